"""Decide where every affine goes, and let nothing be done that is not proved.

`travel` and `merge` search, `simulation` and `response` check. Where the first check comes to no end, BatchNorms stay
until it does: those that multiply some channel by zero, of which no inverse says what was done to it, else all of them.
Where the second one does not, nothing is merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bnfold import reasons, report
from bnfold.ir import Graph, Node
from bnfold.merge import Merge, Merged
from bnfold.operators import Numbers
from bnfold.response import Claim, Stored, check_merges
from bnfold.simulation import NotProved, check
from bnfold.travel import Options, Plan, travel

__all__ = ["claim", "decide", "describe", "prove"]


def decide(graph: Graph, options: Options | None = None, fits: Callable[[Node], str] | None = None) -> Plan:
    """A plan of `travel`, proved for every input.

    Args:
        graph, options, fits: see `travel`.

    Raises:
        NotProved: not even the model as it is equals itself, which is a mistake of ours.
    """
    for held in _held(graph):
        plan = _restored(graph, travel(_without(graph, held), options, fits), held)
        try:
            check(graph, plan.graph, plan.absorbed)
        except NotProved as error:
            gap = error
        else:
            return plan
    raise gap


def prove(graph: Graph, merged: Merged, stored: Stored, known: Mapping[Any, Any] | None = None) -> Merged:
    """What was merged, if that is proved for every input; else nothing.

    Args:
        graph, stored: see `check_merges`.
        merged: what became of it.
        known: numbers that are going to be written, as `claim` takes them.
    """
    claims = [claim(one, stored, known) for one in merged.merges]
    try:
        check_merges(graph, merged.graph, claims, merged.left, stored)
    except NotProved as gap:
        undone = tuple(report.Merge("", one.record.sources, reason=str(gap)) for one in merged.merges)
        return Merged(graph, refused=(*undone, *merged.refused))
    return merged


def describe(graph: Graph, plan: Plan, merged: Merged) -> tuple[str, ...]:
    """What is proved of a fold, in words; nothing where nothing was done.

    Args:
        graph: as it was read.
        plan, merged: what became of it.
    """
    gone = len(graph.nodes) - len(plan.graph.nodes)
    done = gone or any(node.linear is not None and node.linear.changed for node in plan.graph.nodes)
    if not done and not merged.merges:
        return ()
    merges = f" and {len(merged.merges)} merges" if len(merged.merges) > 1 else ""
    merges = " and one merge" if len(merged.merges) == 1 else merges
    return (f"equal for every input over the real numbers, by {len(graph.nodes):,} steps{merges}",)


def claim(one: Merge, stored: Stored, known: Mapping[Any, Any] | None = None) -> Claim:
    """What a merge claims.

    Args:
        one: the merge.
        stored: where its numbers are computed from.
        known: those that were computed, by the identity of their operator, with that.
    """
    way = one.candidate

    def numbers() -> Numbers:
        operator, arrays = (known or {}).get(id(one.operator), (None, None))
        return arrays if operator is one.operator else one.operator.numbers(stored)

    return Claim(one.into, way.source, way.result, way.dropped, way.signs, numbers)


def _held(graph: Graph) -> Iterator[frozenset[str]]:
    """The BatchNorms to leave where they are: none, those that multiply by zero, all; no set of them twice."""
    norms = {node.name: node.affine for node in graph.nodes if node.is_batchnorm and node.affine is not None}
    zeros = frozenset(name for name, affine in norms.items() if np.any(affine.scale == 0))
    yield from dict.fromkeys((frozenset[str](), zeros, frozenset(norms)))


def _without(graph: Graph, held: frozenset[str]) -> Graph:
    return graph.replace(
        {name: replace(graph[name], affine=None, reason=reasons.UNPROVED()) for name in held}
    )


def _restored(graph: Graph, plan: Plan, held: frozenset[str]) -> Plan:
    """The plan, with the numbers of those that were held."""
    nodes = {name: replace(plan.graph[name], affine=graph[name].affine, reason="") for name in held}
    return replace(plan, graph=plan.graph.replace(nodes))
