"""Graphs that were built to mislead the ONNX reader, each of another kind, with the outcome that algebra gives."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import bnfold.onnx
from tests.onnx_models import count, fold, kept, model, norm, weights

BN = "y = BatchNormalization(h, s, b, m, v)"
CONV = "g (float[N, 3, 8, 8] x) => (float[N, 4, p, q] y) {"


def positive(channels):
    return {name: abs(array) if name == "s" else array for name, array in norm(channels).items()}


def conv(channels=4):
    return {"w": weights(channels, 3, 3, 3), "c": weights(channels)}


# ---------------------------------------------------------------- what is declared is not what is computed


def test_a_declared_rank_that_is_wrong_misleads_nobody():
    text = f"g (float[N, 4, 5] x) => (float[N, 4, 4] y) {{ h = MatMul(x, w) {BN} }}"
    some = model(text, {"w": weights(5, 4), **norm(4)})
    some.graph.value_info.append(onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["N", 4]))
    assert "varies along axis 1" in bnfold.onnx.fold(some)[1].verdicts[0].reason


def test_declared_sizes_that_are_wrong_mislead_nobody():
    text = f"g (float[N, 2, 6] x) => (float[M, 4] y) {{ k = MatMul(x, w) h = Reshape(k, shape) {BN} }}"
    some = model(text, {"w": weights(6, 2), "shape": np.array([-1, 4]), **norm(4)})
    some.graph.value_info.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, ["N", 4]))
    assert bnfold.onnx.fold(some)[1].count("kept") == 1


# ---------------------------------------------------------------- constants that are worked out


DISGUISES = {
    "rounded": "d = Div(u, step) r = Round(d) k = Clip(r, low, high) w = Mul(k, step)",
    "cut off": "i = Cast<to=6>(u) w = Cast<to=1>(i)",
    "put together": "a, z = Split<axis=0>(u) k = Concat<axis=0>(z, a) w = Reshape(k, shape)",
    "normalised": "n = ReduceL2<axes=[1, 2, 3]>(u) w = Div(u, n)",
    "scattered": "w = ScatterND(u, where, value)",
    "masked": "k = Less(u, low) w = Where(k, high, u)",
    "by the number of channels": "n = Shape(x) k = Gather(n, one) f = Cast<to=1>(k) w = Mul(u, f)",
    "triangular": "w = Trilu<upper=0>(u)",
}


@pytest.mark.parametrize("way", DISGUISES)
def test_a_weight_that_is_worked_out(way):
    tensors = {
        "u": weights(4, 3, 3, 3) * 3,
        "step": np.float32(0.25),
        "low": np.float32(-1),
        "high": np.float32(1.5),
        "shape": np.array([4, 3, 3, 3]),
        "where": np.zeros((1, 4), np.int64),
        "value": np.array([5.0], np.float32),
        "one": np.array([1]),
    }
    folded, _ = fold(model(f"{CONV} {DISGUISES[way]} h = Conv(x, w) {BN} }}", {**tensors, **norm(4)}), 1)
    assert count(folded) == 0


def test_a_weight_that_goes_with_the_batch_is_no_constant():
    text = f"{CONV} n = Shape(x) k = Gather(n, zero) f = Cast<to=1>(k) w = Mul(u, f) h = Conv(x, w) {BN} }}"
    kept(model(text, {"u": weights(4, 3, 3, 3), "zero": np.array([0]), **norm(4)}), "computed by")


def test_a_factor_that_goes_with_the_batch_lets_the_scale_through():
    text = (
        f"{CONV} k = Conv(x, w, c) n = Shape(x) i = Gather(n, zero) f = Cast<to=1>(i) h = Mul(k, f) {BN} }}"
    )
    _, report = fold(model(text, {**conv(), "zero": np.array([0]), **norm(4)}), 0, 1)
    assert report.count("scale folded") == 1


# ---------------------------------------------------------------- operators in their odd forms


WHOLE = {
    "split in unequal parts": ("k = Conv(x, w, c) l, h = Split<axis=1, num_outputs=2>(k)", 7, 3, 18),
    "slice backwards": ("k = Conv(x, w, c) h = Slice(k, last, far, axis, back)", 4, 4, 17),
    "gather from the end": ("k = Conv(x, w, c) h = Gather<axis=1>(k, order)", 4, 4, 17),
    "depth to space, columns first": (
        'k = Conv(x, w, c) h = DepthToSpace<blocksize=2, mode="CRD">(k)',
        8,
        2,
        17,
    ),
    "depth to space, blocks first": ("k = Conv(x, w, c) h = DepthToSpace<blocksize=2>(k)", 8, 2, 17),
    "channel shuffle": (
        "k = Conv(x, w, c) i = Reshape(k, five) j = Transpose<perm=[0, 2, 1, 3, 4]>(i) h = Reshape(j, four)",
        4,
        4,
        17,
    ),
    "mean over given axes": ("k = Conv(x, w, c) h = ReduceMean<keepdims=0>(k, both)", 4, 4, 18),
    "mean over none": ("k = Conv(x, w, c) h = ReduceMean<noop_with_empty_axes=1>(k)", 4, 4, 18),
    "resize, antialiased": (
        'k = Conv(x, w, c) h = Resize<mode="linear", axes=[3], antialias=1>(k, , , size)',
        4,
        4,
        18,
    ),
    "upsample of operator set 9": ("k = Conv(x, w, c) h = Upsample(k, twice)", 4, 4, 9),
    "squeeze of operator set 9": (
        "k = Conv(x, w, c) l = GlobalAveragePool(k) h = Squeeze<axes=[2, 3]>(l)",
        4,
        4,
        9,
    ),
    "slice of operator set 9": (
        "k = Conv(x, w, c) h = Slice<axes=[1], starts=[-4], ends=[9999]>(k)",
        6,
        4,
        9,
    ),
    "the sum of a thing and its like": ("k = Conv(x, w, c) l = Conv(x, w) h = Add(k, l)", 4, 4, 17),
}


@pytest.mark.parametrize("form", WHOLE)
def test_what_lets_everything_through(form):
    body, channels, left, opset = WHOLE[form]
    tensors = {
        "last": np.array([-1]),
        "far": np.array([-(2**31)]),
        "axis": np.array([1]),
        "back": np.array([-1]),
        "order": np.array([3, -3, 0, -2]),
        "five": np.array([0, 2, 2, 6, 6]),
        "four": np.array([0, 4, 6, 6]),
        "both": np.array([-1, -2]),
        "size": np.array([4]),
        "twice": np.array([1, 1, 2, 2], np.float32),
    }
    used = {
        name: array
        for name, array in tensors.items()
        if name in body.replace(",", " ").replace(")", " ").split()
    }
    text = f"g (float[N, 3, 8, 8] x) => (float y) {{ {body} {BN} }}"
    some = model(text, {**conv(channels), **norm(left), **used}, opset=opset)
    some.graph.output[0].type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto())
    rank = 2 if "squeeze" in form or form == "mean over given axes" else 4
    for _ in range(rank):
        some.graph.output[0].type.tensor_type.shape.dim.add()
    fold(some, 1)


STAYS = {
    "tiled channels": ("k = Conv(x, w, c) h = Tile(k, repeats)", 2),
    "indices given away": ("k = Conv(x, w, c) h, i = MaxPool<kernel_shape=[2, 2]>(k)", 4),
    "the larger of two": ("k = Conv(x, w, c) l = Conv(x, w) h = Max(k, l)", 4),
    "a mask given away": ("k = Conv(x, w, c) h, i = Dropout(k)", 4),
    "a spelt-out normalisation": (
        "k = Conv(x, w, c) a = ReduceMean<axes=[2, 3]>(k) d = Sub(k, a) e = Mul(d, d) f = ReduceMean<axes=[2, 3]>(e) "
        "r = Sqrt(f) h = Div(d, r)",
        4,
    ),
    "channels resized": ('k = Conv(x, w, c) h = Resize<mode="nearest">(k, , scales)', 2),
}


@pytest.mark.parametrize("kind", STAYS)
def test_what_lets_nothing_through(kind):
    body, channels = STAYS[kind]
    tensors = {
        "repeats": np.array([1, 2, 1, 1]),
        "scales": np.array([1, 2, 1, 1], np.float32),
    }
    used = {name: array for name, array in tensors.items() if name in body.replace(")", " ").split()}
    scales = positive(4) if kind == "indices given away" else norm(4)
    kept(model(f"{CONV} {body} {BN} }}", {**conv(channels), **scales, **used}), "not into what comes before")


@pytest.mark.parametrize(("pads", "size", "gone"), [("SAME_UPPER", 3, 1), ("SAME_LOWER", 2, 0)])
def test_a_kernel_beside_a_batchnorm_has_a_centre_or_none(pads, size, gone):
    text = f"""g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) {{
        k = Conv<auto_pad="{pads}">(x, w) h = BatchNormalization(x, s, b, m, v) y = Add(k, h) }}"""
    some = model(text, {"w": weights(4, 4, size, size), **norm(4)})
    fold(some, gone, 1 - gone, merge=False)
    fold(some, 1)


def test_a_slope_that_is_computed_lets_nothing_through():
    text = """g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
        h = BatchNormalization(x, s, b, m, v) k = Sigmoid(x) l = PRelu(h, k) y = Conv(l, w) }"""
    kept(model(text, {"w": weights(4, 3, 1, 1), **positive(3)}), "PRelu")


def test_a_spelt_out_batchnorm_with_channels_last():
    text = f"""{CONV} k = Conv(x, w, c) l = Transpose<perm=[0, 2, 3, 1]>(k) d = Sub(l, m) e = Mul(d, s) f = Add(e, b)
        y = Transpose<perm=[0, 3, 1, 2]>(f) }}"""
    numbers = {name: array for name, array in norm(4).items() if name != "v"}
    folded, _ = fold(model(text, {**conv(), **numbers}), 1)
    assert [node.op_type for node in folded.graph.node] == ["Conv", "Transpose", "Transpose"]


# ---------------------------------------------------------------- bodies


def loop(body, state, carried="x"):
    """A model that runs some nodes three times over a value."""
    some = model(
        "g (float[2, 4, 8, 8] x) => (float[2, 4, 8, 8] y) { k = Conv(x, w, c) }",
        {"w": weights(4, 4, 1, 1), "c": weights(4), "three": np.int64(3), **norm(4)},
    )
    value = onnx.helper.make_tensor_value_info
    inner = onnx.helper.make_graph(
        [*body, onnx.helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [value("i", 7, []), value("go", 9, []), value("z", 1, [2, 4, 8, 8])],
        [value("on", 9, []), value(state, 1, [2, 4, 8, 8])],
    )
    some.graph.node.append(onnx.helper.make_node("Loop", ["three", "", carried], ["y"], "loop", body=inner))
    return some


def batchnorm(source, result):
    return onnx.helper.make_node("BatchNormalization", [source, "s", "b", "m", "v"], [result], "bn")


def test_a_loop_that_normalises_what_it_carries_keeps_it():
    folded, _ = fold(loop([batchnorm("z", "n")], "n", carried="k"), 0, 1)
    assert count(folded) == 1


def test_a_loop_that_normalises_what_was_made_before_it():
    add = onnx.helper.make_node("Add", ["n", "z"], ["t"])
    fold(loop([batchnorm("k", "n"), add], "t"), 1)


def test_a_function_that_is_given_its_epsilon():
    rest = """<domain: "my", opset_import: ["": 17]> block <eps> (x, w, c, s, b, m, v) => (y) {
        h = Conv(x, w, c) y = BatchNormalization<epsilon: float = @eps>(h, s, b, m, v) }"""
    text = f"{CONV} y = my.block<eps = 0.5>(x, w, c, s, b, m, v) }}"
    fold(model(text, {**conv(), **norm(4)}, extra=', "my": 1', rest=rest), 1)
