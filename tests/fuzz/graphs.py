"""Random ONNX models, folded without verification and judged from outside.

Values are images, sequences or vectors; batches are always open, other sizes in half of the draws; sizes of different
axes are often equal, so that what lands on the wrong axis still has a shape that fits. A fold is judged in onnxruntime
with optimisations off, on other numbers, on batches of 1, 2, 3 and 5, with other image sizes where those are open, and
with overridden initializers; what differs in float32 is asked again in float64, which no rounding excuses.

Not drawn: recurrent operators, sequences and optionals, quantisation, float16, external data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import bnfold.onnx
from tests.fuzz.drawing import Draw, Features, Unsuitable, apply

Dim = int | str
Shape = tuple[Dim, ...]
Feed = dict[str, np.ndarray[Any, Any]]

OPSET = 18


class Sketch:
    """A model while it is drawn: nodes, tensors, and the shapes of values, with a name for every size that is open."""

    def __init__(self, choices: Random, dtype: Any) -> None:
        self.dtype, self.random = dtype, choices
        self.kind = TensorProto.FLOAT if dtype == np.float32 else TensorProto.DOUBLE
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, np.ndarray[Any, Any]] = {}
        self.inputs: dict[str, Shape] = {}
        self.values: dict[str, Shape] = {}
        self.outputs: list[str] = []
        self.overridable: list[str] = []
        self.functions: list[onnx.FunctionProto] = []
        self.kernels: dict[tuple[int, ...], str] = {}
        self.count = 0
        self.straight = False
        channels, size = choices.choice((4, 4, 2, 6)), choices.choice((4, 4, 6))
        open_sizes = choices.random() < 0.5
        rank = choices.choice((4, 4, 4, 3, 3, 2))
        sizes: tuple[Dim, ...] = ("H", "W") if open_sizes else (size, size)
        self.input("x", ("N", channels, *sizes)[:rank])

    def take(self, random: Random) -> None:
        """Draw the next choices from here."""
        self.random = random

    # -- choices

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def choose(self, *options: Any) -> Any:
        return self.random.choice(options)

    def numbers(self, *shape: int) -> np.ndarray[Any, Any]:
        generator = np.random.default_rng(self.random.randrange(2**32))
        return generator.standard_normal(shape)

    def scales(self, *shape: int) -> np.ndarray[Any, Any]:
        """Positive, of mixed sign, or with zeros."""
        scale = np.exp(self.numbers(*shape) / 3)
        mixed = np.where(self.numbers(*shape) < -0.5, -scale, scale)
        zeros = np.where(self.numbers(*shape) < -0.8, 0.0, mixed)
        return self.choose(scale, scale, mixed, mixed, zeros)  # type: ignore[no-any-return]

    def pick(self, fits: Callable[[Shape], bool] = lambda shape: True) -> str:
        """A value, mostly one of the newest, and the newest of all in a chain."""
        names = [name for name, shape in self.values.items() if fits(shape)]
        if not names or (self.straight and names[-1] != list(self.values)[-1]):
            raise Unsuitable
        return names[-1] if self.straight or self.chance(0.7) else self.choose(*names[-4:], *names)

    # -- parts

    def input(self, name: str, shape: Shape) -> str:
        self.inputs[name] = self.values[name] = shape
        return name

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def store(self, array: Any, whole: bool = False) -> str:
        """A tensor of the model: integers as they are, floats in the model's type."""
        name = f"t{self.name()}"
        self.tensors[name] = np.asarray(array, np.int64 if whole else self.dtype)
        return name

    def constant(self, array: Any) -> str:
        """Numbers in one of the disguises in which a file can hold them."""
        disguise = self.choose(*["stored"] * 6, "node", "identity", "doubled", "turned")
        if disguise == "node":
            value = numpy_helper.from_array(np.asarray(array, self.dtype))
            return self.raw("Constant", [], value=value)
        if disguise == "identity":
            return self.raw("Identity", [self.store(array)])
        if disguise == "doubled":
            return self.raw("Mul", [self.store(np.asarray(array) / 2), self.store(2.0)])
        if disguise == "turned":
            return self.raw("Transpose", [self.store(np.transpose(array))])
        name = self.store(array)
        if self.chance(0.01):
            self.overridable.append(name)
        return name

    def raw(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node, without a shape for what it computes."""
        name = self.name()
        label = f"{op.lower()}{self.count}" if self.chance(0.8) else ""
        self.nodes.append(helper.make_node(op, list(inputs), [name], label, **attributes))
        return name

    def add(self, op: str, inputs: Sequence[str], shape: Sequence[Dim], **attributes: Any) -> str:
        name = self.raw(op, inputs, **attributes)
        self.values[name] = tuple(shape)
        return name

    def size(self, value: str, axis: int) -> str:
        """The size of an axis, computed when the model runs: `(1,)`."""
        return self.raw("Gather", [self.raw("Shape", [value]), self.store([axis], whole=True)])

    def model(self) -> onnx.ModelProto:
        if not self.nodes:
            raise Unsuitable
        read = {name for node in self.nodes for name in node.input}
        made = [name for name in self.values if name not in self.inputs]
        outputs = dict.fromkeys([*self.outputs, *(name for name in made if name not in read)])
        graph = helper.make_graph(
            self.nodes,
            "drawn",
            [self._info(name, shape) for name, shape in self.inputs.items()],
            [self._info(name, [None] * len(self.values[name])) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.tensors.items()],
        )
        graph.input.extend(
            helper.make_tensor_value_info(name, self.kind, self.tensors[name].shape)
            for name in self.overridable
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("local", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=self.functions)

    def _info(self, name: str, shape: Sequence[Any]) -> onnx.ValueInfoProto:
        kind = TensorProto.INT64 if name.startswith("letters") else self.kind
        return helper.make_tensor_value_info(name, kind, shape)


def resized(size: Dim, by: Callable[[int], int], label: str) -> Dim:
    """A size after an operator: a number where it was one, a new name where it was open."""
    return by(size) if isinstance(size, int) else f"{label}({size})"


def has_channels(shape: Shape) -> bool:
    return len(shape) > 1 and isinstance(shape[1], int)


def is_spatial(shape: Shape) -> bool:
    """A value with channels and axes after them that are not too small for a window of three."""
    return (
        len(shape) in (3, 4) and has_channels(shape) and all(isinstance(n, str) or n > 3 for n in shape[2:])
    )


# ---------------------------------------------------------------- BatchNorms and what absorbs them


def norm(s: Sketch, x: str = "") -> str:
    x = x or s.pick(has_channels)
    c = int(s.values[x][1])
    arrays = (s.scales(c), s.numbers(c), s.numbers(c), np.exp(s.numbers(c) / 3))
    epsilon = s.choose(1e-5, 0.1)
    return s.add("BatchNormalization", [x, *map(s.constant, arrays)], s.values[x], epsilon=epsilon)


def spelt(s: Sketch) -> None:
    x = s.pick(has_channels)
    c, rank = int(s.values[x][1]), len(s.values[x])
    shape = (c, *[1] * (rank - 2))
    centred = s.add("Sub", [x, s.store(s.numbers(*shape))], s.values[x])
    scaled = s.add("Div", [centred, s.store(np.exp(s.numbers(*shape) / 3))], s.values[x])
    s.add(
        "Add",
        [s.store(s.numbers(*shape)), s.add("Mul", [scaled, s.store(s.scales(*shape))], s.values[x])],
        s.values[x],
    )


def conv(s: Sketch, x: str = "") -> str:
    x = x or s.pick(is_spatial)
    n, c, *sizes = s.values[x]
    out = s.choose(c, c, 4, 6)
    groups = s.choose(*(g for g in (1, 1, 2, c) if c % g == 0 and out % g == 0))
    kernel, stride = s.choose(1, 1, 2, 3), s.choose(1, 1, 1, 2)
    before, after = s.choose((0, 0), (kernel // 2,) * 2, (0, 1))
    key = (out, c // groups, *[kernel] * len(sizes))
    if key not in s.kernels or s.chance(0.7):
        s.kernels[key] = s.constant(s.numbers(*key) / np.sqrt(np.prod(key[1:])))
    bias = [s.constant(s.numbers(out))] if s.chance(0.4) else []
    label = f"c{kernel}s{stride}p{before + after}"
    shape = [resized(k, lambda k: (k + before + after - kernel) // stride + 1, label) for k in sizes]
    if label in ("c1s1p0", "c3s1p2"):
        shape = sizes
    pads, strides = [before] * len(sizes) + [after] * len(sizes), [stride] * len(sizes)
    return s.add(
        "Conv", [x, s.kernels[key], *bias], (n, out, *shape), group=groups, pads=pads, strides=strides
    )


def deconv(s: Sketch) -> None:
    x = s.pick(is_spatial)
    n, c, *sizes = s.values[x]
    groups = s.choose(*(g for g in (1, 2, c) if c % g == 0))
    kernel, stride = s.choose(1, 2), s.choose(1, 2)
    weight = s.constant(s.numbers(c, 2, *[kernel] * len(sizes)))
    shape = [resized(k, lambda k: (k - 1) * stride + kernel, f"d{kernel}s{stride}") for k in sizes]
    s.add("ConvTranspose", [x, weight], (n, 2 * groups, *shape), group=groups, strides=[stride] * len(sizes))


def gemm(s: Sketch) -> None:
    x = s.pick(lambda shape: len(shape) == 2 and has_channels(shape))
    n, c = s.values[x]
    out, turned = s.choose(c, 4, 5), s.choose(0, 1)
    weight = s.constant(s.numbers(*((out, c) if turned else (c, out))) / np.sqrt(c))
    bias = s.choose([], [s.constant(s.numbers(out))], [s.store(s.numbers())], [s.store(s.numbers(1, out))])
    s.add(
        "Gemm",
        [x, weight, *bias],
        (n, out),
        transB=turned,
        alpha=s.choose(1.0, 0.5),
        beta=s.choose(1.0, -2.0),
    )


def matmul(s: Sketch) -> None:
    x = s.pick(lambda shape: len(shape) > 1 and isinstance(shape[-1], int))
    *rest, c = s.values[x]
    out = s.choose(c, c, 4, 5)
    y = s.add("MatMul", [x, s.constant(s.numbers(c, out) / np.sqrt(c))], (*rest, out))
    if s.chance(0.5):
        terms = [y, s.store(s.numbers(*s.choose((out,), (1, out))))]
        s.add("Add", terms[:: s.choose(1, -1)], (*rest, out))


def left(s: Sketch) -> str:
    """A matrix from the left: its outputs lie on the last axis but one."""
    x = s.pick(lambda shape: len(shape) > 2 and isinstance(shape[-2], int))
    *rest, c, last = s.values[x]
    out = s.choose(c, c, 4, 5)
    y = s.add("MatMul", [s.constant(s.numbers(out, c) / np.sqrt(c)), x], (*rest, out, last))
    return s.add("Add", [y, s.store(s.numbers(out, 1))], (*rest, out, last)) if s.chance(0.4) else y


def left_and_norm(s: Sketch) -> None:
    """A matrix from the left whose product is normalised, and read by somebody else as well."""
    y = left(s)
    if has_channels(s.values[y]):
        norm(s, y)
    if s.chance(0.7):
        s.add("Tanh", [y], s.values[y])


def recurrent(s: Sketch) -> None:
    """A recurrent layer over the last of three axes, which somebody normalises first or reads as well, now and then."""
    x = s.pick(lambda shape: len(shape) == 3 and isinstance(shape[1], int) and isinstance(shape[2], int))
    if s.chance(0.7):
        x = norm(s, x)
        steps, c, batch = s.values[x]
        x = s.add("Transpose", [x], (steps, batch, c), perm=[0, 2, 1])
    steps, batch, c = s.values[x]
    op, ways = s.choose("LSTM", "GRU", "GRU", "RNN"), s.choose(1, 2)
    rows = 3 * {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    numbers = [s.constant(s.numbers(ways, rows, c) / np.sqrt(c)), s.constant(s.numbers(ways, rows, 3) / 2)]
    if s.chance(0.6):
        numbers.append(s.constant(s.numbers(ways, 2 * rows)))
    more = {"linear_before_reset": s.choose(0, 1)} if op == "GRU" else {}
    way = ("forward", "bidirectional")[ways - 1]
    s.add(op, [x, *numbers], (steps, ways, batch, 3), hidden_size=3, direction=way, **more)


def embedding(s: Sketch) -> None:
    letters = (
        s.input(f"letters{s.count}", ("N", 4)) if s.chance(0.5) else s.input(f"letters{s.count}", ("N",))
    )
    shape = s.inputs.pop(letters)
    s.values.pop(letters)
    s.inputs[letters] = shape
    s.add("Gather", [s.constant(s.numbers(7, 4)), letters], (*shape, 4))


# ---------------------------------------------------------------- one value


def elementwise(s: Sketch) -> None:
    x = s.pick()
    op = s.choose(
        "Relu", "Relu", "LeakyRelu", "Tanh", "Sigmoid", "Abs", "Neg", "Identity", "Dropout", "Softplus"
    )
    s.add(op, [x], s.values[x])


def arithmetic(s: Sketch) -> None:
    """A constant added to, multiplied with or divided by, along any of the axes."""
    x = s.pick()
    sizes = [n if axis and isinstance(n, int) and s.chance(0.5) else 1 for axis, n in enumerate(s.values[x])]
    op = s.choose("Add", "Sub", "Mul", "Div")
    terms = [x, s.store(np.exp(s.numbers(*sizes)) if op == "Div" else s.scales(*sizes))]
    s.add(op, terms[:: 1 if op == "Div" else s.choose(1, -1)], s.values[x])


def pool(s: Sketch) -> None:
    x = s.pick(is_spatial)
    n, c, *sizes = s.values[x]
    pad, op = s.choose(0, 1), s.choose("MaxPool", "AveragePool")
    more = {"count_include_pad": s.choose(0, 1)} if op == "AveragePool" else {}
    shape = [resized(k, lambda k: k + 2 * pad - 1, f"p{pad}") for k in sizes]
    rank = len(sizes)
    s.add(op, [x], (n, c, *shape), kernel_shape=[2] * rank, pads=[pad] * 2 * rank, **more)


def reduce(s: Sketch) -> None:
    x = s.pick(lambda shape: len(shape) > 2)
    shape = s.values[x]
    axes = s.choose([-1], [1], list(range(2, len(shape))))
    keep, op = s.choose(0, 1), s.choose("ReduceMean", "ReduceSum", "ReduceMax")
    gone = {axis % len(shape) for axis in axes}
    left_over = [1 if axis in gone else n for axis, n in enumerate(shape) if keep or axis not in gone]
    s.add(op, [x, s.store(axes, whole=True)], left_over, keepdims=keep)


def pad(s: Sketch) -> None:
    """A Pad of nothing, of one, or by what the size of the image lacks to an even number."""
    x = s.pick(is_spatial)
    rank, kind = len(s.values[x]), s.choose("none", "one", "computed", "computed")
    mode = s.choose("constant", "constant", "edge", "reflect")
    zeros = s.store([0] * (2 * rank - 1), whole=True)
    amount = s.store([int(kind == "one")], whole=True)
    if kind == "computed":
        amount = s.raw("Mod", [s.size(x, rank - 1), s.store([2], whole=True)])
    last = resized(s.values[x][-1], lambda k: k + (k % 2 if kind == "computed" else kind == "one"), kind)
    last = s.values[x][-1] if kind == "none" else last
    s.add("Pad", [x, s.raw("Concat", [zeros, amount], axis=0)], (*s.values[x][:-1], last), mode=mode)


def crop(s: Sketch) -> None:
    """A Slice up to a computed end: to an even number, or all but one."""
    x = s.pick(is_spatial)
    size, two = s.size(x, -1), s.store([2], whole=True)
    kind = s.choose("even", "less")
    end = s.raw("Sub", [size, s.raw("Mod", [size, two]) if kind == "even" else s.store([1], whole=True)])
    last = resized(s.values[x][-1], lambda k: k - (k % 2 if kind == "even" else 1), kind)
    bounds = [s.store([0], whole=True), end, s.store([-1], whole=True)]
    s.add("Slice", [x, *bounds], (*s.values[x][:-1], last))


def channels(s: Sketch) -> None:
    """Some of the channels: every second, backwards, by index with repetitions, or the parts of a Split."""
    x = s.pick(has_channels)
    n, c, *rest = s.values[x]
    kind = s.choose("slice", "gather", "split")
    if kind == "slice":
        step = s.choose(1, 2, -1)
        bounds = [s.store([k], whole=True) for k in ((0, c) if step > 0 else (-1, -c - 1))]
        shape = (n, len(range(int(c))[::step]), *rest)
        s.add("Slice", [x, *bounds, s.store([1], whole=True), s.store([step], whole=True)], shape)
    elif kind == "gather":
        places = [s.random.randrange(int(c)) for _ in range(s.choose(c, 4))]
        s.add("Gather", [x, s.store(places, whole=True)], (n, len(places), *rest), axis=1)
    elif c > 1:
        first, second = s.name(), s.name()
        s.nodes.append(
            helper.make_node("Split", [x, s.store([1, c - 1], whole=True)], [first, second], axis=1)
        )
        s.values |= {first: (n, 1, *rest), second: (n, c - 1, *rest)}


def transpose(s: Sketch) -> None:
    x = s.pick(lambda shape: len(shape) > 2)
    order = list(range(1, len(s.values[x])))
    s.random.shuffle(order)
    perm = [0, *order] if s.chance(0.9) else [order[0], 0, *order[1:]]
    s.add("Transpose", [x], [s.values[x][axis] for axis in perm], perm=perm)


def reshape(s: Sketch) -> None:
    """Positions in one axis, a shuffle of channels, or all in one; by stored or by computed sizes."""
    x = s.pick(lambda shape: len(shape) == 4 and has_channels(shape))
    n, c, h, w = s.values[x]
    kind = s.choose("positions", "shuffle", "flatten", "computed")
    if kind == "positions":
        both = h * w if isinstance(h, int) and isinstance(w, int) else f"{h}*{w}"
        s.add("Reshape", [x, s.store([0, 0, -1], whole=True)], (n, c, both))
    elif kind == "flatten" and isinstance(h, int) and isinstance(w, int):
        s.add("Flatten", [x], (n, int(c) * h * w))
    elif c % 2 == 0:
        sizes = [s.size(x, 0), s.store([2, c // 2], whole=True), s.size(x, 2), s.size(x, 3)]
        target = (
            s.raw("Concat", sizes, axis=0)
            if kind == "computed"
            else s.store([0, 2, c // 2, 0, -1], whole=True)
        )
        if kind == "shuffle":
            target = s.raw("Concat", sizes, axis=0)
        y = s.add("Reshape", [x, target], (n, 2, c // 2, h, w))
        y = s.add("Transpose", [y], (n, c // 2, 2, h, w), perm=[0, 2, 1, 3, 4])
        s.add("Reshape", [y, s.raw("Shape", [x])], (n, c, h, w))


def resize(s: Sketch) -> None:
    x = s.pick(lambda shape: is_spatial(shape) and len(shape) == 4 and shape[3] not in range(12, 99))
    n, c, h, w = s.values[x]
    scales, mode = s.store([1, 1, 2, 2]), s.choose("nearest", "linear")
    s.tensors[scales] = s.tensors[scales].astype(np.float32)
    shape = (n, c, *(resized(k, lambda k: 2 * k, "twice") for k in (h, w)))
    s.add("Resize", [x, "", scales], shape, mode=mode)


def repeated(s: Sketch) -> None:
    """An average over the positions, spread over them again."""
    x = s.pick(is_spatial)
    n, c, *sizes = s.values[x]
    small = s.add("GlobalAveragePool", [x], (n, c, *[1] * len(sizes)))
    s.add("Expand", [small, s.raw("Shape", [x])], s.values[x])


def blocks(s: Sketch) -> None:
    x = s.pick(lambda shape: len(shape) == 4 and has_channels(shape) and shape[1] % 4 == 0)  # type: ignore[operator]
    n, c, h, w = s.values[x]
    shape = (n, c // 4, *(resized(k, lambda k: 2 * k, "blocks") for k in (h, w)))
    s.add("DepthToSpace", [x], shape, blocksize=2, mode=s.choose("DCR", "CRD"))


# ---------------------------------------------------------------- several values


def tap(s: Sketch) -> None:
    """A value that the caller sees as well."""
    name = s.pick()
    if name not in s.inputs:
        s.outputs.append(name)


def combine(s: Sketch) -> None:
    x = s.pick()
    y = s.pick(lambda shape: shape == s.values[x])
    op = s.choose("Add", "Add", "Sub", "Mul", "Max", "Sum", "gate")
    if op == "gate":
        op, y = "Mul", s.add("Sigmoid", [y], s.values[x])
    s.add(op, [x, y], s.values[x])


def concat(s: Sketch) -> None:
    x = s.pick(has_channels)
    n, c, *rest = s.values[x]
    y = s.pick(lambda shape: has_channels(shape) and [shape[0], *shape[2:]] == [n, *rest])
    both = c + s.values[y][1]  # type: ignore[operator]
    if both <= 16:
        s.add("Concat", [x, y], (n, both, *rest), axis=1)


def call_function(s: Sketch) -> None:
    """A function of the model's own with a convolution, a BatchNorm or both in it, called once or twice."""
    x = s.pick(is_spatial)
    _, c, *sizes = s.values[x]
    kernel = s.store(s.numbers(c, c, *[1] * len(sizes)) / np.sqrt(int(c)))
    statistics = [s.store(a) for a in (s.scales(c), s.numbers(c), s.numbers(c), np.exp(s.numbers(c)))]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("BatchNormalization", ["h", "s", "b", "m", "v"], ["y"]),
    ]
    name, opset = f"F{s.count}", helper.make_opsetid("", s.choose(OPSET, OPSET, OPSET - 1))
    s.functions.append(helper.make_function("local", name, list("xwsbmv"), ["y"], nodes, [opset]))
    for _ in range(s.choose(1, 2)):
        x = s.add(name, [x, kernel, *statistics], s.values[x], domain="local")


def branch(s: Sketch) -> None:
    """An If on the size of the batch, with a BatchNorm in one of its bodies that reads a value from outside."""
    x = s.pick(has_channels)
    outer, s.nodes = s.nodes, []
    then_value = norm(s, x)
    inside, s.nodes = s.nodes, outer
    s.values.pop(then_value)
    other = s.name()
    bodies = {
        "then_branch": (inside, then_value),
        "else_branch": ([helper.make_node("Neg", [x], [other])], other),
    }
    graphs = {
        key: helper.make_graph(nodes, key, [], [s._info(value, [None] * len(s.values[x]))])
        for key, (nodes, value) in bodies.items()
    }
    condition = s.raw("Greater", [s.size("x", 0), s.store([2], whole=True)])
    s.add("If", [condition], s.values[x], **graphs)


def loop(s: Sketch) -> None:
    """A Loop over the batch's size whose body adds a value from outside to what it carries."""
    x = s.pick(has_channels)
    start, rank = s.pick(lambda shape: shape == s.values[x]), len(s.values[x])
    step, keep, carried, result, going = (s.name() for _ in range(5))
    nodes = [
        helper.make_node("Identity", [keep], [going]),
        helper.make_node("Add", [carried, x], [result]),
    ]
    scalar = [
        helper.make_tensor_value_info(step, TensorProto.INT64, []),
        helper.make_tensor_value_info(keep, TensorProto.BOOL, []),
    ]
    inputs = [*scalar, s._info(carried, [None] * rank)]
    outputs = [helper.make_tensor_value_info(going, TensorProto.BOOL, []), s._info(result, [None] * rank)]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    times = s.raw("Squeeze", [s.size("x", 0)])
    s.add("Loop", [times, "", start], s.values[x], body=body)


def chain(s: Sketch) -> None:
    """A BatchNorm and what could absorb it, in any order, with something between that passes it on or does not."""
    ends: list[Callable[..., object]] = [norm, s.choose(conv, conv, deconv, matmul, gemm, left)]
    s.random.shuffle(ends)
    between = [
        s.choose(
            elementwise, pool, reduce, pad, crop, channels, transpose, reshape, resize, blocks, arithmetic
        )
    ]
    s.straight = True
    try:
        for add in (ends[0], *between * s.choose(0, 1, 1, 1), ends[1]):
            add(s)
    finally:
        s.straight = False


# ---------------------------------------------------------------- blocks of linear operators


@dataclass(frozen=True)
class Slide:
    """How every term of a sum slides, so that their outputs are of one size whatever their kernels are."""

    stride: int
    slack: int

    def over(self, sizes: Sequence[Dim]) -> list[Dim]:
        """The sizes that come of it."""
        if (self.stride, self.slack) == (1, 0):
            return list(sizes)
        label = f"s{self.stride}k{self.slack}"
        return [resized(k, lambda k: (k + self.slack - 1) // self.stride + 1, label) for k in sizes]


def slide(s: Sketch) -> Slide:
    """Mostly one that keeps sizes; otherwise one that leaves something of each."""
    others = (Slide(2, 0), Slide(1, -1), Slide(1, -2), Slide(1, 1), Slide(2, -1))
    return Slide(1, 0) if s.chance(0.5) else s.choose(*others)  # type: ignore[no-any-return]


def slid(s: Sketch, x: str, out: int, how: Slide, kernel: int = 0) -> str:
    """A convolution of any kernel, dilation, groups and pads that slides so."""
    n, c, *sizes = s.values[x]
    least = 1 if how.slack >= 0 else 1 - how.slack
    kernels = [kernel or max(least, s.choose(1, 1, 2, 3, 3, 4)) for _ in sizes]
    steps = [1 if kernel else s.choose(1, 1, 1, 2) for _ in sizes]
    total = [(k - 1) * step + how.slack for k, step in zip(kernels, steps, strict=True)]
    before = [s.choose(each // 2, each // 2, s.random.randint(0, each)) for each in total]
    after = [each - first for each, first in zip(total, before, strict=True)]
    groups = s.choose(*(g for g in (1, 1, 1, 2, c, c) if c % g == 0 and out % g == 0))
    settings: dict[str, Any] = {
        "pads": [*before, *after],
        "strides": [how.stride] * len(sizes),
        "dilations": steps,
    }
    if how == Slide(1, 0) and s.chance(0.2):
        settings = {"auto_pad": s.choose("SAME_UPPER", "SAME_LOWER")}
    key = (out, int(c) // groups, *kernels)
    if key not in s.kernels or s.chance(0.8):
        s.kernels[key] = s.constant(s.numbers(*key) / np.sqrt(np.prod(key[1:])))
    bias = [s.constant(s.numbers(out))] if s.chance(0.3) else []
    shape = (n, out, *how.over(sizes))
    return s.add("Conv", [x, s.kernels[key], *bias], shape, group=groups, **settings)


def mean(s: Sketch, x: str, how: Slide) -> str:
    """An average pool that slides so; it counts what it pads, mostly."""
    n, c, *sizes = s.values[x]
    size = 1 - how.slack + s.choose(0, 1, 2, 2)
    total = size - 1 + how.slack
    before = s.choose(total // 2, min(total, size - 1))
    pads = [before] * len(sizes) + [min(total - before, size - 1)] * len(sizes)
    if total - before > size - 1 or before > size - 1:
        raise Unsuitable
    more = {"count_include_pad": s.choose(1, 1, 0), "ceil_mode": int(how.stride == 1 and s.chance(0.25))}
    kernel, strides = [size] * len(sizes), [how.stride] * len(sizes)
    shape = (n, c, *how.over(sizes))
    return s.add("AveragePool", [x], shape, kernel_shape=kernel, strides=strides, pads=pads, **more)


def per_channel(s: Sketch, x: str, axis: int = 1) -> str:
    """An affine map of each channel, or of all of them alike: a BatchNorm, or arithmetic with a constant."""
    if axis == 1 and s.chance(0.3):
        return norm(s, x)
    c, rank = s.values[x][axis], len(s.values[x])
    sizes = s.choose([c] + [1] * (rank - axis - 1), [1] * rank, [])
    op = s.choose("Mul", "Add", "Sub", "Neg", "Div")
    if op == "Neg":
        return s.add(op, [x], s.values[x])
    terms = [x, s.store(np.exp(s.numbers(*sizes)) if op == "Div" else s.scales(*sizes))]
    return s.add(op, terms[:: 1 if op == "Div" else s.choose(1, -1)], s.values[x])


def passed(s: Sketch, x: str) -> str:
    """A value, a copy of it, or nothing added to it; seldom, somebody else reads it too."""
    if s.chance(0.05):
        s.outputs.append(x)
    elif s.chance(0.04):
        s.add(s.choose("Tanh", "Abs"), [x], s.values[x])
    elif s.chance(0.06):
        like = s.pick(lambda shape: shape == s.values[x])
        s.add("Reshape", [like, s.raw("Shape", [x])], s.values[x])
    if s.chance(0.84):
        return x
    op = s.choose("Identity", "Dropout", "Add", "Sub", "Mul", "Div")
    neutral = (
        [] if op in ("Identity", "Dropout") else [s.store(np.full(s.choose((), (1,)), op in ("Mul", "Div")))]
    )
    return s.add(op, [x, *neutral], s.values[x])


def image_term(s: Sketch, x: str, out: int, how: Slide) -> str:
    """A linear operator on an image."""
    c, keeps = int(s.values[x][1]), how == Slide(1, 0)
    kinds = ["one"] * 4 + ["narrow", "wide", "scaled"]
    kinds += ["mean", "mean"] * (c == out) + ["itself", "affine"] * (c == out and keeps)
    kind = s.choose(*kinds)
    if kind == "itself":
        return x
    if kind == "affine":
        return per_channel(s, x)
    if kind == "mean":
        return mean(s, x, how)
    if kind == "narrow":
        thin = s.choose(1, 2, c)
        return slid(s, passed(s, slid(s, x, thin, Slide(1, 0), 1)), out, how)
    if kind == "wide":
        return slid(s, passed(s, slid(s, x, s.choose(2, out), how)), out, Slide(1, 0), 1)
    y = slid(s, x, out, how)
    return per_channel(s, passed(s, y)) if kind == "scaled" else y


def matrix_term(s: Sketch, x: str, out: int) -> str:
    """A linear operator along the last axis."""
    c = s.values[x][-1]
    kind = s.choose("one", "one", "two", "two", *["itself", "affine"] * (c == out))
    if kind == "itself":
        return x
    if kind == "affine":
        return per_channel(s, x, len(s.values[x]) - 1)
    if kind == "two":
        x = passed(s, multiplied(s, x, s.choose(1, 2, out)))
        return multiplied(s, per_channel(s, x, len(s.values[x]) - 1) if s.chance(0.3) else x, out)
    return multiplied(s, x, out)


def multiplied(s: Sketch, x: str, out: int) -> str:
    """A matrix from the right, as a Gemm or a MatMul, with a bias of any shape or without."""
    *rest, c = s.values[x]
    shape, scale = (*rest, out), np.sqrt(int(c))
    biases: list[tuple[int, ...]] = [(out,), (1, out), (1,), (1, 1)]
    if len(rest) == 1 and s.chance(0.5):
        turned, bias = s.choose(0, 1), s.choose(None, (), *biases)
        weight = s.constant(s.numbers(*((out, c) if turned else (c, out))) / scale)
        numbers = [] if bias is None else [s.store(s.numbers(*bias))]
        alpha, beta = s.choose(1.0, 0.5), s.choose(1.0, -2.0)
        return s.add("Gemm", [x, weight, *numbers], shape, transB=turned, alpha=alpha, beta=beta)
    around = (1,) * s.choose(0, 0, len(rest) - 1)
    y = s.add("MatMul", [x, s.constant(s.numbers(*around, c, out) / scale)], shape)
    return s.add("Add", [y, s.store(s.numbers(*s.choose(*biases[:3])))], shape) if s.chance(0.4) else y


def summed(s: Sketch, terms: list[str]) -> str:
    """A sum in any order and form, with a difference or a stranger in it."""
    shape = s.values[terms[0]]
    if s.chance(0.3):
        terms.append(s.pick(lambda other: other == shape))
    s.random.shuffle(terms)
    while len(terms) > 1:
        count = s.choose(2, 2, min(len(terms), s.choose(3, 4)))
        op = "Sum" if count > 2 else s.choose("Add", "Add", "Add", "Sum", "Sub")
        some, terms = [terms.pop(0) for _ in range(count)], terms
        terms.insert(s.choose(0, 0, len(terms)), passed(s, s.add(op, some, shape)))
    return s.add("Sum", terms, shape) if s.chance(0.1) else terms[0]


def branches(s: Sketch) -> None:
    """A sum of linear operators on one image, as in RepVGG or MobileOne, and a nonlinearity below it."""
    x = s.pick(is_spatial)
    how, out = slide(s), s.choose(int(s.values[x][1]), int(s.values[x][1]), 4)
    last(s, summed(s, [passed(s, image_term(s, x, out, how)) for _ in range(s.choose(2, 2, 3, 4))]))


def low_rank(s: Sketch) -> None:
    """A sum of matrix products of one value, as in LoRA."""
    x = s.pick(lambda shape: len(shape) > 1 and isinstance(shape[-1], int))
    out = s.choose(int(s.values[x][-1]), 4)
    last(s, summed(s, [passed(s, matrix_term(s, x, out)) for _ in range(s.choose(2, 2, 3))]))


def last(s: Sketch, x: str) -> None:
    """What ends a block, mostly."""
    if s.chance(0.6):
        s.add(s.choose("Relu", "Tanh"), [x], s.values[x])


def sequence(s: Sketch) -> None:
    """Linear operators one after another."""
    x = s.pick(lambda shape: is_spatial(shape) or (len(shape) > 1 and isinstance(shape[-1], int)))
    for _ in range(s.choose(2, 2, 3)):
        if is_spatial(s.values[x]) and s.chance(0.8):
            c = int(s.values[x][1])
            x = image_term(s, x, s.choose(c, 2, 4), slide(s))
        elif is_spatial(s.values[x]) or len(s.values[x]) == 2:
            x = matrix_term(s, x, s.choose(3, 4)) if isinstance(s.values[x][-1], int) else x
        x = passed(s, x)
    last(s, x)


def turned(s: Sketch) -> None:
    """Matrices that multiply from the left, or that read the first of two axes."""
    x = s.pick(lambda shape: len(shape) > 1 and isinstance(shape[-2], int))
    for _ in range(s.choose(1, 2)):
        *rest, c, width = s.values[x]
        out = s.choose(c, 2, 4)
        if len(s.values[x]) == 2 and s.chance(0.5):
            weight = s.constant(s.numbers(c, out) / np.sqrt(int(c)))
            x = s.add("Gemm", [x, weight, s.store(s.numbers(out))], (width, out), transA=1)
            if not isinstance(width, int):
                return
        else:
            x = s.add("MatMul", [s.constant(s.numbers(out, c) / np.sqrt(int(c))), x], (*rest, out, width))
            x = s.add("Add", [x, s.store(s.numbers(out, 1))], (*rest, out, width)) if s.chance(0.4) else x


def looked_up(s: Sketch) -> None:
    """An embedding and linear operators on what it gives."""
    embedding(s)
    x = list(s.values)[-1]
    last(s, matrix_term(s, x, s.choose(2, 4)) if s.chance(0.5) else summed(s, [matrix_term(s, x, 4), x]))


def inside(s: Sketch) -> None:
    """A block half of which, or all of which, stands in the body of an If; or one that a body reads from."""
    x = s.pick(is_spatial)
    c = int(s.values[x][1])
    outside = slid(s, x, c, Slide(1, 0)) if s.chance(0.6) else x
    known, outer, s.nodes = dict(s.values), s.nodes, []
    y = slid(s, outside, c, Slide(1, 0), 1)
    y = s.add("Add", [y, s.choose(x, slid(s, outside, c, Slide(1, 0)))], s.values[x]) if s.chance(0.6) else y
    within, s.nodes = s.nodes, outer
    other = s.name()
    s.values = known
    rank = len(s.values[x])
    graphs = {
        "then_branch": helper.make_graph(within, "then", [], [s._info(y, [None] * rank)]),
        "else_branch": helper.make_graph(
            [helper.make_node("Neg", [outside], [other])], "else", [], [s._info(other, [None] * rank)]
        ),
    }
    condition = s.raw("Greater", [s.size("x", 0), s.store([2], whole=True)])
    result = s.add("If", [condition], s.values[x], **graphs)
    s.add("Add", [result, s.choose(x, outside)], s.values[x])


FEATURES: Features = {
    "chain": (16, chain),
    "norm": (10, norm),
    "spelt": (2, spelt),
    "conv": (10, conv),
    "deconv": (2, deconv),
    "gemm": (3, gemm),
    "matmul": (4, matmul),
    "left": (1, left),
    "left and norm": (2, left_and_norm),
    "recurrent": (3, recurrent),
    "embedding": (1, embedding),
    "elementwise": (5, elementwise),
    "arithmetic": (3, arithmetic),
    "pool": (3, pool),
    "reduce": (2, reduce),
    "pad": (3, pad),
    "crop": (2, crop),
    "channels": (3, channels),
    "transpose": (4, transpose),
    "reshape": (3, reshape),
    "resize": (1, resize),
    "repeated": (1, repeated),
    "blocks": (1, blocks),
    "tap": (3, tap),
    "combine": (5, combine),
    "concat": (3, concat),
    "call function": (2, call_function),
    "branch": (2, branch),
    "loop": (1, loop),
    "branches": (6, branches),
    "low rank": (3, low_rank),
    "sequence": (4, sequence),
    "turned": (1, turned),
    "looked up": (2, looked_up),
    "inside": (1, inside),
}
"""How often each is drawn, and what adds it. A new feature is a row here."""


# ---------------------------------------------------------------- folding and judging


def build(one: Draw, dtype: Any = np.float32) -> onnx.ModelProto:
    sketch = Sketch(one.choices(), dtype)
    apply(FEATURES, one, sketch, Sketch.take)
    return sketch.model()


def options(one: Draw) -> dict[str, Any]:
    random = Random(f"options {one.seed}")
    return {
        "runtime": "any",
        "duplicate": random.random() < 0.4,
        "halves": random.random() < 0.8,
        "lower": random.random() < 0.2,
    }


def feeds(model: onnx.ModelProto) -> Iterator[Feed]:
    """Other numbers in batches of 1, 2, 3 and 5, in two sizes where they are open, and once with new initializers."""
    stored = {tensor.name for tensor in model.graph.initializer}
    for number, (batch, height, width) in enumerate([(2, 6, 6), (1, 7, 5), (3, 4, 7), (5, 9, 8)]):
        random, sizes = np.random.default_rng(number), {"N": batch, "H": height, "W": width}
        feed = {}
        for item in model.graph.input:
            if item.name in stored and number != 2:
                continue
            kind = item.type.tensor_type
            shape = [sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in kind.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            whole = kind.elem_type == TensorProto.INT64
            array = random.integers(0, 7, shape) if whole else np.abs(random.standard_normal(shape)) + 0.1
            feed[item.name] = (array if whole or item.name in stored else 2 * array - 1.5).astype(dtype)
        yield feed


Run = Callable[[Feed], list[Any]]


def runtime(model: onnx.ModelProto) -> Run:
    """A model in onnxruntime, as it is."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.log_severity_level, settings.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
    return lambda feed: list(session.run(None, feed))


def reference(model: onnx.ModelProto) -> Run:
    """A model in ONNX's reference implementation, which has float64 for everything."""
    evaluator = ReferenceEvaluator(model)
    return lambda feed: list(evaluator.run(None, feed))


def _results(run: Run, given: Sequence[Feed]) -> list[Any]:
    """What a model computes of each feed; None where it cannot."""
    results: list[Any] = []
    for feed in given:
        try:
            results.append(run(feed))
        except Exception:  # noqa: BLE001 an image that was cropped to nothing
            results.append(None)
    return results


def deviation(
    model: onnx.ModelProto, folded: onnx.ModelProto, start: Callable[[onnx.ModelProto], Run]
) -> float:
    """How far the outputs of a folded model are off, at most, relative to the largest element of each.

    Raises:
        Unsuitable: the model does not run by itself.
    """
    given = list(feeds(model))
    try:
        wanted = _results(start(model), given)
    except Exception as error:
        raise Unsuitable from error
    if all(each is None for each in wanted):
        raise Unsuitable
    worst = 0.0
    for before, after in zip(wanted, _results(start(folded), given), strict=True):
        if before is not None:
            worst = max([worst, *(map(_distance, before, after) if after is not None else [np.inf])])
    return worst


def _distance(before: Any, after: Any) -> float:
    if np.shape(before) != np.shape(after):
        return float("inf")
    before, after = np.asarray(before, float), np.asarray(after, float)
    peak = max(1e-3, float(np.max(np.abs(before), initial=0, where=np.isfinite(before))))
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0, np.abs(before - after))
    return float(np.max(np.where(np.isnan(off), np.inf, off), initial=0)) / peak


def judge(one: Draw) -> str:
    """What is wrong with the fold of a draw; nothing where it is right."""
    model = build(one)
    try:
        runtime(model)
    except Exception as error:
        raise Unsuitable from error
    before = model.SerializeToString(deterministic=True)
    try:
        folded, _ = bnfold.onnx.fold(model, verify=False, **options(one))
    except Exception as error:  # noqa: BLE001 the model is sound, so whatever comes out is the finding
        return f"{type(error).__name__}: {' '.join(str(error).split()):.200}, with {options(one)}"
    if model.SerializeToString(deterministic=True) != before:
        return "the caller's model was changed"
    try:
        onnx.checker.check_model(folded, full_check=True)
        off = deviation(model, folded, runtime)
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        return f"the folded model is not valid: {' '.join(str(error).split()):.200}"
    if off < 1e-3:
        return ""
    return _judge_widely(one, off)


def _judge_widely(one: Draw, off: float) -> str:
    """Ask again in float64; a difference that is none there is rounding, unless it is a large one."""
    model = build(one, np.float64)
    try:
        wide = deviation(model, bnfold.onnx.fold(model, verify=False, **options(one))[0], reference)
    except Exception:  # noqa: BLE001 an operator that the reference implementation lacks in float64
        wide = off
    return f"{off:.1e} off in float32, {wide:.1e} in float64, with {options(one)}" if wide > 1e-9 else ""
