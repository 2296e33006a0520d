"""What the proof costs: its share of a fold that compares nothing, for the nets of `nets` and `branches`.

    python -m benchmarks.proof

Each fold is timed as a whole and, within it, `simulation.check` and `response.check_merges`. A share is a ratio within
one run, so it does not depend on how busy the machine is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import bnfold
from benchmarks import branches, nets
from bnfold import decide


@contextmanager
def timed(name: str, spent: dict[str, float]) -> Iterator[None]:
    """Add the time that a function of `decide` takes to a sum."""
    real: Callable[..., Any] = getattr(decide, name)

    def clocked(*given: Any) -> Any:
        start = time.perf_counter()
        try:
            return real(*given)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    setattr(decide, name, clocked)
    try:
        yield
    finally:
        setattr(decide, name, real)


def shares(model: nn.Module, inputs: Any, rounds: int = 3) -> tuple[float, float, float]:
    """Seconds of a fold without verification, and the shares of the two checks; of the quickest of some rounds."""
    best = (float("inf"), 0.0, 0.0)
    for _ in range(rounds):
        spent: dict[str, float] = {}
        with timed("check", spent), timed("check_merges", spent):
            start = time.perf_counter()
            bnfold.fold(model, inputs, verify=False)
            whole = time.perf_counter() - start
        best = min(best, (whole, spent["check"] / whole, spent.get("check_merges", 0.0) / whole))
    return best


def models() -> Iterator[tuple[str, nn.Module, Any]]:
    """The nets, with inputs."""
    for family, build in ((nets.NETS, nets.build), (branches.BRANCHES, branches.build)):
        for name in family:
            yield name, *build(name)


def main() -> None:
    torch.set_num_threads(1)
    table = Table("net", "fold, ms", "simulation", "response")
    for name, model, inputs in models():
        whole, algebra, merges = shares(model, inputs)
        table.add_row(name, f"{1000 * whole:.0f}", f"{algebra:.1%}", f"{merges:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
