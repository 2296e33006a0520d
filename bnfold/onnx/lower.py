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

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto

from bnfold import canonical, reasons
from bnfold.algebra import Affine, Linear
from bnfold.canonical import wrap
from bnfold.errors import InputError
from bnfold.ir import Dim, Node, Shape
from bnfold.onnx.context import ImportContext
from bnfold.onnx.flatten import NodeRef
from bnfold.onnx.protos import FLOATS, attributes
from bnfold.window import Window

__all__ = ["EPSILON", "LOWERINGS", "MISMATCH", "lower"]


def _table() -> dict[str, Lowering]:
    lowerings: dict[str, Lowering] = {
        "Conv ConvTranspose": _convolution,
        "DeformConv": _deformable,
        "Gemm": _gemm,
        "MatMul": _matmul,
        "Einsum": _einsum,
        "Gather": _gather,
        "LSTM GRU RNN": _recurrent,
        "BatchNormalization": _batchnorm,
        "Add Sub Mul Div": _with_constant,
        "Neg": _neg,
        "Sum": _sum,
        "Max Min": _compare,
        "Identity Reshape Flatten Squeeze Unsqueeze Expand Relu LeakyRelu Abs": _plain,
        "PRelu": _prelu,
        "Dropout": _dropout,
        "Cast CastLike": _cast,
        "Shape Size": _measure,
        "Transpose": _transpose,
        "Slice": _slice,
        "Split": _split,
        "SplitToSequence SequenceConstruct": _sequence,
        "SequenceAt": _element,
        "Concat": _concat,
        "Tile": _tile,
        "DepthToSpace SpaceToDepth": _depth_to_space,
        "AveragePool MaxPool LpPool": _pool,
        "GlobalAveragePool GlobalMaxPool GlobalLpPool": _global_pool,
        "ReduceMean ReduceMax ReduceMin ReduceSum ReduceL1 ReduceL2": _reduce,
        "Resize Upsample": _resize,
        "Pad": _pad,
    }
    return {op: lowering for ops, lowering in lowerings.items() for op in ops.split()}


EPSILON = float(np.float32(1e-5))
"""What BatchNormalization adds to the variance where it does not say; attributes are float32."""

MISMATCH = reasons.MISMATCH()
"""Why a linear operator cannot absorb that no runtime could run."""


class Unusual(Exception):
    """A node in a form that is not covered; it gets a name that nothing travels through."""


Lowering = Callable[[NodeRef, ImportContext], Node | tuple[Node, ...]]


def lower(ref: NodeRef, context: ImportContext) -> tuple[Node, ...]:
    """Lower one node, nearly always to one; one that lacks what its operator asks for is unusual."""
    lowering = LOWERINGS.get(ref.op) if not ref.results else None
    try:
        drawn = lowering(ref, context) if lowering is not None else _opaque(ref, context)
    except InputError:
        raise
    except (Unusual, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        drawn = _opaque(ref, context, f"unusual {ref.op}")
    return drawn if isinstance(drawn, tuple) else (drawn,)


def _opaque(ref: NodeRef, context: ImportContext, op: str = "") -> Node:
    return Node(ref.name, op or ref.op, context.computed(ref), tuple(ref.outputs))


def _node(ref: NodeRef, inputs: Sequence[str], op: str = "", partial: str = "", **attributes: Any) -> Node:
    return Node(ref.name, op or ref.op, tuple(inputs), tuple(ref.outputs), attributes, partial=partial)


def _input(ref: NodeRef, place: int) -> str:
    return ref.inputs[place] if place < len(ref.inputs) else ""


def _data(ref: NodeRef, context: ImportContext) -> str:
    """The first input, which must be the computed one."""
    value = _input(ref, 0)
    if not value or value in context.constants:
        raise Unusual
    return value


def _known_rank(context: ImportContext, value: str) -> int:
    rank = context.rank(value)
    if rank is None:
        raise Unusual
    return rank


def _integers(ref: NodeRef, context: ImportContext, name: str, place: int) -> list[int] | None:
    """Numbers that are an attribute in old operator sets and an input in newer ones; None where absent.

    Raises:
        Unusual: they are computed.
    """
    value = _input(ref, place)
    if not value:
        given = attributes(ref.node).get(name)
        return None if given is None else [int(n) for n in given]
    numbers = context.constants.integers(value)
    if numbers is None:
        raise Unusual
    return numbers


# ---------------------------------------------------------------- linear operators


def _linear(ref: NodeRef, inputs: Sequence[str], linear: Linear | None, reason: str = "") -> Node:
    return Node(ref.name, ref.op, tuple(inputs), tuple(ref.outputs), linear=linear, reason=reason)


def _weight_reason(ref: NodeRef, context: ImportContext, roles: Sequence[tuple[str, int]]) -> str:
    """Why a linear operator cannot absorb, for the first of its numbers that are not constant floats."""
    for role, place in roles:
        value = _input(ref, place)
        if value and value not in context.constants:
            return context.why(role, value)
        if value and not context.constants.is_workable(value):
            return reasons.TOO_LARGE_CONSTANT(role=role)
        if value and context.type(value) not in FLOATS and context.constants.floats(value) is None:
            return reasons.NOT_FLOAT(role=role)
    return ""


def _convolution(ref: NodeRef, context: ImportContext) -> Node:
    reason = _weight_reason(ref, context, (("weight", 1), ("bias", 2)))
    if reason:
        return _linear(ref, context.computed(ref), None, reason)
    data, weight, options = _data(ref, context), context.constants.dims(ref.inputs[1]), attributes(ref.node)
    if weight is None or len(weight) < 3:
        raise Unusual
    groups, transposed = options.get("group", 1), ref.op == "ConvTranspose"
    if groups < 1 or weight[0] % groups:
        return _linear(ref, context.computed(ref), None, MISMATCH)
    channels = weight[1] * groups
    inputs, outputs = (weight[0], channels) if transposed else (channels, weight[0])
    seen, bias = context.shape(data), context.constants.dims(_input(ref, 2)) if _input(ref, 2) else (outputs,)
    if bias != (outputs,) or (seen is not None and (len(seen) != len(weight) or _differ(seen[1], inputs))):
        return _linear(ref, context.computed(ref), None, MISMATCH)
    window = _window(weight[2:], options)
    return _linear(ref, [data], canonical.convolution(window, inputs, outputs, groups, 1, transposed))


def _deformable(ref: NodeRef, context: ImportContext) -> Node:
    """A convolution whose taps lie where its third input says, weighted by its fifth."""
    reason = _weight_reason(ref, context, (("weight", 1), ("bias", 3)))
    if reason:
        return _linear(ref, context.computed(ref), None, reason)
    data, weight = _data(ref, context), context.constants.dims(ref.inputs[1])
    groups = attributes(ref.node).get("group", 1)
    if weight is None or len(weight) < 3:
        raise Unusual
    inputs, outputs, seen = weight[1] * groups, weight[0], context.shape(data)
    bias = context.constants.dims(ref.inputs[3]) if _input(ref, 3) else (outputs,)
    fits = groups > 0 and not outputs % groups and bias == (outputs,)
    if not fits or (seen is not None and (len(seen) != len(weight) or _differ(seen[1], inputs))):
        return _linear(ref, context.computed(ref), None, MISMATCH)
    return _linear(ref, context.computed(ref), canonical.deformable(inputs, outputs, groups))


def _window(kernel: Sequence[int], options: dict[str, Any]) -> Window:
    """How a kernel of this size slides, by the attributes of its node."""
    ones, mode = [1] * len(kernel), options.get("auto_pad", "NOTSET")
    strides, dilations = options.get("strides") or ones, options.get("dilations") or ones
    pads: tuple[tuple[int, int], ...] | None = ((0, 0),) * len(kernel)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = Window.same_pads(kernel, strides, dilations, lower=mode == "SAME_LOWER")
    elif mode not in ("NOTSET", "VALID"):
        raise Unusual
    elif mode == "NOTSET" and options.get("pads"):
        given = options["pads"]
        pads = tuple(zip(given[: len(kernel)], given[len(kernel) :], strict=True))
    if any(len(given) != len(kernel) for given in (strides, dilations, pads or ones)):
        raise Unusual
    if min(*kernel, *strides, *dilations, *(amount + 1 for pair in pads or () for amount in pair)) < 1:
        raise Unusual
    moved = any(options.get("output_padding") or ()) or "output_shape" in options
    return Window(tuple(kernel), tuple(strides), tuple(dilations), pads, moved)


def _differ(size: Dim, number: int) -> bool:
    return isinstance(size, int) and size != number


def _gemm(ref: NodeRef, context: ImportContext) -> Node:
    reason = _weight_reason(ref, context, (("weight", 1), ("bias", 2)))
    if not reason and _input(ref, 0) in context.constants:
        reason = reasons.FROM_THE_LEFT()
    if reason:
        return _linear(ref, context.computed(ref), None, reason)
    weight, options = context.constants.dims(ref.inputs[1]), attributes(ref.node)
    if weight is None or len(weight) != 2:
        raise Unusual
    order = "oi" if options.get("transB", 0) else "io"
    outputs, inputs = weight if order == "oi" else weight[::-1]
    axis = 0 if options.get("transA", 0) else 1
    seen = context.shape(ref.inputs[0])
    bias = context.constants.dims(ref.inputs[2]) if _input(ref, 2) else ()
    if (seen is not None and (len(seen) != 2 or _differ(seen[axis], inputs))) or not _suits(bias, outputs):
        return _linear(ref, context.computed(ref), None, MISMATCH)
    return _linear(ref, [ref.inputs[0]], canonical.matrix(order, inputs, outputs, axis, 1))


def _suits(bias: tuple[int, ...] | None, outputs: int) -> bool:
    return bias is not None and len(bias) <= 2 and (not bias or bias[-1] in (1, outputs))


def _matmul(ref: NodeRef, context: ImportContext) -> Node:
    constant = [value in context.constants for value in ref.inputs]
    if constant == [False, False]:
        reason = context.why("weight", ref.inputs[1])
        return _linear(ref, ref.inputs, None, reason)
    if constant == [True, True]:
        raise Unusual
    left = constant[0]
    data, weight = ref.inputs[::-1] if left else ref.inputs
    rank, dims = context.rank(data), context.constants.dims(weight)
    if not context.constants.is_workable(weight):
        return _linear(ref, [data], None, reasons.TOO_LARGE_CONSTANT(role="weight"))
    if rank is None or dims is None or context.type(weight) not in FLOATS:
        return _linear(ref, [data], None, reasons.RANK_UNKNOWN())
    if len(dims) < 2 or len(dims) > rank or any(size != 1 for size in dims[:-2]) or (left and rank < 2):
        return _linear(ref, [data], None, reasons.NOT_A_MATRIX())
    axis = rank - 2 if left else rank - 1
    order, (outputs, inputs) = ("oi", dims[-2:]) if left else ("io", dims[:-3:-1])
    seen = context.shape(data)
    if seen is not None and _differ(seen[axis], inputs):
        return _linear(ref, [data], None, MISMATCH)
    return _linear(ref, [data], canonical.matrix(order, inputs, outputs, axis, axis, bare=True))


def _einsum(ref: NodeRef, context: ImportContext) -> Node:
    """A product by a constant matrix, or sums of products through which a scale goes along the axes that are left."""
    ranks = [context.rank(value) for value in ref.inputs]
    known = [rank for rank in ranks if rank is not None]
    found = (
        canonical.contraction(attributes(ref.node)["equation"], known) if len(known) == len(ranks) else None
    )
    if found is None or any(context.type(value) not in FLOATS for value in ref.inputs):
        raise Unusual
    computed = [place for place, value in enumerate(ref.inputs) if value not in context.constants]
    if len(ref.inputs) == 2 and len(computed) == 1:
        weight = ref.inputs[1 - computed[0]]
        dims = context.constants.dims(weight) if context.constants.is_workable(weight) else None
        linear = None if dims is None else canonical.product_of(*found, 1 - computed[0], dims)
        seen = context.shape(ref.inputs[computed[0]])
        if linear is not None and seen is not None and seen[linear.in_axis] == linear.inputs:
            return _linear(ref, [ref.inputs[computed[0]]], linear)
    kept = canonical.kept_axes(*found, computed)
    return _node(ref, [ref.inputs[place] for place in computed], kept=kept)


def _gather(ref: NodeRef, context: ImportContext) -> Node:
    """Along an axis of open size, where places count from its end, no affine varies."""
    table, indices = ref.inputs
    axis = attributes(ref.node).get("axis", 0)
    if table in context.constants:
        return _embedding(ref, context, table, indices, axis)
    rank, numbers = _known_rank(context, table), context.constants.get(indices)
    if numbers is None:
        raise Unusual
    axis = wrap(axis, rank)
    size = (context.shape(table) or ())[axis]
    chosen = np.asarray(numbers, np.int64)
    if isinstance(size, int):
        chosen = np.where(chosen < 0, chosen + size, chosen)
    return _node(ref, [table], axis=axis, indices=chosen)


def _embedding(ref: NodeRef, context: ImportContext, table: str, indices: str, axis: int) -> Node:
    dims, rank = context.constants.dims(table), context.rank(indices)
    typed = context.type(table) in FLOATS and context.constants.is_workable(table)
    if dims is None or len(dims) != 2 or axis % 2 or rank is None or not typed:
        raise Unusual
    linear = canonical.embedding(dims[0], dims[1], rank)
    return Node(ref.name, "Embedding", (indices,), tuple(ref.outputs), linear=linear)


def _recurrent(ref: NodeRef, context: ImportContext) -> tuple[Node, ...]:
    """A product of the input by the weights of all directions and gates, and what the layer goes on to do with it.

    Whatever the layer does (gates, clipping, activations, a bias before or after the reset of a GRU), it reads its
    input by no other way, step by step.
    """
    data, reason = _data(ref, context), _weight_reason(ref, context, (("weight", 1), ("bias", 3)))
    linear = None if reason else _input_product(ref, context, data)
    reason = reason or (MISMATCH if linear is None else "")
    value = _fresh(f"{ref.name}/input", context.whole.home)
    name = _fresh(value, {other.name for other in context.whole.refs})
    others = tuple(v for v in ref.inputs[1:] if v and v not in context.constants)
    product = Node(name, "InputProduct", (data,), (value,), site=ref.name, linear=linear, reason=reason)
    return product, Node(ref.name, ref.op, (value, *others), tuple(ref.outputs))


def _input_product(ref: NodeRef, context: ImportContext, data: str) -> Linear | None:
    """The product, of channels on the last of three axes; None where the shapes do not match."""
    seen, weight = context.shape(data), context.constants.dims(ref.inputs[1])
    bias = context.constants.dims(ref.inputs[3]) if _input(ref, 3) else None
    if seen is None or weight is None:
        raise Unusual
    if len(seen) != 3 or len(weight) != 3 or _differ(seen[2], weight[2]):
        return None
    if bias not in (None, (weight[0], 2 * weight[1])):
        return None
    return canonical.matrix("oi", weight[2], weight[0] * weight[1], 2, 2)


def _fresh(wish: str, taken: Container[str]) -> str:
    """A name that is not taken."""
    return wish if wish not in taken else _fresh(f"{wish}'", taken)


# ---------------------------------------------------------------- affines


def _batchnorm(ref: NodeRef, context: ImportContext) -> Node:
    reason = _batch_statistics(ref) or _numbers_reason(ref, context)
    affine: Affine | None = None
    if not reason:
        affine, reason = _batchnorm_affine(ref, context)
    return Node(ref.name, ref.op, (ref.inputs[0],), tuple(ref.outputs), affine=affine, reason=reason)


def _batch_statistics(ref: NodeRef) -> str:
    options = attributes(ref.node)
    if options.get("training_mode", 0):
        return reasons.TRAINING_NODE()
    if sum(1 for name in ref.node.output if name) > 1:
        return reasons.TRAINING_OUTPUTS()
    return ""


def _numbers_reason(ref: NodeRef, context: ImportContext) -> str:
    if len(ref.inputs) < 5:
        return reasons.NO_STATISTICS()
    return _weight_reason(ref, context, (("scale", 1), ("bias", 2), ("mean", 3), ("variance", 4)))


def _batchnorm_affine(ref: NodeRef, context: ImportContext) -> tuple[Affine | None, str]:
    shape, options = context.shape(ref.inputs[0]), attributes(ref.node)
    if shape is None or len(shape) < 2:
        return None, reasons.RANK_UNKNOWN()
    names = ("gamma", "beta", "mean", "var")
    numbers = {name: context.constants.floats(v) for name, v in zip(names, ref.inputs[1:5], strict=True)}
    known = {name: array for name, array in numbers.items() if array is not None}
    if len(known) < len(names):
        return None, reasons.UNREADABLE()
    per_element = context.opset < 9 and not options.get("spatial", 1)
    return canonical.normalisation(known, options.get("epsilon", EPSILON), shape, per_element)


def _with_constant(ref: NodeRef, context: ImportContext) -> Node:
    """Add, Sub, Mul or Div: of computed values, or of one by a constant."""
    inputs = context.computed(ref)
    if context.type(ref.outputs[0]) not in FLOATS:
        raise Unusual
    if len(inputs) == 2:
        return _node(ref, inputs)
    data, constant = ref.inputs if ref.inputs[0] == inputs[0] else ref.inputs[::-1]
    first, shape = ref.inputs[0] == data, context.shape(data)
    if shape is None or (context.constants.size(constant) or 0) > canonical.LARGEST_AFFINE:
        raise Unusual
    numbers = context.constants.floats(constant)
    affine = None if numbers is None else canonical.affine_of(ref.op, numbers, first)
    aligned = None if affine is None else canonical.align(affine, shape)
    if aligned is None:
        raise Unusual
    if aligned.is_identity:
        return Node(ref.name, "Identity", (data,), tuple(ref.outputs))
    return Node(ref.name, "Affine", (data,), tuple(ref.outputs), affine=aligned)


def _neg(ref: NodeRef, context: ImportContext) -> Node:
    rank = _known_rank(context, ref.inputs[0])
    if context.type(ref.outputs[0]) not in FLOATS:
        raise Unusual
    affine = Affine(-np.ones((1,) * rank), np.zeros((1,) * rank))
    return Node(ref.name, "Affine", (ref.inputs[0],), tuple(ref.outputs), affine=affine)


def _sum(ref: NodeRef, context: ImportContext) -> Node:
    inputs = context.computed(ref)
    if len(inputs) != len(ref.inputs):
        raise Unusual
    return _node(ref, inputs) if len(inputs) > 1 else Node(ref.name, "Identity", inputs, tuple(ref.outputs))


def _compare(ref: NodeRef, context: ImportContext) -> Node:
    """The largest or the smallest of computed values; a constant among them bends the map (Clip)."""
    if context.type(ref.outputs[0]) not in FLOATS:
        raise Unusual
    return _sum(ref, context)


# ---------------------------------------------------------------- what passes an affine on


def _plain(ref: NodeRef, context: ImportContext) -> Node:
    """Operators whose other inputs are shapes or constants: only the data counts."""
    return _node(ref, [_data(ref, context)])


def _dropout(ref: NodeRef, context: ImportContext) -> Node:
    if len([name for name in ref.node.output if name]) > 1:
        raise Unusual
    if _input(ref, 2):
        training = context.constants.get(ref.inputs[2])
        if training is None or np.any(training):
            raise Unusual
    return _plain(ref, context)


def _prelu(ref: NodeRef, context: ImportContext) -> Node:
    if _input(ref, 1) not in context.constants:
        raise Unusual
    return _plain(ref, context)


_WIDER: dict[int, tuple[int, ...]] = {
    TensorProto.FLOAT16: (TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.BFLOAT16: (TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.FLOAT: (TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.DOUBLE: (TensorProto.DOUBLE,),
}


def _cast(ref: NodeRef, context: ImportContext) -> Node:
    source, target = (
        context.type(ref.inputs[0]),
        context.type(ref.outputs[0]) or attributes(ref.node).get("to", 0),
    )
    if source not in FLOATS or target not in FLOATS:
        raise Unusual
    return Node(
        ref.name, "Cast", (ref.inputs[0],), tuple(ref.outputs), {"lossless": target in _WIDER[source]}
    )


def _measure(ref: NodeRef, context: ImportContext) -> Node:
    return Node(ref.name, ref.op, (), tuple(ref.outputs))


def _transpose(ref: NodeRef, context: ImportContext) -> Node:
    perm = attributes(ref.node).get("perm") or list(range(_known_rank(context, ref.inputs[0])))[::-1]
    return _node(ref, ref.inputs, perm=tuple(perm))


def _slice(ref: NodeRef, context: ImportContext) -> Node:
    data = _data(ref, context)
    shape = context.shape(data)
    starts, ends = (_integers(ref, context, name, place) for place, name in ((1, "starts"), (2, "ends")))
    axes, steps = (_integers(ref, context, name, place) for place, name in ((3, "axes"), (4, "steps")))
    if shape is None or starts is None or ends is None:
        raise Unusual
    cut = [slice(None)] * len(shape)
    for place, axis in enumerate(axes if axes is not None else range(len(starts))):
        step = steps[place] if steps else 1
        bounds = canonical.cut(starts[place], ends[place], step, shape[axis])
        if bounds is None:
            raise Unusual
        cut[axis] = bounds
    return _node(ref, [data], slices=tuple(cut))


def _split(ref: NodeRef, context: ImportContext) -> Node:
    data = _data(ref, context)
    shape = context.shape(data)
    if shape is None:
        raise Unusual
    axis = wrap(attributes(ref.node).get("axis", 0), len(shape))
    sizes, size, parts = _integers(ref, context, "split", 1), shape[axis], len(ref.outputs)
    if sizes is None:
        if not isinstance(size, int):
            raise Unusual
        each = -(-size // parts)
        sizes = [min(each, size - each * part) for part in range(parts)]
    return _node(ref, [data], axis=axis, sizes=tuple(sizes))


def _sequence(ref: NodeRef, context: ImportContext) -> Node | tuple[Node, ...]:
    """A sequence from which known parts are taken is nothing by itself: each part is one of what it is made of."""
    uses = context.whole.uses.get(ref.outputs[0], [])
    takers = [use.ref if use.ref is not None and use.ref.op == "SequenceAt" else None for use in uses]
    for taker in takers:
        if taker is None:
            return _opaque(ref, context)
        _element(taker, context)
    return () if takers else _opaque(ref, context)


def _element(ref: NodeRef, context: ImportContext) -> Node:
    """One part of a sequence: a value that was put into it, or a piece of the value that was split."""
    maker, place = context.whole.makers[ref.inputs[0]], context.constants.integers(ref.inputs[1])
    if place is None or len(place) != 1 or maker.results:
        raise Unusual
    if maker.op == "SequenceConstruct":
        if maker.inputs[place[0]] in context.constants:
            raise Unusual
        return Node(ref.name, "Identity", (maker.inputs[place[0]],), tuple(ref.outputs))
    data = _data(maker, context)
    shape, options = context.shape(data), attributes(maker.node)
    if maker.op != "SplitToSequence" or shape is None:
        raise Unusual
    axis = wrap(options.get("axis", 0), len(shape))
    start, stop = _piece(maker, context, place[0], shape[axis])
    if not options.get("keepdims", 1) and not _input(maker, 1):
        return Node(
            ref.name, "Gather", (data,), tuple(ref.outputs), {"axis": axis, "indices": np.int64(start)}
        )
    cut = [slice(None)] * len(shape)
    cut[axis] = slice(start, stop, 1)
    return Node(ref.name, "Slice", (data,), tuple(ref.outputs), {"slices": tuple(cut)})


def _piece(maker: NodeRef, context: ImportContext, place: int, size: Dim) -> tuple[int, int]:
    """Where a piece of a SplitToSequence begins and ends; one size is that of each piece, but for the last one."""
    split = _input(maker, 1)
    sizes = context.constants.integers(split) if split else [1]
    if sizes is None or min(sizes) < 0:
        raise Unusual
    if not split or context.constants.dims(split) == ():
        if not isinstance(size, int):
            raise Unusual
        sizes = [min(sizes[0], size - start) for start in range(0, size, sizes[0])]
    if _differ(size, sum(sizes)):
        raise Unusual
    stop = sum(sizes[: place % len(sizes) + 1])
    return stop - sizes[place], stop


def _concat(ref: NodeRef, context: ImportContext) -> Node:
    rank = _known_rank(context, ref.outputs[0])
    return _node(ref, ref.inputs, axis=wrap(attributes(ref.node).get("axis", 1), rank))


def _tile(ref: NodeRef, context: ImportContext) -> Node:
    repeats = _integers(ref, context, "repeats", 1)
    if repeats is None:
        raise Unusual
    return _node(ref, [_data(ref, context)], repeats=tuple(repeats))


def _depth_to_space(ref: NodeRef, context: ImportContext) -> Node:
    options = attributes(ref.node)
    mode = options.get("mode", "DCR") if ref.op == "DepthToSpace" else "DCR"
    return _node(ref, [_data(ref, context)], blocksize=options["blocksize"], mode=mode)


# ---------------------------------------------------------------- pooling, resizing, padding


def _pool(ref: NodeRef, context: ImportContext) -> Node:
    data, options = _data(ref, context), attributes(ref.node)
    if len([name for name in ref.node.output if name]) > 1 or options.get("storage_order", 0):
        raise Unusual
    window = _window(options["kernel_shape"], options)
    if options.get("ceil_mode"):
        window = replace(window, pads=None)
    counted = ref.op == "AveragePool" and bool(options.get("count_include_pad", 0))
    return _node(ref, [data], **canonical.pooling(window, 2, counted))


def _global_pool(ref: NodeRef, context: ImportContext) -> Node:
    data = _data(ref, context)
    axes = tuple(range(2, _known_rank(context, data)))
    return _node(ref, [data], ref.op.removeprefix("Global"), axes=axes, keepdims=True)


def _reduce(ref: NodeRef, context: ImportContext) -> Node:
    data, options = _data(ref, context), attributes(ref.node)
    rank, axes = _known_rank(context, data), _integers(ref, context, "axes", 1)
    if context.type(data) not in FLOATS:
        raise Unusual
    if not axes:
        if options.get("noop_with_empty_axes", 0):  # each number by itself: a norm of one is its size
            op = "Abs" if ref.op in ("ReduceL1", "ReduceL2") else "Identity"
            return Node(ref.name, op, (data,), tuple(ref.outputs))
        axes = list(range(rank))
    axes = sorted({wrap(axis, rank) for axis in axes})
    return _node(ref, [data], axes=tuple(axes), keepdims=bool(options.get("keepdims", 1)))


def _resize(ref: NodeRef, context: ImportContext) -> Node:
    data, options = _data(ref, context), attributes(ref.node)
    mode = options.get("mode", "nearest")
    if mode not in ("nearest", "linear", "bilinear", "cubic"):
        raise Unusual
    cropped = options.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if cropped and options.get("extrapolation_value", 0.0) != 0:
        raise Unusual
    partial = reasons.FILLS_IN() if cropped else ""
    axes = _resized(ref, context, data)
    if cropped:
        axes = tuple(sorted({*axes, *_cropped(ref, context, _known_rank(context, data), options)}))
    return _node(ref, [data], "Resize", partial, axes=axes, keepdims=True)


def _resized(ref: NodeRef, context: ImportContext, data: str) -> tuple[int, ...]:
    """The axes whose size may change; all of those whose sizes are not known to be equal."""
    before, after = _known_rank(context, data), context.shape(ref.outputs[0])
    shape, options = context.shape(data) or (), attributes(ref.node)
    chosen = options.get("axes")
    places = range(before) if chosen is None else [wrap(axis, before) for axis in chosen]
    scales = _scales(ref, context, options)
    if scales is not None and len(scales) == len(places) and options.get("keep_aspect_ratio_policy") is None:
        return tuple(axis for axis, scale in zip(places, scales, strict=True) if scale != 1)
    same = (
        [a is not None and a == b for a, b in zip(shape, after, strict=True)] if after else [False] * before
    )
    return tuple(axis for axis in places if not same[axis])


def _cropped(ref: NodeRef, context: ImportContext, rank: int, options: dict[str, Any]) -> list[int]:
    """The axes of which a region may be cut out: all but those whose region is known to be the whole."""
    chosen, roi = options.get("axes") or list(range(rank)), context.constants.floats(_input(ref, 1))
    if roi is None or roi.size != 2 * len(chosen):
        return list(range(rank))
    ends = zip(chosen, roi[: len(chosen)], roi[len(chosen) :], strict=True)
    return [wrap(axis, rank) for axis, first, last in ends if (first, last) != (0, 1)]


def _scales(ref: NodeRef, context: ImportContext, options: dict[str, Any]) -> list[float] | None:
    if "scales" in options:
        return list(options["scales"])
    place = 1 if ref.op == "Upsample" or context.opset < 11 else 2
    array = context.constants.get(_input(ref, place))
    return None if array is None or not array.size else [float(n) for n in array.ravel()]


def _pad(ref: NodeRef, context: ImportContext) -> Node:
    data, options = _data(ref, context), attributes(ref.node)
    rank, pads = _known_rank(context, data), _amounts(ref, context, options)
    chosen = _integers(ref, context, "axes", 3)
    places = list(range(rank)) if chosen is None else [wrap(axis, rank) for axis in chosen]
    if len(pads) != 2 * len(places):
        raise Unusual
    pairs = zip(pads[: len(places)], pads[len(places) :], strict=True)
    constant = options.get("mode", "constant") == "constant"
    settings = canonical.padding(dict(zip(places, pairs, strict=True)), constant)
    if settings["partial"] and _filling(ref, context, options) != 0:
        raise Unusual
    return _node(ref, [data], **settings)


def _amounts(ref: NodeRef, context: ImportContext, options: dict[str, Any]) -> Shape:
    """How much a Pad adds; an amount that is computed from sizes that the file leaves open may be any."""
    value = _input(ref, 1)
    pads = context.sizes.numbers(value) if value else tuple(options["pads"])
    if pads is None:
        raise Unusual
    return pads


def _filling(ref: NodeRef, context: ImportContext, options: dict[str, Any]) -> float:
    value = _input(ref, 2)
    if not value:
        return float(options.get("value", 0.0))
    array = context.constants.get(value)
    return float("nan") if array is None or array.size != 1 else float(array.ravel()[0])


LOWERINGS = _table()
"""How each operator is lowered, by its name."""
