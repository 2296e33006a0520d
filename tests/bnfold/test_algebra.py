"""The arithmetic: against hand calculations, and against the operator written out as one dense matrix."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations, product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfold import algebra
from bnfold.algebra import Affine, Linear, batchnorm, round_to


def test_a_batchnorm_is_gamma_over_the_root_of_the_variance_and_what_is_left() -> None:
    scale, shift = batchnorm(mean=[2.0, -1.0], var=[3.0, 8.0], gamma=[4.0, 6.0], beta=[1.0, 5.0], eps=1.0)
    assert scale.tolist() == [2.0, 2.0]
    assert shift.tolist() == [-3.0, 7.0]


def test_a_batchnorm_without_gamma_and_beta_has_one_number_per_channel_all_the_same() -> None:
    scale, shift = batchnorm([1.0, 2.0, 3.0], [3.0, 0.0, 15.0], eps=1.0)
    assert scale.tolist() == [0.5, 1.0, 0.25]
    assert shift.tolist() == [-0.5, -2.0, -0.75]


@pytest.mark.parametrize("var", [-1.0, np.nan, -1e-5])
def test_a_variance_that_has_no_root_is_not_finite_and_warns_nobody(var: float) -> None:
    scale, _ = batchnorm([0.0], [var], eps=1e-5)
    assert not np.isfinite(scale).all()


# ---------------------------------------------------------------- W2 and b2, by hand

W = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
B = np.array([1.0, 0.0, -1.0])


def test_w2_and_b2_of_a_linear_layer_and_its_batchnorm_are_those_of_a_hand_calculation() -> None:
    scale, shift = batchnorm([2.0, 0.0, 1.0], [3.0, 0.0, 3.0], [4.0, -1.0, 2.0], [1.0, 5.0, 0.0], eps=1.0)
    w2, b2 = Linear("oi", 2, 3, 1, 1).absorb_after(scale, shift).fold(W, B)
    assert w2.tolist() == [[2.0, 4.0], [-3.0, -4.0], [5.0, 6.0]]
    assert b2 is not None
    assert b2.tolist() == [-1.0, 5.0, -2.0]


def test_w2_and_b2_of_a_batchnorm_and_the_linear_layer_below_it_are_those_of_a_hand_calculation() -> None:
    linear = Linear("oi", 2, 3, 1, 1).absorb_before(np.array([2.0, -1.0]), np.array([1.0, 10.0]))
    w2, b2 = linear.fold(W, B)
    assert w2.tolist() == [[2.0, -2.0], [6.0, -4.0], [10.0, -6.0]]
    assert b2 is not None
    assert b2.tolist() == [22.0, 43.0, 64.0]


def test_no_bias_is_made_where_none_is_needed() -> None:
    linear = Linear("oi", 2, 3, 1, 1).absorb_after(np.full(3, 2.0), np.zeros(3))
    assert linear.fold(W, None)[1] is None
    assert linear.absorb_after(np.ones(3), np.ones(3)).fold(W, None)[1] is not None


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), (4, 3), (4, 1)])
def test_a_bias_of_any_shape_that_broadcasts_is_folded(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    bias, x = random.normal(size=shape), random.normal(size=(4, 2))
    scale, shift = random.normal(size=(2, 3))
    weight, folded = Linear("oi", 2, 3, 1, 1).absorb_after(scale, shift).fold(W, bias)
    np.testing.assert_allclose(x @ weight.T + folded, (x @ W.T + bias) * scale + shift, rtol=1e-13)


# ---------------------------------------------------------------- every order and grouping, as one dense matrix


def dense(linear: Linear, weight: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The operator as a matrix `(outputs, inputs, taps)` and a vector, by the definition of its order and groups."""
    taps = int(np.prod(weight.shape[2:]))
    out, into = linear.outputs // linear.groups, linear.inputs // linear.groups
    matrix = np.zeros((linear.outputs, linear.inputs, taps))
    for group, o, i in product(range(linear.groups), range(out), range(into)):
        row = weight[group * out + o, i] if linear.order == "oi" else weight[group * into + i, o]
        matrix[group * out + o, group * into + i] = row.ravel()
    return matrix, np.zeros(linear.outputs) if bias is None else bias


SHAPES = [
    ("oi", 3, 5, 1, ()), ("io", 3, 5, 1, ()), ("oi", 4, 4, 1, ()), ("io", 4, 4, 1, ()),
    ("oi", 4, 6, 2, (3,)), ("oi", 6, 6, 6, (3, 3)), ("oi", 6, 12, 6, (3, 3)), ("oi", 4, 4, 2, (1, 1)),
    ("io", 4, 6, 2, (3,)), ("io", 6, 6, 3, (3, 3)), ("io", 6, 6, 6, (3, 3)), ("io", 6, 12, 6, (2, 2, 2)),
    ("io", 6, 3, 3, (3, 3)), ("oi", 6, 3, 3, (1, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("order", "inputs", "outputs", "groups", "kernel"), SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_what_was_absorbed_in_any_order_is_the_same_as_the_dense_operator_between_affines(
    order: str,
    inputs: int,
    outputs: int,
    groups: int,
    kernel: tuple[int, ...],
    biased: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(len(kernel) + outputs)
    square = inputs == outputs
    centre = tuple(n // 2 for n in kernel) if square else None
    size = (outputs, inputs // groups) if order == "oi" else (inputs, outputs // groups)
    weight, bias = random.normal(size=(*size, *kernel)), random.normal(size=outputs) if biased else None
    plain = Linear(order, inputs, outputs, 1, 1, groups=groups, centre=centre)
    for steps in permutations(["before", "after", "parallel", "after", "before"], 4):
        if "parallel" in steps and not square:
            continue
        linear, (matrix, vector) = plain, dense(plain, weight, bias)
        for step in steps:
            scale, shift = random.normal(size=(2, inputs if step == "before" else outputs))
            linear = getattr(linear, f"absorb_{step}")(scale, shift)
            matrix, vector = matrix.copy(), vector.copy()
            if step == "before":
                vector += (matrix * shift[:, None]).sum((1, 2))
                matrix *= scale[:, None]
            elif step == "after":
                matrix *= scale[:, None, None]
                vector = vector * scale + shift
            else:
                tap = int(np.ravel_multi_index(centre, kernel)) if kernel else 0
                matrix[np.arange(outputs), np.arange(outputs), tap] += scale
                vector += shift
        folded, new = linear.fold(weight, bias)
        assert folded.shape == weight.shape
        with monkeypatch.context() as patch:
            patch.setattr(algebra, "BLOCK", 2 * weight[0].size)
            np.testing.assert_array_equal(linear.fold_weight(weight), folded, "two rows at a time")
        expected, offset = dense(plain, folded, new)
        np.testing.assert_allclose(expected, matrix, rtol=0, atol=1e-12 * np.abs(matrix).max())
        np.testing.assert_allclose(offset, vector, rtol=0, atol=1e-12 * np.abs(vector).max())


def test_folding_leaves_the_weight_that_it_was_given_alone() -> None:
    weight, bias = W.copy(), B.copy()
    Linear("oi", 2, 3, 1, 1).absorb_after(np.full(3, 2.0), np.ones(3)).fold(weight, bias)
    np.testing.assert_array_equal(weight, W)
    np.testing.assert_array_equal(bias, B)


def test_a_bias_that_nearly_cancels_against_a_large_mean_is_exact_to_half_an_ulp_of_float32() -> None:
    mean, var, beta, eps = 1e6 + 0.25, 1e-2, 1.0 / 3.0, 1e-5
    bias = np.float32(1e6 + 0.125)
    scale, shift = batchnorm([mean], [var], [1.5], [beta], eps)
    _, folded = (
        Linear("oi", 1, 1, 1, 1)
        .absorb_after(scale, shift)
        .fold(np.ones((1, 1), np.float32), np.array([bias]))
    )
    assert folded is not None
    root = Fraction(float(np.sqrt(np.longdouble(var) + np.longdouble(eps))))
    exact = (Fraction(float(bias)) - Fraction(mean)) * Fraction(3, 2) / root + Fraction(beta)
    ulp = Fraction(abs(float(np.spacing(np.float32(float(exact))))))
    assert abs(Fraction(float(round_to(folded, np.float32)[0])) - exact) <= ulp * Fraction(501, 1000)
    naive = bias * np.float32(scale[0]) + np.float32(shift[0])
    assert abs(Fraction(float(naive)) - exact) > ulp * 1000


def test_two_operators_that_share_a_weight_agree_only_if_they_read_it_alike() -> None:
    scale, shift = np.array([2.0, 3.0]), np.zeros(2)
    straight = Linear("oi", 2, 2, 1, 1).absorb_after(scale, shift)
    turned = Linear("io", 2, 2, 1, 1).absorb_after(scale, shift)
    assert straight.equals(Linear("oi", 2, 2, 2, 2).absorb_after(scale, shift))
    assert not straight.equals(turned)
    assert not straight.equals(Linear("oi", 2, 2, 1, 1).absorb_before(scale, shift))
    assert not straight.equals(
        Linear("oi", 2, 2, 1, 1, centre=()).absorb_after(scale, shift).absorb_parallel(scale, shift)
    )


def test_changed_shifts_and_is_finite_say_what_was_absorbed() -> None:
    plain = Linear("oi", 2, 2, 1, 1, centre=())
    scaled, shifted = (
        plain.absorb_after(np.full(2, 2.0), np.zeros(2)),
        plain.absorb_before(np.ones(2), np.ones(2)),
    )
    assert (plain.changed, scaled.changed, shifted.changed) == (False, True, True)
    assert (plain.shifts, scaled.shifts, shifted.shifts) == (False, False, True)
    assert (plain.is_finite, scaled.is_finite) == (True, True)
    assert not plain.absorb_parallel(np.array([np.inf, 1.0]), np.zeros(2)).is_finite
    assert not plain.absorb_before(np.array([np.nan, 1.0]), np.zeros(2)).is_finite


# ---------------------------------------------------------------- rounding


def nearest(value: Fraction, dtype: Any) -> float:
    """The number of a narrow type nearest to an exact one, ties to even, by looking at its neighbours."""
    guess = np.dtype(dtype).type(float(value))
    candidates = [
        np.nextafter(guess, np.dtype(dtype).type(-np.inf)),
        guess,
        np.nextafter(guess, np.dtype(dtype).type(np.inf)),
    ]
    bits = {float(c): int(np.asarray(c).view(np.uint16)) for c in candidates}
    return min(bits, key=lambda c: (abs(Fraction(c) - value), bits[c] % 2))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@given(mantissa=st.integers(-(2**53), 2**53), exponent=st.integers(-60, -40))
def test_rounding_to_a_narrow_type_is_off_by_at_most_half_an_ulp(
    dtype: Any, mantissa: int, exponent: int
) -> None:
    value = float(Fraction(mantissa) * Fraction(2) ** exponent)
    rounded = float(round_to(np.array([value]), dtype)[0])
    assert rounded == nearest(Fraction(value), dtype)


@pytest.mark.parametrize(
    ("dtype", "middle", "step"),
    [(np.float16, 1 + 2.0**-11, 2.0**-40), (ml_dtypes.bfloat16, 1 + 2.0**-8, 2.0**-40)],
)
def test_a_number_just_beside_the_middle_of_two_is_not_rounded_twice(
    dtype: Any, middle: float, step: float
) -> None:
    below, tie, above = round_to(np.array([middle - step, middle, middle + step]), dtype).astype(np.float64)
    assert below == tie == 1.0
    assert above == 1.0 + 2 * (middle - 1.0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_what_is_too_large_becomes_infinite_silently_and_nan_stays(dtype: Any) -> None:
    rounded = round_to(np.array([1e300, -1e300, np.inf, np.nan, 0.0, 1e-300]), dtype).astype(np.float64)
    np.testing.assert_array_equal(rounded, [np.inf, -np.inf, np.inf, np.nan, 0.0, 0.0])


# ---------------------------------------------------------------- affines

NAN = np.nan


def row(scale: Any, shift: Any) -> Affine:
    return Affine.of(
        np.reshape(np.asarray(scale, float), (1, -1)), np.reshape(np.asarray(shift, float), (1, -1))
    )


def test_composition_applies_the_first_one_first() -> None:
    both = row([2.0, 3.0], [1.0, 1.0]).after(row([5.0, 7.0], [10.0, 20.0]))
    assert both.scale.tolist() == [[10.0, 21.0]]
    assert both.shift.tolist() == [[21.0, 61.0]]


def test_collapse_drops_an_axis_on_which_nothing_varies_even_where_it_may_be_anything() -> None:
    assert row([2.0, 2.0], [1.0, 1.0]).collapse().axes == ()
    assert row([NAN, NAN], [NAN, NAN]).collapse().axes == ()
    assert row([2.0, 2.0], [1.0, 3.0]).collapse().axes == (1,)
    assert row([2.0, NAN], [1.0, NAN]).collapse().axes == (1,)


def test_a_scale_alone_forgets_the_axes_of_its_shift() -> None:
    assert row([2.0, 2.0], [1.0, 3.0]).scale_only().axes == ()


def test_merge_takes_what_either_wants_and_refuses_what_both_want_differently() -> None:
    merged = row([2.0, NAN, NAN], [1.0, NAN, NAN]).merge(row([NAN, 3.0, NAN], [NAN, 4.0, NAN]))
    assert merged is not None
    np.testing.assert_array_equal(merged.scale, [[2.0, 3.0, NAN]])
    np.testing.assert_array_equal(merged.shift, [[1.0, 4.0, NAN]])
    assert row([2.0], [0.0]).merge(row([3.0, 2.0], [0.0, 0.0])) is None
    assert row([2.0], [0.0]).merge(row([2.0, NAN], [1.0, NAN])) is None


def test_settle_makes_what_may_be_anything_like_its_neighbours_along_other_axes_else_unchanged() -> None:
    scale = np.array([[2.0, NAN], [NAN, 3.0], [NAN, NAN]])
    along = Affine(scale, scale * 0).settle(0)
    assert along.vectors(0, 3) is not None
    assert along.scale.ravel().tolist() == [2.0, 3.0, 1.0]
    assert along.shift.ravel().tolist() == [0.0, 0.0, 0.0]
    own = Affine(scale, scale * 0).settle(1)
    assert own.scale.ravel().tolist() == [2.0, 3.0]
    assert not np.isnan(row([NAN, 2.0], [NAN, 1.0]).settle(1).scale).any()


def test_identity_linear_monotone_and_equal_see_numbers_and_not_shapes() -> None:
    assert row([1.0, NAN], [0.0, NAN]).is_identity
    assert not row([1.0, 1.0], [0.0, 1e-300]).is_identity
    assert row([-1.0, NAN], [0.0, NAN]).is_linear
    assert not row([-1.0], [0.0]).is_monotone
    assert row([0.0, NAN], [1.0, NAN]).is_monotone
    assert row([2.0, 2.0], [1.0, 1.0]).equals(row([2.0], [1.0]))
    assert not row([2.0, 2.0], [1.0, 1.5]).equals(row([2.0], [1.0]))


def test_vectors_are_refused_along_another_axis_or_of_another_size() -> None:
    affine = Affine.along(1, 3, [1.0, 2.0], 0.0)
    assert affine.vectors(2, 2) is None
    assert affine.vectors(1, 3) is None
    found = affine.vectors(1, 2)
    assert found is not None
    assert [v.tolist() for v in found] == [[1.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_an_identity_of_any_rank_is_one(rank: int) -> None:
    assert Affine.identity(rank).is_identity
    assert Affine.identity(rank).rank == rank
