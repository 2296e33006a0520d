"""Per-channel numbers land on the axis of the channels, whatever the rank: no verification, judged from outside."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import bnfold.onnx
from tests.onnx_models import model, norm, random, run, weights

SHAPES = {
    2: [(4, 3), (4, 4)],
    3: [(2, 4, 3), (4, 4, 4)],
    4: [(2, 3, 4, 5), (4, 4, 4, 4)],
    5: [(2, 3, 2, 4, 5)],
}
"""By rank, one shape with unequal sizes and one with equal ones (which hide a wrong axis from the checker)."""

CASES = [
    (side, bias, shape)
    for side, bias in itertools.product(("left", "right"), (False, True))
    for shapes in SHAPES.values()
    for shape in shapes
]


def sizes(shape):
    return ", ".join(map(str, shape))


def product(side, bias, shape):
    """The text of a MatMul by a constant `w` (and of an Add of `c`), its tensors, and the shape of what it computes."""
    axis = len(shape) - 2 if side == "left" else len(shape) - 1
    size = shape[axis]
    made = 4 if size == 4 else 6
    output = [*shape[:axis], made, *shape[axis + 1 :]]
    tensors = {"w": weights(made, size) if side == "left" else weights(size, made)}
    call = "MatMul(w, x)" if side == "left" else "MatMul(x, w)"
    if not bias:
        return f"h = {call}", tensors, axis, output
    tensors["c"] = weights(made, 1) if side == "left" else weights(made)
    return f"k = {call} h = Add(k, c)", tensors, axis, output


def affine(axis, rank, channels):
    """A BatchNorm written out as a multiplication and an addition along any axis."""
    shape = [channels if place == axis else 1 for place in range(rank)]
    draw = random(3)
    return {
        "mean": draw.standard_normal(shape).astype(np.float32),
        "scale": draw.uniform(0.5, 1.5, shape).astype(np.float32),
        "shift": draw.standard_normal(shape).astype(np.float32),
    }


def assert_folds_exactly(some, shape, gone, **options):
    folded, report = bnfold.onnx.fold(some, verify=False, **options)
    assert report.count("folded") == gone, str(report)
    feed = {"x": random(9).standard_normal(shape).astype(np.float32)}
    wanted = run(some, feed)
    for name, array in run(folded, feed).items():
        np.testing.assert_allclose(array, wanted[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("side", "bias", "shape"), CASES)
def test_a_copied_product_has_its_bias_on_its_own_axis(side, bias, shape):
    """The product is an output too, so a BatchNorm along its channels gets a copy of it."""
    body, tensors, axis, output = product(side, bias, shape)
    text = f"""g (float[{sizes(shape)}] x) => (float[{sizes(output)}] y, float[{sizes(output)}] h) {{
        {body} d = Sub(h, mean) e = Mul(d, scale) y = Add(e, shift) }}"""
    some = model(text, {**tensors, **affine(axis, len(shape), output[axis])})
    assert_folds_exactly(some, shape, 1, duplicate=True)


@pytest.mark.parametrize(("side", "bias", "shape"), CASES)
def test_a_product_has_its_bias_on_its_own_axis(side, bias, shape):
    body, tensors, axis, output = product(side, bias, shape)
    text = f"""g (float[{sizes(shape)}] x) => (float[{sizes(output)}] y) {{
        {body} d = Sub(h, mean) e = Mul(d, scale) y = Add(e, shift) }}"""
    some = model(text, {**tensors, **affine(axis, len(shape), output[axis])})
    assert_folds_exactly(some, shape, 1)


@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 4, 4)])
def test_two_copies_of_a_matrix_from_the_left_under_two_batchnorms(shape):
    made = [shape[0], 4, shape[2]]
    text = f"""g (float[{sizes(shape)}] x) => (float[{sizes(made)}] y, float[{sizes(made)}] z) {{
        h = MatMul(w, x) y = BatchNormalization(h, s, b, m, v) z = BatchNormalization(h, qs, qb, qm, qv) }}"""
    some = model(text, {"w": weights(4, shape[1]), **norm(4), **norm(4, "q", seed=9)})
    assert_folds_exactly(some, shape, 2, duplicate=True)
