"""Run a module without leaving a trace: buffers, inputs, hooks, modes and random states are as they were."""

from __future__ import annotations

import copy
import logging
import random
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.errors import UnreadableModel
from bnfold.exclusive import exclusive
from bnfold.torch.capture import Differentiates, capture
from bnfold.torch.tensors import held, leaves, put_back
from bnfold.torch.trace import Trace

__all__ = [
    "arrange",
    "copied",
    "copy_structure",
    "empty_containers",
    "first_line",
    "is_meta",
    "is_same",
    "quiet",
    "record_pass",
    "record_shapes",
    "record_somehow",
    "restored",
    "undisturbed",
    "unreadable",
]


def copy_structure(model: nn.Module) -> nn.Module:
    """A copy of a module whose tensors are those of the module itself.

    Raises:
        UnreadableModel: something in it cannot be copied.
    """
    memo = empty_containers(model)
    for thing in _things(model):
        if id(thing) not in memo and type(thing) not in _PLAIN:
            memo.update((id(tensor), tensor) for _, tensor in leaves(thing))
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise UnreadableModel(f"the model cannot be copied: {first_line(error)}; try inplace=True") from error


def empty_containers(model: nn.Module) -> dict[int, Any]:
    """New ones for those that modules hold, by identity of the old ones: a dozen of each module's, for its hooks."""
    return {id(thing): type(thing)() for thing in _things(model) if type(thing) in _COPIED and not thing}


def _things(model: nn.Module) -> Iterator[Any]:
    """What the modules hold that are not compiled."""
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield from vars(module).values()


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
        return function(*args, **(kwargs or {}))


def _own_states() -> tuple[Any, ...]:
    """Where Python's and NumPy's generators are."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return random.getstate(), numpy_state["state"]["pos"], numpy_state["state"]["key"].tobytes()


@contextmanager
def restored(model: nn.Module, whole: bool = False, touched: list[str] | None = None) -> Iterator[None]:
    """Put back every attribute, container and buffer that a pass with real tensors changes.

    What is written into a parameter is put back with `whole`, which copies them all; one that is given another memory
    gets its own back in any case. The names of attributes that were changed go to `touched`.
    """
    memories = [(p, p.data) for p in model.parameters() if type(p) is nn.Parameter]
    kept = [(module, dict(vars(module)), _containers(vars(module))) for module in model.modules()]
    tensors = [
        (tensor, tensor.detach().clone()) for tensor in model.buffers() if not nn.parameter.is_lazy(tensor)
    ]
    tensors += copied(tensor for tensor, _ in held(model)) if whole else []
    try:
        yield
    finally:
        for module, attributes, containers in kept:
            if touched is not None:
                touched += _touched(vars(module), attributes, containers)
            _refill(vars(module), attributes)
            for name, content in containers.items():
                if content or attributes[name]:
                    _refill(attributes[name], content)
        for parameter, memory in memories:
            if parameter.data_ptr() != memory.data_ptr():
                parameter.data = memory
        with torch.no_grad():
            for tensor, content in tensors:
                if tensor.device.type != "meta" and not is_same(tensor, content):
                    put_back(tensor, content)


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


def _touched(now: Mapping[str, Any], before: Mapping[str, Any], containers: Mapping[str, Any]) -> list[str]:
    """The attributes that are others than before, or hold other things."""
    names = [
        name for name in now.keys() | before.keys() if now.get(name, now) is not before.get(name, before)
    ]
    held = ((name, before[name], content) for name, content in containers.items())
    return names + [
        name
        for name, mine, content in held
        if (mine or content) and _identities(mine) != _identities(content)
    ]


def _identities(container: Any) -> list[int]:
    return [id(thing) for thing in (container.values() if isinstance(container, dict) else container)]


def _containers(attributes: Mapping[str, Any]) -> dict[str, Any]:
    held = ((name, thing) for name, thing in attributes.items() if isinstance(thing, (list, dict, set)))
    return {name: _copied(thing) for name, thing in held}


def _copied(container: Any) -> Any:
    if type(container) not in _COPIED:
        return copy.copy(container)
    return container.copy() if container else _EMPTY


_EMPTY: tuple[Any, ...] = ()
"""What stands for the content of an empty container, of which each module has a dozen."""


_COPIED = (dict, list, set, OrderedDict)
"""Containers whose own `copy` makes one of their own kind, in a tenth of the time."""

_PLAIN = frozenset({bool, int, float, str, type(None)})
"""What holds nothing."""


def record_pass(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fake: bool,
    nondeterministic: frozenset[str] = frozenset(),
    touched: list[str] | None = None,
    seed: int = 0,
) -> Trace:
    """Record one pass of a model as it is, on real or on fake tensors; another one where it differentiates.

    Its random state is one that a number stands for.
    """

    def run(differentiates: bool) -> Trace:
        with undisturbed(seed) as draws, restored(model, touched=touched), quiet():
            trace = capture(model, args, kwargs, fake, nondeterministic, differentiates=differentiates)
            trace.draws = draws.has_drawn()
            return trace

    with suppress(Differentiates):
        return run(differentiates=False)
    return run(differentiates=True)


def record_somehow(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], touched: list[str]
) -> Trace:
    """Record with real tensors; with shapes alone where there are no numbers, or no memory or kernel for them.

    Fake tensors are not the first choice: they take longer, and what a model caches outside of its modules (in an
    `lru_cache`, say) would be poisoned with them.
    """
    if is_meta(model, args, kwargs):
        try:
            return record_pass(model, args, kwargs, True, touched=touched)
        except Exception as error:
            raise unreadable(model, error) from error
    try:
        return record_pass(model, args, kwargs, False, touched=touched)
    except (NotImplementedError, torch.OutOfMemoryError) as error:
        return record_shapes(model, args, kwargs, error, touched)
    except Exception as error:
        if "not implemented" in str(error):
            return record_shapes(model, args, kwargs, error, touched)
        raise unreadable(model, error) from error


def record_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception, touched: list[str]
) -> Trace:
    """Record what cannot be run here; where that fails as well, the first problem is the one to report."""
    try:
        return record_pass(model, args, kwargs, True, touched=touched)
    except Exception:  # noqa: BLE001
        raise unreadable(model, error) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging what a fake tensor cannot do."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def is_meta(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a tensor has no numbers."""
    tensors = (*model.parameters(), *model.buffers(), *(tensor for _, tensor in leaves((args, kwargs))))
    return any(tensor.device.type == "meta" for tensor in tensors)


def unreadable(model: nn.Module, error: BaseException) -> UnreadableModel:
    """What went wrong, by the name of the module in which it did."""
    where = getattr(error, "bnfold_frame", "")
    place = f"`{where}`" if where else f"`{type(model).__name__}`"
    if operator := re.search(r"HigherOrderOperator (\w+)", str(error)):
        return UnreadableModel(
            f"{place} calls torch.{operator[1]}, which cannot be followed; use Python's own control flow"
        )
    return UnreadableModel(
        f"{place} could not be run on the example inputs: {type(error).__name__}: {first_line(error)}"
    )
