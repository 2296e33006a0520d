"""The command: `python -m bnfold.fold FILE` folds a file, verifies the result, and writes it beside the file.

    ckpt.pt                        a self-describing checkpoint (see `bnfold.checkpoint`)
    model.onnx                     any ONNX file
    weights.pt, weights.safetensors    the weights of a model that `--model package.module:factory` names
    program.pt2                    a program that `torch.export.save` wrote

Exit code 0: folded and verified. 1: the folded model is not equivalent, and nothing was written. 2: the file or an
argument cannot be used. 141: all is written, and who read the report went away (`| head -1`). The output and the report
appear together when all is done (see `bnfold.output`), and existing ones survive any failure.

An ONNX file never imports torch. The function that does the work is `bnfold.fold`, which this module must not be
confused with (see the end of `bnfold/__init__.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold import fold
from bnfold.archive import is_onnx
from bnfold.command import Parser, add_weights
from bnfold.errors import InputError, run_command
from bnfold.heap import collecting_seldom
from bnfold.output import check_target, replacing, together
from bnfold.printed import Printed
from bnfold.travel import HALVES
from bnfold.wording import enumerate_some

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from bnfold.checkpoint import Checkpoint
    from bnfold.report import Report

__all__ = ["main"]

STDOUT = Path("-")
_OF_WEIGHTS = ("model_args", "key", "prefix")
"""What only weights need, which come with `--model`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _run(_parser().parse_args(arguments)))


def _parser() -> Parser:
    parser = Parser(prog="bnfold fold", description="Fold BatchNorms, exactly, and prove it.")
    add = parser.add_argument
    add(
        "file",
        type=Path,
        help="a checkpoint, an ONNX file, weights (with --model) or an exported program (.pt2)",
    )
    add("-o", "--output", type=Path, help="where to write (default: FILE with .folded before its suffix)")
    add("--dry-run", action="store_true", help="decide, verify and report, but write no model")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the report as JSON, too; - for stdout, tables to stderr",
    )
    add("--html", type=Path, metavar="FILE", help="write the whole report as a page for a browser, too")
    add(
        "--verbose", action="store_true", help="print every BatchNorm and every merge, however many there are"
    )
    add(
        "--no-verify", dest="verify", action="store_false", help="compare nothing; the report says unverified"
    )
    add(
        "--lower", action="store_true", help="turn every BatchNorm that is kept into one multiply and one add"
    )
    add(
        "--for",
        dest="runtime",
        choices=sorted(HALVES),
        help="where it will run; decides whether an Add may be left (default: onnxruntime for ONNX files, else torch)",
    )
    add(
        "--whole",
        dest="halves",
        action="store_false",
        help="leave BatchNorms alone of which only the scale can go, wherever it will run",
    )
    add(
        "--no-merge",
        dest="merge",
        action="store_false",
        help="leave linear operators apart that stand side by side or one after another",
    )
    onnx = parser.add_argument_group("ONNX files")
    onnx.add_argument("--inputs", type=Path, metavar="NPZ", help="verify on these arrays, by input name")
    onnx.add_argument(
        "--freeze-initializers", action="store_true", help="take overridable initializers as constants"
    )
    onnx.add_argument(
        "--duplicate", action="store_true", help="copy an operator that somebody else reads as well"
    )
    onnx.add_argument(
        "--certificate", type=Path, metavar="FILE", help="write what `bnfold verify` checks again, elsewhere"
    )
    add_weights(parser.add_argument_group("weights of a module"))
    return parser


def _run(options: argparse.Namespace) -> int:
    if not options.file.is_file():
        raise InputError(f"{options.file}: {'it is a folder' if options.file.is_dir() else 'no such file'}")
    if options.output is None:
        options.output = options.file.with_name(f"{options.file.stem}.folded{options.file.suffix}")
    _check_targets(options)
    onnx = is_onnx(options.file)
    import_module("onnx" if onnx else "torch")  # what is missing is said first of what the file needs most
    console = _console(options)
    with together():
        report, done = (_fold_onnx if onnx else _fold_torch)(options)
        if options.json not in (None, STDOUT):
            with replacing(options.json) as temporary:
                temporary.write_text(report.to_json() + "\n", encoding="utf-8")
        if options.html is not None:
            with replacing(options.html) as temporary:
                temporary.write_text(report.to_html(options.file.name), encoding="utf-8")
    if options.json == STDOUT:
        print(report.to_json())
    console.print(Printed(report, options.verbose, "in full: --verbose, --html FILE, --json FILE"))
    print("nothing written (--dry-run)" if options.dry_run else done, file=console.file)
    return 0


def _check_targets(options: argparse.Namespace) -> None:
    """Refuse what could not be written before anything is computed."""
    if options.output == STDOUT and not options.dry_run:
        raise InputError("-o -: a model is not written to stdout; name a file")
    if options.html == STDOUT:
        raise InputError("--html -: a page is not written to stdout; name a file")
    if options.dry_run and options.certificate is not None:
        raise InputError("--certificate: with --dry-run there is no model to certify; leave one of them out")
    models = {} if options.dry_run else {"the model": options.output}
    aside = {"the report": options.json, "the page": options.html, "the certificate": options.certificate}
    taken = {options.file.resolve(): "the model itself"}
    for what, path in {**models, **aside}.items():
        if path in (None, STDOUT):
            continue
        check_target(path)
        place = path.resolve()
        if what in aside and place in taken and not path.is_char_device():
            raise InputError(f"{path} is {taken[place]}; name another file for {what}")
        taken[place] = f"where {what} goes"


def _refuse(options: argparse.Namespace, *names: str) -> None:
    """Refuse options that say nothing about this kind of file: whoever gave one believes that it is heeded."""
    for name in names:
        if getattr(options, name):
            option = name.replace("_", "-")
            raise InputError(f"{options.file}: --{option} is not for this kind of file; leave it out")


def _console(options: argparse.Namespace) -> Console:
    """Where the report goes: as wide as the terminal."""
    from rich.console import Console

    out = sys.stderr if options.json == STDOUT else sys.stdout
    return Console(highlight=False, file=out, width=None if out.isatty() else 110)


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    """What every frontend can be told."""
    names = ("verify", "lower", "halves", "merge")
    runtime = {} if options.runtime is None else {"runtime": options.runtime}
    return {name: getattr(options, name) for name in names} | runtime


def _fold_onnx(options: argparse.Namespace) -> tuple[Report, str]:
    from bnfold import onnx as frontend

    _refuse(options, "model", *_OF_WEIGHTS, "input")
    with collecting_seldom():
        report = frontend.fold_file(
            options.file,
            None if options.dry_run else options.output,
            inputs=options.inputs,
            freeze_initializers=options.freeze_initializers,
            duplicate=options.duplicate,
            certificate=options.certificate,
            **_choices(options),
        )
    return report, f"wrote {options.output}"


def _fold_torch(options: argparse.Namespace) -> tuple[Report, str]:
    from bnfold import checkpoint

    _refuse(options, "inputs", "freeze_initializers", "duplicate", "certificate")
    if options.model is None:
        _refuse(options, *_OF_WEIGHTS)
        if checkpoint.identify(options.file) != "exported program":
            return _fold_checkpoint(options)
    from bnfold import torch as frontend

    report = frontend.fold_checkpoint_file(
        options.file,
        None if options.dry_run else options.output,
        model=options.model,
        shapes=options.input,
        arguments=frontend.read_arguments(options.model_args),
        key=options.key,
        prefix=options.prefix,
        **_choices(options),
    )
    return report, f"wrote {options.output}"


def _fold_checkpoint(options: argparse.Namespace) -> tuple[Report, str]:
    """Fold a self-describing checkpoint: exercise E02 of the lecture, for any net.

    It holds layers of torch.nn only, so no per-channel Add can be left in it, and no multiply.
    """
    from bnfold import checkpoint

    if checkpoint.identify(options.file) == "checkpoint":
        _refuse(options, "input")
    if options.lower:
        raise InputError(
            f"{options.file} is a checkpoint, which holds layers of torch.nn only; leave --lower out"
        )

    source = checkpoint.load(options.file)
    inputs, exhaustive = source.input.examples()
    model, report = fold(source.model, inputs, verify=options.verify, merge=options.merge, halves=False)
    evidence = (replace(item, inputs=len(inputs), exhaustive=exhaustive) for item in report.evidence)
    report = replace(report, evidence=tuple(evidence), notes=tuple(_notes_on(report)))
    if not options.dry_run:
        checkpoint.save(options.output, _folded(source, model, report, options.file))
    done = f"wrote {options.output}\nnext: python -m export {options.output}"
    return report, "\n".join([*_describe_new(source.model, model), done])


def _notes_on(report: Report) -> Iterator[str]:
    """What is to be said of a checkpoint, which says itself that it takes no other size."""
    yield from (note for note in report.notes if not note.startswith("not read at another size"))


def _describe_new(before: nn.Module, after: nn.Module) -> list[str]:
    """One line with tensors that folding computed anew, a dozen at most, and their shapes; none where there is none."""
    old = before.state_dict()
    new = [
        name for name, tensor in after.state_dict().items() if name not in old or not tensor.equal(old[name])
    ]
    shapes = ("x".join(map(str, after.state_dict()[name].shape)) for name in new)
    return [f"new: {enumerate_some(list(map(' '.join, zip(new, shapes, strict=True))), 12)}"] if new else []


def _folded(source: Checkpoint, model: Any, report: Report, path: Path) -> Checkpoint:
    """The checkpoint of a folded net: BatchNorms erased, and where it came from."""
    from hashlib import sha256

    from bnfold.checkpoint import drop_identities

    verdicts = report.to_dict()["verdicts"]
    record = {"source": sha256(path.read_bytes()).hexdigest(), "verdicts": [dict(v) for v in verdicts]}
    return replace(source, model=drop_identities(model), folded=record)


if __name__ == "__main__":
    sys.exit(main())
