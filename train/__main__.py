"""python -m train: names in, `ckpt.pt` out.

    python -m train                                   the shipped list, the quick recipe, a few seconds
    python -m train --names makemore --recipe lecture the lecture's list and its loop, some minutes
    python -m train --hidden 100 --layers 6 --seed 7  another net

Exit code 0; 2 with one line on stderr where an argument or a list cannot be used; 130 after Ctrl-C, which ends the
training early and still writes the checkpoint. The same seed on the same machine gives the same tensors, bit for bit:
everything runs on one thread, and all chances come from one generator.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Generator, nn

import data
from bnfold.checkpoint import Checkpoint, InputDomain, save
from bnfold.errors import InputError, run_command
from data.names import DEFAULT_LIST
from train.evaluate import measure
from train.loop import descend, postponed_interrupt
from train.material import Material, prepare
from train.net import Sizes, build
from train.recipes import RECIPES, Recipe
from train.report import Bar, print_losses
from train.sample import invent

NOTEBOOK_SEED = 2147483647
SAMPLES = 10

Losses = dict[str, float | None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line; options that were not given and that a recipe has are None."""
    parser = _Parser(prog="python -m train", description="Train the lecture's net on a list of names.")
    add = parser.add_argument
    add(
        "--names",
        metavar="FILE",
        help="a UTF-8 file with one name on a line, or makemore (default: shipped list)",
    )
    add("-o", "--out", type=Path, default=Path("ckpt.pt"), help="where to write (ckpt.pt)")
    add(
        "--recipe",
        choices=RECIPES,
        default="quick",
        help="; ".join(f"{r.name}: {r.summary}" for r in RECIPES.values()),
    )
    add("--context", type=_at_least(1), default=3, metavar="N", help="characters of context (3)")
    add("--embedding", type=_at_least(1), default=10, metavar="N", help="numbers for each character (10)")
    add("--hidden", type=_at_least(1), default=200, metavar="N", help="neurons of each hidden layer (200)")
    add("--layers", type=_at_least(1), default=3, metavar="N", help="linear layers (3)")
    add("--steps", type=_at_least(1), metavar="N", help="steps of training (the recipe's)")
    add(
        "--batch",
        type=_at_least(2),
        metavar="N",
        help="examples, or different contexts, in a step (the recipe's)",
    )
    add("--rate", type=_positive, metavar="X", help="the highest learning rate (the recipe's)")
    add(
        "--seed",
        type=_at_least(0),
        default=NOTEBOOK_SEED,
        metavar="N",
        help=f"({NOTEBOOK_SEED}, the notebook's)",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Train, write the checkpoint, and show what came of it; return the exit code."""
    torch.set_num_threads(1)
    _check_output(options.out)
    names = data.read_names(options.names)
    material = prepare(names, options.context)
    sizes = Sizes(
        len(material.vocabulary), options.context, options.embedding, options.hidden, options.layers
    )
    recipe = _season(RECIPES[options.recipe], options)
    generator = Generator().manual_seed(options.seed)
    net = build(sizes, generator)
    console = Console(highlight=False)
    with postponed_interrupt() as interrupted:
        console.print(_introduce(names, material, sizes), soft_wrap=True)
        steps = _train(net, material, recipe, generator, interrupted)
        losses = _measure_all(net, material)
        record = _record(options, names, recipe, steps, losses)
        save(options.out, Checkpoint(net.eval(), _domain(sizes), material.vocabulary.characters, record))
    print_losses(console, {"this net": losses, **_references(material)})
    invented = invent(
        net, material.vocabulary, options.context, SAMPLES, Generator().manual_seed(options.seed)
    )
    console.print("\n".join(invented), markup=False, soft_wrap=True)
    stopped = f", stopped after {steps} of {recipe.steps} steps" if steps < recipe.steps else ""
    console.print(
        f"\nwrote {options.out}{stopped}; next: python -m bnfold.fold {options.out}", soft_wrap=True
    )
    return 130 if stopped else 0


def _at_least(least: int) -> Any:
    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        if value >= 2**63:
            raise argparse.ArgumentTypeError(f"{value} is more than 63 bits hold")
        return value

    return integer


def _positive(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def _check_output(path: Path) -> None:
    """Raise before the training, and not after it, if nothing can be written to `path`."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder; make it first, or write elsewhere")


def _season(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """Return the recipe with what the command line says otherwise."""
    given = {name: getattr(options, name) for name in ("steps", "batch", "rate")}
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def _introduce(names: Sequence[str], material: Material, sizes: Sizes) -> str:
    train = material.train
    return (
        f"{len(names):,} names, {train.examples:,} training examples, {len(train):,} different contexts; "
        f"{sizes.layers} linear layers, {sizes.parameters:,} parameters"
    )


def _train(
    net: nn.Sequential, material: Material, recipe: Recipe, generator: Generator, interrupted: Any
) -> int:
    """Train until the end or Ctrl-C; return the number of steps taken."""
    steps = 0
    with Bar(recipe.name, recipe.steps) as bar:
        for loss in descend(net, material, recipe, generator):
            steps += 1
            bar.advance(loss)
            if interrupted():
                break
    return steps


def _measure_all(net: nn.Sequential, material: Material) -> Losses:
    return {part: measure(net, getattr(material, part)) for part in ("train", "dev", "test")}


def _references(material: Material) -> dict[str, Losses]:
    """Return the losses of those who know the letters' frequencies, or nothing, and the least there can be on train."""
    x, y = (tensor.numpy() for tensor in material.examples)
    parts = {part: _targets(material, part) for part in ("train", "dev", "test")}
    return {
        "unigram": {part: data.unigram_loss(y, targets) for part, targets in parts.items()},
        "uniform": dict.fromkeys(parts, data.uniform_loss(len(material.vocabulary))),
        f"least from {material.context} characters": {"train": data.conditional_entropy(x, y)},
    }


def _targets(material: Material, part: str) -> Any:
    table = getattr(material, part)
    return table.targets.repeat_interleave(table.counts.long()).numpy()


def _domain(sizes: Sizes) -> InputDomain:
    return InputDomain((sizes.context,), "int64", 0, sizes.vocabulary)


def _record(
    options: argparse.Namespace, names: Sequence[str], recipe: Recipe, steps: int, losses: Losses
) -> dict[str, Any]:
    """Return how the net came about, in plain values that say nothing of the machine or the hour."""
    return {
        "names": {
            "list": Path(options.names).name if options.names else DEFAULT_LIST.name,
            "count": len(names),
            "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        },
        "recipe": recipe.name,
        "seed": options.seed,
        "steps": {"planned": recipe.steps, "taken": steps},
        "batch": recipe.batch,
        "rate": recipe.rate,
        "losses": losses,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse(arguments)
    return run_command(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
