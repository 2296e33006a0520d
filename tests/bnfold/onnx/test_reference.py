"""The float64 run against onnxruntime's float32 run, operator by operator."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import pytest

from bnfold.onnx.run import run_exactly, to_float64
from tests.onnx_models import model, norm, run, weights

POOLS = [
    (op, k, s, p, ceil, counted, size)
    for op, k, s, p, ceil, counted, size in product(
        ("MaxPool", "AveragePool"), (2, 3), (1, 2, 3), (0, 1), (0, 1), (0, 1), (7, 8)
    )
    if not (op == "MaxPool" and counted)
]

CONVS = [
    (op, k, f"strides=[{s}, {s}], dilations=[{d}, {d}], group={g}, {pad}", g)
    for op, k, s, d, g, pad in product(
        ("Conv", "ConvTranspose"), (1, 2, 3), (1, 2), (1, 2), (1, 2),
        ("pads=[0, 0, 0, 0]", "pads=[1, 0, 0, 1]", 'auto_pad="VALID"', 'auto_pad="SAME_UPPER"'),
    )
    if not ("SAME" in pad and (d > 1 or op == "ConvTranspose"))
]  # fmt: skip


def assert_agrees(some, feed, tolerance=1e-4):
    wanted = run(some, feed)
    found = run_exactly(to_float64(some, None), [feed])[0]
    for name, array in found.items():
        assert array.shape == wanted[name].shape
        assert array.dtype == np.float64
        np.testing.assert_allclose(array, wanted[name], atol=tolerance)


@pytest.mark.parametrize(("op", "k", "s", "p", "ceil", "counted", "size"), POOLS)
def test_pooling_is_that_of_onnxruntime(op, k, s, p, ceil, counted, size):
    more = f", count_include_pad={counted}" if op == "AveragePool" else ""
    options = (
        f"kernel_shape=[{k}, {k}], strides=[{s}, {s}], pads=[{p}, {p}, {p}, {p}], ceil_mode={ceil}{more}"
    )
    text = f"g (float[1, 2, {size}, {size}] x) => (float[1, 2, a, b] y) {{ y = {op}<{options}>(x) }}"
    assert_agrees(model(text, opset=19), {"x": weights(1, 2, size, size)})


@pytest.mark.parametrize(("op", "k", "options", "groups"), CONVS)
def test_convolution_is_that_of_onnxruntime(op, k, options, groups):
    text = f"g (float[2, 4, 7, 7] x) => (float[2, c, a, b] y) {{ y = {op}<{options}>(x, w, bias) }}"
    tensors = {"w": weights(4, 4 // groups, k, k), "bias": weights(4)}
    assert_agrees(model(text, tensors), {"x": weights(2, 4, 7, 7)})


def test_a_batchnorm_of_operator_set_9_does_not_normalise_by_the_batch():
    text = """g (float[2, 3, 4] x) => (float[2, 3, 4] y) {
        c = Conv(x, w) y = BatchNormalization<momentum=0.9>(c, s, b, m, v) }"""
    some = model(text, {"w": weights(3, 3, 1), **norm(3)}, opset=9)
    assert_agrees(some, {"x": weights(2, 3, 4)})


def test_types_are_widened_wherever_they_are_written():
    text = """g (float16[2, 3] x, bool c) => (float[2, 3] y) {
        k = Constant<value_float = 0.5>() n = Constant<value_ints = [2, 3]>() z = ConstantOfShape(n)
        f = Cast<to = 1>(x) a = Mul(f, k) b = Add(a, z)
        y = If (c) <then_branch = t () => (float[2, 3] p) { p = Relu(b) },
                    else_branch = e () => (float[2, 3] q) { h = CastLike(x, b) q = Sub(h, b) }> }"""
    for flag in (True, False):
        assert_agrees(model(text), {"x": weights(2, 3, dtype=np.float16), "c": np.array(flag)})


def test_resize_keeps_its_scales_in_float32():
    text = """g (float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y) {
        c = Conv(x, w) y = Resize<mode = "linear">(c, , scales) }"""
    tensors = {"w": weights(2, 2, 1, 1), "scales": np.array([1, 1, 2, 2], np.float32)}
    assert_agrees(model(text, tensors), {"x": weights(1, 2, 4, 4)})


def test_random_numbers_are_the_same_in_both_copies():
    text = """g (float[4, 3] x) => (float[4, 5] y) { r = RandomNormalLike(x) a = Add(x, r) h = Gemm(a, w)
        y = BatchNormalization(h, s, b, m, v) }"""
    from bnfold.onnx import fold

    _, report = fold(model(text, {"w": weights(3, 5), **norm(5)}))
    assert report.count("folded") == 1
    assert report.verified


def test_the_widened_copy_leaves_the_original_alone():
    some = model("g (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }")
    before = onnx.ModelProto.FromString(some.SerializeToString())
    to_float64(some, None)
    assert some == before
