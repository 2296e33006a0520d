"""The inputs that two models are compared on: arrays in the order of a model's inputs, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bnfold.algebra import is_float
from bnfold.equivalence import Outputs

__all__ = [
    "Array",
    "Case",
    "Form",
    "count_by_shapes",
    "count_examples",
    "move",
    "nudged",
    "perturbed",
    "renamed",
]

Array = np.ndarray[Any, Any]

Form = Callable[[tuple[Array, ...]], Any]
"""From arrays to what a module is called with, where that holds more than arrays."""


@dataclass(frozen=True, eq=False)
class Case:
    """One input.

    Attributes:
        label: what kind it is, and which: "given 1", "perturbed 2", "ascent step 4".
        arrays: one for each tensor, in order.
        names: the inputs that they are for; empty where only the order is known.
        form: how a module is called with them; None where they are its arguments.
    """

    label: str
    arrays: tuple[Array, ...]
    names: tuple[str, ...] = ()
    form: Form | None = None


def count_examples(case: Case) -> int:
    """How many examples an input holds."""
    return count_by_shapes(array.shape for array in case.arrays)


def count_by_shapes(shapes: Iterable[Sequence[int]]) -> int:
    """How many examples arrays of these shapes hold: their first axis where that is one size, else 1."""
    sizes = {shape[0] for shape in shapes if len(shape) > 1}
    return sizes.pop() if len(sizes) == 1 else 1


def perturbed(case: Case, seed: int = 0) -> Iterator[Case]:
    """The same with noise of half the spread of each array, if any holds floats."""
    random = np.random.default_rng(seed)

    def shake(array: Array) -> Array:
        if not is_float(array):
            return array
        wide = array.astype(np.float64)
        spread = float(np.std(wide)) if array.size > 1 else 1.0
        return np.asarray((wide + 0.5 * spread * random.standard_normal(array.shape)).astype(array.dtype))

    if any(is_float(array) for array in case.arrays):
        yield replace(case, label=f"perturbed {case.label}", arrays=tuple(map(shake, case.arrays)))


def nudged(case: Case, step: float, seed: int) -> Case:
    """The same, every float moved up or down by two times a relative step."""
    random = np.random.default_rng(seed)
    return replace(case, arrays=tuple(move(array, step, random) for array in case.arrays))


def move(array: Array, step: float, random: np.random.Generator) -> Array:
    """Every float of an array moved up or down by two times a relative step; other numbers as they are."""
    if not is_float(array):
        return array
    signs = random.integers(2, size=array.shape) * 2 - 1
    return np.asarray((array.astype(np.float64) * (1 + 2 * step * signs)).astype(array.dtype))


def renamed(outputs: Outputs, like: Outputs) -> Outputs:
    """Outputs under the names of others, by order, where the names are not the same."""
    if set(outputs) == set(like) or len(outputs) != len(like):
        return outputs
    return dict(zip(like, outputs.values(), strict=True))
