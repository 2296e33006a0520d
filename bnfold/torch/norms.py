"""Find the BatchNorms by what runs, not by class.

A module call whose whole work is one affine map of its input is a BatchNorm if its numbers come from its buffers:
`nn.BatchNorm*`, frozen and hand-written ones alike. One that goes on with an activation is a BatchNorm with a tail,
which stays. The formula written out in the middle of other code is one, too, and goes by its numbers (`formulas`).
`F.batch_norm` there is owed a verdict, but cannot be taken out of it; so is every formula whose numbers cannot change,
and every module that calls itself a BatchNorm and was not met as one (`add_absent`).

A BatchNorm whose tensors other code reads as well is found, and refused: without it, that code would not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from bnfold import reasons
from bnfold.algebra import Affine
from bnfold.torch.compiled import compiled_norms, holder_of
from bnfold.torch.constants import slots_of
from bnfold.torch.draft import DraftNode, NormPlace, readers_of
from bnfold.torch.formulas import FormulaPlace, chains_of, place_of
from bnfold.torch.storage import roots_of
from bnfold.torch.tails import Tail, find_tail, obstacle
from bnfold.torch.tensors import inside
from bnfold.torch.trace import Call, Frame, Trace, Value

__all__ = ["absent", "add_absent", "calls_itself_batchnorm", "find_norms"]


def find_norms(
    model: nn.Module, trace: Trace, items: Sequence[DraftNode], outputs: Sequence[str]
) -> list[DraftNode]:
    """The nodes with one BatchNormalization for each BatchNorm, which has its place or the reason why it stays."""
    return _Finder(model, trace, items, outputs).find()


class _Finder:
    """Looks at one module call after another, inner ones first."""

    def __init__(
        self, model: nn.Module, trace: Trace, items: Sequence[DraftNode], outputs: Sequence[str]
    ) -> None:
        self.model, self.trace, self.items, self.outputs = model, trace, list(items), outputs
        self.readers = readers_of(items)
        self.drawn: dict[int, list[DraftNode]] = {}
        self.children: dict[int, list[Frame]] = {}
        self.merged: dict[str, list[DraftNode]] = {}
        self.obstacles: dict[int, str] = {}
        self.foreign = _foreign_reads(model, trace)
        for item in items:
            self.drawn.setdefault(id(item.call), []).append(item)
        for frame in trace.frames:
            self.children.setdefault(id(frame.parent), []).append(frame)

    def find(self) -> list[DraftNode]:
        """Make one BatchNormalization of each BatchNorm."""
        for frame in self.trace.frames:
            if frame.module is not None and frame.path:
                self.obstacles[id(frame)] = obstacle(frame) or self._find_norm(frame)
        self._compare_calls()
        for item in self.items:
            if item.is_batchnorm and item.place is None:
                self._leave_functional(item)
        self._find_formulas()
        return self.items

    def _find_formulas(self) -> None:
        """Make one BatchNormalization of each formula written out in other code, where its numbers can change."""
        for lines in list(chains_of(self.items, readers_of(self.items), self.outputs)):
            name = _statistic(lines)
            place = place_of(self.model, self.trace, self.items, lines) if name else ""
            if isinstance(place, FormulaPlace):
                one = _replace(lines[0], list(lines))
                one.affine, one.place, one.site = _compose(lines), place, self._owner(place) or name
                self._put(one, lines)

    def _owner(self, place: FormulaPlace) -> str:
        """The BatchNorm that holds all numbers of a formula, without being called."""
        owners = {slot.module for slot in place.slots.values()}
        owner = next(iter(owners)) if len(owners) == 1 else ""
        return owner if owner and calls_itself_batchnorm(self.model.get_submodule(owner)) else ""

    def _put(self, one: DraftNode, head: Sequence[DraftNode]) -> None:
        """Let one node stand where the parts of an affine map did."""
        at = self.items.index(head[0])
        gone = {id(item) for item in head}
        rest = (item for item in self.items[at:] if id(item) not in gone)
        self.items = [*self.items[:at], one, *rest]

    def _within(self, frame: Frame) -> list[DraftNode]:
        calls = self.trace.calls[frame.start : frame.stop]
        items = (item for call in calls for item in self.drawn.get(id(call), ()))
        return [item for item in items if item.op not in ("If", "Hook")]

    def _compare_calls(self) -> None:
        """Keep a BatchNorm that is not the same, tail included, in every call of its module."""
        for path, items in self.merged.items():
            calls = sum(frame.path == path for frame in self.trace.frames)
            tails = {repr(item.place.tail) for item in items if isinstance(item.place, NormPlace)}
            if calls != len(items) or len(tails) > 1:
                for item in items:
                    item.refuse(reasons.CALLED_DIFFERENTLY(calls=calls))

    def _find_norm(self, frame: Frame) -> str:
        """Make one BatchNormalization of what a module call does first, if that is one affine map; else say why not."""
        within = self._within(frame)
        head: list[DraftNode] = []
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
        if not any(item.op in ("BatchNormalization", "Affine") for item in head) or not _is_norm(frame, head):
            return _more(within, frame)
        children = self.children.get(id(frame), [])
        tail = find_tail(frame, within[len(head) :], value, children, self._within)
        if tail is None or not self._is_private(head) or not _is_straight(head):
            return _more(within, frame)
        self._merge(frame, head, tail)
        return ""

    def _is_private(self, head: list[DraftNode]) -> bool:
        """Whether nobody else reads what lies between the parts of an affine map."""
        between = [item.outputs[0] for item in head[:-1]]
        return all(len(self.readers.get(name, ())) == 1 and name not in self.outputs for name in between)

    def _merge(self, frame: Frame, head: list[DraftNode], tail: Tail) -> None:
        first = next((item for item in head if item.reason), head[0])
        whole = _compose(head)
        one = _replace(first, head)
        one.affine = None if first.reason else whole
        narrowing = frame.given[0].dtype != (
            head[-1].call.made[0].dtype if head[-1].call.made else frame.given[0].dtype
        )
        one.place = NormPlace(frame.path or "", tail, frame.given[0].dtype)
        one.site = frame.path or ""
        self.merged.setdefault(one.site, []).append(one)
        if narrowing:
            one.refuse(reasons.NARROWS(dtype=frame.given[0].dtype))
        self._refuse_borrowed(one, frame)
        for item in head:
            self.drawn[id(item.call)] = [one] if item is first else []
        self._put(one, head)

    def _refuse_borrowed(self, item: DraftNode, frame: Frame) -> None:
        """A module whose tensors are fetched by other code cannot be taken out."""
        if item.affine is not None and (who := self.foreign.get(frame.path or "")):
            item.refuse(reasons.NUMBERS_USED(who=who))
        for (path, attribute), who in self.trace.escaped.items():
            if path == frame.path and item.affine is not None:
                user = who or type(self.model).__name__
                item.refuse(reasons.BUFFER_USED(attribute=attribute, who=user))

    def _leave_functional(self, item: DraftNode) -> None:
        mean = item.statistics.get("running_mean")
        slot = mean.slots[0] if mean is not None and mean.slots else None
        owner = None if slot is None else slot.module
        frame = item.call.frame
        path = frame.path or ""
        label = f"{path}.{item.call.label}" if path else item.call.label
        item.site = owner or (label if slot is None else slot.name)
        if frame.module is not None and frame.path is None:
            item.refuse(reasons.HOMELESS())
        elif frame.module is self.model and owner == "" and calls_itself_batchnorm(self.model):
            item.site = type(self.model).__name__
            item.refuse(reasons.WHOLE_MODEL())
        elif item.affine is not None:
            obstacle = self.obstacles.get(id(frame), "") if owner == frame.path else ""
            where = path or type(self.model).__name__
            item.refuse(obstacle or reasons.FUNCTION(where=where))


def _is_norm(frame: Frame, head: list[DraftNode]) -> bool:
    if any(item.is_batchnorm for item in head):
        return True
    named = frame.module is not None and calls_itself_batchnorm(frame.module)
    constants = (value for item in head for value in item.call.reads.values())
    slots = [slot for value in constants for root in slots_of(value).values() for slot in root.slots]
    return any(
        (named or slot.kind != "parameter") and inside(slot.module, frame.path or "") for slot in slots
    )


def _foreign_reads(model: nn.Module, trace: Trace) -> dict[str, str]:
    """The modules that hold a tensor which other code reads, however that came by it, and whose code that is."""
    foreign: dict[str, str] = {}
    for call in trace.calls:
        running = {frame.path for frame in call.frame.line()}
        who = f"the code of `{call.frame.path or type(model).__name__}`"
        for value in call.reads.values() if not call.constant else ():
            for root in roots_of(value).values():
                if not any(slot.module in running for slot in root.slots):
                    foreign.update((slot.module, who) for slot in root.slots)
    returned = (v for name, v in trace.outputs.items() if not name.startswith("kept alive"))
    for root in (root for value in returned for root in roots_of(value).values()):
        if not any(slot.module == "" for slot in root.slots):
            foreign.update((slot.module, "the output of the model") for slot in root.slots)
    return foreign


def _more(within: Sequence[DraftNode], frame: Frame) -> str:
    """What the code of a module does besides normalising."""
    if any(item.is_batchnorm for item in within) and not _is_met(within, frame):
        return reasons.ANOTHER_TENSOR()
    labels = dict.fromkeys(item.call.label for item in within if not item.is_batchnorm)
    names = ", ".join(f"`{label}`" for label in list(labels)[:3])
    return reasons.DOES_MORE(what=names or "it keeps what it computes")


def _is_met(within: Sequence[DraftNode], frame: Frame) -> bool:
    """Whether operators read the tensor that a module is given, and make the one that it returns."""
    read = {name for item in within for name in item.inputs}
    made = {name for item in within for name in item.outputs}
    return frame.given[0].name in read and frame.made[0].name in made | read


def _turns(head: Sequence[DraftNode]) -> Iterator[tuple[DraftNode, list[int]]]:
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


def _is_straight(head: Sequence[DraftNode]) -> bool:
    """Whether the axes come out of an affine map in the order in which they went in."""
    *_, (_, axes) = _turns(head)
    return axes == sorted(axes)


def _compose(head: Sequence[DraftNode]) -> Affine | None:
    """One affine map of several parts, with the axes of the first one's input."""
    whole: Affine | None = None
    for item, axes in list(_turns(head))[:-1]:
        if item.affine is not None:
            order = np.argsort(axes)
            here = Affine(item.affine.scale.transpose(order), item.affine.shift.transpose(order))
            whole = here if whole is None else here.after(whole)
    return whole


def _replace(first: DraftNode, head: list[DraftNode]) -> DraftNode:
    """One BatchNormalization in the place of the parts of an affine map."""
    one = DraftNode("BatchNormalization", list(head[0].inputs), list(head[-1].outputs), first.call)
    one.reason = first.reason
    one.statistics = first.statistics
    return one


def add_absent(model: nn.Module, trace: Trace, items: Sequence[DraftNode]) -> list[DraftNode]:
    """The nodes, and one with a verdict for each BatchNorm that is none of them.

    That is every module that calls itself one and was not met as one, and every formula written out in other code.
    """
    modules = dict(model.named_modules())
    missed: list[DraftNode] = []
    met = {item.site for item in items if item.is_batchnorm}
    ran = {frame.path for frame in trace.frames}
    taken = {item.name for item in items}
    used = _used_modules(model, trace)
    for path, module in modules.items():
        if (path or type(module).__name__) in met or not calls_itself_batchnorm(module):
            continue
        if any(site.startswith(f"{path}.") for site in met):
            continue
        if holder_of(path, modules) is not None:
            continue
        if path not in ran:
            who = used.get(path)
            reason = reasons.NOT_CALLED(who=who) if who else reasons.NOT_RUN()
        elif "quantized" in type(module).__module__.split("."):
            reason = reasons.NORM_QUANTISED()
        elif module.training:
            reason = reasons.TRAINING()
        else:
            reason = reasons.NOT_AFFINE()
        one = absent(path, reason)
        one.name += " (not met)" if path in taken else ""
        missed.append(one)
    return [*items, *missed, *_compiled(modules, taken), *_written_out(model, items, trace)]


def _compiled(modules: Mapping[str, nn.Module], taken: set[str]) -> Iterator[DraftNode]:
    """A verdict for each BatchNorm that is compiled, be it a module or an operator of a graph."""
    paths = [
        path
        for path, module in modules.items()
        if calls_itself_batchnorm(module) and holder_of(path, modules)
    ]
    for name in dict.fromkeys((*paths, *compiled_norms(modules))):
        holder = holder_of(name, modules) or name
        one = absent(name, reasons.COMPILED(path=holder))
        one.name += " (not met)" if name in taken else ""
        yield one


def _written_out(model: nn.Module, items: Sequence[DraftNode], trace: Trace) -> Iterator[DraftNode]:
    """A verdict for each chain of affine maps that can only be a BatchNorm, and whose numbers could not be changed.

    It stays a chain of affine maps: others pass it.
    """
    outputs = [value.name for value in trace.outputs.values()]
    for chain in chains_of(items, readers_of(items), outputs):
        name = _statistic(chain)
        why = place_of(model, trace, items, chain) if name else ""
        if name:
            where = chain[0].call.frame.path or type(model).__name__
            row = reasons.WRITTEN_OUT_AS if isinstance(why, str) else reasons.WRITTEN_OUT
            yield absent(name, row(where=where, because=why))


def _statistic(chain: Sequence[DraftNode]) -> str:
    """The first buffer of a chain that centres, scales, and shifts again, or divides by a root; empty for any other."""
    affines = [item.affine for item in chain if item.affine is not None]
    scales = [place for place, affine in enumerate(affines) if np.any(affine.scale != 1)]
    shifts = [place for place, affine in enumerate(affines) if np.any(affine.shift != 0)]
    whole = _compose(chain)
    if not scales or not shifts or whole is None or len(whole.axes) != 1:
        return ""
    constants = [
        value for item in chain for value in item.call.reads.values() if value.constant or value.slots
    ]
    centred = shifts[0] < scales[0] < shifts[-1] or (shifts[0] < scales[0] and scales[-1] == shifts[-1])
    if not (centred and len(chain) >= 3) and not any(map(_has_root, constants)):
        return ""
    slots = [slot for value in constants for root in slots_of(value).values() for slot in root.slots]
    return next((slot.name for slot in slots if slot.kind == "buffer"), "")


def _has_root(value: Value) -> bool:
    """Whether a constant is computed with a square root."""
    call = value.call if value.constant and not value.slots else None
    roots = ("sqrt", "rsqrt", "pow")
    return call is not None and (call.label in roots or any(map(_has_root, call.reads.values())))


def _used_modules(model: nn.Module, trace: Trace) -> dict[str, str]:
    """The modules that hold a tensor which is read, with the path of the module in whose code that is."""
    return {
        slot.module: call.frame.path or type(model).__name__
        for call in trace.calls
        for value in call.reads.values()
        for slot in value.slots
    }


def absent(path: str, reason: str) -> DraftNode:
    """A BatchNormalization that nothing runs, with its verdict."""
    call = Call(-1, "batch_norm", (), {}, Frame(None, path, None))
    item = DraftNode(
        "BatchNormalization", [f"input of {path}"], [f"output of {path}"], call, name=path, site=path
    )
    item.refuse(reason)
    return item


def calls_itself_batchnorm(module: nn.Module) -> bool:
    """Whether its class says so; nothing is told of what it computes."""
    if isinstance(module, torch.jit.ScriptModule):
        return "batchnorm" in str(getattr(module, "original_name", "")).lower()
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "batchnorm" in type(module).__name__.lower()
