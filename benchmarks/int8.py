"""python -m benchmarks.int8: one example at a time with float and with int8 weights, from a small net to a wide one.

The lecture's net with its hidden layers as wide as is said, random weights and statistics, in onnxruntime on one
thread; float and int8 take turns, and a ratio is that of one turn, the median over all. `deviation` is the largest over
all examples, of the largest output. Blocks of 32 to 256 and the kernel that computes in float32 come along for one
width. How the dev loss moves is `python -m train && python -m export --weights int8`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

import numpy as np
import onnx
from rich import box
from rich.console import Console
from rich.table import Table

import bnfold
from benchmarks.latency import build_net
from bnfold.checkpoint import InputDomain
from export.latency import measure
from export.quantise import BLOCK, quantise
from export.session import open_session
from export.write import write

WIDTHS = (200, 512, 1024, 2048, 4096)
BLOCKS = (32, 64, 128, 256)
TURNS = 15


def draw(hidden: int) -> onnx.ModelProto:
    """Return the folded net as an ONNX model."""
    domain = InputDomain((3,), "int64", 0, 27)
    folded, _ = bnfold.fold(build_net(hidden), domain.sample(64))
    return write(folded, domain.sample(2))


def compare(files: Mapping[str, onnx.ModelProto], turns: int = TURNS) -> dict[str, list[float]]:
    """Return for each file the microseconds, the time and the deviation as shares of the first, and its MiB."""
    contexts = [{"input": one[None]} for one in InputDomain((3,), "int64", 0, 27).sample(32).numpy()]
    sessions = {name: open_session(file.SerializeToString()) for name, file in files.items()}
    outputs = {
        name: np.concatenate([session.run(None, one)[0] for one in contexts])
        for name, session in sessions.items()
    }
    first = next(iter(files))
    runs = {name: _call(session, contexts) for name, session in sessions.items()}
    times = [measure(runs, 200, 1.0) for _ in range(turns)]
    return {
        name: [
            statistics.median(one[name] for one in times) * 1e6,
            statistics.median(one[name] / one[first] for one in times),
            float(np.abs(outputs[name] - outputs[first]).max() / np.abs(outputs[first]).max()),
            file.ByteSize() / 2**20,
        ]
        for name, file in files.items()
    }


def _call(session: Any, contexts: list[dict[str, Any]]) -> Callable[[], object]:
    feeds = cycle(contexts)
    return lambda: session.run(None, next(feeds))


def print_rows(console: Console, rows: Mapping[str, list[float]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("weights", "MiB", "us", "of float", "deviation"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    for name, (micros, ratio, deviation, size) in rows.items():
        table.add_row(name, f"{size:.1f}", f"{micros:,.1f}", f"{ratio:.2f}", f"{deviation:.1e}")
    console.print(table)


def main() -> None:
    """Print one table over widths, then one over blocks."""
    console, rows = Console(highlight=False), {}
    for hidden in WIDTHS:
        floats = draw(hidden)
        found = compare({"float": floats, f"int8, block {BLOCK}": quantise(floats)})
        rows |= {f"hidden {hidden:,}, {name}": row for name, row in found.items()}
    print_rows(console, rows)
    floats = draw(1024)
    files = {f"hidden 1,024, int8, block {block}": quantise(floats, block) for block in BLOCKS}
    files["the same, block 128, computed in float32"] = quantise(floats, 128, 1)
    print_rows(console, compare({"hidden 1,024, float": floats} | files, 5))


if __name__ == "__main__":
    main()
