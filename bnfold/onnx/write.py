"""Turn what `travel` decided into edits of the model that was read.

Each difference between the two graphs is one or a few edits (see `edit` for what those leave alone):

- a node that is gone is bypassed;
- a linear operator that was copied is copied, for its one reader;
- a linear operator that has absorbed something reads a new weight, and a new bias where it needs one: Conv,
  ConvTranspose and Gemm have an input for it, a recurrent layer has one for this and another bias, a MatMul gets an Add
  (or the one that it has a new constant), the rows of an embedding hold it;
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

from bnfold import reasons
from bnfold.algebra import Affine, Array, Linear, round_to
from bnfold.ir import Graph, Node
from bnfold.merge import Merged
from bnfold.onnx.constant_folding import Unworkable
from bnfold.onnx.edit import Edit, Editor
from bnfold.onnx.flatten import NodeRef
from bnfold.onnx.merging import write_merges
from bnfold.onnx.read import ImportedModel
from bnfold.onnx.slots import RECURRENT, Slots, find_slots, stored_bias, stored_weight, with_state_bias

__all__ = ["fits", "write"]


def write(imported: ImportedModel, graph: Graph, merged: Merged | None = None) -> tuple[Edit, ...]:
    """What to change in an imported model so that it computes another graph.

    Args:
        imported: as `read` made it. Neither it nor its model is changed.
        graph: its graph by the plan.
        merged: what of that graph is to be one operator.

    Returns:
        Edits for `bnfold.onnx.edit.apply`, to the model or to any copy of it. Their new weights are computed from the
        imported model when they are stored, so it must be as it was until then.
    """
    return _Writer(imported, graph, merged or Merged(graph)).write()


def fits(imported: ImportedModel) -> Any:
    """Make the question that `travel` asks about a linear node: why its new numbers cannot be stored, or nothing."""
    return _Fits(imported)


@dataclass(frozen=True, eq=False)
class _Weight:
    """The weight of a linear operator with everything that it has absorbed, as it is stored."""

    imported: ImportedModel
    slots: Slots
    linear: Linear
    dims: tuple[int, ...]

    def __call__(self, dtype: np.dtype[Any], /) -> np.ndarray[Any, Any]:
        weight = stored_weight(self.imported, self.slots)
        bias = self.linear.fold_bias(None, None) if self.slots.ref.op == "Gather" else None
        if bias is None:
            return self.linear.fold_weight(weight, dtype).reshape(self.dims)
        return round_to(self.linear.fold_weight(weight) + bias, dtype).reshape(self.dims)


class _Writer:
    def __init__(self, imported: ImportedModel, graph: Graph, merged: Merged) -> None:
        self.imported, self.graph = replace(imported, refs=dict(imported.refs)), graph
        self.merged = merged
        self.editor = Editor(imported)
        self.view = self.editor.view
        self.done: dict[tuple[Any, ...], list[tuple[Linear, str, str]]] = {}

    def write(self) -> tuple[Edit, ...]:
        old = self.imported.graph
        places = {node.name: self._data_place(node) for node in old.nodes if node.affine is not None}
        for node in self.graph.nodes:
            if node.copied is not None:
                self._copy(node, *node.copied, places)
        for node in old.nodes:
            if node.name in self.graph and node.name not in self.merged.nodes:
                self._change(node, self.graph[node.name], places)
        for node in old.nodes:
            if node.name not in self.graph:
                refs = self.imported.refs[node.name]
                source = self.view.inputs[refs[0]][places[node.name]]
                self.editor.bypass(refs, source, refs[-1].outputs[0])
        write_merges(self.imported, self.graph, self.merged, self.editor)
        return self.editor.finish()

    def _data_place(self, node: Node) -> int:
        """Which input of a node of the file is the one that the graph shows."""
        copies = self.imported.context.copies
        inputs = self.imported.refs[node.name][0].inputs
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
        refs: list[NodeRef] = []
        shared: dict[str, str] = {}
        for ref in self.imported.refs[original]:
            value = self.editor.new_value(f"{self.view.raw[ref.outputs[0]]}.copy", ref.owner)
            inputs = [shared.get(name, name) for name in ref.inputs]
            refs.append(self.editor.insert_copy(ref, inputs, value))
            shared[ref.outputs[0]] = value
        self.imported.refs[node.name] = refs
        self.view.set_input(self.imported.refs[reader][0], places[reader], refs[-1].outputs[0])
        if node.linear is not None:
            self._absorb(node, node.linear)

    def _absorb(self, node: Node, linear: Linear) -> None:
        slots = find_slots(self.imported, node.name)
        ref, value, bias = slots.ref, slots.ref.inputs[slots.weight], slots.bias_value
        key = (value, bias, ref.op, slots.alpha, slots.beta, linear.order, linear.groups)
        for other, weight_name, bias_name in self.done.get(key, ()):
            if other.equals(linear):
                self._attach(slots, weight_name, bias_name)
                return
        names = self._store(node, slots, linear)
        self.done.setdefault(key, []).append((linear, *names))
        self._attach(slots, *names)

    def _store(self, node: Node, slots: Slots, linear: Linear) -> tuple[str, str]:
        """Store the new weight and bias; the value "" stands for a bias that stays as it is, or is in the weight."""
        value, old_bias = slots.ref.inputs[slots.weight], slots.bias_value
        constants = self.imported.context.constants
        dims, data_type = constants.dims(value) or (), self.imported.context.type(value)
        raw = self._label(value, node.name, "weight")
        weight = _Weight(self.imported, slots, linear, dims)
        weight_name = self.editor.add_tensor(f"{raw}.folded", weight, dims, data_type, value)
        if slots.ref.op == "Gather":
            return weight_name, ""
        old = stored_bias(self.imported, slots, linear)
        seen = stored_weight(self.imported, slots) if linear.shifts_input else None
        bias = linear.fold_bias(seen, old)
        if bias is None or (old is not None and np.array_equal(bias, old) and slots.beta == 1):
            return weight_name, ""
        raw = self._label(
            old_bias, raw.replace("weight", "bias") if "weight" in raw else f"{raw}.bias", "bias"
        )
        bias_type = self.imported.context.type(old_bias) if old_bias else data_type
        bias = self._place_bias(slots, linear, bias)
        return weight_name, self._add(f"{raw}.folded", bias, bias_type, old_bias or value)

    def _label(self, value: str, otherwise: str, role: str) -> str:
        """What to call the successor of a stored number."""
        tensor = self.imported.context.whole.tensors.get(value)
        if tensor is not None:
            return str(tensor.name).removesuffix(".folded")
        return f"{otherwise}.{role}" if role == "weight" else otherwise

    def _add(self, wish: str, values: Array, data_type: int, replaces: str) -> str:
        return self.editor.add_tensor(wish, partial(round_to, values), values.shape, data_type, replaces)

    def _place_bias(self, slots: Slots, linear: Linear, bias: Array) -> Array:
        """Give a bias the shape in which it is read: of a MatMul or Einsum, along the axis of its outputs."""
        if slots.ref.op in RECURRENT:
            return with_state_bias(self.imported, slots.ref, bias)
        if slots.ref.op not in ("MatMul", "Einsum"):
            return bias
        old = self.imported.context.constants.array(slots.bias_value).shape if slots.bias_value else ()
        if math.prod(old) == linear.outputs:
            return bias.reshape(old)
        rank = self.imported.context.rank(slots.ref.inputs[1 - slots.weight]) or 0
        return bias.reshape(-1, *[1] * (rank - 1 - linear.out_axis))

    def _attach(self, slots: Slots, weight: str, bias: str) -> None:
        self.view.set_input(slots.ref, slots.weight, weight)
        if slots.ref.op == "Gemm":
            self.editor.drop_attribute(slots.ref, "alpha")
            if bias:
                self.editor.drop_attribute(slots.ref, "beta")
        if not bias:
            return
        if slots.add is not None:
            self.view.set_input(slots.add, slots.bias, bias)
        else:
            self._insert_bias(slots.ref, bias)

    def _insert_bias(self, ref: NodeRef, bias: str) -> None:
        """Add a bias after a MatMul that has none."""
        result = ref.outputs[0]
        raw = self.view.raw[result]
        unbiased = self.editor.new_value(f"{raw}.unbiased", ref.owner)
        self.view.set_output(ref, 0, unbiased)
        name = self.editor.fresh_node(f"{ref.node.name}.bias" if ref.node.name else "")
        self.editor.insert(ref, "Add", name, [unbiased, bias], result)

    # -- affines that stay

    def _set_batchnorm(self, node: Node, affine: Affine) -> bool:
        """Give a BatchNormalization of the file other numbers; False where it is none, or cannot hold them."""
        refs = self.imported.refs[node.name]
        ref = refs[0]
        if len(refs) > 1 or ref.op != "BatchNormalization" or node.op != "BatchNormalization":
            return False
        dims = self.imported.context.constants.dims(ref.inputs[1]) or ()
        size = dims[0] if len(dims) == 1 else 0
        vectors = affine.vectors(1, size) if size else None
        if vectors is None:
            return False
        numbers = [*vectors, np.zeros(size), np.ones(size)]
        for place, values in enumerate(numbers, 1):
            value = ref.inputs[place]
            label = self._label(value, f"{node.name}.{('scale', 'bias', 'mean', 'var')[place - 1]}", "number")
            name = self._add(f"{label}.folded", np.array(values), self.imported.context.type(value), value)
            self.view.set_input(ref, place, name)
        self.editor.set_attribute(ref, "epsilon", 0.0)
        return True

    def _spell_out(self, node: Node, affine: Affine, place: int) -> None:
        """Write an affine as a Mul and an Add, or as one of them."""
        refs = self.imported.refs[node.name]
        source, result, anchor = self.view.inputs[refs[0]][place], refs[-1].outputs[0], refs[-1]
        for ref in refs:
            self.editor.remove(ref)
        data_type = self.imported.context.type(source) or TensorProto.FLOAT
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
                anchor, op, name if refs[-1].node.name else "", [source, constant], target
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

    imported: ImportedModel
    _largest: dict[str, float] = field(default_factory=dict)

    def __call__(self, node: Node) -> str:
        if node.linear is None or not node.linear.changed:
            return ""
        try:
            return self._ask(node, node.linear)
        except Unworkable as error:
            return str(error)

    def _ask(self, node: Node, linear: Linear) -> str:
        slots = find_slots(self.imported, node.name)
        value = slots.ref.inputs[slots.weight]
        name, limit = _limit(self.imported.context.type(value))
        peak = self._peak(value)
        if not math.isfinite(peak):
            return reasons.WEIGHT_NOT_FINITE()
        if self._bound(slots, linear, peak) < limit / 4:
            return ""
        return self._check(slots, linear, name, limit)

    def _peak(self, value: str) -> float:
        if value not in self._largest:
            array = self.imported.context.constants.array(value)
            low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
            self._largest[value] = max(-low, high) if math.isfinite(low + high) else math.inf
        return self._largest[value]

    def _bound(self, slots: Slots, linear: Linear, peak: float) -> float:
        """More than any new weight or bias can be."""
        peak *= abs(slots.alpha)
        before = [np.abs(a).max(initial=0.0) for a in linear.before or (np.ones(1), np.zeros(1))]
        after = [np.abs(a).max(initial=0.0) for a in linear.after or (np.ones(1), np.zeros(1))]
        parallel = np.abs(linear.parallel).max(initial=0.0) if linear.parallel is not None else 0.0
        stored = stored_bias(self.imported, slots, linear)
        bias = 0.0 if stored is None else np.abs(stored).max(initial=0.0)
        taps = (
            math.prod(self.imported.context.constants.dims(slots.ref.inputs[slots.weight]) or ())
            / linear.outputs
        )
        weight = peak * before[0] * after[0] + parallel
        return float(weight + after[0] * (bias + peak * before[1] * taps) + after[1])

    def _check(self, slots: Slots, linear: Linear, name: str, limit: float) -> str:
        bias = stored_bias(self.imported, slots, linear)
        for role, array in zip(
            ("weight", "bias"), linear.fold(stored_weight(self.imported, slots), bias), strict=True
        ):
            if array is not None and not np.abs(array).max(initial=0.0) <= limit:
                return reasons.OVERFLOWS(role=role, dtype=name)
        return ""


def _limit(data_type: int) -> tuple[str, float]:
    """A type's name and its largest number."""
    limits: dict[int, tuple[str, float]] = {
        TensorProto.FLOAT16: ("float16", 65504.0),
        TensorProto.BFLOAT16: ("bfloat16", 3.38953139e38),
        TensorProto.DOUBLE: ("float64", 1.7976931348623157e308),
    }
    return limits.get(data_type, ("float32", 3.4028234663852886e38))
