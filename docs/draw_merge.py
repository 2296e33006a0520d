"""Draw the pictures of `docs/merge.md`: kernels of one channel, merged by `bnfold.operators` itself.

    python docs/draw_merge.py [FOLDER]

A kernel is a grid of its taps, darker where it weighs more, crossed where it is zero; the bold cell is the offset zero,
the input at an output's own position. Whatever stands to the right of an equals sign was computed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bnfold.operators import Operator, add, average, compose
from bnfold.window import Window

INK, QUIET, FILL = "#24292f", "#6b7178", np.array([0x56, 0xB4, 0xE9]) / 255
CELL = 0.3
"""Inches per tap."""


def kernel(taps: Sequence[Sequence[float]], dilation: int = 1) -> Operator:
    """A convolution of one channel with these taps, around its own position."""
    weight = np.array(taps, np.float64)
    pads = tuple(((size // 2) * dilation, (size // 2) * dilation) for size in weight.shape)
    window = Window(weight.shape, (1, 1), (dilation, dilation), pads)
    return Operator(1, 1, 1, 1, 1, window, lambda stored: (weight[None, None, None], np.zeros(1)))


def unpadded(operator: Operator) -> Operator:
    """The same kernel without padding, as what stands above another one may have it."""
    assert operator.window is not None
    window = Window(operator.window.kernel, (1, 1), operator.window.dilations, ((0, 0), (0, 0)))
    return Operator(1, 1, 1, 1, 1, window, operator.numbers)


IDENTITY = kernel([[1.0]])
POINT = kernel([[0.7]])
SQUARE = kernel([[0.2, 0.5, 0.1], [0.4, 0.8, 0.6], [0.3, 0.5, 0.2]])
ROW, COLUMN = kernel([[0.4, 0.7, 0.5]]), kernel([[0.6], [0.3], [0.5]])
WIDE = kernel([[0.3, 0.6, 0.3], [0.6, 0.9, 0.6], [0.3, 0.6, 0.3]], dilation=2)
POOL = average(Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))), 1, 1)


@dataclass(frozen=True)
class Picture:
    """A row of kernels with signs between them, and what each is called."""

    kernels: tuple[Operator, ...]
    signs: tuple[str, ...]
    names: tuple[str, ...]


def _nobody(node: object) -> tuple[np.ndarray, None]:
    raise AssertionError("the pictures store nothing")


def beside(names: Sequence[str], *kernels: Operator) -> Picture:
    """A sum, and what it is."""
    total = kernels[0]
    for each in kernels[1:]:
        total = add(total, each)
    return Picture((*kernels, total), (*["+"] * (len(kernels) - 1), "="), (*names, "one"))


def after(names: Sequence[str], first: Operator, second: Operator) -> Picture:
    """One after another, and what that is."""
    return Picture((first, second, compose(first, second, _nobody)), ("then", "="), (*names, "one"))


PICTURES = {
    "sum": beside(("3x3", "1x1", "the value itself"), SQUARE, POINT, IDENTITY),
    "cross": beside(("3x3", "1x3", "3x1"), SQUARE, ROW, COLUMN),
    "dilated": beside(("3x3", "3x3, dilation 2"), SQUARE, WIDE),
    "pool": beside(("average pool", "1x1"), POOL, POINT),
    "sequence": after(("1x1", "3x3"), POINT, SQUARE),
    "unpadded": after(("1x3", "3x1, no padding"), unpadded(ROW), unpadded(COLUMN)),
}


def _draw_kernel(axes: Axes, operator: Operator, left: float) -> float:
    """Draw one kernel, its left edge here; return its width in cells."""
    window = operator.window
    assert window is not None
    weight = operator.numbers(_nobody)[0][0, 0, 0]
    height, width = window.extent
    grid = np.full((height, width), np.nan)
    grid[:: window.dilations[0], :: window.dilations[1]] = weight
    for (row, column), value in np.ndenumerate(grid):
        x, y = left + column, height / 2 - row - 1
        shade = 1 - (1 - FILL) * (0 if np.isnan(value) else min(abs(value), 1.6) / 1.6)
        axes.add_patch(Rectangle((x, y), 1, 1, fc=shade, ec=QUIET, lw=0.6))
        if np.isnan(value) or value == 0:
            axes.plot([x + 0.3, x + 0.7], [y + 0.3, y + 0.7], color=QUIET, lw=0.6)
        else:
            axes.text(x + 0.5, y + 0.47, f"{value:.1f}", ha="center", va="center", fontsize=7, color=INK)
    own = (-window.offset(0), -window.offset(1))
    if own[0] < height and own[1] < width:
        corner = (left + own[1], height / 2 - own[0] - 1)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec=INK, lw=1.8))
    return float(width)


def draw(picture: Picture) -> Figure:
    """One row of kernels."""
    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    left, low = 0.5, max(each.window.extent[0] for each in picture.kernels if each.window is not None) / 2
    for place, (operator, name) in enumerate(zip(picture.kernels, picture.names, strict=True)):
        if place:
            sign = picture.signs[place - 1]
            room = 2.6 if len(sign) > 1 else 1.6
            axes.text(left + room / 2, -0.05, sign, ha="center", va="center", fontsize=11, color=INK)
            left += room
        width = _draw_kernel(axes, operator, left)
        room = max(width, 0.21 * len(name))
        axes.text(left + width / 2, -low - 0.6, name, ha="center", va="center", fontsize=7.5, color=QUIET)
        left += (width + room) / 2 if room > width and place < len(picture.kernels) - 1 else width
    axes.set_xlim(-0.8, left + 0.8)
    axes.set_ylim(-low - 1.1, low + 0.3)
    axes.axis("off")
    figure.set_size_inches(CELL * (left + 1.6), CELL * (2 * low + 1.4))
    return figure


def main(folder: Path) -> None:
    """Write all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update({"svg.hashsalt": "bnfold", "svg.fonttype": "none", "font.family": "sans-serif"})
    for name, picture in PICTURES.items():
        figure = draw(picture)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures" / "merge")
