"""Edit a model in place, so that only what has to change changes.

An `Editor` works on a surveyed model: it knows every place where a value is read, gives new things names that nobody
has, and takes away what nobody reads any more once `finish` is called. Nodes and initializers that are not touched are
never copied or reordered, so their bytes stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from bnfold.onnx.read import Picture
from bnfold.onnx.scope import Spot, Use

__all__ = ["Editor"]


class Editor:
    """Changes to the model of a picture.

    Attributes:
        external: where the numbers of a new tensor should go in the file, by its name: the location of those that it
            replaces.
    """

    def __init__(self, picture: Picture) -> None:
        self.model, self.scene, self.whole = picture.model, picture.scene, picture.scene.whole
        self.external: dict[str, str] = {}
        self._names = {name for name in self.whole.names if name}
        self._node_names = {spot.node.name for spot in self.whole.spots}
        self._removed: set[int] = set()
        self._added: list[tuple[Spot, Spot, bool]] = []
        self._idle: list[str] = []
        self._forgotten: dict[int, tuple[onnx.GraphProto, set[str]]] = {}

    # -- names

    def fresh(self, wish: str) -> str:
        """A name for a value that no value has, in any graph."""
        return _fresh(wish, self._names)

    def fresh_node(self, wish: str) -> str:
        """A name for a node that no node has; none where the wish is empty."""
        return _fresh(wish, self._node_names) if wish else ""

    # -- values

    def add_tensor(self, wish: str, array: np.ndarray[Any, Any], data_type: int, replaces: str = "") -> str:
        """Add an initializer to the main graph and return the value."""
        name = self.fresh(wish)
        tensor = self.model.graph.initializer.add(name=name, data_type=data_type, dims=array.shape)
        tensor.raw_data = np.ascontiguousarray(array).tobytes()
        if self.model.ir_version < 4:
            self.model.graph.input.append(onnx.helper.make_tensor_value_info(name, data_type, array.shape))
        old = self.whole.tensors.get(replaces)
        if old is not None and old.data_location == TensorProto.EXTERNAL:
            self.external[name] = next(item.value for item in old.external_data if item.key == "location")
        self.whole.raw[name], self.whole.home[name] = name, self.model.graph
        self.whole.tensors[name] = tensor
        self.whole.uses[name] = []
        return name

    def set_input(self, spot: Spot, place: int, value: str) -> None:
        """Let a node read another value."""
        while len(spot.inputs) <= place:
            spot.inputs.append("")
            spot.node.input.append("")
        self._release(spot, place)
        spot.inputs[place], spot.node.input[place] = value, self.whole.raw[value]
        self.whole.uses.setdefault(value, []).append(Use(spot, spot.owner, place))

    def _release(self, spot: Spot, place: int) -> None:
        value = spot.inputs[place]
        if value:
            uses = self.whole.uses[value]
            uses[:] = [use for use in uses if use.spot is not spot or use.place != place]
            if not uses:
                self._idle.append(value)

    def bypass(self, spots: Sequence[Spot], source: str, target: str) -> None:
        """Remove nodes that compute `target` from `source`, and let `source` take its place everywhere."""
        for spot in spots:
            self.remove(spot)
        uses = self.whole.uses.pop(target, [])
        returned = [use for use in uses if use.spot is None]
        if returned and not self._take_name(source, target, returned):
            self._insert_identity(spots[-1], source, target, returned)
        for use in uses:
            if use.spot is not None:
                use.spot.inputs[use.place], use.spot.node.input[use.place] = source, self.whole.raw[source]
                self.whole.uses.setdefault(source, []).append(use)
        if not returned:
            self._forget(target)

    def _take_name(self, source: str, target: str, returned: list[Use]) -> bool:
        """Let `source` have the name of `target`, which a graph returns; False where it must keep its own."""
        maker = self.whole.makers.get(source)
        taken = any(use.spot is None for use in self.whole.uses.get(source, ()))
        if maker is None or taken or maker.owner is not returned[0].owner:
            return False
        self._forget(source)
        name = self.whole.raw[source] = self.whole.raw[target]
        maker.node.output[maker.outputs.index(source)] = name
        for use in self.whole.uses.setdefault(source, []):
            if use.spot is not None:
                use.spot.node.input[use.place] = name
        self.whole.uses[source] += returned
        return True

    def _insert_identity(self, anchor: Spot, source: str, target: str, returned: list[Use]) -> None:
        self.whole.uses[target] = list(returned)
        self.insert(anchor, "Identity", self.fresh_node(anchor.node.name), [source], target)

    def _forget(self, value: str) -> None:
        """Drop what the file says about a value that is no more."""
        home = self.whole.home[value]
        self._forgotten.setdefault(id(home), (home, set()))[1].add(self.whole.raw[value])

    # -- nodes

    def remove(self, spot: Spot) -> None:
        """Take a node away; its outputs must find another maker or no reader."""
        self._removed.add(id(spot.node))
        for place in range(len(spot.inputs)):
            self._release(spot, place)
        spot.inputs[:] = [""] * len(spot.inputs)

    def insert(
        self, anchor: Spot, op: str, name: str, inputs: Sequence[str], output: str, after: bool = True
    ) -> Spot:
        """Add a node next to another one, in the same graph."""
        node = onnx.NodeProto(op_type=op, name=name, output=[self.whole.raw[output]])
        spot = Spot(node, anchor.owner, [], [output], [], name)
        for place, value in enumerate(inputs):
            self.set_input(spot, place, value)
        self.whole.makers[output] = spot
        anchor = next((first for first, added, _ in self._added if added is anchor), anchor)
        self._added.append((anchor, spot, after))
        return spot

    def insert_copy(self, spot: Spot, inputs: Sequence[str], output: str) -> Spot:
        """Add a copy of a node, attributes and all, that reads and computes other values."""
        name = self.fresh_node(f"{spot.node.name}.copy" if spot.node.name else "")
        copy = self.insert(spot, spot.op, name, inputs, output)
        copy.node.attribute.extend(spot.node.attribute)
        copy.node.domain = spot.node.domain
        return copy

    def new_value(self, wish: str, owner: onnx.GraphProto) -> str:
        """A new value, to be computed by a node that is inserted."""
        name = self.fresh(wish)
        self.whole.raw[name], self.whole.home[name], self.whole.uses[name] = name, owner, []
        return name

    def set_output(self, spot: Spot, place: int, value: str) -> None:
        """Let a node compute another value."""
        spot.outputs[place], spot.node.output[place] = value, self.whole.raw[value]
        self.whole.makers[value] = spot

    # -- the end

    def finish(self) -> None:
        """Take away what nobody reads any more, and put the new nodes in their places."""
        idle_tensors, raw = self._sweep(), self.whole.raw
        graphs = {id(spot.owner): spot.owner for spot in self.whole.spots}
        for graph in graphs.values():
            self._rebuild(graph)
        graphs[id(self.model.graph)] = self.model.graph
        for graph in graphs.values():
            _delete(graph.initializer, lambda tensor: id(tensor) in idle_tensors)
            here = {raw[value] for value in idle_tensors.values() if self.whole.home[value] is graph}
            _delete(graph.sparse_initializer, lambda sparse, here=here: sparse.values.name in here)
        gone = {self.whole.raw[value] for value in idle_tensors.values() if self._is_main(value)}
        _delete(self.model.graph.input, lambda given: given.name in gone)
        for graph, names in self._forgotten.values():
            _delete(graph.value_info, lambda info, names=names: info.name in names)
            _delete(graph.quantization_annotation, lambda note, names=names: note.tensor_name in names)

    def _is_main(self, value: str) -> bool:
        return self.whole.home[value] is self.model.graph

    def _sweep(self) -> dict[int, str]:
        """Remove the nodes behind values that lost their last reader; return the initializers that did."""
        tensors: dict[int, str] = {}
        while self._idle:
            value = self._idle.pop()
            if self.whole.uses.get(value):
                continue
            maker = self.whole.makers.get(value)
            if value in self.whole.tensors and value not in self.scene.overridable:
                tensors[id(self.whole.tensors[value])] = value
                self._forget(value)
            elif maker is not None and self._is_idle(maker):
                self.remove(maker)
                for output in filter(None, maker.outputs):
                    self._forget(output)
        return tensors

    def _is_idle(self, spot: Spot) -> bool:
        if id(spot.node) in self._removed or spot.results:
            return False
        return not any(self.whole.uses.get(value) for value in spot.outputs if value)

    def _rebuild(self, graph: onnx.GraphProto) -> None:
        before: dict[int, list[Spot]] = {}
        after: dict[int, list[Spot]] = {}
        for anchor, spot, follows in self._added:
            if anchor.owner is graph and id(spot.node) not in self._removed:
                (after if follows else before).setdefault(id(anchor.node), []).append(spot)
        if not before and not after and not self._removed:
            return
        for place in range(len(graph.node) - 1, -1, -1):
            node = graph.node[place]
            for spot in reversed(after.get(id(node), ())):
                graph.node.insert(place + 1, spot.node)
            for spot in reversed(before.get(id(node), ())):
                graph.node.insert(place, spot.node)
            if id(node) in self._removed:
                del graph.node[place + len(before.get(id(node), ()))]


def _fresh(wish: str, taken: set[str]) -> str:
    name, count = wish, 1
    while name in taken:
        count += 1
        name = f"{wish}_{count}"
    taken.add(name)
    return name


def _delete(items: Any, unwanted: Any) -> None:
    """Delete from a repeated field, in place."""
    for place in range(len(items) - 1, -1, -1):
        if unwanted(items[place]):
            del items[place]
