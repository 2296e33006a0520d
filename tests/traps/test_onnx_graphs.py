"""Sharing, bodies, constants in disguise, names and files."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest

import bnfold.onnx
from bnfold.errors import InputError, NotEquivalent
from tests.onnx_models import count, fold, kept, model, norm, run, weights

BN = "y = BatchNormalization(h, s, b, m, v)"


def initializers(folded):
    return {t.name: onnx.numpy_helper.to_array(t) for t in folded.graph.initializer}


# ---------------------------------------------------------------- sharing


def test_a_producer_with_a_second_reader_stays():
    text = f"g (float[4, 3] x) => (float[4, 5] y, float[4, 5] z) {{ h = Gemm(x, w) {BN} z = Relu(h) }}"
    kept(model(text, {"w": weights(3, 5), **norm(5)}), "also read by")


def test_a_producer_that_is_an_output_stays():
    text = f"g (float[4, 3] x) => (float[4, 5] y, float[4, 5] h) {{ h = Gemm(x, w) {BN} }}"
    kept(model(text, {"w": weights(3, 5), **norm(5)}), "output of the model")


def test_a_batchnorm_between_input_and_output_stays():
    kept(
        model("g (float[4, 3] x) => (float[4, 3] y) { y = BatchNormalization(x, s, b, m, v) }", norm(3)),
        "input of",
    )


def test_a_shared_weight_under_two_batchnorms_becomes_two():
    text = """g (float[4, 3] x) => (float[4, 5] y, float[4, 5] z) {
        h = Gemm(x, w) y = BatchNormalization(h, s, b, m, v)
        r = Relu(x) k = Gemm(r, w) z = BatchNormalization(k, qs, qb, qm, qv) }"""
    folded, _ = fold(model(text, {"w": weights(3, 5), **norm(5), **norm(5, "q", seed=9)}), 2)
    assert "w" not in initializers(folded)
    assert sum(a.shape == (3, 5) for a in initializers(folded).values()) == 2


def test_a_shared_weight_and_batchnorm_stay_shared():
    text = """g (float[4, 3] x) => (float[4, 5] y, float[4, 5] z) {
        h = Gemm(x, w) y = BatchNormalization(h, s, b, m, v)
        r = Relu(x) k = Gemm(r, w) z = BatchNormalization(k, s, b, m, v) }"""
    folded, _ = fold(model(text, {"w": weights(3, 5), **norm(5)}), 2)
    assert len(initializers(folded)) == 2


def test_a_weight_that_somebody_else_reads_stays_for_them():
    text = f"g (float[4, 3] x) => (float[4, 5] y, float[4, 5] z) {{ h = Gemm(x, w) {BN} r = Relu(x) z = MatMul(r, w) }}"
    folded, _ = fold(model(text, {"w": weights(3, 5), **norm(5)}), 1)
    np.testing.assert_array_equal(initializers(folded)["w"], weights(3, 5))


def test_a_bias_shared_by_two_nodes():
    text = """g (float[4, 3] x) => (float[4, 5] y, float[4, 5] z) {
        h = Gemm(x, w, c) y = BatchNormalization(h, s, b, m, v) z = Gemm(x, u, c) }"""
    folded, _ = fold(
        model(text, {"w": weights(3, 5), "u": weights(3, 5, seed=4), "c": weights(5), **norm(5)}), 1
    )
    np.testing.assert_array_equal(initializers(folded)["c"], weights(5))


def test_an_embedding_that_is_also_the_output_layer():
    text = """g (int64[4] i) => (float[4, 9] y) {
        e = Gather(table, i) n = BatchNormalization(e, s, b, m, v) r = Relu(n) y = Gemm<transB=1>(r, table) }"""
    folded, _ = fold(model(text, {"table": weights(9, 5), **norm(5)}), 1)
    np.testing.assert_array_equal(initializers(folded)["table"], weights(9, 5))
    assert "table.folded" in initializers(folded)


def test_both_weight_and_statistics_may_be_one_tensor():
    text = "g (float[4, 3] x) => (float[4, 5] y) { h = Gemm(x, w, s) y = BatchNormalization(h, s, s, s, v) }"
    fold(model(text, {"w": weights(3, 5), "s": norm(5)["s"], "v": norm(5)["v"]}), 1)


# ---------------------------------------------------------------- overridable initializers


def overridable(ir):
    text = f"g (float[4, 3] x, float[3, 5] w) => (float[4, 5] y) {{ h = Gemm(x, w) {BN} }}"
    return model(text, {"w": weights(3, 5), **norm(5)}, ir=ir)


def test_an_overridable_initializer_is_no_constant():
    report = kept(
        overridable(8), "--freeze-initializers", inputs={"x": weights(4, 3), "w": weights(3, 5, seed=5)}
    )
    assert "`w`" in report.verdicts[0].reason


def test_a_frozen_initializer_is_a_constant_and_no_input_any_more():
    some = overridable(8)
    folded, report = bnfold.onnx.fold(some, freeze_initializers=True)
    assert report.count("folded") == 1
    assert [i.name for i in folded.graph.input] == ["x"]
    feed = {"x": weights(4, 3)}
    np.testing.assert_allclose(run(folded, feed)["y"], run(some, feed)["y"], atol=1e-5)


def test_an_overridable_statistic_is_no_constant():
    text = f"g (float[4, 3] x, float[5] m) => (float[4, 5] y) {{ h = Gemm(x, w) {BN} }}"
    kept(
        model(text, {"w": weights(3, 5), **norm(5)}), "mean `m`", inputs={"x": weights(4, 3), "m": weights(5)}
    )


def test_ir_version_3_lists_every_initializer_and_says_so():
    text = f"""g (float[4, 3] x, float[3, 5] w, float[5] c, float[5] s, float[5] b, float[5] m, float[5] v)
        => (float[4, 5] y) {{ h = Gemm(x, w, c) {BN} }}"""
    some = model(text, {"w": weights(3, 5), "c": weights(5), **norm(5)}, opset=8, ir=3)
    folded, report = bnfold.onnx.fold(some)
    onnx.checker.check_model(folded, full_check=True)
    assert report.count("folded") == 1
    assert "IR version 3" in report.notes[0]
    assert {i.name for i in folded.graph.input} == {"x", "w.folded", "c.folded"}
    np.testing.assert_allclose(
        run(folded, {"x": weights(4, 3)})["y"], run(some, {"x": weights(4, 3)})["y"], atol=1e-5
    )


# ---------------------------------------------------------------- bodies


def test_a_value_that_a_body_reads_is_read():
    text = f"""g (float[4, 3] x, bool c) => (float[4, 5] y, float[4, 5] z) {{
        h = Gemm(x, w) {BN}
        z = If (c) <then_branch = t () => (float[4, 5] a) {{ a = Relu(h) }},
                    else_branch = e () => (float[4, 5] o) {{ o = Neg(h) }}> }}"""
    kept(model(text, {"w": weights(3, 5), **norm(5)}), "also read by")


def test_a_batchnorm_in_a_body_may_be_fed_from_outside():
    """The convolution is read in one branch only, so it can have the numbers of that branch."""
    text = """g (float[4, 3] x, bool c) => (float[4, 5] z) {
        h = Gemm(x, w) k = Gemm(x, w)
        z = If (c) <then_branch = t () => (float[4, 5] a) { n = BatchNormalization(h, s, b, m, v) a = Relu(n) },
                    else_branch = e () => (float[4, 5] a2) { a2 = Neg(k) }> }"""
    folded, _ = fold(model(text, {"w": weights(3, 5), **norm(5)}), 1)
    assert count(folded) == 0


def test_both_branches_may_use_one_name_and_read_one_value():
    text = """g (float[4, 3] x, bool c) => (float[4, 5] z) {
        h = Gemm(x, w)
        z = If (c) <then_branch = t () => (float[4, 5] a) { a = BatchNormalization(h, s, b, m, v) },
                    else_branch = e () => (float[4, 5] o) { n = Gemm(x, w) o = BatchNormalization(n, s, b, m, v) }> }"""
    some = model(text, {"w": weights(3, 5), **norm(5)})
    some.graph.node[1].attribute[1].g.node[1].output[0] = "a"
    some.graph.node[1].attribute[1].g.output[0].name = "a"
    fold(some, 2)


def test_a_batchnorm_that_returns_from_a_body_what_is_made_outside():
    text = """g (float[4, 3] x, bool c) => (float[4, 5] z) {
        h = Gemm(x, w)
        z = If (c) <then_branch = t () => (float[4, 5] a) { a = BatchNormalization(h, s, b, m, v) },
                    else_branch = e () => (float[4, 5] o) { o = Gemm(x, w) }> }"""
    folded, _ = fold(model(text, {"w": weights(3, 5), **norm(5)}), 1)
    assert count(folded) == 0


LOOP = """g (float[4, 5] x, int64 n) => (float[4, 5] z) {
    t = Constant<value = bool {1}>()
    z = Loop (n, t, x) <body = l (int64 i, bool c, float[4, 5] a) => (bool d, float[4, 5] e) {
        d = Identity(c) h = Gemm(a, w) k = BatchNormalization(h, s, b, m, v) e = Tanh(k) }> }"""


def test_a_batchnorm_in_a_loop_folds_into_the_loop():
    folded, _ = fold(
        model(LOOP, {"w": weights(5, 5), **norm(5)}), 1, inputs={"x": weights(4, 5), "n": np.int64(3)}
    )
    assert count(folded) == 0


def test_a_loop_carried_value_is_no_input_of_the_loop():
    """The batchnorm reads the carried value: the Gemm outside makes only the first one."""
    text = """g (float[4, 5] x, int64 n) => (float[4, 5] z) {
        t = Constant<value = bool {1}>() q = Gemm(x, w)
        z = Loop (n, t, q) <body = l (int64 i, bool c, float[4, 5] a) => (bool d, float[4, 5] e) {
            d = Identity(c) k = BatchNormalization(a, s, b, m, v) e = Tanh(k) }> }"""
    some = model(text, {"w": weights(5, 5), **norm(5)})
    kept(some, "Tanh", inputs={"x": weights(4, 5), "n": np.int64(3)})


# ---------------------------------------------------------------- functions


FUNCTION = """
<domain: "local", opset_import: ["" : 17]>
block (x, w, s, b, m, v) => (y) { h = Gemm(x, w) n = BatchNormalization(h, s, b, m, v) y = Relu(n) }
"""


def test_a_function_whose_calls_have_other_numbers_is_inlined():
    text = """g (float[4, 5] x) => (float[4, 5] y) {
        h = local.block(x, w, s, b, m, v) y = local.block(h, u, s, v, b, v) }"""
    some = model(
        text,
        {"w": weights(5, 5), "u": weights(5, 5, seed=3), **norm(5)},
        extra=', "local" : 1',
        rest=FUNCTION,
    )
    folded, report = fold(some, 2)
    assert count(folded) == 0
    assert "block" in report.notes[0]


@pytest.mark.parametrize("epsilon", ["", "<e = 2.0>"])
@pytest.mark.parametrize("through", ["block", "outer"])
def test_what_a_call_leaves_out_is_the_default_of_its_function(epsilon, through):
    text = f"""g (float[4, 5] x, bool k) => (float[4, 5] y) {{
        h = local.{through}{epsilon}(x, w, s, b, m, v)
        y = If (k) <
            then_branch = t () => (float[4, 5] p) {{ p = local.block(h, u, s, v, b, v) }},
            else_branch = f () => (float[4, 5] q) {{ q = Identity(h) }}>
    }}"""
    functions = """
<domain: "local", opset_import: ["" : 17]>
block <e: float = 0.5> (x, w, s, b, m, v) => (y) {
    h = Gemm(x, w) n = BatchNormalization<epsilon: float = @e>(h, s, b, m, v) y = Relu(n) }
<domain: "local", opset_import: ["" : 17, "local" : 1]>
outer <e: float = 3.0> (x, w, s, b, m, v) => (y) {
    h = local.block(x, w, s, b, m, v) y = local.block<e: float = @e>(h, w, s, b, m, v) }
"""
    numbers = {"w": weights(5, 5), "u": weights(5, 5, seed=3), **norm(5)}
    some = model(text, numbers, extra=', "local" : 1', rest=functions)
    gone = 3 if through == "outer" else 2
    fold(some, gone, inputs={"x": weights(4, 5), "k": np.array(True)})


def test_a_default_holds_where_the_caller_hands_on_what_it_was_not_given():
    text = """g (float[4, 5] x) => (float[4, 5] y) {
        h = local.outer(x, w, s, b, m, v) y = local.block(h, w, s, b, m, v) }"""
    functions = """
<domain: "local", opset_import: ["" : 17]>
block <e: float = 0.5> (x, w, s, b, m, v) => (y) {
    h = Gemm(x, w) n = BatchNormalization<epsilon: float = @e>(h, s, b, m, v) y = Relu(n) }
<domain: "local", opset_import: ["" : 17, "local" : 1]>
outer <k> (x, w, s, b, m, v) => (y) { y = local.block<e: float = @k>(x, w, s, b, m, v) }
"""
    fold(model(text, {"w": weights(5, 5), **norm(5)}, extra=', "local" : 1', rest=functions), 2)


def test_a_batchnorm_in_a_body_in_a_function_is_folded():
    text = "g (float[4, 5] x, bool k) => (float[4, 5] y) { y = local.block(x, k, w, s, b, m, v) }"
    function = """
<domain: "local", opset_import: ["" : 17]>
block (x, k, w, s, b, m, v) => (y) {
    h = Gemm(x, w)
    y = If (k) <
        then_branch = t () => (p) { p = BatchNormalization(h, s, b, m, v) },
        else_branch = f () => (q) { q = Identity(x) }>
}"""
    some = model(text, {"w": weights(5, 5), **norm(5)}, extra=', "local" : 1', rest=function)
    fold(some, 1, inputs={"x": weights(4, 5), "k": np.array(True)})


@pytest.mark.parametrize("taken", ["", "x.0 = Relu(x)"])
def test_a_function_may_hand_an_input_through(taken):
    """The inliner leaves such an output without a name, and so does onnxruntime."""
    text = """g (float[4, 3] x) => (float[4, 5] y) {
        p, k = local.both(x, w) h = Gemm(p, w) y = BatchNormalization(h, s, b, m, v) }"""
    function = f"""
<domain: "local", opset_import: ["" : 17]>
both (x, w) => (x, k) {{ {taken.replace("x.0", '"x.0"')} k = Gemm(x, w) }}"""
    some = model(text, {"w": weights(3, 5), **norm(5)}, extra=', "local" : 1', rest=function)
    folded, report = bnfold.onnx.fold(some, verify=False)
    assert [verdict.outcome for verdict in report.verdicts] == ["folded"]
    feed = {"x": weights(4, 3)}
    wanted = onnx.reference.ReferenceEvaluator(some).run(None, feed)
    found = onnx.reference.ReferenceEvaluator(folded).run(None, feed)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)


def test_a_value_may_be_named_as_one_of_a_body_is_named_in_the_list_of_all():
    text = """g (float[4, 3] x, bool k) => (float[4, 5] y) {
        "y.0/p" = Gemm(x, w)
        y = If (k) <
            then_branch = t () => (float[4, 5] p) { p = BatchNormalization("y.0/p", s, b, m, v) },
            else_branch = f () => (float[4, 5] q) { q = Gemm(x, w) }>
    }"""
    feed = {"x": weights(4, 3), "k": np.array(True)}
    fold(model(text, {"w": weights(3, 5), **norm(5)}), 1, inputs=feed)


def test_a_function_with_a_default_is_run_in_float64():
    text = """g (float[4, 3] x) => (float[4, 5] y) {
        h = Gemm(x, w) n = BatchNormalization(h, s, b, m, v) y = local.f(n) }"""
    function = """
<domain: "local", opset_import: ["" : 17]>
f <a: float = 0.5> (x) => (y) { y = LeakyRelu<alpha: float = @a>(x) }"""
    some = model(text, {"w": weights(3, 5), **norm(5)}, extra=', "local" : 1', rest=function)
    _, report = fold(some, 1)
    assert [each.question for each in report.evidence] == ["float64", "float32"]


def test_a_function_that_hides_nothing_is_left_alone():
    text = """g (float[4, 3] x) => (float[4, 5] y) {
        h = Gemm(x, w) n = BatchNormalization(h, s, b, m, v) y = local.f(n) }"""
    function = '\n<domain: "local", opset_import: ["" : 17]>\nf (x) => (y) { y = Relu(x) }'
    folded, _ = fold(model(text, {"w": weights(3, 5), **norm(5)}, extra=', "local" : 1', rest=function), 1)
    assert [n.op_type for n in folded.graph.node] == ["Gemm", "f"]
    assert len(folded.functions) == 1


def test_a_batchnorm_that_stays_in_a_function_has_a_verdict_and_the_function_stays():
    text = "g (float[4, 5] x) => (float[4, 5] y) { y = local.block(x, s, b, m, v) }"
    function = """
<domain: "local", opset_import: ["" : 17]>
block (x, s, b, m, v) => (y) { h = Relu(x) n = BatchNormalization(h, s, b, m, v) y = Relu(n) }
"""
    kept(model(text, norm(5), extra=', "local" : 1', rest=function), "Relu")


def test_a_function_may_be_named_like_an_operator():
    """`local.BatchNormalization` is not ONNX's."""
    text = (
        "g (float[4, 3] x) => (float[4, 5] y) { h = Gemm(x, w) y = local.BatchNormalization(h, s, b, m, v) }"
    )
    function = '\n<domain: "local", opset_import: ["" : 17]>\nBatchNormalization (x, s, b, m, v) => (y) { y = Relu(x) }'
    fold(model(text, {"w": weights(3, 5), **norm(5)}, extra=', "local" : 1', rest=function), 0)


# ---------------------------------------------------------------- constants in disguise


DISGUISES = {
    "initializer": ("", "w"),
    "transpose": ("k = Transpose(w)", "t"),
    "identity": ("k = Identity(w)", "w"),
    "cast": ("k = Cast<to=1>(w)", "double"),
    "castlike": ("k = CastLike(w, x)", "double"),
    "reshape": ("k = Reshape(w, shape)", "flat"),
    "unsqueeze, squeeze": ("a = Unsqueeze(w, zero) k = Squeeze(a, zero)", "w"),
    "expand": ("k = Expand(w, shape)", "w"),
    "expand by a computed shape": ("g1 = Shape(w) k = Expand(w, g1)", "w"),
    "arithmetic": ("one = Constant<value_float=2.0>() k = Mul(w, one)", "w"),
    "slice and concat": (
        "a = Slice(w, zero, one1, zero) e = Slice(w, one1, three, zero) k = Concat<axis=0>(a, e)",
        "w",
    ),
    "split": ("a, e = Split<axis=0>(w, parts) k = Concat<axis=0>(a, e)", "w"),
    "where": ("cond = Less(w, w) k = Where(cond, w, w)", "w"),
}


@pytest.mark.parametrize("how", DISGUISES)
def test_a_weight_in_disguise(how):
    chain, form = DISGUISES[how]
    array = weights(3, 5)
    stored = {"w": array, "t": array.T, "double": array.astype(np.float64), "flat": array.ravel()}[form]
    text = f"g (float[4, 3] x) => (float[4, 5] y) {{ {chain} h = Gemm(x, {'k' if chain else 'w'}) {BN} }}"
    tensors = {"w": np.ascontiguousarray(stored), "shape": np.array([3, 5]), "zero": np.array([0]), **norm(5)}
    tensors |= {"one1": np.array([1]), "parts": np.array([1, 2]), "three": np.array([3])}
    used = {
        name: a
        for name, a in tensors.items()
        if name in text.replace(",", " ").replace(")", " ").replace("(", " ").split()
    }
    folded, _ = fold(model(text, used), 1)
    assert [n.op_type for n in folded.graph.node] == ["Gemm"], "the chain is dead and should be gone"
    assert {t.data_type for t in folded.graph.initializer} == {onnx.TensorProto.FLOAT}


def test_constants_of_every_form():
    text = """g (float[4, 2] x) => (float[4, 2] y) {
        w = Constant<value = float[2, 2] {1.0, 2.0, 3.0, -4.0}>()
        s = Constant<value_floats = [1.5, -0.5]>()
        n = Constant<value_ints = [2]>()
        b = ConstantOfShape<value = float[1] {0.25}>(n)
        m = ConstantOfShape(n)
        one = Constant<value_float = 1.0>()
        v = Expand(one, n)
        h = Gemm(x, w) y = BatchNormalization(h, s, b, m, v) }"""
    folded, _ = fold(model(text), 1)
    assert [n.op_type for n in folded.graph.node] == ["Gemm"]


def test_the_way_a_dynamic_export_writes_its_numbers():
    """Bias and statistics are expanded, by a shape that is computed from the input's fixed sizes."""
    text = """g (float[N, 3, 6, 6] x) => (float[N, 4, 4, 4] y) {
        zero = Constant<value = float {0.0}>() like = CastLike(zero, x)
        shape = Constant<value_ints = [4]>() c = Expand(like, shape)
        whole = Shape<start=1, end=2>(x) one = Constant<value_ints = [1]>() four = Add(whole, one)
        v1 = Constant<value_float = 0.5>() v = Expand(v1, four)
        h = Conv(x, w, c) y = BatchNormalization(h, s, b, m, v) }"""
    numbers = norm(4)
    del numbers["v"]
    folded, _ = fold(model(text, {"w": weights(4, 3, 3, 3), **numbers}), 1)
    assert [n.op_type for n in folded.graph.node] == ["Conv"]


def test_a_random_weight_is_no_constant():
    text = f"g (float[4, 3] x) => (float[4, 5] y) {{ w = RandomNormal<shape=[3, 5], seed=1.0>() h = Gemm(x, w) {BN} }}"
    kept(model(text, norm(5)), "computed by")


def test_a_computed_weight_is_no_constant():
    text = f"g (float[4, 3] x) => (float[4, 4] y) {{ w = Transpose(x) h = Gemm(x, w) {BN} }}"
    kept(model(text, norm(4)), "its weight is computed by")


def test_a_quantised_weight_is_left_alone():
    text = (
        f"g (float[4, 3] x) => (float[4, 5] y) {{ w = DequantizeLinear(q, scale, zero) h = Gemm(x, w) {BN} }}"
    )
    tensors = {
        "q": np.arange(15, dtype=np.int8).reshape(3, 5),
        "scale": np.float32(0.1),
        "zero": np.int8(2),
        **norm(5),
    }
    kept(model(text, tensors), "quantised", tolerance=2e-2)


def test_a_quantised_output_is_left_alone():
    text = f"""g (float[4, 3] x) => (float[4, 5] y) {{
        a = Gemm(x, w) q = QuantizeLinear(a, scale, zero) h = DequantizeLinear(q, scale, zero) {BN} }}"""
    tensors = {"w": weights(3, 5), "scale": np.float32(0.1), "zero": np.int8(2), **norm(5)}
    kept(model(text, tensors), "DequantizeLinear")


# ---------------------------------------------------------------- matrices and their biases


def test_matmul_and_add_are_one_linear_operator():
    text = """g (float[2, 7, 3] x) => (float[2, 5, 7] y) {
        a = MatMul(x, w) h0 = Add(c, a) h = Transpose<perm=[0, 2, 1]>(h0) y = BatchNormalization(h, s, b, m, v) }"""
    folded, _ = fold(model(text, {"w": weights(3, 5), "c": weights(5), **norm(5)}), 1)
    assert [n.op_type for n in folded.graph.node] == ["MatMul", "Add", "Transpose"]


def test_a_matmul_whose_sum_is_read_twice_has_no_bias_of_its_own():
    text = """g (float[2, 3] x) => (float[2, 5] y, float[2, 5] z) {
        h = MatMul(x, w) y = BatchNormalization(h, s, b, m, v) z = Add(h, c) }"""
    kept(model(text, {"w": weights(3, 5), "c": weights(5), **norm(5)}), "also read by")


def test_a_bare_matmul_that_needs_a_bias_gets_an_add():
    text = f"g (float[4, 3] x) => (float[4, 5] y) {{ h = MatMul(x, w) {BN} }}"
    folded, _ = fold(model(text, {"w": weights(3, 5), **norm(5)}), 1)
    assert [n.op_type for n in folded.graph.node] == ["MatMul", "Add"]


# ---------------------------------------------------------------- spelt out


def test_a_batchnorm_spelt_out_is_one_batchnorm():
    text = """g (float[2, 3, 6] x) => (float[2, 4, 6] y) {
        h = Conv(x, w) c = Sub(h, m) e = Constant<value_float = 0.001>() ve = Add(v, e) d = Sqrt(ve)
        n = Div(c, d) g1 = Mul(n, s) y = Add(g1, b) }"""
    numbers = {k: a.reshape(4, 1) for k, a in norm(4).items()}
    folded, _ = fold(model(text, {"w": weights(4, 3, 1), **numbers}), 1)
    assert [n.op_type for n in folded.graph.node] == ["Conv"]


def test_a_batchnorm_spelt_out_that_stays_is_reported():
    text = """g (float[2, 4, 6] x) => (float[2, 4, 6] y) {
        h = Sigmoid(x) c = Sub(h, m) n = Div(c, v) g1 = Mul(n, s) a = Add(g1, b) y = Relu(a) }"""
    kept(model(text, {k: a.reshape(4, 1) for k, a in norm(4).items()}), "Sigmoid")


def test_a_scale_and_a_shift_that_stay_are_no_batchnorm():
    text = "g (float[2, 4, 6] x) => (float[2, 4, 6] y) { h = Sigmoid(x) a = Mul(h, s) c = Add(a, b) y = Relu(c) }"
    numbers = norm(4)
    fold(model(text, {"s": numbers["s"].reshape(4, 1), "b": numbers["b"].reshape(4, 1)}), 0)


def test_a_scale_and_a_shift_that_disappear_are_one():
    text = "g (float[2, 3, 6] x) => (float[2, 4, 6] y) { h = Conv(x, w) a = Mul(h, s) c = Add(a, b) y = Relu(c) }"
    numbers = norm(4)
    fold(
        model(
            text, {"w": weights(4, 3, 1), "s": numbers["s"].reshape(4, 1), "b": numbers["b"].reshape(4, 1)}
        ),
        1,
    )


def test_the_tail_of_a_layer_norm_is_no_batchnorm():
    text = """g (float[2, 6, 4] x) => (float[2, 6, 5] y) {
        mean = ReduceMean<axes=[-1]>(x) c = Sub(x, mean) sq = Mul(c, c) var = ReduceMean<axes=[-1]>(sq)
        e = Constant<value_float = 0.001>() ve = Add(var, e) d = Sqrt(ve) n = Div(c, d)
        g1 = Mul(n, s) a = Add(g1, b) y = MatMul(a, w) }"""
    numbers = norm(4)
    fold(model(text, {"s": numbers["s"], "b": numbers["b"], "w": weights(4, 5)}), 0)


# ---------------------------------------------------------------- the rest of the file


def test_everything_else_comes_through_untouched():
    text = """g (float[N, 3, 6, 6] x) => (float[N, 4, 4, 4] y, float[N, 4, 4, 4] z) {
        h = Conv(x, w) y = BatchNormalization(h, s, b, m, v) z = Sin(y) }"""
    some = model(text, {"w": weights(4, 3, 3, 3), "unused": weights(2), **norm(4)})
    some.producer_name, some.producer_version, some.model_version, some.doc_string = "p", "1", 7, "about"
    some.metadata_props.add(key="k", value="v")
    some.graph.doc_string = "graph"
    some.opset_import.add(domain="ai.onnx.ml", version=3)
    some.graph.node[2].doc_string = "sine"
    some.graph.node[2].metadata_props.add(key="n", value="m")
    some.graph.value_info.append(onnx.helper.make_tensor_value_info("h", 1, ["N", 4, 4, 4]))
    some.graph.quantization_annotation.add(tensor_name="x").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="s0"
    )
    folded, _ = fold(some, 1)
    wanted = onnx.ModelProto()
    wanted.CopyFrom(some)
    del wanted.graph.node[1]
    wanted.graph.node[0].output[0] = "y"
    wanted.graph.node[0].input[1:] = ["w.folded", "w.bias.folded"]
    del wanted.graph.initializer[:], wanted.graph.value_info[:]
    wanted.graph.initializer.append(some.graph.initializer[1])
    wanted.graph.initializer.extend(t for t in folded.graph.initializer if t.name.endswith(".folded"))
    assert folded.SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)


def test_a_model_without_a_batchnorm_comes_back_byte_for_byte():
    some = model("g (float[4, 3] x) => (float[4, 5] y) { h = Gemm(x, w) y = Relu(h) }", {"w": weights(3, 5)})
    folded, report = bnfold.onnx.fold(some)
    assert folded == some
    assert not report.verdicts


def test_new_names_collide_with_nothing():
    text = """g (float[4, 3] x) => (float[4, 5] y, float[4, 5] z) {
        "h" = MatMul(x, w) y = BatchNormalization(h, s, b, m, v) z = Add(y, "w.folded") }"""
    text = text.replace('"h"', "h").replace('"w.folded"', "taken")
    some = model(text, {"w": weights(3, 5), "taken": weights(5), **norm(5)})
    for tensor in some.graph.initializer:
        tensor.name = "w.folded" if tensor.name == "taken" else tensor.name
    some.graph.node[2].input[1] = "w.folded"
    folded, _ = fold(some, 1)
    assert len({t.name for t in folded.graph.initializer}) == len(folded.graph.initializer) == 3


def test_nodes_without_names_and_with_the_same_name():
    text = """g (float[4, 3] x) => (float[4, 5] y) {
        h = Gemm(x, w) a = BatchNormalization(h, s, b, m, v) r = Relu(a)
        k = Gemm(r, u) y = BatchNormalization(k, s, b, m, v) }"""
    some = model(text, {"w": weights(3, 5), "u": weights(5, 5), **norm(5)})
    _, report = fold(some, 2)
    assert [v.name for v in report.verdicts] == ["a", "y"]
    for node in some.graph.node:
        node.name = "same"
    _, report = bnfold.onnx.fold(some, verify=False)
    assert len({v.name for v in report.verdicts}) == 2


def test_a_batchnorm_that_is_read_for_its_shape_only():
    text = """g (float[N, 3, 6] x) => (float[N, 4, 6] y, int64[3] z) {
        h = Conv(x, w) y = BatchNormalization(h, s, b, m, v) z = Shape(h) }"""
    folded, _ = fold(model(text, {"w": weights(4, 3, 1), **norm(4)}), 1)
    assert [n.op_type for n in folded.graph.node] == ["Conv", "Shape"]


def test_flatten_repeats_a_channel_over_its_positions():
    text = """g (float[N, 3, 4, 4] x) => (float[N, 5] y) {
        n = BatchNormalization(x, s, b, m, v) f = Flatten(n) y = Gemm(f, w, c) }"""
    fold(model(text, {"w": weights(48, 5), "c": weights(5), **norm(3)}), 1)


def test_a_reshape_with_a_computed_batch_size():
    text = """g (float[N, 3, 4, 4] x) => (float[N, 5] y) {
        n = BatchNormalization(x, s, b, m, v) sh = Shape(n) zero = Constant<value_ints = [0]>()
        one = Constant<value_ints = [1]>() rest = Constant<value_ints = [-1]>()
        first = Slice(sh, zero, one, zero) to = Concat<axis=0>(first, rest) f = Reshape(n, to) y = Gemm(f, w) }"""
    fold(model(text, {"w": weights(48, 5), **norm(3)}), 1)


def test_a_graph_out_of_order_is_read_in_order():
    text = f"g (float[4, 3] x) => (float[4, 5] y) {{ h = Gemm(x, w) {BN} }}"
    some = model(text, {"w": weights(3, 5), **norm(5)})
    swapped = onnx.ModelProto()
    swapped.CopyFrom(some)
    swapped.graph.node[0].CopyFrom(some.graph.node[1])
    swapped.graph.node[1].CopyFrom(some.graph.node[0])
    folded, report = bnfold.onnx.fold(swapped)
    assert report.count("folded") == 1
    np.testing.assert_allclose(
        run(folded, {"x": weights(4, 3)})["y"], run(some, {"x": weights(4, 3)})["y"], atol=1e-5
    )


# ---------------------------------------------------------------- what cannot be used, and what cannot be trusted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[4, 3] x) => (float[4, 3] y) { a = Relu(c) c = Relu(a) y = Add(a, x) }", "cycle"),
        ("g (float[4, 3] x) => (float[4, 3] y) { y = Relu(nowhere) }", "nothing computes"),
        ("g (float[4, 3] x) => (float[4, 3] y) { a = Relu(x) a = Neg(x) y = Relu(a) }", "computed twice"),
    ],
)
def test_a_graph_that_does_not_hang_together(text, message):
    with pytest.raises(InputError, match=message):
        bnfold.onnx.fold(model(text))


def test_wrong_shapes():
    text = f"g (float[4, 3] x) => (float[4, 5] y) {{ h = Gemm(x, w) {BN} }}"
    with pytest.raises(InputError, match="onnxruntime"):
        bnfold.onnx.fold(model(text, {"w": weights(4, 5), **norm(5)}))
    with pytest.raises(InputError, match="onnxruntime"):
        bnfold.onnx.fold(model(text, {"w": weights(3, 5), **norm(6)}))


def test_a_custom_operator_is_folded_only_unverified():
    text = "g (float[4, 3] x) => (float[4, 5] y) { h = Gemm(x, w) n = BatchNormalization(h, s, b, m, v) y = my.Op(n) }"
    some = model(text, {"w": weights(3, 5), **norm(5)}, extra=', "my" : 1')
    with pytest.raises(InputError, match="my"):
        bnfold.onnx.fold(some)
    folded, report = bnfold.onnx.fold(some, verify=False)
    assert report.count("folded") == 1
    assert not report.verified
    assert [n.op_type for n in folded.graph.node] == ["Gemm", "Op"]


def test_a_wrong_fold_is_caught(monkeypatch):
    """One variance off by 0.2 % is what the comparison must see."""
    from bnfold import canonical

    right = canonical.batchnorm

    def wrong(mean, var, gamma, beta, eps):
        var = np.array(var)
        var[2] *= 1.002
        return right(mean, var, gamma, beta, eps)

    monkeypatch.setattr(canonical, "batchnorm", wrong)
    text = f"g (float[4, 3] x) => (float[4, 5] y) {{ h = Gemm(x, w) {BN} }}"
    with pytest.raises(NotEquivalent):
        bnfold.onnx.fold(model(text, {"w": weights(3, 5), **norm(5)}))


@pytest.mark.parametrize(
    "sum_",
    [
        "y = Add(n, h)",
        "y = Sub(n, h)",
        "y = Sub(h, n)",
        "d = Sub(a, h) y = Add(n, d)",
        "d = Sub(h, a) y = Add(n, d)",
        "zero = Constant<value_float = 0.0>() d = Add(zero, n) y = Add(d, h)",
        "d = Identity(n) y = Add(h, d)",
    ],
)
def test_a_batchnorm_beside_a_convolution_whatever_the_signs(sum_):
    text = f"""g (float[2, 3, 6, 6] x0) => (float[2, 3, 6, 6] y) {{ x = Sigmoid(x0) a = Tanh(x0)
        h = Conv<pads=[1, 1, 1, 1]>(x, w) n = BatchNormalization(x, s, b, m, v) {sum_} }}"""
    fold(model(text, {"w": weights(3, 3, 3, 3), **norm(3)}), 1)


def test_a_quotient_of_whole_numbers_in_a_chain_of_constants_is_rounded_towards_zero():
    text = """g (float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y) {
        q = Div(a, n) f = Cast<to=1>(q) k = Mul(w, f) h = Conv(x, k) y = BatchNormalization(h, s, b, m, v) }"""
    whole = {"a": np.array([-7], np.int64), "n": np.array([2], np.int64)}
    fold(model(text, {"w": weights(4, 3, 1, 1), **whole, **norm(4)}), 1)
