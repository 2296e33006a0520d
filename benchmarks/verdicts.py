"""Golden verdicts: what becomes of every BatchNorm in every trap, net, ONNX file and zoo at hand, to hold a change to.

    python -m benchmarks.verdicts OUT.json [--only SOURCE ...] [--files FOLDER ...] [--per-family N]
    python -m benchmarks.verdicts OUT.json --against OLD.json     # exit code 1 if anything differs, line by line

The file says `name -> {BatchNorm: [outcome, into, reason]}`, sorted; a model that cannot be folded has the error
instead. `--against` runs what OLD holds, of the sources asked for, and compares outcome and into (with `--reasons`, the
words too). What OLD does not hold is no difference, and a test that moved to another file is found by its name.

The sources: `tests` (every report that a test makes, and every graph that one sends travelling), `nets` (those of
`benchmarks.nets` and `benchmarks.branches` as modules and out of both exporters), `graphs` (the traps of
`benchmarks.onnx_folders`), `files` (ONNX files in installed packages, or in the folders given) and the zoos of
`benchmarks.zoo_torch` that are installed.
Everything runs in a process of its own, one at a time, with fixed seeds and a time limit. Nothing is compared in
numbers unless `--verify` is given; the tests do that by themselves. What merging takes away counts as folded, so a tree
that merges is held to one that does not with `--no-merge`.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Record = list[Any]
"""Of one BatchNorm: outcome, the operators that absorbed it, the reason."""
Verdicts = dict[str, dict[str, Record]]
"""By the model's name and the BatchNorm's."""
Job = tuple[str, Callable[[], Verdicts]]

CHECKOUT = Path(__file__).parents[1]
TESTED = ("traps", "bnfold", "end_to_end", "properties")
EVERY_SECONDS = 30.0
"""How often the file is written, so that `--resume` can go on from there."""
FORK = multiprocessing.get_context("fork")


def records(verdicts: Iterable[Any]) -> dict[str, Record]:
    """The records of one model; a BatchNorm whose name was there before gets a number."""
    found: dict[str, Record] = {}
    for verdict in verdicts:
        again = sum(name.partition(" (")[0] == verdict.name for name in found)
        name = f"{verdict.name} ({again + 1})" if again else verdict.name
        found[name] = [verdict.outcome, list(verdict.into), verdict.reason]
    return found


def failure(kind: str, sentence: str) -> dict[str, Record]:
    """What stands where a model has no verdicts."""
    return {"": [kind, [], (sentence.strip().splitlines() or [""])[0]]}


# ---------------------------------------------------------------- the sources


class Recorder:
    """A pytest plugin: the verdicts of every report that a test makes, and of every graph that it sends travelling."""

    def __init__(self) -> None:
        from bnfold import travel
        from bnfold.report import Report

        self.found: Verdicts = {}
        self.test, self.calls, self.last = "", 0, None
        make, go = Report.__init__, travel.travel

        def make_and_record(report: Any, *args: Any, **options: Any) -> None:
            make(report, *args, **options)
            if report.verdicts is not self.last:
                self.last = report.verdicts
                self.add(report.verdicts)

        def go_and_record(*args: Any, **options: Any) -> Any:
            plan = go(*args, **options)
            if sys._getframe(1).f_globals["__name__"].startswith("tests."):
                self.add(plan.verdicts)
            return plan

        Report.__init__, travel.travel = make_and_record, go_and_record

    def add(self, verdicts: Iterable[Any]) -> None:
        self.calls += 1
        self.found[f"{self.test}#{self.calls}"] = records(verdicts)

    def pytest_sessionstart(self) -> None:
        """Let Hypothesis draw the same examples in every run: not from the numbers in the code, which change with it.

        pytest rewrites Hypothesis first, and warns where it is too late.
        """
        from hypothesis.internal.conjecture import providers

        providers._get_local_constants = lambda: providers._local_constants

    def pytest_runtest_setup(self, item: Any) -> None:
        import torch

        torch.manual_seed(0)
        self.test, self.calls, self.last = item.nodeid, 0, None


def run_tests(file: Path) -> Verdicts:
    """Run the tests of a file, and record; whether they pass is not asked."""
    import pytest

    os.environ["CI"] = "1"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = (
        "1"  # bnfold's own would be rewritten, which is too late here
    )
    os.chdir(CHECKOUT)
    recorder = Recorder()
    pytest.main([str(file), "-q", "-p", "no:cacheprovider"], plugins=[recorder])
    return recorder.found


def tests(options: argparse.Namespace) -> Iterator[Job]:
    for folder in TESTED:
        for file in sorted((CHECKOUT / "tests" / folder).glob("test_*.py")):
            yield str(file.relative_to(CHECKOUT)), partial(run_tests, file)


def choices(options: argparse.Namespace) -> dict[str, bool]:
    """How everything is folded; a tree older than merging knows no `merge`."""
    return {"verify": options.verify} | ({"merge": False} if options.no_merge else {})


def fold_model(name: str, how: dict[str, bool], model: Any, inputs: Any = None) -> Verdicts:
    import bnfold

    _, report = bnfold.fold(model, inputs, **{"runtime": "any", **how})
    return {name: records(report.verdicts)}


def fold_file(name: str, how: dict[str, bool], path: Path) -> Verdicts:
    import bnfold

    return {name: records(bnfold.fold_file(path, None, **{"runtime": "any", **how}).verdicts)}


def fold_net(name: str, how: dict[str, bool], net: str, gammas: str, small: bool, way: str) -> Verdicts:
    """Fold a net of `NETS` or `BRANCHES` as a module, or as a file that one of torch's exporters wrote."""
    from benchmarks import branches, nets
    from benchmarks.onnx_folders import WAYS, export

    model, inputs = (branches if net in branches.BRANCHES else nets).build(net, gammas, small)
    if way not in WAYS:
        return fold_model(name, how, model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export(model, inputs, path, way)
        return fold_file(name, how, path)


def nets(options: argparse.Namespace) -> Iterator[Job]:
    """Small nets in every way, whole ones as modules."""
    from benchmarks.branches import BRANCHES
    from benchmarks.nets import NETS
    from benchmarks.onnx_folders import WAYS

    kinds = [(True, way) for way in ("module", *WAYS)] + [(False, "module")]
    for net in (*NETS, *BRANCHES):
        for gammas in ("positive", "mixed"):
            for small, way in kinds:
                name = f"nets/{net}, {gammas}, {'small' if small else 'whole'}, {way}"
                yield name, partial(fold_net, name, choices(options), net, gammas, small, way)


def graphs(options: argparse.Namespace) -> Iterator[Job]:
    from benchmarks.onnx_folders import TRAPS, trap

    for label in TRAPS:
        yield f"graphs/{label}", partial(fold_model, f"graphs/{label}", choices(options), trap(label))


def files(options: argparse.Namespace) -> Iterator[Job]:
    for place in options.files or [Path(sysconfig.get_path("purelib"))]:
        for path in sorted(place.rglob("*.onnx")):
            name = f"files/{path.relative_to(place)}"
            yield name, partial(fold_file, name, choices(options), path)


def fold_zoo(name: str, how: dict[str, bool], build: Callable[[], Any], kind: Any, limit: float) -> Verdicts:
    """Fold a model of a zoo, unless it is too large or has no BatchNorm."""
    import torch

    from benchmarks.zoo_torch import calibrate, inputs_for, is_worth_it

    if not is_worth_it(build, limit):
        return {}
    torch.manual_seed(0)
    model = build()
    inputs = calibrate(model, inputs_for(model, kind, name.partition("/")[2]))
    return fold_model(name, how, model, inputs)


def zoo_cases(source: str, per_family: int) -> list[Any]:
    """The models of a zoo, of each family the first few; none, and a line that says so, if it is not installed."""
    from benchmarks.zoo_torch import ZOOS

    try:
        return first_of_families(list(ZOOS[source]()), per_family)
    except ImportError as error:
        print(f"{source} is not installed and is left out ({error})", file=sys.stderr)
        return []


def zoo(source: str, options: argparse.Namespace) -> Iterator[Job]:
    for label, build, kind in zoo_cases(source, options.per_family):
        name = f"{source}/{label}"
        yield name, partial(fold_zoo, name, choices(options), build, kind, options.limit)


def first_of_families(cases: list[Any], count: int) -> list[Any]:
    """The first few variants of each family, which is the name as far as its first digit; sorted as numbers are."""
    if not count:
        return cases

    def pieces(case: Any) -> list[tuple[int, str]]:
        return [(int(piece), "") if piece.isdigit() else (0, piece) for piece in re.split(r"(\d+)", case[0])]

    families = groupby(sorted(cases, key=pieces), key=lambda case: re.split(r"\d", case[0])[0])
    return [case for _, family in families for case in list(family)[:count]]


ZOO_NAMES = ("timm", "torchvision", "pytorchcv", "smp", "monai", "transformers", "speechbrain", "others")
SOURCES: dict[str, Callable[[argparse.Namespace], Iterator[Job]]] = {
    "tests": tests,
    "nets": nets,
    "graphs": graphs,
    "files": files,
    **{name: partial(zoo, name) for name in ZOO_NAMES},
}


# ---------------------------------------------------------------- each in a process of its own


def isolated(name: str, work: Callable[[], Verdicts], timeout: float) -> Verdicts:
    """What a job finds; a process that dies or takes too long is a failure of that name."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_send, args=(theirs, name, work))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(timeout) else {name: failure("too slow", f"over {timeout:g} s")}
    except EOFError:
        return {name: failure("crash", "the process ended without an answer")}
    finally:
        process.kill()
        process.join()


def _send(pipe: Connection, name: str, work: Callable[[], Verdicts]) -> None:
    logging.disable(logging.WARNING)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = work()
        except Exception as error:
            found = {name: failure(type(error).__name__, str(error))}
    pipe.send(found)


def jobs(options: argparse.Namespace, old: Verdicts | None) -> Iterator[Job]:
    """What is to be done; against another file, only what that one holds, and all tests, which may have moved."""
    for source in options.only:
        for name, work in SOURCES[source](options):
            if old is None or source == "tests" or name in old:
                yield name, work


def is_done(name: str, found: Verdicts) -> bool:
    return name in found or any(key.startswith(f"{name}::") for key in found)


def collect(options: argparse.Namespace, old: Verdicts | None) -> Verdicts:
    """Run everything, write it down now and then, and go on where an earlier run stopped if so asked."""
    found: Verdicts = load(options.out) if options.resume else {}
    written = time.monotonic()
    for name, work in jobs(options, old):
        if is_done(name, found):
            continue
        start = time.monotonic()
        new = isolated(name, work, options.timeout * (10 if name.startswith("tests/") else 1))
        found |= new
        if new:
            print(f"{name}: {totals(new)}, {time.monotonic() - start:.1f} s", flush=True)
        if options.out and time.monotonic() - written > EVERY_SECONDS:
            save(options.out, found)
            written = time.monotonic()
    return found


# ---------------------------------------------------------------- the file, and two of them


def load(path: Path) -> Verdicts:
    return json.loads(path.read_text(encoding="utf-8"))


def save(path: Path, found: Verdicts) -> None:
    """Write in one step, a line for each model."""
    lines = (f"{json.dumps(name)}: {json.dumps(found[name], sort_keys=True)}" for name in sorted(found))
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    temporary.replace(path)


def totals(found: Verdicts) -> str:
    """How many of each outcome."""
    count = Counter(record[0] for each in found.values() for record in each.values())
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(count.items())) or "no BatchNorm"


def differences(old: Verdicts, new: Verdicts, reasons: bool = False) -> Iterator[str]:
    """One line for each BatchNorm of the old file of which something else became."""
    moved = Counter(name.partition("::")[2] for name in new)
    homes = {name.partition("::")[2]: name for name in new}
    for name in sorted(old):
        short = name.partition("::")[2]
        home = name if name in new or moved[short] != 1 or not short else homes[short]
        if home not in new:
            yield f"{name}: is gone"
            continue
        for norm in sorted(old[name].keys() | new[home].keys()):
            before, after = (say(each.get(norm), reasons) for each in (old[name], new[home]))
            if before != after:
                yield f"{name}: {norm or 'the model'}: {before} -> {after}"


def say(record: Record | None, reasons: bool) -> str:
    """A record in words."""
    if record is None:
        return "no verdict"
    outcome, into, reason = record
    return (
        outcome
        + (f" into {', '.join(into)}" if into else "")
        + (f" ({reason})" if reasons and reason else "")
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.verdicts", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("out", nargs="?", type=Path, help="where to write; nowhere if left out")
    add(
        "--only", nargs="+", choices=SOURCES, default=list(SOURCES), metavar="SOURCE", help=", ".join(SOURCES)
    )
    add("--against", type=Path, metavar="OLD", help="print what differs from this file")
    add("--reasons", action="store_true", help="compare the words of the reasons, too")
    add(
        "--files",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="where ONNX files lie (default: installed packages)",
    )
    add("--per-family", type=int, default=0, metavar="N", help="of each family in a zoo the first N only")
    add("--limit", type=float, default=6e7, help="the largest number of parameters to try")
    add(
        "--timeout",
        type=float,
        default=120.0,
        help="seconds for one model; a file of tests has ten times as many",
    )
    add("--verify", action="store_true", help="compare the numbers of every fold, too")
    add("--no-merge", action="store_true", help="fold alone, merge nothing; not in tests")
    add("--resume", action="store_true", help="leave out what OUT holds already")
    options = parser.parse_args(arguments)
    if options.resume and not (options.out and options.out.is_file()):
        parser.error("--resume goes on with OUT, which is not there")
    if options.against and not options.against.is_file():
        parser.error(f"{options.against}: no such file")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    for frontend in ("bnfold.onnx", "bnfold.torch"):
        import_module(frontend)  # once, for all processes
    old = None
    if options.against:
        old = {
            name: each for name, each in load(options.against).items() if name.split("/")[0] in options.only
        }
    found = collect(options, old)
    if options.out:
        save(options.out, found)
    print(f"{len(found)} models: {totals(found)}")
    lines = list(differences(old or {}, found, options.reasons))
    if options.against:
        print("\n".join([*lines, f"{len(lines)} differences"]))
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
