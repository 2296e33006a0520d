"""One lowering per ATen operator: how a captured call is drawn as nodes in the vocabulary of `ir`.

A lowering is given the call's arguments by the names of the operator's schema (its first, `self`, `input` or `data`, by
place), with `Value` in the place of each tensor, and a `Draft` that takes nodes. It raises `Opaque` for a form that it
does not cover; then, and for every operator without a lowering, the call becomes an opaque node, through which nothing
travels.
A composite operator without a lowering (`multiply`, `movedim`, `chunk`) never comes here: `modes` sees its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from bnfold import canonical, reasons
from bnfold.algebra import Affine, Array, Linear
from bnfold.torch.constants import slots_of
from bnfold.torch.trace import Call, Value
from bnfold.window import Window

__all__ = ["LOWERINGS", "Draft", "Lowering", "Opaque", "Statistics", "bind", "lower", "lowering"]


class Draft(Protocol):
    """What a lowering may ask for and do."""

    def node(
        self,
        op: str,
        inputs: Sequence[Value | str],
        outputs: Sequence[Value | str],
        affine: Affine | None = None,
        partial: str = "",
        **attributes: Any,
    ) -> None:
        """Draw one node."""

    def linear(
        self,
        op: str,
        x: Value,
        y: Value | str,
        weight: Value,
        bias: Value | None,
        linear: Linear,
        others: Sequence[Value] = (),
    ) -> None:
        """Draw a linear operator, with the values that are its weight and bias, and what it reads besides."""

    def batchnorm(self, x: Value, y: Value, statistics: Statistics, eps: float, reason: str) -> None:
        """Draw a BatchNorm; `reason` is why it cannot be moved, or empty."""

    def between(self, shape: Sequence[int]) -> str:
        """Name a value between two nodes of one call."""
        ...

    def array(self, constant: Any) -> Array | None:
        """The numbers of a constant; None where it is none, or cannot be computed."""


class Opaque(Exception):
    """A call in a form that its lowering does not cover."""


Statistics = dict[str, Value | None]
"""What a BatchNorm is given, by the names of its arguments."""

Lowering = Callable[..., None]

LOWERINGS: dict[str, Lowering] = {}
"""By the name of the operator, without the mark of its in-place form."""


def lowering(names: str) -> Callable[[Lowering], Lowering]:
    """Register a lowering for some operators."""

    def register(draw: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(names.split(), draw))
        return draw

    return register


def lower(draft: Draft, call: Call) -> bool:
    """Draw a call by its lowering; False where there is none for it."""
    found = LOWERINGS.get(call.label)
    if found is None or not call.made or not all(value.data or not value.constant for value in call.made):
        return False
    try:
        arguments = bind(call)
        first = [arguments.pop(name) for name in ("self", "input", "data") if name in arguments]
        found(draft, call, *first, **arguments)
    except Opaque:
        return False
    return True


def bind(call: Call) -> dict[str, Any]:
    """The arguments by the names of the schema, with its defaults.

    Raises:
        Opaque: it writes into tensors that it is given for that.
    """
    names, defaults, writes_out = _signature(call.function)
    _need(not writes_out)
    return {**defaults, **dict(zip(names, call.args, strict=False)), **call.kwargs}


@cache
def _signature(function: Any) -> tuple[tuple[str, ...], dict[str, Any], bool]:
    """The names of an operator's arguments, their defaults, and whether some are written into."""
    schema = function._schema.arguments
    defaults = {each.name: each.default_value for each in schema if each.has_default_value()}
    plain = {name: tuple(thing) if isinstance(thing, list) else thing for name, thing in defaults.items()}
    return tuple(each.name for each in schema), plain, any(each.is_out for each in schema)


# ---------------------------------------------------------------- small questions


def _need(*facts: Any) -> None:
    if not all(facts):
        raise Opaque


def _computed(value: Any) -> bool:
    return isinstance(value, Value) and not value.constant


def _floating(*values: Value) -> bool:
    return all(value.dtype.is_floating_point for value in values)


def _axes(axes: Any, rank: int) -> tuple[int, ...]:
    """Axes as a sorted tuple of numbers that are not negative; None and () are all of them."""
    return tuple(sorted(a % rank for a in axes)) if axes else tuple(range(rank))


def _plain(*things: Any) -> bool:
    """Whether settings are numbers only."""
    return all(_plain(*t) if isinstance(t, tuple) else not isinstance(t, Value) for t in things)


def _each(setting: Any, count: int) -> tuple[Any, ...]:
    return tuple(setting) * count if len(setting) == 1 else tuple(setting)


# ---------------------------------------------------------------- linear operators


@lowering("conv1d conv2d conv3d")
def _conv(draft: Draft, call: Call, x: Value, weight: Value, bias: Value | None, **settings: Any) -> None:
    y, axis = call.made[0], x.rank - weight.rank + 1
    _need(_computed(x), _plain(*settings.values()), _floating(x, y))
    window = _window(weight, settings)
    linear = canonical.convolution(window, x.shape[axis], weight.shape[0], settings["groups"], axis)
    draft.linear("Conv", x, y, weight, bias, linear)


def _window(weight: Value, settings: Mapping[str, Any]) -> Window:
    """How a kernel slides."""
    kernel, spatial = weight.shape[2:], weight.rank - 2
    stride, dilation = _each(settings["stride"], spatial), _each(settings["dilation"], spatial)
    pads: tuple[tuple[int, int], ...] | None
    if settings["padding"] == "same":
        pads = Window.same_pads(kernel, stride, dilation, lower=False)
    else:
        padding = (0,) if settings["padding"] == "valid" else settings["padding"]
        pads = tuple((amount, amount) for amount in _each(padding, spatial))
    return Window(kernel, stride, dilation, pads, any(settings.get("output_padding", ())))


@lowering("convolution")
def _convolution(draft: Draft, call: Call, x: Value, weight: Value, bias: Value | None, **rest: Any) -> None:
    """What autograd makes of both kinds, where a model differentiates by itself."""
    (_conv_transpose if rest.pop("transposed") else _conv)(draft, call, x, weight, bias, **rest)


@lowering("conv_transpose1d conv_transpose2d conv_transpose3d")
def _conv_transpose(
    draft: Draft, call: Call, x: Value, weight: Value, bias: Value | None, **settings: Any
) -> None:
    y, axis, groups = call.made[0], x.rank - weight.rank + 1, settings["groups"]
    _need(_computed(x), _plain(*settings.values()), _floating(x, y))
    sizes = x.shape[axis], weight.shape[1] * groups
    linear = canonical.convolution(_window(weight, settings), *sizes, groups, axis, transposed=True)
    draft.linear("ConvTranspose", x, y, weight, bias, linear)


def _product(
    draft: Draft,
    call: Call,
    x: Value,
    weight: Value,
    bias: Value | None,
    order: str,
    axis: int,
    biasless: str = "",
) -> None:
    outputs, inputs = weight.shape if order == "oi" else weight.shape[::-1]
    linear = canonical.matrix(order, inputs, outputs, axis, axis, biasless, bias is None)
    draft.linear("Gemm" if x.rank == 2 else "MatMul", x, call.made[0], weight, bias, linear)


@lowering("linear")
def _linear(draft: Draft, call: Call, x: Value, weight: Value, bias: Value | None) -> None:
    _need(_computed(x), weight.rank == 2, _floating(x, call.made[0]))
    _product(draft, call, x, weight, bias, "oi", x.rank - 1)


@lowering("matmul mm")
def _matmul(draft: Draft, call: Call, left: Value, **rest: Value) -> None:
    (right,) = rest.values()
    _need(_floating(left, right))
    bare = reasons.BARE_PRODUCT()
    if _computed(left) and right.rank == 2 and not right.data:
        return _product(draft, call, left, right, None, "io", left.rank - 1, bare)
    _need(_computed(right), left.rank == 2, right.rank >= 2, not left.data)
    return _product(draft, call, right, left, None, "oi", right.rank - 2, bare)


@lowering("einsum")
def _einsum(draft: Draft, call: Call, equation: str, tensors: Any, path: Any) -> None:
    """A product by a stored matrix, or sums of products through which a scale goes along the axes that are left.

    Not of one operand: that may be a view of it.
    """
    y = call.made[0]
    found = canonical.contraction(equation, [t.rank for t in tensors])
    computed = [place for place, tensor in enumerate(tensors) if _computed(tensor)]
    _need(found is not None, _floating(y, *tensors), computed, len(tensors) > 1)
    words, result = found  # type: ignore[misc]
    if len(tensors) == 2 and len(computed) == 1 and not tensors[1 - computed[0]].data:
        x, weight = tensors[computed[0]], tensors[1 - computed[0]]
        linear = canonical.product_of(words, result, 1 - computed[0], weight.shape)
        if linear is not None and x.shape[linear.in_axis] == linear.inputs:
            linear = replace(linear, biasless=reasons.BARE_EINSUM())
            return draft.linear("Einsum", x, y, weight, None, linear)
    kept = canonical.kept_axes(words, result, computed)
    return draft.node("Einsum", [tensors[place] for place in computed], [y], kept=kept)


@lowering("addmm")
def _addmm(draft: Draft, call: Call, x: Value, mat1: Value, mat2: Value, beta: Any, alpha: Any) -> None:
    _need(_computed(mat1), x.constant, x.shape == mat2.shape[1:], beta == alpha == 1)
    _need(mat2.rank == 2, not mat2.data)
    _product(draft, call, mat1, mat2, x, "io", 1)


@lowering("_trilinear")
def _bilinear(draft: Draft, call: Call, *, i1: Value, i2: Value, i3: Value, **rest: Any) -> None:
    """`F.bilinear`, which adds its bias afterwards: `sum x_i W_oij y_j`."""
    lists = [tuple(rest[name]) for name in ("expand1", "expand2", "expand3", "sumdim")]
    _need(lists == [(1, 3), (0,), (1, 2), (2, 3)], _computed(i1), _computed(i3), i2.rank == 3)
    _need(i1 is not i3, not i2.data, _floating(i1, i3, call.made[0]))
    linear = canonical.bilinear(i2.shape[1], i2.shape[0], 1)
    draft.linear("Bilinear", i1, call.made[0], i2, None, linear, [i3])


@lowering("torchvision.deform_conv2d")
def _deformable(
    draft: Draft, call: Call, x: Value, weight: Value, offset: Value, mask: Value, bias: Value, **rest: Any
) -> None:
    """A bias that is not stored anywhere is zeros that torchvision makes."""
    others = [offset, mask] if rest["use_mask"] else [offset]
    _need(_computed(x), _plain(*rest.values()), _floating(x, call.made[0]), x not in others)
    stored = bias.slots or not bias.constant or slots_of(bias)
    linear = canonical.deformable(x.shape[1], weight.shape[0], rest["groups"])
    draft.linear("DeformConv", x, call.made[0], weight, bias if stored else None, linear, others)


@lowering("embedding")
def _embedding(draft: Draft, call: Call, weight: Value, indices: Value, **rest: Any) -> None:
    _need(_computed(indices), not weight.data, weight.rank == 2)
    rows, width = weight.shape
    linear = canonical.embedding(rows, width, indices.rank)
    draft.linear("Embedding", indices, call.made[0], weight, None, linear)


@lowering("_embedding_bag _embedding_bag_forward_only")
def _embedding_bag(draft: Draft, call: Call, mode: int, **rest: Any) -> None:
    """Sums and means of rows have no row of the table either, but are linear."""
    _need(mode in (0, 1))
    draft.node("EmbeddingBag", [v for v in call.reads.values() if not v.constant and not v.slots], call.made)


@lowering("lstm gru rnn_tanh rnn_relu")
def _recurrent(draft: Draft, call: Call, x: Value, hx: Any, params: Any, **settings: Any) -> None:
    """A product of the input for each direction of the first layer, and what the layers go on to do with those."""
    directions = 1 + settings["bidirectional"]
    each = len(params) // (directions * settings["num_layers"])
    firsts = [params[place * each : place * each + each] for place in range(directions)]
    _need(_computed(x), _floating(x, call.made[0]), _stand_apart(firsts, params, settings["has_biases"]))
    made = []
    for weight, _, *rest in firsts:
        outputs, inputs = weight.shape
        bare = "" if settings["has_biases"] else reasons.BARE_LAYER()
        linear = canonical.matrix("oi", inputs, outputs, x.rank - 1, x.rank - 1, bare)
        made.append(draft.between((*x.shape[:-1], outputs)))
        bias = rest[0] if settings["has_biases"] else None
        draft.linear("InputProduct", x, made[-1], weight, bias, linear)
    state = hx if isinstance(hx, tuple) else (hx,)
    others = (*state, settings.get("batch_sizes"), *params)
    computed = [v for v in others if v is not None and not v.constant and not v.slots]
    draft.node(call.label, [*made, *computed], call.made)


def _stand_apart(firsts: Sequence[Sequence[Value]], params: Sequence[Value], biased: bool) -> bool:
    """Whether the weights and biases of the inputs are read as nothing else by the same call."""
    own = [value for first in firsts for value in (first[0], *(first[2:3] if biased else ()))]
    return all(sum(other is value for other in params) == 1 for value in own)


# ---------------------------------------------------------------- normalisation

_NUMBERS = ("running_mean", "running_var", "weight", "bias")


@lowering(
    "batch_norm instance_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"
)
def _batch_norm(draft: Draft, call: Call, x: Value, eps: float, **rest: Any) -> None:
    statistics = {name: rest.get(name) for name in _NUMBERS}
    tracked = statistics["running_mean"] is not None and statistics["running_var"] is not None
    _need(_computed(x), x.rank >= 2, tracked or call.label != "instance_norm")
    reason = ""
    if not tracked:
        reason = reasons.UNTRACKED()
    elif rest.get("training") or rest.get("use_input_stats"):
        reason = reasons.TRAINING()
    draft.batchnorm(x, call.made[0], statistics, eps, reason)


# ---------------------------------------------------------------- arithmetic


@lowering("add sub mul div rsub")
def _combine(draft: Draft, call: Call, left: Any, other: Any, alpha: Any = 1, **rest: Any) -> None:
    """`left op alpha right`, where either may be constant."""
    y, op = call.made[0], call.label.removeprefix("r").capitalize()
    left, right = (other, left) if call.label == "rsub" else (left, other)
    _need(_plain(alpha), _floating(y), _floating(*(v for v in (left, right) if _computed(v))))
    _need(alpha == 1 or call.label != "rsub", not rest.get("rounding_mode"))
    if _computed(left) and _computed(right):
        return _combine_computed(draft, op, left, right, alpha, y)
    x, constant = (left, right) if _computed(left) else (right, left)
    numbers = draft.array(constant)
    _need(_computed(x), numbers is not None)
    affine = canonical.affine_of(op, np.asarray(numbers), x is left, float(alpha))
    _need(affine is not None)
    return _affine(draft, call, x, affine)


def _combine_computed(draft: Draft, op: str, left: Value, right: Value, alpha: Any, y: Value) -> None:
    if left is right:
        _need(op == "Add")
        return draft.node("Affine", [left], [y], affine=Affine.of(np.full((1,) * y.rank, 1.0 + alpha), 0.0))
    second: Value | str = right
    if alpha != 1:
        second = draft.between(right.shape)
        scale = np.full((1,) * right.rank, float(alpha))
        draft.node("Affine", [right], [second], affine=Affine.of(scale, 0.0))
    return draft.node(op, [left, second], [y])


def _affine(draft: Draft, call: Call, x: Value, affine: Affine | None) -> None:
    """Draw an affine by a constant, unless that enlarges the value or is too much to hold."""
    y = call.made[0]
    aligned = canonical.align(affine, x.shape) if affine is not None and x.shape == y.shape else None
    _need(aligned is not None)
    if aligned is not None and aligned.is_identity:
        return draft.node("Identity", [x], [y])
    return draft.node("Affine", [x], [y], affine=aligned)


@lowering("neg")
def _neg(draft: Draft, call: Call, x: Value) -> None:
    _need(_computed(x), _floating(x))
    _affine(draft, call, x, Affine.of(-1.0, 0.0))


@lowering("addcmul")
def _addcmul(draft: Draft, call: Call, x: Any, tensor1: Any, tensor2: Any, value: Any) -> None:
    factor, other = (tensor1, tensor2) if _computed(tensor1) else (tensor2, tensor1)
    _need(_computed(factor), not _computed(other), not _computed(x), _floating(factor, call.made[0]))
    scale, shift = draft.array(other), draft.array(x)
    affine = None if scale is None or shift is None else Affine.of(scale * value, shift)
    _affine(draft, call, factor, affine)


# ---------------------------------------------------------------- what changes nothing, or only the type


@lowering("clone detach alias contiguous")
def _identity(draft: Draft, call: Call, x: Value, **rest: Any) -> None:
    _need(_computed(x))
    draft.node("Identity", [x], call.made[:1])


@lowering("_to_copy")
def _cast(draft: Draft, call: Call, x: Value, **rest: Any) -> None:
    y = call.made[0]
    _need(_computed(x), _floating(x, y))
    if x.dtype == y.dtype:
        return _identity(draft, call, x)
    return draft.node("Cast", [x], [y], lossless=y.dtype.itemsize > x.dtype.itemsize)


@lowering("dropout feature_dropout alpha_dropout feature_alpha_dropout")
def _dropout(draft: Draft, call: Call, x: Value, p: float, train: bool) -> None:
    _need(_computed(x), not train or p == 0)
    draft.node("Dropout", [x], call.made[:1])


# ---------------------------------------------------------------- data movement


@lowering("reshape view _unsafe_view flatten squeeze unsqueeze unflatten")
def _move(draft: Draft, call: Call, x: Value, **rest: Any) -> None:
    _need(_computed(x), call.made[0].dtype == x.dtype)
    draft.node("Reshape", [x], call.made[:1])


@lowering("permute transpose t")
def _permute(draft: Draft, call: Call, x: Value, dims: Any = None, dim0: int = 0, dim1: int = 1) -> None:
    _need(_computed(x))
    perm = list(range(x.rank))
    if dims is not None:
        perm = [d % x.rank for d in dims]
    elif x.rank > 1:
        perm[dim0], perm[dim1] = perm[dim1], perm[dim0]
    draft.node("Transpose", [x], call.made[:1], perm=tuple(perm))


@lowering("expand")
def _expand(draft: Draft, call: Call, x: Value, **rest: Any) -> None:
    _need(_computed(x))
    draft.node("Expand", [x], call.made[:1])


@lowering("repeat")
def _repeat(draft: Draft, call: Call, x: Value, repeats: Any) -> None:
    _need(_computed(x), _plain(repeats))
    source: Value | str = x
    if len(repeats) > x.rank:
        source = draft.between((1,) * (len(repeats) - x.rank) + x.shape)
        draft.node("Reshape", [x], [source])
    draft.node("Tile", [source], call.made[:1], repeats=tuple(repeats))


@lowering("cat stack")
def _concat(draft: Draft, call: Call, tensors: Any, dim: int) -> None:
    stacked, axis = call.label == "stack", dim % call.made[0].rank
    parts: Any = [t for t in tensors if stacked or t.shape != (0,)]
    _need(all(map(_computed, parts)), len({t.dtype for t in parts}) == 1)
    if stacked:
        raised = [draft.between((*t.shape[:axis], 1, *t.shape[axis:])) for t in parts]
        for tensor, value in zip(parts, raised, strict=True):
            draft.node("Unsqueeze", [tensor], [value])
        parts = raised
    draft.node("Concat", parts, call.made[:1], axis=axis)


@lowering("split split_with_sizes unsafe_split unsafe_split_with_sizes unbind")
def _split(draft: Draft, call: Call, x: Value, dim: int, **rest: Any) -> None:
    _need(_computed(x))
    axis, pieces = dim % x.rank, list[Any](call.made)
    if call.label == "unbind":
        shape = tuple(1 if place == axis else size for place, size in enumerate(x.shape))
        pieces = [draft.between(shape) for _ in call.made]
        sizes = (1,) * len(pieces)
    else:
        sizes = tuple(value.shape[axis] for value in call.made)
    draft.node("Split", [x], pieces, axis=axis, sizes=sizes)
    for piece, value in zip(pieces, call.made, strict=True):
        if piece is not value:
            draft.node("Squeeze", [piece], [value])


@lowering("slice")
def _slice(draft: Draft, call: Call, x: Value, dim: int, start: Any, end: Any, step: Any) -> None:
    _need(_computed(x), _plain(start, end, step))
    _take(draft, call, x, {dim % x.rank: slice(start, end, step)})


@lowering("flip")
def _flip(draft: Draft, call: Call, x: Value, dims: Any) -> None:
    _need(_computed(x))
    _take(draft, call, x, dict.fromkeys(_axes(dims, x.rank), slice(None, None, -1)))


def _take(draft: Draft, call: Call, x: Value, cuts: dict[int, slice]) -> None:
    slices = tuple(_settled(cuts.get(a, slice(None)), size) for a, size in enumerate(x.shape))
    draft.node("Slice", [x], call.made[:1], slices=slices)


def _settled(cut: slice, size: int) -> slice:
    settled = canonical.cut(cut.start, cut.stop, cut.step or 1, size)
    assert settled is not None
    return settled


def _gather(draft: Draft, x: Value, y: Value | str, axis: int, indices: Any) -> None:
    draft.node("Gather", [x], [y], axis=axis, indices=np.where(indices < 0, indices + x.shape[axis], indices))


@lowering("select")
def _select(draft: Draft, call: Call, x: Value, dim: int, index: Any) -> None:
    _need(_computed(x), _plain(index))
    _gather(draft, x, call.made[0], dim % x.rank, np.asarray(index))


@lowering("index_select")
def _index_select(draft: Draft, call: Call, x: Value, dim: int, index: Value) -> None:
    _need(_computed(x), index.rank == 1)
    if _computed(index):
        draft.node(f"{call.label} by index", [index], [])
        return draft.node("Select", [x], call.made[:1], axes=(dim % x.rank,))
    numbers = draft.array(index)
    _need(numbers is not None)
    return _gather(draft, x, call.made[0], dim % x.rank, np.asarray(numbers, np.int64))


@lowering("_pack_padded_sequence")
def _pack(draft: Draft, call: Call, x: Value, lengths: Value, batch_first: bool) -> None:
    """The steps of all sequences in a row, without those that only fill up the shorter ones."""
    _need(_computed(x), x.rank >= 2)
    steps = draft.between((x.shape[0] * x.shape[1], *x.shape[2:]))
    draft.node("Reshape", [x], [steps])
    draft.node("Select", [steps], call.made[:1], axes=(0,))
    draft.node(call.label, [lengths] if _computed(lengths) else [], call.made[1:])


@lowering("index")
def _index(draft: Draft, call: Call, x: Value, indices: Any) -> None:
    """`x[:, indices]`, with nothing else that selects."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    _need(len(given) == 1, given[0][1].dtype not in (torch.bool, torch.uint8))
    _index_select(draft, call, x, *given[0])


@lowering("roll")
def _roll(draft: Draft, call: Call, x: Value, shifts: Any, dims: Any) -> None:
    _need(_computed(x), dims, _plain(shifts, dims))
    source: Any = x
    for place, (shift, dim) in enumerate(zip(shifts, dims, strict=True)):
        target = call.made[0] if place == len(dims) - 1 else draft.between(x.shape)
        axis = dim % x.rank
        draft.node("Gather", [source], [target], axis=axis, indices=np.roll(np.arange(x.shape[axis]), shift))
        source = target


@lowering("im2col")
def _blocks(draft: Draft, call: Call, x: Value, **settings: Any) -> None:
    """`F.unfold`: what a kernel sees at each place, one column each. Zeros are padded first, then positions chosen."""
    y = call.made[0]
    _need(_computed(x), x.rank == 4, y.rank == 3, _plain(*settings.values()))
    kernel, dilation, padding, stride = (
        _each(settings[name], 2) for name in ("kernel_size", "dilation", "padding", "stride")
    )
    source: Value | str = x
    height, width = (size + 2 * pad for size, pad in zip(x.shape[2:], padding, strict=True))
    if any(padding):
        source = draft.between((*x.shape[:2], height, width))
        draft.node("Pad", [x], [source], axes=(2, 3), partial=reasons.PADS())
    starts = [
        np.arange(0, size - step * (taps - 1), stride_)
        for size, step, taps, stride_ in zip((height, width), dilation, kernel, stride, strict=True)
    ]
    taps = np.add.outer(
        np.arange(kernel[0]) * dilation[0] * width, np.arange(kernel[1]) * dilation[1]
    ).ravel()
    chosen = np.add.outer(taps, np.add.outer(starts[0] * width, starts[1]).ravel()).ravel()
    flat, seen = draft.between((*x.shape[:2], height * width)), draft.between((*x.shape[:2], chosen.size))
    draft.node("Reshape", [source], [flat])
    draft.node("Gather", [flat], [seen], axis=2, indices=chosen)
    draft.node("Reshape", [seen], [y])


@lowering("unfold")
def _slide(draft: Draft, call: Call, x: Value, dimension: int, size: int, step: int) -> None:
    """`Tensor.unfold`: the windows of one axis, with an axis for them and a last one for their elements."""
    _need(_computed(x), x.rank, _plain(dimension, size, step))
    y, axis = call.made[0], dimension % x.rank
    windows = np.add.outer(np.arange(y.shape[axis]) * step, np.arange(size))
    seen = draft.between((*x.shape[:axis], *windows.shape, *x.shape[axis + 1 :]))
    draft.node("Gather", [x], [seen], axis=axis, indices=windows)
    perm = [place for place in range(x.rank + 1) if place != axis + 1]
    draft.node("Transpose", [seen], [y], perm=(*perm, axis + 1))


@lowering("pixel_shuffle pixel_unshuffle")
def _pixels(draft: Draft, call: Call, x: Value, **factor: int) -> None:
    _need(_computed(x), x.rank == 4)
    op = "DepthToSpace" if call.label == "pixel_shuffle" else "SpaceToDepth"
    draft.node(op, [x], call.made[:1], blocksize=next(iter(factor.values())), mode="CRD")


@lowering("channel_shuffle native_channel_shuffle")
def _channel_shuffle(draft: Draft, call: Call, x: Value, groups: int) -> None:
    _need(_computed(x), x.rank >= 3)
    _gather(draft, x, call.made[0], 1, np.arange(x.shape[1]).reshape(groups, -1).T.ravel())


# ---------------------------------------------------------------- pooling, means, resizing, padding


def _spatial(call: Call, x: Value) -> tuple[int, ...]:
    return tuple(range(x.rank - next(int(c) for c in call.label if c.isdigit()), x.rank))


@lowering("avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d")
def _average(draft: Draft, call: Call, x: Value, **rest: Any) -> None:
    _need(_computed(x))
    axes = _spatial(call, x)
    if "kernel_size" not in rest:
        return draft.node("AveragePool", [x], call.made[:1], axes=axes, keepdims=True, window=None)
    _need(_plain(*rest.values()))
    kernel, pads = _each(rest["kernel_size"], len(axes)), _each(rest["padding"], len(axes))
    strides = _each(rest["stride"] or kernel, len(axes))
    window = Window(kernel, strides, (1,) * len(axes), tuple((pad, pad) for pad in pads))
    divisor, ceils = rest.get("divisor_override"), rest["ceil_mode"]
    options = canonical.pooling(window, axes[0], rest["count_include_pad"], bool(divisor), ceils)
    return draft.node("AveragePool", [x], call.made[:1], **options)


@lowering("max_pool1d max_pool2d max_pool3d")
def _maximum(draft: Draft, call: Call, x: Value, **rest: Any) -> None:
    _need(_computed(x))
    draft.node("MaxPool", [x], call.made[:1], axes=_spatial(call, x), keepdims=True)


@lowering(
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices max_pool3d_with_indices"
)
def _indexed_maximum(draft: Draft, call: Call, x: Value, **rest: Any) -> None:
    _need(_computed(x))
    draft.node("MaxPool", [x], call.made[:1], axes=_spatial(call, x), keepdims=True)
    draft.node("ArgMax", [x], call.made[1:])


@lowering("maximum minimum fmax fmin")
def _compare(draft: Draft, call: Call, x: Value, other: Value) -> None:
    """The larger or the smaller of two, element by element."""
    y = call.made[0]
    _need(_computed(x), _computed(other), x is not other, _floating(x, other, y), x.dtype == other.dtype)
    draft.node("Max" if "max" in call.label else "Min", [x, other], [y])


_REDUCTIONS = {
    "mean": "ReduceMean",
    "sum": "ReduceSum",
    "amax": "ReduceMax",
    "max": "ReduceMax",
    "amin": "ReduceMin",
    "min": "ReduceMin",
}


@lowering(" ".join(_REDUCTIONS))
def _reduce(draft: Draft, call: Call, x: Value, dim: Any = None, keepdim: Any = False, **rest: Any) -> None:
    y = call.made[0]
    if "other" in rest:
        return _compare(draft, call, x, rest["other"])
    whole = dim is None and call.label in ("max", "min")
    _need(_computed(x), _floating(x, y), x.dtype == y.dtype, _plain(dim), not whole)
    axes = _axes((dim,) if isinstance(dim, int) else dim, x.rank)
    draft.node(_REDUCTIONS[call.label], [x], [y], axes=axes, keepdims=bool(keepdim))
    if len(call.made) > 1:
        draft.node("ArgMax", [x], call.made[1:])
    return None


@lowering("linalg_vector_norm")
def _vector_norm(
    draft: Draft,
    call: Call,
    x: Value,
    ord: Any = 2,  # noqa: A002 its name in the schema
    dim: Any = None,
    keepdim: Any = False,
    **rest: Any,
) -> None:
    y = call.made[0]
    _need(_computed(x), _floating(x, y), x.dtype == y.dtype, _plain(ord, dim), ord in (1, 2))
    axes = _axes((dim,) if isinstance(dim, int) else dim, x.rank)
    draft.node("ReduceL1" if ord == 1 else "ReduceL2", [x], [y], axes=axes, keepdims=bool(keepdim))


_ACTIVATIONS = {
    "relu": "Relu",
    "leaky_relu": "LeakyRelu",
    "rrelu": "LeakyRelu",
    "prelu": "PRelu",
    "_prelu_kernel": "PRelu",
    "abs": "Abs",
}


@lowering(" ".join(_ACTIVATIONS))
def _activate(
    draft: Draft, call: Call, x: Value, weight: Any = None, training: Any = False, **rest: Any
) -> None:
    _need(_computed(x), _floating(x), not training, weight is None or not weight.data)
    draft.node(_ACTIVATIONS[call.label], [x], call.made[:1])


@lowering(
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
def _resize(draft: Draft, call: Call, x: Value, **rest: Any) -> None:
    _need(_computed(x), _floating(x))
    draft.node("Resize", [x], call.made[:1], axes=tuple(range(2, x.rank)))


_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
"""Modules whose amounts are settings, those of the ZeroPad modules among them."""


@lowering("pad constant_pad_nd")
def _pad(draft: Draft, call: Call, x: Value, pad: Any, mode: str = "constant", value: Any = None) -> None:
    _need(_computed(x), _plain(pad, value))
    pairs = {x.rank - 1 - i: pad[2 * i : 2 * i + 2] for i in range(len(pad) // 2)}
    crop = None
    if all(amount <= 0 for amount in pad):
        cuts = {a: slice(-p, x.shape[a] + q) for a, (p, q) in pairs.items() if p or q}
        if mode != "constant" or isinstance(call.frame.module, _CONSTANT_PADS):
            return _take(draft, call, x, cuts)
        crop = pad, tuple(_settled(cuts.get(axis, slice(None)), n) for axis, n in enumerate(x.shape))
    else:
        _need(mode != "constant" or not value)
    axes = tuple(sorted(axis for axis, pair in pairs.items() if any(pair) or crop is not None))
    name = "pad" if mode == "constant" and value else "Pad"
    partial = reasons.PADS() if mode == "constant" else ""
    return draft.node(name, [x], call.made[:1], axes=axes, partial=partial, crop=crop)
