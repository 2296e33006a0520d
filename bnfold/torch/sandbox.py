"""Run a module without leaving a trace: buffers, inputs, hooks, modes and random states are as they were."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.errors import UnreadableModel
from bnfold.exclusive import exclusive
from bnfold.torch.internals import passed_on
from bnfold.torch.tensors import Slot, leaves, put_back, walk
from bnfold.torch.tensors import held as held_tensors

__all__ = [
    "Snapshot",
    "arrange",
    "copied",
    "copy_module",
    "copy_structure",
    "first_line",
    "is_same",
    "restored",
    "undisturbed",
]


def copy_structure(model: nn.Module) -> nn.Module:
    """A copy of a module whose tensors are those of the module itself.

    Raises:
        UnreadableModel: something in it cannot be copied.
    """
    kept = {id(tensor): tensor for thing in _things(model) for _, tensor in leaves(thing)}
    try:
        return copy_module(model, kept)
    except Exception as error:
        raise UnreadableModel(f"the model cannot be copied: {first_line(error)}; try inplace=True") from error


def copy_module(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a module, in which some things are copied to what is said of them, by identity.

    As `copy.deepcopy` makes it, in a quarter of its time: what torch's own `nn.Module` holds is copied here, a dozen
    empty containers in each, and the rest by `deepcopy`.
    """
    modules = [module for _, module in walk(model) if _is_copied_plainly(module)]
    for module in modules:
        kind = type(module)
        memo[id(module)] = kind.__new__(kind)
    for module in reversed(modules):  # what one holds before itself, as its own `__setstate__` may ask that
        content = {
            name: thing if type(thing) in _PLAIN else _copy(thing, memo)
            for name, thing in vars(module).items()
        }
        if type(module).__setstate__ is nn.Module.__setstate__:
            vars(memo[id(module)]).update(content)
        else:
            memo[id(module)].__setstate__(content)
    return copy.deepcopy(model, memo)


def _copy(thing: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of what a module holds."""
    kind = type(thing)
    if kind is tuple and _is_flat(thing):
        return thing
    named = kind is dict and _PLAIN.issuperset(map(type, thing))
    if kind not in _COPIED or id(thing) in memo or not (named or _is_flat(thing)):
        return copy.deepcopy(thing, memo)
    made: Any = thing.copy() if thing else kind()
    memo[id(thing)] = made
    if named:
        made.update((name, copy.deepcopy(part, memo)) for name, part in thing.items())
    return made


def _is_flat(things: Collection[Any]) -> bool:
    """Whether nothing in a container holds anything itself."""
    return not things or (
        _PLAIN.issuperset(map(type, things))
        and (not isinstance(things, dict) or _PLAIN.issuperset(map(type, things.values())))
    )


def _is_copied_plainly(module: nn.Module) -> bool:
    """Whether a module is copied by copying what it holds, since it says nothing else of itself."""
    kind: Any = type(module)
    return "__deepcopy__" not in vars(module) and _is_plain(kind)


@cache
def _is_plain(kind: type) -> bool:
    ways = ("__getstate__", "__reduce__", "__reduce_ex__", "__new__")
    more = any(hasattr(kind, way) for way in ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__"))
    slots = any(vars(each).get("__slots__") for each in kind.__mro__)
    return not more and not slots and all(getattr(kind, way) is getattr(nn.Module, way) for way in ways)


def _things(model: nn.Module) -> Iterator[Any]:
    """What the modules hold that are not compiled, but for what holds nothing."""
    for _, module in walk(model):
        if not isinstance(module, torch.jit.ScriptModule):
            for thing in vars(module).values():
                if type(thing) not in _PLAIN and not (type(thing) in _FLAT and _is_flat(thing)):
                    yield thing


def first_line(error: BaseException) -> str:
    """The first line of what went wrong."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def arrange(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments.

    A tensor is the only argument, a dict holds keyword arguments, a tuple of a tuple (or list) and a dict holds both,
    any other tuple or list holds positional ones.
    """
    if isinstance(example_inputs, dict) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    if not isinstance(example_inputs, tuple | list):
        return (example_inputs,), {}
    if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and _is_keywords(example_inputs[1]):
        return tuple(example_inputs[0]), dict(example_inputs[1])
    return tuple(example_inputs), {}


def _is_keywords(thing: Any) -> bool:
    return isinstance(thing, dict) and all(isinstance(key, str) for key in thing)


@contextmanager
def undisturbed(seed: int | None = None) -> Iterator[_Draws]:
    """Leave every global random state as it was; nobody else runs a model meanwhile (see `exclusive`).

    Args:
        seed: of the numbers that are drawn. torch's global generators are seeded when an operation asks for the first
            number, so that what draws none leaves them to other threads.

    Yields:
        Who can say afterwards whether any were drawn.
    """
    with exclusive():
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
        state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 the model may use it
        draws = _Draws(seed)
        try:
            with draws:
                yield draws
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            if draws.seen or draws.is_seeded_anew():
                torch.set_rng_state(states[0])
                for device, one in zip(devices, states[1], strict=True):
                    torch.cuda.set_rng_state(one, device)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches whether this thread draws random numbers, and seeds the first, unless the model does that itself."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never: skipping it would import the compiler, which takes seconds."""
        return False

    def __init__(self, seed: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed, self.seen, self.before = seed, False, torch.initial_seed()
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 the model may use it
        self.states = _own_states()
        self.first: Tensor | None = None

    def has_drawn(self) -> bool:
        """Whether a global generator has given numbers, be it Python's or NumPy's."""
        drawn = self.first is not None and not torch.equal(self.first, torch.get_rng_state())
        return drawn or self.is_seeded_anew() or self.states != _own_states()

    def is_seeded_anew(self) -> bool:
        """Whether somebody has called `torch.manual_seed` or its like."""
        return torch.initial_seed() != self.before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.seen and torch.Tag.nondeterministic_seeded in function.tags:
            self.seen = True
            if self.seed is not None and not self.is_seeded_anew():
                torch.manual_seed(self.seed)
                self.before = torch.initial_seed()
            self.first = torch.get_rng_state()
        return passed_on(function, args, kwargs or {})


def _own_states() -> tuple[Any, ...]:
    """Where Python's and NumPy's generators are."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return random.getstate(), numpy_state["state"]["pos"], numpy_state["state"]["key"].tobytes()


class Snapshot:
    """What a module holds: every attribute, container and buffer, and with `whole` every number of a parameter.

    It serves for one pass after another, since each leaves the module as it was.
    """

    def __init__(self, model: nn.Module, whole: bool = False) -> None:
        self.model, modules = model, [module for _, module in walk(model)]
        self.memories = [(p, p.data) for p in model.parameters() if type(p) is nn.Parameter]
        self.attributes = [(vars(module), dict(vars(module))) for module in modules]
        held = [
            (name, thing)
            for _, attributes in self.attributes
            for name, thing in attributes.items()
            if isinstance(thing, (list, dict, set))
        ]
        self.empty = [(name, thing) for name, thing in held if type(thing) in _COPIED and not thing]
        filled = [(name, thing) for name, thing in held if type(thing) not in _COPIED or thing]
        self.filled = [(name, thing, _copied(thing)) for name, thing in filled]
        self.tensors = [(t, t.detach().clone()) for t in model.buffers() if not nn.parameter.is_lazy(t)]
        self.tensors += copied(tensor for tensor, _ in self.held) if whole else []

    @cached_property
    def held(self) -> list[tuple[Tensor, tuple[Slot, ...]]]:
        """Every tensor that the module holds, with the places (see `tensors.held`), asked for before a pass."""
        return list(held_tensors(self.model))

    def put_back(self, touched: list[str] | None = None) -> None:
        """Make it hold that again; the names of attributes that were others go to `touched`."""
        filled = [(name, thing, ()) for name, thing in self.empty if thing]
        containers = [*self.filled, *filled]
        if touched is not None:
            touched += (name for now, before in self.attributes for name in _changed(now, before))
            touched += (n for n, thing, content in containers if _identities(thing) != _identities(content))
        for now, before in self.attributes:
            _refill(now, before)
        for _, thing, content in containers:
            _refill(thing, content)
        for parameter, memory in self.memories:
            if parameter.data_ptr() != memory.data_ptr():
                parameter.data = memory
        with torch.no_grad():
            for tensor, content in self.tensors:
                if tensor.device.type != "meta" and not is_same(tensor, content):
                    put_back(tensor, content)


@contextmanager
def restored(
    model: nn.Module,
    whole: bool = False,
    touched: list[str] | None = None,
    snapshot: Snapshot | None = None,
) -> Iterator[Snapshot]:
    """Put back every attribute, container and buffer that a pass with real tensors changes.

    What is written into a parameter is put back with `whole`, which copies them all; one that is given another memory
    gets its own back in any case. The names of attributes that were changed go to `touched`. A `snapshot` that is there
    already is not taken again.
    """
    snapshot = snapshot or Snapshot(model, whole)
    try:
        yield snapshot
    finally:
        snapshot.put_back(touched)


def copied(tensors: Iterable[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    """Each tensor that has numbers of its own, with a copy of them."""
    plain = (t for t in tensors if t is not None and type(t) in (Tensor, nn.Parameter) and not t.is_nested)
    return [(t, t.detach().clone()) for t in plain if t.device.type != "meta" and t.layout is torch.strided]


def is_same(tensor: Tensor, content: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN among them."""
    if tensor.shape != content.shape or tensor.dtype != content.dtype:
        return False
    if tensor.layout is not torch.strided:
        tensor, content = tensor.to_dense(), content.to_dense()
    if torch.equal(tensor, content):
        return True
    return bool(((tensor == content) | ((tensor != tensor) & (content != content))).all())


def _refill(container: Any, content: Any) -> None:
    """Give a container its content back; one that has it is left alone, since another thread may be looking."""
    if not _holds_the_same(container, content):
        container.clear()
        container.extend(content) if isinstance(container, list) else container.update(content)


def _holds_the_same(mine: Any, theirs: Any) -> bool:
    """Whether two containers hold the same things, by identity and in order."""
    if len(mine) != len(theirs) or not all(map(is_, mine, theirs)):
        return False
    return not isinstance(mine, dict) or not mine or all(map(is_, mine.values(), theirs.values()))


def _changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """The attributes that are others than before."""
    if _holds_the_same(now, before):
        return []
    return [n for n in now.keys() | before.keys() if now.get(n, now) is not before.get(n, before)]


def _identities(container: Any) -> list[int]:
    return [id(thing) for thing in (container.values() if isinstance(container, dict) else container)]


def _copied(container: Any) -> Any:
    return container.copy() if type(container) in _COPIED else copy.copy(container)


_COPIED = (dict, list, set, OrderedDict)
"""Containers whose own `copy` makes one of their own kind, in a tenth of the time."""

_FLAT = (tuple, *_COPIED)

_PLAIN = frozenset({bool, int, float, str, type(None)})
"""What holds nothing."""
