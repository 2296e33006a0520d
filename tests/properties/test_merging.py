"""Random blocks of linear operators: merged they compute what they computed, at every size, and nothing is dearer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnfold.candidates
import bnfold.merge
import bnfold.operators
from bnfold.ir import Node
from bnfold.merge import Merged, merge
from bnfold.operators import Operator
from bnfold.window import Window
from tests.properties import blocks

TOLERANCE = 1e-12
FEW, MANY = range(300), range(1_000, 9_000)


class Draw:
    """One random graph, merged, and evaluated before and after at each of its sizes.

    Every third one has sizes that are symbols, every fourth one a host that refuses much, and every fifth one is merged
    whatever it costs, unless it is said.
    """

    def __init__(
        self,
        seed: int,
        symbolic: bool | None = None,
        stubborn: float | None = None,
        at_any_cost: bool | None = None,
        size: int = 0,
    ) -> None:
        symbolic = seed % 3 == 0 if symbolic is None else symbolic
        stubborn = 0.3 * (seed % 4 == 0) if stubborn is None else stubborn
        at_any_cost = seed % 5 == 0 if at_any_cost is None else at_any_cost
        self.graph, self.weights, self.inputs = blocks.draw(seed, size or 3 + seed % 12, symbolic)
        self.model = blocks.Model(self.weights, stubborn, adds_in_place=seed % 7 == 0)
        self.merged = merge(self.graph, self.model, at_any_cost)
        self.before = [blocks.run(self.graph, self.weights, inputs) for inputs in self.inputs]
        made = self.model.merged(self.merged)
        self.after = [blocks.run(self.merged.graph, made, inputs) for inputs in self.inputs]

    @property
    def deviation(self) -> float:
        """The largest difference, relative to the largest number of an output or a thousandth of that of the graph."""
        pairs = zip(self.before, self.after, strict=True)
        return max(self._deviation(before, after) for before, after in pairs)

    def _deviation(self, before: blocks.Arrays, after: blocks.Arrays) -> float:
        largest = max(float(np.abs(value).max(initial=0)) for value in before.values())
        worst = 0.0
        for old, new in zip(self.graph.outputs, self.merged.graph.outputs, strict=True):
            x, y = before[old], after[new]
            if x.shape != y.shape:
                return np.inf
            peak = max(float(np.abs(x).max(initial=0)), largest / 1000)
            worst = max(worst, float(np.abs(x - y).max(initial=0)) / (peak or 1.0))
        return worst


def kinds(draw: Draw) -> set[str]:
    """What there is to see in the merges of a graph."""
    seen = {"left"} if draw.merged.left else set()
    for one in draw.merged.merges:
        operator, window = one.operator, one.operator.window
        parts = [draw.graph[name] for name in one.candidate.nodes]
        last = draw.before[0][one.candidate.result].ndim - 1
        facts = {
            "gathered": bool(one.candidate.dropped),
            "grouped": operator.groups > 1,
            "shared": any(node.site for node in parts),
            "table": operator.lookup,
            f"{len(operator.kernel)}-d": True,
            "strided": window is not None and max(window.strides) > 1,
            "dilated": window is not None and max(window.dilations) > 1,
            "uneven": window is not None and any(a != b for a, b in window.pads or ()),
            "left product": window is None and operator.in_axis == operator.out_axis < last,
            "turned": operator.in_axis != operator.out_axis and not operator.lookup,
        }
        seen |= {fact for fact, holds in facts.items() if holds} | {node.op for node in parts}
    return seen


EXPECTED = {
    *("0-d", "1-d", "2-d", "3-d", "strided", "dilated", "uneven", "grouped", "shared"),
    *("gathered", "left", "table", "left product", "turned"),
    *("Conv", "Gemm", "MatMul", "Embedding", "AveragePool", "Affine", "BatchNormalization", "Identity"),
    *("Add", "Sub", "Sum"),
}


def test_hundreds_of_random_blocks_compute_the_same_once_merged() -> None:
    seen: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for seed in FEW:
        draw = Draw(seed)
        assert draw.deviation <= TOLERANCE, seed
        seen.update(kinds(draw))
        refused.update(one.reason.partition(":")[0] for one in draw.merged.refused)
    assert min(seen[kind] for kind in EXPECTED) >= 3, seen
    assert len(refused) >= 6, refused


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([0.0, 0.2, 0.6]), st.booleans())
@settings(max_examples=60)
def test_any_random_block_computes_the_same_once_merged(
    seed: int, symbolic: bool, stubborn: float, at_any_cost: bool
) -> None:
    assert Draw(seed, symbolic, stubborn, at_any_cost).deviation <= TOLERANCE


@pytest.mark.slow
def test_tens_of_thousands_of_random_blocks_compute_the_same_once_merged() -> None:
    wrong = [seed for seed in MANY if not Draw(seed).deviation <= TOLERANCE]
    assert not wrong


@pytest.mark.slow
def test_large_random_graphs_compute_the_same_once_merged() -> None:
    wrong = [seed for seed in range(300) if not Draw(seed, size=80).deviation <= TOLERANCE]
    assert not wrong


def form(merged: Merged) -> list[Any]:
    """All that was decided."""
    nodes = [(node.name, node.op, node.inputs, node.outputs) for node in merged.graph.nodes]
    return [nodes, merged.graph.outputs, [one.record for one in merged.merges], merged.refused, merged.left]


def test_the_same_graph_is_merged_alike_in_whatever_order_its_shapes_are_listed() -> None:
    for seed in range(100):
        draw = Draw(seed, at_any_cost=False)
        graph = replace(draw.graph, shapes=dict(reversed(draw.graph.shapes.items())))
        assert form(merge(graph, draw.model)) == form(draw.merged)


def test_no_merge_is_dearer_and_the_record_says_what_it_was_and_is_for_one_example() -> None:
    """Counted at the sizes of the first input, which are known of one example or of all."""
    merges = 0
    for seed in FEW[:150]:
        draw = Draw(seed, stubborn=0.0, at_any_cost=False)
        graph = replace(draw.graph, sizes={name: value.shape for name, value in draw.before[0].items()})
        merged = merge(graph, draw.model)
        after = blocks.run(merged.graph, draw.model.merged(merged), draw.inputs[0])
        for one in merged.merges:
            made = draw.before[0][one.candidate.result]
            examples = len(made) if one.operator.out_axis else 1
            nodes = [blocks.cost(graph[name], draw.before[0]) for name in one.candidate.nodes]
            sums = len(one.candidate.dropped) * made.size
            was = int(sum(count for count, _ in nodes) + sums) // examples, sum(held for _, held in nodes)
            count, held = blocks.cost(merged.graph[one.into], after)
            assert one.record.multiply_adds == (was[0], count // examples), seed
            assert one.record.bytes == (was[1], held), seed
            assert count // examples + held <= sum(was), seed
            assert any(graph[name].linear is not None for name in one.candidate.nodes), seed
            merges += 1
    assert merges > 150


class ByName(blocks.Model):
    """A model that stores weights by the names of their nodes."""

    def stored(self, node: Node) -> Any:
        return self.weights[node.name]


def test_merging_again_finds_something_in_one_graph_of_ten_at_most() -> None:
    """What a gathered sum is a sum on may have no other reader any more; nobody looks again."""
    more = 0
    for seed in FEW[:120]:
        draw = Draw(seed, stubborn=0.0, at_any_cost=False)
        more += bool(merge(draw.merged.graph, ByName(draw.model.merged(draw.merged))).merges)
    assert more <= 12


# ---------------------------------------------------------------- the property can fail


def is_found_out() -> bool:
    """Whether some draw comes out wrong, or fails."""

    def is_wrong(seed: int) -> bool:
        try:
            return not Draw(seed).deviation <= TOLERANCE
        except (ValueError, IndexError, KeyError, AssertionError, RuntimeError, blocks.Unsuitable):
            return True

    return any(is_wrong(seed) for seed in range(600))


def with_slack_of(first: Window, second: Window) -> Window:
    """The second window, padded at its end so that its slack is that of the first one."""
    pads = [
        (before, after + first.slack(axis) - second.slack(axis))
        for axis, (before, after) in enumerate(second.pads or ())
    ]
    return replace(second, pads=tuple(pads))


def forget_the_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    union = bnfold.operators.union
    lax = lambda first, second: union(first, with_slack_of(first, second))  # noqa: E731
    monkeypatch.setattr(bnfold.operators, "union", lax)


def forget_the_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the slack: where strides differ and slacks do not, outputs are of one size only if they have one element."""
    union = bnfold.operators.union

    def lax(first: Window, second: Window) -> Window:
        if first.strides == second.strides:
            return union(first, second)
        return union(first, with_slack_of(first, replace(second, strides=first.strides)))

    monkeypatch.setattr(bnfold.operators, "union", lax)


def forget_what_the_second_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Window, "is_point", property(lambda window: True))


def forget_the_bias_under_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Window, "is_padded", property(lambda window: False))


def forget_the_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    add = bnfold.operators.add
    monkeypatch.setattr(bnfold.operators, "add", lambda first, second, sign: add(first, second))


def forget_other_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    lax = lambda ways, value, nodes: value not in ways.outputs  # noqa: E731
    monkeypatch.setattr(bnfold.candidates.Ways, "is_within", lax)


def forget_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    lax = lambda ways, value, nodes: ways.readers[value] <= nodes  # noqa: E731
    monkeypatch.setattr(bnfold.candidates.Ways, "is_within", lax)


def forget_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnfold.merge._Choice, "_is_used", lambda choice, name: False)


def forget_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def lax(weight: Any, groups: int) -> Any:
        return np.tile(weight, (1, 1, len(weight) // groups, *[1] * (weight.ndim - 3))).reshape(
            groups, -1, weight.shape[2] * len(weight) // groups, *weight.shape[3:]
        )

    monkeypatch.setattr(bnfold.operators, "_regroup", lax)


def forget_dilations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bnfold.operators, "_run", lambda start, taps, dilation, step: slice(start, start + taps)
    )


def forget_the_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bnfold.operators._form

    def lax(operator: Operator) -> Any:
        channels, outputs, _, _, *rest = whole(operator)
        return channels, outputs, *rest

    monkeypatch.setattr(bnfold.operators, "_form", lax)


MUTATIONS: list[Callable[[pytest.MonkeyPatch], None]] = [
    forget_the_slack,
    forget_the_strides,
    forget_what_the_second_pads,
    forget_the_bias_under_padding,
    forget_the_sign,
    forget_other_readers,
    forget_outputs,
    forget_what_is_taken,
    forget_groups,
    forget_dilations,
    forget_the_axis,
]


@pytest.mark.parametrize("forget", MUTATIONS, ids=lambda forget: forget.__name__)
def test_a_merge_that_forgets_a_condition_is_found_out(
    forget: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch)
    assert is_found_out()
