"""python -m train.lab: the lecture's stations and experiments, run one after the other, in one table and on one page.

    python -m train.lab --quick                    everything, squeezed into about two minutes; writes lab.html
    python -m train.lab --names makemore           everything as the lecture runs it: hours, the stations side by side
    python -m train.lab tanh kaiming --steps 5000  some recipes, squeezed at will
    python -m train.lab --experiment jitter        an experiment that is no training run; prints its table
    python -m train.lab --list                     what there is

Each row of the table is a run. `saturated` is the least and the largest share of outputs beyond 0.97 among the layers
(0 or less after ReLU) in the last batch that was watched; `dead` the share of neurons beyond 0.99 for every context of
the training set; `update` the median of log10 update:data over all weights at that step. The reference is the
notebook's, on its own list, after all steps of the recipe; a squeezed run says how many it took, and its losses are
not to be held against it.

A run that diverges is a row that says so. Exit code 0, or 2 with one line on stderr.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Generator

import data
from bnfold.command import Parser
from bnfold.errors import InputError, run_command
from bnfold.output import check_target
from train.arguments import at_least
from train.diagnostics import Diagnostics, Layer, examine
from train.evaluate import evaluating, measure
from train.experiments import EXPERIMENTS, Experiment
from train.loop import descend
from train.material import Material, prepare
from train.page import Part, Picture, Section, Table, write_page
from train.recipes import RECIPES, Recipe, make
from train.report import Bar, open_console, print_recipes, print_table

__all__ = ["Outcome", "perform", "tabulate"]

QUICK_WORK = 6000
"""Steps times layers that a squeezed run has."""
WATCHED = 50
STATIONS = ("original", "softmax", "tanh", "kaiming", "batchnorm", "deep", "lecture")


@dataclass(frozen=True)
class Outcome:
    """One run: what was watched, train and dev loss, the outputs for every context; `failure` where it diverged."""

    recipe: Recipe
    planned: int
    diagnostics: Diagnostics
    losses: tuple[float, float]
    layers: tuple[Layer, ...]
    failure: str = ""

    @property
    def row(self) -> tuple[str, ...]:
        """The row of the table."""
        steps = f"{self.recipe.steps:,}"
        if self.recipe.steps < self.planned:
            steps += f" of {self.planned:,}"
        history = self.diagnostics.losses
        first = f"{history[0]:.4f}" if history else ""
        losses = ("diverged", "") if self.failure else (f"{loss:.4f}" for loss in self.losses)
        update = self.diagnostics.median_update()
        reference = ", ".join(f"{key} {value:.4f}" for key, value in self.recipe.reference.items())
        return (
            self.recipe.name, steps, first, *losses, _tell_saturation(self.diagnostics), _tell_dead(self.layers),
            "" if math.isnan(update) else f"{update:.1f}", reference,
        )  # fmt: skip


def perform(recipe: Recipe, material: Material, seed: int, most: int | None = None) -> Outcome:
    """Train a recipe, for `most` steps at most, and return what was seen."""
    planned, recipe = recipe.steps, replace(recipe, steps=min(recipe.steps, most or recipe.steps))
    generator = Generator().manual_seed(seed)
    net = make(recipe, material, generator)
    failure = ""
    with (
        Bar(recipe.name, recipe.steps) as bar,
        Diagnostics(net, max(1, recipe.steps // WATCHED)) as diagnostics,
    ):
        try:
            for loss in descend(net, material, recipe, generator):
                diagnostics.record(loss)
                bar.advance(loss)
        except InputError as error:
            failure = str(error)
    losses = math.nan, math.nan
    if not failure:
        losses = measure(net, material.train), measure(net, material.dev)
    with evaluating(net):
        layers = examine(net, material.train.contexts)
    return Outcome(recipe, planned, diagnostics, losses, layers, failure)


def tabulate(outcomes: Sequence[Outcome]) -> Table:
    """Return one row for each run."""
    squeezed = any(outcome.recipe.steps < outcome.planned for outcome in outcomes)
    caption = (
        "steps squeezed where it says so: those losses are not to be held against the reference, which is of the "
        "lecture's own list"
    )
    headings = ("recipe", "steps", "first", "train", "dev", "saturated", "dead", "update", "reference")
    return Table(headings, [outcome.row for outcome in outcomes], caption if squeezed else "", words=(8,))


def run(options: argparse.Namespace) -> None:
    """Run what was asked for, print it, and write the page."""
    console = open_console()
    if options.list:
        _list_all(console)
        return
    torch.set_num_threads(1)
    check_target(options.output)
    material = prepare(data.read_names(options.names))
    recipes, experiments = _choose(options)
    answers = [(each, _answer(console, each, material, options.seed)) for each in experiments]
    outcomes = [perform(each, material, options.seed, _limit(each, options)) for each in recipes]
    if not outcomes:
        return
    print_table(console, tabulate(outcomes))
    write_page(options.output, "The lecture's laboratory", list(_lay_out(outcomes, answers)))
    console.print(f"wrote {options.output}", soft_wrap=True)


def _list_all(console: Console) -> None:
    print_recipes(console, RECIPES)
    rows = [(each.name, each.question) for each in EXPERIMENTS.values()]
    print_table(console, Table(("experiment", "what it asks"), rows, words=(1,)))


def _choose(options: argparse.Namespace) -> tuple[list[Recipe], list[Experiment]]:
    """Return the recipes and experiments that were named; all of them if none was."""
    if not options.recipes and not options.experiment:
        return list(RECIPES.values()), list(EXPERIMENTS.values())
    return [RECIPES[name] for name in options.recipes], [EXPERIMENTS[name] for name in options.experiment]


def _limit(recipe: Recipe, options: argparse.Namespace) -> int | None:
    limit: int | None = options.steps
    return max(1, QUICK_WORK // recipe.layers) if limit is None and options.quick else limit


def _answer(console: Console, experiment: Experiment, material: Material, seed: int) -> list[Table]:
    """Run an experiment and print its tables."""
    console.print(f"\n[bold]{experiment.name}[/bold]: {experiment.question}", soft_wrap=True)
    tables = experiment.run(material, seed)
    for table in tables:
        print_table(console, table)
    return tables


def _tell_saturation(diagnostics: Diagnostics) -> str:
    layers = diagnostics.records[-1].layers if diagnostics.records else ()
    shares = [layer.saturated for layer in layers if layer.kind != "Linear"]
    if not shares:
        return ""
    least, most = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return most if least == most else f"{least[:-1]}-{most}"


def _tell_dead(layers: Sequence[Layer]) -> str:
    shares = [layer.dead for layer in layers if layer.kind != "Linear"]
    return f"{sum(shares) / len(shares):.1%}" if shares else ""


def _lay_out(
    outcomes: Sequence[Outcome], answers: Sequence[tuple[Experiment, list[Table]]]
) -> Iterator[Part]:
    """Yield the parts of the page."""
    from train.plots import draw_losses

    yield tabulate(outcomes)
    stations = {
        each.recipe.name: each.diagnostics.losses for each in outcomes if each.recipe.name in STATIONS
    }
    if stations:
        yield draw_losses(stations)
    for outcome in outcomes:
        yield Section(outcome.recipe.name, list(_describe(outcome)))
    for experiment, tables in answers:
        yield Section(experiment.name, [experiment.question, *tables])


def _describe(outcome: Outcome) -> Iterator[Part]:
    recipe = outcome.recipe
    yield f"{recipe.summary}. To be seen: {recipe.expect}." if recipe.expect else f"{recipe.summary}."
    if outcome.failure:
        yield outcome.failure
    yield from _draw(outcome.diagnostics)


def _draw(diagnostics: Diagnostics) -> Iterator[Picture]:
    from train.plots import draw_activations, draw_gradients, draw_updates

    if not diagnostics.records:
        return
    last = diagnostics.records[-1]
    if last.layers:
        yield draw_activations(last)
        yield draw_gradients(last)
    yield draw_updates(diagnostics)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(prog="python -m train.lab", description="Run the lecture's stations and experiments.")
    add = parser.add_argument
    add("recipes", nargs="*", metavar="RECIPE", help="which to run (default: all, and all experiments)")
    add("--quick", action="store_true", help="squeeze every run: everything in about two minutes")
    add("--steps", type=at_least(1), metavar="N", help="squeeze every run into N steps at most")
    add(
        "--experiment", action="append", default=[], choices=EXPERIMENTS, metavar="NAME",
        help="run this experiment; may be given several times",
    )  # fmt: skip
    add("--names", metavar="FILE", help="as for python -m train")
    add("--seed", type=at_least(0), default=2147483647, metavar="N", help="(2147483647, the notebook's)")
    add("-o", "--output", type=Path, default=Path("lab.html"), metavar="FILE", help="the page (lab.html)")
    add("--list", action="store_true", help="show recipes and experiments, run nothing")
    options = parser.parse_args(arguments)
    unknown = next((name for name in options.recipes if name not in RECIPES), None)
    if unknown is not None:
        parser.error(f"there is no recipe {unknown}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
