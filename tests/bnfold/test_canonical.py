"""Canonical forms: what follows from an operator's settings, whichever frontend has read them."""

from __future__ import annotations

import numpy as np
import pytest

from bnfold import canonical
from bnfold.algebra import Affine
from bnfold.window import Window


def window(kernel=(3, 3), strides=(1, 1), dilations=(1, 1), pads=((0, 0), (0, 0)), more=False):
    return Window(kernel, strides, dilations, pads, more)


AROUND = ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("shape", "centre", "partial"),
    [
        (window(), None, ""),
        (window(pads=AROUND), (1, 1), "it pads with zeros"),
        (window((1, 1)), (0, 0), ""),
        (window((1, 1), pads=AROUND), None, "it pads with zeros"),
        (window(strides=(2, 2), pads=AROUND), None, "it pads with zeros"),
        (window(dilations=(2, 2), pads=AROUND), None, "it pads with zeros"),
        (window(dilations=(2, 2), pads=((2, 2), (2, 2))), (1, 1), "it pads with zeros"),
        (window(strides=(2, 2), pads=None), None, "it pads with zeros"),
    ],
)
def test_what_a_convolution_sums_and_where_its_centre_is(shape, centre, partial):
    made = canonical.convolution(shape, 4, 4)
    assert (made.order, made.centre, made.partial) == ("oi", centre, partial)


@pytest.mark.parametrize(
    ("shape", "whole"),
    [
        (window((1, 1)), True),
        (window(), False),
        (window((1, 1), strides=(2, 2)), False),
        (window((1, 1), more=True), False),
    ],
)
def test_a_transposed_convolution_sums_every_tap_only_where_it_is_pointwise(shape, whole):
    made = canonical.convolution(shape, 4, 6, transposed=True)
    assert (made.order, not made.partial) == ("io", whole)


def test_no_centre_between_different_channels():
    assert canonical.convolution(window(pads=AROUND), 4, 6).centre is None
    assert canonical.matrix("oi", 4, 6, 1, 1).centre is None
    assert canonical.matrix("oi", 4, 4, 0, 1).centre is None
    assert canonical.matrix("oi", 4, 4, 1, 1).centre == ()


@pytest.mark.parametrize(
    ("lower", "pads"), [(False, ((1, 1), (1, 2), (0, 0))), (True, ((1, 1), (2, 1), (0, 0)))]
)
def test_pads_that_keep_the_size(lower, pads):
    assert Window.same_pads((3, 4, 1), (1, 1, 2), (1, 1, 1), lower) == pads
    assert Window.same_pads((3,), (2,), (1,), lower) is None


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("first", [True, False])
def test_an_operation_by_a_constant_is_an_affine(op, first):
    x, c = np.linspace(-1, 1, 6).reshape(2, 3), np.array([2.0, -3.0, 0.5])
    compute = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}[op]
    made = canonical.affine_of(op, c, first)
    if op == "Div" and not first:
        assert made is None
    else:
        np.testing.assert_allclose(x * made.scale + made.shift, compute(x, c) if first else compute(c, x))


def test_alpha_scales_the_second_operand():
    made = canonical.affine_of("Sub", np.array(3.0), first=True, alpha=2.0)
    assert (float(made.scale), float(made.shift)) == (1.0, -6.0)
    made = canonical.affine_of("Add", np.array(3.0), first=False, alpha=2.0)
    assert (float(made.scale), float(made.shift)) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("numbers", "shape", "aligned"),
    [
        (np.ones(3), (2, 3), (1, 1)),
        (np.arange(3.0), (2, 3), (1, 3)),
        (np.arange(3.0), ("N", 3), (1, 3)),
        (np.arange(3.0), (2, "C"), None),
        (np.arange(3.0), (2, 1), None),
        (np.ones((1, 1, 1)), (2, 3), None),
        (np.array([1.0, np.inf, 1.0]), (2, 3), None),
    ],
)
def test_an_affine_is_laid_along_the_axes_of_its_value_unless_it_enlarges_it(numbers, shape, aligned):
    made = canonical.align(Affine.of(numbers, 0.0), shape)
    assert (made and made.scale.shape) == aligned


def statistics(**changed):
    plain = {"mean": np.zeros(3), "var": np.ones(3), "gamma": np.ones(3), "beta": np.zeros(3)}
    return plain | {name: np.asarray(array, float) for name, array in changed.items()}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"mean": [0, np.nan, 0]}, "its running mean holds a number that is not finite, for channel 1"),
        ({"var": [1, 1, -1]}, "the variance of channel 2 is not positive"),
        ({"gamma": [1, 1]}, "its weight has the shape [2], which does not suit an input of [2, 3]"),
        ({"gamma": [1e200] * 3, "mean": [1e200] * 3}, "a number in it overflows"),
    ],
)
def test_a_normalisation_that_is_no_affine_says_which_number_it_is(changed, reason):
    assert canonical.normalisation(statistics(**changed), 1e-5, (2, 3)) == (None, reason)


def test_a_normalisation_is_an_affine_along_the_channels():
    numbers = statistics(mean=[1, 2, 3], var=[4, 4, 4], gamma=[2, 2, 2], beta=[0, 1, 0])
    affine, reason = canonical.normalisation(numbers, 0.0, ("N", 3, 5))
    assert not reason
    assert affine.scale.ravel().tolist() == [1, 1, 1]
    assert affine.shift.ravel().tolist() == [-1, -1, -3]
    assert affine.scale.shape == (1, 3, 1)


@pytest.mark.parametrize(
    ("given", "size", "cut"),
    [
        ((0, 5, 1), 5, slice(None)),
        ((0, 9, 1), 5, slice(None)),
        ((-2, None, 1), 5, slice(3, 5, 1)),
        ((None, None, -1), 5, slice(4, None, -1)),
        ((1, 4, 1), "N", slice(1, 4, None)),
        ((0, None, 2), "N", slice(None, None, 2)),
        ((-2, None, 1), "N", None),
        ((0, -1, 1), "N", None),
    ],
)
def test_a_cut_has_bounds_that_are_not_negative_or_none_that_can_be_told(given, size, cut):
    assert canonical.cut(*given, size) == cut


def test_a_pooling_mixes_the_axes_along_which_it_moves():
    made = canonical.pooling(window((3, 1), pads=((1, 1), (0, 0))), 2)
    assert made == {"axes": (2, 3), "keepdims": True, "partial": "", "window": None}
    assert canonical.pooling(window((3, 1)), 2)["axes"] == (2,)
    assert (
        canonical.pooling(window(pads=AROUND), 2, counts_padding=True)["partial"] == "it counts zero padding"
    )


def test_a_pooling_that_sums_a_whole_window_everywhere_says_which():
    """A mean that leaves out what it pads divides by another number at the border; so may one that rounds up."""
    plain, padded = window((2, 2), (2, 2)), window(pads=AROUND)
    assert canonical.pooling(plain, 2)["window"] == plain
    assert canonical.pooling(padded, 2, counts_padding=True)["window"] == padded
    assert canonical.pooling(padded, 2)["window"] is None
    assert canonical.pooling(plain, 2, divisor=True)["window"] is None
    assert canonical.pooling(plain, 2, ceils=True)["window"] is None


@pytest.mark.parametrize(
    ("pairs", "zeros", "axes", "partial"),
    [
        ({2: (1, 0), 3: (0, 0)}, True, (2,), "it pads with zeros"),
        ({2: (1, 0)}, False, (2,), ""),
        ({2: (-1, 0)}, True, (2,), ""),
        ({2: (0, None)}, True, (2,), "it pads with zeros"),
        ({2: (0, 0)}, True, (), ""),
    ],
)
def test_a_padding_by_an_amount_that_is_not_known_is_one(pairs, zeros, axes, partial):
    assert canonical.padding(pairs, zeros) == {"axes": axes, "partial": partial}
