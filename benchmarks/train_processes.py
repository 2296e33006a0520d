"""python -m benchmarks.train_processes: steps of training a second in one process and in two, which share the rows.

Each column of the table is a torchrun of its own, on the CPU over gloo; three rounds, the best of each counts, since
processes that wait for each other suffer from whatever else a machine does. One process by torchrun has the
collectives, too, with nobody to wait for.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice

import torch
from rich.console import Console
from rich.table import Table
from torch import Generator

import data
from bnfold.command import is_first
from bnfold.distributed import Processes, join
from bnfold.errors import run_command
from train.loop import Training
from train.material import prepare
from train.recipes import RECIPES, make

ROUNDS, BATCHES, EXAMPLES = 3, (32, 2048, 16384), 2**15
STARTER = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def clock(batch: int, processes: Processes | None) -> float:
    """Return the microseconds of a step of the lecture's three-layer net."""
    material = prepare(data.read_names(None))
    recipe, generator = replace(RECIPES["lecture"], batch=batch), Generator().manual_seed(1)
    training = iter(Training(make(recipe, material, generator), material, recipe, generator, processes))
    steps = max(4, min(300, EXAMPLES // batch))
    list(islice(training, 2))
    begin = time.perf_counter()
    list(islice(training, steps))
    return (time.perf_counter() - begin) / steps * 1e6


def measure(count: int) -> list[float]:
    """Return the same of so many processes, for every size of batch; 0 is one without torchrun."""
    starter = (*STARTER, "--nproc-per-node", str(count)) if count else (sys.executable,)
    command = (*starter, "-m", "benchmarks.train_processes", "--here")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def tabulate() -> Table:
    """Return one row for each size of batch."""
    names = {0: "one process", 1: "torchrun, one", 2: "torchrun, two"}
    table = Table("batch", *(f"{name}, us" for name in names.values()), "two against one")
    rounds = [[measure(count) for count in names] for _ in range(ROUNDS)]
    for place, batch in enumerate(BATCHES):
        best = [min(one[column][place] for one in rounds) for column in range(len(names))]
        table.add_row(f"{batch:,}", *(f"{one:,.0f}" for one in best), f"{best[0] / best[2]:.2f}")
    return table


def run(options: argparse.Namespace) -> None:
    """Print the table, or the times of one column where this is one."""
    torch.set_num_threads(1)
    if not options.here:
        Console(highlight=False).print(tabulate())
        return
    with join() as processes:
        for batch in BATCHES:
            taken = clock(batch, processes)
            if is_first():
                print(taken)


def main() -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description="Steps of training a second in several processes.")
    parser.add_argument(
        "--here", action="store_true", help="measure this process, alone or with those of torchrun"
    )
    return run_command(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
