"""Find the state dict in what a file holds: under which key it lies, and what a wrapper put before every name.

    stored = find_state(container, path, names)
    stored.state                # tensors by the names that the model has
    stored.replaced(state)      # the container with another state dict in that place

A container is a state dict, or holds some under keys, inside of other dicts, too (`{"ema": {"model": {...}}}`). Of
several, those count that have names of the model; of these the ones under `state_dict`, `model_state_dict` and `model`
go first, in this order. What is left to choose then is the user's choice: a key ("ema", "ema.model") and a prefix.

A prefix is as many whole parts ("net.", "module.model.") as all names have in common, and such that most of what
remains are names of the model. Not found by itself: a prefix that only some names have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bnfold.errors import InputError
from bnfold.wording import enumerate_some

__all__ = ["State", "Stored", "find_state"]

State = Mapping[str, Tensor]
"""A state dict; what modules keep in it besides tensors is handed on as it is."""

DEPTH = 3
"""In as many dicts inside of one another state dicts are looked for."""

_KEYS = (("state_dict",), ("model_state_dict",), ("model",))

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that only a wrapper gives."""

_COUNTERS = ("total_ops", "total_params")
"""Buffers that a profiler (thop) leaves in every module."""

_EXTRA = "_extra_state"
"""How torch calls what a module keeps in its state dict besides tensors (`get_extra_state`)."""

_Place = tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """A state dict, and where it lies.

    Attributes:
        container: all that the file holds.
        place: the keys that lead to the state dict; none where the container is it.
        prefix: what stands before every name in the file.
        state: the tensors, without it.
        rest: tensors beside them, of names that do not begin with a prefix that was asked for.
        others: state dicts that lie elsewhere, by their keys.
    """

    container: Any
    place: _Place
    prefix: str
    state: dict[str, Tensor]
    rest: State
    others: tuple[str, ...] = ()

    def named(self, state: State) -> dict[str, Tensor]:
        """Other tensors, named as in the file, and the rest."""
        return {**self.rest, **{f"{self.prefix}{name}": tensor for name, tensor in state.items()}}

    def replaced(self, state: State) -> Any:
        """The container with other tensors in place of these."""
        return _put(self.container, self.place, self.named(state))

    def describe(self) -> list[str]:
        """One note where the file holds more than one state dict; none where there was nothing to choose."""
        if not self.others:
            return []
        named = ", ".join(f"`{key}`" for key in self.others)
        return [
            f"the weights under `{'.'.join(self.place)}` were folded; those under {named} are left as they are"
        ]


def find_state(
    container: Any,
    path: str | Path,
    names: Collection[str] | None = None,
    key: str | None = None,
    prefix: str | None = None,
) -> Stored:
    """Find a state dict.

    Args:
        container: what the file holds.
        path: of the file, for what is said of it.
        names: those that the model has; without them, what only a wrapper gives is taken off.
        key: where to look, keys in one another joined by dots; None to find it.
        prefix: what to take off, and off which names; None to find it.

    Raises:
        InputError: there is none, none there, or there are several and nothing tells which.
    """
    found = dict(_states(container))
    place = _choose(found, path, names) if key is None else _descend(key, found, path)
    state = found[place]
    if names is not None:
        state = {name: t for name, t in state.items() if name in names or not name.endswith(_COUNTERS)}
    if prefix is None:
        prefix, rest = _find_prefix(state, names), {}
    else:
        prefix = f"{prefix.removesuffix('.')}." if prefix else ""
        rest = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name not in rest}
    if not inner:
        heads = enumerate_some(sorted({f"`{name.partition('.')[0]}.`" for name in state}), 6)
        raise InputError(f"{path}: no name begins with {prefix}; they begin with {heads}")
    others = tuple(".".join(each) for each in found if each != place) if place else ()
    return Stored(container, place, prefix, inner, rest, others)


def _states(container: Any, place: _Place = ()) -> Iterator[tuple[_Place, State]]:
    """Every state dict in a container, by the keys that lead to it."""
    if _is_state(container):
        yield place, container
    elif isinstance(container, dict) and len(place) < DEPTH:
        for key, inner in container.items():
            if isinstance(key, str):
                yield from _states(inner, (*place, key))


def _is_state(value: Any) -> bool:
    """Whether a value is a dict of tensors by name, some at least, and of what modules keep besides."""
    return (
        isinstance(value, dict)
        and any(isinstance(thing, Tensor) for thing in value.values())
        and all(
            isinstance(name, str) and (isinstance(thing, Tensor) or name.rpartition(".")[2] == _EXTRA)
            for name, thing in value.items()
        )
    )


def _choose(found: Mapping[_Place, State], path: str | Path, names: Collection[str] | None) -> _Place:
    """Where the state dict lies that has the model's names."""
    if not found:
        raise InputError(f"{path} holds no state dict: it should be one, or have one under `state_dict`")
    fitting = [place for place in found if names is None or _suits(found[place], names)] or list(found)
    known = [place for place in _KEYS if place in fitting]
    if not known and len(fitting) > 1:
        keys = enumerate_some([f"`{'.'.join(place)}`" for place in fitting], 6)
        raise InputError(f"{path} holds several state dicts, under {keys}; choose one with --key")
    return (known or fitting)[0]


def _descend(key: str, found: Mapping[_Place, State], path: str | Path) -> _Place:
    """The place that a key names."""
    place = next((each for each in found if ".".join(each) == key), None)
    if place is None:
        keys = enumerate_some([f"`{'.'.join(each)}`" for each in found if each], 6)
        where = f"there are some under {keys}" if keys else "leave --key out"
        raise InputError(f"{path} holds no state dict under `{key}`; {where}")
    return place


def _suits(state: State, names: Collection[str]) -> bool:
    """Whether anything in a state dict is of the model."""
    prefix = _find_prefix(state, names)
    return any(name.removeprefix(prefix) in names for name in state)


def _find_prefix(state: State, names: Collection[str] | None) -> str:
    """What wrappers and owners put before every name: the shortest with which most names are the model's."""
    if names is None:
        return _wrapped(state)
    best, most = "", 0
    for prefix in _common_heads(state):
        hits = sum(name.removeprefix(prefix) in names for name in state)
        if hits > most:
            best, most = prefix, hits
    return best


def _common_heads(state: State) -> Iterator[str]:
    """The whole parts that all names begin with, the shortest first: "", "module.", "module.net."."""
    prefix, first = "", next(iter(state), "")
    while all(name.startswith(prefix) for name in state):
        yield prefix
        part, dot, _ = first[len(prefix) :].partition(".")
        if not dot:
            return
        prefix += part + dot


def _wrapped(state: State) -> str:
    """The prefixes that only a wrapper gives."""
    prefix = ""
    while more := next((one for one in _WRAPPERS if all(n.startswith(prefix + one) for n in state)), ""):
        prefix += more
    return prefix


def _put(container: Any, place: _Place, state: dict[str, Tensor]) -> Any:
    """A container with another value at a place."""
    if not place:
        return state
    return {**container, place[0]: _put(container[place[0]], place[1:], state)}
