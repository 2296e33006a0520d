"""THE TABLE: one row per operator, how an affine travels through it or why it cannot.

A row answers two questions about a node `y = op(x, ...)`, in terms of `Affine`s that broadcast against the values:

    up    every output is *wanted* as A(y); as what must each input arrive?         A(op(x)) = op(B(x))
    down  some inputs arrive raw that should be A(x); what do the outputs lack?     op(A(x)) = B(op(x))

The answer is an affine per input (or per output), with None for "as it is", or, where the operator takes the affine
in, the new `Linear` (a linear operator) or `Affine` (another BatchNorm). A row that cannot, raises `Refuse` with a
clause for the report. An operator that is not in the table refuses everything, so forgetting one is safe.

Each row stands below its two transfers. Adding an operator is a line here, and a row where none of these fits; the
tests that are driven by the table pick it up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import lcm, prod
from typing import Protocol

import numpy as np

from bnfold import reasons
from bnfold.algebra import Affine, Array, Linear, widen
from bnfold.errors import Refuse
from bnfold.ir import Dim, Node, Shape

__all__ = ["TABLE", "Row", "Surroundings", "find", "is_sum", "moved", "sign_of", "without_row"]

LARGEST = 1 << 24
"""An affine that would have to be written out in more numbers than this goes no further."""


def _table() -> dict[str, Row]:
    rows = {
        "Gemm MatMul Conv ConvTranspose Embedding": ABSORB,  # what is below; above, a shift only without padding
        "Bilinear DeformConv": ABSORB,  # linear in the first operand, where the others are as they were
        "InputProduct": ABSORB,  # what a recurrent layer makes of its input, before it does anything else
        "Einsum": CONTRACT,  # a linear operator, where one operand is a matrix; else the scale into one operand
        "BatchNormalization": COMPOSE,  # where nothing better can be had
        "Affine": CONJUGATE,  # its own numbers stay; on its other side the affine has others
        "Identity Dropout": PASS,
        "Cast": CAST,  # unless it narrows
        "Reshape Flatten Squeeze Unsqueeze": REGROUP,  # carry the numbers along
        "Transpose": TRANSPOSE,
        "Slice": SLICE,  # what is not read may be anything
        "Gather": TAKE,
        "Split": SPLIT,
        "Concat": CONCAT,  # cuts going up, joins going down
        "Expand": EXPAND,  # where the copies need not differ
        "Tile": TILE,
        "DepthToSpace": SPREAD,  # each channel's numbers repeat
        "SpaceToDepth": COLLECT,
        "Add Sum": ADD,  # up: the scale into every operand, the shift into one; down: where all are scaled alike
        "Sub": SUBTRACT,
        "Mul Div": MULTIPLY,  # the scale into one factor
        "Select": MEAN,  # positions that nobody knows before the model runs: alike along those axes
        "AveragePool ReduceMean Resize Pad": MEAN,  # whole; the scale alone where some weights do not sum to one
        "ReduceSum": TOTAL,  # the scale
        "MaxPool ReduceMax ReduceMin": MAXIMUM,  # if no scale is negative
        "Max Min": COMPARE,  # likewise, where all operands are alike
        "LpPool ReduceL1 ReduceL2": NORM,  # a scale that is nowhere negative, no shift
        "Relu LeakyRelu PRelu Abs": HOMOGENEOUS,  # a scale that is nowhere negative, no shift
    }
    return {op: row for ops, row in rows.items() for op in ops.split()}


Flow = Sequence[Affine | None]
"""One affine per output (or input) of a node; None is the identity."""

Answer = Linear | Affine | Flow


class Surroundings(Protocol):
    """What a row may ask about the rest of the graph."""

    def shape(self, value: str) -> Shape | None:
        """The shape of a value, as far as it is known."""

    def takes_shift(self, value: str) -> bool:
        """Whether a shift could go up from here, by the look of the operators above."""


@dataclass(frozen=True)
class Row:
    """How an affine travels through one operator.

    Attributes:
        up, down: the two transfers.
        shift: whose inputs decide whether a shift can go up: ``"all"`` of them, ``"any"`` of them, or ``"none"``.
        asks: the attributes that `up` and `down` read.
        carries: whether it passes down all that it is given, and so no less than what there is to refuse further down.
        selects: whether it reads only a part of a value, so that the rest may change under it.
        signs: of a sum, the sign of its first operand and that of every other one.
        compares: whether it passes down only what all of its operands were given alike.
    """

    up: Callable[[Node, Surroundings, Flow], Answer]
    down: Callable[[Node, Surroundings, Flow], Answer]
    shift: str = "none"
    asks: tuple[str, ...] = ()
    carries: bool = False
    selects: bool = False
    signs: tuple[float, float] | None = None
    compares: bool = False


def find(node: Node) -> Row:
    """The row of a node's operator.

    Raises:
        Refuse: there is none.
    """
    row = TABLE.get(node.op)
    if row is None:
        raise Refuse(without_row(node))
    return row


_UNFOLLOWED = frozenset(
    """addbmm addmm baddbmm bmm complex cumsum CumSum EmbeddingBag index_add lerp OptionalGetElement rsub _sparse_addmm
    tensordot trapezoid view_as_complex view_as_real""".split()  # noqa: SIM905
) | {"unusual Einsum", "unusual SequenceAt"}
"""Operators without a row that are linear in each of their operands, so that "not linear" would be no reason."""


def without_row(node: Node) -> str:
    """Why no affine map passes an operator that the table does not have."""
    return reasons.NOT_FOLLOWED(node=node) if node.op in _UNFOLLOWED else reasons.NOT_LINEAR(node=node)


def is_sum(node: Node) -> bool:
    """Whether a node adds up or subtracts values."""
    row = TABLE.get(node.op)
    return row is not None and row.signs is not None


def sign_of(node: Node, place: int) -> float:
    """The sign of an operand of a sum: -1 for what is subtracted."""
    first, other = find(node).signs or (1.0, 1.0)
    return other if place else first


# ---------------------------------------------------------------- linear operators and affines absorb


def _linear(node: Node) -> Linear:
    if node.linear is None:
        raise Refuse(reasons.CANNOT_ABSORB(node=node, because=node.reason or reasons.NO_WEIGHT()))
    return node.linear


def _vectors(node: Node, affine: Affine, axis: int, size: int) -> tuple[Array, Array]:
    """The affine as two vectors along the channels of a linear operator; what nobody minds stays as it is."""
    settled = affine.settle(axis)
    vectors = settled.vectors(axis, size)
    if vectors is None:
        axes = " and ".join(map(str, settled.axes))
        raise Refuse(reasons.OTHER_AXIS(node=node, axis=axis, axes=axes))
    return vectors


def _absorb_after(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    linear, affine = _linear(node), _only(wanted)
    if passes(linear, affine.settle(None), linear.out_axis):
        return [moved(affine.settle(None), linear.out_axis, linear.in_axis)]
    scale, shift = _vectors(node, affine, linear.out_axis, linear.outputs)
    if linear.biasless and np.any(shift != 0):
        raise Refuse(reasons.CANNOT_SHIFT(node=node, because=linear.biasless))
    return linear.absorb_after(scale, shift)


def _absorb_before(node: Node, around: Surroundings, given: Flow) -> Answer:
    if any(other is not None for other in given[1:]):
        raise Refuse(reasons.FIRST_OPERAND(node=node))
    linear, affine = _linear(node), _only(given)
    if passes(linear, affine, linear.in_axis):
        return [moved(affine, linear.in_axis, linear.out_axis)]
    if linear.sealed:
        raise Refuse(reasons.CANNOT_BEFORE(node=node, because=linear.sealed))
    scale, shift = _vectors(node, affine, linear.in_axis, linear.inputs)
    for obstacle in (linear.partial, linear.biasless):
        if obstacle and np.any(shift != 0):
            raise Refuse(reasons.CANNOT_SHIFT(node=node, because=obstacle))
    return linear.absorb_before(scale, shift)


def passes(linear: Linear, affine: Affine, axis: int) -> bool:
    """Whether a scale along other axes than this one, on which the matrix works, goes by: `W (s x) = s (W x)`."""
    others = bool(affine.axes) and axis not in affine.axes
    fits = max(linear.in_axis, linear.out_axis) < affine.rank  # a declared rank may be wrong
    return others and fits and linear.is_bare and affine.is_linear


def moved(affine: Affine, source: int, target: int) -> Affine:
    """The same affine, where an axis on which it does not depend is another one."""
    return affine.map(lambda array: np.moveaxis(array, source, target))


ABSORB = Row(_absorb_after, _absorb_before)


def _affine(node: Node) -> Affine:
    if node.affine is None:
        raise Refuse(reasons.STAYS(node=node, because=node.reason or reasons.NOT_CONSTANT()))
    if not node.affine.is_finite:
        raise Refuse(reasons.HOLDS_NOT_FINITE(node=node))
    return node.affine


def _compose_after(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    return _only(wanted).settle(None).after(_affine(node))


def _compose_before(node: Node, around: Surroundings, given: Flow) -> Answer:
    return _affine(node).after(_only(given))


COMPOSE = Row(_compose_after, _compose_before)


def _conjugate_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    """Leave the constant alone and pass what is left: `A F = F B` has `B = F^-1 A F`."""
    own, affine = _affine(node), _only(wanted)
    if np.any(own.scale == 0):
        raise Refuse(reasons.BY_ZERO(node=node))
    return [Affine.of(affine.scale, (affine.shift + own.shift * (affine.scale - 1)) / own.scale).collapse()]


def _conjugate_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    """Leave the constant alone and pass what is left: `F A = B F` has `B = F A F^-1`, which needs no inverse."""
    own, affine = _affine(node), _only(given)
    return [Affine.of(affine.scale, own.scale * affine.shift + own.shift * (1 - affine.scale)).collapse()]


CONJUGATE = Row(_conjugate_up, _conjugate_down, "all")


# ---------------------------------------------------------------- data movement carries the numbers along


def _only(flow: Flow) -> Affine:
    """The first affine of a flow, where a node has one input (or output) that matters."""
    if flow[0] is None:
        raise Refuse(reasons.NO_CARRIER())
    return flow[0]


def _shape(node: Node, around: Surroundings, value: str) -> Shape:
    shape = around.shape(value)
    if shape is None:
        raise Refuse(reasons.SHAPE_UNKNOWN(node=node))
    return shape


def _size(node: Node, size: Dim) -> int:
    if not isinstance(size, int):
        raise Refuse(reasons.SHAPE_UNKNOWN(node=node))
    return size


def _check_size(node: Node, sizes: Iterable[int]) -> None:
    if prod(sizes) > LARGEST:
        raise Refuse(reasons.TOO_LARGE(node=node, limit=LARGEST))


def _pass(node: Node, around: Surroundings, flow: Flow) -> Answer:
    return [_only(flow)]


PASS = Row(_pass, _pass, "all", carries=True)


def _cast(node: Node, around: Surroundings, flow: Flow) -> Answer:
    if not node.attributes["lossless"]:
        raise Refuse(reasons.NARROWS_TYPE(node=node))
    return [_only(flow)]


CAST = Row(_cast, _cast, "all", ("lossless",), carries=True)


def _reshape_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    return [
        _regroup(
            node, _only(wanted), _shape(node, around, node.outputs[0]), _shape(node, around, node.inputs[0])
        )
    ]


def _reshape_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    return [
        _regroup(
            node, _only(given), _shape(node, around, node.inputs[0]), _shape(node, around, node.outputs[0])
        )
    ]


def _regroup(node: Node, affine: Affine, source: Shape, target: Shape) -> Affine:
    """Carry an affine through a reshape: within each group of axes that is regrouped, write it out and reshape it."""
    wide: list[int] = []
    narrow: list[int] = []
    alike: list[int] = []
    for here, there in groups(source, target):
        given, made = [source[axis] for axis in here], [target[axis] for axis in there]
        if all(affine.scale.shape[axis] == 1 for axis in here):
            given, made = [1] * len(here), [1] * len(there)
        elif 0 < _known(given) < len(given) and 0 < _known(made) < len(made):
            lead = _known(given), _known(made)
            if any(affine.scale.shape[axis] != 1 for axis in here[lead[0] :]):
                raise Refuse(reasons.SHAPE_UNKNOWN(node=node))
            given, made = _blocks(given, made, lead)
            alike += there[lead[1] :]
        wide += [_size(node, size) for size in given]
        narrow += [_size(node, size) for size in made]
    if prod(wide) != prod(narrow):
        raise Refuse(reasons.SHAPES_DISAGREE(node=node))
    _check_size(node, wide)
    moved = affine.map(lambda array: np.broadcast_to(array, wide).reshape(narrow))
    if any(axis in alike for axis in moved.axes):
        raise Refuse(reasons.SHAPE_UNKNOWN(node=node))
    return moved


def _known(sizes: Sequence[Dim]) -> int:
    """How many sizes are known before the first that is not."""
    return next((place for place, size in enumerate(sizes) if not isinstance(size, int)), len(sizes))


def _blocks(given: list[Dim], made: list[Dim], lead: tuple[int, int]) -> tuple[list[Dim], list[Dim]]:
    """Stand-ins for two lists of sizes of one product, of which only the leading ones are known.

    What is the same all along the others is the same on each of as many blocks as the least common multiple counts.
    """
    heads = given[: lead[0]], made[: lead[1]]
    products = [prod(size for size in head if isinstance(size, int)) for head in heads]
    counts = [lcm(*products) // product for product in products]
    tails = [1] * (len(given) - lead[0] - 1), [1] * (len(made) - lead[1] - 1)
    return [*heads[0], counts[0], *tails[0]], [*heads[1], counts[1], *tails[1]]


def groups(source: Shape, target: Shape) -> list[tuple[range, range]]:
    """Split two shapes of one value into the shortest runs of axes with equal products, in order.

    Sizes that are not known end the comparison from that side; what neither side reaches is one run.
    """
    left = list(_runs(source, target))
    start, begin = (left[-1][0].stop, left[-1][1].stop) if left else (0, 0)
    rest, other = source[start:], target[begin:]
    right = [
        (
            range(len(source) - a.stop, len(source) - a.start),
            range(len(target) - b.stop, len(target) - b.start),
        )
        for a, b in _runs(rest[::-1], other[::-1])
    ][::-1]
    stop, end = (right[0][0].start, right[0][1].start) if right else (len(source), len(target))
    middle = [(range(start, stop), range(begin, end))] if start < stop or begin < end else []
    return [*left, *middle, *right]


def _runs(source: Shape, target: Shape) -> Iterable[tuple[range, range]]:
    """The runs of `groups` that can be told from the left."""
    i = j = 0
    while i < len(source) and j < len(target):
        if source[i] == target[j] and source[i] is not None:
            a, b = i + 1, j + 1
        else:
            a, b = _run(source, target, i, j)
        if a == i:
            return
        yield range(i, a), range(j, b)
        i, j = a, b


def _run(source: Shape, target: Shape, i: int, j: int) -> tuple[int, int]:
    """Where the shortest run of known sizes with equal products ends that begins here; `(i, j)` if nowhere."""
    a, b, here, there = i, j, 1, 1
    while a == i or b == j or here != there:
        left = a == i or (b > j and here < there)
        size = next(iter((source[a:] if left else target[b:])[:1]), None)
        if not isinstance(size, int):
            return i, j
        if left:
            a, here = a + 1, here * size
        else:
            b, there = b + 1, there * size
    return a, b


REGROUP = Row(_reshape_up, _reshape_down, "all", carries=True)


def _transpose_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    inverse = np.argsort(node.attributes["perm"])
    return [_only(wanted).map(lambda array: np.transpose(array, inverse))]


def _transpose_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    return [_only(given).map(lambda array: np.transpose(array, node.attributes["perm"]))]


TRANSPOSE = Row(_transpose_up, _transpose_down, "all", ("perm",), carries=True)


def _slice_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    def cut(array: Array) -> Array:
        return array[
            tuple(
                s if n != 1 else slice(None)
                for s, n in zip(node.attributes["slices"], array.shape, strict=True)
            )
        ]

    return [_only(given).map(cut)]


def _slice_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    """What was not read may be anything (NaN)."""
    shape = _shape(node, around, node.inputs[0])
    slices = node.attributes["slices"]
    cut = [axis for axis, s in enumerate(slices) if s != slice(None)]
    known = {axis: size for axis in cut if isinstance(size := shape[axis], int)}
    if len(known) < len(cut):
        if any(axis in cut for axis in _only(wanted).axes):
            raise Refuse(reasons.SHAPE_UNKNOWN(node=node))
        return [_only(wanted)]

    def spread(array: Array) -> Array:
        sizes = [known.get(axis, size) for axis, size in enumerate(array.shape)]
        _check_size(node, sizes)
        full = np.full(sizes, np.nan)
        full[tuple(s if axis in cut else slice(None) for axis, s in enumerate(slices))] = array
        return full

    return [_only(wanted).map(spread)]


SLICE = Row(_slice_up, _slice_down, "all", ("slices",), selects=True)


def _take_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    axis, indices = node.attributes["axis"], np.asarray(node.attributes["indices"])

    def take(array: Array) -> Array:
        if array.shape[axis] == 1:
            return array.reshape([*array.shape[:axis], *[1] * indices.ndim, *array.shape[axis + 1 :]])
        _check_size(node, [*array.shape[:axis], indices.size, *array.shape[axis + 1 :]])
        return np.take(array, indices, axis)

    return [_only(given).map(take)]


def _take_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    axis, indices = node.attributes["axis"], np.asarray(node.attributes["indices"])
    known = _shape(node, around, node.inputs[0])[axis]
    end = axis + indices.ndim
    if not isinstance(known, int) and not {*range(axis, end)} & {*_only(wanted).axes}:
        return [_only(wanted).map(lambda array: array.reshape([*array.shape[:axis], 1, *array.shape[end:]]))]
    size = _size(node, known)

    def spread(array: Array) -> Array:
        before, after = array.shape[:axis], array.shape[end:]
        _check_size(node, [*before, max(size, indices.size), *after])
        array = np.broadcast_to(array, [*before, *indices.shape, *after])
        array = np.moveaxis(array.reshape([*before, indices.size, *after]), axis, 0)
        full = np.full((size, *array.shape[1:]), np.nan)
        full[indices.ravel()] = array
        if not np.array_equal(full[indices.ravel()], array, equal_nan=True):
            raise Refuse(reasons.REPEATS(node=node))
        return np.moveaxis(full, 0, axis)

    return [_only(wanted).map(spread)]


TAKE = Row(_take_up, _take_down, "all", ("axis", "indices"), selects=True)


def _pieces(affine: Affine, axis: int, sizes: Sequence[int]) -> list[Affine]:
    """Cut an affine along an axis into pieces of these sizes."""
    if affine.scale.shape[axis] == 1:
        return [affine] * len(sizes)
    ends = list(accumulate(sizes))
    cuts = [(slice(None),) * axis + (slice(end - size, end),) for size, end in zip(sizes, ends, strict=True)]
    return [Affine(affine.scale[cut], affine.shift[cut]).collapse() for cut in cuts]


def _join(node: Node, flow: Flow, axis: int, sizes: Sequence[int]) -> Affine:
    """Put affines (None: identity) side by side along an axis."""
    rank = next(affine.rank for affine in flow if affine is not None)
    whole = [affine or Affine.identity(rank) for affine in flow]
    shape = np.broadcast_shapes(
        *(tuple(1 if a == axis else n for a, n in enumerate(w.scale.shape)) for w in whole)
    )
    _check_size(node, [*shape[:axis], sum(sizes), *shape[axis + 1 :]])

    def wide(array: Array, size: int) -> Array:
        return np.broadcast_to(array, [*shape[:axis], size, *shape[axis + 1 :]])

    scale = np.concatenate([wide(w.scale, size) for w, size in zip(whole, sizes, strict=True)], axis)
    shift = np.concatenate([wide(w.shift, size) for w, size in zip(whole, sizes, strict=True)], axis)
    return Affine(scale, shift).collapse()


def _sizes(node: Node, around: Surroundings) -> list[int]:
    """The sizes of a Concat's inputs along its axis."""
    return [_size(node, _shape(node, around, value)[node.attributes["axis"]]) for value in node.inputs]


def _concat_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    affine, axis = _only(wanted), node.attributes["axis"]
    if affine.scale.shape[axis] == 1:
        return [affine] * len(node.inputs)
    return _pieces(affine, axis, _sizes(node, around))


def _concat_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    first = given[0]
    if first is not None and all(g is not None and g.equals(first) for g in given):
        axis = node.attributes["axis"]
        if first.scale.shape[axis] == 1:
            return [first]
    return [_join(node, given, node.attributes["axis"], _sizes(node, around))]


CONCAT = Row(_concat_up, _concat_down, "all", ("axis",), carries=True)


def _split_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    return [_join(node, wanted, node.attributes["axis"], node.attributes["sizes"])]


def _split_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    return _pieces(_only(given), node.attributes["axis"], node.attributes["sizes"])


SPLIT = Row(_split_up, _split_down, "all", ("axis", "sizes"), selects=True)


def _expand_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    return [_narrow(node, around, _only(wanted), node.inputs[0])]


def _expand_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    return [widen(_only(given), len(_shape(node, around, node.outputs[0])))]


EXPAND = Row(_expand_up, _expand_down, "all", carries=True)


def _narrow(node: Node, around: Surroundings, affine: Affine, value: str) -> Affine:
    """What an operand that is broadcast must arrive as; refuses what would differ between its copies.

    A size that is not a number may turn out to be 1.
    """
    shape = _shape(node, around, value)
    missing = affine.rank - len(shape)
    copied = [
        *range(missing),
        *(missing + axis for axis, size in enumerate(shape) if not isinstance(size, int) or size == 1),
    ]
    if any(axis in copied for axis in affine.axes):
        raise Refuse(reasons.BROADCASTS(node=node, value=value))
    keep = affine.scale.shape[missing:]
    return Affine(affine.scale.reshape(keep), affine.shift.reshape(keep))


def _tile_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    repeats = node.attributes["repeats"]

    def fold(array: Array) -> Array:
        for axis, times in enumerate(repeats):
            if array.shape[axis] == 1 or times == 1:
                continue
            blocks = np.split(array, times, axis)
            if not all(np.array_equal(block, blocks[0], equal_nan=True) for block in blocks):
                raise Refuse(reasons.REPEATS(node=node))
            array = blocks[0]
        return array

    return [_only(wanted).map(fold)]


def _tile_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    affine = _only(given)
    sizes = zip(affine.scale.shape, node.attributes["repeats"], strict=True)
    repeats = [times if size != 1 else 1 for size, times in sizes]
    _check_size(node, (*affine.scale.shape, *repeats))
    return [affine.map(lambda array: np.tile(array, repeats))]


TILE = Row(_tile_up, _tile_down, "all", ("repeats",), carries=True)


def _channels_to_blocks(node: Node, around: Surroundings, flow: Flow) -> Answer:
    """The affine on the deep side of a DepthToSpace, from the one on its wide side."""
    affine, block = _only(flow), node.attributes["blocksize"]
    if any(axis != 1 for axis in affine.axes) or (affine.axes and affine.rank != 4):
        raise Refuse(reasons.MIXES_CHANNELS(node=node))
    copies = block ** (affine.rank - 2)
    if affine.scale.shape[1] == 1:
        return [affine]
    _check_size(node, (*affine.scale.shape, copies))
    if node.attributes["mode"] == "CRD":
        return [affine.map(lambda array: np.repeat(array, copies, 1))]
    return [affine.map(lambda array: np.concatenate([array] * copies, 1))]


def _blocks_to_channels(node: Node, around: Surroundings, flow: Flow) -> Answer:
    """The affine on the wide side of a DepthToSpace, from the one on its deep side."""
    affine, block = _only(flow), node.attributes["blocksize"]
    if not affine.axes:
        return [affine]
    copies = block ** (affine.rank - 2)
    order = (-1, copies) if node.attributes["mode"] == "CRD" else (copies, -1)

    def merge(array: Array) -> Array:
        seen = array.reshape(order) if affine.axes == (1,) and affine.rank == 4 else None
        each = None if seen is None else (seen if order[1] == copies else seen.T)
        if each is None or not all(np.array_equal(each[:, 0], column, equal_nan=True) for column in each.T):
            raise Refuse(reasons.SPREADS(node=node))
        return each[:, 0].reshape(1, -1, *[1] * (affine.rank - 2))

    return [affine.map(merge)]


SPREAD = Row(_channels_to_blocks, _blocks_to_channels, "all", ("blocksize", "mode"))
COLLECT = Row(_blocks_to_channels, _channels_to_blocks, "all", ("blocksize", "mode"))


# ---------------------------------------------------------------- several operands


def _add_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    """Scale into every operand, shift into one: the first that can take it."""
    affine = _only(wanted)
    scaled = [_narrow(node, around, affine.scale_only(), value) for value in node.inputs]
    if affine.is_linear:
        return scaled
    able = [place for place, value in enumerate(node.inputs) if around.takes_shift(value)]
    for place in able or range(len(node.inputs)):
        try:
            whole = _narrow(node, around, affine, node.inputs[place])
        except Refuse:
            continue
        return [
            *scaled[:place],
            Affine(whole.scale, sign_of(node, place) * whole.shift),
            *scaled[place + 1 :],
        ]
    raise Refuse(reasons.NO_OPERAND_SHIFT(node=node))


def _add_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    """Operands that were all scaled alike leave that scale and the sum of their shifts."""
    rank = len(_shape(node, around, node.outputs[0]))
    each = [widen(affine, rank) for affine in given]
    if any(not _alike(each[0].scale, other.scale) for other in each):
        raise Refuse(reasons.NOT_SCALED(node=node))
    shifts = (sign_of(node, place) * affine.shift for place, affine in enumerate(each))
    shift = sum(shifts, np.zeros((1,) * rank))
    return [Affine.of(each[0].scale, shift).collapse()]


def _alike(first: Array, second: Array) -> bool:
    try:
        return bool(np.all(first == second))
    except ValueError:
        return False


ADD = Row(_add_up, _add_down, "any", signs=(1.0, 1.0))
SUBTRACT = replace(ADD, signs=(1.0, -1.0))


def _multiply_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    """A scale goes into one factor, a shift cannot."""
    affine = _linear_only(node, _only(wanted))
    places = range(1 if node.op == "Div" else len(node.inputs))
    able = [place for place in places if around.takes_shift(node.inputs[place])]
    for place in able or places:
        try:
            factor = _narrow(node, around, affine, node.inputs[place])
        except Refuse:
            continue
        return [factor if here == place else None for here in range(len(node.inputs))]
    raise Refuse(reasons.NO_OPERAND_SCALE(node=node))


def _multiply_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    rank = len(_shape(node, around, node.outputs[0]))
    product = Affine.identity(rank)
    for place, affine in enumerate(given):
        if affine is None:
            continue
        if node.op == "Div" and place:
            raise Refuse(reasons.DIVIDES(node=node))
        product = widen(_linear_only(node, affine), rank).after(product)
    return [product.collapse()]


MULTIPLY = Row(_multiply_up, _multiply_down)


def _contract_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    """A scale along axes that one operand has goes into it; every term of the sums has it once."""
    if node.linear is not None:
        return _absorb_after(node, around, wanted)
    affine = _linear_only(node, _only(wanted).settle(None))
    kept: Sequence[Sequence[int]] = node.attributes["kept"]
    sizes = [
        dict(zip(kept[p], _shape(node, around, value), strict=True)) for p, value in enumerate(node.inputs)
    ]
    varies = {axis: affine.scale.shape[axis] for axis in affine.axes}
    places = [place for place, own in enumerate(sizes) if varies.items() <= own.items()]
    for place in [p for p in places if around.takes_shift(node.inputs[p])] or places:
        shape = [1 if axis < 0 else affine.scale.shape[axis] for axis in kept[place]]
        order = [axis for axis in kept[place] if axis in affine.axes]
        scale = np.squeeze(affine.scale, tuple(a for a in range(affine.rank) if a not in affine.axes))
        factor = scale.transpose(np.argsort(np.argsort(order))).reshape(shape)
        return [Affine.of(factor, 0.0) if here == place else None for here in range(len(kept))]
    raise Refuse(reasons.NO_OPERAND_SCALE(node=node))


def _contract_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    if node.linear is not None:
        return _absorb_before(node, around, given)
    rank = len(_shape(node, around, node.outputs[0]))
    product = Affine.identity(rank)
    for affine, kept in zip(given, node.attributes["kept"], strict=True):
        if affine is None:
            continue
        scale = _linear_only(node, _uniform(node, affine, [a for a, to in enumerate(kept) if to < 0])).scale
        axes = [axis for axis, to in enumerate(kept) if to >= 0]
        sizes = dict(zip([kept[axis] for axis in axes], [scale.shape[axis] for axis in axes], strict=True))
        order = np.argsort([kept[axis] for axis in axes])
        small = scale.reshape([scale.shape[axis] for axis in axes]).transpose(order)
        product = Affine.of(small.reshape([sizes.get(a, 1) for a in range(rank)]), 0.0).after(product)
    return [product.collapse()]


CONTRACT = Row(_contract_up, _contract_down, asks=("kept",))


def _compare_up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
    """What grows with its argument commutes with the larger (or smaller) of two: `max(A x, A y) = A max(x, y)`."""
    affine = _monotone(node, _only(wanted))
    return [_narrow(node, around, affine, value) for value in node.inputs]


def _compare_down(node: Node, around: Surroundings, given: Flow) -> Answer:
    rank = len(_shape(node, around, node.outputs[0]))
    first, *others = (widen(affine, rank) for affine in given)
    if not all(first.equals(other) for other in others):
        raise Refuse(reasons.NOT_ALIKE(node=node))
    return [_monotone(node, first)]


COMPARE = Row(_compare_up, _compare_down, "all", compares=True)


# ---------------------------------------------------------------- pooling, resizing, padding, activations


def _linear_only(node: Node, affine: Affine, obstacle: str = "") -> Affine:
    if not affine.is_linear:
        why = reasons.NO_SHIFT_AS if obstacle else reasons.NO_SHIFT
        raise Refuse(why(node=node, because=obstacle))
    return affine


def _monotone(node: Node, affine: Affine) -> Affine:
    if not affine.is_monotone:
        raise Refuse(reasons.NO_NEGATIVE(node=node))
    if len([value for value in node.outputs if value]) > 1 and not np.all(affine.scale > 0):
        raise Refuse(reasons.ALSO_WHERE(node=node))
    return affine


def _uniform(node: Node, affine: Affine, axes: Iterable[int]) -> Affine:
    """Refuse an affine that varies along an axis on which the operator mixes positions."""
    if any(axis in axes for axis in affine.axes):
        raise Refuse(reasons.MIXES_POSITIONS(node=node))
    return affine


def _window(checks: Callable[[Node, Affine], Affine], shift: str = "none") -> Row:
    """The row of an operator that combines positions along `axes`, within each channel."""

    def down(node: Node, around: Surroundings, given: Flow) -> Answer:
        axes = node.attributes["axes"]
        affine = checks(node, _uniform(node, _only(given), axes))
        if not node.attributes.get("keepdims", True):
            affine = affine.map(lambda array: np.squeeze(array, tuple(axes)))
        return [affine, *[None] * (len(node.outputs) - 1)]

    def up(node: Node, around: Surroundings, wanted: Flow) -> Answer:
        axes, affine = node.attributes["axes"], _only(wanted)
        if not node.attributes.get("keepdims", True):
            affine = affine.map(lambda array: np.expand_dims(array, tuple(axes)))
        return [checks(node, _uniform(node, affine, axes))]

    return Row(up, down, shift, ("axes", "keepdims"))


def _averaged(node: Node, affine: Affine) -> Affine:
    return _linear_only(node, affine, node.partial) if node.partial else affine


MEAN = _window(_averaged, "all")
TOTAL = _window(_linear_only)
MAXIMUM = _window(_monotone, "all")


def _scaled(node: Node, affine: Affine) -> Affine:
    return _monotone(node, _linear_only(node, affine))


NORM = _window(_scaled)


def _homogeneous(node: Node, around: Surroundings, flow: Flow) -> Answer:
    return [_scaled(node, _only(flow))]


HOMOGENEOUS = Row(_homogeneous, _homogeneous)

TABLE = _table()
"""The row of every operator that an affine can pass, by its name."""
