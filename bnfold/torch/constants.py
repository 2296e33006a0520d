"""Compute constants again in float64: what a model works out of its parameters and buffers on every pass.

A hand-written BatchNorm computes `(x - mean.view(1, -1, 1, 1)) / torch.sqrt(var + eps)`; the numbers that an affine
needs are those of `mean.view(...)` and `torch.sqrt(...)`. They are computed here from the stored tensors, widened to
float64 first, so that nothing is rounded on the way: a conversion to another float dtype is left out. Tensors on the
`meta` device have no numbers; some between one and two stand in for them, no two of a tensor alike, so that decisions
can be looked at. Not covered: those that rest on signs (a scale that is negative does not pass a ReLU), or on whether
two tensors of one shape hold the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnfold.algebra import Affine, Array
from bnfold.torch.tensors import returned
from bnfold.torch.trace import Call, Like, Value

__all__ = ["Evaluator", "numbers", "slots_of"]


def slots_of(value: Value, found: dict[int, Value] | None = None) -> dict[int, Value]:
    """The parameters, buffers and attributes that a constant is computed from, by identity of the value."""
    found = {} if found is None else found
    if value.slots:
        found[id(value)] = value
    elif value.constant and value.call is not None:
        for part in value.call.reads.values():
            slots_of(part, found)
    return found


def numbers(tensor: Tensor) -> Tensor:
    """The numbers of a stored tensor on the CPU, float64 where they are floats."""
    tensor = tensor.detach()
    if tensor.device.type == "meta":
        if not tensor.is_floating_point():
            return torch.ones(tensor.shape, dtype=tensor.dtype)
        return 1 + (torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape) * 5**0.5) % 1
    tensor = tensor.cpu()
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


class Evaluator:
    """Values that were computed already, by identity.

    Several passes over one model may share it: what the model holds is known by its tensor, and so are the affines of
    its BatchNorms.
    """

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.normalisations: dict[Any, tuple[Affine | None, str]] = {}

    def array(self, value: Value) -> Array:
        """The numbers of a constant as float64."""
        return np.asarray(self.tensor(value).double().numpy())

    def tensor(self, value: Value) -> Tensor:
        """The numbers of a constant.

        Raises:
            Exception: whatever torch raises where a computation cannot be repeated in float64.
        """
        if id(value) not in self.known:
            if value.tensor is not None:
                self.known[id(value)] = self._numbers(value.tensor)
            else:
                assert value.call is not None
                self._run(value.call)
        found: Tensor = self.known[id(value)]
        return found

    def _numbers(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.held:
            self.held[id(tensor)] = tensor, numbers(tensor)
        return self.held[id(tensor)][1]

    def _run(self, call: Call) -> None:
        args, kwargs = self._thaw(call.args), self._thaw(call.kwargs)
        with torch.no_grad():
            result = call.function(*args, **kwargs)
        for value, tensor in zip(call.made, returned(result), strict=True):
            self.known[id(value)] = tensor

    def _thaw(self, thing: Any) -> Any:
        """Arguments with tensors in the place of values, on the CPU and without narrowing."""
        if isinstance(thing, Value):
            return self.tensor(thing)
        if isinstance(thing, Like):
            return torch.empty(thing.shape, dtype=self._thaw(thing.dtype))
        if isinstance(thing, torch.dtype):
            return torch.float64 if thing.is_floating_point else thing
        if isinstance(thing, torch.device):
            return torch.device("cpu")
        if isinstance(thing, tuple):
            return [self._thaw(part) for part in thing]
        if isinstance(thing, dict):
            return {key: self._thaw(part) for key, part in thing.items()}
        return thing
