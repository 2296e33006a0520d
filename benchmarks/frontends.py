"""Both frontends on the same models: a module, and the files that torch's two exporters write of it.

    python -m benchmarks.frontends [nets timm torchvision pytorchcv ...] [--only PATTERN ...] [--per-family N]

The table of operators is one, so what becomes of a BatchNorm should not depend on the way by which a model comes. A
BatchNorm of a file goes by the name of its running mean, which both exporters keep; where some of a file have no
such name, the outcomes of the model are counted instead. Everything is folded for any runtime, since files are for
onnxruntime otherwise, and exported in the way that folds nothing (`onnx_folders.WAYS`); no numbers are compared. Each
model runs in a process of its own. `RIGHT` says which differences are right, and why; the exit code is 1 if there are
others.

Not compared: a BatchNorm that a file does not hold, since it did not run or the exporter folded it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.verdicts import (
    ZOO_NAMES,
    Job,
    Record,
    Verdicts,
    failure,
    isolated,
    records,
    totals,
    zoo_cases,
)

RIGHT = {
    "nets/Diverse Branch Block": "its code reads the numbers of a BatchNorm to fill a border, and a file has no code",
    "pytorchcv/octresnet*": "its code gives two convolutions one bias, to count twice; a file has one for each",
}
"""The models of which a module and a file have other verdicts, and why that is right."""

Outcomes = Mapping[str, list[str]]
"""What became of the BatchNorms of one name, in order."""


def of_module(verdicts: Iterable[Any]) -> dict[str, Record]:
    """The records of a module, by path; several calls of one module are one."""
    return records(verdicts)


def of_file(verdicts: Iterable[Any], path: Path) -> dict[str, Record]:
    """The records of a file, by the names of the modules that the BatchNorms were."""
    import onnx

    found: dict[str, str] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.op_type == "BatchNormalization" and node.input[3].endswith(".running_mean"):
            found[node.name or node.output[0]] = node.input[3].removesuffix(".running_mean")
    renamed = ((found.get(verdict.name, verdict.name), verdict) for verdict in verdicts)
    return _numbered((name, [v.outcome, list(v.into), v.reason]) for name, v in renamed)


def _numbered(named: Iterable[tuple[str, Record]]) -> dict[str, Record]:
    """Records by name; of several of one name the others have a number."""
    found: dict[str, Record] = {}
    times = Counter[str]()
    for name, record in named:
        times[name] += 1
        found[name if times[name] == 1 else f"{name} ({times[name]})"] = record
    return found


def differences(module: Mapping[str, Record], file: Mapping[str, Record]) -> Iterator[str]:
    """A line for each BatchNorm of a file of which something else became than of the module's."""
    if not file.keys() <= _with_numbers(module, file):
        mine, theirs = totals({"": dict(module)}), totals({"": dict(file)})
        if mine != theirs:
            yield f"{mine} -> {theirs}"
        return
    for name, record in file.items():
        before = module[_plain(name, module)]
        if before[0] != record[0]:
            reason = before[2] or record[2]
            yield f"{name}: {before[0]} -> {record[0]} ({reason})"


def _plain(name: str, module: Mapping[str, Record]) -> str:
    """The name without the number of a further call."""
    return name if name in module else name.rpartition(" (")[0]


def _with_numbers(module: Mapping[str, Record], file: Mapping[str, Record]) -> set[str]:
    return {name for name in file if _plain(name, module) in module}


def reason_for(name: str) -> str:
    """Why other verdicts are right; empty where they are not."""
    return next((reason for pattern, reason in RIGHT.items() if fnmatch(name, pattern)), "")


def fold_all_ways(name: str, model: Any, inputs: Any) -> Verdicts:
    """Fold a module, and the files of it."""
    import bnfold
    from benchmarks.onnx_folders import WAYS

    folded = bnfold.fold(model, inputs, verify=False, runtime="any")[1]
    found = {f"{name}, module": of_module(folded.verdicts)}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            found[f"{name}, {way}"] = export_and_fold(model, inputs, Path(folder) / f"{way}.onnx", way)
    return found


def export_and_fold(model: Any, inputs: Any, path: Path, way: str) -> dict[str, Record]:
    """Fold the file of a module; where the exporter fails, or writes what is not valid, that is said instead."""
    import bnfold
    from benchmarks.onnx_folders import export
    from bnfold.errors import InputError
    from bnfold.torch.sandbox import arrange

    args, kwargs = arrange(inputs)
    try:
        export(model, (*args, kwargs) if kwargs else args, path, way)
    except Exception as error:
        return failure("not exported", f"{type(error).__name__}: {error}")
    try:
        return of_file(bnfold.fold_file(path, None, verify=False, runtime="any").verdicts, path)
    except InputError as error:
        return failure("not valid", str(error))


def fold_net(name: str, net: str, gammas: str) -> Verdicts:
    """Fold a small net of `nets` or `branches`."""
    from benchmarks import branches, nets

    model, inputs = (branches if net in branches.BRANCHES else nets).build(net, gammas, small=True)
    return fold_all_ways(name, model, inputs)


def fold_zoo(name: str, build: Callable[[], Any], kind: Any, limit: float) -> Verdicts:
    """Fold a model of a zoo, unless it is too large or has no BatchNorm."""
    import torch

    from benchmarks.zoo_torch import calibrate, inputs_for, is_worth_it

    if not is_worth_it(build, limit):
        return {}
    torch.manual_seed(0)
    model = build()
    inputs = calibrate(model, inputs_for(model, kind, name.partition("/")[2]))
    return fold_all_ways(name, model, inputs)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """What is to be folded, by source and name."""
    for source in options.sources:
        found = nets() if source == "nets" else zoo(source, options)
        for name, work in found:
            if not options.only or any(fnmatch(name.partition("/")[2], pattern) for pattern in options.only):
                yield name, work


def nets() -> Iterator[Job]:
    """The small nets with gammas of both signs, which decide the most."""
    from benchmarks.branches import BRANCHES
    from benchmarks.nets import NETS

    for net in (*NETS, *BRANCHES):
        yield f"nets/{net}", partial(fold_net, f"nets/{net}", net, "mixed")


def zoo(source: str, options: argparse.Namespace) -> Iterator[Job]:
    """The models of a zoo, if it is installed."""
    for label, build, kind in zoo_cases(source, options.per_family):
        yield f"{source}/{label}", partial(fold_zoo, f"{source}/{label}", build, kind, options.limit)


def compare(name: str, found: Verdicts) -> tuple[list[str], str]:
    """The differences of a model, each with the exporter, and a line that says how it went."""
    module = found.get(f"{name}, module")
    if module is None:
        (record,) = found[name].values()
        return [], f"{name}: {record[0]} ({record[2]})"
    lines, said = [], [totals({"": module})]
    for key, file in found.items():
        way = key.removeprefix(f"{name}, ")
        if way != "module" and "" in file:
            said.append(f"{way}: {file[''][0]}")
        elif way != "module":
            said.append(f"{way}: {totals({'': file})}")
            lines += [f"{name}, {way}: {line}" for line in differences(module, file)]
    return lines, f"{name}: {'; '.join(said)}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.frontends", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("sources", nargs="*", default=["nets"], metavar="SOURCE", help=f"nets, {', '.join(ZOO_NAMES)}")
    add("--only", nargs="+", default=[], metavar="PATTERN", help="models of such names only")
    add("--per-family", type=int, default=0, metavar="N", help="of each family in a zoo the first N only")
    add("--limit", type=float, default=6e7, help="the largest number of parameters to try")
    add("--timeout", type=float, default=300.0, help="seconds for one model")
    options = parser.parse_args(arguments)
    for source in options.sources:
        if source not in ("nets", *ZOO_NAMES):
            parser.error(f"{source} is no source: nets, {', '.join(ZOO_NAMES)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each model, and one for each difference."""
    options = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    for frontend in ("bnfold.onnx", "bnfold.torch"):
        import_module(frontend)  # once, for all processes
    models, right, wrong = 0, Counter[str](), 0
    for name, work in jobs(options):
        if found := isolated(name, work, options.timeout):
            lines, said = compare(name, found)
            reason = reason_for(name)
            models, right[reason], wrong = (
                models + 1,
                right[reason] + len(lines),
                wrong + (not reason) * len(lines),
            )
            print("\n    ".join([said, *([f"right: {reason}"] if lines and reason else lines)]), flush=True)
    print(f"{models} models, {wrong} differences, {sum(right.values()) - wrong} more that are right")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
