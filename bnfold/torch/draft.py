"""Draw captured calls, one by one, as items that are not bound to any storage yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bnfold import canonical, reasons
from bnfold.algebra import Affine, Array, Linear
from bnfold.ir import Node
from bnfold.torch.constants import Evaluator
from bnfold.torch.lower import lower
from bnfold.torch.trace import Call, Slot, Trace, Value

if TYPE_CHECKING:
    from bnfold.torch.calls import ModulePlace
    from bnfold.torch.formulas import FormulaPlace

__all__ = ["Draft", "DraftNode", "LinearPlace", "NormPlace", "readers_of"]


@dataclass(frozen=True, slots=True)
class LinearPlace:
    """Where a linear operator keeps its numbers.

    Attributes:
        weight: the slot of its weight; `transposed` where the operator uses the transpose of what is stored.
        bias: the slot of its bias, or where one can be added; None where none can.
        computed: how the weight is computed, "parametrization", "hook" or by the "code" of a module that then becomes
            the operator; empty where it is stored as it is.
        scaling: what the code multiplies the stored weight by, laid out as that is; None where it takes it as it is.
        bias_scaling: what it multiplies the stored bias by; nowhere zero.
        code: the weight and bias that code computes, and the module in whose place the operator comes.
    """

    weight: Slot
    transposed: bool
    bias: Slot | None
    computed: str = ""
    scaling: Array | None = field(default=None, compare=False)
    bias_scaling: Array | None = field(default=None, compare=False)
    code: tuple[Value, Value | None, ModulePlace] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class NormPlace:
    """The module that a BatchNorm is, and what that module does afterwards.

    Attributes:
        path: its qualified name.
        tail: what follows the affine map: names of its own children, or modules that stand for a function.
        dtype: of its input.
    """

    path: str
    tail: tuple[tuple[str, nn.Module | None], ...]
    dtype: torch.dtype


@dataclass(eq=False, slots=True)
class DraftNode:
    """A node as it is being drawn.

    Attributes:
        op, attributes, affine, linear, reason, partial, site: as those of the `Node` that it becomes.
        inputs, outputs: the names of values.
        call: the call that it is drawn of.
        weight, bias, statistics: the values that its numbers are, until `place` says where they are stored.
        name: empty until `naming`.
        place: where its numbers are stored: of a linear operator, of a BatchNorm, of one that is written out.
        joined: the call that adds its bias, where that is another one.
        varies: whether its call has other settings for other inputs.
    """

    op: str
    inputs: list[str]
    outputs: list[str]
    call: Call
    attributes: dict[str, Any] = field(default_factory=dict)
    affine: Affine | None = None
    linear: Linear | None = None
    weight: Value | None = None
    bias: Value | None = None
    statistics: dict[str, Value | None] = field(default_factory=dict)
    name: str = ""
    site: str = ""
    place: LinearPlace | NormPlace | FormulaPlace | None = None
    joined: Call | None = None
    reason: str = ""
    partial: str = ""
    varies: bool = False

    @property
    def is_batchnorm(self) -> bool:
        """Whether it is owed a verdict."""
        return self.op == "BatchNormalization"

    def become_opaque(self, op: str) -> None:
        """Let nothing travel through it."""
        self.op, self.affine, self.linear, self.weight, self.bias = op, None, None, None, None

    def refuse(self, reason: str) -> None:
        """Keep it where it is, for this reason."""
        self.affine = self.linear = None
        self.attributes, self.reason = {}, reason

    def reading(self, inputs: list[str]) -> DraftNode:
        """The same node, of other inputs."""
        return self if inputs == self.inputs else replace(self, inputs=inputs)

    def node(self) -> Node:
        """The node as it is now."""
        return Node(
            self.name,
            self.op,
            tuple(self.inputs),
            tuple(self.outputs),
            self.attributes,
            site=self.site,
            linear=self.linear,
            affine=self.affine,
            reason=self.reason,
            partial=self.partial,
        )


def readers_of(items: Sequence[DraftNode]) -> dict[str, list[DraftNode]]:
    """The nodes that read each value."""
    readers: dict[str, list[DraftNode]] = {}
    for item in items:
        for name in dict.fromkeys(item.inputs):
            readers.setdefault(name, []).append(item)
    return readers


class Draft:
    """Takes nodes for one trace.

    Attributes:
        recording: the trace.
        evaluator: computes constants.
        items: what was drawn so far.
        shapes: of values, in the pass that was recorded.
        call: the one that is being drawn.
        count: of the values that lie between two nodes of one call.
    """

    def __init__(self, recording: Trace, evaluator: Evaluator) -> None:
        self.recording, self.evaluator = recording, evaluator
        self.items: list[DraftNode] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.call: Call = recording.calls[0] if recording.calls else None  # type: ignore[assignment]
        self.count = 0
        read = {id(value) for call in recording.calls for value in call.reads.values()}
        read |= {id(value) for value in recording.outputs.values()}
        for call in recording.calls:
            if not call.constant and (call.reads or any(id(value) in read for value in call.made)):
                self._draw(call, any(id(value) in read for value in call.written))
        for value in recording.inputs.values():
            self.shapes[value.name] = value.shape

    def _draw(self, call: Call, aliased: bool) -> None:
        self.call = call
        before = len(self.items)
        drawn = not aliased and lower(self, call) and self._holds_at_any_size(call, self.items[before:])
        taken = {name for item in self.items[before:] for name in item.inputs}
        missed = any(not v.constant and not v.slots and v.name not in taken for v in call.reads.values())
        if not drawn or missed:
            del self.items[before:]
            self._draw_opaque(call)
        for value in (*call.made, *call.written):
            self.shapes[value.name] = value.shape

    def _holds_at_any_size(self, call: Call, drawn: Sequence[DraftNode]) -> bool:
        """Whether what a call was drawn as rests on no size that numbers decide: it does the same to each row."""
        if not any(value.sized for value in (*call.reads.values(), *call.made)):
            return True
        loose = any(value.loose for value in (*call.reads.values(), *call.made))
        return not loose and all(item.op in _AT_ANY_SIZE for item in drawn)

    def _draw_opaque(self, call: Call) -> None:
        inputs = [v.name for v in call.reads.values() if not v.constant and not v.slots]
        outputs = [v.name for v in (*call.made, *call.written) if not v.slots]
        self.items.append(DraftNode(call.label, inputs, outputs, call))

    # -- what lowerings call

    def node(
        self,
        op: str,
        inputs: Sequence[Value | str],
        outputs: Sequence[Value | str],
        affine: Affine | None = None,
        partial: str = "",
        **attributes: Any,
    ) -> None:
        """Draw a node."""
        given, made = ([v if isinstance(v, str) else v.name for v in side] for side in (inputs, outputs))
        self.items.append(DraftNode(op, given, made, self.call, attributes, affine, partial=partial))

    def linear(
        self,
        op: str,
        x: Value,
        y: Value | str,
        weight: Value,
        bias: Value | None,
        linear: Linear,
        others: Sequence[Value] = (),
    ) -> None:
        """Draw a linear operator, whose storage is found later."""
        made = y if isinstance(y, str) else y.name
        item = DraftNode(op, [x.name], [made], self.call, linear=linear, weight=weight, bias=bias)
        read = [v for v in (*others, weight, bias) if v is not None]
        item.inputs += [v.name for v in read if not v.constant and not v.slots]
        self.items.append(item)

    def batchnorm(
        self, x: Value, y: Value, statistics: dict[str, Value | None], eps: float, reason: str
    ) -> None:
        """Draw a BatchNorm, or one that stays for a reason."""
        item = DraftNode("BatchNormalization", [x.name], [y.name], self.call, statistics=statistics)
        given = [v for v in statistics.values() if v is not None]
        item.inputs += [v.name for v in given if not v.constant and not v.slots]
        if not reason and not all(v.constant for v in given):
            reason = reasons.CHANGING()
        if not reason:
            item.affine, reason = self._normalisation(x, statistics, eps)
        if reason:
            item.refuse(reason)
        self.items.append(item)

    def _normalisation(
        self, x: Value, statistics: Mapping[str, Value | None], eps: float
    ) -> tuple[Affine | None, str]:
        held = tuple(None if value is None else id(value.tensor) for value in statistics.values())
        if any(value is not None and value.tensor is None for value in statistics.values()):
            return self._normalise(x, statistics, eps)
        key = (*held, eps, x.rank, x.shape[1])
        if key not in self.evaluator.normalisations:
            self.evaluator.normalisations[key] = self._normalise(x, statistics, eps)
        return self.evaluator.normalisations[key]

    def _normalise(
        self, x: Value, statistics: Mapping[str, Value | None], eps: float
    ) -> tuple[Affine | None, str]:
        arrays: dict[str, Array] = {}
        for name, value in statistics.items():
            array = None if value is None else self.array(value)
            if value is not None and array is None:
                return None, reasons.NOT_AHEAD(what=name)
            if array is not None:
                arrays[_TERMS[name]] = np.broadcast_to(array, x.shape[1])
        return canonical.normalisation(arrays, eps, x.shape)

    def between(self, shape: Sequence[int]) -> str:
        """Name a value between two nodes of one call."""
        self.count += 1
        name = f"between {self.count}"
        self.shapes[name] = tuple(shape)
        return name

    def array(self, constant: Any) -> Array | None:
        """The numbers of a constant; None where it is none, or cannot be computed."""
        if isinstance(constant, bool | int | float):
            return np.asarray(float(constant))
        if not isinstance(constant, Value) or not constant.constant:
            return None
        try:
            return self.evaluator.array(constant)
        except Exception:  # noqa: BLE001 whatever torch says of what cannot be repeated in float64
            return None


_AT_ANY_SIZE = frozenset(
    [
        *("BatchNormalization", "Gemm", "MatMul", "Conv", "ConvTranspose", "Affine", "Add", "Sub", "Mul"),
        *("Identity", "Cast", "Dropout", "Relu", "LeakyRelu", "PRelu", "Abs"),
    ]
)
"""What does the same to each row, image or position: not what adds axes up, cuts, joins, reshapes or pools."""

_TERMS = {"running_mean": "mean", "running_var": "var", "weight": "gamma", "bias": "beta"}
