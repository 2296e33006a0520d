"""How a kernel slides over the spatial axes of a value, and what two of them amount to together.

A convolution is a map from offsets to matrices (Dumoulin & Visin 2016, "A guide to convolution arithmetic"):

    y[o] = sum_j W[j] x[o s + j d - p] + b        taps j, stride s, dilation d, padding p before; zeros outside of x

so a window is, along each axis, the offsets `j d - p` and a stride, and

- `union` is the window of a sum of operators on one value: all their offsets, on the coarsest grid that holds them;
- `Window.after` is the window of one operator after another: each offset of the second, in steps of the first one's
  stride, plus each offset of the first.

Padding after the last element decides on the size of the output alone: `floor((n + slack - 1) / s) + 1` elements, where
the slack is that padding less the last offset. Two windows of one stride and one slack give outputs of one size for
every size n of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from bnfold.errors import Refuse

__all__ = ["Window", "union"]


@dataclass(frozen=True, slots=True)
class Window:
    """How a kernel slides over the spatial axes of a value.

    Attributes:
        kernel, strides, dilations: one number for each spatial axis.
        pads: how much is padded before and after, for each spatial axis; None where that depends on the size.
        output_pads: of a transposed convolution, whether anything else decides on the size of its output.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...] | None
    output_pads: bool = False

    @staticmethod
    def point(rank: int) -> Window:
        """The window of one tap that reads an output's own position, over this many axes."""
        ones = (1,) * rank
        return Window(ones, ones, ones, ((0, 0),) * rank)

    @property
    def extent(self) -> tuple[int, ...]:
        """How far the kernel reaches along each axis, with its dilation."""
        return tuple((size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True))

    @property
    def is_padded(self) -> bool:
        """Whether anything is padded, be it at other sizes."""
        return self.pads is None or any(any(pair) for pair in self.pads)

    @property
    def keeps_size(self) -> bool:
        """Whether outputs are laid out like the input, each around its own position."""
        around = tuple((reach // 2, reach // 2) for reach in self.extent)
        odd = all(size % 2 for size in self.kernel)
        return odd and set(self.strides) <= {1} and self.pads == around and not self.output_pads

    @property
    def is_point(self) -> bool:
        """Whether it has one tap and no padding, whatever its stride."""
        return set(self.kernel) <= {1} and not self.is_padded

    def offset(self, axis: int) -> int:
        """The first offset along an axis, zero or less."""
        return -self._pads()[axis][0]

    def slack(self, axis: int) -> int:
        """The padding after the last element, less the last offset."""
        return self._pads()[axis][1] - self.offset(axis) - self.extent[axis] + 1

    def _pads(self) -> tuple[tuple[int, int], ...]:
        if self.pads is None:
            raise Refuse("how much it pads depends on the size")
        return self.pads

    def after(self, first: Window) -> Window:
        """The window of this operator after another one.

        Raises:
            Refuse: this one pads with zeros what is no zero on the other one's own padding.
        """
        if self.is_padded and not first.is_point:
            raise Refuse(
                "the second one pads what the first one computes, which is not what the first one pads"
            )
        axes = zip(self.kernel, self.dilations, self._pads(), first.kernel, first.strides, strict=True)
        kernel, dilations, pads = [], [], []
        for axis, (size, dilation, (before, after), inner, stride) in enumerate(axes):
            step = _step([(size, dilation * stride), (inner, first.dilations[axis])], [0])
            reach = (size - 1) * dilation * stride + first.extent[axis] - 1
            kernel.append(reach // step + 1)
            dilations.append(step)
            own = first._pads()[axis]
            pads.append((own[0] + before * stride, own[1] + after * stride))
        strides = tuple(mine * theirs for mine, theirs in zip(self.strides, first.strides, strict=True))
        return Window(tuple(kernel), strides, tuple(dilations), tuple(pads))

    @staticmethod
    def same_pads(
        kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], lower: bool
    ) -> tuple[tuple[int, int], ...] | None:
        """The pads that keep the size (ONNX's `auto_pad`, torch's `padding="same"`); `lower` puts the odd one before.

        None where a stride makes them depend on the size.
        """
        total = [(size - 1) * step for size, step in zip(kernel, dilations, strict=True)]
        if any(stride != 1 for stride, pad in zip(strides, total, strict=True) if pad):
            return None
        small = [pad // 2 for pad in total]
        pairs = zip(small, total, strict=True)
        return tuple((pad - half, half) if lower else (half, pad - half) for half, pad in pairs)


def union(first: Window, second: Window) -> Window:
    """The window of a sum of two operators on one value.

    Raises:
        Refuse: their strides differ, or they give outputs of different sizes for some size of the input.
    """
    if first.strides != second.strides:
        raise Refuse("their strides differ")
    kernel, dilations, pads = [], [], []
    for axis in range(len(first.kernel)):
        slack = first.slack(axis)
        if slack != second.slack(axis):
            raise Refuse(
                "they pad by different amounts, so that for other sizes their outputs would differ in size"
            )
        start = min(first.offset(axis), second.offset(axis))
        ends = [w.offset(axis) + w.extent[axis] - 1 for w in (first, second)]
        grids = [(w.kernel[axis], w.dilations[axis]) for w in (first, second)]
        step = _step(grids, [w.offset(axis) - start for w in (first, second)])
        kernel.append((max(ends) - start) // step + 1)
        dilations.append(step)
        pads.append((-start, slack + max(ends)))
    return Window(tuple(kernel), first.strides, tuple(dilations), tuple(pads))


def _step(grids: Sequence[tuple[int, int]], starts: Sequence[int]) -> int:
    """The coarsest step on which all offsets lie, of `(taps, dilation)` that begin at these starts."""
    return gcd(*starts, *(dilation for taps, dilation in grids if taps > 1)) or 1
