"""The tensors in nested things: what a caller gives, what a model returns, what its modules hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Part", "Slot", "held", "inside", "leaves", "put_back", "returned", "words"]


@dataclass(frozen=True, slots=True)
class Slot:
    """A place of a module that holds a tensor: `module` is its path, `kind` parameter, buffer or attribute."""

    module: str
    attribute: str
    kind: str

    @property
    def name(self) -> str:
        """As in a state dict."""
        return f"{self.module}.{self.attribute}" if self.module else self.attribute


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor: where it begins and ends on each axis, and the shape in which it is used."""

    ends: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]

    @property
    def index(self) -> tuple[slice, ...]:
        """The box as an index."""
        return tuple(slice(*ends) for ends in self.ends)

    def take(self, tensor: Tensor) -> Tensor:
        """The part of a tensor."""
        return tensor[self.index].reshape(self.shape)

    def overlaps(self, other: Part) -> bool:
        """Whether two parts of one tensor have a number in common."""
        pairs = zip(self.ends, other.ends, strict=True)
        return all(max(a, c) < min(b, d) for (a, b), (c, d) in pairs)

    def __str__(self) -> str:
        """As one would write it."""
        return "[" + ", ".join(f"{start}:{stop}" for start, stop in self.ends) + "]"


def held(model: nn.Module) -> Iterator[tuple[Tensor, tuple[Slot, ...]]]:
    """Every tensor that the model's modules hold, once, with all the places that hold it.

    Not covered: what compiled modules hold, and what lies in containers.
    """
    places: dict[int, tuple[Tensor, list[Slot]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for kind, found in (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("attribute", vars(module)),
        ):
            for attribute, tensor in list(found.items()):
                if isinstance(tensor, Tensor):
                    places.setdefault(id(tensor), (tensor, []))[1].append(Slot(path, attribute, kind))
    return ((tensor, tuple(slots)) for tensor, slots in places.values())


def put_back(tensor: Tensor, content: Tensor) -> None:
    """Give a tensor its earlier numbers, or its earlier memory where it lies in another one."""
    if tensor.shape == content.shape and tensor.dtype == content.dtype:
        tensor.copy_(content)
    else:
        tensor.data = content


def leaves(thing: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, lists, dicts, dataclasses and objects, with a path to each."""
    seen = set() if seen is None else seen
    if isinstance(thing, Tensor):
        yield path, thing
        return
    if (
        thing is None
        or isinstance(thing, str | bytes | int | float | complex | type | nn.Module)
        or id(thing) in seen
    ):
        return
    seen.add(id(thing))
    for key, part in _parts(thing):
        yield from leaves(part, f"{path}.{key}" if path else str(key), seen)


def words(thing: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """What else there is in nested things: names and whole numbers, and the rank and dtype of each tensor.

    Not covered: floats, which may tell of numbers or of the time, and what has no order.
    """
    seen = set() if seen is None else seen
    if isinstance(thing, Tensor):
        yield path, (thing.dim(), thing.dtype)
    elif thing is None or isinstance(thing, str | int | torch.dtype | torch.device):
        yield path, thing
    elif not isinstance(thing, _WORDLESS) and id(thing) not in seen:
        seen.add(id(thing))
        for key, part in _parts(thing):
            name = str(key) if isinstance(key, str | int) else type(key).__name__
            yield from words(part, f"{path}.{name}" if path else name, seen)


_WORDLESS = (bytes, float, complex, type, nn.Module, set, frozenset)


def _parts(thing: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(thing, dict):
        return list(thing.items())
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return list(zip(thing._fields, thing, strict=True))
    if isinstance(thing, list | tuple | set | frozenset):
        return list(enumerate(thing))
    if is_dataclass(thing) and not isinstance(thing, type):
        return [(f.name, getattr(thing, f.name, None)) for f in fields(thing)]
    return list(getattr(thing, "__dict__", {}).items())


def returned(result: Any) -> Iterator[Tensor]:
    """The tensors that an operator returns or is given, in order: itself, or those of a list."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from returned(part)


def inside(path: str, outer: str) -> bool:
    """Whether the module of one path is that of another, or lies in it."""
    return path == outer or not outer or path.startswith(f"{outer}.")
