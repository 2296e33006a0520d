"""The shapes and element types of all values: what ONNX's shape inference says, and what it leaves open.

The inference runs on a copy of the model without its large tensors (their shapes stay), so that a model over 2 GiB can
be inferred and no weight is copied. Symbols that the inference invents for unknown sizes are unique, so two equal
symbols are one size. What it leaves open is refined here, and given back to it:

- small vectors of sizes are computed symbolically (`Concat(Shape(x)[:2], [-1])`), so a reshape whose target is
  computed has a rank, and most of its sizes;
- sizes that the file declares for inner values are those of one run where one of them is a number and the inputs leave
  it open; then none of them is believed;
- where all but one size of a reshape is known on both sides, that one is the same on both, which is how a symbolic
  batch size survives a `Reshape(x, [-1, 2048])`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto

from bnfold.graph import Dim, Shape
from bnfold.onnx.scope import Spot, Survey, bodies, survey
from bnfold.onnx.sizes import Shapes, find_sizes, note_sizes, product

if TYPE_CHECKING:
    from bnfold.onnx.constants import Constants

__all__ = ["Shapes", "infer", "refine", "skeleton"]

_FAILURES = (
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    ValueError,
    RuntimeError,
    TypeError,
)

ROUNDS = 8
"""How often what was refined is given back to the inference."""

LONG = 1 << 16
"""With vectors of more numbers than this, no numbers are propagated by ONNX's inference."""

LARGE = 512
"""Tensors of more elements than this are left out of the copy that shapes are inferred on."""


def infer(
    model: onnx.ModelProto,
    whole: Survey,
    constants: Callable[[Shapes], Constants],
    overridable: frozenset[str] = frozenset(),
) -> tuple[Shapes, Constants]:
    """Shapes and types of all values of a surveyed model, and what is constant, given those.

    Initializers that a caller may override are inputs here: neither their numbers nor their sizes are known.
    """
    bare = skeleton(model)
    for place in range(len(bare.graph.initializer) - 1, -1, -1):
        if bare.graph.initializer[place].name in overridable:
            del bare.graph.initializer[place]
    plain = _infer_plainly(bare)
    if _declares_one_run(bare, plain):
        _forget_sizes(bare.graph)
        whole.types = {value: kind for value, kind in whole.types.items() if value in whole.inputs}
    propagate = not _has_long_vectors(plain)
    for _ in range(ROUNDS):
        found = _infer_once(bare, whole, overridable, propagate)
        known = constants(found)
        before = dict(found.shapes)
        for spot in whole.spots:
            refine(spot, found, known)
            if not spot.results:
                known.add_node(spot.node, spot.inputs, spot.outputs)
        better = {
            v: s for v, s in found.shapes.items() if _is_better(before.get(v), s) and found.types.get(v)
        }
        better = {v: s for v, s in better.items() if whole.home[v] is model.graph}
        if not better:
            break
        _declare(bare, better, found.types)
    return found, known


def _infer_plainly(bare: onnx.ModelProto) -> onnx.GraphProto:
    """What follows from the inputs alone, without any number that is computed; sizes without a name get one."""
    free = onnx.ModelProto()
    free.CopyFrom(bare)
    _forget_sizes(free.graph)
    for given in free.graph.input:
        for axis, dim in enumerate(given.type.tensor_type.shape.dim):
            if dim.dim_value <= 0 and not dim.dim_param:
                dim.dim_param = f"{given.name}.{axis}"
    try:
        return onnx.shape_inference.infer_shapes(free).graph
    except _FAILURES:
        return free.graph


def _declares_one_run(bare: onnx.ModelProto, plain: onnx.GraphProto) -> bool:
    """Whether the file declares a number for a size of an inner value that is one of an input's open sizes."""
    opened = {dim.dim_param for given in plain.input for dim in given.type.tensor_type.shape.dim} - {""}
    said = {
        info.name: info.type.tensor_type.shape.dim for info in (*bare.graph.value_info, *bare.graph.output)
    }
    return any(
        mine.dim_param in opened and declared.HasField("dim_value")
        for info in (*plain.value_info, *plain.output)
        for mine, declared in zip(info.type.tensor_type.shape.dim, said.get(info.name, ()), strict=False)
    )


def _has_long_vectors(plain: onnx.GraphProto) -> bool:
    """Whether a vector is so long that ONNX's inference, which follows each of its numbers, would take all memory."""
    shapes = (info.type.tensor_type.shape.dim for info in (*plain.input, *plain.value_info, *plain.output))
    return any(len(dims) == 1 and dims[0].dim_value > LONG for dims in shapes)


def _forget_sizes(graph: onnx.GraphProto) -> None:
    """Drop what a graph says of the sizes of anything but its inputs."""
    for info in (*graph.value_info, *graph.output):
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")


def _infer_once(bare: onnx.ModelProto, whole: Survey, overridable: frozenset[str], propagate: bool) -> Shapes:
    complaint = ""
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=propagate)
    except _FAILURES as error:
        complaint = str(error)
        try:
            inferred = onnx.shape_inference.infer_shapes(bare, data_prop=propagate)
        except _FAILURES:
            inferred = bare
    found = Shapes({}, {}, complaint)
    for types in (survey(inferred).types, whole.types):
        for value, declared in types.items():
            _note(found, value, declared)
    for value, tensor in whole.tensors.items():
        if value not in overridable:
            found.shapes[value], found.types[value] = tuple(tensor.dims), tensor.data_type
    return found


def _is_better(old: Shape | None, new: Shape) -> bool:
    """Whether refining has found a rank or a number that was not known."""
    return old is None or any(
        isinstance(b, int) and not isinstance(a, int) for a, b in zip(old, new, strict=False)
    )


def _declare(bare: onnx.ModelProto, shapes: Mapping[str, Shape], types: Mapping[str, int]) -> None:
    outputs = {output.name for output in bare.graph.output}
    kept = [info for info in bare.graph.value_info if info.name not in shapes]
    del bare.graph.value_info[:]
    bare.graph.value_info.extend(kept)
    for value, shape in shapes.items():
        if value not in outputs:
            bare.graph.value_info.append(onnx.helper.make_tensor_value_info(value, types[value], shape))


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
    for part in ("input", "output", "value_info", "sparse_initializer"):
        getattr(bare, part).extend(getattr(graph, part))
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
    if tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) <= LARGE:
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
    note_sizes(spot, found, constants)
    if target not in found.types and source in found.types and spot.op in _KEEPS_TYPE:
        found.types[target] = found.types[source]
    shape = found.shapes.get(source)
    if shape is None and spot.op == "Reshape":
        better = _target(spot, found, constants)
    else:
        better = _apply(spot, shape, found, constants) if shape is not None and spot.op in _RULES else None
    if better is not None:
        known = found.shapes.get(target)
        found.shapes[target] = better if known is None else _merge(known, better)


def _apply(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    """Apply the rule of an operator; where a node lacks what the rule needs, nothing is known."""
    try:
        return _RULES[spot.op](spot, shape, found, constants)
    except (IndexError, KeyError, ZeroDivisionError, ValueError):
        return None


def _merge(known: Shape, better: Shape) -> Shape:
    if len(known) != len(better):
        return known
    return tuple(a if b is None or isinstance(a, int) else b for a, b in zip(known, better, strict=True))


Rule = Callable[[Spot, Shape, Shapes, "Constants"], "Shape | None"]


def _same(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape:
    return shape


def _reshape(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    """Copy zeros, then let the one size that is open on both sides be the same on both."""
    wanted = find_sizes(spot.inputs[1], found, constants) if len(spot.inputs) > 1 else None
    if wanted is None:
        target = found.shapes.get(spot.outputs[0])
        return None if target is None else balance(shape, target)
    keeps = not any(item.name == "allowzero" and item.i for item in spot.node.attribute)
    copied = [shape[i] if n == 0 and keeps and i < len(shape) else n for i, n in enumerate(wanted)]
    return balance(shape, tuple(None if n == -1 else n for n in copied))


def _target(spot: Spot, found: Shapes, constants: Constants) -> Shape | None:
    """What a reshape asks for, whatever it reshapes."""
    wanted = find_sizes(spot.inputs[1], found, constants) if len(spot.inputs) > 1 else None
    return None if wanted is None else tuple(None if n in (0, -1) else n for n in wanted)


def _expand(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    wanted = find_sizes(spot.inputs[1], found, constants)
    if wanted is None:
        return None
    rank = max(len(shape), len(wanted))
    aligned = [(1,) * (rank - len(other)) + tuple(other) for other in (shape, wanted)]
    return tuple(_widest(sizes) for sizes in zip(*aligned, strict=True))


def _resize(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    given = len(spot.inputs) > 3 and spot.inputs[3]
    bounded = any(
        item.name == "keep_aspect_ratio_policy" and item.s != b"stretch" for item in spot.node.attribute
    )
    wanted = find_sizes(spot.inputs[3], found, constants) if given and not bounded else None
    return wanted if wanted is not None and len(wanted) == len(shape) else None


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
    return product(shape[:axis]), product(shape[axis:])


def _conv(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    weight = found.shapes.get(spot.inputs[1])
    if weight is None or len(weight) < 3 or len(weight) != len(shape):
        return None
    return (shape[0], weight[0], *_slid(spot, shape[2:], weight[2:]))


def _conv_transpose(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    weight = found.shapes.get(spot.inputs[1])
    groups = next((item.i for item in spot.node.attribute if item.name == "group"), 1)
    if weight is None or len(weight) < 3 or not isinstance(weight[1], int):
        return None
    return (shape[0], weight[1] * groups, *[None] * (len(weight) - 2))


def _slid(spot: Spot, sizes: Shape, kernel: Shape) -> list[Dim]:
    """The sizes after a window has slid over them; a symbol stays where stride and padding leave the size alone."""
    lists = {item.name: list(item.ints) for item in spot.node.attribute}
    mode = next((item.s.decode() for item in spot.node.attribute if item.name == "auto_pad"), "NOTSET")
    ones = [1] * len(sizes)
    strides, dilations = lists.get("strides") or ones, lists.get("dilations") or ones
    pads = lists.get("pads") or [0] * 2 * len(sizes)
    ceil = any(item.name == "ceil_mode" and item.i for item in spot.node.attribute)
    result: list[Dim] = []
    for axis, size in enumerate(sizes):
        taps = kernel[axis]
        lost = (taps - 1) * dilations[axis] if isinstance(taps, int) else None
        if mode.startswith("SAME"):
            lost = 0
        elif lost is not None and mode == "NOTSET":
            lost -= pads[axis] + pads[axis + len(sizes)]
        known = isinstance(size, int) and lost is not None and not mode.startswith("SAME") and not ceil
        slid = (size - lost - 1) // strides[axis] + 1 if known else None  # type: ignore[operator]
        result.append(size if strides[axis] == 1 and lost == 0 else slid)
    return result


def _transpose(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    perm = next(
        (list(item.ints) for item in spot.node.attribute if item.name == "perm"),
        list(range(len(shape)))[::-1],
    )
    return tuple(shape[axis] for axis in perm) if sorted(perm) == list(range(len(shape))) else None


def _numbers(spot: Spot, name: str, place: int, constants: Constants) -> list[int] | None:
    """Numbers that are an attribute in old operator sets and an input in newer ones."""
    if len(spot.inputs) > place and spot.inputs[place]:
        return constants.integers(spot.inputs[place])
    return next((list(item.ints) for item in spot.node.attribute if item.name == name), None)


def _slice(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    starts, ends, axes, steps = (
        _numbers(spot, name, place, constants)
        for place, name in enumerate(("starts", "ends", "axes", "steps"), 1)
    )
    result = list(shape)
    if starts is None or ends is None:
        return tuple(None for _ in shape)
    for place, axis in enumerate(axes if axes is not None else range(len(starts))):
        size, step = shape[axis], steps[place] if steps else 1
        whole = isinstance(size, int) and len(range(*slice(starts[place], ends[place], step).indices(size)))
        result[axis] = None if whole is False else whole
    return tuple(result)


def _squeeze(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    axes = _numbers(spot, "axes", 1, constants)
    if axes is None:
        return None
    gone = {axis % len(shape) for axis in axes}
    return tuple(size for axis, size in enumerate(shape) if axis not in gone)


def _unsqueeze(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    axes = _numbers(spot, "axes", 1, constants)
    if axes is None:
        return None
    rank, rest = len(shape) + len(axes), list(shape)
    new = {axis % rank for axis in axes}
    return tuple(1 if axis in new else rest.pop(0) for axis in range(rank))


def _reduce(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    axes = _numbers(spot, "axes", 1, constants)
    if axes is None:
        return None
    keeps = next((item.i for item in spot.node.attribute if item.name == "keepdims"), 1)
    gone = {axis % len(shape) for axis in axes}
    if keeps:
        return tuple(1 if axis in gone else size for axis, size in enumerate(shape))
    return tuple(size for axis, size in enumerate(shape) if axis not in gone)


def _matmul(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    other = found.shapes.get(spot.inputs[1])
    if other is None or len(shape) < 2 or len(other) < 2:
        return None
    rank = max(len(shape), len(other))
    batch = [(1,) * (rank - len(each)) + each[:-2] for each in (shape, other)]
    return (*(_widest(sizes) for sizes in zip(*batch, strict=True)), shape[-2], other[-1])


def _pool(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    kernel = next((tuple(item.ints) for item in spot.node.attribute if item.name == "kernel_shape"), ())
    return (*shape[:2], *_slid(spot, shape[2:], kernel)) if len(kernel) == len(shape) - 2 else None


def _pad(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    pads = _numbers(spot, "pads", 1, constants)
    axes = _numbers(spot, "axes", 3, constants)
    around = dict.fromkeys(range(len(shape)), 0)
    if pads is None or len(pads) != 2 * len(around if axes is None else axes):
        return None
    half = len(pads) // 2
    for place, axis in enumerate(around if axes is None else axes):
        around[axis % len(shape)] = pads[place] + pads[half + place]
    return tuple(
        n + around[a] if isinstance(n, int) else (n if not around[a] else None) for a, n in enumerate(shape)
    )


def _concat(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    shapes = [found.shapes.get(value) for value in spot.inputs]
    axis = next((item.i for item in spot.node.attribute if item.name == "axis"), 0) % len(shape)
    if any(other is None or len(other) != len(shape) for other in shapes):
        return None
    known = [other for other in shapes if other is not None]
    along = [other[axis] for other in known]
    total = sum(n for n in along if isinstance(n, int)) if all(isinstance(n, int) for n in along) else None
    return tuple(total if a == axis else _first(other[a] for other in known) for a in range(len(shape)))


def _first(sizes: Iterable[Dim]) -> Dim:
    """The same size, said several times: a number if there is one."""
    given = [size for size in sizes if size is not None]
    return next((size for size in given if isinstance(size, int)), given[0] if given else None)


def _split(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    axis = next((item.i for item in spot.node.attribute if item.name == "axis"), 0) % len(shape)
    sizes, whole = _numbers(spot, "split", 1, constants), shape[axis]
    parts = len(spot.outputs)
    if sizes is None and isinstance(whole, int) and whole % parts == 0:
        sizes = [whole // parts] * parts
    for place, output in enumerate(spot.outputs):
        if output and (sizes is None or len(sizes) == parts):
            part = (*shape[:axis], sizes[place] if sizes else None, *shape[axis + 1 :])
            found.shapes[output] = _merge(found.shapes.get(output, part), part)
    return None


def _gather(spot: Spot, shape: Shape, found: Shapes, constants: Constants) -> Shape | None:
    indices = found.shapes.get(spot.inputs[1])
    axis = next((item.i for item in spot.node.attribute if item.name == "axis"), 0) % max(len(shape), 1)
    return None if indices is None else (*shape[:axis], *indices, *shape[axis + 1 :])


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


_KEEPS_SHAPE = [
    "Identity", "Dropout", "BatchNormalization", "InstanceNormalization", "Relu", "LeakyRelu", "PRelu",
    "Sigmoid", "Tanh", "Clip", "Elu", "Selu", "Softplus", "HardSigmoid", "HardSwish", "Mish", "Gelu",
    "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg", "Softmax", "LogSoftmax", "Cast", "CastLike", "LRN",
    "Floor", "Ceil", "Round", "Celu", "LayerNormalization", "Sign", "Reciprocal", "ThresholdedRelu",
]  # fmt: skip

_KEEPS_TYPE = frozenset([
    *_KEEPS_SHAPE,
    "Slice", "Squeeze", "Unsqueeze", "MaxPool", "AveragePool", "Split", "Gather", "Expand", "Resize",
    "Transpose", "Flatten", "ReduceMean", "ReduceSum", "ReduceMax", "GlobalAveragePool",
    "GlobalMaxPool", "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Sum",
    "Concat", "Reshape",
]) - {"Cast", "CastLike"}  # fmt: skip

_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_KEEPS_SHAPE, _same),
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Pad": _pad,
    "Concat": _concat,
    "Split": _split,
    "Gather": _gather,
    **{f"Reduce{kind}": _reduce for kind in ("Mean", "Sum", "Max", "Min", "L2", "Prod")},
    "Expand": _expand,
    "Resize": _resize,
    "Flatten": _flatten,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Transpose": _transpose,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Sum"), _broadcast),
}
