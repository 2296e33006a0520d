"""Comparing two models: a wrong fold is caught, rounding is not, and the bounds come from the model."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bnfold.algebra import Linear, batchnorm, round_to
from bnfold.equivalence import ALGEBRA, TELLING, Alike, Comparison, Unavailable, compare, judge, measure
from bnfold.errors import NotEquivalent

RANDOM = np.random.default_rng(3)
X = RANDOM.normal(size=(64, 20))
W1, B1 = RANDOM.normal(size=(30, 20)) / 4, RANDOM.normal(size=30)
W2, B2 = RANDOM.normal(size=(10, 30)) / 5, RANDOM.normal(size=10)
MEAN, VAR = RANDOM.normal(size=30), np.exp(RANDOM.normal(size=30))
GAMMA, BETA = RANDOM.normal(size=30), RANDOM.normal(size=30)


def net(weight: np.ndarray, bias: np.ndarray, norm: Any, dtype: Any) -> list[dict[str, np.ndarray]]:
    """A net of two layers, a BatchNorm and a Tanh, every step rounded to a dtype; one output per example."""
    w1, b1, w2, b2, x = (round_to(a, dtype) for a in (weight, bias, W2, B2, X))
    hidden = x @ w1.T + b1
    if norm is not None:
        mean, var, gamma, beta = (round_to(a, dtype) for a in norm)
        hidden = (hidden - mean) / np.sqrt(var + dtype(1e-5)) * gamma + beta
    logits = np.tanh(hidden.astype(dtype)) @ w2.T + b2
    return [{"logits": row.astype(dtype)} for row in logits]


def folded(var: np.ndarray = VAR) -> tuple[np.ndarray, np.ndarray]:
    scale, shift = batchnorm(MEAN, var, GAMMA, BETA)
    weight, bias = Linear("oi", 20, 30, 1, 1).absorb_after(scale, shift).fold(W1, B1)
    assert bias is not None
    return weight, bias


def pair(dtype: Any, weight: np.ndarray, bias: np.ndarray) -> tuple[Any, Any]:
    return net(W1, B1, (MEAN, VAR, GAMMA, BETA), dtype), net(weight, bias, None, dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_a_right_fold_answers_both_questions(dtype: Any) -> None:
    name = np.dtype(dtype).name
    evidence = judge(
        pair(dtype, *folded()), pair(np.float64, *folded()), name, changed=1, inputs=64, exhaustive=True
    )
    assert [item.question for item in evidence] == ["float64", name]
    assert evidence[0].bound == ALGEBRA
    assert all(item.deviation <= item.bound and item.inputs == 64 and item.exhaustive for item in evidence)
    assert all(item.movement is not None and item.movement > 0.1 for item in evidence)


def test_a_float64_model_is_asked_one_question() -> None:
    both = pair(np.float64, *folded())
    assert [item.question for item in judge(both, both, "float64", 1, 64)] == ["float64"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_one_variance_that_is_off_by_two_thousandths_is_caught(dtype: Any) -> None:
    wrong = VAR.copy()
    wrong[7] *= 1.002
    with pytest.raises(
        NotEquivalent, match=r"the models differ in float64 by .* at input \d+, output logits"
    ):
        judge(pair(dtype, *folded(wrong)), pair(np.float64, *folded(wrong)), np.dtype(dtype).name, 1, 64)


def test_one_weight_that_is_off_by_a_thousandth_is_caught_in_float64_and_in_float32() -> None:
    weight, bias = folded()
    wrong = weight.copy()
    wrong[3, 4] += 1e-3
    with pytest.raises(NotEquivalent, match="in float64"):
        judge(pair(np.float32, weight, bias), pair(np.float64, wrong, bias), "float32", 1, 64)
    with pytest.raises(NotEquivalent, match="in float32"):
        judge(pair(np.float32, wrong, bias), pair(np.float64, weight, bias), "float32", 1, 64)
    with pytest.raises(NotEquivalent, match="in float32"):
        judge(pair(np.float32, wrong, bias), None, "float32", 1, 64)


def test_without_float64_the_bound_says_that_it_could_not_be_run() -> None:
    (evidence,) = judge(pair(np.float32, *folded()), None, "float32", changed=1, inputs=64)
    assert "float64 could not be run" in evidence.source
    assert evidence.deviation <= evidence.bound < 1e-5


def outputs(*arrays: Any, name: str = "y") -> list[dict[str, np.ndarray]]:
    return [{name: np.asarray(array)} for array in arrays]


def test_the_message_names_the_input_the_output_and_the_element() -> None:
    before = outputs(np.zeros((2, 3)), [[1.0, 2.0, 3.0], [4.0, 5.0, 8.0]])
    after = outputs(np.zeros((2, 3)), [[1.0, 2.0, 3.0], [4.0, 5.5, 8.0]])
    with pytest.raises(NotEquivalent) as caught:
        compare(before, after, 1e-3, "float64")
    assert str(caught.value) == (
        "the models differ in float64 by 6.25e-02 of the largest output at input 1, output y[1, 1]: 5 before, "
        "5.5 after; the bound is 1.00e-03"
    )


def test_differences_are_relative_to_the_largest_element_over_all_inputs() -> None:
    assert measure(outputs([1.0], [100.0]), outputs([2.0], [100.0])).deviation == 0.01


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_infinities_and_nans_must_stand_in_the_same_places(dtype: Any) -> None:
    odd = np.array([np.nan, np.inf, -np.inf, 1.0]).astype(dtype)
    assert measure(outputs(odd), outputs(odd)).deviation == 0.0
    for place in range(4):
        other = odd.copy()
        other[place] = 2.0 if place == 3 else 0.0
        assert measure(outputs(odd), outputs(other)).deviation >= 1.0
    assert measure(outputs(odd), outputs(-odd)).deviation == np.inf


def test_outputs_of_other_names_or_shapes_are_not_equivalent() -> None:
    with pytest.raises(NotEquivalent, match=r"one has outputs \['y'\], the other \['z'\]"):
        compare(outputs([1.0]), outputs([1.0], name="z"), 1.0)
    with pytest.raises(NotEquivalent, match=r"shapes \(1,\) and \(2,\)"):
        compare(outputs([1.0]), outputs([1.0, 1.0]), 1.0)


def test_shapes_that_differ_are_caught_even_where_float64_cannot_be_run() -> None:
    with pytest.raises(NotEquivalent, match=r"shapes \(1,\) before, \(2,\) after"):
        judge((outputs([1.0]), outputs([1.0, 1.0])), None, "float32", 1, 1)


@pytest.mark.parametrize(("before", "after"), [([1, 2], [1, 3]), ([True, False], [True, True])])
def test_whole_numbers_and_booleans_must_be_equal_but_only_in_float64(before: Any, after: Any) -> None:
    assert measure(outputs(before), outputs(after)).deviation == 1.0
    assert measure(outputs(before), outputs(after), discrete=False).deviation == 0.0
    assert measure(outputs(before), outputs(before)).deviation == 0.0


def test_complex_outputs_are_compared_as_such() -> None:
    assert measure(outputs([3 + 4j]), outputs([3 - 4j])).deviation == pytest.approx(1.6)


def test_an_output_of_nothing_or_of_zeros_is_equal_to_itself() -> None:
    assert measure(outputs(np.zeros((0, 3))), outputs(np.zeros((0, 3)))).deviation == 0.0
    assert measure(outputs(np.zeros(3)), outputs(np.zeros(3))).deviation == 0.0
    assert measure(outputs(np.zeros(3)), outputs(np.full(3, 1e-3))).deviation == 1e-3


def test_a_model_that_overflows_in_its_own_dtype_does_not_excuse_a_wrong_fold() -> None:
    """Its noise would be infinite, and so would a bound made from it."""
    exact, wrong = outputs([1e6, 1.0]), outputs([1e6, 1.5])
    own = outputs(np.array([np.inf, 1.0], np.float16))
    with pytest.raises(NotEquivalent, match="in float64"):
        judge((own, own), (exact, wrong), "float16", 1, 1)
    with pytest.raises(NotEquivalent, match="in float16"):
        judge((own, outputs(np.array([np.inf, 1.5], np.float16))), (exact, exact), "float16", 1, 1)
    evidence = judge((own, own), (exact, exact), "float16", 1, 1)
    assert all(np.isfinite(item.bound) and item.deviation == 0.0 for item in evidence)


def test_a_fold_that_overflows_where_the_model_did_not_is_caught() -> None:
    exact, own = outputs([1e4, 1.0]), outputs(np.array([1e4, 1.0], np.float16))
    with pytest.raises(NotEquivalent, match="in float16"):
        judge((own, outputs(np.array([np.inf, 1.0], np.float16))), (exact, exact), "float16", 1, 1)


@pytest.mark.parametrize(("arrays", "movement"), [
    ([[[1.0], [4.0]]], 0.75), ([[1.0], [4.0]], 0.75), ([[[4.0], [4.0]]], 0.0), ([[4.0]], None), ([[[4.0]]], None),
])  # fmt: skip
def test_movement_is_how_far_an_output_moves_between_two_inputs(arrays: Any, movement: float | None) -> None:
    both = (outputs(*arrays), outputs(*arrays))
    (evidence,) = judge(both, both, "float64", 0, len(arrays))
    assert evidence.movement == movement


# ---------------------------------------------------------------- one comparison


class Made:
    """Runs that are known beforehand; what is an exception is raised."""

    dtype, examples = "float32", 64

    def __init__(
        self,
        before: Any,
        exact: Any,
        after: Any = None,
        nudged: Any = None,
        doubt: str = "",
        near: Any = None,
        far: Any = None,
        alike: Any = None,
    ) -> None:
        unknown = Unavailable("unknown")
        self.results = [before, exact, after, nudged, near or unknown, far or unknown, alike or unknown]
        self.doubt, self.calls = doubt, list[int]()

    def _give(self, which: int) -> Any:
        self.calls.append(which)
        if isinstance(self.results[which], Exception):
            raise self.results[which]
        return self.results[which]

    def run_before(self) -> Any:
        return self._give(0)

    def run_exactly(self) -> Any:
        return self._give(1)

    def run_after(self, folded: Any) -> Any:
        assert folded == "folded"
        return self._give(2)

    def run_nudged(self, exact: bool, units: float, seed: int) -> Any:
        return self._give(4 if exact and units == 1 else 5 if exact else 3)

    def run_alike(self, folded: Any) -> Any:
        assert folded == "folded"
        return self._give(6)


def questions(comparison: Comparison) -> list[str]:
    return [item.question for item in comparison.judge("folded")]


def test_a_comparison_that_agrees_runs_each_model_once_and_nudges_nothing() -> None:
    before, after = pair(np.float32, *folded())
    runs = Made(before, pair(np.float64, *folded()), after)
    assert questions(Comparison(runs, 1)) == ["float64", "float32"]
    assert runs.calls == [0, 1, 2]


def test_the_folded_model_runs_last_since_it_may_be_the_unfolded_one_edited() -> None:
    runs = Made(pair(np.float32, *folded())[0], pair(np.float64, *folded()))
    Comparison(runs, 1)
    assert runs.calls == [0, 1]


def moved(outputs: Any, by: float) -> Any:
    """Outputs, each larger by something."""
    return [{"logits": row["logits"] + by} for row in outputs]


def test_a_float64_model_is_granted_what_one_rounding_of_its_numbers_does_and_no_more() -> None:
    before, _ = pair(np.float64, *folded())

    def ask(off: float, near: float, far: float) -> list[str]:
        after = moved(before, off)
        runs = Made(before, (before, after), after, near=moved(before, near), far=moved(before, far))
        runs.dtype = "float64"
        return questions(Comparison(runs, 1))

    assert ask(3e-11, 5e-12, 5e-9) == ["float64"]
    for off, near, far in ((1e-10, 5e-12, 5e-9), (3e-11, 0.0, 0.0), (3e-11, 1e-13, 1e-10)):
        with pytest.raises(NotEquivalent, match="in float64"):
            ask(off, near, far)


def test_a_response_that_does_not_grow_is_a_jump_and_excuses_nothing_in_float64() -> None:
    before, _ = pair(np.float64, *folded())
    after = moved(before, 3e-11)
    for far in (5e-12, 1e-10, np.nan):
        runs = Made(before, (before, after), after, near=moved(before, 5e-12), far=moved(before, far))
        runs.dtype = "float64"
        with pytest.raises(NotEquivalent, match="in float64"):
            Comparison(runs, 1).judge("folded")


def test_what_one_rounding_does_in_float64_is_measured_before_the_model_is_edited_and_only_if_asked() -> None:
    before, after = pair(np.float32, *folded())
    exact, _ = pair(np.float64, *folded())
    off = moved(exact, 1e-9), moved(exact, 2e-6)
    runs = Made(before, (exact, off[0]), after, near=moved(exact, 1e-9), far=off[1])
    comparison = Comparison(runs, 1)
    assert set(runs.calls) == {0, 1, 4, 5}
    assert questions(comparison) == ["float64", "float32"]
    assert 3 not in runs.calls


def test_a_model_that_jumps_is_granted_what_rounded_inputs_do_to_it_and_no_more() -> None:
    before, _ = pair(np.float32, *folded())
    exact = pair(np.float64, *folded())
    off = [{"logits": row["logits"] + np.float32(3e-4)} for row in before]
    near = [{"logits": row["logits"] - np.float32(3e-4)} for row in before]
    jumping, steady = Made(before, exact, off, near), Made(before, exact, off, before)
    comparison = Comparison(jumping, 1)
    assert questions(comparison) == ["float64", "float32"]
    assert any("one rounding of inputs and weights moves the outputs" in note for note in comparison.notes)
    with pytest.raises(NotEquivalent):
        Comparison(steady, 1).judge("folded")
    with pytest.raises(NotEquivalent):
        Comparison(Made(before, exact, off, Unavailable("gone")), 1).judge("folded")


def test_a_model_that_selects_is_held_to_runs_that_choose_alike() -> None:
    own, exact = pair(np.float32, *folded()), pair(np.float64, *folded())
    jumped, wrong = moved(own[1], 1.0), moved(own[1], 1e-3)

    def ask(own_alike: Any, after: Any, truth: Any = exact[0]) -> Comparison:
        alike = Alike(own_alike, exact, choices=9, after=2, truth=0)
        comparison = Comparison(Made(own[0], (truth, truth), after, alike=alike), 1)
        assert all(item.deviation <= item.bound < TELLING for item in comparison.judge("folded"))
        return comparison

    assert "of 9 choices 2 fall otherwise" in ask(own, jumped).notes[0]
    assert "of 9 choices 2 fall otherwise" in ask(own, own[1], truth=moved(exact[0], 1.0)).notes[0]
    for truth in (exact[0], moved(exact[0], 1.0)):
        with pytest.raises(NotEquivalent):
            ask((own[0], wrong), jumped, truth)


def test_a_bound_as_large_as_the_outputs_is_owned_up_to() -> None:
    dtype = ml_dtypes.bfloat16
    runs = Made(pair(dtype, *folded())[0], pair(np.float64, *folded()), pair(dtype, *folded())[1])
    runs.dtype = "bfloat16"
    few, many = Comparison(runs, 1), Comparison(runs, 60)
    assert questions(few) == questions(many) == ["float64", "bfloat16"]
    assert (few.notes, len(many.notes)) == ([], 1)
    assert "in bfloat16 the bound is as large as the outputs" in many.notes[0]


def test_runs_that_choose_alike_anyway_excuse_nothing() -> None:
    own, exact = pair(np.float32, *folded()), pair(np.float64, *folded())
    alike = Alike(own, exact, choices=9, after=0, truth=0)
    with pytest.raises(NotEquivalent):
        Comparison(Made(own[0], exact, moved(own[1], 1.0), own[0], alike=alike), 1).judge("folded")


def test_what_cannot_be_run_is_left_out_with_its_note() -> None:
    before, after = pair(np.float32, *folded())
    exact = pair(np.float64, *folded())
    narrow = Comparison(Made(before, Unavailable("no float64"), after), 1)
    wide = Comparison(Made(Unavailable("no float32"), exact), 1)
    none = Comparison(Made(Unavailable("neither"), Unavailable("neither")), 1)
    assert (questions(narrow), narrow.notes) == (["float32"], ["no float64"])
    assert (questions(wide), wide.notes) == (["float64"], ["no float32"])
    assert (questions(none), none.notes) == ([], ["neither"])


def test_a_rounded_model_that_runs_in_float64_only_is_held_to_its_own_dtype() -> None:
    exact = net(W1, B1, (MEAN, VAR, GAMMA, BETA), np.float64), net(*folded(), None, np.float64)
    exact[1][0]["logits"] += 1e-8
    runs = Made(Unavailable("no kernel"), exact)
    assert "float64" in questions(Comparison(runs, 1, rounded=True))
    with pytest.raises(NotEquivalent):
        Comparison(runs, 1).judge("folded")


def test_float64_that_is_in_doubt_is_dropped_only_where_it_differs() -> None:
    before, after = pair(np.float32, *folded())
    right, wrong = pair(np.float64, *folded()), pair(np.float64, W1, B1)
    agreed = Comparison(Made(before, right, after, doubt="narrow"), 1)
    dropped = Comparison(Made(before, wrong, after, doubt="narrow"), 1)
    assert (questions(agreed), agreed.notes) == (["float64", "float32"], [])
    assert (questions(dropped), dropped.notes) == (["float32"], ["narrow"])
