"""Check the numbers that an operator was given, each by itself, to half a unit in its last place.

What an operator has absorbed says exactly what its weight and bias are to be:

    weight' = after W before + parallel            bias' = after (b + W shift_before) + shift_after

Here they are computed once more from the stored numbers, as unevaluated sums of two float64 (Dekker 1971, "A
floating-point technique for extending the available precision"), which leave out less than 2^-100 of each product; and
a stored number must be the nearest of its type. `fold` computes in float64 and rounds once, so a number may be off by
what float64 loses besides: twice 2^-53 of itself, and of a bias as many times 2^-53 of what it is a sum of as that has
terms (Higham 2002, section 3.1). In a float32 that is a part in 10^8 of the half unit.

Not covered: the maps that were absorbed themselves (`simulation`), and merged operators (`response`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.algebra import Array, Linear

__all__ = ["measure", "measure_bias", "measure_weight", "smallest"]

_EPS = 2.0**-53
_SPLIT = 2.0**27 + 1.0
_TYPES = {"float64": (52, -1022), "float32": (23, -126), "float16": (10, -14), "bfloat16": (7, -126)}
"""How many digits follow the first one, and the least exponent of a normal number."""

Pair = tuple[Array, Array]
"""An unevaluated sum: a number, and what is missing from it."""


Numbers = tuple[npt.NDArray[Any], npt.NDArray[Any] | None]
"""The weight and the bias of an operator, as `Linear.fold` takes them."""


def measure(linear: Linear, numbers: Numbers, new: Numbers, dtype: str, looks_up: bool = False) -> float:
    """How far the worst number of an operator is off: of its weight and of its bias; see `measure_weight`."""
    (weight, bias), (made, own) = numbers, new
    share = measure_weight(linear, weight, made, dtype, looks_up)
    return share if looks_up else max(share, measure_bias(linear, weight, bias, own, dtype))


def measure_weight(
    linear: Linear, weight: npt.NDArray[Any], new: npt.NDArray[Any], dtype: str, looks_up: bool = False
) -> float:
    """By how many times what it may be off the worst number of a weight is off.

    Args:
        linear: what the operator has absorbed.
        weight: before, as `Linear.fold` takes it.
        new: after, of the same shape.
        dtype: what the new one is stored in, by name.
        looks_up: whether the bias of a table is in its rows.

    Returns:
        At most 1 where every number is right.
    """
    if np.shape(weight) != np.shape(new):
        return np.inf
    seen = linear.view(np.asarray(weight, np.float64))
    exact: Pair = (seen, np.zeros_like(seen))
    added = np.zeros_like(seen)
    if linear.before is not None:
        exact = _times(exact, np.reshape(linear.before[0], (linear.groups, 1, -1, 1)))
    if linear.after is not None:
        exact = _times(exact, np.reshape(linear.after[0], (linear.groups, -1, 1, 1)))
        if looks_up:
            added += np.reshape(linear.after[1], (linear.groups, -1, 1, 1))
    if linear.parallel is not None:
        kernel, channels = np.shape(weight)[2:], np.arange(linear.outputs // linear.groups)
        tap = np.ravel_multi_index(linear.centre or (), kernel) if kernel else 0
        added[:, channels, channels, tap] += np.reshape(linear.parallel, (linear.groups, -1))
    size = np.abs(exact[0]) + np.abs(added)
    return _worst(_plus(exact, added), linear.view(np.asarray(new, np.float64)), dtype, 4 * _EPS * size)


def measure_bias(
    linear: Linear,
    weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None,
    new: npt.NDArray[Any] | None,
    dtype: str,
) -> float:
    """The same of a bias; None stands for zeros."""
    own = np.zeros(linear.outputs) if bias is None else np.asarray(bias, np.float64)
    exact: Pair = (own, np.zeros_like(own))
    size, terms = np.abs(own), 2
    if linear.before is not None and linear.shifts_input:
        seen = linear.view(np.asarray(weight, np.float64))
        shift = np.reshape(linear.before[1], (linear.groups, 1, -1, 1))
        products = _times(
            (seen, np.zeros_like(seen)), np.broadcast_to(shift, (linear.groups, 1, *seen.shape[2:3], 1))
        )
        high, low = (each.reshape(linear.outputs, -1) for each in products)
        total = _sum((high, low))
        exact = _plus(_plus(exact, total[0]), total[1])
        size, terms = size + np.abs(high).sum(axis=1), terms + high.shape[1]
    if linear.after is not None:
        exact = _plus(_times(exact, linear.after[0]), linear.after[1])
        size = size * np.abs(linear.after[0]) + np.abs(linear.after[1])
    stored = np.zeros_like(exact[0]) if new is None else np.asarray(new, np.float64)
    return _worst(exact, np.broadcast_to(stored, exact[0].shape), dtype, 2 * terms * _EPS * size)


def _worst(exact: Pair, new: Array, dtype: str, besides: Array) -> float:
    """The largest distance from the exact numbers, in units of what it may be."""
    with np.errstate(all="ignore"):
        distance = np.abs((new - exact[0]) - exact[1])
        allowed = _spacing(new, dtype) / 2 + besides
        share = np.where(distance == 0, 0.0, distance / allowed)
    return float(np.max(np.where(np.isnan(share), np.inf, share), initial=0.0))


def _spacing(numbers: Array, dtype: str) -> Array:
    """The distance from each number to the next one of its type."""
    digits, least = _TYPES[dtype]
    exponent = np.where(numbers == 0, least, np.maximum(np.frexp(numbers)[1] - 1, least))
    spacing: Array = np.ldexp(1.0, exponent - digits)
    return spacing


def smallest(dtype: str) -> float:
    """The smallest positive number of a type."""
    digits, least = _TYPES[dtype]
    return 2.0 ** (least - digits)


# ---------------------------------------------------------------- unevaluated sums


def _split(number: Array) -> Pair:
    """A number as a sum of two of half as many digits (Veltkamp)."""
    far = _SPLIT * number
    high = far - (far - number)
    return high, number - high


def _product(first: Array, second: Array) -> Pair:
    """A product and what is missing from it (Dekker)."""
    product = first * second
    (a, b), (c, d) = _split(first), _split(second)
    return product, ((a * c - product) + a * d + b * c) + b * d


def _times(pair: Pair, factor: Array) -> Pair:
    high, low = _product(pair[0], factor)
    return _add(high, low + pair[1] * factor)


def _add(first: Array, second: Array) -> Pair:
    """A sum and what is missing from it (Knuth)."""
    total = first + second
    own = total - first
    return total, (first - (total - own)) + (second - own)


def _plus(pair: Pair, term: Array) -> Pair:
    high, low = _add(pair[0], term)
    return _add(high, low + pair[1])


def _sum(pair: Pair) -> Pair:
    """The sum of each row, half by half."""
    high, low = pair
    while high.shape[1] > 1:
        if high.shape[1] % 2:
            high, low = (np.pad(each, ((0, 0), (0, 1))) for each in (high, low))
        total, rest = _add(high[:, ::2], high[:, 1::2])
        high, low = _add(total, rest + low[:, ::2] + low[:, 1::2])
    return high[:, 0], low[:, 0]
