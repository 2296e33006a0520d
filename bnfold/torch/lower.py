"""One row per torch function: how a recorded call is drawn as nodes in the vocabulary of `graph`.

A row is given the call's arguments by name, with `Value` in the place of each tensor, and a `Draft` that takes nodes.
It returns whether it has drawn the call; where it has not (another dtype, a tensor among the settings), and for every
function without a row, the call becomes an opaque node, through which nothing travels.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from bnfold.algebra import Affine, Array, Linear
from bnfold.torch.capture import Call, Listed, Value
from bnfold.torch.functions import getter, variants

__all__ = ["ROWS", "Draft", "draw"]


class Draft(Protocol):
    """What a row may ask for and do."""

    def node(
        self,
        op: str,
        inputs: Sequence[Value | str],
        outputs: Sequence[Value | str],
        affine: Affine | None = None,
        **attributes: Any,
    ) -> None:
        """Draw one node."""

    def linear(self, op: str, x: Value, y: Value, weight: Value, bias: Value | None, linear: Linear) -> None:
        """Draw a linear operator, with the values that are its weight and bias."""

    def batchnorm(self, x: Value, y: Value, statistics: Statistics, eps: float, reason: str) -> None:
        """Draw a BatchNorm; `reason` is why it cannot be moved, or empty."""

    def between(self, shape: Sequence[int]) -> str:
        """Name a value between two nodes of one call."""
        ...

    def array(self, constant: Any) -> Array | None:
        """The numbers of a constant; None where it is none, or cannot be computed."""


Statistics = dict[str, Value | None]
"""What `F.batch_norm` is given, by the names of its arguments."""

Rows = dict[Any, tuple["_Signature", Callable[..., bool]]]


_SYNONYMS = {
    "input": "x",
    "self": "x",
    "axis": "dim",
    "keepdims": "keepdim",
    "axis0": "dim0",
    "axis1": "dim1",
}


class _Signature:
    """The names of a function's arguments, with defaults: ``"x dim=0"``; ``*dims`` takes all that follow."""

    def __init__(self, text: str) -> None:
        self.names: list[str] = []
        self.defaults: dict[str, Any] = {}
        self.rest = ""
        for part in text.split():
            name, _, default = part.partition("=")
            if name.startswith("*"):
                self.rest = name = name[1:]
            self.names.append(name)
            if default:
                self.defaults[name] = ast.literal_eval(default)

    def bind(self, call: Call) -> dict[str, Any] | None:
        """The arguments by name; None where they are others than these."""
        args, found = list(call.args), dict(self.defaults)
        if self.rest:
            place = self.names.index(self.rest)
            many = args[place:]
            if many:
                args[place:] = [many[0] if len(many) == 1 and isinstance(many[0], tuple) else tuple(many)]
        kwargs = {_SYNONYMS.get(name, name): thing for name, thing in call.kwargs.items()}
        if len(args) > len(self.names) or any(name not in self.names for name in kwargs):
            return None
        found.update(zip(self.names, args, strict=False))
        found.update(kwargs)
        return found if all(name in found for name in self.names) else None


ROWS: Rows = {}
"""Every function that can be drawn, with the names of its arguments and its row."""


def row(names: str, arguments: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Register a row for every variant of some functions."""

    def register(draw: Callable[..., bool]) -> Callable[..., bool]:
        for name in names.split():
            found = [getter(name)] if name in ("T", "mT", "data") else list(variants(name))
            found += _overloads(name)
            ROWS.update((function, (_Signature(arguments), draw)) for function in found)
        return draw

    return register


_REORDERED = ("embedding", "batch_norm", "instance_norm")


def _overloads(name: str) -> list[Any]:
    """The operators of this name that exported programs and compiled code call."""
    packets = (
        getattr(torch.ops.aten, spelled, None) for spelled in (name, f"{name}_") if name not in _REORDERED
    )
    return [getattr(p, each) for p in packets if p is not None for each in p.overloads() if "out" not in each]


def draw(draft: Draft, call: Call) -> bool:
    """Draw a call by its row; False where there is none for it."""
    try:
        found = ROWS.get(call.function)
    except TypeError:
        return False
    if found is None or not call.made or not all(value.data or not value.constant for value in call.made):
        return False
    arguments = found[0].bind(call)
    return arguments is not None and found[1](draft, call, **arguments)


# ---------------------------------------------------------------- small questions


def _computed(value: Any) -> bool:
    return isinstance(value, Value) and not value.constant


def _floating(*values: Value) -> bool:
    return all(value.dtype.is_floating_point for value in values)


def _axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _axes(axes: Any, rank: int) -> tuple[int, ...]:
    """Axes as a sorted tuple of numbers that are not negative; None and () are all of them."""
    if axes is None or axes == ():
        return tuple(range(rank))
    return tuple(sorted(_axis(a, rank) for a in (axes if isinstance(axes, tuple) else (axes,))))


def _tuple(setting: Any, count: int) -> tuple[Any, ...]:
    if isinstance(setting, tuple):
        return setting * count if len(setting) == 1 else setting
    return (setting,) * count


def _plain(thing: Any) -> bool:
    """Whether a setting is numbers only."""
    if isinstance(thing, tuple):
        return all(_plain(part) for part in thing)
    return isinstance(thing, int | float | str | np.ndarray | type(None))


# ---------------------------------------------------------------- linear operators


@row("conv1d conv2d conv3d", "x weight bias=None stride=1 padding=0 dilation=1 groups=1")
def _conv(draft: Draft, call: Call, x: Value, weight: Value, bias: Value | None, **settings: Any) -> bool:
    spatial, y = weight.rank - 2, call.made[0]
    if not _computed(x) or not _plain(tuple(settings.values())) or not _floating(x, y):
        return False
    kernel, axis, groups = weight.shape[2:], x.rank - spatial - 1, settings["groups"]
    stride, dilation = _tuple(settings["stride"], spatial), _tuple(settings["dilation"], spatial)
    pads = _paddings(settings["padding"], kernel, dilation)
    centred = all(s == 1 for s in stride) and all(
        a == b == d * (k // 2) and k % 2 for (a, b), k, d in zip(pads, kernel, dilation, strict=True)
    )
    same = weight.shape[0] == x.shape[axis]
    linear = Linear(
        order="oi",
        inputs=x.shape[axis],
        outputs=weight.shape[0],
        in_axis=axis,
        out_axis=axis,
        groups=groups,
        centre=tuple(k // 2 for k in kernel) if centred and same else None,
        partial="it pads with zeros" if any(a or b for a, b in pads) else "",
    )
    draft.linear("Conv", x, y, weight, bias, linear)
    return True


def _paddings(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """How much a convolution pads, before and after, along each axis."""
    if padding == "same":
        return [
            ((d * (k - 1)) // 2, d * (k - 1) - (d * (k - 1)) // 2)
            for k, d in zip(kernel, dilation, strict=True)
        ]
    return [(p, p) for p in _tuple(0 if padding == "valid" else padding, len(kernel))]


@row(
    "conv_transpose1d conv_transpose2d conv_transpose3d",
    "x weight bias=None stride=1 padding=0 output_padding=0 groups=1 dilation=1",
)
def _conv_transpose(
    draft: Draft, call: Call, x: Value, weight: Value, bias: Value | None, **settings: Any
) -> bool:
    spatial, y = weight.rank - 2, call.made[0]
    if not _computed(x) or not _plain(tuple(settings.values())) or not _floating(x, y):
        return False
    axis = x.rank - spatial - 1
    whole = prod(weight.shape[2:]) == 1 and not any(np.ravel(settings["padding"]))
    whole = (
        whole and set(np.ravel(settings["stride"])) == {1} and not any(np.ravel(settings["output_padding"]))
    )
    linear = Linear(
        order="io",
        inputs=x.shape[axis],
        outputs=weight.shape[1] * settings["groups"],
        in_axis=axis,
        out_axis=axis,
        groups=settings["groups"],
        partial="" if whole else "not every output of it sums every tap",
    )
    draft.linear("ConvTranspose", x, y, weight, bias, linear)
    return True


@row("linear", "x weight bias=None")
def _matrix(draft: Draft, call: Call, x: Value, weight: Value, bias: Value | None) -> bool:
    if not _computed(x) or weight.rank != 2 or not _floating(x, call.made[0]):
        return False
    outputs, inputs = weight.shape
    return _product(draft, call, x, weight, bias, ("oi", inputs, outputs, x.rank - 1))


def _product(
    draft: Draft,
    call: Call,
    x: Value,
    weight: Value,
    bias: Value | None,
    form: tuple[str, int, int, int],
    biasless: str = "",
) -> bool:
    order, inputs, outputs, axis = form
    centre = () if inputs == outputs else None
    linear = Linear(order, inputs, outputs, axis, axis, centre=centre, biasless=biasless)
    draft.linear("Gemm" if x.rank == 2 else "MatMul", x, call.made[0], weight, bias, linear)
    return True


@row("matmul mm", "x other")
def _matmul(draft: Draft, call: Call, x: Any, other: Any) -> bool:
    return _multiply(draft, call, x, other)


@row("rmatmul", "other x")
def _rmatmul(draft: Draft, call: Call, x: Any, other: Any) -> bool:
    return _multiply(draft, call, x, other)


def _multiply(draft: Draft, call: Call, left: Any, right: Any) -> bool:
    if not isinstance(left, Value) or not isinstance(right, Value) or not _floating(left, right):
        return False
    bare = "it is a matrix product without a bias"
    if _computed(left) and right.rank == 2 and not right.data:
        inputs, outputs = right.shape
        return _product(draft, call, left, right, None, ("io", inputs, outputs, left.rank - 1), bare)
    if _computed(right) and left.rank == 2 and right.rank >= 2 and not left.data:
        outputs, inputs = left.shape
        return _product(draft, call, right, left, None, ("oi", inputs, outputs, right.rank - 2), bare)
    return False


@row("addmm", "x mat1 mat2 beta=1 alpha=1")
def _addmm(draft: Draft, call: Call, x: Value, mat1: Value, mat2: Value, beta: Any, alpha: Any) -> bool:
    if not (_computed(mat1) and x.constant and mat2.rank == 2 and not mat2.data and beta == alpha == 1):
        return False
    inputs, outputs = mat2.shape
    return x.shape == (outputs,) and _product(draft, call, mat1, mat2, x, ("io", inputs, outputs, 1))


@row(
    "embedding", "x weight padding_idx=None max_norm=None norm_type=2.0 scale_grad_by_freq=False sparse=False"
)
def _embedding(draft: Draft, call: Call, x: Value, weight: Value, max_norm: Any, **rest: Any) -> bool:
    if not _computed(x) or max_norm is not None or weight.data or weight.rank != 2:
        return False
    rows, width = weight.shape
    sealed = "it looks rows up, by whole numbers"
    linear = Linear("io", rows, width, 0, x.rank, sealed=sealed)
    draft.linear("Embedding", x, call.made[0], weight, None, linear)
    return True


_function: Any
for _function in (torch.embedding, torch._VF.embedding, torch.ops.aten.embedding.default):
    _others = "padding_idx=-1 scale_grad_by_freq=False sparse=False max_norm=None"
    ROWS[_function] = _Signature(f"weight x {_others}"), _embedding


# ---------------------------------------------------------------- normalisation


@row(
    "batch_norm",
    "x running_mean running_var weight=None bias=None training=False momentum=0.1 eps=1e-05 cudnn_enabled=True",
)
def _batch_norm(draft: Draft, call: Call, x: Value, training: Any, eps: float, **rest: Any) -> bool:
    statistics = {name: rest[name] for name in ("running_mean", "running_var", "weight", "bias")}
    return _normalise(draft, call, x, statistics, bool(training), eps)


@row(
    "instance_norm",
    "x running_mean=None running_var=None weight=None bias=None use_input_stats=True momentum=0.1 eps=1e-05",
)
def _instance_norm(draft: Draft, call: Call, x: Value, use_input_stats: Any, eps: float, **rest: Any) -> bool:
    statistics = {name: rest[name] for name in ("running_mean", "running_var", "weight", "bias")}
    if statistics["running_mean"] is None:
        return False
    return _normalise(draft, call, x, statistics, bool(use_input_stats), eps)


_ORDER = "x weight bias running_mean running_var"
for _function in (torch.batch_norm, torch._VF.batch_norm, torch.ops.aten.batch_norm.default):
    ROWS[_function] = _Signature(f"{_ORDER} training momentum eps cudnn_enabled"), _batch_norm
for _function in (torch.instance_norm, torch._VF.instance_norm, torch.ops.aten.instance_norm.default):
    ROWS[_function] = _Signature(f"{_ORDER} use_input_stats momentum eps cudnn_enabled"), _instance_norm


@row("native_batch_norm _native_batch_norm_legit", f"{_ORDER} training momentum eps")
def _native_batch_norm(draft: Draft, call: Call, **rest: Any) -> bool:
    return _batch_norm(draft, call, **rest)


@row("_native_batch_norm_legit_no_training", f"{_ORDER} momentum eps")
def _inferred_batch_norm(draft: Draft, call: Call, **rest: Any) -> bool:
    return _batch_norm(draft, call, training=False, **rest)


def _normalise(
    draft: Draft, call: Call, x: Value, statistics: Statistics, training: bool, eps: float
) -> bool:
    if not _computed(x) or x.rank < 2:
        return False
    tracked = statistics["running_mean"] is not None and statistics["running_var"] is not None
    reason = ""
    if not tracked:
        reason = "it keeps no running statistics and normalises by the batch even in eval (track_running_stats=False)"
    elif training:
        reason = "it is in training mode and would normalise by the batch; call model.eval() first"
    draft.batchnorm(x, call.made[0], statistics, eps, reason)
    return True


# ---------------------------------------------------------------- arithmetic


@row("add radd", "x other alpha=1")
def _add(draft: Draft, call: Call, x: Any, other: Any, alpha: Any) -> bool:
    return _combine(draft, call, "Add", x, other, alpha)


@row("sub subtract", "x other alpha=1")
def _sub(draft: Draft, call: Call, x: Any, other: Any, alpha: Any) -> bool:
    return _combine(draft, call, "Sub", x, other, alpha)


@row("rsub", "other x alpha=1")
def _rsub(draft: Draft, call: Call, x: Any, other: Any, alpha: Any) -> bool:
    return alpha == 1 and _combine(draft, call, "Sub", x, other, 1)


@row("mul multiply rmul", "x other")
def _mul(draft: Draft, call: Call, x: Any, other: Any) -> bool:
    return _combine(draft, call, "Mul", x, other, 1)


@row("div divide true_divide truediv", "x other")
def _div(draft: Draft, call: Call, x: Any, other: Any) -> bool:
    return _combine(draft, call, "Div", x, other, 1)


@row("rtruediv", "other x")
def _rtruediv(draft: Draft, call: Call, x: Any, other: Any) -> bool:
    return _combine(draft, call, "Div", x, other, 1)


@row("neg negative", "x")
def _neg(draft: Draft, call: Call, x: Value) -> bool:
    return _combine(draft, call, "Mul", x, -1.0, 1)


@row("addcmul", "x tensor1 tensor2 value=1")
def _addcmul(draft: Draft, call: Call, x: Any, tensor1: Any, tensor2: Any, value: Any) -> bool:
    factor, other = (tensor1, tensor2) if _computed(tensor1) else (tensor2, tensor1)
    if not _computed(factor) or _computed(other) or _computed(x) or not _floating(factor, call.made[0]):
        return False
    scale, shift = draft.array(other), draft.array(x)
    return scale is not None and shift is not None and _affine(draft, call, factor, scale * value, shift)


def _combine(draft: Draft, call: Call, op: str, left: Any, right: Any, alpha: Any) -> bool:
    """`left op alpha right`, where either may be constant."""
    y = call.made[0]
    if not _plain(alpha) or not _floating(y) or not _floating(*(v for v in (left, right) if _computed(v))):
        return False
    if _computed(left) and _computed(right):
        return _combine_computed(draft, op, left, right, alpha, y)
    x, constant = (left, right) if _computed(left) else (right, left)
    numbers = draft.array(constant)
    if not _computed(x) or numbers is None:
        return False
    form = _affine_of(op, numbers, x is left, float(alpha))
    return form is not None and _affine(draft, call, x, *form)


def _combine_computed(draft: Draft, op: str, left: Value, right: Value, alpha: Any, y: Value) -> bool:
    if left is right:
        if op != "Add":
            return False
        draft.node("Affine", [left], [y], affine=Affine.of(np.full((1,) * y.rank, 1.0 + alpha), 0.0))
        return True
    second: Value | str = right
    if alpha != 1:
        second = draft.between(right.shape)
        draft.node(
            "Affine", [right], [second], affine=Affine.of(np.full((1,) * right.rank, float(alpha)), 0.0)
        )
    draft.node(op, [left, second], [y])
    return True


def _affine_of(
    op: str, numbers: Array, first: bool, alpha: float
) -> tuple[npt.ArrayLike, npt.ArrayLike] | None:
    """Scale and shift of `x op alpha c` (where x is first) or `c op alpha x`."""
    with np.errstate(all="ignore"):
        if op == "Mul":
            return numbers, 0.0
        if op == "Div":
            return (1.0 / numbers, 0.0) if first else None
        sign = alpha if op == "Add" else -alpha
        return (1.0, sign * numbers) if first else (sign, numbers)


def _affine(draft: Draft, call: Call, x: Value, scale: npt.ArrayLike, shift: npt.ArrayLike) -> bool:
    """Draw `scale x + shift`, unless that enlarges the value or is too much to hold."""
    y, affine = call.made[0], Affine.of(scale, shift)
    rank = affine.scale.ndim
    if rank > x.rank or x.shape != y.shape or affine.scale.size > 1 << 22 or not affine.is_finite:
        return False
    shape = (1,) * (x.rank - rank) + affine.scale.shape
    affine = Affine(affine.scale.reshape(shape), affine.shift.reshape(shape)).collapse()
    draft.node(
        "Identity" if affine.is_identity else "Affine",
        [x],
        [y],
        affine=None if affine.is_identity else affine,
    )
    return True


# ---------------------------------------------------------------- what changes nothing, or only the type


_SETTINGS = "x *rest=() dtype=None device=None non_blocking=False copy=False memory_format=None"


@row(
    "contiguous clone detach positive resolve_conj resolve_neg alias requires_grad_ cpu cuda data", _SETTINGS
)
def _identity(draft: Draft, call: Call, x: Value, **settings: Any) -> bool:
    draft.node("Identity", [x], call.made[:1])
    return _computed(x)


@row("to type type_as float double half bfloat16", _SETTINGS)
def _cast(draft: Draft, call: Call, x: Value, **settings: Any) -> bool:
    y = call.made[0]
    if not _computed(x) or not _floating(x, y):
        return False
    if x.dtype == y.dtype:
        return _identity(draft, call, x)
    draft.node("Cast", [x], [y], lossless=y.dtype.itemsize > x.dtype.itemsize)
    return True


@row(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout",
    "x p=0.5 training=True inplace=False",
)
def _dropout(draft: Draft, call: Call, x: Value, p: Any, training: Any, inplace: Any) -> bool:
    if not _computed(x) or (training and p != 0):
        return False
    draft.node("Dropout", [x], call.made[:1])
    return True


# ---------------------------------------------------------------- data movement


@row("reshape view", "x *shape")
def _reshape(draft: Draft, call: Call, x: Value, shape: Any) -> bool:
    return call.made[0].dtype == x.dtype and _move(draft, call, x)


@row("view_as reshape_as", "x other")
def _reshape_as(draft: Draft, call: Call, x: Value, other: Any) -> bool:
    return _move(draft, call, x)


@row("flatten", "x start_dim=0 end_dim=-1")
def _flatten(draft: Draft, call: Call, x: Value, start_dim: Any, end_dim: Any) -> bool:
    return _move(draft, call, x)


@row("squeeze", "x *dim=()")
def _squeeze(draft: Draft, call: Call, x: Value, dim: Any) -> bool:
    return _move(draft, call, x)


@row("unsqueeze", "x dim")
def _unsqueeze(draft: Draft, call: Call, x: Value, dim: Any) -> bool:
    return _move(draft, call, x)


@row("unflatten", "x dim sizes")
def _unflatten(draft: Draft, call: Call, x: Value, dim: Any, sizes: Any) -> bool:
    return _move(draft, call, x)


def _move(draft: Draft, call: Call, x: Value) -> bool:
    if _computed(x):
        draft.node("Reshape", [x], call.made[:1])
    return _computed(x)


@row("permute", "x *dims")
def _permute(draft: Draft, call: Call, x: Value, dims: Any) -> bool:
    return _transpose_to(draft, call, x, [_axis(d, x.rank) for d in dims])


@row("transpose swapaxes swapdims", "x dim0 dim1")
def _transpose(draft: Draft, call: Call, x: Value, dim0: int, dim1: int) -> bool:
    perm = list(range(x.rank))
    a, b = _axis(dim0, x.rank), _axis(dim1, x.rank)
    perm[a], perm[b] = b, a
    return _transpose_to(draft, call, x, perm)


@row("t T", "x")
def _reverse(draft: Draft, call: Call, x: Value) -> bool:
    return _transpose_to(draft, call, x, list(range(x.rank))[::-1])


@row("mT", "x")
def _matrix_transpose(draft: Draft, call: Call, x: Value) -> bool:
    return _transpose(draft, call, x, -1, -2)


@row("movedim moveaxis", "x source destination")
def _movedim(draft: Draft, call: Call, x: Value, source: Any, destination: Any) -> bool:
    marked = np.lib.stride_tricks.as_strided(np.zeros(1), range(x.rank), [0] * x.rank)
    return _transpose_to(draft, call, x, list(np.moveaxis(marked, source, destination).shape))


def _transpose_to(draft: Draft, call: Call, x: Value, perm: list[int]) -> bool:
    if _computed(x):
        draft.node("Transpose", [x], call.made[:1], perm=tuple(perm))
    return _computed(x)


@row("expand", "x *sizes implicit=False")
def _expand(draft: Draft, call: Call, x: Value, sizes: Any, implicit: Any) -> bool:
    return _stretch(draft, call, x)


@row("broadcast_to", "x size")
def _broadcast_to(draft: Draft, call: Call, x: Value, size: Any) -> bool:
    return _stretch(draft, call, x)


@row("expand_as", "x other")
def _expand_as(draft: Draft, call: Call, x: Value, other: Any) -> bool:
    return _stretch(draft, call, x)


def _stretch(draft: Draft, call: Call, x: Value) -> bool:
    if _computed(x):
        draft.node("Expand", [x], call.made[:1])
    return _computed(x)


@row("repeat tile", "x *repeats")
def _repeat(draft: Draft, call: Call, x: Value, repeats: Any) -> bool:
    if not _computed(x) or not _plain(repeats):
        return False
    source: Value | str = x
    rank = max(x.rank, len(repeats))
    if rank > x.rank:
        source = draft.between((1,) * (rank - x.rank) + x.shape)
        draft.node("Reshape", [x], [source])
    draft.node("Tile", [source], call.made[:1], repeats=(1,) * (rank - len(repeats)) + tuple(repeats))
    return True


@row("cat concat concatenate", "tensors dim=0")
def _concat(draft: Draft, call: Call, tensors: Any, dim: int) -> bool:
    tensors = tuple(t for t in tensors if t.shape != (0,))
    if not all(_computed(t) for t in tensors) or len({t.dtype for t in tensors}) > 1:
        return False
    draft.node("Concat", tensors, call.made[:1], axis=_axis(dim, call.made[0].rank))
    return True


@row("stack", "tensors dim=0")
def _stack(draft: Draft, call: Call, tensors: Any, dim: int) -> bool:
    if not all(_computed(t) for t in tensors) or len({t.dtype for t in tensors}) > 1:
        return False
    axis = _axis(dim, call.made[0].rank)
    shape = (*tensors[0].shape[:axis], 1, *tensors[0].shape[axis:])
    raised = [draft.between(shape) for _ in tensors]
    for tensor, value in zip(tensors, raised, strict=True):
        draft.node("Unsqueeze", [tensor], [value])
    draft.node("Concat", raised, call.made[:1], axis=axis)
    return True


@row("chunk tensor_split unsafe_chunk", "x chunks dim=0")
def _chunk(draft: Draft, call: Call, x: Value, chunks: Any, dim: int) -> bool:
    return _cut(draft, call, x, dim)


@row("split split_with_sizes unsafe_split", "tensor split_size_or_sections dim=0")
def _split(draft: Draft, call: Call, tensor: Value, split_size_or_sections: Any, dim: int) -> bool:
    return _cut(draft, call, tensor, dim)


def _cut(draft: Draft, call: Call, x: Value, dim: int) -> bool:
    axis = _axis(dim, x.rank)
    if _computed(x):
        draft.node("Split", [x], call.made, axis=axis, sizes=tuple(value.shape[axis] for value in call.made))
    return _computed(x)


@row("unbind", "x dim=0")
def _unbind(draft: Draft, call: Call, x: Value, dim: int) -> bool:
    if not _computed(x):
        return False
    axis = _axis(dim, x.rank)
    shape = tuple(1 if place == axis else size for place, size in enumerate(x.shape))
    pieces = [draft.between(shape) for _ in call.made]
    draft.node("Split", [x], pieces, axis=axis, sizes=(1,) * len(pieces))
    for piece, value in zip(pieces, call.made, strict=True):
        draft.node("Squeeze", [piece], [value])
    return True


@row("slice", "x dim=0 start=None end=None step=1")
def _slice(draft: Draft, call: Call, x: Value, dim: int, start: Any, end: Any, step: Any) -> bool:
    if not _computed(x) or not _plain((start, end, step)):
        return False
    return _take(draft, x, call.made[0], {_axis(dim, x.rank): slice(start, end, step)})


@row("narrow", "x dim start length")
def _narrow(draft: Draft, call: Call, x: Value, dim: int, start: Any, length: Any) -> bool:
    if not _computed(x) or not _plain((start, length)):
        return False
    axis = _axis(dim, x.rank)
    start = _axis(start, x.shape[axis])
    return _take(draft, x, call.made[0], {axis: slice(start, start + length)})


@row("flip", "x *dims")
def _flip(draft: Draft, call: Call, x: Value, dims: Any) -> bool:
    if not _computed(x):
        return False
    return _take(draft, x, call.made[0], {axis: slice(None, None, -1) for axis in _axes(dims, x.rank)})


def _take(draft: Draft, x: Value, y: Value | str, cuts: dict[int, slice]) -> bool:
    draft.node(
        "Slice",
        [x],
        [y],
        slices=tuple(_settled(cuts.get(a, slice(None)), size) for a, size in enumerate(x.shape)),
    )
    return True


def _settled(cut: slice, size: int) -> slice:
    """The same slice with bounds that are not negative; all of an axis is `slice(None)`."""
    start, stop, step = cut.indices(size)
    if (start, stop, step) == (0, size, 1):
        return slice(None)
    if step < 0:
        return slice(start if cut.start is not None else None, stop if stop >= 0 else None, step)
    return slice(start, max(start, stop), step)


@row("select", "x dim index")
def _select(draft: Draft, call: Call, x: Value, dim: int, index: Any) -> bool:
    if not _computed(x) or not _plain(index):
        return False
    axis = _axis(dim, x.rank)
    draft.node("Gather", [x], call.made[:1], axis=axis, indices=np.asarray(_axis(index, x.shape[axis])))
    return True


@row("index_select", "x dim index")
def _index_select(draft: Draft, call: Call, x: Value, dim: int, index: Any) -> bool:
    return _gather(draft, x, call.made[0], _axis(dim, x.rank), index)


def _gather(
    draft: Draft, x: Value, y: Value, axis: int, index: Any, cuts: dict[int, slice] | None = None
) -> bool:
    numbers = (
        np.asarray(index) if isinstance(index, tuple) else None if _computed(index) else draft.array(index)
    )
    if not _computed(x) or numbers is None or numbers.ndim != 1:
        return False
    target: Value | str = y
    rest = {a: cut for a, cut in (cuts or {}).items() if cut != slice(None)}
    shape = (*x.shape[:axis], numbers.size, *x.shape[axis + 1 :])
    if rest:
        target = draft.between(shape)
    places = numbers.astype(np.int64)
    draft.node(
        "Gather", [x], [target], axis=axis, indices=np.where(places < 0, places + x.shape[axis], places)
    )
    if rest:
        draft.node(
            "Slice",
            [target],
            [y],
            slices=tuple(_settled(rest.get(a, slice(None)), n) for a, n in enumerate(shape)),
        )
    return True


@row("roll", "x shifts dims=None")
def _roll(draft: Draft, call: Call, x: Value, shifts: Any, dims: Any) -> bool:
    if not _computed(x) or dims is None or not _plain((shifts, dims)):
        return False
    shifts, dims = _tuple(shifts, 1), _tuple(dims, 1)
    source: Value | str = x
    for place, (shift, dim) in enumerate(zip(shifts, dims, strict=True)):
        axis = _axis(dim, x.rank)
        target = call.made[0] if place == len(dims) - 1 else draft.between(x.shape)
        indices = np.roll(np.arange(x.shape[axis]), shift)
        draft.node("Gather", [source], [target], axis=axis, indices=indices)
        source = target
    return True


@row("getitem", "x index")
def _getitem(draft: Draft, call: Call, x: Value, index: Any) -> bool:
    if not _computed(x):
        return False
    parts = list(index) if isinstance(index, tuple) and not isinstance(index, Listed) else [index]
    arrays = [part for part in parts if isinstance(part, Value | tuple)]
    if len(arrays) == 1:
        return _getitem_array(draft, call, x, parts)
    if not all(part is None or part is Ellipsis or _is_cut(part) for part in parts):
        return False
    return _getitem_basic(draft, x, call.made[0], parts)


def _is_cut(part: Any) -> bool:
    if isinstance(part, slice):
        return _plain((part.start, part.stop, part.step))
    return isinstance(part, int) and not isinstance(part, bool)


def _getitem_array(draft: Draft, call: Call, x: Value, parts: list[Any]) -> bool:
    """`x[:, indices]`, with nothing else that selects."""
    place = next(i for i, part in enumerate(parts) if isinstance(part, Value | tuple))
    index = parts[place]
    if isinstance(index, Value) and (
        index.dtype.is_floating_point or index.dtype in (torch.bool, torch.uint8)
    ):
        return False
    if isinstance(index, tuple) and not all(type(part) is int for part in index):
        return False
    cuts: dict[int, slice] = {}
    axis, target = 0, 0
    for part in parts:
        if part is Ellipsis:
            axis = x.rank - (len(parts) - 1 - parts.index(Ellipsis))
            continue
        if part is index:
            target = axis
        elif isinstance(part, slice) and _is_cut(part):
            cuts[axis] = part
        else:
            return False
        axis += 1
    return _gather(draft, x, call.made[0], target, index, cuts)


def _getitem_basic(draft: Draft, x: Value, y: Value, parts: list[Any]) -> bool:
    """Slices, then whole numbers as slices of one, then a reshape that drops those axes and adds the new ones."""
    if Ellipsis in parts:
        dots = parts.index(Ellipsis)
        used = sum(part is not None and part is not Ellipsis for part in parts)
        parts = [*parts[:dots], *[slice(None)] * (x.rank - used), *parts[dots + 1 :]]
    cuts: dict[int, slice] = {}
    axis = 0
    for part in parts:
        if part is None:
            continue
        if isinstance(part, int):
            start = _axis(part, x.shape[axis])
            part = slice(start, start + 1)
        cuts[axis] = part
        axis += 1
    reshaped = any(part is None or isinstance(part, int) for part in parts)
    shape = [len(range(*cuts.get(a, slice(None)).indices(size))) for a, size in enumerate(x.shape)]
    middle: Value | str = draft.between(shape) if reshaped else y
    _take(draft, x, middle, cuts)
    if reshaped:
        draft.node("Reshape", [middle], [y])
    return True


@row("pixel_shuffle", "x upscale_factor")
def _pixel_shuffle(draft: Draft, call: Call, x: Value, upscale_factor: int) -> bool:
    if _computed(x) and x.rank == 4:
        draft.node("DepthToSpace", [x], call.made[:1], blocksize=upscale_factor, mode="CRD")
        return True
    return False


@row("pixel_unshuffle", "x downscale_factor")
def _pixel_unshuffle(draft: Draft, call: Call, x: Value, downscale_factor: int) -> bool:
    if _computed(x) and x.rank == 4:
        draft.node("SpaceToDepth", [x], call.made[:1], blocksize=downscale_factor, mode="CRD")
        return True
    return False


@row("channel_shuffle native_channel_shuffle", "x groups")
def _channel_shuffle(draft: Draft, call: Call, x: Value, groups: int) -> bool:
    if not _computed(x) or x.rank < 3:
        return False
    channels = np.arange(x.shape[1]).reshape(groups, -1).T.ravel()
    draft.node("Gather", [x], call.made[:1], axis=1, indices=channels)
    return True


# ---------------------------------------------------------------- pooling, means, resizing, padding


def _spatial(x: Value, count: int) -> tuple[int, ...]:
    return tuple(range(x.rank - count, x.rank))


_AVERAGES = "x kernel_size stride=None padding=0 ceil_mode=False count_include_pad=True divisor_override=None"


@row("avg_pool2d avg_pool3d", _AVERAGES)
def _avg_pool(
    draft: Draft,
    call: Call,
    x: Value,
    padding: Any,
    count_include_pad: Any,
    divisor_override: Any,
    **rest: Any,
) -> bool:
    return _average(draft, call, x, padding, count_include_pad, divisor_override)


@row("avg_pool1d", _AVERAGES.rsplit(" ", 1)[0])
def _avg_pool1d(
    draft: Draft, call: Call, x: Value, padding: Any, count_include_pad: Any, **rest: Any
) -> bool:
    return _average(draft, call, x, padding, count_include_pad, None)


def _average(draft: Draft, call: Call, x: Value, padding: Any, counted: Any, divisor: Any) -> bool:
    count = int("3" in call.label) * 3 or int("2" in call.label) * 2 or 1
    partial = "it counts zero padding" if counted and any(np.ravel(padding)) else ""
    partial = "it divides by another number than it sums" if divisor else partial
    if _computed(x):
        draft.node("AveragePool", [x], call.made[:1], axes=_spatial(x, count), keepdims=True, partial=partial)
    return _computed(x)


@row("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", "x output_size")
def _adaptive(draft: Draft, call: Call, x: Value, output_size: Any) -> bool:
    return _average(draft, call, x, 0, False, None)


_MAXIMA = "x kernel_size stride=None padding=0 dilation=1 ceil_mode=False return_indices=False"


@row("max_pool1d max_pool2d max_pool3d", _MAXIMA)
def _max_pool(draft: Draft, call: Call, x: Value, return_indices: Any, **rest: Any) -> bool:
    return not return_indices and _maximum(draft, call, x)


@row("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d", "x output_size return_indices=False")
def _adaptive_max(draft: Draft, call: Call, x: Value, output_size: Any, return_indices: Any) -> bool:
    return not return_indices and _maximum(draft, call, x)


def _maximum(draft: Draft, call: Call, x: Value) -> bool:
    if not _computed(x) or len(call.made) != 1:
        return False
    count = int("3" in call.label) * 3 or int("2" in call.label) * 2 or 1
    draft.node("MaxPool", [x], call.made[:1], axes=_spatial(x, count), keepdims=True)
    return True


@row("mean", "x dim=None keepdim=False dtype=None")
def _mean(draft: Draft, call: Call, x: Value, dim: Any, keepdim: Any, dtype: Any) -> bool:
    return _reduce(draft, call, x, "ReduceMean", dim, keepdim)


@row("sum", "x dim=None keepdim=False dtype=None")
def _sum(draft: Draft, call: Call, x: Value, dim: Any, keepdim: Any, dtype: Any) -> bool:
    return _reduce(draft, call, x, "ReduceSum", dim, keepdim)


@row("amax", "x dim=() keepdim=False")
def _amax(draft: Draft, call: Call, x: Value, dim: Any, keepdim: Any) -> bool:
    return _reduce(draft, call, x, "ReduceMax", dim, keepdim)


@row("max", "x dim keepdim=False")
def _max(draft: Draft, call: Call, x: Value, dim: Any, keepdim: Any) -> bool:
    if not _computed(x) or not _plain(dim) or len(call.made) != 2:
        return False
    axes = _axes(dim, x.rank)
    draft.node("ReduceMax", [x], call.made[:1], axes=axes, keepdims=bool(keepdim))
    draft.node("ArgMax", [x], call.made[1:])
    return True


def _reduce(draft: Draft, call: Call, x: Value, op: str, dim: Any, keepdim: Any) -> bool:
    y = call.made[0]
    if not _computed(x) or not _floating(x, y) or x.dtype != y.dtype or not _plain(dim):
        return False
    draft.node(op, [x], [y], axes=_axes(dim, x.rank), keepdims=bool(keepdim))
    return True


@row("relu", "x inplace=False")
def _relu(draft: Draft, call: Call, x: Value, inplace: Any) -> bool:
    return _activate(draft, call, x, "Relu")


@row("leaky_relu", "x negative_slope=0.01 inplace=False")
def _leaky_relu(draft: Draft, call: Call, x: Value, negative_slope: Any, inplace: Any) -> bool:
    return _activate(draft, call, x, "LeakyRelu")


@row("rrelu", "x lower=0.125 upper=0.3333333333333333 training=False inplace=False")
def _rrelu(draft: Draft, call: Call, x: Value, training: Any, **rest: Any) -> bool:
    return not training and _activate(draft, call, x, "LeakyRelu")


@row("prelu", "x weight")
def _prelu(draft: Draft, call: Call, x: Value, weight: Value) -> bool:
    return not weight.data and _activate(draft, call, x, "PRelu")


@row("abs absolute", "x")
def _abs(draft: Draft, call: Call, x: Value) -> bool:
    return _activate(draft, call, x, "Abs")


def _activate(draft: Draft, call: Call, x: Value, op: str) -> bool:
    if _computed(x) and _floating(x):
        draft.node(op, [x], call.made[:1])
        return True
    return False


@row(
    "interpolate upsample upsample_nearest upsample_bilinear",
    "x size=None scale_factor=None mode='nearest' align_corners=None recompute_scale_factor=None antialias=False",
)
def _resize(draft: Draft, call: Call, x: Value, **rest: Any) -> bool:
    if not _computed(x) or not _floating(x):
        return False
    draft.node("Resize", [x], call.made[:1], axes=tuple(range(2, x.rank)), partial="")
    return True


_UPSAMPLE = "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d"


@row(f"{_UPSAMPLE} upsample_trilinear3d upsample_bicubic2d", "x *rest=()")
def _upsample(draft: Draft, call: Call, x: Value, **rest: Any) -> bool:
    return _resize(draft, call, x)


@row("pad", "x pad mode='constant' value=None")
def _pad(draft: Draft, call: Call, x: Value, pad: Any, mode: str, value: Any) -> bool:
    if not _computed(x) or not _plain(pad) or not _plain(value):
        return False
    pairs = {x.rank - 1 - i: pad[2 * i : 2 * i + 2] for i in range(len(pad) // 2)}
    axes = tuple(sorted(axis for axis, pair in pairs.items() if any(pair)))
    if all(amount <= 0 for amount in pad):
        cuts = {axis: slice(-a, x.shape[axis] + b) for axis, (a, b) in pairs.items() if a or b}
        return _take(draft, x, call.made[0], cuts)
    if mode == "constant" and value:
        return False
    partial = "it pads with zeros" if mode == "constant" else ""
    draft.node("Pad", [x], call.made[:1], axes=axes, partial=partial)
    return True
