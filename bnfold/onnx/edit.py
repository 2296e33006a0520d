"""Edits to a model: planned on what was read of it, carried out on any copy of it.

An `Editor` plans: it knows every place where a value is read, gives new things names that nobody has, and takes away
what nobody reads any more once `finish` is called. It changes neither what was read nor the model. What it gives back
is data, which `apply` carries out on the model that was read or on an unchanged copy of it, the float64 one included:
nodes are told by their place in their graph, tensors by their name. Nodes and initializers that no edit names are
never copied or reordered, so their bytes stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto

from bnfold.algebra import Array
from bnfold.errors import BnfoldError, InputError
from bnfold.onnx.flatten import FlatModel, NodeRef, Use, bodies, fresh
from bnfold.onnx.protos import FLOATS
from bnfold.onnx.read import ImportedModel

__all__ = [
    "Edit",
    "Editor",
    "Forget",
    "Insert",
    "Remove",
    "Rewire",
    "SetAttribute",
    "Store",
    "apply",
    "new_data",
]

Path = tuple[tuple[int, int], ...]
"""The way to a graph from the main one, which is (): the place of a node and the number of its body, and so on."""

Address = tuple[Path, int]
"""Where a node stands: its graph, and its place in it."""


class Numbers(Protocol):
    """The numbers of a new tensor, computed when they are asked for, so that one tensor is held at a time."""

    def __call__(self, dtype: np.dtype[Any], /) -> np.ndarray[Any, Any]:
        """Compute them in float64 and round them once."""


@dataclass(frozen=True)
class Rewire:
    """Let a node read and compute these values."""

    graph: Path
    place: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class SetAttribute:
    """Give an attribute of a node this value, or take it away."""

    graph: Path
    place: int
    name: str
    value: float | None


@dataclass(frozen=True, eq=False)
class Store:
    """Add an initializer to the main graph.

    Attributes:
        location: where its numbers should go in the file: with the external data that they replace.
    """

    name: str
    dims: tuple[int, ...]
    data_type: int
    numbers: Numbers
    location: str = ""
    graph: Path = ()


@dataclass(frozen=True)
class Forget:
    """Drop the initializers of these names, and what else the file says about them."""

    graph: Path
    names: frozenset[str]


@dataclass(frozen=True)
class Remove:
    """Take a node away."""

    graph: Path
    place: int


@dataclass(frozen=True)
class Insert:
    """Add a node after the one that stands here."""

    graph: Path
    place: int
    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str | None = None
    attributes: tuple[onnx.AttributeProto, ...] = ()


Edit = Rewire | SetAttribute | Store | Forget | Remove | Insert


# ---------------------------------------------------------------- carrying them out


def apply(
    edits: Sequence[Edit], model: onnx.ModelProto, exact: bool = False, late: Collection[str] = ()
) -> onnx.ModelProto:
    """Change a model as these edits say.

    Args:
        edits: in the order of `Editor.finish`: those that move nodes come last, from the back of a graph to its front.
        model: the one that they were planned on, or an unchanged copy; edited in place.
        exact: store new numbers in float64, as a copy wants them in which all floating-point types are.
        late: the new tensors whose numbers are left out; `new_data` gives them.

    Returns:
        The model.

    Raises:
        InputError: a new number is not finite in the type of its tensor.
    """
    graphs = {path: _find(model, path) for path in {edit.graph for edit in edits}}
    for edit in edits:
        if isinstance(edit, Store):
            data_type = TensorProto.DOUBLE if exact and edit.data_type in FLOATS else edit.data_type
            _store(edit, model, data_type, edit.name in late)
        elif isinstance(edit, Forget):
            _forget(edit, graphs[edit.graph])
        elif isinstance(edit, Insert):
            graphs[edit.graph].node.insert(edit.place + 1, _node(edit))
        elif isinstance(edit, Remove):
            del graphs[edit.graph].node[edit.place]
        else:
            _change(edit, graphs[edit.graph].node[edit.place])
    return model


def _find(model: onnx.ModelProto, path: Path) -> onnx.GraphProto:
    graph = model.graph
    for place, number in path:
        graph = list(bodies(graph.node[place]))[number]
    return graph


def _change(edit: Rewire | SetAttribute, node: onnx.NodeProto) -> None:
    if isinstance(edit, Rewire):
        node.input[:], node.output[:] = edit.inputs, edit.outputs
        return
    _delete(node.attribute, lambda item: item.name == edit.name)
    if edit.value is not None:
        node.attribute.append(onnx.helper.make_attribute(edit.name, edit.value))


def new_data(edit: Store, data_type: int) -> Array:
    """The numbers of a new tensor as bytes, computed and rounded to a type now.

    Raises:
        BnfoldError: they are more or fewer than its shape says.
        InputError: one of them is not finite in this type.
    """
    dtype = onnx.helper.tensor_dtype_to_np_dtype(data_type)
    rounded = edit.numbers(dtype)
    if rounded.size != math.prod(edit.dims):
        raise BnfoldError(
            f"the new numbers of `{edit.name}` are {rounded.size}, and its shape is {edit.dims}"
        )
    if not np.isfinite(rounded).all():
        raise InputError(f"the folded numbers of `{edit.name}` are not finite in {dtype}")
    return np.ascontiguousarray(rounded).reshape(-1).view(np.uint8)


def _store(edit: Store, model: onnx.ModelProto, data_type: int, late: bool) -> None:
    tensor = _declare(edit, model, data_type)
    if late:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=edit.location)
    else:
        tensor.raw_data = new_data(edit, data_type).tobytes()


def _declare(edit: Store, model: onnx.ModelProto, data_type: int) -> TensorProto:
    """Add an initializer that has no data yet."""
    if model.ir_version < 4:
        model.graph.input.append(onnx.helper.make_tensor_value_info(edit.name, data_type, edit.dims))
    tensor: TensorProto = model.graph.initializer.add(name=edit.name, data_type=data_type, dims=edit.dims)
    return tensor


def _forget(edit: Forget, graph: onnx.GraphProto) -> None:
    names = edit.names
    _delete(graph.initializer, lambda tensor: tensor.name in names)
    _delete(graph.sparse_initializer, lambda sparse: sparse.values.name in names)
    _delete(graph.value_info, lambda info: info.name in names)
    _delete(graph.quantization_annotation, lambda note: note.tensor_name in names)
    if not edit.graph:
        _delete(graph.input, lambda given: given.name in names)


def _node(edit: Insert) -> onnx.NodeProto:
    node = onnx.NodeProto(op_type=edit.op, name=edit.name or None, input=edit.inputs, output=edit.outputs)
    node.attribute.extend(edit.attributes)
    if edit.domain is not None:
        node.domain = edit.domain
    return node


def _delete(items: Any, unwanted: Any) -> None:
    """Delete from a repeated field, in place."""
    for place in range(len(items) - 1, -1, -1):
        if unwanted(items[place]):
            del items[place]


# ---------------------------------------------------------------- planning them


class View:
    """The model as it will be: who reads what, who computes it, and what it is called.

    Attributes:
        raw: the name of a value in the file.
        home: the graph in which a value is defined.
        makers: the node that computes a value.
        uses: where each value is read.
        inputs, outputs: the values that a node reads and computes.
        changed: the nodes that read or compute other names than they did.
        idle: values that lost their last reader.
    """

    def __init__(self, whole: FlatModel) -> None:
        self.raw, self.home, self.makers = dict(whole.raw), dict(whole.home), dict(whole.makers)
        self.uses = {value: list(uses) for value, uses in whole.uses.items()}
        self.inputs = {ref: list(ref.inputs) for ref in whole.refs}
        self.outputs = {ref: list(ref.outputs) for ref in whole.refs}
        self.changed: dict[NodeRef, None] = {}
        self.idle: list[str] = []

    def define(self, name: str, owner: onnx.GraphProto) -> str:
        """A new value that nobody reads yet."""
        self.raw[name], self.home[name], self.uses[name] = name, owner, []
        return name

    def set_input(self, ref: NodeRef, place: int, value: str) -> None:
        """Let a node read another value."""
        inputs = self.inputs[ref]
        inputs += [""] * (place + 1 - len(inputs))
        self._release(ref, place)
        inputs[place] = value
        self.uses.setdefault(value, []).append(Use(ref, ref.owner, place))
        self.changed[ref] = None

    def set_inputs(self, ref: NodeRef, values: Sequence[str]) -> None:
        """Let a node read these values and no others."""
        self.release(ref)
        self.inputs[ref] = []
        for place, value in enumerate(values):
            self.set_input(ref, place, value)

    def set_output(self, ref: NodeRef, place: int, value: str) -> None:
        """Let a node compute another value."""
        self.outputs[ref][place] = value
        self.makers[value] = ref
        self.changed[ref] = None

    def release(self, ref: NodeRef) -> None:
        """Let a node read nothing any more."""
        for place in range(len(self.inputs[ref])):
            self._release(ref, place)
        self.inputs[ref] = [""] * len(self.inputs[ref])

    def _release(self, ref: NodeRef, place: int) -> None:
        value = self.inputs[ref][place]
        if value:
            uses = self.uses[value]
            uses[:] = [use for use in uses if use.ref is not ref or use.place != place]
            if not uses:
                self.idle.append(value)

    def move_uses(self, uses: Sequence[Use], source: str) -> None:
        """Let the nodes of these uses read `source` instead."""
        for use in uses:
            if use.ref is not None:
                self.inputs[use.ref][use.place] = source
                self.uses.setdefault(source, []).append(use)
                self.changed[use.ref] = None

    def rename(self, value: str, name: str) -> None:
        """Call a value otherwise, wherever it is computed and read."""
        self.raw[value] = name
        readers = (use.ref for use in self.uses[value] if use.ref is not None)
        self.changed.update(dict.fromkeys([self.makers[value], *readers]))

    def is_read(self, ref: NodeRef) -> bool:
        """Whether anybody reads what a node computes."""
        return any(self.uses.get(value) for value in self.outputs[ref] if value)

    def names(self, ref: NodeRef) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What a node reads and computes, as it stands in the file."""
        inputs, outputs = (
            tuple(self.raw.get(value, "") for value in values)
            for values in (self.inputs[ref], self.outputs[ref])
        )
        return inputs, outputs


class Editor:
    """Plans edits to an imported model, on a view of it."""

    def __init__(self, imported: ImportedModel) -> None:
        self.model, self.context = imported.model, imported.context
        self.view = View(imported.context.whole)
        self._names = {name for name in imported.context.whole.names if name}
        self._node_names = {ref.node.name for ref in imported.context.whole.refs}
        self._attributes: dict[NodeRef, dict[str, float | None]] = {}
        self._stored: dict[str, Store] = {}
        self._removed: set[NodeRef] = set()
        self._anchors: dict[NodeRef, NodeRef] = {}
        self._forgotten: dict[int, tuple[onnx.GraphProto, set[str]]] = {}

    # -- values

    def new_value(self, wish: str, owner: onnx.GraphProto) -> str:
        """A new value, to be computed by a node that is inserted, of a name that no value has in any graph."""
        return self.view.define(fresh(wish, self._names), owner)

    def add_tensor(
        self, wish: str, numbers: Numbers, dims: Sequence[int], data_type: int, replaces: str = ""
    ) -> str:
        """Add an initializer to the main graph and return the value."""
        name = self.new_value(wish, self.model.graph)
        old, location = self.context.whole.tensors.get(replaces), ""
        if old is not None and old.data_location == TensorProto.EXTERNAL:
            location = next(item.value for item in old.external_data if item.key == "location")
        self._stored[name] = Store(name, tuple(dims), data_type, numbers, location)
        return name

    def bypass(self, refs: Sequence[NodeRef], source: str, target: str) -> None:
        """Remove nodes that compute `target` from `source`, and let `source` take its place everywhere."""
        for ref in refs:
            self.remove(ref)
        uses = self.view.uses.pop(target, [])
        returned = [use for use in uses if use.ref is None]
        if returned and not self._take_name(source, target, returned):
            self.view.uses[target] = list(returned)
            self.insert(refs[-1], "Identity", self.fresh_node(refs[-1].node.name), [source], target)
        self.view.move_uses(uses, source)
        if not returned:
            self.forget(target)

    def _take_name(self, source: str, target: str, returned: list[Use]) -> bool:
        """Let `source` have the name of `target`, which a graph returns; False where it must keep its own."""
        maker = self.view.makers.get(source)
        uses = self.view.uses.setdefault(source, [])
        taken = any(use.ref is None for use in uses)
        if maker is None or taken or maker.owner is not returned[0].owner:
            return False
        self.forget(source)
        self.view.rename(source, self.view.raw[target])
        uses += returned
        return True

    def forget(self, value: str) -> None:
        """Drop what the file says about a value that is no more."""
        home = self.view.home[value]
        self._forgotten.setdefault(id(home), (home, set()))[1].add(self.view.raw[value])

    # -- nodes

    def fresh_node(self, wish: str) -> str:
        """A name for a node that no node has; none where the wish is empty."""
        return fresh(wish, self._node_names) if wish else ""

    def set_attribute(self, ref: NodeRef, name: str, value: float) -> None:
        """Give an attribute of a node of the file another value."""
        self._attributes.setdefault(ref, {})[name] = value

    def drop_attribute(self, ref: NodeRef, name: str) -> None:
        """Take an attribute away from a node, if it has it."""
        if any(item.name == name for item in ref.node.attribute):
            self._attributes.setdefault(ref, {})[name] = None

    def remove(self, ref: NodeRef) -> None:
        """Take a node away; its outputs must find another maker or no reader."""
        self._removed.add(ref)
        self.view.release(ref)

    def insert(self, anchor: NodeRef, op: str, name: str, inputs: Sequence[str], output: str) -> NodeRef:
        """Add a node after another one, in the same graph."""
        ref = NodeRef(onnx.NodeProto(op_type=op, name=name), anchor.owner, list(inputs), [output], [], name)
        self.view.inputs[ref], self.view.outputs[ref] = [], [output]
        for place, value in enumerate(inputs):
            self.view.set_input(ref, place, value)
        self.view.makers[output] = ref
        self._anchors[ref] = self._anchors.get(anchor, anchor)
        return ref

    def insert_copy(self, ref: NodeRef, inputs: Sequence[str], output: str) -> NodeRef:
        """Add a copy of a node, attributes and all, that reads and computes other values."""
        name = self.fresh_node(f"{ref.node.name}.copy" if ref.node.name else "")
        copy = self.insert(ref, ref.op, name, inputs, output)
        copy.node.attribute.extend(ref.node.attribute)
        copy.node.domain = ref.node.domain
        return copy

    # -- the end

    def finish(self) -> tuple[Edit, ...]:
        """Take away what nobody reads any more, and give back all edits, in the order in which they are carried out."""
        self._sweep()
        paths, places = _addresses(self.model)
        touched = {*self.view.changed, *self._attributes, *self._removed, *self._anchors.values()}
        where = {ref: (paths[id(ref.owner)], places[id(ref.node)]) for ref in touched - self._anchors.keys()}
        forgotten = (Forget(paths[id(home)], frozenset(names)) for home, names in self._forgotten.values())
        return (*self._changes(where), *self._stored.values(), *forgotten, *self._moves(where))

    def _sweep(self) -> None:
        """Remove the nodes and initializers behind values that lost their last reader."""
        idle = self.view.idle
        while idle:
            value = idle.pop()
            maker = self.view.makers.get(value)
            if self.view.uses.get(value) or self._stored.pop(value, None) is not None:
                continue
            if value in self.context.whole.tensors and value not in self.context.overridable:
                self.forget(value)
            elif maker is not None and self._is_idle(maker):
                self.remove(maker)
                for output in filter(None, self.view.outputs[maker]):
                    self.forget(output)

    def _is_idle(self, ref: NodeRef) -> bool:
        return ref not in self._removed and not ref.results and not self.view.is_read(ref)

    def _changes(self, where: Mapping[NodeRef, Address]) -> Iterator[Edit]:
        """What changes nodes of the file that stay."""
        for ref in self.view.changed:
            if ref in where and ref not in self._removed:
                yield Rewire(*where[ref], *self.view.names(ref))
        for ref, attributes in self._attributes.items():
            if ref in where and ref not in self._removed:
                yield from (SetAttribute(*where[ref], name, value) for name, value in attributes.items())

    def _moves(self, where: Mapping[NodeRef, Address]) -> list[Edit]:
        """What moves nodes, from the back to the front, so that places in front of it stay as they are."""
        moves: list[tuple[Address, int, Edit]] = [
            (where[ref], -1, Remove(*where[ref])) for ref in self._removed if ref in where
        ]
        moves += [
            (where[anchor], number, self._insertion(ref, where[anchor]))
            for number, (ref, anchor) in enumerate(self._anchors.items())
            if ref not in self._removed
        ]
        return [edit for *_, edit in sorted(moves, key=lambda move: move[:2], reverse=True)]

    def _insertion(self, ref: NodeRef, address: Address) -> Insert:
        node, gone = ref.node, self._attributes.get(ref, {})
        kept = tuple(item for item in node.attribute if item.name not in gone)
        domain = node.domain if node.HasField("domain") else None
        return Insert(*address, node.op_type, node.name, *self.view.names(ref), domain, kept)


def _addresses(model: onnx.ModelProto) -> tuple[dict[int, Path], dict[int, int]]:
    """The way to each graph, and the place of each node in its graph, by the `id` of those that somebody holds."""
    paths: dict[int, Path] = {}
    places: dict[int, int] = {}
    waiting: list[tuple[Path, onnx.GraphProto]] = [((), model.graph)]
    while waiting:
        path, graph = waiting.pop()
        paths[id(graph)] = path
        for place, node in enumerate(graph.node):
            places[id(node)] = place
            waiting += [((*path, (place, number)), body) for number, body in enumerate(bodies(node))]
    return paths, places
