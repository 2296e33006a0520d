"""Let a model choose as another run of it did: what is selected, compared or rounded falls as it was recorded.

A detector keeps its best candidates, a mask what is above a threshold, a quantiser takes the nearest whole number.
Two such models that differ by one rounding differ by all of an output as soon as two candidates are nearly equal. As
long as every choice falls alike they are continuous, and can be compared. So one run is recorded; in the others each
choice is made, counted if it falls otherwise, and then overruled by the recorded one. What the choices are made from is
compared as outputs are: no choice hides a number that is wrong.

A choice is an operation that makes integers or truths of floats (`argmax`, `gt`, `nms`, a cast), a rounding (`round`,
`sign`), or one that gives places and the values there (`topk`, `max` along an axis), whose values are then read at the
recorded places.

Not covered: Python that branches on a float (`if x.max().item() > 3`); operations that choose in place; poolings, whose
values are continuous and whose places nobody reads; how many values `unique` finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from bnfold.equivalence import Unavailable

__all__ = ["Choice", "Choosing", "Tally"]

_STEPS = frozenset({"ceil", "floor", "heaviside", "round", "sign", "trunc"})
"""Operations on floats that give floats, and the same ones for nearly equal values."""

_PLACES = frozenset(
    {"cummax", "cummin", "kthvalue", "max", "median", "min", "mode", "nanmedian", "sort", "topk"}
)
"""Operations that give values and the places along an axis where they stand."""


@dataclass(frozen=True)
class Choice:
    """One choice of a run.

    Attributes:
        name: of the operation.
        results: what it gave; of values with their places, the places.
        settings: the numbers and words that it was given.
    """

    name: str
    results: tuple[Tensor, ...]
    settings: tuple[Any, ...] = ()


@dataclass
class Tally:
    """What became of the choices of a run; see `Choosing`."""

    made: list[Choice] = field(default_factory=list)
    grounds: dict[str, Tensor] = field(default_factory=dict)
    otherwise: set[str] = field(default_factory=set)


class Choosing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the choices of what runs within, or has them fall as they were recorded.

    Attributes:
        tally: the choices made, what they were made from, by a name, and the names of those that fell otherwise.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never: skipping it would import the compiler, which takes seconds."""
        return False

    def __init__(self, recorded: Sequence[Choice] | None = None) -> None:
        """Record, or follow what is recorded."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorded, self.tally = recorded, Tally()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._schema.is_mutable:
            return result
        floats = [each for each in tree_leaves((args, kwargs)) if _is_float(each)]
        name = function._schema.name.rpartition("::")[2]
        chosen = _chosen(name, result) if floats else ()
        return (
            self._choose(name, floats, chosen, result, (args, kwargs or {}, function)) if chosen else result
        )

    def _choose(
        self, name: str, floats: list[Tensor], chosen: tuple[Tensor, ...], result: Any, call: Any
    ) -> Any:
        place = len(self.tally.made)
        title = f"<what choice {place + 1}, {name}, is made from>"
        for number, each in enumerate(floats):
            self.tally.grounds[f"{title}[{number}]"] = each.detach().clone()
        settings = tuple(each for each in tree_leaves(call[:2]) if isinstance(each, int | float | str))
        self.tally.made.append(Choice(name, tuple(each.detach().clone() for each in chosen), settings))
        if self.recorded is None:
            return result
        found = self.recorded[place] if place < len(self.recorded) else None
        if found is None or (found.name, found.settings) != (name, settings):
            raise Unavailable(f"choice {place + 1} of the model is another one ({name})")
        followed = self.recorded[place].results
        if not all(map(_falls_alike, chosen, followed)):
            self.tally.otherwise.add(f"{place} {name}")
        return _overruled(result, chosen, followed, call)


def _is_float(thing: Any) -> bool:
    return isinstance(thing, Tensor) and thing.is_floating_point()


def _chosen(name: str, result: Any) -> tuple[Tensor, ...]:
    """What of a result is a choice; nothing where it is a number like any other."""
    tensors = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
    whole = tuple(each for each in tensors if not _is_float(each) and not each.is_complex())
    if name in _STEPS:
        return tuple(tensors)
    return whole if len(whole) == len(tensors) or name in _PLACES else ()


def _falls_alike(own: Tensor, recorded: Tensor) -> bool:
    return own.shape == recorded.shape and bool((own == recorded.to(own.dtype)).all())


def _overruled(result: Any, chosen: Sequence[Tensor], recorded: Sequence[Tensor], call: Any) -> Any:
    """A result with the recorded choices in it, and with the values that stand at recorded places."""
    parts, form = tree_flatten(result)
    by_identity = {id(own): theirs for own, theirs in zip(chosen, recorded, strict=True)}
    made = [by_identity[id(p)].to(p.dtype, copy=True) if id(p) in by_identity else None for p in parts]
    if all(each is not None for each in made):
        return tree_unflatten(made, form)
    values = _read(recorded[0], *call)
    return tree_unflatten([values if each is None else each for each in made], form)


def _read(places: Tensor, args: Any, kwargs: Any, function: Any) -> Tensor:
    """What stands at some places along the axis that an operation goes along.

    Raises:
        Unavailable: they are places of a tensor of another shape.
    """
    given = {each.name: each.default_value for each in function._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | kwargs
    data, axis = given["self"], given["dim"]
    narrowed = places.dim() < data.dim()
    if narrowed:
        places = places.unsqueeze(axis)
    try:
        values = torch.take_along_dim(data, places, axis)
    except (RuntimeError, IndexError) as error:
        raise Unavailable("a choice is made from values of another shape") from error
    return values.squeeze(axis) if narrowed else values
