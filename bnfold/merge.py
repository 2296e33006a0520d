"""Merge what is linear side by side, or one after another, into one operator; the second pass, after `travel`.

Pure, like `travel`: a `Graph` in, a `Graph` and a list of `Merge` out. Folding erases affine maps; what is left between
two nonlinear operators is often still a whole block of linear ones (the branches of MobileOne or RepVGG, a LoRA layer,
two Linears in a row), and such a block is one operator. Three rules, whose algebra is in `operators`:

1. Side by side: a sum of linear operators on one value, the value itself and affine maps of it among them.
2. One after another, where nobody else reads what lies between.
3. Never dearer: the multiply-adds of one pass plus the bytes of the weights must not grow. A mean takes the additions
   that sums along one axis after another take, each as half a multiply-add; and where no weight is, none comes to be.

**How it is decided.** Going down the graph, each value is written in every way as one operator on an earlier value
(`Candidate`): through its own node alone, through that and the one above, and so on, as long as what lies between is
private. Nothing is gated here, since a sum can pay where a part of it does not: 1x3 beside 3x1 is dearer as one, beside
a 3x3 as well it is cheaper, and so is a low-rank branch beside the matrix that it corrects. Then, going up, each value
that is not within a merge yet takes its best candidate that is not dearer and that the model can hold (`Host.place`).
Where a sum has other operands too, those on one value are gathered in one of them and the others dropped.

Every candidate is decided from shapes alone; numbers are computed when a host writes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, reduce
from itertools import islice
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np

from bnfold import canonical, report
from bnfold.algebra import Affine, Linear
from bnfold.errors import Refuse
from bnfold.ir import Dim, Graph, Node, Shape
from bnfold.operators import Operator, average, beside, of_linear, sequence
from bnfold.rules import TABLE, sign_of
from bnfold.window import Window

__all__ = ["Candidate", "Cost", "Host", "Merge", "Merged", "is_sum", "merge", "settle"]

_MOST_NODES = 100
"""As many nodes make one operator, at most."""

_MOST_WAYS = 8
"""In as many ways a value is written as one operator on an earlier value; as many terms of a sum may take others in."""


class Cost(NamedTuple):
    """What an operator takes: multiply-adds (for each position of its output, or in all) and bytes of weights."""

    multiply_adds: int | Fraction
    bytes: int

    def plus(self, other: Cost) -> Cost:
        """The cost of both."""
        return Cost(self.multiply_adds + other.multiply_adds, self.bytes + other.bytes)

    def times(self, positions: int | Fraction) -> Cost:
        """The cost at so many positions; the weights are read once."""
        return Cost(self.multiply_adds * positions, self.bytes)

    @property
    def total(self) -> int:
        """What is compared: one multiply-add is about as dear as one byte that comes from memory."""
        return int(self.multiply_adds) + self.bytes


NOTHING = Cost(0, 0)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A value, written as one operator on an earlier value.

    Attributes:
        source, result: the two values.
        operator: an affine map as long as no operator gives it a kind.
        node: the node that computes the result; "" where source and result are one value.
        parts: how the inputs of that node are written.
        before: what its nodes cost now, for each position of the result; of an affine map, for each element.
        dropped: nodes of sums, and places of operands of theirs whose share the operator computes as well.
        signs: of each of those, whether it is added or subtracted.
        terms: of a sum that was gathered, the terms in question, the one that takes the others in first.
        size: how many nodes of it compute something; a sum of many counts as sums of two.
    """

    source: str
    result: str
    operator: Operator | Affine
    node: str = ""
    parts: tuple[Candidate, ...] = ()
    before: Cost = NOTHING
    dropped: tuple[tuple[str, int], ...] = ()
    signs: tuple[float, ...] = ()
    terms: tuple[Candidate, ...] = ()
    size: int = 0

    @property
    def width(self) -> int:
        """Of how many elements `before` is the cost."""
        return self.operator.outputs if isinstance(self.operator, Operator) else 1

    def cost(self, channels: int) -> Cost:
        """What its nodes cost now for each position of the result, where that has so many channels."""
        return self.before if isinstance(self.operator, Operator) else self.before.times(channels)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node that it stands for, from the result up."""
        found: dict[str, None] = {}
        waiting = [self]
        while waiting:
            one = waiting.pop()
            found.update({one.node: None} if one.node else {})
            waiting.extend(one.parts)
        return tuple(found)


class Host(Protocol):
    """The model in which merged operators are to be written."""

    @property
    def adds_in_place(self) -> bool:
        """Whether a sum may be an accumulation (`y += f(x)`), whose first term must have its final shape."""
        ...

    def stored(self, node: Node) -> Any:
        """The weight and bias of a linear node (see `operators.Stored`).

        Raises:
            Refuse: they cannot be read.
        """

    def itemsize(self, node: Node) -> int:
        """How many bytes one number of its weight takes."""
        ...

    def can_drop(self, term: Candidate) -> bool:
        """Whether an operand of a sum can be left out, once another one stands for it as well."""
        ...

    def place(self, candidate: Candidate) -> Any:
        """Where the operator of a candidate can be written.

        Raises:
            Refuse: nowhere, and why; also where its numbers are not finite, or cannot be had.
        """


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
    found = _Ways(graph, host)
    choice = _Choice(graph, host, found, at_any_cost)
    with np.errstate(all="ignore"):
        found.find()
        choice.choose()
    return choice.merged()


def _work_of(graph: Graph, node: Node) -> int:
    """How many multiply-adds a linear node takes for one example."""
    if node.linear is None or node.op == "Embedding":
        return 0
    return _weights(node) * _positions(graph, node.outputs[0], node.linear.out_axis)


def _positions(graph: Graph, value: str, channels: int) -> int:
    """How many positions one example of a value has, as far as sizes are known; `channels` is the axis of those."""
    sizes = enumerate(_sizes(graph, value))
    return prod(size for axis, size in sizes if axis not in (0, channels) and isinstance(size, int))


def _sizes(graph: Graph, value: str) -> Shape:
    """The sizes of a value, those of one example where there is one."""
    return graph.sizes.get(value, graph.shapes.get(value, ()))


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


# ---------------------------------------------------------------- each value as one operator on an earlier one


@dataclass(eq=False)
class _Ways:
    """In which ways each value is one operator on an earlier value.

    Attributes:
        ways: by value, from near to far.
        refused: by the nodes that could not become one, why.
        outputs: of the graph.
        readers: by value, the names of the nodes that read it.
    """

    graph: Graph
    host: Host
    ways: dict[str, list[Candidate]] = field(default_factory=dict)
    refused: dict[tuple[str, ...], str] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()
    readers: dict[str, set[str]] = field(default_factory=dict)

    def find(self) -> None:
        """Go down the graph."""
        for node in self.graph.nodes:
            if len(node.outputs) == 1 and node.inputs:
                ways = self._of_sum(node) if is_sum(node) else self._of_chain(node)
                self.ways[node.outputs[0]] = list(islice(ways, _MOST_WAYS))

    def __post_init__(self) -> None:
        self.outputs = frozenset(self.graph.outputs)
        for node in self.graph.nodes:
            for value in node.inputs:
                self.readers.setdefault(value, set()).add(node.name)

    def is_within(self, value: str, nodes: Set[str]) -> bool:
        """Whether nobody reads a value but some of these nodes."""
        return value not in self.outputs and self.readers.get(value, set()) <= nodes

    def is_private(self, value: str, reader: Node) -> bool:
        """Whether nobody else reads a value, and this node once."""
        return self.is_within(value, {reader.name}) and reader.inputs.count(value) == 1

    def through(self, value: str, reader: Node) -> list[Candidate]:
        """How a node could look through a value that it alone reads."""
        return self.ways.get(value, []) if self.is_private(value, reader) else []

    def _of_chain(self, node: Node) -> Iterator[Candidate]:
        """Through one node, and on through what lies above it."""
        own = self._own(node)
        if own is not None and len(node.inputs) == 1:
            cost, size = self._cost(node, own), int(node.op != "Identity")
            step = Candidate(node.inputs[0], node.outputs[0], own, node.name, before=cost, size=size)
            yield step
            yield from self._above(step)

    def _above(self, way: Candidate) -> Iterator[Candidate]:
        """A candidate once more, on through what lies above the value that it reads, if nothing else reads that."""
        above = self.ways.get(way.source, []) if self.is_within(way.source, {*way.nodes}) else []
        for inner in above:
            if inner.size + way.size <= _MOST_NODES:
                try:
                    yield self._after(inner, way)
                except Refuse as why:
                    return self.refuse((inner, way), str(why))

    def _after(self, first: Candidate, second: Candidate) -> Candidate:
        """One candidate after another."""
        before = first.before.plus(second.before)
        stored = self.host.stored
        operator = sequence(first.operator, second.operator, stored) if second.size else first.operator
        if isinstance(operator, Operator):
            read = second.operator.inputs if isinstance(second.operator, Operator) else 0
            above = first.cost(read).times(self._ratio(second))
            before = above.plus(second.cost(operator.outputs))
        parts, size = (first, *second.parts), first.size + second.size
        return replace(second, source=first.source, operator=operator, parts=parts, before=before, size=size)

    def _own(self, node: Node) -> Operator | Affine | None:
        """What a node computes of its one input, if that is linear."""
        rank = len(self.graph.shapes.get(node.outputs[0], ()))
        if node.op == "Identity":
            return Affine.identity(rank)
        if node.op in ("Affine", "BatchNormalization"):
            return node.affine if node.affine is not None and node.affine.is_finite else None
        try:
            if node.op == "AveragePool":
                return self._pool(node)
            return of_linear(node) if node.linear is not None else None
        except Refuse:
            return None

    def _pool(self, node: Node) -> Operator | None:
        window, shape = node.attributes.get("window"), self.graph.shapes.get(node.inputs[0], ())
        axis = len(shape) - len(window.kernel) - 1 if isinstance(window, Window) else -1
        channels = shape[axis] if axis >= 0 else None
        if not isinstance(window, Window) or not isinstance(channels, int) or not channels:
            return None
        return average(window, channels, axis)

    def _cost(self, node: Node, own: Operator | Affine) -> Cost:
        """What one node costs for each position of its output, or for each element."""
        if isinstance(own, Affine):
            return Cost(int(node.op != "Identity"), 0)
        if node.linear is None:
            return Cost(Fraction(own.outputs * sum(own.kernel), 2), 0)
        return Cost(own.multiply_adds, (own.weights + own.outputs) * self.host.itemsize(node))

    def _ratio(self, way: Candidate) -> Fraction:
        """How many positions of its source there are for one of its result; for one of many, if sizes are unknown."""
        if isinstance(way.operator, Affine) or way.operator.window is None:
            return Fraction(1)
        strides = way.operator.window.strides
        unknown = (None,) * len(strides)
        read, made = ((*unknown, *_sizes(self.graph, v))[-len(strides) :] for v in (way.source, way.result))
        axes = zip(read, made, strides, strict=True)
        return prod((_quotient(n, m, stride) for n, m, stride in axes), start=Fraction(1))

    # -- sums

    def _of_sum(self, node: Node) -> Iterator[Candidate]:
        """A sum whose operands are all operators on one earlier value, and on through what lies above that."""
        operands = (
            [self.operand(node, value) for value in node.inputs] if _is_plain(self.graph, node) else [{}]
        )
        for source in operands[0]:
            terms = [ways[source] for ways in operands if source in ways]
            size = len(terms) - 1 + sum(term.size for term in terms)
            if len(terms) == len(operands) and size <= _MOST_NODES:
                try:
                    way = _total(node, terms, size)
                except Refuse as why:
                    self.refuse((*terms, node.name), str(why))
                    continue
                yield way
                yield from self._above(way)

    def operand(self, node: Node, value: str) -> dict[str, Candidate]:
        """How one operand of a sum can be written, by the value that it is an operator on."""
        rank = len(self.graph.shapes.get(value, ()))
        ways = {value: Candidate(value, value, Affine.identity(rank))}
        for way in self.through(value, node):
            ways.setdefault(way.source, way)
        return ways

    def refuse(self, parts: Iterable[Candidate | str], why: str) -> None:
        """Note why some nodes did not become one."""
        names = [(part,) if isinstance(part, str) else part.nodes for part in parts]
        nodes = [name for group in names for name in group if self.graph[name].linear is not None]
        if len(nodes) > 1:
            self.refused[tuple(sorted(nodes))] = why


def _total(node: Node, terms: Sequence[Candidate], size: int) -> Candidate:
    """A sum of some terms on one value.

    Raises:
        Refuse: they are no one operator.
    """
    operator = terms[0].operator
    for term in terms[1:]:
        operator = beside(operator, term.operator, sign_of(node, 1))
    way = Candidate(terms[0].source, node.outputs[0], operator, node.name, tuple(terms), size=size)
    costs = (term.cost(way.width) for term in terms)
    return replace(way, before=reduce(Cost.plus, costs, Cost((len(terms) - 1) * way.width, 0)))


def is_sum(node: Node) -> bool:
    """Whether a node adds up or subtracts values."""
    return node.op in TABLE and TABLE[node.op].signs is not None


def _is_plain(graph: Graph, node: Node) -> bool:
    """Whether a node is a sum of operands of one shape, so that nothing is broadcast."""
    if not is_sum(node):
        return False
    shapes = {graph.shapes.get(value) for value in (*node.inputs, *node.outputs)}
    return len(shapes) == 1 and None not in shapes


def _is_minuend(node: Node, place: int) -> bool:
    """Whether the other operands of a sum are subtracted from that at this place."""
    return not place and sign_of(node, 1) < 0


def _quotient(read: Dim, made: Dim, stride: int) -> Fraction:
    if isinstance(read, int) and isinstance(made, int) and made:
        return Fraction(read, made)
    return Fraction(stride)


# ---------------------------------------------------------------- which of them is taken


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
    """Which candidates become one operator."""

    def __init__(self, graph: Graph, host: Host, found: _Ways, at_any_cost: bool) -> None:
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
        return _is_plain(self.graph, node) and not any(self._joins(node, reader) for reader in readers)

    def _joins(self, node: Node, reader: Node) -> bool:
        """Whether the operands of a sum are as good as operands of the sum that reads it."""
        if not (_is_plain(self.graph, node) and _is_plain(self.graph, reader)):
            return False
        (value,) = node.outputs
        return self.found.is_private(value, reader) and not _is_minuend(reader, reader.inputs.index(value))

    # -- cost

    def _costs(self, way: Candidate) -> tuple[Cost, Cost]:
        operator = way.operator
        if not isinstance(operator, Operator):
            return way.before, way.before
        positions = _positions(self.graph, way.result, operator.out_axis)
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
                    yield _Term((node.name, place), ways, own, _is_minuend(node, place))

    def _gather_on(self, terms: Sequence[_Term]) -> set[tuple[str, int]]:
        """Gather terms in one that stays, or a dear one, where that is not dearer; return those that are used up."""
        dearest = sorted(terms, key=lambda term: -_work(term.way.operator))
        for host in sorted(dearest, key=self._preference)[:_MOST_WAYS]:
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
        if so_far.size + term.way.size >= _MOST_NODES:
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
