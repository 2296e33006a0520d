"""The numbers of linear operators as a module stores them, in float64, and new ones as they are to be stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bnfold import weights
from bnfold.algebra import Array, Linear, round_to_odd
from bnfold.equivalence import UNIT_ROUNDOFF
from bnfold.torch.constants import Evaluator, numbers, slots_of
from bnfold.torch.draft import LinearPlace
from bnfold.torch.hooks import computes_weight
from bnfold.torch.sandbox import copy_module
from bnfold.torch.tensors import leaves, walk
from bnfold.torch.trace import Value

__all__ = [
    "copy_with",
    "measure",
    "round_like",
    "stored_numbers",
    "stored_tensors",
    "stored_weight",
    "to_float64",
]


def to_float64(model: nn.Module) -> nn.Module:
    """A copy of a module with every float tensor in float64.

    Raises:
        Exception: whatever the module raises when it is copied.
    """
    twin = copy_with(model, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    for module in twin.modules():
        if isinstance(module, torch.jit.ScriptModule):
            module.double()
    return twin


def copy_with(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a module, its tensors changed.

    Raises:
        Exception: whatever the module raises when it is copied.
    """
    memo: dict[int, Any] = {}
    for _, module in walk(model):
        if not isinstance(module, torch.jit.ScriptModule):
            for _, tensor in leaves([module._parameters, module._buffers, vars(module)]):
                memo.setdefault(id(tensor), _changed(tensor, change))
    return copy_module(model, memo)


def _changed(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    new = change(tensor.detach())
    new = new.clone() if new.dtype == tensor.dtype else new
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def stored_tensors(model: nn.Module, place: LinearPlace) -> tuple[Tensor, Tensor | None]:
    """The tensors at the two slots, or the parts of them that are used; a computed weight as it is now.

    Of numbers that code computes, the first tensor among those that it computes them from.
    """
    if place.code is not None:
        return _held(model, next(iter(slots_of(place.code[0]).values()))), None
    module = model.get_submodule(place.weight.module)
    bias = None if place.bias is None else place.bias.read(model)
    if place.computed == "parametrization":
        held: Any = module.parametrizations
        weight = next(iter(held["weight"].parameters(recurse=False)))
    elif place.computed:
        weight = next(
            p for name, p in module._parameters.items() if p is not None and name.startswith("weight_")
        )
    else:
        held = place.weight.read(model)
        assert held is not None
        weight = held
    return weight, bias


def stored_weight(model: nn.Module, place: LinearPlace, scaled: bool = True) -> npt.NDArray[Any]:
    """The weight that an operator uses, in float64; or that which its code multiplies by constants first."""
    if place.code is not None:
        return _compute_by_code(model, place.code[0])
    if place.computed:
        tensor = _compute_weight(model.get_submodule(place.weight.module), place.computed)
    else:
        tensor = numbers(stored_tensors(model, place)[0])
    array = tensor.numpy()
    if scaled and place.scaling is not None:
        array = array * place.scaling
    return array.T if place.transposed else array


def _compute_weight(module: nn.Module, how: str) -> Tensor:
    """The weight that a parametrization or hook computes, in float64."""
    twin = to_float64(module)
    with torch.no_grad():
        if how == "hook":
            hook = next(h for h in twin._forward_pre_hooks.values() if computes_weight(h))
            return numbers(_run_hook(hook, twin))
        return numbers(twin.weight)  # type: ignore[arg-type]


def _run_hook(hook: Any, module: nn.Module) -> Tensor:
    options = {"do_power_iteration": False} if hasattr(hook, "n_power_iterations") else {}
    compute = hook.apply_mask if hasattr(hook, "apply_mask") else hook.compute_weight
    weight: Tensor = compute(module, **options)
    return weight


def stored_numbers(model: nn.Module, place: LinearPlace) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """The weight and the bias that an operator uses, in float64."""
    if place.code is not None:
        own = place.code[1]
        return stored_weight(model, place), None if own is None else _compute_by_code(model, own)
    weight, bias = stored_weight(model, place), stored_tensors(model, place)[1]
    if bias is None:
        return weight, None
    return weight, numbers(bias).numpy() * (1.0 if place.bias_scaling is None else place.bias_scaling)


def _compute_by_code(model: nn.Module, value: Value) -> npt.NDArray[Any]:
    """What code computes from the tensors that a module holds, in float64."""
    evaluator = Evaluator()
    evaluator.known = {place: numbers(_held(model, slot)) for place, slot in slots_of(value).items()}
    return evaluator.array(value)


def _held(model: nn.Module, value: Value) -> Tensor:
    """What a module holds at the place of a value."""
    slot = value.slots[0]
    tensor: Tensor = getattr(model.get_submodule(slot.module), slot.attribute)
    return tensor


def round_like(array: Array, like: Tensor) -> Tensor:
    """Float64 numbers as a tensor of another's dtype and device, rounded once."""
    if like.device.type == "meta":
        return torch.empty(array.shape, dtype=like.dtype, device="meta")
    narrow = like.dtype not in (torch.float64, torch.float32)
    rounded = round_to_odd(array) if narrow else np.require(array, requirements=["C", "W"])
    if array.shape == like.shape:
        return torch.empty_like(like, requires_grad=False).copy_(torch.from_numpy(rounded))
    return torch.from_numpy(rounded).to(like.device, like.dtype, copy=True)


def measure(before: nn.Module, after: nn.Module, place: LinearPlace, linear: Linear) -> float | None:
    """How far the numbers of a folded operator are off, as a share of what they may be (see `bnfold.weights`).

    Args:
        before: the module as it was read.
        after: the folded one.
        place: where the operator keeps its numbers.
        linear: what it has absorbed.

    Returns:
        At most 1 where every number is right; None where code multiplies what is stored, which is rounded besides, or
        computed all of it, and where there are no numbers.
    """
    if place.code is not None:
        return None
    like = stored_tensors(before, place)[0]
    dtype = str(like.dtype).removeprefix("torch.")
    scaled = place.scaling is not None or place.bias_scaling is not None
    if scaled or dtype not in UNIT_ROUNDOFF or like.device.type == "meta":
        return None
    numbers, new = stored_numbers(before, place), stored_numbers(after, replace(place, computed=""))
    return weights.measure(linear, numbers, new, dtype, bool(linear.sealed) and place.bias is None)
