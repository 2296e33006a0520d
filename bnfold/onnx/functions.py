"""A model's own functions, inlined where something in them could be folded.

A function's body is shared by all of its calls, so nothing can be folded into it as it stands. ONNX's inliner takes a
function only if it imports the operator set that the model does; one that imports another version, in which all of its
operators are the same, is taken to import the model's. Neither the inliner nor ONNX's reference implementation knows
what a function takes for an attribute that a call leaves out: each call is made to say it. Nor does the inliner name an
output of a function that is an input of it: it is made a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx

from bnfold import reasons
from bnfold.onnx.flatten import bodies, fresh
from bnfold.report import Verdict

__all__ = ["inline", "left_in_functions", "write_out_defaults"]

_LINEAR = {"Conv", "ConvTranspose", "DeformConv", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"}
_SHARED = frozenset({"BatchNormalization", *_LINEAR})
_ONNX = ("", "ai.onnx")


def inline(model: onnx.ModelProto) -> tuple[onnx.ModelProto | None, list[str]]:
    """A copy in which the functions that hold BatchNorms or linear operators are inlined, and their names."""
    if not model.functions:
        return None, []
    wanted = _functions_worth_inlining(model)
    nodes = (node for holder in (model.graph, *model.functions) for node in _nodes(holder))
    if not wanted or not any(node.op_type == "BatchNormalization" and node.domain in _ONNX for node in nodes):
        return None, []
    try:
        inlined = _inline(model, wanted)
    except (onnx.checker.ValidationError, ValueError, RuntimeError):
        return None, []
    left = {(f.domain, f.name) for f in inlined.functions}
    return inlined, [name for domain, name in wanted if (domain, name) not in left]


def _inline(model: onnx.ModelProto, wanted: list[tuple[str, str]]) -> onnx.ModelProto:
    """A copy in which these functions are inlined, callers first: what they leave out shows in what they call."""
    from onnx import inliner

    inlined = onnx.ModelProto()
    inlined.CopyFrom(model)
    _import_one_version(inlined)
    _compute_outputs(inlined)
    defaults = any(function.attribute_proto for function in model.functions)
    for some in _callers_first(model, wanted) if defaults else [wanted]:
        write_out_defaults(inlined)
        inlined = inliner.inline_selected_functions(inlined, some)
    return inlined


def _compute_outputs(model: onnx.ModelProto) -> None:
    """Let functions compute what they hand through, in place: the inliner leaves an output that is an input unnamed."""
    for function in model.functions:
        taken = {*function.input, *(name for node in _nodes(function) for name in node.output)}
        for place, name in enumerate(function.output):
            if name in function.input:
                copy = fresh(name, taken)
                function.node.add(op_type="Identity", input=[name], output=[copy])
                function.output[place] = copy


def _callers_first(model: onnx.ModelProto, wanted: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Functions in groups, each before those that it calls."""
    calls: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for f in model.functions:
        calls.setdefault((f.domain, f.name), set()).update((node.domain, node.op_type) for node in _nodes(f))
    left = dict.fromkeys(wanted)
    while left:
        called = set().union(*(calls[key] for key in left))
        yield (group := [key for key in left if key not in called])
        left = {key: None for key in left if key in called} if group else {}


def write_out_defaults(model: onnx.ModelProto) -> None:
    """Give every call the attributes that it leaves to the defaults of its function, in place."""
    defaults = {_key(f, f.name): f.attribute_proto for f in model.functions}
    for holder in (model.graph, *model.functions):
        for node in _nodes(holder):
            said = {item.name for item in node.attribute}
            unsaid = defaults.get(_key(node, node.op_type), ())
            node.attribute.extend(item for item in unsaid if item.name not in said)


def left_in_functions(model: onnx.ModelProto) -> list[Verdict]:
    """What is said of the BatchNorms in functions of another version, which nothing is inlined of."""
    version = _version(model)
    return [
        Verdict(f"{function.name}.{node.name or node.output[0]}", "kept", reason=_why(function, version))
        for function in model.functions
        if _version(function) != version and not _is_the_same(function, version)
        for node in _nodes(function)
        if node.op_type == "BatchNormalization" and node.domain in _ONNX
    ]


def _why(function: onnx.FunctionProto, version: int) -> str:
    changed = next(node.op_type for node in _nodes(function) if not _stays(node, _version(function), version))
    own = _version(function)
    return reasons.OTHER_VERSION(function=function.name, own=own, version=version, op=changed)


def _import_one_version(model: onnx.ModelProto) -> None:
    """Let functions import the model's version where that changes none of their operators."""
    version = _version(model)
    for function in model.functions:
        for item in function.opset_import:
            if item.domain in _ONNX and _is_the_same(function, version):
                item.version = version


def _key(holder: Any, name: str) -> tuple[str, str, str]:
    """Which function is meant; older versions of onnx know of one of each name."""
    return holder.domain, name, getattr(holder, "overload", "")


def _version(holder: Any) -> int:
    """The version of ONNX's own operators that a model or a function imports."""
    return next((item.version for item in holder.opset_import if item.domain in _ONNX), 1)


def _is_the_same(function: onnx.FunctionProto, version: int) -> bool:
    return all(_stays(node, _version(function), version) for node in _nodes(function))


def _stays(node: onnx.NodeProto, *versions: int) -> bool:
    """Whether an operator is one and the same in some versions."""
    if node.domain not in _ONNX:
        return True
    try:
        since = {onnx.defs.get_schema(node.op_type, version, "").since_version for version in versions}
    except (onnx.defs.SchemaError, TypeError):  # no such operator, or no such version
        return False
    return len(since) == 1


def _nodes(holder: Any) -> Iterator[onnx.NodeProto]:
    """Those of a function or a graph, and of the bodies in it."""
    waiting = [holder]
    while waiting:
        for node in waiting.pop().node:
            yield node
            waiting += bodies(node)


def _functions_worth_inlining(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(f.domain, f.name) for f in model.functions if _holds(model, f, _SHARED)]


def _holds(
    model: onnx.ModelProto, function: onnx.FunctionProto, operators: frozenset[str] | set[str]
) -> bool:
    """Whether a function computes one of these operators, by itself or through another function."""
    by_name = {(f.domain, f.name): f for f in model.functions}
    waiting, seen = [function], {(function.domain, function.name)}
    while waiting:
        for node in _nodes(waiting.pop()):
            key = (node.domain, node.op_type)
            if key in by_name and key not in seen:
                seen.add(key)
                waiting.append(by_name[key])
            elif node.op_type in operators and node.domain in _ONNX:
                return True
    return False
