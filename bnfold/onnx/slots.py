"""Where a linear operator of an ONNX model keeps its numbers, and what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bnfold.algebra import Array, Linear
from bnfold.onnx.flatten import NodeRef
from bnfold.onnx.protos import attribute
from bnfold.onnx.read import ImportedModel

__all__ = [
    "RECURRENT",
    "Slots",
    "find_slots",
    "state_bias",
    "stored_bias",
    "stored_numbers",
    "stored_weight",
    "with_state_bias",
]

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
"""Layers with one weight per direction for their input, and two biases in a row: of the input, and of the state."""


@dataclass(eq=False)
class Slots:
    """Where a linear operator keeps its numbers.

    Attributes:
        ref: the node with the weight.
        weight: the input that holds the weight.
        add: the node with the bias; None where there is none and the operator has no input for one.
        bias: the input of `add` that holds the bias.
        alpha, beta: what Gemm multiplies them by.
    """

    ref: NodeRef
    weight: int
    add: NodeRef | None = None
    bias: int = 0
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def bias_value(self) -> str:
        """The value that is the bias, or nothing."""
        return self.add.inputs[self.bias] if self.add is not None and self.bias < len(self.add.inputs) else ""


_PLACES = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "DeformConv": (1, 3),
    **dict.fromkeys(RECURRENT, (1, 3)),
}
"""By operator, the inputs of one that has an input for a bias: that of the weight, and that of the bias."""


def find_slots(imported: ImportedModel, name: str) -> Slots:
    """Where the linear operator of this name keeps its numbers.

    Raises:
        LookupError: it is of a kind that nothing is said of here.
    """
    refs, constants = imported.refs[name], imported.context.constants
    ref = refs[0]
    if ref.op in _PLACES:
        weight, bias = _PLACES[ref.op]
        factors = (attribute(ref.node, name, 1.0) if ref.op == "Gemm" else 1.0 for name in ("alpha", "beta"))
        return Slots(ref, weight, ref, bias, *factors)
    if ref.op == "Gather":
        return Slots(ref, 0)
    if ref.op not in ("MatMul", "Einsum"):
        raise LookupError(f"where `{name}` ({ref.op}) keeps its weight")
    weight = 0 if ref.inputs[0] in constants else 1
    if len(refs) == 1:
        return Slots(ref, weight)
    return Slots(ref, weight, refs[1], 0 if refs[1].inputs[0] in constants else 1)


def stored_weight(imported: ImportedModel, slots: Slots) -> np.ndarray[Any, Any]:
    """The weight of a linear operator, with Gemm's alpha, as a matrix or kernel."""
    array = imported.context.constants.array(slots.ref.inputs[slots.weight])
    if slots.ref.op == "MatMul":
        array = array.reshape(array.shape[-2:])
    elif slots.ref.op in RECURRENT:
        array = array.reshape(-1, array.shape[-1])
    return array if slots.alpha == 1 else np.asarray(array, np.float64) * slots.alpha


def stored_bias(imported: ImportedModel, slots: Slots, linear: Linear) -> Array | None:
    """The bias of a linear operator, with Gemm's beta, against `(..., outputs)`."""
    if not slots.bias_value:
        return None
    array = np.asarray(imported.context.constants.array(slots.bias_value), np.float64)
    if slots.ref.op in ("MatMul", "Einsum"):
        array = np.array(np.broadcast_to(array.ravel(), linear.outputs))
    elif slots.ref.op in RECURRENT:
        array = np.split(array, 2, axis=1)[0].ravel()
    return array * slots.beta


def stored_numbers(
    imported: ImportedModel, name: str, linear: Linear
) -> tuple[np.ndarray[Any, Any], Array | None]:
    """The weight and the bias of the linear operator of this name."""
    slots = find_slots(imported, name)
    return stored_weight(imported, slots), stored_bias(imported, slots, linear)


def with_state_bias(imported: ImportedModel, ref: NodeRef, bias: Array) -> Array:
    """The two biases of a recurrent layer in the form in which it reads them, with another one for its input."""
    other = state_bias(imported, ref)
    return np.concatenate([bias.reshape(other.shape), other], axis=1)


def state_bias(imported: ImportedModel, ref: NodeRef) -> Array:
    """The bias that a recurrent layer adds to what it makes of its state; zeros where there is none."""
    value = ref.inputs[3] if len(ref.inputs) > 3 else ""
    if not value:
        return np.zeros((imported.context.constants.dims(ref.inputs[1]) or ())[:2])
    return np.split(np.asarray(imported.context.constants.array(value), np.float64), 2, axis=1)[1]
