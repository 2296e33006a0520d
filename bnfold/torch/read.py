"""Read a module: draw what one forward pass computes as a `Graph`, with a note of where each number is stored.

    capture the calls -> lower each to nodes -> find the BatchNorms -> settle who shares a parameter with whom -> Graph

**Other inputs.** The pass is captured again with another batch size, at other sizes, with the other value of each flag
(`trials`). A size that differs becomes a symbol, a setting that differs makes its node opaque, a value that another
pass uses in another way has one more reader (`sizes`): nothing is decided that holds for the example alone. A
BatchNorm that did not run tells of code that no pass has seen (`idle`).

**BatchNorms** are found by what runs, not by class. A module call whose whole work is one affine map of its input is a
BatchNorm if its numbers come from its buffers: `nn.BatchNorm*`, frozen and hand-written ones alike. One that goes on
with an activation is a BatchNorm with a tail, which stays. `F.batch_norm` in the middle of other code is owed a
verdict, but cannot be taken out of it.

**Sharing** is counted by parameter. A linear operator is bound to the place its weight is stored at. Two modules that
hold one Parameter are two places, since each can be given its own; two calls of one module are one place; a parameter
that is read in any other way belongs to whoever reads it, and stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.algebra import Affine
from bnfold.errors import UnreadableModel
from bnfold.ir import Graph, Node, Shape
from bnfold.torch.alignment import Alignment
from bnfold.torch.capture import capture, computes_weight
from bnfold.torch.constants import Evaluator, slots_of
from bnfold.torch.draft import Draft, Item, LinearPlace, NormPlace
from bnfold.torch.idle import Idle, find_idle
from bnfold.torch.modules import TAILS
from bnfold.torch.running import (
    arrange,
    copied,
    copy_structure,
    quiet,
    record_pass,
    record_somehow,
    restored,
    undisturbed,
)
from bnfold.torch.sizes import settle
from bnfold.torch.tensors import Slot, leaves, put_back
from bnfold.torch.trace import Call, Frame, Trace, Value
from bnfold.torch.trials import Trials, run_trials, two_or_more

__all__ = ["LinearPlace", "NormPlace", "Reading", "Step", "arrange", "copy_structure", "draw_steps", "read"]


@dataclass(frozen=True, eq=False)
class Step:
    """One operation outside of every BatchNorm, as far as a fold must leave it as it is.

    Attributes:
        label: what was called.
        inputs: how many computed values it read.
        affine: of an affine map by constants.
        weight: the slot of its weight, of a linear operator; `biased` tells whether it has a bias.
        sources: the steps (counted from 0) and inputs of the model that computed what it reads.
        settings: the numbers and words among its arguments.
    """

    label: str
    inputs: int
    affine: Affine | None
    weight: str
    biased: bool
    sources: tuple[int | str, ...]
    settings: tuple[Any, ...]


@dataclass(frozen=True)
class Reading:
    """A graph and the places of its numbers, by node name; valid for every copy of the module.

    Attributes:
        fake: whether it was read without arithmetic.
        steps: what runs outside of the BatchNorms, for comparison with what runs after a fold.
        branches: whether numbers that depend on the inputs left the tensors.
        writes: whether it changed tensors that the module holds, or might have on other inputs.
        dtypes: the float dtypes that it computes in.
        notes: what other inputs it could not be read with.
        heads: parts that did not run and could read what the folds change; see `read`.
    """

    graph: Graph
    linears: Mapping[str, LinearPlace]
    norms: Mapping[str, NormPlace]
    fake: bool
    steps: tuple[Step, ...] = ()
    branches: bool = False
    dtypes: frozenset[torch.dtype] = frozenset()
    writes: bool = True
    notes: tuple[str, ...] = ()
    heads: tuple[Idle, ...] = ()


def read(model: nn.Module, example_inputs: Any, headless: bool = False) -> Reading:
    """Draw what a module computes from some inputs. The module is left exactly as it is.

    Args:
        model: any module, in any mode; what is in training mode is drawn as such.
        example_inputs: see `arrange`.
        headless: take it that heads which did not run never do (see `idle`).

    Raises:
        UnreadableModel: it cannot be run on these inputs, or not copied; the message names the module in the way.
    """
    if lazy := _find_uninitialised(model):
        return _read_uninitialised(model, lazy)
    args, kwargs = arrange(example_inputs)
    try:
        twin = copy_structure(model)
    except UnreadableModel:
        twin = model
    touched: list[str] = []
    recording = record_somehow(twin, args, kwargs, touched)
    if (touched or recording.changed_slots) and (paths := _unsteady(twin, args, kwargs, recording)):
        recording = record_pass(twin, args, kwargs, recording.fake, paths)
    trials = _try_otherwise(twin, args, kwargs, recording)
    idle = _find_idle(twin, args, kwargs, (recording, *(trial.recording for trial in trials.made)))
    causes = {each.holder: each.path for each in idle if not (headless and each.head)}
    if causes:
        recording = record_pass(twin, args, kwargs, recording.fake, recording.unsteady | causes.keys())
    draft = Draft(recording, Evaluator())
    draft.items += _at_the_doors(recording)
    aligned = [(trial, Alignment.of(recording, trial.recording)) for trial in trials.made]
    reader = _Reader(twin, draft, settle(draft, aligned, model), causes)
    heads = tuple(each for each in idle if each.head)
    return replace(reader.read(), notes=tuple(dict.fromkeys(trials.notes)), heads=heads)


def _at_the_doors(recording: Trace) -> Iterator[Item]:
    """Readers of what modules whose code may run otherwise are given and return: it may go another way."""
    for frame in recording.frames:
        if frame.path in recording.unsteady:
            for value in (*frame.given, *frame.made):
                if not value.slots and not value.constant:
                    yield Item("If", [value.name], [], Call(-1, "If", (), {}, frame))


def _try_otherwise(twin: nn.Module, args: Any, kwargs: Any, recording: Trace) -> Trials:
    """The passes on other inputs that could be made."""

    def run(args: Any, kwargs: Any, seed: int) -> Trace:
        return record_pass(twin, args, kwargs, recording.fake, recording.unsteady, seed=seed)

    def parts(other: Trace) -> bool:
        alignment = Alignment.of(recording, other)
        return bool(alignment.partings or alignment.apart)

    return run_trials(twin, args, kwargs, run, parts, recording.draws)


def _find_idle(twin: nn.Module, args: Any, kwargs: Any, recordings: Sequence[Trace]) -> tuple[Idle, ...]:
    """The parts with BatchNorms that ran in no pass, and whose tensors none has read."""
    calls = (call for recording in recordings for call in recording.calls)
    read = {slot.module for call in calls for v in call.reads.values() for slot in v.slots}
    ran = {frame.path for recording in recordings for frame in recording.frames if frame.path is not None}
    norms = [path for path, module in twin.named_modules() if path and _is_idle_norm(module)]
    return find_idle(twin, norms, ran | read, *two_or_more(args, kwargs))


def _is_idle_norm(module: nn.Module) -> bool:
    return _calls_itself_batchnorm(module) and not isinstance(module, torch.jit.ScriptModule)


def draw_steps(model: nn.Module, example_inputs: Any, reading: Reading) -> tuple[Step, ...]:
    """What a module that was edited runs outside of the modules that were BatchNorms.

    Raises:
        Exception: whatever it raises.
    """
    args, kwargs = arrange(example_inputs)
    draft = Draft(record_pass(model, args, kwargs, reading.fake), Evaluator())
    reader = _Reader(model, draft, dict(draft.shapes))
    reader._join_biases()
    reader._drop_identities()
    return tuple(reader.steps({place.path for place in reading.norms.values()}))


def _unsteady(twin: nn.Module, args: Any, kwargs: Any, recording: Trace) -> frozenset[str]:
    """The modules whose own code runs otherwise in a second pass, because of what the first one left behind."""
    paths = {id(module): path for path, module in twin.named_modules()}
    given = copied(tensor for _, tensor in leaves((args, kwargs)))
    known: Any = {"fake": recording.fake, "lasting": True, "differentiates": recording.differentiates}
    try:
        with undisturbed(), restored(twin, whole=True), quiet():
            first = _events(capture(twin, args, kwargs, **known), paths)
            for tensor, content in given:
                put_back(tensor, content)
            second = _events(capture(twin, args, kwargs, **known), paths)
    except Exception:  # noqa: BLE001 a pass that can be made once only
        return frozenset(paths.values())
    finally:
        with torch.no_grad():
            for tensor, content in given:
                put_back(tensor, content)
    return frozenset(path for path in first | second if first.get(path) != second.get(path))


def _events(recording: Trace, paths: Mapping[int, str]) -> dict[str, list[Any]]:
    """What the code of each module did itself, in order: what it called, and on what of its own."""
    events: dict[str, list[tuple[float, Any]]] = {}
    makers: dict[int, tuple[str, int, int]] = {}

    def own(path: str, values: Iterable[Value]) -> list[Any]:
        return [name for v in values if (name := makers.get(id(v))) is not None and _inside(name[0], path)]

    for at, call in enumerate(recording.calls):
        if any(value.data for value in call.reads.values()) and call.label not in _UNSEEN:
            path = paths.get(id(call.frame.module), "")
            mine = events.setdefault(path, [])
            mine.append((at, (call.label, own(path, call.reads.values()))))
            makers.update({id(value): (path, len(mine), place) for place, value in enumerate(call.made)})
    for frame in recording.frames:
        if frame.parent is not None and frame.parent.module is not None:
            path, child = paths.get(id(frame.parent.module), ""), paths.get(id(frame.module), "")
            events.setdefault(path, []).append((frame.start - 0.5, (child, own(path, frame.given))))
    return {path: [event for _, event in sorted(mine, key=lambda e: e[0])] for path, mine in events.items()}


_UNSEEN = ("If", "Hook", "Alias", "Outside")


class _Reader:
    """From a draft to a reading."""

    def __init__(
        self,
        model: nn.Module,
        draft: Draft,
        shapes: dict[str, Shape],
        causes: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.draft, self.shapes, self.causes = model, draft, shapes, causes or {}
        self.recording = draft.recording
        self.items = draft.items
        self.modules = dict(model.named_modules())
        self.outputs = [v.name for v in self.recording.outputs.values() if not v.constant and not v.slots]

    def read(self) -> Reading:
        self._join_biases()
        self._find_norms()
        self._name()
        self._guard_changes()
        self._guard_inputs()
        self._drop_identities()
        norms = {item.place.path for item in self.items if isinstance(item.place, NormPlace)}
        steps = tuple(self.steps(norms))
        self._bind_linears()
        self._add_absent()
        self._part_twins()
        nodes = tuple(self._node(item) for item in self.items)
        inputs = tuple(v.name for v in self.recording.inputs.values() if not v.slots)
        graph = Graph(nodes, inputs, tuple(dict.fromkeys(self.outputs)), self.shapes)
        linears = {
            i.name: i.place for i in self.items if isinstance(i.place, LinearPlace) and i.linear is not None
        }
        places = {i.name: i.place for i in self.items if isinstance(i.place, NormPlace)}
        dtypes = frozenset(
            v.dtype for call in self.recording.calls for v in call.made if v.dtype.is_floating_point
        )
        writes = bool(self.recording.changed_slots) or self.recording.branches
        return Reading(
            graph, linears, places, self.recording.fake, steps, self.recording.branches, dtypes, writes
        )

    def steps(self, norms: set[str]) -> Iterator[Step]:
        """What runs outside of these modules, in order."""
        inside = tuple(f"{path}." for path in norms)
        given = {value.name for value in self.recording.inputs.values()}
        origins: dict[str, int | str] = {}
        at = 0
        for item in self.items:
            path = item.call.frame.path or ""
            if item.op in ("If", "Hook"):
                continue
            if path in norms or path.startswith(inside):
                first = item.inputs[0] if item.inputs else ""
                origins.update(
                    dict.fromkeys(item.outputs, origins.get(first, first if first in given else ""))
                )
                continue
            sources = [origins.get(name, name if name in given else "") for name in item.inputs]
            count = sum(value.data for value in item.call.reads.values())
            origins.update(dict.fromkeys(item.outputs, at if count else ""))
            if not count:
                continue
            slot = None if item.weight is None else _choose(item.weight, item.call.frame)
            weight = "" if slot is None else slot.name
            affine = None if item.is_batchnorm else item.affine
            settings = tuple(_settings((item.call.args, item.call.kwargs)))
            known = tuple(source for source in sources if source != "")
            yield Step(item.call.label, count, affine, weight, item.bias is not None, known, settings)
            at += 1

    def _node(self, item: Item) -> Node:
        return Node(
            item.name,
            item.op,
            tuple(item.inputs),
            tuple(item.outputs),
            item.attributes,
            site=item.site,
            linear=item.linear,
            affine=item.affine,
            reason=item.reason,
            partial=item.partial,
        )

    def _readers(self) -> dict[str, list[Item]]:
        readers: dict[str, list[Item]] = {}
        for item in self.items:
            for name in dict.fromkeys(item.inputs):
                readers.setdefault(name, []).append(item)
        return readers

    def _join_biases(self) -> None:
        """Make one operator of a matrix product and the parameter that is added to it."""
        readers = self._readers()
        gone: set[int] = set()
        for item in self.items:
            if item.linear is None or item.bias is not None or item.op not in ("Gemm", "MatMul"):
                continue
            read = readers.get(item.outputs[0], [])
            if len(read) == 1 and item.outputs[0] not in self.outputs and _is_bias(read[0], item):
                item.bias = next(v for v in read[0].call.reads.values() if v.slots)
                item.linear = replace(item.linear, biasless="")
                item.outputs, item.joined = read[0].outputs, read[0].call
                gone.add(id(read[0]))
        self.items[:] = [item for item in self.items if id(item) not in gone]

    # -- BatchNorms

    def _find_norms(self) -> None:
        self.readers = self._readers()
        self.drawn: dict[int, list[Item]] = {}
        self.children: dict[int, list[Frame]] = {}
        self.merged: dict[str, list[Item]] = {}
        self.obstacles: dict[int, str] = {}
        self.foreign = self._foreign_reads()
        for item in self.items:
            self.drawn.setdefault(id(item.call), []).append(item)
        for frame in self.recording.frames:
            self.children.setdefault(id(frame.parent), []).append(frame)
        for frame in self.recording.frames:
            if frame.module is not None and frame.path:
                self.obstacles[id(frame)] = _obstacle(frame) or self._find_norm(frame)
        self._compare_calls()
        for item in self.items:
            if item.is_batchnorm and item.place is None:
                self._leave_functional(item)

    def _within(self, frame: Frame) -> list[Item]:
        calls = self.recording.calls[frame.start : frame.stop]
        items = (item for call in calls for item in self.drawn.get(id(call), ()))
        return [item for item in items if item.op not in ("If", "Hook")]

    def _compare_calls(self) -> None:
        """Keep a BatchNorm that is not the same, tail included, in every call of its module."""
        for path, items in self.merged.items():
            calls = sum(frame.path == path for frame in self.recording.frames)
            tails = {repr(item.place.tail) for item in items if isinstance(item.place, NormPlace)}
            if calls != len(items) or len(tails) > 1:
                for item in items:
                    item.refuse(f"it is called {calls} times and does not do the same each time")

    def _find_norm(self, frame: Frame) -> str:
        """Make one BatchNormalization of what a module call does first, if that is one affine map; else say why not."""
        within = self._within(frame)
        head: list[Item] = []
        value = frame.given[0].name
        for item in within:
            if (
                item.call.frame is not frame
                or item.inputs != [value]
                or len(item.outputs) != 1
                or item.place is not None
            ):
                break
            if item.op not in ("BatchNormalization", "Affine", "Identity", "Dropout", "Cast", "Transpose"):
                break
            head.append(item)
            value = item.outputs[0]
        while head and value != frame.made[0].name and head[-1].op not in ("BatchNormalization", "Affine"):
            value = head.pop().inputs[0]
        if not any(item.op in ("BatchNormalization", "Affine") for item in head) or not self._is_norm(
            frame, head
        ):
            return _more(within)
        tail = self._find_tail(frame, within[len(head) :], value)
        if tail is None or not self._is_private(head) or not _is_straight(head):
            return _more(within)
        self._merge(frame, head, tail)
        return ""

    def _is_norm(self, frame: Frame, head: list[Item]) -> bool:
        if any(item.is_batchnorm for item in head):
            return True
        named = frame.module is not None and _calls_itself_batchnorm(frame.module)
        constants = (value for item in head for value in item.call.reads.values())
        slots = [slot for value in constants for root in slots_of(value).values() for slot in root.slots]
        return any(
            (named or slot.kind != "parameter") and _inside(slot.module, frame.path or "") for slot in slots
        )

    def _is_private(self, head: list[Item]) -> bool:
        """Whether nobody else reads what lies between the parts of an affine map."""
        between = [item.outputs[0] for item in head[:-1]]
        return all(len(self.readers.get(name, ())) == 1 and name not in self.outputs for name in between)

    def _find_tail(
        self, frame: Frame, rest: list[Item], value: str
    ) -> tuple[tuple[str, nn.Module | None], ...] | None:
        """What a module does after its affine map: its own children and plain activations, one after another."""
        assert frame.module is not None
        steps: list[tuple[str, nn.Module | None]] = []
        children = self.children.get(id(frame), [])
        while rest or children:
            inner = self._within(children[0]) if children else []
            if children and (not rest or not inner or inner[0] is rest[0]):
                child, children = children[0], children[1:]
                name = next((n for n, held in frame.module._modules.items() if held is child.module), None)
                chained = child.plain and child.given[0].name == value and rest[: len(inner)] == inner
                if name is None or not chained:
                    return None
                steps.append((name, None))
                value, rest = child.made[0].name, rest[len(inner) :]
                continue
            if not rest:
                return None
            step = _stand_in(rest[0], value)
            if step is None:
                return None
            steps.append((f"step{len(steps)}", step))
            value, rest = rest[0].outputs[0], rest[1:]
        return tuple(steps) if value == frame.made[0].name else None

    def _merge(self, frame: Frame, head: list[Item], tail: tuple[tuple[str, nn.Module | None], ...]) -> None:
        first = next((item for item in head if item.reason), head[0])
        whole = _compose(head)
        one = replace_item(first, head)
        one.affine = None if first.reason else whole
        narrowing = frame.given[0].dtype != (
            head[-1].call.made[0].dtype if head[-1].call.made else frame.given[0].dtype
        )
        one.place = NormPlace(frame.path or "", tail, frame.given[0].dtype)
        one.site = frame.path or ""
        self.merged.setdefault(one.site, []).append(one)
        if narrowing:
            one.refuse(f"it also changes the type of its input, from {frame.given[0].dtype}")
        self._refuse_borrowed(one, frame)
        at = self.items.index(head[0])
        gone = {id(item) for item in head}
        for item in head:
            self.drawn[id(item.call)] = [one] if item is first else []
        self.items[:] = [item for item in self.items[:at] if id(item) not in gone] + [
            one,
            *(item for item in self.items[at:] if id(item) not in gone),
        ]

    def _refuse_borrowed(self, item: Item, frame: Frame) -> None:
        """A module whose tensors are fetched by other code cannot be taken out."""
        if item.affine is not None and (who := self.foreign.get(frame.path or "")):
            item.refuse(f"its numbers are used by {who} as well")
        for (path, attribute), who in self.recording.borrowed.items():
            if path == frame.path and item.affine is not None:
                item.refuse(
                    f"its `{attribute}` is used by the code of `{who or type(self.model).__name__}` as well"
                )

    def _foreign_reads(self) -> dict[str, str]:
        """The modules that hold a tensor which other code reads, however that came by it, and whose code that is."""
        foreign: dict[str, str] = {}
        for call in self.recording.calls:
            running = {frame.path for frame in call.frame.line()}
            who = f"the code of `{call.frame.path or type(self.model).__name__}`"
            for value in call.reads.values() if not call.constant else ():
                for root in _roots(value).values():
                    if not any(slot.module in running for slot in root.slots):
                        foreign.update((slot.module, who) for slot in root.slots)
        returned = (v for name, v in self.recording.outputs.items() if not name.startswith("kept alive"))
        for root in (root for value in returned for root in _roots(value).values()):
            if not any(slot.module == "" for slot in root.slots):
                foreign.update((slot.module, "the output of the model") for slot in root.slots)
        return foreign

    def _leave_functional(self, item: Item) -> None:
        mean = item.statistics.get("running_mean")
        owner = mean.slots[0].module if mean is not None and mean.slots else None
        frame = item.call.frame
        path = frame.path or ""
        item.site = owner or (f"{path}.{item.call.label}" if path else item.call.label)
        if frame.module is not None and frame.path is None:
            item.refuse(_HOMELESS)
        elif frame.module is self.model and owner == "":
            item.site = type(self.model).__name__
            item.refuse("it is the whole model")
        elif item.affine is not None:
            obstacle = self.obstacles.get(id(frame), "") if owner == frame.path else ""
            item.refuse(
                obstacle
                or f"it is called as a function in the code of `{path or type(self.model).__name__}`; "
                "make it an nn.BatchNorm module of its own"
            )

    # -- names

    def _name(self) -> None:
        """Give every node a name that a reader of the report will recognise, each once."""
        alone: dict[str, int] = {}
        for item in self.items:
            path = item.call.frame.path or ""
            alone[path] = alone.get(path, 0) + 1
        taken: set[str] = set()
        for item in self.items:
            name = item.site or self._natural_name(item, alone)
            unique, count = name, 1
            while unique in taken:
                count += 1
                unique = f"{name} (call {count})"
            taken.add(unique)
            item.name = unique

    def _natural_name(self, item: Item, alone: Mapping[str, int]) -> str:
        path = item.call.frame.path or ""
        if item.op == "Hook":
            return f"a hook on {path}"
        if item.op == "If":
            parallel = f", where {self.causes[path]} did not run" if path in self.causes else ""
            return f"a branch in {path or type(self.model).__name__}{parallel}"
        if item.weight is not None and any(slot.module == path for slot in item.weight.slots):
            return path or item.call.label
        if path and alone[path] == 1:
            return path
        return f"{path}.{item.call.label}" if path else item.call.label

    # -- changes in place

    def _guard_changes(self) -> None:
        """Let no BatchNorm go whose output is changed in place while its input is read by somebody else.

        Without it, what is changed would be its input. Going up, only readers that all want the same could agree to it;
        going down, the operator that changes it would have to let it pass.
        """
        readers = self._readers()
        producers = {name: item for item in self.items for name in item.outputs}
        for item in self.items:
            if item.call.written:
                for name in _changed(item):
                    if self._guard(item, name, readers, producers):
                        item.become_opaque(f"{item.op}, in place")
                        break

    def _guard(
        self, item: Item, name: str, readers: dict[str, list[Item]], producers: dict[str, Item]
    ) -> bool:
        """Whether something else reads the memory that an item would change, if BatchNorms above it were gone."""
        passed: list[Item] = []
        while (producer := producers.get(name)) is not None and _shares(producer) and producer.inputs:
            name = producer.inputs[0]
            passed += [producer] if producer.is_batchnorm else []
            others = readers.get(name, ())
            if len(others) > 1 or name in self.outputs:
                if _agree(others):
                    for norm in passed:
                        norm.refuse(
                            f"`{item.name}` changes its output in place, and without it would change its input"
                        )
                return bool(passed)
        return producer is None and bool(passed)

    def _guard_inputs(self) -> None:
        """Let no BatchNorm go whose input is changed in place while its output is still read.

        Without it, both would be one memory.
        """
        calls = self.recording.calls
        changes = [(at, call) for at, call in enumerate(calls) if call.written]
        norms = (
            [item for item in self.items if item.is_batchnorm and item.affine is not None] if changes else []
        )
        values = {v.name: v for call in calls for v in (*call.reads.values(), *call.made)}
        places = {id(call): at for at, call in enumerate(calls)}
        lasting = {value.memory for value in self.recording.outputs.values()}
        for item in norms:
            above, below = values[item.inputs[0]].memory, {values[item.outputs[0]].memory}
            if above in below:
                continue
            for later in norms:
                if values[later.inputs[0]].memory in below:
                    below.add(values[later.outputs[0]].memory)
            for at, call in changes:
                mine = at > places[id(item.call)] and any(value.memory == above for value in call.written)
                reads = (value for other in calls[at:] for value in other.reads.values())
                if mine and (below & lasting or any(value.memory in below for value in reads)):
                    item.refuse(
                        f"`{call.label}` changes its input in place, and without it would change its output"
                    )

    def _drop_identities(self) -> None:
        """Let who reads a copy of a value read the value."""
        alias: dict[str, str] = {}
        kept = []
        for item in self.items:
            item.inputs = [alias.get(name, name) for name in item.inputs]
            if item.op in ("Identity", "Dropout") and len(item.outputs) == 1:
                alias[item.outputs[0]] = item.inputs[0]
            else:
                kept.append(item)
        self.items = kept
        self.outputs = [alias.get(name, name) for name in self.outputs]

    # -- linear operators

    def _bind_linears(self) -> None:
        linears = [item for item in self.items if item.linear is not None]
        for item in linears:
            self._bind(item)
        used = self._other_reads()
        for item in linears:
            self._check_reads(item, used)
        self._check_sharing([item for item in linears if item.linear is not None])

    def _bind(self, item: Item) -> None:
        """Find where a linear operator keeps its numbers."""
        assert item.weight is not None
        assert item.linear is not None
        frame = item.call.frame
        if frame.module is not None and frame.path is None:
            return item.refuse(_HOMELESS)
        origin, transposed = _origin(item.weight)
        computed = ""
        if not origin.slots:
            computed = self._how_computed(item, origin)
            if not computed:
                return item.refuse("its weight is computed while the model runs")
        if not item.weight.constant and not computed:
            return item.refuse("its weight changes while the model runs")
        if not _is_plain(origin):
            return item.refuse("its weight is no ordinary tensor of numbers")
        slot = Slot(frame.path or "", "weight", "parameter") if computed else _choose(origin, frame)
        if slot is None:
            names = " and ".join(f"`{s.name}`" for s in origin.slots[:3])
            return item.refuse(
                f"its weight is held by {names} at once, and its code does not tell which is meant"
            )
        bias = self._bind_bias(item, slot)
        if isinstance(bias, str):
            if item.bias is not None:
                return item.refuse(bias)
            item.linear, bias = replace(item.linear, biasless=bias), None
        elif item.op != "Embedding":
            item.linear = replace(item.linear, biasless="")
        item.place = LinearPlace(slot, transposed, bias, computed)
        item.site = slot.module if slot.attribute == "weight" and slot.module else slot.name
        return None

    def _how_computed(self, item: Item, origin: Value) -> str:
        """Whether torch's parametrizations or hooks compute the weight of the module that runs, and from it alone."""
        module, path = item.call.frame.module, item.call.frame.path
        if module is None or not path or origin.data:
            return ""
        if any(not _inside(slot.module, path) for root in _roots(origin).values() for slot in root.slots):
            return ""
        if nn.utils.parametrize.is_parametrized(module, "weight"):
            made = origin.frame.path if origin.frame is not None else None
            return "parametrization" if made and made.startswith(f"{path}.parametrizations.weight") else ""
        hooks = [h for h in module._forward_pre_hooks.values() if computes_weight(h)]
        names = {getattr(h, "name", getattr(h, "_tensor_name", "")) for h in hooks}
        return "hook" if len(hooks) == 1 and names == {"weight"} and origin.constant else ""

    def _bind_bias(self, item: Item, weight: Slot) -> Slot | str | None:
        """The slot of the bias, or why there is none."""
        frame = item.call.frame
        if item.op == "Embedding":
            return None
        if item.bias is not None:
            if not item.bias.constant or not item.bias.slots:
                return "its bias is computed while the model runs"
            return _choose(item.bias, frame) or "its bias is held by several modules at once"
        assert item.linear is not None
        module = frame.module
        if (
            module is not None
            and weight.name == f"{frame.path}.weight"
            and getattr(module, "bias", 0) is None
        ):
            return Slot(weight.module, "bias", "parameter")
        nobody = f"the code of `{frame.path or type(self.model).__name__}` gives it no bias"
        return item.linear.biasless or nobody

    def _other_reads(self) -> dict[int, str]:
        """Parameters that are read otherwise than as the weight or bias of a linear operator, and by whom."""
        reads: dict[int, str] = {}
        computed = [
            i.place.weight for i in self.items if isinstance(i.place, LinearPlace) and i.place.computed
        ]
        inside = tuple(f"{slot.module}.parametrizations.weight" for slot in computed)
        for item in self.items:
            if inside and (item.call.frame.path or "").startswith(inside):
                continue
            own = (
                {id(item.weight), id(item.bias)}
                if item.place is not None and item.linear is not None
                else set()
            )
            calls = [item.call] if item.joined is None else [item.call, item.joined]
            for value in (value for call in calls for value in call.reads.values()):
                if id(value) not in own:
                    reads.update(dict.fromkeys(_roots(value), item.name))
        for value in self.recording.outputs.values():
            reads.update(dict.fromkeys(_roots(value), "the output of the model"))
        return reads

    def _check_reads(self, item: Item, used: Mapping[int, str]) -> None:
        if item.linear is None or item.weight is None:
            return
        for what, value in (("weight", item.weight), ("bias", item.bias)):
            for root in _roots(value) if value is not None else ():
                if root in used or self._changes(root):
                    how = (
                        f"is read by `{used[root]}` as well"
                        if root in used
                        else "changes while the model runs"
                    )
                    item.refuse(f"its {what} {how}")
                    return

    def _changes(self, root: int) -> bool:
        return any(
            id(v) == root and id(v.tensor) in self.recording.changed_slots
            for v in self.recording.slots.values()
        )

    def _check_sharing(self, linears: list[Item]) -> None:
        """Refuse operators that store one parameter in different ways."""
        uses: dict[str, list[Item]] = {}
        for item in linears:
            assert isinstance(item.place, LinearPlace)
            for slot in (item.place.weight, item.place.bias):
                if slot is not None:
                    uses.setdefault(slot.name, []).append(item)
        clashes = [(name, items) for name, items in uses.items() if len({_kind(item) for item in items}) > 1]
        for name, items in clashes:
            for item in items:
                other = next(other for other in items if other is not item)
                item.refuse(f"`{name}` is used in another way by `{other.name}`")

    # -- the rest

    def _add_absent(self) -> None:
        """A verdict for every module that calls itself a BatchNorm and was not met as one."""
        met = {item.site for item in self.items if item.is_batchnorm}
        ran = {frame.path for frame in self.recording.frames}
        taken = {item.name for item in self.items}
        used = self._used_modules()
        for path, module in self.modules.items():
            if (path or type(module).__name__) in met or not _calls_itself_batchnorm(module):
                continue
            if any(one.startswith(f"{path}.") for one in met):
                continue
            inside = next(
                (p for p in _parents(path) if isinstance(self.modules[p], torch.jit.ScriptModule)), None
            )
            if inside is not None or isinstance(module, torch.jit.ScriptModule):
                reason = f"it is compiled into the ScriptModule `{inside or path}`; fold before scripting"
            elif path not in ran:
                who = used.get(path)
                reason = f"it is not called; the code of `{who}` uses its numbers" if who else _IDLE
            elif module.training:
                reason = "it is in training mode and would normalise by the batch; call model.eval() first"
            else:
                reason = "what it computes is not one affine map per channel"
            absent = _absent(path, reason)
            absent.name += " (not met)" if path in taken else ""
            self.items.append(absent)

    def _used_modules(self) -> dict[str, str]:
        """The modules that hold a tensor which is read, with the path of the module in whose code that is."""
        return {
            slot.module: call.frame.path or type(self.model).__name__
            for call in self.recording.calls
            for value in call.reads.values()
            for slot in value.slots
        }

    def _part_twins(self) -> None:
        """Let no operator read one value twice: a copy stands between."""
        count = 0
        parted: list[Item] = []
        for item in self.items:
            if len(set(item.inputs)) < len(item.inputs):
                seen: set[str] = set()
                for place, name in enumerate(item.inputs):
                    if name in seen:
                        count += 1
                        again = f"{name} again {count}"
                        self.shapes[again] = self.shapes.get(name, ())
                        if name not in self.shapes:
                            del self.shapes[again]
                        parted.append(
                            Item("Identity", [name], [again], item.call, name=f"{item.name} again {count}")
                        )
                        item.inputs[place] = again
                    seen.add(name)
            parted.append(item)
        self.items = parted


_SHARING = frozenset(
    """BatchNormalization Identity Dropout Reshape Squeeze Unsqueeze Flatten
    Transpose Slice Split Gather Expand Cast Alias""".split()  # noqa: SIM905
)
"""Operators whose output may lie in the memory of their input, or will, once they are gone."""

_COPYING = frozenset(("add", "sub", "rsub", "mul", "div", "clone"))
"""What makes a tensor of its own even where it changes nothing, as in `0 + x`."""


def _shares(item: Item) -> bool:
    """Whether the output of an item may lie in the memory of its input."""
    known = {value.memory for value in (*item.call.reads.values(), *(old for old, _ in item.call.changed))}
    copies = item.op == "Identity" and item.call.label in _COPYING and not item.call.changed
    return item.op in _SHARING and not (copies and item.call.made[0].memory not in known)


def _changed(item: Item) -> list[str]:
    """The values of an item whose memory it changes: those that it names, or any of them."""
    call = item.call
    return [old.name for old, _ in call.changed] if len(call.changed) >= len(call.written) else item.inputs


def _agree(readers: Sequence[Item]) -> bool:
    """Whether all readers of a value are BatchNorms that compute the same."""
    affines = [reader.affine for reader in readers if reader.is_batchnorm]
    first = affines[0] if affines else None
    return len(affines) == len(readers) and all(
        first is not None and affine is not None and affine.equals(first) for affine in affines
    )


_IDLE = "it did not run on the example inputs"
_HOMELESS = "its module is not held by the model; make it an attribute, or keep it in an nn.ModuleList"


def _obstacle(frame: Frame) -> str:
    """Why a module call cannot be a BatchNorm that could go, whatever it computes."""
    if type(frame.module).__call__ is not nn.Module.__call__:
        return "its class has a `__call__` of its own"
    if not frame.plain:
        return "it is called with more than one argument, or returns more than one tensor"
    return "its code does not always do the same" if frame.branches else ""


def _more(within: Sequence[Item]) -> str:
    """What the code of a module does besides normalising."""
    labels = dict.fromkeys(item.call.label for item in within if not item.is_batchnorm)
    names = ", ".join(f"`{label}`" for label in list(labels)[:3])
    return f"its own code does more than normalise and activate: {names or 'it keeps what it computes'}"


def _is_bias(item: Item, linear: Item) -> bool:
    """Whether an item adds a stored vector to the product of a matrix."""
    assert linear.linear is not None
    values = [v for v in item.call.reads.values() if v.slots]
    added = item.op in ("Affine", "Identity") and item.call.label == "add"
    if not added or len(values) != 1 or len(item.call.args) != 2 or item.call.kwargs:
        return False
    bias, outputs = values[0], linear.linear.outputs
    last = linear.linear.out_axis == linear.call.made[0].rank - 1
    whole = bias.tensor is not None and bias.tensor.numel() == outputs
    return bias.constant and last and whole and bias.shape[-1:] == (outputs,)


def _turns(head: Sequence[Item]) -> Iterator[tuple[Item, list[int]]]:
    """The parts of an affine map, each with the axes of its input as axes of the whole map's."""
    axes: list[int] = []
    for item in head:
        rank = (
            len(item.attributes["perm"]) if item.op == "Transpose" else item.affine.rank if item.affine else 0
        )
        axes = axes or list(range(rank))
        yield item, axes
        if item.op == "Transpose":
            axes = [axes[axis] for axis in item.attributes["perm"]]
    yield head[-1], axes


def _is_straight(head: Sequence[Item]) -> bool:
    """Whether the axes come out of an affine map in the order in which they went in."""
    *_, (_, axes) = _turns(head)
    return axes == sorted(axes)


def _compose(head: Sequence[Item]) -> Affine | None:
    """One affine map of several parts, with the axes of the first one's input."""
    whole: Affine | None = None
    for item, axes in list(_turns(head))[:-1]:
        if item.affine is not None:
            order = np.argsort(axes)
            here = Affine(item.affine.scale.transpose(order), item.affine.shift.transpose(order))
            whole = here if whole is None else here.after(whole)
    return whole


def _settings(thing: Any) -> Iterator[Any]:
    """The numbers and words in nested arguments."""
    if isinstance(thing, dict):
        thing = [part for _, part in sorted(thing.items())]
    if isinstance(thing, list | tuple):
        for part in thing:
            yield from _settings(part)
    elif isinstance(thing, bool | int | float | str):
        yield thing


def replace_item(first: Item, head: list[Item]) -> Item:
    """One BatchNormalization in the place of the parts of an affine map."""
    one = Item("BatchNormalization", list(head[0].inputs), list(head[-1].outputs), first.call)
    one.reason = first.reason
    one.statistics = first.statistics
    return one


def _absent(path: str, reason: str) -> Item:
    call = Call(-1, "batch_norm", (), {}, Frame(None, path, None))
    item = Item("BatchNormalization", [f"input of {path}"], [f"output of {path}"], call, name=path, site=path)
    item.refuse(reason)
    return item


def _calls_itself_batchnorm(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return "batchnorm" in str(getattr(module, "original_name", "")).lower()
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "batchnorm" in type(module).__name__.lower()


def _parents(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _inside(path: str, outer: str) -> bool:
    return path == outer or not outer or path.startswith(f"{outer}.")


def _roots(value: Value) -> dict[int, Value]:
    """The slots behind a value that does not depend on the inputs, constant or not."""
    if value.slots:
        return {id(value): value}
    if value.constant:
        return slots_of(value)
    if value.data or value.call is None:
        return {}
    found: dict[int, Value] = {}
    for part in value.call.reads.values():
        found.update(_roots(part))
    return found


_SWAPS = ("transpose", "permute")
_PLAIN_STEPS = ("detach", "alias", "contiguous", "clone", "_to_copy")


def _origin(weight: Value) -> tuple[Value, bool]:
    """The slot that a weight is, through casts and transposes; and whether it was transposed."""
    transposed = False
    value = weight
    while not value.slots and value.constant and value.call is not None and len(value.call.reads) == 1:
        label, args = value.call.label, value.call.args
        if value.rank == 2 and (label == "t" or (label in _SWAPS and _is_turn(args[1:]))):
            transposed = not transposed
        elif label not in _PLAIN_STEPS:
            break
        value = next(iter(value.call.reads.values()))
    return (value, transposed) if value.slots else (weight, False)


def _is_plain(weight: Value) -> bool:
    """Whether a weight is stored as numbers in memory, not sparse, quantised, or of a class with ways of its own."""
    tensor = weight.tensor
    if tensor is None:
        return True
    ordinary = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return ordinary and tensor.layout == torch.strided and tensor.is_floating_point()


def _is_turn(dims: Any) -> bool:
    flat = [d % 2 for d in (dims[0] if len(dims) == 1 else dims)]
    return flat in ([1, 0], [0, 1]) if len(dims) == 2 else flat == [1, 0]


def _choose(value: Value, frame: Frame) -> Slot | None:
    """The slot of a parameter that the code of a frame means; None where that cannot be told."""
    own = [slot for slot in value.slots if slot.module == frame.path]
    if len(own) == 1:
        return own[0]
    return value.slots[0] if len(value.slots) == 1 else None


def _kind(item: Item) -> Any:
    assert item.linear is not None
    assert isinstance(item.place, LinearPlace)
    linear = item.linear
    bias = item.place.bias.name if item.place.bias is not None else ""
    form = (
        linear.order,
        linear.groups,
        linear.inputs,
        linear.outputs,
        item.op == "Embedding",
        item.op == "Conv",
    )
    return (item.place.weight.name, bias, item.place.transposed, item.bias is None, *form)


def _stand_in(item: Item, value: str) -> nn.Module | None:
    """A module that computes what a call does after an affine map, where that is a plain activation."""
    make = TAILS.get(item.call.label)
    if make is None or item.inputs != [value] or len(item.outputs) != 1 or len(item.call.reads) != 1:
        return None
    try:
        return make(*item.call.args[1:], **{k: v for k, v in item.call.kwargs.items() if k != "inplace"})
    except TypeError:
        return None


# ---------------------------------------------------------------- models without numbers yet


def _find_uninitialised(model: nn.Module) -> str:
    """The path of a lazy module that has not run yet."""
    for path, module in model.named_modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(nn.parameter.is_lazy(tensor) for tensor in tensors if tensor is not None):
            return path or type(module).__name__
    return ""


def _read_uninitialised(model: nn.Module, lazy: str) -> Reading:
    """A graph of verdicts alone."""
    reader_items = []
    for path, module in model.named_modules():
        if _calls_itself_batchnorm(module):
            reader_items.append(
                _absent(path, f"`{lazy}` has no numbers yet; run the model once before folding")
            )
    if not reader_items:
        raise UnreadableModel(f"`{lazy}` has no numbers yet; run the model once before folding")
    nodes = tuple(
        Node(i.name, i.op, tuple(i.inputs), tuple(i.outputs), site=i.site, reason=i.reason)
        for i in reader_items
    )
    return Reading(Graph(nodes, (), (), {}), {}, {}, True)
