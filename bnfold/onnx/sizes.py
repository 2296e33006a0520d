"""Vectors of sizes, computed symbolically: what a model computes from shapes to reshape, expand or resize by.

`Concat(Shape(x)[:2], [-1])` of an `(N, 64, 7, 7)` value is `(N, 64, -1)`. Only small vectors (and scalars) of whole
numbers are followed, through the few operators that exporters compute them with; a size that is not known is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onnx import TensorProto

from bnfold.graph import Dim, Shape
from bnfold.onnx.scope import Spot

if TYPE_CHECKING:
    from bnfold.onnx.constants import Constants

__all__ = ["Shapes", "find_sizes", "note_sizes", "product"]


@dataclass(frozen=True)
class Shapes:
    """The shapes and the element types (`TensorProto.DataType`) of values, and what the inference complained about.

    Attributes:
        sizes: what is known of small vectors (and scalars) of whole numbers that the model computes.
    """

    shapes: dict[str, Shape]
    types: dict[str, int]
    complaint: str = ""
    sizes: dict[str, Shape] = field(default_factory=dict)


def find_sizes(value: str, found: Shapes, constants: Constants) -> Shape | None:
    """What is known of a small vector of whole numbers."""
    if value in constants:
        size = constants.size(value)
        numbers = constants.integers(value) if size is not None and size <= 64 else None
        return None if numbers is None else tuple(numbers)
    return found.sizes.get(value)


def note_sizes(spot: Spot, found: Shapes, constants: Constants) -> None:
    """Compute a vector of sizes symbolically, if that is what a node computes."""
    if spot.op in ("Shape", "Size"):
        shape = found.shapes.get(spot.inputs[0])
        result = None if shape is None else _measured(spot, shape)
    elif spot.op in _SIZES and found.types.get(spot.outputs[0]) in (TensorProto.INT64, TensorProto.INT32):
        given = [find_sizes(value, found, constants) if value else None for value in spot.inputs]
        result = None if given[0] is None else _SIZES[spot.op](spot, [g or () for g in given], constants)
    elif found.types.get(spot.outputs[0]) == TensorProto.INT64:
        shape = found.shapes.get(spot.outputs[0], ())
        result = (
            (None,) * shape[0] if len(shape) == 1 and isinstance(shape[0], int) and shape[0] <= 64 else None
        )
    else:
        return
    if result is not None and len(result) <= 64:
        found.sizes[spot.outputs[0]] = result
        rank = len(found.shapes.get(spot.outputs[0], (0, 0)))
        whole = [size for size in result if isinstance(size, int)]
        if rank < 2 and len(whole) == len(result):
            constants.add_sizes(spot.outputs[0], whole if rank else whole[0])


def _measured(spot: Spot, shape: Shape) -> Shape:
    if spot.op == "Size":
        return (product(shape),)
    bounds = {item.name: item.i for item in spot.node.attribute}
    return shape[slice(bounds.get("start", 0), bounds.get("end"))]


def _picked(spot: Spot, given: list[Shape], constants: Constants) -> Shape | None:
    chosen = constants.integers(spot.inputs[1])
    if chosen is None or any(not -len(given[0]) <= n < len(given[0]) for n in chosen):
        return None
    return tuple(given[0][n] for n in chosen)


def _cut(spot: Spot, given: list[Shape], constants: Constants) -> Shape | None:
    options = {item.name: list(item.ints) for item in spot.node.attribute}
    numbers = [constants.integers(value) if value else None for value in spot.inputs[1:]]
    starts, ends, _, steps = (
        *([options.get("starts"), options.get("ends")] if options else numbers),
        *[None] * 4,
    )[:4]
    if options:
        steps = None
    if not starts or not ends or len(starts) != 1 or (len(spot.inputs) > 4 and steps is None):
        return None
    return given[0][slice(starts[0], ends[0], steps[0] if steps else None)]


def _joined(spot: Spot, given: list[Shape], constants: Constants) -> Shape | None:
    return tuple(size for part in given for size in part) if all(given) else None


def _kept(spot: Spot, given: list[Shape], constants: Constants) -> Shape | None:
    return given[0]


def _computed(compute: Callable[[int, int], int]) -> Callable[[Spot, list[Shape], Constants], Shape | None]:
    def rule(spot: Spot, given: list[Shape], constants: Constants) -> Shape | None:
        length = max(map(len, given))
        if not all(given) or any(len(part) not in (1, length) for part in given):
            return None
        left, right = (part * length if len(part) == 1 else part for part in given)
        return tuple(_combine(spot.op, compute, a, b) for a, b in zip(left, right, strict=True))

    return rule


def _combine(op: str, compute: Callable[[int, int], int], a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return compute(a, b) if op != "Div" or b else None
    if op in ("Mul", "Div") and b == 1:
        return a
    return b if op == "Mul" and a == 1 else None


def _truncated(a: int, b: int) -> int:
    """A quotient of whole numbers, rounded towards zero."""
    return a // b if (a >= 0) == (b > 0) else -(-a // b)


_SIZES: Mapping[str, Callable[[Spot, list[Shape], Constants], Shape | None]] = {
    **dict.fromkeys(("Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape"), _kept),
    "Gather": _picked,
    "Slice": _cut,
    "Concat": _joined,
    "Add": _computed(lambda a, b: a + b),
    "Sub": _computed(lambda a, b: a - b),
    "Mul": _computed(lambda a, b: a * b),
    "Div": _computed(_truncated),
}


def product(sizes: Shape) -> Dim:
    """The product of sizes, where it can be told."""
    rest = [size for size in sizes if size != 1]
    if all(isinstance(size, int) for size in rest):
        return math.prod(size for size in rest if isinstance(size, int))
    return rest[0] if len(rest) == 1 else None
