"""Import an ONNX model as the graph on which folding is decided.

`read` flattens the model (`flatten`), infers shapes (`shapes`), finds out what is constant (`constant_folding`) and
lowers each node to its canonical form (`lower`). Two patterns of several nodes become one:

- a MatMul by a constant and the Add of a constant vector along its output channels: one MatMul with a bias;
- a BatchNormalization spelt out as Sub, Div, Mul and Add of constants: a maximal chain of affines, each link read by
  the next one alone, with at least one scale and one shift. A chain that begins by subtracting a mean and goes on to
  scale and shift, or that takes a square root of constants, is a BatchNormalization whatever becomes of it. Any other
  scale with a shift (a rescaled input, say) is only drawn as one if it disappears: `demote` draws it as plain affines
  again. The tail of a LayerNorm that is computed by hand never is.

A body of If, Loop or Scan is a part of the graph: its nodes stand before the node that runs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from bnfold.algebra import Affine
from bnfold.errors import InputError
from bnfold.ir import Graph, Node
from bnfold.onnx.constant_folding import Constants
from bnfold.onnx.context import ImportContext
from bnfold.onnx.flatten import NodeRef, flatten
from bnfold.onnx.lower import MISMATCH, lower
from bnfold.onnx.shapes import Shapes, infer

__all__ = ["ImportedModel", "read"]

OLDEST = 7
"""The oldest operator set that is read: before it, operands were broadcast by an `axis` attribute."""


@dataclass(eq=False)
class ImportedModel:
    """A model and its graph.

    Attributes:
        model: the model that was read; `write` changes it.
        graph: what `travel` decides on.
        context: shapes, types and constants.
        refs: the nodes of the file behind each node of the graph.
        tentative: the spelt-out affines that count as a BatchNorm only if they disappear.
        notes: what a report should say about the model.
    """

    model: onnx.ModelProto
    graph: Graph
    context: ImportContext
    refs: dict[str, list[NodeRef]]
    tentative: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    @property
    def contradiction(self) -> str:
        """What no runtime could run, by the look of its shapes; nothing where there is none."""
        broken = (node for node in self.graph.nodes if node.reason == MISMATCH)
        return next((f"`{node.name}` ({node.op}): {MISMATCH}" for node in broken), "")

    @property
    def folder(self) -> Path | None:
        """Where external data lies."""
        return self.context.constants.folder


def read(
    model: onnx.ModelProto,
    folder: Path | None = None,
    *,
    freeze_initializers: bool = False,
    demote: Iterable[str] = (),
) -> ImportedModel:
    """Draw a model.

    Args:
        model: is not changed, but `ImportedModel` refers to it.
        folder: where its external data lies.
        freeze_initializers: take initializers that are also inputs for constants.
        demote: spelt-out BatchNorms to draw as plain affines.

    Raises:
        InputError: the model is older than operator set 7, or its graph does not hang together.
    """
    try:
        context, notes = _flatten(model, folder, freeze_initializers)
    except UnicodeDecodeError as error:
        raise InputError(f"the model holds text that is not UTF-8: {error}") from error
    nodes: list[Node] = []
    refs: dict[str, list[NodeRef]] = {}
    for ref in context.whole.refs:
        if not any(output in context.constants for output in ref.outputs):
            drawn = lower(ref, context)
            nodes += drawn
            refs.update((node.name, [ref]) for node in drawn)
    imported = ImportedModel(model, _graph(nodes, context), context, refs, notes=notes)
    _join_biases(imported)
    _join_affines(imported, frozenset(demote))
    return imported


def _flatten(model: onnx.ModelProto, folder: Path | None, freeze: bool) -> tuple[ImportContext, list[str]]:
    opset = _opset(model)
    whole = flatten(model)
    listed = {given.name for given in model.graph.input} & {tensor.name for tensor in model.graph.initializer}
    overridable = frozenset(listed) if model.ir_version >= 4 and not freeze else frozenset()
    stored = {value: tensor for value, tensor in whole.tensors.items() if value not in overridable}

    def constants_of(kind: type[Constants], found: Shapes) -> Constants:
        return kind(folder, found.shapes, found.types, opset, stored)

    found, constants, sizes = infer(model, whole, constants_of, overridable)
    notes = []
    if listed and not overridable:
        why = (
            "--freeze-initializers"
            if model.ir_version >= 4
            else f"IR version {model.ir_version} has them all listed"
        )
        notes.append(
            f"{len(listed)} initializers are also inputs of the model and were taken for constants ({why})"
        )
    return ImportContext(whole, found, constants, sizes, opset, overridable), notes


def _opset(model: onnx.ModelProto) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    opset = int(versions[0]) if versions else onnx.defs.onnx_opset_version()
    if opset < OLDEST:
        way = f"convert it to {OLDEST} or newer (onnx.version_converter)"
        raise InputError(f"the model uses operator set {opset}; {way}")
    return opset


def _graph(nodes: Iterable[Node], context: ImportContext) -> Graph:
    """The graph of these nodes, in which a copy of a value is the value."""
    drawn: list[Node] = []
    for node in nodes:
        inputs = tuple(context.copies.get(value, value) for value in node.inputs)
        if node.op in ("Identity", "Dropout") and len(inputs) == 1:
            context.copies[node.outputs[0]] = inputs[0]
        else:
            drawn.append(node if inputs == node.inputs else replace(node, inputs=inputs))
    outputs = tuple(context.copies.get(value, value) for value in context.whole.outputs)
    return Graph(
        tuple(drawn), (*context.whole.inputs, *sorted(context.overridable)), outputs, context.found.shapes
    )


# ---------------------------------------------------------------- patterns of several nodes


def _is_private(imported: ImportedModel, value: str, reader: str) -> bool:
    """Whether a value is read once, by this node of the same graph, and nowhere else."""
    uses = imported.context.whole.uses.get(value, [])
    refs = imported.refs[reader]
    return len(uses) == 1 and uses[0].ref is refs[0] and uses[0].owner is imported.context.whole.home[value]


def _follower(imported: ImportedModel, node: Node) -> Node | None:
    """The affine that alone reads what a node computes."""
    readers = imported.graph.readers(node.outputs[0])
    if len(readers) != 1 or readers[0].op != "Affine" or len(imported.refs[readers[0].name]) > 1:
        return None
    return readers[0] if _is_private(imported, node.outputs[0], readers[0].name) else None


def _join_biases(imported: ImportedModel) -> None:
    """Draw a MatMul or Einsum and the Add of a vector along its output channels as one."""
    joined: dict[str, Node] = {}
    gone: set[str] = set()
    for node in imported.graph.nodes:
        if node.op not in ("MatMul", "Einsum") or node.linear is None:
            continue
        reader = _follower(imported, node)
        if reader is None or reader.affine is None or imported.refs[reader.name][0].op != "Add":
            continue
        if reader.affine.vectors(node.linear.out_axis, node.linear.outputs) is not None:
            joined[node.name] = replace(node, outputs=reader.outputs, linear=replace(node.linear, bare=False))
            imported.refs[node.name] += imported.refs[reader.name]
            gone.add(reader.name)
    _redraw(imported, joined, gone)


def _redraw(imported: ImportedModel, changed: dict[str, Node], gone: set[str]) -> None:
    nodes = [changed.get(node.name, node) for node in imported.graph.nodes if node.name not in gone]
    imported.graph = replace(imported.graph, nodes=tuple(nodes))


def _join_affines(imported: ImportedModel, demoted: frozenset[str]) -> None:
    """Draw chains of affines that amount to a BatchNorm as one."""
    changed: dict[str, Node] = {}
    gone: set[str] = set()
    tentative: set[str] = set()
    for node in imported.graph.nodes:
        if node.op != "Affine" or node.name in gone:
            continue
        chain = _chain(imported, node)
        gone.update(link.name for link in chain[1:])
        kind = _kind(imported, chain)
        if not kind or node.name in demoted:
            gone.difference_update(link.name for link in chain[1:])
            continue
        changed[node.name] = _composed(chain)
        imported.refs[node.name] = [ref for link in chain for ref in imported.refs[link.name]]
        if kind == "tentative":
            tentative.add(node.name)
    imported.tentative = frozenset(tentative)
    _redraw(imported, changed, gone)


def _chain(imported: ImportedModel, node: Node) -> list[Node]:
    """The longest chain of affines that begins here."""
    chain = [node]
    following = _follower(imported, node)
    while following is not None:
        chain.append(following)
        following = _follower(imported, following)
    return chain


def _composed(chain: list[Node]) -> Node:
    affine = Affine.identity(chain[0].affine.rank if chain[0].affine else 0)
    for link in chain:
        assert link.affine is not None
        affine = link.affine.after(affine)
    return replace(chain[0], op="BatchNormalization", outputs=chain[-1].outputs, affine=affine.collapse())


def _kind(imported: ImportedModel, chain: list[Node]) -> str:
    """Return "certain" for what can only be a BatchNorm, "tentative" for what may be one, "" for what is none."""
    affines = [link.affine for link in chain if link.affine is not None]
    scales = [place for place, affine in enumerate(affines) if np.any(affine.scale != 1)]
    shifts = [place for place, affine in enumerate(affines) if np.any(affine.shift != 0)]
    if len({axis for affine in affines for axis in affine.axes}) > 1:
        return ""
    whole = _composed(chain).affine
    if (
        not scales
        or not shifts
        or whole is None
        or len(whole.axes) > 1
        or not _per_channel(imported, chain, whole)
    ):
        return ""
    centred = shifts[0] < scales[0] and shifts[-1] > scales[0]
    if (centred and len(chain) >= 3) or any(_has_root(imported, link) for link in chain):
        return "certain"
    return "" if _normalises(imported, chain[0]) else "tentative"


def _per_channel(imported: ImportedModel, chain: list[Node], whole: Affine) -> bool:
    """Whether it is one number per channel, be it that there is only one channel."""
    shape = imported.graph.shapes.get(chain[0].inputs[0], ())
    return bool(whole.axes) or (len(shape) > 1 and shape[1] == 1)


def _has_root(imported: ImportedModel, link: Node) -> bool:
    """Whether the constant of a link is computed with a square root."""
    context = imported.context
    waiting = [v for ref in imported.refs[link.name] for v in ref.inputs if v in context.constants]
    seen: set[str] = set()
    while waiting:
        value = waiting.pop()
        maker = context.whole.makers.get(value)
        if maker is None or value in seen:
            continue
        seen.add(value)
        if maker.op in ("Sqrt", "Pow"):
            return True
        waiting.extend(v for v in maker.inputs if v in context.constants)
    return False


def _normalises(imported: ImportedModel, node: Node) -> bool:
    """Whether the value before a chain is divided by something computed, as in a LayerNorm."""
    producer = imported.graph.producer(node.inputs[0])
    while producer is not None and producer.op in ("Reshape", "Transpose", "Cast") and producer.inputs:
        producer = imported.graph.producer(producer.inputs[0])
    if producer is None:
        return False
    return producer.op in ("Mul", "Div", "LayerNormalization", "InstanceNormalization", "unusual Div")
