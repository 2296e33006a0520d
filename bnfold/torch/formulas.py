"""A BatchNorm that is written out in a forward: `gain * (h - mean) / (var + eps) ** 0.5 + bias`, in any spelling.

Its lines cannot be taken out of code that nobody may edit, but the numbers that they read can be those of an identity:
a mean of 0, a variance of `1 - eps`, a gain of 1. Those numbers are found backwards. The last operation of each line
has a neutral operand (0 is subtracted, 1 is divided by), and from there `1 = sqrt(var + eps)` is solved for what is
stored, operation by operation. Where a shift has to stay, or another affine came in, one of the lines adds or
multiplies by that instead. What was found is put into the lines, which are computed again in float64: they must be the
affine that was wished for.

Not covered: numbers that other code reads as well, that a state dict does not hold, or that several modules hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from bnfold import reasons
from bnfold.algebra import Affine, Array
from bnfold.errors import Refuse
from bnfold.torch.constants import Evaluator, slots_of
from bnfold.torch.draft import Draft, DraftNode
from bnfold.torch.storage import choose, roots_of
from bnfold.torch.tensors import Slot
from bnfold.torch.trace import Trace, Value

__all__ = ["FormulaPlace", "chains_of", "place_of"]


class _Unsolved(Exception):
    """These numbers, in this order, do not do; others may."""


_LINES = frozenset(("add", "sub", "mul", "div", "addcmul"))


@dataclass(frozen=True, eq=False)
class FormulaPlace:
    """The lines of one BatchNorm, and where the numbers in them are stored.

    Attributes:
        path: of the module in whose code they stand.
        slots: by identity of its value, the slot of each number.
        lines: the nodes that they were drawn as.
        trace: the pass that those are of.
    """

    path: str
    slots: Mapping[int, Slot]
    lines: tuple[DraftNode, ...]
    trace: Trace

    def solve(self, affine: Affine | None = None) -> dict[Slot, Array]:
        """The numbers, in float64 and as they are stored, with which the lines compute an affine; None: the identity.

        Raises:
            Refuse: there are none, or they are not found.
        """
        rank = next(item.affine.rank for item in self.lines if item.affine is not None)
        wanted, operands = affine or Affine.identity(rank), list(_operands(self.lines))
        nobody: list[_Operand | None] = [None]
        scales = [one for one in operands if one.scales][::-1] if np.any(wanted.scale != 1) else nobody
        shifts = [one for one in operands if not one.scales][::-1] if np.any(wanted.shift != 0) else nobody
        for scale, shift in product(scales, shifts):
            try:
                known = _solve(wanted, operands, scale, shift)
            except _Unsolved:
                continue
            if self._computes(known, wanted):
                return {self.slots[place]: array for place, array in known.items()}
        raise Refuse(reasons.NO_NUMBERS())

    def _computes(self, known: Mapping[int, Array], wanted: Affine) -> bool:
        """Whether the lines, with other numbers, are the affine that they should be."""
        evaluator = Evaluator()
        evaluator.known = {place: torch.from_numpy(np.array(array)) for place, array in known.items()}
        calls = [item.call for item in self.lines]
        whole = Affine.identity(wanted.rank)
        for item in Draft(replace(self.trace, calls=calls, inputs={}, outputs={}), evaluator).items:
            if item.op not in ("Affine", "Identity"):
                return False
            whole = item.affine.after(whole) if item.affine is not None else whole
        pairs = ((whole.scale, wanted.scale), (whole.shift, wanted.shift))
        return all(np.allclose(mine, theirs, rtol=1e-13, atol=1e-13) for mine, theirs in pairs)


def chains_of(
    items: Sequence[DraftNode], readers: Mapping[str, Sequence[DraftNode]], outputs: Sequence[str]
) -> Iterator[list[DraftNode]]:
    """The longest chains of sums and products by stored numbers, each in the code of one module call."""
    gone: set[int] = set()
    for item in items:
        chain = [item] if _is_line(item) and id(item) not in gone else []
        while chain:
            value = chain[-1].outputs[0]
            read = readers.get(value, ())
            alone = len(read) == 1 and value not in outputs
            if not alone or not _is_line(read[0]) or read[0].call.frame is not item.call.frame:
                break
            chain.append(read[0])
        gone.update(map(id, chain))
        if chain:
            yield chain


def _is_line(item: DraftNode) -> bool:
    reads = item.call.reads.values()
    stored = any(value.slots or (value.constant and slots_of(value)) for value in reads)
    return item.op in ("Affine", "Identity") and item.call.label in _LINES and stored


def place_of(
    model: nn.Module, trace: Trace, items: Sequence[DraftNode], lines: Sequence[DraftNode]
) -> FormulaPlace | str:
    """Where the numbers of a chain are stored, or why it must stay as it is."""
    frame, values = lines[0].call.frame, _slots(lines)
    if frame.path is None:
        return reasons.HOMELESS()
    slots: dict[int, Slot] = {}
    for place, value in values.items():
        slot = choose(value, frame)
        if slot is None or value.tensor is None or not value.tensor.is_floating_point():
            return reasons.SLOT_SHARED(slot=value.slots[0].name)
        if not _is_saved(model, slot):
            return reasons.NOT_SAVED(slot=slot.name)
        if id(value.tensor) in trace.changed_slots:
            return reasons.SLOT_CHANGES(slot=slot.name)
        slots[place] = slot
    if who := _other_reader(trace, items, lines, values):
        return reasons.NUMBERS_USED(who=who)
    found = FormulaPlace(frame.path, slots, tuple(replace(item) for item in lines), trace)
    try:
        found.solve()
    except Refuse:
        return reasons.NOT_UNDONE()
    return found


def _slots(lines: Sequence[DraftNode]) -> dict[int, Value]:
    reads = (value for item in lines for value in item.call.reads.values() if value.constant or value.slots)
    return {place: slot for value in reads for place, slot in slots_of(value).items()}


def _is_saved(model: nn.Module, slot: Slot) -> bool:
    return slot.kind != "attribute" and slot.attribute in model.get_submodule(slot.module).state_dict()


def _other_reader(
    trace: Trace, items: Sequence[DraftNode], lines: Sequence[DraftNode], values: Mapping[int, Value]
) -> str:
    """Who else reads the numbers of a chain."""
    own = set(map(id, lines))
    for item in items:
        calls = [item.call] if item.joined is None else [item.call, item.joined]
        reads = (value for call in calls for value in call.reads.values())
        if id(item) not in own and any(roots_of(value).keys() & values.keys() for value in reads):
            return f"the code of `{item.call.frame.path}`" if item.call.frame.path else "other code"
    for name, value in trace.outputs.items():
        if not (value.slots and name.startswith("kept alive")) and roots_of(value).keys() & values.keys():
            return "the output of the model"
    return ""


# ---------------------------------------------------------------- what a line multiplies by, and what it adds


@dataclass(frozen=True, eq=False)
class _Operand:
    """A constant that a line multiplies by, or adds; where `inverse`, one that it divides by or subtracts."""

    line: int
    value: Value
    scales: bool
    inverse: bool = False


def _operands(lines: Sequence[DraftNode]) -> Iterator[_Operand]:
    """The constants of all lines, those that scale first."""
    found = []
    for at, item in enumerate(lines):
        label, values = item.call.label, [v for v in item.call.args if isinstance(v, Value)]
        constants = [value for value in values if value.constant or value.slots]
        if label == "addcmul":
            found += [_Operand(at, constants[0], False), _Operand(at, constants[1], True)]
        else:
            found.append(_Operand(at, constants[0], label in ("mul", "div"), label in ("sub", "div")))
    yield from sorted(found, key=lambda one: not one.scales)


def _solve(
    wanted: Affine, operands: Sequence[_Operand], scale: _Operand | None, shift: _Operand | None
) -> dict[int, Array]:
    """The numbers behind the operands if one of them scales, one shifts, and the others do nothing.

    Raises:
        Refuse: there are none.
    """
    known: dict[int, Array] = {}
    with np.errstate(all="ignore"):
        for one in operands:
            target = np.full((), 1.0 if one.scales else 0.0)
            if one is scale:
                target = _fit(1.0 / wanted.scale if one.inverse else wanted.scale, one.value)
            elif one is shift:
                early = scale is not None and one.line < scale.line
                moved = wanted.shift / wanted.scale if early else wanted.shift
                target = _fit(-moved if one.inverse else moved, one.value)
            _settle(one.value, target, known)
    return known


def _fit(array: Array, value: Value) -> Array:
    """Numbers that broadcast against what a line reads, with the rank of what it reads them from."""
    lead = array.ndim - len(value.shape)
    if lead < 0:
        return array.reshape((1,) * -lead + array.shape)
    if any(size != 1 for size in array.shape[:lead]):
        raise _Unsolved("it varies along an axis that its lines do not")
    return array.reshape(array.shape[lead:])


# ---------------------------------------------------------------- from a constant to what it is computed from

_MOVES = frozenset(("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten"))
_SPREADS = frozenset(("expand", "transpose", "permute", "t"))
_COPIES = frozenset(("detach", "alias", "contiguous", "clone", "_to_copy"))


def _settle(value: Any, wanted: Array, known: dict[int, Array]) -> None:
    """Note what the slots behind a constant must hold for it to be what is wished.

    Raises:
        Refuse: that is not known, or another line wishes something else of them.
    """
    if not isinstance(value, Value):
        raise _Unsolved("a number that is not stored would have to change")
    if value.slots:
        return _note(value, wanted, known)
    call = value.call
    if call is None or not value.constant or call.changed or call.written or call.kwargs:
        raise _Unsolved("it is computed in a way that is not undone")
    first, *rest = call.args
    if call.label in _COPIES:
        return _settle(first, wanted, known)
    if call.label in _MOVES and isinstance(first, Value):
        whole = wanted if wanted.size == 1 else _broadcast(wanted, value.shape).reshape(first.shape)
        return _settle(first, whole.reshape(()) if whole.size == 1 else whole, known)
    if call.label in _SPREADS and wanted.size == 1:
        return _settle(first, wanted.reshape(()), known)
    if len(rest) == 1 and call.label in _UNDO_TWO:
        return _settle_two(call.label, first, rest[0], wanted, known)
    if call.label not in _UNDO or rest:
        raise _Unsolved(f"`{call.label}` is not undone")
    return _settle(first, np.asarray(_UNDO[call.label](wanted)), known)


def _note(value: Value, wanted: Array, known: dict[int, Array]) -> None:
    array = _broadcast(wanted, value.shape)
    if not np.isfinite(array).all() or not np.array_equal(known.setdefault(id(value), array), array):
        raise _Unsolved("its lines would need two numbers in one place")


def _broadcast(array: Array, shape: tuple[int, ...]) -> Array:
    try:
        return np.array(np.broadcast_to(array, shape))
    except ValueError:
        raise _Unsolved("it varies along an axis that its lines do not") from None


_UNDO: dict[str, Callable[[Array], Array]] = {
    "sqrt": lambda y: y * y,
    "rsqrt": lambda y: 1.0 / (y * y),
    "reciprocal": lambda y: 1.0 / y,
    "neg": lambda y: -y,
}
"""What an operation was given, of what it made."""

_UNDO_TWO: dict[str, tuple[Callable[[Array, float], Array], Callable[[Array, float], Array] | None]] = {
    "add": (lambda y, c: y - c, lambda y, c: y - c),
    "sub": (lambda y, c: y + c, lambda y, c: c - y),
    "mul": (lambda y, c: y / c, lambda y, c: y / c),
    "div": (lambda y, c: y * c, lambda y, c: c / y),
    "pow": (lambda y, c: y ** (1.0 / c), None),
}
"""Of its first operand given the second one, and the other way around."""


def _settle_two(label: str, left: Any, right: Any, wanted: Array, known: dict[int, Array]) -> None:
    """Of two operands, the one that is a number stays; of two that are stored, one is neutral or both vanish."""
    for_left, for_right = _UNDO_TWO[label]
    if not isinstance(right, Value):
        return _settle(left, np.asarray(for_left(wanted, np.float64(right))), known)
    if not isinstance(left, Value) and for_right is not None:
        return _settle(right, np.asarray(for_right(wanted, np.float64(left))), known)
    if label in ("add", "sub"):
        _settle(right, np.zeros(()), known)
        return _settle(left, wanted, known)
    if label in ("mul", "div") and np.all(wanted == 0):
        return _settle_either((left, right) if label == "mul" else (left,), known)
    if label in ("mul", "div"):
        _settle(right, np.ones(()), known)
        return _settle(left, wanted, known)
    raise _Unsolved(f"`{label}` is not undone")


def _settle_either(factors: Sequence[Any], known: dict[int, Array]) -> None:
    """Let one of the factors be zero."""
    for factor in factors:
        trial = dict(known)
        try:
            _settle(factor, np.zeros(()), trial)
        except _Unsolved:
            continue
        return known.update(trial)
    raise _Unsolved("no factor can be zero")
