"""The tensors in nested things: what a caller gives, what a model returns, what its modules hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Part", "Slot", "held", "inside", "leaves", "put_back", "returned", "walk", "words"]

Part = tuple[range | int, ...]
"""What of a tensor is meant, axis by axis; an axis of which one place is taken is gone. Empty: all of it."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place of a module that holds a tensor, or a part of it.

    Attributes:
        module: its path.
        attribute: of the module.
        kind: parameter, buffer or attribute.
        part: what of the tensor is meant.
    """

    module: str
    attribute: str
    kind: str
    part: Part = ()

    @property
    def name(self) -> str:
        """As in a state dict, with the part in Python's notation."""
        return f"{self.whole}[{', '.join(map(_written, self.part))}]" if self.part else self.whole

    @property
    def whole(self) -> str:
        """As in a state dict."""
        return f"{self.module}.{self.attribute}" if self.module else self.attribute

    @property
    def index(self) -> tuple[slice | int, ...]:
        """The part, as tensors are indexed."""
        return tuple(p if isinstance(p, int) else slice(p.start, p.stop, p.step) for p in self.part)

    def overlaps(self, other: Slot) -> bool:
        """Whether two parts of one tensor have a number in common."""
        pairs = zip(self.part, other.part, strict=False)
        return all(_meet(_places(mine), _places(theirs)) for mine, theirs in pairs)

    def read(self, model: nn.Module) -> Tensor | None:
        """The tensor, or its part, with no history; None where a module holds none."""
        tensor = getattr(model.get_submodule(self.module), self.attribute)
        if tensor is None or not self.part:
            return tensor  # type: ignore[no-any-return]
        return tensor.detach()[self.index].requires_grad_(tensor.requires_grad)  # type: ignore[no-any-return]


def _written(part: range | int) -> str:
    if isinstance(part, int):
        return str(part)
    return f"{part.start}:{part.stop}" + (f":{part.step}" if part.step != 1 else "")


def _meet(mine: range, theirs: range) -> bool:
    near = max(mine.start, theirs.start) < min(mine.stop, theirs.stop)
    return near and (mine.step == theirs.step == 1 or not set(mine).isdisjoint(theirs))


def _places(part: range | int) -> range:
    return range(part, part + 1) if isinstance(part, int) else part


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of a model once, with its path, in the order of `named_modules`; in a fifth of its time."""
    found: dict[int, tuple[str, nn.Module]] = {}

    def visit(path: str, module: nn.Module) -> None:
        found[id(module)] = path, module
        for name, child in module._modules.items():
            if child is not None and id(child) not in found:
                visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return list(found.values())


def held(model: nn.Module) -> Iterator[tuple[Tensor, tuple[Slot, ...]]]:
    """Every tensor that the model's modules hold, once, with all the places that hold it.

    Not covered: what compiled modules hold, and what lies in containers.
    """
    places: dict[int, tuple[Tensor, list[Slot]]] = {}
    for path, module in walk(model):
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
