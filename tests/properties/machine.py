"""A machine that computes a `Graph` in float64 NumPy, and one that draws random graphs from the table's rows.

The machine shares no code with the rows: it knows what each operator computes, not how an affine passes it. A linear
operator's weights are folded by `Linear.fold`, which has tests of its own against hand calculations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from bnfold.algebra import Affine, Linear
from bnfold.ir import Graph, Node

Arrays = dict[str, np.ndarray]


def run(graph: Graph, weights: dict[str, Any], inputs: Arrays) -> Arrays:
    """Compute every value of a graph; `weights` holds `(weight, bias)` by the name of a linear node's site."""
    values = dict(inputs)
    for node in graph.nodes:
        results = COMPUTE[node.op](node, weights, *[values[name] for name in node.inputs])
        results = results if isinstance(results, tuple) else (results,)
        values.update(zip(node.outputs, results, strict=True))
    return values


def _conv(node: Node, weights: dict[str, Any], x: np.ndarray) -> np.ndarray:
    weight, bias = node.linear.fold(*weights[node.place])
    pad, kernel, groups = node.attributes["pad"], weight.shape[2], node.linear.groups
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    stride = node.attributes["stride"]
    windows = sliding_window_view(x, (kernel, kernel), axis=(2, 3))[:, :, ::stride, ::stride]
    n, c, h, w = windows.shape[:4]
    grouped = windows.reshape(n, groups, c // groups, h, w, kernel, kernel)
    y = np.einsum("ngihwkl,goikl->ngohw", grouped, weight.reshape(groups, -1, *weight.shape[1:]))
    y = y.reshape(n, -1, h, w)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


def _conv_transpose(node: Node, weights: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Kernel equal to stride: every input position paints its own block."""
    weight, bias = node.linear.fold(*weights[node.place])
    groups, k = node.linear.groups, weight.shape[2]
    n, _, h, w = x.shape
    y = np.einsum(
        "ngihw,giokl->ngohkwl", x.reshape(n, groups, -1, h, w), weight.reshape(groups, -1, *weight.shape[1:])
    )
    y = y.reshape(n, -1, h * k, w * k)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


def _matmul(node: Node, weights: dict[str, Any], x: np.ndarray) -> np.ndarray:
    weight, bias = node.linear.fold(*weights[node.place])
    y = x @ (weight.T if node.linear.order == "oi" else weight)
    return y if bias is None else y + bias


def _einsum(node: Node, weights: dict[str, Any], *xs: np.ndarray) -> np.ndarray:
    if node.linear is None:
        places = iter(xs)
        operands = [
            weights[node.name][0] if part == "w" else next(places) for part in node.attributes["operands"]
        ]
        return np.einsum(node.attributes["equation"], *operands)
    weight, bias = node.linear.fold(*weights[node.place])
    matrix = weight if node.linear.order == "oi" else weight.T
    y = np.moveaxis(np.moveaxis(xs[0], node.linear.in_axis, -1) @ matrix.T, -1, node.linear.out_axis)
    if bias is None:
        return y
    return y + bias.reshape(-1, *[1] * (y.ndim - 1 - node.linear.out_axis))


def _bilinear(node: Node, weights: dict[str, Any], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    weight, bias = node.linear.fold(*weights[node.place])
    made = np.einsum("...i,oij,...j->...o", x, weight, y)
    return made if bias is None else made + bias


def _deformable(node: Node, weights: dict[str, Any], x: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """A kernel of 2x1 whose taps are moved by whole steps, another way at each position; zeros lie outside."""
    weight, bias = node.linear.fold(*weights[node.place])
    n, c, h, w = x.shape
    groups = node.linear.groups
    steps = np.rint(moves).astype(int).reshape(n, 2, 2, h, w)
    around = np.pad(x, [(0, 0), (0, 0), (9, 9), (9, 9)])
    rows, columns = np.mgrid[9 : 9 + h, 9 : 9 + w]
    taps = [
        np.stack(
            [
                each[
                    :,
                    np.clip(rows + tap + move[tap, 0], 0, h + 17),
                    np.clip(columns + move[tap, 1], 0, w + 17),
                ]
                for each, move in zip(around, steps, strict=True)
            ]
        )
        for tap in range(2)
    ]
    seen = np.stack(taps, -1).reshape(n, groups, c // groups, h, w, 2)
    y = np.einsum("ngihwk,goik->ngohw", seen, weight.reshape(groups, -1, c // groups, 2))
    y = y.reshape(n, -1, h, w)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


def _embedding(node: Node, weights: dict[str, Any], x: np.ndarray) -> np.ndarray:
    table, bias = node.linear.fold(*weights[node.place])
    y = table[np.abs(np.rint(x * 7)).astype(int) % len(table)]
    return y if bias is None else y + bias


def _windows(node: Node, x: np.ndarray, fill: float) -> np.ndarray:
    pad = node.attributes.get("pad", 0)
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)], constant_values=fill)
    seen = sliding_window_view(x, (2, 2), axis=(2, 3))[:, :, ::2, ::2]
    return seen.reshape(*seen.shape[:4], 4)


def _norm(node: Node, x: np.ndarray, order: int) -> np.ndarray:
    total = (np.abs(x) ** order).sum(node.attributes["axes"], keepdims=node.attributes["keepdims"])
    return total ** (1 / order)


def _max_pool(node: Node, weights: dict[str, Any], x: np.ndarray) -> Any:
    """The largest of each window and, where a second output is drawn, the first that is it, rounding aside."""
    seen = _windows(node, x, -np.inf)
    most = seen.max(-1, keepdims=True)
    nearly = seen >= most - 1e-9 * (1 + np.abs(most))
    return most[..., 0] if len(node.outputs) == 1 else (most[..., 0], nearly.argmax(-1))


def _depth_to_space(x: np.ndarray, block: int, mode: str) -> np.ndarray:
    n, c, h, w = x.shape
    deep = c // block**2
    if mode == "CRD":
        return (
            x.reshape(n, deep, block, block, h, w)
            .transpose(0, 1, 4, 2, 5, 3)
            .reshape(n, deep, h * block, w * block)
        )
    return (
        x.reshape(n, block, block, deep, h, w)
        .transpose(0, 3, 4, 1, 5, 2)
        .reshape(n, deep, h * block, w * block)
    )


def _space_to_depth(x: np.ndarray, block: int, mode: str) -> np.ndarray:
    n, c, h, w = x.shape
    tall = x.reshape(n, c, h // block, block, w // block, block)
    order = (0, 1, 3, 5, 2, 4) if mode == "CRD" else (0, 3, 5, 1, 2, 4)
    return tall.transpose(order).reshape(n, c * block**2, h // block, w // block)


def _pad(node: Node, x: np.ndarray) -> np.ndarray:
    return np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], mode=node.attributes["mode"])


def _affine(node: Node, weights: dict[str, Any], x: np.ndarray) -> np.ndarray:
    return x * node.affine.scale + node.affine.shift


def _reshaped(node: Node, weights: dict[str, Any], x: np.ndarray) -> np.ndarray:
    return x.reshape(node.attributes["to"])


COMPUTE: dict[str, Callable[..., Any]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _matmul,
    "MatMul": _matmul,
    "InputProduct": _matmul,
    "Bilinear": _bilinear,
    "DeformConv": _deformable,
    "Embedding": _embedding,
    "Einsum": _einsum,
    "BatchNormalization": _affine,
    "Affine": _affine,
    "Identity": lambda node, w, x: x,
    "Dropout": lambda node, w, x: x,
    "Cast": lambda node, w, x: x,
    "Reshape": _reshaped,
    "Flatten": lambda node, w, x: x.reshape(len(x), -1),
    "Squeeze": lambda node, w, x: np.squeeze(x, node.attributes["axis"]),
    "Unsqueeze": lambda node, w, x: np.expand_dims(x, node.attributes["axis"]),
    "Transpose": lambda node, w, x: x.transpose(node.attributes["perm"]),
    "Slice": lambda node, w, x: x[node.attributes["slices"]],
    "Gather": lambda node, w, x: np.take(x, node.attributes["indices"], node.attributes["axis"]),
    "Split": lambda node, w, x: tuple(
        np.split(x, np.cumsum(node.attributes["sizes"])[:-1], node.attributes["axis"])
    ),
    "Concat": lambda node, w, *xs: np.concatenate(xs, node.attributes["axis"]),
    "Expand": lambda node, w, x: np.broadcast_to(x, node.attributes["to"]),
    "Tile": lambda node, w, x: np.tile(x, node.attributes["repeats"]),
    "DepthToSpace": lambda node, w, x: _depth_to_space(
        x, node.attributes["blocksize"], node.attributes["mode"]
    ),
    "SpaceToDepth": lambda node, w, x: _space_to_depth(
        x, node.attributes["blocksize"], node.attributes["mode"]
    ),
    "Add": lambda node, w, *xs: sum(xs[1:], xs[0]),
    "Sum": lambda node, w, *xs: sum(xs[1:], xs[0]),
    "Sub": lambda node, w, x, y: x - y,
    "Mul": lambda node, w, x, y: x * y,
    "Div": lambda node, w, x, y: x / y,
    "Max": lambda node, w, *xs: np.maximum.reduce(np.broadcast_arrays(*xs)),
    "Min": lambda node, w, *xs: np.minimum.reduce(np.broadcast_arrays(*xs)),
    "AveragePool": lambda node, w, x: _windows(node, x, 0.0).mean(-1),
    "LpPool": lambda node, w, x: np.sqrt((_windows(node, x, 0.0) ** 2).sum(-1)),
    "ReduceL1": lambda node, w, x: _norm(node, x, 1),
    "ReduceL2": lambda node, w, x: _norm(node, x, 2),
    "MaxPool": _max_pool,
    "ReduceMean": lambda node, w, x: x.mean(node.attributes["axes"], keepdims=node.attributes["keepdims"]),
    "ReduceMax": lambda node, w, x: x.max(node.attributes["axes"], keepdims=node.attributes["keepdims"]),
    "ReduceMin": lambda node, w, x: x.min(node.attributes["axes"], keepdims=node.attributes["keepdims"]),
    "ReduceSum": lambda node, w, x: x.sum(node.attributes["axes"], keepdims=node.attributes["keepdims"]),
    "Relu": lambda node, w, x: np.maximum(x, 0),
    "LeakyRelu": lambda node, w, x: np.where(x < 0, 0.1 * x, x),
    "PRelu": lambda node, w, x: np.where(x < 0, node.attributes["slope"] * x, x),
    "Abs": lambda node, w, x: np.abs(x),
    "Select": lambda node, w, x: np.take(x, node.attributes["rows"], *node.attributes["axes"]),
    "Resize": lambda node, w, x: np.repeat(np.repeat(x, 2, 2), 2, 3),
    "Pad": lambda node, w, x: _pad(node, x),
    "Tanh": lambda node, w, x: np.tanh(x),
}


@dataclass
class Sketch:
    """A random graph while it is drawn. Values begin as `(batch, 4, 6, 6)`; other ranks come from the operators."""

    random: np.random.Generator
    batch: int = 2
    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    values: Arrays = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def choose(self, *options: Any) -> Any:
        return options[int(self.random.integers(len(options)))]

    def input(self, name: str, *shape: int) -> str:
        if name not in self.values:
            self.inputs.append(name)
            self.values[name] = self.random.normal(size=shape)
        return name

    def pick(self, fits: Callable[[np.ndarray], bool] = lambda x: True) -> str:
        """One of the newest values that fit, favouring those that nobody reads yet."""
        read = {name for node in self.nodes for name in node.inputs}
        fitting = [n for n, v in self.values.items() if v.dtype.kind == "f" and v.size < 9_000 and fits(v)]
        fresh = [name for name in fitting if name not in read]
        if fresh and self.chance(0.8):
            fitting = fresh
        if not fitting:
            raise Unsuitable
        return str(self.random.choice(fitting[-4:]))

    def next_name(self, op: str) -> str:
        return f"{op.lower()}{len(self.nodes)}"

    def add(self, op: str, *inputs: str, count: int = 1, **more: Any) -> tuple[str, ...]:
        """One node, and what it computes. Whatever `Node` does not know is an attribute."""
        name = self.next_name(op)
        names = tuple(f"{name}.{place}" if count > 1 else f"{name}.out" for place in range(count))
        parts = {key: more.pop(key) for key in ("site", "linear", "affine", "partial") if key in more}
        node = Node(name, op, inputs, names, more, **parts)
        results = COMPUTE[op](node, self.weights, *[self.values[value] for value in inputs])
        results = results if isinstance(results, tuple) else (results,)
        self.nodes.append(node)
        self.values.update(zip(names, results, strict=True))
        return names

    def graph(self) -> Graph:
        """What was drawn; every value that nobody reads is an output, now and then one that somebody reads."""
        read = {name for node in self.nodes for name in node.inputs}
        made = [name for node in self.nodes for name in node.outputs]
        outputs = [name for name in made if name not in read or self.chance(0.03)]
        blur, lost = self.choose((0,), (0,), (0,), (0, 2, 3), (0, 1, 2, 3)), self.choose(0, 0, 0, 0.1)
        unknown = self.chance(0.3)

        def shape(value: np.ndarray) -> tuple[Any, ...]:
            sizes = [
                (None if unknown and a else f"S{n}") if a in blur else n for a, n in enumerate(value.shape)
            ]
            return tuple(sizes)

        shapes = {name: shape(value) for name, value in self.values.items() if not self.chance(lost)}
        return Graph(tuple(self.nodes), tuple(self.inputs), tuple(outputs), shapes)


class Unsuitable(Exception):
    """No value is there that this step could read."""


def gammas(random: np.random.Generator, shape: Any) -> np.ndarray:
    """Scales: positive, of mixed sign, or with zeros, each in a good share of all draws."""
    scale = np.exp(random.normal(0, 0.5, shape))
    kind = random.random()
    if kind < 0.4:
        return scale
    scale = np.where(random.random(shape) < 0.3, -scale, scale)
    return np.where(random.random(shape) < 0.2, 0.0, scale) if kind > 0.85 else scale


# ---------------------------------------------------------------- one step per operator


def batchnorm(sketch: Sketch, op: str) -> None:
    value = sketch.pick(lambda x: x.ndim >= 2)
    rank, size = sketch.values[value].ndim, sketch.values[value].shape[1]
    shift = sketch.random.normal(size=size) * sketch.chance(0.85)
    sketch.add(op, value, affine=Affine.along(1, rank, gammas(sketch.random, size), shift))


def affine(sketch: Sketch, op: str) -> None:
    value = sketch.pick()
    shape = [n if axis and sketch.chance(0.5) else 1 for axis, n in enumerate(sketch.values[value].shape)]
    scale = gammas(sketch.random, shape) if sketch.chance(0.5) else np.ones(shape)
    sketch.add(op, value, affine=Affine.of(scale, sketch.random.normal(size=shape) * sketch.chance(0.8)))


def conv(sketch: Sketch, op: str, value: str = "", same: bool = False, kernel: int = 0) -> str:
    random = sketch.random
    value = value or sketch.pick(lambda x: x.ndim == 4 and min(x.shape[2:]) >= 3)
    channels = sketch.values[value].shape[1]
    out = channels if same or sketch.chance(0.6) else sketch.choose(4, 6, 8)
    groups = sketch.choose(*[g for g in (1, 2, channels) if channels % g == 0 and out % g == 0])
    kernel, stride = kernel or sketch.choose(1, 3), 1 if same else sketch.choose(1, 1, 2)
    pad = kernel // 2 if same else sketch.choose(0, kernel // 2)
    inside = channels == out and stride == 1 and pad == kernel // 2
    again = [
        n for n in sketch.nodes if n.op == "Conv" and n.linear is not None and n.linear.inputs == channels
    ]
    if again and not same and sketch.chance(0.15):
        node = sketch.choose(*again)
        return sketch.add(op, value, site=node.place, linear=node.linear, **node.attributes)[0]
    bias = random.normal(size=out) if sketch.chance(0.5) else None
    sketch.weights[sketch.next_name(op)] = (
        random.normal(size=(out, channels // groups, kernel, kernel)) / 3,
        bias,
    )
    linear = Linear(
        "oi", channels, out, 1, 1, groups=groups,
        centre=(kernel // 2,) * 2 if inside else None,
        partial="it pads with zeros" if pad else "",
        biasless="it has no bias" if bias is None and sketch.chance(0.2) else "",
    )  # fmt: skip
    return sketch.add(op, value, linear=linear, pad=pad, stride=stride)[0]


def conv_transpose(sketch: Sketch, op: str) -> None:
    value = sketch.pick(lambda x: x.ndim == 4 and x.shape[2] < 7)
    channels, out = sketch.values[value].shape[1], sketch.choose(4, 8)
    groups = sketch.choose(*[g for g in (1, 2, 4) if channels % g == 0 and out % g == 0])
    sketch.weights[sketch.next_name(op)] = (
        sketch.random.normal(size=(channels, out // groups, 2, 2)) / 2,
        None,
    )
    sketch.add(op, value, linear=Linear("io", channels, out, 1, 1, groups=groups, partial="it has stride 2"))


def matmul(sketch: Sketch, op: str, value: str = "", out: int = 0) -> str:
    value = value or sketch.pick(lambda x: (x.ndim == 2) == (op == "Gemm") and x.ndim > 0)
    x = sketch.values[value]
    out = out or sketch.choose(x.shape[-1], x.shape[-1], 5)
    order, axis = sketch.choose("oi", "io"), x.ndim - 1
    size = (out, x.shape[-1]) if order == "oi" else (x.shape[-1], out)
    bare = sketch.chance(0.3)
    bias = None if bare else sketch.random.normal(size=out)
    sketch.weights[sketch.next_name(op)] = sketch.random.normal(size=size) / 3, bias
    centre = () if out == x.shape[-1] else None
    linear = Linear(order, x.shape[-1], out, axis, axis, centre=centre, bare=bare)
    return sketch.add(op, value, linear=linear)[0]


def einsum(sketch: Sketch, op: str) -> None:
    """A matrix along any axis, its outputs on any; or sums of products of two values, or of one and a constant."""
    value = sketch.pick(lambda x: 2 <= x.ndim <= 4)
    x, random = sketch.values[value], sketch.random
    letters = "abcd"[: x.ndim]
    if sketch.chance(0.6):
        source, target = (int(random.integers(x.ndim)) for _ in range(2))
        out, order = sketch.choose(x.shape[source], 4, 5), sketch.choose("oi", "io")
        size = (out, x.shape[source]) if order == "oi" else (x.shape[source], out)
        sketch.weights[sketch.next_name(op)] = random.normal(size=size) / 3, None
        biasless = sketch.choose("", "", "it has no bias")
        square = source == target and out == x.shape[source]
        centre = () if square else None
        linear = Linear(
            order, x.shape[source], out, source, target, centre=centre, biasless=biasless, bare=True
        )
        sketch.add(op, value, linear=linear)
        return
    summed = sketch.choose("", *letters[1:])
    result = "".join(random.permutation([letter for letter in letters if letter != summed] + ["z"]))
    other = "".join(random.permutation([*summed, "z", sketch.choose(*letters)]))
    other = "".join(dict.fromkeys(other))
    size = [x.shape[letters.index(letter)] if letter != "z" else 3 for letter in other]
    words, operands, inputs = (letters, other), ("x", "w"), [value]
    if sketch.chance(0.4):
        operands, inputs = ("x", "x"), [value, sketch.input(f"side {'x'.join(map(str, size))}", *size)]
    else:
        sketch.weights[sketch.next_name(op)] = random.normal(size=size), None
    if sketch.chance(0.3):
        words, operands, inputs = words[::-1], operands[::-1], inputs[::-1]
    kept = tuple(
        tuple(result.find(letter) for letter in word)
        for word, part in zip(words, operands, strict=True)
        if part == "x"
    )
    sketch.add(op, *inputs, kept=kept, operands=operands, equation=f"{','.join(words)}->{result}")


def bilinear(sketch: Sketch, op: str) -> None:
    """Of two values that agree in all axes but the last."""
    first = sketch.pick(lambda x: x.ndim >= 2)
    head, size = sketch.values[first].shape[:-1], sketch.values[first].shape[-1]
    second = sketch.pick(lambda x: x.shape[:-1] == head)
    bias = sketch.random.normal(size=5) if sketch.chance(0.5) else None
    weight = sketch.random.normal(size=(5, size, sketch.values[second].shape[-1])) / 3
    sketch.weights[sketch.next_name(op)] = weight, bias
    axis = len(head)
    sketch.add(op, first, second, linear=Linear("oi", size, 5, axis, axis, partial="it has a second operand"))


def deformable(sketch: Sketch, op: str) -> None:
    value = sketch.pick(lambda x: x.ndim == 4)
    n, channels, h, w = sketch.values[value].shape
    moves = sketch.input(f"moves {n}x{h}x{w}", n, 4, h, w)
    if sketch.chance(0.3):
        own = Affine.along(1, 4, np.full(4, 2.0), np.ones(4))
        (moves,) = sketch.add("BatchNormalization", moves, affine=own)
    groups = sketch.choose(*[g for g in (1, 2, channels) if channels % g == 0])
    out = groups * sketch.choose(1, 2)
    weight = sketch.random.normal(size=(out, channels // groups, 2, 1)) / 2
    sketch.weights[sketch.next_name(op)] = weight, None
    sketch.add(
        op, value, moves, linear=Linear("oi", channels, out, 1, 1, groups=groups, partial="zeros outside")
    )


def embedding(sketch: Sketch, op: str) -> None:
    value = sketch.pick(lambda x: x.ndim <= 2)
    again = [node for node in sketch.nodes if node.op == op]
    rank = sketch.values[value].ndim
    if again and sketch.chance(0.5):
        shared = replace(again[0].linear, in_axis=rank, out_axis=rank)  # type: ignore[type-var]
        sketch.add(op, value, site=again[0].place, linear=shared)
        return
    sketch.weights[sketch.next_name(op)] = (sketch.random.normal(size=(11, 6)), None)
    sketch.add(op, value, linear=Linear("io", 11, 6, rank, rank, sealed="it looks rows up"))


def pointwise(sketch: Sketch, op: str) -> None:
    value = sketch.pick()
    x = sketch.values[value]
    more = {"Cast": {"lossless": sketch.chance(0.8)}}.get(op, {})
    if op == "PRelu":
        shape = [n if axis == 1 else 1 for axis, n in enumerate(x.shape)]
        more = {"slope": sketch.random.normal(size=shape)}
    sketch.add(op, value, **more)


def reshape(sketch: Sketch, op: str) -> None:
    """Flatten some axes, split one in two, or drop and add axes of size 1."""
    value = sketch.pick(lambda x: 2 <= x.ndim <= 5)
    shape = list(sketch.values[value].shape)
    axis = int(sketch.random.integers(1, len(shape)))
    options = [shape, [*shape, 1], [1, *shape], [n for a, n in enumerate(shape) if a == 0 or n != 1]]
    if axis + 1 < len(shape):
        options += [[*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]]] * 4
    if shape[axis] % 2 == 0:
        halves = ([2, shape[axis] // 2], [shape[axis] // 2, 2])
        options += [[*shape[:axis], *half, *shape[axis + 1 :]] for half in halves] * 2
    sketch.add(op, value, to=tuple(sketch.choose(*[to for to in options if len(to) <= 5])))


def squeeze(sketch: Sketch, op: str) -> None:
    if op == "Flatten":
        sketch.add(op, sketch.pick(lambda x: x.ndim >= 2))
    elif op == "Unsqueeze":
        value = sketch.pick(lambda x: x.ndim < 5)
        sketch.add(op, value, axis=int(sketch.random.integers(sketch.values[value].ndim + 1)))
    else:
        value = sketch.pick(lambda x: 1 in x.shape)
        sketch.add(op, value, axis=sketch.values[value].shape.index(1))


def transpose(sketch: Sketch, op: str) -> None:
    value = sketch.pick(lambda x: x.ndim >= 2)
    rank = sketch.values[value].ndim
    perm = (
        sketch.random.permutation(rank)
        if sketch.chance(0.2)
        else [0, *(1 + sketch.random.permutation(rank - 1))]
    )
    sketch.add(op, value, perm=tuple(map(int, perm)))


def select(sketch: Sketch, op: str) -> None:
    """Read a part of a value; half of the time some other part is read by a second node."""
    random, value = sketch.random, sketch.pick(lambda x: x.ndim >= 2 and max(x.shape[1:]) > 2)
    shape = sketch.values[value].shape
    axis = sketch.choose(*[a for a, n in enumerate(shape) if a and n > 2])
    size = shape[axis]
    for _ in range(sketch.choose(1, 2)):
        if op == "Slice":
            start, stop = sorted(map(int, random.choice(size + 1, 2, replace=False)))
            part = sketch.choose(
                slice(start, stop), slice(start, stop, 2), slice(stop - 1, start or None, -1)
            )
            if stop - start < 2:
                part = slice(start, stop)
            sketch.add(op, value, slices=tuple(part if a == axis else slice(None) for a in range(len(shape))))
        elif op == "Gather":
            indices = sketch.choose(
                random.permutation(size), random.integers(0, size, 5), random.permutation(size)[:2]
            )
            scalar = sketch.chance(0.15) and len(shape) > 2
            if sketch.chance(0.2) and len(shape) < 5:
                indices = np.add.outer(np.arange(0, size - 1, sketch.choose(1, 2)), np.arange(2))
            sketch.add(op, value, axis=axis, indices=np.asarray(indices.flat[0]) if scalar else indices)
        else:
            first = int(random.integers(1, size))
            sketch.add(op, value, count=2, axis=axis, sizes=(first, size - first))


def pick_rows(sketch: Sketch, op: str) -> None:
    value = sketch.pick(lambda x: x.ndim >= 2)
    axis = int(sketch.random.integers(sketch.values[value].ndim))
    rows = sketch.random.integers(0, sketch.values[value].shape[axis], 3)
    sketch.add(op, value, axes=(axis,), rows=rows)


def recurrent(sketch: Sketch, op: str) -> None:
    """The channels of an image, or of a sequence, turned to the last axis, for a product and the rest of a layer."""
    value = sketch.pick(lambda x: x.ndim in (3, 4))
    if sketch.values[value].ndim == 4:
        n, c, h, w = sketch.values[value].shape
        (value,) = sketch.add("Reshape", value, to=(n, c, h * w))
    if sketch.chance(0.5):
        size = sketch.values[value].shape[1]
        own = Affine.along(1, 3, gammas(sketch.random, size), sketch.random.normal(size=size))
        (value,) = sketch.add("BatchNormalization", value, affine=own)
    if sketch.chance(0.8):
        (value,) = sketch.add("Transpose", value, perm=sketch.choose((0, 2, 1), (2, 0, 1)))
    sketch.add("Tanh", matmul(sketch, op, value))


def enlarge(sketch: Sketch, op: str) -> None:
    if op == "Tile":
        value = sketch.pick(lambda x: x.ndim >= 2 and x.size < 600)
        shape = sketch.values[value].shape
        axis = int(sketch.random.integers(1, len(shape)))
        sketch.add(op, value, repeats=tuple(2 if a == axis else 1 for a in range(len(shape))))
    else:
        value = sketch.pick(lambda x: 1 in x.shape)
        shape = tuple(3 if n == 1 and a != 0 else n for a, n in enumerate(sketch.values[value].shape))
        sketch.add(op, value, to=(*sketch.choose((), (2,)), *shape) if len(shape) < 4 else shape)


def blocks(sketch: Sketch, op: str) -> None:
    def deep(x: np.ndarray) -> bool:
        return x.ndim == 4 and x.shape[1] % 4 == 0 and x.shape[2] < 12

    def wide(x: np.ndarray) -> bool:
        return x.ndim == 4 and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0 and x.shape[1] < 20

    sketch.add(
        op, sketch.pick(deep if op == "DepthToSpace" else wide), blocksize=2, mode=sketch.choose("CRD", "DCR")
    )


def combine(sketch: Sketch, op: str) -> None:
    """Add, subtract, multiply or divide values, now and then by way of broadcasting, or one with itself."""
    operands = [sketch.pick()]
    for _ in range(2 if op == "Sum" and sketch.chance(0.7) else 1):
        shape = np.broadcast_shapes(*[sketch.values[value].shape for value in operands])
        wide = sketch.chance(0.4)
        operands.append(sketch.pick(lambda x: _broadcasts(x.shape, shape) if wide else x.shape == shape))  # noqa: B023
    if op in ("Max", "Min") and len(set(operands)) == 1:
        raise Unsuitable
    sketch.random.shuffle(operands)
    if op == "Div":
        operands[1] = _away_from_zero(sketch, operands[1])
    sketch.add(op, *operands)


def _away_from_zero(sketch: Sketch, value: str) -> str:
    """Dividing by next to nothing would show the rounding of whatever was divided."""
    one = np.ones((1,) * sketch.values[value].ndim)
    return sketch.add("Affine", *sketch.add("Abs", value), affine=Affine(one, one))[0]


def _broadcasts(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    return all(n == m or 1 in (n, m) for n, m in zip(first[::-1], second[::-1], strict=False))


def concat(sketch: Sketch, op: str) -> None:
    first = sketch.pick(lambda x: x.ndim >= 2)
    shape = sketch.values[first].shape
    axis = 1 if sketch.chance(0.8) else len(shape) - 1

    def joins(x: np.ndarray) -> bool:
        return x.ndim == len(shape) and all(a == axis or n == shape[a] for a, n in enumerate(x.shape))

    sketch.add(op, first, *[sketch.pick(joins) for _ in range(sketch.choose(1, 1, 2))], axis=axis)


def window(sketch: Sketch, op: str) -> None:
    """Pooling, means, maxima, resizing and padding."""
    value = sketch.pick(lambda x: x.ndim == 4 and 3 < min(x.shape[2:]) < 20)
    partial = ""
    more: dict[str, Any] = {"axes": (2, 3), "keepdims": True}
    if op in ("AveragePool", "MaxPool", "LpPool"):
        more |= {"pad": sketch.choose(0, 1)}
        partial = "it counts zero padding" if more["pad"] and op == "AveragePool" else ""
    elif op.startswith("Reduce"):
        more |= {
            "keepdims": sketch.choose(True, False),
            "axes": sketch.choose((2, 3), (2, 3), (3,), (1,), (1, 2)),
        }
    elif op == "Pad":
        mode = sketch.choose("constant", "reflect", "edge")
        more |= {"mode": mode}
        partial = "it pads with zeros" if mode == "constant" else ""
    count = 2 if op == "MaxPool" and sketch.chance(0.3) else 1
    sketch.add(op, value, count=count, partial=partial, **more)


# ---------------------------------------------------------------- motifs of several nodes


def repeat(sketch: Sketch) -> None:
    """Call a BatchNorm once more, on another value: one site, two nodes; or on the same value, as its double."""
    norms = [node for node in sketch.nodes if node.is_batchnorm]
    if norms:
        node = sketch.choose(*norms)
        assert node.affine is not None
        size, rank = node.affine.scale.size, node.affine.rank
        if sketch.chance(0.3):
            sketch.add(node.op, node.inputs[0], affine=node.affine)
        else:
            value = sketch.pick(lambda x: x.ndim == rank and x.shape[1] == size)
            sketch.add(node.op, value, site=node.place, affine=node.affine)


def shuffle(sketch: Sketch) -> None:
    """The channel shuffle: split the channels in two, transpose, put them together again."""
    value = sketch.pick(lambda x: x.ndim == 4 and x.shape[1] % 2 == 0)
    n, c, h, w = sketch.values[value].shape
    (split,) = sketch.add("Reshape", value, to=(n, 2, c // 2, h, w))
    (turned,) = sketch.add("Transpose", split, perm=(0, 2, 1, 3, 4))
    sketch.add("Reshape", turned, to=(n, c, h, w))


def parallel(sketch: Sketch) -> None:
    """RepVGG: convolutions and a BatchNorm, or nothing, of one value, summed at once or one by one."""
    value = sketch.pick(lambda x: x.ndim == 4 and min(x.shape[2:]) >= 3)
    size = sketch.values[value].shape[1]
    branches = [conv(sketch, "Conv", value, same=True, kernel=3), value]
    if sketch.chance(0.7):
        norm = Affine.along(1, 4, gammas(sketch.random, size), sketch.random.normal(size=size))
        branches[1] = sketch.add("BatchNormalization", value, affine=norm)[0]
    if sketch.chance(0.4):
        branches.append(conv(sketch, "Conv", value, same=True, kernel=1))
    sketch.random.shuffle(branches)
    if sketch.chance(0.5):
        sketch.add("Sum", *branches)
    else:
        total = branches[0]
        for branch in branches[1:]:
            (total,) = sketch.add(
                sketch.choose("Add", "Add", "Sub"), *sketch.choose((total, branch), (branch, total))
            )


def lean(sketch: Sketch) -> None:
    """A residual around a square matrix: `x + W x`."""
    value = sketch.pick(lambda x: x.ndim >= 2)
    made = matmul(sketch, "MatMul", value, out=sketch.values[value].shape[-1])
    sketch.add(sketch.choose("Add", "Sum", "Sub"), *sketch.choose((value, made), (made, value)))


def aside(sketch: Sketch) -> None:
    """One number per channel, computed from another input, laid against an image by broadcasting."""
    value = sketch.pick(lambda x: x.ndim == 4)
    size = sketch.values[value].shape[1]
    made = matmul(sketch, "Gemm", sketch.input("side", 1, 5), out=size)
    (column,) = sketch.add("Reshape", made, to=sketch.choose((size, 1, 1), (1, size, 1, 1)))
    sketch.add(sketch.choose("Add", "Sub", "Mul", "Sum"), *sketch.choose((value, column), (column, value)))


def gate(sketch: Sketch) -> None:
    """Squeeze and excitation: an image times a function of its own means."""
    value = sketch.pick(lambda x: x.ndim == 4)
    n, c = sketch.values[value].shape[:2]
    (mean,) = sketch.add("ReduceMean", value, axes=(2, 3), keepdims=False)
    (turned,) = sketch.add("Tanh", matmul(sketch, "Gemm", mean, out=c))
    (shaped,) = sketch.add("Reshape", turned, to=(n, c, 1, 1))
    sketch.add("Mul", value, shaped)


def dense(sketch: Sketch) -> None:
    """DenseNet: a value beside what is computed from it."""
    value = sketch.pick(lambda x: x.ndim == 4 and min(x.shape[2:]) >= 3 and x.shape[1] < 30)
    sketch.add("Concat", value, conv(sketch, "Conv", value, same=True), axis=1)


def compare(sketch: Sketch) -> None:
    """Max-feature-map: the larger half of the channels, or of two convolutions."""
    value = sketch.pick(lambda x: x.ndim == 4 and x.shape[1] % 2 == 0 and min(x.shape[2:]) >= 3)
    size = sketch.values[value].shape[1] // 2
    if sketch.chance(0.5):
        halves = sketch.add(
            "Split", conv(sketch, "Conv", value, same=True), count=2, axis=1, sizes=(size, size)
        )
    else:
        halves = tuple(conv(sketch, "Conv", value, same=True) for _ in range(2))
    (most,) = sketch.add(sketch.choose("Max", "Min"), *halves)
    norm = sketch.random.normal(size=sketch.values[most].shape[1])
    sketch.add("BatchNormalization", most, affine=Affine.along(1, 4, gammas(sketch.random, norm.size), norm))


def opaque(sketch: Sketch) -> None:
    sketch.add("Tanh", sketch.pick())


STEPS: dict[str, Callable[[Sketch, str], Any]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": matmul,
    "MatMul": matmul,
    "InputProduct": recurrent,
    "Embedding": embedding,
    "Bilinear": bilinear,
    "DeformConv": deformable,
    "Einsum": einsum,
    "BatchNormalization": batchnorm,
    "Affine": affine,
    "Reshape": reshape,
    "Transpose": transpose,
    "Concat": concat,
    **dict.fromkeys(("Identity", "Dropout", "Cast", "Relu", "LeakyRelu", "PRelu", "Abs"), pointwise),
    **dict.fromkeys(("Flatten", "Squeeze", "Unsqueeze"), squeeze),
    **dict.fromkeys(("Slice", "Gather", "Split"), select),
    "Select": pick_rows,
    **dict.fromkeys(("Expand", "Tile"), enlarge),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), blocks),
    **dict.fromkeys(("Add", "Sub", "Sum", "Mul", "Div", "Max", "Min"), combine),
    **dict.fromkeys(
        "AveragePool MaxPool LpPool ReduceMean ReduceMax ReduceMin ReduceSum ReduceL1 ReduceL2 Resize Pad".split(),  # noqa: SIM905
        window,
    ),
}
"""How a node of each operator is drawn."""

MOTIFS = (repeat, repeat, shuffle, parallel, lean, aside, gate, dense, compare, opaque)
OFTEN = ("Conv",) * 8 + ("MatMul", "Relu", "Add", "Concat", "Split", "Reshape", "Transpose", "MaxPool") * 2


SEQUENCES = ("InputProduct", "Select")
"""Operators that only `draw_sequence` draws, and those that the table is asked about one by one."""


def draw_sequence(seed: int, size: int) -> tuple[Graph, dict[str, Any], Arrays]:
    """The same with recurrent layers and positions that the model picks."""
    return draw(seed, size, SEQUENCES * 6)


def draw(seed: int, size: int, more: Sequence[str] = ()) -> tuple[Graph, dict[str, Any], Arrays]:
    """A random graph of about `size` nodes, its weights and its inputs; some operators are drawn more often."""
    sketch = Sketch(np.random.default_rng(seed))
    sketch.batch = sketch.choose(2, 2, 2, 1)
    for place in range(sketch.choose(1, 2)):
        sketch.input(f"x{place}", sketch.batch, 4, 6, 6)
    operators = (*(op for op in STEPS if op not in SEQUENCES), *OFTEN, *more)
    for _ in range(20 * size):
        if len(sketch.nodes) >= size:
            break
        try:
            if sketch.chance(0.2):
                sketch.choose(*MOTIFS)(sketch)
            else:
                op = "BatchNormalization" if sketch.chance(0.35) else sketch.choose(*operators)
                STEPS[op](sketch, op)
        except Unsuitable:
            continue
    return sketch.graph(), sketch.weights, {name: sketch.values[name] for name in sketch.inputs}


def draw_node(seed: int, op: str) -> tuple[Node, Sketch]:
    """One random node of an operator, and the sketch that holds what it reads."""
    sketch = Sketch(np.random.default_rng(seed))
    pool = [
        (2, 4, 6, 6),
        (2, 8, 4, 4),
        (2, 6, 5),
        (2, 6),
        (2, 1, 6, 6),
        (1, 4, 1, 1),
        (4, 1, 1),
        (2, 4, 6, 6),
    ]
    while not any(node.op == op for node in sketch.nodes):
        sketch.random.shuffle(pool)
        for place, shape in enumerate(pool):
            sketch.values.pop(f"x{place}", None)
            sketch.input(f"x{place}", *shape)
        try:
            STEPS[op](sketch, op)
        except Unsuitable:
            continue
    return next(node for node in sketch.nodes if node.op == op), sketch


def deviation(before: Arrays, after: Arrays, names: Iterable[tuple[str, str]]) -> float:
    """The largest difference between outputs, relative to the largest number in each; infinite where they cannot be."""
    worst = 0.0
    for old, new in names:
        x, y = before[old], after[new]
        if x.shape != y.shape or (x.dtype.kind != "f" and not np.array_equal(x, y)):
            return np.inf
        with np.errstate(all="ignore"):
            peak = np.max(np.abs(x[np.isfinite(x)]), initial=0.0) or 1.0
            off = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y) / peak)
        worst = max(worst, float(np.max(np.nan_to_num(off, nan=np.inf), initial=0.0)))
    return worst


def chain(*nodes: Node, shape: tuple[Any, ...] = (2, 4, 6, 6)) -> Graph:
    """A hand-made graph: nodes in a row, all values of one shape."""
    values = ["x", *(f"v{place}" for place in range(len(nodes)))]
    linked = [
        replace(node, inputs=(a,), outputs=(b,)) for node, (a, b) in zip(nodes, pairwise(values), strict=True)
    ]
    return Graph(tuple(linked), ("x",), (values[-1],), dict.fromkeys(values, shape))
