"""What a fold rests on holds for every size that the file declares, not only for those that it was compared with.

Each graph is folded with verification off and judged in onnxruntime at several batch and image sizes.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest

import bnfold.onnx
from tests.onnx_models import model, norm, random, run, weights

OPEN, FIXED = "N, 3, H, W", "N, 3, 8, 8"
SIZES = [(1, 3, 8, 8), (2, 3, 7, 7), (1, 3, 9, 6)]
HALF = "sh = Shape(x) hw = Gather<axis=0>(sh, ax23)"
PAD = "q = Concat<axis=0>(z4, z2, p) h = Pad(k, q) y = Conv(h, w)"
NUMBERS = {
    "zero": np.array([0]),
    "one": np.array([1]),
    "two": np.array([2]),
    "eight": np.array([8]),
    "z2": np.zeros(2, np.int64),
    "z4": np.zeros(4, np.int64),
    "ones2": np.ones(2, np.int64),
    "ax23": np.array([2, 3]),
    "w": weights(4, 3, 3, 3),
    "u": weights(4, 3, 1, 1),
}


def graph(body, declared=OPEN, more="", **options):
    text = f"g (float[{declared}] x{more}) => (float[a, b, c, d] y) {{ k = BatchNormalization(x, s, b, m, v) {body} }}"
    used = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    numbers = {name: abs(array) if name == "s" else array for name, array in norm(3).items()}
    tensors = {name: array for name, array in {**NUMBERS, **numbers}.items() if name in used}
    return model(text, tensors, opset=18, **options)


def assert_holds(some, outcome, feeds):
    folded, report = bnfold.onnx.fold(some, verify=False, runtime="any")
    for feed in feeds:
        wanted = run(some, feed)
        for name, array in run(folded, feed).items():
            np.testing.assert_allclose(array, wanted[name], atol=1e-5, err_msg=str(feed["x"].shape))
    assert [verdict.outcome for verdict in report.verdicts] == [outcome], str(report)


def images(sizes=tuple(SIZES)):
    return [{"x": random(3).standard_normal(size).astype(np.float32)} for size in sizes]


AMOUNTS = {
    "what is left over by two": f"{HALF} p = Mod(hw, two) {PAD}",
    "on named axes": f"{HALF} p = Mod(hw, two) q = Concat<axis=0>(z2, p) h = Pad(k, q, , ax23) y = Conv(h, w)",
    "up to eight": f"{HALF} d = Sub(eight, hw) p = Max(d, zero) {PAD}",
    "unless it is eight": f"{HALF} c = Equal(hw, eight) p = Where(c, z2, ones2) {PAD}",
    "by the number of elements": f"n = Size(x) r = Mod(n, two) i = Reshape(r, one) p = Concat<axis=0>(i, zero) {PAD}",
}


@pytest.mark.parametrize("amount", AMOUNTS)
def test_a_pad_by_an_amount_that_is_computed_lets_only_the_scale_through(amount):
    assert_holds(graph(AMOUNTS[amount]), "scale folded", images())


def test_a_reflecting_pad_by_an_amount_that_is_computed_lets_everything_through():
    body = AMOUNTS["what is left over by two"].replace("Pad(", 'Pad<mode="reflect">(')
    assert_holds(graph(body), "folded", images())


@pytest.mark.parametrize("amount", ["what is left over by two", "up to eight", "unless it is eight"])
def test_a_pad_that_is_zero_at_every_size_that_is_declared_is_none(amount):
    assert_holds(graph(AMOUNTS[amount], FIXED), "folded", images(SIZES[:1]))


def test_a_crop_that_is_computed_is_not_taken_for_none():
    body = f"{HALF} p = Div(hw, two) q = Mul(p, two) h = Slice(k, z2, q, ax23) y = Conv(h, u)"
    assert_holds(graph(body), "kept", images())


WINDOWS = {
    'Conv<auto_pad="SAME_UPPER", strides=[2, 2]>(k, w)': "scale folded",
    'Conv<auto_pad="SAME_LOWER", strides=[3, 3]>(k, w)': "scale folded",
    'Conv<auto_pad="SAME_UPPER", strides=[2, 2]>(k, u)': "folded",
    'AveragePool<kernel_shape=[2, 2], auto_pad="SAME_UPPER", strides=[2, 2]>(k)': "folded",
    'AveragePool<kernel_shape=[2, 2], auto_pad="SAME_LOWER", count_include_pad=1, strides=[2, 2]>(k)': "scale folded",
    "AveragePool<kernel_shape=[2, 2], ceil_mode=1, strides=[2, 2]>(k)": "folded",
    "AveragePool<kernel_shape=[2, 2], ceil_mode=1, count_include_pad=1, strides=[2, 2]>(k)": "scale folded",
    "AveragePool<kernel_shape=[3, 3], ceil_mode=1, pads=[1, 1, 0, 0], strides=[2, 2]>(k)": "folded",
    "MaxPool<kernel_shape=[2, 2], ceil_mode=1, strides=[2, 2]>(k)": "folded",
    'MaxPool<kernel_shape=[2, 2], auto_pad="SAME_UPPER", strides=[2, 2]>(k)': "folded",
}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_that_reaches_over_the_border_at_some_sizes_only(window):
    assert_holds(
        graph(f"h = {window} y = Conv(h, u)" if "Pool" in window else f"y = {window}"),
        WINDOWS[window],
        images(),
    )


# ---------------------------------------------------------------- what the file says of its own sizes


STALE = f"r = Relu(x) sh = Shape(r) hw = Gather<axis=0>(sh, ax23) p = Mod(hw, two) {PAD}"


def test_sizes_that_an_exporter_left_behind_are_not_believed():
    some = graph(STALE)
    some.graph.value_info.append(
        onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, [1, 3, 8, 8])
    )
    assert_holds(some, "scale folded", images())


def test_the_sizes_of_an_output_are_not_believed_where_the_input_leaves_them_open():
    some = graph(STALE)
    some.graph.output.append(onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, [1, 3, 8, 8]))
    assert_holds(some, "scale folded", images())


def test_sizes_that_an_input_does_not_name_are_open():
    some = graph(STALE)
    for dim in some.graph.input[0].type.tensor_type.shape.dim:
        dim.ClearField("dim_param")
    some.graph.value_info.append(
        onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, [1, 3, 8, 8])
    )
    assert_holds(some, "scale folded", images())


def test_an_initializer_that_a_caller_may_override_has_the_sizes_that_the_input_declares():
    some = graph(f"sh = Shape(o) r = Sub(sh, eight) p = Concat<axis=0>(r, zero) {PAD}", more=", float[K] o")
    some.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(8, np.float32), "o"))
    feeds = [{**images()[0], "o": np.zeros(count, np.float32)} for count in (8, 9)]
    assert_holds(some, "scale folded", feeds)


def test_a_region_that_is_cut_out_of_the_channels_mixes_them():
    body = """h = Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize">(k, roi, scales)
        y = Conv(h, u)"""
    some = graph(body, FIXED)
    for name, array in {"roi": [0, 0.5, 0, 0, 1, 1, 1, 1], "scales": [1, 1, 1, 1]}.items():
        some.graph.initializer.append(onnx.numpy_helper.from_array(np.array(array, np.float32), name))
    assert bnfold.onnx.read(some).graph["h"].attributes["axes"] == (1,)


def test_sizes_that_a_resize_keeps_in_proportion_are_not_those_that_it_is_given():
    some = graph('h = Resize<keep_aspect_ratio_policy="not_larger">(k, , , to) y = Conv(h, u)')
    some.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 3, 8, 4]), "to"))
    assert bnfold.onnx.read(some).graph.shapes["h"][2:] != (8, 4)


def test_an_input_that_declares_a_size_of_0_is_made_up_with_it():
    """A cache that is empty at first."""
    text = """g (float[1, 3, 0] past, float[1, 3, 8] x) => (float[1, 4, 6] y) {
        c = Concat<axis=2>(past, x)
        h = Conv(c, w)
        y = BatchNormalization(h, s, b, m, v)
    }"""
    _, report = bnfold.onnx.fold(model(text, {"w": weights(4, 3, 3), **norm(4)}))
    assert report.verified
    assert [item.question for item in report.evidence] == ["float64", "float32"]


def test_outputs_without_numbers_verify_nothing():
    text = """g (float[0, 3] x) => (float[0, 4] y) {
        h = MatMul(x, w)
        y = BatchNormalization(h, s, b, m, v)
    }"""
    _, report = bnfold.onnx.fold(model(text, {"w": weights(3, 4), **norm(4)}))
    assert [verdict.outcome for verdict in report.verdicts] == ["folded"]
    assert not report.verified
    assert any("the outputs hold no numbers" in note for note in report.notes)


# ---------------------------------------------------------------- an axis less where a size is one


def squeezed(body, declared="N, 3, H, W", op=17):
    """A model with a Squeeze that takes away whatever is one long."""
    text = f"g (float[{declared}] x) => (float y) {{ {body} }}"
    used = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    tensors = {
        "u": weights(4, 3, 1, 1),
        "w": weights(3, 4),
        "t": weights(4, 2),
        "ax3": np.array([3]),
        **norm(4),
    }
    some = model(text, {name: array for name, array in tensors.items() if name in used}, opset=op)
    some.graph.output[0].type.tensor_type.ClearField("shape")
    return some


CONV = "c = Conv(x, u) d = Squeeze(c) y = BatchNormalization(d, s, b, m, v)"


@pytest.mark.parametrize("op", [11, 17])
@pytest.mark.parametrize("is_declared", [False, True])
def test_a_batchnorm_may_find_its_channels_on_another_axis_behind_a_squeeze_of_open_sizes(op, is_declared):
    some = squeezed(CONV, op=op)
    if is_declared:
        told = onnx.helper.make_tensor_value_info("d", onnx.TensorProto.FLOAT, ["N", 4, "H", "W"])
        some.graph.value_info.append(told)
    assert_holds(some, "kept", images([(2, 3, 4, 8), (1, 3, 4, 8)]))


def test_what_is_behind_a_squeeze_of_open_sizes_has_no_axes_that_are_known():
    body = (
        "c = MatMul(x, w) d = Squeeze(c) e = ReduceMean<axes=[1], keepdims=0>(d) f = Mul(e, s) y = Add(f, b)"
    )
    some = squeezed(body, "N, M, 1, 3")
    folded, _ = bnfold.onnx.fold(some, verify=False, runtime="any")
    for feed in images([(2, 4, 1, 3), (1, 4, 1, 3)]):
        np.testing.assert_allclose(run(folded, feed)["y"], run(some, feed)["y"], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "declared", "size"),
    [
        (CONV, "2, 3, 1, 8", (2, 3, 1, 8)),
        (CONV.replace("Squeeze(c)", "Squeeze(c, ax3)"), "N, 3, H, 1", (2, 3, 5, 1)),
        ("d = Squeeze(x) g = Gemm(d, w) y = BatchNormalization(g, s, b, m, v)", "N, 3, 1, 1", (2, 3, 1, 1)),
        (f"p = MaxPool<kernel_shape=[1, 1]>(x) {CONV.replace('x,', 'p,')}", "N, 3, 1, 1", (2, 3, 1, 1)),
        (
            "c = Conv(x, u) n = BatchNormalization(c, s, b, m, v) d = Squeeze(n) y = Gemm(d, t)",
            "N, 3, 1, 1",
            (2, 3, 1, 1),
        ),
    ],
    ids=["fixed", "named", "a matrix of rank two", "a BatchNorm of rank two", "on the way to a matrix"],
)
def test_a_squeeze_behind_which_the_axes_are_known_is_passed(body, declared, size):
    assert_holds(squeezed(body, declared), "folded", images([size]))


# ---------------------------------------------------------------- numbers that depend on a size at some sizes only


NORM = "y = BatchNormalization(a, s, b, m, v)"
SIZE = "sh = Shape(x) n = Gather<axis=0>(sh, zero) h = Gather<axis=0>(sh, two)"
BENT = {
    "how much is missing to eight": "d = Sub(eight, h) i = Max(d, zero)",
    "eight at most": "i = Min(h, eight)",
    "whether there is one example": "q = Equal(n, one) i = Cast<to=7>(q)",
    "two below eight, else one": "q = Less(h, eight) i = Where(q, two, one)",
    "how often five hundred and twelve fit": "p = Mul(eight, eight) r = Mul(p, eight) i = Div(h, r)",
    "an element of a list": "l = Concat<axis=0>(zero, two, one) p = Min(h, two) i = Gather<axis=0>(l, p)",
    "what is left above a maximum": "p = Mul(two, eight) r = Max(h, p) i = Sub(r, h)",
}


def with_numbers(some):
    """A model with the small numbers that its nodes read."""
    extra = {
        **NUMBERS,
        "three": np.array([3]),
        "four": np.array([4]),
        "minus": np.array([-1]),
        "row": weights(8),
        "square": weights(8, 8),
    }
    extra["tall"] = weights(16, 3)
    missing = {name for node in some.graph.node for name in node.input} & extra.keys()
    for name in sorted(missing - {tensor.name for tensor in some.graph.initializer}):
        some.graph.initializer.append(onnx.numpy_helper.from_array(extra[name], name))
    return some


AT_MOST = "p = Min(h, eight)"
BENT.update(
    {
        "the size of a constant": f"{AT_MOST} q = ConstantOfShape(p) i = Size(q)",
        "the shape of what is made of one": f"{AT_MOST} q = ConstantOfShape(p) r = Neg(q) i = Shape(r)",
        "the size of copies": f"{AT_MOST} q = Expand(one, p) r = Tile(q, p) i = Size(r)",
        "the size of a reshaped constant": f"{AT_MOST} q = ConstantOfShape(p) r = Reshape(q, p) i = Size(r)",
        "a range": f"{AT_MOST} k = Squeeze(zero) l = Squeeze(p) q = Squeeze(one) r = Range(k, l, q) i = Size(r)",
    }
)


@pytest.mark.parametrize("use", ["Add", "Mul"])
@pytest.mark.parametrize("number", BENT)
def test_a_number_that_depends_on_a_size_by_a_comparison_is_no_constant(number, use):
    body = f"""{SIZE} {BENT[number]} f = Cast<to=1>(i) c = Conv(x, u) a = {use}(c, f) {NORM}"""
    some = with_numbers(squeezed(body))
    folded, _ = bnfold.onnx.fold(some, verify=False, runtime="any")
    for feed in images([(2, 3, 9, 9), (1, 3, 9, 9), (2, 3, 3, 5), (2, 3, 1, 1), (2, 3, 600, 1)]):
        np.testing.assert_allclose(run(folded, feed)["y"], run(some, feed)["y"], atol=1e-5)


def test_a_number_is_a_constant_whatever_stands_beside_it_in_a_comparison():
    """What an exporter writes of `expand(-1, 4, -1, -1)`: `Where(Equal(shape, -1), 1, shape)`."""
    body = f"""{SIZE} k = Concat<axis=0>(n, eight, h) e = Equal(k, one) r = Where(e, two, k) i = Gather<axis=0>(r, one)
        f = Cast<to=1>(i) c = Conv(x, u) a = Add(c, f) {NORM}"""
    assert_holds(with_numbers(squeezed(body)), "folded", images([(2, 3, 9, 9), (1, 3, 1, 8)]))


PIECE = "c = Conv(x, u) p = Slice(c, zero, eight, three)"
SHORTER = {
    "its size": f"{PIECE} z = Shape(p) n = Gather<axis=0>(z, three) f = Cast<to=1>(n) a = Add(c, f) {NORM}",
    "what is added to it": f"{PIECE} a = Add(p, row) y = MatMul(a, square)",
}


@pytest.mark.parametrize("piece", SHORTER)
def test_a_slice_of_an_open_size_may_leave_less_than_it_asks_for(piece):
    some = with_numbers(squeezed(SHORTER[piece]))
    folded, _ = bnfold.onnx.fold(some, verify=False, runtime="any")
    sizes = [(2, 3, 5, 9), (2, 3, 5, 1)] if "MatMul" in SHORTER[piece] else [(2, 3, 5, 9), (2, 3, 5, 4)]
    for feed in images(sizes):
        np.testing.assert_allclose(run(folded, feed)["y"], run(some, feed)["y"], atol=1e-5)


def test_a_slice_leaves_what_it_asks_for_where_a_reader_runs_with_no_other_size():
    body = (
        "p = Slice(x, zero, four, one) k = BatchNormalization(p, s, b, m, v) f = Flatten(k) y = Gemm(f, tall)"
    )
    feeds = images([(2, 4, 2, 2), (1, 5, 2, 2)])
    assert_holds(with_numbers(squeezed(body, "N, C, 2, 2")), "folded", feeds)


# ---------------------------------------------------------------- what bodies say of their own sizes

SEEN = "sh = Shape({}) n = Gather<axis=0>(sh, two) f = Cast<to=1>(n)"
BODIES = {
    "a value of a branch": f"""y = If(q)<then_branch = t () => (float[N, 4, H, W] o) <float[1, 4, 8, 8] c>
        {{ c = Conv(x, u) {SEEN.format("c")} a = Mul(c, f) o = BatchNormalization(a, s, b, m, v) }},
        else_branch = e () => (float[N, 4, H, W] o2) {{ o2 = Conv(x, u) }}>""",
    "what a loop carries": f"""c = Conv(x, u) y = Loop(turns, q, c)<body = o (int64 i, bool on, float[1, 4, 8, 8] l)
        => (bool on2, float[1, 4, 8, 8] l2) {{ on2 = Identity(on) {SEEN.format("l")} h = Conv(l, u4) a = Mul(h, f)
        l2 = BatchNormalization(a, s, b, m, v) }}>""",
    "what a scan carries": f"""c = Conv(x, u) y, z = Scan<num_scan_inputs=1, body = o (float[1, 4, 8, 8] l, int64 i)
        => (float[A, 4, C, D] l2, int64 i2) {{ i2 = Identity(i) {SEEN.format("l")} h = Conv(l, u4) a = Mul(h, f)
        l2 = BatchNormalization(a, s, b, m, v) }}>(c, ax23)""",
}


@pytest.mark.parametrize("size", [(1, 3, 8, 8), (2, 3, 5, 4)])
@pytest.mark.parametrize("body", BODIES)
def test_sizes_that_an_exporter_left_behind_in_a_body_are_not_believed(body, size):
    """The reference implementation runs all of them at other sizes, onnxruntime the loop."""
    numbers = {"u": weights(4, 3, 1, 1), "u4": weights(4, 4, 1, 1), "turns": np.array(2), **norm(4)}
    tensors = {**numbers, "two": NUMBERS["two"], "ax23": NUMBERS["ax23"]}
    some = model(f"g (float[N, 3, H, W] x, bool q) => (float[A, B, C, D] y) {{ {BODIES[body]} }}", tensors)
    folded, report = bnfold.onnx.fold(some, verify=False, runtime="any")
    feed = {"x": random(3).standard_normal(size).astype(np.float32), "q": np.array(True)}
    wanted, found = (onnx.reference.ReferenceEvaluator(each).run(["y"], feed)[0] for each in (some, folded))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert [verdict.outcome for verdict in report.verdicts] == ["scale folded"]


RESHAPES = {
    "two examples at least": ("q = Max(n, two) p = Concat<axis=0>(q, four, minus)", "kept"),
    "as many rows as make up for eight columns": (
        "q = Max(w, eight) p = Concat<axis=0>(minus, four, h, q)",
        "kept",
    ),
    "rows and columns that make up for each other": (
        "q = Max(h, two) p = Concat<axis=0>(n, four, q, minus)",
        "folded",
    ),
}


@pytest.mark.parametrize("sizes", RESHAPES)
def test_a_reshape_by_a_bent_number_moves_the_channels_where_that_is_another(sizes):
    vector, outcome = RESHAPES[sizes]
    body = f"""{SIZE} w = Gather<axis=0>(sh, three) {vector} c = Conv(x, u) a = Reshape(c, p) {NORM}"""
    some = with_numbers(squeezed(body.replace("(w,", "(wide,").replace(" w =", " wide =")))
    assert_holds(some, outcome, images([(4, 3, 8, 8), (2, 3, 2, 8), (1, 3, 4, 8), (2, 3, 2, 4)]))


# ---------------------------------------------------------------- one position of an open length

ONE_POSITION = {
    "alone": ("y = BatchNormalization(one, s, b, m, v)", "folded"),
    "beside another": (
        "n = BatchNormalization(one, s, b, m, v) two = Gather<axis=1>(h, i) y = Sub(n, two)",
        "kept",
    ),
    "beside all": (
        "n = BatchNormalization(one, s, b, m, v) r = ReduceMax<keepdims=0>(h, i1) y = Sub(n, r)",
        "kept",
    ),
}


@pytest.mark.parametrize("beside", ONE_POSITION)
@pytest.mark.parametrize("last", [0, -1])
def test_one_position_of_an_open_length_folds_unless_others_are_wanted_as_they_are(beside, last):
    body, outcome = ONE_POSITION[beside]
    text = f"""g (float[N, T, 5] x) => (float[N, 4] y) {{ h = MatMul(x, w) one = Gather<axis=1>(h, at) {body} }}"""
    numbers = {"w": weights(5, 4), "at": np.array(last), "i": np.array(0), "i1": np.array([1])}
    used = {name: array for name, array in numbers.items() if f"{name})" in text or f"{name}," in text}
    some = model(text, {**used, **norm(4)}, opset=18)
    feeds = [random(3).standard_normal(size).astype(np.float32) for size in [(2, 6, 5), (1, 1, 5), (3, 4, 5)]]
    assert_holds(some, outcome, [{"x": feed} for feed in feeds])
