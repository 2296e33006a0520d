"""Make inputs for a model from what it declares: types, shapes, and what its tables can be asked for.

Signals are smooth and correlated between channels, with an offset and a little noise, as images and sound are: pure
noise averages out in nets that end in a pooling, and a comparison on it says little. Whole numbers that reach a table
are drawn from its rows. Sizes that the model leaves open are tried out, until it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from bnfold.errors import InputError
from bnfold.ir import Dim
from bnfold.onnx.context import ImportContext
from bnfold.onnx.protos import FLOATS

__all__ = ["Feed", "candidates"]

Feed = dict[str, np.ndarray[Any, Any]]

LARGEST = 1 << 24
"""No input is made up with more elements than this, unless it is declared so."""

DECLARED = 1 << 28
"""Nor with more than this, whatever is declared."""

_SIZES = (
    (2, 64),
    (1, 64),
    (1, 32),
    (2, 16),
    (1, 128),
    (1, 224),
    (1, 512),
    (1, 8),
    (1, 320),
    (1, 1),
    (1, 16000),
)
"""Sizes to try where they are open: of the first axis, and of every other."""

_WHOLE = (None, 1, 16000, 0)
"""What to try for whole numbers that reach no table: a few different ones, or all of them this one."""

_THROUGH = frozenset({
    "Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Flatten", "Expand", "Slice",
    "Clip", "Gather", "Concat",
})  # fmt: skip


def candidates(model: onnx.ModelProto, context: ImportContext, seed: int = 0) -> Iterator[Feed]:
    """Feeds to try, the most likely first."""
    given = [item for item in model.graph.input if item.name in context.whole.inputs]
    is_open = any(not isinstance(size, int) for item in given for size in _shape(item))
    is_whole = any(_kind(item) not in FLOATS for item in given)
    for item in given:
        if not item.type.HasField("tensor_type"):
            raise InputError(f"the input `{item.name}` is no tensor; give inputs, or fold without verifying")
        count = math.prod(size for size in _shape(item) if isinstance(size, int))
        if count > DECLARED:
            fact = f"is declared with {count} elements or more, and bnfold makes up {DECLARED} at most"
            raise InputError(f"the input `{item.name}` {fact}; give inputs, or fold without verifying")
    for whole in _WHOLE if is_whole else (None,):
        for sizes in _SIZES if is_open else _SIZES[:1]:
            yield from _small(given, context, sizes, whole, seed)
        for channels in _channels(context) if is_open else ():
            for size in (16, 64):
                for axis in (-1, 1):
                    yield from _small(given, context, (2, size), whole, seed, (axis, channels))


def _small(*arguments: Any) -> Iterator[Feed]:
    """One feed, or none where it would be too large."""
    try:
        yield make(*arguments)
    except InputError:
        return


def _channels(context: ImportContext) -> list[int]:
    """How many channels the weights of the model read, first come first."""
    found: dict[int, None] = {}
    for ref in context.whole.refs:
        dims = context.constants.dims(ref.inputs[1]) if len(ref.inputs) > 1 and ref.op in _READERS else None
        if dims:
            found.update(dict.fromkeys(dims[:2]))
    return list(found)[:6]


_READERS = frozenset({"MatMul", "Gemm", "Conv", "BatchNormalization"})


def make(
    given: list[onnx.ValueInfoProto],
    context: ImportContext,
    sizes: tuple[int, int],
    whole: int | None,
    seed: int,
    channels: tuple[int, int] | None = None,
) -> Feed:
    """One feed: an array for every input of the model."""
    random = np.random.default_rng(seed)
    feed = {}
    for item in given:
        declared = _shape(item)
        shape = [_size(dim, axis, sizes) for axis, dim in enumerate(declared)]
        if channels is not None and len(shape) > 1 and not isinstance(declared[channels[0]], int):
            shape[channels[0]] = channels[1]
        if math.prod(shape) > LARGEST and any(not isinstance(size, int) for size in declared):
            raise InputError(f"the input `{item.name}` would be too large")
        feed[item.name] = np.asarray(_array(item, shape, context, whole, random))
    return feed


def _shape(item: onnx.ValueInfoProto) -> list[Dim]:
    dims = item.type.tensor_type.shape.dim
    fixed = [dim.HasField("dim_value") and dim.dim_value >= 0 for dim in dims]
    return [int(d.dim_value) if known else d.dim_param or None for d, known in zip(dims, fixed, strict=True)]


def _kind(item: onnx.ValueInfoProto) -> int:
    return int(item.type.tensor_type.elem_type)


def _size(dim: Dim, axis: int, sizes: tuple[int, int]) -> int:
    if isinstance(dim, int):
        return dim
    return sizes[0] if axis == 0 or (dim or "").lower() in ("batch", "batch_size", "n", "b") else sizes[1]


def _array(
    item: onnx.ValueInfoProto,
    shape: list[int],
    context: ImportContext,
    whole: int | None,
    random: np.random.Generator,
) -> np.ndarray[Any, Any]:
    kind = _kind(item)
    dtype = np.dtype(object) if kind == TensorProto.STRING else onnx.helper.tensor_dtype_to_np_dtype(kind)
    if kind in FLOATS:
        return signal(shape, random).astype(dtype)
    if dtype.kind == "c":
        return (signal(shape, random) + 1j * signal(shape, random)).astype(dtype)
    if kind == TensorProto.BOOL:
        return np.asarray(random.random(shape) < 0.7)
    if kind == TensorProto.STRING:
        return np.full(shape, "a", object)
    rows = _rows(item.name, context)
    if whole is not None and rows is None:
        return np.full(shape, whole, dtype)
    return np.asarray(random.integers(0, rows or (256 if kind == TensorProto.UINT8 else 8), shape)).astype(
        dtype
    )


def signal(shape: list[int], random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A smooth signal along every axis, with an offset per example and channel, and a little noise."""
    result = 0.1 * random.standard_normal(shape)
    for _ in range(3):
        wave = np.ones(shape)
        for axis, size in enumerate(shape):
            if size > 1:
                turns = random.uniform(0.3, 3.0) * np.arange(size) / size
                along = np.cos(2 * np.pi * (turns + random.random()))
                wave = wave * along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        result = result + wave
    offsets = (
        random.standard_normal(shape[:2] + [1] * (len(shape) - 2)) if shape else random.standard_normal()
    )
    return np.asarray(result + 0.5 * offsets)


def _rows(name: str, context: ImportContext) -> int | None:
    """How many rows the smallest table has that an input is looked up in."""
    waiting, seen, rows = [name], {name}, []
    while waiting:
        value = waiting.pop()
        for use in context.whole.uses.get(value, ()):
            ref = use.ref
            if ref is None:
                continue
            if (ref.op in ("Gather", "GatherElements", "OneHot") and use.place == 1) or ref.op == "OneHot":
                rows += _table_rows(ref.inputs, ref.node, context)
            elif (ref.op in _THROUGH and use.place == 0) or ref.op == "Concat":
                waiting += [output for output in ref.outputs if output not in seen]
                seen.update(ref.outputs)
    return min(rows, default=None)


def _table_rows(inputs: list[str], node: onnx.NodeProto, context: ImportContext) -> list[int]:
    if node.op_type == "OneHot":
        depth = context.constants.integers(inputs[1])
        return depth[:1] if depth else []
    axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
    shape = context.shape(inputs[0])
    size = shape[axis] if shape else None
    return [size] if isinstance(size, int) and size > 0 else []
