"""Names that a net invents: one character after the other, from its own probabilities, in eval mode."""

from __future__ import annotations

import torch
from torch import Generator, nn

import data
from train.evaluate import evaluating

__all__ = ["invent"]


def invent(
    net: nn.Sequential, vocabulary: data.Vocabulary, context: int, count: int, generator: Generator
) -> list[str]:
    """Return `count` names, all written at once; one that does not end is cut at `data.LONGEST_NAME` characters."""
    window = torch.zeros(count, context, dtype=torch.int64)
    written = torch.zeros(count, 0, dtype=torch.int64)
    with evaluating(net):
        while written.shape[1] < data.LONGEST_NAME and not (written == 0).any(1).all():
            drawn = torch.multinomial(net(window).softmax(1), 1, generator=generator)
            window, written = torch.cat([window[:, 1:], drawn], 1), torch.cat([written, drawn], 1)
    names = (vocabulary.decode(numbers) for numbers in written.tolist())
    return [name.partition(vocabulary.terminator)[0] for name in names]
