"""LOWERINGS: how each ONNX operator becomes a `Node` of the graph that `travel` decides on.

Whatever depends on the operator set, on attributes or on constant inputs is settled here, once: `alpha`, `beta`,
`auto_pad`, axes as an attribute or an input, a missing epsilon, a training mode that hides in the number of outputs.
What follows from that for the table is in `bnfold.canonical`, for both frontends. An operator in a form that is not
covered gets a name that the table does not know, and nothing travels through it; so does every operator of another
domain than ONNX's own.

A node that reads only the *shape* of a value (Shape, Size, the pattern of a CastLike) reads none of its numbers, so it
is lowered without that input: an affine may change the numbers under it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto

from bnfold import canonical
from bnfold.algebra import Affine, Linear
from bnfold.canonical import Window, wrap
from bnfold.errors import InputError
from bnfold.graph import Dim, Node, Shape
from bnfold.onnx.constants import FLOATS, attributes
from bnfold.onnx.scene import Scene
from bnfold.onnx.scope import Spot

__all__ = ["EPSILON", "LOWERINGS", "MISMATCH", "lower"]


def _table() -> dict[str, Lowering]:
    lowerings = {
        "Conv ConvTranspose": _convolution,
        "Gemm": _gemm,
        "MatMul": _matmul,
        "Gather": _gather,
        "BatchNormalization": _batchnorm,
        "Add Sub Mul Div": _with_constant,
        "Neg": _neg,
        "Sum": _sum,
        "Identity Reshape Flatten Squeeze Unsqueeze Expand Relu LeakyRelu Abs": _plain,
        "PRelu": _prelu,
        "Dropout": _dropout,
        "Cast CastLike": _cast,
        "Shape Size": _measure,
        "Transpose": _transpose,
        "Slice": _slice,
        "Split": _split,
        "Concat": _concat,
        "Tile": _tile,
        "DepthToSpace SpaceToDepth": _depth_to_space,
        "AveragePool MaxPool LpPool": _pool,
        "GlobalAveragePool GlobalMaxPool GlobalLpPool": _global_pool,
        "ReduceMean ReduceMax ReduceSum ReduceL1 ReduceL2": _reduce,
        "Resize Upsample": _resize,
        "Pad": _pad,
    }
    return {op: lowering for ops, lowering in lowerings.items() for op in ops.split()}


EPSILON = float(np.float32(1e-5))
"""What BatchNormalization adds to the variance where it does not say; attributes are float32."""

MISMATCH = "the shapes of its weight and of its input do not match"
"""Why a linear operator cannot absorb that no runtime could run."""


class Unusual(Exception):
    """A node in a form that is not covered; it gets a name that nothing travels through."""


Lowering = Callable[[Spot, Scene], Node]


def lower(spot: Spot, scene: Scene) -> Node:
    """Lower one node; one that lacks what its operator asks for is unusual."""
    lowering = LOWERINGS.get(spot.op) if not spot.results else None
    try:
        return lowering(spot, scene) if lowering is not None else _opaque(spot, scene)
    except InputError:
        raise
    except (Unusual, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return _opaque(spot, scene, f"unusual {spot.op}")


def _opaque(spot: Spot, scene: Scene, op: str = "") -> Node:
    return Node(spot.name, op or spot.op, scene.computed(spot), tuple(spot.outputs))


def _node(spot: Spot, inputs: Sequence[str], op: str = "", partial: str = "", **attributes: Any) -> Node:
    return Node(spot.name, op or spot.op, tuple(inputs), tuple(spot.outputs), attributes, partial=partial)


def _input(spot: Spot, place: int) -> str:
    return spot.inputs[place] if place < len(spot.inputs) else ""


def _data(spot: Spot, scene: Scene) -> str:
    """The first input, which must be the computed one."""
    value = _input(spot, 0)
    if not value or value in scene.constants:
        raise Unusual
    return value


def _known_rank(scene: Scene, value: str) -> int:
    rank = scene.rank(value)
    if rank is None:
        raise Unusual
    return rank


def _integers(spot: Spot, scene: Scene, name: str, place: int) -> list[int] | None:
    """Numbers that are an attribute in old operator sets and an input in newer ones; None where absent.

    Raises:
        Unusual: they are computed.
    """
    value = _input(spot, place)
    if not value:
        given = attributes(spot.node).get(name)
        return None if given is None else [int(n) for n in given]
    numbers = scene.constants.integers(value)
    if numbers is None:
        raise Unusual
    return numbers


# ---------------------------------------------------------------- linear operators


def _linear(spot: Spot, inputs: Sequence[str], linear: Linear | None, reason: str = "") -> Node:
    return Node(spot.name, spot.op, tuple(inputs), tuple(spot.outputs), linear=linear, reason=reason)


def _weight_reason(spot: Spot, scene: Scene, roles: Sequence[tuple[str, int]]) -> str:
    """Why a linear operator cannot absorb, for the first of its numbers that are not constant floats."""
    for role, place in roles:
        value = _input(spot, place)
        if value and value not in scene.constants:
            return scene.why(role, value)
        if value and not scene.constants.is_workable(value):
            return f"its {role} is computed from constants and too large to be worked out"
        if value and scene.type(value) not in FLOATS and scene.constants.floats(value) is None:
            return f"its {role} is not a floating-point tensor"
    return ""


def _convolution(spot: Spot, scene: Scene) -> Node:
    reason = _weight_reason(spot, scene, (("weight", 1), ("bias", 2)))
    if reason:
        return _linear(spot, scene.computed(spot), None, reason)
    data, weight, options = _data(spot, scene), scene.constants.dims(spot.inputs[1]), attributes(spot.node)
    if weight is None or len(weight) < 3:
        raise Unusual
    groups, transposed = options.get("group", 1), spot.op == "ConvTranspose"
    if groups < 1 or weight[0] % groups:
        return _linear(spot, scene.computed(spot), None, MISMATCH)
    channels = weight[1] * groups
    inputs, outputs = (weight[0], channels) if transposed else (channels, weight[0])
    seen = scene.shape(data)
    if seen is not None and (len(seen) != len(weight) or _differ(seen[1], inputs)):
        return _linear(spot, scene.computed(spot), None, MISMATCH)
    window = _window(weight[2:], options)
    return _linear(spot, [data], canonical.convolution(window, inputs, outputs, groups, 1, transposed))


def _window(kernel: Sequence[int], options: dict[str, Any]) -> Window:
    """How a kernel of this size slides, by the attributes of its node."""
    ones, mode = [1] * len(kernel), options.get("auto_pad", "NOTSET")
    strides, dilations = options.get("strides") or ones, options.get("dilations") or ones
    pads: tuple[tuple[int, int], ...] | None = ((0, 0),) * len(kernel)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = Window.same_pads(kernel, strides, dilations, lower=mode == "SAME_LOWER")
    elif mode == "NOTSET" and options.get("pads"):
        given = options["pads"]
        pads = tuple(zip(given[: len(kernel)], given[len(kernel) :], strict=True))
    moved = any(options.get("output_padding") or ()) or "output_shape" in options
    return Window(tuple(kernel), tuple(strides), tuple(dilations), pads, moved)


def _differ(size: Dim, number: int) -> bool:
    return isinstance(size, int) and size != number


def _gemm(spot: Spot, scene: Scene) -> Node:
    reason = _weight_reason(spot, scene, (("weight", 1), ("bias", 2)))
    if not reason and _input(spot, 0) in scene.constants:
        reason = "its weight multiplies from the left"
    if reason:
        return _linear(spot, scene.computed(spot), None, reason)
    weight, options = scene.constants.dims(spot.inputs[1]), attributes(spot.node)
    if weight is None or len(weight) != 2:
        raise Unusual
    order = "oi" if options.get("transB", 0) else "io"
    outputs, inputs = weight if order == "oi" else weight[::-1]
    axis = 0 if options.get("transA", 0) else 1
    seen = scene.shape(spot.inputs[0])
    bias = scene.constants.dims(spot.inputs[2]) if _input(spot, 2) else ()
    if (seen is not None and (len(seen) != 2 or _differ(seen[axis], inputs))) or not _suits(bias, outputs):
        return _linear(spot, scene.computed(spot), None, MISMATCH)
    return _linear(spot, [spot.inputs[0]], canonical.matrix(order, inputs, outputs, axis, 1))


def _suits(bias: tuple[int, ...] | None, outputs: int) -> bool:
    return bias is not None and len(bias) <= 2 and (not bias or bias[-1] in (1, outputs))


def _matmul(spot: Spot, scene: Scene) -> Node:
    constant = [value in scene.constants for value in spot.inputs]
    if constant == [False, False]:
        reason = scene.why("weight", spot.inputs[1])
        return _linear(spot, spot.inputs, None, reason)
    if constant == [True, True]:
        raise Unusual
    left = constant[0]
    data, weight = spot.inputs[::-1] if left else spot.inputs
    rank, dims = scene.rank(data), scene.constants.dims(weight)
    if not scene.constants.is_workable(weight):
        return _linear(
            spot, [data], None, "its weight is computed from constants and too large to be worked out"
        )
    if rank is None or dims is None or scene.type(weight) not in FLOATS:
        return _linear(spot, [data], None, "the rank of its input is not known")
    if len(dims) < 2 or len(dims) > rank or any(size != 1 for size in dims[:-2]) or (left and rank < 2):
        return _linear(spot, [data], None, "its constant is not a matrix")
    axis = rank - 2 if left else rank - 1
    order, (outputs, inputs) = ("oi", dims[-2:]) if left else ("io", dims[:-3:-1])
    seen = scene.shape(data)
    if seen is not None and _differ(seen[axis], inputs):
        return _linear(spot, [data], None, MISMATCH)
    return _linear(spot, [data], canonical.matrix(order, inputs, outputs, axis, axis))


def _gather(spot: Spot, scene: Scene) -> Node:
    table, indices = spot.inputs
    axis = attributes(spot.node).get("axis", 0)
    if table in scene.constants:
        return _embedding(spot, scene, table, indices, axis)
    rank, numbers = _known_rank(scene, table), scene.constants.get(indices)
    if numbers is None or numbers.ndim > 1:
        raise Unusual
    axis = wrap(axis, rank)
    size = (scene.shape(table) or ())[axis]
    chosen = np.asarray(numbers, np.int64)
    if (chosen < 0).any():
        if not isinstance(size, int):
            raise Unusual
        chosen = np.where(chosen < 0, chosen + size, chosen)
    return _node(spot, [table], axis=axis, indices=chosen)


def _embedding(spot: Spot, scene: Scene, table: str, indices: str, axis: int) -> Node:
    dims, rank = scene.constants.dims(table), scene.rank(indices)
    typed = scene.type(table) in FLOATS and scene.constants.is_workable(table)
    if dims is None or len(dims) != 2 or axis % 2 or rank is None or not typed:
        raise Unusual
    linear = canonical.embedding(dims[0], dims[1], rank)
    return Node(spot.name, "Embedding", (indices,), tuple(spot.outputs), linear=linear)


# ---------------------------------------------------------------- affines


def _batchnorm(spot: Spot, scene: Scene) -> Node:
    reason = _batch_statistics(spot, scene) or _numbers_reason(spot, scene)
    affine: Affine | None = None
    if not reason:
        affine, reason = _batchnorm_affine(spot, scene)
    return Node(spot.name, spot.op, (spot.inputs[0],), tuple(spot.outputs), affine=affine, reason=reason)


def _batch_statistics(spot: Spot, scene: Scene) -> str:
    options = attributes(spot.node)
    if options.get("training_mode", 0):
        return "it is in training mode (training_mode=1) and normalises by the batch; export the model in eval mode"
    if sum(1 for name in spot.node.output if name) > 1:
        return "it has more than one output, so it is in training mode; export the model in eval mode"
    return ""


def _numbers_reason(spot: Spot, scene: Scene) -> str:
    if len(spot.inputs) < 5:
        return "it has no statistics"
    return _weight_reason(spot, scene, (("scale", 1), ("bias", 2), ("mean", 3), ("variance", 4)))


def _batchnorm_affine(spot: Spot, scene: Scene) -> tuple[Affine | None, str]:
    shape, options = scene.shape(spot.inputs[0]), attributes(spot.node)
    if shape is None or len(shape) < 2:
        return None, "the rank of its input is not known"
    names = ("gamma", "beta", "mean", "var")
    numbers = {name: scene.constants.floats(v) for name, v in zip(names, spot.inputs[1:5], strict=True)}
    known = {name: array for name, array in numbers.items() if array is not None}
    if len(known) < len(names):
        return None, "its numbers cannot be read"
    per_element = scene.opset < 9 and not options.get("spatial", 1)
    return canonical.normalisation(known, options.get("epsilon", EPSILON), shape, per_element)


def _with_constant(spot: Spot, scene: Scene) -> Node:
    """Add, Sub, Mul or Div: of computed values, or of one by a constant."""
    inputs = scene.computed(spot)
    if scene.type(spot.outputs[0]) not in FLOATS:
        raise Unusual
    if len(inputs) == 2:
        return _node(spot, inputs)
    data, constant = spot.inputs if spot.inputs[0] == inputs[0] else spot.inputs[::-1]
    first, shape = spot.inputs[0] == data, scene.shape(data)
    if shape is None or (scene.constants.size(constant) or 0) > canonical.LARGEST_AFFINE:
        raise Unusual
    numbers = scene.constants.floats(constant)
    affine = None if numbers is None else canonical.affine_of(spot.op, numbers, first)
    aligned = None if affine is None else canonical.align(affine, shape)
    if aligned is None:
        raise Unusual
    if aligned.is_identity:
        return Node(spot.name, "Identity", (data,), tuple(spot.outputs))
    return Node(spot.name, "Affine", (data,), tuple(spot.outputs), affine=aligned)


def _neg(spot: Spot, scene: Scene) -> Node:
    rank = _known_rank(scene, spot.inputs[0])
    if scene.type(spot.outputs[0]) not in FLOATS:
        raise Unusual
    affine = Affine(-np.ones((1,) * rank), np.zeros((1,) * rank))
    return Node(spot.name, "Affine", (spot.inputs[0],), tuple(spot.outputs), affine=affine)


def _sum(spot: Spot, scene: Scene) -> Node:
    inputs = scene.computed(spot)
    if len(inputs) != len(spot.inputs):
        raise Unusual
    return (
        _node(spot, inputs) if len(inputs) > 1 else Node(spot.name, "Identity", inputs, tuple(spot.outputs))
    )


# ---------------------------------------------------------------- what passes an affine on


def _plain(spot: Spot, scene: Scene) -> Node:
    """Operators whose other inputs are shapes or constants: only the data counts."""
    return _node(spot, [_data(spot, scene)])


def _dropout(spot: Spot, scene: Scene) -> Node:
    if len([name for name in spot.node.output if name]) > 1:
        raise Unusual
    if _input(spot, 2):
        training = scene.constants.get(spot.inputs[2])
        if training is None or np.any(training):
            raise Unusual
    return _plain(spot, scene)


def _prelu(spot: Spot, scene: Scene) -> Node:
    if _input(spot, 1) not in scene.constants:
        raise Unusual
    return _plain(spot, scene)


_WIDER: dict[int, tuple[int, ...]] = {
    TensorProto.FLOAT16: (TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.BFLOAT16: (TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.FLOAT: (TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.DOUBLE: (TensorProto.DOUBLE,),
}


def _cast(spot: Spot, scene: Scene) -> Node:
    source, target = (
        scene.type(spot.inputs[0]),
        scene.type(spot.outputs[0]) or attributes(spot.node).get("to", 0),
    )
    if source not in FLOATS or target not in FLOATS:
        raise Unusual
    return Node(
        spot.name, "Cast", (spot.inputs[0],), tuple(spot.outputs), {"lossless": target in _WIDER[source]}
    )


def _measure(spot: Spot, scene: Scene) -> Node:
    return Node(spot.name, spot.op, (), tuple(spot.outputs))


def _transpose(spot: Spot, scene: Scene) -> Node:
    perm = attributes(spot.node).get("perm") or list(range(_known_rank(scene, spot.inputs[0])))[::-1]
    return _node(spot, spot.inputs, perm=tuple(perm))


def _slice(spot: Spot, scene: Scene) -> Node:
    data = _data(spot, scene)
    shape = scene.shape(data)
    starts, ends = (_integers(spot, scene, name, place) for place, name in ((1, "starts"), (2, "ends")))
    axes, steps = (_integers(spot, scene, name, place) for place, name in ((3, "axes"), (4, "steps")))
    if shape is None or starts is None or ends is None:
        raise Unusual
    cut = [slice(None)] * len(shape)
    for place, axis in enumerate(axes if axes is not None else range(len(starts))):
        step = steps[place] if steps else 1
        bounds = canonical.cut(starts[place], ends[place], step, shape[axis])
        if bounds is None:
            raise Unusual
        cut[axis] = bounds
    return _node(spot, [data], slices=tuple(cut))


def _split(spot: Spot, scene: Scene) -> Node:
    data = _data(spot, scene)
    shape = scene.shape(data)
    if shape is None:
        raise Unusual
    axis = wrap(attributes(spot.node).get("axis", 0), len(shape))
    sizes, size, parts = _integers(spot, scene, "split", 1), shape[axis], len(spot.outputs)
    if sizes is None:
        if not isinstance(size, int):
            raise Unusual
        each = -(-size // parts)
        sizes = [min(each, size - each * part) for part in range(parts)]
    return _node(spot, [data], axis=axis, sizes=tuple(sizes))


def _concat(spot: Spot, scene: Scene) -> Node:
    rank = _known_rank(scene, spot.outputs[0])
    return _node(spot, spot.inputs, axis=wrap(attributes(spot.node).get("axis", 1), rank))


def _tile(spot: Spot, scene: Scene) -> Node:
    repeats = _integers(spot, scene, "repeats", 1)
    if repeats is None:
        raise Unusual
    return _node(spot, [_data(spot, scene)], repeats=tuple(repeats))


def _depth_to_space(spot: Spot, scene: Scene) -> Node:
    options = attributes(spot.node)
    mode = options.get("mode", "DCR") if spot.op == "DepthToSpace" else "DCR"
    return _node(spot, [_data(spot, scene)], blocksize=options["blocksize"], mode=mode)


# ---------------------------------------------------------------- pooling, resizing, padding


def _pool(spot: Spot, scene: Scene) -> Node:
    data, options = _data(spot, scene), attributes(spot.node)
    if len([name for name in spot.node.output if name]) > 1 or options.get("storage_order", 0):
        raise Unusual
    window = _window(options["kernel_shape"], options)
    if options.get("ceil_mode"):
        window = replace(window, pads=None)
    counted = spot.op == "AveragePool" and bool(options.get("count_include_pad", 0))
    return _node(spot, [data], **canonical.pooling(window, 2, counted))


def _global_pool(spot: Spot, scene: Scene) -> Node:
    data = _data(spot, scene)
    axes = tuple(range(2, _known_rank(scene, data)))
    return _node(spot, [data], spot.op.removeprefix("Global"), axes=axes, keepdims=True)


def _reduce(spot: Spot, scene: Scene) -> Node:
    data, options = _data(spot, scene), attributes(spot.node)
    rank, axes = _known_rank(scene, data), _integers(spot, scene, "axes", 1)
    if scene.type(data) not in FLOATS:
        raise Unusual
    if not axes:
        if options.get("noop_with_empty_axes", 0):
            return Node(spot.name, "Identity", (data,), tuple(spot.outputs))
        axes = list(range(rank))
    axes = sorted({wrap(axis, rank) for axis in axes})
    return _node(spot, [data], axes=tuple(axes), keepdims=bool(options.get("keepdims", 1)))


def _resize(spot: Spot, scene: Scene) -> Node:
    data, options = _data(spot, scene), attributes(spot.node)
    mode = options.get("mode", "nearest")
    if mode not in ("nearest", "linear", "bilinear", "cubic"):
        raise Unusual
    cropped = options.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if cropped and options.get("extrapolation_value", 0.0) != 0:
        raise Unusual
    partial = "it fills in zeros outside the image" if cropped else ""
    axes = _resized(spot, scene, data)
    if cropped:
        axes = tuple(sorted({*axes, *_cropped(spot, scene, _known_rank(scene, data), options)}))
    return _node(spot, [data], "Resize", partial, axes=axes, keepdims=True)


def _resized(spot: Spot, scene: Scene, data: str) -> tuple[int, ...]:
    """The axes whose size may change; all of those whose sizes are not known to be equal."""
    before, after = _known_rank(scene, data), scene.shape(spot.outputs[0])
    shape, options = scene.shape(data) or (), attributes(spot.node)
    chosen = options.get("axes")
    places = range(before) if chosen is None else [wrap(axis, before) for axis in chosen]
    scales = _scales(spot, scene, options)
    if scales is not None and len(scales) == len(places) and options.get("keep_aspect_ratio_policy") is None:
        return tuple(axis for axis, scale in zip(places, scales, strict=True) if scale != 1)
    same = (
        [a is not None and a == b for a, b in zip(shape, after, strict=True)] if after else [False] * before
    )
    return tuple(axis for axis in places if not same[axis])


def _cropped(spot: Spot, scene: Scene, rank: int, options: dict[str, Any]) -> list[int]:
    """The axes of which a region may be cut out: all but those whose region is known to be the whole."""
    chosen, roi = options.get("axes") or list(range(rank)), scene.constants.floats(_input(spot, 1))
    if roi is None or roi.size != 2 * len(chosen):
        return list(range(rank))
    ends = zip(chosen, roi[: len(chosen)], roi[len(chosen) :], strict=True)
    return [wrap(axis, rank) for axis, first, last in ends if (first, last) != (0, 1)]


def _scales(spot: Spot, scene: Scene, options: dict[str, Any]) -> list[float] | None:
    if "scales" in options:
        return list(options["scales"])
    place = 1 if spot.op == "Upsample" or scene.opset < 11 else 2
    array = scene.constants.get(_input(spot, place))
    return None if array is None or not array.size else [float(n) for n in array.ravel()]


def _pad(spot: Spot, scene: Scene) -> Node:
    data, options = _data(spot, scene), attributes(spot.node)
    rank, pads = _known_rank(scene, data), _amounts(spot, scene, options)
    chosen = _integers(spot, scene, "axes", 3)
    places = list(range(rank)) if chosen is None else [wrap(axis, rank) for axis in chosen]
    if len(pads) != 2 * len(places):
        raise Unusual
    pairs = zip(pads[: len(places)], pads[len(places) :], strict=True)
    constant = options.get("mode", "constant") == "constant"
    settings = canonical.padding(dict(zip(places, pairs, strict=True)), constant)
    if settings["partial"] and _filling(spot, scene, options) != 0:
        raise Unusual
    return _node(spot, [data], **settings)


def _amounts(spot: Spot, scene: Scene, options: dict[str, Any]) -> Shape:
    """How much a Pad adds; an amount that is computed from sizes that the file leaves open may be any."""
    value = _input(spot, 1)
    pads = scene.sizes.numbers(value) if value else tuple(options["pads"])
    if pads is None:
        raise Unusual
    return pads


def _filling(spot: Spot, scene: Scene, options: dict[str, Any]) -> float:
    value = _input(spot, 2)
    if not value:
        return float(options.get("value", 0.0))
    array = scene.constants.get(value)
    return float("nan") if array is None or array.size != 1 else float(array.ravel()[0])


LOWERINGS = _table()
"""How each operator is lowered, by its name."""
