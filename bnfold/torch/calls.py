"""The module calls of a forward pass, as places in which one operator could stand for all that is computed there.

A block of linear operators that becomes one operator must be taken out of code that nobody may edit. That is possible
where a module call does nothing else, but for the activations at its end: then the module itself becomes the operator.
So a call qualifies if it was given one tensor, which the operator reads, returned one tensor, and if nobody looks into
the module otherwise: no hooks, no other call, no other code that reads what it holds, nothing changed in place that
somebody else could see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bnfold.errors import Refuse
from bnfold.torch.draft import DraftNode
from bnfold.torch.hooks import computes_weight
from bnfold.torch.steps import TraceStep, steps_of
from bnfold.torch.storage import roots_of
from bnfold.torch.tails import Tail, find_tail, obstacle
from bnfold.torch.tensors import inside
from bnfold.torch.trace import Frame, Trace

__all__ = ["ModuleCalls", "ModulePlace"]


@dataclass(frozen=True)
class ModulePlace:
    """A module that can become one operator.

    Attributes:
        path: its qualified name.
        tail: what it does afterwards; see `tails`.
        dtype: of what it is given and returns.
    """

    path: str
    tail: Tail
    dtype: torch.dtype


class ModuleCalls:
    """The module calls of one pass, with the nodes of each.

    Attributes:
        trace, items, alias, norms, otherwise, formulas: see `__init__`.
        hosts: the paths of modules that become operators whose weights their code computes; set once those are bound.
        frames: by the name of a node, the call in whose own code it is.
        held, children: by identity of a call, the nodes in it (those of inner calls too), and the calls right in it.
        count: by path, how often a module is called.
        reads: see `_reads`.
        dtypes: of values, by name.
    """

    def __init__(
        self,
        trace: Trace,
        items: Sequence[DraftNode],
        alias: Mapping[str, str],
        norms: Collection[str],
        otherwise: Mapping[str, str],
        formulas: Collection[str] = (),
    ) -> None:
        """Sort the nodes by module call.

        Args:
            trace: the pass.
            items: its nodes, named.
            alias: for the values that are copies of another one, that one.
            norms: the paths of BatchNorms.
            otherwise: the paths of modules that do something else for other inputs, and what those are.
            formulas: the names of the numbers of BatchNorms that are written out.
        """
        self.trace, self.items, self.alias, self.norms = trace, list(items), alias, frozenset(norms)
        self.otherwise, self.formulas = otherwise, formulas
        self.hosts: frozenset[str] = frozenset()
        self.frames = {item.name: item.call.frame for item in items}
        self.held: dict[int, list[DraftNode]] = {}
        self.children: dict[int, list[Frame]] = {}
        self.count = Counter(frame.path for frame in trace.frames)
        for item in items:
            for frame in item.call.frame.line():
                self.held.setdefault(id(frame), []).append(item)
        for frame in trace.frames:
            self.children.setdefault(id(frame.parent), []).append(frame)
        self.reads = list(_reads(trace))
        values = (*trace.inputs.values(), *(value for call in trace.calls for value in call.made))
        self.dtypes = {value.name: value.dtype for value in values}

    def steps(self, paths: Collection[str], gone: Mapping[str, str]) -> tuple[TraceStep, ...]:
        """What runs outside of BatchNorms and these modules.

        Args:
            paths: of the modules.
            gone: nodes that do not run any more, with the value that stands for what they computed.
        """
        alias: dict[str, str] = {}
        left: list[DraftNode] = []
        for item in self.items:
            if item.name in gone:
                alias[item.outputs[0]] = alias.get(gone[item.name], gone[item.name])
            else:
                left.append(item.reading([alias.get(name, name) for name in item.inputs]))
        return tuple(steps_of(self.trace, left, {*self.norms, *self.hosts, *paths}, self.formulas))

    def find(
        self, nodes: Sequence[str], source: str, result: str, bypassed: Mapping[str, tuple[str, str]]
    ) -> ModulePlace:
        """The module that does what these nodes do, and nothing else but a tail.

        Args:
            nodes: names of the nodes; one that no call is drawn as (a value that is read again) runs nowhere.
            source, result: the value that they read and the one that they compute.
            bypassed: nodes that are gone: their output, and the value that stands for it.

        Raises:
            Refuse: there is none.
        """
        resolve = _resolver(self.alias, bypassed)
        nodes = [name for name in nodes if name in self.frames]
        for frame in self.frames[nodes[0]].line() if nodes else ():
            mine = self.held.get(id(frame), [])
            if not set(nodes) <= {item.name for item in mine}:
                continue
            if not frame.path or frame.module is None:
                break
            others = [item for item in mine if item.name not in nodes and item.name not in bypassed]
            tail = self._tail(frame, others, result, resolve, bypassed, nodes)
            if tail is None or resolve(frame.given[0].name) != source:
                raise Refuse(f"`{frame.path}` does more than that")
            self._check(frame)
            return ModulePlace(frame.path, tail, frame.given[0].dtype)
        raise Refuse("no module does that alone; make one of it")

    def check_idle(self, idle: Sequence[str], host: str) -> None:
        """Refuse to let modules pass on what they are given, where that is changed before the host reads it.

        Args:
            idle: paths of modules, from the first one on.
            host: the path of the module after them.
        """
        first, last = (next(f for f in self.trace.frames if f.path == path) for path in (idle[0], host))
        for call in self.trace.calls[first.start : last.start]:
            changed = (*call.written, *(old for old, _ in call.changed))
            if any(value.memory == first.given[0].memory for value in changed):
                raise Refuse(f"what `{first.path}` is given is changed in place before `{host}` runs")

    def measured(self, bypassed: Mapping[str, tuple[str, str]]) -> dict[str, list[Frame]]:
        """The module calls in whose code the size or type of each value is asked for, but for BatchNorms."""
        resolve = _resolver(self.alias, bypassed)
        found: dict[str, list[Frame]] = {}
        for name, frames in self.trace.measured.items():
            others = [frame for frame in frames if not any(f.path in self.norms for f in frame.line())]
            found.setdefault(resolve(name), []).extend(others)
        return found

    def _tail(
        self,
        frame: Frame,
        others: Sequence[DraftNode],
        result: str,
        resolve: Callable[[str], str],
        bypassed: Mapping[str, tuple[str, str]],
        nodes: Sequence[str],
    ) -> Tail | None:
        why = obstacle(frame)
        if why:
            raise Refuse(f"`{frame.path}` cannot become it: {why}")
        last = max(item.call.index for item in self.held[id(frame)] if item.name in nodes)
        children = [
            child
            for child in self.children.get(id(frame), [])
            if child.start > last and not self._is_gone(child, bypassed)
        ]

        def within(child: Frame) -> list[DraftNode]:
            return [item for item in self.held.get(id(child), []) if item.name not in bypassed]

        return find_tail(frame, others, result, children, within, resolve)

    def _is_gone(self, frame: Frame, bypassed: Mapping[str, tuple[str, str]]) -> bool:
        """Whether a module call was a BatchNorm that is no more."""
        mine = self.held.get(id(frame), [])
        return bool(mine) and all(item.name in bypassed for item in mine)

    def _check(self, frame: Frame) -> None:
        """Refuse a module that somebody looks into, or whose call somebody else could notice."""
        path, module = frame.path, frame.module
        assert path is not None
        assert module is not None
        if self.count[path] > 1:
            raise Refuse(f"`{path}` is called {self.count[path]} times")
        if frame.assigns:
            raise Refuse(f"the code of `{path}` sets an attribute of a module")
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            raise Refuse(f"`{path}` is compiled")
        if any(_has_hooks(part) for part in module.modules()):
            raise Refuse(f"`{path}` has hooks, or a module in it")
        for where, words in self.otherwise.items():
            if inside(where, path):
                raise Refuse(f"`{where}` does something else, given {words}")
        for holder, attribute, at in self.reads:
            if inside(holder, path) and not frame.start <= at < frame.stop:
                raise Refuse(f"`{holder}.{attribute}` is read outside of `{path}`")
        for (holder, attribute), who in self.trace.escaped.items():
            if inside(holder, path) and not inside(who, path):
                raise Refuse(f"`{holder}.{attribute}` is fetched outside of `{path}`")
        if self._changes_what_it_was_given(frame):
            raise Refuse(f"the code of `{path}` changes in place what it was given")
        given, made = frame.given[0].dtype, frame.made[0].dtype
        if given.is_floating_point and given != made:
            raise Refuse(f"`{path}` changes the type of what it is given")

    def _changes_what_it_was_given(self, frame: Frame) -> bool:
        calls = self.trace.calls[frame.start : frame.stop]
        own = {value.memory for call in calls for value in call.made} - {v.memory for v in frame.given}
        return any(old.memory not in own for call in calls for old, _ in call.changed)


def _resolver(alias: Mapping[str, str], bypassed: Mapping[str, tuple[str, str]]) -> Callable[[str], str]:
    """How a value is known once copies and nodes are gone."""
    stands_for = dict(bypassed.values())

    def resolve(name: str) -> str:
        name = alias.get(name, name)
        while name in stands_for:
            name = stands_for[name]
        return name

    return resolve


def _has_hooks(module: nn.Module) -> bool:
    """Whether code that is not its own runs with a module; what computes its weight is known by its result."""
    before = [hook for hook in module._forward_pre_hooks.values() if not computes_weight(hook)]
    return bool(before or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _reads(trace: Trace) -> Iterator[tuple[str, str, int]]:
    """Which tensor of which module is read by which call; -1 is the caller of the model."""
    for at, call in enumerate(trace.calls):
        for value in call.reads.values() if not call.constant else ():
            for root in roots_of(value).values():
                running = {frame.path for frame in call.frame.line()}
                slots = [slot for slot in root.slots if slot.module in running] or root.slots
                yield from ((slot.module, slot.attribute, at) for slot in slots)
    returned = (value for name, value in trace.outputs.items() if not name.startswith("kept alive"))
    for value in returned:
        yield from (
            (slot.module, slot.attribute, -1) for root in roots_of(value).values() for slot in root.slots
        )
