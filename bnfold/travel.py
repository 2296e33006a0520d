"""The driver: every affine goes up, else down, else its scale goes alone, else it stays; with a verdict for each.

Pure: a `Graph` in, a `Graph` and the verdicts out; no framework, no weight is touched. How an affine passes one
operator is a row of `rules.TABLE`; here is only who must be asked, in which order, and what follows.

**Up.** "Make this value arrive already scaled and shifted." The wish goes from the BatchNorm's input to whoever
computes it, and on through the table's rows until linear operators have absorbed it. Nodes are asked in reverse order
of computation, so that a value's readers have all spoken before its producer is asked: a value read by somebody else
keeps what that reader needs, and wishes that contradict one another are refused.

**Down.** "Everybody who reads this value makes up for it." Nodes are asked in order of computation; every reader must
absorb, and a model's output cannot.

**All or nothing.** An attempt collects changes and applies them only when nobody refused. BatchNorms that share their
numbers (one module called twice) move together, and linear operators that share theirs must come out alike.

**Order.** Attempts that end in linear operators come first, until there are none: they take nothing from each other
(every linear operator absorbs any number of affines on either side), so no choice among them loses another. Then
BatchNorms that can only be composed into another BatchNorm; here a choice can cost one (of thousands of small random
graphs, one lost one), so both orders are tried and the better one is taken. Last, scales that leave their shift behind.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from itertools import chain, islice

import numpy as np

from bnfold import reasons
from bnfold.algebra import Affine, Array, Linear
from bnfold.duplicate import copy_producers, original
from bnfold.errors import InputError, Refuse
from bnfold.ir import Graph, Node, Shape
from bnfold.report import Outcome, Verdict
from bnfold.rules import TABLE, find, is_sum, sign_of, without_row

__all__ = ["HALVES", "Options", "Plan", "travel"]


HALVES = {"any": 99, "torch": 99, "onnxruntime": 2}
"""By runtime, up to which rank of a value an Add is not slower than the BatchNorm (measured: `docs/leftover.md`)."""


@dataclass(frozen=True)
class Options:
    """What folding may do besides moving whole affines.

    Attributes:
        halves: move a scale where the shift must stay; a per-channel Add is left.
        runtime: where the model will run (a key of `HALVES`), which says whether that Add pays.
        lower: leave one multiply and one add in the place of every BatchNorm that is kept.
        duplicate: copy a linear operator that somebody else reads as well (`duplicate`); for files only.
        merge: let linear operators side by side, or one after another, become one afterwards (`merge`).
    """

    halves: bool = True
    runtime: str = "any"
    lower: bool = False
    duplicate: bool = False
    merge: bool = True

    def __post_init__(self) -> None:
        if self.runtime not in HALVES:
            raise InputError(f"runtime {self.runtime!r} is not known; choose one of {', '.join(HALVES)}")


@dataclass(frozen=True)
class Plan:
    """Where every affine went.

    Attributes:
        graph: the graph afterwards.
        verdicts: one for every BatchNorm.
        absorbed: of BatchNorms that took in another one below them, by name, the affine of that one (for `simulation`).
    """

    graph: Graph
    verdicts: tuple[Verdict, ...]
    absorbed: Mapping[str, Affine] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """How many BatchNorms are left, in whole or in part."""
        return sum(verdict.outcome != "folded" for verdict in self.verdicts)


def travel(graph: Graph, options: Options | None = None, fits: Callable[[Node], str] | None = None) -> Plan:
    """Move every BatchNorm of a graph into the linear operators around it.

    Args:
        graph: as a frontend's `read` draws it.
        options: see `Options`.
        fits: asked of every node with what it would absorb or leave; returns why its numbers cannot be stored
            ("its weight would overflow float16"), or nothing.

    Returns:
        The graph without the BatchNorms that were folded, its linear operators with what they absorbed, and a verdict
        for every BatchNorm.
    """
    options, fits = options or Options(), fits or (lambda node: "")
    with np.errstate(over="ignore", invalid="ignore"):
        plan = _travel(graph, options, fits)
        return _duplicate(graph, options, fits, plan) if options.duplicate and plan.kept else plan


def _duplicate(graph: Graph, options: Options, fits: Callable[[Node], str], plan: Plan) -> Plan:
    """Fold once more, with copies for those that were kept; copies that do not help are taken back."""
    kept = {verdict.name for verdict in plan.verdicts if verdict.outcome != "folded"}
    while kept:
        copied, readers = copy_producers(graph, [node.name for node in graph.nodes if node.place in kept])
        again = _travel(copied, options, original(fits))
        stayed = {name for name in readers if name in again.graph}
        if not stayed:
            return again if readers else plan
        kept = {graph[name].place for name in readers - stayed}
    return plan


def _travel(graph: Graph, options: Options, fits: Callable[[Node], str]) -> Plan:
    """Fold, with both orders of composing where the choice can matter."""
    driver = _Driver(graph, options, fits, (Attempt.up, Attempt.down))
    plan = driver.run()
    if not driver.composed or not plan.kept:
        return plan
    other = _Driver(graph, options, fits, (Attempt.down, Attempt.up)).run()
    return min(plan, other, key=lambda either: either.kept)


class _Driver:
    """The state of one `travel`: the nodes as they are by now, who is gone, and the verdicts so far.

    Attributes:
        composing: in which order the directions are tried in which BatchNorms are composed.
        composed: whether any was, so that the other order is worth a try.
        nodes: by name, as they are by now; those that were erased, too.
        position: of each node, its place in the order of computation.
        erased: the nodes that are gone; `origins` says which value each of their outputs is now.
        outputs, held_in: the values that cannot change: those that the caller gets, and those that the model keeps,
            with where it does.
        reads: by value, the nodes that read it by now; filled as it is asked for.
        places: by place, the nodes that share it.
        centred: values that a linear operator with a centre reads, on which a sum beside it could lean.
        verdicts, spared: what became of places so far, and those whose scale could have gone alone but stays.
        moves: how many were made; what was `refused` stays so until there is another one.
    """

    def __init__(
        self,
        graph: Graph,
        options: Options,
        fits: Callable[[Node], str],
        composing: tuple[Direction, Direction],
    ) -> None:
        self.graph, self.options, self.fits, self.composing = graph, options, fits, composing
        self.composed = False
        self.nodes = {node.name: node for node in graph.nodes}
        self.position = {node.name: place for place, node in enumerate(graph.nodes)}
        self.erased: set[str] = set()
        self.outputs, self.held_in = set(graph.outputs), dict(graph.held_in)
        self.origins: dict[str, str] = {}
        self.reads: dict[str, dict[str, None]] = {}
        self.places: dict[str, list[str]] = {}
        for node in graph.nodes:
            if node.site or node.linear is not None or node.is_batchnorm:
                self.places.setdefault(node.place, []).append(node.name)
        self.centred: set[str] = set()
        for node in graph.nodes:
            if node.linear is not None and node.linear.centre is not None:
                self._mark(node.inputs[0])
        self.verdicts: dict[str, Verdict] = {}
        self.spared: set[str] = set()
        self.moves = 0
        self.refused: dict[tuple[str, Direction, bool], _Refused] = {}

    @cached_property
    def dead_ends(self) -> dict[str, str]:
        """Values that no affine leaves downwards, each with who is in the way: a refusal that needs no walk."""
        ends: dict[str, str] = {}
        for node in reversed(self.graph.nodes):
            for value in node.outputs:
                if value in self.outputs:
                    ends[value] = self.ending(node, value)
            row = TABLE.get(node.op)
            way = ends.get(node.outputs[0]) if row is not None and row.carries else None
            if row is None:
                way = without_row(node)
            if way:
                ends.update(dict.fromkeys(node.inputs, way))
        return ends

    # -- the graph as it is by now

    def shape(self, value: str) -> Shape | None:
        return self.graph.shapes.get(value)

    def source(self, value: str) -> str:
        """The value that this one is, now that some nodes are gone."""
        path = []
        while value in self.origins:
            path.append(value)
            value = self.origins[value]
        self.origins.update(dict.fromkeys(path, value))
        return value

    def _mark(self, value: str) -> None:
        """Note that a linear operator with a centre reads this value, or what BatchNorms make of it."""
        while value not in self.centred:
            self.centred.add(value)
            producer = self.graph.producer(value)
            if producer is not None and producer.is_batchnorm:
                value = producer.inputs[0]

    def erase(self, node: Node) -> None:
        """Let whoever reads the output of a node read its input, under either name."""
        self.erased.add(node.name)
        below, above = node.outputs[0], self.source(node.inputs[0])
        self.origins[below] = above
        names = self._reads(above)
        names.update(self._reads(below))
        del names[node.name]
        if below in self.outputs:
            self.outputs.add(above)
            if below in self.held_in:
                self.held_in.setdefault(above, self.held_in[below])

    def producer(self, value: str) -> Node | None:
        producer = self.graph.producer(self.source(value))
        return None if producer is None else self.nodes[producer.name]

    def _reads(self, value: str) -> dict[str, None]:
        if value not in self.reads:
            self.reads[value] = dict.fromkeys(node.name for node in self.graph.readers(value))
        return self.reads[value]

    def readers(self, value: str) -> Iterator[Node]:
        """The nodes that read a value by now, each once."""
        return (self.nodes[name] for name in self._reads(value))

    def is_shared(self, value: str) -> bool:
        """Whether a value is read more than once, be it by one node."""
        reads = (v for node in self.readers(value) for v in node.inputs if self.source(v) == value)
        return len(list(islice(reads, 2))) > 1

    def is_output(self, value: str) -> bool:
        return value in self.outputs

    def ending(self, node: Node, value: str, row: reasons.Reason = reasons.ENDS) -> str:
        """Why an output of a node cannot change that is one of the model, or kept by it."""
        where = self.held_in.get(value)
        return row(node=node) if where is None else reasons.KEPT_OUTPUT(node=node, where=where)

    def takes_shift(self, value: str, patience: int = 64) -> bool:
        """Whether a shift could go up from here, by the look of the operators above; after so many steps, no."""
        value = self.source(value)
        producer = self.producer(value)
        if producer is None or not patience or self.is_shared(value):
            return False
        if producer.linear is not None:
            return not producer.linear.biasless
        if producer.is_batchnorm:
            return producer.affine is not None
        row = TABLE.get(producer.op)
        if row is None or row.shift == "none" or producer.partial:
            return False
        every = all if row.shift == "all" else any
        return every(self.takes_shift(value, patience - 1) for value in producer.inputs)

    # -- moving

    def run(self) -> Plan:
        units = self._units()
        waiting = self._whole(list(units))
        if self.options.halves:
            waiting = [unit for unit in waiting if not self._half(unit)]
        for unit in waiting:
            self._keep(unit)
        verdicts = tuple(self.verdicts[unit] for unit in units)
        changed = self.graph.replace(
            {name: node for name, node in self.nodes.items() if node is not self.graph[name]}
        )
        absorbed = {name: node.absorbed for name, node in self.nodes.items() if node.absorbed is not None}
        return Plan(changed.bypass(self.erased), verdicts, absorbed)

    def _units(self) -> dict[str, None]:
        """The places of all BatchNorms, in order."""
        return dict.fromkeys(node.place for node in self.graph.nodes if node.is_batchnorm)

    def _whole(self, units: list[str]) -> list[str]:
        """Fold what can be folded whole; return what is left."""
        while True:
            before = len(units)
            units = self._sweep(self._sweep(units, Attempt.up), Attempt.down)
            if len(units) == before:
                first, second = self.composing
                units = self._sweep(self._sweep(units, first, compose=True), second, compose=True)
            if len(units) == before:
                return units

    def _sweep(self, units: list[str], direction: Direction, compose: bool = False) -> list[str]:
        """Try to move each unit in one direction, the first to arrive first; return those that stay."""
        step = 1 if direction is Attempt.up else -1
        return [unit for unit in units[::step] if not self._try(unit, direction, compose)][::step]

    def _try(self, unit: str, direction: Direction, compose: bool) -> bool:
        """Attempt to move one unit as a whole; True if it is gone."""
        if unit in self.verdicts:
            return True
        try:
            self._attempt(unit, direction, compose).commit()
        except Refuse:
            return False
        self.composed |= compose
        return True

    def _attempt(self, unit: str, direction: Direction, compose: bool, half: bool = False) -> Attempt:
        """Try one move, unless it was refused and nothing has moved since.

        Raises:
            Refuse: see `Attempt.make`.
        """
        asked = (unit, direction, half)
        known = self.refused.get(asked)
        if known is not None and known.moves == self.moves and (known.compose == compose or not known.met):
            raise known.refusal.with_traceback(None)
        attempt = Attempt(self, {unit: None}, compose, half)
        try:
            attempt.make(direction)
        except Refuse as refusal:
            self.refused[asked] = _Refused(self.moves, compose, attempt.met_batchnorm, refusal)
            raise
        return attempt

    def _half(self, unit: str) -> bool:
        """Move the scale of one unit and leave its shift; True if that was done."""
        for direction in (Attempt.up, Attempt.down):
            try:
                attempt = self._attempt(unit, direction, compose=False, half=True)
            except Refuse:
                continue
            if self._pays(unit):
                attempt.commit(self._reason(unit))
                return True
            self.spared.add(unit)
            return False
        return False

    def _pays(self, unit: str) -> bool:
        """Whether an Add in the place of a unit is not slower where the model will run."""
        nodes = (self.nodes[name] for name in self.places[unit])
        return all(node.affine is None or node.affine.rank <= HALVES[self.options.runtime] for node in nodes)

    def _keep(self, unit: str) -> None:
        reason = self._reason(unit)
        if unit in self.spared:
            reason = reasons.SLOWER(because=reason, runtime=self.options.runtime)
        self.verdicts[unit] = Verdict(unit, "kept", (), reason)
        for name in self.places[unit]:
            node = self.nodes[name]
            if self.options.lower and node.affine is not None:
                self.nodes[name] = node.leave(node.affine)

    def _reason(self, unit: str) -> str:
        """Why a unit cannot be folded whole: one sentence for each direction, or one for both."""
        refusals: list[str] = []
        for direction in (Attempt.up, Attempt.down):
            try:
                self._attempt(unit, direction, compose=True)
            except Refuse as refusal:
                refusals.append(str(refusal))
        if len(set(refusals)) < 2:
            return "".join(refusals[:1])
        return reasons.BOTH_WAYS(above=refusals[0], below=refusals[1])


@dataclass(frozen=True)
class _Refused:
    """A move that was refused: after how many others, whether it could compose, and whether that mattered."""

    moves: int
    compose: bool
    met: bool
    refusal: Refuse


@dataclass
class Attempt:
    """One move, before it is made: what it would change. Nothing is touched until `commit`.

    Attributes:
        units: the places of the BatchNorms that move together, in order.
        compose: whether another BatchNorm may absorb them.
        half: whether only the scale moves.
        changed: by name, the nodes as they would be: with what they absorbed, or what is left in their place.
        extra: by the name of a linear operator, what it makes up for on the way up beside itself, before it is asked.
        met_batchnorm: whether it came to another BatchNorm, where `compose` decides.
    """

    driver: _Driver
    units: dict[str, None]
    compose: bool
    half: bool = False
    changed: dict[str, Node] = field(default_factory=dict)
    extra: dict[str, list[Array]] = field(default_factory=dict)
    met_batchnorm: bool = False

    def make(self, direction: Direction) -> None:
        """Try it.

        Raises:
            Refuse: somebody is in the way; the message says who.
        """
        while True:
            self._check_members()
            self.changed, self.extra = {}, {}
            try:
                direction(self)
                break
            except _Join as join:
                self.units.update(join.places)
        self._check_sharing()
        for node in self.changed.values():
            self._check_numbers(node)

    def commit(self, reason: str = "") -> None:
        """Apply the changes and write the verdicts."""
        into = tuple(
            dict.fromkeys(node.place for node in self.changed.values() if node.place not in self.units)
        )
        outcome: Outcome = "scale folded" if self.half else "folded"
        for unit in self.units:
            self.driver.verdicts[unit] = Verdict(unit, outcome, into, reason)
        if not self.half:
            for node in self._members():
                self.driver.erase(node)
        self.driver.nodes.update(self.changed)
        self.driver.moves += 1

    def up(self) -> None:
        """Wish every member's input to arrive as the member's output is."""
        demands = _Demands(self)
        queue = [(-self.driver.position[node.name], node.name) for node in self._members()]
        heapq.heapify(queue)
        seen = {name for _, name in queue}
        while queue:
            node = self._now(heapq.heappop(queue)[1])
            sources = [self.driver.source(value) for value in node.inputs]
            for value, affine in zip(sources, self._asked_up(node, demands), strict=True):
                if affine is None or affine.is_identity:
                    if sources.count(value) > 1:
                        demands.add(value, node.name, affine or self._identity(value))
                    continue
                demands.add(value, node.name, affine)
                producer = self.driver.graph.producer(value)
                if producer is None:
                    raise Refuse(reasons.BEGINS(value=value))
                if producer.name not in seen:
                    seen.add(producer.name)
                    heapq.heappush(queue, (-self.driver.position[producer.name], producer.name))

    def down(self) -> None:
        """Give every reader of a member's output the raw value, with what it lacks."""
        residues: dict[str, Affine] = {}
        queue = [(self.driver.position[node.name], node.name) for node in self._members()]
        heapq.heapify(queue)
        seen = {name for _, name in queue}
        while queue:
            node = self._now(heapq.heappop(queue)[1])
            given = [residues.get(self.driver.source(value)) for value in node.inputs]
            for value, affine in zip(node.outputs, self._asked_down(node, given), strict=True):
                if not value or affine is None or affine.is_identity:
                    continue
                if self.driver.is_output(value):
                    raise Refuse(self.driver.ending(node, value))
                if value in self.driver.dead_ends:
                    raise Refuse(self.driver.dead_ends[value])
                residues[value] = affine
                for reader in self.driver.readers(value):
                    if reader.name not in seen:
                        seen.add(reader.name)
                        heapq.heappush(queue, (self.driver.position[reader.name], reader.name))

    # -- asking one node

    def _members(self) -> list[Node]:
        names = (name for unit in self.units for name in self.driver.places[unit])
        return [node for name in names if (node := self.driver.nodes[name]).is_batchnorm]

    def _is_member(self, node: Node) -> bool:
        return node.is_batchnorm and node.place in self.units

    def _now(self, name: str) -> Node:
        """A node with what it has absorbed so far, in this attempt too."""
        return self.changed.get(name, self.driver.nodes[name])

    def _asked_up(self, node: Node, demands: _Demands) -> Sequence[Affine | None]:
        """As what each input of a node must arrive, given what is wished of its outputs."""
        wanted = [demands.agreed(value, node) for value in node.outputs]
        if self._is_member(node):
            return self._take(node, [self._own_up(node, wanted[0])], len(node.inputs))
        if all(affine is None for affine in wanted):
            return [None] * len(node.inputs)
        leaning = self._parallel_up(node, wanted[0])
        if 0 in leaning and wanted[0] is not None:
            wanted = [Affine(wanted[0].scale, sign_of(node, 1) * wanted[0].shift)]
        rest = tuple(v for place, v in enumerate(node.inputs) if place not in leaning)
        operands = replace(node, inputs=rest) if leaning else node
        answer = find(node).up(operands, self.driver, wanted)
        if isinstance(answer, Affine) and wanted[0] is not None:
            below = wanted[0].settle(None)
            node = replace(node, absorbed=below.after(node.absorbed) if node.absorbed else below)
        answers = iter(self._take(node, answer, len(operands.inputs)))
        return [None if place in leaning else next(answers) for place in range(len(node.inputs))]

    def _asked_down(self, node: Node, given: list[Affine | None]) -> Sequence[Affine | None]:
        """What each output of a node lacks, given what its inputs lack."""
        if self._is_member(node):
            return self._take(node, [self._own_down(node, given[0])], len(node.outputs))
        given = self._parallel_down(node, given)
        if all(affine is None for affine in given):
            return [None] * len(node.outputs)
        return self._take(node, find(node).down(node, self.driver, given), len(node.outputs))

    def _take(
        self, node: Node, answer: Linear | Affine | Sequence[Affine | None], count: int
    ) -> Sequence[Affine | None]:
        """Note what a node has absorbed, and return what it passes on, which is the same in either direction."""
        if isinstance(answer, Linear):
            for scale in self.extra.get(node.name, ()):
                answer = answer.absorb_parallel(scale, np.zeros_like(scale))
            self.changed[node.name] = replace(node, linear=answer)
        elif isinstance(answer, Affine):
            self.met_batchnorm = True
            if not self.compose:
                raise Refuse(reasons.IN_THE_WAY(node=node))
            self.changed[node.name] = replace(node, affine=answer)
        elif len(answer) != count:
            raise Refuse(reasons.OTHER_OPERANDS(node=node))
        else:
            return answer
        return [None] * count

    def _identity(self, value: str) -> Affine:
        shape = self.driver.shape(value)
        if shape is None:
            raise Refuse(reasons.VALUE_UNKNOWN(value=value))
        return Affine.identity(len(shape))

    def _own_up(self, node: Node, wanted: Affine | None) -> Affine:
        """What a member wishes of its input: its own affine, below what is wished of it."""
        own = _own(node)
        if not self.half:
            return own if wanted is None else wanted.after(own)
        if wanted is not None:
            raise Refuse(reasons.MOVES_TWICE(node=node))
        self._leave(node, own.shift)
        return own.scale_only()

    def _own_down(self, node: Node, given: Affine | None) -> Affine:
        """What a member's output lacks once it is gone."""
        own = _own(node)
        if not self.half:
            return own if given is None else own.after(given)
        if given is not None or np.any(own.scale == 0):
            raise Refuse(reasons.ZERO_SCALE(node=node))
        self._leave(node, own.shift / own.scale)
        if node.absorbed is not None:
            back = Affine.of(1.0 / own.scale, 0.0).after(node.absorbed)
            self.changed[node.name] = replace(self.changed[node.name], absorbed=back)
        return own.scale_only()

    def _leave(self, node: Node, shift: Array) -> None:
        """Leave one per-channel Add in the place of a member."""
        self.changed[node.name] = node.leave(Affine.of(1.0, shift))

    # -- a linear operator beside: L(x) + x

    def _parallel_up(self, node: Node, wanted: Affine | None) -> set[int]:
        """The operands of a sum that another operand makes up for: `s (L x + x) = (s L + (s - 1) I) x + x`."""
        leaning: set[int] = set()
        if not is_sum(node) or wanted is None or not np.any(wanted.scale != 1):
            return leaning
        for place in range(len(node.inputs)):
            parallel = self._parallel(node, place, members=False)
            vectors = parallel and self._along(parallel, wanted.settle(parallel[1].out_axis))
            if parallel and vectors:
                self.extra.setdefault(parallel[0], []).append(parallel[2] * (vectors[0] - 1.0))
                leaning.add(place)
        return leaning if len(leaning) < len(node.inputs) else set()

    def _parallel_down(self, node: Node, given: list[Affine | None]) -> list[Affine | None]:
        """What is left for a sum to pass on, once a linear operator beside made up for it.

        `L x + (s x + t) = (L + (s - 1) I) x + t + x`
        """
        scaled = [affine for affine in given if affine is not None and np.any(affine.scale != 1)]
        if not is_sum(node) or not scaled or len(scaled) == len(given):
            return given
        rest = list(given)
        for place, affine in enumerate(given):
            if affine is None:
                continue
            parallel = self._parallel(node, place, members=True)
            vectors = parallel and self._along(parallel, affine)
            if parallel and vectors and not (parallel[1].biasless and np.any(vectors[1] != 0)):
                name, linear, sign = parallel
                scale, shift = vectors
                absorbed = linear.absorb_parallel(sign * (scale - 1.0), sign * shift)
                self.changed[name] = replace(self._now(name), linear=absorbed)
                rest[place] = None
        return rest

    def _along(self, parallel: tuple[str, Linear, float], affine: Affine) -> tuple[Array, Array] | None:
        return affine.vectors(parallel[1].out_axis, parallel[1].outputs)

    def _parallel(self, node: Node, place: int, members: bool) -> tuple[str, Linear, float] | None:
        """A linear operator that reads what one operand of this sum is, and whose output is another one of its own.

        With it comes -1 where one of the two is added and the other subtracted, else 1.
        """
        shape = self.driver.shape(node.outputs[0])
        if shape is None or self.driver.shape(node.inputs[place]) != shape:
            return None
        origin = self._origin(node.inputs[place], members)
        if origin not in self.driver.centred:
            return None
        own = sign_of(node, place)
        around = [(v, own * sign_of(node, other)) for other, v in enumerate(node.inputs) if other != place]
        for value, sign in around:
            value = self.driver.source(value)
            if self.driver.is_shared(value) or self.driver.is_output(value):
                continue
            producer = self.driver.producer(value)
            if producer is None:
                continue
            if is_sum(producer) and self.driver.shape(producer.outputs[0]) == shape:
                around += [(v, sign * sign_of(producer, other)) for other, v in enumerate(producer.inputs)]
            linear = self._now(producer.name).linear
            if linear is None or linear.centre is None:
                continue
            if self._origin(producer.inputs[0], members) == origin:
                return producer.name, linear, sign
        return None

    def _origin(self, value: str, members: bool) -> str:
        """The value that this one is by now, or will be once the members are gone too."""
        value = self.driver.source(value)
        producer = self.driver.producer(value)
        while members and producer is not None and not self.half and self._is_member(producer):
            value = self.driver.source(producer.inputs[0])
            producer = self.driver.producer(value)
        return value

    # -- what must hold in the end

    def _check_members(self) -> None:
        for node in self._members():
            if not _own(node).is_finite:
                raise Refuse(reasons.OWN_NOT_FINITE())
            if self.half and not np.any(_own(node).scale != 1):
                raise Refuse(reasons.ONLY_SHIFTS())

    def _check_sharing(self) -> None:
        """Nodes that share their numbers must have absorbed the same."""
        for node in self.changed.values():
            names = self.driver.places[node.place]
            if not all(name in self.changed and _same(self.changed[name], node) for name in names):
                raise Refuse(reasons.USED_TWICE(place=node.place, times=len(names)))

    def _check_numbers(self, node: Node) -> None:
        """What was absorbed must be finite, and storable."""
        if node.affine is not None and not self._is_member(node):
            axis = node.attributes.get("axis", 1)
            if any(other != axis for other in node.affine.axes):
                raise Refuse(reasons.OTHER_AXES(node=node))
            if not node.affine.is_finite:
                raise Refuse(reasons.BECOMES_NOT_FINITE(node=node))
        if node.linear is not None and not node.linear.is_finite:
            raise Refuse(reasons.BECOMES_NOT_FINITE(node=node))
        obstacle = self.driver.fits(node)
        if obstacle:
            raise Refuse(reasons.CANNOT_STORE(node=node, because=obstacle))


Direction = Callable[[Attempt], None]


class _Join(Exception):
    """Other BatchNorms read the same value and want the same of it."""

    def __init__(self, places: list[str]) -> None:
        super().__init__(*places)
        self.places = dict.fromkeys(places)


class _Demands:
    """What is wished of each value, by whom, during one way up."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt, self.driver = attempt, attempt.driver
        self.demands: dict[str, list[tuple[str, Affine]]] = {}

    def add(self, value: str, reader: str, affine: Affine) -> None:
        self.demands.setdefault(value, []).append((reader, affine))

    def agreed(self, value: str, producer: Node) -> Affine | None:
        """What all readers of a value can live with; None where nobody wished anything.

        Raises:
            Refuse: they cannot, or the value is an output of the model.
            _Join: another BatchNorm wants the same and may come along.
        """
        demands = self.demands.get(value)
        if demands is None:
            return None
        if self.driver.is_output(value):
            raise Refuse(self.driver.ending(producer, value, reasons.ALSO_OUTPUT))
        alike: list[str] = []
        merged = demands[0][1]
        for reader, affine in chain(demands[1:], self._needs(value, demands, alike)):
            both = merged.merge(affine)
            if both is None:
                raise Refuse(reasons.ALSO_READ(node=producer, reader=self.driver.nodes[reader]))
            merged = both
        if alike:
            raise _Join(alike)
        return merged

    def _needs(
        self, value: str, demands: list[tuple[str, Affine]], alike: list[str]
    ) -> Iterator[tuple[str, Affine]]:
        """What the readers need who wished nothing: that what they read stays; `alike` gets who may come along."""
        spoken, demand = {reader for reader, _ in demands}, demands[0][1]
        for reader in self.driver.readers(value):
            if reader.name in spoken:
                continue
            if self._may_join(reader, demand):
                alike.append(reader.place)
            else:
                yield reader.name, self._need(reader, demand.rank)

    def _may_join(self, reader: Node, demand: Affine) -> bool:
        if self.attempt.half or not reader.is_batchnorm or reader.place in self.attempt.units:
            return False
        return reader.affine is not None and reader.affine.equals(demand)

    def _need(self, reader: Node, rank: int, patience: int = 64) -> Affine:
        """What a reader needs of a value: that what it selects stays; after so many selectors in a row, all of it."""
        row = TABLE.get(reader.op)
        shapes = [self.driver.shape(value) for value in reader.outputs if value]
        if row is None or not row.selects or None in shapes or not patience:
            return Affine.identity(rank)
        kept = [self._needed(v, patience - 1) if v else _anything(rank) for v in reader.outputs]
        answer = row.up(reader, self.driver, kept)
        assert not isinstance(answer, Linear | Affine)
        assert answer[0] is not None
        return answer[0]

    def _needed(self, value: str, patience: int) -> Affine:
        """What the readers of a value that a selector makes need of it: that what they read stays."""
        rank = len(self.driver.shape(value) or ())
        needs = [self._need(reader, rank, patience) for reader in self.driver.readers(value)]
        if self.driver.is_output(value):
            needs.append(Affine.identity(rank))
        return reduce(lambda a, b: a.merge(b) or Affine.identity(rank), needs, _anything(rank))


def _anything(rank: int) -> Affine:
    """What is wished of a value that nobody reads."""
    nan = np.full((1,) * rank, np.nan)
    return Affine(nan, nan)


def _own(node: Node) -> Affine:
    """The affine of a BatchNorm that can move."""
    if node.affine is None:
        raise Refuse(node.reason or reasons.NOT_CONSTANT())
    return node.affine


def _same(first: Node, second: Node) -> bool:
    if first.linear is not None and second.linear is not None:
        return first.linear.equals(second.linear)
    return first.affine is not None and second.affine is not None and first.affine.equals(second.affine)
