"""Record the calls of one pass: what each reads, makes and changes, and which code a number may have decided about.

**Branches.** Where a number that depends on the inputs leaves the tensors (`item`, `bool`, NumPy), the code that runs
after it might have been other code. So it might once somebody asks for a size that depends on numbers (of what a mask
or `nonzero` selects); what is computed from such a tensor meanwhile is drawn as what nothing travels through. From a
branch on nothing is trusted that passes through a module whose own forward was under way, nor any value that was alive:
an opaque call "reads" it. What runs whole inside another module's forward stays as it is.

**Without numbers.** A pass of which the calls alone count can leave out what costly operators compute (`hollow`). What
comes of it rests on no number: where one is asked for, be it by the model, a size, an error, a hook or another thread,
`NeedsNumbers` asks for another pass, which `passes.record_pass` makes. What the pass writes into tensors from before
it is put back, whoever holds them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bnfold.torch.aten import is_pure, makes_list, name_of, reads_shape, sized_axes
from bnfold.torch.hooks import observers
from bnfold.torch.internals import without_functions
from bnfold.torch.memory import Memory
from bnfold.torch.tensors import leaves, returned
from bnfold.torch.trace import Call, Frame, Like, Value

__all__ = ["Differentiates", "NeedsNumbers", "Recorder", "Sealed"]


class Differentiates(BaseException):
    """The model differentiates by itself; no error, so that its code does not catch it."""


class NeedsNumbers(BaseException):
    """Something depends on a number that was not computed; no error, so that the model's code does not catch it."""


_SIZING = (nn.LSTM, nn.GRU, nn.RNN)
"""Modules that take a number out of a tensor (how many sequences are packed) for a size alone."""


@dataclass(eq=False, slots=True)
class Sealed:
    """A call whose operators are its own business, but for what they read and change: compiled code."""

    call: Call
    changed: list[Tensor]
    told: bool = False


_ATOMS = frozenset({int, float, bool, str, type(None)})


class Recorder:
    """The calls of one pass, and the frame of the module in whose code it is.

    Attributes:
        memory: which value each tensor is.
        numbers: whether what costs most is computed.
        asked: whether something depended on numbers that depend on the inputs.
        unset: whether some numbers were left out by now.
        lacking: whether something needs one that was left out, so that the pass is of no use.
        branches: whether a number may have decided which code ran.
        believed: the last error that an operator raised and that is due to no number that was left out.
        calls: in order.
        frame, root: the module call that is under way, and the frame around the model.
        sealed: the call under way whose operators are its own business.
        unseen: whether it is bnfold that asks something of tensors.
        measured: by the name of a value, the module calls in whose code its size or type was asked for.
    """

    def __init__(self, memory: Memory, numbers: bool = True) -> None:
        self.memory, self.numbers = memory, numbers
        self.asked = self.unset = self.lacking = self.branches = False
        self.believed: BaseException | None = None
        self.calls: list[Call] = []
        self.frame = self.root = Frame(None, None, None)
        self.sealed: Sealed | None = None
        self.unseen = False
        self.measured: dict[str, list[Frame]] = {}

    # -- values

    def value(self, tensor: Tensor) -> Value:
        """The value that a tensor is now; an opaque call makes it where that was not seen."""
        if (value := self.memory.now(tensor)) is not None:
            return value
        reads = {id(value): value for value in self.memory.beneath(tensor)}
        call = Call(len(self.calls), "Alias" if reads else "Outside", (), {}, self.frame, reads)
        self.calls.append(call)
        data = not reads or any(value.data for value in reads.values())
        call.made.append(self.memory.new(tensor, call, constant=False, data=data))
        if not reads:
            self.memory.outside[id(call.made[0])] = weakref.ref(tensor)
        return call.made[0]

    def look(self, thing: Any) -> tuple[Value, ...]:
        """The values of the tensors in nested things."""
        with self.looking():
            if isinstance(thing, Tensor):
                return (self.value(thing),)
            return tuple(self.value(tensor) for _, tensor in leaves(thing))

    def measure(self, tensor: Any, sizes: bool = True) -> None:
        """Note that somebody asks for the sizes of a tensor, or for its rank or type, which no numbers decide."""
        if self.sealed is None and not self.unseen and isinstance(tensor, Tensor):
            value = self.memory.noted(tensor)
            if value is not None and value.data:
                self.measured.setdefault(value.name, []).append(self.frame)
                if (sizes and value.sized) or value.loose:
                    self.branch()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Ask something of tensors without capturing that."""
        before, self.unseen = self.unseen, True
        try:
            with without_functions():
                yield
        finally:
            self.unseen = before

    def read(self, call: Call, value: Value) -> None:
        """Note that a call reads a value; a value that passes through a branching forward is read by that, too."""
        call.reads[id(value)] = value
        if not self.branches or value.slots or value.frame is None or not value.data:
            return
        mine = {id(frame): frame for frame in call.frame.line()}
        meeting = next(frame for frame in value.frame.line() if id(frame) in mine)
        if meeting.data_dependent:
            self.observe("If", [value], meeting)

    def observe(self, label: str, values: Iterable[Value], frame: Frame) -> None:
        """An opaque call that reads some values and makes none."""
        reads = {id(value): value for value in values if not value.slots}
        if reads:
            self.calls.append(Call(len(self.calls), label, (), {}, frame, reads))

    def branch(self) -> None:
        """A number has left the tensors: whatever is alive may be read by code that did not run."""
        self.ask()
        self.branches = True
        for frame in self.frame.line():
            frame.data_dependent = True
        self.observe("If", [value for _, value in self.memory.alive() if value.data], self.frame)

    def ask(self) -> None:
        """Something depends on numbers that depend on the inputs.

        Raises:
            NeedsNumbers: some were left out.
        """
        self.asked = True
        self.lacking |= self.unset
        if self.lacking:
            raise NeedsNumbers

    def reveal(self) -> None:
        """Somebody looks at numbers beside the model's code, and may keep them where nobody puts anything back.

        Raises:
            NeedsNumbers: they would not be computed.
        """
        self.lacking |= not self.numbers
        if self.lacking:
            raise NeedsNumbers

    @contextmanager
    def insisting(self) -> Iterator[None]:
        """Ask again at the end: bare excepts and `finally` catch everything, compiled code makes it an error.

        An error of the model's own may be due to a number that it got in a way that nobody sees, as in a thread.
        """
        try:
            yield
        except Exception as error:
            if not self.lacking and (not self.unset or error is self.believed):
                raise
            raise NeedsNumbers from error
        if self.lacking:
            raise NeedsNumbers

    # -- calls

    def begin(self, function: Any, args: Any, kwargs: Any) -> Call:
        """A call with values in the place of tensors."""
        call = Call(0, function, (), {}, self.frame)
        if reads_shape(function) and args and isinstance(args[0], Tensor):
            self.measure(args[0])
            args = (Like(tuple(args[0].shape), args[0].dtype), *args[1:])
        call.args, call.kwargs = self._freeze(args, call), self._freeze(kwargs, call)
        return call

    def _freeze(self, thing: Any, call: Call) -> Any:
        if type(thing) in _ATOMS:  # nearly always
            return thing
        if isinstance(thing, Tensor):
            value = self.value(thing)
            self.read(call, value)
            return value
        if isinstance(thing, list | tuple):
            return tuple([self._freeze(part, call) for part in thing])
        if isinstance(thing, dict):
            return {key: self._freeze(part, call) for key, part in thing.items()}
        return thing

    def finish(self, call: Call, result: Any, changed: Sequence[Tensor] = (), told: bool = False) -> None:
        """Note what a call returned and changed, and whether it gave numbers away."""
        call.index = len(self.calls)
        self.calls.append(call)
        reads = call.reads.values()
        call.constant = is_pure(call.function) and all(value.constant for value in reads)
        data = any(value.data for value in reads)
        self._note_changes(call, changed, data)
        found = list(returned(result))
        for tensor in found:
            value = self.memory.noted(tensor)
            if value is None or not (value.slots or value in call.made):
                value = self.memory.new(tensor, call, call.constant, data)
                value.sized = _sized(call, value) if data else value.sized
                value.loose = data and _is_loose(call)
            if value not in call.made:
                call.made.append(value)
        told = told or (not found and result is not None) or _counts(call)
        if data and (told or any(value.sized for value in call.made)):
            self.ask()
        if data and told and not _only_sizes(self.frame.module):
            self.branch()

    def _note_changes(self, call: Call, changed: Sequence[Tensor], data: bool) -> None:
        before = [(tensor, self.memory.noted(tensor)) for tensor in changed]
        for tensor in changed:
            self.memory.change(tensor, call, data)
        for tensor, old in before:
            if old is not None and old.slots:
                self.memory.changed.add(id(tensor))
            elif old is not None:
                call.made.append(self.memory.new(tensor, call, False, data or old.data))
                call.changed.append((old, call.made[-1]))

    def seal(
        self, label: str, run: Callable[[], Any], reads: Iterable[Tensor], changed: Iterable[Tensor] = ()
    ) -> Any:
        """Run something as one opaque call that reads these tensors, and whatever its operators read."""
        call = Call(0, label, (), {}, self.frame)
        with self.looking():
            for tensor in reads:
                self.read(call, self.value(tensor))
            for tensor in changed:
                self.memory.save(tensor)
        if any(value.data for value in call.reads.values()):
            self.ask()
        sealed = self.sealed = Sealed(call, list(changed))
        try:
            result = run()
        finally:
            self.sealed = None
        with self.looking():
            self.finish(call, result, sealed.changed, sealed.told)
        return result


def _sized(call: Call, made: Value) -> range:
    """The axes of what a call makes that may be as long as some numbers say: all, if that is so of one it reads."""
    taken = any(value.sized for value in call.reads.values())
    return range(made.rank) if taken else sized_axes(call.function, call.args, made.rank)


_SHAPING = ("view", "reshape", "_unsafe_view")
"""Operators that are told the shape of what they make."""


def _is_loose(call: Call) -> bool:
    """Whether what a call makes may have as many axes as some numbers say: one that is squeezed goes if it is one."""
    name = name_of(call.function)
    if name == "squeeze":
        value, *dims = call.args
        asked = [axis % max(value.rank, 1) for axis in dims] if all(isinstance(d, int) for d in dims) else []
        if value.sized and (not asked or any(axis in value.sized for axis in asked)):
            return True
    return name not in _SHAPING and any(value.loose for value in call.reads.values())


def _counts(call: Call) -> bool:
    """Whether a call returns as many tensors as some numbers say; along which axis, is asked of `unbind` alone."""
    if not makes_list(call.function):
        return False
    value = next((value for value in call.reads.values() if value.sized), None)
    if value is None:
        return False
    along = call.args[1] if name_of(call.function) == "unbind" and len(call.args) > 1 else None
    return not isinstance(along, int) or along % value.rank in value.sized


def _only_sizes(module: nn.Module | None) -> bool:
    """Whether all that a module's own code does with numbers that leave tensors is to make something of that size."""
    return (
        module is not None
        and type(module) in _SIZING
        and "forward" not in vars(module)
        and not observers(module)
    )
