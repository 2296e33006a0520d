"""Merge what is linear side by side, or one after another, into one operator; the second pass, after `travel`.

Pure, like `travel`: a `Graph` in, a `Graph` and a list of `Merge` out. Folding erases affine maps; what is left between
two nonlinear operators is often still a whole block of linear ones (the branches of MobileOne or RepVGG, a LoRA layer,
two Linears in a row), and such a block is one operator. Three rules, whose algebra is in `operators`:

1. Side by side: a sum of linear operators on one value, the value itself and affine maps of it among them.
2. One after another, where nobody else reads what lies between.
3. Never dearer: the multiply-adds of one pass plus the bytes of the weights must not grow. A mean takes the additions
   that sums along one axis after another take, each as half a multiply-add; and where no weight is, none comes to be.

**How it is decided.** Going down the graph, each value is written in every way as one operator on an earlier value
(`candidates`). Then, going up, each value that is not within a merge yet takes its best candidate that is not dearer
and that the model can hold (`Host.place`). Where a sum has other operands too, those on one value are gathered in one
of them and the others dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from bnfold import canonical, report
from bnfold.algebra import Affine, Linear
from bnfold.candidates import (
    MOST_NODES,
    MOST_WAYS,
    Candidate,
    Cost,
    Host,
    Ways,
    is_minuend,
    is_plain_sum,
    positions_of,
)
from bnfold.errors import Refuse
from bnfold.ir import Graph, Node
from bnfold.operators import Operator, beside
from bnfold.rules import sign_of

__all__ = ["Merge", "Merged", "merge", "settle"]


@dataclass(frozen=True, eq=False)
class Merge:
    """One operator that stands for several.

    Attributes:
        into: the node of the new graph.
        candidate: what it is made of.
        place: what the host said of where it is written.
        record: for the report.
    """

    into: str
    candidate: Candidate
    place: Any
    record: report.Merge

    @property
    def operator(self) -> Operator:
        """The merged operator."""
        assert isinstance(self.candidate.operator, Operator)
        return self.candidate.operator


@dataclass(frozen=True)
class Merged:
    """What was merged, and what was not.

    Attributes:
        graph: the graph afterwards.
        merges: the operators that stand for several, in the order of computation.
        refused: what could have been one operator and is not, with the reason.
        left: of the sums that lost operands to a merge, by name, the places of those that are left, if any.
    """

    graph: Graph
    merges: tuple[Merge, ...] = ()
    refused: tuple[report.Merge, ...] = ()
    left: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> Mapping[str, Merge]:
        """Every node that is in a merge, by name."""
        return {name: one for one in self.merges for name in one.candidate.nodes}

    def only(self, merges: Iterable[Merge], graph: Graph) -> Merged:
        """Some of these merges alone; the graph afterwards is left as it is.

        Args:
            merges: those.
            graph: the graph before.
        """
        some = tuple(merges)
        return replace(self, merges=some, left=_left(graph, some))

    def tell(self, told: report.Report, graph: Graph) -> report.Report:
        """A report, with what was merged in it.

        Args:
            told: the report so far.
            graph: the graph before.
        """
        rest = [
            _work_of(graph, node)
            for node in graph.nodes
            if node.linear is not None and node.name not in self.nodes
        ]
        parts = [
            node
            for name in self.nodes
            if (node := graph[name]).linear is not None or node.op == "AveragePool"
        ]
        pairs = [one.record.multiply_adds for one in self.merges]
        return replace(
            told,
            merges=(*(one.record for one in self.merges), *self.refused),
            operators=(len(rest) + len(parts), len(rest) + len(self.merges)),
            multiply_adds=(sum(rest) + sum(a for a, _ in pairs), sum(rest) + sum(b for _, b in pairs)),
        )


def _left(graph: Graph, merges: Iterable[Merge]) -> dict[str, tuple[int, ...]]:
    """The places of the operands that are left of each sum that lost some."""
    dropped = {operand for one in merges for operand in one.candidate.dropped}
    touched = {name for name, _ in dropped}
    left: dict[str, tuple[int, ...]] = {}
    gone: set[str] = set()
    for node in graph.nodes if touched else ():
        places = [place for place, value in enumerate(node.inputs) if value not in gone]
        if node.name in touched or len(places) < len(node.inputs):
            left[node.name] = tuple(place for place in places if (node.name, place) not in dropped)
            gone.update(() if left[node.name] else node.outputs)
    return left


def merge(graph: Graph, host: Host, at_any_cost: bool = False) -> Merged:
    """Merge the linear operators of a graph.

    Args:
        graph: as `travel` leaves it.
        host: says which merged operators can be written, and where.
        at_any_cost: leave it all to the host, which knows what was merged before.

    Returns:
        The graph with one linear node in the place of each block that was merged.
    """
    found = Ways(graph, host)
    choice = _Choice(graph, host, found, at_any_cost)
    with np.errstate(all="ignore"):
        found.find()
        choice.choose()
    return choice.merged()


def _work_of(graph: Graph, node: Node) -> int:
    """How many multiply-adds a linear node takes for one example."""
    if node.linear is None or node.op == "Embedding":
        return 0
    return _weights(node) * positions_of(graph, node.outputs[0], node.linear.out_axis)


def settle(verdicts: Iterable[report.Verdict], graph: Graph, merged: Merged) -> tuple[report.Verdict, ...]:
    """The verdicts on BatchNorms once operators are merged: what was left of some may be gone.

    Args:
        verdicts: of `travel`.
        graph: its graph.
        merged: what became of it.
    """
    homes: dict[str, list[Merge | None]] = {}
    for node in graph.nodes:
        homes.setdefault(node.place, []).append(merged.nodes.get(node.name))
    return tuple(_settled(verdict, homes.get(verdict.name, [])) for verdict in verdicts)


def _settled(verdict: report.Verdict, homes: Sequence[Merge | None]) -> report.Verdict:
    if verdict.outcome == "folded" or not homes or None in homes:
        return verdict
    into = dict.fromkeys(one.record.into for one in homes if one is not None)
    return report.Verdict(verdict.name, "folded", (*verdict.into, *into))


# ---------------------------------------------------------------- which candidates are taken


@dataclass(frozen=True, eq=False)
class _Term:
    """One operand of a sum.

    Attributes:
        operand: the node that reads it and where.
        ways: how it can be written.
        sign: whether it is added or subtracted.
        stays: whether it can take others in but not be left out: something is subtracted from it.
        way: one of those ways.
    """

    operand: tuple[str, int]
    ways: dict[str, Candidate]
    sign: float
    stays: bool
    way: Candidate = field(default_factory=lambda: Candidate("", "", Affine.identity(0)))


def _with_term(so_far: Candidate, term: _Term, sign: float) -> Candidate:
    """A candidate that computes the share of one more term.

    Raises:
        Refuse: together they are no one operator.
    """
    way, width = term.way, so_far.width
    return replace(
        so_far,
        operator=beside(so_far.operator, way.operator, sign),
        parts=(*so_far.parts, *([way] if way.node else [])),
        before=so_far.before.plus(way.cost(width)).plus(Cost(width, 0)),
        dropped=(*so_far.dropped, term.operand),
        signs=(*so_far.signs, sign),
        terms=(*(so_far.terms or (so_far,)), way),
        size=so_far.size + way.size + 1,
    )


class _Choice:
    """Which candidates become one operator.

    Attributes:
        found: the candidates.
        at_any_cost: whether the host alone decides.
        taken: by the name of a node, the merge that it is in.
        touched: sums that have lost operands to a merge.
        position: of each node, its place in the order of computation.
        merges: what was taken so far, what is farthest down first.
    """

    def __init__(self, graph: Graph, host: Host, found: Ways, at_any_cost: bool) -> None:
        self.graph, self.host, self.found, self.at_any_cost = graph, host, found, at_any_cost
        self.taken: dict[str, Merge] = {}
        self.touched: set[str] = set()
        self.position = {node.name: place for place, node in enumerate(graph.nodes)}
        self.merges: list[Merge] = []

    def choose(self) -> None:
        """Go up the graph: what is farthest down and takes most in comes first."""
        for node in reversed(self.graph.nodes):
            if self._is_used(node.name) or len(node.outputs) != 1:
                continue
            ways = [way for way in self.found.ways.get(node.outputs[0], ()) if way.size > 1]
            ways.sort(key=lambda way: -self._saving(way))
            if not any(self._take(way) for way in ways) and self._is_root(node):
                self._gather(node)

    def _is_root(self, node: Node) -> bool:
        """Whether a node is a sum, and no part of another one."""
        readers = self.graph.readers(node.outputs[0])
        return is_plain_sum(self.graph, node) and not any(self._joins(node, reader) for reader in readers)

    def _joins(self, node: Node, reader: Node) -> bool:
        """Whether the operands of a sum are as good as operands of the sum that reads it."""
        if not (is_plain_sum(self.graph, node) and is_plain_sum(self.graph, reader)):
            return False
        (value,) = node.outputs
        return self.found.is_private(value, reader) and not is_minuend(reader, reader.inputs.index(value))

    # -- cost

    def _costs(self, way: Candidate) -> tuple[Cost, Cost]:
        operator = way.operator
        if not isinstance(operator, Operator):
            return way.before, way.before
        positions = positions_of(self.graph, way.result, operator.out_axis)
        numbers = operator.weights + operator.outputs
        after = Cost(operator.multiply_adds, numbers * self._itemsize(way))
        return way.before.times(positions), after.times(positions)

    def _itemsize(self, way: Candidate) -> int:
        linears = self._linears(way)
        return self.host.itemsize(linears[0]) if linears else 4

    def _linears(self, way: Candidate) -> list[Node]:
        """The nodes that have a weight, among those that become one."""
        return [node for name in way.nodes if (node := self.graph[name]).linear is not None]

    def _saving(self, way: Candidate) -> int:
        before, after = self._costs(way)
        return before.total - after.total

    # -- taking one

    def _take(self, way: Candidate) -> bool:
        """Take a candidate, unless it is dearer, has no weight so far, or cannot be written."""
        if not isinstance(way.operator, Operator) or any(self._is_used(name) for name in way.nodes):
            return False
        if not (self._linears(way) or self.at_any_cost):
            return False
        before, after = self._costs(way)
        try:
            if after.total > before.total and not self.at_any_cost:
                raise Refuse(_dearer(before, after))
            self._add(way, self.host.place(way), before, after)
        except Refuse as why:
            self.found.refuse([way], str(why))
            return False
        return True

    def _add(self, way: Candidate, place: Any, before: Cost, after: Cost) -> None:
        into, counts = self._name(way), (int(before.multiply_adds), int(after.multiply_adds))
        label, sources = getattr(place, "name", "") or into, tuple(reversed(way.nodes))
        record = report.Merge(label, sources, counts, (before.bytes, after.bytes))
        made = Merge(into, way, place, record)
        self.merges.append(made)
        self.taken.update(dict.fromkeys(way.nodes, made))
        self.touched.update(name for name, _ in way.dropped)

    def _is_used(self, name: str) -> bool:
        """Whether a node is in a merge, or a sum that has lost operands to one."""
        return name in self.taken or name in self.touched

    def _name(self, way: Candidate) -> str:
        """The dearest linear node among those that become one."""
        nodes = [self.graph[name] for name in reversed(way.nodes)]
        linears = [node for node in nodes if node.linear is not None] or nodes
        return max(linears, key=_weights).name

    # -- sums with other operands

    def _gather(self, root: Node) -> None:
        """Gather the operands of a sum that are operators on one value in one of them, value by value."""
        terms = list(self._terms(root))
        counts = Counter(source for term in terms for source in term.ways)
        for source, _ in counts.most_common():
            while used := self._gather_on(self._free(terms, source)):
                terms = [term for term in terms if term.operand not in used]

    def _free(self, terms: Iterable[_Term], source: str) -> list[_Term]:
        """Those that are operators on one value, and can be left out; nothing, unless there are two."""
        mine = [replace(term, way=term.ways[source]) for term in terms if source in term.ways]
        free = [term for term in mine if not any(self._is_used(name) for name in term.way.nodes)]
        free = [term for term in free if term.stays or self.host.can_drop(term.way)] if len(free) > 1 else []
        return free if len(free) > 1 else []

    def _terms(self, root: Node) -> Iterator[_Term]:
        """The operands of a whole tree of sums; what something is subtracted from is one, be it a sum."""
        waiting = [(root, 1.0)]
        while waiting:
            node, sign = waiting.pop()
            for place, value in enumerate(node.inputs):
                own, producer = sign * sign_of(node, place), self.graph.producer(value)
                if producer is not None and self._joins(producer, node):
                    waiting.append((producer, own))
                else:
                    ways = self.found.operand(node, value)
                    yield _Term((node.name, place), ways, own, is_minuend(node, place))

    def _gather_on(self, terms: Sequence[_Term]) -> set[tuple[str, int]]:
        """Gather terms in one that stays, or a dear one, where that is not dearer; return those that are used up."""
        dearest = sorted(terms, key=lambda term: -_work(term.way.operator))
        for host in sorted(dearest, key=self._preference)[:MOST_WAYS]:
            best = host.way
            for term in dearest if isinstance(best.operator, Operator) else ():
                if term is not host and not term.stays:
                    best = self._wider(best, term, host.sign * term.sign) or best
            if best.dropped and self._take(best):
                return {host.operand, *best.dropped}
        return set()

    def _preference(self, term: _Term) -> tuple[bool, int]:
        """Which term should take others in: one that stays; then the first one, where the host adds in place."""
        return not term.stays, self.position.get(term.way.node, 0) if self.host.adds_in_place else 0

    def _wider(self, so_far: Candidate, term: _Term, sign: float) -> Candidate | None:
        """A candidate with one more term of its sum; None where that is dearer than both."""
        if so_far.size + term.way.size >= MOST_NODES:
            return None
        try:
            wider = _with_term(so_far, term, sign)
        except Refuse as why:
            self.found.refuse([so_far, term.way], str(why))
            return None
        pays = self.at_any_cost or self._saving(wider) >= self._saving(so_far)
        return wider if pays else None

    # -- what comes of it

    def merged(self) -> Merged:
        """The graph afterwards, and the records."""
        made = {self._last(one): one for one in self.merges}
        left = _left(self.graph, self.merges)
        alias: dict[str, str] = {}
        nodes: list[Node] = []
        for node in self.graph.nodes:
            if node.name in made:
                node = self._node(made[node.name])
            elif node.name in self.taken or left.get(node.name) == ():
                continue
            places = left.get(node.name, range(len(node.inputs)))
            inputs = tuple(alias.get(node.inputs[place], node.inputs[place]) for place in places)
            if node.name in left and len(inputs) == 1:
                alias[node.outputs[0]] = inputs[0]
                continue
            nodes.append(replace(node, inputs=inputs) if inputs != node.inputs else node)
        outputs = tuple(alias.get(value, value) for value in self.graph.outputs)
        graph = replace(self.graph, nodes=tuple(nodes), outputs=outputs)
        return Merged(graph, tuple(reversed(self.merges)), tuple(self._refusals()), left)

    def _last(self, one: Merge) -> str:
        producer = self.graph.producer(one.candidate.result)
        assert producer is not None
        return producer.name

    def _node(self, one: Merge) -> Node:
        """The linear node that stands for several; its numbers are the operator's."""
        way, operator = one.candidate, one.operator
        op, linear = _canonical(operator, self.graph[one.into].op)
        return Node(one.into, op, (way.source,), (way.result,), linear=linear)

    def _refusals(self) -> Iterator[report.Merge]:
        """What was not merged, but for what is a part of something that was."""
        for names, why in self.found.refused.items():
            homes = {id(self.taken.get(name)) for name in names}
            if len(homes) > 1 or not all(name in self.taken for name in names):
                yield report.Merge("", names, reason=why)


def _canonical(operator: Operator, matrix: str) -> tuple[str, Linear]:
    """An operator of a node, by name and shape; `matrix` is how a product along one axis is called."""
    sizes = (operator.inputs, operator.outputs)
    if operator.lookup:
        return "Embedding", canonical.embedding(*sizes, operator.out_axis)
    if operator.window is not None:
        return "Conv", canonical.convolution(operator.window, *sizes, operator.groups, operator.out_axis)
    axes = (operator.in_axis, operator.out_axis)
    return "Gemm" if len(set(axes)) > 1 else matrix, canonical.matrix("oi", *sizes, *axes)


def _weights(node: Node) -> int:
    linear = node.linear
    if linear is None:
        return 0
    taps = prod(linear.window.kernel) if linear.window is not None else 1
    return linear.outputs * linear.inputs // linear.groups * taps


def _work(operator: Operator | Affine) -> int:
    return operator.multiply_adds if isinstance(operator, Operator) else -1


def _dearer(before: Cost, after: Cost) -> str:
    return (
        f"as one it would be dearer: {int(after.multiply_adds):,} multiply-adds and {after.bytes:,} bytes, "
        f"now {int(before.multiply_adds):,} and {before.bytes:,}"
    )
