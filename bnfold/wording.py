"""How a report words things: text of strangers made fit to be shown, and sentences that say the same of other names.

The reasons in a report are sentences that name nodes: "`relu1` (Relu) is not linear". A net of hundreds of BatchNorms
has few kinds of them. What differs within a kind stands in backticks, or is a number; both are slots. The sentence
of a group keeps what all its members have in a slot, and leaves the others open:

    `relu1` (Relu) is not linear    -.
    `relu2` (Relu) is not linear    -'-> `...` (Relu) is not linear

A name with a backtick in it cuts its sentence into other slots. That makes a kind of its own, never a wrong sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Group", "enumerate_some", "group", "shorten_number", "spell_out"]

Item = TypeVar("Item")

_SLOT = re.compile(r"(`[^`]*`|(?<![\w.,])[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?![.,]*\w))")


def spell_out(text: str) -> str:
    """Text without what no reader sees: line ends, control characters and halves of characters become escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


@dataclass(frozen=True)
class Group(Generic[Item]):
    """Items of which the same is said.

    Attributes:
        items: in the order in which they came.
        parts: the sentence, cut at the slots in which the items differ.
        values: what each item has in those slots, (items, parts - 1).
    """

    items: tuple[Item, ...]
    parts: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    def sentence(self, marks: Iterable[str] | None = None) -> str:
        """What is said, with a mark in each open slot: by default `...` for names, from where to where for numbers."""
        marks = map(_cover, zip(*self.values, strict=True)) if marks is None else marks
        return self.parts[0] + "".join(mark + part for mark, part in zip(marks, self.parts[1:], strict=True))


def group(items: Iterable[Item], sentence: Callable[[Item], str]) -> list[Group[Item]]:
    """Put the items together of which sentences of one kind are said, the largest group first."""
    kinds: dict[tuple[str | bool, ...], list[tuple[Item, list[str]]]] = {}
    for item in items:
        text = _SLOT.split(sentence(item))
        kind = (*text[::2], *(value[0] == "`" for value in text[1::2]))
        kinds.setdefault(kind, []).append((item, text))
    groups = [_join(alike) for alike in kinds.values()]
    return sorted(groups, key=lambda one: -len(one.items))


def _join(alike: Sequence[tuple[Item, list[str]]]) -> Group[Item]:
    """The group of items whose sentences have the same text between the slots."""
    texts = [text for _, text in alike]
    parts, open_slots = [texts[0][0]], []
    for slot in range(1, len(texts[0]), 2):
        if len({text[slot] for text in texts}) > 1:
            open_slots.append(slot)
            parts.append(texts[0][slot + 1])
        else:
            parts[-1] += texts[0][slot] + texts[0][slot + 1]
    values = tuple(tuple(text[slot] for slot in open_slots) for text in texts)
    return Group(tuple(item for item, _ in alike), tuple(parts), values)


def _cover(values: Sequence[str]) -> str:
    """What stands for values that differ."""
    if values[0].startswith("`"):
        return "`...`"
    low, high = (end(values, key=_number) for end in (min, max))
    return f"{low} to {high}"


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def enumerate_some(names: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return separator.join([*names[:most], *([f"and {rest:,} more"] if rest > 0 else [])])


def shorten_number(number: int) -> str:
    """A number in three digits or so: 1.07 G, 94.3 k."""
    for factor, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)
