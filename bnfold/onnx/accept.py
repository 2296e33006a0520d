"""What is refused before anything is computed: a description that does not hold together, or asks for too much.

A file may come from anybody. What every later step rests on is asked here once, in one walk over the description, so
that a damaged or hostile model ends in one line:

- text is UTF-8, and messages are nested no deeper than protobuf itself reads them (`DEPTH`);
- an attribute that is said to hold a tensor or a graph holds one;
- a tensor has a type, no negative sizes, and as many numbers as its shape promises;
- a sparse tensor lies in the model itself and stands for no more than `WRITTEN_OUT` numbers;
- a function has one definition and does not call itself, by whatever way; the calls of all functions expand to no more
  than `EXPANDED` nodes, no more than `CALLS` deep.

Not covered: whether operators exist and suit their inputs, which onnxruntime and ONNX's checker judge (`run`, `fold`),
and tensors in external files (`protos.check_external`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import onnx
from onnx import AttributeProto, SparseTensorProto, TensorProto

from bnfold.errors import InputError
from bnfold.onnx.flatten import bodies
from bnfold.onnx.protos import bits

__all__ = ["accept"]

DEPTH = 100
"""How deep messages may be nested: about 33 bodies in one another."""

EXPANDED = 50_000
"""How many nodes the calls of a model's functions may expand to."""

CALLS = 100
"""How deep functions may call one another, as in ONNX's own checker."""

WRITTEN_OUT = 1 << 28
"""How many numbers a sparse tensor may stand for."""

Key = tuple[str, str, str]


def accept(model: onnx.ModelProto, label: str = "the model") -> None:
    """Refuse a description that does not hold together, or asks for too much.

    Raises:
        InputError: see the module.
    """
    try:
        for message in list(_messages(model, label)):
            if isinstance(message, TensorProto):
                _check_tensor(message)
            elif isinstance(message, SparseTensorProto):
                _check_sparse(message)
            elif isinstance(message, AttributeProto):
                _check_attribute(message)
    except UnicodeDecodeError as error:
        raise InputError(f"{label} holds text that is not UTF-8: {error}") from error
    _check_functions(model)


def _messages(model: onnx.ModelProto, label: str) -> Iterator[Any]:
    """Every message of a model, itself included; all text has been looked at when the last is there."""
    waiting: list[tuple[Any, int]] = [(model, 0)]
    while waiting:
        message, depth = waiting.pop()
        if depth > DEPTH:
            raise InputError(f"{label} nests its bodies or types too deep (more than {DEPTH} messages)")
        for field, value in _fields(message):
            if field.type == field.TYPE_STRING:
                _check_text(value, field.name, label)
            elif field.type == field.TYPE_MESSAGE:
                waiting += [
                    (inner, depth + 1) for inner in ([value] if hasattr(value, "ListFields") else value)
                ]
        yield message


_OF_TENSOR = [
    field for field in TensorProto.DESCRIPTOR.fields if field.type in (field.TYPE_STRING, field.TYPE_MESSAGE)
]
"""What else a tensor holds: text, and messages, of which `segment` alone stands once."""


def _fields(message: Any) -> Iterable[tuple[Any, Any]]:
    """What a message holds; of a tensor without its numbers, which would be copied to be given."""
    if not isinstance(message, TensorProto):
        return message.ListFields()  # type: ignore[no-any-return]
    fields = (field for field in _OF_TENSOR if field.name != "segment" or message.HasField("segment"))
    return [(field, getattr(message, field.name)) for field in fields]


def _check_text(value: Any, field: str, label: str) -> None:
    for text in [value] if isinstance(value, str | bytes) else value:
        if not isinstance(text, str):
            raise InputError(f"{label} holds text that is not UTF-8: a {field}, {text[:40]!r}")


_HELD = {
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
}
"""Where an attribute of a type keeps its message."""


def _check_attribute(item: AttributeProto) -> None:
    field = _HELD.get(item.type)
    if field and not item.ref_attr_name and not item.HasField(field):
        kind = AttributeProto.AttributeType.Name(item.type).lower()
        raise InputError(f"an attribute `{item.name:.80}` is said to be a {kind} and holds none")


def _check_tensor(tensor: TensorProto) -> None:
    name = f"the tensor `{tensor.name:.80}`"
    if tensor.data_type == TensorProto.UNDEFINED or tensor.data_type not in TensorProto.DataType.values():
        raise InputError(f"{name} has no type that is known (number {tensor.data_type})")
    if any(size < 0 for size in tensor.dims):
        raise InputError(f"{name} has a negative size: {list(tensor.dims)}")
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    promised, stored = _promised(tensor)
    if promised != stored:
        raise InputError(
            f"{name} has the shape {list(tensor.dims)}, and other than its data: {stored} for {promised}"
        )


def _check_sparse(sparse: SparseTensorProto) -> None:
    name, count = f"the sparse tensor `{sparse.values.name:.80}`", math.prod(sparse.dims)
    if any(size < 0 for size in sparse.dims) or count > WRITTEN_OUT:
        raise InputError(f"{name} would have the shape {list(sparse.dims)} ({WRITTEN_OUT} numbers at most)")
    if TensorProto.EXTERNAL in (sparse.values.data_location, sparse.indices.data_location):
        raise InputError(f"{name} has its data in another file, which is not read; store it in the model")


def _promised(tensor: TensorProto) -> tuple[int, int]:
    """How much a shape promises and how much is stored, in bytes or in numbers."""
    count = math.prod(tensor.dims)
    packed = -(-count * bits(tensor.data_type) // 8)
    if "FLOAT6" in TensorProto.DataType.Name(tensor.data_type):  # packed by some writers and not by others
        return 0, 0
    if tensor.HasField("raw_data"):
        return packed, len(tensor.raw_data)
    numbers = getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))
    each = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
    return min(each * count, packed) if bits(tensor.data_type) < 8 else each * count, len(numbers)


# ---------------------------------------------------------------- functions


def _check_functions(model: onnx.ModelProto) -> None:
    """Refuse functions that are defined twice, call themselves, or expand too far."""
    calls: dict[Key, list[Key]] = {}
    for function in model.functions:
        if _key(function) in calls:
            raise InputError(f"the function `{function.name}` is defined twice")
        calls[_key(function)] = [_callee(node) for node in _nodes(function.node)]
    extents: dict[Key, tuple[int, int]] = {}
    for key in calls:
        _measure(key, calls, extents)
    total = sum(extents[key][0] for node in _nodes(model.graph.node) if (key := _callee(node)) in extents)
    deepest = max((depth for _, depth in extents.values()), default=0)
    if total > EXPANDED or deepest > CALLS:
        fact = f"to {total} nodes, {deepest} calls deep; the limits are {EXPANDED} and {CALLS}"
        raise InputError(f"the calls of the model's functions expand {fact}")


def _measure(key: Key, calls: dict[Key, list[Key]], extents: dict[Key, tuple[int, int]]) -> None:
    """Note how many nodes a call expands to, and how many calls deep, of a function and of those that it calls."""
    waiting, open_ = [key], set[Key]()
    while waiting:
        here = waiting[-1]
        missing = [inner for inner in calls[here] if inner in calls and inner not in extents]
        if missing and here not in extents:
            open_.add(here)
            if any(inner in open_ for inner in missing):
                raise InputError(f"the function `{here[1]}` calls itself")
            waiting += dict.fromkeys(missing)
            continue
        parts = [extents.get(inner, (1, 0)) for inner in calls[here]]
        extents[here] = (sum(nodes for nodes, _ in parts), 1 + max((depth for _, depth in parts), default=0))
        open_.discard(waiting.pop())


def _nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These nodes and those in their bodies."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [inner for body in bodies(node) for inner in body.node]


def _key(function: onnx.FunctionProto) -> Key:
    return function.domain, function.name, function.overload


def _callee(node: onnx.NodeProto) -> Key:
    return node.domain, node.op_type, node.overload
