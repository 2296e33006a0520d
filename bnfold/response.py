"""Check that a merged operator is what it was made of, for every input, by its response to one random impulse.

`merge` multiplies and adds up weights; this neither does nor knows how. A block of linear operators is, away from its
bias, one map from offsets to matrices, and a matrix is known by what it makes of a random vector, but for an accident
of probability zero (Freivalds 1979, "Fast probabilistic algorithms"), if nobody knew the vector before: each check
draws another one. So a vector of random numbers goes in at one position, and what comes out at each position, one
operator after another, must be what the merged operator makes of it; with strides, one goes in at each position that
they tell apart. What comes out for nothing is the bias.

That is the block in the middle of a value. At its border nothing more is needed, if

- both give outputs of one size for every size of the input, which their strides and slacks say (`window`), and
- whatever pads with zeros, pads the block's own input, or what is zero wherever that would be padded.

A sum whose operands have moved into a merged operator is checked in the same walk: what was taken from it must have
been added where its other operands come from.

Not covered: the values between, of which nobody may know (`Host.place`), and how the numbers are rounded (`weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.algebra import Affine, Array, Linear
from bnfold.errors import Refuse
from bnfold.ir import Graph, Node
from bnfold.rules import TABLE, is_sum, sign_of
from bnfold.simulation import NotProved
from bnfold.window import Window

__all__ = ["Claim", "Stored", "check_merges"]

_ROUNDING = 2.0**-30

Stored = Callable[[Node], tuple[npt.NDArray[Any], npt.NDArray[Any] | None]]
"""The weight and bias of a linear node, as the model holds them."""

Position = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Response:
    """What a value is where an impulse went in.

    Attributes:
        axis: where its channels lie.
        taps: by position, two rows of one number per channel: what it is there, and the size of what that is a sum of.
        constant: the same, of what it is everywhere.
        strides, slack: how its size follows from that of the block's input: `floor((n + slack - 1) / stride) + 1`.
        point: whether it would be zero, but for the constant, wherever the block's input would be padded.
    """

    axis: int
    taps: Mapping[Position, Array]
    constant: Array
    strides: tuple[int, ...] = ()
    slack: tuple[int, ...] = ()
    point: bool = True

    @property
    def channels(self) -> int:
        """How many channels it has."""
        return len(self.constant[0])

    @property
    def form(self) -> tuple[object, ...]:
        """What two values must have in common to be added."""
        return self.axis, self.channels, self.strides, self.slack

    def map(self, move: Callable[[Array], Array]) -> _Response:
        """Let the same be done to every number, at each position and everywhere."""
        return replace(
            self, taps={at: move(own) for at, own in self.taps.items()}, constant=move(self.constant)
        )


@dataclass(frozen=True)
class Claim:
    """What is said of a merged operator.

    Attributes:
        into: its node in the graph afterwards.
        source, result: the values that it reads and computes.
        dropped: the operands of sums that it took in, by the node that read each, and where.
        signs: whether each was added, or subtracted.
        numbers: tells its weight `(groups, outputs/groups, inputs/groups, *kernel)` and its bias `(outputs,)`.
    """

    into: str
    source: str
    result: str
    dropped: tuple[tuple[str, int], ...]
    signs: tuple[float, ...]
    numbers: Callable[[], tuple[Array, Array]]


def check_merges(
    graph: Graph,
    after: Graph,
    claims: Sequence[Claim],
    left: Mapping[str, Sequence[int]],
    stored: Stored,
    rounding: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Check that a graph with merged operators computes what it did without.

    Args:
        graph: before anything was merged.
        after: with one node in the place of each block.
        claims: what those nodes are.
        left: of the sums that lost operands, the places of those that are left.
        stored: the numbers of the linear nodes before.
        rounding: how far each number of a merged operator may be off, as a part of itself, and where that is less.

    Raises:
        NotProved: that does not follow.
    """
    if not claims and not left:
        return
    with np.errstate(all="ignore"):
        try:
            _Walk(graph, after, claims, left, stored, rounding).run()
        except (Refuse, ValueError, LookupError) as gap:
            raise NotProved(f"what was merged is not proved: {gap}") from gap


@dataclass(frozen=True)
class _Known:
    """What stands for a value afterwards, and what else is added to it there: values of the graph before, how often."""

    stands_for: str
    extra: Mapping[str, float] = field(default_factory=dict)


class _Walk:
    """The state of one check: by value of the graph before, what is known of it afterwards."""

    def __init__(
        self,
        graph: Graph,
        after: Graph,
        claims: Sequence[Claim],
        left: Mapping[str, Sequence[int]],
        stored: Stored,
        rounding: tuple[float, float],
    ) -> None:
        self.graph, self.after, self.left, self.stored = graph, after, left, stored
        self.within, self.least = rounding[0] + _ROUNDING, rounding[1]
        self.results = {claim.result: claim for claim in claims}
        self.merged = {claim.into for claim in claims}
        self.known: dict[str, _Known] = {}

    def run(self) -> None:
        for name, places in self.left.items():
            self._check_left(self.graph[name], list(places))
        for node in self.graph.nodes:
            claim = self.results.get(node.outputs[0]) if node.outputs else None
            if claim is not None:
                self._merge(claim, self.after[claim.into])
            elif is_sum(node) and (node.name in self.left or node.name in self.after):
                self._shrink(node, self.left.get(node.name, range(len(node.inputs))))
            elif node.name in self.after and node.name not in self.merged:
                self._keep(node, self.after[node.name])
        for value, stands_for in zip(self.graph.outputs, self.after.outputs, strict=True):
            self._check(value, stands_for)

    def _check_left(self, node: Node, places: list[int]) -> None:
        """Operands that are left are some of those of a sum, each once and in their order."""
        if not is_sum(node) or places != [place for place in range(len(node.inputs)) if place in places]:
            raise Refuse(f"`{node.name}` ({node.op}) does not lose operands like this")

    def _find(self, value: str) -> _Known:
        if value in self.known:
            return self.known[value]
        if self.graph.producer(value) is not None:
            raise Refuse(f"`{value}` is gone")
        return _Known(value)

    def _check(self, value: str, stands_for: str) -> None:
        if self._find(value) != _Known(stands_for):
            raise Refuse(f"`{value}` would be another one")

    def _keep(self, node: Node, twin: Node) -> None:
        """A node that is there before and after."""
        same = (node.op, node.linear, node.affine, node.outputs) == (
            twin.op,
            twin.linear,
            twin.affine,
            twin.outputs,
        )
        if not same or node.attributes != twin.attributes:
            raise Refuse(f"`{node.name}` ({node.op}) has become another operator")
        for value, stands_for in zip(node.inputs, twin.inputs, strict=True):
            self._check(value, stands_for)
        self.known.update((value, _Known(value)) for value in node.outputs)

    def _shrink(self, node: Node, left: Sequence[int]) -> None:
        """A sum that may have lost operands: what was lost is missing, what the others bring along is added."""
        extra: dict[str, float] = {}
        for place, value in enumerate(node.inputs):
            sign = sign_of(node, place)
            terms = self._find(value).extra if place in left else {value: -1.0}
            for term, times in terms.items():
                for leaf, own in self._leaves(term):
                    extra[leaf] = extra.get(leaf, 0.0) + sign * times * own
        extra = {value: times for value, times in extra.items() if times}
        (value,) = node.outputs
        if len(left) > 1:
            twin = self.after[node.name]
            names = tuple(self._find(node.inputs[place]).stands_for for place in left)
            if twin.op != node.op or twin.inputs != names:
                raise Refuse(f"`{node.name}` ({node.op}) adds up something else")
            self.known[value] = _Known(value, extra)
        elif left:
            if sign_of(node, left[0]) < 0:
                raise Refuse(f"`{node.name}` ({node.op}) would lose a sign")
            self.known[value] = _Known(self._find(node.inputs[left[0]]).stands_for, extra)

    def _leaves(self, value: str) -> Iterator[tuple[str, float]]:
        """The terms of a value that no sum stands for any more."""
        node = self.graph.producer(value)
        if node is None or len(self.left.get(node.name, (0,))) > 0:
            yield value, 1.0
            return
        for place, operand in enumerate(node.inputs):
            yield from ((leaf, sign_of(node, place) * own) for leaf, own in self._leaves(operand))

    def _merge(self, one: Claim, twin: Node) -> None:
        """A merged operator: its result, and the operands of sums that it took in."""
        _check_window(twin)
        if twin.linear is None or twin.outputs != (one.result,) or len(twin.inputs) != 1:
            raise Refuse(f"`{one.into}` does not compute `{one.result}`")
        self._check(one.source, twin.inputs[0])
        lost = [self.graph[name].inputs[place] for name, place in one.dropped]
        extra = dict(zip(lost, one.signs, strict=True))
        if len(extra) < len(lost):
            raise Refuse(f"`{one.into}` takes one value in twice")
        weight, bias = one.numbers()
        weight = weight.reshape(-1, *weight.shape[2:])
        impulse = _impulses(twin.linear)
        block = _Block(self.graph, self.stored, one.source, impulse)
        whole = block.respond(one.result)
        for value, sign in extra.items():
            whole = _sum(whole, block.respond(value), sign)
        mine = _apply(replace(twin.linear, order="oi"), weight, bias, impulse)
        least = self.least * (1.0 + sum(float(own[1].sum()) for own in impulse.taps.values()))
        if not _agree(whole, mine, (self.within, least), bool(twin.linear.sealed)):
            raise Refuse(f"`{one.into}` is not what it was made of")
        self.known[one.result] = _Known(one.result, extra)


# ---------------------------------------------------------------- one block


def _impulses(linear: Linear) -> _Response:
    """A random vector at each of the positions that the strides of a merged operator tell apart."""
    random = np.random.default_rng()
    strides = linear.window.strides if linear.window is not None else ()
    taps: dict[Position, Array] = {}
    for at in product(*(range(stride) for stride in strides)):
        vector = random.uniform(1.0, 2.0, linear.inputs) * random.choice([-1.0, 1.0], linear.inputs)
        if linear.sealed:
            vector += (1.0 - vector.sum()) / linear.inputs
        taps[at] = np.stack([vector, np.abs(vector)])
    ones, zeros = (1,) * len(strides), (0,) * len(strides)
    return _Response(linear.in_axis, taps, np.zeros((2, linear.inputs)), ones, zeros)


class _Block:
    """The values of a block, one after another."""

    def __init__(self, graph: Graph, stored: Stored, source: str, impulse: _Response) -> None:
        self.graph, self.stored, self.known = graph, stored, {source: impulse}

    def respond(self, value: str) -> _Response:
        """What a value is, where an impulse went in at the source.

        Raises:
            Refuse: something that is not linear lies between, or a zero would be padded that is none.
        """
        waiting = [value]
        while waiting:
            node = self.graph.producer(waiting[-1])
            if waiting[-1] in self.known:
                waiting.pop()
            elif node is None or len(node.outputs) != 1:
                raise Refuse(f"`{value}` is made of `{waiting[-1]}` as well")
            else:
                missing = [each for each in node.inputs if each not in self.known]
                waiting.extend(missing)
                if not missing:
                    self.known[waiting.pop()] = self._through(
                        node, [self.known[each] for each in node.inputs]
                    )
        return self.known[value]

    def _through(self, node: Node, given: list[_Response]) -> _Response:
        row = TABLE.get(node.op)
        if node.linear is not None:
            _check_window(node)
            return _apply(node.linear, *self.stored(node), given[0])
        if node.affine is not None:
            return _scale(node.affine, given[0])
        if node.op == "Identity":
            return given[0]
        if node.op == "AveragePool" and isinstance(node.attributes.get("window"), Window):
            return _average(node.attributes["window"], given[0])
        if row is None or row.signs is None:
            raise Refuse(f"`{node.name}` ({node.op}) is not linear")
        total = given[0]
        for place, operand in enumerate(given[1:], 1):
            total = _sum(total, operand, sign_of(node, place))
        return total


def _check_window(node: Node) -> None:
    """Refuse a convolution of which it is not known how it slides."""
    if node.op == "ConvTranspose" or (
        node.op == "Conv" and (node.linear is None or node.linear.window is None)
    ):
        raise Refuse(f"`{node.name}` ({node.op}) slides in a way that is not followed")


def _sum(first: _Response, second: _Response, sign: float) -> _Response:
    if first.form != second.form:
        raise Refuse("what is added has another size, or other channels")
    signs = np.array([[sign], [1.0]])
    taps = dict(first.taps)
    for at, own in second.taps.items():
        taps[at] = taps.get(at, 0.0) + signs * own
    constant = first.constant + signs * second.constant
    return replace(first, taps=taps, constant=constant, point=first.point and second.point)


def _scale(affine: Affine, given: _Response) -> _Response:
    vectors = affine.vectors(given.axis, given.channels)
    if vectors is None:
        raise Refuse("an affine map varies along another axis than the channels")
    return _with(vectors, given)


def _with(vectors: tuple[Array, Array], given: _Response) -> _Response:
    """A scale and a shift for each channel."""
    scale, shift = (np.stack([each, np.abs(each)]) for each in vectors)
    scaled = given.map(lambda numbers: scale * numbers)
    return replace(scaled, constant=scaled.constant + shift)


def _average(window: Window, given: _Response) -> _Response:
    """The mean of a window, zeros that it pads included, in each channel."""
    share = 1.0 / float(np.prod(window.kernel))
    weights = dict.fromkeys(np.ndindex(*window.kernel), share)
    return _slide(window, given, lambda tap, numbers: weights[tap] * numbers)


def _apply(
    linear: Linear, weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None, given: _Response
) -> _Response:
    """A linear operator with all that it has absorbed, one of its taps after another."""
    if (given.axis, given.channels) != (linear.in_axis, linear.inputs):
        raise Refuse("its channels lie on another axis")
    window = linear.window or Window((), (), (), ())
    seen = np.asarray(linear.view(weight), np.float64)
    pair, made_of = (seen, np.abs(seen)), dict[int, tuple[Array, Array]]()

    def multiply(tap: Position, numbers: Array) -> Array:
        if id(numbers) not in made_of:
            rows = numbers.reshape(2, linear.groups, 1, 1, -1)
            made = [(row @ own)[..., 0, :] for row, own in zip(rows, pair, strict=True)]
            made_of[id(numbers)] = numbers, np.stack(made).reshape(2, linear.outputs, -1)
        return made_of[id(numbers)][1][..., np.ravel_multi_index(tap, window.kernel) if tap else 0]

    read = given if linear.before is None else _with(linear.before, given)
    made = replace(_slide(window, read, multiply), axis=linear.out_axis)
    if bias is not None:
        if any(size != 1 for size in np.shape(bias)[:-1]):
            raise Refuse("its bias differs between rows")
        own = np.broadcast_to(np.asarray(bias, np.float64).ravel(), linear.outputs)
        made = replace(made, constant=made.constant + np.stack([own, np.abs(own)]))
    if linear.after is not None:
        made = _with(linear.after, made)
    if linear.parallel is None:
        return made
    beside = _with((linear.parallel, np.zeros(linear.outputs)), given)
    return _sum(made, beside, 1.0)


def _slide(window: Window, given: _Response, multiply: Callable[[Position, Array], Array]) -> _Response:
    """`y[o] = sum_j W[j] x[o s + j d - p]`: each position goes where some tap reads it."""
    if len(window.kernel) != len(given.strides):
        raise Refuse("it is a convolution, or a matrix, and what it reads is none")
    if window.is_padded and not (given.point and not np.any(given.constant)):
        raise Refuse("it pads with zeros what would be something else there")
    offsets = [window.offset(axis) for axis in range(len(window.kernel))]
    taps: dict[Position, Array] = {}
    constant: Any = 0.0
    for tap in np.ndindex(*window.kernel):
        constant = constant + multiply(tap, given.constant)
        for at, numbers in given.taps.items():
            steps = zip(at, tap, window.dilations, offsets, window.strides, strict=True)
            places = [divmod(p - j * d - offset, stride) for p, j, d, offset, stride in steps]
            if not any(rest for _, rest in places):
                where = tuple(place for place, _ in places)
                taps[where] = taps.get(where, 0.0) + multiply(tap, numbers)
    axes = range(len(window.kernel))
    strides = tuple(given.strides[axis] * window.strides[axis] for axis in axes)
    slack = tuple(given.slack[axis] + given.strides[axis] * window.slack(axis) for axis in axes)
    return _Response(given.axis, taps, constant, strides, slack, given.point and window.is_point)


def _agree(first: _Response, second: _Response, within: tuple[float, float], looks_up: bool) -> bool:
    """Whether two operators make the same of an impulse, of nothing, and of every size."""
    if first.form != second.form:
        return False
    if looks_up:
        one, other = (sum(each.taps.values(), each.constant) for each in (first, second))
        return _are_close(one, other, within)
    nothing = np.zeros((2, first.channels))
    places = first.taps.keys() | second.taps.keys()
    pairs = ((first.taps.get(at, nothing), second.taps.get(at, nothing)) for at in places)
    return _are_close(first.constant, second.constant, within) and all(
        _are_close(*pair, within) for pair in pairs
    )


def _are_close(first: Array, second: Array, within: tuple[float, float]) -> bool:
    return bool(
        np.all(np.abs(first[0] - second[0]) <= within[0] * np.maximum(first[1], second[1]) + within[1])
    )
