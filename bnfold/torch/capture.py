"""Capture what one forward pass computes from what: every operator, with the values that it read, made and changed.

The model is run. Two modes of torch see every operator and what no operator shows (`modes`), every module call is
followed here, and a `Recorder` notes what all of them see: it decides what a number may have decided.

`FakeTensorMode`, where it is asked for, computes shapes alone: right for what is too large to run, or has no numbers. A
pass with real tensors takes a third of the time on common models (it costs a fake tensor 100 times what the arithmetic
of a small image costs) and follows models that need numbers.

Not covered: a branch on a shape is followed as the example goes; higher-order operators (`torch.cond`) raise; what a
model's code assigns to global names, and to what they hold, stays, be it a number or a tensor without any.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Thread, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.torch.hooks import computes_weight, observers
from bnfold.torch.internals import BelowAutograd, make_fake_mode
from bnfold.torch.memory import Memory
from bnfold.torch.modes import Functions, Operators
from bnfold.torch.recorder import Recorder
from bnfold.torch.tensors import Slot, held, leaves, walk, words
from bnfold.torch.trace import Frame, Trace, Value

__all__ = ["capture"]


class _Modules:
    """The module calls of one pass."""

    def __init__(self, model: nn.Module, recorder: Recorder, nondeterministic: frozenset[str]) -> None:
        self.recorder, self.nondeterministic = recorder, nondeterministic
        self.paths = {id(module): path for path, module in walk(model)}
        self.frames: list[Frame] = []
        self.escaped: dict[tuple[str, str], str] = {}

    def run(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module, as a frame."""
        recorder = self.recorder
        if recorder.sealed is not None or recorder.unseen:
            return call(module, *args, **kwargs)
        frame = Frame(module, self.paths.get(id(module)), recorder.frame)
        frame.data_dependent = frame.path in self.nondeterministic
        recorder.branches |= frame.data_dependent
        frame.given = recorder.look(args[0] if len(args) == 1 and not kwargs else (args, kwargs))
        if observers(module):
            recorder.reveal()
        frame.start = len(recorder.calls)
        recorder.frame = frame
        try:
            result = self._run(call, module, args, kwargs)
        except BaseException as error:
            vars(error).setdefault("bnfold_frame", frame.path or "")
            raise
        finally:
            recorder.frame = frame.parent or recorder.root
        frame.stop = len(recorder.calls)
        frame.made = recorder.look(result)
        frame.plain = isinstance(result, Tensor) and len(frame.given) == len(args) + len(kwargs) == 1
        self.frames.append(frame)
        if observed := observers(module):
            recorder.observe("Hook", [*frame.given, *(frame.made if observed == "hook" else ())], frame)
        return result

    def _run(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module; compiled code as one opaque call that reads everything it is given and holds."""
        if not isinstance(module, torch.jit.ScriptModule):
            return call(module, *args, **kwargs)
        held = (*module.parameters(), *module.buffers())
        reads = [tensor for _, tensor in leaves((args, kwargs))]
        reads += [tensor for tensor in held if self.recorder.memory.noted(tensor) is not None]
        return self.recorder.seal("ScriptModule", lambda: call(module, *args, **kwargs), reads)

    def fetch(self, module: nn.Module, attribute: str) -> None:
        """Note that code of another module fetches a tensor of this one."""
        path, frame = self.paths.get(id(module)), self.recorder.frame
        if path is None or all(each.module is not module for each in frame.line()):
            self.escaped.setdefault((path or "", attribute), frame.path or "")

    def assign(self) -> None:
        """Note that an attribute of a module is set."""
        for frame in self.recorder.frame.line():
            frame.assigns = True


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
    recorder = Recorder(memory, numbers)
    modules = _Modules(model, recorder, nondeterministic)
    inputs = _enter_inputs(recorder, args, kwargs)
    with ExitStack() as stack:
        if not lasting:
            stack.callback(memory.restore)
        stack.callback(torch.clear_autocast_cache)
        _enter_modes(stack, recorder, modules, mode, differentiates)
        stack.enter_context(recorder.insisting())
        result = model(*args, **kwargs)
    outputs = {path: recorder.value(tensor) for path, tensor in leaves(result)}
    _add_survivors(memory, outputs, set(_computed_weights(model)))
    holders = _holders(model, memory)
    decided = recorder.root.data_dependent
    return Trace(
        calls=recorder.calls,
        frames=modules.frames,
        inputs=inputs,
        outputs=outputs,
        slots=memory.slots,
        changed_slots=memory.changed,
        escaped=modules.escaped,
        fake=fake,
        data_dependent=decided,
        nondeterministic=nondeterministic,
        differentiates=differentiates,
        words=() if decided else tuple(words(result)),
        measured=recorder.measured,
        holders=holders,
        asked=recorder.asked,
    )


def _enter_inputs(recorder: Recorder, args: Any, kwargs: Any) -> dict[str, Value]:
    """The values that the caller gives, by path."""
    given = dict(leaves((args, kwargs) if kwargs else args))
    paths = given if len(given) > 1 else [""]
    return {
        path: recorder.memory.enter_input(tensor, f"input {path}" if path else "input", recorder.root)
        for path, tensor in zip(paths, given.values(), strict=False)
    }


def _enter_modes(
    stack: ExitStack, recorder: Recorder, modules: _Modules, fake: Any, differentiates: bool
) -> None:
    torch.clear_autocast_cache()
    stack.enter_context(torch.no_grad())
    if "torch._dynamo" in sys.modules:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    stack.enter_context(_followed(modules))
    stack.enter_context(_overheard(recorder))
    if fake is not None:
        stack.enter_context(fake)
    below = stack.enter_context(BelowAutograd(differentiates))
    functions = Functions(recorder, below)
    stack.enter_context(Operators(recorder, functions, fake))
    below.settle()
    stack.enter_context(functions)


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
    unheld = _unheld(memory)
    kept = [value for tensor, value in alive() if id(tensor) not in unheld]
    outputs.update({f"kept alive {value.name}": value for value in kept})


def _unheld(memory: Memory) -> set[int]:
    """Those of the tensors that no Python code holds: they live on as what another tensor is a view of.

    They are counted, since no search for those who hold them looks into a frozen heap.
    """
    viewed = {id(tensor._base) for tensor, _ in memory.alive()}
    references = [weakref.ref(tensor) for tensor, _ in memory.alive() if id(tensor) in viewed]
    with torch.inference_mode(False):
        view = torch.empty(0).view(0)
    assert view._base is not None
    alone = _count_holders(weakref.ref(view._base))
    return {id(each()) for each in references if _count_holders(each) <= alone}


def _count_holders(reference: weakref.ref[Tensor]) -> int:
    return sys.getrefcount(reference())


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
def _overheard(recorder: Recorder) -> Iterator[None]:
    """Have numbers for the other threads that the model starts or gives work to, where nothing can be followed.

    Not covered: a thread that runs already and is told by a queue of the model's own.
    """
    here = get_ident()

    def reveal(method: Callable[..., Any]) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if get_ident() == here:
                recorder.reveal()
            return method(*args, **kwargs)

        return run

    start, submit = Thread.start, ThreadPoolExecutor.submit
    try:
        Thread.start, ThreadPoolExecutor.submit = reveal(start), reveal(submit)  # type: ignore[method-assign]
        yield
    finally:
        Thread.start, ThreadPoolExecutor.submit = start, submit  # type: ignore[method-assign]
