"""Linear operators made of linear operators: their sum on one value, and one after another.

An `Operator` is a geometry (channels, groups, window) and a recipe for its numbers, which are computed when somebody
asks, in float64, from what the model stores. All weights have one shape here, `(groups, outputs/groups,
inputs/groups, *kernel)`, and with it the rules are two:

    side by side         (L1 + L2)(x)    their weights are added, offset by offset                           `add`
    one after another    L2(L1(x))       a product of matrices for each pair of offsets; its bias is
                                         what L2 makes of L1's, plus its own                                 `compose`

An identity, or any affine map per channel, is a matrix that is diagonal, at the offset zero; an average pool is one at
as many offsets as it has taps; a depthwise convolution is diagonal too. Groups are blocks on the diagonal, so operators
of `a` and `b` groups have `gcd(a, b)` in common. See `window` for the offsets. An affine map by itself is of no kind, a
convolution or a matrix along some axis: it takes that of its neighbour (`beside`, `sequence`), and stays an `Affine` as
long as it has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.algebra import Affine, Array
from bnfold.errors import Refuse
from bnfold.ir import Node
from bnfold.window import Window, union

__all__ = [
    "Numbers",
    "Operator",
    "Stored",
    "add",
    "average",
    "beside",
    "compose",
    "diagonal",
    "of_linear",
    "sequence",
]

LARGEST = 1 << 28
"""An operator of more weights than this is made of smaller ones only where those have as many."""

Stored = Callable[[Node], tuple[npt.NDArray[Any], npt.NDArray[Any] | None]]
"""The numbers of a linear node as the model keeps them: the weight, in the order of its `Linear`, and the bias."""

Numbers = tuple[Array, Array]
"""A weight `(groups, outputs/groups, inputs/groups, *kernel)` and a bias `(outputs,)`."""


@dataclass(frozen=True, eq=False)
class Operator:
    """A linear operator, as a geometry and a recipe for its numbers.

    Attributes:
        inputs, outputs: channels over all groups; the rows of a table are its inputs.
        in_axis, out_axis: where the channels lie on the value read and on the value written.
        window: how its kernel slides; None for a matrix.
        lookup: whether it looks up rows of a table instead of multiplying.
        numbers: computes its weight and bias; refuses where those are no matrix with a vector beside it.
    """

    inputs: int
    outputs: int
    groups: int
    in_axis: int
    out_axis: int
    window: Window | None
    numbers: Callable[[Stored], Numbers]
    lookup: bool = False

    @property
    def kernel(self) -> tuple[int, ...]:
        """The shape of its kernel, `()` for a matrix."""
        return self.window.kernel if self.window is not None else ()

    @property
    def weights(self) -> int:
        """How many numbers its weight has."""
        return self.outputs * (self.inputs // self.groups) * prod(self.kernel)

    @property
    def multiply_adds(self) -> int:
        """How many multiply-adds one position of its output takes."""
        return 0 if self.lookup else self.weights


# ---------------------------------------------------------------- operators of one node

_KINDS = frozenset({"Gemm", "MatMul", "Conv", "Embedding"})
"""What an operator can be as a node of the graph, and a node as an operator."""


def of_linear(node: Node) -> Operator:
    """A linear node, with all that it has absorbed.

    Raises:
        Refuse: it has no constant weight, or none at all, or is neither a convolution nor a matrix by itself.
    """
    linear = node.linear
    if linear is None:
        raise Refuse(node.reason or "its weight is not constant")
    if not linear.inputs * linear.outputs:
        raise Refuse("it has no channels")
    if len(node.inputs) > 1:
        raise Refuse("it reads another value as well")
    if node.op == "InputProduct":
        raise Refuse("it is a part of a recurrent layer")
    if node.op == "ConvTranspose" or (node.op == "Conv" and linear.window is None):
        raise Refuse("how it slides depends on the size of its input, or it is transposed")
    if node.op not in _KINDS:
        raise Refuse(f"it is of a kind ({node.op}) that nothing is merged with")
    window = linear.window

    def numbers(stored: Stored) -> Numbers:
        weight, bias = linear.fold(*stored(node))
        kernel = window.kernel if window is not None else ()
        seen = linear.view(weight)
        return seen.reshape(*seen.shape[:3], *kernel), _vector(bias, linear.outputs)

    lookup = node.op == "Embedding"
    sizes = (linear.inputs, linear.outputs, linear.groups, linear.in_axis, linear.out_axis)
    return Operator(*sizes, window, numbers, lookup)


def _vector(bias: Array | None, outputs: int) -> Array:
    if bias is None:
        return np.zeros(outputs)
    if bias.size != 1 and (bias.size, bias.shape[-1]) != (outputs, outputs):
        raise Refuse("its bias is no vector along its outputs")
    return np.broadcast_to(bias.ravel(), outputs)


def diagonal(affine: Affine, neighbour: Operator, axis: int, channels: int) -> Operator:
    """An affine map per channel, of the same kind as an operator beside, above or below it.

    Raises:
        Refuse: it varies along other axes too.
    """
    vectors = affine.vectors(axis, channels)
    if vectors is None:
        raise Refuse("an affine map varies along another axis than that of the channels")
    scale, shift = vectors
    window = None if neighbour.window is None else Window.point(len(neighbour.window.kernel))
    shape = (channels, 1, 1, *(window.kernel if window is not None else ()))
    return Operator(
        channels, channels, channels, axis, axis, window, lambda stored: (scale.reshape(shape), shift)
    )


def average(window: Window, channels: int, axis: int) -> Operator:
    """An average pool, whose every output is a mean over all its taps."""
    shape = (channels, 1, 1, *window.kernel)

    def numbers(stored: Stored) -> Numbers:
        return np.full(shape, 1.0 / prod(window.kernel)), np.zeros(channels)

    return _bounded(Operator(channels, channels, channels, axis, axis, window, numbers))


# ---------------------------------------------------------------- operators of several


def add(first: Operator, second: Operator, sign: float = 1.0) -> Operator:
    """The operator `first(x) + sign second(x)`.

    Raises:
        Refuse: they read or write other channels or sizes.
    """
    if _form(first) != _form(second):
        raise Refuse("they read or write other channels, or along other axes")
    window = None
    if first.window is not None and second.window is not None:
        window = union(first.window, second.window)
    groups = gcd(first.groups, second.groups)
    kernel = window.kernel if window is not None else ()

    def numbers(stored: Stored) -> Numbers:
        weight = np.zeros((groups, first.outputs // groups, first.inputs // groups, *kernel))
        bias = np.zeros(first.outputs)
        for factor, term in ((1.0, first), (sign, second)):
            own, shift = term.numbers(stored)
            weight[_taps(term.window, window)] += factor * _regroup(own, groups)
            bias += factor * shift
        return weight, bias

    sizes = (first.inputs, first.outputs, groups, first.in_axis, first.out_axis)
    return _bounded(Operator(*sizes, window, numbers, first.lookup), first, second)


def _bounded(operator: Operator, *parts: Operator) -> Operator:
    """An operator, unless it has too many numbers, and more than its parts.

    Raises:
        Refuse: it has.
    """
    if operator.weights > max(LARGEST, sum(part.weights for part in parts)):
        raise Refuse(f"as one it would have {operator.weights:,} weights")
    return operator


def _form(operator: Operator) -> tuple[object, ...]:
    spatial = None if operator.window is None else len(operator.window.kernel)
    axes = (operator.in_axis, operator.out_axis)
    return operator.inputs, operator.outputs, *axes, spatial, operator.lookup


def _taps(own: Window | None, whole: Window | None) -> tuple[Any, ...]:
    """Where the taps of one term lie in the kernel of a sum."""
    if own is None or whole is None:
        return (...,)
    starts = [own.offset(axis) - whole.offset(axis) for axis in range(len(own.kernel))]
    axes = zip(starts, own.kernel, own.dilations, whole.dilations, strict=True)
    return (..., *(_run(start // step, size, dilation, step) for start, size, dilation, step in axes))


def _run(start: int, taps: int, dilation: int, step: int) -> slice:
    """As many taps, from a start, on a grid of which `step` is the finest distance."""
    stride = max(dilation // step, 1) if taps > 1 else 1
    return slice(start, start + (taps - 1) * stride + 1, stride)


def _regroup(weight: Array, groups: int) -> Array:
    """The weight of an operator of more groups as one of fewer: blocks on the diagonal of larger ones."""
    count, outputs, inputs, *kernel = weight.shape
    ratio = count // groups
    if ratio == 1:
        return weight
    seen = weight.reshape(groups, ratio, outputs, inputs, *kernel)
    blocks = np.zeros((groups, ratio, outputs, ratio, inputs, *kernel))
    own = np.arange(ratio)
    blocks[:, own, :, own] = seen.swapaxes(0, 1)
    return blocks.reshape(groups, ratio * outputs, ratio * inputs, *kernel)


def compose(first: Operator, second: Operator, stored: Stored) -> Operator:
    """The operator `second(first(x))`.

    Args:
        first, second: one reads what the other one writes.
        stored: asked for the bias of `first` where `second` pads with zeros.

    Raises:
        Refuse: they mix other axes, or `second` pads with zeros where `first` would give something else.
    """
    if (first.out_axis, first.outputs) != (second.in_axis, second.inputs) or second.lookup:
        raise Refuse("they have their channels on other axes")
    if (first.window is None) != (second.window is None):
        raise Refuse("one is a convolution and the other one a matrix")
    window = None
    if first.window is not None and second.window is not None:
        window = second.window.after(first.window)
        if second.window.is_padded and np.any(first.numbers(stored)[1] != 0):
            raise Refuse("the second one pads with zeros, and the first one has a bias")
    groups = gcd(first.groups, second.groups)

    def numbers(stored: Stored) -> Numbers:
        return _product(first, second, groups, window, stored)

    sizes = (first.inputs, second.outputs, groups, first.in_axis, second.out_axis)
    return _bounded(Operator(*sizes, window, numbers, first.lookup), first, second)


def _product(
    first: Operator, second: Operator, groups: int, window: Window | None, stored: Stored
) -> Numbers:
    (inner, inner_bias), (outer, outer_bias) = first.numbers(stored), second.numbers(stored)
    inner, outer = _regroup(inner, groups), _regroup(outer, groups)
    middle, inputs, *taps = inner.shape[1:]
    flat = inner.reshape(groups, middle, inputs * prod(taps))
    outputs = outer.shape[1]
    kernel = window.kernel if window is not None else ()
    weight, bias = np.zeros((groups, outputs, inputs, *kernel)), np.array(outer_bias, np.float64)
    for tap in np.ndindex(*outer.shape[3:]):
        matrix = outer[(slice(None), slice(None), slice(None), *tap)]
        place = _shifted(first.window, second.window, window, tap)
        weight[place] += (matrix @ flat).reshape(groups, outputs, inputs, *taps)
        bias += (matrix @ inner_bias.reshape(groups, middle, 1)).ravel()
    return weight, bias


def _shifted(
    first: Window | None, second: Window | None, whole: Window | None, tap: tuple[int, ...]
) -> tuple[Any, ...]:
    """Where the taps of the first operator come to lie, seen through one tap of the second."""
    if first is None or second is None or whole is None:
        return (...,)
    axes = zip(
        tap, second.dilations, first.strides, first.kernel, first.dilations, whole.dilations, strict=True
    )
    return (..., *(_run(at * d * s // step, size, inner, step) for at, d, s, size, inner, step in axes))


# ---------------------------------------------------------------- operators and affine maps


def beside(first: Operator | Affine, second: Operator | Affine, sign: float = 1.0) -> Operator | Affine:
    """The sum of two on one value, the second one with a sign.

    Raises:
        Refuse: see `add` and `diagonal`.
    """
    if isinstance(first, Operator) and isinstance(second, Operator):
        return add(first, second, sign)
    if isinstance(first, Operator):
        assert isinstance(second, Affine)
        return add(first, diagonal(second, first, first.in_axis, first.inputs), sign)
    if isinstance(second, Operator):
        return add(diagonal(first, second, second.in_axis, second.inputs), second, sign)
    _check_axes(first, second)
    return Affine.of(first.scale + sign * second.scale, first.shift + sign * second.shift)


def sequence(first: Operator | Affine, second: Operator | Affine, stored: Stored) -> Operator | Affine:
    """One after another.

    Raises:
        Refuse: see `compose` and `diagonal`; or the second one looks up rows, by whole numbers.
    """
    if isinstance(first, Operator) and isinstance(second, Operator):
        return compose(first, second, stored)
    if isinstance(first, Operator):
        assert isinstance(second, Affine)
        return compose(first, diagonal(second, first, first.out_axis, first.outputs), stored)
    if isinstance(second, Operator):
        if second.lookup:
            raise Refuse("it looks up rows, by whole numbers")
        return compose(diagonal(first, second, second.in_axis, second.inputs), second, stored)
    _check_axes(first, second)
    return second.after(first)


def _check_axes(first: Affine, second: Affine) -> None:
    """Refuse affine maps that together vary along several axes: no operator stands for that, however many numbers."""
    if len({*first.axes, *second.axes}) > 1:
        raise Refuse("an affine map varies along another axis than that of the channels")
