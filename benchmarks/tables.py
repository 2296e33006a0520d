"""python -m benchmarks.tables: whether a table in the place of layers takes less time, and whether the rule knows.

An embedding, Flatten and a Linear against tables of positions, one example at a time in onnxruntime, one thread, other
characters in every call; `export.tables.positions_pay` says what it would have chosen. A choice is right where the one
chosen is not slower by more than a twentieth. Then look-ups in whole tables of growing size, against Gather and Flatten
alone, which is less than any net over characters.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from itertools import cycle

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from bnfold.checkpoint import InputDomain
from export.latency import measure
from export.session import open_session
from export.tables import Lookup, positions_pay, tabulate_positions
from export.write import write

SIZES = [
    (3, 27, 10, 64),
    (3, 27, 10, 200),
    (3, 27, 24, 200),
    (3, 27, 24, 512),
    (3, 27, 64, 200),
    (4, 27, 32, 100),
    (8, 27, 10, 64),
    (8, 27, 10, 200),
    (8, 27, 16, 200),
    (8, 27, 24, 200),
    (8, 27, 64, 512),
    (16, 27, 24, 64),
    (16, 27, 10, 200),
    (16, 27, 64, 512),
    (8, 256, 24, 200),
    (16, 256, 64, 512),
    (8, 1000, 16, 200),
    (8, 1000, 64, 200),
    (8, 1000, 64, 500),
    (16, 1000, 10, 200),
    (16, 1000, 32, 200),
    (3, 3000, 64, 400),
]
"""Positions, characters, width of the embedding, features: what the constants of the rule were fitted to."""

HELD_OUT = [
    (2, 27, 48, 256),
    (5, 27, 20, 128),
    (5, 40, 40, 64),
    (6, 60, 12, 150),
    (10, 27, 12, 100),
    (12, 100, 20, 300),
    (4, 500, 24, 250),
    (6, 2000, 20, 300),
]
"""And what they were not."""

WHOLE = [(27, 3, 27), (64, 3, 27), (27, 4, 27), (128, 3, 27)]
"""Characters, positions, outputs."""


def call(content: bytes, domain: InputDomain) -> Callable[[], object]:
    """Return a call of onnxruntime with another example each time."""
    session = open_session(content)
    feeds = cycle([{"input": one[None]} for one in domain.sample(4096).numpy()])
    return lambda: session.run(None, next(feeds))


def content(net: nn.Module, domain: InputDomain) -> bytes:
    return write(net, domain.sample(2)).SerializeToString()


def compare(positions: int, characters: int, width: int, features: int) -> tuple[float, float]:
    """Return the median seconds of layers and of tables, of the turn with the median ratio of nine."""
    domain = InputDomain((positions,), "int64", 0, characters)
    layers = nn.Sequential(
        nn.Embedding(characters, width), nn.Flatten(), nn.Linear(positions * width, features)
    ).eval()
    runs = {
        "layers": call(content(layers, domain), domain),
        "tables": call(content(tabulate_positions(layers), domain), domain),
    }
    turns = [measure(runs, 2000, 0.2) for _ in range(9)]
    turn = sorted(turns, key=lambda one: one["tables"] / one["layers"])[4]
    return turn["layers"], turn["tables"]


def rows_of_positions() -> Iterator[tuple[bool, list[str]]]:
    """Yield whether the rule chose right, and the row."""
    for sizes in (*SIZES, *HELD_OUT):
        layers, tables = compare(*sizes)
        chosen = positions_pay(*sizes)
        right = tables <= 1.05 * layers if chosen else layers <= 1.05 * tables
        numbers = f"{sizes[0] * sizes[2] * sizes[3]:,}", f"{4 * sizes[0] * sizes[1] * sizes[3] / 2**20:.2f}"
        times = [f"{layers * 1e6:.2f}", f"{tables * 1e6:.2f}", f"{tables / layers:.2f}"]
        verdict = ("tables" if chosen else "layers") + ("" if right else ", wrong")
        yield right, [*map(str, sizes), *numbers, *times, verdict]


def print_positions(console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = (
        "positions",
        "V",
        "width",
        "features",
        "products",
        "MiB",
        "layers us",
        "tables us",
        "ratio",
        "rule",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    verdicts = []
    for right, row in rows_of_positions():
        verdicts.append(right)
        table.add_row(*row)
    console.print(table)
    fitted, held = verdicts[: len(SIZES)], verdicts[len(SIZES) :]
    console.print(f"the rule chose right in {sum(fitted)} of the {len(fitted)} sizes that it was fitted to,")
    console.print(f"and in {sum(held)} of the last {len(held)}, which it was not")


def print_whole(console: Console) -> None:
    for characters, positions, outputs in WHOLE:
        domain = InputDomain((positions,), "int64", 0, characters)
        numbers = np.random.default_rng(0).standard_normal(
            (characters,) * positions + (outputs,), dtype=np.float32
        )
        least = nn.Sequential(nn.Embedding(characters, 9), nn.Flatten()).eval()
        runs = {
            "least": call(content(least, domain), domain),
            "whole": call(content(nn.Sequential(Lookup(torch.from_numpy(numbers))).eval(), domain), domain),
        }
        turns = [measure(runs, 2000, 0.3) for _ in range(9)]
        ratio = statistics.median(one["whole"] / one["least"] for one in turns)
        console.print(
            f"a whole table of {numbers.nbytes / 2**20:.1f} MiB: {ratio:.2f} of Gather and Flatten alone"
        )


def main() -> None:
    """Print both."""
    console = Console(highlight=False, width=120)
    print_positions(console)
    print_whole(console)


if __name__ == "__main__":
    main()
