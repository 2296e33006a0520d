"""Is a second operator cheaper than a BatchNormalization? An operator whose output a BatchNorm and somebody else read.

    x -- operator --+-- BatchNormalization -- Relu -- a          x --+-- operator, folded -- Relu -- a
                    +-- Relu -- b                                    +-- operator -- Relu -- b

Both forms come from one model, the second by `bnfold.fold(model, duplicate=True)`, and take turns in onnxruntime on one
thread. Printed is the second's CPU time as a multiple of the first's, the median over rounds of the best of several
calls, with a session's default options and with all optimisations off.

    python -m benchmarks.duplicate
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

import bnfold

ROUNDS, SECONDS = 15, 0.02

# operator, channels read, channels written, kernel, groups, size of the map
CASES = [
    ("depthwise 3x3", 32, 32, 3, 32, 112),
    ("depthwise 3x3", 128, 128, 3, 128, 28),
    ("depthwise 1x1", 64, 64, 1, 64, 56),
    ("conv 1x1", 2, 64, 1, 1, 56),
    ("conv 1x1", 8, 64, 1, 1, 56),
    ("conv 1x1", 64, 64, 1, 1, 56),
    ("conv 1x1", 256, 256, 1, 1, 14),
    ("conv 3x3", 3, 32, 3, 1, 112),
    ("conv 3x3", 64, 64, 3, 1, 28),
    ("conv 3x3", 256, 256, 3, 1, 14),
    ("Gemm", 64, 64, 0, 1, 1),
    ("Gemm", 512, 512, 0, 1, 1),
]


def make_model(read: int, written: int, kernel: int, groups: int, size: int) -> onnx.ModelProto:
    """The first form, with random numbers."""
    random = np.random.default_rng(0)
    weights = {
        "gamma": random.uniform(0.5, 1.5, written), "beta": random.normal(size=written),
        "mean": random.normal(size=written), "var": random.uniform(0.5, 1.5, written),
    }  # fmt: skip
    if kernel:
        weights["w"] = random.normal(size=(written, read // groups, kernel, kernel)) / np.sqrt(
            read * kernel**2 / groups
        )
        operator = helper.make_node("Conv", ["x", "w"], ["y"], group=groups, pads=[kernel // 2] * 4)
        given, made = [1, read, size, size], [1, written, size, size]
    else:
        weights["w"] = random.normal(size=(written, read)) / np.sqrt(read)
        operator = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
        given, made = [1, read], [1, written]
    nodes = [
        operator,
        helper.make_node("BatchNormalization", ["y", "gamma", "beta", "mean", "var"], ["z"]),
        helper.make_node("Relu", ["z"], ["a"]),
        helper.make_node("Relu", ["y"], ["b"]),
    ]
    infos = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, given if name == "x" else made)
        for name in "xab"
    ]
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "shared", infos[:1], infos[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def caller(model: onnx.ModelProto, optimise: bool) -> Callable[[], Any]:
    """What runs the model once."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape
    feed = {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}
    return lambda: session.run(None, feed)


def clock(call: Callable[[], Any]) -> float:
    """CPU seconds of this thread, in which a session with one thread does all its work."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def compare(kept: onnx.ModelProto, copied: onnx.ModelProto, optimise: bool) -> tuple[float, float]:
    """Microseconds of the first form, and the time of the second as a multiple of it."""
    calls = [caller(kept, optimise), caller(copied, optimise)]
    repeats = max(3, round(SECONDS / min(clock(calls[0]) for _ in range(3))))
    rounds = [[min(clock(call) for _ in range(repeats)) for call in calls] for _ in range(ROUNDS)]
    return 1e6 * median(first for first, _ in rounds), median(second / first for first, second in rounds)


def main() -> None:
    """Measure every case, and print one row each."""
    table = Table(
        "operator",
        "read",
        "written",
        "map",
        "default, µs",
        "copied, ratio",
        "optimisations off, µs",
        "copied, ratio",
    )
    for name, *sizes in CASES:
        kept = make_model(*sizes)
        copied, report = bnfold.fold(kept, duplicate=True)
        if report.count("folded") != 1:
            raise RuntimeError(f"{name} should have been copied")
        times = [f"{value:.3g}" for optimise in (True, False) for value in compare(kept, copied, optimise)]
        read, written, kernel, _, size = sizes
        table.add_row(name, str(read), str(written), f"{size}x{size}" if kernel else "-", *times)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
