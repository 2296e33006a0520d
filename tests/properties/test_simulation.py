"""The checker of folds against a driver with a mistake in it, and against one without: nothing wrong comes past it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnfold.errors import Refuse
from bnfold.ir import Graph
from bnfold.simulation import NotProved, check
from bnfold.travel import Options, Plan, travel
from tests.properties import machine
from tests.properties.mutants import MUTANTS, Mutant, driver

WRONG = 1e-6


def drawn(seed: int) -> tuple[Graph, Any, Any]:
    with np.errstate(all="ignore"):
        return machine.draw(seed, 4 + seed % 14)


def is_proved(graph: Graph, plan: Plan) -> bool:
    try:
        check(graph, plan.graph, plan.absorbed)
    except NotProved:
        return False
    return True


def is_wrong(graph: Graph, plan: Plan, weights: Any, inputs: Any) -> bool:
    """Whether a plan computes something else, by running it."""
    with np.errstate(all="ignore"):
        before = machine.run(graph, weights, inputs)
        after = machine.run(plan.graph, weights, inputs)
    return not machine.deviation(before, after, zip(graph.outputs, plan.graph.outputs, strict=True)) <= WRONG


def mistaken_fold(mutant: Mutant, seed: int) -> tuple[Graph, Plan, bool] | None:
    """The graph of a seed, what a driver with a mistake makes of it, whether that is wrong; None where it raises."""
    graph, weights, inputs = drawn(seed)
    try:
        with driver(mutant) as mistaken:
            plan = mistaken(graph)
        return graph, plan, is_wrong(graph, plan, weights, inputs)
    except (Refuse, ValueError, LookupError, AssertionError, AttributeError):
        return None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_fold_is_stopped_without_being_run(mutant: Mutant) -> None:
    graph, weights, inputs = drawn(mutant.seed)
    with driver(mutant) as mistaken:
        plan = mistaken(graph)
    assert is_wrong(graph, plan, weights, inputs)
    assert not is_proved(graph, plan)
    assert not is_wrong(graph, travel(graph), weights, inputs), "it is wrong without the mistake, too"


def test_there_are_fifty_mistakes_and_each_is_another_one() -> None:
    assert len({(mutant.module, mutant.old, mutant.new) for mutant in MUTANTS}) >= 50
    assert {mutant.module for mutant in MUTANTS} == {"travel", "rules", "algebra"}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_of_hundreds_of_folds_by_a_mistaken_driver_no_wrong_one_is_proved(mutant: Mutant) -> None:
    for seed in range(300):
        if (found := mistaken_fold(mutant, seed)) is not None:
            graph, plan, wrong = found
            assert not (wrong and is_proved(graph, plan)), seed


def refused(seeds: range) -> list[int]:
    """The graphs whose folds are right and not proved."""
    found = []
    for seed in seeds:
        graph, _, _ = drawn(seed)
        if not is_proved(graph, travel(graph, Options(halves=seed % 3 > 0, lower=seed % 5 == 0))):
            found.append(seed)
    return found


def test_right_folds_are_proved() -> None:
    assert len(refused(range(300))) <= 3


@pytest.mark.slow
def test_of_thousands_of_right_folds_less_than_one_in_two_hundred_is_not_proved() -> None:
    assert len(refused(range(1_000, 7_000))) < 30
