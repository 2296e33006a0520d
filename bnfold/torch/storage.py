"""Bind each linear operator to the place where its weight and its bias are stored, or say why it has none.

An operator is bound to the parameter that its weight is, through casts and transposes, or to the module whose
parametrization or hook computes it. Where a bias can be added, it is bound to the place of that.

**Scaled weights.** Code may multiply a parameter by constants on every pass (the mask of a pruned net, the constant of
an equalised learning rate). Rows and columns are scaled by what is written into the parameter, before the code
multiplies: `(a W b) * c = a (W * c) b`, whatever zeros c has. A bias takes a sum, so it is divided by its constant
first, which must not be zero.

**Any other computation** of parameters and constants (a standardised weight, which would undo any such scale) is done
once and for all, where a module does nothing else: it becomes the operator, with the weight that it computed.

**Sharing** is counted by parameter. Two modules that hold one Parameter are two places, since each can be given its
own; two calls of one module are one place; a parameter that is read in any other way belongs to whoever reads it, and
the operator stays as it is. So do operators that store one parameter in different ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold import reasons
from bnfold.algebra import Array, Linear
from bnfold.errors import Refuse
from bnfold.torch.capture import computes_weight
from bnfold.torch.constants import Evaluator, slots_of
from bnfold.torch.draft import DraftNode, LinearPlace
from bnfold.torch.tensors import Part, Slot, inside, returned
from bnfold.torch.trace import Call, Frame, Trace, Value

if TYPE_CHECKING:
    from bnfold.torch.calls import ModuleCalls

__all__ = ["Origin", "bind_linears", "choose", "origin_of", "roots_of"]


def bind_linears(model: nn.Module, trace: Trace, items: Sequence[DraftNode], calls: ModuleCalls) -> None:
    """Give every linear operator its place, or refuse it."""
    linears, evaluator = [item for item in items if item.linear is not None], Evaluator()
    for item in linears:
        _bind(model, item, evaluator, calls)
    used = _other_reads(trace, items)
    for item in linears:
        _check_reads(trace, item, used)
    _check_sharing([item for item in linears if item.linear is not None])


def _bind(model: nn.Module, item: DraftNode, evaluator: Evaluator, calls: ModuleCalls) -> None:
    """Find where a linear operator keeps its numbers."""
    assert item.weight is not None
    assert item.linear is not None
    frame = item.call.frame
    if frame.module is not None and frame.path is None:
        return item.refuse(reasons.HOMELESS())
    found, computed = origin_of(item.weight), ""
    if found.factors or not found.value.slots:
        computed = _how_computed(item, item.weight)
        found = Origin(item.weight) if computed else found
    scaling = found.scaling(evaluator)
    if not computed and (not found.value.slots or scaling is None):
        return _bind_code(item, evaluator, calls)
    origin = found.value
    if not item.weight.constant and not computed:
        return item.refuse(reasons.WEIGHT_CHANGES(role="weight"))
    if not _is_plain(origin):
        return item.refuse(reasons.NOT_ORDINARY())
    slot = Slot(frame.path or "", "weight", "parameter") if computed else choose(origin, frame)
    if slot is None:
        names = " and ".join(f"`{s.name}`" for s in origin.slots[:3])
        return item.refuse(reasons.HELD_BY_SEVERAL(names=names))
    bias, bias_scaling = _bind_bias(model, item, slot), None
    if item.bias is not None and isinstance(bias, Slot):
        bias_scaling = origin_of(item.bias).scaling(evaluator)
        if bias_scaling is None or np.any(bias_scaling == 0):
            bias = reasons.WEIGHT_COMPUTED(role="bias")
    part = found.part
    if part is not None and item.bias is None and isinstance(bias, Slot):
        bias = reasons.PART(name=slot.name)
    if isinstance(bias, str):
        if item.bias is not None:
            return item.refuse(bias)
        item.linear, bias = replace(item.linear, biasless=bias), None
    elif item.op != "Embedding":
        item.linear = replace(item.linear, biasless="")
    bias_part = origin_of(item.bias).part if item.bias is not None else None
    item.place = LinearPlace(slot, found.transposed, bias, computed, part=part, bias_part=bias_part)
    if found.factors:
        item.linear = replace(item.linear, centre=None)
        item.place = replace(item.place, scaling=scaling)
    if item.bias is not None and origin_of(item.bias).factors:
        item.place = replace(item.place, bias_scaling=bias_scaling)
    item.site = slot.module if slot.attribute == "weight" and slot.module and part is None else slot.name
    item.site += "" if part is None else str(part)
    return None


def _bind_code(item: DraftNode, evaluator: Evaluator, calls: ModuleCalls) -> None:
    """Find a module that does nothing but to compute a weight from what it holds, and to use it: it can become that.

    What it holds may be anybody's as well, and stays as it is.
    """
    assert item.weight is not None
    assert item.linear is not None
    computed = reasons.WEIGHT_COMPUTED(role="weight")
    known = [value for value in (item.weight, item.bias) if value is not None]
    roots = [root for value in known for root in slots_of(value).values()]
    if not all(value.constant and slots_of(value) for value in known) or any(
        root.dtype != item.weight.dtype for root in roots
    ):
        return item.refuse(computed)
    try:
        for value in known:
            evaluator.array(value)
        check_form(item.linear, item.op, item.call.made[0].rank)
        host = calls.find([item.name], item.inputs[0], item.outputs[0], {})
    except Refuse as refusal:
        return item.refuse(reasons.WEIGHT_COMPUTED_AS(role="weight", because=refusal))
    except Exception:  # noqa: BLE001 whatever torch says of what cannot be repeated in float64
        return item.refuse(computed)
    code = (item.weight, item.bias, host)
    item.place = LinearPlace(
        Slot(f"{host.path}.merged", "weight", "parameter"), False, None, "code", code=code
    )
    item.linear, item.site = replace(item.linear, biasless=""), host.path
    return None


def check_form(linear: Linear, op: str, rank: int) -> None:
    """Refuse what no module of torch.nn computes, or what is no operator by itself."""
    window = linear.window
    if op not in ("Gemm", "MatMul", "Conv") or (op == "Conv" and (window is None or window.pads is None)):
        raise Refuse(reasons.NOT_ALONE())
    if window is None and {linear.in_axis, linear.out_axis} != {rank - 1}:
        raise Refuse(reasons.LAST_AXIS())
    if window is not None and any(before != after for before, after in window.pads or ()):
        raise Refuse(reasons.PADS_UNEVENLY())


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
        origin = origin_of(item.bias)
        if not item.bias.constant or not origin.value.slots or origin.transposed:
            return reasons.WEIGHT_COMPUTED(role="bias")
        return choose(origin.value, frame) or reasons.BIAS_OF_SEVERAL()
    assert item.linear is not None
    module = frame.module
    if module is not None and weight.name == f"{frame.path}.weight" and getattr(module, "bias", 0) is None:
        return Slot(weight.module, "bias", "parameter")
    nobody = reasons.NO_BIAS(where=frame.path or type(model).__name__)
    return item.linear.biasless or nobody


def _other_reads(trace: Trace, items: Sequence[DraftNode]) -> dict[int, str]:
    """Parameters that are read otherwise than as the weight or bias of a linear operator, and by whom."""
    reads: dict[int, str] = {}
    bound: dict[int, set[int]] = {}
    for item in items:
        if isinstance(item.place, LinearPlace) and item.linear is not None and item.place.code is None:
            bound.setdefault(id(item.call), set()).update((id(item.weight), id(item.bias)))
    computed = [i.place.weight for i in items if isinstance(i.place, LinearPlace) and i.place.computed]
    parametrized = tuple(f"{slot.module}.parametrizations.weight" for slot in computed)
    for item in items:
        if parametrized and (item.call.frame.path or "").startswith(parametrized):
            continue
        own = bound.get(id(item.call), set())
        calls = [item.call] if item.joined is None else [item.call, item.joined]
        for value in (value for call in calls for value in call.reads.values()):
            read = _factors_of(item, value) if id(value) in own else roots_of(value)
            reads.update(dict.fromkeys(read, item.name))
    for value in trace.outputs.values():
        reads.update(dict.fromkeys(roots_of(value), "the output of the model"))
    return reads


def _check_reads(trace: Trace, item: DraftNode, used: Mapping[int, str]) -> None:
    if item.linear is None or item.weight is None:
        return
    alone = isinstance(item.place, LinearPlace) and item.place.code is not None
    for what, value in (("weight", item.weight), ("bias", item.bias)):
        if value is None:
            continue
        scales = _factors_of(item, value)
        for root in roots_of(value):
            taken = root in used and root not in scales and not alone
            if taken or _changes(trace, root):
                row = reasons.READ_AS_WELL if taken else reasons.WEIGHT_CHANGES
                item.refuse(row(role=what, who=used.get(root)))
                return


def _factors_of(item: DraftNode, value: Value) -> dict[int, Value]:
    """What scales the weight or bias of an operator, and must stay as it is; nothing of what else its call is."""
    if not isinstance(item.place, LinearPlace) or (value is item.weight and item.place.computed):
        return {}
    factors = (factor for factor, _, _ in origin_of(value).factors if isinstance(factor, Value))
    return {root: slot for factor in factors for root, slot in roots_of(factor).items()}


def _changes(trace: Trace, root: int) -> bool:
    return any(id(v) == root and id(v.tensor) in trace.changed_slots for v in trace.slots.values())


def _check_sharing(linears: list[DraftNode]) -> None:
    """Refuse operators that store one parameter in different ways."""
    uses: dict[str, dict[tuple[Part | None, Any], list[DraftNode]]] = {}
    for item in linears:
        place = item.place
        assert isinstance(place, LinearPlace)
        for slot, part in ((place.weight, place.part), (place.bias, place.bias_part)):
            if slot is not None:
                uses.setdefault(slot.name, {}).setdefault((part, _kind(item)), []).append(item)
    for name, kinds in uses.items():
        clashes = [(one, other) for one, other in permutations(kinds, 2) if _meet(one[0], other[0])]
        for one, other in clashes:
            for item in kinds[one]:
                item.refuse(reasons.OTHER_WAY(name=name, other=kinds[other][0].name))


def _meet(first: Part | None, second: Part | None) -> bool:
    """Whether two parts of one parameter, None for all of it, have a number in common."""
    return first is None or second is None or first.overlaps(second)


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
    scalings = (item.place.scaling, item.place.bias_scaling)
    scaled = tuple(None if each is None else each.tobytes() for each in scalings)
    parts = (item.place.part, item.place.bias_part)
    return (item.place.weight.name, bias, item.place.transposed, item.bias is None, *parts, *scaled, *form)


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
_CUTS = ("slice", "select", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind")
_PLAIN_STEPS = ("detach", "alias", "contiguous", "clone", "_to_copy")


@dataclass(frozen=True)
class Origin:
    """What a weight or bias is computed from.

    Attributes:
        value: a parameter or buffer; the value itself where it is not one of those, scaled.
        transposed: whether it was transposed on the way.
        factors: by what it was multiplied, or divided where the first flag says so; laid out as the parameter is, or
            as its transpose where the second one does.
        part: which part of the parameter it is; what is transposed and multiplied is that. None for all of it.
    """

    value: Value
    transposed: bool = False
    factors: tuple[tuple[Any, bool, bool], ...] = ()
    part: Part | None = None

    def scaling(self, evaluator: Evaluator) -> Array | None:
        """The product of all factors, as large as the parameter; None where it is not known or not finite."""
        shape = self.value.shape if self.part is None else self.part.shape
        whole = np.ones(shape)
        try:
            with np.errstate(all="ignore"):
                for factor, divides, turned in self.factors:
                    array = (
                        evaluator.array(factor) if isinstance(factor, Value) else np.asarray(float(factor))
                    )
                    array = np.atleast_2d(array).T if turned else array
                    whole = whole / array if divides else whole * array
        except Exception:  # noqa: BLE001 whatever torch says of what cannot be repeated in float64
            return None
        return whole if whole.shape == shape and np.isfinite(whole).all() else None


def origin_of(weight: Value) -> Origin:
    """The parameter that a weight is, through casts, transposes and products by constants."""
    return _trace_back(weight) or Origin(weight)


def _trace_back(value: Value) -> Origin | None:
    if value.slots:
        return Origin(value)
    call = value.call
    if not value.constant or call is None or call.changed or call.written:
        return None
    if call.label in ("mul", "div", "neg"):
        return _product_of(value, call)
    if call.label in _CUTS:
        return _part_of(value, call)
    turns = value.rank == 2 and (call.label == "t" or (call.label in _SWAPS and _is_turn(call.args[1:])))
    if len(call.reads) != 1 or not (turns or call.label in _PLAIN_STEPS):
        return None
    found = _trace_back(next(iter(call.reads.values())))
    return found if found is None or not turns else replace(found, transposed=not found.transposed)


def _part_of(value: Value, call: Call) -> Origin | None:
    """The box of a parameter that a value is, told by where it would lie in the memory of one."""
    source, *settings = call.args
    if not source.slots or 0 in source.shape or any(isinstance(one, Value) for one in settings):
        return None
    given = dict(zip((each.name for each in call.function._schema.arguments), call.args, strict=False))
    axis = {**given, **call.kwargs}.get("dim", 0) % source.rank
    whole = torch.empty(source.shape, device="meta")
    seen = list(returned(call.function(whole, *settings, **call.kwargs)))[call.made.index(value)]
    count = seen.shape[axis] if seen.dim() == whole.dim() else 1
    if count > 1 and seen.stride(axis) != whole.stride(axis):
        return None
    start = seen.storage_offset() // whole.stride(axis)
    ends = ((0, size) if place != axis else (start, start + count) for place, size in enumerate(source.shape))
    return Origin(source, part=Part(tuple(ends), tuple(value.shape)))


def _product_of(value: Value, call: Call) -> Origin | None:
    """The parameter of the shape of a product that is one of its factors; one that is learned before any other."""
    first, *rest = call.args
    factor: Any = rest[0] if rest else -1.0
    pairs = [(first, factor), (factor, first)] if call.label == "mul" else [(first, factor)]
    found = [
        replace(origin, factors=(*origin.factors, (other, call.label == "div", origin.transposed)))
        for part, other in pairs
        if isinstance(part, Value) and part.shape == value.shape and not call.kwargs
        for origin in [_trace_back(part)]
        if origin is not None and not _depends(other, origin.value)
    ]
    return min(found, key=lambda origin: origin.value.slots[0].kind != "parameter", default=None)


def _depends(factor: Any, root: Value) -> bool:
    return isinstance(factor, Value) and (not factor.constant or id(root) in roots_of(factor))


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
