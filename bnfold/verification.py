"""Hold two finished models against each other: modules, ONNX models, or one of each.

    verification = verify_sides(open_side(before), open_side(after), inputs)

A `Side` is a model that can be run on a `Case`: arrays in the order of the model's inputs. What the two sides compute
is judged by `bnfold.equivalence`, as a fold is; all that is here is on which inputs.

    given        the caller's, or the example inputs that a file holds
    made up      where none are given: what an ONNX model declares, what a checkpoint's domain is sampled for
    all          every input, where a checkpoint's domain is finite and not too large; then nothing else is tried
    perturbed    the same with noise of half their spread, as far as they are floats
    ascent       steps that climb the difference of the two models (`bnfold.ascent`)

The first three kinds are judged by themselves, then again together with the ascent: a climb can reach larger outputs,
to which differences are relative.

Inputs and outputs are matched by name where the names agree, else by their order. Not covered: a model of another kind
than it was, such as one with quantised weights, passes only with a `tolerance` that is said; and inputs that are
integers without a finite domain are tried as given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bnfold.archive import is_onnx, load_arrays
from bnfold.ascent import climb
from bnfold.cases import Array, Case, count_examples, nudged, perturbed, renamed
from bnfold.divergence import Divergence, Recording, find_divergence
from bnfold.equivalence import UNIT_ROUNDOFF, Alike, Comparison, Outputs, Unavailable, Worst, compare, measure
from bnfold.errors import InputError, NotEquivalent, UnreadableModel
from bnfold.report import Evidence

__all__ = ["Side", "Verification", "find_cases", "open_file", "open_side", "verify_sides"]

_FRAMEWORKS = (("torch.nn", "Module", "torch"), ("onnx", "ModelProto", "onnx"), ("onnx_ir", "Model", "onnx"))


class Side(Protocol):
    """One of two models, ready to run. `run` and its like raise `Unavailable` for a run that cannot be made."""

    names: tuple[str, ...]
    doubt: str
    seconds: float

    @property
    def dtype(self) -> str:
        """Its own dtype, a key of `UNIT_ROUNDOFF`; of several, the coarsest."""

    @property
    def weights(self) -> int:
        """How many operators have weights, each of which may have been rounded once."""

    def meet(self, first: Any) -> None:
        """Learn for which side, the first of two, inputs are drawn."""

    def read(self, inputs: Any) -> list[Case]:
        """The caller's inputs, in the form in which such a model is called."""

    def make_up(self) -> tuple[list[Case], bool]:
        """Inputs for this model, none where nothing is known of them, and whether they are all that there are."""

    def accept(self, case: Case) -> Case:
        """The same inputs in the types in which this model takes them."""

    def run(self, case: Case) -> Outputs:
        """What the model computes in its own dtype."""

    def run_exactly(self, cases: Sequence[Case], own: Sequence[Outputs] | None) -> list[Outputs]:
        """What it computes in float64, from the weights that it has; `own` is what it computes in its own dtype."""

    def run_nudged(self, cases: Sequence[Case], exact: bool, units: float, seed: int) -> list[Outputs]:
        """What it computes in float64 or in its own dtype, with its weights moved by units in their last place."""

    def soften(self) -> Callable[[Case], Outputs]:
        """Run the model with rectifiers that leak, so that a direction is seen where they are shut."""

    def differentiate(self, other: Any, case: Case, objective: Any) -> Sequence[Array | None] | None:
        """The gradient of the objective by each array of a case; None where there is none to be had."""

    def record(self, case: Case, output: str) -> Recording:
        """What is computed on the way to an output."""


@dataclass(frozen=True)
class Verification:
    """Whether two models agree, on what that rests, and where they differ most.

    Attributes:
        evidence: the comparisons that were passed; of a failure, none.
        tried: what the inputs were, as ("given", 1), in order.
        worst: the largest difference of all, within its bound or not.
        case: the input that it occurs on.
        notes: what could not be compared, and why.
        failure: one sentence where they are not equivalent.
        divergence: the first layer whose difference lasts, where it was looked for.
    """

    evidence: tuple[Evidence, ...]
    tried: tuple[str, ...]
    worst: Worst | None = None
    case: Case | None = None
    notes: tuple[str, ...] = ()
    failure: str = ""
    divergence: Divergence | None = None

    @property
    def equivalent(self) -> bool:
        """Whether no bound was exceeded."""
        return not self.failure

    def raise_if_different(self) -> None:
        """Raise `NotEquivalent`, with the worst place, unless the models agree."""
        if self.failure:
            raise NotEquivalent(self.failure, self.worst)

    def describe_worst(self) -> str:
        """Input, output, element and the two values of the largest difference, as a clause."""
        if self.worst is None or self.case is None:
            return ""
        return self.worst.place.replace(f"input {self.worst.input}", self.case.label, 1)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values."""
        worst = None
        if self.worst is not None and self.case is not None:
            worst = {"kind": self.case.label, **asdict(self.worst), "place": self.describe_worst()}
        divergence = None if self.divergence is None else asdict(self.divergence)
        return {
            "equivalent": self.equivalent,
            "failure": self.failure,
            "evidence": [asdict(item) for item in self.evidence],
            "inputs": list(self.tried),
            "worst": worst and _finite(worst),
            "divergence": divergence and _finite(divergence),
            "notes": list(self.notes),
        }


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None for infinite numbers, which JSON has not."""
    return {name: None if value == np.inf else value for name, value in record.items()}


# ---------------------------------------------------------------- what is compared


def open_side(model: Any, label: str = "the model", folder: Path | None = None) -> Side:
    """One side, of a module or an ONNX model, whose framework was imported by whoever made it, or of a file.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(model, str | Path):
        return open_file(model)
    for framework, kind, frontend in _FRAMEWORKS:
        module = sys.modules.get(framework)
        if module is not None and isinstance(model, getattr(module, kind)):
            side: Side = import_module(f"bnfold.{frontend}.side").open_model(model, label, folder)
            return side
    raise InputError(f"{type(model).__name__} is neither an nn.Module nor an ONNX model")


def open_file(
    name: str | Path,
    factory: str | None = None,
    shapes: Sequence[str] | None = None,
    **choices: str | None,
) -> Side:
    """One side, of what the user names: a file, or "package.module:factory".

    Args:
        name: an ONNX file, a checkpoint, an exported program, weights of what `factory` builds, or a factory itself.
        factory: "package.module:factory", for weights.
        shapes: of the inputs of a module, as `bnfold.torch.make_inputs` reads them.
        **choices: of weights, `key` and `prefix`, and `arguments` of what builds their module, as JSON.

    Raises:
        InputError: there is no such file, or it cannot be used.
    """
    path, label = Path(name), str(name)
    given: tuple[Any, ...] = (path, label, factory, shapes)
    frontend, opening = "torch", "open_file"
    if not path.exists() and ":" in label:
        opening, given, choices = "open_factory", (label, shapes, choices.get("arguments")), {}
    elif not path.is_file():
        raise InputError(f"{path}: {'it is a folder' if path.is_dir() else 'no such file'}")
    elif is_onnx(path):
        frontend, given, choices = "onnx", (path, label), {}
    import_module(frontend)  # what is missing is said first of what is needed most
    side: Side = getattr(import_module(f"bnfold.{frontend}.side"), opening)(*given, **choices)
    return side


def find_cases(before: Side, after: Side, inputs: Any = None) -> tuple[list[Case], bool]:
    """The inputs to begin with, given or made up, and whether they are all that there are.

    Raises:
        InputError: none are given, and neither model tells what it takes; or they suit none.
    """
    if inputs is not None:
        return list(_read(before, after, inputs)), False
    found = [side.make_up() for side in (before, after)]
    for cases, exhaustive in sorted(found, key=lambda one: not one[1]):
        if cases:
            return cases, exhaustive
    raise InputError("nothing is known of what the models take; give inputs")


def _read(before: Side, after: Side, inputs: Any) -> Iterator[Case]:
    """The caller's inputs: files or dicts of arrays by name, for either kind of model; else as a module is called."""
    if isinstance(inputs, str | Path):
        inputs = [inputs]
    if isinstance(inputs, list) and inputs and all(isinstance(one, str | Path) for one in inputs):
        inputs = [load_arrays(Path(path)) for path in inputs]
    several = isinstance(inputs, list) and bool(inputs) and all(isinstance(one, Mapping) for one in inputs)
    feeds = inputs if several else [inputs]
    if all(_is_feed(feed) for feed in feeds) and (several or before.names or after.names):
        for number, feed in enumerate(feeds, start=1):
            arrays = tuple(np.asarray(array) for array in feed.values())
            yield Case(f"given {number}", arrays, tuple(map(str, feed)))
        return
    reader = after if before.names and not after.names else before
    yield from reader.read(inputs)


def _is_feed(thing: Any) -> bool:
    """Whether something is arrays by the name of an input."""
    return isinstance(thing, Mapping) and all(
        isinstance(name, str) and hasattr(array, "__array__") for name, array in thing.items()
    )


# ---------------------------------------------------------------- the comparison


def verify_sides(
    before: Side,
    after: Side,
    inputs: Any = None,
    tolerance: float | None = None,
    locate: bool = False,
) -> Verification:
    """Compare two models; see the head of this file.

    Args:
        inputs: as `find_cases` reads them; None has them made up.
        tolerance: the largest difference, relative to the largest output, instead of the bounds that are derived.
        locate: look for the layer where a difference begins.

    Raises:
        InputError: inputs are missing or do not suit a model, or the tolerance is none.
        UnreadableModel: neither comparison can be made.
    """
    if tolerance is not None and not 0 <= tolerance < np.inf:
        raise InputError(f"a tolerance of {tolerance} holds nothing to anything; give a number of 0 or more")
    cases, exhaustive = find_cases(before, after, inputs)
    after.meet(before)
    pair = _Pair(before, after, tolerance)
    cases = [before.accept(case) for case in cases]
    if not exhaustive:
        cases = _with_noise(pair, cases)
    judged = pair.judge(cases, exhaustive)
    if judged.equivalent and not exhaustive:
        climbed, why = climb(before, after, cases, pair.run)
        again = pair.judge([*cases, *climbed], exhaustive) if climbed else judged
        judged = replace(again, notes=(*again.notes, *why))
    if locate and not judged.equivalent:
        judged = replace(judged, divergence=find_divergence(before, after, judged.case, judged.worst))
    return judged


def _with_noise(pair: _Pair, cases: list[Case]) -> list[Case]:
    """The cases, and each with noise, as far as the first model runs on that."""
    noisy = []
    for case in cases:
        try:
            for near in perturbed(case):
                accepted = pair.before.accept(near)
                pair.run(accepted)
                noisy.append(accepted)
        except (InputError, Unavailable):
            continue
    return [*cases, *noisy]


@dataclass
class _Pair:
    """Two sides, and what they computed so far."""

    before: Side
    after: Side
    tolerance: float | None = None
    own: dict[int, tuple[Case, Outputs, Outputs]] = field(default_factory=dict)
    exact: dict[int, tuple[Outputs, Outputs]] = field(default_factory=dict)

    def run(self, case: Case) -> tuple[Outputs, Outputs]:
        """What both compute in their own dtypes, the second's outputs under the names of the first's.

        Raises:
            InputError, Unavailable: the first does not run.
            UnreadableModel: the first runs, and the second does not.
        """
        if id(case) not in self.own:
            old = self.before.run(case)
            try:
                new = self.after.run(case)
            except (InputError, Unavailable) as error:
                raise UnreadableModel(
                    f"the second model does not run where the first does: {error}"
                ) from error
            self.own[id(case)] = case, old, renamed(new, old)
        return self.own[id(case)][1:]

    def run_exactly(self, cases: Sequence[Case]) -> list[tuple[Outputs, Outputs]]:
        """The same in float64."""
        new = [case for case in cases if id(case) not in self.exact]
        if new:
            known = [self.own.get(id(case)) for case in new]
            complete = [one for one in known if one is not None]
            whole = len(complete) == len(new)
            olds = self.before.run_exactly(new, [one[1] for one in complete] if whole else None)
            news = self.after.run_exactly(new, [one[2] for one in complete] if whole else None)
            for case, old, late in zip(new, olds, news, strict=True):
                self.exact[id(case)] = old, renamed(late, old)
        return [self.exact[id(case)] for case in cases]

    def judge(self, cases: list[Case], exhaustive: bool) -> Verification:
        """Hold what they compute on these inputs to the bounds."""
        tried = tuple(case.label for case in cases)
        runs = _Runs(self, cases)
        if self.tolerance is not None:
            evidence, worst, notes = _judge_by_tolerance(runs, self.tolerance)
        else:
            evidence, worst, notes = _judge(runs)
        if worst is not None:
            case = cases[max(worst.input, 0)]
            place = worst.place.replace(f"input {worst.input}", case.label, 1)
            failure = (
                f"the models differ in {worst.question} by {worst.deviation:.2e} of the largest output at {place}; "
                f"the bound is {worst.bound:.2e}{self._way_out()}"
            )
            return Verification((), tried, worst, case, notes, failure)
        evidence = tuple(replace(item, exhaustive=exhaustive) for item in evidence)
        worst = measure(*runs.nearest(), discrete=False)
        return Verification(evidence, tried, worst, cases[max(worst.input, 0)], notes)

    def _way_out(self) -> str:
        dtypes = self.before.dtype, self.after.dtype
        if self.tolerance is not None or UNIT_ROUNDOFF[dtypes[0]] >= UNIT_ROUNDOFF[dtypes[1]]:
            return ""
        return f" (the first is {dtypes[0]}, the second {dtypes[1]}: say with a tolerance how much that may cost)"


@dataclass
class _Runs:
    """The runs of one comparison; see `bnfold.equivalence.Runs`."""

    pair: _Pair
    cases: list[Case]

    @property
    def dtype(self) -> str:
        return self.pair.before.dtype

    @property
    def examples(self) -> int:
        return sum(count_examples(case) for case in self.cases)

    @property
    def doubt(self) -> str:
        return self.pair.before.doubt or self.pair.after.doubt

    def run_before(self) -> list[Outputs]:
        return [self.pair.run(case)[0] for case in self.cases]

    def run_exactly(self) -> tuple[list[Outputs], list[Outputs]]:
        both = self.pair.run_exactly(self.cases)
        return [old for old, _ in both], [new for _, new in both]

    def run_after(self, folded: Any) -> list[Outputs]:
        return [self.pair.run(case)[1] for case in self.cases]

    def run_nudged(self, exact: bool, units: float, seed: int) -> list[Outputs]:
        before, unit = self.pair.before, UNIT_ROUNDOFF["float64" if exact else self.dtype]
        cases = [before.accept(nudged(case, units * unit, seed)) for case in self.cases]
        return before.run_nudged(cases, exact, units, seed)

    def run_alike(self, folded: Any) -> Alike:
        """Never: two models of any kind need not choose in the same order."""
        raise Unavailable("the choices of two models cannot be told apart")

    def nearest(self) -> tuple[list[Outputs], list[Outputs]]:
        """What was computed in the models' own dtypes, or else in float64."""
        try:
            return self.run_before(), self.run_after(None)
        except Unavailable:
            return self.run_exactly()


_Judged = tuple[tuple[Evidence, ...], Worst | None, tuple[str, ...]]


def _judge(runs: _Runs) -> _Judged:
    """Ask the two questions of `equivalence`."""
    weights = max(runs.pair.before.weights, runs.pair.after.weights)
    comparison = Comparison(runs, weights, rounded=True)
    try:
        evidence = comparison.judge(None)
    except NotEquivalent as error:
        worst = error.worst or Worst(np.inf, str(error), 0, question=runs.dtype)
        return (), worst, tuple(comparison.notes)
    if not evidence:
        raise UnreadableModel(" ".join(comparison.notes))
    return evidence, None, tuple(comparison.notes)


def _judge_by_tolerance(runs: _Runs, tolerance: float) -> _Judged:
    """Hold the outputs to a number that somebody chose."""
    try:
        before, after = runs.run_before(), runs.run_after(None)
    except Unavailable as error:
        raise UnreadableModel(f"nothing can be held to the tolerance: {error}") from error
    try:
        worst = compare(before, after, tolerance, runs.dtype)
    except NotEquivalent as error:
        return (), error.worst, ()
    found = Evidence(
        runs.dtype, runs.examples, False, worst.deviation, tolerance, "the tolerance that was given", None
    )
    return (found,), None, ()
