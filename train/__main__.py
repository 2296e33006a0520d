"""python -m train: names in, `ckpt.pt` out.

    python -m train                                   the shipped list, the quick recipe, a few seconds
    python -m train --names makemore --recipe lecture the lecture's list and its loop, some minutes
    python -m train --list                            the recipes, and what each should show
    python -m train --hidden 100 --layers 6 --seed 7  another net
    python -m train --layers scratch                  the layers of train/layers.py instead of torch.nn's
    python -m train --plots DIR --tensorboard DIR     what went on inside, as pictures and a page, or for TensorBoard
    python -m train --recipe zeros --explain          which parameters moved, and why the others did not
    python -m train --calibrate                       the statistics of the whole training set in every BatchNorm
    python -m train --resume                          after a kill: goes on where the same command was
    python -m train --device cuda --batch 16384       the steps on a GPU
    torchrun --nproc-per-node 2 -m train              the rows of each batch spread over processes: the same net
    python -m train --compare a.pt b.pt               two nets side by side; trains nothing

Exit code 0; 2 with one line on stderr where an argument or a list cannot be used; 130 after Ctrl-C, which ends the
training early and still writes the checkpoint; 3 where another of several processes went away: then the first writes
the checkpoint of the last whole step and keeps the training, and where the first is gone, what it kept last is there.

The same seed on the same machine gives the same tensors, bit for bit, watched or not, in one go or resumed: a process
runs on one thread, and all chances come from one generator. A training that takes long is kept beside the checkpoint,
in `ckpt.training.pt`, until that is written. Of several processes, the first one's share of the rows is watched.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Generator, nn

import data
from bnfold.checkpoint import Checkpoint, InputDomain, save
from bnfold.command import Parser, is_first, report_once
from bnfold.distributed import Processes, join
from bnfold.errors import InputError, ProcessLost, run_command
from bnfold.output import check_target
from data.names import DEFAULT_LIST
from train import calibration, gradients
from train.arguments import at_least, check_folder, pick_device, positive
from train.compare import compare, load_side
from train.diagnostics import Diagnostics, compare_statistics
from train.evaluate import measure, study_habits
from train.gradients import Ledger
from train.layers import to_torch
from train.loop import Training, postponed_interrupt
from train.material import Material, prepare
from train.net import count_parameters
from train.recipes import RECIPES, Recipe, make
from train.report import Bar, open_console, print_losses, print_recipes, print_table
from train.resume import Keeper, beside
from train.sample import invent

NOTEBOOK_SEED = 2147483647
SAMPLES = 10
WATCHED = 100
"""About as many steps are watched for the pictures, unless --every says otherwise."""
AGREE = 16
"""After so many steps several processes ask each other whether to stop."""

Losses = dict[str, float | None]


@dataclass(frozen=True)
class Seen:
    """A training, and what it leaves besides the net: the loss of every step, and what was asked for."""

    training: Training
    history: list[float]
    diagnostics: Diagnostics | None
    ledger: Ledger | None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line; what was not given and a recipe decides is None."""
    parser = Parser(prog="python -m train", description="Train one of the lecture's nets on a list of names.")
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
    add("--compare", nargs=2, metavar=("A", "B"), help="show two checkpoints side by side, train nothing")
    add(
        "--seed",
        type=at_least(0),
        default=NOTEBOOK_SEED,
        metavar="N",
        help=f"({NOTEBOOK_SEED}, the notebook's)",
    )
    add("--resume", action="store_true", help="go on with the training that was kept, if there is one")
    add(
        "--save-every",
        type=at_least(1),
        metavar="N",
        help="keep the training after every N-th step (about every ten seconds)",
    )
    add("--device", default="cpu", metavar="NAME", help="where the steps are taken: cpu, cuda, cuda:1 (cpu)")
    look = parser.add_argument_group("looking inside").add_argument
    look(
        "--plots",
        type=Path,
        metavar="DIR",
        help="write the lecture's pictures, and index.html with all of them",
    )
    look("--tensorboard", type=Path, metavar="DIR", help="write the same numbers for TensorBoard")
    look(
        "--every", type=at_least(1), metavar="N", help=f"watch every N-th step (about {WATCHED} steps in all)"
    )
    look(
        "--explain",
        action="store_true",
        help="say which parameters moved, and which factors kept the others still",
    )
    look(
        "--calibrate", action="store_true",
        help="after training, take the statistics of every BatchNorm over the whole training set, and keep them",
    )  # fmt: skip
    change = parser.add_argument_group("instead of what the recipe says").add_argument
    change("--context", type=at_least(1), metavar="N", help="characters of context")
    change("--embedding", type=at_least(1), metavar="N", help="numbers for each character")
    change("--hidden", type=at_least(1), metavar="N", help="neurons of each hidden layer")
    change(
        "--layers", type=_layers, action="append", default=[], metavar="N|KIT",
        help="how many linear layers, or whose: torch (torch.nn's) or scratch (written out); may be given twice",
    )  # fmt: skip
    change("--steps", type=at_least(1), metavar="N", help="steps of training")
    change("--batch", type=at_least(2), metavar="N", help="examples, or different contexts, in a step")
    change("--rate", type=positive, metavar="X", help="the highest learning rate")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; return the exit code."""
    console = open_console(quiet=not is_first())
    if options.list:
        print_recipes(console, RECIPES)
        return 0
    torch.set_num_threads(1)
    if options.compare:
        return _compare(console, options)
    recipe = _season(RECIPES[options.recipe], options)
    _check(options, recipe)
    with join(pick_device(options.device).type) as processes:
        return _run_recipe(console, options, recipe, processes)


def _run_recipe(
    console: Console, options: argparse.Namespace, recipe: Recipe, processes: Processes | None
) -> int:
    """Train, write the checkpoint, and show what came of it; return the exit code."""
    names = data.read_names(options.names)
    material = prepare(names, recipe.context)
    generator = Generator().manual_seed(options.seed)
    net = make(recipe, material, generator).to(pick_device(options.device))
    with postponed_interrupt(several=processes is not None) as interrupted:
        console.print(_introduce(names, material, recipe, net), soft_wrap=True)
        seen, keeper = _prepare(net, material, recipe, generator, options, names, processes)
        lost = _train(seen, keeper, interrupted, processes)
        if not is_first():
            return 0 if len(seen.history) == recipe.steps else 130
        net.cpu()
        nets = {"this net": net}
        if options.calibrate:
            nets = {"running statistics": net, **calibration.calibrate(net, material, recipe)}
        rows = {name: _measure_all(each, material) for name, each in nets.items()}
        kept = calibration.AS_DRAWN if options.calibrate else "this net"
        record = _record(options, names, recipe, seen.history, rows[kept])
        domain = InputDomain((recipe.context,), "int64", 0, len(material.vocabulary))
        model = to_torch(nets[kept]).eval()
        save(options.out, Checkpoint(model, domain, material.vocabulary.characters, record))
        if keeper is not None and len(seen.history) == recipe.steps:
            keeper.drop()
    print_losses(console, rows | _references(material, recipe))
    console.print(_compare_first(seen.history[0], recipe))
    _show_inside(console, options, nets, material, seen)
    invented = invent(
        nets[kept], material.vocabulary, recipe.context, SAMPLES, Generator().manual_seed(options.seed)
    )
    console.print("\n".join(["", *invented, ""]), markup=False, soft_wrap=True)
    taken = len(seen.history)
    if lost is not None:
        kept = "" if keeper is None else "; --resume goes on with it"
        raise ProcessLost(f"{lost}: {options.out} holds the net of step {taken:,} of {recipe.steps:,}{kept}")
    stopped = f", stopped after {taken} of {recipe.steps} steps" if taken < recipe.steps else ""
    console.print(f"wrote {options.out}{stopped}; next: python -m bnfold.fold {options.out}", soft_wrap=True)
    return 130 if stopped else 0


def _compare(console: Console, options: argparse.Namespace) -> int:
    """Show two checkpoints side by side."""
    names = data.read_names(options.names)
    left, right = (load_side(path, names) for path in options.compare)
    for table in compare(left, right, tuple(options.compare), SAMPLES, options.seed):
        print_table(console, table)
    return 0


def _show_inside(
    console: Console,
    options: argparse.Namespace,
    nets: dict[str, nn.Sequential],
    material: Material,
    seen: Seen,
) -> None:
    """Print and write what was asked for besides the losses."""
    net, *calibrated = nets.values()
    statistics = compare_statistics(net, calibrated[0]) if calibrated else ()
    if statistics:
        print_table(console, calibration.tabulate(statistics))
    if seen.ledger is not None:
        print_table(console, gradients.tabulate(seen.ledger.entries(), len(seen.history)))
        habits = study_habits(net, material.train)
        console.print(
            f"KL(letters' frequencies || net) {habits.divergence:.4f} nats; a context changes the probability of a "
            f"character by {habits.contrast:.2g} at most",
            soft_wrap=True,
        )
    if seen.diagnostics is not None and options.plots:
        from train.plots import draw

        page = draw(seen.diagnostics, options.plots, statistics, f"{options.recipe}: what the net did")
        console.print(f"wrote {page}", soft_wrap=True)
    if seen.diagnostics is not None and options.tensorboard:
        from train.events import write_events

        write_events(seen.diagnostics, options.tensorboard)
        console.print(
            f"wrote {options.tensorboard}; look: tensorboard --logdir {options.tensorboard}", soft_wrap=True
        )


def _layers(text: str) -> int | str:
    if text not in ("torch", "scratch") and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither a number of layers nor torch or scratch")
    number: int | str = text if text in ("torch", "scratch") else at_least(1)(text)
    return number


def _check(options: argparse.Namespace, recipe: Recipe) -> None:
    """Raise before the training, and not after it, if what is asked for cannot be had."""
    check_target(options.out)
    pick_device(options.device)
    if options.plots:
        check_folder(options.plots, "the pictures")
    if options.tensorboard:
        from train.events import check_tensorboard

        check_folder(options.tensorboard, "the events")
        check_tensorboard()
    if options.calibrate and recipe.design.batchnorm == "none":
        raise InputError(f"{recipe.name} has no BatchNorm to calibrate; leave --calibrate out")


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


def _prepare(
    net: nn.Sequential,
    material: Material,
    recipe: Recipe,
    generator: Generator,
    options: argparse.Namespace,
    names: Sequence[str],
    processes: Processes | None,
) -> tuple[Seen, Keeper | None]:
    """What a training needs: the one that was kept, or a new one; nobody keeps one that ends in a device."""
    looks = options.plots or options.tensorboard
    watched = options.every or max(1, recipe.steps // WATCHED) if looks else 0
    seen = Seen(
        Training(net, material, recipe, generator, processes),
        [],
        Diagnostics(net, watched) if watched else None,
        Ledger(net) if options.explain or recipe.explain else None,
    )
    if options.out.exists() and not options.out.is_file() and not options.resume:
        return seen, None
    run = _identify(options, names, recipe) | {"watched": watched, "explained": seen.ledger is not None}
    looking = (seen.diagnostics, seen.ledger)
    keeper = Keeper(beside(options.out), run, seen.training, seen.history, looking, options.save_every)
    note = ""
    if not options.resume and keeper.path.exists():
        note = f"{keeper.path} holds a training that did not end; --resume goes on with it"
    elif options.resume and keeper.take_up():
        note = f"resumed after {seen.training.step:,} of {recipe.steps:,} steps"
    if note and is_first():
        print(note)
    if processes is not None:
        _check_alike(processes, run, seen.training.step)
    return seen, keeper


def _check_alike(processes: Processes, run: dict[str, Any], step: int) -> None:
    """Raise unless all processes are about to do the same."""
    digest = hashlib.sha256(repr((run, step)).encode()).digest()
    if len(set(processes.gather_bytes(digest))) > 1:
        raise InputError(
            "the processes have different names, options or kept trainings; give them one folder"
        )


def _identify(options: argparse.Namespace, names: Sequence[str], recipe: Recipe) -> dict[str, Any]:
    """What two runs have in common that give the same net, in plain values."""
    sizes = ("name", "kit", "steps", "batch", "rate", "context", "embedding", "hidden", "layers")
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    own = {"recipe" if name == "name" else name: getattr(recipe, name) for name in sizes}
    return {"names": digest, "seed": options.seed, "torch": str(torch.__version__), **own}


def _train(
    seen: Seen, keeper: Keeper | None, interrupted: Callable[[], bool], processes: Processes | None
) -> ProcessLost | None:
    """Train until the end or Ctrl-C, at least one step, and let all look on who want to.

    Returns:
        What ended it early in the first process, where another one went away after a step.
    """
    training = seen.training
    with ExitStack() as stack:
        bar = stack.enter_context(Bar(training.recipe.name, training.recipe.steps, training.step))
        notes: list[Callable[[float], None]] = [seen.history.append, bar.advance]
        if seen.diagnostics is not None:
            notes.append(stack.enter_context(seen.diagnostics).record)
        if seen.ledger is not None:
            notes.append(stack.enter_context(seen.ledger).count)
        notes += [keeper.step] if keeper is not None and is_first() else []
        lost = None
        try:
            for loss in training:
                for note in notes:
                    note(loss)
                if _is_over(training.step, interrupted, processes):
                    break
        except ProcessLost as error:
            if not (is_first() and seen.history):
                raise
            lost = error
    if keeper is not None and is_first() and training.step < training.recipe.steps:
        keeper.keep()
    return lost


def _is_over(step: int, interrupted: Callable[[], bool], processes: Processes | None) -> bool:
    """Whether somebody pressed Ctrl-C; several processes ask each other now and then."""
    if processes is None:
        return interrupted()
    return step % AGREE == 0 and processes.any(interrupted())


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
        "statistics": calibration.AS_DRAWN if options.calibrate else "running",
        "seed": options.seed,
        "steps": {"planned": recipe.steps, "taken": len(history)},
        "batch": recipe.batch,
        "rate": recipe.rate,
        "losses": {"first": history[0], **losses},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return report_once(lambda: run_command(lambda: run(parse(arguments))))


if __name__ == "__main__":
    sys.exit(main())
