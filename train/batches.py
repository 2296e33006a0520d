"""Minibatches: examples as the lecture draws them, or different contexts with all that follows them.

Both are endless and take their chances from one generator. Each estimates the training loss by

    loss = sum_b sum_t w[b, t] * -log p(t | x[b]),        sum w = 1

`draw_examples` takes `size` examples with replacement; w is 1 / size at the example's own character. Many batches are
drawn at once, which gives the same ones and costs less.

`draw_contexts` takes `size` different contexts. Context c is in a batch with probability pi(c), the square root of its
frequency times a constant, at most 1; then w[c, t] is n(c, t) / pi(c), divided by the sum of all (Hajek 1971), which
is steadier than the unbiased estimate with N instead. The most frequent contexts are in every batch with the exact
counts of what follows, so that a few hundred rows give a gradient with less noise than thousands of examples do. The
draw is systematic (Madow 1949): contexts in random order, laid end to end by their probability, and `size` equidistant
points; `ROUND` batches share one order, their points evenly interleaved, so that each context turns up as often as it
should.

Of the powers tried, 1/4, 1/2 and 3/4 do equally well, 1 a little and 0 much worse. Rare contexts are seen more often
than they occur; so a BatchNorm sees, and tracks the statistics of, the contexts as they are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from train.material import Material

__all__ = ["AT_ONCE", "ROUND", "draw_contexts", "draw_examples", "inclusion", "presence"]

AT_ONCE = 3200
"""About as many examples are drawn at once: a hundred of the lecture's batches."""

ROUND = 16

Batch = tuple[Tensor, Tensor]


def draw_examples(material: Material, size: int, generator: Generator) -> Iterator[Batch]:
    """Yield `size` contexts (size, length) and their targets (size,), int64, drawn with replacement."""
    x, y = material.examples
    while True:
        chosen = torch.randint(0, len(x), (max(1, AT_ONCE // size), size), generator=generator)
        yield from zip(x[chosen], y[chosen], strict=True)


def draw_contexts(material: Material, size: int, generator: Generator) -> Iterator[Batch]:
    """Yield at most `size` different contexts (b, length) and the weights of their targets (b, characters) float32."""
    table, characters = material.train, len(material.vocabulary)
    probabilities = inclusion(table.frequencies, size)
    lengths = table.starts.diff()
    weights = (table.counts / probabilities.repeat_interleave(lengths)).to(torch.float32)
    for chosen in _systematic(probabilities, min(size, len(table)), generator):
        lasting = lengths[chosen]
        ends = lasting.cumsum(0)
        pairs = torch.arange(int(ends[-1])) + (table.starts[chosen] - ends + lasting).repeat_interleave(
            lasting
        )
        targets = torch.zeros(len(chosen) * characters)
        rows = torch.arange(0, len(targets), characters).repeat_interleave(lasting)
        targets[rows + table.targets[pairs]] = weights[pairs]
        yield table.contexts[chosen], (targets / targets.sum()).view(-1, characters)


def inclusion(frequencies: Tensor, size: int) -> Tensor:
    """Return min(1, k * sqrt(frequency)), (n,) float64, with k such that they sum to `size`; all 1 if `size` >= n."""
    wished = frequencies.double().sqrt()
    certain = torch.zeros(len(wished), dtype=torch.bool)
    while not certain.all():
        scale = (size - certain.sum()) / wished[~certain].sum()
        more = ~certain & (wished * scale >= 1)
        if not more.any():
            return torch.where(certain, 1.0, wished * scale)
        certain |= more
    return torch.ones_like(wished)


def presence(draw: object, material: Material, size: int) -> Tensor:
    """Return how often each context of the training set is in a batch of `draw`, on average, (n,) float64.

    That is what a BatchNorm sees while the net trains; for `draw_examples` it is the frequency in the set.
    """
    frequencies = material.train.frequencies
    return inclusion(frequencies, size) if draw is draw_contexts else frequencies * (size / frequencies.sum())


def _systematic(probabilities: Tensor, size: int, generator: Generator) -> Iterator[Tensor]:
    """Yield the indices of `size` different elements, each element in a batch with its probability."""
    steps = torch.arange(size, dtype=torch.float64)
    while True:
        order = torch.randperm(len(probabilities), generator=generator)
        ends = probabilities[order].cumsum(0)
        ends[-1] = size
        offset = torch.rand(1, generator=generator, dtype=torch.float64)
        for turn in torch.randperm(ROUND, generator=generator):
            yield order[torch.searchsorted(ends, steps + (turn + offset) / ROUND, right=True)]
