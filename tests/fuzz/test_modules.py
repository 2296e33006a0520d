"""Random torch modules: folded without verification they compute what they did, and a row that lies is found out."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from bnfold import decide
from tests.fuzz.drawing import Draw, Finding, complaint, draw, findings
from tests.fuzz.modules import FEATURES, build, distance, example, judge, other, outputs
from tests.fuzz.test_graphs import LIES

FEW, MANY, SHARDS = range(20), range(20, 4_000), 40


def search(seeds: range, *only: str, enough: int = 5) -> list[Finding]:
    return findings({name: FEATURES[name] for name in only} or FEATURES, judge, seeds, enough)


def test_twenty_random_modules_compute_the_same_folded() -> None:
    found = search(FEW)
    assert not found, "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_thousands_of_random_modules_compute_the_same_folded(shard: int) -> None:
    found = search(MANY[shard::SHARDS])
    assert not found, "\n".join(map(str, found))


def test_a_weight_that_is_computed_is_tied_to_nothing() -> None:
    assert not search(range(20), "parametrised", "tied")


@pytest.mark.slow
def test_parts_of_weights_are_folded_into_apart() -> None:
    assert not search(range(60), "part", "elementwise", "combine")


ONE_SIZE = (Draw(6404, (("pool", 1778), ("chain", 7985))), Draw(10706, (("pool", 5551), ("chain", 9006))))
"""A Linear along the last axis where that is 4, as it is in images of 5 after the pool, and in no others."""


@pytest.mark.parametrize("one", ONE_SIZE, ids=lambda one: str(one.seed))
def test_what_happens_at_one_size_that_no_trial_met_is_not_judged(one: Draw) -> None:
    assert not complaint(judge, one)
    module = build(one)
    outputs(module, example(one), True)
    met = set(module.ways)
    assert outputs(module, other(6, len(example(one)), 5, 5), True)
    assert module.ways > met, "the draw no longer asks for a size that its example has not"


def test_values_that_are_empty_are_as_far_apart_as_their_shapes() -> None:
    empty, narrow = torch.ones(2, 0), torch.ones(1, 0)
    assert distance([empty], [empty]) == 0
    assert distance([empty], [narrow]) == float("inf")
    assert distance([empty, torch.ones(2)], [empty, torch.zeros(2)]) == 1


def test_a_reader_that_runs_a_module_on_its_example_alone_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A branch on a size would be folded as if it were none."""
    trials = import_module("bnfold.torch.trials")

    def run_none(*arguments: Any) -> Any:
        return trials.Trials()

    monkeypatch.setattr(import_module("bnfold.torch.read"), "run_trials", run_none)
    assert search(range(20), "skips on size", "skips on evenness", "conv norm", enough=1)
    monkeypatch.undo()
    assert not search(range(5), "skips on size", "skips on evenness", "conv norm")


def test_a_fold_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for proof in ("check", "check_merges"):  # which would not let it be wrong
        monkeypatch.setattr(decide, proof, lambda *given: None)
    monkeypatch.setattr(*LIES["a zero border takes a shift"])
    draws = (draw({"chain": FEATURES["chain"]}, seed) for seed in range(200))
    found = next(one for one in draws if complaint(judge, one))
    monkeypatch.undo()
    assert not complaint(judge, found), "it is wrong without the lie, too"
