"""Climb the difference of two models, from the inputs that were tried to inputs on which they differ more.

The objective is D(x) = sum_k |b_k(x) - a_k(x)|^2 / p_k^2, over the floating-point outputs k, p_k the largest element of
output k so far. Every step moves each element by a quarter of its input's range, up or down, and stays within the range
of what was tried:

    x <- clip(x + (high - low) / 4 * sign(g))

g is the gradient where both models are modules that can be differentiated. Everywhere else it is estimated without one
(SPSA, Spall 1992, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation"):
the mean over `DIRECTIONS` random vectors d of +1 and -1 of (D(x + c d) - D(x - c d)) d. Where the first axis of all
inputs and outputs counts examples, each example climbs by itself.

Two models that differ in a rectified branch are equal wherever that is shut, and the gradient is zero there. So what is
climbed is the difference of the two models with rectifiers that leak (y + 0.1 (x - y) for y = relu(x)), on both sides
alike; what counts is how far the models themselves differ on the way.

Not covered: inputs without floats; models that take more than `SLOW` seconds for a run; a branch behind another bend
than a rectifier that is as flat. An ascent that finds nothing proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bnfold.cases import Array, Case, is_float
from bnfold.equivalence import Outputs, Unavailable, measure
from bnfold.errors import InputError, UnreadableModel

__all__ = ["climb"]

STEPS = 8
DIRECTIONS = 8
SLOW = 2.0
QUICK = 0.01
"""A model whose run takes more seconds than this is asked for two directions only."""

Run = Callable[[Case], tuple[Outputs, Outputs]]
Box = Sequence[tuple[float, float]]


def climb(before: Any, after: Any, cases: Sequence[Case], run: Run) -> tuple[list[Case], list[str]]:
    """The input on the way on which two sides differ most, and a note where there is no way to climb.

    Args:
        before, after: see `bnfold.verification.Side`.
        cases: what was tried; the ascent begins at the worst.
        run: both models on one case.
    """
    seconds = max(before.seconds, after.seconds)
    if not any(is_float(array) for case in cases for array in case.arrays):
        return [], []
    if seconds > SLOW:
        return [], ["no ascent on the difference: one run takes too long"]
    try:
        start = max(cases, key=lambda case: _gap(run(case)))
        path = _climb(before, after, start, _box(start, cases), 2 if seconds > QUICK else DIRECTIONS)
        return [max((before.accept(case) for case in path), key=lambda case: _gap(run(case)))], []
    except (Unavailable, InputError, UnreadableModel) as error:
        return [], [f"no ascent on the difference: {error}"]


def _gap(both: tuple[Outputs, Outputs]) -> float:
    """How far two models differ; where they do not, the last of several counts as the worst."""
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


def _climb(before: Any, after: Any, start: Case, box: Box, directions: int) -> Iterator[Case]:
    """Each step of the way."""
    random, case = np.random.default_rng(2), start
    objective: Callable[[Case], Array] | None = None
    for step in range(1, STEPS + 1):
        slopes = before.differentiate(after, case)
        if slopes is None:
            objective = objective or _objective(before.soften(), after.soften(), start)
            slopes = _estimate(objective, case, box, directions, random)
        arrays = [_step(*each) for each in zip(case.arrays, slopes, box, strict=True)]
        case = before.accept(replace(case, label=f"ascent step {step}", arrays=tuple(arrays)))
        yield case


def _step(array: Array, slope: Array | None, ends: tuple[float, float]) -> Array:
    """One step up the slope, within the box."""
    low, high = ends
    if slope is None or not is_float(array) or not high > low:
        return array
    with np.errstate(invalid="ignore"):
        moved = array.astype(np.float64) + (high - low) / 4 * np.sign(np.nan_to_num(slope))
    return np.asarray(np.clip(moved, low, high).astype(array.dtype))


def _objective(
    old: Callable[[Case], Outputs], new: Callable[[Case], Outputs], start: Case
) -> Callable[[Case], Array]:
    """D, for each example where those can be told apart, else as one number."""
    peaks = {name: float(np.nanmax(np.abs(array), initial=0.0)) or 1.0 for name, array in _floats(old(start))}
    rows = {len(array) if array.ndim else 0 for array in start.arrays}
    count = rows.pop() if len(rows) == 1 else 0

    def measure_rows(case: Case) -> Array:
        first, second = dict(_floats(old(case))), [array for _, array in _floats(new(case))]
        gaps: list[Array] = [
            np.asarray(np.abs((b - a) / peaks.get(name, 1.0)) ** 2)
            for (name, a), b in zip(first.items(), second, strict=False)
            if a.shape == b.shape
        ]
        if count and all(gap.ndim and len(gap) == count for gap in gaps):
            return np.asarray(sum((gap.reshape(count, -1).sum(1) for gap in gaps), np.zeros(count)))
        return np.asarray(sum(float(gap.sum()) for gap in gaps))

    return measure_rows


def _floats(outputs: Outputs) -> Iterator[tuple[str, Array]]:
    for name, array in outputs.items():
        if is_float(np.asarray(array)):
            yield name, np.asarray(array, np.float64)


def _estimate(
    objective: Callable[[Case], Array], case: Case, box: Box, directions: int, random: np.random.Generator
) -> list[Array]:
    """The slope of the objective along random directions, weighed by how steep it is there."""
    slopes: list[Array] = [np.zeros(array.shape) for array in case.arrays]
    for _ in range(directions):
        signs = [np.asarray(random.integers(2, size=array.shape) * 2.0 - 1) for array in case.arrays]
        up, down = (objective(_moved(case, [sense * one for one in signs], box)) for sense in (0.5, -0.5))
        with np.errstate(invalid="ignore"):
            rise = np.nan_to_num(up - down)
        for slope, one in zip(slopes, signs, strict=True):
            slope += one * (rise.reshape(-1, *[1] * (one.ndim - 1)) if rise.ndim else rise)
    return slopes


def _moved(case: Case, slopes: Sequence[Array], box: Box) -> Case:
    """The inputs half a step along a direction; unlike a step, by its length."""
    arrays = []
    for array, slope, (low, high) in zip(case.arrays, slopes, box, strict=True):
        wide = array.astype(np.float64) + (high - low) / 4 * slope if is_float(array) else array
        arrays.append(np.asarray(np.clip(wide, low, high).astype(array.dtype) if is_float(array) else array))
    return replace(case, arrays=tuple(arrays))
