"""The folders of ONNX files against each other, on the same files: BatchNorms left, right or wrong, time and memory.

    python -m benchmarks.onnx_folders [FILE_OR_FOLDER ...] [--markdown docs/onnx_folders.md] [--timeout SECONDS]

Without files it makes some: the graphs of `TRAPS`, written as text, and small versions of the nets of
`benchmarks.nets`, exported by both of torch's exporters in the way that folds nothing. Every tool runs in a process of
its own, as it is called by default, from file to file; a tool that is not installed is left out, with a line that says
so. Time is that of the call, without the start of the interpreter; memory is the peak of the process. bnfold is
measured as it is used, with its own comparison of the two models.

A result is *wrong* if its outputs differ from the original's by more than `TOLERANCE` of the largest output, in
onnxruntime with all optimisations off, or if it does not load. Initializers that a caller may override are overridden.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from bnfold.onnx.inputs import candidates
from bnfold.onnx.read import read
from bnfold.onnx.run import Outputs, Runner

TOLERANCE = 1e-3

TOOLS = {
    "onnxsim": "onnxsim",
    "onnxslim": "onnxslim",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "bnfold": "bnfold",
}
"""The tools, and the module that each needs."""

BN = "y = BatchNormalization(h, s, b, m, v)"

TRAPS = {
    "reshape mixes channels": """g (float[2, 4, 3] x) => (float[2, 5, 4] y) {
        a = MatMul(x, w3x5) to = Constant<value_ints=[2, 5, 4]>() h = Reshape(a, to) BN }""",
    "linear on another axis": "g (float[2, 5, 3] x) => (float[2, 5, 5] y) { h = MatMul(x, w3x5) BN }",
    "matrix from the left": "g (float[2, 3, 7] x) => (float[2, 5, 7] y) { h = MatMul(w5x3, x) BN }",
    "grouped deconvolution": """g (float[2, 5, 4, 4] x) => (float[2, 5, 6, 6] y) {
        h = ConvTranspose<group=5>(x, w5x1x3x3) BN }""",
    "gemm with alpha, beta, C": """g (float[4, 3] x) => (float[4, 5] y) {
        h = Gemm<alpha=0.5, beta=2.0>(x, w3x5, w4x1) BN }""",
    "gemm with transA": "g (float[3, 4] x) => (float[4, 5] y) { h = Gemm<transA=1>(x, w3x5) BN }",
    "shared weight": """g (float[4, 3] x) => (float[4, 5] y, float[4, 5] z) {
        h = Gemm(x, w3x5) BN r = Relu(x) z = Gemm(r, w3x5) }""",
    "second reader": "g (float[4, 3] x) => (float[4, 5] y, float[4, 5] z) { h = Gemm(x, w3x5) BN z = Relu(h) }",
    "read in a body": """g (float[4, 3] x, bool c) => (float[4, 5] y, float[4, 5] z) { h = Gemm(x, w3x5) BN
        z = If (c) <then_branch = t () => (float[4, 5] p) { p = Relu(h) },
                    else_branch = e () => (float[4, 5] q) { q = Neg(h) }> }""",
    "overridable weight": "g (float[4, 3] x, float[3, 5] w3x5) => (float[4, 5] y) { h = Gemm(x, w3x5) BN }",
    "padded below": """g (float[2, 5, 6] x) => (float[2, 5, 6] y) {
        h = Relu(x) n = BatchNormalization(h, s, b, m, v) y = Conv<pads=[1, 1]>(n, w5x5x3) }""",
    "constant behind a chain": """g (float[2, 3, 6] x) => (float[2, 5, 4] y) {
        one = Constant<value_float=0.5>() like = CastLike(one, x) n = Constant<value_ints=[5]>() c = Expand(like, n)
        h = Conv(x, w5x3x3, c) BN }""",
    "spelt out": """g (float[2, 3, 6] x) => (float[2, 5, 4] y) { h = Conv(x, w5x3x3) to = Constant<value_ints=[5, 1]>()
        mm = Reshape(m, to) vv = Reshape(v, to) ss = Reshape(s, to) bb = Reshape(b, to)
        e = Constant<value_float=0.001>() ve = Add(vv, e) d = Sqrt(ve)
        c = Sub(h, mm) n = Div(c, d) k = Mul(n, ss) y = Add(k, bb) }""",
    "float16 weight, float statistics": "g (float16[4, 3] x) => (float16[4, 5] y) { h = Gemm(x, half3x5) BN }",
}
"""Graphs on which folders differ; `w3x5` is a tensor of that shape, `s b m v` are the numbers of a BatchNorm."""

WAYS: dict[str, dict[str, Any]] = {
    "TorchScript": {"dynamo": False, "do_constant_folding": False},
    "dynamo": {"dynamo": True, "optimize": False, "verbose": False},
}
"""Both of torch's exporters, in the way that folds nothing."""


# ---------------------------------------------------------------- the tools, each in a process of its own


def fold(tool: str, source: Path, target: Path) -> None:
    """Let one tool make `target` from `source`."""
    if tool == "bnfold":
        import bnfold

        bnfold.fold_file(source, target, runtime="any")
    elif tool == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        onnxruntime.InferenceSession(str(source), options, ["CPUExecutionProvider"])
    elif tool == "onnxsim":
        from onnxsim import simplify

        onnx.save(simplify(onnx.load(source))[0], target)
    elif tool == "onnxslim":
        from onnxslim import slim

        onnx.save(slim(onnx.load(source)), target)
    else:
        from onnxscript import optimizer, rewriter

        onnx.save(rewriter.rewrite(optimizer.optimize(onnx.load(source))), target)


def work(tool: str, source: Path, target: Path) -> None:
    """Fold in this process, and print the seconds and the peak of memory in MB as JSON."""
    start = time.perf_counter()
    fold(tool, source, target)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, peak_memory()]))


def peak_memory() -> float:
    """The peak of this process in MB; `getrusage` would begin with what the parent had."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@dataclass(frozen=True)
class Result:
    """What a tool made of one file."""

    left: int
    verdict: str
    seconds: float
    megabytes: float


def measure(tool: str, source: Path, timeout: float) -> Result:
    """Run one tool on one file and judge what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "folded.onnx"
        command = [sys.executable, "-m", "benchmarks.onnx_folders", "--work", tool, str(source), str(target)]
        variables = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, env=variables, check=True
            )
            seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
            return Result(count(target), judge(source, target), seconds, megabytes)
        except subprocess.TimeoutExpired:
            return Result(count(source), "too slow", timeout, 0.0)
        except (subprocess.CalledProcessError, ValueError, IndexError):
            return Result(count(source), "fails", 0.0, 0.0)


def count(path: Path) -> int:
    """How many BatchNormalization nodes a file has, bodies and functions included."""
    model = onnx.load(path, load_external_data=False)
    nodes, waiting = 0, [model.graph, *model.functions]
    while waiting:
        for node in waiting.pop().node:
            nodes += node.op_type == "BatchNormalization"
            waiting += [item.g for item in node.attribute if item.type == onnx.AttributeProto.GRAPH]
    return nodes


def feeds(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Inputs for a file, the likeliest first; what may be overridden is overridden."""
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    given = [item.name for item in model.graph.input if item.name in stored] if model.ir_version >= 4 else []
    draw = np.random.default_rng(3)
    for feed in candidates(model, read(model).context, seed=11):
        for name in given:
            array = onnx.numpy_helper.to_array(stored[name])
            feed[name] = draw.standard_normal(array.shape).astype(array.dtype)
        yield feed


def judge(source: Path, target: Path) -> str:
    """Whether two files compute the same."""
    before = Runner(source)
    for feed in feeds(source):
        try:
            wanted = before(feed)
        except ValueError:
            continue
        try:
            return "right" if agree(wanted, Runner(target)(feed)) else "wrong"
        except ValueError:
            return "invalid"
    return "cannot be run"


def agree(wanted: Outputs, found: Outputs) -> bool:
    """Whether outputs are the same, within `TOLERANCE`."""
    if wanted.keys() != found.keys():
        return False
    for name, array in wanted.items():
        other = found[name]
        if array.shape != other.shape or array.dtype != other.dtype:
            return False
        if array.dtype.kind == "f":
            coarse = 0.02 if array.dtype == np.float16 else TOLERANCE
            peak = np.abs(array[np.isfinite(array)]).max(initial=0.0)
            if not np.allclose(array, other, rtol=0, atol=coarse * max(float(peak), 1e-3), equal_nan=True):
                return False
    return True


# ---------------------------------------------------------------- the files


def write_traps(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write the graphs of `TRAPS` to files."""
    for number, name in enumerate(TRAPS):
        path = folder / f"trap{number}.onnx"
        onnx.save(trap(name), path)
        yield f"trap: {name}", path


def trap(name: str) -> onnx.ModelProto:
    """One graph of `TRAPS`, with random numbers."""
    draw = np.random.default_rng(0)
    text = TRAPS[name].replace("BN", BN)
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    for value in sorted({value for node in model.graph.node for value in node.input}):
        array = _tensor(value, draw)
        if array is not None:
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, value))
    return model


def _tensor(name: str, draw: np.random.Generator) -> np.ndarray | None:
    if name in ("s", "b", "m", "v"):
        return np.abs(draw.standard_normal(5)).astype(np.float32) + (0.5 if name == "v" else 0)
    kind = next(
        (kind for kind in ("half", "w") if name.startswith(kind) and name[len(kind) :][:1].isdigit()), None
    )
    if kind is None:
        return None
    shape = [int(size) for size in name[len(kind) :].split("x")]
    return draw.standard_normal(shape).astype(np.float16 if kind == "half" else np.float32)


def export_nets(folder: Path) -> Iterator[tuple[str, Path]]:
    """Export small versions of well-known nets, in both ways."""
    from benchmarks.nets import NETS, build

    logging.disable(logging.WARNING)
    for name in NETS:
        module, inputs = build(name, "mixed", small=True)
        for way in WAYS:
            path = folder / f"{name} {way}.onnx".replace("/", " ")
            export(module, inputs, path, way)
            yield f"{name} ({way})", path


def export(module: Any, inputs: Any, path: Path, way: str) -> None:
    """Export a module by one of `WAYS`."""
    import torch

    data, options = io.BytesIO(), dict(WAYS[way])
    if not options["dynamo"]:
        options["training"] = torch.onnx.TrainingMode.PRESERVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, inputs, data, **options)
    path.write_bytes(data.getvalue())


def find(places: list[Path], folder: Path) -> Iterator[tuple[str, Path]]:
    """The files to fold, with what to call them."""
    if not places:
        yield from write_traps(folder)
        yield from export_nets(folder)
    for place in places:
        for path in sorted(place.rglob("*.onnx")) if place.is_dir() else [place]:
            yield path.name, path


# ---------------------------------------------------------------- the table


def cell(result: Result) -> str:
    """One result in the table: how many are left, and what is wrong with it."""
    return f"{result.left}" if result.verdict == "right" else f"{result.left} {result.verdict}"


def summarise(rows: dict[str, tuple[int, dict[str, Result]]], tool: str) -> list[str]:
    """One tool's line: BatchNorms erased, files it got wrong or could not do, seconds and memory."""
    total = sum(norms for norms, _ in rows.values())
    mine = [(norms, results[tool]) for norms, results in rows.values()]
    erased = sum(norms - result.left for norms, result in mine if result.verdict == "right")
    bad = [result.verdict for _, result in mine if result.verdict != "right"]
    seconds = sum(result.seconds for _, result in mine)
    peak = max((result.megabytes for _, result in mine), default=0.0)
    wrong = ", ".join(f"{bad.count(kind)} {kind}" for kind in sorted(set(bad))) or "none"
    return [tool, f"{erased} of {total}", wrong, f"{seconds:.1f}", f"{peak:.0f}"]


HEADINGS = (
    "tool",
    "BatchNorms erased, outputs right",
    "files not right",
    "seconds, all files",
    "peak memory, MB",
)


def show(rows: dict[str, tuple[int, dict[str, Result]]], tools: list[str]) -> None:
    """Print both tables."""
    table = Table("file", "BatchNorms", *tools)
    for name, (norms, results) in rows.items():
        table.add_row(name, str(norms), *(cell(results[tool]) for tool in tools))
    whole = Table(*HEADINGS)
    for tool in tools:
        whole.add_row(*summarise(rows, tool))
    console = Console(width=140)
    console.print(table)
    console.print(whole)


def to_markdown(rows: dict[str, tuple[int, dict[str, Result]]], tools: list[str]) -> str:
    """Both tables as Markdown."""

    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    head = ["file", "BatchNorms", *tools]
    body = [
        [name, str(norms), *(cell(results[tool]) for tool in tools)]
        for name, (norms, results) in rows.items()
    ]
    whole = [list(HEADINGS), ["---"] * len(HEADINGS), *(summarise(rows, tool) for tool in tools)]
    each = [head, ["---"] * len(head), *body]
    return (
        "\n".join(["\n".join(map(line, whole)), "", "BatchNorms left, file by file:", "", *map(line, each)])
        + "\n"
    )


def main() -> None:
    """Run the tools on the files and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="ONNX files, or folders of them")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one tool on one file")
    parser.add_argument(
        "--markdown", type=Path, help="write the tables here, too, below the line `<!-- table -->`"
    )
    parser.add_argument("--work", nargs=3, metavar=("TOOL", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], Path(options.work[1]), Path(options.work[2]))
        return
    tools = [tool for tool, module in TOOLS.items() if importlib.util.find_spec(module)]
    for tool in TOOLS.keys() - set(tools):
        print(f"{tool} is not installed and is left out")
    rows: dict[str, tuple[int, dict[str, Result]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in find(options.files, Path(folder)):
            rows[name] = (count(path), {tool: measure(tool, path, options.timeout) for tool in tools})
            print(
                f"{name}: " + ", ".join(f"{tool} {cell(result)}" for tool, result in rows[name][1].items()),
                flush=True,
            )
    show(rows, tools)
    if options.markdown:
        before = options.markdown.read_text(encoding="utf-8").partition("<!-- table -->")[0]
        options.markdown.write_text(f"{before}<!-- table -->\n\n{to_markdown(rows, tools)}", encoding="utf-8")


if __name__ == "__main__":
    main()
