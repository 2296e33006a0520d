"""Read a module: draw what one forward pass computes as a `Graph`, with a note of where each number is stored.

    capture the calls -> lower each to nodes -> settle other inputs -> the passes of `_draw` -> Graph

**Other inputs.** The pass is captured again with another batch size, at other sizes, with the other value of each flag
(`trials`). A size that differs becomes a symbol, a setting that differs makes its node opaque, a value that another
pass uses in another way has one more reader (`sizes`): nothing is decided that holds for the example alone. A
BatchNorm that did not run tells of code that no pass has seen (`idle`).

**Passes.** Each takes the nodes and decides one thing about them, in a file of its own: which are BatchNorms (`norms`),
what they are called (`naming`), which must stay for what is changed in place (`aliasing`), what runs beside them
(`steps`), where linear operators keep their numbers (`storage`). A pass that takes nodes away or adds some returns a
new list (`simplify`, `norms`); the others write what they decide into the nodes. The order is that of `_draw`, which
says what each needs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from bnfold import reasons
from bnfold.errors import UnreadableModel
from bnfold.ir import Graph, Shape
from bnfold.torch.aliasing import guard_changes, guard_inputs
from bnfold.torch.alignment import Alignment
from bnfold.torch.calls import ModuleCalls
from bnfold.torch.constants import Evaluator
from bnfold.torch.determinism import find_nondeterministic
from bnfold.torch.draft import Draft, DraftNode, LinearPlace, NormPlace
from bnfold.torch.formulas import FormulaPlace
from bnfold.torch.idle import Idle, find_idle
from bnfold.torch.naming import name_items
from bnfold.torch.norms import absent, add_absent, calls_itself_batchnorm, find_norms
from bnfold.torch.passes import record_pass, record_somehow
from bnfold.torch.sandbox import Snapshot, arrange, copy_structure
from bnfold.torch.simplify import drop_identities, join_biases, part_twins
from bnfold.torch.sizes import is_of_torch, settle
from bnfold.torch.steps import TraceStep, steps_of
from bnfold.torch.storage import bind_linears
from bnfold.torch.trace import Call, Trace
from bnfold.torch.trials import Trial, Trials, run_trials, two_or_more

__all__ = ["Reading", "draw_steps", "read"]


@dataclass(frozen=True)
class Reading:
    """A graph and the places of its numbers, by node name; valid for every copy of the module.

    Attributes:
        fake: whether it was read without arithmetic.
        steps: what runs outside of the BatchNorms, for comparison with what runs after a fold.
        data_dependent: whether numbers that depend on the inputs left the tensors.
        writes: whether it changed tensors that the module holds, or might have on other inputs.
        dtypes: the float dtypes that it computes in.
        notes: what other inputs it could not be read with.
        heads: parts that did not run and could read what the folds change; see `read`.
        calls: the module calls, as places for merged operators.
        formulas: the lines of BatchNorms that are written out, by node name.
        rounded: new numbers that were computed for one copy, for the next one (see `write`).
        tried: what the other passes were given.
        asked: whether something depended on numbers that depend on the inputs (see `Trace`).
    """

    graph: Graph
    linears: Mapping[str, LinearPlace]
    norms: Mapping[str, NormPlace]
    fake: bool
    steps: tuple[TraceStep, ...] = ()
    data_dependent: bool = False
    dtypes: frozenset[torch.dtype] = frozenset()
    writes: bool = True
    notes: tuple[str, ...] = ()
    heads: tuple[Idle, ...] = ()
    calls: ModuleCalls | None = None
    formulas: Mapping[str, FormulaPlace] = field(default_factory=dict)
    rounded: dict[Any, Any] = field(default_factory=dict)
    tried: tuple[Any, ...] = ()
    asked: bool = True


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
    snapshot = Snapshot(twin)
    recording = record_somehow(twin, args, kwargs, touched, snapshot, numbers=twin is model)
    if (touched or recording.changed_slots) and (
        paths := find_nondeterministic(twin, args, kwargs, recording)
    ):
        numbers = recording.asked
        recording = record_pass(twin, args, kwargs, recording.fake, paths, numbers=numbers, snapshot=snapshot)
    trials = _try_otherwise(twin, args, kwargs, recording, snapshot)
    idle = _find_idle(twin, args, kwargs, (recording, *(trial.recording for trial in trials.made)))
    causes = {each.holder: each.path for each in idle if not (headless and each.head)}
    if causes:
        known, numbers = recording.nondeterministic | causes.keys(), recording.asked
        recording = record_pass(twin, args, kwargs, recording.fake, known, numbers=numbers, snapshot=snapshot)
    draft = Draft(recording, Evaluator())
    draft.items += _at_the_doors(recording)
    aligned = [(trial, trial.alignment) for trial in trials.made]
    if causes:
        aligned = [(trial, Alignment.of(recording, trial.recording)) for trial in trials.made]
    shapes = settle(draft, aligned, model)
    reading = _draw(twin, recording, draft.items, shapes, causes, _otherwise(aligned))
    graph = replace(reading.graph, sizes=draft.shapes)
    heads = tuple(each for each in idle if each.head)
    notes, tried = tuple(dict.fromkeys(trials.notes)), tuple(trial.given for trial in trials.made)
    return replace(reading, graph=graph, notes=notes, heads=heads, tried=tried)


def _draw(
    model: nn.Module,
    trace: Trace,
    items: Sequence[DraftNode],
    shapes: dict[str, Shape],
    causes: Mapping[str, str],
    otherwise: Mapping[str, str],
) -> Reading:
    """Let one pass after another decide about the nodes.

    BatchNorms and changes in place are looked at before copies of values are dropped: a copy can be part of a
    BatchNorm, and can have memory of its own. Names come before the first reason that says one. Operators are bound
    late, since who else reads a parameter is told by the nodes that are left.
    """
    outputs = _outputs(trace)
    items = join_biases(items, outputs)
    items = find_norms(model, trace, items, outputs)
    name_items(model, items, causes)
    guard_changes(items, outputs)
    guard_inputs(trace, items)
    items, alias = drop_identities(items)
    outputs = [alias.get(name, name) for name in outputs]
    norms = {item.place.path for item in items if isinstance(item.place, NormPlace)}
    formulas = {item.name: item.place for item in items if isinstance(item.place, FormulaPlace)}
    names = frozenset(slot.name for place in formulas.values() for slot in place.slots.values())
    calls = ModuleCalls(trace, items, alias, norms, otherwise, names)
    bind_linears(model, trace, items, calls)
    calls.hosts = frozenset(_hosts(i.place for i in items if i.linear is not None))
    steps = tuple(steps_of(trace, items, norms | calls.hosts, names))
    items = add_absent(model, trace, items)
    items = part_twins(items, shapes)
    inputs = tuple(v.name for v in trace.inputs.values() if not v.slots)
    nodes = tuple(item.node() for item in items)
    returned = {value.name for name, value in trace.outputs.items() if not name.startswith("kept alive")}
    held_in = {
        alias.get(name, name): holder for name, holder in trace.holders.items() if name not in returned
    }
    graph = Graph(nodes, inputs, tuple(dict.fromkeys(outputs)), shapes, held_in=held_in)
    return replace(_reading(trace, graph, items, steps), calls=calls, formulas=formulas)


def _hosts(places: Iterable[Any]) -> Iterator[str]:
    """The modules that become operators whose weights their code computes."""
    coded = (place.code for place in places if isinstance(place, LinearPlace) and place.code is not None)
    return (host.path for _, _, host in coded)


def _reading(trace: Trace, graph: Graph, items: Sequence[DraftNode], steps: tuple[TraceStep, ...]) -> Reading:
    linears = {i.name: i.place for i in items if isinstance(i.place, LinearPlace) and i.linear is not None}
    norms = {i.name: i.place for i in items if isinstance(i.place, NormPlace)}
    dtypes = frozenset(v.dtype for call in trace.calls for v in call.made if v.dtype.is_floating_point)
    writes = bool(trace.changed_slots) or trace.data_dependent
    return Reading(
        graph, linears, norms, trace.fake, steps, trace.data_dependent, dtypes, writes, asked=trace.asked
    )


def _outputs(trace: Trace) -> list[str]:
    return [v.name for v in trace.outputs.values() if not v.constant and not v.slots]


def draw_steps(
    model: nn.Module, example_inputs: Any, reading: Reading, replaced: Collection[str] = ()
) -> tuple[TraceStep, ...]:
    """What a module that was edited runs outside of the modules that were BatchNorms, and of other replaced ones.

    Raises:
        Exception: whatever it raises.
    """
    args, kwargs = arrange(example_inputs)
    trace = record_pass(model, args, kwargs, reading.fake, numbers=reading.asked)
    outputs = _outputs(trace)
    items = join_biases(Draft(trace, Evaluator()).items, outputs)
    items, _ = drop_identities(items)
    norms = {*(place.path for place in reading.norms.values()), *_hosts(reading.linears.values())}
    slots = (slot for place in reading.formulas.values() for slot in place.slots.values())
    return tuple(steps_of(trace, items, norms.union(replaced), {slot.name for slot in slots}))


def _otherwise(aligned: Iterable[tuple[Trial, Alignment]]) -> dict[str, str]:
    """The modules that do something else in another pass, with what that was given."""
    return {
        path: trial.words
        for trial, alignment in aligned
        for path, module in alignment.otherwise.items()
        if trial.ranked or not is_of_torch(module)
    }


def _at_the_doors(recording: Trace) -> Iterator[DraftNode]:
    """Readers of what modules whose code may run otherwise are given and return: it may go another way."""
    for frame in recording.frames:
        if frame.path in recording.nondeterministic:
            for value in (*frame.given, *frame.made):
                if not value.slots and not value.constant:
                    yield DraftNode("If", [value.name], [], Call(-1, "If", (), {}, frame))


def _try_otherwise(twin: nn.Module, args: Any, kwargs: Any, recording: Trace, snapshot: Snapshot) -> Trials:
    """The passes on other inputs that could be made."""

    def run(args: Any, kwargs: Any, seed: int) -> Trace:
        known, numbers = recording.nondeterministic, recording.asked
        return record_pass(twin, args, kwargs, recording.fake, known, None, seed, numbers, snapshot)

    return run_trials(twin, args, kwargs, run, recording)


def _find_idle(twin: nn.Module, args: Any, kwargs: Any, recordings: Sequence[Trace]) -> tuple[Idle, ...]:
    """The parts with BatchNorms that ran in no pass, and whose tensors none has read."""
    calls = (call for recording in recordings for call in recording.calls)
    read = {slot.module for call in calls for v in call.reads.values() for slot in v.slots}
    ran = {frame.path for recording in recordings for frame in recording.frames if frame.path is not None}
    norms = [path for path, module in twin.named_modules() if path and _is_idle_norm(module)]
    return find_idle(twin, norms, ran | read, *two_or_more(args, kwargs))


def _is_idle_norm(module: nn.Module) -> bool:
    return calls_itself_batchnorm(module) and not isinstance(module, torch.jit.ScriptModule)


def _find_uninitialised(model: nn.Module) -> str:
    """The path of a lazy module that has not run yet."""
    for path, module in model.named_modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(nn.parameter.is_lazy(tensor) for tensor in tensors if tensor is not None):
            return path or type(module).__name__
    return ""


def _read_uninitialised(model: nn.Module, lazy: str) -> Reading:
    """A graph of verdicts alone."""
    reason = reasons.NO_NUMBERS_YET(lazy=lazy)
    nodes = tuple(
        absent(path, reason).node()
        for path, module in model.named_modules()
        if calls_itself_batchnorm(module)
    )
    if not nodes:
        raise UnreadableModel(reason)
    return Reading(Graph(nodes, (), (), {}), {}, {}, True)
