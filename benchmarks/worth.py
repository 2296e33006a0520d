"""What folding is worth: BatchNorms left and single-example latency, by bnfold and by the other folders.

    python -m benchmarks.worth [--only NAME] [--rounds N] [--out worth.json]

The nets are those of `benchmarks.nets`, at full size, exported by `torch.onnx.export` in the way that folds nothing
(the default exporters fold by themselves, and are measured as one of the tools). Every tool starts from the same model,
its result is compared with the original in float64 and called wrong where it differs. A tool that is not installed
is left out, with a line that says so; one that fails is called so. bnfold's own comparison is switched off here.

Latency is that of onnxruntime on one thread, one example, once with a session's default options, whose own folding is
part of what is measured, and once with all optimisations off. What is counted is the CPU time of that thread, which
other work on the machine disturbs less than the clock on the wall. The models take turns; each round takes the best of
a few calls, and printed is the median over the rounds of the ratio to the unfolded model. The best other tool is the
one that leaves the fewest BatchNorms, and of several the fastest.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import bnfold
from benchmarks.nets import NETS, build

Feed = list[np.ndarray]

SECONDS = 0.02
"""How long the calls of one model in one round take together, at least."""


SITTINGS = 3
"""How often the sessions are opened anew: where weights come to lie in memory can matter more than a BatchNorm."""


# ---------------------------------------------------------------- the tools


def export(model: nn.Module, inputs: tuple[Any, ...], **options: Any) -> onnx.ModelProto:
    """The ONNX model of a module, with every BatchNorm still in it."""
    data = io.BytesIO()
    fixed = {"dynamo": False, "do_constant_folding": True, "training": torch.onnx.TrainingMode.PRESERVE}
    torch.onnx.export(model, inputs, data, **(fixed | options))
    return onnx.load_from_string(data.getvalue())


@dataclass(frozen=True)
class Case:
    """A net as every tool gets it."""

    module: nn.Module
    inputs: tuple[Any, ...]
    model: onnx.ModelProto


def by_torch_fx(case: Case) -> onnx.ModelProto:
    """`torch.fx`'s fuse, on the module."""
    from torch.fx.experimental.optimization import fuse

    return export(fuse(copy.deepcopy(case.module)).eval(), case.inputs)


def by_torch_onnx(case: Case) -> onnx.ModelProto:
    """`torch.onnx.export` as it is called by default."""
    program = torch.onnx.export(copy.deepcopy(case.module), case.inputs, dynamo=True, verbose=False)
    return program.model_proto


def by_onnxruntime(case: Case) -> onnx.ModelProto:
    """The offline optimisation of onnxruntime, at the level whose result any runtime can read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(case.model.SerializeToString(), options, ["CPUExecutionProvider"])
        return onnx.load(path)


def by_onnxsim(case: Case) -> onnx.ModelProto:
    """onnxsim, as it is called by default."""
    from onnxsim import simplify

    return simplify(case.model)[0]


def by_onnxslim(case: Case) -> onnx.ModelProto:
    """onnxslim, as it is called by default."""
    from onnxslim import slim

    return slim(case.model)


def by_onnxoptimizer(case: Case) -> onnx.ModelProto:
    """onnxoptimizer, with every fusion and elimination."""
    from onnxoptimizer import get_fuse_and_elimination_passes, optimize

    return optimize(case.model, get_fuse_and_elimination_passes())


def by_onnxscript(case: Case) -> onnx.ModelProto:
    """The optimizer of onnxscript, then its rewriter with its default rules."""
    from onnxscript import optimizer, rewriter

    return rewriter.rewrite(optimizer.optimize(case.model))


def by_bnfold(case: Case, **options: Any) -> onnx.ModelProto:
    """What this project makes of it."""
    return bnfold.fold(case.model, verify=False, **{"runtime": "any", **options})[0]


OTHERS: dict[str, Callable[[Case], onnx.ModelProto]] = {
    "torch.fx": by_torch_fx,
    "torch.onnx": by_torch_onnx,
    "onnxruntime": by_onnxruntime,
    "onnxoptimizer": by_onnxoptimizer,
    "onnxsim": by_onnxsim,
    "onnxslim": by_onnxslim,
    "onnxscript": by_onnxscript,
}

OURS: dict[str, Callable[[Case], onnx.ModelProto]] = {
    "bnfold, whole": lambda case: by_bnfold(case, halves=False),
    "bnfold": by_bnfold,
}

MEASURED = ("best other", "bnfold, whole", "bnfold", "bnfold, then it")


# ---------------------------------------------------------------- one net


@dataclass
class Result:
    """What one tool made of one net.

    Attributes:
        left: BatchNormalization nodes.
        adds: more Add and Mul nodes than the original has, where there are: what replaced a BatchNorm.
        error: the largest difference from the float64 outputs, relative to the largest output.
        problem: why there is no model, or none that can be used.
        latency: milliseconds, and the ratio to the unfolded model, by session options.
    """

    left: int = -1
    adds: int = 0
    error: float = float("nan")
    problem: str = ""
    latency: dict[str, tuple[float, float]] = field(default_factory=dict)


def count(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each operator a model has, those of its functions included."""
    functions = (node.op_type for function in model.functions for node in function.node)
    return Counter([*(node.op_type for node in model.graph.node), *functions])


def open_session(model: onnx.ModelProto, optimise: bool) -> onnxruntime.InferenceSession:
    """A session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def caller(model: onnx.ModelProto, feed: Feed, optimise: bool) -> Callable[[], Any]:
    """What runs a model once; its inputs are given by position, since a tool may rename them."""
    session = open_session(model, optimise)
    named = dict(zip((item.name for item in session.get_inputs()), feed, strict=True))
    return lambda: session.run(None, named)[0]


def compute_truth(case: Case) -> np.ndarray:
    """The output in float64."""
    wide = [each.double() if each.is_floating_point() else each for each in case.inputs]
    with torch.no_grad():
        return copy.deepcopy(case.module).double()(*wide).numpy()


def apply(
    tool: Callable[[Case], onnx.ModelProto], case: Case, feed: Feed, truth: np.ndarray, noise: float
) -> tuple[Result, Any]:
    """Run one tool, count what it left and hold its output to the truth; the model is None where it is of no use."""
    try:
        model = tool(case)
        output = caller(model, feed, optimise=False)()
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        return Result(problem=f"fails: {type(error).__name__}: {line}"[:160]), None
    before, after = count(case.model), count(model)
    adds = sum(max(0, after[op] - before[op]) for op in ("Add", "Mul", "Sub", "Div"))
    off = float(np.abs(output - truth).max() / np.abs(truth).max())
    wrong = not off <= max(1e-4, 20 * noise)
    return Result(
        after["BatchNormalization"], adds, off, "wrong output" if wrong else ""
    ), None if wrong else model


def examine(
    name: str, gammas: str, rounds: int, tools: dict[str, Callable[[Case], onnx.ModelProto]]
) -> dict[str, Result]:
    """Every tool on one net, then the latency of the unfolded model, the best other tool and bnfold.

    The other tools look at no sign, so they are asked once.
    """
    module, inputs = build(name, gammas)
    case = Case(module, inputs, export(module, inputs))
    norms = sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
    if count(case.model)["BatchNormalization"] != norms:
        raise RuntimeError(f"the exported {name} should have {norms} BatchNorms")
    feed, truth = [each.numpy() for each in inputs], compute_truth(case)
    plain, _ = apply(lambda case: case.model, case, feed, truth, float("inf"))
    results, models = {"unfolded": plain}, {"unfolded": case.model}
    for tool, run in (tools | OURS).items():
        try:
            with quiet():
                results[tool], models[tool] = apply(run, case, feed, truth, plain.error)
        except ImportError:
            missing.add(tool)
    usable = [tool for tool in tools if models.get(tool) is not None]
    if not usable:
        return results
    fewest = min(results[tool].left for tool in usable)
    best = (
        fastest({tool: models[tool] for tool in usable if results[tool].left == fewest}, feed)
        if rounds
        else usable[0]
    )
    results["best other"] = Result(**{**asdict(results[best]), "problem": best})
    if rounds:
        models["best other"] = models[best]
        results["bnfold, then it"], models["bnfold, then it"] = apply(
            OTHERS[best], fold_both(case), feed, truth, plain.error
        )
        chosen = {tool: models[tool] for tool in ("unfolded", *MEASURED) if models[tool] is not None}
        if results["bnfold"].left == results["bnfold, whole"].left:
            del chosen["bnfold, whole"]
        for label, optimise in (("default", True), ("off", False)):
            for tool, times in measure(chosen, feed, optimise, rounds).items():
                results[tool].latency[label] = times
        results["bnfold, whole"].latency = results["bnfold, whole"].latency or results["bnfold"].latency
    return results


def fold_both(case: Case) -> Case:
    """The net folded by bnfold, as a module and as a model, for a tool that comes after it."""
    module, _ = bnfold.fold(case.module, case.inputs, verify=False)
    return Case(module, case.inputs, by_bnfold(case))


def fastest(models: dict[str, onnx.ModelProto], feed: Feed) -> str:
    """The fastest of a few models in a session with default options; a first look, before what is reported."""
    times = measure(models, feed, True, 5)
    return min(times, key=lambda tool: times[tool][0])


missing: set[str] = set()


@contextlib.contextmanager
def quiet() -> Any:
    """What the tools print is not of interest here."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def measure(
    models: dict[str, onnx.ModelProto], feed: Feed, optimise: bool, rounds: int
) -> dict[str, tuple[float, float]]:
    """Milliseconds of each model in onnxruntime, and the ratio to the first."""
    return take_turns(lambda: {tool: caller(model, feed, optimise) for tool, model in models.items()}, rounds)


def take_turns(
    prepare: Callable[[], dict[str, Callable[[], Any]]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Milliseconds of each call, and the ratio to the first, medians over rounds in which they take turns.

    `prepare` makes the calls anew in every sitting.
    """
    times: dict[str, list[float]] = {}
    for sitting in range(SITTINGS):
        calls = prepare()
        order = list(calls)
        once = min(clock(call) for call in calls.values() for _ in range(2))
        repeats = max(2, min(200, round(SECONDS / once)))
        for number in range(sitting, sitting + -(-rounds // SITTINGS)):
            for tool in order[number % len(order) :] + order[: number % len(order)]:
                times.setdefault(tool, []).append(min(clock(calls[tool]) for _ in range(repeats)))
    plain = times[order[0]]
    ratios = {tool: median(a / b for a, b in zip(times[tool], plain, strict=True)) for tool in order}
    return {tool: (1000 * median(times[tool]), ratios[tool]) for tool in order}


def clock(call: Callable[[], Any]) -> float:
    """CPU seconds of this thread, in which a session with one thread does all its work."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


# ---------------------------------------------------------------- tables


def show_left(result: Result | None, ours: bool = True) -> str:
    """One cell of the first table; other tools rewrite more than BatchNorms, so their Adds say nothing."""
    if result is None:
        return "-"
    if result.problem:
        return result.problem.split(":")[0]
    return str(result.left) + (f" + {result.adds} Add" if ours and result.adds > 0 else "")


def tabulate_left(found: dict[str, dict[str, Result]]) -> Table:
    """BatchNorms left, by net and tool."""
    table = Table("net", "unfolded", *OTHERS, *OURS)
    for name, results in found.items():
        table.add_row(
            name, *(show_left(results.get(tool), tool in OURS) for tool in ("unfolded", *OTHERS, *OURS))
        )
    return table


def tabulate_latency(found: dict[str, dict[str, Result]], label: str) -> Table:
    """Milliseconds of the unfolded model and the ratios of the others to it."""
    table = Table("net", "unfolded, ms", "best other is", *MEASURED, title=f"optimisations: {label}")
    for name, results in found.items():
        milliseconds = f"{results['unfolded'].latency[label][0]:.3g}"
        ratios = [
            f"{results[tool].latency[label][1]:.2f}" if label in results[tool].latency else "-"
            for tool in MEASURED
        ]
        table.add_row(name, milliseconds, results["best other"].problem, *ratios)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every net and print the tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.worth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="nets whose name contains this")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the latency, 0 for none")
    parser.add_argument("--gammas", choices=("positive", "mixed"), action="append")
    parser.add_argument("--out", default="", help="write what was measured as JSON")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    onnxruntime.set_default_logger_severity(4)
    torch.set_num_threads(1)
    console, record = Console(width=160), {}
    for gammas in options.gammas or ("positive", "mixed"):
        found = {}
        for name in (name for name in NETS if options.only in name):
            print(f"{gammas}: {name}", file=sys.stderr, flush=True)
            found[name] = examine(
                name, gammas, *((options.rounds, OTHERS) if gammas == "positive" else (0, {}))
            )
        console.print(f"\nBatchNorms left, {gammas} gammas", tabulate_left(found))
        for label in ("default", "off") if gammas == "positive" and options.rounds else ():
            console.print(tabulate_latency(found, label))
        record[gammas] = {name: {tool: asdict(r) for tool, r in rs.items()} for name, rs in found.items()}
    for tool in sorted(missing):
        print(f"{tool} is not installed and was left out: pip install {tool}", file=sys.stderr)
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
