"""Recipes: how a net is trained, as data. A recipe is a row here; nothing else knows its name.

`quick` was found by measuring, on the makemore list and on one thread. What was tried, with the dev loss at the end:

    large batches of examples, AdamW, one cycle                        12 s     2.075
    all different contexts in every step, Adam, 300 steps              10 s     2.122
    the same with orthogonalised steps (Muon), 200 steps                8 s     2.093    overfits
    a sixteenth of the contexts, drawn evenly, Muon, 600 steps          7 s     2.150    misses the frequent ones
    300 contexts drawn by frequency ^ 0, 1, 1/2; Adam, 600 steps      1.3 s     2.140, 2.076, 2.071
    200 contexts; betas (0.9, 0.99), (0.8, 0.95)                      0.9 s     2.074, 2.070  (mean of three seeds)
    with averaged weights, weight decay, dropout, cosine              0.9 s     none better

What limits it now is generalisation: a longer run fits train better, and dev no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Generator, Tensor, nn

from train.batches import draw_contexts, draw_examples
from train.material import Material
from train.optimisers import Adam, Descent, Optimiser

__all__ = ["RECIPES", "Recipe"]

Draw = Callable[[Material, int, Generator], Iterator[tuple[Tensor, Tensor]]]
Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Recipe:
    """How to train: `rate` times `schedule(done / steps)` is the learning rate of a step."""

    name: str
    summary: str
    steps: int
    batch: int
    rate: float
    draw: Draw
    optimiser: Callable[[nn.Module], Optimiser]
    schedule: Schedule


def one_cycle(progress: float, warm: float = 0.2) -> float:
    """Rise linearly during the first fifth, then fall linearly to 0 (after Smith 2018)."""
    return max(progress, 1e-3) / warm if progress < warm else (1 - progress) / (1 - warm)


def step_decay(progress: float) -> float:
    """Return 1 in the first half, then 0.1."""
    return 1.0 if progress < 0.5 else 0.1


def brisk_adam(net: nn.Module) -> Optimiser:
    """Return Adam with betas for runs of a few hundred steps."""
    return Adam(net, betas=(0.8, 0.95))


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "quick",
            "a good net in about a second: different contexts with all that follows them, Adam, one cycle",
            steps=500, batch=256, rate=0.06, draw=draw_contexts, optimiser=brisk_adam, schedule=one_cycle,
        ),
        Recipe(
            "lecture",
            "the loop as the lecture runs it: 32 examples a step, plain gradient descent, a step decay",
            steps=200_000, batch=32, rate=0.1, draw=draw_examples, optimiser=Descent, schedule=step_decay,
        ),
    )
}  # fmt: skip
