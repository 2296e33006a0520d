"""Running a model twice: what draws random numbers draws the same ones, so that a verdict is no throw of dice."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import bnfold.onnx
from bnfold.errors import NotEquivalent
from bnfold.onnx.run import Runner
from tests.onnx_models import model, norm, weights

FOLDS = "h = Gemm(x, w) n = BatchNormalization(h, s, b, m, v)"
DRAWS = {
    "Dropout": "y = Dropout(n, ratio, trains)",
    "Dropout with its mask": "y, mask = Dropout(n, ratio, trains)",
    "RandomNormal": "z = RandomNormal<shape=[4, 5]>() y = Add(n, z)",
    "RandomNormalLike": "z = RandomNormalLike<dtype=1>(n) y = Mul(n, z)",
    "RandomUniform": "z = RandomUniform<shape=[4, 5]>() y = Mul(n, z)",
    "RandomUniformLike": "z = RandomUniformLike<dtype=1>(n) y = Add(n, z)",
    "Bernoulli": "p = Sigmoid(x) q = Bernoulli<dtype=1>(p) r = ReduceSum(q) y = Mul(n, r)",
    "Multinomial": "p = Log(chances) q = Multinomial<dtype=6, sample_size=5>(p) z = Cast<to=1>(q) y = Add(n, z)",
    "two of a kind": "d = Dropout(n, ratio, trains) y = Dropout(d, ratio, trains)",
}
FEED = {"x": weights(4, 3, seed=4)}


def drawn(body, **options):
    tensors = {
        "ratio": np.float32(0.1),
        "trains": np.array(True),
        "chances": np.full((4, 6), 1 / 6, np.float32),
        "w": weights(3, 5),
        **norm(5),
    }
    used = (body + options.get("rest", "")).replace(",", " ").replace("(", " ").replace(")", " ").split()
    tensors = {name: array for name, array in tensors.items() if name in used}
    return model(f"g (float[4, 3] x) => (float[4, 5] y) {{ {body} }}", tensors, opset=18, **options)


def assert_folds_every_time(some):
    for _ in range(10):
        _, report = bnfold.onnx.fold(some)
        assert report.count("folded") == 1
        assert report.verified


@pytest.mark.parametrize("draw", DRAWS)
def test_a_model_that_draws_numbers_is_folded_every_time(draw):
    assert_folds_every_time(drawn(f"{FOLDS} {DRAWS[draw]}"))


@pytest.mark.parametrize("draw", DRAWS)
def test_one_feed_gives_one_answer_in_every_run(draw):
    some = drawn(f"{FOLDS} {DRAWS[draw]}")
    runner = Runner(some)
    first, second, third = runner(FEED), runner(FEED), Runner(some)(FEED)
    np.testing.assert_array_equal(first["y"], second["y"])
    np.testing.assert_array_equal(first["y"], third["y"])


def test_a_function_that_draws_numbers_is_folded_every_time():
    rest = """<domain: "my", opset_import: ["": 18]> block (x, w, s, b, m, v, ratio, trains) => (y) {
        h = Gemm(x, w) n = BatchNormalization(h, s, b, m, v) y = Dropout(n, ratio, trains) }"""
    body = "y = my.block(x, w, s, b, m, v, ratio, trains)"
    assert_folds_every_time(drawn(body, extra=', "my": 1', rest=rest))


def test_a_function_that_draws_numbers_and_is_called_twice_is_folded_every_time():
    rest = """<domain: "my", opset_import: ["": 18]> noisy (n, ratio, trains) => (y) {
        y = Dropout(n, ratio, trains) }"""
    body = f"{FOLDS} d = my.noisy(n, ratio, trains) y = my.noisy(d, ratio, trains)"
    assert_folds_every_time(drawn(body, extra=', "my": 1', rest=rest))


def test_a_body_that_draws_numbers_is_folded_every_time():
    some = drawn(FOLDS + " y = Identity(n)")
    some.graph.node.pop()
    info = onnx.helper.make_tensor_value_info("d", onnx.TensorProto.FLOAT, [4, 5])
    noisy = onnx.helper.make_graph(
        [onnx.helper.make_node("RandomNormalLike", ["n"], ["d"])], "noisy", [], [info]
    )
    calm = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["n"], ["d"])], "calm", [], [info])
    some.graph.node.append(onnx.helper.make_node("If", ["yes"], ["y"], then_branch=noisy, else_branch=calm))
    some.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    assert_folds_every_time(some)


def test_a_seed_of_the_model_s_own_is_kept():
    texts = (
        f"{FOLDS} z = RandomNormal<shape=[4, 5], seed={seed}>() y = Add(n, z)" for seed in ("7.0", "8.0")
    )
    one, other = (Runner(drawn(text))(FEED)["y"] for text in texts)
    assert not np.array_equal(one, other)


def test_a_wrong_fold_is_caught_behind_a_dropout(monkeypatch):
    from bnfold import canonical

    right = canonical.batchnorm
    monkeypatch.setattr(
        canonical, "batchnorm", lambda mean, var, **rest: right(mean, np.asarray(var) * 1.01, **rest)
    )
    for _ in range(5):
        with pytest.raises(NotEquivalent):
            bnfold.onnx.fold(drawn(f"{FOLDS} {DRAWS['Dropout']}"))
