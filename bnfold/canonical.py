"""Canonical forms: what the table asks about an operator, made of what an operator says about itself.

Both frontends lower a convolution, a matrix product, a pooling or a padding through the functions here, once they have
read its settings off an ATen call or an ONNX node; so the two cannot come to see one operator differently. Pure:
numbers in, `Linear`, `Affine` or the settings of a `Node` out.

Not covered: where the numbers are stored, and which inputs are constants. Those are the frontend's to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold import reasons
from bnfold.algebra import Affine, Array, Linear, batchnorm
from bnfold.ir import Dim, Shape
from bnfold.window import Window

__all__ = [
    "affine_of",
    "align",
    "bilinear",
    "contraction",
    "convolution",
    "cut",
    "deformable",
    "embedding",
    "kept_axes",
    "matrix",
    "normalisation",
    "padding",
    "pooling",
    "product_of",
    "wrap",
]

LARGEST_AFFINE = 1 << 20
"""A constant operand with more elements than this is not looked at as an affine."""


def wrap(axis: int, rank: int) -> int:
    """An axis that may be counted from the end, counted from the front."""
    return axis + rank if axis < 0 else axis


# ---------------------------------------------------------------- linear operators


def convolution(
    window: Window, inputs: int, outputs: int, groups: int = 1, axis: int = 1, transposed: bool = False
) -> Linear:
    """A convolution of `inputs` to `outputs` channels along an axis, with a weight as ONNX and torch lay it out."""
    pointwise = set(window.extent) <= {1}
    if transposed:
        whole = pointwise and set(window.strides) <= {1} and not window.is_padded and not window.output_pads
        partial = "" if whole else reasons.PARTLY()
    else:
        partial = reasons.PADS() if window.is_padded else ""
    centre = tuple(size // 2 for size in window.kernel)
    return Linear(
        "io" if transposed else "oi",
        inputs,
        outputs,
        axis,
        axis,
        groups,
        centre if window.keeps_size and inputs == outputs else None,
        partial,
        window=None if transposed else window,
    )


def matrix(
    order: str,
    inputs: int,
    outputs: int,
    in_axis: int,
    out_axis: int,
    biasless: str = "",
    bare: bool = False,
) -> Linear:
    """A product by a constant matrix, along one axis of a value, or from one axis to another."""
    centre = () if inputs == outputs and in_axis == out_axis else None
    return Linear(order, inputs, outputs, in_axis, out_axis, centre=centre, biasless=biasless, bare=bare)


def contraction(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """An Einsum as one word for each operand and one for the result, without an ellipsis: an axis is a letter.

    None for what has an axis twice in one word, or words that do not suit the operands.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    words = left.split(",")
    spare = [rank - len(word.replace("...", "")) for word, rank in zip(words, ranks, strict=False)]
    if len(words) != len(ranks) or any(
        n < 0 or (n and "..." not in w) for w, n in zip(words, spare, strict=True)
    ):
        return None
    letters = "".join(word.replace("...", "") for word in words)
    free = [chr(0x100 + place) for place in range(max(spare, default=0))]
    if not arrow:
        once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        result = ("..." if free else "") + "".join(once)
    words = [
        word.replace("...", "".join(free[len(free) - n :])) for word, n in zip(words, spare, strict=True)
    ]
    result = result.replace("...", "".join(free))
    broken = any(len(set(word)) < len(word) for word in (*words, result)) or "." in "".join([*words, result])
    return None if broken or set(result) - set("".join(words)) else (words, result)


def product_of(words: Sequence[str], result: str, constant: int, dims: Sequence[int]) -> Linear | None:
    """An Einsum by a constant matrix as a product along one axis, where it is one: all other axes stay in order.

    Not covered: an axis of size 1 in the matrix that the value has more of; who calls compares the sizes.
    """
    data, weight = words[1 - constant], words[constant]
    inner, outer = set(data) & set(weight) - set(result), set(weight) & set(result) - set(data)
    if len(words) != 2 or len(weight) != 2 or len(inner) != 1 or len(outer) != 1:
        return None
    (i,), (o,) = inner, outer
    if data.replace(i, "") != result.replace(o, ""):
        return None
    sizes = dict(zip(weight, dims, strict=True))
    order, axes = ("io" if weight[0] == i else "oi"), (data.index(i), result.index(o))
    return matrix(order, sizes[i], sizes[o], *axes, bare=True)


def kept_axes(words: Sequence[str], result: str, computed: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Of each computed operand of an Einsum, where its axes are in the result; -1 for one that is summed over."""
    return tuple(tuple(result.find(letter) for letter in words[place]) for place in computed)


def bilinear(inputs: int, outputs: int, axis: int) -> Linear:
    """`sum x_i W_oij y_j` along the last axis, as a product of x; what would be added to x is multiplied by y."""
    return Linear("oi", inputs, outputs, axis, axis, partial=reasons.OTHER_FACTOR())


def deformable(inputs: int, outputs: int, groups: int) -> Linear:
    """A convolution whose taps lie where the model computes: outside of its input there are zeros."""
    return Linear("oi", inputs, outputs, 1, 1, groups, partial=reasons.ZEROS_OUTSIDE())


def embedding(rows: int, width: int, rank: int) -> Linear:
    """A table whose rows are looked up by a value of this rank."""
    return Linear("io", rows, width, 0, rank, sealed=reasons.LOOKS_UP())


# ---------------------------------------------------------------- affines


def affine_of(op: str, numbers: Array, first: bool, alpha: float = 1.0) -> Affine | None:
    """`x op alpha c` (`first`) or `c op alpha x` as an affine of x, broadcast from the right; None for `c / x`."""
    with np.errstate(all="ignore"):
        if op == "Mul":
            return Affine.of(numbers, 0.0)
        if op == "Div":
            return Affine.of(1.0 / numbers, 0.0) if first else None
        sign = alpha if op == "Add" else -alpha
        return Affine.of(1.0, sign * numbers) if first else Affine.of(sign, numbers)


def align(affine: Affine, shape: Shape) -> Affine | None:
    """An affine by a constant operand, with the rank of the value that it acts on.

    None where it enlarges that value, or might (a size that is only a name can be 1), where a number in it is not
    finite, and where it is too much to hold.
    """
    missing = len(shape) - affine.rank
    if missing < 0 or affine.scale.size > LARGEST_AFFINE or not affine.is_finite:
        return None
    sizes = (1,) * missing + affine.scale.shape
    if any(mine not in (1, size) for mine, size in zip(sizes, shape, strict=True)):
        return None
    return Affine(affine.scale.reshape(sizes), affine.shift.reshape(sizes)).collapse()


def normalisation(
    statistics: Mapping[str, npt.ArrayLike], eps: float, shape: Sequence[Dim], per_element: bool = False
) -> tuple[Affine | None, str]:
    """The affine of a BatchNorm with frozen statistics, or why there is none.

    Args:
        statistics: `mean` and `var`, and where there are any `gamma` and `beta`, each `(channels,)`.
        eps: what is added to the variance.
        shape: of the value that is normalised; channels are its axis 1.
        per_element: whether there is a number for every element of an example (ONNX before operator set 9).
    """
    numbers = {name: np.asarray(array, np.float64) for name, array in statistics.items()}
    expected = shape[1:] if per_element else shape[1:2]
    for name, array in numbers.items():
        broken = np.flatnonzero(~np.isfinite(array))
        if broken.size:
            return None, reasons.NOT_FINITE(what=_NAMES[name], channel=broken[0])
        suits = array.ndim == len(expected) and array.shape == numbers["mean"].shape
        if not suits or any(map(_differ, expected, array.shape)):
            sizes = list(array.shape)
            row = reasons.NOT_PER_ELEMENT if per_element else reasons.WRONG_SHAPE
            return None, row(what=_NAMES[name], sizes=sizes, shape=list(shape))
    bad = np.flatnonzero(~(numbers["var"] + eps > 0))
    if bad.size:
        return None, reasons.NOT_POSITIVE(channel=int(bad[0]))
    scale, shift = batchnorm(**numbers, eps=eps)
    if not (np.isfinite(scale) & np.isfinite(shift)).all():
        return None, reasons.OWN_OVERFLOWS()
    if per_element:
        return Affine.of(scale[None], shift[None]), ""
    return Affine.along(1, len(shape), scale, shift), ""


_NAMES = {"mean": "running mean", "var": "running variance", "gamma": "weight", "beta": "bias"}


def _differ(size: Dim, number: int) -> bool:
    return isinstance(size, int) and size != number


# ---------------------------------------------------------------- data movement, pooling, padding


def cut(start: int | None, end: int | None, step: int, size: Dim) -> slice | None:
    """A slice with bounds that are not negative, `slice(None)` where it takes all; None where that cannot be told."""
    if isinstance(size, int):
        first, last, step = slice(start, end, step).indices(size)
        if (first, last, step) == (0, size, 1):
            return slice(None)
        return slice(first, last if step > 0 or last >= 0 else None, step)
    if (start or 0) < 0 or (end is not None and end < 0) or step < 1:
        return None
    return slice(start or None, end, step if step != 1 else None)


def pooling(
    window: Window, first_axis: int, counts_padding: bool = False, divisor: bool = False, ceils: bool = False
) -> dict[str, Any]:
    """The settings of a pooling node over the axes from `first_axis` on.

    Args:
        counts_padding: whether zeros that are padded count as elements of a mean.
        divisor: whether it divides by another number than how many elements it sums.
        ceils: whether the size of its output is rounded up, so that it may read past its padding.
    """
    sizes = zip(window.kernel, window.strides, strict=True)
    moves = [size != 1 or stride != 1 or window.is_padded for size, stride in sizes]
    axes = tuple(first_axis + place for place, does in enumerate(moves) if does)
    partial = reasons.COUNTS_PADDING() if counts_padding and window.is_padded else ""
    partial = reasons.OTHER_DIVISOR() if divisor else partial
    whole = window.pads is not None and (counts_padding or not window.is_padded) and not divisor and not ceils
    return {"axes": axes, "keepdims": True, "partial": partial, "window": window if whole else None}


def padding(pairs: Mapping[int, Sequence[Dim]], zeros: bool) -> dict[str, Any]:
    """The settings of a Pad node that adds (or crops, where negative) this much before and after each axis.

    An amount that is not a number may be any.
    """
    axes = tuple(sorted(axis for axis, pair in pairs.items() if tuple(pair) != (0, 0)))
    more = any(not isinstance(amount, int) or amount > 0 for pair in pairs.values() for amount in pair)
    return {"axes": axes, "partial": reasons.PADS() if zeros and more else ""}
