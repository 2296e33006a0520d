"""What was done to a model, as data: enough to check it again elsewhere, from the two models alone.

A `Record` says which BatchNorms are gone, what each linear operator absorbed, what was left of others, what was copied
and what was merged. `apply` makes of the graph of the source, read anew, the graph that the result should have, and
`simulation.check` and `response.check_merges` prove that both compute the same. `match` then finds in the graph that
the result does have, node by node, the one that it should have.

    {"format": "bnfold certificate", "version": 1, ..., "done": {...}}

Nothing of `travel` or `merge` is asked, nor trusted: a record that says too little or the wrong thing proves nothing.

Not covered: the numbers of either model, and what the files say that a graph does not (`bnfold.onnx.certify`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from bnfold.algebra import Affine, Array, Linear
from bnfold.errors import Refuse
from bnfold.ir import Graph, Node
from bnfold.merge import Merged
from bnfold.response import Claim
from bnfold.travel import Plan

__all__ = ["Applied", "Matched", "Record", "apply", "claims", "match", "record"]


@dataclass(frozen=True)
class Record:
    """What was done to a graph, as plain values; nodes and values by their names in the source.

    Attributes:
        erased: the nodes that are gone.
        linears: what linear operators absorbed: scales and shifts `before`, `after`, and the scale `parallel`.
        affines: what others were left of, scale and shift; `absorbed` says what some took in below them.
        copies: of linear operators: the copy, what it is of, who reads it, what it computes.
        merges: what became one operator: see `bnfold.response.Claim`.
        left: of the sums that lost operands, the places of those that are left.
    """

    erased: Sequence[str] = ()
    linears: Mapping[str, Any] = field(default_factory=dict)
    affines: Mapping[str, Any] = field(default_factory=dict)
    absorbed: Mapping[str, Any] = field(default_factory=dict)
    copies: Sequence[Any] = ()
    merges: Sequence[Any] = ()
    left: Mapping[str, Sequence[int]] = field(default_factory=dict)


def record(graph: Graph, plan: Plan, merged: Merged) -> Record:
    """What a plan and its merges do to a graph."""
    after = {node.name: node for node in plan.graph.nodes}
    pairs = [(graph[name], node) for name, node in after.items() if name in graph]
    copies = [node for node in after.values() if node.copied is not None]
    changed = [node for old, node in pairs if node.linear is not old.linear] + copies
    return Record(
        erased=[node.name for node in graph.nodes if node.name not in after],
        linears={node.name: _vectors(node.linear) for node in changed if node.linear is not None},
        affines={
            node.name: _numbers(node.affine)
            for old, node in pairs
            if node.affine is not None and node.affine is not old.affine
        },
        absorbed={name: _numbers(affine) for name, affine in plan.absorbed.items()},
        copies=[[node.name, *(node.copied or ()), node.outputs[0]] for node in copies],
        merges=[
            {
                "into": one.into,
                "source": one.candidate.source,
                "result": one.candidate.result,
                "nodes": sorted(one.candidate.nodes),
                "dropped": [list(operand) for operand in one.candidate.dropped],
                "signs": list(one.candidate.signs),
            }
            for one in merged.merges
        ],
        left={name: list(places) for name, places in merged.left.items()},
    )


def _numbers(affine: Affine) -> dict[str, Any]:
    return {"scale": affine.scale.tolist(), "shift": affine.shift.tolist()}


def _vectors(linear: Linear) -> dict[str, Any]:
    pairs = {"before": linear.before, "after": linear.after}
    found: dict[str, Any] = {
        name: {"scale": pair[0].tolist(), "shift": pair[1].tolist()}
        for name, pair in pairs.items()
        if pair is not None
    }
    return found if linear.parallel is None else {**found, "parallel": linear.parallel.tolist()}


# ---------------------------------------------------------------- doing it again


@dataclass(frozen=True)
class Applied:
    """The graphs that a record makes of a graph.

    Attributes:
        folded: with what was absorbed.
        absorbed: for `simulation.check`.
        merged: the same with what was merged; merged nodes have no numbers yet, nor a form.
        alias: the values that others stand for, since what computed them is gone.
    """

    folded: Graph
    absorbed: Mapping[str, Affine]
    merged: Graph
    alias: Mapping[str, str]


def apply(graph: Graph, done: Record) -> Applied:
    """Do to a graph what a record says.

    Raises:
        Refuse: it cannot be done to this graph.
    """
    graph = _copied(graph, done.copies)
    nodes: dict[str, Node] = {}
    for name, vectors in done.linears.items():
        nodes[name] = replace(graph[name], linear=_with_vectors(graph[name], vectors))
    for name, numbers in done.affines.items():
        old = graph[name]
        affine = _affine(numbers)
        if old.affine is None or affine.rank != old.affine.rank:
            raise Refuse(f"`{name}` cannot be what is left of it")
        nodes[name] = replace(old, affine=affine)
    for name in done.erased:
        if graph[name].affine is None:
            raise Refuse(f"`{name}` cannot be gone")
    folded = graph.replace(nodes).bypass(frozenset(done.erased))
    absorbed = {name: _affine(numbers) for name, numbers in done.absorbed.items()}
    alias = {graph[name].outputs[0]: graph[name].inputs[0] for name in done.erased}
    return Applied(folded, absorbed, *_merged(folded, done, alias))


def _affine(numbers: Mapping[str, Any]) -> Affine:
    scale, shift = _array(numbers["scale"]), _array(numbers["shift"])
    if scale.shape != shift.shape:
        raise Refuse("a scale and its shift are of different shapes")
    return Affine(scale, shift)


def _array(numbers: Any) -> Array:
    array = np.asarray(numbers, np.float64)
    if not np.isfinite(array).all():
        raise Refuse("a number is not finite")
    return array


def _with_vectors(node: Node, vectors: Mapping[str, Any]) -> Linear:
    linear = node.linear
    if linear is None or not vectors.keys() <= {"before", "after", "parallel"}:
        raise Refuse(f"`{node.name}` ({node.op}) cannot absorb")
    sizes = {"before": linear.inputs, "after": linear.outputs}
    pairs: dict[str, tuple[Array, Array]] = {}
    for name, size in sizes.items():
        if name in vectors:
            pairs[name] = _array(vectors[name]["scale"]), _array(vectors[name]["shift"])
            if {each.shape for each in pairs[name]} != {(size,)}:
                raise Refuse(f"`{node.name}` ({node.op}) has other channels")
    parallel = _array(vectors["parallel"]) if "parallel" in vectors else None
    if parallel is not None and parallel.shape != (linear.outputs,):
        raise Refuse(f"`{node.name}` ({node.op}) has other channels")
    return replace(linear, before=pairs.get("before"), after=pairs.get("after"), parallel=parallel)


def _copied(graph: Graph, copies: Sequence[Any]) -> Graph:
    """The graph with copies of linear operators, each behind what it is of."""
    behind: dict[str, list[Node]] = {}
    readers: dict[str, Node] = {}
    shapes = dict(graph.shapes)
    for name, of, reader, value in copies:
        node = graph[of]
        if graph[reader].affine is None:
            raise Refuse(f"`{reader}` cannot read a copy")
        copy = replace(node, name=name, outputs=(value,), site="", copied=(of, reader))
        behind.setdefault(of, []).append(copy)
        readers[reader] = replace(graph[reader], inputs=(value,))
        if node.outputs[0] in shapes:
            shapes[value] = shapes[node.outputs[0]]
    nodes = tuple(new for node in graph.nodes for new in (node, *behind.get(node.name, ())))
    return replace(graph, nodes=nodes, shapes=shapes).replace(readers)


def _merged(graph: Graph, done: Record, gone: Mapping[str, str]) -> tuple[Graph, Mapping[str, str]]:
    """The graph with one node in the place of each block that was merged, and the values that others stand for."""
    made = {one["result"]: one for one in done.merges}
    within = {name for one in done.merges for name in one["nodes"]}
    alias: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        one = made.get(node.outputs[0]) if node.outputs else None
        if one is not None:
            nodes.append(Node(one["into"], "", (alias.get(one["source"], one["source"]),), (one["result"],)))
        elif node.name not in within and done.left.get(node.name) != []:
            places = done.left.get(node.name, range(len(node.inputs)))
            inputs = tuple(alias.get(node.inputs[place], node.inputs[place]) for place in places)
            if node.name in done.left and len(inputs) == 1:
                alias[node.outputs[0]] = inputs[0]
            else:
                nodes.append(replace(node, inputs=inputs))
    outputs = tuple(alias.get(value, value) for value in graph.outputs)
    return replace(graph, nodes=tuple(nodes), outputs=outputs), {**gone, **alias}


def claims(done: Record, numbers: Callable[[str], Any]) -> list[Claim]:
    """What is claimed of merged operators; `numbers` tells the weight and bias of each, by name."""
    return [
        Claim(
            one["into"],
            one["source"],
            one["result"],
            tuple((name, int(place)) for name, place in one["dropped"]),
            tuple(float(sign) for sign in one["signs"]),
            partial(numbers, one["into"]),
        )
        for one in done.merges
    ]


# ---------------------------------------------------------------- finding it in the result


@dataclass(frozen=True)
class Matched:
    """What was found of one graph in another one.

    Attributes:
        nodes: for each node that there should be, the one that there is; affine maps apart.
        affines: the maps between two other nodes: the value, as the second graph names it, what the map should be,
            what it is, and the size of what that is a sum of.
        values: each value that is read somewhere, with the one that stands for it.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    values: set[tuple[str, str]] = field(default_factory=set)
    affines: list[tuple[str, Affine, Affine, Affine]] = field(default_factory=list)


def match(should: Graph, does: Graph) -> Matched:
    """Find one graph in another one, from the outputs up.

    Args:
        should: what `apply` made; a node without an operator may be any linear one.
        does: the graph of the result.

    Raises:
        Refuse: something is missing, or is something else.
    """
    found, values = Matched(), dict[str, str]()
    waiting = list(zip(should.outputs, does.outputs, strict=True))
    while waiting:
        pair = waiting.pop()
        if pair in found.values:
            continue
        found.values.add(pair)
        (value, mine, _), (stands_for, theirs, size) = _climb(should, pair[0]), _climb(does, pair[1])
        if mine is not None or theirs is not None:
            one = Affine.identity(0)
            found.affines.append((pair[1], mine or one, theirs or one, size or one))
        if values.setdefault(value, stands_for) != stands_for:
            raise Refuse(f"`{stands_for}` stands where `{values[value]}` should")
        found.values.add((value, stands_for))
        node, twin = should.producer(value), does.producer(stands_for)
        if node is None or twin is None:
            if node is not twin or not _is_given_alike(should, does, value, stands_for):
                raise Refuse(f"`{stands_for}` is not `{value}`")
            continue
        if node.outputs.index(value) != twin.outputs.index(stands_for):
            raise Refuse(f"`{twin.name}` ({twin.op}) is read for another output")
        if found.nodes.setdefault(node.name, twin) is not twin:
            raise Refuse(f"`{twin.name}` stands where `{found.nodes[node.name].name}` should")
        _check_alike(node, twin)
        waiting += zip(node.inputs, twin.inputs, strict=True)
    return found


def _climb(graph: Graph, value: str) -> tuple[str, Affine | None, Affine | None]:
    """The value that this one is an affine map of, through as many as there are in a row, and the size of its terms.

    None for a map through none.
    """
    whole: Affine | None = None
    size: Affine | None = None
    while (node := graph.producer(value)) is not None and node.affine is not None and len(node.inputs) == 1:
        own = Affine(np.abs(node.affine.scale), np.abs(node.affine.shift))
        whole = node.affine if whole is None else whole.after(node.affine)
        size = own if size is None else size.after(own)
        value = node.inputs[0]
    return value, whole, size


def _is_given_alike(should: Graph, does: Graph, value: str, stands_for: str) -> bool:
    """Whether two values are the same input, or the same one of no graph's."""
    if value in should.inputs and stands_for in does.inputs:
        return should.inputs.index(value) == does.inputs.index(stands_for)
    return value == stands_for


def _check_alike(node: Node, twin: Node) -> None:
    """Refuse a node of another operator, form or setting."""
    if len(node.inputs) != len(twin.inputs) or len(node.outputs) != len(twin.outputs):
        raise Refuse(f"`{twin.name}` ({twin.op}) reads or writes something else than `{node.name}`")
    if not node.op:
        alike = twin.linear is not None
    else:
        alike = node.op == twin.op and _are_equal(node.attributes, twin.attributes)
        alike = alike and (node.linear is None) == (twin.linear is None)
        if node.linear is not None and twin.linear is not None:
            alike = alike and node.linear.form("biasless", "bare") == twin.linear.form("biasless", "bare")
    if not alike:
        raise Refuse(f"`{twin.name}` ({twin.op}) stands where `{node.name}` ({node.op}) should")


def _are_equal(first: Any, second: Any) -> bool:
    """Whether two settings are equal, arrays among them."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_are_equal(first[key], second[key]) for key in first)
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return np.array_equal(first, second)
    return bool(first == second)
