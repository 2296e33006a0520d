"""What folding a module costs: beside `torch.fx`'s fusing, and in forward passes of the module itself.

    python -m benchmarks.fold_modules [NET ...]

Process time, one thread, the quickest of some turns, alternating; ratios within one run. `fuse` traces symbolically: it
never runs the module, looks for a Conv and a BatchNorm side by side, and checks nothing. Here the module runs five
times before anything is decided (the example; another batch and another size; an odd size; without its batch axis; and
once the fold is made), without its convolutions where no number is asked for, and eight times more, in full, where it
is verified.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import bnfold
from benchmarks import nets

DEFAULT = ("Inception v1", "RepVGG-A0", "IResNet-50", "DenseNet-121", "ShuffleNet v2")
TURNS = 3


def seconds(action: Callable[[], Any]) -> float:
    """Of this process."""
    start = time.process_time()
    action()
    return time.process_time() - start


def measure(model: nn.Module, inputs: Any) -> dict[str, float]:
    """The least seconds of each way."""
    from torch.fx.experimental.optimization import fuse  # which warns of what it imports itself

    ways: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(*inputs),
        "fuse": lambda: fuse(model),
        "fold": lambda: bnfold.fold(model, inputs, verify=False),
        "verified": lambda: bnfold.fold(model, inputs),
    }
    least = dict.fromkeys(ways, float("inf"))
    with torch.no_grad():
        for _ in range(TURNS):
            for name, way in ways.items():
                least[name] = min(least[name], seconds(way))
    return least


def main(names: list[str]) -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    table = Table("net", "forward, ms", "fx fuse, ms", "fold / fuse", "verified / fuse", "fold / forward")
    for name in names or DEFAULT:
        found = measure(*nets.build(name))
        row = [1e3 * found["forward"], 1e3 * found["fuse"]]
        ratios = [
            found["fold"] / found["fuse"],
            found["verified"] / found["fuse"],
            found["fold"] / found["forward"],
        ]
        table.add_row(name, *(f"{one:.0f}" for one in row), *(f"{one:.1f}" for one in ratios))
    console = Console()
    console.print(table, f"torch {torch.__version__}")


if __name__ == "__main__":
    main(sys.argv[1:])
