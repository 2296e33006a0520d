"""Shapes that ONNX's inference leaves open, and inputs made from what a model declares."""

from __future__ import annotations

import numpy as np
import pytest

import bnfold.onnx
from bnfold.onnx.inputs import candidates
from tests.onnx_models import model, weights


def shape(text, value, **options):
    imported = bnfold.onnx.read(model(text, **options))
    return imported.graph.shapes.get(value)


@pytest.mark.parametrize(
    ("source", "target", "found"),
    [
        ("N, 64, 7, 7", "-1, 3136", ("N", 3136)),
        ("N, 64, 7, 7", "0, -1", ("N", 3136)),
        ("N, 64, H", "0, -1, 8", ("N", None, 8)),
        ("N, 12", "-1, 4", (None, 4)),
        ("6, 4", "-1, 3", (8, 3)),
    ],
)
def test_what_a_reshape_leaves_open_is_told_by_the_sizes(source, target, found):
    made = shape(
        f"""g (float[{source}] x) => (float[{", ".join("abcd"[: len(found)])}] y) {{
        to = Constant<value_ints = [{target}]>() y = Reshape(x, to) }}""",
        "y",
    )
    assert [size if isinstance(size, int) or size in ("N", "H") else None for size in made] == list(found)


def test_half_of_a_size_rounded_up_is_no_half_of_it_rounded_down():
    text = """g (float[N, 3, H, H] x) => (float[a, b, c, d] y, float[a, b, e, f] z) {
        y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
        z = MaxPool<kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1>(x) }"""
    assert shape(text, "y")[:2] == shape(text, "z")[:2] == ("N", 3)
    assert shape(text, "y")[2] == shape(text, "y")[3]
    assert shape(text, "y")[2] != shape(text, "z")[2]


def test_a_model_that_takes_multiples_only_is_read_at_multiples():
    text = """g (float[N, 4, H, H] x) => (float[a, b, c] y) { s = Shape(x)
        zero = Constant<value_ints = [0]>() two = Constant<value_ints = [2]>() w = Constant<value_ints = [16]>()
        n = Gather<axis = 0>(s, zero) h = Gather<axis = 0>(s, two) parts = Div(h, w) four = Constant<value_ints = [4]>()
        to = Concat<axis = 0>(n, four, parts, w, h) r = Reshape(x, to) rest = Constant<value_ints = [0, 0, -1]>()
        y = Reshape(r, rest) }"""
    assert shape(text, "y")[:2] == ("N", 4)


@pytest.mark.parametrize(("size", "known"), [("H", None), ("64", 0)])
def test_what_is_the_same_at_every_size_that_was_tried_is_no_proof(size, known):
    text = f"""g (float[N, 4, {size}] x) => (float[a, b, c] y) {{ s = Shape(x) at = Constant<value_ints = [2]>()
        h = Gather<axis = 0>(s, at) least = Constant<value_ints = [16]>() nothing = Constant<value_ints = [0]>()
        short = Sub(least, h) more = Max(short, nothing) front = Constant<value_ints = [0, 0, 0, 0, 0]>()
        pads = Concat<axis = 0>(front, more) y = Pad(x, pads) }}"""
    context = bnfold.onnx.read(model(text)).context
    assert context.constants.integers("pads") == (None if known is None else [0] * 6)
    assert context.sizes.numbers("pads") == (0, 0, 0, 0, 0, known)


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
    return next(candidates(some, bnfold.onnx.read(some).context))


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


def test_a_model_that_takes_one_size_only_shows_its_ranks_behind_what_contradicts_at_others():
    text = """g (float[N, 4, H, 48] x) => (float[a, b, c, d] y) { p = AveragePool<kernel_shape = [48, 1]>(x)
        to = Constant<value_ints = [0, 4, 1, 48]>() r = Reshape(x, to) one = GlobalAveragePool(r)
        w = Constant<value_ints = [1, 1, 1, 48]>() e = Expand(one, w) c = Concat<axis = 1>(p, e) y = Relu(c) }"""
    found = shape(text, "y")
    assert found is not None
    assert len(found) == 4
