"""Draw the pictures of `docs/travel.md`: one per row of the operator table.

    python docs/draw_travel.py [FOLDER]

Each line of a picture is an equation between two pipelines that are read from left to right. A strip is an affine:
one cell per channel, its left half the scale, its right half the shift; an empty half is 1, or 0. A lying strip varies
along another axis than the channels. A filled box has absorbed an affine.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

INK, PAPER, FILL, QUIET, NO = "#24292f", "#f6f4ee", "#cfe3f5", "#6b7178", "#b3261e"
A, B, C, D = "#e69f00", "#56b4e9", "#009e73", "#cc79a7"
UNIT = 0.34
"""Inches per unit of the drawing."""


@dataclass(frozen=True)
class Op:
    """An operator; `full` where it has absorbed an affine."""

    text: str
    full: bool = False

    @property
    def width(self) -> float:
        """Wide enough for the text."""
        return 0.6 + 0.26 * len(self.text)

    def draw(self, axes: Axes, x: float, y: float) -> None:
        """Draw it, its left edge at x and its middle at y."""
        face = FILL if self.full else "white"
        axes.add_patch(
            FancyBboxPatch(
                (x + 0.08, y - 0.42),
                self.width - 0.16,
                0.84,
                "round,pad=0.0,rounding_size=0.18",
                fc=face,
                ec=INK,
                lw=1.1,
            )
        )
        axes.text(x + self.width / 2, y - 0.03, self.text, ha="center", va="center", fontsize=8.5, color=INK)


@dataclass(frozen=True)
class Strip:
    """An affine: the colours of its cells, and which halves are there."""

    cells: tuple[str, ...] = (A, B)
    scale: bool = True
    shift: bool = True
    lying: bool = False

    @property
    def width(self) -> float:
        """Its width, with air."""
        return 0.3 * len(self.cells) + 0.2 if self.lying else 0.8

    def draw(self, axes: Axes, x: float, y: float) -> None:
        """Draw it, its left edge at x and its middle at y."""
        count = len(self.cells)
        for place, colour in enumerate(self.cells):
            for half, there in enumerate((self.scale, self.shift)):
                if self.lying:
                    left, low, wide, high = x + 0.1 + 0.3 * place, y - 0.3 * half, 0.3, 0.3
                else:
                    left, low, wide, high = (
                        x + 0.1 + 0.3 * half,
                        y + 0.15 * count - 0.3 * (place + 1),
                        0.3,
                        0.3,
                    )
                face = colour if there and colour else "white"
                axes.add_patch(Rectangle((left, low), wide, high, fc=face, ec=INK, lw=0.8))
                if not colour:
                    axes.text(
                        left + wide / 2,
                        low + high / 2 - 0.02,
                        "?",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color=QUIET,
                    )


@dataclass(frozen=True)
class No:
    """A refusal, in words."""

    text: str

    @property
    def width(self) -> float:
        """Wide enough for the text."""
        return 0.3 + 0.2 * len(self.text)

    def draw(self, axes: Axes, x: float, y: float) -> None:
        """Draw it, its left edge at x and its middle at y."""
        axes.text(
            x + 0.2, y - 0.03, self.text, ha="left", va="center", fontsize=8.5, color=NO, style="italic"
        )


@dataclass(frozen=True)
class Fork:
    """Branches, one above the other, that begin from one value (`read`), end in one (`meet`), or both."""

    branches: tuple[tuple[Op | Strip, ...], ...]
    read: bool = False
    meet: bool = True

    @property
    def inner(self) -> float:
        """The width of the widest branch."""
        return max(sum(token.width + 0.25 for token in branch) for branch in self.branches)

    @property
    def width(self) -> float:
        """With room to part and to meet."""
        return self.inner + 0.3 + 0.25 * (self.read + self.meet)

    def draw(self, axes: Axes, x: float, y: float) -> None:
        """Draw it, its left edge at x and its middle at y."""
        right = x + self.width
        for place, branch in enumerate(self.branches):
            level = y + (len(self.branches) - 1) * 0.55 - 1.1 * place
            length = sum(token.width + 0.25 for token in branch)
            at = x + 0.25 if self.read else right - 0.45 - length
            if self.read:
                axes.plot([x, x + 0.25], [y, level], color=INK, lw=1.0)
            for token in branch:
                axes.plot([at, at + 0.25], [level, level], color=INK, lw=1.0)
                token.draw(axes, at + 0.25, level)
                at += 0.25 + token.width
            if self.meet:
                axes.plot([at, right - 0.25, right], [level, level, y], color=INK, lw=1.0)


Token = Op | Strip | No | Fork
Line = tuple[str, tuple[Token, ...], tuple[Token, ...]]


def _height(line: Line) -> float:
    tokens = (*line[1], *line[2])
    rows = max((len(token.branches) for token in tokens if isinstance(token, Fork)), default=1)
    tall = max((len(t.cells) for t in _all(tokens) if isinstance(t, Strip) and not t.lying), default=0)
    return max(1.35, 1.1 * rows + 0.35, 0.3 * tall + 0.5)


def _all(tokens: tuple[Token, ...]) -> list[Token]:
    inner = [t for token in tokens if isinstance(token, Fork) for branch in token.branches for t in branch]
    return [*tokens, *inner]


def _pipeline(axes: Axes, tokens: tuple[Token, ...], x: float, y: float) -> float:
    for place, token in enumerate(tokens):
        if place and not isinstance(token, No) and not isinstance(tokens[place - 1], Fork):
            axes.plot([x, x + 0.25], [y, y], color=INK, lw=1.0)
            x += 0.25
        elif place and not isinstance(token, No):
            axes.plot([x, x + 0.1], [y, y], color=INK, lw=1.0)
            x += 0.1
        token.draw(axes, x, y)
        x += token.width
    return x


def draw(path: Path, lines: list[Line]) -> None:
    """Write one picture."""
    heights = [_height(line) for line in lines]
    total = sum(heights) + 0.2
    figure = Figure(facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    y, wide = total - 0.1, 0.0
    for (direction, before, after), height in zip(lines, heights, strict=True):
        middle = y - height / 2
        axes.text(0.3, middle - 0.03, direction, ha="left", va="center", fontsize=8, color=QUIET)
        x = _pipeline(axes, before, 1.75, middle)
        if isinstance(after[0], No):
            x = _pipeline(axes, after, x + 0.15, middle)
        else:
            axes.text(x + 0.4, middle - 0.03, "=", ha="center", va="center", fontsize=12, color=INK)
            x = _pipeline(axes, after, x + 0.8, middle)
        y, wide = y - height, max(wide, x + 0.4)
    figure.set_size_inches(wide * UNIT, total * UNIT)
    axes.set(xlim=(0, wide), ylim=(0, total))
    figure.savefig(path, facecolor=PAPER, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=200)


S, T = Strip(), Strip(shift=False)
TWO, ONE = (A, B), (A,)


def _passes(op: str, *more: Line, strip: Strip = S) -> list[Line]:
    return [("up", (Op(op), strip), (strip, Op(op))), ("down", (strip, Op(op)), (Op(op), strip)), *more]


def _fork(above: Op, *below: Strip) -> Fork:
    return Fork(((above,), below), read=True)


LEANT = (_fork(Op("Conv", True)), Op("Add"))

PICTURES: dict[str, list[Line]] = {
    "absorb": [
        ("up", (Op("Conv"), S), (Op("Conv", True),)),
        ("down", (S, Op("Conv")), (Op("Conv", True),)),
        ("down", (S, Op("Conv, padded")), (No("no shift: the border reads zeros"),)),
        ("down", (T, Op("Conv, padded")), (Op("Conv, padded", True),)),
    ],
    "beside": [
        ("down", (_fork(Op("Conv"), S), Op("Add")), LEANT),
        ("up", (_fork(Op("Conv")), Op("Add"), S), LEANT),
    ],
    "batchnorm": [
        ("up", (Op("BatchNorm"), S), (Op("BatchNorm", True),)),
        ("down", (S, Op("BatchNorm")), (Op("BatchNorm", True),)),
    ],
    "affine": [
        ("up", (Op("x 3, + 1"), Strip((A, B))), (Strip((C, D)), Op("x 3, + 1"))),
        ("down", (Strip((A, B)), Op("x 3, + 1")), (Op("x 3, + 1"), Strip((C, D)))),
        ("up", (Op("x 0"), S), (No("nothing undoes a zero"),)),
    ],
    "pass": _passes("Identity"),
    "cast": [*_passes("Cast, wider"), ("up", (Op("Cast, narrower"), S), (No("it would round elsewhere"),))],
    "reshape": [
        ("up", (Op("Flatten"), Strip((A, A, B, B))), (S, Op("Flatten"))),
        ("down", (S, Op("Flatten")), (Op("Flatten"), Strip((A, A, B, B)))),
    ],
    "transpose": [
        ("up", (Op("Transpose"), S), (Strip(lying=True), Op("Transpose"))),
        ("down", (S, Op("Transpose")), (Op("Transpose"), Strip(lying=True))),
    ],
    "select": [
        ("up", (Op("Slice"), S), (Strip((A, B, "", "")), Op("Slice"))),
        ("down", (Strip((A, B, C, D)), Op("Slice")), (Op("Slice"), S)),
    ],
    "split": [
        ("up", (Op("Split"), Fork(((Strip(ONE),), (Strip((B,)),)), read=True, meet=False)), (S, Op("Split"))),
        (
            "down",
            (S, Op("Split")),
            (Op("Split"), Fork(((Strip(ONE),), (Strip((B,)),)), read=True, meet=False)),
        ),
    ],
    "concat": [
        ("up", (Op("Concat"), S), (Fork(((Strip(ONE),), (Strip((B,)),))), Op("Concat"))),
        ("down", (Fork(((Strip(ONE),), (Op("x"),))), Op("Concat")), (Op("Concat"), Strip((A, "white")))),
    ],
    "repeat": [
        ("up", (Op("Tile"), Strip((A, B, A, B))), (S, Op("Tile"))),
        ("down", (S, Op("Tile")), (Op("Tile"), Strip((A, B, A, B)))),
        ("up", (Op("Tile"), Strip((A, B, C, D))), (No("copies would have to differ"),)),
    ],
    "blocks": [
        ("up", (Op("DepthToSpace"), S), (Strip((A, A, A, A, B, B, B, B)), Op("DepthToSpace"))),
        ("up", (Op("SpaceToDepth"), Strip((A, A, A, A))), (Strip((A,)), Op("SpaceToDepth"))),
    ],
    "add": [
        ("up", (Op("Add"), S), (Fork(((S,), (T,))), Op("Add"))),
        ("down", (Fork(((S,), (S,))), Op("Add")), (Op("Add"), Strip(TWO))),
        ("down", (Fork(((S,), (Op("x"),))), Op("Add")), (No("only one of the two is scaled"),)),
    ],
    "multiply": [
        ("up", (Op("Mul"), T), (Fork(((T,), (Op("x"),))), Op("Mul"))),
        ("down", (Fork(((T,), (Op("x"),))), Op("Mul")), (Op("Mul"), T)),
        ("up", (Op("Mul"), S), (No("no shift"),)),
    ],
    "mean": [
        *_passes("AveragePool"),
        ("up", (Op("counts padding"), S), (No("no shift: its weights do not sum to one"),)),
    ],
    "maximum": [*_passes("MaxPool"), ("up", (Op("MaxPool"), S), (No("if some scale is negative"),))],
    "sum": [
        *_passes("ReduceSum", strip=T),
        ("up", (Op("ReduceSum"), S), (No("no shift: it would be summed"),)),
    ],
    "relu": [
        *_passes("Relu", strip=T),
        ("up", (Op("Relu"), S), (No("no shift, and no negative scale"),)),
    ],
    "pad": [
        *_passes("Pad, reflect"),
        ("up", (Op("Pad, zeros"), S), (No("no shift: the border stays zero"),)),
    ],
    "half": [
        ("down", (S, Op("Conv, padded")), (Strip(scale=False), Op("Conv, padded", True))),
        ("up", (Op("Conv"), Op("Relu"), S), (Op("Conv", True), Op("Relu"), Strip(scale=False))),
    ],
}


def main() -> None:
    """Draw all of them, into the folder that is named or beside the document."""
    mpl.rcParams["svg.hashsalt"] = "bnfold"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures" / "travel"
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in PICTURES.items():
        draw(folder / f"{name}.svg", lines)


if __name__ == "__main__":
    main()
