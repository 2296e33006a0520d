"""The lecture's pictures, from what `train.diagnostics` saw.

    pictures = draw_all(diagnostics)               # as SVG text, to be put into a page
    draw(diagnostics, folder)                      # each as a file, and `index.html` with all of them

Each picture is a function of its own too, so that a page of several runs can choose. They are SVG with no background:
ink is `currentColor`, near black, or near white where the reader prefers dark; lines have colours of a middle
lightness with a contrast of at least 3 to white and to near black alike (WCAG 2.2, 1.4.11). The same numbers give the
same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from bnfold.errors import InputError
from bnfold.output import replacing, together
from train.diagnostics import DEAD, Diagnostics, Layer, Record, Spread, Statistics
from train.page import Picture, write_page

__all__ = [
    "COLOURS",
    "draw",
    "draw_activations",
    "draw_all",
    "draw_gradients",
    "draw_losses",
    "draw_parameter_gradients",
    "draw_saturation",
    "draw_statistics",
    "draw_updates",
]

Item = TypeVar("Item")

COLOURS = ("#3b82f6", "#d9640a", "#15913f", "#e0393e", "#8b5cf6", "#0e8a9c", "#db2777", "#7c7a12")
_RAMP = LinearSegmentedColormap.from_list("depth", [COLOURS[i] for i in (0, 4, 6, 3, 1)])

_INK = "#010203"
"""Drawn wherever `currentColor` is meant; no line has this colour."""

_SCHEME = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "grid.color": _INK, "grid.alpha": 0.12, "axes.grid": True, "axes.axisbelow": True, "legend.frameon": False,
    "font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9, "lines.linewidth": 1.4,
    "svg.hashsalt": "bnfold", "svg.fonttype": "path",
}  # fmt: skip
_WIDTH = 9.0
_MOST_NAMED = 12
_MOST_MAPS = 6
_BLOCKS = 200
_UNLIKE = 30
"""Sizes with a larger ratio are drawn on a logarithmic axis."""


def draw_activations(record: Record) -> Picture:
    """Draw how the outputs of each layer are spread."""
    lines = [
        (f"{_name(layer)}: mean {s.mean:+.2f}, std {s.std:.2f}, saturated {layer.saturated:.1%}", s)
        for layer in record.layers
        if (s := layer.output)
    ]
    return _draw_spreads(
        "activations", f"Activations at step {record.step:,}", "output",
        "A healthy tanh layer keeps its std from layer to layer, with a few per cent saturated at -1 and 1.", lines,
    )  # fmt: skip


def draw_gradients(record: Record) -> Picture:
    """Draw how the gradients of the layers' outputs are spread."""
    lines = [
        (f"{_name(layer)}: mean {s.mean:+.1e}, std {s.std:.1e}", s)
        for layer in record.layers
        if (s := layer.gradient)
    ]
    return _draw_spreads(
        "gradients", f"Gradients of the activations at step {record.step:,}", "derivative of the loss",
        "They should be as wide in the first layer as in the last: neither vanish nor explode with depth.", lines,
    )  # fmt: skip


def draw_parameter_gradients(record: Record) -> Picture:
    """Draw how the gradients of the weights are spread, with their size beside that of the weights."""
    lines = [
        (
            f"{p.name} {_shape(p.shape)}: mean {s.mean:+.1e}, std {s.std:.1e}, grad:data {p.gradient_ratio:.1e}",
            s,
        )
        for p in record.parameters
        if len(p.shape) > 1 and (s := p.gradient)
    ]
    return _draw_spreads(
        "weights", f"Gradients of the weights at step {record.step:,}", "derivative of the loss",
        "A weight whose grad:data stands out is going to learn at a pace of its own.", lines,
    )  # fmt: skip


def draw_updates(diagnostics: Diagnostics) -> Picture:
    """Draw the update:data ratio of each weight over time."""
    weights = {p.name for record in diagnostics.records for p in record.parameters if len(p.shape) > 1}
    with _figure(3.6) as figure:
        axes = figure.subplots()
        lines = {name: line for name, line in diagnostics.updates().items() if name in weights}
        for (name, (steps, ratios)), colour in zip(lines.items(), _colours(len(lines)), strict=True):
            heights = [ratio if math.isfinite(ratio) else math.nan for ratio in ratios]
            label = name if np.isfinite(heights).any() else f"{name} (constant)"
            axes.plot(steps, heights, ".-" if len(steps) < 3 else "-", color=colour, label=label)
        axes.set_xlim(*_span(diagnostics))
        axes.axhline(-3, color=_INK, linestyle="--", linewidth=1)
        axes.set(xlabel="step", ylabel="log10(update : data)")
        _legend(figure, axes)
        return _finish(
            figure, "updates", "Size of the updates",
            "Std of the change that a step makes over std of the weight. The dashed guide at -3 is the lecture's: far "
            "below it a weight learns too slowly, far above it too fast. A weight that is constant has no ratio.",
        )  # fmt: skip


def draw_losses(runs: Mapping[str, Sequence[float]]) -> Picture:
    """Draw the losses of runs by name: all steps, and again without the first twentieth, where a hockey stick is."""
    with _figure(3.4) as figure:
        whole, rest = figure.subplots(1, 2)
        for (name, losses), colour in zip(runs.items(), _colours(len(runs)), strict=True):
            _draw_loss(whole, name, losses, colour, 0, len(runs) == 1)
            _draw_loss(rest, name, losses, colour, len(losses) // 20, len(runs) == 1)
        whole.set(title="all steps", xlabel="step", ylabel="loss", yscale="log")
        rest.set(title="without the first twentieth", xlabel="step")
        whole.yaxis.set_major_locator(MaxNLocator(7))
        whole.yaxis.set_major_formatter("{x:g}")
        whole.yaxis.set_minor_locator(NullLocator())
        if len(runs) > 1:
            _legend(figure, whole)
        return _finish(
            figure, "loss", "Loss",
            "Left, on a logarithmic scale: a hockey stick means that training began by unlearning a confidently wrong "
            "first guess. Right, what remains without it. Lines are means of neighbouring steps; of a single run, a "
            "band goes from least to most.",
        )  # fmt: skip


def draw_saturation(records: Sequence[Record]) -> Picture:
    """Draw, for each of some steps, which neurons let no gradient through for which of 32 examples."""
    rows = _choose([layer.name for layer in records[-1].layers], _MOST_MAPS)
    with _figure(0.6 + 1.3 * len(rows)) as figure:
        grid = figure.subplots(len(rows), len(records), squeeze=False)
        for column, record in zip(grid.T, records, strict=True):
            seen = {layer.name: layer for layer in record.layers}
            for axes, name in zip(column, rows, strict=True):
                _draw_map(axes, record.step, seen[name])
        return _finish(
            figure, "saturation", "Saturated neurons",
            f"White: |h| > {DEAD} (h at or below 0 after ReLU), so that no gradient to speak of passes. Each row is an "
            "example, each column a neuron; a column all white is a neuron that is dead for these examples.",
        )  # fmt: skip


def draw_statistics(statistics: Sequence[Statistics]) -> Picture:
    """Draw the running mean and std of every channel against the calibrated ones."""
    with _figure(4.6) as figure:
        means, stds = figure.subplots(1, 2)
        for one, colour in zip(statistics, _colours(len(statistics)), strict=True):
            means.plot(one.mean, one.running_mean, ".", color=colour, markersize=4, label=_compare(one))
            stds.plot(one.var**0.5, one.running_var**0.5, ".", color=colour, markersize=4)
        for axes, what in ((means, "mean"), (stds, "std")):
            axes.axline((0, 0), slope=1, color=_INK, linestyle="--", linewidth=0.8)
            axes.set(title=what, xlabel="calibrated, over the whole set", ylabel="running, while training")
        _legend(figure, means, 1)
        return _finish(
            figure, "statistics", "Running against calibrated statistics",
            "Each dot is a channel; on the dashed line both agree. Running averages lag behind the weights and take on "
            "the noise of their last batches.",
        )  # fmt: skip


def draw_all(diagnostics: Diagnostics, statistics: Sequence[Statistics] = ()) -> list[Picture]:
    """Draw every picture that there are numbers for, of the last step that was watched.

    Raises:
        InputError: no step was watched.
    """
    if not diagnostics.records:
        raise InputError("no step was watched, so there is nothing to draw; train for at least one step")
    first, last = diagnostics.records[0], diagnostics.records[-1]
    pictures = [draw_losses({"loss": diagnostics.losses})]
    if last.layers:
        pictures += [draw_activations(last), draw_gradients(last)]
    pictures += [draw_parameter_gradients(last), draw_updates(diagnostics)]
    if last.layers:
        pictures.append(draw_saturation([first] if first is last else [first, last]))
    return pictures + ([draw_statistics(statistics)] if statistics else [])


def draw(
    diagnostics: Diagnostics,
    folder: str | Path,
    statistics: Sequence[Statistics] = (),
    title: str = "What the net did while it trained",
) -> Path:
    """Write every picture into `folder`, made if need be, and `index.html` with all of them; return its path.

    Raises:
        InputError: no step was watched, or `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the pictures")
    pictures = draw_all(diagnostics, statistics)
    folder.mkdir(parents=True, exist_ok=True)
    with together():
        for picture in pictures:
            with replacing(folder / f"{picture.name}.svg") as temporary:
                temporary.write_text(picture.svg, encoding="utf-8")
        write_page(folder / "index.html", title, pictures)
    return folder / "index.html"


def _draw_spreads(
    name: str, title: str, label: str, caption: str, lines: Sequence[tuple[str, Spread]]
) -> Picture:
    """Draw densities, of many only some, beside the std of all, in the order of computation."""
    colours = _colours(len(lines))
    chosen = _choose(range(len(lines)), _MOST_NAMED)
    with _figure(3.4 + 0.2 * len(chosen)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 1))
        right.set_visible(len(lines) > 1)
        for i in chosen:
            _draw_spread(left, *lines[i], colours[i])
        _limit(left, [lines[i][1] for i in chosen])
        left.set(xlabel=label, ylabel="density")
        stds = [s.std for _, s in lines]
        right.scatter(range(1, len(lines) + 1), stds, c=colours, s=16)
        right.set(xlabel="in order", ylabel="std")
        if _ratio(stds) > _UNLIKE:
            right.set_yscale("log")
        else:
            right.set_ylim(0, 1.15 * max((std for std in stds if 0 < std < math.inf), default=1))
        right.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _legend(figure, left, 1)
        return _finish(figure, name, title, caption)


def _draw_spread(axes: Axes, text: str, spread: Spread, colour: str) -> None:
    """Draw a density, or a line where all numbers are equal and there is none."""
    if spread.least == spread.most:
        axes.axvline(spread.least, color=colour, label=f"{text}, all equal")
    else:
        axes.plot(*spread.density, color=colour, label=text)


def _limit(axes: Axes, spreads: Sequence[Spread]) -> None:
    """Keep single outliers from squeezing the densities, and densities of very unlike widths readable."""
    stds = [s.std for s in spreads if math.isfinite(s.std)]
    ends = [end for s in spreads for end in (s.least, s.most) if math.isfinite(end)]
    if ends and (reach := 6 * max(stds, default=0)) > 0:
        axes.set_xlim(max(min(ends), -reach), min(max(ends), reach))
    elif ends:
        axes.set_xlim(min(ends) - 1, max(ends) + 1)
    if _ratio(stds) > _UNLIKE:
        axes.set_yscale("log")


def _ratio(stds: Sequence[float]) -> float:
    """Return the largest over the least of those above zero."""
    positive = [std for std in stds if std > 0]
    return max(positive) / min(positive) if positive else 1.0


def _span(diagnostics: Diagnostics) -> tuple[float, float]:
    return -0.02 * len(diagnostics.losses), 1.02 * len(diagnostics.losses)


def _draw_loss(axes: Axes, name: str, losses: Sequence[float], colour: str, begin: int, band: bool) -> None:
    values = np.asarray(losses)[begin:]
    steps = np.arange(begin, begin + len(values))
    size = max(1, len(values) // _BLOCKS)
    whole = len(values) // size * size
    blocks = values[:whole].reshape(-1, size)
    middles = steps[:whole].reshape(-1, size).mean(1)
    if band:
        axes.fill_between(middles, blocks.min(1), blocks.max(1), color=colour, alpha=0.25, linewidth=0)
    axes.plot(middles, blocks.mean(1), color=colour, label=name)


def _draw_map(axes: Axes, step: int, layer: Layer) -> None:
    axes.imshow(layer.dead_map, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="none")
    dead = round(layer.dead * layer.dead_map.shape[1])
    axes.set_title(
        f"{_name(layer)} at step {step:,}: {dead} of {layer.dead_map.shape[1]:,} dead in the batch"
    )
    axes.grid(visible=False)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(True)


def _compare(one: Statistics) -> str:
    least, most = one.ratios
    return f"{one.name}: means {one.apart:.2f} std apart at most, std ratio {least:.2f} to {most:.2f}"


def _name(layer: Layer) -> str:
    return layer.name if layer.kind.lower() in layer.name.lower() else f"{layer.name} ({layer.kind})"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _choose(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` of the items, evenly, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))
    return [items[i] for i in chosen]


def _colours(count: int) -> list[str]:
    """Return a colour for each line: unlike ones for a few, a ramp by depth for many."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [mpl.colors.to_hex(_RAMP(i / (count - 1))) for i in range(count)]


def _legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """Put the names of the lines below the figure; of many only some, the first and the last among them."""
    handles = axes.get_legend_handles_labels()[0]
    if handles:
        named = _choose(handles, _MOST_NAMED)
        figure.legend(handles=named, loc="outside lower center", ncols=columns)


@contextmanager
def _figure(height: float) -> Iterator[Figure]:
    settings: dict[Any, Any] = {**mpl.rcParamsDefault, **_SETTINGS}
    with mpl.rc_context(settings):
        yield Figure(figsize=(_WIDTH, height), layout="constrained")


def _finish(figure: Figure, name: str, title: str, caption: str) -> Picture:
    """Return the figure as SVG text without date, its ink in `currentColor`."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue().replace(_INK, "currentColor")
    head, _, body = svg.partition("<defs>")
    return Picture(name, title, caption, f"{head}{_SCHEME}<defs>{body}")
