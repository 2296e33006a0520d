"""Move every number that a model computes with a little, to see what roundings do to its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from bnfold.cases import move
from bnfold.equivalence import UNIT_ROUNDOFF
from bnfold.onnx.protos import FLOATS, load
from bnfold.onnx.run import fixed_values, widen

__all__ = ["nudge"]


def nudge(
    model: onnx.ModelProto, folder: Path | None, units: float, seed: int, exact: bool = False
) -> onnx.ModelProto:
    """A copy of a model, each float of its weights moved up or down by units in its last place.

    Not moved: scalars and the scales of a Resize, of which sizes are computed, and what functions, bodies and sparse
    tensors hold.

    Args:
        model: the model, in which a weight may wait to be widened (see `bnfold.onnx.run`); its external data lies in
            `folder` and comes into the copy.
        exact: move numbers in float64, by its units.

    Raises:
        InputError: external data is missing.
    """
    copy, random = onnx.ModelProto(), np.random.default_rng(seed)
    copy.CopyFrom(model)
    fixed = fixed_values(copy.graph)
    for name, tensor in _weights(copy.graph):
        if name in fixed:
            continue
        array = widen(load(tensor, folder)) if exact else load(tensor, folder)
        unit = UNIT_ROUNDOFF[array.dtype.name]
        tensor.CopyFrom(onnx.numpy_helper.from_array(move(array, units * unit, random), tensor.name))
    return copy


def _weights(graph: onnx.GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """The stored floats that are no scalars, with the names of their values."""
    stored = [(tensor.name, tensor) for tensor in graph.initializer]
    stored += [
        (node.output[0], item.t)
        for node in graph.node
        if node.op_type == "Constant"
        for item in node.attribute
        if item.name == "value"
    ]
    yield from ((name, tensor) for name, tensor in stored if tensor.data_type in FLOATS and tensor.dims)
