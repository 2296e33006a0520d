"""What a net has learnt: its loss on a part of the names, in eval mode, over every example.

Eval mode is the point. In training mode a BatchNorm normalises by the batch at hand, so a loss measured that way is
the loss of another function, and changes with the company an example keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from train.material import ContextCounts

__all__ = ["evaluating", "measure"]

_CHUNK = 2**14


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
