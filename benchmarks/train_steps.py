"""python -m benchmarks.train_steps: steps of training a second, beside the notebook's own loop, on the CPU and on CUDA.

    python -m benchmarks.train_steps                        batch 32, on one thread: the notebook's loop, autograd, ours
    python -m benchmarks.train_steps --batch 4096
    python -m benchmarks.train_steps --device cuda          the same net on both, at batches from 32 to 65,536

All contestants take turns of some steps in one process, and the ratios are medians over the turns, so that whatever
else the machine does falls on all. The notebook's loop is that of `benchmarks.train_recipe`: explicit layers,
`loss.backward()`, every parameter moved by hand. `autograd` is the same loop with the layers of torch.nn and one vector
of parameters; the watched ones are ours, with `train.diagnostics` looking on. Exit code 2 with one line where there
is no CUDA.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Generator

import data
from benchmarks.train_recipe import Notebook
from bnfold.errors import run_command
from train.arguments import at_least, pick_device
from train.backprop import by_autograd
from train.diagnostics import Diagnostics
from train.loop import Training
from train.material import Material, prepare
from train.recipes import RECIPES, make

TURNS, EXAMPLES = 25, 12_800
BATCHES = (32, 256, 2048, 16384, 65536)

Steps = Callable[[int], float]
"""Takes some steps and returns the seconds they took."""


def start(
    material: Material, batch: int, device: torch.device, autograd: bool = False, watched: int = 0
) -> Steps:
    """Return what trains the lecture's three-layer net on a device, watched every so many steps."""
    kit = "torch" if autograd else "scratch"
    recipe, generator = replace(RECIPES["lecture"], batch=batch, kit=kit), Generator().manual_seed(1)
    training = Training(make(recipe, material, generator).to(device), material, recipe, generator)
    if autograd:
        training._differentiate = by_autograd(training.net, training._optimiser.gradients)
    return partial(clock, watch(training, watched) if watched else iter(training))


def watch(training: Training, every: int) -> Iterator[float]:
    """Yield the losses, and look on as --plots does."""
    with Diagnostics(training.net, every) as diagnostics:
        for loss in training:
            diagnostics.record(loss)
            yield loss


def clock(losses: Iterator[float], steps: int) -> float:
    begin = time.perf_counter()
    for _ in range(steps):
        next(losses)
    return time.perf_counter() - begin


def take_turns(contestants: dict[str, Steps], steps: int, turns: int = TURNS) -> dict[str, list[float]]:
    """Return the seconds of a step, by contestant and turn; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 1):
        for name, run in contestants.items():
            taken = run(steps) / steps
            seconds[name] += [taken] if turn else []
    return seconds


def tabulate(seconds: dict[str, list[float]], title: str) -> Table:
    """Return one row for each contestant; ratios to the first."""
    table = Table("", "steps/s", "us", "times as fast", "least", "most", title=title)
    first = next(iter(seconds.values()))
    for name, mine in seconds.items():
        ratios = [theirs / own for theirs, own in zip(first, mine, strict=True)]
        numbers = f"{1 / median(mine):,.0f}", f"{median(mine) * 1e6:,.0f}"
        table.add_row(
            name, *numbers, *(f"{ratio:.2f}" for ratio in (median(ratios), min(ratios), max(ratios)))
        )
    return table


def beside_notebook(material: Material, batch: int) -> Table:
    """Hold the notebook's loop, autograd and ours to each other."""
    notebook, here = Notebook(material, batch), torch.device("cpu")
    contestants = {
        "the notebook's loop": notebook.run,
        "autograd, torch.nn": start(material, batch, here, autograd=True),
        "python -m train": start(material, batch, here),
        "watched every 100th step": start(material, batch, here, watched=100),
        "watched every 10th step": start(material, batch, here, watched=10),
    }
    return tabulate(take_turns(contestants, max(2, EXAMPLES // batch // 4)), f"batch {batch}, one thread")


def beside_cpu(material: Material, device: torch.device, batch: int) -> Table:
    """Hold a device to the CPU, ours and autograd on either."""
    here = torch.device("cpu")
    contestants = {
        "cpu": start(material, batch, here),
        f"{device}": start(material, batch, device),
        f"{device}, autograd": start(material, batch, device, autograd=True),
    }
    return tabulate(take_turns(contestants, max(2, EXAMPLES // batch // 2), 9), f"batch {batch:,}")


def run(options: argparse.Namespace) -> None:
    """Print the tables."""
    device = pick_device(options.device)
    torch.set_num_threads(1)
    material, console = prepare(data.read_names(options.names)), Console(highlight=False)
    about = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    console.print(f"torch {torch.__version__}, Python {platform.python_version()}, {about}")
    if device.type == "cpu":
        console.print(beside_notebook(material, options.batch or 32))
        return
    for batch in [options.batch] if options.batch else BATCHES:
        console.print(beside_cpu(material, device, batch))


def main() -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description="Steps of training a second.")
    parser.add_argument("--names", metavar="FILE", help="as for python -m train")
    parser.add_argument(
        "--batch", type=at_least(2), metavar="N", help="examples in a step (32; on CUDA several)"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1 (cpu)")
    return run_command(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
