"""What the protobufs of a file hold, as Python and NumPy values: the attributes of a node, the numbers of a tensor.

External data lies in the model's folder or below it, wherever links lead; it is mapped into memory, not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from bnfold.errors import InputError

__all__ = [
    "FLOATS",
    "Tensor",
    "attribute",
    "attributes",
    "bits",
    "check_external",
    "densify",
    "load",
    "map_bytes",
    "width",
]

Tensor = np.ndarray[Any, Any]

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16})
"""The types in which an affine can travel."""


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values (strings decoded)."""
    return {item.name: _attribute_value(item) for item in node.attribute}


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """One attribute of a node as a Python value."""
    return next((_attribute_value(item) for item in node.attribute if item.name == name), default)


def _attribute_value(item: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(item)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (onnx.TensorProto, onnx.GraphProto, int, float)):
        return value
    return (
        [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in value]
        if _is_list(value)
        else value
    )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) or type(value).__name__.startswith("Repeated")


def load(tensor: TensorProto, folder: Path | None) -> Tensor:
    """The numbers of a stored tensor; external data is memory-mapped.

    Raises:
        InputError: its data is missing, outside the model's folder, or of another size than it says.
    """
    if tensor.data_location == TensorProto.EXTERNAL:
        return _map_external(tensor, folder)
    try:
        return onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"the tensor `{tensor.name}` cannot be read: {error}") from error


def _map_external(tensor: TensorProto, folder: Path | None) -> Tensor:
    path, offset, size = check_external(tensor, folder)
    dtype, shape = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
    if dtype.itemsize * 8 != bits(tensor.data_type):
        raise InputError(f"the tensor `{tensor.name}` is packed more densely than bnfold reads")
    return map_bytes(path, offset, size).view(dtype).reshape(shape)


def densify(sparse: onnx.SparseTensorProto) -> TensorProto:
    """A sparse tensor written out.

    Raises:
        InputError: its places do not suit its shape.
    """
    values, places = load(sparse.values, None), np.asarray(load(sparse.indices, None), np.int64)
    dims = tuple(sparse.dims)
    dense = np.zeros(dims, values.dtype)
    try:
        flat = places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), dims)
        if flat.shape != values.shape or (flat < 0).any():
            raise ValueError(f"{len(flat)} places for {values.size} values")
        dense.reshape(-1)[flat] = values
    except (ValueError, IndexError) as error:
        raise InputError(f"the sparse tensor `{sparse.values.name}` cannot be read: {error}") from error
    return onnx.numpy_helper.from_array(dense, sparse.values.name)


def map_bytes(path: Path, offset: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A part of a file, as it is on the disk."""
    return np.memmap(path, np.uint8, "r", offset, (size,)) if size else np.empty(0, np.uint8)


def check_external(tensor: TensorProto, folder: Path | None) -> tuple[Path, int, int]:
    """The file, offset and length of a tensor's external data.

    Raises:
        InputError: there is no such file, it lies outside the model's folder, or it is too short.
    """
    path, offset, length = locate(tensor, folder)
    size = -(-math.prod(tensor.dims) * bits(tensor.data_type) // 8)
    if path.stat().st_size < offset + size or (length and length < size):
        raise InputError(f"the data of `{tensor.name}` in {path.name} is shorter than its shape says")
    return path, offset, size


def bits(data_type: int) -> int:
    """How many bits one element takes in a file."""
    name = TensorProto.DataType.Name(data_type)
    packed = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
    return packed[name] if name in packed else width(data_type) * 8


def width(data_type: int) -> int:
    """How many bytes one element takes, at most."""
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def locate(tensor: TensorProto, folder: Path | None) -> tuple[Path, int, int]:
    """The file, offset and length (0: to be told by the shape) of a tensor's external data.

    Raises:
        InputError: there is no such file, or it lies outside the model's folder.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise InputError(
            f"`{tensor.name}` keeps its data in {location!r}; fold the file, so that its folder is known"
        )
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
    except ValueError as error:
        raise InputError(f"the data of `{tensor.name}` is at no readable place: {error}") from error
    path, root = (folder / location), folder.resolve()
    named = location and "\0" not in location and not Path(location).is_absolute()
    inside = named and _resolves_into(path, root)
    if not inside or offset < 0 or length < 0:
        raise InputError(f"the data of `{tensor.name}` lies outside the model's folder, at {location!r}")
    if not path.is_file():
        raise InputError(f"the data of `{tensor.name}` is missing: no file {location!r} beside the model")
    return path, offset, length


def _resolves_into(path: Path, root: Path) -> bool:
    """Whether a path is in a folder, links followed; one that the system cannot look at is not."""
    try:
        path.is_file()
        return path.resolve().is_relative_to(root)
    except OSError:
        return False
