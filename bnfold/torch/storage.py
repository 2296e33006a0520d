"""Bind each linear operator to the place where its weight and its bias are stored, or say why it has none.

An operator is bound to the parameter that its weight is, through casts and transposes, or to the module whose
parametrization or hook computes it. Where a bias can be added, it is bound to the place of that.

**Sharing** is counted by parameter. Two modules that hold one Parameter are two places, since each can be given its
own; two calls of one module are one place; a parameter that is read in any other way belongs to whoever reads it, and
the operator stays as it is. So do operators that store one parameter in different ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.torch.capture import computes_weight
from bnfold.torch.constants import slots_of
from bnfold.torch.draft import DraftNode, LinearPlace
from bnfold.torch.tensors import Slot, inside
from bnfold.torch.trace import Frame, Trace, Value

__all__ = ["HOMELESS", "bind_linears", "choose", "roots_of"]

HOMELESS = "its module is not held by the model; make it an attribute, or keep it in an nn.ModuleList"


def bind_linears(model: nn.Module, trace: Trace, items: Sequence[DraftNode]) -> None:
    """Give every linear operator its place, or refuse it."""
    linears = [item for item in items if item.linear is not None]
    for item in linears:
        _bind(model, item)
    used = _other_reads(trace, items)
    for item in linears:
        _check_reads(trace, item, used)
    _check_sharing([item for item in linears if item.linear is not None])


def _bind(model: nn.Module, item: DraftNode) -> None:
    """Find where a linear operator keeps its numbers."""
    assert item.weight is not None
    assert item.linear is not None
    frame = item.call.frame
    if frame.module is not None and frame.path is None:
        return item.refuse(HOMELESS)
    origin, transposed = _origin(item.weight)
    computed = ""
    if not origin.slots:
        computed = _how_computed(item, origin)
        if not computed:
            return item.refuse("its weight is computed while the model runs")
    if not item.weight.constant and not computed:
        return item.refuse("its weight changes while the model runs")
    if not _is_plain(origin):
        return item.refuse("its weight is no ordinary tensor of numbers")
    slot = Slot(frame.path or "", "weight", "parameter") if computed else choose(origin, frame)
    if slot is None:
        names = " and ".join(f"`{s.name}`" for s in origin.slots[:3])
        return item.refuse(
            f"its weight is held by {names} at once, and its code does not tell which is meant"
        )
    bias = _bind_bias(model, item, slot)
    if isinstance(bias, str):
        if item.bias is not None:
            return item.refuse(bias)
        item.linear, bias = replace(item.linear, biasless=bias), None
    elif item.op != "Embedding":
        item.linear = replace(item.linear, biasless="")
    item.place = LinearPlace(slot, transposed, bias, computed)
    item.site = slot.module if slot.attribute == "weight" and slot.module else slot.name
    return None


def _how_computed(item: DraftNode, origin: Value) -> str:
    """Whether torch's parametrizations or hooks compute the weight of the module that runs, and from it alone."""
    module, path = item.call.frame.module, item.call.frame.path
    if module is None or not path or origin.data:
        return ""
    if any(not inside(slot.module, path) for root in roots_of(origin).values() for slot in root.slots):
        return ""
    if nn.utils.parametrize.is_parametrized(module, "weight"):
        made = origin.frame.path if origin.frame is not None else None
        return "parametrization" if made and made.startswith(f"{path}.parametrizations.weight") else ""
    hooks = [h for h in module._forward_pre_hooks.values() if computes_weight(h)]
    names = {getattr(h, "name", getattr(h, "_tensor_name", "")) for h in hooks}
    return "hook" if len(hooks) == 1 and names == {"weight"} and origin.constant else ""


def _bind_bias(model: nn.Module, item: DraftNode, weight: Slot) -> Slot | str | None:
    """The slot of the bias, or why there is none."""
    frame = item.call.frame
    if item.op == "Embedding":
        return None
    if item.bias is not None:
        if not item.bias.constant or not item.bias.slots:
            return "its bias is computed while the model runs"
        return choose(item.bias, frame) or "its bias is held by several modules at once"
    assert item.linear is not None
    module = frame.module
    if module is not None and weight.name == f"{frame.path}.weight" and getattr(module, "bias", 0) is None:
        return Slot(weight.module, "bias", "parameter")
    nobody = f"the code of `{frame.path or type(model).__name__}` gives it no bias"
    return item.linear.biasless or nobody


def _other_reads(trace: Trace, items: Sequence[DraftNode]) -> dict[int, str]:
    """Parameters that are read otherwise than as the weight or bias of a linear operator, and by whom."""
    reads: dict[int, str] = {}
    bound: dict[int, set[int]] = {}
    for item in items:
        if item.place is not None and item.linear is not None:
            bound.setdefault(id(item.call), set()).update((id(item.weight), id(item.bias)))
    computed = [i.place.weight for i in items if isinstance(i.place, LinearPlace) and i.place.computed]
    parametrized = tuple(f"{slot.module}.parametrizations.weight" for slot in computed)
    for item in items:
        if parametrized and (item.call.frame.path or "").startswith(parametrized):
            continue
        own = bound.get(id(item.call), set())
        calls = [item.call] if item.joined is None else [item.call, item.joined]
        for value in (value for call in calls for value in call.reads.values()):
            if id(value) not in own:
                reads.update(dict.fromkeys(roots_of(value), item.name))
    for value in trace.outputs.values():
        reads.update(dict.fromkeys(roots_of(value), "the output of the model"))
    return reads


def _check_reads(trace: Trace, item: DraftNode, used: Mapping[int, str]) -> None:
    if item.linear is None or item.weight is None:
        return
    for what, value in (("weight", item.weight), ("bias", item.bias)):
        for root in roots_of(value) if value is not None else ():
            if root in used or _changes(trace, root):
                how = f"is read by `{used[root]}` as well" if root in used else "changes while the model runs"
                item.refuse(f"its {what} {how}")
                return


def _changes(trace: Trace, root: int) -> bool:
    return any(id(v) == root and id(v.tensor) in trace.changed_slots for v in trace.slots.values())


def _check_sharing(linears: list[DraftNode]) -> None:
    """Refuse operators that store one parameter in different ways."""
    uses: dict[str, list[DraftNode]] = {}
    for item in linears:
        assert isinstance(item.place, LinearPlace)
        for slot in (item.place.weight, item.place.bias):
            if slot is not None:
                uses.setdefault(slot.name, []).append(item)
    clashes = [(name, items) for name, items in uses.items() if len({_kind(item) for item in items}) > 1]
    for name, items in clashes:
        for item in items:
            other = next(other for other in items if other is not item)
            item.refuse(f"`{name}` is used in another way by `{other.name}`")


def _kind(item: DraftNode) -> Any:
    assert item.linear is not None
    assert isinstance(item.place, LinearPlace)
    linear = item.linear
    bias = item.place.bias.name if item.place.bias is not None else ""
    form = (
        linear.order,
        linear.groups,
        linear.inputs,
        linear.outputs,
        item.op == "Embedding",
        item.op == "Conv",
    )
    return (item.place.weight.name, bias, item.place.transposed, item.bias is None, *form)


def roots_of(value: Value) -> dict[int, Value]:
    """The slots behind a value that does not depend on the inputs, constant or not."""
    if value.slots:
        return {id(value): value}
    if value.constant:
        return slots_of(value)
    if value.data or value.call is None:
        return {}
    found: dict[int, Value] = {}
    for part in value.call.reads.values():
        found.update(roots_of(part))
    return found


def choose(value: Value, frame: Frame) -> Slot | None:
    """The slot of a parameter that the code of a frame means; None where that cannot be told."""
    own = [slot for slot in value.slots if slot.module == frame.path]
    if len(own) == 1:
        return own[0]
    return value.slots[0] if len(value.slots) == 1 else None


_SWAPS = ("transpose", "permute")
_PLAIN_STEPS = ("detach", "alias", "contiguous", "clone", "_to_copy")


def _origin(weight: Value) -> tuple[Value, bool]:
    """The slot that a weight is, through casts and transposes; and whether it was transposed."""
    transposed = False
    value = weight
    while not value.slots and value.constant and value.call is not None and len(value.call.reads) == 1:
        label, args = value.call.label, value.call.args
        if value.rank == 2 and (label == "t" or (label in _SWAPS and _is_turn(args[1:]))):
            transposed = not transposed
        elif label not in _PLAIN_STEPS:
            break
        value = next(iter(value.call.reads.values()))
    return (value, transposed) if value.slots else (weight, False)


def _is_plain(weight: Value) -> bool:
    """Whether a weight is stored as numbers in memory, not sparse, quantised, or of a class with ways of its own."""
    tensor = weight.tensor
    if tensor is None:
        return True
    ordinary = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return ordinary and tensor.layout == torch.strided and tensor.is_floating_point()


def _is_turn(dims: Any) -> bool:
    flat = [d % 2 for d in (dims[0] if len(dims) == 1 else dims)]
    return flat in ([1, 0], [0, 1]) if len(dims) == 2 else flat == [1, 0]
