"""Turn what `travel` decided into edits of the model that was read.

Each difference between the two graphs is one or a few edits (see `edit` for what those leave alone):

- a node that is gone is bypassed;
- a linear operator that was copied is copied, for its one reader;
- a linear operator that has absorbed something reads a new weight, and a new bias where it needs one: Conv,
  ConvTranspose and Gemm have an input for it, a MatMul gets an Add (or the one that it has a new constant), the rows of
  an embedding hold it;
- a BatchNormalization that has absorbed another one gets new numbers (mean 0, variance 1, epsilon 0, which is exact),
  one that is to be an affine becomes a Mul and an Add, or an Add alone.

New weights are computed in float64 when the edits are carried out, one at a time, and rounded once to the type of the
tensor that they replace. Gemm's `alpha` and `beta` go into them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from onnx import TensorProto

from bnfold.algebra import Affine, Array, Linear
from bnfold.graph import Graph, Node
from bnfold.onnx.constants import Unworkable, attribute
from bnfold.onnx.edit import Edit, Editor
from bnfold.onnx.read import Picture
from bnfold.onnx.scope import Spot

__all__ = ["fits", "write"]


def write(picture: Picture, graph: Graph) -> tuple[Edit, ...]:
    """What to change in the model of a picture so that it computes another graph.

    Args:
        picture: as `read` drew it. Neither it nor its model is changed.
        graph: the picture's graph after the journey.

    Returns:
        Edits for `bnfold.onnx.edit.apply`, to the model or to any copy of it. Their new weights are computed from the
        picture's model when they are stored, so it must be as it was until then.
    """
    return _Writer(picture, graph).write()


def fits(picture: Picture) -> Any:
    """Make the question that `travel` asks about a linear node: why its new numbers cannot be stored, or nothing."""
    return _Fits(picture)


@dataclass(eq=False)
class Slots:
    """Where a linear operator keeps its numbers.

    Attributes:
        spot: the node with the weight.
        weight: the input that holds the weight.
        add: the node with the bias; None where there is none and the operator has no input for one.
        bias: the input of `add` that holds the bias.
        alpha, beta: what Gemm multiplies them by.
    """

    spot: Spot
    weight: int
    add: Spot | None = None
    bias: int = 0
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def multiplies_from_left(self) -> bool:
        """Whether it is a MatMul whose outputs lie on the last axis but one."""
        return self.spot.op == "MatMul" and self.weight == 0

    @property
    def bias_value(self) -> str:
        """The value that is the bias, or nothing."""
        return self.add.inputs[self.bias] if self.add is not None and self.bias < len(self.add.inputs) else ""


def find_slots(picture: Picture, name: str) -> Slots:
    """Where the linear operator of this name keeps its numbers."""
    spots, constants = picture.spots[name], picture.scene.constants
    spot = spots[0]
    if spot.op in ("Conv", "ConvTranspose"):
        return Slots(spot, 1, spot, 2)
    if spot.op == "Gemm":
        return Slots(spot, 1, spot, 2, attribute(spot.node, "alpha", 1.0), attribute(spot.node, "beta", 1.0))
    if spot.op == "Gather":
        return Slots(spot, 0)
    weight = 0 if spot.inputs[0] in constants else 1
    if len(spots) == 1:
        return Slots(spot, weight)
    return Slots(spot, weight, spots[1], 0 if spots[1].inputs[0] in constants else 1)


def stored_weight(picture: Picture, slots: Slots) -> np.ndarray[Any, Any]:
    """The weight of a linear operator, with Gemm's alpha, as a matrix or kernel."""
    array = picture.scene.constants.array(slots.spot.inputs[slots.weight])
    if slots.spot.op == "MatMul":
        array = array.reshape(array.shape[-2:])
    return array if slots.alpha == 1 else np.asarray(array, np.float64) * slots.alpha


def stored_bias(picture: Picture, slots: Slots, linear: Linear) -> Array | None:
    """The bias of a linear operator, with Gemm's beta, against `(..., outputs)`."""
    if not slots.bias_value:
        return None
    array = np.asarray(picture.scene.constants.array(slots.bias_value), np.float64)
    if slots.spot.op == "MatMul":
        array = np.array(np.broadcast_to(array.ravel(), linear.outputs))
    return array * slots.beta


@dataclass(frozen=True, eq=False)
class _Weight:
    """The weight of a linear operator with everything that it has absorbed, as it is stored."""

    picture: Picture
    slots: Slots
    linear: Linear
    dims: tuple[int, ...]

    def __call__(self) -> Array:
        weight = self.linear.fold_weight(stored_weight(self.picture, self.slots))
        bias = self.linear.fold_bias(None, None) if self.slots.spot.op == "Gather" else None
        return (weight if bias is None else weight + bias).reshape(self.dims)


class _Writer:
    def __init__(self, picture: Picture, graph: Graph) -> None:
        self.picture, self.graph = replace(picture, spots=dict(picture.spots)), graph
        self.editor = Editor(picture)
        self.view = self.editor.view
        self.done: dict[tuple[Any, ...], list[tuple[Linear, str, str]]] = {}

    def write(self) -> tuple[Edit, ...]:
        old = self.picture.graph
        places = {node.name: self._data_place(node) for node in old.nodes if node.affine is not None}
        for node in self.graph.nodes:
            if node.copied is not None:
                self._copy(node, *node.copied, places)
        for node in old.nodes:
            if node.name in self.graph:
                self._change(node, self.graph[node.name], places)
        for node in old.nodes:
            if node.name not in self.graph:
                spots = self.picture.spots[node.name]
                source = self.view.inputs[spots[0]][places[node.name]]
                self.editor.bypass(spots, source, spots[-1].outputs[0])
        return self.editor.finish()

    def _data_place(self, node: Node) -> int:
        """Which input of a node of the file is the one that the graph shows."""
        copies = self.picture.scene.copies
        inputs = self.picture.spots[node.name][0].inputs
        return [copies.get(value, value) for value in inputs].index(node.inputs[0])

    def _change(self, old: Node, new: Node, places: dict[str, int]) -> None:
        if new.linear is not None and new.linear.changed:
            self._absorb(new, new.linear)
        if new.affine is None or old.affine is None or (new.op == old.op and new.affine.equals(old.affine)):
            return
        if new.op == "Affine" or not self._set_batchnorm(new, new.affine):
            self._spell_out(new, new.affine, places[new.name])

    # -- linear operators

    def _copy(self, node: Node, original: str, reader: str, places: dict[str, int]) -> None:
        """Copy a linear operator for the one BatchNorm that is to read the copy; a MatMul's Add comes along."""
        spots: list[Spot] = []
        shared: dict[str, str] = {}
        for spot in self.picture.spots[original]:
            value = self.editor.new_value(f"{self.view.raw[spot.outputs[0]]}.copy", spot.owner)
            inputs = [shared.get(name, name) for name in spot.inputs]
            spots.append(self.editor.insert_copy(spot, inputs, value))
            shared[spot.outputs[0]] = value
        self.picture.spots[node.name] = spots
        self.view.set_input(self.picture.spots[reader][0], places[reader], spots[-1].outputs[0])
        if node.linear is not None:
            self._absorb(node, node.linear)

    def _absorb(self, node: Node, linear: Linear) -> None:
        slots = find_slots(self.picture, node.name)
        spot, value, bias = slots.spot, slots.spot.inputs[slots.weight], slots.bias_value
        key = (value, bias, spot.op, slots.alpha, slots.beta, linear.order, linear.groups)
        for other, weight_name, bias_name in self.done.get(key, ()):
            if other.equals(linear):
                self._attach(slots, linear, weight_name, bias_name)
                return
        names = self._store(node, slots, linear)
        self.done.setdefault(key, []).append((linear, *names))
        self._attach(slots, linear, *names)

    def _store(self, node: Node, slots: Slots, linear: Linear) -> tuple[str, str]:
        """Store the new weight and bias; the value "" stands for a bias that stays as it is, or is in the weight."""
        value, old_bias = slots.spot.inputs[slots.weight], slots.bias_value
        constants = self.picture.scene.constants
        dims, data_type = constants.dims(value) or (), self.picture.scene.type(value)
        raw = self._label(value, node.name, "weight")
        weight = _Weight(self.picture, slots, linear, dims)
        weight_name = self.editor.add_tensor(f"{raw}.folded", weight, dims, data_type, value)
        if slots.spot.op == "Gather":
            return weight_name, ""
        old = stored_bias(self.picture, slots, linear)
        seen = stored_weight(self.picture, slots) if linear.shifts_input else None
        bias = linear.fold_bias(seen, old)
        if bias is None or (old is not None and np.array_equal(bias, old) and slots.beta == 1):
            return weight_name, ""
        raw = self._label(
            old_bias, raw.replace("weight", "bias") if "weight" in raw else f"{raw}.bias", "bias"
        )
        bias_type = self.picture.scene.type(old_bias) if old_bias else data_type
        bias = self._place_bias(slots, linear, bias)
        return weight_name, self._add(f"{raw}.folded", bias, bias_type, old_bias or value)

    def _label(self, value: str, otherwise: str, role: str) -> str:
        """What to call the successor of a stored number."""
        tensor = self.picture.scene.whole.tensors.get(value)
        if tensor is not None:
            return str(tensor.name).removesuffix(".folded")
        return f"{otherwise}.{role}" if role == "weight" else otherwise

    def _add(self, wish: str, values: Array, data_type: int, replaces: str) -> str:
        return self.editor.add_tensor(wish, partial(np.asarray, values), values.shape, data_type, replaces)

    def _place_bias(self, slots: Slots, linear: Linear, bias: Array) -> Array:
        """Give the bias of a MatMul the shape in which it is added: from the left, along the last axis but one."""
        if slots.spot.op != "MatMul":
            return bias
        old = self.picture.scene.constants.array(slots.bias_value).shape if slots.bias_value else ()
        if math.prod(old) == linear.outputs:
            return bias.reshape(old)
        return bias[:, None] if slots.multiplies_from_left else bias

    def _attach(self, slots: Slots, linear: Linear, weight: str, bias: str) -> None:
        self.view.set_input(slots.spot, slots.weight, weight)
        if slots.spot.op == "Gemm":
            self.editor.drop_attribute(slots.spot, "alpha")
            if bias:
                self.editor.drop_attribute(slots.spot, "beta")
        if not bias:
            return
        if slots.add is not None:
            self.view.set_input(slots.add, slots.bias, bias)
        else:
            self._insert_bias(slots.spot, bias)

    def _insert_bias(self, spot: Spot, bias: str) -> None:
        """Add a bias after a MatMul that has none."""
        result = spot.outputs[0]
        raw = self.view.raw[result]
        unbiased = self.editor.new_value(f"{raw}.unbiased", spot.owner)
        self.view.set_output(spot, 0, unbiased)
        name = self.editor.fresh_node(f"{spot.node.name}.bias" if spot.node.name else "")
        self.editor.insert(spot, "Add", name, [unbiased, bias], result)

    # -- affines that stay

    def _set_batchnorm(self, node: Node, affine: Affine) -> bool:
        """Give a BatchNormalization of the file other numbers; False where it is none, or cannot hold them."""
        spots = self.picture.spots[node.name]
        spot = spots[0]
        if len(spots) > 1 or spot.op != "BatchNormalization" or node.op != "BatchNormalization":
            return False
        dims = self.picture.scene.constants.dims(spot.inputs[1]) or ()
        size = dims[0] if len(dims) == 1 else 0
        vectors = affine.vectors(1, size) if size else None
        if vectors is None:
            return False
        numbers = [*vectors, np.zeros(size), np.ones(size)]
        for place, values in enumerate(numbers, 1):
            value = spot.inputs[place]
            label = self._label(value, f"{node.name}.{('scale', 'bias', 'mean', 'var')[place - 1]}", "number")
            name = self._add(f"{label}.folded", np.array(values), self.picture.scene.type(value), value)
            self.view.set_input(spot, place, name)
        self.editor.set_attribute(spot, "epsilon", 0.0)
        return True

    def _spell_out(self, node: Node, affine: Affine, place: int) -> None:
        """Write an affine as a Mul and an Add, or as one of them."""
        spots = self.picture.spots[node.name]
        source, result, anchor = self.view.inputs[spots[0]][place], spots[-1].outputs[0], spots[-1]
        for spot in spots:
            self.editor.remove(spot)
        data_type = self.picture.scene.type(source) or TensorProto.FLOAT
        steps = []
        if np.any(affine.scale != 1):
            steps.append(("Mul", "scale", affine.scale))
        if np.any(affine.shift != 0) or not steps:
            steps.append(("Add", "shift", affine.shift))
        for step, (op, role, numbers) in enumerate(steps):
            constant = self._add(f"{node.name}.{role}", _trim(numbers), data_type, "")
            last = step == len(steps) - 1
            target = (
                result if last else self.editor.new_value(f"{self.view.raw[result]}.scaled", anchor.owner)
            )
            name = node.name if last else f"{node.name}.{role}"
            new = self.editor.insert(
                anchor, op, name if spots[-1].node.name else "", [source, constant], target
            )
            source = new.outputs[0]


def _trim(numbers: Array) -> Array:
    """Drop leading axes of size 1, which broadcasting puts back."""
    while numbers.ndim > 1 and numbers.shape[0] == 1:
        numbers = numbers[0]
    return numbers


# ---------------------------------------------------------------- can it be stored?


@dataclass(eq=False)
class _Fits:
    """Whether what a linear operator has absorbed can be stored in its own types.

    A bound decides where it can: the largest weight times the largest scales. Only where that comes near the largest
    number of the type are the new numbers computed.
    """

    picture: Picture
    _largest: dict[str, float] = field(default_factory=dict)

    def __call__(self, node: Node) -> str:
        if node.linear is None or not node.linear.changed:
            return ""
        try:
            return self._ask(node, node.linear)
        except Unworkable as error:
            return str(error)

    def _ask(self, node: Node, linear: Linear) -> str:
        slots = find_slots(self.picture, node.name)
        value = slots.spot.inputs[slots.weight]
        name, limit = _limit(self.picture.scene.type(value))
        peak = self._peak(value)
        if not math.isfinite(peak):
            return "its weight holds numbers that are not finite"
        if self._bound(slots, linear, peak) < limit / 4:
            return ""
        return self._check(slots, linear, name, limit)

    def _peak(self, value: str) -> float:
        if value not in self._largest:
            array = self.picture.scene.constants.array(value)
            low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
            self._largest[value] = max(-low, high) if math.isfinite(low + high) else math.inf
        return self._largest[value]

    def _bound(self, slots: Slots, linear: Linear, peak: float) -> float:
        """More than any new weight or bias can be."""
        peak *= abs(slots.alpha)
        before = [np.abs(a).max(initial=0.0) for a in linear.before or (np.ones(1), np.zeros(1))]
        after = [np.abs(a).max(initial=0.0) for a in linear.after or (np.ones(1), np.zeros(1))]
        beside = np.abs(linear.beside).max(initial=0.0) if linear.beside is not None else 0.0
        stored = stored_bias(self.picture, slots, linear)
        bias = 0.0 if stored is None else np.abs(stored).max(initial=0.0)
        taps = (
            math.prod(self.picture.scene.constants.dims(slots.spot.inputs[slots.weight]) or ())
            / linear.outputs
        )
        weight = peak * before[0] * after[0] + beside
        return float(weight + after[0] * (bias + peak * before[1] * taps) + after[1])

    def _check(self, slots: Slots, linear: Linear, name: str, limit: float) -> str:
        bias = stored_bias(self.picture, slots, linear)
        for role, array in zip(
            ("weight", "bias"), linear.fold(stored_weight(self.picture, slots), bias), strict=True
        ):
            if array is not None and not np.abs(array).max(initial=0.0) <= limit:
                return f"its {role} would overflow {name}"
        return ""


def _limit(data_type: int) -> tuple[str, float]:
    """A type's name and its largest number."""
    limits: dict[int, tuple[str, float]] = {
        TensorProto.FLOAT16: ("float16", 65504.0),
        TensorProto.BFLOAT16: ("bfloat16", 3.38953139e38),
        TensorProto.DOUBLE: ("float64", 1.7976931348623157e308),
    }
    return limits.get(data_type, ("float32", 3.4028234663852886e38))
