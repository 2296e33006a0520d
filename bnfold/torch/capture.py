"""Record what one forward pass computes from what: every call, with the values that it read, made and changed.

Three modes look at the same pass, and each sees what the others cannot:

- a `TorchFunctionMode` sees the calls as the model writes them (`conv2d`, `batch_norm`, `cat`), which is what the
  table in `lower` speaks about, and follows any Python;
- a `TorchDispatchMode` sees every operation that reads or changes a tensor, so that nothing is read unseen by
  scripted code, custom autograd functions or kernels called from elsewhere: what happens outside a call of the first
  kind becomes a call of its own, and what happens inside one is added to what it read;
- `FakeTensorMode`, where it is asked for, computes shapes alone: right for what is too large to run, or has no
  numbers. A pass with real tensors takes a third of the time on common models (it costs a fake tensor 100 times what
  the arithmetic of a small image costs) and follows models that need numbers.

**Values.** A value is a tensor as it was when it was made. What is changed in place gets a new name; a tensor whose
memory was changed by way of another one (a view) is read by way of an opaque call that reads both. Values are held
weakly: what is still alive when the pass is over can be read by somebody, and counts as an output.

**Constants.** A call of a pure function on constants (parameters, buffers, numbers) makes a constant, which
`constants.evaluate` can compute again in float64.

**Branches.** Where a number that depends on the inputs leaves the tensors (`item`, `bool`, NumPy), the code that runs
after it might have been other code. From there on nothing is trusted that passes through a module whose own forward
was under way, nor any value that was alive: an opaque call "reads" it. What runs whole inside another module's
forward stays as it is.

Not covered: a branch on a shape is followed as the example goes.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.torch.functions import LIKE, METADATA, PURE, name_of

__all__ = ["Call", "Frame", "Like", "Listed", "Recording", "Slot", "Value", "leaves", "put_back", "record"]


@dataclass(frozen=True, slots=True)
class Like:
    """Stands in a call's arguments for a tensor of which only the shape and dtype are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Listed(tuple):  # type: ignore[type-arg]
    """Stands in a call's arguments for a list, which selects otherwise than a tuple."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place of a module that holds a tensor: `module` is its path, `kind` parameter, buffer or attribute."""

    module: str
    attribute: str
    kind: str

    @property
    def name(self) -> str:
        """As in a state dict."""
        return f"{self.module}.{self.attribute}" if self.module else self.attribute


@dataclass(eq=False, slots=True)
class Value:
    """A tensor as it was when it was made.

    Attributes:
        shape, dtype: of the tensor.
        call: who made it; None for an input, a slot, or a tensor from outside of what was recorded.
        slots: the places that hold it, for a parameter, buffer or attribute; its numbers are in `tensor`.
        constant: whether its numbers can be computed again from slots and numbers.
        data: whether its numbers may depend on the inputs.
        name: of a value that somebody computes or gives; unique.
        frame: the module call in whose own code it was made.
        memory: a number for the memory that it lies in; two values of one number may change together.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    call: Call | None = None
    slots: tuple[Slot, ...] = ()
    tensor: Tensor | None = None
    constant: bool = False
    data: bool = True
    name: str = ""
    frame: Frame | None = None
    memory: int = 0

    @property
    def rank(self) -> int:
        """How many axes it has."""
        return len(self.shape)


@dataclass(eq=False, slots=True)
class Frame:
    """One call of a module.

    Attributes:
        module: the module itself; None for the frame around the model.
        path: its qualified name, None where the model does not hold it.
        given, made: the values among its arguments and results.
        start, stop: the calls made while it ran.
        branches: whether a number left the tensors while it ran.
        plain: whether it was given one tensor and nothing else, and returned one tensor.
    """

    module: nn.Module | None
    path: str | None
    parent: Frame | None
    start: int = 0
    stop: int = 0
    given: tuple[Value, ...] = ()
    made: tuple[Value, ...] = ()
    branches: bool = False
    plain: bool = False

    def line(self) -> Iterator[Frame]:
        """This frame and those around it, from the inside."""
        frame: Frame | None = self
        while frame is not None:
            yield frame
            frame = frame.parent


@dataclass(eq=False, slots=True)
class Call:
    """One call: `args` and `kwargs` with `Value` in the place of each tensor.

    Attributes:
        function: what was called; a string for what is no function ("If", "Hook", "Alias").
        reads: every value that it read, each once.
        made: the values of the tensors that it returned, in order.
        changed: pairs of values, before and after, of what it changed in place.
        written: stand for the memory that it changed, where somebody reads that by way of another tensor.
        frame: the module call in whose code it stands.
    """

    index: int
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frame: Frame
    reads: dict[int, Value] = field(default_factory=dict)
    made: list[Value] = field(default_factory=list)
    changed: list[tuple[Value, Value]] = field(default_factory=list)
    written: list[Value] = field(default_factory=list)
    constant: bool = False

    @property
    def label(self) -> str:
        """What was called, in one word."""
        return name_of(self.function)


@dataclass(eq=False)
class Recording:
    """One forward pass.

    Attributes:
        calls: in order.
        frames: module calls, in the order in which they ended (inner ones first).
        inputs: the values that the caller gave, by path.
        outputs: the values that the caller gets, by path, or that stayed alive.
        slots: every tensor that the model holds, by identity.
        changed_slots: tensors of the model that the pass changed in place, by identity.
        borrowed: `(module path, attribute)` of tensors that were fetched from outside of their module's own call.
        fake: whether it ran without numbers.
        branches: whether numbers that depend on the inputs left the tensors.
        unsteady: what was known before of code that does not always run alike.
    """

    calls: list[Call]
    frames: list[Frame]
    inputs: dict[str, Value]
    outputs: dict[str, Value]
    slots: dict[int, Value]
    changed_slots: set[int]
    borrowed: dict[tuple[str, str], str]
    fake: bool
    branches: bool
    unsteady: frozenset[str] = frozenset()


def put_back(tensor: Tensor, content: Tensor) -> None:
    """Give a tensor its earlier numbers, or its earlier memory where it lies in another one."""
    if tensor.shape == content.shape and tensor.dtype == content.dtype:
        tensor.copy_(content)
    else:
        tensor.data = content


def leaves(thing: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, lists, dicts, dataclasses and objects, with a path to each."""
    seen = set() if seen is None else seen
    if isinstance(thing, Tensor):
        yield path, thing
        return
    if (
        thing is None
        or isinstance(thing, str | bytes | int | float | complex | type | nn.Module)
        or id(thing) in seen
    ):
        return
    seen.add(id(thing))
    for key, part in _parts(thing):
        yield from leaves(part, f"{path}.{key}" if path else str(key), seen)


def _parts(thing: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(thing, dict):
        return list(thing.items())
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return list(zip(thing._fields, thing, strict=True))
    if isinstance(thing, list | tuple | set | frozenset):
        return list(enumerate(thing))
    if is_dataclass(thing) and not isinstance(thing, type):
        return [(f.name, getattr(thing, f.name, None)) for f in fields(thing)]
    return list(getattr(thing, "__dict__", {}).items())


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


class _Recorder:
    """The state of one recording."""

    def __init__(self, model: nn.Module, fake: Any, unsteady: frozenset[str]) -> None:
        self.fake, self.unsteady = fake, unsteady
        self.calls: list[Call] = []
        self.frames: list[Frame] = []
        self.entries: dict[int, _Entry] = {}
        self.stores: dict[int, _Store] = {}
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.slots = {id(value.tensor): value for value in slot_values(model)}
        self.changed_slots: set[int] = set()
        self.given: dict[int, Tensor] = {}
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}
        self.borrowed: dict[tuple[str, str], str] = {}
        self.frame = self.root = Frame(None, None, None)
        self.current: Call | None = None
        self.pending: list[Tensor] = []
        self.leaks = False
        self.hidden = 0
        self.count = 0
        for value in self.slots.values():
            assert value.tensor is not None
            self.enter(value.tensor, value)

    # -- values

    def enter(self, tensor: Tensor, value: Value) -> Value:
        """Note which value a tensor is from now on."""
        store = self.store(tensor)
        generation = 0
        if store is not None:
            store.values.append(value)
            generation, value.memory = store.generation, store.number
        self.entries[id(tensor)] = _Entry(weakref.ref(tensor), value, store, generation)
        return value

    def store(self, tensor: Tensor) -> _Store | None:
        """The memory that a tensor lies in; None where it has none of its own to show (sparse, wrapped)."""
        try:
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        except (RuntimeError, NotImplementedError, AttributeError):
            return None
        return self.stores.setdefault(reference.cdata, _Store(reference, len(self.stores) + 1))

    def save(self, tensor: Tensor) -> None:
        """Keep the numbers of every parameter, buffer and input that lies in a memory about to be changed."""
        store = self.store(tensor)
        for value in store.values if store is not None and self.fake is None else ():
            held = value.tensor if value.slots else self.given.get(id(value))
            if held is not None and id(held) not in self.saved:
                self.saved[id(held)] = held, held.detach().clone()

    def restore(self) -> None:
        """Put back what was saved."""
        with torch.no_grad():
            for tensor, content in self.saved.values():
                put_back(tensor, content)

    def known(self, tensor: Tensor) -> _Entry | None:
        entry = self.entries.get(id(tensor))
        return entry if entry is not None and entry.tensor() is tensor else None

    def value(self, tensor: Tensor) -> Value:
        """The value that a tensor is now; an opaque call makes it where that was not seen."""
        entry = self.known(tensor)
        if entry is not None and (entry.store is None or entry.generation == entry.store.generation):
            return self._slot_now(entry.value)
        if entry is not None and entry.store is not None:
            return self._opaque("Alias", tensor, [entry.value, *entry.store.values])
        store = self.store(tensor)
        if store is not None and store.values:
            return self._opaque("Alias", tensor, store.values)
        return self._opaque("Outside", tensor, [])

    def _slot_now(self, value: Value) -> Value:
        if value.constant and value.tensor is not None and id(value.tensor) in self.changed_slots:
            value.constant = False
        return value

    def _opaque(self, label: str, tensor: Tensor, reads: Iterable[Value]) -> Value:
        call = self.begin(label, (), {})
        call.reads = {id(value): value for value in reads}
        value = self.new(tensor, call, constant=False, data=label == "Outside" or any(v.data for v in reads))
        self.calls.append(call)
        return value

    def new(self, tensor: Tensor, call: Call | None, constant: bool, data: bool) -> Value:
        """A new value for a tensor, made by a call."""
        self.count += 1
        shape = tuple(int(size) for size in tensor.shape)
        value = Value(
            shape, tensor.dtype, call, constant=constant, data=data, name=f"v{self.count}", frame=self.frame
        )
        if call is not None:
            call.made.append(value)
        return self.enter(tensor, value)

    # -- calls

    def begin(self, function: Any, args: Any, kwargs: Any) -> Call:
        call = Call(0, function, (), {}, self.frame)
        place = LIKE.get(function) if isinstance(args, tuple) else None
        if place is not None and len(args) > place and isinstance(args[place], Tensor):
            like = Like(tuple(args[place].shape), args[place].dtype)
            args = (*args[:place], like, *args[place + 1 :])
        call.args, call.kwargs = self.freeze(args, call), self.freeze(kwargs, call)
        return call

    def freeze(self, thing: Any, call: Call) -> Any:
        """The same arguments with values in the place of tensors, which are noted as read."""
        if isinstance(thing, Tensor):
            value = self.value(thing)
            self.read(call, value)
            return value
        if isinstance(thing, slice):
            return slice(*(self.freeze(part, call) for part in (thing.start, thing.stop, thing.step)))
        if isinstance(thing, list | tuple):
            return (Listed if isinstance(thing, list) else tuple)(self.freeze(part, call) for part in thing)
        if isinstance(thing, dict):
            return {key: self.freeze(part, call) for key, part in thing.items()}
        if not isinstance(
            thing, str | int | float | bool | complex | torch.dtype | torch.device | Like | type(None)
        ):
            for _, tensor in leaves(thing):
                self.read(call, self.value(tensor))
        return thing

    def read(self, call: Call, value: Value) -> None:
        """Note that a call reads a value; a value that passes through a branching forward is read by that, too."""
        call.reads[id(value)] = value
        if value.slots or value.frame is None or not value.data:
            return
        mine = {id(frame): frame for frame in call.frame.line()}
        meeting = next(frame for frame in value.frame.line() if id(frame) in mine)
        if meeting.branches:
            self.observe("If", [value], meeting)

    def observe(self, label: str, values: Iterable[Value], frame: Frame) -> None:
        """An opaque call that reads some values and makes none."""
        reads = {id(value): value for value in values if not value.slots}
        if reads:
            self.calls.append(Call(len(self.calls), label, (), {}, frame, reads))

    def branch(self) -> None:
        """A number has left the tensors: whatever is alive may be read by code that did not run."""
        for frame in self.frame.line():
            frame.branches = True
        alive = [e.value for e in self.entries.values() if e.tensor() is not None and e.value.data]
        self.observe("If", alive, self.frame)

    def finish(self, call: Call, result: Any) -> None:
        """Note what a call returned and changed."""
        call.index = len(self.calls)
        self.calls.append(call)
        reads = list(call.reads.values())
        pure = call.function in PURE and not self.pending
        call.constant = pure and all(value.constant for value in reads)
        data = any(value.data for value in reads)
        changed, self.pending = self.pending, []
        before = [(tensor, entry.value) for tensor in changed if (entry := self.known(tensor)) is not None]
        for tensor in changed:
            self._change(tensor, call, data)
        for tensor, old in before:
            if not old.slots:
                call.changed.append((old, self.new(tensor, call, False, data or old.data)))
        found = 0
        for tensor in _returned(result):
            found += 1
            entry = self.known(tensor)
            if entry is not None and (entry.value.slots or entry.value in call.made):
                if entry.value not in call.made:
                    call.made.append(entry.value)
                continue
            self.new(tensor, call, call.constant, data)
        if data and (self.leaks or (not found and result is not None)):
            self.branch()
        self.leaks = False

    def _change(self, tensor: Tensor, call: Call, data: bool) -> None:
        """Everything that lies in this memory has changed, by what the call has read."""
        store = self.store(tensor)
        if store is None or not store.values:
            return
        store.generation += 1
        self.count += 1
        written = Value(
            tuple(tensor.shape), tensor.dtype, call, data=data, name=f"v{self.count}", frame=self.frame
        )
        written.memory = store.number
        call.written.append(written)
        for value in store.values:
            if value.slots and value.tensor is not None:
                self.changed_slots.add(id(value.tensor))
        store.values.append(written)

    # -- module calls

    def run_module(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module, as a frame."""
        if self.current is not None or self.hidden:
            return call(module, *args, **kwargs)
        frame = Frame(module, self.paths.get(id(module)), self.frame, len(self.calls))
        frame.branches = frame.path in self.unsteady
        with _unseen(self):
            frame.given = tuple(self.value(tensor) for _, tensor in leaves((args, kwargs)))
            frame.start = len(self.calls)
        before, self.frame = self.frame, frame
        try:
            if isinstance(module, torch.jit.ScriptModule):
                result = self._run_whole(call, module, args, kwargs)
            else:
                result = call(module, *args, **kwargs)
        except BaseException as error:
            vars(error).setdefault("bnfold_frame", frame.path or "")
            raise
        finally:
            self.frame = before
        frame.stop = len(self.calls)
        with _unseen(self):
            frame.made = tuple(self.value(tensor) for _, tensor in leaves(result))
        frame.plain = isinstance(result, Tensor) and len(frame.given) == len(args) + len(kwargs) == 1
        self.frames.append(frame)
        if observed := _observers(module):
            values = [*frame.given, *(frame.made if observed == "hook" else ())]
            self.observe("Hook", values, frame)
        return result

    def _run_whole(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run compiled code as one opaque call that reads everything it is given and holds."""
        one = self.begin("ScriptModule", args, kwargs)
        for tensor in (*module.parameters(), *module.buffers()):
            if (entry := self.known(tensor)) is not None:
                one.reads[id(entry.value)] = entry.value
        self.current, self.hidden = one, self.hidden + 1
        try:
            result = call(module, *args, **kwargs)
        finally:
            self.current, self.hidden = None, self.hidden - 1
        self.finish(one, result)
        return result

    def fetch(self, module: nn.Module, attribute: str) -> None:
        """Note that code of another module fetches a tensor of this one."""
        path = self.paths.get(id(module))
        if path is None or all(frame.module is not module for frame in self.frame.line()):
            self.borrowed.setdefault((path or "", attribute), self.frame.path or "")


def _returned(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _returned(part)
    elif isinstance(result, dict):
        yield from _returned(list(result.values()))


def _observers(module: nn.Module) -> str:
    """Whether somebody looks at what goes through a module: its hooks, or those on every module."""
    everywhere = torch.nn.modules.module
    if module._forward_hooks or everywhere._global_forward_hooks:
        return "hook"
    known = {id(hook) for hook in module._forward_pre_hooks.values() if computes_weight(hook)}
    if len(known) < len(module._forward_pre_hooks) or everywhere._global_forward_pre_hooks:
        return "pre-hook"
    return ""


def computes_weight(hook: Any) -> bool:
    """Whether a pre-hook is one of torch's that only compute the module's weight."""
    return type(hook).__module__ in _WEIGHT_HOOKS or isinstance(hook, prune.BasePruningMethod)


_WEIGHT_HOOKS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")


def slot_values(model: nn.Module) -> Iterator[Value]:
    """Every tensor that the model's modules hold, with all the places that hold it."""
    places: dict[int, tuple[Tensor, list[Slot]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for kind, found in (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("attribute", vars(module)),
        ):
            for attribute, tensor in list(found.items()):
                if isinstance(tensor, Tensor):
                    places.setdefault(id(tensor), (tensor, []))[1].append(Slot(path, attribute, kind))
    for tensor, slots in places.values():
        value = Value(
            tuple(tensor.shape), tensor.dtype, None, tuple(slots), tensor, constant=True, data=False
        )
        value.name = slots[0].name
        yield value


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, kwargs = self.recorder, kwargs or {}
        if recorder.current is not None or recorder.hidden or function in METADATA:
            return function(*args, **kwargs)
        if function is Tensor.__iter__:
            return iter(self.__torch_function__(torch.unbind, types, (args[0], 0)))
        with _unseen(recorder):
            call = recorder.begin(function, args, kwargs)
        recorder.current = call
        try:
            result = function(*args, **kwargs)
        finally:
            recorder.current = None
        with _unseen(recorder):
            recorder.finish(call, result)
        return result


class _Dispatches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never: skipping it would import the compiler, which takes seconds."""
        return False

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, kwargs = self.recorder, kwargs or {}
        if function is torch.ops.prim.device.default or (recorder.hidden and recorder.current is None):
            return function(*args, **kwargs)
        outer = recorder.current
        with _unseen(recorder):
            call = recorder.begin(function, args, kwargs) if outer is None else outer
            if outer is not None:
                self._read_more(outer, args, kwargs)
            changed = [
                tensor for tensor in _written(function, args, kwargs) if recorder.store(tensor) is not None
            ]
            for tensor in changed:
                recorder.save(tensor)
        recorder.leaks |= _tells(function, args)
        recorder.current = call
        try:
            result = self._run(function, args, kwargs, changed)
        finally:
            recorder.current = outer
        recorder.pending += [tensor for tensor in changed if not _among(tensor, recorder.pending)]
        if outer is None:
            with _unseen(recorder):
                recorder.finish(call, result)
        return result

    def _read_more(self, call: Call, args: Any, kwargs: Any) -> None:
        if LIKE.get(call.function) == 0:
            return
        for _, tensor in leaves((args, kwargs)):
            entry = self.recorder.known(tensor)
            if entry is not None and id(entry.value) not in call.reads:
                self.recorder.read(call, entry.value)

    def _run(self, function: Any, args: Any, kwargs: Any, changed: list[Tensor]) -> Any:
        """Run one operation; what it changes of the model itself is changed in a copy."""
        fake = self.recorder.fake
        real = [tensor for tensor in changed if fake is not None and not _is_fake(tensor)]
        if not real:
            return function(*args, **kwargs)

        def swap(one: Tensor) -> Any:
            return fake.from_tensor(one) if _among(one, real) else one

        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, swap, (args, kwargs))
        return function(*args, **kwargs)


def _tells(function: Any, args: Any) -> bool:
    """Whether an operation gives away numbers, as a number or in the shape of its result."""
    if torch.Tag.data_dependent_output in function.tags:
        return True
    masks = (tensor for _, tensor in leaves(args[1:]) if tensor.dtype in (torch.bool, torch.uint8))
    indexing = function.overloadpacket is torch.ops.aten.index
    return torch.Tag.dynamic_output_shape in function.tags and (not indexing or any(True for _ in masks))


def _among(tensor: Any, tensors: Iterable[Tensor]) -> bool:
    return any(tensor is other for other in tensors)


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses import FakeTensor

    return isinstance(tensor, FakeTensor)


def _written(function: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors among the arguments that an operation changes, by its schema."""
    schema = function._schema
    if not schema.is_mutable:
        return
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from _returned(given)


@contextmanager
def _unseen(recorder: _Recorder) -> Iterator[None]:
    """Look at tensors without recording that."""
    recorder.hidden += 1
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        recorder.hidden -= 1


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fake: bool = False,
    unsteady: frozenset[str] = frozenset(),
    lasting: bool = False,
) -> Recording:
    """Run a model once and record it. The model is run as it is: give a copy where that must not be touched.

    Args:
        args, kwargs: what its forward is given.
        fake: compute shapes alone.
        unsteady: paths of modules whose own code is known to run otherwise at other times; taken for branches.
        lasting: leave what it changes in tensors as it is.

    Raises:
        Exception: whatever the model raises, with `bnfold_frame` set to the path of the module in whose code it was.
    """
    from torch._subclasses import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    if mode is not None:
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
    recorder = _Recorder(model, mode, unsteady)
    inputs = {}
    given = dict(leaves((args, kwargs) if kwargs else args))
    for path, tensor in given.items():
        path = path if len(given) > 1 else ""
        value = recorder.known(tensor)
        inputs[path] = value.value if value is not None else _enter_input(recorder, path, tensor)
    with ExitStack() as stack:
        if not lasting:
            stack.callback(recorder.restore)
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_followed(recorder))
        if mode is not None:
            stack.enter_context(mode)
        stack.enter_context(_Dispatches(recorder))
        stack.enter_context(_Functions(recorder))
        result = model(*args, **kwargs)
    outputs = {path: recorder.value(tensor) for path, tensor in leaves(result)}
    _add_survivors(recorder, outputs, set(_computed_weights(model)))
    return Recording(
        recorder.calls,
        recorder.frames,
        inputs,
        outputs,
        recorder.slots,
        recorder.changed_slots,
        recorder.borrowed,
        fake,
        recorder.root.branches,
        unsteady,
    )


def _enter_input(recorder: _Recorder, path: str, tensor: Tensor) -> Value:
    value = Value(tuple(tensor.shape), tensor.dtype, name=f"input {path}" if path else "input")
    value.frame = recorder.root
    recorder.given[id(value)] = tensor
    return recorder.enter(tensor, value)


def _computed_weights(model: nn.Module) -> Iterator[int]:
    """The weights that torch's hooks leave on a module, where nobody but the module's next call looks."""
    for module in model.modules():
        if any(computes_weight(hook) for hook in module._forward_pre_hooks.values()):
            yield from (id(tensor) for tensor in vars(module).values() if isinstance(tensor, Tensor))


def _add_survivors(recorder: _Recorder, outputs: dict[str, Value], ignored: set[int]) -> None:
    """Whatever is still alive when the pass is over may be read: in a cache, in an object that was returned."""
    known = {id(value) for value in outputs.values()}

    def alive() -> list[_Entry]:
        living = (e for e in recorder.entries.values() if e.value.call is not None and e.tensor() is not None)
        values = (e for e in living if id(e.tensor()) not in ignored)
        return [entry for entry in values if id(entry.value) not in known]

    if alive():
        gc.collect()
    unheld = _unheld([entry.tensor() for entry in alive()], [e.tensor() for e in recorder.entries.values()])
    kept = [entry.value for entry in alive() if id(entry.tensor()) not in unheld]
    outputs.update({f"kept alive {value.name}": value for value in kept})


def _unheld(kept: list[Tensor | None], alive: list[Tensor | None]) -> set[int]:
    """Those of the kept tensors that no Python code holds: they live on as what another tensor is a view of."""
    viewed = {id(tensor._base) for tensor in alive if tensor is not None}
    tensors = [tensor for tensor in kept if tensor is not None and id(tensor) in viewed]
    found = gc.get_referrers(*tensors) if tensors else ()
    mine = {id(kept), id(alive), id(tensors)}
    holders = [holder for holder in found if id(holder) not in mine and not isinstance(holder, FrameType)]
    held = {id(thing) for holder in holders for thing in gc.get_referents(holder)}
    return {id(tensor) for tensor in tensors} - held


@contextmanager
def _followed(recorder: _Recorder) -> Iterator[None]:
    """Let every module call, and every fetch of a tensor from a module, pass by the recorder."""
    call, fetch = nn.Module.__call__, nn.Module.__getattr__

    def follow(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.run_module(call, module, args, kwargs)

    def look(module: nn.Module, attribute: str) -> Any:
        found = fetch(module, attribute)
        if isinstance(found, Tensor):
            recorder.fetch(module, attribute)
        return found

    nn.Module.__call__, nn.Module.__getattr__ = follow, look  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = call, fetch  # type: ignore[method-assign]
