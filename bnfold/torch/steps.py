"""What a module runs outside of its BatchNorms, as a sequence of steps that a fold must leave as it is.

`retrace` compares the steps before and after a fold. Nothing here knows of folding: a step says what was called on
what, with which numbers, and what a fold may change of it (whether it has a bias) stands apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bnfold.algebra import Affine
from bnfold.torch.constants import slots_of
from bnfold.torch.draft import DraftNode
from bnfold.torch.storage import origin_of
from bnfold.torch.trace import Trace

__all__ = ["TraceStep", "settings", "steps_of"]


@dataclass(frozen=True, eq=False)
class TraceStep:
    """One operation outside of every BatchNorm, as far as a fold must leave it as it is.

    Attributes:
        label: what was called.
        inputs: how many computed values it read.
        affine: of an affine map by constants.
        weight: the slot of its weight, of a linear operator.
        bias: the slot of its bias, in other words where it is computed from that; empty if it has none.
        sources: the steps (counted from 0) and inputs of the model that computed what it reads.
        settings: the numbers and words among its arguments.
    """

    label: str
    inputs: int
    affine: Affine | None
    weight: str
    bias: str
    sources: tuple[int | str, ...]
    settings: tuple[Any, ...]


def steps_of(
    trace: Trace, items: Sequence[DraftNode], norms: set[str], formulas: Collection[str] = ()
) -> Iterator[TraceStep]:
    """What runs outside of BatchNorms, in order, and what is returned besides numbers.

    Args:
        trace, items: the pass, and its nodes.
        norms: the paths of the modules that are BatchNorms.
        formulas: the names of the parameters and buffers of those that are written out.
    """
    inside = tuple(f"{path}." for path in norms)
    given = {value.name for value in trace.inputs.values()}
    origins: dict[str, int | str] = {}
    at = 0
    for item in items:
        path = item.call.frame.path or ""
        if item.op in ("If", "Hook"):
            continue
        if path in norms or path.startswith(inside) or (formulas and _reads(item, formulas)):
            first = item.inputs[0] if item.inputs else ""
            origins.update(dict.fromkeys(item.outputs, origins.get(first, first if first in given else "")))
            continue
        sources = [origins.get(name, name if name in given else "") for name in item.inputs]
        count = sum(value.data for value in item.call.reads.values())
        origins.update(dict.fromkeys(item.outputs, at if count else ""))
        if not count:
            continue
        slot = None if item.weight is None else origin_of(item.weight).slot(item.call.frame)
        weight = "" if slot is None else _COMPUTED.sub(lambda found: found[1] or "", slot.name)
        affine = None if item.is_batchnorm else item.affine
        words = tuple(settings((item.call.args, item.call.kwargs)))
        known = tuple(source for source in sources if source != "")
        yield TraceStep(item.call.label, count, affine, weight, _bias_of(item), known, words)
        at += 1
    yield TraceStep("return", 0, None, "", "", (), trace.words)


_COMPUTED = re.compile(r"(?:parametrizations\.(\w+)\.original|(?<=weight)_orig)$")
"""What torch's parametrizations and hooks compute a weight from, which is a weight once that is done for good."""


def _bias_of(item: DraftNode) -> str:
    """The slot of a bias that is passed on as it is stored; of any other one, some words."""
    if item.bias is None:
        return ""
    origin = origin_of(item.bias)
    slot = None if origin.factors or not origin.value.slots else origin.slot(item.call.frame)
    return "computed" if slot is None else slot.name


def _reads(item: DraftNode, names: Collection[str]) -> bool:
    """Whether an item reads a number of one of these names."""
    constants = (value for value in item.call.reads.values() if value.constant or value.slots)
    roots = (root for value in constants for root in slots_of(value).values())
    return any(slot.name in names for root in roots for slot in root.slots)


def settings(thing: Any) -> list[Any]:
    """The numbers and words in nested arguments."""
    found: list[Any] = []
    _gather(thing, found)
    return found


def _gather(thing: Any, found: list[Any]) -> None:
    if isinstance(thing, bool | int | float | str):
        found.append(thing)
    elif isinstance(thing, list | tuple):
        for part in thing:
            _gather(part, found)
    elif isinstance(thing, dict):
        for _, part in sorted(thing.items()):
            _gather(part, found)
