"""Copies of a model that do without some of its tensors, since each copy of a weight costs its time and its memory."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import onnx
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import TensorProto

from bnfold.onnx.protos import FLOATS

__all__ = ["copy_without", "without_weights"]

LARGE = 512
"""Tensors of more numbers than this are no checker's business."""


def copy_without(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy of a model without these initializers of its main graph.

    They may still be there where the model has fields that this version of ONNX does not know.
    """
    copy = onnx.ModelProto()
    if any(len(UnknownFieldSet(message)) for message in (model, model.graph)):
        copy.CopyFrom(model)
        return copy
    _copy_fields(model, copy, "graph")
    _copy_fields(model.graph, copy.graph, "initializer")
    copy.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in names)
    return copy


def _copy_fields(message: Any, copy: Any, but: str) -> None:
    """Copy what a message holds, one field aside."""
    for field, value in message.ListFields():
        if field.name == but:
            continue
        if hasattr(value, "ListFields"):
            getattr(copy, field.name).CopyFrom(value)
        elif hasattr(value, "extend"):
            getattr(copy, field.name).extend(value)
        else:
            setattr(copy, field.name, value)


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model for ONNX's checker, in which the large weights of the main graph are inputs of their type and shape.

    The checker would copy each number several times, and look at none. Left in the model are weights that the checker
    has something to say about: those that are also inputs, or stand twice. That there are as many numbers as the shape
    says was asked when the model was accepted (see `accept` and `check_external`), or they were computed so.
    """
    others = {item.name for item in model.graph.input}
    others |= {tensor.name for tensor in model.graph.initializer if not _is_large(tensor)}
    large = [tensor for tensor in model.graph.initializer if tensor.name not in others]
    names = {tensor.name for tensor in large}
    if len(names) < len(large) or not names:
        return model
    copy = copy_without(model, names)
    if len(copy.graph.initializer) + len(large) > len(model.graph.initializer):
        return model
    for tensor in large:
        copy.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    return copy


def _is_large(tensor: TensorProto) -> bool:
    """Whether it is one of many floats, which are stored in the one way that is not copied to be looked at."""
    stored = tensor.HasField("raw_data") or tensor.data_location == TensorProto.EXTERNAL
    return stored and tensor.data_type in FLOATS and math.prod(tensor.dims) > LARGE
