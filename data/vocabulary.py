"""The characters of a list of names, numbered; number 0 ends a name, and pads the context before it begins.

The terminator is `.`, as in the lecture, unless a name has a `.` of its own: then the first of `|`, `#`, `~`
that no name uses, or else the first such character of Unicode's private use area. It is never part of a name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from bnfold.errors import InputError

__all__ = ["Vocabulary"]


@dataclass(frozen=True)
class Vocabulary:
    """`characters[i]` is the character with number i; `characters[0]` is the terminator.

    Raises:
        InputError: fewer than two characters, one that is not a single character, or one that occurs twice.
    """

    characters: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.characters) < 2 or any(len(character) != 1 for character in self.characters):
            raise InputError("a vocabulary takes a terminator and one or more single characters")
        if len(set(self.characters)) < len(self.characters):
            raise InputError("a vocabulary takes every character once")

    @classmethod
    def from_names(cls, names: Iterable[str]) -> Vocabulary:
        """Return a terminator that no name uses, followed by the characters of `names`, sorted."""
        used = set("".join(names))
        candidates = chain(".|#~", map(chr, range(0xE000, 0x110000)))
        terminator = next(character for character in candidates if character not in used)
        return cls((terminator, *sorted(used)))

    def __len__(self) -> int:
        return len(self.characters)

    @property
    def terminator(self) -> str:
        """The character with number 0."""
        return self.characters[0]

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the numbers of the characters of `text`, (len(text),) int64.

        Raises:
            InputError: a character that the vocabulary does not hold.
        """
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        numbers = self._numbers[np.minimum(points, len(self._numbers) - 1)]
        if (numbers < 0).any():
            stranger = text[int(np.argmax(numbers < 0))]
            raise InputError(f"{stranger!r} is not among the {len(self)} characters of the vocabulary")
        return numbers

    def decode(self, numbers: Iterable[int]) -> str:
        """Return the characters with these numbers, terminators included; the reverse of `encode`."""
        return "".join(self.characters[number] for number in numbers)

    @cached_property
    def _numbers(self) -> NDArray[np.int64]:
        """The number of every code point up to the largest and one beyond; -1 where there is none."""
        points = [ord(character) for character in self.characters]
        numbers = np.full(max(points) + 2, -1, np.int64)
        numbers[points] = np.arange(len(points))
        return numbers
