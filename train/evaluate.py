"""What a net has learnt: its loss on a part of the names, in eval mode, over every example.

Eval mode is the point. In training mode a BatchNorm normalises by the batch at hand, so a loss measured that way is
the loss of another function, and changes with the company an example keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from train.material import ContextCounts

__all__ = ["Habits", "evaluating", "measure", "study_habits"]

_CHUNK = 2**14


@dataclass(frozen=True)
class Habits:
    """How far a net has come beyond the letters' frequencies.

    `divergence` is KL(frequencies || net), the mean over all examples, in nats; `contrast` the largest difference
    that a context makes to the probability of a character, 0 for a net that does not look at it.
    """

    divergence: float
    contrast: float


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put a net into eval mode without gradients, and back."""
    before = net.training
    try:
        with torch.no_grad():
            net.eval()
            yield
    finally:
        net.train(before)


def measure(net: nn.Sequential, table: ContextCounts) -> float:
    """Return the mean loss of a net over all examples of `table`, in nats, summed in float64."""
    total = 0.0
    with evaluating(net):
        for first in range(0, len(table), _CHUNK):
            last = min(first + _CHUNK, len(table))
            pairs = slice(int(table.starts[first]), int(table.starts[last]))
            rows = torch.arange(last - first).repeat_interleave(table.starts[first : last + 1].diff())
            losses = -net(table.contexts[first:last]).double().log_softmax(1)
            total += float(losses[rows, table.targets[pairs]] @ table.counts[pairs])
    return total / table.examples


def study_habits(net: nn.Sequential, table: ContextCounts) -> Habits:
    """Return how a net's probabilities compare with the frequencies of the characters in `table`, in float64."""
    with evaluating(net):
        logs = net(table.contexts).double().log_softmax(1)
    letters = torch.zeros(logs.shape[1], dtype=torch.float64).index_add_(0, table.targets, table.counts)
    letters /= letters.sum()
    known = letters > 0
    divergences = (letters[known] * (letters[known].log() - logs[:, known])).sum(1)
    probabilities = logs.exp()
    contrast = (probabilities.amax(0) - probabilities.amin(0)).max()
    return Habits(float(divergences @ table.frequencies) / table.examples, float(contrast))
