"""Climb the difference of two models, from the inputs that were tried to inputs on which they differ more.

The objective is D(x) = sum_k <u_k, b_k(x) - a_k(x)> / p_k over the floating-point outputs k, with u_k the signs of the
difference at the start and p_k the largest element of a_k there. It is climbed, and from the same start descended,
through a difference of zero to the other sign. Every step moves each element by a quarter of its input's range, up or
down, and stays within the range of what was tried:

    x <- clip(x +- (high - low) / 4 * sign(g))

g is the gradient of D where both models are modules that can be differentiated. Everywhere else it is estimated without
one (SPSA; Spall 1992, "Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation"): the mean over `DIRECTIONS` random vectors d of +1 and -1 of (D(x + c d) - D(x - c d)) d. Where the
first axis of all inputs and outputs counts examples, each example climbs by itself.

Two models that differ in a rectified branch are equal wherever that is shut, and the gradient is zero there. So what is
climbed is the difference of the two models with rectifiers that leak (y + `LEAK` (x - y) for y = relu(x)), on both
sides alike, which keeps a fold through a rectifier a fold; what counts is how far the models themselves differ on the
way. Where even those differ by rounding alone there is no slope, and a step goes in a random direction.

Not covered: inputs without floats; models that take more than `SLOW` seconds for a run; a branch behind another bend
than a rectifier that is as flat. An ascent that finds nothing proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bnfold.algebra import is_float
from bnfold.cases import Array, Case, renamed
from bnfold.equivalence import UNIT_ROUNDOFF, Outputs, Unavailable, measure
from bnfold.errors import InputError, UnreadableModel

__all__ = ["LEAK", "Objective", "climb"]

LEAK = 0.1
"""The slope of a softened rectifier where it is shut, on both sides."""

STEPS = 8
DIRECTIONS = 8
FEW = 2
"""A model that is not `QUICK` is asked for so many directions, and takes half the steps."""

SLOW = 2.0
FLAT = 64.0
"""A difference of so many unit roundoffs of the largest output has no slope but that of rounding."""

QUICK = 0.01
"""A run of a quick model takes no more seconds than this."""

Run = Callable[[Case], tuple[Outputs, Outputs]]
Box = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Objective:
    """D: the signs and the sizes by which the differences of the outputs are summed, in the order of the outputs."""

    signs: tuple[Array, ...]
    peaks: tuple[float, ...]

    @classmethod
    def at(cls, old: Outputs, new: Outputs) -> Objective:
        """The objective for a start on which two models compute this."""
        first, second = _floats(old), _floats(new)
        gaps = [
            b - a if a.shape == b.shape else np.zeros(a.shape) for a, b in zip(first, second, strict=False)
        ]
        with np.errstate(invalid="ignore"):
            signs = tuple(np.where(gap < 0, -1.0, 1.0) for gap in gaps)
            return cls(signs, tuple(float(np.nanmax(np.abs(a), initial=0.0)) or 1.0 for a in first))

    def __call__(self, old: Outputs, new: Outputs, rows: int) -> Array:
        """Its value, for each of so many examples where the outputs have as many, else as one number."""
        terms = [
            sign * (b - a) / peak
            for a, b, sign, peak in zip(_floats(old), _floats(new), self.signs, self.peaks, strict=False)
            if a.shape == b.shape == sign.shape
        ]
        if rows and all(term.ndim and len(term) == rows for term in terms):
            return np.asarray(sum((term.reshape(rows, -1).sum(1) for term in terms), np.zeros(rows)))
        return np.asarray(sum(float(term.sum()) for term in terms))


def climb(before: Any, after: Any, cases: Sequence[Case], run: Run) -> tuple[list[Case], list[str]]:
    """The input on the way on which two sides differ most, and a note where there is no way to climb.

    Args:
        before, after: see `bnfold.verification.Side`.
        cases: what was tried; the ascent begins at the worst.
        run: both models on one case.
    """
    if not any(is_float(array) for case in cases for array in case.arrays):
        return [], []
    if max(before.seconds, after.seconds) > SLOW:
        return [], ["no ascent on the difference: one run takes too long"]
    try:
        start = max(cases, key=lambda case: _gap(run(case)))
        soft, box = (before.soften(), after.soften()), _box(start, cases)
        ways = [_Way((before, after), soft, start, box, sense) for sense in (1.0, -1.0)]
        path = (case for way in ways for case in way)
        return [max(path, key=lambda case: _gap(run(case)))], []
    except (Unavailable, InputError, UnreadableModel) as error:
        return [], [f"no ascent on the difference: {error}"]


def _gap(both: tuple[Outputs, Outputs]) -> float:
    """How far two models differ."""
    return measure([both[0]], [both[1]], discrete=False).deviation


def _box(start: Case, cases: Sequence[Case]) -> Box:
    """The range of each input over everything that was tried in the same form."""
    alike = [case for case in cases if len(case.arrays) == len(start.arrays)]
    return [_range([case.arrays[place] for case in alike]) for place in range(len(start.arrays))]


def _range(arrays: Sequence[Array]) -> tuple[float, float]:
    if not is_float(arrays[0]):
        return 0.0, 0.0
    finite = [wide[np.isfinite(wide)] for wide in (array.astype(np.float64) for array in arrays)]
    return (
        min((float(one.min()) for one in finite if one.size), default=0.0),
        max((float(one.max()) for one in finite if one.size), default=0.0),
    )


class _Way:
    """The steps from one start, up the objective or down."""

    def __init__(
        self,
        sides: tuple[Any, Any],
        soft: Sequence[Callable[[Case], Outputs]],
        start: Case,
        box: Box,
        sense: float,
    ) -> None:
        self.sides, self.soft, self.start, self.box, self.sense = sides, soft, start, box, sense
        self.objective = Objective.at(*(run(start) for run in soft))
        is_quick = max(side.seconds for side in sides) <= QUICK
        self.directions, self.steps = (DIRECTIONS, STEPS) if is_quick else (FEW, STEPS // 2)
        self.random = np.random.default_rng(2)
        rows = {len(array) if array.ndim else 0 for array in start.arrays}
        self.rows = rows.pop() if len(rows) == 1 else 0

    def __iter__(self) -> Iterator[Case]:
        """Each step."""
        before, after = self.sides
        case, name = self.start, "ascent" if self.sense > 0 else "descent"
        for step in range(1, self.steps + 1):
            slopes: Sequence[Array | None] | None = self._wander(case) if self._is_flat(case) else None
            slopes = before.differentiate(after, case, self.objective) if slopes is None else slopes
            slopes = self._estimate(case) if slopes is None else slopes
            signs = [None if slope is None else self.sense * _sign(slope) for slope in slopes]
            case = before.accept(replace(self._move(case, signs), label=f"{name} step {step}"))
            yield case

    def _is_flat(self, case: Case) -> bool:
        """Whether the softened models differ by rounding alone."""
        old, new = (run(case) for run in self.soft)
        return _gap((old, renamed(new, old))) <= FLAT * UNIT_ROUNDOFF[self.sides[0].dtype]

    def _wander(self, case: Case) -> list[Array]:
        """A random direction."""
        return [np.asarray(self.random.integers(2, size=a.shape) * 2.0 - 1) for a in case.arrays]

    def _estimate(self, case: Case) -> list[Array | None]:
        """The slope of the objective along random directions, weighed by how steep it is there."""
        slopes: list[Array] = [np.zeros(array.shape) for array in case.arrays]
        for _ in range(self.directions):
            signs = self._wander(case)
            up, down = (self._value(self._move(case, [side * one for one in signs])) for side in (0.5, -0.5))
            with np.errstate(invalid="ignore"):
                rise = np.nan_to_num(up - down)
            for slope, one in zip(slopes, signs, strict=True):
                slope += one * (rise.reshape(-1, *[1] * (one.ndim - 1)) if rise.ndim else rise)
        return list(slopes)

    def _value(self, case: Case) -> Array:
        old, new = (run(case) for run in self.soft)
        return self.objective(old, new, self.rows)

    def _move(self, case: Case, steps: Sequence[Array | None]) -> Case:
        """The inputs moved by so many quarters of their range, within it."""
        moved = [_moved(*each) for each in zip(case.arrays, steps, self.box, strict=True)]
        return replace(case, arrays=tuple(moved))


def _sign(slope: Array) -> Array:
    return np.asarray(np.sign(np.nan_to_num(slope)))


def _moved(array: Array, step: Array | None, ends: tuple[float, float]) -> Array:
    low, high = ends
    if step is None or not high > low:
        return array
    wide = array.astype(np.float64) + (high - low) / 4 * step
    return np.asarray(np.clip(wide, low, high).astype(array.dtype))


def _floats(outputs: Outputs) -> list[Array]:
    arrays = (np.asarray(array) for array in outputs.values())
    return [array.astype(np.float64) for array in arrays if is_float(array)]
