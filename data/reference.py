"""Losses to read a training run by: what knowing nothing, the letters, or whole contexts would give, in nats.

    uniform       ln V                         every character equally likely
    unigram       -mean_i ln p(y_i)            the frequencies of the characters in the train set
    conditional   -mean_i ln p(y_i | x_i)      the frequencies after each context, in the same set

The conditional entropy is a floor: no model that sees `x` alone has a lower loss on the set it was counted
on. On other names the counts are no prediction.
"""

from __future__ import annotations

from math import log

import numpy as np
from numpy.typing import NDArray

__all__ = ["conditional_entropy", "count_distinct", "uniform_loss", "unigram_loss"]


def uniform_loss(vocabulary_size: int) -> float:
    """Return ln V, the loss of a guess that takes all characters for equally likely."""
    return log(vocabulary_size)


def unigram_loss(train_y: NDArray[np.int64], y: NDArray[np.int64]) -> float:
    """Return the mean loss on the targets `y` of the frequencies counted in the targets `train_y`.

    Infinite if `y` has a character that `train_y` lacks; nan if either is empty.
    """
    if not (len(train_y) and len(y)):
        return float("nan")
    size = 1 + max(train_y.max(), y.max())
    with np.errstate(divide="ignore"):
        losses = log(len(train_y)) - np.log(np.bincount(train_y, minlength=size))
    return float(losses[y].mean())


def conditional_entropy(x: NDArray[np.int64], y: NDArray[np.int64]) -> float:
    """Return the entropy of the targets `y` (n,) given the contexts `x` (n, length); nan if empty."""
    if not len(y):
        return float("nan")
    given = np.unique(_number_rows(x), return_counts=True)[1]
    joint = np.unique(_number_rows(np.column_stack([x, y])), return_counts=True)[1]
    return float((given @ np.log(given) - joint @ np.log(joint)) / len(y))


def count_distinct(x: NDArray[np.int64]) -> int:
    """Return how many different contexts occur among the rows of `x` (n, length)."""
    return len(np.unique(_number_rows(x)))


def _number_rows(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a number for each row, equal for equal rows only; renumbered per column to stay small."""
    numbers = np.zeros(len(rows), np.int64)
    for column in rows.T:
        numbers = np.unique(numbers * (1 + column.max(initial=0)) + column, return_inverse=True)[1]
    return numbers
