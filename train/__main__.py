"""python -m train: names in, `ckpt.pt` out.

    python -m train                                   the shipped list, the quick recipe, a few seconds
    python -m train --names makemore --recipe lecture the lecture's list and its loop, some minutes
    python -m train --list                            the recipes, and what each should show
    python -m train --hidden 100 --layers 6 --seed 7  another net
    python -m train --layers scratch                  the layers of train/layers.py instead of torch.nn's

Exit code 0; 2 with one line on stderr where an argument or a list cannot be used; 130 after Ctrl-C, which ends the
training early and still writes the checkpoint. The same seed on the same machine gives the same tensors, bit for bit:
everything runs on one thread, and all chances come from one generator.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
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
from train.layers import to_torch
from train.loop import descend, postponed_interrupt
from train.material import Material, prepare
from train.net import count_parameters
from train.recipes import RECIPES, Recipe, make
from train.report import Bar, print_losses, print_recipes
from train.sample import invent

NOTEBOOK_SEED = 2147483647
SAMPLES = 10

Losses = dict[str, float | None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line; what was not given and a recipe decides is None."""
    parser = _Parser(
        prog="python -m train", description="Train one of the lecture's nets on a list of names."
    )
    add = parser.add_argument
    add(
        "--names",
        metavar="FILE",
        help="a UTF-8 file with one name on a line, or makemore (default: shipped list)",
    )
    add("-o", "--out", type=Path, default=Path("ckpt.pt"), metavar="FILE", help="where to write (ckpt.pt)")
    add(
        "--recipe",
        choices=RECIPES,
        default="quick",
        metavar="NAME",
        help="how to make and train the net (quick)",
    )
    add("--list", action="store_true", help="show the recipes, train nothing")
    add(
        "--seed",
        type=_at_least(0),
        default=NOTEBOOK_SEED,
        metavar="N",
        help=f"({NOTEBOOK_SEED}, the notebook's)",
    )
    change = parser.add_argument_group("instead of what the recipe says").add_argument
    change("--context", type=_at_least(1), metavar="N", help="characters of context")
    change("--embedding", type=_at_least(1), metavar="N", help="numbers for each character")
    change("--hidden", type=_at_least(1), metavar="N", help="neurons of each hidden layer")
    change(
        "--layers", type=_layers, action="append", default=[], metavar="N|KIT",
        help="how many linear layers, or whose: torch (torch.nn's) or scratch (written out); may be given twice",
    )  # fmt: skip
    change("--steps", type=_at_least(1), metavar="N", help="steps of training")
    change("--batch", type=_at_least(2), metavar="N", help="examples, or different contexts, in a step")
    change("--rate", type=_positive, metavar="X", help="the highest learning rate")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Train, write the checkpoint, and show what came of it; return the exit code."""
    console = Console(highlight=False)
    if options.list:
        print_recipes(console, RECIPES)
        return 0
    torch.set_num_threads(1)
    _check_output(options.out)
    recipe = _season(RECIPES[options.recipe], options)
    names = data.read_names(options.names)
    material = prepare(names, recipe.context)
    generator = Generator().manual_seed(options.seed)
    net = make(recipe, material, generator)
    with postponed_interrupt() as interrupted:
        console.print(_introduce(names, material, recipe, net), soft_wrap=True)
        history = _train(net, material, recipe, generator, interrupted)
        losses = _measure_all(net, material)
        record = _record(options, names, recipe, history, losses)
        domain = InputDomain((recipe.context,), "int64", 0, len(material.vocabulary))
        save(options.out, Checkpoint(to_torch(net).eval(), domain, material.vocabulary.characters, record))
    print_losses(console, {"this net": losses, **_references(material, recipe)})
    console.print(_compare_first(history[0], recipe))
    invented = invent(
        net, material.vocabulary, recipe.context, SAMPLES, Generator().manual_seed(options.seed)
    )
    console.print("\n".join(["", *invented, ""]), markup=False, soft_wrap=True)
    stopped = f", stopped after {len(history)} of {recipe.steps} steps" if len(history) < recipe.steps else ""
    console.print(f"wrote {options.out}{stopped}; next: python -m bnfold.fold {options.out}", soft_wrap=True)
    return 130 if stopped else 0


def _layers(text: str) -> int | str:
    number: int | str = text if text in ("torch", "scratch") else _at_least(1)(text)
    return number


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
    names = ("context", "embedding", "hidden", "steps", "batch", "rate")
    given: dict[str, Any] = {
        name: getattr(options, name) for name in names if getattr(options, name) is not None
    }
    for value in options.layers:
        given["kit" if isinstance(value, str) else "layers"] = value
    return replace(recipe, **given)


def _introduce(names: Sequence[str], material: Material, recipe: Recipe, net: nn.Sequential) -> str:
    train = material.train
    return (
        f"{len(names):,} names, {train.examples:,} training examples, {len(train):,} different contexts; "
        f"{recipe.layers} linear layers, {count_parameters(net):,} parameters"
    )


def _train(
    net: nn.Sequential,
    material: Material,
    recipe: Recipe,
    generator: Generator,
    interrupted: Callable[[], bool],
) -> list[float]:
    """Train until the end or Ctrl-C; return the loss of every step taken, at least one."""
    history = []
    with Bar(recipe.name, recipe.steps) as bar:
        for loss in descend(net, material, recipe, generator):
            history.append(loss)
            bar.advance(loss)
            if interrupted():
                break
    return history


def _compare_first(loss: float, recipe: Recipe) -> str:
    beside = recipe.reference.get("first")
    return f"loss of the first batch {loss:.4f}" + (f", in the notebook {beside:.4f}" if beside else "")


def _measure_all(net: nn.Sequential, material: Material) -> Losses:
    return {part: measure(net, getattr(material, part)) for part in ("train", "dev", "test")}


def _references(material: Material, recipe: Recipe) -> dict[str, Losses]:
    """Return the losses of those who know the letters' frequencies, or nothing, and the least there can be on train."""
    x, y = (tensor.numpy() for tensor in material.examples)
    parts = {part: _targets(material, part) for part in ("train", "dev", "test")}
    notebook = {part: recipe.reference[part] for part in parts if part in recipe.reference}
    rows: dict[str, Losses] = {"notebook, on its own list": {**notebook}} if notebook else {}
    return rows | {
        "unigram": {part: data.unigram_loss(y, targets) for part, targets in parts.items()},
        "uniform": dict.fromkeys(parts, data.uniform_loss(len(material.vocabulary))),
        f"least from {material.context} characters": {"train": data.conditional_entropy(x, y)},
    }


def _targets(material: Material, part: str) -> Any:
    table = getattr(material, part)
    return table.targets.repeat_interleave(table.counts.long()).numpy()


def _record(
    options: argparse.Namespace,
    names: Sequence[str],
    recipe: Recipe,
    history: Sequence[float],
    losses: Losses,
) -> dict[str, Any]:
    """Return how the net came about, in plain values that say nothing of the machine or the hour."""
    return {
        "names": {
            "list": Path(options.names).name if options.names else DEFAULT_LIST.name,
            "count": len(names),
            "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        },
        "recipe": recipe.name,
        "layers": recipe.kit,
        "seed": options.seed,
        "steps": {"planned": recipe.steps, "taken": len(history)},
        "batch": recipe.batch,
        "rate": recipe.rate,
        "losses": {"first": history[0], **losses},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse(arguments)
    return run_command(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
