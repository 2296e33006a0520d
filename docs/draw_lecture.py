"""Draw the pictures of docs/lecture.md again: python docs/draw_lecture.py, from the checkout.

Every picture is of a run of the shipped list with the notebook's seed, short enough for all of them to take a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Generator

import data
from train import calibration, plots
from train.diagnostics import Diagnostics, compare_statistics
from train.lab import Outcome, perform
from train.loop import descend
from train.material import Material, prepare
from train.page import Picture
from train.recipes import RECIPES, make

FOLDER = Path(__file__).parent / "pictures" / "lecture"
SEED = 2147483647


def draw(material: Material) -> Iterator[tuple[str, Picture]]:
    """Yield a name and a picture for each station that shows something of its own."""
    runs = {name: perform(RECIPES[name], material, SEED, 3000) for name in ("original", "softmax", "tanh")}
    yield "loss", plots.draw_losses({name: runs[name].diagnostics.losses for name in ("original", "softmax")})
    yield "saturation-softmax", _draw_first_map(runs["softmax"])
    yield "saturation-tanh", _draw_first_map(runs["tanh"])
    for name in ("gain-1", "gain-3", "deep"):
        run = perform(RECIPES[name], material, SEED, 1000)
        yield f"activations-{name}", plots.draw_activations(run.diagnostics.records[0])
    for name in ("plain", "slow"):
        yield f"updates-{name}", plots.draw_updates(perform(RECIPES[name], material, SEED, 1000).diagnostics)
    yield "statistics", _draw_statistics(material)


def _draw_first_map(run: Outcome) -> Picture:
    return plots.draw_saturation(run.diagnostics.records[:1])


def _draw_statistics(material: Material) -> Picture:
    """Draw running against calibrated statistics of the first BatchNorm after 300 steps, when weights move fast."""
    recipe, generator = RECIPES["lecture"], Generator().manual_seed(SEED)
    net = make(recipe, material, generator)
    with Diagnostics(net, 300) as diagnostics:
        for loss in descend(net, material, recipe, generator):
            diagnostics.record(loss)
            if len(diagnostics.losses) == 300:
                break
    calibrated = calibration.calibrate(net, material, recipe)[calibration.AS_DRAWN]
    return plots.draw_statistics(compare_statistics(net, calibrated)[:1])


def main() -> int:
    """Draw them all."""
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, picture in draw(prepare(data.read_names(None))):
        (FOLDER / f"{name}.svg").write_text(picture.svg, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
