"""Settle what of a pass holds for other inputs too, by what other passes did (see `trials`, `alignment`).

- A size that differs between the passes becomes a symbol, so that nothing is decided that holds for one size alone.
- A setting or constant that differs makes its node opaque, unless it differs only along axes whose size is a symbol
  anyway: no affine map varies along those.
- A value that another pass uses in another way is read by one more node, through which nothing travels; a parameter
  that other code uses there stays as it is.
- A pad with amounts that differ, or that no other size could be asked about, is a pad with zeros, even where it pads
  by nothing in the example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from bnfold import reasons
from bnfold.ir import Shape
from bnfold.torch.alignment import Alignment
from bnfold.torch.constants import slots_of
from bnfold.torch.draft import Draft, DraftNode
from bnfold.torch.steps import settings
from bnfold.torch.trace import Call, Frame, Value
from bnfold.torch.trials import Trial

__all__ = ["is_of_torch", "settle", "words_of"]


def settle(draft: Draft, trials: Iterable[tuple[Trial, Alignment]], model: nn.Module) -> dict[str, Shape]:
    """The shapes of all values, with a symbol for each size that differs; the draft's items are changed in place."""
    settler = _Settler(draft, type(model).__name__)
    for trial, alignment in trials:
        if trial.ranked:
            settler.compare(Draft(trial.recording, draft.evaluator), alignment)
        settler.part(trial, alignment)
    settler.settle_pads()
    return settler.shapes()


class _Settler:
    def __init__(self, draft: Draft, title: str) -> None:
        self.draft, self.title = draft, title
        self.drawn = _by_call(draft.items)
        self.others: list[dict[str, tuple[int, ...]]] = []
        self.asked: set[int] = set()
        self.parted: set[str] = set()

    # -- sizes and settings

    def compare(self, other: Draft, alignment: Alignment) -> None:
        """Note the sizes of another pass, and make opaque what does something else there."""
        found: dict[str, tuple[int, ...]] = {}
        self.others.append(found)
        theirs = _by_call(other.items)
        for name, value in alignment.values.items():
            found[name] = value.shape
        for call, items in self.drawn.items():
            if (match := alignment.calls.get(call)) is None:
                continue
            pair = theirs.get(id(match), [])
            for item in items:
                item.varies |= not _same_words(item.call, match)
            if [_form(item) for item in items] != [_form(item) for item in pair]:
                for item in items:
                    _give_up(item)
                continue
            for mine, their in zip(items, pair, strict=True):
                names = zip((*mine.inputs, *mine.outputs), (*their.inputs, *their.outputs), strict=True)
                found.update({name: other.shapes[twin] for name, twin in names if twin in other.shapes})
                self._compare_item(mine, their, found)
        found.update({name: value.shape for name, value in alignment.taken() if name not in found})

    def _compare_item(self, mine: DraftNode, theirs: DraftNode, found: dict[str, tuple[int, ...]]) -> None:
        names = [n for n in (*mine.inputs, *mine.outputs) if n in self.draft.shapes and n in found]
        pairs = [(self.draft.shapes[name], found[name]) for name in names]
        moved = set(_moved(*pairs[0])) if pairs else set()
        if any(len(a) != len(b) for a, b in pairs) or not _same_settings(mine, theirs, moved):
            _give_up(mine)
        padded = mine.attributes.get("axes", ()) if "crop" in mine.attributes else ()
        if padded and all((pairs[0][0][axis] - pairs[0][1][axis]) % 2 for axis in padded):
            self.asked.add(id(mine))

    def shapes(self) -> dict[str, Shape]:
        """All shapes, with symbols."""
        return {name: self._symbols(name, shape) for name, shape in self.draft.shapes.items()}

    def _symbols(self, name: str, shape: tuple[int, ...]) -> Shape:
        others = [found[name] for found in self.others if name in found]
        if any(len(other) != len(shape) for other in others):
            return (None,) * len(shape)
        columns = zip(shape, *others, strict=True)
        return tuple(sizes[0] if len(set(sizes)) == 1 else "|".join(map(str, sizes)) for sizes in columns)

    def settle_pads(self) -> None:
        """Make plain crops of the pads whose amounts are settings: the same where the size differs by an odd number."""
        for item in self.draft.items:
            crop = item.attributes.pop("crop", None)
            if crop is not None and id(item) in self.asked:
                item.op, item.attributes = "Slice", {"slices": crop[1]}

    # -- code that does something else

    def part(self, trial: Trial, alignment: Alignment) -> None:
        """Let what another pass uses otherwise be read by one more node; let its parameters stay.

        The modules of torch.nn do the same with and without a batch axis, in other calls.
        """
        for parting in alignment.partings:
            known = not trial.ranked and is_of_torch(parting.frame.module)
            if parting.value not in self.parted and not known:
                self.parted.add(parting.value)
                self.draft.items.append(self._reader(parting.value, parting.frame, trial))
        if alignment.apart:
            for item in list(self.draft.items):
                self._refuse_apart(item, trial, alignment)

    def _where(self, frame: Frame, trial: Trial) -> str:
        return f"{frame.path or self.title}, given {trial.words}"

    def _reader(self, value: str, frame: Frame, trial: Trial) -> DraftNode:
        call = Call(-1, "If", (), {}, frame)
        return DraftNode("If", [value], [], call, site=self._where(frame, trial))

    def _refuse_apart(self, item: DraftNode, trial: Trial, alignment: Alignment) -> None:
        names = [slot.name for value in _stored(item) for slot in value.slots]
        frame = next((alignment.apart[name] for name in names if name in alignment.apart), None)
        if frame is None:
            return
        if item.is_batchnorm or item.linear is not None:
            item.refuse(reasons.USED_OTHERWISE(where=self._where(frame, trial)))
        else:
            item.become_opaque(item.call.label)


def is_of_torch(module: nn.Module | None) -> bool:
    """Whether a module is one of torch.nn, which do the same with and without a batch axis."""
    return type(module).__module__.startswith("torch.nn.")


def _by_call(items: Sequence[DraftNode]) -> dict[int, list[DraftNode]]:
    drawn: dict[int, list[DraftNode]] = {}
    for item in items:
        drawn.setdefault(id(item.call), []).append(item)
    return drawn


def _form(item: DraftNode) -> tuple[str, int, int]:
    return item.op, len(item.inputs), len(item.outputs)


def _stored(item: DraftNode) -> list[Value]:
    """The parameters and buffers that an item is drawn from."""
    given = [v for v in (item.weight, item.bias, *item.statistics.values()) if v is not None]
    if item.affine is not None and not item.is_batchnorm:
        given += [v for v in item.call.reads.values() if v.slots or v.constant]
    return [root for value in given for root in (slots_of(value).values() if not value.slots else [value])]


def _moved(mine: tuple[int, ...], theirs: tuple[int, ...]) -> list[int]:
    """The axes along which two shapes of one rank differ."""
    return [axis for axis, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b]


def _same_words(mine: Call, theirs: Call) -> bool:
    """Whether two calls have the same numbers and words among their arguments."""
    return settings((mine.args, mine.kwargs)) == settings((theirs.args, theirs.kwargs))


def _give_up(item: DraftNode) -> None:
    """Let nothing travel through an item that does something else for other inputs."""
    if item.is_batchnorm:
        item.refuse(reasons.OTHER_SIZE())
    else:
        item.become_opaque(item.call.label)
        item.attributes = {}


def _same_settings(mine: DraftNode, theirs: DraftNode, moved: set[int]) -> bool:
    """Whether two items do the same, but for what happens along axes of other sizes; takes the weaker promise."""
    if (mine.affine is None) != (theirs.affine is None) or (mine.linear is None) != (theirs.linear is None):
        return False
    if (
        mine.affine is not theirs.affine
        and mine.affine is not None
        and theirs.affine is not None
        and not mine.affine.equals(theirs.affine)
    ):
        return False
    if mine.linear is not None and theirs.linear is not None:
        one, other = mine.linear, theirs.linear
        if any(getattr(one, name) != getattr(other, name) for name in _FORM):
            return False
        centre = one.centre if one.centre == other.centre else None
        window = one.window if one.window == other.window else None
        mine.linear = replace(one, centre=centre, partial=one.partial or other.partial, window=window)
        weights, biases = (mine.weight, theirs.weight), (mine.bias, theirs.bias)
        if any(list(words_of(a)) != list(words_of(b)) for a, b in (weights, biases)):
            return False
    mine.partial = mine.partial or theirs.partial
    return all(_settle_setting(mine, theirs, key, moved) for key in mine.attributes)


def words_of(value: Value | None) -> Iterator[Any]:
    """The numbers and words that a weight is computed with."""
    if value is None or value.slots or not value.constant:
        return
    if value.tensor is not None:
        yield value.tensor.tolist()
    if value.call is not None:
        yield from settings((value.call.args, value.call.kwargs))
        for part in value.call.reads.values():
            yield from words_of(part)


_FORM = ("order", "inputs", "outputs", "in_axis", "out_axis", "groups", "sealed", "biasless", "bare")


def _settle_setting(mine: DraftNode, theirs: DraftNode, key: str, moved: set[int]) -> bool:
    """Whether a setting is the same, weakens what an item promises, or is about axes of other sizes."""
    one: Any = mine.attributes[key]
    other: Any = theirs.attributes.get(key)
    if key == "axes" and mine.op == "Pad":
        mine.attributes[key] = tuple(sorted({*one, *(other or ())}))
    elif key == "slices" and other is not None:
        return all(a == b or axis in moved for axis, (a, b) in enumerate(zip(one, other, strict=True)))
    elif key == "window":
        mine.attributes[key] = one if one == other else None
    elif key == "crop":
        mine.attributes[key] = one if one is not None and other is not None and one[0] == other[0] else None
    elif mine.attributes.get("axis") in moved and key in ("indices", "sizes"):
        return np.ndim(one) == np.ndim(other)
    else:
        return bool(np.array_equal(one, other))
    return True
