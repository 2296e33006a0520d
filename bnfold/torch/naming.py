"""Name every drafted node as a reader of the report will recognise it, each once.

A BatchNorm goes by its site, an operator by the module that holds its weight or whose only work it is, anything else by
the module in whose code it stands and what was called there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from bnfold.torch.draft import DraftNode

__all__ = ["name_items"]


def name_items(model: nn.Module, items: Sequence[DraftNode], causes: Mapping[str, str]) -> None:
    """Give every node its name.

    Args:
        causes: the modules that may go another way, with the path of what did not run for it.
    """
    alone: dict[str, int] = {}
    for item in items:
        path = item.call.frame.path or ""
        if item.op == "InputProduct":
            continue
        alone[path] = alone.get(path, 0) + 1
    taken: set[str] = set()
    for item in items:
        name = item.site or _natural_name(model, item, alone, causes)
        unique, count = name, 1
        while unique in taken:
            count += 1
            unique = f"{name} (call {count})"
        taken.add(unique)
        item.name = unique


def _natural_name(
    model: nn.Module, item: DraftNode, alone: Mapping[str, int], causes: Mapping[str, str]
) -> str:
    path = item.call.frame.path or ""
    if item.op == "Hook":
        return f"a hook on {path}"
    if item.op == "If":
        beside = f", where {causes[path]} did not run" if path in causes else ""
        return f"a branch in {path or type(model).__name__}{beside}"
    if item.op == "InputProduct" and item.weight is not None and item.weight.slots:
        return item.weight.slots[0].name
    if item.weight is not None and any(slot.module == path for slot in item.weight.slots):
        return path or item.call.label
    if path and alone[path] == 1:
        return path
    return f"{path}.{item.call.label}" if path else item.call.label
