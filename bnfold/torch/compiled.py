"""BatchNorms that are compiled into ScriptModules: what they are called, and what to do about them.

Scripted, traced and frozen code runs as one opaque call: it has no modules that could be edited, and a frozen graph
no parameters. Each BatchNorm in it is owed a verdict all the same, whether a module stands for it or an operator alone.
The way out is the module before it was compiled, or the ONNX file that torch writes of the compiled one.

A BatchNorm of a graph goes by the module that holds its running mean, of which freezing leaves a name. Not found: one
that is merged into a convolution already (`torch.jit.freeze` does that), or spelt out in other operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["compiled_norms", "holder_of"]

_OPERATORS = frozenset(
    f"aten::{name}" for name in ("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training")
)
_MEAN = 3
"""The place of the running mean among their arguments."""


def holder_of(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The outermost ScriptModule that a module is, or lies in: its path, or its class; None where there is none."""
    parts = path.split(".") if path else []
    for count in range(len(parts) + 1):
        outer = ".".join(parts[:count])
        if isinstance(module := modules.get(outer), torch.jit.ScriptModule):
            return outer or str(getattr(module, "original_name", "") or type(module).__name__)
    return None


def compiled_norms(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """What the BatchNorms are called that the graphs of outermost ScriptModules hold, each name once."""
    names: dict[str, None] = {}
    for path, module in modules.items():
        parent = path.rpartition(".")[0]
        inner = bool(path) and holder_of(parent, modules) is not None
        if isinstance(module, torch.jit.ScriptModule) and not inner:
            names |= dict.fromkeys(".".join(filter(None, (path, name))) for name in _norms_of(module))
    return iter(names)


def _norms_of(module: torch.jit.ScriptModule) -> Iterator[str]:
    """The names of the BatchNorms in the graph of a module's forward, if it has one."""
    graph = getattr(module, "inlined_graph", None) if hasattr(module, "forward") else None
    for node in _nodes(graph) if graph is not None else ():
        if node.kind() in _OPERATORS:
            name = _name_of(list(node.inputs())[_MEAN])
            yield node.output().debugName() if name is None else name


def _nodes(block: Any) -> Iterator[Any]:
    """The nodes of a graph, and of the blocks in it."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _name_of(mean: Any) -> str | None:
    """The path of the module that holds a running mean; None where that cannot be told."""
    node, names = mean.node(), []
    if node.kind() == "prim::Constant":
        frozen: str = mean.debugName()
        return frozen.removeprefix("self.").rpartition(".")[0] if frozen.startswith("self.") else None
    while node.kind() == "prim::GetAttr":
        names.append(node.s("name"))
        node = next(iter(node.inputs())).node()
    return ".".join(names[:0:-1]) if names else None
