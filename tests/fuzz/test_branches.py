"""Random torch modules with much to merge compute the same folded, and a rule that lies is found out."""

from __future__ import annotations

import pytest

from bnfold.torch.calls import ModuleCalls
from tests.fuzz.branches import FEATURES, judge
from tests.fuzz.drawing import Finding, complaint, draw, findings

FEW, MANY, SHARDS = range(6), range(6, 2_000), 40


def search(seeds: range) -> list[Finding]:
    return findings(FEATURES, judge, seeds)


def test_some_random_modules_compute_the_same_merged() -> None:
    found = search(FEW)
    assert not found, "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_thousands_of_random_modules_compute_the_same_merged(shard: int) -> None:
    found = search(MANY[shard::SHARDS])
    assert not found, "\n".join(map(str, found))


def test_a_module_that_is_replaced_whatever_its_code_does_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ModuleCalls, "_check", lambda *given: None)
    draws = (draw({"block": FEATURES["block"]}, seed) for seed in range(10))
    found = next(one for one in draws if complaint(judge, one))
    monkeypatch.undo()
    assert not complaint(judge, found), "it is wrong without the lie, too"
