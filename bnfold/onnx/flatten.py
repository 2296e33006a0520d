"""Every node of a model in one list, with values named across bodies: who reads what, wherever it stands.

The bodies of If, Loop and Scan see the values around them, so a body is no graph of its own. `flatten` lists them all:
the nodes of a body come before the node that runs them, which reads what the body returns. Values of a body get a
name of their own (two branches may both call a value `y`), and every use is recorded as the place in the file where it
is written, so that a value can be renamed wherever it is read.

What is checked here: every value that is read is computed once, somewhere before (or can be put in such an order).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx

from bnfold.errors import InputError
from bnfold.onnx.protos import densify

__all__ = ["FlatModel", "NodeRef", "Use", "bodies", "declared_types", "flatten", "fresh"]


@dataclass(eq=False)
class NodeRef:
    """One node of the file.

    Attributes:
        node: the node itself, as it stands in `owner`.
        owner: the graph or body that holds it.
        inputs, outputs: the values by their names in the list ("" where absent).
        results: what its bodies return, if it has any.
        name: unique in the list.
    """

    node: onnx.NodeProto
    owner: onnx.GraphProto
    inputs: list[str]
    outputs: list[str]
    results: list[str]
    name: str = ""

    @property
    def op(self) -> str:
        """The operator, with its domain unless it is ONNX's own."""
        domain = self.node.domain
        return self.node.op_type if domain in ("", "ai.onnx") else f"{domain}.{self.node.op_type}"


@dataclass(eq=False)
class Use:
    """One place where a value is read: an input of a node, or an output of a graph (`ref` is None)."""

    ref: NodeRef | None
    owner: onnx.GraphProto
    place: int


@dataclass(eq=False)
class FlatModel:
    """The model, flattened.

    Attributes:
        refs: all nodes, in an order in which they can be computed.
        home: the graph in which a value is defined.
        raw: the name of a value in the file.
        uses: where each value is read.
        makers: the node that computes a value.
        tensors: the initializers of all graphs, sparse ones written out.
        inputs: the inputs of the main graph, without initializers that are listed there.
        outputs: the outputs of the main graph.
        types: what the file declares about values, main graph and bodies.
        names: those that values have in the file, whatever graph they stand in.
    """

    refs: list[NodeRef] = field(default_factory=list)
    home: dict[str, onnx.GraphProto] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    uses: dict[str, list[Use]] = field(default_factory=dict)
    makers: dict[str, NodeRef] = field(default_factory=dict)
    tensors: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds."""
    for item in node.attribute:
        if item.type == onnx.AttributeProto.GRAPH:
            yield item.g
        elif item.type == onnx.AttributeProto.GRAPHS:
            yield from item.graphs


def flatten(model: onnx.ModelProto) -> FlatModel:
    """Flatten a model.

    Raises:
        InputError: a value is read that nothing computes, is computed twice, or depends on itself.
    """
    result = FlatModel()
    _Walk(result, _defined(model.graph)).graph(model.graph, {}, "")
    return result


def _defined(graph: onnx.GraphProto) -> set[str]:
    """The names that a graph itself gives to values."""
    stored = (*(tensor.name for tensor in graph.initializer), *(given.name for given in graph.input))
    return {*stored, *(name for node in graph.node for name in node.output)}


def declared_types(model: onnx.ModelProto) -> Mapping[str, onnx.TypeProto]:
    """What a model that has been flattened once declares about its values (`FlatModel.types`)."""
    graph = model.graph
    if any(True for node in graph.node for _ in bodies(node)):
        return flatten(model).types
    infos = reversed((*graph.value_info, *graph.input, *graph.output))
    return {info.name: info.type for info in infos if info.HasField("type")}


class _Walk:
    def __init__(self, result: FlatModel, reserved: set[str]) -> None:
        self.result, self.reserved = result, reserved
        self.taken: dict[str, int] = {}

    def graph(self, graph: onnx.GraphProto, around: Mapping[str, str], prefix: str) -> list[str]:
        """Walk one graph; return what it returns."""
        here = dict(around)
        self._declare(graph, here, prefix)
        for node in sort(graph):
            self._node(node, graph, here, prefix)
        returned = [self._find(here, output.name, f"the graph `{graph.name}`") for output in graph.output]
        for place, value in enumerate(returned):
            self.result.uses.setdefault(value, []).append(Use(None, graph, place))
        self._note_types(graph, here)
        if not prefix:
            self.result.outputs = returned
        return returned

    def _declare(self, graph: onnx.GraphProto, here: dict[str, str], prefix: str) -> None:
        stored = {tensor.name for tensor in graph.initializer}
        for tensor in graph.initializer:
            self.result.tensors[self._define(here, tensor.name, prefix, graph)] = tensor
        for sparse in graph.sparse_initializer:
            value = self._define(here, sparse.values.name, prefix, graph)
            self.result.tensors[value] = densify(sparse)
        for given in graph.input:
            if given.name in stored:
                continue
            value = self._define(here, given.name, prefix, graph)
            if not prefix:
                self.result.inputs.append(value)

    def _define(self, here: dict[str, str], name: str, prefix: str, graph: onnx.GraphProto) -> str:
        if not isinstance(name, str):
            raise InputError(f"the name {name!r} is not UTF-8")
        value = prefix + name
        while prefix and (value in self.reserved or self.result.home.get(value, graph) is not graph):
            value += "'"
        if self.result.home.get(value) is not None:
            raise InputError(f"the value `{name}` is computed twice")
        here[name] = value
        self.result.home[value], self.result.raw[value] = graph, name
        self.result.names.add(name)
        return value

    def _node(self, node: onnx.NodeProto, graph: onnx.GraphProto, here: dict[str, str], prefix: str) -> None:
        ref = NodeRef(node, graph, [], [], [])
        label = node.name or next((name for name in node.output if name), node.op_type)
        ref.name = self._unique(label)
        for place, name in enumerate(node.input):
            value = self._find(here, name, f"`{ref.name}` ({node.op_type})") if name else ""
            ref.inputs.append(value)
            if value:
                self.result.uses.setdefault(value, []).append(Use(ref, graph, place))
        for place, body in enumerate(bodies(node)):
            ref.results += self.graph(body, here, f"{ref.name}.{place}/")
        self.result.refs.append(ref)
        for name in node.output:
            value = self._define(here, name, prefix, graph) if name else ""
            ref.outputs.append(value)
            if value:
                self.result.makers[value] = ref

    def _unique(self, label: str) -> str:
        count = self.taken.get(label, 0)
        self.taken[label] = count + 1
        return label if not count else self._unique(f"{label}#{count + 1}")

    def _find(self, here: Mapping[str, str], name: str, reader: str) -> str:
        if name not in here:
            raise InputError(f"{reader} reads `{name}`, which nothing computes")
        return here[name]

    def _note_types(self, graph: onnx.GraphProto, here: Mapping[str, str]) -> None:
        for info in (*graph.value_info, *graph.input, *graph.output):
            if info.name in here and info.HasField("type"):
                self.result.types.setdefault(here[info.name], info.type)


def fresh(wish: str, taken: set[str]) -> str:
    """A name that is not taken, which it is from now on."""
    name, count = wish, 1
    while name in taken:
        count += 1
        name = f"{wish}_{count}"
    taken.add(name)
    return name


# ---------------------------------------------------------------- order


def sort(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph in an order in which they can be computed; as they stand, where that is one.

    Raises:
        InputError: there is none, because the graph has a cycle.
    """
    made = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    waits = [_waits(node, made) for node in graph.node]
    if all(earlier < place for place, wait in enumerate(waits) for earlier in wait):
        return list(graph.node)
    return [graph.node[place] for place in _order(graph, waits)]


def _waits(node: onnx.NodeProto, made: Mapping[str, int]) -> set[int]:
    return {made[name] for name in reads(node) if name in made}


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node and its bodies read."""
    yield from (name for name in node.input if name)
    for body in bodies(node):
        own = {name for inner in body.node for name in inner.output} | {given.name for given in body.input}
        own |= {tensor.name for tensor in body.initializer}
        for inner in body.node:
            yield from (name for name in reads(inner) if name not in own)
        yield from (output.name for output in body.output if output.name not in own)


def _order(graph: onnx.GraphProto, waits: list[set[int]]) -> list[int]:
    followers: dict[int, list[int]] = {}
    left = [len(wait) for wait in waits]
    for place, wait in enumerate(waits):
        for earlier in wait:
            followers.setdefault(earlier, []).append(place)
    ready = [place for place, count in enumerate(left) if not count]
    order: list[int] = []
    for place in ready:
        order.append(place)
        for follower in followers.get(place, ()):
            left[follower] -= 1
            if not left[follower]:
                ready.append(follower)
    if len(order) < len(left):
        stuck = next(graph.node[place] for place, count in enumerate(left) if count)
        raise InputError(f"the graph has a cycle through `{stuck.name or stuck.output[0]}` ({stuck.op_type})")
    return order
