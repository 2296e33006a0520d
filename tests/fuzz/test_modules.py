"""Random torch modules: folded without verification they compute what they did, and a row that lies is found out."""

from __future__ import annotations

import pytest

from tests.fuzz.drawing import Finding, complaint, findings
from tests.fuzz.modules import FEATURES, judge
from tests.fuzz.test_graphs import LIES

FEW, MANY, SHARDS = range(60), range(1_000, 11_000), 40


def search(seeds: range, enough: int = 5) -> list[Finding]:
    return findings(FEATURES, judge, seeds, enough)


def test_dozens_of_random_modules_compute_the_same_folded() -> None:
    found = search(FEW)
    assert not found, "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_thousands_of_random_modules_compute_the_same_folded(shard: int) -> None:
    found = search(MANY[shard::SHARDS])
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("lie", ["a zero border takes a shift", "a shift passes a ReLU"])
def test_a_fold_that_is_wrong_is_found(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*LIES[lie])
    found = search(range(200), enough=1)
    monkeypatch.undo()
    assert found
    assert not complaint(judge, found[0].draw), "it is wrong without the lie, too"
