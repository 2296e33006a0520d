"""The arithmetic of folding, in float64 NumPy: affines, and linear operators that absorb them.

A BatchNorm in eval mode (Ioffe & Szegedy 2015, "Batch Normalization", algorithm 2) computes, per channel,

    y = gamma (x - mean) / sqrt(var + eps) + beta  =  scale x + shift,    scale = gamma / sqrt(var + eps)
                                                                          shift = beta - mean scale

so it is an `Affine`. A linear operator `y = W x + b` absorbs one on either side:

    above it   W (s x + t) + b  =  (W diag s) x + (b + W t)              `Linear.absorb_before`
    below it   s (W x + b) + t  =  (diag s W) x + (s b + t)              `Linear.absorb_after`
    beside it  W x + b + (s x + t)  =  (W + diag s) x + (b + t)          `Linear.absorb_parallel`

Any number of those compose into three vectors per operator, so a plan is decided without touching a weight, and each
weight is then computed once, from its stored numbers, in float64, and rounded once (`Linear.fold`).

Weights come in two orders, `(g o) i *k` (Linear, Gemm with transB=1, Conv) and `(g i) o *k` (Gemm with transB=0,
MatMul, ConvTranspose). Seen as `(g, o, i, k)` they coincide, and each formula is written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.window import Window

__all__ = [
    "Affine",
    "Array",
    "Linear",
    "batchnorm",
    "first_along",
    "is_float",
    "round_to",
    "round_to_odd",
    "widen",
]

Array = npt.NDArray[np.float64]

BLOCK = 1 << 15
"""About how many numbers of a weight are folded at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """The map `x -> scale * x + shift`, where both broadcast against the value that they act on.

    Both arrays are float64 and have the rank of that value, with 1 along every axis on which they do not depend: a
    BatchNorm of an `(N, C, H, W)` value holds two arrays of shape `(1, C, 1, 1)`. NaN in a *wanted* affine means
    "anything will do" (see `travel`); the affine of a model never holds one.
    """

    scale: Array
    shift: Array

    @staticmethod
    def of(scale: npt.ArrayLike, shift: npt.ArrayLike) -> Affine:
        """Make one from two arrays that broadcast against each other."""
        scale, shift = np.asarray(scale, np.float64), np.asarray(shift, np.float64)
        if scale.shape != shift.shape:
            scale, shift = np.broadcast_arrays(scale, shift)
        return Affine(scale, shift)

    @staticmethod
    def identity(rank: int) -> Affine:
        """The affine that changes nothing, for a value of this rank."""
        return Affine(np.ones((1,) * rank), np.zeros((1,) * rank))

    @staticmethod
    def along(axis: int, rank: int, scale: npt.ArrayLike, shift: npt.ArrayLike) -> Affine:
        """Place two vectors of shape `(channels,)` along one axis of a value of this rank."""
        shape = [1] * rank
        shape[axis] = -1
        return Affine.of(np.reshape(scale, shape), np.reshape(shift, shape))

    @property
    def rank(self) -> int:
        """The rank of the value that this acts on."""
        return self.scale.ndim

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes on which it depends."""
        return tuple(axis for axis, size in enumerate(self.scale.shape) if size != 1)

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing; entries that are NaN may be anything."""
        return _holds_only(1.0, self.scale) and self.is_linear

    @property
    def is_linear(self) -> bool:
        """Whether its shift is zero everywhere."""
        return _holds_only(0.0, self.shift)

    @property
    def is_finite(self) -> bool:
        """Whether every number in it is finite."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())

    @property
    def is_monotone(self) -> bool:
        """Whether no scale is negative, so that it commutes with a maximum."""
        return not bool((self.scale < 0).any())

    def after(self, first: Affine) -> Affine:
        """The composition `x -> self(first(x))`."""
        return Affine.of(self.scale * first.scale, self.scale * first.shift + self.shift)

    def scale_only(self) -> Affine:
        """The same scale, no shift."""
        return Affine(self.scale, np.where(np.isnan(self.shift), np.nan, 0.0)).collapse()

    def equals(self, other: Affine) -> bool:
        """Whether both act alike on a value of one rank."""
        mine, theirs = self.collapse(), other.collapse()
        return np.array_equal(mine.scale, theirs.scale) and np.array_equal(mine.shift, theirs.shift)

    def map(self, move: Any) -> Affine:
        """Apply the same rearrangement to both arrays, then drop the axes along which nothing varies any more."""
        return Affine(move(self.scale), move(self.shift)).collapse()

    def collapse(self) -> Affine:
        """The same affine, with size 1 along every axis on which its numbers do not depend."""
        scale, shift = self.scale, self.shift
        for axis in self.axes:
            if not _varies(scale, axis) and not _varies(shift, axis):
                scale, shift = first_along(scale, axis), first_along(shift, axis)
        return Affine(scale, shift)

    def settle(self, axis: int | None) -> Affine:
        """Decide what was wanted "as anything" (NaN): like the rest along every axis but this one, else unchanged."""
        scale, shift = self.scale, self.shift
        for other in self.axes:
            if other != axis and np.isnan(scale).any():
                low, high = (
                    np.fmin.reduce(scale, other, keepdims=True),
                    np.fmax.reduce(scale, other, keepdims=True),
                )
                least, most = (
                    np.fmin.reduce(shift, other, keepdims=True),
                    np.fmax.reduce(shift, other, keepdims=True),
                )
                if np.array_equal(low, high, equal_nan=True) and np.array_equal(least, most, equal_nan=True):
                    scale, shift = low, least
        return Affine(np.where(np.isnan(scale), 1.0, scale), np.where(np.isnan(shift), 0.0, shift)).collapse()

    def merge(self, other: Affine) -> Affine | None:
        """The affine that is wanted where two are; NaN gives way; None where they disagree."""
        mine, theirs = np.broadcast_arrays(self.scale, other.scale)
        mine_too, theirs_too = np.broadcast_arrays(self.shift, other.shift)
        both = ~(np.isnan(mine) | np.isnan(theirs))
        if np.any(mine[both] != theirs[both]) or np.any(mine_too[both] != theirs_too[both]):
            return None
        free = np.isnan(mine)
        return Affine(np.where(free, theirs, mine), np.where(free, theirs_too, mine_too)).collapse()

    def vectors(self, axis: int, size: int) -> tuple[Array, Array] | None:
        """Scale and shift as two vectors of shape `(size,)`, or None where they depend on another axis than this."""
        if any(other != axis for other in self.axes) or self.scale.size not in (1, size):
            return None
        return np.broadcast_to(self.scale.ravel(), size), np.broadcast_to(self.shift.ravel(), size)


def _holds_only(number: float, array: Array) -> bool:
    """Whether every entry is this number or NaN. Most arrays show at once that they hold another one."""
    first = array.item(0) if array.size else number
    return (first == number or math.isnan(first)) and bool(((array == number) | (array != array)).all())


def _varies(array: Array, axis: int) -> bool:
    """Whether an array depends on an axis; NaN is as NaN. Most vectors show at once by their ends that they do."""
    if array.size == array.shape[axis] and array.size:
        ends = array.item(0), array.item(-1)
        if ends[0] != ends[1] and not (math.isnan(ends[0]) and math.isnan(ends[1])):
            return True
    first = first_along(array, axis)
    return not bool(((array == first) | ((array != array) & (first != first))).all())


def is_float(array: npt.NDArray[Any]) -> bool:
    """Whether an array holds floating-point numbers, the bfloat16 of `ml_dtypes` among them."""
    return bool(array.dtype.kind == "f" or array.dtype.name == "bfloat16")


def first_along(array: Array, axis: int) -> Array:
    """The first entries of an array along an axis, which is kept, with size 1."""
    return array[(slice(None),) * axis + (slice(0, 1),)]


def widen(affine: Affine | None, rank: int) -> Affine:
    """An affine of an operand that is broadcast to this rank; None stands for the identity."""
    if affine is None:
        return Affine.identity(rank)
    shape = (1,) * (rank - affine.rank) + affine.scale.shape
    return Affine(affine.scale.reshape(shape), affine.shift.reshape(shape))


def batchnorm(
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike = 1.0,
    beta: npt.ArrayLike = 0.0,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """Scale and shift, each `(channels,)`, of a BatchNorm with frozen statistics (Ioffe & Szegedy 2015, algorithm 2).

    Not finite where `var + eps` is not positive or a number is not finite; the reader says so in its verdict.
    """
    mean, var, gamma, beta = (np.asarray(a, np.float64) for a in (mean, var, gamma, beta))
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(var + eps)
        scale, shift = np.broadcast_arrays(scale, beta - mean * scale)
    return scale, shift


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A linear operator: the shape of its weight, what it can absorb, and what it has absorbed so far.

    The weight itself stays where the model keeps it, until `fold` is given it.

    Attributes:
        order: ``"oi"`` for a weight `(groups*out, in, *kernel)`, ``"io"`` for `(groups*in, out, *kernel)`.
        inputs, outputs: channels over all groups. An embedding table is ``"io"`` with its rows as `inputs`.
        in_axis, out_axis: where the channels lie on the value read and on the value written (not negative).
        centre: the index of the kernel tap that reads an output's own position, `()` for a matrix; None where no tap
            does, or the output is not laid out like the input (stride, even kernel, other channel counts).
        partial: why some output does not sum every tap ("it pads with zeros"), so that no shift may come in from
            above; empty where every output sums them all.
        sealed: why nothing may come in from above at all (an embedding reads rows, not values); empty otherwise.
        biasless: why no bias can be written, so that it can take a scale but no shift; empty otherwise.
        bare: whether it is a matrix that has no bias, through which a scale along any other axis passes.
        window: how a convolution slides; None for any other operator.
        before, after: the affines absorbed above and below, as `(scale, shift)` vectors, or None.
        parallel: the scale of the affine absorbed beside it, `(channels,)`, or None; its shift is in `after`.
    """

    order: str
    inputs: int
    outputs: int
    in_axis: int
    out_axis: int
    groups: int = 1
    centre: tuple[int, ...] | None = None
    partial: str = ""
    sealed: str = ""
    biasless: str = ""
    bare: bool = False
    window: Window | None = None
    before: tuple[Array, Array] | None = None
    after: tuple[Array, Array] | None = None
    parallel: Array | None = field(default=None)

    def form(self, *aside: str) -> dict[str, Any]:
        """What it is, by attribute, whatever it has absorbed; without the attributes that are to be set aside."""
        taken = {"before", "after", "parallel", *aside}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in taken}

    @property
    def changed(self) -> bool:
        """Whether anything has been absorbed."""
        return self.before is not None or self.after is not None or self.parallel is not None

    @property
    def shifts(self) -> bool:
        """Whether what was absorbed gives the operator another bias than its own one, scaled."""
        shifts = [pair[1] for pair in (self.before, self.after) if pair is not None]
        return any(bool(np.any(shift != 0)) for shift in shifts)

    @property
    def shifts_input(self) -> bool:
        """Whether a shift came in from above, which goes through the weight into the bias."""
        return self.before is not None and bool(np.any(self.before[1] != 0))

    @property
    def is_finite(self) -> bool:
        """Whether every number that was absorbed is finite."""
        pairs = [pair for pair in (self.before, self.after) if pair is not None]
        numbers = [
            *(number for pair in pairs for number in pair),
            *([] if self.parallel is None else [self.parallel]),
        ]
        return all(bool(np.isfinite(each).all()) for each in numbers)

    @property
    def is_bare(self) -> bool:
        """Whether it has no bias, and none from what it has absorbed."""
        return self.bare and not self.shifts

    def absorb_after(self, scale: Array, shift: Array) -> Linear:
        """Below it: `scale (W x + b) + shift`, both `(outputs,)`."""
        if self.after is not None:
            shift = scale * self.after[1] + shift
        first = 1.0 if self.after is None else self.after[0]
        parallel = None if self.parallel is None else scale * self.parallel
        return replace(self, after=(scale * first, shift), parallel=parallel)

    def absorb_before(self, scale: Array, shift: Array) -> Linear:
        """Above it: `W (scale x + shift) + b`, both `(inputs,)`."""
        outer = self.before or (np.ones(self.inputs), np.zeros(self.inputs))
        before = (outer[0] * scale, outer[0] * shift + outer[1])
        if self.parallel is None:
            return replace(self, before=before)
        after = self.after or (np.ones(self.outputs), np.zeros(self.outputs))
        return replace(
            self,
            before=before,
            parallel=self.parallel * scale,
            after=(after[0], after[1] + self.parallel * shift),
        )

    def absorb_parallel(self, scale: Array, shift: Array) -> Linear:
        """Beside it: `W x + b + (scale x + shift)`, both `(outputs,)`; needs a `centre`."""
        parallel = scale if self.parallel is None else self.parallel + scale
        after = self.after or (np.ones(self.outputs), np.zeros(self.outputs))
        return replace(self, parallel=parallel, after=(after[0], after[1] + shift))

    def equals(self, other: Linear) -> bool:
        """Whether two operators that share one weight have absorbed the same, so that one new weight serves both."""
        if (self.order, self.groups) != (other.order, other.groups):
            return False
        mine = [*(self.before or (None, None)), *(self.after or (None, None)), self.parallel]
        theirs = [*(other.before or (None, None)), *(other.after or (None, None)), other.parallel]
        return all(
            (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
            for a, b in zip(mine, theirs, strict=True)
        )

    def fold(self, weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None) -> tuple[Array, Array | None]:
        """The weight and bias, in float64, of the operator with everything it has absorbed.

        Args:
            weight: in `order`, of shape `(groups*out, in, *kernel)` or `(groups*in, out, *kernel)`, any float dtype.
            bias: anything that broadcasts against `(..., outputs)`, or None.

        Returns:
            The weight in its own order and shape, and the bias: None where there was none and none is needed,
            `(outputs,)` where there was none, else the broadcast of the old one with `(outputs,)`.
        """
        return self.fold_weight(weight), self.fold_bias(weight, bias)

    def fold_weight(self, weight: npt.NDArray[Any], dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
        """The first half of `fold`: the new weight, computed in float64 and rounded once to `dtype`.

        A few rows at a time, so that what is between the stored numbers and the new ones stays in the cache.
        """
        taps = math.prod(np.shape(weight)[2:])
        rows = np.reshape(weight, (len(weight), weight.shape[1] * taps))
        scales = [self._spread(scale, side, taps) for side, scale in self._scales()]
        folded = np.empty(rows.shape, dtype)
        step = max(1, BLOCK // max(rows.shape[1], 1))
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            wide = rows[block].astype(np.float64)
            for scale in scales:
                wide *= scale if len(scale) == 1 else scale[block]
            if self.parallel is not None:
                self._add_identity(wide, start, np.shape(weight)[2:])
            folded[block] = round_to(wide, dtype)
        return folded.reshape(np.shape(weight))

    def _scales(self) -> Iterator[tuple[str, Array]]:
        """The scales that were absorbed, each with the side of the weight that it belongs to."""
        for side, pair in (("i", self.before), ("o", self.after)):
            if pair is not None:
                yield side, pair[0]

    def _spread(self, scale: Array, side: str, taps: int) -> Array:
        """A scale of one side as it multiplies the rows of a stored weight, `(rows, columns * taps)`."""
        if self.order[0] == side:
            return np.reshape(scale, (len(scale), 1))
        by_column = np.repeat(np.reshape(scale, (self.groups, len(scale) // self.groups)), taps, axis=1)
        rows = (self.outputs if side == "i" else self.inputs) // self.groups
        return by_column if self.groups == 1 else np.repeat(by_column, rows, axis=0)

    def fold_bias(self, weight: npt.NDArray[Any] | None, bias: npt.NDArray[Any] | None) -> Array | None:
        """The second half of `fold`: the new bias. The weight may be None unless `shifts_input`."""
        if bias is None and not self.shifts:
            return None
        folded = np.zeros(self.outputs) if bias is None else np.asarray(bias, np.float64)
        if self.before is not None and self.shifts_input:
            folded = folded + self._multiply(np.asarray(weight, np.float64), self.before[1])
        return folded if self.after is None else folded * self.after[0] + self.after[1]

    def _multiply(self, weight: Array, shift: Array) -> Array:
        """`W shift`, of shape `(outputs,)`: what a vector becomes that every tap reads."""
        taps = math.prod(weight.shape[2:])
        rows = weight.reshape(self.groups, len(weight) // self.groups, weight.shape[1] * taps)
        by_group = shift.reshape(self.groups, self.inputs // self.groups)
        if self.order == "oi":
            product: Array = rows @ np.repeat(by_group, taps, axis=1)[:, :, None]
            return product.ravel()
        total: Array = (by_group[:, None, :] @ rows).reshape(self.outputs, taps).sum(axis=1)
        return total

    def view(self, weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The weight as `(groups, out, in, taps)`."""
        rows, columns = weight.shape[:2]
        taps = math.prod(weight.shape[2:])
        grouped = weight.reshape(self.groups, rows // self.groups, columns, taps)
        return grouped if self.order == "oi" else grouped.swapaxes(1, 2)

    def _add_identity(self, rows: Array, start: int, kernel: tuple[int, ...]) -> None:
        """Add `parallel` to the tap at an output's own position, in place, in rows of a weight from `start` on."""
        assert self.parallel is not None
        assert self.centre is not None
        tap = int(np.ravel_multi_index(self.centre, kernel)) if kernel else 0
        channel = np.arange(start, start + len(rows))
        own = channel % (self.outputs // self.groups)
        rows[np.arange(len(rows)), own * math.prod(kernel) + tap] += self.parallel[channel]


def round_to(values: Array, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Round float64 to a storage dtype, once, to nearest even.

    `ml_dtypes.bfloat16` converts by way of float32, which would round twice; going there by rounding to odd makes the
    second rounding exact (Boldo & Melquiond 2005, "When double rounding is odd").
    """
    target = np.dtype(dtype)
    with np.errstate(over="ignore"):
        return values.astype(target) if target.kind == "f" else round_to_odd(values).astype(target)


def round_to_odd(values: Array) -> npt.NDArray[np.float32]:
    """Round float64 to float32 so that a further rounding to any narrower type is as good as a single one."""
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(values)
    truncated = np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)
    inexact = (truncated.astype(np.float64) != values) & np.isfinite(values)
    odd: npt.NDArray[np.float32] = (truncated.view(np.uint32) | inexact).view(np.float32)
    return odd
