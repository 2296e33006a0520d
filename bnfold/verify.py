"""The command: `python -m bnfold.verify A B` holds two models against each other, whatever each of them is.

    a.onnx b.onnx                        two ONNX files; torch is not needed
    ckpt.pt ckpt.onnx                    a checkpoint and its ONNX file, on every input there is
    weights.pt net.onnx --model package.module:factory --input 1x3x224x224
    package.module:one package.module:other --input 1x3x224x224

A and B are each an ONNX file, a self-describing checkpoint, an exported program (`.pt2`), weights of what `--model`
(for B: `--model-b`) builds, folded or not, or what builds a module. Exit code 0: equivalent. 1: not equivalent; one
line on stderr says where. 2: a file or an argument cannot be used.

What a certificate says of two ONNX files (`--certificate`, or one that B carries) is proved first, for every input.
Then both are run. The inputs are those of `--inputs`, once for each batch; else made up (see `bnfold.verification`).
The worst of them is named, and kept with `--worst FILE.npz`, which `--inputs` reads again. Of several processes, which
torchrun starts, each compares its share of `--inputs` (see `bnfold.shares`), and the first reports for all.

The function that does the work is `bnfold.verify`, which this module must not be confused with (see the end of
`bnfold/__init__.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.archive import is_onnx
from bnfold.command import Parser, add_weights, is_first, is_started, report_once
from bnfold.errors import InputError, run_command
from bnfold.output import check_target, replacing, together
from bnfold.verification import Verification, open_file, verify_sides

if TYPE_CHECKING:
    from bnfold.distributed import Processes

__all__ = ["main"]

STDOUT = Path("-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return report_once(lambda: run_command(lambda: _run(_parser().parse_args(arguments))))


def _parser() -> Parser:
    parser = Parser(prog="bnfold verify", description="Hold two models against each other.")
    add = parser.add_argument
    add("before", metavar="A", help="an ONNX file, a checkpoint, a .pt2, weights, or package.module:factory")
    add("after", metavar="B", help="what should compute the same")
    add("--inputs", type=Path, action="append", metavar="NPZ", help="arrays by input name; once per batch")
    add("--tolerance", type=float, metavar="T", help="allow T of the largest output (default: derived)")
    add("--certificate", type=Path, metavar="FILE", help="prove what this says of two ONNX files, first")
    add("--json", type=Path, metavar="FILE", help="write the record as JSON, too; - for stdout")
    add("--worst", type=Path, metavar="NPZ", help="keep the input on which they differ most")
    modules = parser.add_argument_group("modules")
    add_weights(modules)
    modules.add_argument(
        "--model-b", metavar="PACKAGE.MODULE:FACTORY", help="that of B, if it is another one"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    _check_targets(options)
    with _joined() as processes:
        return _verify(options, processes)


def _verify(options: argparse.Namespace, processes: Processes | None) -> int:
    out = sys.stderr if options.json == STDOUT else sys.stdout
    for shown in _prove(options):
        if is_first():
            print(f"proved: {shown}", file=out)
    choices = {"arguments": options.model_args, "key": options.key, "prefix": options.prefix}
    before = open_file(options.before, options.model, options.input, **choices)
    after = open_file(options.after, options.model_b or options.model, options.input, **choices)
    compare = partial(verify_sides, before, after, tolerance=options.tolerance, locate=True)
    found = compare(options.inputs) if processes is None else _compare_share(options, compare, processes)
    if is_first():
        with together():
            _keep(options, found)
        for line in _describe(found):
            print(line, file=out)
    found.raise_if_different()
    if is_first():
        print("equivalent", file=out)
    return 0


@contextmanager
def _joined() -> Iterator[Processes | None]:
    """The processes that torchrun started; alone, nothing needs torch."""
    if not is_started():
        yield None
        return
    from bnfold.distributed import join

    with join() as processes:
        yield processes


def _compare_share(
    options: argparse.Namespace, compare: Callable[[Any], Verification], processes: Processes
) -> Verification:
    """What all processes find together."""
    from bnfold.shares import judge_together, take_share

    def look() -> Verification | None:
        share = take_share(options.inputs, processes)
        return compare(share) if share else None

    return judge_together(look, options.worst is not None, processes)


def _prove(options: argparse.Namespace) -> Sequence[str]:
    """What a certificate proves: the one that was given, else the one that B carries, if it is of these two files."""
    before, after = Path(options.before), Path(options.after)
    both = all(path.is_file() and is_onnx(path) for path in (before, after))
    if options.certificate is not None:
        if not both:
            raise InputError(f"{options.certificate}: a certificate is of two ONNX files; leave it out")
        from bnfold.onnx import certify

        return certify.check_files(before, after, options.certificate)
    if not both:
        return ()
    from bnfold.onnx import certify

    return certify.carried(before, after)


def _check_targets(options: argparse.Namespace) -> None:
    """Refuse what could not be written before anything is computed."""
    named = [path for path in (options.json, options.worst) if path not in (None, STDOUT)]
    for path in named:
        check_target(path)
        if str(path) in (options.before, options.after) or path in (options.inputs or ()):
            raise InputError(f"{path} is read; name another file to write")
    if options.worst == STDOUT:
        raise InputError("--worst -: arrays are not written to stdout; name a file")
    if len(set(named)) < len(named):
        raise InputError(f"{options.json} is where the input goes; name another file for the record")


def _keep(options: argparse.Namespace, found: Verification) -> None:
    """Write the record and the worst input, as far as they are asked for."""
    record = {"before": options.before, "after": options.after, **found.to_dict()}
    text = json.dumps(record, indent=2, allow_nan=False)
    if options.json == STDOUT:
        print(text)
    elif options.json is not None:
        with replacing(options.json) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    if options.worst is not None and found.case is not None:
        import numpy as np

        names = found.case.names or tuple(f"input{place}" for place in range(len(found.case.arrays)))
        with replacing(options.worst) as temporary, temporary.open("wb") as file:
            np.savez(file, **dict(zip(names, found.case.arrays, strict=True)))  # type: ignore[arg-type]


def _describe(found: Verification) -> Iterator[str]:
    """What was tried, what was found, and where the models differ most."""
    yield f"tried: {', '.join(found.tried)}"
    for item in found.evidence:
        inputs = f"all {item.inputs:,}" if item.exhaustive else f"{item.inputs:,}"
        yield (
            f"{item.question}: {inputs} example{'s' * (item.inputs != 1)}, deviation {item.deviation:.1e} of the "
            f"largest output, bound {item.bound:.1e} ({item.source})"
        )
    yield from found.notes
    if place := found.describe_worst():
        yield f"worst: {place}"
    if found.divergence is not None:
        yield f"begins: {found.divergence}"


if __name__ == "__main__":
    sys.exit(main())
