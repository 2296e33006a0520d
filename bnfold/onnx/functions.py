"""A model's own functions, inlined where something in them could be folded.

A function's body is shared by all of its calls, so nothing can be folded into it as it stands.
"""

from __future__ import annotations

import onnx

__all__ = ["inline"]

_LINEAR = {"Conv", "ConvTranspose", "DeformConv", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"}
_SHARED = frozenset({"BatchNormalization", *_LINEAR})


def inline(model: onnx.ModelProto) -> tuple[onnx.ModelProto | None, list[str]]:
    """A copy in which the functions that hold BatchNorms or linear operators are inlined, and their names."""
    if not model.functions:
        return None, []
    from onnx import inliner

    wanted = _functions_worth_inlining(model)
    inside = any(_holds(model, function, {"BatchNormalization"}) for function in model.functions)
    if not wanted or not (inside or any(node.op_type == "BatchNormalization" for node in model.graph.node)):
        return None, []
    try:
        return inliner.inline_selected_functions(model, wanted), [name for _, name in wanted]
    except (onnx.checker.ValidationError, ValueError, RuntimeError):
        return None, []


def _functions_worth_inlining(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(f.domain, f.name) for f in model.functions if _holds(model, f, _SHARED)]


def _holds(
    model: onnx.ModelProto, function: onnx.FunctionProto, operators: frozenset[str] | set[str]
) -> bool:
    """Whether a function computes one of these operators, by itself or through another function."""
    by_name = {(f.domain, f.name): f for f in model.functions}
    waiting, seen = [function], {(function.domain, function.name)}
    while waiting:
        for node in waiting.pop().node:
            key = (node.domain, node.op_type)
            if key in by_name and key not in seen:
                seen.add(key)
                waiting.append(by_name[key])
            elif node.op_type in operators and node.domain in ("", "ai.onnx"):
                return True
    return False
