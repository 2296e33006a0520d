"""Bind each linear operator to the place where its weight and its bias are stored, or say why it has none.

An operator is bound to the parameter that its weight is, through casts and transposes, or to the module whose
parametrization or hook computes it. Where a bias can be added, it is bound to the place of that.

**Parts.** Code may take a part of a parameter (octave convolutions, slimmable nets, projections of attention, matrices
in a stack): slices, one of many, splits. Each part is a place of its own, and the rest of the parameter stays as it is.
Parts that overlap are used in different ways, and stay. A bias of the same rows can be added where no other part has
those rows, too.

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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold import reasons
from bnfold.algebra import Array, Linear
from bnfold.errors import Refuse
from bnfold.torch.constants import Evaluator, slots_of
from bnfold.torch.draft import DraftNode, LinearPlace
from bnfold.torch.hooks import computes_weight
from bnfold.torch.lower import bind
from bnfold.torch.tensors import Part, Slot, inside
from bnfold.torch.trace import Call, Frame, Trace, Value

if TYPE_CHECKING:
    from bnfold.torch.calls import ModuleCalls

__all__ = ["Origin", "bind_linears", "choose", "origin_of", "roots_of"]


def bind_linears(model: nn.Module, trace: Trace, items: Sequence[DraftNode], calls: ModuleCalls) -> None:
    """Give every linear operator its place, or refuse it."""
    linears, evaluator = [item for item in items if item.linear is not None], Evaluator()
    for item in linears:
        _bind(model, item, evaluator, calls)
    bound: list[DraftNode] = []
    while bound != (linears := [item for item in linears if item.linear is not None]):
        bound, used = linears, _other_reads(trace, items)
        for item in linears:
            _check_reads(trace, item, used)
        linears = [item for item in linears if item.linear is not None]
        _check_new_biases(linears)
        _check_sharing(linears)


def _bind(model: nn.Module, item: DraftNode, evaluator: Evaluator, calls: ModuleCalls) -> None:
    """Find where a linear operator keeps its numbers."""
    assert item.weight is not None
    assert item.linear is not None
    frame = item.call.frame
    if frame.module is not None and frame.path is None:
        return item.refuse(reasons.HOMELESS())
    found, computed = _origin_of_weight(item, item.weight)
    scaling = found.scaling(evaluator)
    if not computed and (not found.value.slots or scaling is None):
        return _bind_code(item, evaluator, calls)
    if not item.weight.constant and not computed:
        return item.refuse(reasons.WEIGHT_CHANGES(role="weight"))
    if not _is_plain(found.value):
        return item.refuse(reasons.NOT_ORDINARY())
    slot = Slot(frame.path or "", "weight", "parameter") if computed else found.slot(frame)
    if slot is None:
        names = " and ".join(f"`{s.name}`" for s in found.value.slots[:3])
        return item.refuse(reasons.HELD_BY_SEVERAL(names=names))
    bias, bias_scaling = _bind_bias(model, item, slot, evaluator)
    if isinstance(bias, str) and item.bias is not None:
        return item.refuse(bias)
    if item.op != "Embedding":
        item.linear = replace(item.linear, biasless=bias if isinstance(bias, str) else "")
    if found.factors:
        item.linear = replace(item.linear, centre=None)
    item.place = LinearPlace(
        slot,
        found.transposed,
        bias if isinstance(bias, Slot) else None,
        computed,
        scaling=scaling if found.factors else None,
        bias_scaling=bias_scaling,
    )
    alone = slot.attribute == "weight" and slot.module and not slot.part
    item.site = slot.module if alone else slot.name
    return None


def _origin_of_weight(item: DraftNode, weight: Value) -> tuple[Origin, str]:
    """What a weight is made of, or itself and how a module computes it on every pass."""
    found = origin_of(weight)
    computed = _how_computed(item, weight) if found.factors or not found.value.slots else ""
    return (Origin(weight) if computed else found), computed


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


def _bind_bias(
    model: nn.Module, item: DraftNode, weight: Slot, evaluator: Evaluator
) -> tuple[Slot | str | None, Array | None]:
    """The slot of the bias, or why there is none, and what its numbers are multiplied by on every pass."""
    if item.op == "Embedding":
        return None, None
    if item.bias is None:
        return _missing_bias(model, item, weight), None
    origin = origin_of(item.bias)
    if not item.bias.constant or not origin.value.slots or origin.transposed:
        return reasons.WEIGHT_COMPUTED(role="bias"), None
    slot, scaling = origin.slot(item.call.frame), origin.scaling(evaluator)
    if slot is None:
        return reasons.BIAS_OF_SEVERAL(), None
    if scaling is None or np.any(scaling == 0):
        return reasons.WEIGHT_COMPUTED(role="bias"), None
    return slot, scaling if origin.factors else None


def _missing_bias(model: nn.Module, item: DraftNode, weight: Slot) -> Slot | str:
    """Where a bias would be stored that is not there, or why it cannot be."""
    assert item.linear is not None
    frame = item.call.frame
    module = frame.module
    if module is not None and weight.whole == f"{frame.path}.weight" and getattr(module, "bias", 0) is None:
        return _new_bias(item.linear, weight, origin_of(item.weight).transposed if item.weight else False)
    nobody = reasons.NO_BIAS(where=frame.path or type(model).__name__)
    return item.linear.biasless or nobody


def _new_bias(linear: Linear, weight: Slot, transposed: bool) -> Slot | str:
    """Where a module that has no bias would hold one."""
    rows = weight.part[:1]
    if weight.part and (transposed or linear.order != "oi" or not isinstance(rows[0], range)):
        return reasons.PART(name=weight.name)
    return Slot(weight.module, "bias", "parameter", rows)


Reads = dict[int, list[tuple[str, Slot | None]]]
"""Who reads each parameter, and of which place; None where that is not known."""


def _other_reads(trace: Trace, items: Sequence[DraftNode]) -> Reads:
    """Parameters that are read otherwise than as the weight or bias of a linear operator which can absorb.

    What such an operator is refused for shows here the next time: then it reads its numbers as they are.
    """
    reads: Reads = {}
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
            for root in read:
                reads.setdefault(root, []).append((item.name, _slot_of(item, value)))
    for value in trace.outputs.values():
        for root in roots_of(value):
            reads.setdefault(root, []).append(("the output of the model", None))
    return reads


def _slot_of(item: DraftNode, value: Value) -> Slot | None:
    """The place of a value that an operator reads as its weight or bias, and no longer absorbs by."""
    if item.linear is not None or not isinstance(item.place, LinearPlace) or item.place.code is not None:
        return None
    if value is item.weight:
        return item.place.weight
    return item.place.bias if value is item.bias else None


def _check_reads(trace: Trace, item: DraftNode, used: Reads) -> None:
    if item.linear is None or item.weight is None:
        return
    assert isinstance(item.place, LinearPlace)
    alone = item.place.code is not None
    for what, value, slot in (
        ("weight", item.weight, item.place.weight),
        ("bias", item.bias, item.place.bias),
    ):
        if value is None:
            continue
        scales = _factors_of(item, value)
        for root in roots_of(value):
            others = () if alone or root in scales else used.get(root, ())
            who = next((name for name, place in others if _is_touched(slot, place)), "")
            if who or _changes(trace, root):
                row = reasons.READ_AS_WELL if who else reasons.WEIGHT_CHANGES
                item.refuse(row(role=what, who=who))
                return


def _is_touched(mine: Slot | None, other: Slot | None) -> bool:
    """Whether what is written at one place may show at another one."""
    if mine is None or other is None:
        return True
    return mine.whole == other.whole and mine.overlaps(other)


def _factors_of(item: DraftNode, value: Value) -> dict[int, Value]:
    """What scales the weight or bias of an operator, and must stay as it is; nothing of what else its call is."""
    if not isinstance(item.place, LinearPlace) or (value is item.weight and item.place.computed):
        return {}
    factors = (factor for factor, _, _ in origin_of(value).factors if isinstance(factor, Value))
    return {root: slot for factor in factors for root, slot in roots_of(factor).items()}


def _changes(trace: Trace, root: int) -> bool:
    if not trace.changed_slots:
        return False
    return any(id(v) == root and id(v.tensor) in trace.changed_slots for v in trace.slots.values())


def _check_sharing(linears: list[DraftNode]) -> None:
    """Refuse operators that store one parameter, or the same numbers of one, in different ways."""
    uses: dict[str, dict[Any, tuple[Slot, list[DraftNode]]]] = {}
    for item in linears:
        assert isinstance(item.place, LinearPlace)
        for slot in (item.place.weight, item.place.bias):
            if slot is not None:
                users = uses.setdefault(slot.whole, {}).setdefault((slot, _kind(item)), (slot, []))
                users[1].append(item)
    pairs = [pair for each in uses.values() for pair in permutations(each.values(), 2)]
    clashes = [(slot, items, others[0]) for (slot, items), (other, others) in pairs if slot.overlaps(other)]
    for slot, items, other in clashes:
        for item in items:
            if item.linear is not None:
                item.refuse(reasons.OTHER_WAY(name=slot.name, other=other.name))


def _check_new_biases(linears: list[DraftNode]) -> None:
    """Let none be added of which two parts of a weight would read the same numbers."""
    new: dict[str, dict[str, tuple[Slot, list[DraftNode]]]] = {}
    for item in linears:
        assert isinstance(item.place, LinearPlace)
        slot = item.place.bias
        if item.bias is None and slot is not None and item.place.weight.part:
            users = new.setdefault(slot.whole, {}).setdefault(item.place.weight.name, (slot, []))
            users[1].append(item)
    for parts in new.values():
        slots = [slot for slot, _ in parts.values()]
        if any(one.overlaps(other) for one, other in combinations(slots, 2)):
            for item in (item for _, items in parts.values() for item in items):
                assert item.linear is not None
                assert isinstance(item.place, LinearPlace)
                item.linear = replace(item.linear, biasless=reasons.BIAS_OF_PARTS())
                item.place = replace(item.place, bias=None)


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
    return (item.place.weight.name, bias, item.place.transposed, item.bias is None, *scaled, *form)


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


@dataclass(frozen=True)
class Origin:
    """What a weight or bias is computed from.

    Attributes:
        value: a parameter or buffer; the value itself where it is not one of those, scaled.
        transposed: whether it was transposed on the way.
        part: what of it is taken, along its own axes; empty for all.
        factors: by what it was multiplied, or divided where the first flag says so; laid out as the parameter is, or
            as its transpose where the second one does.
    """

    value: Value
    transposed: bool = False
    part: Part = ()
    factors: tuple[tuple[Any, bool, bool], ...] = ()

    def scaling(self, evaluator: Evaluator) -> Array | None:
        """The product of all factors, as large as what is taken, or a one; None where it is not known or not finite."""
        if not self.factors:
            return np.ones(())
        shape = self.shape
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is taken of the parameter."""
        axes = self.part or tuple(map(range, self.value.shape))
        return tuple(len(part) for part in axes if isinstance(part, range))

    def slot(self, frame: Frame) -> Slot | None:
        """The place that the code of a frame means; None where that cannot be told."""
        slot = choose(self.value, frame)
        return None if slot is None else replace(slot, part=self.part)

    def within(self, axis: int, taken: range | int) -> Origin | None:
        """The same, but of what this is, some places of one axis; None where that is not covered."""
        shape, axis = self.shape, 1 - axis if self.transposed else axis
        if self.factors or (self.transposed and isinstance(taken, int)):
            return None
        part = list(self.part or map(range, self.value.shape))
        place = [at for at, one in enumerate(part) if isinstance(one, range)][axis]
        own = part[place]
        assert isinstance(own, range)
        part[place] = own[taken] if isinstance(taken, int) else own[taken.start : taken.stop : taken.step]
        whole = len(part) == len(shape) and all(
            one == range(size) for one, size in zip(part, self.value.shape, strict=True)
        )
        return replace(self, part=() if whole else tuple(part))


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
    if call.label in _PARTS:
        return _part_of(value, call)
    turns = value.rank == 2 and (call.label == "t" or (call.label in _SWAPS and _is_turn(call.args[1:])))
    if len(call.reads) != 1 or not (turns or call.label in _PLAIN_STEPS):
        return None
    found = _trace_back(next(iter(call.reads.values())))
    return found if found is None or not turns else replace(found, transposed=not found.transposed)


_PARTS = ("slice", "select", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind")


def _part_of(value: Value, call: Call) -> Origin | None:
    """A part of a parameter."""
    given = bind(call)
    source, place = given["self"], next(at for at, one in enumerate(call.made) if one is value)
    found = _trace_back(source)
    if found is None:
        return None
    axis = given["dim"] % source.rank
    return found.within(axis, _taken(call.label, range(source.shape[axis]), place, given))


def _taken(label: str, size: range, place: int, given: dict[str, Any]) -> range | int:
    """Which places of an axis are taken."""
    if label == "slice":
        return size[given["start"] : given["end"] : int(given["step"])]
    if label == "select":
        return size[int(given["index"])]
    if label == "unbind":
        return place
    label = label.removeprefix("unsafe_")
    if label == "split":
        return size[place * int(given["split_size"]) : (place + 1) * int(given["split_size"])]
    start: int = sum(given["split_sizes"][:place])
    return size[start : start + int(given["split_sizes"][place])]


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
