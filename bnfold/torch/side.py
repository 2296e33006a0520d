"""A module as one side of a verification: run in its own dtype and in float64, differentiated, and looked into.

See `bnfold.verification.Side`. A module is called with what its caller gave, tensors replaced by the arrays of a case;
with arrays by name that are all parameters of its `forward`, as those; else with one tensor after the other.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from bnfold.algebra import is_float
from bnfold.ascent import LEAK, Objective
from bnfold.cases import Array, Case
from bnfold.divergence import Recording
from bnfold.equivalence import Outputs, Unavailable
from bnfold.errors import InputError, UnreadableModel
from bnfold.torch.double import double
from bnfold.torch.files import (
    load_factory,
    load_folded,
    load_state,
    make_inputs,
    read_arguments,
    refuse_complex,
)
from bnfold.torch.fold import Narrow, coarsest_dtype, run, widened
from bnfold.torch.nudge import nudge
from bnfold.torch.program import load_module, without_own_advice
from bnfold.torch.sandbox import arrange, first_line, restored, undisturbed
from bnfold.torch.stored import to_float64
from bnfold.torch.tensors import leaves

__all__ = ["ModuleSide", "open_factory", "open_file", "open_model"]


class ModuleSide:
    """A module in eval mode, or one that behaves the same in any."""

    names: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, label: str, examples: Any = None, kind: str = "") -> None:
        """Prepare to run a module.

        Args:
            label: what it is called where it does not run.
            examples: what it is called with where no inputs are given.
            kind: what those are: "made up", or "all" of them.
        """
        self.model, self.label, self.examples, self.kind = model, label, examples, kind
        self.doubt, self.seconds = "", 0.0
        self._recast: dict[torch.dtype, torch.dtype] = {}

    def meet(self, first: Any) -> None:
        """Take what is drawn for a module of another dtype in the own one."""
        if isinstance(first, ModuleSide):
            self._recast = {first._float: self._float}

    @cached_property
    def _float(self) -> torch.dtype:
        """The dtype of the first float parameter."""
        found = (t.dtype for t in self.model.parameters() if t.is_floating_point())
        return next(found, torch.float32)

    @property
    def dtype(self) -> str:
        """The float dtype of the largest roundoff that it holds."""
        return coarsest_dtype(self.model)

    @property
    def weights(self) -> int:
        """How many modules have a weight."""
        return sum(isinstance(getattr(module, "weight", None), Tensor) for module in self.model.modules())

    def read(self, inputs: Any) -> list[Case]:
        """One case: what `bnfold.fold` takes as example inputs."""
        return [self._draw("given 1", inputs)]

    def make_up(self) -> tuple[list[Case], bool]:
        """What the file of the module says of its inputs."""
        if self.examples is None:
            return [], False
        if self.kind == "all":
            return [self._draw(f"all {len(self.examples):,} inputs", self.examples)], True
        return [self._draw(f"{self.kind} 1", self.examples)], False

    def _draw(self, label: str, inputs: Any) -> Case:
        """A case, of whose parts those that are plain tensors become arrays."""
        parts, spec = tree_flatten(inputs)
        arrays = tuple(_array(part) for part in parts if _is_plain(part))
        names = self._parameters()[: len(arrays)] if _are_positional(inputs) else ()
        return Case(label, arrays, names if len(names) == len(arrays) else (), partial(_fill, parts, spec))

    def _parameters(self) -> tuple[str, ...]:
        try:
            return tuple(inspect.signature(self.model.forward).parameters)
        except (TypeError, ValueError):
            return ()

    def accept(self, case: Case) -> Case:
        """The same, rounded to the dtypes in which the module is called."""
        parts = [part for part in tree_flatten(self._inputs(case))[0] if _is_plain(part)]
        arrays = tuple(_array(part) for part in parts)
        names = case.names if case.form is not None or len(case.names) == len(arrays) else ()
        return Case(case.label, arrays, names, case.form or partial(_fill, *tree_flatten(self._inputs(case))))

    def _inputs(self, case: Case) -> Any:
        if case.form is not None:
            return tree_map_only(Tensor, self._cast, case.form(case.arrays))
        tensors = [self._tensor(array) for array in case.arrays]
        named, parameters = dict(zip(case.names, tensors, strict=False)), self._parameters()
        first = parameters[: len(tensors)]
        if set(named) == set(first):
            return tuple(named[name] for name in first), {}
        return ((), named) if named and set(named) <= set(parameters) else (tuple(tensors), {})

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._recast.get(tensor.dtype, tensor.dtype))

    def _tensor(self, array: Array) -> Tensor:
        """An array that came with no form, in the dtype and on the device of the module's own floats."""
        device = next((t.device for t in self.model.parameters()), torch.device("cpu"))
        tensor = _to_tensor(array)
        return tensor.to(device, self._float if tensor.is_floating_point() else tensor.dtype)

    # -- the runs

    def run(self, case: Case) -> Outputs:
        """What it computes in its own dtype.

        Raises:
            Unavailable: it does not run in it.
        """
        self._require_numbers()
        start = time.perf_counter()
        try:
            outputs = run(self.model, self._inputs(case))
        except Exception as error:
            why = f"{self.label} does not run in it: {type(error).__name__}: {first_line(error)}"
            raise Unavailable(f"not compared in {self.dtype}: {why}") from error
        self.seconds = time.perf_counter() - start
        return _named(outputs)

    def run_exactly(self, cases: Sequence[Case], own: Sequence[Outputs] | None) -> list[Outputs]:
        """What a copy in float64 computes; be in doubt of it where it computes in less.

        Raises:
            Unavailable: it does not run in float64, since it fixes a dtype by itself.
        """
        self._require_numbers()
        try:
            wide = [tree_map_only(Tensor, widened, self._inputs(case)) for case in cases]
            twin = self._twin
            with double(), Narrow() as watch:
                outputs = [_named(run(twin, each)) for each in wide]
        except Exception as error:
            why = f"{self.label} does not run in it: {first_line(error)}"
            raise Unavailable(f"not compared in float64: {why}") from error
        if watch.seen:
            self.doubt = f"not compared in float64: {self.label} fixes a narrower dtype by itself"
        return outputs

    def run_nudged(self, cases: Sequence[Case], exact: bool, units: float, seed: int) -> list[Outputs]:
        """What a copy computes whose weights are moved by units in their last place.

        Raises:
            Unavailable: it does not run with those.
        """
        try:
            moved = nudge(self._twin if exact else self.model, units, seed, whole=exact)
            inputs = [self._inputs(case) for case in cases]
            if exact:
                inputs = [tree_map_only(Tensor, widened, each) for each in inputs]
            with double() if exact else nullcontext():
                return [_named(run(moved, each)) for each in inputs]
        except Exception as error:
            raise Unavailable(first_line(error)) from error

    @cached_property
    def _twin(self) -> nn.Module:
        with without_own_advice():
            return to_float64(self.model)

    def _require_numbers(self) -> None:
        tensors = (*self.model.parameters(), *self.model.buffers())
        if any(tensor.device.type == "meta" or nn.parameter.is_lazy(tensor) for tensor in tensors):
            raise Unavailable("unverified: there are tensors without numbers (lazy, or on the meta device)")

    # -- for the ascent

    def soften(self) -> Callable[[Case], Outputs]:
        """Run the module with rectifiers that leak."""

        def run_soft(case: Case) -> Outputs:
            with Leaking():
                return _named(run(self.model, self._inputs(case)))

        return run_soft

    def differentiate(self, other: Any, case: Case, objective: Objective) -> Sequence[Array | None] | None:
        """The gradient of the objective of `bnfold.ascent`; None where there is none to be had."""
        if not isinstance(other, ModuleSide):
            return None
        tracked = [_to_tensor(a).requires_grad_() if is_float(a) else _to_tensor(a) for a in case.arrays]
        try:
            with torch.enable_grad(), Leaking():
                gap = self._gap(other, case, tracked, objective)
            if gap is None or not gap.requires_grad:
                return None
            wanted = [tensor for tensor in tracked if tensor.requires_grad]
            slopes = iter(torch.autograd.grad(gap, wanted, allow_unused=True))
        except Exception:  # noqa: BLE001 whatever the model's own code does not do under a gradient
            return None
        found = [next(slopes) if tensor.requires_grad else None for tensor in tracked]
        return [None if slope is None else slope.double().numpy() for slope in found]

    def _gap(
        self, other: ModuleSide, case: Case, tracked: list[Tensor], objective: Objective
    ) -> Tensor | None:
        """The objective, as torch sees it."""
        with restored(self.model, True), undisturbed(seed=0):
            old = _floats(self._call(self._follow(case, tracked)))
        with restored(other.model, True), undisturbed(seed=0):
            new = _floats(other._call(other._follow(case, tracked)))
        terms = [
            ((b.double() - a.double()).cpu() * torch.from_numpy(sign)).sum() / peak
            for a, b, sign, peak in zip(old, new, objective.signs, objective.peaks, strict=False)
            if a.shape == b.shape == sign.shape
        ]
        return torch.stack(terms).sum() if terms else None

    def _follow(self, case: Case, tracked: Sequence[Tensor]) -> Any:
        """What the module is called with, made of tensors that are differentiated by."""
        inputs, waiting = self._inputs(case), iter(tracked)

        def follow(part: Any) -> Any:
            if not _is_plain(part):
                return part
            tensor = next(waiting)
            return tensor.to(part.device, part.dtype) * 1 if tensor.requires_grad else part

        parts, spec = tree_flatten(inputs)
        return tree_unflatten([follow(part) for part in parts], spec)

    def _call(self, inputs: Any) -> Any:
        args, kwargs = arrange(inputs)
        return self.model(*args, **kwargs)

    # -- for the layer

    def record(self, case: Case, output: str) -> Recording:
        """What its modules return, and how that comes together, as autograd knows it.

        Raises:
            UnreadableModel: it does not run.
        """
        tracked = [_to_tensor(a).requires_grad_() if is_float(a) else _to_tensor(a) for a in case.arrays]
        seen = _Seen()
        try:
            with (
                torch.enable_grad(),
                undisturbed(seed=0),
                restored(self.model, True),
                seen.watching(self.model),
            ):
                result = self._call(self._follow(case, tracked))
                parts = [tensor for path, tensor in leaves(result) if (path or "output") == output]
                return seen.recording(parts or [tensor for _, tensor in leaves(result)])
        except Exception as error:
            raise UnreadableModel(f"{self.label} cannot be looked into: {first_line(error)}") from error


class _Seen:
    """What the modules of a model returned in one pass."""

    def __init__(self) -> None:
        self.values: dict[str, Array] = {}
        self.makers: dict[str, str] = {}
        self.roots: dict[str, Any] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Keep what every module returns, by its path; calls after the first by their number."""
        with ExitStack() as stack:
            for path, module in model.named_modules():
                if path and not isinstance(module, torch.jit.ScriptModule):
                    hook = module.register_forward_hook(partial(self._keep, path))
                    stack.callback(hook.remove)
            yield

    def _keep(self, path: str, module: nn.Module, args: Any, result: Any) -> None:
        for place, (_, tensor) in enumerate(leaves(result)):
            name = path if not place else f"{path}[{place}]"
            calls = sum(one.partition(" ")[0] == name for one in self.values)
            name = f"{name} (call {calls + 1})" if calls else name
            self.values[name] = _array(tensor)
            self.makers[name] = type(module).__name__
            self.roots[name] = tensor.grad_fn

    def recording(self, outputs: Sequence[Tensor]) -> Recording:
        """The values, with the nearest of them on every way back from the outputs and from each other.

        What a module hands on as it got it (an Identity, the last value of a container) comes of the one before.
        """
        if any(tensor.grad_fn is None for tensor in outputs):
            return Recording("module", self.values, self.makers, _one_after_the_other(list(self.values)))
        marks: dict[Any, str] = {}
        inner: dict[str, str] = {}
        roots = {name: root for name, root in self.roots.items() if root is not None}
        for name, root in roots.items():
            if root in marks:
                inner[name] = marks[root]
            marks[root] = name
        sources = {"": _nearest([tensor.grad_fn for tensor in outputs], marks)}
        for name, root in roots.items():
            before = [one for one, _ in root.next_functions]
            sources[name] = (inner[name],) if name in inner else _nearest(before, marks)
        return Recording("module", self.values, self.makers, sources)


def _one_after_the_other(names: list[str]) -> dict[str, tuple[str, ...]]:
    """Where nothing is known of how values come together: each comes of the one before."""
    backwards = ["", *reversed(names)]
    return {name: tuple(backwards[place + 1 : place + 2]) for place, name in enumerate(backwards)}


def _nearest(roots: Sequence[Any], marks: dict[Any, str]) -> tuple[str, ...]:
    """The marked nodes of autograd's graph that are reached first."""
    found, seen, waiting = dict[str, None](), set[Any](), [root for root in roots if root is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in marks:
            found[marks[node]] = None
        else:
            waiting += [one for one, _ in node.next_functions if one is not None]
    return tuple(found)


class Leaking(TorchFunctionMode):
    """Lets rectifiers leak: y + LEAK (x - y) for y = f(x)."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = _SHUT.get(function)
        if plain is None or not args:
            return function(*args, **(kwargs or {}))
        options = {name: value for name, value in (kwargs or {}).items() if name != "inplace"}
        result = plain(*args, **options)
        return result + LEAK * (args[0] - result) if result.is_floating_point() else result


_SHUT: dict[Any, Any] = {
    torch.relu: torch.relu,
    torch.relu_: torch.relu,
    Tensor.relu: torch.relu,
    Tensor.relu_: torch.relu,
    F.relu: torch.relu,
    F.relu6: F.relu6,
    F.hardtanh: F.hardtanh,
    torch.ops.aten.relu.default: torch.relu,
}
"""What clips, and the same without writing into its input."""


def open_model(model: nn.Module, label: str = "the module", folder: Any = None) -> ModuleSide:
    """A module as one side."""
    return ModuleSide(model, label)


def open_factory(name: str, shapes: Sequence[str] | None, arguments: str | None = None) -> ModuleSide:
    """What "package.module:factory" builds, in eval mode, as one side; `arguments` as `read_arguments` reads them."""
    return ModuleSide(_built(name, arguments), name, _made_up(shapes), "made up")


def open_file(
    path: Path, label: str, factory: str | None, shapes: Sequence[str] | None, **choices: str | None
) -> ModuleSide:
    """A checkpoint, an exported program, or the weights of what a factory builds, as one side.

    Args:
        path, label: the file, and what it is called.
        factory, shapes: what builds the module of weights, and its inputs.
        **choices: `arguments` of the factory, `key` and `prefix` of the weights in the file.

    Raises:
        InputError: the file cannot be read, or holds the weights of another module.
    """
    if factory is not None:
        module = _load_weights(path, factory, shapes, **choices)
        return ModuleSide(module, label, _made_up(shapes), "made up")
    from bnfold import checkpoint

    if checkpoint.identify(path) == "exported program":
        module, recorded = load_module(path)
        return ModuleSide(module, label, recorded, "recorded")
    found = checkpoint.load(path)
    inputs, exhaustive = found.input.examples()
    return ModuleSide(found.model, label, inputs, "all" if exhaustive else "made up")


def _made_up(shapes: Sequence[str] | None) -> Any:
    return make_inputs(shapes) if shapes else None


def _built(factory: str, arguments: str | None) -> nn.Module:
    return copy.deepcopy(load_factory(factory, read_arguments(arguments))).eval()


def _load_weights(
    path: Path, factory: str, shapes: Sequence[str] | None, arguments: str | None = None, **where: str | None
) -> nn.Module:
    """What a factory builds, with the weights of a file, folded or not."""
    module = _built(factory, arguments)
    _, state, _ = load_state(path, module.state_dict(), **where)
    refuse_complex(module, state, path)
    try:
        module.load_state_dict(state)
        return module
    except RuntimeError as error:
        if not shapes:
            fact = f"{path} does not hold the weights of what {factory} builds"
            raise InputError(f"{fact}; if they are folded ones, give --input SHAPE") from error
    return load_folded(_built(factory, arguments), make_inputs(shapes), state)


def _are_positional(inputs: Any) -> bool:
    """Whether example inputs are tensors for the first parameters, one after the other."""
    args, kwargs = arrange(inputs)
    return not kwargs and all(_is_plain(one) for one in args)


def _is_plain(part: Any) -> bool:
    """Whether something is a tensor of numbers that NumPy can hold."""
    return (
        type(part) in (Tensor, nn.Parameter)
        and part.layout is torch.strided
        and part.device.type != "meta"
        and not part.is_nested
        and part.dtype in _DTYPES
    )


_DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
})  # fmt: skip


def _array(tensor: Tensor) -> Array:
    """A copy of a tensor's numbers; bfloat16, which NumPy lacks, as float32."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    return np.array((tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())


def _to_tensor(array: Array) -> Tensor:
    """A tensor of its own; NumPy's bfloat16, an extension, by way of float32."""
    wide = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    try:
        return torch.from_numpy(np.array(wide))
    except TypeError as error:
        raise InputError(f"torch has no tensors of {array.dtype}") from error


def _fill(parts: Sequence[Any], spec: Any, arrays: tuple[Array, ...]) -> Any:
    """What a module is called with, its plain tensors replaced by arrays."""
    waiting = iter(arrays)
    filled = [
        _to_tensor(next(waiting)).to(part.device, part.dtype) if _is_plain(part) else part for part in parts
    ]
    return tree_unflatten(filled, spec)


def _named(outputs: Outputs) -> Outputs:
    """The outputs by their paths; the only one of a module that returns a tensor is called `output`."""
    return {path or "output": array for path, array in outputs.items()}


def _floats(result: Any) -> list[Tensor]:
    return [tensor for _, tensor in leaves(result) if tensor.is_floating_point()]
