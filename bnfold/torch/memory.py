"""Which value each tensor is while a model runs, and which values lie in one memory.

Tensors are held weakly, by identity. A piece of memory counts its changes: a tensor that was noted before the last one
is another value by now, which nobody has given a name yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bnfold.torch.tensors import Slot, put_back
from bnfold.torch.trace import Call, Frame, Value

__all__ = ["Memory"]


@dataclass(eq=False, slots=True)
class _Store:
    """One piece of memory: how often it was changed, and the values that lie in it."""

    reference: StorageWeakRef
    number: int
    generation: int = 0
    values: list[Value] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Entry:
    tensor: weakref.ref[Tensor]
    value: Value
    store: _Store | None
    generation: int

    @property
    def is_current(self) -> bool:
        """Whether the memory is as it was when the tensor was noted."""
        return self.store is None or self.generation == self.store.generation


class Memory:
    """The tensors of one pass, from those that the model holds (see `tensors.held`) on.

    Attributes:
        saves: whether what is changed can be put back; not where tensors have no numbers.
        entries, stores: what was noted of tensors, by identity, and of pieces of memory, by address.
        slots: the values of the tensors that the model holds, by identity of the tensor.
        changed: which of these tensors the pass has changed, by identity.
        given, outside: the tensors that the caller gave, and those from elsewhere, by identity of the value.
        saved: tensors from before the pass whose memory was about to change, by identity, with their numbers.
        count: of the values that were named so far.
    """

    def __init__(self, held: Iterable[tuple[Tensor, tuple[Slot, ...]]], saves: bool = True) -> None:
        self.saves = saves
        self.entries: dict[int, _Entry] = {}
        self.stores: dict[int, _Store] = {}
        self.slots: dict[int, Value] = {}
        self.changed: set[int] = set()
        self.given: dict[int, Tensor] = {}
        self.outside: dict[int, weakref.ref[Tensor]] = {}
        self.saved: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self.count = 0
        for tensor, places in held:
            value = Value(tuple(tensor.shape), tensor.dtype, None, places, tensor, constant=True, data=False)
            value.name = places[0].name
            self.slots[id(tensor)] = self.enter(tensor, value)

    # -- what a tensor is

    def enter(self, tensor: Tensor, value: Value) -> Value:
        """Note which value a tensor is from now on."""
        store = self.store(tensor)
        generation = 0
        if store is not None:
            store.values.append(value)
            generation, value.memory = store.generation, store.number
        self.entries[id(tensor)] = _Entry(weakref.ref(tensor), value, store, generation)
        return value

    def enter_input(self, tensor: Tensor, name: str, frame: Frame) -> Value:
        """Note a tensor that the caller gives; one that is known already stays what it is."""
        if (value := self.noted(tensor)) is not None:
            return value
        value = Value(tuple(tensor.shape), tensor.dtype, name=name, frame=frame)
        self.given[id(value)] = tensor
        return self.enter(tensor, value)

    def enter_alias(self, tensor: Tensor, value: Value) -> None:
        """Let a tensor with memory of its own stand for a value that another one is."""
        self.entries[id(tensor)] = _Entry(weakref.ref(tensor), value, None, 0)

    def enter_numbers(self, tensor: Tensor, numbers: Tensor) -> None:
        """Note a tensor that was made of these numbers."""
        self.count += 1
        value = Value(tuple(numbers.shape), numbers.dtype, tensor=numbers, constant=True, data=False)
        value.name = f"v{self.count}"
        self.enter(tensor, value)

    def new(self, tensor: Tensor, call: Call, constant: bool, data: bool) -> Value:
        """A new value for a tensor, made by a call."""
        return self.enter(tensor, self._fresh(tensor, call, constant, data))

    def _fresh(self, tensor: Tensor, call: Call, constant: bool, data: bool) -> Value:
        self.count += 1
        shape = tuple(map(int, tensor.shape))
        name = f"v{self.count}"
        return Value(shape, tensor.dtype, call, constant=constant, data=data, name=name, frame=call.frame)

    def noted(self, tensor: Tensor) -> Value | None:
        """The value that a tensor was when it was last noted."""
        entry = self._entry(tensor)
        return None if entry is None else entry.value

    def now(self, tensor: Tensor) -> Value | None:
        """The value that a tensor is; None where that has no name yet."""
        entry = self._entry(tensor)
        if entry is None or not entry.is_current:
            return None
        if entry.value.constant and id(entry.value.tensor) in self.changed:
            entry.value.constant = False
        return entry.value

    def beneath(self, tensor: Tensor) -> list[Value]:
        """The values that a tensor without a name may be made of: what it was, and what else lies in its memory."""
        entry, store = self._entry(tensor), self.store(tensor)
        own = [] if entry is None else [entry.value]
        return own + (store.values if store is not None else [])

    def _entry(self, tensor: Tensor) -> _Entry | None:
        entry = self.entries.get(id(tensor))
        return entry if entry is not None and entry.tensor() is tensor else None

    def alive(self) -> Iterator[tuple[Tensor, Value]]:
        """The tensors that somebody still holds, with their values."""
        for entry in self.entries.values():
            if (tensor := entry.tensor()) is not None:
                yield tensor, entry.value

    # -- where it lies

    def store(self, tensor: Tensor) -> _Store | None:
        """The memory that a tensor lies in; None where it has none of its own to show (sparse, wrapped)."""
        try:
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        except (RuntimeError, NotImplementedError, AttributeError):
            return None
        store = self.stores.get(reference.cdata)
        if store is None:
            store = self.stores[reference.cdata] = _Store(reference, len(self.stores) + 1)
        return store

    def change(self, tensor: Tensor, call: Call, data: bool) -> None:
        """Everything that lies in this memory has changed, by what a call has read."""
        store = self.store(tensor)
        if store is None or not store.values:
            return
        store.generation += 1
        written = self._fresh(tensor, call, False, data)
        written.memory = store.number
        call.written.append(written)
        self.changed.update(id(value.tensor) for value in store.values if value.slots)
        store.values.append(written)

    def save(self, tensor: Tensor) -> None:
        """Keep the numbers of every tensor from before the pass that lies in a memory about to be changed."""
        store = self.store(tensor)
        for value in store.values if store is not None and self.saves else ():
            mine = value.tensor if value.slots else self._from_before(value)
            if mine is not None and id(mine) not in self.saved:
                self.saved[id(mine)] = weakref.ref(mine), mine.detach().clone()

    def _from_before(self, value: Value) -> Tensor | None:
        """A tensor that the caller gave, or that lies in a container, in an object or in a global name."""
        outside = self.outside.get(id(value))
        return self.given.get(id(value)) if outside is None else outside()

    def restore(self) -> None:
        """Put back what was saved."""
        with torch.no_grad():
            for reference, content in self.saved.values():
                if (tensor := reference()) is not None:
                    put_back(tensor, content)
