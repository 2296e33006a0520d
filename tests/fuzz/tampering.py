"""Folded models with one thing in them changed: a number, a wire, an attribute, an operator, a node."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["tamper"]

_OTHERS = {
    "Relu": "Abs",
    "Abs": "Relu",
    "Add": "Sub",
    "Sub": "Add",
    "Mul": "Add",
    "Tanh": "Sigmoid",
    "Max": "Min",
}


def tamper(model: onnx.ModelProto, random: np.random.Generator) -> str:
    """Change one thing in a model; say what, or nothing where that could not be done."""
    change = CHANGES[random.integers(len(CHANGES))]
    return f"{change.__name__}: {what}" if (what := change(model, random)) else ""


def _node(model: onnx.ModelProto, random: np.random.Generator) -> onnx.NodeProto:
    return model.graph.node[random.integers(len(model.graph.node))]


def number(model: onnx.ModelProto, random: np.random.Generator) -> str:
    if not model.graph.initializer:
        return ""
    tensor = model.graph.initializer[random.integers(len(model.graph.initializer))]
    array = numpy_helper.to_array(tensor).copy()
    if not array.size or array.dtype.kind not in "fi":
        return ""
    place = random.integers(array.size)
    array.flat[place] = array.flat[place] * 1.01 + 0.01 if array.dtype.kind == "f" else array.flat[place] + 1
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return f"{name}[{place}]"


def wire(model: onnx.ModelProto, random: np.random.Generator) -> str:
    node = _node(model, random)
    values = [
        value for each in model.graph.node for value in each.output if value and value not in node.output
    ]
    if not node.input or not values:
        return ""
    place, value = random.integers(len(node.input)), values[random.integers(len(values))]
    what = f"{node.op_type} reads {value} for {node.input[place]}"
    node.input[place] = value
    return what


def order(model: onnx.ModelProto, random: np.random.Generator) -> str:
    node = _node(model, random)
    if len(node.input) < 2:
        return ""
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return node.op_type


def attribute(model: onnx.ModelProto, random: np.random.Generator) -> str:
    node = _node(model, random)
    if not node.attribute:
        return ""
    item = node.attribute[random.integers(len(node.attribute))]
    if item.type == onnx.AttributeProto.INT:
        item.i = item.i + 1 if item.i != 1 else 0
    elif item.type == onnx.AttributeProto.FLOAT:
        item.f = item.f * 1.5 + 0.1
    elif item.type == onnx.AttributeProto.INTS and item.ints:
        item.ints[:] = item.ints[::-1]
    else:
        return ""
    return f"{node.op_type}.{item.name}"


def operator(model: onnx.ModelProto, random: np.random.Generator) -> str:
    nodes = [node for node in model.graph.node if node.op_type in _OTHERS]
    if not nodes:
        return ""
    node = nodes[random.integers(len(nodes))]
    node.op_type = _OTHERS[node.op_type]
    return node.op_type


def removal(model: onnx.ModelProto, random: np.random.Generator) -> str:
    node = _node(model, random)
    if not node.input or not node.output:
        return ""
    gone, source = node.output[0], node.input[0]
    for each in model.graph.node:
        each.input[:] = [source if value == gone else value for value in each.input]
    if gone in {item.name for item in model.graph.output}:
        return ""
    op = node.op_type
    model.graph.node.remove(node)
    return op


CHANGES: list[Callable[[onnx.ModelProto, np.random.Generator], str]] = [
    number,
    wire,
    order,
    attribute,
    operator,
    removal,
]
