"""Shapes that ONNX's inference leaves open, and inputs made from what a model declares."""

from __future__ import annotations

import numpy as np
import pytest

import bnfold.onnx
from bnfold.onnx.inputs import candidates
from bnfold.onnx.shapes import balance
from tests.onnx_models import model, weights


@pytest.mark.parametrize(
    ("source", "target", "found"),
    [
        (("N", 64, 7, 7), (None, 3136), ("N", 3136)),
        (("N", 64, 7, 7), ("N", None), ("N", 3136)),
        (("N", 64, "H", "W"), ("N", 2, 32, None), ("N", 2, 32, None)),
        (("N", 64, "H"), ("N", None, "H"), ("N", 64, "H")),
        (("N", 12), (None, 4), (None, 4)),
        ((6, 4), (None, 3), (8, 3)),
        ((None, 8), (None, 8), (None, 8)),
    ],
)
def test_one_open_size_is_told_by_the_products(source, target, found):
    assert balance(source, target) == found


def shape(text, value, **options):
    picture = bnfold.onnx.read(model(text, **options))
    return picture.graph.shapes.get(value)


def test_a_reshape_by_computed_sizes():
    text = """g (float[N, 6, H, W] x) => (float[a, b, c, d, e] y) { s = Shape(x)
        zero = Constant<value_ints = [0]>() one = Constant<value_ints = [1]>() two = Constant<value_ints = [2]>()
        big = Constant<value_ints = [9223372036854775807]>()
        first = Slice(s, zero, one, zero) last = Slice(s, two, big, zero) c1 = Gather<axis = 0>(s, one)
        half = Div(c1, two) to = Concat<axis = 0>(first, two, half, last) y = Reshape(x, to) }"""
    assert shape(text, "y") == ("N", 2, 3, "H", "W")


def test_a_symbol_survives_a_convolution_that_keeps_the_size():
    text = "g (float[N, 3, H, W] x) => (float[N, 4, a, b] y) { y = Conv<pads = [1, 1, 1, 1]>(x, w) }"
    assert shape(text, "y", tensors={"w": weights(4, 3, 3, 3)})[2:] == ("H", "W")


def test_the_rank_behind_an_operator_that_nobody_knows():
    text = """g (float[N, 3] x) => (float[a, b, c] y) { z = my.Op(x) to = Constant<value_ints = [2, 5, -1]>()
        r = Reshape(z, to) t = Transpose<perm = [0, 2, 1]>(r) y = Relu(t) }"""
    assert shape(text, "y", extra=', "my" : 1')[::2] == (2, 5)


def feed(text, **options):
    some = model(text, **options)
    return next(candidates(some, bnfold.onnx.read(some).scene))


def test_whole_numbers_stay_within_the_table_they_are_looked_up_in():
    text = """g (int32[50, 3] i) => (float[50, 3, 2] y) { j = Cast<to = 7>(i) k = Identity(j) y = Gather(table, k) }"""
    drawn = feed(text, tensors={"table": weights(5, 2)})["i"]
    assert drawn.dtype == np.int32
    assert set(drawn.ravel()) == set(range(5))


def test_signals_are_smooth_and_differ_between_examples():
    image = feed("g (float[N, 3, H, W] x) => (float[N, 3, H, W] y) { y = Relu(x) }")["x"]
    assert image.shape == (2, 3, 64, 64)
    step = np.abs(np.diff(image, axis=3)).mean()
    assert step < 0.3 * image.std()
    assert np.abs(image[0] - image[1]).mean() > 0.1


def test_equal_symbols_are_equal_sizes():
    feeds = feed("g (float[B, T] x, int64[B, T] i, bool flag) => (float[B, T] y) { y = Relu(x) }")
    assert feeds["x"].shape == feeds["i"].shape
    assert feeds["flag"].shape == ()
