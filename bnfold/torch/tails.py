"""What a module does after the operator that it is: its own children and plain activations, one after another.

A module whose call can be replaced keeps its tail (`modules.Tail`): a BatchNorm with a built-in activation, a block of
branches that end in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from bnfold import reasons
from bnfold.torch.draft import DraftNode
from bnfold.torch.modules import TAILS
from bnfold.torch.trace import Frame

__all__ = ["Tail", "find_tail", "obstacle"]

Tail = tuple[tuple[str, nn.Module | None], ...]
"""Names of a module's own children, or modules that stand for a function."""

_TAKEN = ("affine", "merged")
"""What the operator before a tail is called where it stands beside it as a child."""


def find_tail(
    frame: Frame,
    rest: Sequence[DraftNode],
    value: str,
    children: Sequence[Frame],
    within: Callable[[Frame], list[DraftNode]],
    resolve: Callable[[str], str] = lambda name: name,
) -> Tail | None:
    """The tail of a module call; None where it does anything else.

    Args:
        frame: the call.
        rest: what it computes after its operator.
        value: what that operator gives.
        children: the module calls in its own code, after the operator.
        within: the nodes of a module call.
        resolve: the name by which a value is known.
    """
    assert frame.module is not None
    steps: list[tuple[str, nn.Module | None]] = []
    rest, children = list(rest), list(children)
    while rest or children:
        inner = within(children[0]) if children else []
        if children and (not rest or not inner or inner[0] is rest[0]):
            child, children = children[0], children[1:]
            name = next((n for n, held in frame.module._modules.items() if held is child.module), None)
            chained = child.plain and resolve(child.given[0].name) == value and rest[: len(inner)] == inner
            if name is None or name in _TAKEN or not chained:
                return None
            steps.append((name, None))
            value, rest = resolve(child.made[0].name), rest[len(inner) :]
            continue
        if not rest:
            return None
        step = _stand_in(rest[0], value, resolve)
        if step is None:
            return None
        steps.append((_unused(f"step{len(steps)}", frame.module), step))
        value, rest = resolve(rest[0].outputs[0]), rest[1:]
    return tuple(steps) if value == resolve(frame.made[0].name) else None


def _unused(name: str, module: nn.Module) -> str:
    """A name for one more child of a module."""
    return _unused(f"{name}_", module) if name in module._modules else name


def _stand_in(item: DraftNode, value: str, resolve: Callable[[str], str]) -> nn.Module | None:
    """A module that computes what a call does to a value, where that is a plain activation."""
    make = TAILS.get(item.call.label)
    given = [resolve(name) for name in item.inputs]
    if make is None or item.varies or given != [value] or len(item.outputs) != 1 or len(item.call.reads) != 1:
        return None
    try:
        return make(*item.call.args[1:], **{k: v for k, v in item.call.kwargs.items() if k != "inplace"})
    except TypeError:
        return None


def obstacle(frame: Frame) -> str:
    """Why a module call cannot become another one, whatever it computes."""
    if type(frame.module).__call__ is not nn.Module.__call__:
        return reasons.OWN_CALL()
    if not frame.plain:
        return reasons.NOT_PLAIN()
    return reasons.NOT_ALWAYS() if frame.data_dependent else ""
