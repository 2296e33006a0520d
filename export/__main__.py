"""python -m export: a checkpoint becomes an ONNX file for inference on single examples.

    python -m export [ckpt.pt] [-o ckpt.onnx] [--batch N|dynamic] [--tables auto] [--weights int8] [--no-timing]

BatchNorms that remain are folded first. The file is written last, once the ONNX checker has passed it and onnxruntime
has computed what the net computes on every input. Then the sizes and the time of one example are shown beside those of
the net with its BatchNorms; of a folded checkpoint that is the file it was made from, if it lies beside it unchanged.

With `--tables auto` a table may stand for layers (`export.tables`). With `--weights int8` large weights are int8, and
held to the dev loss of the names that the net was trained on (`export.quantise`).

Exit code 0; 1 where onnxruntime computes something else, 2 where a file or an argument cannot be used, or int8 weights
raise the dev loss by more than `--max-loss-increase`; after 1 and 2 nothing was written, and there is one line on
stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from shlex import quote

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from bnfold import checkpoint as checkpoints
from bnfold.checkpoint import Checkpoint
from bnfold.command import Parser
from bnfold.errors import InputError, run_command
from bnfold.printed import PARTS, Printed
from bnfold.report import Report
from export.convert import Exported, export, has_batchnorm
from export.latency import Timing, compare_latencies
from export.quantise import Int8
from export.write import Batch


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(prog="python -m export", description="Write a checkpoint as ONNX, proven.")
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        help="a checkpoint, folded or not (the newer one of ckpt.pt and ckpt.folded.pt)",
        metavar="CHECKPOINT",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where to write (ckpt.onnx beside it)"
    )
    parser.add_argument("--batch", default="1", metavar="N|dynamic", help="examples that one run takes (1)")
    parser.add_argument(
        "--tables",
        choices=("never", "auto"),
        default="never",
        help="auto: a table of outputs in the place of layers, where one example then takes less time (never)",
    )
    parser.add_argument(
        "--weights",
        choices=("float", "int8"),
        default="float",
        help="int8: large matrices in a quarter of the bytes, for onnxruntime alone (float)",
    )
    parser.add_argument(
        "--max-loss-increase",
        metavar="NATS",
        help="by how much int8 weights may raise the dev loss (0.001)",
    )
    parser.add_argument(
        "--names", metavar="FILE", help="the list that the net was trained on, as for python -m train"
    )
    parser.add_argument(
        "--no-timing", dest="timing", action="store_false", help="skip the measurement of latency"
    )
    return parser.parse_args(arguments)


def _newest() -> Path:
    """Return the checkpoint that the road has come to: the folded one, unless a net was trained since."""
    found = [path for path in (Path("ckpt.folded.pt"), Path("ckpt.pt")) if path.is_file()]
    if not found:
        raise InputError("there is no ckpt.pt here; make one with `python -m train`, or name a checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def run(options: argparse.Namespace) -> None:
    """Export, then print what was folded, how it was proven, and what it costs to run."""
    options.checkpoint = options.checkpoint or _newest()
    batch, weights = _batch(options.batch), _weights(options)
    exported = export(options.checkpoint, options.output, batch, options.tables, weights)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)
    report = Report(exported.verdicts, (exported.evidence,))
    console.print(Printed(report, more="", parts=PARTS if exported.verdicts else PARTS[1:]))
    console.print(tabulate(_time(options.checkpoint, exported)) if options.timing else "")
    if exported.loss and weights:
        print(
            f"int8 weights: dev loss {exported.loss.net:.5f} before, {exported.loss.file:.5f} after,"
            f" {exported.loss.increase:+.5f} of {weights.max_loss_increase:g} allowed"
        )
    print(f"nodes: {exported.counts}")
    print(f"wrote {exported.path}")
    if checkpoints.load(options.checkpoint).vocabulary:
        print(f"next: python -m export.sample {quote(str(exported.path))} --count 20 --seed 1")


def tabulate(timings: Sequence[Timing]) -> Table:
    """Return the table of latencies, the first row being the yardstick."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("one example in")
    for heading in ("nodes", "bytes", "median", "times as fast"):
        table.add_column(heading, justify="right")
    for timing in timings:
        size = ["" if number is None else f"{number:,}" for number in (timing.nodes, timing.size)]
        speed = f"{timings[0].seconds / timing.seconds:.1f}"
        table.add_row(timing.name, *size, f"{timing.seconds * 1e6:.1f} us", speed)
    return table


def _batch(text: str) -> Batch:
    if text == "dynamic":
        return text
    if not text.isdecimal() or not text.isascii() or not 1 <= int(text[:10]) < 2**31:
        raise InputError(f"--batch {text}: it takes a number from 1 up, or dynamic")
    return int(text)


def _weights(options: argparse.Namespace) -> Int8 | None:
    text = options.max_loss_increase
    if options.weights == "float":
        if text is not None or options.names is not None:
            raise InputError("--max-loss-increase and --names go with --weights int8")
        return None
    with suppress(ValueError):
        if text is None or 0 <= float(text) < float("inf"):
            return Int8(names=options.names) if text is None else Int8(float(text), options.names)
    raise InputError(f"--max-loss-increase {text}: it takes a number of nats from 0 up")


def _time(path: Path, exported: Exported) -> list[Timing]:
    source = checkpoints.load(path)
    example = source.input.sample(1)
    return compare_latencies(
        exported.model, _find_unfolded(path, source), example, exported.path.read_bytes()
    )


def _find_unfolded(path: Path, source: Checkpoint) -> nn.Module | None:
    """Return the net with its BatchNorms: the checkpoint's own, or that of the file which was folded into it."""
    if has_batchnorm(source.model):
        return source.model
    sibling = path.with_name(path.stem.removesuffix(".folded") + path.suffix)
    wanted = (source.folded or {}).get("source")
    if sibling.is_file() and sha256(sibling.read_bytes()).hexdigest() == wanted:
        return checkpoints.load(sibling).model
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
