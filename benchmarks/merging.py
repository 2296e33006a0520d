"""What merging is worth: as trained, folded, merged, and by the model's own method; operators left and latency.

    python -m benchmarks.merging [NAMES ...] [--small] [--rounds N] [--out merging.json]

The models are those of `benchmarks.branches` and, where timm and segmentation_models_pytorch are installed, `ZOO` and
`ENCODERS`: one or two of every family that has a `reparameterize`, `fuse` or `switch_to_deploy` of its own. `--list`
names all in timm. BatchNorms are in place, with the statistics of a batch; NAMES are parts of names.

    trained    exported by `torch.onnx.export` in the way that folds nothing
    folded     by bnfold with `merge=False`, as a module, then exported
    merged     by bnfold, as a module, then exported
    as file    exported as trained, then by bnfold as a file
    own        by the model's own method, then exported

Every output is compared with that of the model as trained in float64, and called wrong where it differs. Latency is
that of one example on one thread, in onnxruntime with default options and in torch eager, where a file has none; how it
is measured is said in `benchmarks.worth`. Before the table stands where bnfold falls short of what it is to reach: no
BatchNorm, at most the operators that the own method leaves, 5 % of its latency in onnxruntime and 15 % in torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import bnfold
from benchmarks import branches, worth
from benchmarks.nets import anchor

OWN = ("fuse", "reparameterize", "switch_to_deploy")

ZOO = (
    "mobileone_s0", "mobileone_s4", "repvgg_a0", "fastvit_t8", "fastvit_sa12", "repvit_m0_9", "repghostnet_050",
    "ghostnetv3_050", "lcnetv2_small", "shvit_s1", "iformer_t", "efficientvim_m1", "efficientvit_m0", "levit_128s",
    "levit_conv_128s", "nextvit_small", "tiny_vit_5m_224",
)  # fmt: skip
"""Of timm."""

ENCODERS = ("mobileone_s0",)
"""Of segmentation_models_pytorch, under a Unet."""


# ---------------------------------------------------------------- the models


@dataclass(frozen=True)
class Case:
    """A model as it is trained, one example, and what brings a copy of it into its own form."""

    module: nn.Module
    inputs: tuple[Any, ...]
    own: Callable[[nn.Module], nn.Module]


def branch_cases(small: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """The nets of `benchmarks.branches`."""

    def make(name: str) -> Case:
        module, inputs = branches.build(name, small=small)
        return Case(module, inputs, branches.reparameterize)

    for name in branches.BRANCHES:
        yield name, lambda name=name: make(name)


def train(module: nn.Module, size: Sequence[int]) -> tuple[Any, ...]:
    """Give a model what training would, as far as that matters here, and return an example for it."""
    branches.stir(module)
    anchor(module, (torch.randn(8, *size),), 0.0, moved=False)
    return (torch.randn(1, *size),)


def timm_cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """The models of `ZOO`."""
    import timm

    def make(name: str) -> Case:
        torch.manual_seed(0)
        module = timm.create_model(name)
        inputs = train(module, module.default_cfg["input_size"])
        return Case(module, inputs, timm.utils.reparameterize_model)

    for name in ZOO:
        yield f"timm/{name}", lambda name=name: make(name)


def smp_cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """A Unet on the encoders of `ENCODERS`."""
    import segmentation_models_pytorch as smp
    from segmentation_models_pytorch.encoders.mobileone import reparameterize_model

    def make(name: str) -> Case:
        torch.manual_seed(0)
        module = smp.Unet(name, encoder_weights=None)
        inputs = train(module, (3, 224, 224))
        return Case(module, inputs, reparameterize_model)

    for name in ENCODERS:
        yield f"smp/{name}", lambda name=name: make(name)


def cases(small: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """All of them, as far as they are installed."""
    yield from branch_cases(small)
    for zoo in (timm_cases, smp_cases):
        try:
            yield from zoo()
        except ImportError as error:
            print(f"{error}: left out", file=sys.stderr)


def owners() -> Iterator[str]:
    """Every model of timm that has a method of its own, with the classes that have it."""
    import timm

    for name in timm.list_models():
        with torch.device("meta"):
            module = timm.create_model(name)
        found = {type(part).__name__ for part in module.modules() if any(hasattr(part, own) for own in OWN)}
        if found:
            yield f"{name}: {', '.join(sorted(found))}"


# ---------------------------------------------------------------- what becomes of one


@dataclass
class Result:
    """What became of a model in one way.

    Attributes:
        counts: nodes of its ONNX model, by column of the table.
        error: the largest difference from the float64 outputs, relative to the largest output.
        problem: why there is no model, or none that can be used.
        onnxruntime, torch: milliseconds, and the ratio to the model as trained.
    """

    counts: dict[str, int] = field(default_factory=dict)
    error: float = float("nan")
    problem: str = ""
    onnxruntime: tuple[float, float] | None = None
    torch: tuple[float, float] | None = None


COLUMNS = {
    "Conv": ("Conv",),
    "Gemm": ("Gemm", "MatMul"),
    "Add": ("Add", "Sub", "Sum"),
    "BN": ("BatchNormalization",),
}


def by_module(module: nn.Module, case: Case) -> tuple[onnx.ModelProto, nn.Module | None]:
    """A module and what is exported of it."""
    return worth.export(module, case.inputs), module


def by_folding(case: Case, **options: Any) -> tuple[onnx.ModelProto, nn.Module | None]:
    """What bnfold makes of the module."""
    return by_module(bnfold.fold(case.module, case.inputs, verify=False, **options)[0], case)


def by_file(case: Case) -> tuple[onnx.ModelProto, nn.Module | None]:
    """What bnfold makes of the file."""
    return bnfold.fold(worth.export(case.module, case.inputs), verify=False)[0], None


Way = Callable[[Case], tuple[onnx.ModelProto, nn.Module | None]]

WAYS: dict[str, Way] = {
    "trained": lambda case: by_module(case.module, case),
    "folded": lambda case: by_folding(case, merge=False),
    "merged": by_folding,
    "as file": by_file,
    "own": lambda case: by_module(case.own(case.module).eval(), case),
}


def deviation(output: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference, relative to the largest output."""
    return float(np.abs(output - truth).max() / np.abs(truth).max())


def count(model: onnx.ModelProto) -> dict[str, int]:
    """The columns of the table."""
    nodes = worth.count(model)
    return {column: sum(nodes[name] for name in names) for column, names in COLUMNS.items()}


def run_eager(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with torch.inference_mode():
        return module(*inputs)


def go(way: Way, case: Case, truth: np.ndarray, noise: float) -> tuple[Result, Any, Any]:
    """One way: what it left, and the model and the module to be timed, where the outputs are right."""
    try:
        with worth.quiet():
            model, module = way(case)
        feed = [each.numpy() for each in case.inputs]
        outputs = [worth.caller(model, feed, optimise=False)()]
        outputs += [] if module is None else [run_eager(module, case.inputs).numpy()]
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        return Result(problem=f"fails: {type(error).__name__}: {line}"[:160]), None, None
    result = Result(count(model), max(deviation(output, truth) for output in outputs))
    if not result.error <= max(1e-4, 20 * noise):
        result.problem = "wrong output"
        return result, None, None
    return result, model, module


def examine(case: Case, rounds: int, ways: dict[str, Way] = WAYS) -> dict[str, Result]:
    """Every way on one model, then the latency of those that are right."""
    truth = worth.compute_truth(case)
    noise = deviation(run_eager(case.module, case.inputs).numpy(), truth)
    found = {name: go(way, case, truth, noise) for name, way in ways.items()}
    results = {name: result for name, (result, _, _) in found.items()}
    if not rounds:
        return results
    models = {name: model for name, (_, model, _) in found.items() if model is not None}
    for name, times in worth.measure(models, [each.numpy() for each in case.inputs], True, rounds).items():
        results[name].onnxruntime = times
    modules = {name: module for name, (_, _, module) in found.items() if module is not None}
    calls = {name: lambda m=module: run_eager(m, case.inputs) for name, module in modules.items()}
    for name, times in worth.take_turns(lambda: calls, rounds).items():
        results[name].torch = times
    return results


# ---------------------------------------------------------------- the table


GOALS = {"onnxruntime": 1.05, "torch": 1.15}


def shortfalls(result: Result, own: Result) -> Iterator[str]:
    """In what a merged model is behind the model's own method."""
    if result.problem:
        yield result.problem
    for column, number in result.counts.items():
        most = 0 if column == "BN" else own.counts.get(column, number)
        if number > most:
            yield f"{number} {column} rather than {most}"
    for runtime, bound in GOALS.items():
        mine, theirs = getattr(result, runtime), getattr(own, runtime)
        if mine and theirs and mine[0] > bound * theirs[0]:
            yield f"{mine[0] / theirs[0]:.2f} times as long in {runtime}"


def show(times: tuple[float, float] | None) -> list[str]:
    """Milliseconds and ratio."""
    return ["-", "-"] if times is None else [f"{times[0]:.3g}", f"{times[1]:.2f}"]


def tabulate(found: dict[str, dict[str, Result]]) -> Table:
    """A row for each way of each model."""
    table = Table("model", "way", *COLUMNS, "difference", "onnxruntime, ms", "ratio", "torch, ms", "ratio")
    for name, results in found.items():
        for way, result in results.items():
            counts = [str(result.counts.get(column, "-")) for column in COLUMNS]
            said = result.problem.split(":")[0] or f"{result.error:.1e}"
            times = [*show(result.onnxruntime), *show(result.torch)]
            table.add_row(name if way == "trained" else "", way, *counts, said, *times)
        table.add_section()
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine every model and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.merging", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=[""], help="models whose name contains one of these")
    parser.add_argument("--small", action="store_true", help="the small versions of `benchmarks.branches`")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the latency, 0 for none")
    parser.add_argument("--out", type=Path, help="write what was measured as JSON")
    parser.add_argument("--list", action="store_true", help="name timm's models with a method of their own")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    onnxruntime.set_default_logger_severity(4)
    torch.set_num_threads(1)
    if options.list:
        print("\n".join(owners()))
        return 0
    console, found = Console(width=160, highlight=False), {}
    for name, make in cases(options.small):
        if any(part in name for part in options.names):
            try:
                found[name] = results = examine(make(), options.rounds)
            except Exception as error:
                print(f"{name} cannot be built, run or exported: {error}", file=sys.stderr)
                continue
            for way in ("merged", "as file"):
                short = ", ".join(shortfalls(results[way], results["own"]))
                console.print(f"{name}, {way}: {short or 'all reached'}")
    console.print(tabulate(found))
    if options.out:
        record = {name: {way: asdict(result) for way, result in each.items()} for name, each in found.items()}
        options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
