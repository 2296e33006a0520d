"""Run code with float64 as the dtype of new tensors, in this thread alone.

`torch.set_default_dtype` is the process's: another thread would find float64 in the tensors that it makes meanwhile.
Here two modes, which belong to a thread, do the same from outside. What an operation makes of numbers (`zeros`, `full`,
`rand`) or of integers (`indices / 2`, `mask * 0.1`, `sqrt`) would be of the default dtype where the call names none; it
is made in float64 instead, from the numbers themselves and not by widening what was rounded. `torch.tensor` and its
like make their tensors out of the dispatcher's sight, and are met as functions.

Not covered: `torch.get_default_dtype()` and `torch.Tensor([0.1])` tell and give the process's dtype, and an operation
that makes several tensors of integers makes them in it. Such code computes in less than float64, which a comparison
sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["double"]

_WIDE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}
_FROM_DATA = frozenset({torch.tensor, torch.as_tensor, torch.asarray})
_WHERE = frozenset({torch.where, Tensor.where})


@contextmanager
def double() -> Iterator[None]:
    """New tensors of this thread are float64 (complex128) where nobody says otherwise."""
    with _Operations(), _Functions():
        yield


def _is_narrow(thing: Any) -> bool:
    """Whether something is a tensor of floats, real or complex, that could be wider."""
    inexact = isinstance(thing, Tensor) and (thing.is_floating_point() or thing.is_complex())
    return inexact and thing.dtype not in (torch.float64, torch.complex128)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return _WIDE.get(dtype, torch.float64)


class _Functions(TorchFunctionMode):
    """Makes tensors of Python's numbers in float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        if (
            function in _WHERE
            and any(isinstance(one, float) for one in given)
            and not any(map(_is_narrow, given))
        ):
            args, kwargs = tree_map_only((Tensor, float), _number, (args, kwargs))
        result = function(*args, **kwargs)
        if function in _FROM_DATA and _is_narrow(result) and kwargs.get("dtype") is None:
            data = args[0] if args else next(iter(kwargs.values()))
            if not hasattr(data, "dtype"):
                return function(*args, **{**kwargs, "dtype": _wide(result.dtype)})
        return result


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes in float64 what an operation would make in the default dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never: skipping it would import the compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(one, Tensor) and one.is_floating_point() for one in args):  # nearly always
            return function(*args, **kwargs)
        if function is torch.ops.aten.scalar_tensor.default and kwargs.get("dtype") in _defaults():
            return function(*args, **{**kwargs, "dtype": _wide(kwargs["dtype"])})
        given = tree_leaves((args, kwargs))
        tensors = [one for one in given if isinstance(one, Tensor)]
        free = not function._schema.is_mutable and not any(isinstance(one, torch.dtype) for one in given)
        if not free or any(not _is_whole(one) for one in tensors):
            return function(*args, **kwargs)
        if tensors:
            result = function(*args, **kwargs)
            return self._from_integers(function, args, kwargs) if _is_narrow(result) else result
        return self._from_nothing(function, args, kwargs)

    def _from_integers(self, function: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, Tensor.double, (args, kwargs))
        return function(*args, **kwargs)

    def _from_nothing(self, function: Any, args: Any, kwargs: Any) -> Any:
        arguments = function._schema.arguments
        if not any(each.name == "dtype" and each.default_value is None for each in arguments):
            return function(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in function.tags:
            result = function(*args, **kwargs)
            return (
                function(*args, **{**kwargs, "dtype": _wide(result.dtype)}) if _is_narrow(result) else result
            )
        return function(*args, **{"dtype": torch.float64, **kwargs})


def _defaults() -> tuple[torch.dtype, ...]:
    return torch.get_default_dtype(), torch.complex64


def _number(thing: Tensor | float) -> Tensor:
    """A number, or a tensor of integers, as floats; a mask is no number."""
    if not isinstance(thing, Tensor):
        return torch.tensor(thing, dtype=torch.float64)
    return thing.double() if _is_whole(thing) and thing.dtype is not torch.bool else thing


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor holds integers or truths."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)
