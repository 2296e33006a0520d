"""Check a fold over the real numbers, for every input, without running anything: a proof by simulation.

`travel` searches; this only checks, and shares nothing with it but the table of operators. Going down the graph once,
it keeps what is known of each value of the model before and of the value that stands for it in the model after:

    before = original(w)        after = folded(w) + the sum of beside[x] x

for one w, the same in both: two affine maps, and vectors for values x of the model after. Inputs are equal to begin
with, and outputs must be equal in the end. In between, what is known of the outputs of a node follows from what is
known of its inputs, by one of five steps:

- an operator of the table takes both maps through (`op(A(x)) = B(op(x))`, the row's `down`);
- a linear operator has absorbed exactly that in which its inputs differ, and then differs by what it took in below; a
  scale along another axis than its own goes by where it has no bias (`W (s x) = s (W x)`);
- a BatchNorm that is gone joins the map of the model before; one that is left, both;
- a sum of values scaled alike is scaled so, and what a linear operator took in beside joins the operand that it is of;
- anything else must be given what it was given before.

This is a simulation relation (Milner 1971, "An algebraic definition of simulation between programs"), and it is to
`travel` what a proof checker is to a prover: whatever the search gets wrong, a guard forgotten, a reader overlooked, a
sign, an order, does not come past it. It trusts what `read` says of the model, and the rows of `rules`, which tests
hold to an interpreter of their own. Maps are compared to 2^-40 of the terms that they were computed from; what is less
is the rounding of float64.

Not covered: whether the new weights hold what was absorbed (`weights`), and rounding (`equivalence`). A few right folds
are not proved: where channels are multiplied by zero twice in a row, no map says what became of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bnfold.algebra import Affine, Array, Linear, first_along, widen
from bnfold.errors import NotEquivalent, Refuse
from bnfold.ir import Graph, Node, Shape
from bnfold.rules import TABLE, Row, moved, sign_of

__all__ = ["NotProved", "check"]

_ROUNDING = 2.0**-40
_LOUDEST = 2.0**-30
"""What rounding left of terms that cancel in one channel excuses no more than this part of a number of another one."""
_IDENTITY = Affine.identity(0)


class NotProved(NotEquivalent):
    """A fold that could not be proved; the message names the node at which the proof ends."""


@dataclass(frozen=True, eq=False)
class _Relation:
    """What is known of a value before and of one after.

    Attributes:
        original, folded: what either is of their common origin; None for the identity.
        beside: what else there is of values of the model after.
        noise: how far two maps may lie apart by rounding alone, besides a part of themselves.
    """

    original: Affine | None = None
    folded: Affine | None = None
    beside: Mapping[str, Affine] = field(default_factory=dict)
    noise: float = 0.0

    @property
    def is_equal(self) -> bool:
        """Whether both are the same value."""
        return self.original is None and self.folded is None and not self.beside

    @property
    def rank(self) -> int:
        """The rank of the value, as far as a map shows it."""
        return max((side.rank for side in (self.original, self.folded) if side is not None), default=0)


_EQUAL = _Relation()


def check(before: Graph, after: Graph, absorbed: Mapping[str, Affine] | None = None) -> None:
    """Check that two graphs compute the same, for every input.

    Args:
        before: as it was read.
        after: its nodes by name, without the BatchNorms that are gone, some linear operators with what they absorbed.
        absorbed: of BatchNorms that took in others below them, by name, what those were: a claim, which is checked too.

    Raises:
        NotProved: that does not follow.
    """
    with np.errstate(all="ignore"):
        try:
            if _is_untouched(before, after):
                return
            _Proof(before, after, absorbed or {}).run()
        except (Refuse, ValueError, LookupError) as gap:
            raise NotProved(f"the fold is not proved: {gap}") from gap


class _Proof:
    """The state of one `check`: by value before and value after, what is known of the two."""

    def __init__(self, before: Graph, after: Graph, absorbed: Mapping[str, Affine]) -> None:
        self.before, self.after, self.absorbed = before, after, absorbed
        self.ranks = _ranks(before)
        self.twins: dict[str, list[Node]] = {}
        for node in after.nodes:
            self.twins.setdefault(node.original, []).append(node)
        computed = {value for node in before.nodes for value in node.outputs}
        read = {*before.inputs, *before.outputs, *(v for node in before.nodes for v in node.inputs)}
        self.known: dict[str, dict[str, _Relation]] = {value: {value: _EQUAL} for value in read - computed}

    def shape(self, value: str) -> Shape | None:
        """What a row may ask of a value."""
        rank = self.ranks.get(value)
        return self.before.shapes.get(value, None if rank is None else (None,) * rank)

    def takes_shift(self, value: str) -> bool:
        """What only rows on the way up ask."""
        return False

    def run(self) -> None:
        self._check_names()
        self._check_sharing()
        for node in self.before.nodes:
            for twin in self.twins.get(node.name, ()):
                self._pass(node, twin)
            if node.name not in self.twins:
                self._erase(node)
        for value, stands_for in zip(self.before.outputs, self.after.outputs, strict=True):
            if not self._relation(value, stands_for).is_equal:
                raise Refuse(f"the output `{value}` would be another one")

    def _check_names(self) -> None:
        """A name stands for one value, or one node, of the model after."""
        made = [value for node in self.after.nodes for value in node.outputs if value]
        names = [node.name for node in self.after.nodes]
        if (
            len(set(made)) < len(made)
            or len(set(names)) < len(names)
            or not self.known.keys().isdisjoint(made)
        ):
            raise Refuse("one name would stand for two things")
        if self.after.inputs != self.before.inputs:
            raise Refuse("the model would have other inputs")

    def _check_sharing(self) -> None:
        """Nodes that share their numbers must have come out alike."""
        homes: dict[str, list[Node]] = {}
        for node in self.before.nodes:
            if node.site:
                homes.setdefault(node.site, []).append(node)
        for place, nodes in homes.items():
            left = [self.after[node.name] for node in nodes if node.name in self.after]
            parted = len(left) < len(nodes) and any(node.is_batchnorm for node in left)
            changed = any(_has_changed(self.before[node.name], node) for node in left)
            if parted or (changed and not all(_are_alike(left[0], node) for node in left)):
                raise Refuse(f"the uses of `{place}` would differ")

    def _relation(self, value: str, stands_for: str) -> _Relation:
        relation = self.known.get(value, {}).get(stands_for)
        if relation is None:
            raise Refuse(f"`{stands_for}` does not stand for `{value}`")
        return relation

    def _note(self, value: str, stands_for: str, relation: _Relation) -> None:
        if value:
            self.known.setdefault(value, {})[stands_for] = _reduced(relation)

    # -- the steps

    def _erase(self, node: Node) -> None:
        """A node that is gone, for which what it read stands."""
        if node.affine is None or len(node.inputs) != 1:
            raise Refuse(f"`{node.name}` ({node.op}) is gone")
        for stands_for, relation in self.known[node.inputs[0]].items():
            self._note(node.outputs[0], stands_for, self._joined(node.name, node.affine, None, relation))

    def _pass(self, node: Node, twin: Node) -> None:
        """A node that is there before and after."""
        if not _is_same_kind(node, twin):
            raise Refuse(f"`{node.name}` ({node.op}) has become another operator")
        pairs = zip(node.inputs, twin.inputs, strict=True)
        given = [self._relation(value, stands_for) for value, stands_for in pairs]
        made = self._made(node, twin, given)
        for value, stands_for, relation in zip(node.outputs, twin.outputs, made, strict=True):
            self._note(value, stands_for, relation)

    def _made(self, node: Node, twin: Node, given: list[_Relation]) -> Sequence[_Relation]:
        """What is known of its outputs."""
        if all(relation.is_equal for relation in given) and not _has_changed(node, twin):
            return [_EQUAL] * len(node.outputs)
        if node.linear is not None and twin.linear is not None:
            if not all(relation.is_equal for relation in given[1:]):
                raise Refuse(f"`{node.name}` ({node.op}) would be given something else beside")
            return [self._absorb(node, twin, node.linear, twin.linear, given[0])]
        row = TABLE.get(node.op)
        if row is not None and row.signs is not None:
            return [self._add(node, twin, given)]
        if row is None or any(relation.beside for relation in given):
            raise Refuse(f"`{node.name}` ({node.op}) would be given something else")
        if node.affine is not None and twin.affine is not None:
            return [self._keep(node, node.affine, twin.affine, given[0])]
        sides = [relation.original for relation in given], [relation.folded for relation in given]
        if row.compares:
            sides = self._matched(node, sides[0], given), self._matched(node, sides[1], given)
        original, folded = self._down(node, row, sides[0]), self._down(node, row, sides[1])
        noise = max(relation.noise for relation in given)
        return [_Relation(one, two, noise=noise) for one, two in zip(original, folded, strict=True)]

    def _matched(
        self, node: Node, flow: list[Affine | None], given: Sequence[_Relation]
    ) -> list[Affine | None]:
        """The maps of operands that are compared: the first one for all, where they are one but for rounding."""
        shape, noise = self.shape(node.outputs[0]), max(relation.noise for relation in given)
        if shape is None or all(affine is None for affine in flow):
            return flow
        first, *others = (widen(affine, len(shape)) for affine in flow)
        return [first] * len(flow) if all(_agree(first, other, noise) for other in others) else flow

    def _down(self, node: Node, row: Row, flow: Sequence[Affine | None]) -> Sequence[Affine | None]:
        """By the table, what is left of maps below an operator."""
        if all(affine is None for affine in flow):
            return [None] * len(node.outputs)
        made = row.down(node, self, flow)
        if isinstance(made, Linear | Affine):
            raise Refuse(f"`{node.name}` ({node.op}) would be given something else")
        return made

    def _absorb(self, node: Node, twin: Node, old: Linear, new: Linear, given: _Relation) -> _Relation:
        """`after(L(before(x))) + parallel x`, where `before` makes up for what x is, but for a scale that goes by."""
        if not _is_same_operator(old, new):
            raise Refuse(f"`{node.name}` ({node.op}) has become another operator")
        obstacle = _obstacle(new)
        if obstacle:
            raise Refuse(f"`{node.name}` ({node.op}) has absorbed what it cannot: {obstacle}")
        made_up, noise = _compose(
            self._along(node.inputs[0], new.in_axis, new.before), given.folded, given.noise
        )
        left = _reduced(_Relation(given.original, made_up, noise=noise))
        sides = left.original, left.folded
        if given.beside or not all(side is None or _goes_by(new, side) for side in sides):
            raise Refuse(f"`{node.name}` ({node.op}) does not make up for what it is given")
        past, rest = (None if side is None else moved(side, new.in_axis, new.out_axis) for side in sides)
        below, noise = _compose(self._along(node.outputs[0], new.out_axis, new.after), rest, left.noise)
        if new.parallel is None:
            return _Relation(past, below, noise=noise)
        own = self._along(node.outputs[0], new.out_axis, (new.parallel, np.zeros(new.outputs)))
        return _Relation(past, below, {} if own is None else {twin.inputs[0]: own}, noise)

    def _along(self, value: str, axis: int, vectors: tuple[Array, Array] | None) -> Affine | None:
        """What a linear operator has absorbed, as an affine of the value that it reads or writes."""
        shape = self.shape(value)
        if vectors is None:
            return None
        if shape is None:
            raise Refuse(f"the shape of `{value}` is not known")
        return Affine.along(axis, len(shape), *vectors).collapse()

    def _keep(self, node: Node, old: Affine, new: Affine, given: _Relation) -> _Relation:
        """An affine that is left: with other numbers, or passed by (`F A = B F`)."""
        if node.is_batchnorm or not old.equals(new):
            return self._joined(node.name, old, new, given)
        original, noise = _conjugate(old, given.original, given.noise)
        folded, other = _conjugate(old, given.folded, given.noise)
        return _Relation(original, folded, noise=max(noise, other))

    def _joined(self, name: str, old: Affine, new: Affine | None, given: _Relation) -> _Relation:
        """An affine joins the maps; what it took in below it is what is left of both, if that is so."""
        original, noise = _compose(old, given.original, given.noise)
        folded, other = _compose(new, given.folded, given.noise)
        below = self.absorbed.get(name)
        whole, more = _compose(below, original, noise)
        if below is not None and _agree(whole, folded, max(more, other)):
            return replace(given, original=None, folded=below, noise=0.0)
        return replace(given, original=original, folded=folded, noise=max(noise, other))

    def _add(self, node: Node, twin: Node, given: Sequence[_Relation]) -> _Relation:
        """A sum of operands whose two maps scale in one ratio, once what is beside some of them has joined others."""
        signs = [sign_of(node, place) for place in range(len(given))]
        beside: dict[str, Array] = {}
        for sign, relation in zip(signs, given, strict=True):
            for value, own in relation.beside.items():
                beside[value] = beside.get(value, np.zeros(())) + sign * own.scale
        operands = zip(signs, given, twin.inputs, strict=True)
        given = [_leaning(relation, sign, beside.pop(value, None)) for sign, relation, value in operands]
        shape = self.shape(node.outputs[0])
        rank = self._widest(node, given) if shape is None else len(shape)
        noise = sum(relation.noise for relation in given)
        original = [widen(relation.original, rank) for relation in given]
        folded = [widen(relation.folded, rank) for relation in given]
        one, more = _total([sign * each.shift for sign, each in zip(signs, original, strict=True)])
        other, most = _total([sign * each.shift for sign, each in zip(signs, folded, strict=True)])
        left = {value: Affine.of(scale, 0.0) for value, scale in beside.items()}
        for way in (1, -1):
            first, second = (original, folded)[::way]
            ratio = _ratio(first, second, noise)
            if ratio is not None:
                scales = (np.ones(()), ratio)[::way]
                before, after = Affine.of(scales[0], one), Affine.of(scales[1], other)
                return _Relation(before.collapse(), after.collapse(), left, noise + max(more, most))
        raise Refuse(f"the operands of `{node.name}` ({node.op}) would be scaled differently")

    def _widest(self, node: Node, given: Sequence[_Relation]) -> int:
        """The rank of a sum of which nothing is known but its operands."""
        ranks = [self.ranks.get(value, one.rank) for value, one in zip(node.inputs, given, strict=True)]
        varies = any(side.axes for one in given for side in (one.original, one.folded) if side is not None)
        if varies and not all(ranks):
            raise Refuse(f"the shape around `{node.name}` ({node.op}) is not known")
        return max(ranks)


# ---------------------------------------------------------------- nodes


def _ranks(graph: Graph) -> dict[str, int]:
    """The ranks of values; where shapes do not say, those of values next to an affine, or to one of known rank."""
    ranks = {value: len(shape) for value, shape in graph.shapes.items()}
    for way in (1, -1):
        for node in graph.nodes[::way]:
            known, others = (node.inputs, node.outputs)[::way]
            if node.affine is not None:
                ranks.update(dict.fromkeys((*known[:1], *others[:1]), node.affine.rank))
            elif node.op in _SAME_RANK and node.attributes.get("keepdims", True):
                found = [ranks[value] for value in known if value in ranks]
                ranks.update({value: found[0] for value in others if found and value not in ranks})
    return ranks


_SAME_RANK = TABLE.keys() - {
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Gather", "Expand", "MatMul", "Embedding", "Einsum"),
    *("Add", "Sum", "Sub", "Mul", "Div", "Max", "Min"),
}
"""Operators whose outputs have the rank of their inputs."""


def _is_untouched(before: Graph, after: Graph) -> bool:
    """Whether nothing was done."""
    ends = (before.inputs, before.outputs) == (after.inputs, after.outputs)
    if not ends or len(before.nodes) != len(after.nodes):
        return False
    pairs = zip(before.nodes, after.nodes, strict=True)
    return all(
        (node.name, node.op, node.inputs, node.outputs, node.attributes)
        == (twin.name, twin.op, twin.inputs, twin.outputs, twin.attributes)
        and not _has_changed(node, twin)
        for node, twin in pairs
    )


def _has_changed(node: Node, twin: Node) -> bool:
    return node.linear is not twin.linear or node.affine is not twin.affine


def _is_same_kind(node: Node, twin: Node) -> bool:
    """Whether two nodes are one operator with one setting, whatever numbers either holds."""
    if (node.affine is None, node.linear is None) != (twin.affine is None, twin.linear is None):
        return False
    if node.affine is not None and {node.op, twin.op} <= {"Affine", "BatchNormalization"}:
        return True
    return (node.op, node.attributes) == (twin.op, twin.attributes)


def _are_alike(first: Node, second: Node) -> bool:
    """Whether two nodes of one place have come out with the same numbers."""
    if first.linear is not None and second.linear is not None:
        return first.linear.equals(second.linear)
    return first.affine is not None and second.affine is not None and first.affine.equals(second.affine)


def _is_same_operator(old: Linear, new: Linear) -> bool:
    """Whether one linear operator is another one that has absorbed something."""
    return not old.changed and old.form() == new.form()


def _obstacle(linear: Linear) -> str:
    """Why a linear operator cannot have absorbed what it has; empty where it can."""
    if linear.before is not None and linear.sealed:
        return linear.sealed
    if linear.before is not None and linear.partial and np.any(linear.before[1] != 0):
        return linear.partial
    if linear.biasless and linear.shifts:
        return linear.biasless
    return (
        "it is not laid out like its input" if linear.parallel is not None and linear.centre is None else ""
    )


def _goes_by(linear: Linear, affine: Affine) -> bool:
    """Whether a scale along other axes than that on which a matrix without a bias works is one of its outputs, too."""
    return linear.is_bare and affine.is_linear and linear.in_axis not in affine.axes


# ---------------------------------------------------------------- maps


def _compose(second: Affine | None, first: Affine | None, noise: float) -> tuple[Affine | None, float]:
    """One map after another."""
    if second is None or first is None:
        return (second or first), noise
    shift, more = _total([second.scale * first.shift, second.shift])
    largest = float(np.max(np.abs(second.scale), initial=0.0))
    return Affine.of(second.scale * first.scale, shift), noise * largest + more


def _conjugate(own: Affine, affine: Affine | None, noise: float) -> tuple[Affine | None, float]:
    """What is left of a map below a constant affine map: `F A = B F` has `B = F A F^-1`, without the inverse."""
    if affine is None:
        return None, noise
    shift, more = _total([own.scale * affine.shift, own.shift, -own.shift * affine.scale])
    return Affine.of(affine.scale, shift).collapse(), noise + more


def _total(terms: Sequence[Array]) -> tuple[Array, float]:
    """A sum, and how far rounding may have moved it where its terms cancel; what rounding alone leaves is zero."""
    total = sum(terms[1:], terms[0])
    size = sum((np.abs(term) for term in terms[1:]), np.abs(terms[0]))
    if not np.isfinite(size).all():
        raise Refuse("a number overflows")
    cancelled = np.where(np.abs(total) < size * 2.0**-10, size, 0.0)
    return np.where(np.abs(total) <= size * 2.0**-46, 0.0, total), float(
        cancelled.max(initial=0.0)
    ) * _ROUNDING


def _leaning(relation: _Relation, sign: float, beside: Array | None) -> _Relation:
    """What is known of an operand, once what a linear operator beside it took in of it is added to it."""
    if beside is None:
        return replace(relation, beside={})
    scale, _ = _total([np.ones(()), sign * beside])
    folded, noise = _compose(Affine.of(scale, 0.0), relation.folded, relation.noise)
    return _reduced(replace(relation, folded=folded, beside={}, noise=noise + _ROUNDING))


def _ratio(first: Sequence[Affine], second: Sequence[Affine], noise: float) -> Array | None:
    """By what the second maps scale more than the first, all alike; None where they do not."""
    ratio = np.full((), np.nan)
    for one, other in zip(first, second, strict=True):
        ratio = np.where(np.isnan(ratio) & (one.scale != 0), other.scale / one.scale, ratio)
    ratio = np.where(np.isnan(ratio), 1.0, ratio)
    pairs = zip(first, second, strict=True)
    return ratio if all(_are_close(ratio * one.scale, other.scale, noise) for one, other in pairs) else None


def _are_close(first: Array, second: Array, noise: float, scale: Array | float = 0.0) -> bool:
    """Whether numbers are equal but for rounding; those of a shift may be off by a part of the scale, too."""
    size = np.maximum(np.abs(first), np.abs(second))
    excused = np.minimum(noise, _LOUDEST * np.maximum(size, np.abs(scale)))
    return bool(np.all(np.abs(first - second) <= _ROUNDING * size + excused))


def _agree(first: Affine | None, second: Affine | None, noise: float) -> bool:
    """Whether two maps are one, but for rounding."""
    if first is None and second is None:
        return True
    one, other = first or _IDENTITY, second or _IDENTITY
    return _are_close(one.scale, other.scale, noise) and _are_close(one.shift, other.shift, noise, one.scale)


def _reduced(relation: _Relation) -> _Relation:
    """The same, of another common origin: with one map or none where that can be."""
    original, folded, noise = relation.original, relation.folded, relation.noise
    if _agree(original, folded, noise):
        return replace(relation, original=None, folded=None, noise=0.0)
    if original is not None and folded is not None:
        if np.all(folded.scale != 0):
            (original, noise), folded = _divide(original, folded, noise), None
        elif np.all(original.scale != 0):
            (folded, noise), original = _divide(folded, original, noise), None
    original, folded = (None if side is None else _evened(side, noise) for side in (original, folded))
    return replace(relation, original=original, folded=folded, noise=noise)


def _divide(second: Affine, first: Affine, noise: float) -> tuple[Affine, float]:
    """The map that makes of one what another one does: `second first^-1`."""
    scale = second.scale / first.scale
    shift, more = _total([second.shift, -scale * first.shift])
    least = float(np.min(np.abs(first.scale), initial=1.0))
    return Affine.of(scale, shift), noise / least + more


def _evened(affine: Affine, noise: float) -> Affine:
    """The same map, alike along every axis along which it differs by rounding alone."""
    scale, shift = affine.scale, affine.shift
    for axis in affine.axes:
        one, other = first_along(scale, axis), first_along(shift, axis)
        if _are_close(scale, one, noise) and _are_close(shift, other, noise, scale):
            scale, shift = one, other
    return Affine(scale, shift)
