"""What should stand where a BatchNorm stays: itself, one multiply and one add, or (its scale gone) one add.

Eight times (affine, ReLU) over one value, one thread, each form interleaved with the others in one process; printed is
the time of each form as a multiple of BatchNormalization's, the median over rounds of the best of several calls.

    python -m benchmarks.leftover
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table
from torch import nn

LAYERS, ROUNDS, CALLS = 8, 15, 4
SHAPES = [
    (1, 64, 1, 1),
    (1, 256, 14, 14),
    (1, 64, 56, 56),
    (16, 256, 14, 14),
    (1, 512),
    (64, 512),
    (1, 128, 400),
]
FORMS = ("BatchNorm", "multiply, add", "fused multiply-add", "add")


def onnx_model(form: str, shape: tuple[int, ...], random: np.random.Generator) -> bytes:
    """`LAYERS` times (affine in this form, Relu), with random numbers."""
    channels, broadcast = shape[1], (shape[1], *[1] * (len(shape) - 2))
    nodes, weights, value = [], [], "x"

    def constant(name: str, values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    for layer in range(LAYERS):
        scale, shift = np.exp(random.normal(size=channels) / 4), random.normal(size=channels)
        if form == "BatchNorm":
            names = [
                constant(f"{n}{layer}", v)
                for n, v in zip("gbmv", (scale, shift, 0 * shift, 0 * scale + 1), strict=True)
            ]
            nodes.append(helper.make_node("BatchNormalization", [value, *names], [f"a{layer}"]))
        else:
            if form != "add":
                nodes.append(
                    helper.make_node(
                        "Mul", [value, constant(f"s{layer}", scale.reshape(broadcast))], [f"m{layer}"]
                    )
                )
                value = f"m{layer}"
            nodes.append(
                helper.make_node(
                    "Add", [value, constant(f"t{layer}", shift.reshape(broadcast))], [f"a{layer}"]
                )
            )
        nodes.append(helper.make_node("Relu", [f"a{layer}"], [f"y{layer}"]))
        value = f"y{layer}"
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", value)]
    graph = helper.make_graph(nodes, "leftover", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def onnx_run(form: str, shape: tuple[int, ...], random: np.random.Generator) -> Callable[[], Any] | None:
    """What runs this form in onnxruntime with its default optimisations; None where ONNX has no such operator."""
    if form == "fused multiply-add":
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx_model(form, shape, random), options, ["CPUExecutionProvider"])
    feed = {"x": random.normal(size=shape).astype(np.float32)}
    return lambda: session.run(None, feed)


class Affine(nn.Module):
    """A per-channel affine in one of the forms."""

    def __init__(self, form: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.form = form
        self.scale = nn.Parameter(torch.rand(shape[1], *[1] * (len(shape) - 2)) + 0.5)
        self.shift = nn.Parameter(torch.randn_like(self.scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "add":
            return x + self.shift
        if self.form == "multiply, add":
            return x * self.scale + self.shift
        return torch.addcmul(self.shift, x, self.scale)


def torch_run(form: str, shape: tuple[int, ...], random: np.random.Generator) -> Callable[[], Any]:
    """What runs this form in torch."""
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    layers = [norm(shape[1]) if form == "BatchNorm" else Affine(form, shape) for _ in range(LAYERS)]
    model = nn.Sequential(*(layer for affine in layers for layer in (affine, nn.ReLU()))).eval()
    x = torch.from_numpy(random.normal(size=shape).astype(np.float32))

    def call() -> Any:
        with torch.inference_mode():
            return model(x)

    return call


def best(call: Callable[[], Any]) -> float:
    """The shortest of a few calls, in seconds."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Measure every form, and print one row per runtime and shape."""
    torch.set_num_threads(1)
    table = Table("runtime", "shape", "BatchNorm, µs", *(f"{form}, ratio" for form in FORMS[1:]))
    for runtime, make in (("onnxruntime", onnx_run), ("torch", torch_run)):
        for shape in SHAPES:
            calls = {form: make(form, shape, np.random.default_rng(0)) for form in FORMS}
            rounds = [{form: best(call) for form, call in calls.items() if call} for _ in range(ROUNDS)]
            ratios = [
                f"{median(r[form] / r['BatchNorm'] for r in rounds):.2f}" if calls[form] else "-"
                for form in FORMS[1:]
            ]
            table.add_row(
                runtime,
                "x".join(map(str, shape)),
                f"{median(r['BatchNorm'] for r in rounds) * 1e6:.0f}",
                *ratios,
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
