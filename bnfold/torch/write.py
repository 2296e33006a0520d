"""Write a plan into a module: new weights where something was absorbed, `nn.Identity` where a BatchNorm was.

The module is edited, not rebuilt: its class, its methods and the names in its state dict stay. Each new weight is
computed in float64 from the stored one and rounded once to the dtype it is stored in; it is a new Parameter at its
slot, so that a module which held the same Parameter keeps the old one. A BatchNorm module *becomes* what is left of
it, as the object that it is, so that every reference to it (in a list, in a bound method) sees the change.

`write` leaves the caller's module alone and returns a copy that shares no tensor with it: what is replaced is not
copied first. A copy that shared the unchanged tensors would cost less memory, but training one would change the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold import reasons
from bnfold.algebra import Affine, Array
from bnfold.errors import Refuse
from bnfold.ir import Node
from bnfold.merge import Merged
from bnfold.operators import Numbers, Operator, of_linear
from bnfold.torch.calls import ModulePlace
from bnfold.torch.draft import LinearPlace, NormPlace
from bnfold.torch.formulas import FormulaPlace
from bnfold.torch.hooks import computes_weight
from bnfold.torch.merging import compute_merged, put_merged, put_operator
from bnfold.torch.modules import ChannelAdd, ChannelMulAdd, Tail, turn_into
from bnfold.torch.read import Reading
from bnfold.torch.sandbox import copy_module, copy_structure
from bnfold.torch.stored import round_like, stored_numbers, stored_tensors, stored_weight
from bnfold.torch.tensors import Slot, leaves, walk
from bnfold.travel import Plan

__all__ = ["become", "check_fit", "compute_coded", "settle_weight", "write"]


def write(
    model: nn.Module,
    reading: Reading,
    plan: Plan,
    inplace: bool = False,
    merged: Merged | None = None,
    rounded: Rounded | None = None,
) -> nn.Module:
    """The folded module: a copy, or with `inplace` the module itself.

    Args:
        model: the module that was read, or a copy of it (in float64, say).
        reading, plan: what was read, and where every affine went.
        merged: what of that is to be one operator.
        rounded: new numbers of operators that another copy was given, which must be gone; what is missing is put there.

    Raises:
        UnreadableModel: the module cannot be copied.
    """
    target = model if inplace else copy_structure(model)
    made = _edit(target, reading, plan, merged or Merged(plan.graph), {} if rounded is None else rounded)
    return target if inplace else _part(target, made)


def _part(model: nn.Module, made: list[Tensor]) -> nn.Module:
    """Give a structural copy tensors of its own, except for those that are new anyway."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in made}
    for _, module in walk(model):
        if not isinstance(module, torch.jit.ScriptModule):
            for _, tensor in leaves(vars(module)):
                if nn.parameter.is_lazy(tensor):
                    make: Any = type(tensor)
                    memo.setdefault(id(tensor), make(tensor.requires_grad, tensor.device, tensor.dtype))
                elif not tensor.is_leaf or tensor.layout is not torch.strided:
                    memo.setdefault(id(tensor), tensor.detach().clone())
    return copy_module(model, memo)


def _edit(model: nn.Module, reading: Reading, plan: Plan, merged: Merged, rounded: Rounded) -> list[Tensor]:
    """Apply the difference; return the tensors that are new."""
    after = {node.name: node for node in plan.graph.nodes}
    operators = compute_merged(model, reading, merged, rounded)
    nodes = [node for node in reading.graph.nodes if node.name not in merged.nodes]
    changed: dict[str, tuple[LinearPlace, Node]] = {}
    for node in nodes:
        new = after.get(node.name)
        if new is not None and new.linear is not None and new.linear is not node.linear:
            place = reading.linears[node.name]
            changed.setdefault(place.weight.name, (place, new))
    coded = [compute_coded(model, place, new) for place, new in changed.values() if place.code is not None]
    made: list[Tensor] = []
    done: set[str] = set()
    for node in sorted(nodes, key=lambda node: -node.affine.rank if node.affine else 0):
        new = after.get(node.name)
        kept = new is not None and new.op == node.op and new.affine is node.affine
        if node.name in reading.norms and node.place not in done and not kept:
            made += _edit_norm(model, reading.norms[node.name], new)
            done.add(node.place)
    for place, new in changed.values():
        if place.code is None:
            made += _edit_linear(model, place, new, rounded)
    for one in coded:
        made += put_operator(model, *one)
    for name, formula in reading.formulas.items():
        own, new = reading.graph[name], after.get(name)
        if name not in merged.nodes and (new is None or new.affine is not own.affine):
            made += _edit_formula(model, formula, None if new is None else new.affine)
    return made + put_merged(model, operators)


# ---------------------------------------------------------------- linear operators


def compute_coded(
    model: nn.Module, place: LinearPlace, node: Node
) -> tuple[ModulePlace, Operator, Numbers, Tensor]:
    """What is to stand for a module whose code computes the weight: see `put_operator`.

    For all of them before one is put: they may be computed from the same parameter.
    """
    assert place.code is not None
    operator = of_linear(node)
    numbers = operator.numbers(lambda node: stored_numbers(model, place))
    return place.code[2], operator, numbers, stored_tensors(model, place)[0]


def _edit_linear(model: nn.Module, place: LinearPlace, node: Node, rounded: Rounded) -> list[Tensor]:
    module = model.get_submodule(place.weight.module)
    weight, bias = stored_tensors(model, place)
    like = weight if bias is None else bias
    new_weight, new_bias = _round(model, place, node, (weight, like), rounded)
    if place.computed:
        settle_weight(module, place.computed)
    made = [_put(module, place.weight.attribute, new_weight, weight, place.weight)]
    if new_bias is not None and place.bias is not None:
        owner = model.get_submodule(place.bias.module)
        made.append(_put(owner, place.bias.attribute, new_bias, like, place.bias, len(made[0])))
    return made


Rounded = dict[Any, tuple[Any, ...]]
"""New numbers, by the identity of the operator that they are of, which stands before them so that it lives as long."""


def _round(
    model: nn.Module, place: LinearPlace, node: Node, like: tuple[Tensor, Tensor], rounded: Rounded
) -> tuple[Tensor, Tensor | None]:
    """New weight and bias as they are stored; in memory that the copies have which were given the same `rounded`."""
    key = place.weight.name, id(node.linear)
    if key not in rounded:
        weight, bias = _fold(model, place, node)
        made = round_like(weight, like[0]), None if bias is None else round_like(bias, like[1])
        rounded[key] = (node.linear, *made)
    _, new_weight, new_bias = rounded[key]
    return new_weight, new_bias


def settle_weight(module: nn.Module, how: str) -> None:
    """Make room for a weight that is a parameter. torch's own ways edit what a copy shares with the original."""
    if how == "parametrization":
        _remove_parametrization(module)
        return
    hook = next(h for h in module._forward_pre_hooks.values() if computes_weight(h))
    key = next(key for key, h in module._forward_pre_hooks.items() if h is hook)
    del module._forward_pre_hooks[key]
    for name in [n for n in (*module._parameters, *module._buffers) if n.startswith("weight_")]:
        delattr(module, name)
    vars(module).pop("weight", None)
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for mark in [
            k for k, h in hooks.items() if "SpectralNorm" in type(h).__name__ + repr(getattr(h, "hook", h))
        ]:
            del hooks[mark]


def _remove_parametrization(module: nn.Module) -> None:
    """Take a parametrization off; the class is left alone, since a copy shares it with the original."""
    left: Any = module._modules["parametrizations"]
    del left["weight"]
    kind = type(module)
    if len(left):
        content = {
            name: thing
            for name, thing in vars(kind).items()
            if name not in ("weight", "__dict__", "__weakref__")
        }
        module.__class__ = type(kind.__name__, kind.__bases__, content)
    else:
        del module._modules["parametrizations"]
        module.__class__ = kind.__bases__[0]


def _fold(model: nn.Module, place: LinearPlace, node: Node) -> tuple[Array, Array | None]:
    """New weight and bias in float64, laid out as they are stored.

    What the code multiplies a weight by stands aside: rows and columns may be scaled before or after that.
    """
    assert node.linear is not None
    weight, new_bias = node.linear.fold(*stored_numbers(model, place))
    if place.scaling is not None:
        weight = node.linear.fold_weight(stored_weight(model, place, scaled=False))
    if new_bias is not None and place.bias_scaling is not None:
        new_bias = new_bias / place.bias_scaling
    if node.op == "Embedding" and new_bias is not None:
        weight, new_bias = weight + new_bias, None
    return (np.ascontiguousarray(weight.T) if place.transposed else weight), new_bias


def _put(
    module: nn.Module, attribute: str, new: Tensor, like: Tensor, slot: Slot | None = None, rows: int = 0
) -> Tensor:
    """Store a tensor at a slot, with the gradient setting of the one that was there, whose dtype and device it has.

    Beside a part of a tensor, all stays as it was, and is zero where there was none; then `rows` says how long it is.
    """
    tensor = new
    if slot is not None and slot.part:
        held = getattr(module, attribute)
        part, tensor = tensor, tensor.new_zeros(rows) if held is None else held.detach().clone()
        tensor[slot.index] = part
    if attribute in module._buffers:
        module._buffers[attribute] = tensor
    elif isinstance(vars(module).get(attribute), Tensor) and attribute not in module._parameters:
        vars(module)[attribute] = tensor
    else:
        tensor = nn.Parameter(tensor, like.requires_grad)
        vars(module).pop(attribute, None)
        module._parameters[attribute] = tensor
        if isinstance(module, nn.RNNBase):
            setattr(module, attribute, tensor)  # which notes it in the list of weights that the module keeps
    return tensor


# ---------------------------------------------------------------- BatchNorms


def _edit_norm(model: nn.Module, place: NormPlace, new: Node | None) -> list[Tensor]:
    """Let a BatchNorm module become what is left of it."""
    module = model.get_submodule(place.path)
    left: nn.Module | None = None
    if new is not None:
        assert new.affine is not None
        if new.is_batchnorm and _is_rewritable(module):
            return _rewrite_norm(module, new.affine)
        left = _leftover(module, place, new.affine)
    become(module, place, left)
    return [] if left is None else list(left.parameters())


def become(module: nn.Module, place: NormPlace, left: nn.Module | None) -> None:
    """Let a BatchNorm module become what is left of it: nothing, one module, and whatever it did afterwards."""
    if not place.tail:
        turn_into(module, left or nn.Identity())
        return
    turn_into(module, Tail({} if left is None else {"affine": left}, module, place.tail))


_REWRITABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _edit_formula(model: nn.Module, place: FormulaPlace, affine: Affine | None) -> list[Tensor]:
    """Let the lines of a BatchNorm that is written out compute what is left of it, or what they are given."""
    return [
        _put(module, slot.attribute, round_like(array, like), like)
        for slot, array in place.solve(affine).items()
        for module in [model.get_submodule(slot.module)]
        for like in [getattr(module, slot.attribute)]
    ]


def _is_rewritable(module: nn.Module) -> bool:
    """Whether other numbers make it another affine; where hooks compute too, their share is in what was read."""
    numbers_of = ("weight", "bias", "running_mean", "running_var")
    hooked = module._forward_pre_hooks or module._forward_hooks
    return (
        not hooked
        and type(module) in _REWRITABLE
        and all(isinstance(getattr(module, n), Tensor) for n in numbers_of)
    )


def _rewrite_norm(module: nn.Module, affine: Affine) -> list[Tensor]:
    """Give a BatchNorm that absorbed another affine the numbers of both: mean 0, variance 1, no eps."""
    norm: Any = module
    made: list[Tensor] = []
    for name, values in (("weight", affine.scale), ("bias", affine.shift)):
        like = getattr(norm, name)
        made.append(
            _put(norm, name, round_like(np.broadcast_to(values.ravel(), norm.num_features), like), like)
        )
    norm.running_mean, norm.running_var = (
        torch.zeros_like(norm.running_mean),
        torch.ones_like(norm.running_var),
    )
    norm.eps = 0.0
    return [*made, norm.running_mean, norm.running_var]


def _leftover(module: nn.Module, place: NormPlace, affine: Affine) -> nn.Module:
    """One add, or one multiply and one add, with an affine's numbers."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    like = tensors[0] if tensors else torch.empty((), dtype=place.dtype)
    dtype = torch.float64 if like.dtype == torch.float64 else place.dtype
    like = torch.empty((), dtype=dtype, device=like.device)
    trained = any(p.requires_grad for p in module.parameters())
    bias = round_like(_for_any_rank(module, affine.shift[0]), like)
    if not np.any(affine.scale != 1):
        return ChannelAdd(bias, trained)
    return ChannelMulAdd(round_like(_for_any_rank(module, affine.scale[0]), like), bias, trained)


def _for_any_rank(module: nn.Module, numbers: Array) -> Array:
    """One number per channel, shaped for inputs of every rank that a BatchNorm of torch takes."""
    ranks = {nn.BatchNorm1d: 2, nn.SyncBatchNorm: 4}
    wanted = next((rank for kind, rank in ranks.items() if isinstance(module, kind)), numbers.ndim)
    return numbers.reshape(numbers.shape + (1,) * (wanted - numbers.ndim))


# ---------------------------------------------------------------- what fits


def check_fit(model: nn.Module, reading: Reading) -> Callable[[Node], str]:
    """A question for `travel`: why the numbers of a linear node, with all that it absorbed, cannot be stored."""

    def fits(node: Node) -> str:
        if node.name in reading.formulas and node.affine is not None:
            return _check_formula(reading.formulas[node.name], node.affine)
        place = reading.linears.get(node.name)
        if place is None or node.linear is None:
            return ""
        like, _ = stored_tensors(model, place)
        if like.device.type == "meta":
            return ""
        if like.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            return reasons.STORED_AS(dtype=str(like.dtype).removeprefix("torch."))
        if like.dtype != torch.float16 and _is_moderate(node) and place.bias_scaling is None:
            return ""
        weight, bias = _fold(model, place, node)
        for what, array in (("weight", weight), ("bias", bias)):
            if array is not None and not torch.isfinite(round_like(array, like)).all():
                return reasons.OVERFLOWS(role=what, dtype=str(like.dtype).removeprefix("torch."))
        return ""

    return fits


def _check_formula(place: FormulaPlace, affine: Affine) -> str:
    try:
        place.solve(affine)
    except Refuse as refusal:
        return str(refusal)
    return ""


def _is_moderate(node: Node) -> bool:
    """Whether nothing absorbed comes near the range of a float32."""
    assert node.linear is not None
    linear = node.linear
    pairs = [pair for pair in (linear.before, linear.after) if pair is not None]
    arrays = [array for pair in pairs for array in pair] + (
        [linear.parallel] if linear.parallel is not None else []
    )
    return all(np.abs(array).max(initial=0.0) < 1e12 for array in arrays)
