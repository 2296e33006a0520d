"""Attributes and forms of one operator, in files."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnfold.onnx
from bnfold.errors import InputError
from bnfold.fold import main
from tests.onnx_models import count, fold, kept, model, norm, random, run, weights, write

BN = "y = BatchNormalization(h, s, b, m, v)"


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (4, 5), (4, 1), None])
@pytest.mark.parametrize("trans", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm_alpha_beta_and_any_c(shape, trans):
    a, b = trans
    c = "" if shape is None else ", c"
    x = "3, 4" if a else "4, 3"
    text = f"""g (float[{x}] x) => (float[4, 5] y) {{
        h = Gemm<alpha=0.7, beta=1.3, transA={a}, transB={b}>(x, w{c}) {BN} }}"""
    tensors = {"w": weights(5, 3) if b else weights(3, 5), **norm(5)}
    if shape is not None:
        tensors["c"] = weights(*shape)
    folded, _ = fold(model(text, tensors), 1)
    assert count(folded) == 0


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 14, 15, 18, 21, 24])
def test_every_operator_set(opset):
    text = f"g (float[N, 3, 6, 6] x) => (float[N, 8, 6, 6] y) {{ h = Conv<pads=[1, 1, 1, 1]>(x, w) {BN} }}"
    fold(model(text, {"w": weights(8, 3, 3, 3), **norm(8)}, opset=opset), 1)


def test_operator_set_6_is_refused_with_the_way_out():
    text = f"g (float[N, 3] x) => (float[N, 3] y) {{ h = Relu(x) {BN} }}"
    with pytest.raises(InputError, match="version_converter"):
        bnfold.onnx.fold(model(text, norm(3), opset=6))


@pytest.mark.parametrize("spatial", [0, 1])
def test_spatial_of_operator_set_7(spatial):
    numbers = {
        k: a if spatial else np.broadcast_to(a[:, None, None], (4, 5, 5)).copy() for k, a in norm(4).items()
    }
    text = f"""g (float[2, 3, 5, 5] x) => (float[2, 4, 5, 5] y) {{
        h = Conv(x, w) y = BatchNormalization<spatial={spatial}>(h, s, b, m, v) }}"""
    some = model(text, {"w": weights(4, 3, 1, 1), **numbers}, opset=7)
    fold(some, 1)


def test_spatial_0_with_a_number_per_channel_says_what_spatial_asks_for():
    text = """g (float[2, 3, 5, 5] x) => (float[2, 4, 5, 5] y) {
        h = Conv(x, w) y = BatchNormalization<spatial=0>(h, s, b, m, v) }"""
    some = model(text, {"w": weights(4, 3, 1, 1), **norm(4)}, opset=7)
    (verdict,) = bnfold.onnx.fold(some, verify=False)[1].verdicts
    assert "spatial=0 asks for a number for every element" in verdict.reason


def test_spatial_0_that_varies_in_space_stays():
    numbers = {k: a.reshape(4, 5, 5) for k, a in norm(100).items()}
    text = """g (float[2, 3, 5, 5] x) => (float[2, 4, 5, 5] y) {
        h = Conv(x, w) y = BatchNormalization<spatial=0>(h, s, b, m, v) }"""
    kept(model(text, {"w": weights(4, 3, 1, 1), **numbers}, opset=7), "varies along axis")


def test_a_missing_epsilon_is_1e_5():
    numbers = norm(4) | {"v": np.full(4, 1e-6, np.float32)}
    text = f"g (float[2, 3, 5] x) => (float[2, 4, 5] y) {{ h = Conv(x, w) {BN} }}"
    folded, _ = fold(model(text, {"w": weights(4, 3, 1), **numbers}), 1)
    new = onnx.numpy_helper.to_array(folded.graph.initializer[0])
    ratio = new.ravel() / weights(4, 3, 1).ravel()
    np.testing.assert_allclose(ratio, np.repeat(numbers["s"] / np.sqrt(1.1e-5), 3), rtol=1e-6)


def test_training_mode_stays():
    text = """g (float[4, 3] x) => (float[4, 5] y) {
        h = Gemm(x, w) y, mean, var = BatchNormalization<training_mode=1>(h, s, b, m, v) }"""
    kept(model(text, {"w": weights(3, 5), **norm(5)}), "training mode")


def test_more_than_one_output_before_operator_set_14_means_training():
    text = """g (float[4, 3] x) => (float[4, 5] y) {
        h = Gemm(x, w, c) y, mean, var, sm, sv = BatchNormalization(h, s, b, m, v) }"""
    some = model(text, {"w": weights(3, 5), "c": weights(5), **norm(5)}, opset=9)
    kept(some, "more than one output", verify=False)


def test_instance_normalization_is_no_batchnorm():
    text = "g (float[2, 3, 8] x) => (float[2, 3, 8] y) { h = Conv(x, w) y = InstanceNormalization(h, s, b) }"
    numbers = norm(3)
    some = model(text, {"w": weights(3, 3, 1), "s": numbers["s"], "b": numbers["b"]})
    fold(some, 0, 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("channels", [4, 8])
def test_grouped_conv_transpose_also_with_equal_channels(groups, channels):
    text = f"""g (float[2, 4, 6, 6] x) => (float[2, {channels}, 13, 13] y) {{
        h = ConvTranspose<group={groups}, strides=[2, 2], output_padding=[1, 1], pads=[1, 1, 0, 0]>(x, w, c) {BN} }}"""
    fold(
        model(text, {"w": weights(4, channels // groups, 3, 3), "c": weights(channels), **norm(channels)}), 1
    )


def test_a_matrix_from_the_left():
    text = f"g (float[2, 3, 7] x) => (float[2, 5, 7] y) {{ h = MatMul(w, x) {BN} }}"
    folded, _ = fold(model(text, {"w": weights(5, 3), **norm(5)}), 1)
    assert count(folded, "Add") == 1


def test_a_constant_that_is_no_matrix_stays():
    text = f"g (float[2, 4, 3] x) => (float[2, 4, 5] y) {{ h = MatMul(x, w) {BN} }}"
    kept(model(text, {"w": weights(2, 3, 5), **norm(4)}), "not a matrix")


def test_a_constant_with_leading_ones_is_a_matrix():
    text = """g (float[2, 4, 3] x) => (float[2, 5, 4] y) {
        h = MatMul(x, w) t = Transpose<perm=[0, 2, 1]>(h) y = BatchNormalization(t, s, b, m, v) }"""
    folded, _ = fold(model(text, {"w": weights(1, 3, 5), **norm(5)}), 1)
    assert {tuple(t.dims) for t in folded.graph.initializer} == {(1, 3, 5), (5,)}


def test_linear_writes_another_axis_than_the_batchnorm_normalises():
    """The shapes agree, so a fold that looks at shapes alone is silently wrong."""
    text = f"g (float[2, 5, 3] x) => (float[2, 5, 5] y) {{ h = MatMul(x, w) {BN} }}"
    kept(model(text, {"w": weights(3, 5), **norm(5)}), "channels on axis 2")


def test_a_reshape_that_mixes_the_channels_stays():
    text = """g (float[2, 4, 3] x) => (float[2, 5, 4] y) {
        h = MatMul(x, w) t = Reshape(h, shape) y = BatchNormalization(t, s, b, m, v) }"""
    report = kept(model(text, {"w": weights(3, 5), "shape": np.array([2, 5, 4]), **norm(5)}), "")
    assert "Reshape" in report.verdicts[0].reason or "MatMul" in report.verdicts[0].reason


@pytest.mark.parametrize(
    ("attributes", "whole"),
    [
        ("", True),
        ('auto_pad="VALID"', True),
        ("pads=[0, 0, 0, 0]", True),
        ("pads=[1, 1, 1, 1]", False),
        ("pads=[0, 0, 1, 1]", False),
        ('auto_pad="SAME_UPPER"', False),
        ('auto_pad="SAME_LOWER", strides=[2, 2]', False),
    ],
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_below_a_batchnorm_padding_lets_only_the_scale_in(attributes, whole, kernel):
    text = f"""g (float[2, 3, 6, 6] x) => (float[2, 4, h, w_] y) {{
        n = BatchNormalization(x, s, b, m, v) y = Conv<{attributes}>(n, w, c) }}"""
    whole = whole or (kernel == 1 and "auto_pad" in attributes)
    some = model(text.replace("<>", ""), {"w": weights(4, 3, kernel, kernel), "c": weights(4), **norm(3)})
    folded, report = fold(some, int(whole), int(not whole))
    assert count(folded) == 0
    assert report.verdicts[0].outcome == ("folded" if whole else "scale folded")


def test_a_pad_node_counts_as_padding():
    text = """g (float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y) {
        n = BatchNormalization(x, s, b, m, v) p = Pad(n, pads) y = Conv(p, w) }"""
    tensors = {"w": weights(4, 3, 3, 3), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), **norm(3)}
    _, report = fold(model(text, tensors), 0, 1)
    assert report.verdicts[0].outcome == "scale folded"


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_a_pad_that_repeats_what_is_there_lets_all_through(mode):
    text = f"""g (float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y) {{
        n = BatchNormalization(x, s, b, m, v) p = Pad<mode="{mode}">(n, pads) y = Conv(p, w) }}"""
    fold(model(text, {"w": weights(4, 3, 3, 3), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), **norm(3)}), 1)


def test_a_pad_with_another_constant_stays():
    text = """g (float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y) {
        n = BatchNormalization(x, s, b, m, v) p = Pad(n, pads, one) y = Conv(p, w) }"""
    tensors = {
        "w": weights(4, 3, 3, 3),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "one": np.float32(1),
        **norm(3),
    }
    kept(model(text, tensors), "Pad")


@pytest.mark.parametrize("counted", [0, 1])
def test_average_pooling_that_counts_padding(counted):
    text = f"""g (float[2, 3, 8, 8] x) => (float[2, 4, 8, 8] y) {{
        h = Conv(x, w) p = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad={counted}>(h)
        y = BatchNormalization(p, s, b, m, v) }}"""
    some = model(text, {"w": weights(4, 3, 1, 1), **norm(4)})
    fold(some, 1 - counted, counted)


def test_conv_transpose_with_output_padding_below_a_batchnorm():
    text = """g (float[2, 3, 6] x) => (float[2, 4, n] y) {
        n = BatchNormalization(x, s, b, m, v) y = ConvTranspose<strides=[2], output_padding=[1]>(n, w) }"""
    folded, report = fold(model(text, {"w": weights(3, 4, 2), **norm(3)}), 0, 1)
    assert report.verdicts[0].outcome == "scale folded"
    assert count(folded) == 0


# ---------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [("float16", np.float16, 4e-3), ("double", np.float64, 1e-13), ("float", np.float32, 2e-6)],
)
def test_every_tensor_keeps_its_type(kind, dtype, tolerance):
    text = f"g ({kind}[4, 3] x) => ({kind}[4, 5] y) {{ h = Gemm(x, w) {BN} }}"
    folded, _ = fold(
        model(text, {"w": weights(3, 5, dtype=dtype), **norm(5, dtype=dtype)}), 1, tolerance=tolerance
    )
    assert {onnx.numpy_helper.to_array(t).dtype for t in folded.graph.initializer} == {np.dtype(dtype)}


def test_half_precision_weights_with_single_precision_statistics():
    text = f"g (float16[4, 3] x) => (float16[4, 5] y) {{ h = Gemm(x, w, c) {BN} }}"
    tensors = {"w": weights(3, 5, dtype=np.float16), "c": weights(5, dtype=np.float16), **norm(5)}
    folded, _ = fold(model(text, tensors, opset=15), 1, tolerance=4e-3)
    assert {t.data_type for t in folded.graph.initializer} == {onnx.TensorProto.FLOAT16}


def test_bfloat16_is_folded_and_compared_as_far_as_it_can_be_run():
    dtype = ml_dtypes.bfloat16
    text = f"g (bfloat16[4, 3] x) => (bfloat16[4, 5] y) {{ h = MatMul(x, w) {BN} }}"
    some = model(text, {"w": weights(3, 5, dtype=dtype), **norm(5, dtype=dtype)})
    folded, report = bnfold.onnx.fold(some, runtime="any")
    onnx.checker.check_model(folded, full_check=True)
    assert report.count("folded") == 1
    assert report.verified
    assert {t.data_type for t in folded.graph.initializer} == {onnx.TensorProto.BFLOAT16}


def test_overflow_in_half_precision_stays():
    numbers = norm(5, dtype=np.float16) | {"v": np.full(5, 1e-7, np.float16)}
    text = """g (float16[4, 3] x) => (float16[4, 5] y) {
        h = Gemm(x, w) y = BatchNormalization<epsilon=1e-9>(h, s, b, m, v) }"""
    some = model(text, {"w": np.full((3, 5), 1e4, np.float16), **numbers})
    kept(some, "overflow float16")


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", ["s", "v", "m"])
def test_a_number_that_is_not_finite_stays(name):
    numbers = norm(5)
    numbers[name] = np.array([1, np.nan, 1, 1, 1], np.float32)
    text = f"g (float[4, 3] x) => (float[4, 5] y) {{ h = Gemm(x, w) {BN} }}"
    kept(model(text, {"w": weights(3, 5), **numbers}), "channel 1")


def test_a_negative_variance_stays():
    numbers = norm(5) | {"v": np.array([1, 1, -1, 1, 1], np.float32)}
    text = f"g (float[4, 3] x) => (float[4, 5] y) {{ h = Gemm(x, w) {BN} }}"
    kept(model(text, {"w": weights(3, 5), **numbers}), "variance of channel 2")


def test_gamma_zero_and_variance_zero():
    numbers = norm(5) | {"s": np.array([0, 1, 0, -1, 2], np.float32), "v": np.zeros(5, np.float32)}
    text = f"g (float[4, 3] x) => (float[4, 5] y) {{ h = Gemm(x, w) {BN} }}"
    fold(model(text, {"w": weights(3, 5), **numbers}), 1)


def test_cancellation_in_the_bias_is_rounded_once():
    numbers = norm(5) | {"m": np.full(5, 4096.25, np.float32), "v": np.ones(5, np.float32)}
    bias = np.full(5, 4096.5, np.float32)
    text = f"g (float[4, 3] x) => (float[4, 5] y) {{ h = Gemm(x, w, c) {BN} }}"
    folded, _ = fold(model(text, {"w": weights(3, 5), "c": bias, **numbers}), 1, tolerance=1e-3)
    scale = numbers["s"].astype(np.float64) / np.sqrt(1 + np.float32(1e-5).astype(np.float64))
    exact = (scale * 0.25 + numbers["b"]).astype(np.float32)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in folded.graph.initializer}
    np.testing.assert_array_max_ulp(stored["c.folded"], exact, maxulp=1)


def test_chains_of_batchnorms():
    text = """g (float[4, 3] x) => (float[4, 5] y) {
        h = Gemm(x, w) a = BatchNormalization(h, s, b, m, v) c = BatchNormalization(a, s, b, m, v)
        r = Relu(c) d = BatchNormalization(r, s, b, m, v) e = BatchNormalization(d, s, b, m, v) y = Gemm(e, u) }"""
    fold(model(text, {"w": weights(3, 5), "u": weights(5, 5), **norm(5)}), 4)


def test_batchnorm_relu_padded_conv_says_so():
    text = """g (float[4, 3, 5] x) => (float[4, 5, 3] y) {
        n = BatchNormalization(x, s, b, m, v) r = Relu(n) y = Conv(r, w) }"""
    kept(model(text, {"w": weights(5, 3, 3), **norm(3)}), "Relu")


def test_a_model_that_runs_before_and_after_gives_the_same_with_real_inputs():
    text = f"g (float[4, 3] x) => (float[4, 5] y) {{ h = Gemm(x, w) {BN} }}"
    some = model(text, {"w": weights(3, 5), **norm(5)})
    feed = {"x": random(3).standard_normal((4, 3)).astype(np.float32)}
    folded, report = fold(some, 1, inputs=feed)
    assert report.evidence[0].inputs == 4
    np.testing.assert_allclose(run(folded, feed)["y"], run(some, feed)["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("value", "outcome"), [(0.0, "scale folded"), (3.0, "kept")])
def test_a_crop_that_fills_in_a_constant_takes_the_scale_only_where_that_is_zero(value, outcome):
    resize = (
        f'mode="linear", coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value={value}'
    )
    text = f"""g (float[N, 3, 6, 6] x) => (float[N, 4, 12, 12] y) {{
        c = Conv(x, w) h = Resize<{resize}>(c, roi, scales) y = BatchNormalization(h, s, b, m, v) }}"""
    held = {
        "w": weights(4, 3, 1, 1),
        "roi": np.array([0, 0, -0.2, -0.2, 1, 1, 1.2, 1.2], np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
        **norm(4),
    }
    _, report = bnfold.onnx.fold(model(text, held), runtime="any")
    assert [verdict.outcome for verdict in report.verdicts] == [outcome], report


def test_outputs_without_a_name_are_not_shown_to_onnxruntime():
    text = "g (float[4, 3] x) => (float[4, 5] y) { h = MatMul(x, w) y = BatchNormalization(h, s, b, m, v) }"
    ragged = model(text, {"w": weights(3, 5), **norm(5)}, opset=9)
    ragged.graph.node[1].output.extend([""] * 4)
    _, report = bnfold.onnx.fold(ragged)
    assert report.verified
    assert report.count("folded") == 1


@pytest.mark.parametrize(
    "norm_",
    [
        "r = LpPool<kernel_shape=[2, 2], p=3, strides=[2, 2], pads=[1, 0, 0, 1]>(h)",
        "r = GlobalLpPool<p=1>(h)",
        "r = ReduceL2(h, axes)",
        "r = ReduceL1<keepdims=0>(h, axes) ",
    ],
)
def test_a_scale_goes_up_through_a_norm_and_its_shift_stays(norm_):
    numbers = {**norm(4), "axes": np.array([2, 3]), "w": weights(4, 3, 3, 3)}
    numbers["s"] = np.abs(numbers["s"])
    rank = 2 if "keepdims=0" in norm_ else 4
    text = f"""g (float[2, 3, 6, 6] x) => (float[{", ".join("abcd"[:rank])}] y) {{ h = Conv(x, w) {norm_}
        y = BatchNormalization(r, s, b, m, v) }}"""
    used = {
        name: array for name, array in numbers.items() if name in ("w", "s", "b", "m", "v") or name in norm_
    }
    _, report = bnfold.onnx.fold(model(text, used, opset=18), runtime="any")
    assert [(v.outcome, v.into) for v in report.verdicts] == [("scale folded", ("h",))]
    assert report.verified


@pytest.mark.parametrize("shape", [(8, 0), (1,), (8, 1)])
def test_a_bias_that_is_no_vector_of_the_outputs_is_no_crash(shape):
    text = f"g (float[2, 3, 6, 6] x) => (float[2, 8, 4, 4] y) {{ h = Conv(x, w, c) {BN} }}"
    some = model(text, {"w": weights(8, 3, 3, 3), "c": np.ones(shape, np.float32), **norm(8)})
    with pytest.raises(InputError):
        bnfold.onnx.fold(some, verify=False, runtime="any")


def test_a_file_is_folded_for_onnxruntime_unless_it_is_said_where_it_will_run(tmp_path: Path) -> None:
    """An Add is slower there than a BatchNormalization, on images; on matrices it is not."""
    images = model(
        """net (float[N,3,6,6] x) => (float[N,4,6,6] y) {
            n = BatchNormalization(x, s, b, m, v)
            y = Conv<pads=[1,1,1,1]>(n, W)
        }""",
        {"W": weights(4, 3, 3, 3), **norm(3)},
    )
    rows = model(
        """net (float[N,4] x) => (float[N,4] y) {
            r = Gemm<transB=1>(x, W)
            q = Relu(r)
            n = BatchNormalization(q, s, b, m, v)
            y = Relu(n)
        }""",
        {"W": weights(4, 4), **(norm(4) | {"s": np.ones(4, np.float32)})},
    )
    for some, runtime, outcome in (
        (images, {}, "kept"),
        (images, {"runtime": "any"}, "scale folded"),
        (rows, {}, "scale folded"),
    ):
        assert bnfold.onnx.fold(some, **runtime)[1].verdicts[0].outcome == outcome
    source = write(tmp_path / "net.onnx", images)
    for arguments, halves in (([], 0), (["--for", "torch"], 1), (["--for", "torch", "--whole"], 0)):
        record = tmp_path / "report.json"
        assert main([str(source), "--json", str(record), *arguments]) == 0
        assert json.loads(record.read_text())["counts"]["scale folded"] == halves


@pytest.mark.parametrize("op", ["Max", "Min"])
@pytest.mark.parametrize("negative", [False, True])
def test_a_comparison_of_values_lets_through_what_grows(op, negative):
    text = f"""g (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y) {{
        c = Conv(x, w) a, d = Split<axis=1, num_outputs=2>(c) h = {op}(a, d, a) {BN} }}"""
    numbers = norm(4)
    numbers["s"] = np.abs(numbers["s"]) * (np.array([1, -1, 1, 1], np.float32) if negative else 1)
    some = model(text, {"w": weights(8, 3, 1, 1), **numbers}, opset=18)
    if negative:
        kept(some, "lets no negative scale through")
    else:
        assert count(fold(some, 1)[0]) == 0


def test_a_comparison_with_a_constant_keeps_what_is_around_it():
    text = f"g (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y) {{ c = Conv(x, w) h = Max(c, zero) {BN} }}"
    numbers = {"w": weights(4, 3, 1, 1), "zero": np.zeros((), np.float32), **norm(4)}
    kept(model(text, numbers, opset=18), "is not linear")


EINSUMS = [
    ("bi,io->bo", "N, 3", (3, 4), "N, 4", False),
    ("io,bi->bo", "N, 3", (3, 4), "N, 4", True),
    ("bi,oi", "N, 3", (4, 3), "N, 4", False),
    ("bci,oc->boi", "N, 3, 5", (4, 3), "N, 4, 5", False),
    ("b...i,io->bo...", "N, 5, 3", (3, 4), "N, 4, 5", False),
    ("bchw,co->bohw", "N, 3, 5, 6", (3, 4), "N, 4, 5, 6", False),
]


@pytest.mark.parametrize(("equation", "given", "shape", "made", "first"), EINSUMS)
def test_an_einsum_by_a_matrix_absorbs_from_both_sides_and_certifies(
    equation, given, shape, made, first, tmp_path, run_module
):
    axis = 2 if equation.startswith("b...i") else 1
    text = f"""g (float[{given}] x) => (float[{made}] y) {{
        {"t = Identity(x)" if axis == 1 else "t = Transpose<perm=[0, 2, 1]>(x)"}
        n = BatchNormalization(t, ns, nb, nm, nv)
        {"u = Identity(n)" if axis == 1 else "u = Transpose<perm=[0, 2, 1]>(n)"}
        h = Einsum<equation="{equation}">({"w, u" if first else "u, w"}) {BN} }}"""
    below = {f"n{name}": array for name, array in norm(3).items()}
    some = model(text, {"w": weights(*shape), **below, **norm(4)}, opset=18)
    folded, _ = fold(some, 2)
    assert count(folded) == 0
    onnx.save(some, tmp_path / "a.onnx")
    done = run_module("bnfold.fold", "a.onnx", "-o", "b.onnx", "--certificate", "c.json")
    assert done.returncode == 0, done.stderr
    checked = run_module("bnfold", "verify", "a.onnx", "b.onnx", "--certificate", "c.json")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("equation", "shape", "given"),
    [("nctv,vw->nctw", (5, 5), "N, 4, 6, 5"), ("nctv,vw->nwct", (5, 5), "N, 4, 6, 5"),
     ("kvw,nkctv->nctw", (2, 5, 5), "N, 2, 4, 6, 5")],
)  # fmt: skip
def test_a_scale_passes_an_einsum_along_another_axis(equation, shape, given):
    """Mixed positions let no shift through; what is left of the BatchNorm is one addition."""
    ranks = len(given.split(","))
    channel = ranks - 3
    back = {"nwct": "[0, 2, 3, 1]"}.get(equation[-4:], "[0, 1, 2, 3]")
    text = f"""g (float[{given}] x) => (float[N, 4, 6, 5] y) {{
        f = Transpose<perm={[a for a in range(ranks) if a != channel] + [channel]}>(x)
        g = MatMul(f, mat)
        c = Transpose<perm={[*range(channel), ranks - 1, *range(channel, ranks - 1)]}>(g)
        e = Einsum<equation="{equation}">({"c, w" if ranks == 4 else "w, c"})
        h = Transpose<perm={back}>(e) {BN} }}"""
    tensors = {"w": weights(*shape), "mat": weights(4, 4), **norm(4)}
    _, report = fold(model(text, tensors, opset=18), 0, 1)
    assert report.count("scale folded") == 1


def test_an_einsum_that_takes_a_diagonal_stays():
    text = f"""g (float[N, 4, 4] x) => (float[N, 4] y) {{ h = Einsum<equation="bii,io->bo">(x, w) {BN} }}"""
    kept(model(text, {"w": weights(4, 4), **norm(4)}, opset=18), "is not followed, though it is linear")


# ---------------------------------------------------------------- where rounding decides

TENTHS = (random(1).integers(-20, 20, (4, 3, 1, 1)) * np.float32(0.05)).astype(np.float32)
JUMPS = {
    "a weight of steps": "d = Div(q, tenth) r = Round(d) k = Mul(r, tenth) h = Conv(x, k)",
    "a weight of whole numbers": "d = Div(q, tenth) r = Cast<to=6>(d) k = Cast<to=1>(r) h = Conv(x, k)",
    "a factor": "c = Conv(x, q) d = Mul(ten, most) r = Floor(d) h = Mul(c, r)",
    "a size": """c = Conv(x, q) d = Mul(ten, most) r = Cast<to=7>(d) l = Expand(one, r) i = Size(l) f = Cast<to=1>(i)
        h = Mul(c, f)""",
    "a comparison": "d = Mul(ten, most) e = Less(d, seven) f = Cast<to=1>(e) p = Add(q, f) h = Conv(x, p)",
}


@pytest.mark.parametrize("number", JUMPS)
def test_a_constant_that_rounding_decides_is_what_the_model_computes_or_none(number):
    """In float32 `10 * 0.7` is 7, and in float64, of the same numbers, a little less."""
    tensors = {
        "q": TENTHS,
        "tenth": np.float32(0.1),
        "ten": np.float32([10]),
        "most": np.float32([0.7]),
        "seven": np.float32([7]),
        "one": np.float32([1]),
    }
    text = f"g (float[N, 3, 5, 5] x) => (float[N, 4, 5, 5] y) {{ {JUMPS[number]} {BN} }}"
    used = {name: array for name, array in tensors.items() if f"({name}," in text or f" {name})" in text}
    some = model(text, {**used, **norm(4)})
    folded, report = bnfold.onnx.fold(some, verify=False)
    feed = {"x": random(2).standard_normal((2, 3, 5, 5)).astype(np.float32)}
    np.testing.assert_allclose(run(folded, feed)["y"], run(some, feed)["y"], atol=1e-5)
    assert [verdict.outcome for verdict in report.verdicts] == ["kept"]


def test_a_constant_of_steps_that_no_rounding_moves_folds():
    text = f"""g (float[N, 3, 5, 5] x) => (float[N, 4, 5, 5] y) {{
        d = Div(q, half) r = Round(d) k = Mul(r, half) h = Conv(x, k) {BN} }}"""
    fold(model(text, {"q": weights(4, 3, 1, 1), "half": np.float32(0.5), **norm(4)}), 1)


@pytest.mark.parametrize("op", ["ReduceL1", "ReduceL2"])
@pytest.mark.parametrize("axes", ["", ", none"])
def test_a_norm_along_no_axis_is_the_size_of_each_number(op, axes):
    text = f"""g (float[N, 3, 5, 5] x) => (float[N, 4, 5, 5] y) {{
        c = Conv(x, w) h = {op}<noop_with_empty_axes=1>(c{axes}) {BN} }}"""
    none = {"none": np.zeros(0, np.int64)} if axes else {}
    some = model(text, {"w": weights(4, 3, 1, 1), **none, **norm(4)}, opset=18)
    folded, _ = bnfold.onnx.fold(some, verify=False)
    feed = {"x": random(2).standard_normal((2, 3, 5, 5)).astype(np.float32)}
    np.testing.assert_allclose(run(folded, feed)["y"], run(some, feed)["y"], atol=1e-5)


def block_in_a_function(own, of_model):
    """Conv and BatchNormalization in a function that imports one version, called by a model that imports another."""
    random = np.random.default_rng(0)
    body = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("BatchNormalization", ["h", "s", "b", "m", "v"], ["y"], name="bn"),
    ]
    given = ["x", "w", "s", "b", "m", "v"]
    function = helper.make_function("own", "Block", given, ["y"], body, [helper.make_opsetid("", own)])
    tensors = {name: random.uniform(0.5, 1.5, 4) for name in "sbmv"} | {"w": random.normal(size=(4, 3, 3, 3))}
    graph = helper.make_graph(
        [helper.make_node("Block", given, ["y"], domain="own")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()],
    )
    versions = [helper.make_opsetid("", of_model), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, functions=[function], opset_imports=versions, ir_version=9)


@pytest.mark.parametrize(("own", "of_model"), [(17, 17), (16, 17), (15, 21)])
def test_a_function_of_another_version_with_the_same_operators_folds(own, of_model):
    folded, report = bnfold.fold(block_in_a_function(own, of_model))
    assert [verdict.outcome for verdict in report.verdicts] == ["folded"]
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph.node)


def test_a_batchnorm_in_a_function_of_another_version_says_which_operator_differs():
    (verdict,) = bnfold.fold(block_in_a_function(13, 17))[1].verdicts
    assert (verdict.name, verdict.outcome) == ("Block.bn", "kept")
    assert "operator set 13" in verdict.reason
    assert "17, in which BatchNormalization is another" in verdict.reason


def test_a_function_of_a_version_that_nobody_knows_is_no_crash():
    with pytest.raises(InputError):
        bnfold.onnx.fold(block_in_a_function(2**40, 17), verify=False)
