"""The material of a run: names as examples, and the same examples counted by context.

Of the 182,625 training examples of the lecture's list only 5,438 contexts are different. A net sees nothing of an
example but its context, so the loss over all examples is one pass over the different contexts,

    L = -1/N sum_c sum_t n(c, t) log p(t | c),        n(c, t): how often character t follows context c

at a thirty-fourth of the work. `ContextCounts` holds n as runs: the pairs of context i are `starts[i]` to `starts[i +
1]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import data

__all__ = ["ContextCounts", "Material", "count_contexts", "prepare"]


@dataclass(frozen=True)
class ContextCounts:
    """Different contexts in lexicographic order, and how often which character follows each.

    `contexts` (n, length) int64; `starts` (n + 1,) int64; `targets` (pairs,) int64; `counts` (pairs,) float64.
    """

    contexts: Tensor
    starts: Tensor
    targets: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def examples(self) -> int:
        """The number of examples that were counted."""
        return int(self.counts.sum())

    @property
    def frequencies(self) -> Tensor:
        """How many examples have each context, (n,) float64."""
        return torch.segment_reduce(self.counts, "sum", offsets=self.starts)


@dataclass(frozen=True)
class Material:
    """A list of names, ready to train on: `examples` are those of train, (n, context) and (n,) int64."""

    names: data.Split
    vocabulary: data.Vocabulary
    context: int
    examples: tuple[Tensor, Tensor]
    train: ContextCounts
    dev: ContextCounts
    test: ContextCounts


def prepare(names: Sequence[str], context: int = 3) -> Material:
    """Split `names` as the lecture does and count each part by context.

    Raises:
        InputError: a context below 1.
    """
    vocabulary, parts = data.Vocabulary.from_names(names), data.split(names)
    x, y = data.contexts(parts.train, vocabulary, context)
    dev, test = (
        count_contexts(*data.contexts(part, vocabulary, context)) for part in (parts.dev, parts.test)
    )
    examples = torch.from_numpy(x), torch.from_numpy(y)
    return Material(parts, vocabulary, context, examples, count_contexts(x, y), dev, test)


def count_contexts(x: NDArray[np.int64], y: NDArray[np.int64]) -> ContextCounts:
    """Count the examples with contexts `x` (n, length) and targets `y` (n,), at least one."""
    rows = np.column_stack([x, y])
    rows = rows[np.lexsort(rows.T[::-1])]
    changed = rows[1:] != rows[:-1]
    pairs = np.flatnonzero(np.r_[True, changed.any(1)])
    firsts = np.flatnonzero(np.r_[True, changed[:, :-1].any(1)])
    starts = np.r_[np.searchsorted(pairs, firsts), len(pairs)]
    counts = np.diff(np.r_[pairs, len(rows)]).astype(np.float64)
    return ContextCounts(*map(torch.from_numpy, (rows[firsts, :-1], starts, rows[pairs, -1], counts)))
