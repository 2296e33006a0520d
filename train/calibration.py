"""The lecture's stage two: the statistics of every BatchNorm over the training set, after training.

A set has many examples of each context, so contexts are taken once, with weights (see `bnfold.calibrate`). Which, makes
a difference where batches are not drawn from the set as it is:

    as drawn        each context as often as it is in a batch: what the running averages estimate, what the weights
                    were trained under, and what is kept
    over the set    each context as often as it is in the training set

For recipes that draw examples the two are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bnfold
from train.batches import draw_examples, presence
from train.diagnostics import Statistics
from train.material import Material
from train.page import Table
from train.recipes import Recipe

__all__ = ["AS_DRAWN", "OVER_SET", "calibrate", "tabulate"]

AS_DRAWN, OVER_SET = "calibrated as drawn", "calibrated over the training set"
_CHUNK = 2**14


def calibrate(net: nn.Sequential, material: Material, recipe: Recipe) -> dict[str, nn.Sequential]:
    """Return copies of `net` with calibrated statistics, by name; `AS_DRAWN` alone where the other is the same.

    Raises:
        InputError: the net has no BatchNorm.
    """
    drawn = presence(recipe.draw, material, recipe.batch)
    ways = {AS_DRAWN: drawn * (material.train.examples / drawn.sum())}
    if recipe.draw is not draw_examples:
        ways[OVER_SET] = material.train.frequencies
    return {name: _calibrate(net, material.train.contexts, weights) for name, weights in ways.items()}


def tabulate(statistics: tuple[Statistics, ...]) -> Table:
    """Return, for each BatchNorm, how far the running statistics are from the calibrated ones."""
    rows = [
        (one.name, f"{one.apart:.3f}", f"{one.ratios[0]:.3f} to {one.ratios[1]:.3f}") for one in statistics
    ]
    return Table(("running against calibrated", "means apart at most, in stds", "ratio of stds"), rows)


def _calibrate(net: nn.Sequential, contexts: Tensor, weights: Tensor) -> nn.Sequential:
    batches = list(zip(torch.split(contexts, _CHUNK), torch.split(weights, _CHUNK), strict=True))

    def apply(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = model(batch[0])
        return out

    with torch.no_grad():
        return bnfold.calibrate(net, batches, apply=apply, weights=lambda batch: batch[1])
