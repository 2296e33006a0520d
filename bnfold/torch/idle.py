"""BatchNorms that did not run: a sign that the code of the module around them has another way to go.

Where a module ran and something that it holds did not, its code chose. What chose may be the mode of the module: then
a pass in training mode runs what was idle, and evaluation never does. Otherwise an idle part

- without linear operators of its own (`(self.bn_clean if clean else self.bn_adv)(self.conv(x))`) may stand in the
  place of what ran, so nothing is trusted that passes through the code around it;
- with linear operators of its own is a head, that may read whatever the code around it computes, and one whose name
  the code around it never says is probably left over. A fold that rests on their not running says so.

Not covered: other code without any BatchNorm in it, which nothing gives away.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from bnfold.torch.passes import record_pass

__all__ = ["Idle", "find_idle"]


@dataclass(frozen=True)
class Idle:
    """Part of a model that did not run.

    Attributes:
        path: its qualified name; nothing in it ran.
        holder: the innermost module around it that did.
        head: whether it has linear operators of its own, or nobody says its name.
    """

    path: str
    holder: str
    head: bool


def find_idle(
    model: nn.Module, norms: Iterable[str], ran: Collection[str], args: Any, kwargs: Any
) -> tuple[Idle, ...]:
    """The parts of a model with BatchNorms in them that run neither here nor in training mode.

    Args:
        norms: the paths of its BatchNorms.
        ran: the paths of the modules that ran.
        args, kwargs: what to run it on in training mode; a batch of two or more.
    """
    found = tuple(_idle(model, norms, ran))
    if not found or not _trains(model):
        return found
    trained = _ran_in_training(model, args, kwargs)
    return tuple(idle for idle in found if not any(_within(path, idle.path) for path in trained))


def _idle(model: nn.Module, norms: Iterable[str], ran: Collection[str]) -> Iterator[Idle]:
    """The largest parts that hold an idle BatchNorm and nothing that ran."""
    parents = {parent for path in ran for parent in _around(path)}
    seen: set[str] = set()
    for norm in norms:
        line = [norm, *_around(norm)]
        idle = [path for path in line if path not in parents and path not in ran]
        if norm in ran or not idle or idle[-1] in seen or not idle[-1]:
            continue
        seen.add(idle[-1])
        holder = next((path for path in line if path in ran), "")
        tensors = model.get_submodule(idle[-1]).parameters()
        head = any(tensor.dim() > 1 for tensor in tensors) or not _is_named(model, holder, idle[-1])
        yield Idle(idle[-1], holder, head)


def _is_named(model: nn.Module, holder: str, path: str) -> bool:
    """Whether the code of the modules around a part says its name, or takes names as they come."""
    inside = path[len(holder) :].lstrip(".").split(".")
    around = (model.get_submodule(each) for each in (holder, *_around(holder)))
    said = {word for module in around for word in _words_of(module)}
    return bool(said & {*inside, *_ANY_NAME})


_ANY_NAME = ("getattr", "_modules", "children", "named_children", "get_submodule")


def _words_of(module: nn.Module) -> Iterator[str]:
    """The names and strings in the functions of a module's classes, and in those that it holds."""
    classes = [each for each in type(module).__mro__ if each.__module__ != nn.Module.__module__]
    held = [thing for each in classes for name, thing in vars(each).items() if name != "__init__"]
    for thing in (*held, *vars(module).values()):
        code = getattr(inspect.unwrap(thing), "__code__", None) if callable(thing) else None
        if isinstance(code, CodeType):
            yield from _words_in(code)


def _words_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words_in(constant)


def _trains(model: nn.Module) -> bool:
    """Whether training mode is another mode than the one that the model was read in."""
    return not all(module.training for module in model.modules())


def _ran_in_training(model: nn.Module, args: Any, kwargs: Any) -> set[str]:
    """The paths of the modules that run in training mode; none where it cannot be run in that."""
    try:
        twin = copy.deepcopy(model)
        recording = record_pass(twin.train(), args, kwargs, False, numbers=False)
    except Exception:  # noqa: BLE001 whatever the code raises on a batch that it would not train on
        return set()
    return {frame.path for frame in recording.frames if frame.path is not None}


def _around(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")
