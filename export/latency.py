"""The median time of one example, net by net, in one run.

The contestants take turns in short blocks, so that a machine that slows down slows all of them, and the median of each
is over single calls, so that an interrupt counts once. One thread everywhere, in torch as in onnxruntime (see
`export.session` for why). What is timed is what a caller in Python waits for: the call with everything that it costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.session import open_session
from export.write import write

__all__ = ["Timing", "compare_latencies", "measure"]

_BLOCK = 20


@dataclass(frozen=True)
class Timing:
    """One contestant: what it is, nodes and bytes of its file (None for torch), median seconds for one example."""

    name: str
    seconds: float
    nodes: int | None = None
    size: int | None = None


def measure(
    runs: Mapping[str, Callable[[], object]], calls: int = 2000, budget: float = 3.0
) -> dict[str, float]:
    """Return the median seconds of each run, of `calls` calls or as many as fit in `budget` seconds for all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    block, end = 1, time.perf_counter() + budget
    while len(next(iter(times.values()))) < calls and time.perf_counter() < end:
        for name, run in runs.items():
            times[name] += _time_block(run, block)
        block = _BLOCK
    return {name: statistics.median(each) for name, each in times.items()}


def _time_block(run: Callable[[], object], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - start) * 1e-9)
    return times


def compare_latencies(
    folded: nn.Module, unfolded: nn.Module | None, example: Tensor, content: bytes, calls: int = 2000
) -> list[Timing]:
    """Time one example in torch and in onnxruntime.

    Args:
        folded: the net that `content` stands for.
        unfolded: the same with its BatchNorms; None where that is not at hand.
        example: one example, (1, ...).
        content: the bytes of the ONNX file; if its batch is larger than one, the example is repeated to fill it.
        calls: how often each contestant is called, time permitting.

    Returns:
        One `Timing` each for torch, torch folded, onnxruntime on the unfolded net without and with its
        optimisations, and onnxruntime folded; without `unfolded` the second and the last alone.
    """
    nets = {} if unfolded is None else {"torch": unfolded}
    files: dict[str, tuple[bytes, bool]] = {}
    if unfolded is not None:
        plain = write(
            unfolded, example.repeat(2, *[1] * (example.ndim - 1)), optimise=False
        ).SerializeToString()
        files = {
            "onnxruntime, unfolded, optimisations off": (plain, False),
            "onnxruntime, unfolded": (plain, True),
        }
    nets["torch, folded"], files["onnxruntime, folded"] = folded, (content, True)
    with _one_thread():
        runs = {name: _call_torch(net, example) for name, net in nets.items()}
        runs |= {name: _call_onnx(file, example, optimise) for name, (file, optimise) in files.items()}
        medians = measure(runs, calls)
    return [Timing(name, medians[name], *_describe(files.get(name))) for name in runs]


def _describe(file: tuple[bytes, bool] | None) -> tuple[int | None, int | None]:
    import onnx

    return (None, None) if file is None else (len(onnx.load_from_string(file[0]).graph.node), len(file[0]))


def _call_torch(net: nn.Module, example: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return net(example)

    return call


def _call_onnx(content: bytes, example: Tensor, optimise: bool) -> Callable[[], object]:
    session = open_session(content, optimise)
    entry = session.get_inputs()[0]
    batch = entry.shape[0] if isinstance(entry.shape[0], int) else 1
    feed = {entry.name: example.repeat(batch, *[1] * (example.ndim - 1)).numpy()}
    return lambda: session.run(None, feed)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
