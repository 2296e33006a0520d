"""Where linear operators of an ONNX model become one, and where they must not: judged without bnfold's own comparison.

Every model is folded unverified and run in onnxruntime, optimisations off, at two batches and two image sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest

import bnfold.onnx
from bnfold.onnx.merging import merge_imported
from bnfold.report import Report
from tests.onnx_models import Tensor, model, norm, random, run, weights


def feeds(some: onnx.ModelProto) -> list[Mapping[str, Tensor]]:
    """Two feeds; open sizes are a batch of 2 and 3, images of 8 x 8 and 7 x 9."""
    stored = {tensor.name for tensor in some.graph.initializer}
    found = []
    for seed, sizes in enumerate(({"N": 2, "H": 8, "W": 8}, {"N": 3, "H": 7, "W": 9})):
        feed = {}
        for given in some.graph.input:
            kind = given.type.tensor_type
            shape = [
                sizes.get(dim.dim_param, 2) if dim.dim_param else dim.dim_value for dim in kind.shape.dim
            ]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            array = (
                random(seed).integers(0, 4, shape)
                if dtype.kind == "i"
                else random(seed).standard_normal(shape)
            )
            feed |= {} if given.name in stored else {given.name: np.asarray(array).astype(dtype)}
        found.append(feed)
    return found


def merged(some: onnx.ModelProto, tolerance: float = 2e-6, **options: Any) -> tuple[onnx.ModelProto, Report]:
    """Fold without a comparison, and compare."""
    folded, report = bnfold.onnx.fold(some, verify=False, **options)
    onnx.checker.check_model(folded, full_check=True)
    for feed in feeds(some):
        wanted, given = run(some, feed), run(folded, feed)
        for name, array in wanted.items():
            assert given[name].dtype == array.dtype
            scale = max(float(np.abs(array).max(initial=0)), 1e-3)
            np.testing.assert_allclose(given[name], array, rtol=0, atol=tolerance * scale)
    return folded, report


def operators(folded: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in folded.graph.node]


IMAGE = "g (float[N, 4, H, W] x) => (float[N, 4, p, q] y)"


# ---------------------------------------------------------------- after folding


def test_what_folding_brings_together_becomes_one() -> None:
    text = f"""{IMAGE} {{ k = Conv<pads=[1, 1, 1, 1]>(x, w) kn = BatchNormalization(k, s, b, m, v)
        l = Conv(x, u) ln = BatchNormalization(l, s, b, m, v) i = BatchNormalization(x, s, b, m, v)
        a = Add(kn, ln) c = Add(a, i) y = Relu(c) }}"""
    folded, report = merged(model(text, {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1), **norm(4)}))
    assert operators(folded) == ["Conv", "Relu"]
    assert report.count("folded") == 3


def test_a_batchnorm_that_is_folded_does_not_stand_between_two_convolutions() -> None:
    text = f"{IMAGE} {{ k = Conv(x, u) n = BatchNormalization(k, s, b, m, v) y = Conv(n, w) }}"
    folded, _ = merged(model(text, {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1), **norm(4)}))
    assert operators(folded) == ["Conv"]


@pytest.mark.parametrize("copies", ["d = Dropout(n)", "d = Identity(k)", "c = Identity(k) d = Dropout(c)"])
def test_copies_that_nobody_reads_go_with_what_they_copy(copies: str) -> None:
    text = f"{IMAGE} {{ k = Conv(x, u) n = BatchNormalization(k, s, b, m, v) {copies} y = Conv(n, w) }}"
    folded, _ = merged(model(text, {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1), **norm(4)}))
    assert operators(folded) == ["Conv"]


# ---------------------------------------------------------------- sums with other operands


def test_operands_on_one_value_are_gathered_though_another_one_stands_between() -> None:
    text = """g (float[N, 4, H, W] x, float[N, 4, H, W] z) => (float[N, 4, H, W] y) {
        k = Conv<pads=[1, 1, 1, 1]>(x, w) l = Conv(x, u) a = Add(k, z) y = Add(a, l) }"""
    folded, _ = merged(model(text, {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1)}))
    assert operators(folded) == ["Conv", "Add"]


def test_a_sum_whose_operands_all_go_stays_where_its_shape_is_read() -> None:
    text = """g (float[N, 4, H, W] x, float[N, 4, H, W] z) => (float[N, 4, H, W] y, float[N, 4, H, W] q) {
        k = Conv<pads=[1, 1, 1, 1]>(x, w) l = Conv(x, u) a = Add(l, x) s = Shape(a) q = Reshape(z, s)
        b = Add(k, z) y = Add(a, b) }"""
    merged(model(text, {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1)}))


def test_operators_on_the_copy_of_another_one_are_merged() -> None:
    text = """g (float[N, 4, H, W] x) => (float[N, 4, H, W] y, float[N, 4, H, W] q) {
        k = Conv(x, t) q = Tanh(k) n = BatchNormalization(k, s, b, m, v) r = Relu(n)
        i = Conv(k, u) j = Conv<pads=[1, 1, 1, 1]>(k, w) z = Add(i, j) n2 = BatchNormalization(k, s, b, m, v)
        i2 = Conv(n2, u) j2 = Conv<pads=[1, 1, 1, 1]>(n2, w) z2 = Add(i2, j2) a = Add(z, z2) y = Add(a, r) }"""
    tensors = {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1), "t": weights(4, 4, 1, 1, seed=5)}
    merged(model(text, {**tensors, **norm(4)}), duplicate=True)


TWICE = {
    "branches": "g = Conv<pads=[1, 1, 1, 1]>(x, w) k = Conv(g, u) a = Add(g, k) y = Relu(a)",
    "the same operand": "g = Conv<pads=[1, 1, 1, 1]>(x, w) a = Add(g, g) y = Relu(a)",
    "nothing but itself less itself": "g = Conv<pads=[1, 1, 1, 1]>(x, w, c) a = Sub(g, g) y = Relu(a)",
    "a mean": """g = Conv(x, u, c) p = AveragePool<kernel_shape=[3, 3]>(g) k = Conv(g, w) a = Sub(p, k) y = Relu(a)""",
}


@pytest.mark.parametrize("kind", TWICE)
def test_what_only_the_terms_of_a_sum_read_becomes_a_part_of_it(kind: str) -> None:
    tensors = {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1), "c": weights(4)}
    some = model(f"{IMAGE} {{ {TWICE[kind]} }}", tensors)
    folded, _ = merged(some)
    assert operators(folded) == ["Conv", "Relu"]


def test_what_another_one_reads_beside_the_terms_of_a_sum_stays() -> None:
    text = """g (float[N, 4, H, W] x) => (float[N, 4, p, q] y, int64[4] s) {
        g = Conv<pads=[1, 1, 1, 1]>(x, w) k = Conv(g, u) y = Add(g, k) s = Shape(g) }"""
    folded, _ = merged(model(text, {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1)}))
    assert operators(folded) == ["Conv", "Conv", "Shape"]


# ---------------------------------------------------------------- matrices


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_bias_down_the_rows_of_a_square_product_is_no_bias_of_its_columns(place: str) -> None:
    biases = {"first": (weights(4, 1), weights(4)), "second": (weights(4), weights(4, 1))}[place]
    text = "g (float[4, 3] x) => (float[4, 4] y) { h = Gemm(x, w, c) y = Gemm(h, u, d) }"
    tensors = {"w": weights(3, 4), "u": weights(4, 4), "c": biases[0], "d": biases[1]}
    folded, _ = merged(model(text, tensors))
    assert operators(folded) == ["Gemm", "Gemm"]


@pytest.mark.parametrize("opset", [7, 10, 11, 17])
def test_a_product_that_reads_its_input_transposed_is_one_in_every_operator_set(opset: int) -> None:
    text = "g (float[3, 5] x) => (float[5, 2] y) { h = Gemm<transA=1>(x, w, c) y = Gemm(h, u, d) }"
    tensors = {
        "w": weights(3, 4),
        "u": weights(4, 2),
        "c": np.zeros(4, np.float32),
        "d": np.zeros(2, np.float32),
    }
    folded, _ = merged(model(text, tensors, opset=opset))
    assert operators(folded) == ["Gemm"]


EMPTY = {
    "no output": (weights(4, 3), weights(3, 0)),
    "nothing between": (weights(4, 0), weights(0, 4)),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_matrices_without_elements_are_merged_like_others(kind: str) -> None:
    text = "g (float[2, 4] x) => (float[2, p] y) { a = MatMul(x, w) b = MatMul(a, u) y = Add(b, c) }"
    if kind == "nothing between":
        text = """g (float[2, 4] x) => (float[2, 4] y) {
            k = MatMul(x, q) a = MatMul(x, w) b = MatMul(a, u) y = Add(k, b) }"""
    first, second = EMPTY[kind]
    tensors = {"w": first, "u": second}
    merged(model(text, {**tensors, **({"q": weights(4, 4)} if "q" in text else {"c": weights(0)})}))


# ---------------------------------------------------------------- names


TREE = "k = Conv<pads=[1, 1, 1, 1]>(x, w) l = Conv(x, u) a = Add(k, l) c = Add(a, x) y = Relu(c)"


def test_an_operator_is_not_called_like_a_node_that_stays() -> None:
    some = model(f"{IMAGE} {{ {TREE} }}", {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1)})
    some.graph.node[3].name, some.graph.node[4].name = "sum", "k"
    folded, _ = merged(some)
    assert [node.name for node in folded.graph.node] == ["k_2", "k"]


def test_an_operator_keeps_the_name_of_the_one_with_most_weights() -> None:
    some = model(f"{IMAGE} {{ {TREE} }}", {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1)})
    for place, name in enumerate("klacy"):
        some.graph.node[place].name = name
    folded, report = merged(some)
    assert [node.name for node in folded.graph.node] == ["k", "y"]
    assert report.merged[0].into == "k"


def test_a_product_before_its_bias_is_not_called_like_a_node_that_stays() -> None:
    text = "g (float[N, 5, 4] x) => (float[N, 5, 4] y) { a = MatMul(x, w) b = MatMul(a, u) c = Add(b, v) y = Relu(c) }"
    some = model(text, {"w": weights(4, 4), "u": weights(4, 4, seed=2), "v": weights(4)})
    for place, name in enumerate(["a", "b", "c", "a.product"]):
        some.graph.node[place].name = name
    folded, _ = merged(some)
    assert [node.op_type for node in folded.graph.node] == ["MatMul", "Add", "Relu"]


def test_nothing_is_said_of_a_sum_that_is_gone() -> None:
    text = """g (float[N, 4, H, W] x, float[N, 4, H, W] z) => (float[N, 4, H, W] y) {
        k = Conv<pads=[1, 1, 1, 1]>(x, w) l = Conv(x, u) b = Add(x, l) d = Add(k, z) e = Add(d, b) y = Relu(e) }"""
    some = model(text, {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1)})
    folded, _ = merged(onnx.shape_inference.infer_shapes(some))
    assert operators(folded) == ["Conv", "Add", "Relu"]
    made = {name for node in folded.graph.node for name in node.output}
    assert {info.name for info in folded.graph.value_info} <= made


# ---------------------------------------------------------------- numbers


def test_numbers_that_half_precision_holds_with_fewer_digits_stay_apart() -> None:
    small = (weights(4, 4, 1, 1) * 1e-3).astype(np.float16)
    text = "g (float16[N, 4, H, W] x) => (float16[N, 4, H, W] y) { k = Conv(x, w) y = Conv(k, u) }"
    _, report = merged(model(text, {"w": small, "u": small}), tolerance=2e-3)
    assert "underflow float16" in report.merges[0].reason


# ---------------------------------------------------------------- the report


def test_a_pool_that_goes_into_a_convolution_counts_as_an_operator_before() -> None:
    text = """g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) {
        p = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1>(x)
        k = Conv<group=4, pads=[1, 1, 1, 1]>(x, w)
        y = Sub(k, p) }"""
    folded, report = merged(model(text, {"w": weights(4, 1, 3, 3)}))
    assert operators(folded) == ["Conv"]
    assert report.operators == (2, 1)
    assert report.multiply_adds == ((9 + 3 + 1) * 4 * 64, 9 * 4 * 64), (
        "the convolution, the pool and the difference, then the convolution"
    )


# ---------------------------------------------------------------- size


def test_a_sum_of_a_thousand_products_is_merged_part_by_part() -> None:
    count = 1200
    nodes = " ".join(f"k{n} = MatMul(x, w) s{n + 1} = Add(s{n}, k{n})" for n in range(count))
    text = f"g (float[N, 4] x, float[N, 4] s0) => (float[N, 4] y) {{ {nodes} y = Tanh(s{count}) }}"
    folded, report = merged(model(text, {"w": weights(4, 4)}), tolerance=1e-5)
    assert sum(op == "MatMul" for op in operators(folded)) <= count / 50
    assert report.merged


def test_operators_with_the_same_numbers_share_them() -> None:
    text = f"""{IMAGE} {{ k = Conv<pads=[1, 1, 1, 1]>(x, w) l = Conv(x, u) a = Add(k, l) r = Relu(a)
        m = Conv<pads=[1, 1, 1, 1]>(r, w) n = Conv(r, u) b = Add(m, n) y = Relu(b) }}"""
    folded, _ = merged(model(text, {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1)}))
    assert operators(folded) == ["Conv", "Relu"] * 2
    assert len(folded.graph.initializer) == 1


def test_a_matrix_and_the_same_one_transposed_are_two() -> None:
    text = """g (float[N, 4] x, float[N, 3, 4] z) => (float[N, 4] y, float[N, 3, 4] q) {
        k = Gemm(x, w, c) y = Gemm(k, u) l = MatMul(z, w) m = Add(l, c) q = MatMul(m, u) }"""
    tensors = {"w": weights(4, 4), "u": weights(4, 4, seed=2), "c": weights(4)}
    folded, _ = merged(model(text, tensors, opset=13))
    assert operators(folded) == ["Gemm", "MatMul", "Add"]
    assert len(folded.graph.initializer) == 3


VAST = {
    "a pool": (
        """g (float[N, 64, H, W] x) => (float[N, 64, p, q] y) { a = AveragePool<kernel_shape=[20000, 20000],
            count_include_pad=1>(x) y = Relu(a) }""",
        {},
    ),
    "a pool of a vast image": (
        """g (float[1, 4, 400000, 400000] x) => (float[1, 4, p, q] y) { a = AveragePool<kernel_shape=[20000, 20000],
            count_include_pad=1>(x) y = Mul(a, two) }""",
        {"two": np.full((4, 1, 1), 2, np.float32)},
    ),
    "groups that have none in common": (
        """g (float[N, 62208, H, W] x) => (float[N, 62208, H, W] y) { w = Expand(one, a) u = Expand(one, b)
            v = Expand(one, c) k = Conv<group=256>(x, w) l = Conv<group=243>(k, u)
            y = Conv<group=62208, pads=[1, 1, 1, 1]>(l, v) }""",
        {
            "a": np.array([62208, 243, 1, 1]),
            "b": np.array([62208, 256, 1, 1]),
            "c": np.array([62208, 1, 3, 3]),
        },
    ),
    "affine maps along two axes, side by side": (
        """g (float[N, 1000000, 1000000] x) => (float[N, 1000000, 1000000] y) {
            k = Mul(x, down) l = Mul(x, along) y = Add(k, l) }""",
        {},
    ),
    "affine maps along two axes, one after another": (
        """g (float[N, 1000000, 1000000] x) => (float[N, 1000000, 1000000] y) {
            k = Mul(x, down) y = Mul(k, along) }""",
        {},
    ),
}


@pytest.mark.parametrize("kind", VAST)
def test_what_would_be_vast_as_one_stays_apart(kind: str) -> None:
    text, tensors = VAST[kind]
    numbers = np.arange(1_000_000, dtype=np.float32)
    known = {"one": np.ones((1, 1, 1, 1), np.float32), "down": numbers[:, None], "along": numbers}
    used = {name: array for name, array in known.items() if f"({name}," in text or f", {name})" in text}
    some = model(text, {**tensors, **used})
    folded, _ = bnfold.onnx.fold(some, verify=False)
    assert operators(folded) == operators(some)


@pytest.mark.parametrize(
    "settings", ["strides=[1]", "strides=[1, 1, 2]", "dilations=[0, 1]", "pads=[0, 0, -1, 0]"]
)
def test_a_convolution_with_settings_that_none_can_have_is_left_alone(settings: str) -> None:
    text = f"{IMAGE} {{ k = Conv(x, u) y = Conv<{settings}>(k, w) }}"
    imported = bnfold.onnx.read(model(text, {"w": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1)}))
    assert not merge_imported(imported, imported.graph).merges


@pytest.mark.xfail(strict=True, reason="a table for each position is not made of a flattened embedding")
def test_an_embedding_of_a_context_and_a_product_of_all_of_it_become_tables() -> None:
    text = """g (int64[N, 16] x) => (float[N, 512] y) { e = Gather(t, x) f = Flatten(e) y = Gemm(f, w, c) }"""
    tensors = {"t": weights(30, 64), "w": weights(16 * 64, 512), "c": weights(512)}
    folded, _ = merged(model(text, tensors))
    assert "Gemm" not in operators(folded)
