"""Random blocks of linear operators, and a machine that computes them in float64 at several sizes at once.

The machine shares nothing with `window`, `operators` and `merge`: it convolves with torch, slides pools with NumPy and
multiplies matrices axis by axis. What a linear node has absorbed is folded by `Linear.fold`, which has tests of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from itertools import product
from math import gcd, prod
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from bnfold.algebra import Affine, Linear
from bnfold.candidates import Candidate
from bnfold.errors import Refuse
from bnfold.ir import Graph, Node, Shape
from bnfold.merge import Merged
from bnfold.window import Window
from tests.properties.machine import gammas

Arrays = dict[str, np.ndarray]
Weights = dict[str, Any]


class Unsuitable(Exception):
    """What was drawn cannot be computed, or does not fit."""


# ---------------------------------------------------------------- the machine


def run(graph: Graph, weights: Mapping[str, Any], inputs: Arrays) -> Arrays:
    """Every value of a graph; `weights` holds `(weight, bias)` by the name of a linear node, or of its site.

    Raises:
        KeyError: a node reads what is not computed yet.
    """
    values = dict(inputs)
    for node in graph.nodes:
        (output,) = node.outputs
        assert output not in values, f"{output} is computed twice"
        values[output] = compute(node, weights, [values[name] for name in node.inputs])
    return values


def compute(node: Node, weights: Mapping[str, Any], values: Sequence[np.ndarray]) -> np.ndarray:
    """What one node makes of its inputs."""
    if node.linear is not None:
        weight, bias = node.linear.fold(*(weights.get(node.name) or weights[node.place]))
        y = LINEAR[node.op](node, values[0], weight)
        return y if bias is None else y + _along(bias, node.linear.out_axis, y.ndim)
    return PLAIN[node.op](node, *values)


def _along(bias: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return bias.reshape([-1 if place == axis else 1 for place in range(rank)])


def _conv(node: Node, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    assert node.linear is not None
    window, spatial = node.linear.window or node.attributes["window"], weight.ndim - 2
    assert isinstance(window, Window)
    pads = window.pads or _same(window, x.shape[-spatial:])
    padded = np.pad(x, [(0, 0)] * (x.ndim - spatial) + list(pads))
    batch = torch.from_numpy(padded if x.ndim == spatial + 2 else padded[None])
    if any(size < reach for size, reach in zip(batch.shape[2:], window.extent, strict=True)):
        raise Unsuitable
    function = getattr(torch.nn.functional, f"conv{spatial}d")
    settings = {"stride": window.strides, "dilation": window.dilations, "groups": node.linear.groups}
    y = function(batch, torch.from_numpy(np.ascontiguousarray(weight)), **settings).numpy()
    return y if x.ndim == spatial + 2 else y[0]


def _same(window: Window, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """ONNX's SAME_UPPER, whose padding depends on the size."""
    axes = zip(window.strides, window.extent, sizes, strict=True)
    total = [max((-(-size // stride) - 1) * stride + reach - size, 0) for stride, reach, size in axes]
    return [(pad // 2, pad - pad // 2) for pad in total]


def _transposed(node: Node, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of one tap, without groups."""
    return np.moveaxis(np.tensordot(x, weight.reshape(weight.shape[:2]), (1, 0)), -1, 1)


def _matrix(node: Node, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    assert node.linear is not None
    matrix = weight.T if node.linear.order == "oi" else weight
    return np.moveaxis(np.tensordot(x, matrix, (node.linear.in_axis, 0)), -1, node.linear.out_axis)


def _table(node: Node, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    assert node.linear is not None
    return (weight.T if node.linear.order == "oi" else weight)[x]


def _pool(node: Node, x: np.ndarray) -> np.ndarray:
    """The mean over all taps, zeros that are padded among them."""
    window = node.attributes["window"]
    spatial = len(window.kernel)
    first = x.ndim - spatial
    padded = np.pad(x, [(0, 0)] * first + list(window.pads))
    if any(size < reach for size, reach in zip(padded.shape[first:], window.extent, strict=True)):
        raise Unsuitable
    seen = sliding_window_view(padded, window.extent, axis=tuple(range(first, x.ndim)))
    places = tuple(slice(None, None, stride) for stride in window.strides)
    taps = tuple(slice(None, None, step) for step in window.dilations)
    whole = seen[(*[slice(None)] * first, *places, *taps)]
    return whole.mean(axis=tuple(range(-spatial, 0)))


def _affine(node: Node, x: np.ndarray) -> np.ndarray:
    assert node.affine is not None
    return x * node.affine.scale + node.affine.shift


def _broadcast(xs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    try:
        return np.broadcast_arrays(*xs)
    except ValueError:
        raise Unsuitable from None


LINEAR: dict[str, Callable[..., np.ndarray]] = {
    "Conv": _conv,
    "ConvTranspose": _transposed,
    "Gemm": _matrix,
    "MatMul": _matrix,
    "Embedding": _table,
}
PLAIN: dict[str, Callable[..., np.ndarray]] = {
    "AveragePool": _pool,
    "Affine": _affine,
    "BatchNormalization": _affine,
    "Identity": lambda node, x: x,
    "Relu": lambda node, x: np.maximum(x, 0),
    "Tanh": lambda node, x: np.tanh(x),
    "Add": lambda node, *xs: reduce(np.add, _broadcast(xs)),
    "Sum": lambda node, *xs: reduce(np.add, _broadcast(xs)),
    "Sub": lambda node, *xs: reduce(np.subtract, _broadcast(xs)),
}


@dataclass
class Model:
    """A host of merged operators that stores weights by site; see `bnfold.candidates.Host`.

    Attributes:
        stubborn: the share of operators that it has no place for, decided by their nodes.
        size: of one number, in bytes.
        adds_in_place: whether the first term of a sum takes the others in.
    """

    weights: Weights
    stubborn: float = 0.0
    size: int = 4
    adds_in_place: bool = False

    def stored(self, node: Node) -> Any:
        return self.weights[node.place]

    def itemsize(self, node: Node) -> int:
        return self.size

    def can_drop(self, term: Candidate) -> bool:
        return not self._refuses(term.result)

    def place(self, candidate: Candidate) -> Any:
        if self._refuses(*candidate.nodes):
            raise Refuse("there is no place for it")
        return None

    def _refuses(self, *names: str) -> bool:
        return crc32(" ".join(names).encode()) % 1000 < 1000 * self.stubborn

    def merged(self, merged: Merged) -> Weights:
        """The weights of the merged graph, by node, each in the order that the node states."""
        nodes = {node.name: node.linear for node in merged.graph.nodes if node.linear is not None}
        new = {one.into for one in merged.merges}
        made = {name: self.weights[merged.graph[name].place] for name in nodes if name not in new}
        for one in merged.merges:
            weight, bias = one.operator.numbers(self.stored)
            laid = weight if nodes[one.into].order == "oi" else weight.swapaxes(1, 2)
            made[one.into] = (laid.reshape(-1, *laid.shape[2:]), bias)
        return made


# ---------------------------------------------------------------- what a graph costs, at one size


def cost(node: Node, values: Arrays, itemsize: int = 4) -> tuple[int | Fraction, int]:
    """The multiply-adds that one node takes, an addition of a mean being half of one, and the bytes of its weights."""
    elements = values[node.outputs[0]].size
    if node.linear is not None:
        linear, window = node.linear, node.linear.window or node.attributes.get("window")
        inputs = linear.inputs // linear.groups * prod(window.kernel if window is not None else ())
        stored = (linear.outputs * inputs + linear.outputs) * itemsize
        return (0 if node.op == "Embedding" else elements * inputs), stored
    if node.op == "AveragePool":
        return elements * Fraction(sum(node.attributes["window"].kernel), 2), 0
    if node.op in ("Affine", "BatchNormalization"):
        return elements, 0
    return (elements * (len(node.inputs) - 1) if node.op in ("Add", "Sub", "Sum") else 0), 0


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Aim:
    """What the terms of a sum have in common: how many channels they give, on which axis, and how sizes change."""

    channels: int
    axis: int
    strides: tuple[int, ...] = ()
    slacks: tuple[int, ...] = ()

    @property
    def keeps(self) -> bool:
        return set(self.strides) <= {1} and not any(self.slacks)


@dataclass
class Sketch:
    """A random graph while it is drawn, with what it computes at each of a few sizes."""

    random: np.random.Generator
    count: int
    nodes: list[Node] = field(default_factory=list)
    weights: Weights = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    values: list[Arrays] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = [{} for _ in range(self.count)]

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def choose(self, *options: Any) -> Any:
        return options[int(self.random.integers(len(options)))]

    def below(self, count: int) -> int:
        return int(self.random.integers(count))

    def shapes(self, value: str) -> list[tuple[int, ...]]:
        return [values[value].shape for values in self.values]

    def rank(self, value: str) -> int:
        return len(self.shapes(value)[0])

    def input(self, shapes: Sequence[tuple[int, ...]], rows: int = 0) -> str:
        """A new input of the model: numbers, or rows of a table."""
        name = f"x{len(self.inputs)}"
        self.inputs.append(name)
        for values, shape in zip(self.values, shapes, strict=True):
            drawn = self.random.integers(0, rows, shape) if rows else self.random.normal(size=shape)
            values[name] = drawn
        return name

    def add(self, op: str, *inputs: str, weight: Any = None, **parts: Any) -> str:
        """One node, computed at every size; a weight is `(weight, bias)`."""
        name = f"{op.lower()}{len(self.nodes)}"
        if weight is not None:
            self.weights[parts.get("site") or name] = weight
        node = Node(name, op, inputs, (f"{name}.out",), parts.pop("attributes", {}), **parts)
        made = [compute(node, self.weights, [values[value] for value in inputs]) for values in self.values]
        if any(array.size > 20_000 for array in made):
            raise Unsuitable
        for values, array in zip(self.values, made, strict=True):
            values[node.outputs[0]] = array
        self.nodes.append(node)
        return node.outputs[0]

    # -- one operator

    def conv(
        self, x: str, axis: int, outputs: int, window: Window, groups: int = 0, bias: float = 0.6
    ) -> str:
        inputs = self.shapes(x)[0][axis]
        common = [g for g in range(1, gcd(inputs, outputs) + 1) if inputs % g == outputs % g == 0]
        groups = groups or (common[-1] if self.chance(0.25) else self.choose(*common, 1, 1))
        linear = Linear("oi", inputs, outputs, axis, axis, groups, window=window)
        shape = (outputs, inputs // groups, *window.kernel)
        return self._linear("Conv", x, linear, shape, self._bias(outputs) if self.chance(bias) else None)

    def matrix(self, x: str, in_axis: int, outputs: int, out_axis: int) -> str:
        inputs, order = self.shapes(x)[0][in_axis], self.choose("oi", "io")
        linear = Linear(order, inputs, outputs, in_axis, out_axis)
        shape = (outputs, inputs) if order == "oi" else (inputs, outputs)
        op = "Gemm" if self.rank(x) == 2 and out_axis == 1 else "MatMul"
        bias = self._bias(outputs) if self.chance(0.6) else None
        if bias is not None and op == "Gemm" and self.chance(0.2):
            bias = bias[None] if self.chance(0.5) else np.reshape(bias[0], self.choose((), (1,), (1, 1)))
        return self._linear(op, x, linear, shape, bias)

    def table(self, x: str, rows: int, outputs: int) -> str:
        rank = self.rank(x)
        linear = Linear("io", rows, outputs, 0, rank, sealed="it looks up rows, by whole numbers")
        return self._linear("Embedding", x, linear, (rows, outputs), None)

    def _bias(self, outputs: int) -> np.ndarray:
        return self.random.normal(size=outputs)

    def _linear(self, op: str, x: str, linear: Linear, shape: tuple[int, ...], bias: Any) -> str:
        weight = self.random.normal(size=shape) / max(prod(shape[1:]), 1) ** 0.5
        site = self._again(linear, shape)
        return self.add(
            op, x, weight=None if site else (weight, bias), linear=self._absorbed(linear), site=site
        )

    def _again(self, linear: Linear, shape: tuple[int, ...]) -> str:
        """Now and then an earlier node, whose weight is to serve again."""
        for node in self.nodes if self.chance(0.05) else ():
            if node.linear is not None and np.shape(self.weights[node.place][0]) == shape:
                earlier = (node.linear.order, node.linear.inputs, node.linear.outputs, node.linear.groups)
                if earlier == (linear.order, linear.inputs, linear.outputs, linear.groups):
                    return node.place
        return ""

    def _absorbed(self, linear: Linear) -> Linear:
        """Now and then with what a BatchNorm left in it."""
        if self.chance(0.15):
            linear = linear.absorb_after(gammas(self.random, linear.outputs), self._bias(linear.outputs))
        padded = linear.window is not None and linear.window.is_padded
        if self.chance(0.1) and not linear.sealed:
            linear = linear.absorb_before(
                gammas(self.random, linear.inputs), self._bias(linear.inputs) * (not padded)
            )
        return linear

    def affine(self, x: str, axis: int) -> str:
        size, rank = self.shapes(x)[0][axis], self.rank(x)
        shift = self.random.normal(size=size) * self.chance(0.6)
        affine = Affine.along(axis, rank, gammas(self.random, size), shift)
        if self.chance(0.15):
            affine = Affine.of(np.full((1,) * rank, self.random.normal()), self.random.normal())
        elif self.chance(0.1):
            other = self.below(rank)
            if len({shape[other] for shape in self.shapes(x)}) == 1:
                affine = Affine.along(other, rank, self.random.normal(size=self.shapes(x)[0][other]), 0.5)
        return self.add(self.choose("Affine", "BatchNormalization"), x, affine=affine)

    def pool(self, x: str, window: Window) -> str:
        return self.add("AveragePool", x, attributes={"window": window})

    # -- windows

    def window(self, strides: Sequence[int], slacks: Sequence[int], point: bool = False) -> Window:
        """A window of these strides and slacks."""
        axes = [self._axis(stride, slack, point) for stride, slack in zip(strides, slacks, strict=True)]
        kernel, dilations, pads = zip(*axes, strict=True)
        return Window(kernel, tuple(strides), dilations, pads)

    def _axis(self, stride: int, slack: int, point: bool) -> tuple[int, int, tuple[int, int]]:
        kernels = [1] if point else [1, 1, 2, 3, 3, 3, 4, 5]
        pairs = list(product(kernels, (1, 1, 1, 2, 3)))
        size, dilation = self.choose(*([(k, d) for k, d in pairs if (k - 1) * d + slack >= 0] or pairs))
        last = (size - 1) * dilation
        least = max(0, last + slack - last)
        before = self.choose(*range(least, last + slack + 1)) if last + slack >= least else 0
        if self.chance(0.5) and least <= last // 2 <= last + slack:
            before = last // 2
        after = slack + last - before
        return size, dilation, (before, max(after, 0))

    def bare(self, strides: Sequence[int]) -> Window:
        """A window that pads nothing."""
        sizes = [self.choose(1, 1, 2, 3) for _ in strides]
        steps = [self.choose(1, 1, 2) for _ in strides]
        return Window(tuple(sizes), tuple(strides), tuple(steps), ((0, 0),) * len(sizes))

    # -- sums

    def sum_up(self, terms: Sequence[str]) -> str:
        """All these terms, in some tree of sums."""
        terms = list(terms)
        while len(terms) > 1:
            op = self.choose("Add", "Add", "Sum", "Sub")
            take = min(len(terms), self.choose(2, 3, 4) if op == "Sum" else 2)
            picked = [terms.pop(self.below(len(terms))) for _ in range(take)]
            if op != "Sub" and self.chance(0.04):
                picked.append(picked[0])
                op = "Sum"
            terms.append(self.add(op, *picked))
            if self.chance(0.03):  # nothing, and no operand for nothing
                terms.append(self.add("Sub", picked[0], picked[0]))
            if self.chance(0.08):
                terms[-1] = self.again(terms[-1])
            if self.chance(0.05):
                self.add("Relu", terms[-1])
        return terms[0]

    def again(self, x: str) -> str:
        """The value once more, under another name."""
        return self.add("Identity", x)

    # -- what comes of it

    def graph(self) -> Graph:
        """What was drawn; every value that nobody reads is an output, now and then one that somebody reads."""
        read = {name for node in self.nodes for name in node.inputs}
        made = [name for node in self.nodes for name in node.outputs]
        outputs = [name for name in made if name not in read or self.chance(0.03)]
        anonymous, lost = self.chance(0.2), self.choose(0, 0, 0, 0.05)
        names = [name for name in self.values[0] if not self.chance(lost)]
        shapes = {name: self._shape(name, anonymous) for name in names}
        return Graph(tuple(self.nodes), tuple(self.inputs), tuple(outputs), shapes)

    def _shape(self, value: str, anonymous: bool) -> Shape:
        """A size that is not the same at all sizes of the input is a symbol, or unknown."""
        columns = zip(*self.shapes(value), strict=True)
        return tuple(
            sizes[0] if len(set(sizes)) == 1 else None if anonymous else "n" + "_".join(map(str, sizes))
            for sizes in columns
        )


# ---------------------------------------------------------------- convolutions


def convolutions(sketch: Sketch, size: int) -> None:
    """Blocks of convolutions, pools and affines over one, two or three axes."""
    spatial = sketch.choose(1, 1, 1, 2, 2, 2, 2, 3)
    sizes = [sketch.choose(*range(5, 10 if spatial < 3 else 7)) for _ in range(spatial)]
    grown = [tuple(n + more for n in sizes) for more in range(sketch.count)]
    batch = (sketch.choose(1, 2),) if sketch.chance(0.85) else ()
    axis, channels = len(batch), sketch.choose(1, 2, 3, 4, 6)
    x = sketch.input([(*batch, channels, *more) for more in grown])
    while len(sketch.nodes) < size:
        x = _tolerant(sketch, x, lambda x: _conv_block(sketch, x, axis, spatial))
        if sketch.chance(0.35):
            x = sketch.add("Relu", x)
        if sketch.chance(0.05):
            sketch.add("Tanh", x)


def _tolerant(sketch: Sketch, x: str, step: Callable[[str], str]) -> str:
    """What a step makes of a value; the value itself where that does not fit (what was drawn stays, unread)."""
    try:
        return step(x)
    except Unsuitable:
        return x


def _conv_block(sketch: Sketch, x: str, axis: int, spatial: int) -> str:
    channels = sketch.shapes(x)[0][axis]
    small = min(min(shape[axis + 1 :]) for shape in sketch.shapes(x)) < 4
    strides = tuple(1 if small else sketch.choose(1, 1, 1, 1, 2, 2, 3) for _ in range(spatial))
    slacks = tuple(sketch.choose(0, 0, 0, 0, 0, 1, 2, -1) for _ in range(spatial))
    if sketch.chance(0.05):  # down to one element
        slacks = tuple(1 - size for size in sketch.shapes(x)[0][axis + 1 :])
    if sketch.chance(0.5):
        strides, slacks = strides[:1] * spatial, slacks[:1] * spatial
    aim = Aim(sketch.choose(channels, channels, 2, 4, 6), axis, strides, slacks)
    if sketch.chance(0.35):
        return _conv_term(sketch, x, aim)
    wanted = sketch.choose(2, 2, 3, 3, 4, 6)
    terms: dict[str, None] = {}
    for _ in range(wanted):
        try:
            terms[_conv_term(sketch, x, aim)] = None
        except Unsuitable:
            continue
    fitting = [term for term in terms if sketch.shapes(term) == sketch.shapes(next(iter(terms)))]
    if not fitting:
        raise Unsuitable
    if sketch.chance(0.3):
        fitting.append(_foreign(sketch, fitting[0]))
    y = sketch.sum_up(fitting)
    return sketch.affine(y, axis) if sketch.chance(0.2) else y


def _foreign(sketch: Sketch, like: str) -> str:
    """An operand that does not belong to the others: of another value, or not linear."""
    if sketch.chance(0.5):
        return sketch.add("Relu", like)
    return sketch.input(sketch.shapes(like))


def _conv_term(sketch: Sketch, x: str, aim: Aim) -> str:
    """One linear operator with this aim, made of one node or of several."""
    channels, axis, spatial = sketch.shapes(x)[0][aim.axis], aim.axis, len(aim.strides)
    ones, zeros = (1,) * spatial, (0,) * spatial
    same = channels == aim.channels
    kind = sketch.random.random()
    if kind < 0.12 and same and aim.keeps:
        return x
    if kind < 0.18 and same and aim.keeps:
        return sketch.affine(sketch.again(x) if sketch.chance(0.2) else x, axis)
    if kind < 0.28 and same:
        return sketch.pool(x, sketch.window(aim.strides, aim.slacks))
    if kind < 0.36:  # a point, often, then whatever pads
        inner = sketch.choose(aim.channels, channels, 2, 4)
        window = sketch.window(ones, zeros) if sketch.chance(0.3) else Window.point(spatial)
        point = sketch.conv(x, axis, inner, window, bias=0.3)
        return sketch.conv(point, axis, aim.channels, sketch.window(aim.strides, aim.slacks))
    if kind < 0.44:  # whatever pads, then a point
        wide = sketch.conv(x, axis, sketch.choose(channels, 2, 4), sketch.window(aim.strides, aim.slacks))
        wide = sketch.affine(wide, axis) if sketch.chance(0.3) else wide
        return sketch.conv(wide, axis, aim.channels, Window.point(spatial))
    if kind < 0.52:  # all the padding in the first of two
        return _pad_first(sketch, x, aim)
    if kind < 0.58:  # a point that strides
        point = Window((1,) * spatial, aim.strides, ones, ((0, 0),) * spatial)
        inner = sketch.conv(x, axis, sketch.choose(channels, 2, 4), point, bias=0.3)
        return sketch.conv(inner, axis, aim.channels, sketch.window(ones, zeros))
    if kind < 0.62 and same:  # a pool, then a point
        return sketch.conv(
            sketch.pool(x, sketch.window(aim.strides, aim.slacks)), axis, aim.channels, Window.point(spatial)
        )
    if kind < 0.66 and channels == 1 and aim.keeps:
        return x
    if kind < 0.70 and aim.keeps:
        return sketch.sum_up([_conv_term(sketch, x, aim) for _ in range(2)])
    if kind < 0.73 and aim.keeps:
        return _opaque(sketch, x, aim)
    if kind < 0.78:
        return sketch.conv(x, axis, aim.channels, _coincident(sketch, x, aim))
    return sketch.conv(x, axis, aim.channels, sketch.window(aim.strides, aim.slacks))


def _pad_first(sketch: Sketch, x: str, aim: Aim) -> str:
    strides = [(stride, 1) if sketch.chance(0.5) else (1, stride) for stride in aim.strides]
    second = sketch.bare([pair[1] for pair in strides])
    lacking = [(reach - 1) * pair[0] for reach, pair in zip(second.extent, strides, strict=True)]
    slacks = [slack + lack for slack, lack in zip(aim.slacks, lacking, strict=True)]
    first = sketch.window([pair[0] for pair in strides], slacks)
    middle = sketch.choose(2, 4, aim.channels)
    return sketch.conv(sketch.conv(x, aim.axis, middle, first), aim.axis, aim.channels, second)


def _coincident(sketch: Sketch, x: str, aim: Aim) -> Window:
    """A window of other strides, that gives the wanted size where the input has the first of its sizes."""
    sizes = sketch.shapes(x)[0][-len(aim.strides) :]
    strides, slacks = [], []
    for size, stride, slack in zip(sizes, aim.strides, aim.slacks, strict=True):
        wanted = (size + slack - 1) // stride + 1
        strides.append(sketch.choose(1, 2, 3))
        least = (wanted - 1) * strides[-1] - size + 1
        fits = (size + slack - 1) // strides[-1] + 1 == wanted and sketch.chance(0.5)
        slacks.append(slack if fits else least + sketch.below(strides[-1]))
    return sketch.window(strides, slacks)


def _opaque(sketch: Sketch, x: str, aim: Aim) -> str:
    """A linear operator of which the graph says too little: transposed, or its padding depends on the size."""
    channels, spatial, outputs = sketch.shapes(x)[0][aim.axis], len(aim.strides), aim.channels
    ones = (1,) * spatial
    if aim.axis != 1 or sketch.chance(0.5):
        window = Window((3,) * spatial, ones, ones, None)
        return sketch.conv(x, aim.axis, outputs, window)
    weight = sketch.random.normal(size=(channels, outputs, *ones))
    linear = Linear("io", channels, outputs, 1, 1)
    return sketch.add("ConvTranspose", x, weight=(weight, None), linear=linear)


# ---------------------------------------------------------------- matrices and tables


def matrices(sketch: Sketch, size: int) -> None:
    """Blocks of matrix products along any axis of values of two to four axes."""
    shape = [sketch.choose(2, 3, 4, 5) for _ in range(sketch.choose(2, 2, 3, 4))]
    shape = shape[:1] * len(shape) if sketch.chance(0.4) else shape
    grows = sketch.below(len(shape))
    x = sketch.input(
        [tuple(n + more * (a == grows) for a, n in enumerate(shape)) for more in range(sketch.count)]
    )
    _matrix_blocks(sketch, x, size, fixed=grows)


def tables(sketch: Sketch, size: int) -> None:
    """Blocks that begin with rows of a table."""
    shape, rows = [sketch.choose(1, 2, 3) for _ in range(sketch.choose(1, 2))], sketch.choose(2, 5, 9)
    x = sketch.input([(shape[0] + more, *shape[1:]) for more in range(sketch.count)], rows)
    outputs = sketch.choose(2, 3, 8)
    terms = [sketch.table(x, rows, outputs) for _ in range(sketch.choose(1, 1, 2, 3))]
    terms = [_matrix_term(sketch, t, len(shape), outputs) if sketch.chance(0.4) else t for t in terms]
    _matrix_blocks(sketch, sketch.sum_up(terms), size, fixed=0)


def _matrix_blocks(sketch: Sketch, x: str, size: int, fixed: int) -> None:
    while len(sketch.nodes) < size:
        rank = sketch.rank(x)
        axis = sketch.choose(*(a for a in range(max(rank - 2, 0), rank) if a != fixed), rank - 1)
        if len({shape[axis] for shape in sketch.shapes(x)}) > 1:
            return
        outputs = sketch.choose(sketch.shapes(x)[0][axis], sketch.shapes(x)[0][axis], 1, 3, 6)
        if sketch.chance(0.5):
            x = _matrix_term(sketch, x, axis, outputs)
        else:
            terms = [_matrix_term(sketch, x, axis, outputs) for _ in range(sketch.choose(2, 2, 3, 4))]
            terms = list(dict.fromkeys(terms))
            terms += [_foreign(sketch, terms[0])] if sketch.chance(0.3) else []
            x = sketch.sum_up(terms)
        x = sketch.affine(x, axis) if sketch.chance(0.15) else x
        x = sketch.add("Relu", x) if sketch.chance(0.25) else x


def _matrix_term(sketch: Sketch, x: str, axis: int, outputs: int) -> str:
    """One linear operator of as many outputs, along one axis."""
    inputs, kind = sketch.shapes(x)[0][axis], sketch.random.random()
    if kind < 0.15 and inputs == outputs:
        return x
    if kind < 0.25 and inputs == outputs:
        return sketch.affine(x, axis)
    if kind < 0.45:  # of low rank
        return sketch.matrix(sketch.matrix(x, axis, sketch.choose(1, 2), axis), axis, outputs, axis)
    if kind < 0.5:
        return sketch.matrix(sketch.again(x), axis, outputs, axis)
    if kind < 0.55 and inputs == outputs:
        return sketch.sum_up([_matrix_term(sketch, x, axis, outputs) for _ in range(2)])
    other = 2 * sketch.rank(x) - 3 - axis
    if kind < 0.65 and other >= 0 and {shape[other] for shape in sketch.shapes(x)} == {inputs} == {outputs}:
        return sketch.matrix(x, other, outputs, other)
    return sketch.matrix(x, axis, outputs, axis)


def turned(sketch: Sketch, size: int) -> None:
    """Gemm that reads its matrix transposed, alone and in sums."""
    inputs, rows, outputs = (sketch.choose(2, 3, 4) for _ in range(3))
    x = sketch.input([(inputs, rows + more) for more in range(sketch.count)])
    terms = [sketch.matrix(x, 0, outputs, 1) for _ in range(sketch.choose(1, 2, 3))]
    if sketch.chance(0.4):
        inner = sketch.matrix(x, 0, sketch.choose(1, 2, outputs), 0)
        terms.append(sketch.matrix(sketch.affine(inner, 0) if sketch.chance(0.5) else inner, 0, outputs, 1))
    if sketch.chance(0.3):
        terms.append(sketch.matrix(sketch.matrix(x, 0, 2, 1), 1, outputs, 1))
    _matrix_blocks(sketch, sketch.sum_up(terms), size, fixed=0)


WORLDS = (convolutions,) * 6 + (matrices,) * 2 + (tables, turned)


def draw(seed: int, size: int, symbolic: bool = False) -> tuple[Graph, Weights, list[Arrays]]:
    """A random graph of about `size` nodes, its weights, and its inputs at one size or, `symbolic`, at three."""
    sketch = Sketch(np.random.default_rng(seed), 3 if symbolic else 1)
    while not sketch.nodes:
        try:
            sketch.choose(*WORLDS)(sketch, size)
        except Unsuitable:
            continue
    inputs = [{name: values[name] for name in sketch.inputs} for values in sketch.values]
    return sketch.graph(), sketch.weights, inputs
