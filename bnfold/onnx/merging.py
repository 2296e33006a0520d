"""Write merged operators into an ONNX model: where one fits, and the edits that put it there.

A merged convolution is a Conv, a merged matrix a Gemm where values are matrices, else a MatMul and an Add, and a merged
table a Gather. It is inserted where the last of its nodes stood; they go, with what only they read. A sum that lost
operands to a merge elsewhere keeps the others, and goes if one is left.

What the graph does not show is asked of the file: a value between two nodes must be read by nobody, be it for its shape
alone, and all nodes must stand in one graph or body.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from bnfold.algebra import Array, round_to
from bnfold.candidates import Candidate
from bnfold.decide import prove
from bnfold.errors import Refuse
from bnfold.ir import Graph, Node
from bnfold.merge import Merge, Merged, merge
from bnfold.onnx.constant_folding import Unworkable
from bnfold.onnx.edit import Editor
from bnfold.onnx.flatten import NodeRef
from bnfold.onnx.protos import FLOATS
from bnfold.onnx.read import ImportedModel
from bnfold.onnx.slots import find_slots, stored_numbers
from bnfold.operators import Numbers, Operator
from bnfold.rules import is_sum

__all__ = ["merge_imported", "write_merges"]


def merge_imported(imported: ImportedModel, graph: Graph) -> Merged:
    """Merge the linear operators of a model's graph, as `travel` has left it."""
    host = _Host(imported, graph)
    return prove(graph, merge(graph, host), host.stored)


@dataclass(frozen=True)
class _Place:
    """Where a merged operator goes.

    Attributes:
        refs: the nodes that it replaces, in the order of the file; the last one computes its result.
        data_type: of its numbers.
        biased: whether it has a bias.
        digest: of its numbers; operators with the same ones share them.
    """

    refs: tuple[NodeRef, ...]
    data_type: int
    biased: bool
    digest: bytes


@dataclass(eq=False)
class _Host:
    """An imported model as a host of merged operators; see `bnfold.candidates.Host`."""

    imported: ImportedModel
    graph: Graph

    def stored(self, node: Node) -> Any:
        """The weight and bias of a linear node, Gemm's alpha and beta in them."""
        if node.linear is None or node.name not in self.imported.refs:
            raise Refuse("its numbers are those of another node")
        try:
            return stored_numbers(self.imported, node.name, node.linear)
        except Unworkable as error:
            raise Refuse(str(error)) from error

    def itemsize(self, node: Node) -> int:
        """How many bytes one number of its weight takes."""
        if node.name not in self.imported.refs:
            return 4
        slots = find_slots(self.imported, node.name)
        data_type = self.imported.context.type(slots.ref.inputs[slots.weight]) or TensorProto.FLOAT
        return helper.tensor_dtype_to_np_dtype(data_type).itemsize

    @property
    def adds_in_place(self) -> bool:
        """Nothing is changed in place in a file."""
        return False

    def can_drop(self, term: Candidate) -> bool:
        """Whether an operand of a sum can be left out: any can."""
        return True

    def value(self, name: str) -> str:
        """A value of the graph in the file: what a copy computes has another name there."""
        producer = self.graph.producer(name)
        if producer is None or producer.copied is None:
            return name
        return self.imported.refs[producer.name][-1].outputs[0]

    def place(self, candidate: Candidate) -> _Place:
        """Where a merged operator can be written."""
        refs = tuple(self._refs(candidate))
        if len({id(ref.owner) for ref in refs}) > 1:
            raise Refuse("they stand in different graphs of the file")
        self._check_between(candidate, refs)
        data_type = self._type(candidate)
        assert isinstance(candidate.operator, Operator)
        with np.errstate(all="ignore"):
            weight, bias = candidate.operator.numbers(self.stored)
        _check_range(weight, bias, data_type)
        return _Place(refs, data_type, bool(np.any(bias != 0)), _digest(weight, bias))

    def _refs(self, candidate: Candidate) -> Iterator[NodeRef]:
        """The nodes of the file behind those of the graph, the last one last."""
        for name in reversed(candidate.nodes):
            if name not in self.imported.refs:
                raise Refuse(f"`{name}` is a copy that is not in the file yet")
            yield from self.imported.refs[name]

    @cached_property
    def _bypassed(self) -> frozenset[NodeRef]:
        """The nodes of the file that folding leaves nothing of; they are read through, like a copy."""
        gone = (node.name for node in self.imported.graph.nodes if node.name not in self.graph)
        return frozenset(ref for name in gone for ref in self.imported.refs[name])

    def _check_between(self, candidate: Candidate, refs: Sequence[NodeRef]) -> None:
        """Refuse a value that somebody else reads, for its shape, say."""
        waiting = [value for ref in refs for value in ref.outputs if value and value != candidate.result]
        sums = [self.graph[name] for name in dict(candidate.dropped)]
        empty = self._emptied(sums, candidate.result)
        waiting += [node.outputs[0] for node in empty]
        names = (reader.name for node in empty for reader in self.graph.readers(node.outputs[0]))
        inside = {
            *refs,
            *(ref for name in (*dict(candidate.dropped), *names) for ref in self.imported.refs[name]),
        }
        while waiting:
            for use in self.imported.context.whole.uses.get(waiting.pop(), ()):
                if use.ref is None or not (use.ref in inside or self._is_read_through(use.ref)):
                    name = use.ref.name if use.ref is not None else "the output of the model"
                    raise Refuse(f"what lies between is read by `{name}` as well")
                waiting += [] if use.ref in inside else [use.ref.outputs[0]]

    def _emptied(self, sums: Sequence[Node], host: str) -> list[Node]:
        """The sums that may have no operand left, among those that lose one and those that take these in."""
        kept, found = {node.name for node in self._sums_below(host)}, dict[str, Node]()
        for each in sums:
            for node in (each, *self._sums_below(each.outputs[0], {*kept, *found})):
                found |= {} if node.name in kept else {node.name: node}
        return list(found.values())

    def _sums_below(self, value: str, known: Container[str] = ()) -> Iterator[Node]:
        """The sums that a value is a term of, from the innermost out, up to one that is known."""
        readers = self.graph.readers(value)
        while len(readers) == 1 and is_sum(readers[0]) and readers[0].name not in known:
            yield readers[0]
            readers = self.graph.readers(readers[0].outputs[0])

    def _is_read_through(self, ref: NodeRef) -> bool:
        """Whether a node computes what it reads, as far as the graph shows."""
        return ref in self._bypassed or not self.imported.context.copies.keys().isdisjoint(ref.outputs)

    def _type(self, candidate: Candidate) -> int:
        """The type of all values and weights."""
        types = {self.imported.context.type(candidate.result)}
        for name in candidate.nodes:
            if self.graph[name].linear is not None:
                slots = find_slots(self.imported, name)
                types.add(self.imported.context.type(slots.ref.inputs[slots.weight]))
        if len(types) > 1 or not types <= FLOATS:
            raise Refuse("their numbers are of different types")
        return types.pop()


def _check_range(weight: Array, bias: Array, data_type: int) -> None:
    """Refuse numbers that a type cannot hold, or only with fewer digits than it has."""
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    if not all(np.isfinite(round_to(array, dtype).astype(np.float64)).all() for array in (weight, bias)):
        raise Refuse(f"its numbers would overflow {dtype}")
    if 0 < np.abs(weight).max(initial=0) < _SMALLEST_NORMAL.get(data_type, 2.0**-126):
        raise Refuse(f"its numbers would underflow {dtype}")


def _digest(*arrays: Array) -> bytes:
    import hashlib  # here, since most files need none and it takes 5 ms

    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


_SMALLEST_NORMAL: dict[int, float] = {TensorProto.FLOAT16: 2.0**-14, TensorProto.DOUBLE: 2.0**-1022}
"""Where a type begins to lose digits, if it is not the exponents of float32 that it has."""


# ---------------------------------------------------------------- edits


def write_merges(imported: ImportedModel, graph: Graph, merged: Merged, editor: Editor) -> None:
    """Plan the edits that put merged operators in the place of what they were made of.

    Args:
        imported: the model.
        graph: its graph before anything was merged.
        merged: what is to be merged.
        editor: takes the edits.
    """
    host, stored = _Host(imported, graph), dict[Any, str]()
    for one in merged.merges:
        _Writer(imported, host, one, editor, stored).write()
    for node in graph.nodes:
        if node.name in merged.left:
            _shrink(imported, node, merged.left[node.name], editor)


def _shrink(imported: ImportedModel, node: Node, left: Sequence[int], editor: Editor) -> None:
    """Let a sum add up fewer operands."""
    (ref,) = imported.refs[node.name]
    inputs = [editor.view.inputs[ref][place] for place in left]
    if len(inputs) == 1:
        editor.bypass([ref], inputs[0], ref.outputs[0])
    elif inputs:
        editor.view.set_inputs(ref, inputs)
    else:
        editor.remove(ref)
        editor.forget(ref.outputs[0])


@dataclass(eq=False)
class _Recipe:
    """The numbers of a merged operator, computed when the first of the two is asked for and held until the other is."""

    operator: Operator
    host: _Host
    held: dict[int, Array] = field(default_factory=dict)

    def take(self, which: int) -> Array:
        """The weight (0) or the bias (1)."""
        if which not in self.held:
            numbers: Numbers = self.operator.numbers(self.host.stored)
            self.held = dict(enumerate(numbers))
        return self.held.pop(which)


class _Writer:
    """Writes one merged operator; `stored` knows the tensors that others have written."""

    def __init__(
        self, imported: ImportedModel, host: _Host, one: Merge, editor: Editor, stored: dict[Any, str]
    ) -> None:
        self.imported, self.editor, self.one, self.stored = imported, editor, one, stored
        self.place: _Place = one.place
        self.operator = one.operator
        self.recipe = _Recipe(one.operator, host)
        self.anchor, self.source = self.place.refs[-1], host.value(one.candidate.source)
        self.label = one.into

    def write(self) -> None:
        """Take the nodes away and insert the operator."""
        for ref in self.place.refs:
            self.editor.remove(ref)
            for value in ref.outputs:
                if value and value != self.one.candidate.result:
                    self.editor.forget(value)
                    self._leave(value)
        if self.operator.lookup:
            self._table()
        elif self.operator.window is not None:
            self._convolution()
        else:
            self._matrix()
        self._drop_copies(self.one.candidate.result)

    def _drop_copies(self, value: str) -> None:
        """Take away what adds zero to the result or multiplies it by one: it belonged to the sum."""
        copies = self.imported.context.copies
        for use in list(self.imported.context.whole.uses.get(value, ())):
            if use.ref is not None and use.ref.op in ("Add", "Sub", "Mul", "Div"):
                (output,) = use.ref.outputs
                if output in copies:
                    self._drop_copies(output)
                    self.editor.bypass([use.ref], value, output)

    def _leave(self, value: str) -> None:
        """Let copies of a value that is gone go too, those that nobody reads among them."""
        for use in self.editor.view.uses.get(value, ()):
            if use.ref is not None and use.ref.outputs[0] in self.imported.context.copies:
                self._leave(use.ref.outputs[0])
                self.editor.view.idle.append(use.ref.outputs[0])

    def _insert(self, op: str, inputs: Sequence[str], output: str = "", step: str = "") -> NodeRef:
        name = self._name(step) if self.anchor.node.name else ""
        return self.editor.insert(self.anchor, op, name, inputs, output or self.one.candidate.result)

    def _name(self, step: str) -> str:
        """The name of the dearest node that goes; another one where it had none, or for a step before the last."""
        if not step and self.label in {ref.node.name for ref in self.place.refs}:
            return self.label
        return self.editor.fresh_node(f"{self.label}{step}")

    def _store(self, which: int, shape: tuple[int, ...], order: tuple[int, ...] | None = None) -> str:
        """Store the weight (0) or bias (1), once its axes are reordered, in this shape."""

        def numbers() -> Array:
            array = self.recipe.take(which)
            return np.ascontiguousarray(array if order is None else array.transpose(order)).reshape(shape)

        return self._add(("weight", "bias")[which], numbers, shape, order)

    def _add(self, role: str, numbers: Callable[[], Array], shape: tuple[int, ...], order: Any = None) -> str:
        """Add a tensor, unless the same one has been added."""
        key = (role, shape, order, self.place.data_type, self.place.digest)
        if key not in self.stored:
            name, replaced = f"{self.label}.{role}.merged", self._replaced()

            def rounded(dtype: np.dtype[Any], /) -> np.ndarray[Any, Any]:
                return round_to(numbers(), dtype)

            self.stored[key] = self.editor.add_tensor(name, rounded, shape, self.place.data_type, replaced)
        return self.stored[key]

    def _replaced(self) -> str:
        """The tensor that the new one takes the place of: it goes where that lay."""
        if self.one.into not in self.imported.refs or not self.imported.graph[self.one.into].linear:
            return ""
        slots = find_slots(self.imported, self.one.into)
        return slots.ref.inputs[slots.weight]

    def _convolution(self) -> None:
        operator, window = self.operator, self.operator.window
        assert window is not None
        assert window.pads is not None
        weight = self._store(0, (operator.outputs, operator.inputs // operator.groups, *window.kernel))
        bias = [self._store(1, (operator.outputs,))] if self.place.biased else []
        ref = self._insert("Conv", [self.source, weight, *bias])
        pads = [pair[0] for pair in window.pads] + [pair[1] for pair in window.pads]
        settings = {
            "kernel_shape": window.kernel,
            "strides": window.strides,
            "dilations": window.dilations,
            "pads": pads,
            "group": operator.groups,
        }
        ref.node.attribute.extend(helper.make_attribute(key, value) for key, value in settings.items())

    def _matrix(self) -> None:
        operator, source = self.operator, self.source
        rank = self.imported.context.rank(self.one.candidate.result) or 0
        turned = operator.in_axis != operator.out_axis
        if rank == 2 and operator.out_axis == 1 and (turned or self.place.biased):
            weight = self._store(0, (operator.outputs, operator.inputs))
            needs_bias = self.place.biased or self.imported.context.opset < 11
            bias = [self._store(1, (operator.outputs,))] if needs_bias else []
            ref = self._insert("Gemm", [source, weight, *bias])
            ref.node.attribute.extend([helper.make_attribute("transB", 1)])
            ref.node.attribute.extend([helper.make_attribute("transA", 1)] if turned else [])
            return
        left = operator.out_axis == rank - 2
        if left:
            operands = [self._store(0, (operator.outputs, operator.inputs)), source]
        else:
            operands = [source, self._store(0, (operator.inputs, operator.outputs), (0, 2, 1))]
        if not self.place.biased:
            self._insert("MatMul", operands)
            return
        raw = self.editor.view.raw[self.one.candidate.result]
        between = self.editor.new_value(f"{raw}.unbiased", self.anchor.owner)
        shift = self._store(1, (operator.outputs, 1) if left else (operator.outputs,))
        self._insert("MatMul", operands, between, ".product")
        self._insert("Add", [between, shift])

    def _table(self) -> None:
        operator = self.operator

        def numbers() -> Array:
            weight, bias = self.recipe.take(0), self.recipe.take(1)
            return np.ascontiguousarray(weight[0].T + bias)

        shape = (operator.inputs, operator.outputs)
        self._insert("Gather", [self._add("table", numbers, shape), self.source])
