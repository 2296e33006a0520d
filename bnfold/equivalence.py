"""Compare a model before and after, and raise when they differ.

Two questions, asked separately, of outputs that the frontends computed:

- *Is the algebra right?* Both models in float64, the folded one with weights that were not rounded to the storage
  dtype. The difference is held to 1e-12 of the largest output, or to the rounding noise of the model itself where that
  is more: a deep net amplifies every rounding, and by the same factor in every precision, so the noise that the
  *unfolded* model shows in its own dtype, times the ratio of the two unit roundoffs, is what float64 will show. Where
  that does not do (a float64 model shows no noise), the noise of float64 is measured in float64: all inputs and weights
  of the unfolded model are moved by one unit in the last place, up or down. A linear operator as it is rounded is one
  with such weights, computed exactly (Higham 2002, section 3.5: its backward error), so this is what roundings do.
- *Is the rounding acceptable?* Both models in their own dtype, each against the float64 truth. The folded model may
  be off by a small multiple of what the unfolded one is off by, plus one unit roundoff for each operator that was
  given new weights, since each of those was rounded once. Where the unfolded model itself overflows in its own dtype,
  there is no noise to measure, and only the first question is asked.

`Comparison` asks them of one fold. Where the answer is no, or the noise as large as the outputs, it asks once more. A
model that selects (the best by top-k, what overlaps least) jumps by any rounding: it is compared where it does not, in
runs whose choices all fall as the unfolded model's, together with what they are made from (`Alike`). Where no choice
can be told, the folded model is granted in its own dtype what one rounding of inputs and weights does to the unfolded
one. A note says so then. In float64 nothing is granted to jumps: what roundings
do grows with the roundings, and a response that does not is no measure of them.

Neither bound is a round number that somebody chose to make a model pass: one is measured on the model that nobody
touched, the other is Higham's (2002, "Accuracy and Stability of Numerical Algorithms", section 3.1) unit roundoff per
operation. Differences are relative to the largest element of that output over all inputs; infinities and NaNs must
stand in the same places. Outputs of whole numbers or booleans (an argmax) are compared for equality, in float64 only.

What this cannot see: a model whose output hardly depends on its input (`Evidence.movement`), and inputs of another kind
than those that were tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from bnfold.errors import NotEquivalent
from bnfold.report import Evidence

__all__ = [
    "ALGEBRA",
    "UNIT_ROUNDOFF",
    "Alike",
    "Comparison",
    "Outputs",
    "Pair",
    "Runs",
    "Unavailable",
    "Worst",
    "compare",
    "judge",
    "measure",
]

Outputs = Mapping[str, npt.NDArray[Any]]
"""What a model computed from one input: arrays by the name or path of the output."""

ALGEBRA = 1e-12
"""The largest relative difference that float64 arithmetic is allowed, noise aside."""

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the distance from 1 to the next number, by dtype."""

_MARGIN = 8.0

DRAWS = 3
"""How often the unfolded model is nudged in float64, where it is; the largest response counts."""

TRIES = 12
"""How often at most in its own dtype: a choice between two that are nearly equal falls out the same in half of all."""

STRIDE = 2.0**10
"""A nudge of so many units tells a response that grows from a jump."""

TELLING = 0.1
"""A bound of so much of the largest output holds nothing to anything."""

GROWTH = 2.0**5
"""As much as this the response to that nudge has to be larger; in a linear model, `STRIDE` times but for roundings."""


@dataclass(frozen=True, slots=True)
class Worst:
    """The largest relative difference, and where it is.

    Attributes:
        place: where, in words.
        input, output, element: where; -1, "" and () as far as it is no element of one output.
        values: before and after, as text.
        question, bound: what was asked, and what the difference was held to; "" and infinity before that is known.
    """

    deviation: float
    place: str = ""
    input: int = -1
    output: str = ""
    element: tuple[int, ...] = ()
    values: tuple[str, str] = ("", "")
    question: str = ""
    bound: float = float("inf")


Pair = tuple[Sequence[Outputs], Sequence[Outputs]]
"""Outputs before and after, one `Outputs` per input."""

_T = TypeVar("_T")


class Unavailable(Exception):
    """A run that cannot be made. Its text is what a report's notes say about that."""


@dataclass(frozen=True)
class Alike:
    """Runs in which every choice (the best by top-k, what is above a threshold, a rounding) falls as in the first one.

    Attributes:
        own, exact: outputs in the model's own dtype and in float64; among them what the choices are made from. None
            where float64 outputs prove nothing.
        choices: how many are made.
        after, truth: how many of them fell otherwise in the folded model, and in the unfolded one in float64.
    """

    own: Pair
    exact: Pair | None
    choices: int
    after: int
    truth: int


class Runs(Protocol):
    """The runs that a comparison is made of, as a frontend makes them: each gives one `Outputs` per input.

    All but `run_after` may raise `Unavailable`; what else is raised ends the comparison.
    """

    @property
    def dtype(self) -> str:
        """The model's own dtype, a key of `UNIT_ROUNDOFF`; of several, the coarsest."""

    @property
    def examples(self) -> int:
        """How many examples the inputs hold."""

    @property
    def doubt(self) -> str:
        """Why float64 outputs that differ prove nothing; empty where they do."""

    def run_before(self) -> Sequence[Outputs]:
        """The unfolded model in its own dtype."""

    def run_exactly(self) -> Pair:
        """Both models in float64, the folded one with weights that were not rounded."""

    def run_after(self, folded: Any) -> Sequence[Outputs]:
        """The folded model in its own dtype."""

    def run_nudged(self, exact: bool, units: float, seed: int) -> Sequence[Outputs]:
        """The unfolded model, every input and weight moved up or down by so many units in the last place.

        Args:
            exact: whether in float64, by units of float64; else in its own dtype.
            units: how many.
            seed: of the directions.
        """

    def run_alike(self, folded: Any) -> Alike:
        """All four, with the choices that the unfolded model makes in its own dtype; only where it makes some."""


class Comparison:
    """What the unfolded model computes and what float64 says, waiting for the folded model.

    Attributes:
        notes: what could not be compared, and why.
    """

    def __init__(self, runs: Runs, changed: int, rounded: bool = False) -> None:
        """Run all but the folded model, which may come to be by editing the unfolded one.

        Args:
            runs: the runs to make.
            changed, rounded: see `judge`.
        """
        self.runs, self.changed, self.rounded = runs, changed, rounded
        self.notes: list[str] = []
        self.before = self._attempt(runs.run_before)
        self.exact = self._attempt(runs.run_exactly)
        self.jitter = 0.0
        if self.exact is not None and not self._is_exact(self.exact):
            self.jitter = self._measure_jitter(self.exact[0])

    def _is_exact(self, exact: Pair) -> bool:
        """Whether the float64 outputs agree with nothing granted to the arithmetic of float64."""
        own = exact if self.before is None else (self.before, self.before)
        try:
            self._ask(own, exact, self._held_to)
        except NotEquivalent:
            return False
        return True

    @property
    def _held_to(self) -> str:
        """The dtype whose roundings show; float64 where only it could be run, unless the weights are rounded."""
        return self.runs.dtype if self.before is not None or self.rounded else "float64"

    def _attempt(self, run: Callable[[], _T]) -> _T | None:
        try:
            return run()
        except Unavailable as reason:
            self.notes += [str(reason)] if str(reason) not in self.notes else []
            return None

    def judge(self, folded: Any) -> tuple[Evidence, ...]:
        """Compare with the folded model; no evidence where the unfolded one could not be run, or gives no numbers.

        Raises:
            NotEquivalent: it computes something else.
        """
        if self.before is None:
            return () if self.exact is None else self._judge(self.exact, folded)
        own = self.before, self.runs.run_after(folded)
        if not any(np.size(array) for outputs in self.before for array in outputs.values()):
            self.notes.append("unverified: the outputs hold no numbers for inputs of these sizes")
            return ()
        evidence = self._judge(own, folded)
        self.notes += [
            f"in {item.question} the bound is as large as the outputs, so that what is compared there says nothing"
            for item in evidence
            if item.bound >= 1.0
        ]
        return evidence

    def _judge(self, own: Pair, folded: Any) -> tuple[Evidence, ...]:
        """Ask; where that says no, again without a float64 that is none, or where both models choose alike."""
        try:
            evidence = self._ask(own, self.exact, self._held_to)
        except NotEquivalent:
            if self.runs.doubt and self.exact is not None:
                self.notes.append(self.runs.doubt)
                self.exact = None
                return self._judge(own, folded)
            return self._ask_alike(folded) or self._ask_of_jumps(own)
        return evidence if evidence[-1].bound < TELLING else self._ask_alike(folded) or evidence

    def _ask_alike(self, folded: Any) -> tuple[Evidence, ...]:
        """Compare where both models choose alike; nothing where the model does not choose, or choices cannot be led.

        Raises:
            NotEquivalent: they differ there, too.
        """
        try:
            alike = self.runs.run_alike(folded)
        except Unavailable:
            return ()
        if not alike.after and not alike.truth:
            return ()
        evidence = self._ask(alike.own, alike.exact, self._held_to)
        if alike.exact is not None:
            self.notes.clear()  # why float64 would not do otherwise
        self.notes.append(
            f"the model selects or rounds: of {alike.choices} choices {alike.after} fall otherwise in the folded model "
            f"and {alike.truth} in float64, as values that are nearly equal do; compared with the choices of the "
            "unfolded model, what they are made from included"
        )
        return evidence

    def _ask_of_jumps(self, own: Pair) -> tuple[Evidence, ...]:
        """Grant the folded model in its own dtype what one rounding does to the unfolded one, at most of some draws."""
        dtype = self._held_to
        if self.before is None or (dtype == "float64" and self.exact is not None):
            return self._ask(own, self.exact, dtype)
        sensitivity = 0.0
        for seed in range(TRIES):
            sensitivity = max(sensitivity, self._respond(own[0], False, seeds=(seed,)))
            try:
                evidence = self._ask(own, self.exact, dtype, sensitivity)
            except NotEquivalent:
                if seed == TRIES - 1 or not sensitivity:
                    raise
                continue
            moved = (
                f"one rounding of inputs and weights moves the outputs by {sensitivity:.1e} of the largest"
            )
            self.notes.append(f"in {dtype} {moved}: what is compared there says no more than that")
            break
        return evidence

    def _ask(self, own: Pair, exact: Pair | None, dtype: str, noise: float = 0.0) -> tuple[Evidence, ...]:
        examples, rounded = self.runs.examples, self.rounded
        return judge(
            own, exact, dtype, self.changed, examples, rounded=rounded, noise=noise, jitter=self.jitter
        )

    def _measure_jitter(self, before: Sequence[Outputs]) -> float:
        """What one rounding of every number does to the float64 outputs; 0 of a jump, which is no measure of it."""
        near, far = self._respond(before, True), self._respond(before, True, STRIDE)
        return near if GROWTH * near <= far < np.inf else 0.0

    def _respond(
        self, before: Sequence[Outputs], exact: bool, units: float = 1.0, seeds: Sequence[int] = range(DRAWS)
    ) -> float:
        """How far the outputs move when every input and weight does, at most of some draws; 0 where it is not known."""
        try:
            nudged = [self.runs.run_nudged(exact, units, seed) for seed in seeds]
        except Unavailable:
            return 0.0
        return max(measure(before, near, discrete=False).deviation for near in nudged)


def judge(
    own: Pair,
    exact: Pair | None,
    dtype: str,
    changed: int,
    inputs: int,
    exhaustive: bool = False,
    rounded: bool = False,
    noise: float = 0.0,
    jitter: float = 0.0,
) -> tuple[Evidence, ...]:
    """Ask both questions.

    Args:
        own: outputs before and after in the model's own dtype, one `Outputs` per input.
        exact: the same in float64, or None where the model cannot be run in it.
        dtype: the model's own dtype, a key of `UNIT_ROUNDOFF`; of several, the coarsest.
        changed: how many operators were given new weights.
        inputs: how many examples these outputs are of.
        exhaustive: whether those are all the inputs there are.
        rounded: whether the second model's weights were rounded to `dtype` before they came to `exact`, as those of a
            finished model were; then float64 shows that rounding, and is held to the bound of the second question.
        noise: what is known of the unfolded model's own noise besides its distance from float64.
        jitter: what one rounding of all numbers does to its outputs in float64, if that is known.

    Returns:
        One `Evidence` per question; float64 models and models that cannot run in float64 are asked one.

    Raises:
        NotEquivalent: a bound is exceeded; the message names the worst input and element.
    """
    unit = UNIT_ROUNDOFF[dtype]
    rounding = _MARGIN * (changed + 1) * unit
    if exact is None:
        source = f"{_MARGIN:g} x {changed + 1} roundings of {unit:.1e}; float64 could not be run"
        bound = max(rounding, 64 * unit, _MARGIN * noise)
        _check_shapes(*own)
        worst = compare(*own, bound, dtype, discrete=False)
        return (_evidence(dtype, own[0], worst, bound, source, inputs, exhaustive),)
    own = _where_finite(own[0], own[0]), _where_finite(own[1], own[0])
    truth = _where_finite(exact[0], own[0])
    shown = measure(truth, own[0], discrete=False).deviation if dtype != "float64" else 0.0
    noise = max(noise, shown) if dtype != "float64" else jitter
    carried = _MARGIN**2 * shown * UNIT_ROUNDOFF["float64"] / unit
    within = _MARGIN * noise + rounding
    because = f"{_MARGIN:g} x (unfolded error {noise:.1e} + {changed + 1} roundings of {unit:.1e})"
    bound, source = max(
        (ALGEBRA, "of the largest output"),
        (carried, "the model's own noise"),
        (_MARGIN * jitter, f"{_MARGIN:g} x what one rounding of inputs and weights does ({jitter:.1e})"),
    )
    if rounded:
        bound, source = max((bound, source), (within, because))
    worst = compare(*exact, bound, "float64", discrete=True)
    evidence = (_evidence("float64", exact[0], worst, bound, source, inputs, exhaustive),)
    if dtype == "float64":
        return evidence
    worst = compare(truth, own[1], within, dtype, discrete=False)
    return (*evidence, _evidence(dtype, exact[0], worst, within, because, inputs, exhaustive))


def compare(
    before: Sequence[Outputs],
    after: Sequence[Outputs],
    bound: float,
    question: str = "",
    discrete: bool = True,
) -> Worst:
    """Compare the outputs of two models on the same inputs.

    Returns:
        The worst difference, which is within `bound`.

    Raises:
        NotEquivalent: it is not, or the outputs differ in name or shape.
    """
    worst = measure(before, after, discrete)
    if not worst.deviation <= bound:
        within = f" in {question}" if question else ""
        raise NotEquivalent(
            f"the models differ{within} by {worst.deviation:.2e} of the largest output at {worst.place}; "
            f"the bound is {bound:.2e}",
            replace(worst, question=question, bound=bound),
        )
    return worst


def measure(before: Sequence[Outputs], after: Sequence[Outputs], discrete: bool = True) -> Worst:
    """The largest relative difference between two models' outputs; `discrete` counts whole numbers as well."""
    largest = _largest(before)
    worst = Worst(0.0)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if set(old) != set(new):
            place = f"input {index}: one has outputs {sorted(old)}, the other {sorted(new)}"
            return Worst(np.inf, place, index)
        for name in old:
            here = _difference(np.asarray(old[name]), np.asarray(new[name]), largest[name], discrete)
            if here is not None and not here.deviation <= worst.deviation:
                place = f"input {index}, output {name}{here.place}"
                worst = replace(here, place=place, input=index, output=name)
    return worst


def _difference(old: npt.NDArray[Any], new: npt.NDArray[Any], largest: float, discrete: bool) -> Worst | None:
    """The worst element of one output; None where there is nothing to compare."""
    if old.shape != new.shape:
        return Worst(np.inf, f": shapes {old.shape} and {new.shape}") if discrete else None
    if not _is_continuous(old):
        return _first_unequal(old, new) if discrete and not np.array_equal(old, new) else None
    if not old.size:
        return None
    wide = np.complex128 if np.iscomplexobj(old) else np.float64
    with np.errstate(invalid="ignore"):
        old, new = old.astype(wide), new.astype(wide)
        same = (old == new) | (np.isnan(old) & np.isnan(new))
        distance = np.where(same, 0.0, np.abs(new - old) / largest)
    distance = np.where(np.isnan(distance), np.inf, distance)
    at = np.unravel_index(int(np.argmax(distance)), distance.shape)
    element, values = tuple(int(i) for i in at), (f"{old[at]:.9g}", f"{new[at]:.9g}")
    place = f"[{', '.join(map(str, element))}]: {values[0]} before, {values[1]} after"
    return Worst(float(distance[at]), place, element=element, values=values)


def _first_unequal(old: npt.NDArray[Any], new: npt.NDArray[Any]) -> Worst:
    """Where two outputs of whole numbers first differ."""
    at = tuple(int(i) for i in np.argwhere(old != new)[0])
    values = str(old[at]), str(new[at])
    return Worst(
        1.0, f"[{', '.join(map(str, at))}]: {values[0]} before, {values[1]} after", element=at, values=values
    )


def _check_shapes(before: Sequence[Outputs], after: Sequence[Outputs]) -> None:
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        for name in old.keys() & new.keys():
            if np.shape(old[name]) != np.shape(new[name]):
                shapes = f"shapes {np.shape(old[name])} before, {np.shape(new[name])} after"
                place = f"input {index}, output {name}: {shapes}"
                raise NotEquivalent(
                    f"the models differ at {place}", Worst(np.inf, place, index, name, bound=0.0)
                )


def _where_finite(outputs: Sequence[Outputs], unfolded: Sequence[Outputs]) -> list[Outputs]:
    """Outputs with NaN wherever the unfolded model, in its own dtype, gave no number."""
    return [
        {name: _masked(np.asarray(array), np.asarray(theirs.get(name, 0.0))) for name, array in ours.items()}
        for ours, theirs in zip(outputs, unfolded, strict=True)
    ]


def _masked(array: npt.NDArray[Any], unfolded: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not _is_continuous(array) or not _is_continuous(unfolded) or array.shape != unfolded.shape:
        return array
    lost = ~np.isfinite(unfolded.astype(np.complex128 if np.iscomplexobj(unfolded) else np.float64))
    return np.where(lost, np.array(np.nan, array.dtype), array) if lost.any() else array


def _is_continuous(array: npt.NDArray[Any]) -> bool:
    return array.dtype.kind in "fc" or array.dtype.name == "bfloat16"


def _finite(outputs: Sequence[Outputs], name: str) -> Iterator[npt.NDArray[Any]]:
    for each in outputs:
        array = np.asarray(each.get(name, 0.0))
        if _is_continuous(array):
            array = np.abs(array.astype(np.complex128 if np.iscomplexobj(array) else np.float64))
            yield array[np.isfinite(array)]


def _largest(outputs: Sequence[Outputs]) -> dict[str, float]:
    """The largest finite magnitude of each output over all inputs; 1 where there is none."""
    names = {name for each in outputs for name in each}
    peaks = {
        name: max((float(a.max()) for a in _finite(outputs, name) if a.size), default=0.0) for name in names
    }
    return {name: peak or 1.0 for name, peak in peaks.items()}


def _movement(outputs: Sequence[Outputs]) -> float | None:
    """How far an output moves between two inputs, relative to its largest element; None with one input only."""
    largest, moves = _largest(outputs), []
    for name, peak in largest.items():
        arrays = [np.asarray(each[name]) for each in outputs if _is_continuous(np.asarray(each[name]))]
        if arrays and all(a.shape == arrays[0].shape and a.ndim for a in arrays):
            rows = np.concatenate(arrays) if arrays[0].shape[0] > 1 else np.stack(arrays)
            if len(rows) > 1:
                with np.errstate(invalid="ignore"):
                    moves.append(float(np.nanmax(np.abs(rows[1:] - rows[:1]), initial=0.0)) / peak)
    return max((move for move in moves if np.isfinite(move)), default=None)


def _evidence(
    question: str,
    before: Sequence[Outputs],
    worst: Worst,
    bound: float,
    source: str,
    inputs: int,
    exhaustive: bool,
) -> Evidence:
    return Evidence(question, inputs, exhaustive, worst.deviation, bound, source, _movement(before))
