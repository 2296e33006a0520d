"""Vectors of sizes, as far as they are known at every size of the inputs.

What a model computes from sizes (`Concat(Shape(x)[:2], [-1])` of an `(N, 64, 7, 7)` value) is computed like any other
constant, with NaN for each size that is open. So it is told number by number what is known: `(NaN, 64, -1)`.

What could make a number of a NaN (a comparison, a maximum) makes NaN of it here, element by element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import onnx
from onnx import TensorProto

from bnfold.ir import Shape
from bnfold.onnx.constant_folding import Constants, Unworkable
from bnfold.onnx.protos import Tensor, attributes

__all__ = ["CARRY_NAN", "VECTOR", "Sizes", "is_open"]

VECTOR = 64
"""What a model computes from sizes has no more elements than this."""

CARRY_NAN = frozenset(
    """Identity Reshape Squeeze Unsqueeze Transpose Flatten Gather Slice Concat Expand
    Add Sub Mul Div Neg Shape Size""".split()  # noqa: SIM905
)

_ELEMENTWISE = frozenset(
    "And Clip Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Not Or Sign Where Xor".split()  # noqa: SIM905
)


class Sizes(Constants):
    """Constants among which a size that is open counts as one, and is NaN."""

    def numbers(self, value: str) -> Shape | None:
        """A vector of whole numbers, with None for each that is not known; None where not even their count is."""
        array = self.get(value) if value in self else None
        if array is None:
            shape = self.shapes.get(value, ())
            count = shape[0] if len(shape) == 1 else None
            whole = self.types.get(value) in (TensorProto.INT64, TensorProto.INT32)
            return (None,) * count if isinstance(count, int) and whole and count <= VECTOR else None
        return tuple(int(number) if number == np.trunc(number) else None for number in array.ravel())

    def _has_numbers_for_sizes(self, value: str) -> bool:
        return value in self.shapes

    def _measure(self, node: onnx.NodeProto, value: str, known: Mapping[str, Tensor]) -> Tensor:
        shape = self.shapes.get(value, ())
        if all(isinstance(size, int) for size in shape):
            return super()._measure(node, value, known)
        sizes = np.asarray([size if isinstance(size, int) else np.nan for size in shape])
        if node.op_type == "Size":
            return np.asarray(np.prod(sizes))
        options = attributes(node)
        return sizes[slice(options.get("start", 0), options.get("end"))]

    def _compute(
        self, node: onnx.NodeProto, inputs: Sequence[str], place: int, known: Mapping[str, Tensor]
    ) -> Tensor:
        if not any(is_open(known[name]) for name in inputs if name in known):
            return super()._compute(node, inputs, place, known)
        if node.op_type == "Cast":
            return known[inputs[0]]
        if node.op_type in CARRY_NAN:
            with suppress(Exception):
                array = super()._compute(node, inputs, place, known)
                return array if is_open(array) else array.astype(np.int64)
        if node.op_type in _ELEMENTWISE:
            with suppress(Exception):
                return self._by_element(node, inputs, place, known)
        shape = [size for size in self.shapes.get(node.output[place], (None,)) if isinstance(size, int)]
        if len(shape) < len(self.shapes.get(node.output[place], (None,))) or math.prod(shape) > VECTOR:
            raise Unworkable(f"nothing is known of what `{node.op_type}` makes of an open size")
        return np.full(shape, np.nan)

    def _by_element(
        self, node: onnx.NodeProto, inputs: Sequence[str], place: int, known: Mapping[str, Tensor]
    ) -> Tensor:
        """What an operator makes of numbers and NaN: NaN of each element of which an operand is."""
        closed = {name: self._closed(name, known[name]) for name in inputs if name}
        array = super()._compute(node, inputs, place, closed)
        gaps = [np.isnan(known[name]) for name in inputs if name and is_open(known[name])]
        return np.where(np.any(np.broadcast_arrays(*gaps, np.zeros(array.shape, bool)), 0), np.nan, array)

    def _closed(self, name: str, array: Tensor) -> Tensor:
        """An operand with zeros for what is open, in its own type."""
        if not is_open(array):
            return array
        return np.nan_to_num(array).astype(onnx.helper.tensor_dtype_to_np_dtype(self.types[name]))


def is_open(array: Tensor) -> bool:
    """Whether it holds a number that is not known."""
    return array.dtype.kind == "f" and bool(np.isnan(array).any())
