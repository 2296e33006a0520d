"""Numbers to half a unit in their last place: against exact fractions, and against numbers that are a little off."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from bnfold.algebra import Linear, round_to
from bnfold.weights import measure_bias, measure_weight

TYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def absorbed(seed: int = 0, **facts: object) -> tuple[Linear, np.ndarray, np.ndarray]:
    """An operator that has absorbed on all three sides, its weight and its bias."""
    random = np.random.default_rng(seed)
    linear = Linear("oi", 6, 6, 1, 1, groups=2, centre=(1, 1), **facts)  # type: ignore[arg-type]
    linear = linear.absorb_after(random.normal(size=6), random.normal(size=6))
    linear = linear.absorb_before(random.normal(size=6), random.normal(size=6))
    linear = linear.absorb_parallel(random.normal(size=6), random.normal(size=6))
    return (
        linear,
        random.normal(size=(6, 3, 3, 3)).astype(np.float32),
        random.normal(size=6).astype(np.float32),
    )


def exact(linear: Linear, weight: np.ndarray, bias: np.ndarray) -> tuple[list[Fraction], list[Fraction]]:
    """What the numbers are to be, in fractions."""
    assert linear.before is not None
    assert linear.after is not None
    assert linear.parallel is not None
    (s, t), (a, b), p = (
        [list(map(Fraction, map(float, v))) for v in pair]
        for pair in (linear.before, linear.after, [linear.parallel])
    )
    weights, biases = [], []
    for out in range(6):
        total = Fraction(float(bias[out]))
        for place, number in np.ndenumerate(weight[out]):
            source = out // 3 * 3 + place[0]
            own = Fraction(float(number))
            total += own * t[source]
            beside = p[0][out] if source == out and place[1:] == (1, 1) else 0
            weights.append(a[out] * own * s[source] + beside)
        biases.append(a[out] * total + b[out])
    return weights, biases


@pytest.mark.parametrize("dtype", TYPES)
def test_the_nearest_number_of_its_type_is_right_and_the_next_one_is_not(dtype: str) -> None:
    linear, weight, bias = absorbed()
    wide = linear.fold(weight, bias)
    assert wide[1] is not None
    new, own = (np.asarray(round_to(array, TYPES[dtype]), np.float64) for array in wide)
    assert measure_weight(linear, weight, new, dtype) <= 1
    assert measure_bias(linear, weight, bias, own, dtype) <= 1
    for place in np.ndindex(2, 2):
        off = new.copy()
        off[place] += np.float64(ml_dtypes.finfo(TYPES[dtype]).eps) * 8 * abs(off[place])
        assert measure_weight(linear, weight, off, dtype) > 1
    assert (
        measure_bias(linear, weight, bias, own * (1 + 64 * float(ml_dtypes.finfo(TYPES[dtype]).eps)), dtype)
        > 1
    )


def test_a_number_is_off_by_as_much_as_fractions_say() -> None:
    linear, weight, bias = absorbed()
    for rounding in (np.float32(0.0), np.float32(1e-7), np.float32(3e-7)):
        new = (linear.fold(weight, bias)[0].astype(np.float32) * (1 + rounding)).astype(np.float64)
        truth, _ = exact(linear, weight, bias)
        spacing = np.spacing(np.abs(new).astype(np.float32)).astype(float)
        off = max(
            abs(Fraction(float(number)) - one) / Fraction(float(gap) / 2)
            for number, one, gap in zip(new.ravel(), truth, spacing.ravel(), strict=True)
        )
        assert measure_weight(linear, weight, new, "float32") == pytest.approx(float(off), rel=1e-6)


def test_a_bias_is_off_by_as_much_as_fractions_say() -> None:
    linear, weight, bias = absorbed(3)
    _, truth = exact(linear, weight, bias)
    new = np.array([float(one) for one in truth]).astype(np.float32).astype(np.float64)
    spacing = np.spacing(np.abs(new).astype(np.float32)).astype(float)
    off = max(abs(Fraction(n) - one) / Fraction(g / 2) for n, one, g in zip(new, truth, spacing, strict=True))
    assert measure_bias(linear, weight, bias, new, "float32") == pytest.approx(float(off), rel=1e-5)


def test_a_small_number_beside_large_ones_counts_as_much() -> None:
    linear = Linear("oi", 1, 2, 1, 1).absorb_after(np.array([1e-20, 1e20]), np.zeros(2))
    weight = np.ones((2, 1), np.float32)
    new = linear.fold(weight, None)[0].astype(np.float32).astype(np.float64)
    assert measure_weight(linear, weight, new, "float32") <= 1
    new[0] *= 1.000001
    assert measure_weight(linear, weight, new, "float32") > 1


def test_what_is_missing_or_not_a_number_is_wrong() -> None:
    linear, weight, bias = absorbed()
    new = linear.fold(weight, bias)[0]
    assert measure_weight(linear, weight, new[:3], "float64") == np.inf
    assert measure_weight(linear, weight, new * np.nan, "float64") == np.inf
    assert measure_bias(linear, weight, bias, None, "float64") > 1


def test_a_table_holds_the_bias_in_its_rows() -> None:
    random = np.random.default_rng(1)
    linear = Linear("io", 5, 3, 0, 1, sealed="rows").absorb_after(
        random.normal(size=3), random.normal(size=3)
    )
    table = random.normal(size=(5, 3)).astype(np.float32)
    scale, shift = linear.after or (None, None)
    new = (table.astype(np.float64) * scale + shift).astype(np.float32).astype(np.float64)
    assert measure_weight(linear, table, new, "float32", looks_up=True) <= 1
    assert measure_weight(linear, table, new, "float32") > 1
