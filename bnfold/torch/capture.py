"""Capture what one forward pass computes from what: every operator, with the values that it read, made and changed.

The model is run, and a `TorchDispatchMode` below autograd sees every operator that reads or changes a tensor, whoever
calls it: Python, scripted code, custom autograd functions. There, `conv2d` and `batch_norm` are still whole, and a
parameter is the object that the model holds. A composite operator that `lower` has a lowering for (or that is kept for
its tail or its name) is one call; another one is captured as its parts.

A `TorchFunctionMode` beside it watches for what no operator shows: what reads or changes memory by itself (`numpy`,
`tolist`, `x.data = y`), and a model that differentiates. That cannot be done below autograd: `Differentiates` asks for
another pass, in which autograd takes composite operators apart while gradients are on, and their parts are captured.

`FakeTensorMode`, where it is asked for, computes shapes alone: right for what is too large to run, or has no numbers. A
pass with real tensors takes a third of the time on common models (it costs a fake tensor 100 times what the arithmetic
of a small image costs) and follows models that need numbers.

**Branches.** Where a number that depends on the inputs leaves the tensors (`item`, `bool`, NumPy), the code that runs
after it might have been other code. So it might once somebody asks for a size that depends on numbers (of what a mask
or `nonzero` selects); what is computed from such a tensor meanwhile is drawn as what nothing travels through. From a
branch on nothing is trusted that passes through a module whose own forward was under way, nor any value that was alive:
an opaque call "reads" it. What runs whole inside another module's forward stays as it is.

**Without numbers.** A pass of which the calls alone count can leave out what costly operators compute (`hollow`). What
comes of it rests on no number: where one is asked for, be it by the model, a size, an error, a hook or another thread,
`NeedsNumbers` asks for another pass. What the pass writes into tensors from before it is put back, whoever holds them.

**Autocast** casts what an operator reads. That is taken for a part of the operator: the cast tensor is the same value.

Not covered: a branch on a shape is followed as the example goes; higher-order operators (`torch.cond`) raise; what a
model's code assigns to global names, and to what they hold, stays, be it a number or a tensor without any.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import Thread, get_ident
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.torch.aten import (
    depends_on_numbers,
    gives_number,
    is_composite,
    is_metadata,
    is_pure,
    is_view,
    makes_list,
    makes_whole,
    name_of,
    reads_shape,
    sized_axes,
    written,
)
from bnfold.torch.hollow import HOLLOW, hollow
from bnfold.torch.internals import (
    BelowAutograd,
    autocast_devices,
    is_fake,
    make_fake_mode,
    with_autocast,
    without_functions,
)
from bnfold.torch.lower import LOWERINGS
from bnfold.torch.memory import Memory
from bnfold.torch.modules import TAILS
from bnfold.torch.tensors import Slot, held, leaves, returned, walk, words
from bnfold.torch.trace import Call, Frame, Like, Trace, Value

__all__ = ["KEPT", "Differentiates", "NeedsNumbers", "capture", "computes_weight"]

_WHOLE = {"lstm", "gru", "rnn_tanh", "rnn_relu", "layer_norm", "group_norm", "scaled_dot_product_attention"}
_BY_SIZE = {"einsum", "tensordot"}
KEPT = frozenset({*LOWERINGS, *TAILS, *_WHOLE, *_BY_SIZE})
"""Composite operators that are captured as one call: with a lowering or a stand-in for a tail, better known by their
name than by their parts, or of other parts where a size is 1."""


class Differentiates(BaseException):
    """The model differentiates by itself; no error, so that its code does not catch it."""


class NeedsNumbers(BaseException):
    """Something depends on a number that was not computed; no error, so that the model's code does not catch it."""


_SIZING = (nn.LSTM, nn.GRU, nn.RNN)
"""Modules that take a number out of a tensor (how many sequences are packed) for a size alone."""


@dataclass(eq=False, slots=True)
class _Sealed:
    """A call whose operators are its own business, but for what they read and change: compiled code."""

    call: Call
    changed: list[Tensor]
    told: bool = False


_ATOMS = frozenset({int, float, bool, str, type(None)})


class _Calls:
    """The calls of one pass, and the frame of the module in whose code it is."""

    def __init__(self, memory: Memory, numbers: bool = True) -> None:
        self.memory, self.numbers = memory, numbers
        self.asked = self.unset = self.lacking = self.branches = False
        self.believed: BaseException | None = None
        self.list: list[Call] = []
        self.frame = self.root = Frame(None, None, None)
        self.sealed: _Sealed | None = None
        self.unseen = False
        self.measured: dict[str, list[Frame]] = {}

    # -- values

    def value(self, tensor: Tensor) -> Value:
        """The value that a tensor is now; an opaque call makes it where that was not seen."""
        if (value := self.memory.now(tensor)) is not None:
            return value
        reads = {id(value): value for value in self.memory.beneath(tensor)}
        call = Call(len(self.list), "Alias" if reads else "Outside", (), {}, self.frame, reads)
        self.list.append(call)
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
            self.list.append(Call(len(self.list), label, (), {}, frame, reads))

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
        call.index = len(self.list)
        self.list.append(call)
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
        sealed = self.sealed = _Sealed(call, list(changed))
        try:
            result = run()
        finally:
            self.sealed = None
        with self.looking():
            self.finish(call, result, sealed.changed, sealed.told)
        return result


class _Modules:
    """The module calls of one pass."""

    def __init__(self, model: nn.Module, calls: _Calls, nondeterministic: frozenset[str]) -> None:
        self.calls, self.nondeterministic = calls, nondeterministic
        self.paths = {id(module): path for path, module in walk(model)}
        self.frames: list[Frame] = []
        self.escaped: dict[tuple[str, str], str] = {}

    def run(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module, as a frame."""
        calls = self.calls
        if calls.sealed is not None or calls.unseen:
            return call(module, *args, **kwargs)
        frame = Frame(module, self.paths.get(id(module)), calls.frame)
        frame.data_dependent = frame.path in self.nondeterministic
        calls.branches |= frame.data_dependent
        frame.given = calls.look(args[0] if len(args) == 1 and not kwargs else (args, kwargs))
        if _observers(module):
            calls.reveal()
        frame.start = len(calls.list)
        calls.frame = frame
        try:
            result = self._run(call, module, args, kwargs)
        except BaseException as error:
            vars(error).setdefault("bnfold_frame", frame.path or "")
            raise
        finally:
            calls.frame = frame.parent or calls.root
        frame.stop = len(calls.list)
        frame.made = calls.look(result)
        frame.plain = isinstance(result, Tensor) and len(frame.given) == len(args) + len(kwargs) == 1
        self.frames.append(frame)
        if observed := _observers(module):
            calls.observe("Hook", [*frame.given, *(frame.made if observed == "hook" else ())], frame)
        return result

    def _run(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module; compiled code as one opaque call that reads everything it is given and holds."""
        if not isinstance(module, torch.jit.ScriptModule):
            return call(module, *args, **kwargs)
        held = (*module.parameters(), *module.buffers())
        reads = [tensor for _, tensor in leaves((args, kwargs))]
        reads += [tensor for tensor in held if self.calls.memory.noted(tensor) is not None]
        return self.calls.seal("ScriptModule", lambda: call(module, *args, **kwargs), reads)

    def fetch(self, module: nn.Module, attribute: str) -> None:
        """Note that code of another module fetches a tensor of this one."""
        path, frame = self.paths.get(id(module)), self.calls.frame
        if path is None or all(each.module is not module for each in frame.line()):
            self.escaped.setdefault((path or "", attribute), frame.path or "")

    def assign(self) -> None:
        """Note that an attribute of a module is set."""
        for frame in self.calls.frame.line():
            frame.assigns = True


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never: skipping it would import the compiler, which takes seconds."""
        return False

    def __init__(self, calls: _Calls, surroundings: _Surroundings, fake: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.surroundings, self.fake = calls, surroundings, fake

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        calls, kwargs = self.calls, kwargs or {}
        if calls.unseen or is_metadata(operator) or operator is torch.ops.aten.detach_.default:
            return operator(*args, **kwargs)
        if calls.sealed is not None:
            return self._run_part(calls.sealed, operator, args, kwargs)
        if is_composite(operator):
            if self.surroundings.is_cast(operator, args):
                return self._run_cast(operator, args, kwargs)
            if name_of(operator) not in KEPT:
                with self._doubting(operator), self.surroundings.autocast(operator), self:
                    return operator.decompose(*args, **kwargs)
        if operator is torch.ops.aten.lift_fresh.default and not calls.memory.beneath(args[0]):
            return self._lift(operator, args[0])
        return self._run_call(operator, args, kwargs)

    def _run_call(self, operator: Any, args: Any, kwargs: Any) -> Any:
        call = self.calls.begin(operator, args, kwargs)
        blind = not self.calls.numbers and any(value.data for value in call.reads.values())
        compute = partial(self._leave_out, operator) if blind else operator
        result, changed = self._run(operator, args, kwargs, compute)
        self.calls.finish(call, result, changed, gives_number(operator))
        return result

    def _leave_out(self, operator: Any, *args: Any, **kwargs: Any) -> Any:
        """What an operator makes, without numbers where those are costly; no error that is due to them is believed."""
        if operator in HOLLOW:
            made = None if self.surroundings.devices else hollow(operator, args, kwargs)
            self.calls.unset |= made is not None
            with self._doubting(operator):
                return operator(*args, **kwargs) if made is None else made
        if not self.calls.unset:
            return operator(*args, **kwargs)
        if operator.namespace != "aten" or depends_on_numbers(operator):
            self.calls.ask()
        with self._doubting(operator):
            result = operator(*args, **kwargs)
        if makes_whole(operator, args, result):
            self.calls.ask()
        return result

    @contextmanager
    def _doubting(self, operator: Any) -> Iterator[None]:
        """Believe no error that may be due to numbers that were left out."""
        try:
            yield
        except Exception as error:
            if self.calls.unset and not is_view(operator) and operator not in HOLLOW:
                self.calls.ask()
            self.calls.believed = error
            raise

    def _run_part(self, sealed: _Sealed, operator: Any, args: Any, kwargs: Any) -> Any:
        for _, tensor in leaves((args, kwargs)):
            value = self.calls.memory.noted(tensor)
            if value is not None and id(value) not in sealed.call.reads:
                self.calls.read(sealed.call, value)
        sealed.told |= gives_number(operator) or bool(sized_axes(operator, args, 1))
        result, changed = self._run(operator, args, kwargs, operator)
        known = {id(tensor) for tensor in sealed.changed}
        sealed.changed += [tensor for tensor in changed if id(tensor) not in known]
        return result

    def _run(
        self, operator: Any, args: Any, kwargs: Any, compute: Callable[..., Any]
    ) -> tuple[Any, list[Tensor]]:
        """The result and what was changed; without numbers, what is the model's own is changed in a copy."""
        memory, fake = self.calls.memory, self.fake
        changed = [tensor for tensor in written(operator, args, kwargs) if memory.store(tensor) is not None]
        for tensor in changed:
            memory.save(tensor)
        if fake is not None and (real := {id(tensor) for tensor in changed if not is_fake(tensor)}):

            def swap(tensor: Tensor) -> Any:
                return fake.from_tensor(tensor) if id(tensor) in real else tensor

            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, swap, (args, kwargs))
        with self.surroundings.autocast(operator):
            return compute(*args, **kwargs), changed

    def _run_cast(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """A cast that autocast makes: what comes out stands for what went in."""
        value, result = self.calls.value(args[0]), operator(*args, **kwargs)
        if result is not args[0]:
            self.calls.memory.enter_alias(result, value)
        return result

    def _lift(self, operator: Any, tensor: Tensor) -> Any:
        """A tensor made of Python's numbers: a constant, where the code around has not got them from the inputs."""
        result = operator(tensor)
        if not self.calls.frame.data_dependent:
            self.calls.memory.enter_numbers(result, tensor.clone() if self.fake is None else tensor)
        return result


class _Surroundings(TorchFunctionMode):
    """Sees what no operator shows."""

    def __init__(self, calls: _Calls, below: BelowAutograd) -> None:
        super().__init__()
        self.calls, self.below = calls, below
        self.devices: tuple[str, ...] = ()
        self.casts = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.devices = autocast_devices()
        self.casts = bool(self.devices) and name_of(function) not in _CASTS
        if function in _DIFFERENTIATING or (function in _ASKING and torch.is_grad_enabled()):
            self._differentiate(function)
        if function in _MEASURING and args:
            self.calls.measure(args[0], function not in _RANK_AND_TYPE)
        if function is Tensor.data_ptr:
            self.calls.ask()
        if function == _SET_GRAD:
            function(*args, **kwargs)
            return self.below.settle()
        if function not in _REACHING or self.calls.sealed is not None or self.calls.unseen:
            return function(*args, **kwargs)
        changed = args[:1] if function in _OVERWRITING else ()
        reads = [tensor for _, tensor in leaves((args, kwargs))]
        return self.calls.seal(_REACHING[function], lambda: function(*args, **kwargs), reads, changed)

    def _differentiate(self, function: Any) -> None:
        """Ask for a pass with autograd, unless this is one."""
        if not self.below.differentiates:
            raise Differentiates
        if function == _MAKE_DUAL:
            self.below.dual = True
            self.below.settle()

    def is_cast(self, operator: Any, args: Any) -> bool:
        """Whether this is a cast from float to float that autocast makes, for a function that is none itself."""
        cast = self.casts and operator is torch.ops.aten.to.dtype
        return cast and args[0].is_floating_point() and args[1].is_floating_point

    def autocast(self, operator: Any) -> AbstractContextManager[None]:
        """Autocast as it is around the function that is called."""
        return with_autocast(self.devices, operator.name()) if self.devices else nullcontext()


_TORCH: Any = torch
_TENSOR: Any = Tensor

_SET_GRAD = torch._C._set_grad_enabled
_MAKE_DUAL = _TORCH._VF._make_dual
_DIFFERENTIATING = {torch.autograd.grad, torch.autograd.backward, Tensor.backward, _MAKE_DUAL}
_ASKING = {_TENSOR.requires_grad.__get__, _TENSOR.grad_fn.__get__}

_SIZES = (
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.nelement,
    Tensor.__len__,
    torch.numel,
)
_MEASURING = {
    _TENSOR.shape.__get__,
    _TENSOR.ndim.__get__,
    _TENSOR.nbytes.__get__,
    _TENSOR.dtype.__get__,
    Tensor.stride,
    *_SIZES,
}
"""Functions that tell the size or the type of a tensor."""

_RANK_AND_TYPE = {Tensor.dim, Tensor.ndimension, _TENSOR.ndim.__get__, _TENSOR.dtype.__get__}
"""Those that tell no sizes."""

_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "_to_copy"}
"""Functions that cast where the model says so."""

_OVERWRITING = {_TENSOR.data.__set__: "data", Tensor.apply_: "apply_", Tensor.map_: "map_"}
_READING = (
    *("numpy", "tolist", "storage", "untyped_storage", "_typed_storage"),
    *("__repr__", "__format__"),
    *("__array__", "__dlpack__", "__deepcopy__", "__reduce_ex__"),
)
_REACHING = {**_OVERWRITING, **{getattr(Tensor, name): name.strip("_") for name in _READING}}
"""Functions that reach the memory of a tensor by no operator, with a name for the call; some write into it."""


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
        and not _observers(module)
    )


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


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fake: bool = False,
    nondeterministic: frozenset[str] = frozenset(),
    lasting: bool = False,
    differentiates: bool = False,
    numbers: bool = True,
    places: Iterable[tuple[Tensor, tuple[Slot, ...]]] | None = None,
) -> Trace:
    """Run a model once and capture it. The model is run as it is: give a copy where that must not be touched.

    Args:
        args, kwargs: what its forward is given.
        fake: compute shapes alone.
        nondeterministic: paths of modules whose own code is known to run otherwise at other times; taken for branches.
        lasting: leave what it changes in tensors as it is.
        differentiates: the model is known to differentiate by itself.
        numbers: compute what it costs most to compute.
        places: what `tensors.held` says of the model, if that is known.

    Raises:
        Differentiates: it does, and that was not known.
        NeedsNumbers: something depends on numbers that were not computed.
        Exception: whatever the model raises, with `bnfold_frame` set to the path of the module in whose code it was.
    """
    mode = make_fake_mode() if fake else None
    if mode is not None:
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
    memory = Memory(held(model) if places is None else places, saves=mode is None)
    calls = _Calls(memory, numbers)
    modules = _Modules(model, calls, nondeterministic)
    inputs = _enter_inputs(calls, args, kwargs)
    with ExitStack() as stack:
        if not lasting:
            stack.callback(memory.restore)
        stack.callback(torch.clear_autocast_cache)
        _enter_modes(stack, calls, modules, mode, differentiates)
        stack.enter_context(calls.insisting())
        result = model(*args, **kwargs)
    outputs = {path: calls.value(tensor) for path, tensor in leaves(result)}
    _add_survivors(memory, outputs, set(_computed_weights(model)))
    holders = _holders(model, memory)
    return Trace(
        calls.list,
        modules.frames,
        inputs,
        outputs,
        memory.slots,
        memory.changed,
        modules.escaped,
        fake,
        calls.root.data_dependent,
        nondeterministic,
        differentiates,
        words=() if calls.root.data_dependent else tuple(words(result)),
        measured=calls.measured,
        holders=holders,
        asked=calls.asked,
    )


def _enter_inputs(calls: _Calls, args: Any, kwargs: Any) -> dict[str, Value]:
    """The values that the caller gives, by path."""
    given = dict(leaves((args, kwargs) if kwargs else args))
    paths = given if len(given) > 1 else [""]
    return {
        path: calls.memory.enter_input(tensor, f"input {path}" if path else "input", calls.root)
        for path, tensor in zip(paths, given.values(), strict=False)
    }


def _enter_modes(stack: ExitStack, calls: _Calls, modules: _Modules, fake: Any, differentiates: bool) -> None:
    torch.clear_autocast_cache()
    stack.enter_context(torch.no_grad())
    if "torch._dynamo" in sys.modules:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    stack.enter_context(_followed(modules))
    stack.enter_context(_overheard(calls))
    if fake is not None:
        stack.enter_context(fake)
    below = stack.enter_context(BelowAutograd(differentiates))
    surroundings = _Surroundings(calls, below)
    stack.enter_context(_Operators(calls, surroundings, fake))
    below.settle()
    stack.enter_context(surroundings)


def _computed_weights(model: nn.Module) -> Iterator[int]:
    """The weights that torch's hooks leave on a module, where nobody but the module's next call looks."""
    for _, module in walk(model):
        if any(computes_weight(hook) for hook in module._forward_pre_hooks.values()):
            yield from (id(tensor) for tensor in vars(module).values() if isinstance(tensor, Tensor))


def _holders(model: nn.Module, memory: Memory) -> dict[str, str]:
    """The names of computed values that lie in attributes of the model's modules, each with that attribute."""
    made = {id(tensor): value.name for tensor, value in memory.alive() if value.call is not None}
    holders: dict[str, str] = {}
    for path, module in walk(model):
        compiled = isinstance(module, torch.jit.ScriptModule)
        for found in () if compiled else (module._parameters, module._buffers, vars(module)):
            for attribute, thing in found.items():
                if id(thing) in made:
                    holders.setdefault(made[id(thing)], f"{path}.{attribute}" if path else attribute)
    return holders


def _add_survivors(memory: Memory, outputs: dict[str, Value], ignored: set[int]) -> None:
    """Whatever is still alive when the pass is over may be read: in a cache, in an object that was returned."""
    known = {id(value) for value in outputs.values()}
    held = memory.slots.keys() | {id(tensor) for tensor in memory.given.values()}

    def alive() -> list[tuple[Tensor, Value]]:
        made = ((tensor, value) for tensor, value in memory.alive() if value.call is not None)
        return [pair for pair in made if id(pair[0]) not in ignored and id(pair[1]) not in known]

    if any(id(tensor) not in held for tensor, _ in alive()):
        gc.collect()
    unheld = _unheld([tensor for tensor, _ in alive()], [tensor for tensor, _ in memory.alive()])
    kept = [value for tensor, value in alive() if id(tensor) not in unheld]
    outputs.update({f"kept alive {value.name}": value for value in kept})


def _unheld(kept: list[Tensor], alive: list[Tensor]) -> set[int]:
    """Those of the kept tensors that no Python code holds: they live on as what another tensor is a view of."""
    viewed = {id(tensor._base) for tensor in alive}
    tensors = tuple(tensor for tensor in kept if id(tensor) in viewed)  # passed as it is, so it is known
    found = gc.get_referrers(*tensors) if tensors else ()
    mine = {id(kept), id(alive), id(tensors)}
    holders = [holder for holder in found if id(holder) not in mine and not isinstance(holder, FrameType)]
    held = {id(thing) for holder in holders for thing in gc.get_referents(holder)}
    return {id(tensor) for tensor in tensors} - held


@contextmanager
def _followed(modules: _Modules) -> Iterator[None]:
    """Let every module call, every fetch of a tensor from a module and every attribute that is set pass by `modules`.

    The methods are those of the whole process (see `exclusive`): what other threads do is passed on.
    """
    call, fetch, put, here = nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__, get_ident()
    elsewhere: list[str] = []

    def follow(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if get_ident() != here:
            elsewhere.extend(path for path in (modules.paths.get(id(module)),) if path is not None)
            return call(module, *args, **kwargs)
        return modules.run(call, module, args, kwargs)

    def look(module: nn.Module, attribute: str) -> Any:
        found = fetch(module, attribute)
        if isinstance(found, Tensor) and get_ident() == here:
            modules.fetch(module, attribute)
        return found

    def assign(module: nn.Module, attribute: str, value: Any) -> None:
        if not isinstance(value, Tensor) and get_ident() == here:
            modules.assign()
        put(module, attribute, value)

    try:
        nn.Module.__call__, nn.Module.__getattr__ = follow, look  # type: ignore[method-assign]
        nn.Module.__setattr__ = assign  # type: ignore[assignment, method-assign]
        yield
        if elsewhere:
            error = RuntimeError(
                "it is called in another thread than the model, where nothing can be followed"
            )
            error.bnfold_frame = elsewhere[-1]  # type: ignore[attr-defined]
            raise error
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = call, fetch  # type: ignore[method-assign]
        nn.Module.__setattr__ = put  # type: ignore[method-assign]


@contextmanager
def _overheard(calls: _Calls) -> Iterator[None]:
    """Have numbers for the other threads that the model starts or gives work to, where nothing can be followed.

    Not covered: a thread that runs already and is told by a queue of the model's own.
    """
    here = get_ident()

    def reveal(method: Callable[..., Any]) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if get_ident() == here:
                calls.reveal()
            return method(*args, **kwargs)

        return run

    start, submit = Thread.start, ThreadPoolExecutor.submit
    try:
        Thread.start, ThreadPoolExecutor.submit = reveal(start), reveal(submit)  # type: ignore[method-assign]
        yield
    finally:
        Thread.start, ThreadPoolExecutor.submit = start, submit  # type: ignore[method-assign]
