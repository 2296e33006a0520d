"""Edits are data: planned once, on a model that stays as it is, and carried out on any copy of it."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import onnx
import pytest

import bnfold.onnx
from bnfold.algebra import Linear, round_to
from bnfold.errors import BnfoldError, InputError, NotEquivalent
from bnfold.onnx import runs
from bnfold.onnx.edit import Forget, Insert, Remove, Rewire, Store, apply, new_data
from bnfold.onnx.run import to_float64
from bnfold.onnx.write import fits, write
from bnfold.travel import Options, travel
from tests.onnx_models import count, model, norm, random, run, weights

CHAIN = """g (float[N, 4] x) => (float[N, 6] y) {
    h = MatMul(x, w) n = BatchNormalization(h, s, b, m, v) r = Relu(n)
    k = MatMul(r, u) y = BatchNormalization(k, 2s, 2b, 2m, 2v) }"""

BRANCHES = """g (float[N, 4] x, bool c) => (float[N, 6] y) {
    h = Gemm(x, w, z) n = BatchNormalization(h, s, b, m, v)
    y = If(c) <
        then_branch = g1 () => (float[N, 6] t) { q = MatMul(n, u) t = BatchNormalization(q, 2s, 2b, 2m, 2v) },
        else_branch = g2 () => (float[N, 6] t) { p = Relu(n) t = MatMul(p, u) }
    > }"""


def chain(text: str = CHAIN, **options: int) -> onnx.ModelProto:
    text = text.replace("2s, 2b, 2m, 2v", "os, ob, om, ov")
    tensors = {"w": weights(4, 5), "z": weights(5), "u": weights(5, 6), **norm(5), **norm(6, "o")}
    used = {
        name
        for line in text.split()
        for name in line.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }
    return model(text, {name: array for name, array in tensors.items() if name in used}, **options)


def edits_of(some: onnx.ModelProto) -> tuple[object, ...]:
    imported = bnfold.onnx.read(some)
    return write(imported, travel(imported.graph, Options(), fits(imported)).graph)


def copy(some: onnx.ModelProto) -> onnx.ModelProto:
    other = onnx.ModelProto()
    other.CopyFrom(some)
    return other


@pytest.mark.parametrize("text", [CHAIN, BRANCHES])
def test_edits_leave_the_model_alone_that_they_were_planned_on_and_suit_any_copy(text):
    some = chain(text)
    before = some.SerializeToString()
    edits = edits_of(some)
    first, second = apply(edits, copy(some)), apply(edits, copy(some))
    assert some.SerializeToString() == before
    assert first.SerializeToString() == second.SerializeToString()
    assert count(first) == 0
    feed = {"x": random().standard_normal((3, 4)).astype(np.float32), "c": np.array(True)}
    feed = {item.name: feed[item.name] for item in some.graph.input}
    np.testing.assert_allclose(run(first, feed)["y"], run(some, feed)["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", [CHAIN, BRANCHES])
def test_the_same_edits_give_the_float64_copy_weights_that_are_not_rounded(text):
    some = chain(text)
    edits = edits_of(some)
    narrow, wide = apply(edits, copy(some)), apply(edits, to_float64(some, None), exact=True)
    numbers = [
        {t.name: onnx.numpy_helper.to_array(t) for t in each.graph.initializer} for each in (narrow, wide)
    ]
    new = {edit.name for edit in edits if isinstance(edit, Store)}
    assert new
    assert numbers[0].keys() == numbers[1].keys()
    for name in new:
        assert numbers[1][name].dtype == np.float64
        np.testing.assert_array_equal(numbers[1][name].astype(np.float32), numbers[0][name])
    assert any((numbers[1][name] != numbers[0][name]).any() for name in new)


@pytest.mark.parametrize("number", [1e300, np.nan])
def test_a_new_number_that_is_not_finite_is_refused_when_it_is_computed(number):
    edit = Store("w", (2,), onnx.TensorProto.FLOAT, partial(round_to, np.array([1.0, number])))
    with np.errstate(over="ignore"), pytest.raises(InputError, match="`w` are not finite in float32"):
        new_data(edit, edit.data_type)


def test_new_numbers_that_are_not_as_many_as_the_shape_says_are_refused():
    edit = Store("w", (2, 2), onnx.TensorProto.FLOAT, partial(round_to, np.ones(3)))
    with pytest.raises(BnfoldError, match="`w` are 3, and its shape is"):
        new_data(edit, edit.data_type)


def test_edits_name_what_they_change_and_nothing_else():
    edits = edits_of(chain())
    kinds = Counter(type(edit) for edit in edits)
    assert kinds == {Rewire: 3, Store: 4, Forget: 1, Remove: 2, Insert: 2}
    assert {edit.place for edit in edits if isinstance(edit, Remove)} == {1, 4}
    inserted = [edit for edit in edits if isinstance(edit, Insert)]
    assert [(edit.place, edit.op) for edit in inserted] == [(3, "Add"), (0, "Add")], (
        "from the back to the front"
    )


def test_weights_are_computed_when_they_are_stored_and_not_when_they_are_planned(monkeypatch):
    seen = []
    fold_weight = Linear.fold_weight
    monkeypatch.setattr(Linear, "fold_weight", lambda *a: seen.append(1) or fold_weight(*a))
    some = chain()
    edits = edits_of(some)
    assert not seen
    apply(edits, copy(some))
    assert len(seen) == 2


def test_an_initializer_that_is_not_finite_is_refused_by_name():
    store = Store("w.folded", (1,), onnx.TensorProto.FLOAT16, partial(round_to, np.array([1e6])))
    with pytest.raises(InputError, match=r"`w\.folded`"):
        apply([store], chain())


def test_a_fold_reads_its_model_once(monkeypatch):
    read, seen = bnfold.onnx.read, []
    for module in (bnfold.onnx, runs):
        monkeypatch.setattr(module, "read", lambda *a, **o: seen.append(1) or read(*a, **o), raising=False)
    assert bnfold.onnx.fold(chain())[1].verified
    assert len(seen) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_nudged_numbers_are_run_only_where_the_comparison_fails(monkeypatch, fails):
    from bnfold import equivalence

    nudge, judge, seen = runs.nudge, equivalence.judge, []

    def refuse(*asked, noise=0.0, **more):
        if fails and not noise:
            raise NotEquivalent("made up")
        return judge(*asked, noise=noise, **more)

    monkeypatch.setattr(runs, "nudge", lambda *a: seen.append(1) or nudge(*a))
    monkeypatch.setattr(equivalence, "judge", refuse)
    assert bnfold.onnx.fold(chain())[1].verified
    assert bool(seen) == fails
