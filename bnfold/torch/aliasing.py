"""Let no BatchNorm go where two tensors share memory that is changed in place, and its going would change who sees it.

A BatchNorm makes a tensor of its own. Once it is gone, its input and its output are one memory. So it stays where what
changes its output would then change an input that somebody else reads (`guard_changes`), and where what changes its
input would then change an output that is still read (`guard_inputs`). An operator whose change in place nobody could
undo becomes opaque instead, and nothing travels through it.

Views are not told apart from what they are views of: the whole memory counts as changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from bnfold import reasons
from bnfold.torch.draft import DraftNode, readers_of
from bnfold.torch.trace import Trace

__all__ = ["guard_changes", "guard_inputs"]


def guard_changes(items: Sequence[DraftNode], outputs: Sequence[str]) -> None:
    """Let no BatchNorm go whose output is changed in place while its input is read by somebody else.

    Without it, what is changed would be its input. Going up, only readers that all want the same could agree to it;
    going down, the operator that changes it would have to let it pass.
    """
    readers = readers_of(items)
    producers = {name: item for item in items for name in item.outputs}
    for item in items:
        if item.call.written:
            for name in _changed(item):
                if _guard(item, name, readers, producers, outputs):
                    item.become_opaque(f"{item.op}, in place")
                    break


def _guard(
    item: DraftNode,
    name: str,
    readers: dict[str, list[DraftNode]],
    producers: dict[str, DraftNode],
    outputs: Sequence[str],
) -> bool:
    """Whether something else reads the memory that an item would change, if BatchNorms above it were gone."""
    passed: list[DraftNode] = []
    while (producer := producers.get(name)) is not None and _shares(producer) and producer.inputs:
        name = producer.inputs[0]
        passed += [producer] if producer.is_batchnorm else []
        others = readers.get(name, ())
        if len(others) > 1 or name in outputs:
            if _agree(others):
                for norm in passed:
                    norm.refuse(reasons.OUTPUT_CHANGED(by=item.name))
            return bool(passed)
    return producer is None and bool(passed)


def guard_inputs(trace: Trace, items: Sequence[DraftNode]) -> None:
    """Let no BatchNorm go whose input is changed in place while its output is still read.

    Without it, both would be one memory.
    """
    calls = trace.calls
    changes = [(at, call) for at, call in enumerate(calls) if call.written]
    norms = [item for item in items if item.is_batchnorm and item.affine is not None] if changes else []
    values = {v.name: v for call in calls for v in (*call.reads.values(), *call.made)}
    places = {id(call): at for at, call in enumerate(calls)}
    lasting = {value.memory for value in trace.outputs.values()}
    for item in norms:
        above, below = values[item.inputs[0]].memory, {values[item.outputs[0]].memory}
        if above in below:
            continue
        for later in norms:
            if values[later.inputs[0]].memory in below:
                below.add(values[later.outputs[0]].memory)
        for at, call in changes:
            mine = at > places[id(item.call)] and any(value.memory == above for value in call.written)
            reads = (value for other in calls[at:] for value in other.reads.values())
            if mine and (below & lasting or any(value.memory in below for value in reads)):
                item.refuse(reasons.INPUT_CHANGED(by=call.label))


_SHARING = frozenset(
    """BatchNormalization Identity Dropout Reshape Squeeze Unsqueeze Flatten
    Transpose Slice Split Gather Expand Cast Alias""".split()  # noqa: SIM905
)
"""Operators whose output may lie in the memory of their input, or will, once they are gone."""

_COPYING = frozenset(("add", "sub", "rsub", "mul", "div", "clone"))
"""What makes a tensor of its own even where it changes nothing, as in `0 + x`."""


def _shares(item: DraftNode) -> bool:
    """Whether the output of an item may lie in the memory of its input."""
    known = {value.memory for value in (*item.call.reads.values(), *(old for old, _ in item.call.changed))}
    copies = item.op == "Identity" and item.call.label in _COPYING and not item.call.changed
    return item.op in _SHARING and not (copies and item.call.made[0].memory not in known)


def _changed(item: DraftNode) -> list[str]:
    """The values of an item whose memory it changes: those that it names, or any of them."""
    call = item.call
    return [old.name for old, _ in call.changed] if len(call.changed) >= len(call.written) else item.inputs


def _agree(readers: Sequence[DraftNode]) -> bool:
    """Whether all readers of a value are BatchNorms that compute the same."""
    affines = [reader.affine for reader in readers if reader.is_batchnorm]
    first = affines[0] if affines else None
    return len(affines) == len(readers) and all(
        first is not None and affine is not None and affine.equals(first) for affine in affines
    )
