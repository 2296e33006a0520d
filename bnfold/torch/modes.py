"""Two modes of torch that see what a model does while it runs, and tell a `Recorder`.

A `TorchDispatchMode` below autograd sees every operator that reads or changes a tensor, whoever calls it: Python,
scripted code, custom autograd functions. There, `conv2d` and `batch_norm` are still whole, and a parameter is the
object that the model holds. A composite operator that `lower` has a lowering for (or that is kept for its tail or its
name) is one call; another one is captured as its parts.

A `TorchFunctionMode` beside it watches for what no operator shows: what reads or changes memory by itself (`numpy`,
`tolist`, `x.data = y`), and a model that differentiates. That cannot be done below autograd: `Differentiates` asks for
another pass, in which autograd takes composite operators apart while gradients are on, and their parts are captured.

**Autocast** casts what an operator reads. That is taken for a part of the operator: the cast tensor is the same value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.torch.aten import (
    depends_on_numbers,
    gives_number,
    is_composite,
    is_metadata,
    is_view,
    makes_whole,
    name_of,
    sized_axes,
    written,
)
from bnfold.torch.hollow import HOLLOW, hollow
from bnfold.torch.internals import BelowAutograd, autocast_devices, is_fake, with_autocast
from bnfold.torch.lower import LOWERINGS
from bnfold.torch.modules import TAILS
from bnfold.torch.recorder import Differentiates, Recorder, Sealed
from bnfold.torch.tensors import leaves

__all__ = ["KEPT", "Functions", "Operators"]

_WHOLE = {"lstm", "gru", "rnn_tanh", "rnn_relu", "layer_norm", "group_norm", "scaled_dot_product_attention"}
_BY_SIZE = {"einsum", "tensordot"}
KEPT = frozenset({*LOWERINGS, *TAILS, *_WHOLE, *_BY_SIZE})
"""Composite operators that are captured as one call: with a lowering or a stand-in for a tail, better known by their
name than by their parts, or of other parts where a size is 1."""


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never: skipping it would import the compiler, which takes seconds."""
        return False

    def __init__(self, recorder: Recorder, functions: Functions, fake: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder, self.functions, self.fake = recorder, functions, fake

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, kwargs = self.recorder, kwargs or {}
        if recorder.unseen or is_metadata(operator) or operator is torch.ops.aten.detach_.default:
            return operator(*args, **kwargs)
        if recorder.sealed is not None:
            return self._run_part(recorder.sealed, operator, args, kwargs)
        if is_composite(operator):
            if self.functions.is_cast(operator, args):
                return self._run_cast(operator, args, kwargs)
            if name_of(operator) not in KEPT:
                with self._doubting(operator), self.functions.autocast(operator), self:
                    return operator.decompose(*args, **kwargs)
        if operator is torch.ops.aten.lift_fresh.default and not recorder.memory.beneath(args[0]):
            return self._lift(operator, args[0])
        return self._run_call(operator, args, kwargs)

    def _run_call(self, operator: Any, args: Any, kwargs: Any) -> Any:
        call = self.recorder.begin(operator, args, kwargs)
        blind = not self.recorder.numbers and any(value.data for value in call.reads.values())
        compute = partial(self._leave_out, operator) if blind else operator
        result, changed = self._run(operator, args, kwargs, compute)
        self.recorder.finish(call, result, changed, gives_number(operator))
        return result

    def _leave_out(self, operator: Any, *args: Any, **kwargs: Any) -> Any:
        """What an operator makes, without numbers where those are costly; no error that is due to them is believed."""
        if operator in HOLLOW:
            made = None if self.functions.devices else hollow(operator, args, kwargs)
            self.recorder.unset |= made is not None
            with self._doubting(operator):
                return operator(*args, **kwargs) if made is None else made
        if not self.recorder.unset:
            return operator(*args, **kwargs)
        if operator.namespace != "aten" or depends_on_numbers(operator):
            self.recorder.ask()
        with self._doubting(operator):
            result = operator(*args, **kwargs)
        if makes_whole(operator, args, result):
            self.recorder.ask()
        return result

    @contextmanager
    def _doubting(self, operator: Any) -> Iterator[None]:
        """Believe no error that may be due to numbers that were left out."""
        try:
            yield
        except Exception as error:
            if self.recorder.unset and not is_view(operator) and operator not in HOLLOW:
                self.recorder.ask()
            self.recorder.believed = error
            raise

    def _run_part(self, sealed: Sealed, operator: Any, args: Any, kwargs: Any) -> Any:
        for _, tensor in leaves((args, kwargs)):
            value = self.recorder.memory.noted(tensor)
            if value is not None and id(value) not in sealed.call.reads:
                self.recorder.read(sealed.call, value)
        sealed.told |= gives_number(operator) or bool(sized_axes(operator, args, 1))
        result, changed = self._run(operator, args, kwargs, operator)
        known = {id(tensor) for tensor in sealed.changed}
        sealed.changed += [tensor for tensor in changed if id(tensor) not in known]
        return result

    def _run(
        self, operator: Any, args: Any, kwargs: Any, compute: Callable[..., Any]
    ) -> tuple[Any, list[Tensor]]:
        """The result and what was changed; without numbers, what is the model's own is changed in a copy."""
        memory, fake = self.recorder.memory, self.fake
        changed = [tensor for tensor in written(operator, args, kwargs) if memory.store(tensor) is not None]
        for tensor in changed:
            memory.save(tensor)
        if fake is not None and (real := {id(tensor) for tensor in changed if not is_fake(tensor)}):

            def swap(tensor: Tensor) -> Any:
                return fake.from_tensor(tensor) if id(tensor) in real else tensor

            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, swap, (args, kwargs))
        with self.functions.autocast(operator):
            return compute(*args, **kwargs), changed

    def _run_cast(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """A cast that autocast makes: what comes out stands for what went in."""
        value, result = self.recorder.value(args[0]), operator(*args, **kwargs)
        if result is not args[0]:
            self.recorder.memory.enter_alias(result, value)
        return result

    def _lift(self, operator: Any, tensor: Tensor) -> Any:
        """A tensor made of Python's numbers: a constant, where the code around has not got them from the inputs."""
        result = operator(tensor)
        if not self.recorder.frame.data_dependent:
            self.recorder.memory.enter_numbers(result, tensor.clone() if self.fake is None else tensor)
        return result


class Functions(TorchFunctionMode):
    """Sees every function of torch that is called, for what no operator shows, autocast among it."""

    def __init__(self, recorder: Recorder, below: BelowAutograd) -> None:
        super().__init__()
        self.recorder, self.below = recorder, below
        self.devices: tuple[str, ...] = ()
        self.casts = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.devices = autocast_devices()
        self.casts = bool(self.devices) and name_of(function) not in _CASTS
        if function in _DIFFERENTIATING or (function in _ASKING and torch.is_grad_enabled()):
            self._differentiate(function)
        if function in _MEASURING and args:
            self.recorder.measure(args[0], function not in _RANK_AND_TYPE)
        if function is Tensor.data_ptr:
            self.recorder.ask()
        if function == _SET_GRAD:
            function(*args, **kwargs)
            return self.below.settle()
        if function not in _REACHING or self.recorder.sealed is not None or self.recorder.unseen:
            return function(*args, **kwargs)
        changed = args[:1] if function in _OVERWRITING else ()
        reads = [tensor for _, tensor in leaves((args, kwargs))]
        return self.recorder.seal(_REACHING[function], lambda: function(*args, **kwargs), reads, changed)

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
