"""The shapes and element types of all values: what ONNX's shape inference says, and what it leaves open.

The inference runs on a copy of the model without its large tensors (their shapes stay), so that a model over 2 GiB can
be inferred and no weight is copied. Symbols that the inference invents for unknown sizes are unique, so two equal
symbols are one size. Reshapes are refined here: where all but one size is known on both sides, that one is the same on
both, which is how a symbolic batch size survives a `Reshape(x, [-1, 2048])`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto

from bnfold.graph import Dim, Shape
from bnfold.onnx.scope import Spot, Survey, bodies, survey

if TYPE_CHECKING:
    from bnfold.onnx.constants import Constants

__all__ = ["Shapes", "infer", "refine", "skeleton"]

LARGE = 4096
"""Tensors of more bytes than this are left out of the copy that shapes are inferred on."""


@dataclass(frozen=True)
class Shapes:
    """The shapes and the element types (`TensorProto.DataType`) of values, and what the inference complained about."""

    shapes: dict[str, Shape]
    types: dict[str, int]
    complaint: str = ""


def infer(model: onnx.ModelProto, whole: Survey) -> Shapes:
    """Shapes and types of all values of a surveyed model."""
    bare = skeleton(model)
    complaint = ""
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True)
    except Exception as error:
        complaint = str(error)
        try:
            inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True)
        except Exception:
            inferred = bare
    found = Shapes({}, {}, complaint)
    for types in (survey(inferred).types, whole.types):
        for value, declared in types.items():
            _note(found, value, declared)
    for value, tensor in whole.tensors.items():
        found.shapes[value], found.types[value] = tuple(tensor.dims), tensor.data_type
    return found


def _note(found: Shapes, value: str, declared: onnx.TypeProto) -> None:
    if not declared.HasField("tensor_type"):
        return
    tensor = declared.tensor_type
    if tensor.elem_type:
        found.types.setdefault(value, tensor.elem_type)
    if tensor.HasField("shape"):
        found.shapes.setdefault(value, tuple(_dim(dim) for dim in tensor.shape.dim))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    return dim.dim_param or None


# ---------------------------------------------------------------- a model without its weights


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model in which large tensors have a shape and a type, but no numbers."""
    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    _copy_graph(model.graph, bare.graph)
    return bare


def _copy_graph(graph: onnx.GraphProto, bare: onnx.GraphProto) -> None:
    bare.name = graph.name
    for field in ("input", "output", "value_info", "sparse_initializer"):
        getattr(bare, field).extend(getattr(graph, field))
    for tensor in graph.initializer:
        _copy_tensor(tensor, bare.initializer.add())
    for node in graph.node:
        _copy_node(node, bare.node.add())


def _copy_node(node: onnx.NodeProto, bare: onnx.NodeProto) -> None:
    if node.op_type != "Constant" and not any(True for _ in bodies(node)):
        bare.CopyFrom(node)
        return
    bare.op_type, bare.domain, bare.name = node.op_type, node.domain, node.name
    bare.input.extend(node.input)
    bare.output.extend(node.output)
    for item in node.attribute:
        copy = bare.attribute.add()
        if item.type == onnx.AttributeProto.TENSOR:
            copy.name, copy.type = item.name, item.type
            _copy_tensor(item.t, copy.t)
        elif item.type == onnx.AttributeProto.GRAPH:
            copy.name, copy.type = item.name, item.type
            _copy_graph(item.g, copy.g)
        else:
            copy.CopyFrom(item)


def _copy_tensor(tensor: TensorProto, bare: TensorProto) -> None:
    if tensor.data_location != TensorProto.EXTERNAL and tensor.ByteSize() <= LARGE:
        bare.CopyFrom(tensor)
        return
    bare.name, bare.data_type = tensor.name, tensor.data_type
    bare.dims.extend(tensor.dims)
    bare.data_location = TensorProto.EXTERNAL
    bare.external_data.add(key="location", value="left-out")


# ---------------------------------------------------------------- what the inference leaves open


def refine(spot: Spot, found: Shapes, constants: Constants) -> None:
    """Fill in the shapes of one node's outputs from those of its inputs, and types where none are known."""
    if spot.node.domain not in ("", "ai.onnx") or not spot.outputs or not spot.inputs or not spot.inputs[0]:
        return
    source, target = spot.inputs[0], spot.outputs[0]
    if target not in found.types and source in found.types and spot.op in _KEEPS_TYPE:
        found.types[target] = found.types[source]
    shape = found.shapes.get(source)
    better = _RULES[spot.op](spot, shape, found, constants) if shape is not None and spot.op in _RULES else None
    if better is not None:
        known = found.shapes.get(target)
        found.shapes[target] = better if known is None else _merge(known, better)


def _merge(known: Shape, better: Shape) -> Shape:
    if len(known) != len(better):
        return known
    return tuple(b if b is not None and (a is None or _is_invented(a)) else a for a, b in zip(known, better, strict=True))


def _is_invented(size: Dim) -> bool:
    return isinstance(size, str) and size.startswith("unk__")


Rule = Callable[[Spot, Shape, Shapes, "Constants"], "Shape | None"]


def _same(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape:
    return shape


def _reshape(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    """Copy zeros, then let the one size that is open on both sides be the same on both."""
    wanted = constants.integers(spot.inputs[1]) if len(spot.inputs) > 1 else None
    target: Shape | None = None
    if wanted is not None:
        keeps = not any(item.name == "allowzero" and item.i for item in spot.node.attribute)
        copied = [shape[i] if n == 0 and keeps and i < len(shape) else n for i, n in enumerate(wanted)]
        target = tuple(None if n == -1 else n for n in copied)
    else:
        target = found.shapes.get(spot.outputs[0])
    return None if target is None else balance(shape, target)


def balance(source: Shape, target: Shape) -> Shape:
    """Find the one open size of `target` from the products of both shapes, where symbols cancel out."""
    left, right = list(source), list(target)
    for size in [size for size in left if isinstance(size, str)]:
        if size in right:
            left.remove(size)
            right.remove(size)
    open_left = [size for size in left if not isinstance(size, int)]
    open_right = [size for size in right if not isinstance(size, int)]
    if len(open_right) != 1 or len(open_left) > 1:
        return target
    here = math.prod(size for size in left if isinstance(size, int))
    there = math.prod(size for size in right if isinstance(size, int))
    if not there or not here:
        return target
    if not open_left:
        solved: Dim = here // there if here % there == 0 else None
    else:
        solved = open_left[0] if here == there else None
    if solved is None:
        return target
    spot = target.index(open_right[0])
    return (*target[:spot], solved, *target[spot + 1 :])


def _flatten(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape:
    axis = next((item.i for item in spot.node.attribute if item.name == "axis"), 1)
    axis = axis + len(shape) if axis < 0 else axis
    return _product(shape[:axis]), _product(shape[axis:])


def _product(sizes: Shape) -> Dim:
    rest = [size for size in sizes if size != 1]
    if all(isinstance(size, int) for size in rest):
        return math.prod(size for size in rest if isinstance(size, int))
    return rest[0] if len(rest) == 1 else None


def _conv(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    weight = found.shapes.get(spot.inputs[1])
    if weight is None or len(weight) < 3:
        return None
    return (shape[0], weight[0], *[None] * (len(weight) - 2))


def _transpose(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    perm = next((list(item.ints) for item in spot.node.attribute if item.name == "perm"), list(range(len(shape)))[::-1])
    return tuple(shape[axis] for axis in perm) if sorted(perm) == list(range(len(shape))) else None


def _global_pool(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape:
    return (*shape[:2], *[1] * (len(shape) - 2))


def _broadcast(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    shapes = [found.shapes.get(value) for value in spot.inputs]
    if any(other is None for other in shapes):
        return None
    known = [other for other in shapes if other is not None]
    rank = max(map(len, known))
    aligned = [(1,) * (rank - len(other)) + other for other in known]
    return tuple(_widest(sizes) for sizes in zip(*aligned, strict=True))


def _widest(sizes: tuple[Dim, ...]) -> Dim:
    """The size that these broadcast to, if it can be told."""
    numbers = {size for size in sizes if isinstance(size, int) and size != 1}
    if numbers:
        return next(iter(numbers)) if len(numbers) == 1 else None
    others = {size for size in sizes if size != 1}
    return 1 if not others else next(iter(others)) if len(others) == 1 else None


_KEEPS_SHAPE = (
    "Identity Dropout BatchNormalization InstanceNormalization Relu LeakyRelu PRelu Sigmoid Tanh Clip Elu Selu Softplus "
    "HardSigmoid HardSwish Mish Gelu Erf Exp Log Sqrt Abs Neg Softmax LogSoftmax Cast CastLike LRN Floor Ceil Round Celu "
    "LayerNormalization Sign Reciprocal ThresholdedRelu"
).split()

_KEEPS_TYPE = frozenset(
    [*_KEEPS_SHAPE, "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Sum", "Concat", "Reshape"]
) - {"Cast", "CastLike"}

_RULES: Mapping[str, Rule] = {
    **{op: _same for op in _KEEPS_SHAPE},
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Conv": _conv,
    "Transpose": _transpose,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    **{op: _broadcast for op in ("Add", "Sub", "Mul", "Div", "Sum")},
}
