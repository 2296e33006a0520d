"""Hold two recorded passes of one module against each other: where does its code do something else?

    what each module call did itself, in order -> what corresponds to what -> where the two part

Two passes correspond module call by module call: what the code of one did itself (the calls it made, the modules it
ran) is matched in order with what it did in the other pass, by what was called and on which parameters. From there,

- a value **parts** where it is not read by the same calls in both passes, or is an output in one of them only, or is in
  the hands of code that asks for a number in the other pass alone;
- a module works **otherwise** where what its call makes does not correspond, or it is called once more;
- a parameter is **used apart** where a call of the other pass that corresponds to nothing reads it.

A slice that takes all of an axis is an alias, or no call at all, so one that happens in one pass only, along an axis
whose size differs between the two, is looked through: whoever reads what it takes reads what it is taken of.

Between values that do not part, the two passes compute by the same graph, whatever they do elsewhere: an affine map
that stays within those, and ends in parameters that are not used apart, moves in both of them or in neither.

Not covered: what no pass that was made has done.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

from torch import nn

from bnfold.torch.trace import Call, Frame, Trace, Value

__all__ = ["Alignment", "Parting"]

_SILENT = ("If", "Hook")
_SLICES = ("slice", "alias")
"""Calls that stand for somebody who looks, and compute nothing."""


@dataclass(frozen=True)
class Parting:
    """A value that two passes use in different ways, and the module in whose code they do."""

    value: str
    frame: Frame


class _Script:
    """What the code of each module call did itself, in order."""

    def __init__(self, recording: Trace, slices: Iterable[Call] = ()) -> None:
        self.recording = recording
        self.described: dict[int, Any] = {}
        self.origins = {call.made[0].name: _source(call) for call in slices}
        silent = {id(call) for call in slices}
        self.calls = [call for call in recording.calls if _computes(call) and id(call) not in silent]
        self.places = [
            at for at, call in enumerate(recording.calls) if _computes(call) and id(call) not in silent
        ]
        lines: dict[int, list[tuple[float, Call | Frame]]] = {}
        for at, call in enumerate(recording.calls):
            if _computes(call) and id(call) not in silent:
                lines.setdefault(id(call.frame), []).append((at, call))
        for frame in recording.frames:
            lines.setdefault(id(frame.parent), []).append((frame.start - 0.5, frame))
        ordered = {place: sorted(line, key=lambda each: each[0]) for place, line in lines.items()}
        self.lines = {place: [each for _, each in line] for place, line in ordered.items()}

    @cached_property
    def root(self) -> Frame | None:
        """The frame around the model."""
        frames = (call.frame for call in self.recording.calls)
        first = next(iter(self.recording.frames), None) or next(frames, None)
        return None if first is None else list(first.line())[-1]

    @cached_property
    def readers(self) -> dict[str, set[int]]:
        """Who reads each computed value: calls by identity; 0 is the caller of the model."""
        outputs = self.recording.outputs.values()
        readers: dict[str, set[int]] = {self.origin(value).name: {0} for value in outputs}
        for call in self.calls:
            for value in self.reads(call):
                readers.setdefault(value.name, set()).add(id(call))
        return readers

    def returned(self) -> set[str]:
        """The names of the parameters and buffers that the caller gets, or what is made of them alone."""
        return {name for value in self.recording.outputs.values() for name in _stored(value)}

    def origin(self, value: Value) -> Value:
        """What a value is taken of, by slices that are looked through."""
        while value.name in self.origins:
            value = self.origins[value.name]
        return value

    def reads(self, call: Call) -> list[Value]:
        """The computed values that a call reads."""
        return [self.origin(value) for value in _computed(call)]

    def count(self, frame: Frame) -> int:
        """How many calls a module call made that compute something."""
        return bisect_left(self.places, frame.stop) - bisect_left(self.places, frame.start)

    def sign(self, event: Call | Frame) -> Any:
        """What an event is, as far as it can be told apart from others."""
        if isinstance(event, Frame):
            return id(event.module) if event.path is not None else type(event.module)
        stored = tuple(self._describe(v) for v in event.reads.values() if v.slots or v.constant)
        return event.label, len(event.made), stored

    def _describe(self, value: Value) -> Any:
        """A constant, by the parameters that it is made of and what is called on them."""
        if id(value) not in self.described:
            reads = value.call.reads.values() if value.call is not None and not value.slots else ()
            made = value.slots[0].name if value.slots else value.call.label if value.call is not None else ""
            self.described[id(value)] = (made, *map(self._describe, reads))
        return self.described[id(value)]


class Alignment:
    """What corresponds to what in two passes.

    Attributes:
        calls: the calls of the other pass, by the identity of the call of this one.
        values: the computed values of the other pass, by the name of the value of this one.
    """

    def __init__(
        self, mine: Trace, theirs: Trace, slices: tuple[Iterable[Call], Iterable[Call]] = ((), ())
    ) -> None:
        self.mine, self.theirs = _Script(mine, slices[0]), _Script(theirs, slices[1])
        self.calls: dict[int, Call] = {}
        self.values: dict[str, Value] = {}
        self.frames: dict[int, Frame] = {}
        if len(mine.inputs) == len(theirs.inputs):
            for ours, other in zip(mine.inputs.values(), theirs.inputs.values(), strict=True):
                self.values[ours.name] = other
        if self.mine.root is not None and self.theirs.root is not None:
            self._match(self.mine.root, self.theirs.root)

    @staticmethod
    def of(mine: Trace, theirs: Trace) -> Alignment:
        """Two passes, but for slices that are no calls in one of them."""
        alignment = Alignment(mine, theirs)
        if not alignment._has_lone_slices():
            return alignment
        slices = tuple(alignment._lone_slices())
        theirs_too = tuple(alignment._turned()._lone_slices())
        return Alignment(mine, theirs, (slices, theirs_too)) if slices or theirs_too else alignment

    def _has_lone_slices(self) -> bool:
        """Whether one of the passes makes a slice that corresponds to nothing."""
        known = self.calls.keys() | {id(call) for call in self.calls.values()}
        calls = (*self.mine.calls, *self.theirs.calls)
        return any(call.label in _SLICES and id(call) not in known for call in calls)

    def _turned(self) -> Alignment:
        return Alignment(self.theirs.recording, self.mine.recording)

    def _lone_slices(self) -> Iterator[Call]:
        """The slices of this pass that correspond to none, along axes whose sizes differ."""
        known = dict(self.values)
        for call in self.mine.calls:
            if call.label not in _SLICES or id(call) in self.calls:
                continue
            source, other = _source(call), known.get(_source(call).name)
            if other is not None and (call.label == "alias" or _differ(call, source, other)):
                known[call.made[0].name] = other
                yield call

    def taken(self) -> Iterator[tuple[str, Value]]:
        """What slices that are looked through take in this pass, with what that is in the other one."""
        for name in self.mine.origins:
            value = self.values.get(self.mine.origin(self.mine.origins[name]).name)
            if value is not None:
                yield name, value

    def _match(self, mine: Frame, theirs: Frame) -> None:
        self.frames |= {id(mine): theirs, id(theirs): mine}
        here, there = self.mine.lines.get(id(mine), []), self.theirs.lines.get(id(theirs), [])
        for one, other in _pairs(here, there, self.mine, self.theirs):
            if isinstance(one, Frame) and isinstance(other, Frame):
                self._match(one, other)
            elif isinstance(one, Call) and isinstance(other, Call):
                self.calls[id(one)] = other
                for ours, their in zip(_results(one), _results(other), strict=False):
                    self.values[ours.name] = their

    @cached_property
    def _back(self) -> dict[str, str]:
        return {theirs.name: name for name, theirs in self.values.items()}

    @cached_property
    def partings(self) -> tuple[Parting, ...]:
        """The values of this pass that the other one uses in another way, each once."""
        found = {each.value: each for each in (*self._decided(), *self._rewired(), *self._read_otherwise())}
        return tuple(found.values())

    def _decided(self) -> Iterator[Parting]:
        """What is in the hands of code that asks for a number in the other pass alone, and may part at another one."""
        known = {value.name for call in _branches(self.mine) for value in call.reads.values()}
        for call in _branches(self.theirs):
            names = (self._back.get(self.theirs.origin(value).name) for value in call.reads.values())
            yield from (
                Parting(n, self._parted(call.frame)) for n in names if n is not None and n not in known
            )

    def _rewired(self) -> Iterator[Parting]:
        """What corresponding calls read that does not correspond."""
        for call in self.mine.calls:
            other = self.calls.get(id(call))
            if other is None:
                continue
            reads, theirs = self.mine.reads(call), self.theirs.reads(other)
            if [self.values.get(value.name) for value in reads] == theirs:
                continue
            frame = self._wiring(call)
            back = (self._back.get(value.name) for value in theirs)
            names = (*(value.name for value in reads), *(name for name in back if name is not None))
            yield from (Parting(name, frame) for name in names)

    @cached_property
    def otherwise(self) -> dict[str, nn.Module]:
        """The modules whose calls do something else in the other pass, or happen more often there, by path."""
        frames = (frame for frame in self.theirs.recording.frames if frame.path is not None)
        return {f.path: f.module for f in frames if f.path and f.module is not None and not self._is_alike(f)}

    def _is_alike(self, theirs: Frame) -> bool:
        """Whether a module call of the other pass makes what the one that it corresponds to makes, in as many calls."""
        mine = self.frames.get(id(theirs))
        if mine is None or mine.plain != theirs.plain or self.mine.count(mine) != self.theirs.count(theirs):
            return False
        made = [self.values.get(self.mine.origin(value).name) for value in mine.made if value.data]
        return made == [self.theirs.origin(value) for value in theirs.made if value.data]

    def _wiring(self, call: Call) -> Frame:
        """The module call whose code hands a call what it reads: the innermost that is given the same in both."""
        for frame in call.frame.line():
            other = self.frames.get(id(frame))
            if other is None:
                continue
            given = [self.values.get(self.mine.origin(v).name) for v in frame.given]
            if given == [self.theirs.origin(v) for v in other.given]:
                return frame
        return call.frame

    def _read_otherwise(self) -> Iterator[Parting]:
        """Corresponding values whose readers do not correspond."""
        mine, theirs = self.mine.readers, self.theirs.readers
        by_identity = {id(call): call for script in (self.mine, self.theirs) for call in script.calls}
        for name, value in self.values.items():
            here = mine.get(name, set())
            there = theirs.get(value.name, set())
            matched = {0: 0} | {each: id(self.calls[each]) for each in here if each in self.calls}
            stray = [each for each in here if matched.get(each) not in there]
            stray += sorted(there - {matched.get(each) for each in here})
            if stray:
                calls = [by_identity[each] for each in stray if each in by_identity]
                yield Parting(name, self._parted(calls[0].frame if calls else value.frame))

    def _parted(self, frame: Frame | None) -> Frame:
        """The innermost module call around this one that happens in both passes."""
        line = list(frame.line()) if frame is not None else []
        found = next((each for each in line if id(each) in self.frames), self.mine.root)
        assert found is not None
        return found

    @cached_property
    def apart(self) -> dict[str, Frame]:
        """The parameters and buffers that the other pass alone reads or returns, by name, and the module that parts."""
        matched = {id(call) for call in self.calls.values()}
        found: dict[str, Frame] = {}
        for call in self.theirs.calls:
            if id(call) not in matched:
                for value in call.reads.values():
                    found.update(dict.fromkeys(_stored(value), self._parted(call.frame)))
        if more := self.theirs.returned() - self.mine.returned():
            found.update(dict.fromkeys(more, self._parted(None)))
        return found


def _branches(script: _Script) -> Iterator[Call]:
    """Where code asked for a number, with the values that were alive then, or that it handles later."""
    return (call for call in script.recording.calls if call.label == "If")


def _computes(call: Call) -> bool:
    return not call.constant and call.label not in _SILENT


def _differ(call: Call, source: Value, other: Value) -> bool:
    """Whether a slice is taken along an axis whose size another pass has otherwise."""
    axis = int(call.args[1]) if len(call.args) > 1 else 0
    return other.rank == source.rank and other.shape[axis] != source.shape[axis]


def _source(call: Call) -> Value:
    source: Value = call.args[0]
    return source


def _computed(call: Call) -> Iterator[Value]:
    return (value for value in call.reads.values() if not value.constant and not value.slots)


def _results(call: Call) -> list[Value]:
    """What a call made and changed, in order."""
    return [value for value in (*call.made, *call.written) if not value.slots]


def _stored(value: Value) -> Iterator[str]:
    """The names of the parameters and buffers that a value which reads no input is made of."""
    if value.slots:
        yield from (slot.name for slot in value.slots)
    elif value.call is not None and not value.data:
        for part in value.call.reads.values():
            yield from _stored(part)


def _pairs(
    here: list[Call | Frame], there: list[Call | Frame], mine: _Script, theirs: _Script
) -> Iterator[tuple[Call | Frame, Call | Frame]]:
    """What corresponds in two lines of events: all, one by one, or the longest stretches that are alike."""
    signs, others = [mine.sign(each) for each in here], [theirs.sign(each) for each in there]
    if signs == others:
        yield from zip(here, there, strict=True)
        return
    numbers: dict[Any, int] = {}
    one, other = ([numbers.setdefault(sign, len(numbers)) for sign in line] for line in (signs, others))
    for start, begin, length in SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks():
        yield from zip(here[start : start + length], there[begin : begin + length], strict=True)
