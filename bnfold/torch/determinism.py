"""Find the modules whose code does not run alike twice, because of what the first pass left behind.

A cache that is filled, a flag that is set, a counter: the pass is captured twice, and of each module what its own code
called, on what of its own and with which numbers, is compared. What depends on the inputs is the matter of `trials`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from bnfold.torch.capture import capture
from bnfold.torch.constants import Evaluator, slots_of
from bnfold.torch.passes import quiet
from bnfold.torch.sandbox import copied, restored, undisturbed
from bnfold.torch.sizes import words_of
from bnfold.torch.steps import settings
from bnfold.torch.tensors import inside, leaves, put_back
from bnfold.torch.trace import Call, Trace, Value

__all__ = ["find_nondeterministic"]


def find_nondeterministic(twin: nn.Module, args: Any, kwargs: Any, recording: Trace) -> frozenset[str]:
    """The modules whose own code runs otherwise in a second pass, because of what the first one left behind."""
    paths = {id(module): path for path, module in twin.named_modules()}
    given = copied(tensor for _, tensor in leaves((args, kwargs)))
    known: Any = {"fake": recording.fake, "lasting": True, "differentiates": recording.differentiates}
    try:
        with undisturbed(), restored(twin, whole=True), quiet():
            first = _events(capture(twin, args, kwargs, **known), paths)
            for tensor, content in given:
                put_back(tensor, content)
            second = _events(capture(twin, args, kwargs, **known), paths)
    except Exception:  # noqa: BLE001 a pass that can be made once only
        return frozenset(paths.values())
    finally:
        with torch.no_grad():
            for tensor, content in given:
                put_back(tensor, content)
    return frozenset(path for path in first | second if first.get(path) != second.get(path))


def _events(recording: Trace, paths: Mapping[int, str]) -> dict[str, list[Any]]:
    """What the code of each module did itself, in order: what it called, and on what of its own."""
    events: dict[str, list[tuple[float, Any]]] = {}
    makers: dict[int, tuple[str, int, int]] = {}

    def own(path: str, values: Iterable[Value]) -> list[Any]:
        return [name for v in values if (name := makers.get(id(v))) is not None and inside(name[0], path)]

    for at, call in enumerate(recording.calls):
        if any(value.data for value in call.reads.values()) and call.label not in _UNSEEN:
            path = paths.get(id(call.frame.module), "")
            mine = events.setdefault(path, [])
            mine.append((at, (call.label, own(path, call.reads.values()), _numbers(call))))
            makers.update({id(value): (path, len(mine), place) for place, value in enumerate(call.made)})
    for frame in recording.frames:
        if frame.parent is not None and frame.parent.module is not None:
            path, child = paths.get(id(frame.parent.module), ""), paths.get(id(frame.module), "")
            events.setdefault(path, []).append((frame.start - 0.5, (child, own(path, frame.given))))
    return {path: [event for _, event in sorted(mine, key=lambda e: e[0])] for path, mine in events.items()}


def _numbers(call: Call) -> str:
    """The numbers and words that a call is given, and those that the constants it reads are computed with."""
    constants = [value for value in call.reads.values() if value.constant]
    return repr([*settings((call.args, call.kwargs)), *filter(None, map(_constant, constants))])


def _constant(value: Value) -> Any:
    """What tells a constant of one pass from that of another one; a cache is as good as what it was filled with.

    Nothing of what a state dict holds; of what is computed from that, the numbers it is computed with.
    """
    kinds = {slot.kind for root in slots_of(value).values() for slot in root.slots}
    if kinds <= {"attribute"}:
        array = Evaluator().tensor(value).resolve_conj().numpy()
        return array.shape, array.tobytes()
    return None if value.slots else list(words_of(value))


_UNSEEN = ("If", "Hook", "Alias", "Outside")
