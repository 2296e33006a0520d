"""Write each value as one operator on an earlier value, in every way; `merge` chooses among those.

Going down the graph, each value is written through its own node alone, through that and the one above, and so on, as
long as what lies between is private. Nothing is gated here, since a sum can pay where a part of it does not: 1x3 beside
3x1 is dearer as one, beside a 3x3 as well it is cheaper, and so is a low-rank branch beside the matrix that it
corrects.

Every candidate is decided from shapes alone; numbers are computed when a host writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import reduce
from itertools import islice
from math import prod
from typing import Any, NamedTuple, Protocol

from bnfold.algebra import Affine
from bnfold.errors import Refuse
from bnfold.ir import Dim, Graph, Node, Shape
from bnfold.operators import Operator, average, beside, of_linear, sequence
from bnfold.rules import is_sum, sign_of
from bnfold.window import Window

__all__ = [
    "MOST_NODES",
    "MOST_WAYS",
    "Candidate",
    "Cost",
    "Host",
    "Ways",
    "is_minuend",
    "is_plain_sum",
    "positions_of",
]

MOST_NODES = 100
"""As many nodes make one operator, at most."""

MOST_WAYS = 8
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


@dataclass(eq=False)
class Ways:
    """In which ways each value is one operator on an earlier value.

    Attributes:
        host: the model in which they are to be written.
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
                self.ways[node.outputs[0]] = list(islice(ways, MOST_WAYS))

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
            if inner.size + way.size <= MOST_NODES:
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
            [self.operand(node, value) for value in node.inputs] if is_plain_sum(self.graph, node) else [{}]
        )
        for source in operands[0]:
            terms = [ways[source] for ways in operands if source in ways]
            size = len(terms) - 1 + sum(term.size for term in terms)
            if len(terms) == len(operands) and size <= MOST_NODES:
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


def is_plain_sum(graph: Graph, node: Node) -> bool:
    """Whether a node is a sum of operands of one shape, so that nothing is broadcast."""
    if not is_sum(node):
        return False
    shapes = {graph.shapes.get(value) for value in (*node.inputs, *node.outputs)}
    return len(shapes) == 1 and None not in shapes


def is_minuend(node: Node, place: int) -> bool:
    """Whether the other operands of a sum are subtracted from that at this place."""
    return not place and sign_of(node, 1) < 0


def _quotient(read: Dim, made: Dim, stride: int) -> Fraction:
    if isinstance(read, int) and isinstance(made, int) and made:
        return Fraction(read, made)
    return Fraction(stride)


def positions_of(graph: Graph, value: str, channels: int) -> int:
    """How many positions one example of a value has, as far as sizes are known; `channels` is the axis of those."""
    sizes = enumerate(_sizes(graph, value))
    return prod(size for axis, size in sizes if axis not in (0, channels) and isinstance(size, int))


def _sizes(graph: Graph, value: str) -> Shape:
    """The sizes of a value, those of one example where there is one."""
    return graph.sizes.get(value, graph.shapes.get(value, ()))
