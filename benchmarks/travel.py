"""How long deciding takes: `travel` on graphs of 1,000, 10,000 and 50,000 nodes, of shapes that could make it slow.

    python -m benchmarks.travel [NODES ...]

Prints seconds, and how many times longer ten thousand nodes take than one thousand: 10 is linear.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from bnfold.algebra import Affine, Linear
from bnfold.ir import Graph, Node
from bnfold.travel import travel

SIZES = (1_000, 10_000, 50_000)
CHANNELS = 4
SHAPE = ("N", CHANNELS, 8, 8)


class Sketch:
    """A graph while it is made."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.shapes: dict[str, tuple[object, ...]] = {"x": SHAPE}

    def add(self, op: str, *inputs: str, channels: int = CHANNELS, **parts: object) -> str:
        """One node, and the value that it computes."""
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(Node(name, op, inputs, (f"{name}.out",), parts.pop("attributes", {}), **parts))
        self.shapes[f"{name}.out"] = ("N", channels, 8, 8)
        return f"{name}.out"

    def conv(self, value: str, channels: int = CHANNELS) -> str:
        """A convolution from some channels to a few."""
        linear = Linear(
            "oi", channels, CHANNELS, 1, 1, centre=(1, 1) if channels == CHANNELS else None, partial="zeros"
        )
        return self.add("Conv", value, linear=linear)

    def norm(self, value: str, channels: int = CHANNELS) -> str:
        """A BatchNorm; a run of them neither grows nor vanishes."""
        seed = len(self.nodes)
        scale = np.linspace(0.9, 1.1, channels) ** (-1) ** (seed % 2)
        affine = Affine.along(1, 4, scale, np.linspace(-1, 1, channels) + seed % 7)
        return self.add("BatchNormalization", value, channels=channels, affine=affine)

    def until(self, size: int) -> Iterator[int]:
        """Go on until there are so many nodes."""
        while len(self.nodes) < size:
            yield len(self.nodes)

    def graph(self, *outputs: str) -> Graph:
        """What was made."""
        return Graph(tuple(self.nodes), ("x",), outputs, self.shapes)


def chain(sketch: Sketch, size: int) -> Graph:
    """Conv, BatchNorm, Relu, over and over."""
    value = "x"
    for _ in sketch.until(size):
        value = sketch.add("Relu", sketch.norm(sketch.conv(value)))
    return sketch.graph(value)


def kept(sketch: Sketch, size: int) -> Graph:
    """Nothing can move: Tanh, BatchNorm, Relu, over and over."""
    value = "x"
    for _ in sketch.until(size):
        value = sketch.add("Relu", sketch.norm(sketch.add("Tanh", value)))
    return sketch.graph(value)


def norms(sketch: Sketch, size: int) -> Graph:
    """Nothing but BatchNorms below one convolution."""
    value = sketch.conv("x")
    for _ in sketch.until(size):
        value = sketch.norm(value)
    return sketch.graph(value)


def passes(sketch: Sketch, size: int) -> Graph:
    """One BatchNorm, far below its convolution."""
    value = sketch.conv("x")
    for _ in sketch.until(size - 1):
        value = sketch.add("Identity", value)
    return sketch.graph(sketch.norm(value))


def residual(sketch: Sketch, size: int) -> Graph:
    """ResNet: x + BN(conv(relu(BN(conv(x)))))."""
    value = "x"
    for _ in sketch.until(size):
        inner = sketch.add("Relu", sketch.norm(sketch.conv(value)))
        value = sketch.add("Relu", sketch.add("Add", value, sketch.norm(sketch.conv(inner))))
    return sketch.graph(value)


def preactivated(sketch: Sketch, size: int) -> Graph:
    """Pre-activation ResNet: x + conv(relu(BN(x)))."""
    value = sketch.conv("x")
    for _ in sketch.until(size):
        value = sketch.add("Add", value, sketch.conv(sketch.add("Relu", sketch.norm(value))))
    return sketch.graph(value)


def sums(sketch: Sketch, size: int) -> Graph:
    """A sum of many convolutions, two at a time, and a BatchNorm of it."""
    value = sketch.conv("x")
    for _ in sketch.until(size - 1):
        value = sketch.add("Add", value, sketch.conv("x"))
    return sketch.graph(sketch.norm(value))


def branches(sketch: Sketch, size: int) -> Graph:
    """A sum of many BatchNorms that cannot go up, two at a time, read by something opaque."""
    value = sketch.norm("x")
    for _ in sketch.until(size - 1):
        value = sketch.add("Add", value, sketch.norm("x"))
    return sketch.graph(sketch.add("Tanh", value))


def parallel(sketch: Sketch, size: int) -> Graph:
    """RepVGG: relu(BN(conv(x)) + BN(conv(x)) + BN(x))."""
    value = "x"
    for _ in sketch.until(size):
        first = sketch.add("Add", sketch.norm(sketch.conv(value)), sketch.norm(sketch.conv(value)))
        value = sketch.add("Relu", sketch.add("Add", first, sketch.norm(value)))
    return sketch.graph(value)


def fan(sketch: Sketch, size: int) -> Graph:
    """One convolution that many BatchNorms read, each with numbers of its own."""
    value = sketch.conv("x")
    return sketch.graph(*[sketch.norm(value) for _ in sketch.until(size)])


def twins(sketch: Sketch, size: int) -> Graph:
    """One convolution that many equal BatchNorms read."""
    value, affine = sketch.conv("x"), Affine.along(1, 4, np.linspace(1, 2, CHANNELS), 1.0)
    return sketch.graph(*[sketch.add("BatchNormalization", value, affine=affine) for _ in sketch.until(size)])


def dense(sketch: Sketch, size: int) -> Graph:
    """DenseNet with nested Concats, in blocks of 24 layers: concat(x, conv(relu(BN(x))))."""
    value = "x"
    for _ in sketch.until(size):
        value, channels = sketch.conv(value), CHANNELS
        for _ in range(24):
            made = sketch.conv(sketch.add("Relu", sketch.norm(value, channels), channels=channels), channels)
            channels += CHANNELS
            value = sketch.add("Concat", value, made, attributes={"axis": 1}, channels=channels)
        value = sketch.conv(sketch.norm(value, channels), channels)
    return sketch.graph(value)


def joined(sketch: Sketch, size: int) -> Graph:
    """Many BatchNorms that cannot go up, side by side in flat Concats of 24, read by something opaque."""
    rows = []
    for _ in sketch.until(size - 1):
        made = [sketch.norm("x") for _ in range(24)]
        rows.append(sketch.add("Concat", *made, attributes={"axis": 1}, channels=24 * CHANNELS))
    return sketch.graph(*[sketch.add("Tanh", row, channels=24 * CHANNELS) for row in rows])


def nested(sketch: Sketch, size: int) -> Graph:
    """The same in one Concat, two at a time: the worst shape there is, since each BatchNorm asks its way to the end."""
    value = sketch.norm("x")
    for place in sketch.until(size - 1):
        value = sketch.add(
            "Concat", value, sketch.norm("x"), attributes={"axis": 1}, channels=CHANNELS * (place // 2 + 2)
        )
    return sketch.graph(sketch.add("Tanh", value, channels=CHANNELS))


TOPOLOGIES: tuple[Callable[[Sketch, int], Graph], ...] = (
    chain, kept, norms, passes, residual, preactivated, sums, branches, parallel, fan, twins, dense, joined, nested,
)  # fmt: skip


def measure(draw: Callable[[Sketch, int], Graph], size: int) -> tuple[float, int]:
    """Seconds for one graph, and how many BatchNorms stay."""
    graph = draw(Sketch(), size)
    start = time.perf_counter()
    plan = travel(graph)
    return time.perf_counter() - start, plan.kept


def main() -> None:
    """Print one line per topology."""
    sizes = [int(text) for text in sys.argv[1:]] or [*SIZES]
    print(f"{'topology':<14}" + "".join(f"{size:>10,}" for size in sizes) + "   growth  kept")
    for draw in TOPOLOGIES:
        seconds, kept = zip(*[measure(draw, size) for size in sizes], strict=True)
        growth = f"{seconds[1] / seconds[0]:8.1f}" if len(seconds) > 1 else " " * 8
        print(
            f"{draw.__name__:<14}" + "".join(f"{s:>9.2f}s" for s in seconds) + f" {growth}  {kept[-1]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
