"""Contexts and targets: each character of a name, and its end, told from the `length` characters before it.

With a context of 3, `emma` gives `... -> e`, `..e -> m`, `.em -> m`, `emm -> a`, `mma -> .`. All names are
laid out as one stream with `length` terminators before each name and after the last,

    . . . e m m a . . . o l i v i a . . .

and the examples are the windows of `length + 1` characters, less those whose target is a terminator that
follows another one. NumPy does all of it at once; no example is touched in Python. Contexts never reach
across names.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bnfold.errors import InputError
from data.vocabulary import Vocabulary

__all__ = ["MOST_CONTEXTS", "Split", "all_contexts", "contexts", "split"]

MOST_CONTEXTS = 2**24
"""As many as `all_contexts` will list: 400 MB for a context of 3."""


class Split(NamedTuple):
    """The names to train on, to choose by (dev) and to judge by (test)."""

    train: list[str]
    dev: list[str]
    test: list[str]


def split(names: Sequence[str], seed: int = 42) -> Split:
    """Shuffle a copy of `names` as `random.seed(seed)` would and cut it 80 / 10 / 10, by word.

    The same seed and names give the lecture's split to the word. With fewer than `FEWEST_NAMES` names a part
    is empty.
    """
    shuffled = list(names)
    Random(seed).shuffle(shuffled)
    first, second = int(0.8 * len(shuffled)), int(0.9 * len(shuffled))
    return Split(shuffled[:first], shuffled[first:second], shuffled[second:])


def contexts(
    names: Sequence[str], vocabulary: Vocabulary, length: int = 3
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the contexts (examples, length) and the targets (examples,) of all names, in order, both int64.

    There is one example for each character and one for the end of each name; an empty name has none.

    Raises:
        InputError: a length below 1, a character that the vocabulary lacks, or its terminator inside a name.
    """
    _check_length(length)
    gap = vocabulary.terminator * length
    stream = vocabulary.encode(gap + "".join(name + gap for name in names))
    if np.count_nonzero(stream) < sum(map(len, names)):
        raise InputError(f"a name holds {vocabulary.terminator!r}, which ends names in this vocabulary")
    targets = length + np.flatnonzero(stream[length:] | stream[length - 1 : -1])
    return stream[targets[:, None] + np.arange(-length, 0)], stream[targets]


def all_contexts(vocabulary_size: int, length: int = 3) -> NDArray[np.int64]:
    """Return every context, (vocabulary_size**length, length) int64, the last place running fastest.

    Raises:
        InputError: a length below 1, or more than `MOST_CONTEXTS` of them.
    """
    _check_length(length)
    if (count := vocabulary_size**length) > MOST_CONTEXTS:
        raise InputError(
            f"{vocabulary_size} characters make {count:,} contexts of {length}; at most {MOST_CONTEXTS:,} "
            "can be listed: take a shorter context"
        )
    return np.ascontiguousarray(np.indices((vocabulary_size,) * length, np.int64).reshape(length, -1).T)


def _check_length(length: int) -> None:
    if length < 1:
        raise InputError(f"a context of {length} characters; it takes 1 or more")
