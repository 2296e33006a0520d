"""What two files must have alike that their graphs do not show: settings of nodes, inputs, constants, operator sets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from typing import Any

import onnx

from bnfold.errors import Refuse
from bnfold.onnx.flatten import NodeRef
from bnfold.onnx.protos import FLOATS, load
from bnfold.onnx.read import ImportedModel

__all__ = [
    "Values",
    "are_equal",
    "check_constants",
    "constant",
    "content",
    "default",
    "feed",
    "inputs_of",
    "overload",
    "settings",
    "surroundings",
]


@dataclass(frozen=True)
class Values:
    """Which values of one file stand for which of another one, sizes and whatever else the graphs do not show.

    Attributes:
        before, after: the files.
        alias: values of the first one for which others stand, since what computed them is gone.
        matched: pairs of values of the graphs that were found to stand for each other.
        known: pairs of values that were compared.
    """

    before: ImportedModel
    after: ImportedModel
    alias: Mapping[str, str]
    matched: frozenset[tuple[str, str]]
    known: set[tuple[str, str]]

    def check_node(
        self,
        ref: NodeRef,
        twin: NodeRef,
        linear: bool,
        apart: tuple[int, ...] = (),
        dropped: Collection[int] = (),
    ) -> None:
        """Refuse a node of another operator, setting or operand.

        The operands of a linear operator are looked at elsewhere, and those at the places `apart`. The second node
        does without those that were dropped.
        """
        if list(settings(ref, linear)) != list(settings(twin, linear)):
            raise Refuse(f"`{twin.name}` ({twin.op}) has other settings than `{ref.name}`")
        own = [value for place, value in enumerate(ref.inputs) if place not in dropped]
        both = enumerate(zip_longest(own, twin.inputs, fillvalue=""))
        inputs = (pair for place, pair in both if place not in apart)
        waiting = [] if linear else [*inputs, *zip(ref.results, twin.results, strict=True)]
        while waiting:
            given = waiting.pop()
            pair = self._resolve(*given)
            if pair not in self.matched and pair[0] != self._resolve(*given, aliases={})[0]:
                raise Refuse(f"`{pair[1]}` is not known to stand for `{given[0]}`")
            if pair not in self.known:
                self.known.add(pair)
                waiting += self._makings(*pair)

    def _resolve(self, value: str, other: str, aliases: Mapping[str, str] | None = None) -> tuple[str, str]:
        """The values that two stand for."""
        copies, alias = self.before.context.copies, self.alias if aliases is None else aliases
        while (source := copies.get(value, alias.get(value, value))) != value:
            value = source
        return value, self.after.context.copies.get(other, other)

    def _makings(self, value: str, other: str) -> Sequence[tuple[str, str]]:
        """What must be equal for two values to be equal."""
        one, two = constant(self.before, value), constant(self.after, other)
        if one is not None or two is not None:
            if not are_equal(one, two):
                raise Refuse(f"`{other}` is another constant than `{value}`")
            return ()
        node, twin = (
            each.context.whole.makers.get(v) for each, v in ((self.before, value), (self.after, other))
        )
        if node is None or twin is None:
            if node is not twin or value != other:
                raise Refuse(f"`{other}` is not `{value}`")
            return ()
        if node.outputs.index(value) != twin.outputs.index(other):
            raise Refuse(f"`{other}` is another output than `{value}`")
        if list(settings(node)) != list(settings(twin)):
            raise Refuse(f"`{twin.name}` ({twin.op}) has other settings than `{node.name}`")
        inputs = zip_longest(node.inputs, twin.inputs, fillvalue="")
        return [*inputs, *zip(node.results, twin.results, strict=True)]


def settings(ref: NodeRef, linear: bool = False) -> Iterator[bytes]:
    """What a node does: its operator and attributes, without what is in the numbers of a linear operator.

    Of bodies it is their inputs, and their order, in which what they return is listed. The values of a body go by the
    name of the node that runs it, so that belongs to it.
    """
    node = ref.node
    yield repr((ref.op, node.domain, overload(node))).encode()
    held = [item for item in node.attribute if item.type in _BODIES]
    inputs = [(item.name, [[one.name for one in body.input] for body in _held(item)]) for item in held]
    if held:
        yield repr((inputs, ref.name if any(any(own) for _, own in inputs) else "")).encode()
    for item in sorted(node.attribute, key=lambda item: item.name):
        if item.type not in _BODIES and not (linear and item.name in ("alpha", "beta")):
            yield item.SerializeToString(deterministic=True)


_BODIES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def _held(item: onnx.AttributeProto) -> Sequence[onnx.GraphProto]:
    return [item.g] if item.type == onnx.AttributeProto.GRAPH else item.graphs


def overload(node: Any) -> str:
    """Which one of several functions of one name; older versions of onnx know of none."""
    return str(getattr(node, "overload", ""))


def inputs_of(imported: ImportedModel) -> list[tuple[str, int]]:
    """What a caller may give a model, by name and type: its inputs, and the initializers that may be overridden."""
    stored = {tensor.name for tensor in imported.model.graph.initializer} - imported.context.overridable
    given = (item for item in imported.model.graph.input if item.name not in stored)
    return [(item.name, item.type.tensor_type.elem_type) for item in given]


def surroundings(model: onnx.ModelProto) -> dict[tuple[str, ...], Any]:
    """What the nodes of a model mean: the operator sets, and the functions that it brings along."""
    sets: dict[tuple[str, ...], Any] = {(each.domain,): each.version for each in model.opset_import}
    functions = {
        (f.domain, f.name, overload(f)): f.SerializeToString(deterministic=True) for f in model.functions
    }
    if len(functions) < len(model.functions):
        raise Refuse("two functions are of one name")
    return sets | functions


_MOVES = frozenset({
    "Concat", "Constant", "ConstantOfShape", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Reshape",
    "Shape", "Size", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
"""What makes constants of others and leaves their numbers as they are."""


def check_constants(first: ImportedModel, second: ImportedModel) -> None:
    """Refuse numbers that only the second model works out from others: a runtime rounds them on the way."""
    allowed: frozenset[str] | None = None
    for key, value in _worked_out(second).items():
        allowed = frozenset(_worked_out(first)) if allowed is None else allowed
        if key not in allowed:
            raise Refuse(f"`{value}` is worked out where it should be stored")


def _worked_out(imported: ImportedModel) -> dict[str, str]:
    """Floating-point constants that are computed from others, by what computes them."""
    context, keys, found = imported.context, dict[str, str](), dict[str, str]()
    for ref in context.whole.refs:
        values = [value for value in (*ref.inputs, *ref.outputs) if value]
        floats = any(context.type(value) in (*FLOATS, 0) for value in values)
        if ref.op in _MOVES or not floats or not any(value in context.constants for value in ref.outputs):
            continue
        found |= {_expression(imported, value, keys): value for value in ref.outputs if value}
    return found


def _expression(imported: ImportedModel, value: str, keys: dict[str, str]) -> str:
    """A constant by what computes it, hashed; one that is stored, or only moved, by its numbers."""
    waiting = [value]
    while waiting:
        name = waiting[-1]
        ref = imported.context.whole.makers.get(name)
        stored = ref is None or ref.op in _MOVES
        missing = [] if stored or ref is None else [one for one in ref.inputs if one and one not in keys]
        if name not in keys and not missing:
            own = sha256()
            if stored or ref is None:
                array = constant(imported, name)
                feed(own, repr(None if array is None else (array.dtype, array.shape)).encode())
                feed(own, b"" if array is None else content(array))
            else:
                for piece in (*settings(ref), repr(ref.outputs.index(name)).encode()):
                    feed(own, piece)
                for one in ref.inputs:
                    feed(own, keys[one].encode() if one else b"")
            keys[name] = own.hexdigest()
        if not missing:
            waiting.pop()
        waiting += missing
    return keys[value]


def are_equal(first: Any, second: Any) -> bool:
    """Whether two constants are one, to the bit; None is no constant."""
    if first is None or second is None:
        return first is second
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    return same and (
        first.tobytes() == second.tobytes() if first.dtype != object else bool((first == second).all())
    )


def constant(imported: ImportedModel, value: str) -> Any:
    """The array that a value is; None where it is none."""
    constants = imported.context.constants
    return constants.array(value) if value and value in constants else None


def default(imported: ImportedModel, value: str) -> Any:
    """What an input is that the caller does not give; None where there is nothing."""
    tensor = imported.context.whole.tensors.get(value)
    return None if tensor is None else load(tensor, imported.folder)


# ---------------------------------------------------------------- numbers as bytes


def content(array: Any) -> bytes:
    """The numbers of an array, or its strings, as bytes."""
    return bytes(array.tobytes()) if array.dtype != object else repr(array.tolist()).encode()


def feed(found: Any, piece: bytes) -> None:
    """Hash one piece, with its length, so that no two lists of pieces are hashed alike."""
    found.update(len(piece).to_bytes(8, "little"))
    found.update(piece)
