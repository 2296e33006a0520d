"""Random graphs: folded they compute what they computed, and small ones lose no BatchNorm that could have gone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfold.errors import Refuse
from bnfold.ir import Graph
from bnfold.rules import TABLE
from bnfold.travel import Attempt, Options, Plan, _Driver, travel
from tests.properties import machine

TOLERANCE = 1e-12
FEW, MANY = range(300), range(1_000, 16_000)


def folded(
    seed: int,
    size: int,
    options: Options | None = None,
    draw: Callable[[int, int], tuple[Graph, Any, Any]] = machine.draw,
) -> tuple[Plan, float]:
    """One random graph, folded, and how far its outputs moved."""
    with np.errstate(all="ignore"):
        graph, weights, inputs = draw(seed, size)
        before = machine.run(graph, weights, inputs)
    plan = travel(graph, options)
    with np.errstate(all="ignore"):
        after = machine.run(plan.graph, weights, inputs)
    assert len(plan.verdicts) == len({node.place for node in graph.nodes if node.is_batchnorm})
    outputs = zip(graph.outputs, plan.graph.outputs, strict=True)
    return plan, machine.deviation(before, after, outputs)


def test_hundreds_of_random_graphs_compute_the_same_once_folded() -> None:
    outcomes: Counter[str] = Counter()
    for seed in FEW:
        plan, deviation = folded(seed, 4 + seed % 14)
        assert deviation <= TOLERANCE, seed
        outcomes.update(verdict.outcome for verdict in plan.verdicts)
    assert min(outcomes[outcome] for outcome in ("folded", "scale folded", "kept")) >= 20


def test_hundreds_of_random_sequences_compute_the_same_once_folded() -> None:
    absorbed = 0
    for seed in FEW:
        plan, deviation = folded(seed, 6 + seed % 14, draw=machine.draw_sequence)
        assert deviation <= TOLERANCE, seed
        products = [node.linear for node in plan.graph.nodes if node.op == "InputProduct"]
        absorbed += sum(linear is not None and linear.changed for linear in products)
    assert absorbed >= 20


@given(st.integers(0, 2**32), st.integers(3, 12), st.booleans(), st.booleans())
@settings(max_examples=100)
def test_any_random_graph_computes_the_same_once_folded(
    seed: int, size: int, halves: bool, lower: bool
) -> None:
    assert folded(seed, size, Options(halves=halves, lower=lower))[1] <= TOLERANCE


@pytest.mark.slow
def test_tens_of_thousands_of_random_graphs_compute_the_same_once_folded() -> None:
    wrong = [seed for seed in MANY if not folded(seed, 4 + seed % 14)[1] <= TOLERANCE]
    assert not wrong


@pytest.mark.slow
def test_large_random_graphs_compute_the_same_once_folded() -> None:
    wrong = [seed for seed in range(300) if not folded(seed, 120)[1] <= TOLERANCE]
    assert not wrong


@pytest.mark.parametrize(("op", "truth"), [("Relu", "Identity"), ("MaxPool", "AveragePool"), ("Mul", "Add")])
def test_a_row_that_lies_is_found_out(op: str, truth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The property can fail: give one operator the row of another, and some graph comes out wrong."""
    monkeypatch.setitem(TABLE, op, TABLE[truth])

    def is_wrong(seed: int) -> bool:
        try:
            return folded(seed, 12)[1] > TOLERANCE
        except (ValueError, IndexError):
            return True

    assert any(is_wrong(seed) for seed in range(400))


def test_folding_a_folded_graph_folds_nothing_more() -> None:
    for seed in range(100):
        graph = machine.draw(seed, 10)[0]
        once = travel(graph)
        again = travel(once.graph)
        assert not any(verdict.outcome == "folded" for verdict in again.verdicts), seed


def test_the_same_graph_gives_the_same_verdicts_and_numbers() -> None:
    for seed in range(50):
        graph = machine.draw(seed, 12)[0]
        first, second = travel(graph), travel(machine.draw(seed, 12)[0])
        assert first.verdicts == second.verdicts
        assert [node.name for node in first.graph.nodes] == [node.name for node in second.graph.nodes]
        pairs = zip(first.graph.nodes, second.graph.nodes, strict=True)
        assert all(
            a.linear.equals(b.linear) for a, b in pairs if a.linear is not None and b.linear is not None
        )


# ---------------------------------------------------------------- completeness


def most(graph: Graph) -> int:
    """How many BatchNorms the best sequence of moves erases, by trying them all."""
    driver = _Driver(graph, Options(halves=False), lambda node: "", (Attempt.up, Attempt.down))
    return _best(driver, list(driver._units()), set())


def _best(driver: _Driver, units: list[str], seen: set[object]) -> int:
    top = len(driver.verdicts)
    for unit in units:
        for direction in (Attempt.up, Attempt.down) if unit not in driver.verdicts else ():
            branch = copy.copy(driver)
            for name in ("nodes", "erased", "verdicts", "origins", "outputs"):
                setattr(branch, name, copy.copy(getattr(driver, name)))
            branch.reads = {value: dict(names) for value, names in driver.reads.items()}
            attempt = Attempt(branch, {unit: None}, compose=True)
            try:
                attempt.make(direction)
            except Refuse:
                continue
            attempt.commit()
            left = [branch.nodes[n] for u in units for n in branch.places[u] if n not in branch.erased]
            numbers = tuple((n.affine.scale.tobytes(), n.affine.shift.tobytes()) for n in left if n.affine)
            state = (frozenset(branch.verdicts), numbers)
            if state not in seen:
                seen.add(state)
                top = max(top, _best(branch, units, seen))
    return top


def lost(seeds: range, limit: int) -> tuple[int, int]:
    """How many graphs were tried, and how many of them lose a BatchNorm that some sequence of moves would erase."""
    tried = behind = 0
    for seed in seeds:
        with np.errstate(all="ignore"):
            graph = machine.draw(seed, 4 + seed % 8)[0]
        if len({node.place for node in graph.nodes if node.is_batchnorm}) <= limit:
            tried += 1
            behind += most(graph) > sum(v.outcome == "folded" for v in travel(graph).verdicts)
    return tried, behind


def test_small_graphs_lose_no_batchnorm_that_any_sequence_of_moves_erases() -> None:
    tried, behind = lost(range(200), 4)
    assert tried > 150
    assert behind == 0


@pytest.mark.slow
def test_of_thousands_of_small_graphs_at_most_one_in_a_thousand_loses_a_batchnorm() -> None:
    """Composing BatchNorms into each other is a choice, and `travel` tries two orders of it, not all."""
    tried, behind = lost(range(1_000, 9_000), 6)
    assert tried > 6_000
    assert behind <= tried // 1_000
