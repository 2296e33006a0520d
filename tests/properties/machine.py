"""A machine that computes a `Graph` in float64 NumPy, and one that draws random graphs from the table's rows.

The machine shares no code with the rows: it knows what each operator computes, not how an affine passes it. A linear
operator's weights are folded by `Linear.fold`, which has tests of its own against hand calculations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from bnfold.algebra import Affine, Linear
from bnfold.graph import Graph, Node

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
    n, c, h, w = x.shape
    y = np.einsum(
        "ngihw,giokl->ngohkwl", x.reshape(n, groups, -1, h, w), weight.reshape(groups, -1, *weight.shape[1:])
    )
    y = y.reshape(n, -1, h * k, w * k)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


def _matmul(node: Node, weights: dict[str, Any], x: np.ndarray) -> np.ndarray:
    weight, bias = node.linear.fold(*weights[node.place])
    y = x @ (weight.T if node.linear.order == "oi" else weight)
    return y if bias is None else y + bias


def _embedding(node: Node, weights: dict[str, Any], x: np.ndarray) -> np.ndarray:
    table, bias = node.linear.fold(*weights[node.place])
    y = table[np.abs(np.rint(x * 7)).astype(int) % len(table)]
    return y if bias is None else y + bias


def _pool(node: Node, x: np.ndarray, reduce: Callable[..., np.ndarray], fill: float) -> np.ndarray:
    pad = node.attributes.get("pad", 0)
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)], constant_values=fill)
    return reduce(sliding_window_view(x, (2, 2), axis=(2, 3))[:, :, ::2, ::2], axis=(-2, -1))


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
    "Embedding": _embedding,
    "BatchNormalization": _affine,
    "Affine": _affine,
    "Identity": lambda node, w, x: x,
    "Dropout": lambda node, w, x: x,
    "Cast": lambda node, w, x: x,
    "Reshape": _reshaped,
    "Flatten": _reshaped,
    "Squeeze": _reshaped,
    "Unsqueeze": _reshaped,
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
    "AveragePool": lambda node, w, x: _pool(node, x, np.mean, 0.0),
    "MaxPool": lambda node, w, x: _pool(node, x, np.max, -np.inf),
    "ReduceMean": lambda node, w, x: x.mean(node.attributes["axes"], keepdims=node.attributes["keepdims"]),
    "ReduceMax": lambda node, w, x: x.max(node.attributes["axes"], keepdims=node.attributes["keepdims"]),
    "ReduceSum": lambda node, w, x: x.sum(node.attributes["axes"], keepdims=node.attributes["keepdims"]),
    "Relu": lambda node, w, x: np.maximum(x, 0),
    "LeakyRelu": lambda node, w, x: np.where(x < 0, 0.1 * x, x),
    "PRelu": lambda node, w, x: np.where(x < 0, -0.3 * x, x),
    "Abs": lambda node, w, x: np.abs(x),
    "Resize": lambda node, w, x: np.repeat(np.repeat(x, 2, 2), 2, 3),
    "Pad": lambda node, w, x: _pad(node, x),
    "Tanh": lambda node, w, x: np.tanh(x),
}


@dataclass
class Sketch:
    """A random graph while it is drawn. Values are rank 4 `(2, C, H, W)`; other ranks are left by the op that made them."""

    random: np.random.Generator
    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    values: Arrays = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    batchnorms: float = 0.35

    def pick(self, fits: Callable[[np.ndarray], bool] = lambda x: True) -> str | None:
        """One of the newest values that fit, favouring those that nobody reads yet."""
        read = {name for node in self.nodes for name in node.inputs}
        fitting = [name for name, value in self.values.items() if fits(value) and value.size < 20_000]
        fresh = [name for name in fitting if name not in read]
        if fresh and self.random.random() < 0.8:
            fitting = fresh
        return str(self.random.choice(fitting[-4:])) if fitting else None

    def add(
        self, op: str, inputs: tuple[str, ...], outputs: int = 1, site: str = "", **more: Any
    ) -> tuple[str, ...]:
        name = f"{op.lower()}{len(self.nodes)}"
        names = tuple(f"{name}.{place}" if outputs > 1 else f"{name}.out" for place in range(outputs))
        node = Node(name, op, inputs, names, more.pop("attributes", {}), site=site, **more)
        results = COMPUTE[op](node, self.weights, *[self.values[value] for value in inputs])
        results = results if isinstance(results, tuple) else (results,)
        self.nodes.append(node)
        self.values.update(zip(names, results, strict=True))
        return names

    def next_name(self, op: str) -> str:
        return f"{op.lower()}{len(self.nodes)}"

    def graph(self) -> Graph:
        """What was drawn; every value that nobody reads is an output, now and then one that somebody reads."""
        read = {name for node in self.nodes for name in node.inputs}
        made = [name for node in self.nodes for name in node.outputs]
        outputs = [name for name in made if name not in read or self.random.random() < 0.03]
        shapes = {
            name: ("N", *value.shape[1:]) if value.shape[:1] == (2,) else value.shape
            for name, value in self.values.items()
        }
        return Graph(tuple(self.nodes), tuple(self.inputs), tuple(outputs), shapes)


def gammas(random: np.random.Generator, size: int) -> np.ndarray:
    """Scales of a BatchNorm: positive, of mixed sign, or with zeros, each in a good share of all draws."""
    scale = np.exp(random.normal(0, 0.5, size))
    kind = random.random()
    if kind < 0.4:
        return scale
    scale = np.where(random.random(size) < 0.3, -scale, scale)
    return np.where(random.random(size) < 0.2, 0.0, scale) if kind > 0.85 else scale


def batchnorm(sketch: Sketch) -> None:
    value = sketch.pick(lambda x: x.ndim in (2, 3, 4))
    if value is None:
        return
    rank, size = sketch.values[value].ndim, sketch.values[value].shape[1]
    shift = sketch.random.normal(size=size) * (sketch.random.random() < 0.85)
    sketch.add(
        "BatchNormalization", (value,), affine=Affine.along(1, rank, gammas(sketch.random, size), shift)
    )


def affine(sketch: Sketch) -> None:
    value = sketch.pick()
    if value is None:
        return
    shape = [
        n if axis and sketch.random.random() < 0.5 else 1 for axis, n in enumerate(sketch.values[value].shape)
    ]
    scale = np.exp(sketch.random.normal(size=shape)) if sketch.random.random() < 0.5 else np.ones(shape)
    sketch.add("Affine", (value,), affine=Affine.of(scale, sketch.random.normal(size=shape)))


def conv(sketch: Sketch) -> None:
    random = sketch.random
    value = sketch.pick(lambda x: x.ndim == 4 and min(x.shape[2:]) >= 3)
    if value is None:
        return
    channels = sketch.values[value].shape[1]
    out = channels if random.random() < 0.6 else int(random.choice([4, 6, 8]))
    groups = int(random.choice([g for g in (1, 2, channels) if channels % g == 0 and out % g == 0]))
    kernel, stride = int(random.choice([1, 3])), int(random.choice([1, 1, 2]))
    pad = int(random.choice([0, kernel // 2]))
    same = channels == out and stride == 1 and pad == kernel // 2
    name = sketch.next_name("Conv")
    sketch.weights[name] = weight = (
        random.normal(size=(out, channels // groups, kernel, kernel)) / 3,
        random.normal(size=out) if random.random() < 0.5 else None,
    )
    again = [
        n for n in sketch.nodes if n.op == "Conv" and n.linear.inputs == channels and random.random() < 0.15
    ]
    if again:
        del sketch.weights[name]
        sketch.add(
            "Conv", (value,), site=again[0].place, linear=again[0].linear, attributes=again[0].attributes
        )
        return
    linear = Linear(
        "oi", channels, out, 1, 1, groups=groups,
        centre=(kernel // 2,) * 2 if same else None,
        partial="it pads with zeros" if pad else "",
        biasless="it has no bias" if weight[1] is None and random.random() < 0.2 else "",
    )  # fmt: skip
    sketch.add("Conv", (value,), linear=linear, attributes={"pad": pad, "stride": stride})


def conv_transpose(sketch: Sketch) -> None:
    value = sketch.pick(lambda x: x.ndim == 4 and x.shape[2] < 7)
    if value is None:
        return
    channels, out = sketch.values[value].shape[1], int(sketch.random.choice([4, 8]))
    groups = int(sketch.random.choice([g for g in (1, 2, 4) if channels % g == 0 and out % g == 0]))
    name = sketch.next_name("ConvTranspose")
    sketch.weights[name] = (sketch.random.normal(size=(channels, out // groups, 2, 2)) / 2, None)
    linear = Linear("io", channels, out, 1, 1, groups=groups, partial="it has stride 2")
    sketch.add("ConvTranspose", (value,), linear=linear)


def matmul(sketch: Sketch) -> None:
    value = sketch.pick()
    if value is None:
        return
    x = sketch.values[value]
    out = x.shape[-1] if sketch.random.random() < 0.5 else 5
    order = str(sketch.random.choice(["oi", "io"]))
    op = "Gemm" if x.ndim == 2 else "MatMul"
    name, axis = sketch.next_name(op), x.ndim - 1
    size = (out, x.shape[-1]) if order == "oi" else (x.shape[-1], out)
    sketch.weights[name] = (sketch.random.normal(size=size) / 3, sketch.random.normal(size=out))
    linear = Linear(order, x.shape[-1], out, axis, axis, centre=() if out == x.shape[-1] else None)
    sketch.add(op, (value,), linear=linear)


def embedding(sketch: Sketch) -> None:
    value = sketch.pick(lambda x: x.ndim <= 2)
    if value is None:
        return
    name = sketch.next_name("Embedding")
    sketch.weights[name] = (sketch.random.normal(size=(11, 6)), None)
    rank = sketch.values[value].ndim
    linear = Linear("io", 11, 6, rank, rank, sealed="it looks rows up")
    sketch.add("Embedding", (value,), linear=linear)


def move(sketch: Sketch) -> None:
    random = sketch.random
    value = sketch.pick(lambda x: x.ndim >= 2)
    if value is None:
        return
    x = sketch.values[value]
    kind = str(random.choice(["Transpose", "Reshape", "Slice", "Gather", "Tile", "Expand", "Split", "Split"]))
    axis = int(random.integers(1, x.ndim))
    if kind == "Transpose":
        perm = (0, *(1 + random.permutation(x.ndim - 1)))
        sketch.add(kind, (value,), attributes={"perm": tuple(map(int, perm))})
    elif kind == "Reshape":
        reshape(sketch, value)
    elif kind == "Slice" and x.shape[axis] > 2:
        start, step = int(random.integers(0, 2)), int(random.choice([1, 1, 2]))
        stop = int(random.integers(start + 1, x.shape[axis] + 1))
        slices = tuple(slice(start, stop, step) if a == axis else slice(None) for a in range(x.ndim))
        sketch.add(kind, (value,), attributes={"slices": slices})
    elif kind == "Gather":
        indices = (
            random.permutation(x.shape[axis])
            if random.random() < 0.7
            else random.integers(0, x.shape[axis], 5)
        )
        if random.random() < 0.2 and x.ndim > 2:
            indices = np.asarray(indices[0])
        sketch.add(kind, (value,), attributes={"axis": axis, "indices": indices})
    elif kind == "Tile" and x.size < 600:
        repeats = tuple(2 if a == axis else 1 for a in range(x.ndim))
        sketch.add(kind, (value,), attributes={"repeats": repeats})
    elif kind == "Expand" and 1 in x.shape[1:]:
        sketch.add(
            kind, (value,), attributes={"to": tuple(3 if a and n == 1 else n for a, n in enumerate(x.shape))}
        )
    elif kind == "Split" and x.shape[axis] > 1:
        first = int(random.integers(1, x.shape[axis]))
        sketch.add(kind, (value,), 2, attributes={"axis": axis, "sizes": (first, x.shape[axis] - first)})


def reshape(sketch: Sketch, value: str) -> None:
    """Flatten some axes, split one in two, or drop and add axes of size 1."""
    random, shape = sketch.random, list(sketch.values[value].shape)
    kind = random.random()
    if kind < 0.4 and len(shape) > 2:
        axis = int(random.integers(1, len(shape) - 1))
        to = [*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]]
    elif kind < 0.7 and len(shape) < 5:
        axis = int(random.integers(1, len(shape)))
        if shape[axis] % 2:
            return
        to = [
            *shape[:axis],
            *((2, shape[axis] // 2) if random.random() < 0.5 else (shape[axis] // 2, 2)),
            *shape[axis + 1 :],
        ]
    elif kind < 0.85 and 1 in shape[1:]:
        to = [n for axis, n in enumerate(shape) if axis == 0 or n != 1]
    else:
        to = [*shape, 1] if len(shape) < 4 else shape
    sketch.add("Reshape", (value,), attributes={"to": tuple(to)})


def shuffle(sketch: Sketch) -> None:
    """The channel shuffle: split the channels in two, transpose, put them together again."""
    value = sketch.pick(lambda x: x.ndim == 4 and x.shape[1] % 2 == 0)
    if value is None:
        return
    n, c, h, w = sketch.values[value].shape
    (split,) = sketch.add("Reshape", (value,), attributes={"to": (n, 2, c // 2, h, w)})
    (turned,) = sketch.add("Transpose", (split,), attributes={"perm": (0, 2, 1, 3, 4)})
    sketch.add("Reshape", (turned,), attributes={"to": (n, c, h, w)})


def combine(sketch: Sketch) -> None:
    """Add, subtract, multiply or concatenate values, now and then by way of broadcasting."""
    random = sketch.random
    first = sketch.pick()
    if first is None:
        return
    shape = sketch.values[first].shape
    op = str(random.choice(["Add", "Add", "Sum", "Sub", "Mul", "Concat"]))
    if op == "Concat":
        axis = 1 if random.random() < 0.8 else len(shape) - 1

        def joins(x: np.ndarray) -> bool:
            return x.ndim == len(shape) and all(a == axis or n == shape[a] for a, n in enumerate(x.shape))

        values = [first, *filter(None, [sketch.pick(joins) for _ in range(int(random.integers(1, 3)))])]
        sketch.add(op, tuple(values), attributes={"axis": axis})
        return

    def broadcasts(x: np.ndarray) -> bool:
        return x.ndim == len(shape) and all(
            n in (1, m) or m == 1 for n, m in zip(x.shape, shape, strict=True)
        )

    second = sketch.pick(broadcasts if random.random() < 0.4 else lambda x: x.shape == shape)
    if second is not None:
        sketch.add(op, (first, second))


def window(sketch: Sketch) -> None:
    """Pooling, means, maxima, resizing and padding."""
    random = sketch.random
    value = sketch.pick(lambda x: x.ndim == 4 and 3 < min(x.shape[2:]) < 20)
    if value is None:
        return
    op = str(
        random.choice(["AveragePool", "MaxPool", "ReduceMean", "ReduceMax", "ReduceSum", "Resize", "Pad"])
    )
    attributes: dict[str, Any] = {"axes": (2, 3), "keepdims": True}
    if op in ("AveragePool", "MaxPool"):
        attributes |= {"pad": int(random.integers(2))}
        attributes |= (
            {"partial": "it counts zero padding"} if attributes["pad"] and op == "AveragePool" else {}
        )
    elif op.startswith("Reduce"):
        attributes |= {"keepdims": bool(random.integers(2))}
        attributes |= {"axes": (1,)} if random.random() < 0.1 else {}
    elif op == "Pad":
        mode = str(random.choice(["constant", "reflect", "edge"]))
        attributes |= {"mode": mode} | ({"partial": "it pads with zeros"} if mode == "constant" else {})
    sketch.add(op, (value,), attributes=attributes)


def blocks(sketch: Sketch) -> None:
    mode = str(sketch.random.choice(["CRD", "DCR"]))
    attributes = {"blocksize": 2, "mode": mode}
    if sketch.random.random() < 0.5:
        value = sketch.pick(lambda x: x.ndim == 4 and x.shape[1] % 4 == 0 and x.shape[2] < 12)
        op = "DepthToSpace"
    else:
        value = sketch.pick(
            lambda x: x.ndim == 4 and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0 and x.shape[1] < 20
        )
        op = "SpaceToDepth"
    if value is not None:
        sketch.add(op, (value,), attributes=attributes)


def pointwise(sketch: Sketch) -> None:
    value = sketch.pick()
    op = str(
        sketch.random.choice(["Relu", "LeakyRelu", "PRelu", "Abs", "Tanh", "Identity", "Dropout", "Cast"])
    )
    if value is not None:
        sketch.add(op, (value,), attributes={"lossless": bool(sketch.random.random() < 0.8)})


def repeat(sketch: Sketch) -> None:
    """Call a BatchNorm once more, on another value: one site, two nodes."""
    norms = [node for node in sketch.nodes if node.op == "BatchNormalization"]
    if not norms:
        return
    node = norms[int(sketch.random.integers(len(norms)))]
    size, rank = node.affine.scale.size, node.affine.rank
    value = sketch.pick(lambda x: x.ndim == rank and x.shape[1] == size)
    if value is not None:
        sketch.add("BatchNormalization", (value,), site=node.place, affine=node.affine)


STEPS = (
    conv,
    conv,
    conv,
    matmul,
    conv_transpose,
    embedding,
    affine,
    move,
    move,
    shuffle,
    combine,
    combine,
    combine,
)
STEPS += (window, window, blocks, pointwise, repeat)


def draw(seed: int, size: int) -> tuple[Graph, dict[str, Any], Arrays]:
    """A random graph of about `size` nodes, its weights and its inputs."""
    random = np.random.default_rng(seed)
    sketch = Sketch(random)
    for place in range(int(random.integers(1, 3))):
        sketch.inputs.append(f"x{place}")
        sketch.values[f"x{place}"] = random.normal(size=(2, 4, 6, 6))
    tries = 0
    while len(sketch.nodes) < size and tries < 20 * size:
        tries += 1
        step = batchnorm if random.random() < sketch.batchnorms else STEPS[int(random.integers(len(STEPS)))]
        step(sketch)
    inputs = {name: sketch.values[name] for name in sketch.inputs}
    return sketch.graph(), sketch.weights, inputs


def chain(*nodes: Node, shape: tuple[int, ...] = (2, 4, 6, 6)) -> Graph:
    """A hand-made graph: nodes in a row, all values of one shape."""
    values = ["x", *(f"v{place}" for place in range(len(nodes)))]
    linked = [
        replace(node, inputs=(a,), outputs=(b,)) for node, (a, b) in zip(nodes, pairwise(values), strict=True)
    ]
    return Graph(tuple(linked), ("x",), (values[-1],), dict.fromkeys(values, shape))
