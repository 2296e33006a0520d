"""The float64 run against onnxruntime's float32 run, operator by operator."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import pytest

from bnfold.onnx.nudge import nudge
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


def test_a_function_has_its_attributes_in_float64_too():
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[2, 4, 7] x) => (float[2, 4, 10] y) { c = Conv(x, w) y = own.twice <along = 2> (c) }
        <domain: "own", opset_import: ["" : 17]> twice <along> (a) => (d) {
            d = Concat <axis: int = @along> (a, a) }"""
    some = onnx.parser.parse_model(text)
    some.graph.initializer.append(onnx.numpy_helper.from_array(weights(4, 4, 3), "w"))
    assert_agrees(some, {"x": weights(2, 4, 7)})


def deep_net(layers: int, width: int) -> onnx.ModelProto:
    """Convolutions one after another, whose weights are all there is to it."""
    body = "".join(f"c{place + 1} = Conv(c{place}, w{place}) " for place in range(layers))
    text = f"g (float[1, {width}, 1] x) => (float[1, {width}, 1] y) {{ c0 = Relu(x) {body} y = Relu(c{layers}) }}"
    return model(text, {f"w{place}": weights(width, width, 1) / width for place in range(layers)})


def test_of_many_weights_one_at_a_time_is_held_in_float64():
    import tracemalloc

    layers, width = 12, 200
    wide, feed = to_float64(deep_net(layers, width), None), {"x": weights(1, width, 1)}
    run_exactly(wide, [feed])
    tracemalloc.start()
    run_exactly(wide, [feed])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < layers / 2 * width * width * 8


def test_large_weights_of_a_model_with_a_convolution_wait_to_be_widened():
    some = deep_net(2, 70)
    wide = to_float64(some, None)
    assert [tensor.data_type for tensor in wide.graph.initializer] == [onnx.TensorProto.FLOAT] * 2
    assert_agrees(some, {"x": weights(1, 70, 1)})


def test_a_weight_that_waits_to_be_widened_is_nudged_by_units_of_float64():
    wide = to_float64(deep_net(1, 70), None)
    (near,) = nudge(wide, None, 1.0, 0, exact=True).graph.initializer
    old, new = weights(70, 70, 1) / 70, onnx.numpy_helper.to_array(near)
    assert new.dtype == np.float64
    assert 0 < np.abs(new - old).max() < 1e-14
