"""The shapes and element types of all values, by ONNX's shape inference and by reading the model at several sizes.

The inference runs on a copy of the model without its large tensors (their shapes stay), so that a model over 2 GiB can
be inferred and no weight is copied. Symbols that the inference invents for unknown sizes are unique, so two equal
symbols are one size.

What it leaves open is found by *readings*: every open size of the inputs becomes a number, and one walk over the nodes
infers each from what is known before it, with what the model computes from sizes (`Concat(Shape(x)[:2], [-1])`)
computed on the way; and all of that again with other numbers. A size that is the same in every reading is that number,
one that goes with the sizes of an input is that input's symbol, and sizes that go together are one symbol. The numbers
share no factor and are odd and even, since half of a size, rounded up, must not pass for half of it rounded down.
Sizes at which the inference finds a contradiction are sizes that the model does not take, and no reading; so a model
that takes multiples only is read at multiples. One that takes none of the sizes tried still shows the ranks and the
numbers that they all have in common.

What is the same in every reading is no proof that it is so at all sizes (`max(16 - size, 0)`): where that matters,
`Sizes` tells what does not depend on an open size, and numbers that do by a minimum or a comparison are no constants.
So may a Slice leave fewer than it asks for, and such a number make a size: what is of another size where that is one
alone is open, and so are the axes that a Reshape gives such a number. Sizes that the file declares for inner values,
those of bodies included, are those of one run where one of them is a number and the inputs leave it open; then none of
them is believed. Nor are any, nor is what the readings say, behind a Squeeze that takes away all axes of one, where a
size may be one: there may be an axis less.

Not covered: a size that depends on the numbers in a tensor (NonZero); bodies, beyond what the inference says of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from bnfold.ir import Dim, Shape
from bnfold.onnx.constant_folding import Constants
from bnfold.onnx.flatten import FlatModel, NodeRef, bodies, declared_types
from bnfold.onnx.protos import FLOATS, attribute
from bnfold.onnx.sizes import CARRY_NAN, VECTOR, Sizes, is_open

__all__ = ["Shapes", "infer", "skeleton"]

_FAILURES = (
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    ValueError,
    RuntimeError,
    TypeError,
)

LONG = 1 << 16
"""With vectors of more numbers than this, no numbers are propagated by ONNX's inference."""

LARGE = 512
"""Tensors of more elements than this are left out of the copy that shapes are inferred on."""

READINGS = 3
"""How many readings must agree; two, where the model takes no other sizes."""


@dataclass(frozen=True)
class Shapes:
    """The shapes and the element types (`TensorProto.DataType`) of values, and what the inference complained about."""

    shapes: dict[str, Shape]
    types: dict[str, int]
    complaint: str = ""


Vector = npt.NDArray[Any]

Cuts = Mapping[str, Sequence[int]]
"""Values, and the axes along which they are one long."""


def infer(
    model: onnx.ModelProto,
    whole: FlatModel,
    constants: Callable[[type[Constants], Shapes], Any],
    overridable: frozenset[str] = frozenset(),
) -> tuple[Shapes, Constants, Sizes]:
    """Shapes and types of all values of a flattened model, what is constant, and what is known of computed sizes.

    Initializers that a caller may override are inputs here: neither their numbers nor their sizes are known.
    """
    bare = skeleton(model)
    for place in range(len(bare.graph.initializer) - 1, -1, -1):
        if bare.graph.initializer[place].name in overridable:
            del bare.graph.initializer[place]
    symbols = _name_open_sizes(bare)
    plain = _infer_plainly(bare)
    squeezes = [ref for ref in whole.refs if symbols and _takes_ones(ref)]
    if squeezes or _declares_one_run(whole, plain):
        _forget_sizes(bare.graph)
        whole.types = {value: kind for value, kind in whole.types.items() if value in whole.inputs}
    tensors = {value: tensor for value, tensor in whole.tensors.items() if value not in overridable}
    found = _infer_once(bare, whole.types, tensors, not _has_long_vectors(plain))
    inferred = Shapes(dict(found.shapes), dict(found.types), found.complaint)
    sizes = constants(Sizes, Shapes(inferred.shapes, found.types))
    refs = [ref for ref in whole.refs if ref.owner is model.graph]
    start = _Start(bare, tensors, refs, constants, inferred)
    readings = _read(start, symbols) if _is_open(found, whole) else []
    _agree(found, readings, symbols)
    numbers = _work_out(whole.refs, start, found, readings)
    doubted = _doubt_reshapes(found, numbers, whole)
    shorter = list(_read_shorter(start, found, readings, numbers))
    _agree_with(found, shorter)
    unsure = _loosen(found, whole.refs) if squeezes else set()
    if doubted or shorter or unsure:
        numbers = _work_out(whole.refs, start, found, [*readings, *shorter], unsure)
    for ref in whole.refs:
        if not ref.results:
            sizes.add_node(ref.node, ref.inputs, ref.outputs)
    return found, numbers.known, sizes


def _work_out(
    refs: Sequence[NodeRef],
    start: _Start,
    found: Shapes,
    readings: Sequence[_Reading],
    unsure: Set[str] = frozenset(),
) -> _Numbers:
    """What is constant, by its makers or in all of the readings."""
    numbers = _Numbers(start.constants(Constants, found), start.constants(Sizes, found), readings)
    taken = [reading for reading in readings if found.complaint or not reading.complaint]
    vectors = _alike([reading.vectors for reading in taken])
    for ref in refs:
        numbers.note(ref)
        for value in ref.outputs:
            if value in vectors and value not in unsure | numbers.bent:
                numbers.known.add_sizes(value, vectors[value])
                numbers.told.add_sizes(value, vectors[value])
    return numbers


class _Numbers:
    """Numbers that do not depend on an open size, and those that do by another way than sums and products.

    The latter may be alike at some sizes and are not at all: a minimum, a comparison, a division that leaves something
    over, an element whose place depends on the size.

    Attributes:
        known, told: what is constant, whole and number by number.
        bent: the others.
    """

    def __init__(self, known: Constants, told: Sizes, readings: Sequence[_Reading]) -> None:
        self.known, self.told, self.readings, self.bent = known, told, readings, set[str]()

    def note(self, ref: NodeRef) -> None:
        """Note what a node computes, after those that it reads of."""
        if not ref.results:
            self.known.add_node(ref.node, ref.inputs, ref.outputs)
            self.told.add_node(ref.node, ref.inputs, ref.outputs)
        if ref.op in ("Shape", "Size") or all(self._is_known(value) for value in ref.outputs if value):
            return
        if not self.bent.isdisjoint(ref.inputs) or self._bends(ref):
            self.bent.update(ref.outputs)

    def _is_known(self, value: str) -> bool:
        """Whether a value is the same at every size of the inputs, and known."""
        if value in self.known or value not in self.told:
            return value in self.known
        array = self.told.get(value) if (self.told.size(value) or 0) <= VECTOR else None
        return array is not None and not is_open(array)

    def _bends(self, ref: NodeRef) -> bool:
        if ref.op in ("Gather", "Slice"):
            return not all(self._is_known(value) for value in ref.inputs[1:] if value)
        if ref.op == "Cast":
            return self.told.types.get(ref.inputs[0]) in FLOATS
        if ref.op == "Div":
            return not all(_divides(*map(reading.known.get, ref.inputs)) for reading in self.readings)
        return ref.op not in CARRY_NAN


def _divides(numbers: Vector | None, by: Vector | None) -> bool:
    """Whether a division leaves nothing over."""
    if numbers is None or by is None or "f" in (numbers.dtype.kind, by.dtype.kind):
        return True
    return bool(by.all() and not (numbers % by).any())


def _takes_ones(ref: NodeRef) -> bool:
    """Whether a node takes away every axis that is one long, whichever those are."""
    named = any(item.name == "axes" for item in ref.node.attribute) or any(ref.inputs[1:])
    return ref.op == "Squeeze" and not named


_RANKED = frozenset({"Conv", "ConvTranspose", "Flatten", "Gemm", "Reshape"})
"""Operators whose outputs have as many axes as their weights or their shape say, whatever they read."""


def _axes_asked(found: Shapes, ref: NodeRef) -> int:
    """How many axes what a node reads first must have, at least, for the node to run."""
    shape = found.shapes.get(ref.inputs[1], ()) if len(ref.inputs) > 1 else ()
    if ref.op == "BatchNormalization":  # which takes an axis alone for examples of one channel
        return 2 if shape and isinstance(shape[0], int) and shape[0] > 1 else 1
    return {"Gemm": 2, "Conv": len(shape), "ConvTranspose": len(shape)}.get(ref.op, 0)


def _loosen(found: Shapes, refs: Sequence[NodeRef]) -> set[str]:
    """Forget what depends on whether a size that is open is one, and was taken away; the values in question.

    None was where a node asks for all axes that there can be.
    """
    unsure: set[str] = set()
    loose: set[str] = set()
    asked: Counter[tuple[int, str]] = Counter()
    for ref in refs:
        for value in ref.inputs[:1]:
            key = id(ref.owner), value
            asked[key] = max(asked[key], _axes_asked(found, ref))
    for ref in refs:
        reads = {*ref.inputs, *ref.results}
        shape = found.shapes.get(ref.inputs[0]) if _takes_ones(ref) else ()
        least = asked[id(ref.owner), ref.outputs[0]] if ref.outputs else 0
        starts = shape is None or (
            not all(isinstance(size, int) for size in shape) and least < sum(size != 1 for size in shape)
        )
        if starts or not unsure.isdisjoint(reads):
            unsure.update(ref.outputs)
        if starts or (ref.op not in _RANKED and not loose.isdisjoint(reads)):
            loose.update(ref.outputs)
    for value in unsure & found.shapes.keys():
        found.shapes[value] = (None,) * len(found.shapes[value])
        if value in loose:
            del found.shapes[value]
    return unsure


def _is_open(found: Shapes, whole: FlatModel) -> bool:
    """Whether the inference has left a size open in the main graph."""
    shapes = (found.shapes.get(value, (None,)) for value, raw in whole.raw.items() if value == raw)
    return any(not isinstance(size, int) for shape in shapes for size in shape)


# ---------------------------------------------------------------- readings


def _name_open_sizes(bare: onnx.ModelProto) -> dict[str, int]:
    """Give every open size of the inputs a name; the names, with the axis on which each stands first."""
    found: dict[str, int] = {}
    for given in bare.graph.input:
        for axis, dim in enumerate(given.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") or dim.dim_value < 0:
                dim.dim_param = dim.dim_param or f"{given.name}.{axis}"
                found.setdefault(dim.dim_param, axis)
    return found


def _choices(symbols: Mapping[str, int]) -> Iterator[tuple[int, ...]]:
    """Numbers to try for the open sizes, another one for each; small ones along the first axis."""
    for batch, between, size, step in ((3, 2, 97, 34), (2, 3, 64, 32), (5, 4, 39, 26), (7, 6, 192, 64)):
        yield tuple(
            batch + between * place if axis == 0 else size + step * place
            for place, axis in enumerate(symbols.values())
        )


@dataclass(frozen=True)
class _Start:
    """What every reading begins with: inputs and operator sets, stored tensors, nodes, and what is known already."""

    bare: onnx.ModelProto
    tensors: Mapping[str, TensorProto]
    refs: Sequence[NodeRef]
    constants: Callable[[type[Constants], Shapes], Any]
    inferred: Shapes


def _read(start: _Start, symbols: Mapping[str, int]) -> list[_Reading]:
    """Readings at sizes that the model takes; where those are too few to compare, at sizes that it does not."""
    readings: list[_Reading] = []
    refused: list[_Reading] = []
    for sizes in _choices(symbols):
        reading = _Reading(start, dict(zip(symbols, sizes, strict=True)))
        taken = start.inferred.complaint or not reading.complaint
        (readings if taken else refused).append(reading)
        if len(readings) == (READINGS if symbols else 1):
            return readings
    return readings if len(readings) > 1 else refused


def _read_shorter(
    start: _Start, found: Shapes, readings: Sequence[_Reading], numbers: _Numbers
) -> Iterator[_Reading]:
    """Readings in which what may be shorter is one long, each value by itself; none that the model does not take."""
    for ref in start.refs if readings else ():
        axes = _shorter_axes(found, numbers, ref)
        if axes:
            reading = _Reading(start, readings[0].sizes, {ref.outputs[0]: axes})
            if not reading.complaint:
                yield reading


def _doubt_reshapes(found: Shapes, numbers: _Numbers, whole: FlatModel) -> bool:
    """Leave open what a Reshape gives a bent number: where that is another one, the axes around it are others.

    Returns whether there was any.
    """
    before = dict(found.shapes)
    for ref in whole.refs:
        if ref.op == "Reshape" and ref.inputs[1] in numbers.bent and ref.outputs[0] in found.shapes:
            bent = _bent_places(found, numbers, whole, ref.inputs[1])
            shape = found.shapes[ref.outputs[0]]
            found.shapes[ref.outputs[0]] = tuple(
                None if isinstance(size, str) and (bent is None or axis in bent) else size
                for axis, size in enumerate(shape)
            )
    return found.shapes != before


def _bent_places(found: Shapes, numbers: _Numbers, whole: FlatModel, value: str) -> set[int] | None:
    """Where a vector that is joined of others holds bent numbers, or a -1 that makes up for them; None for anywhere."""
    maker, places, start = whole.makers.get(value), set[int](), 0
    for part in maker.inputs if maker is not None and maker.op == "Concat" else ():
        shape = found.shapes.get(part, ())
        if len(shape) != 1 or not isinstance(shape[0], int):
            return None
        said = numbers.told.numbers(part) or ()
        places.update(start + at for at in range(shape[0]) if part in numbers.bent or -1 in said[at : at + 1])
        start += shape[0]
    return places if start else None


_SHAPE_INPUT = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1, "Tile": 1}
"""Which input says, number by number, how long the axes are."""


def _shorter_axes(found: Shapes, numbers: _Numbers, ref: NodeRef) -> list[int]:
    """The axes that are alike in all readings, and shorter where a Slice finds less, or a bent number is less."""
    after = found.shapes.get(ref.outputs[0], ()) if ref.outputs else ()
    long = [axis for axis, size in enumerate(after) if isinstance(size, int) and size > 1]
    if ref.op in _SHAPE_INPUT:
        value = ref.inputs[_SHAPE_INPUT[ref.op]]
        said = (numbers.told.numbers(value) if value in numbers.bent else None) or ()
        return [axis for axis in long if dict(enumerate(said, len(after) - len(said))).get(axis, 0) is None]
    if ref.op == "Range":
        return long if not numbers.bent.isdisjoint(ref.inputs) else []
    before = found.shapes.get(ref.inputs[0], ()) if ref.op == "Slice" else ()
    return [axis for axis in long if axis < len(before) and not isinstance(before[axis], int)]


def _shortened(kind: onnx.TypeProto, axes: Sequence[int]) -> onnx.TypeProto:
    """A type that is one long along some axes."""
    for axis in axes:
        kind.tensor_type.shape.dim[axis].dim_value = 1
    return kind


def _agree_with(found: Shapes, shorter: Sequence[_Reading]) -> None:
    """Leave open what is of another size where a piece is shorter."""
    for reading in shorter:
        for value, shape in reading.found.shapes.items():
            known = found.shapes.get(value, ())
            if len(known) == len(shape):
                found.shapes[value] = tuple(
                    None if isinstance(a, int) and a != b else a for a, b in zip(known, shape, strict=True)
                )


class _Reading:
    """One walk over the main graph, with a number for every open size.

    Attributes:
        sizes: the numbers, by the symbols in whose place they are.
        found: shapes and types.
        guessed: values whose type is not known.
        vectors: the small vectors (and scalars) of whole numbers that nodes compute.
        complaint: what the inference said of some node.
    """

    def __init__(self, start: _Start, sizes: Mapping[str, int], cuts: Cuts | None = None) -> None:
        self.sizes, self.inferred, self.complaint = sizes, start.inferred, ""
        self.cuts = cuts or {}
        self.opsets = list(start.bare.opset_import)
        self.found, self.guessed = Shapes({}, {}), set[str]()
        self.known: Constants = start.constants(Constants, self.found)
        self.types: dict[str, onnx.TypeProto] = {}
        self.vectors: dict[str, Vector] = {}
        for value, tensor in start.tensors.items():
            self._note(value, onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims))
        for given in start.bare.graph.input:
            self._note(given.name, _filled(given.type, sizes))
        for ref in start.refs:
            self._walk(ref)

    def _walk(self, ref: NodeRef) -> None:
        whole = not ref.results and self.cuts.keys().isdisjoint(ref.outputs)
        constant = whole and self.known.add_node(ref.node, ref.inputs, ref.outputs)
        schema = _schema(ref.node, self.opsets)
        sure = {value: self._as_inferred(value) for value in ref.outputs if value}
        made = self._infer(ref, schema) if ref.op != "Constant" and None in sure.values() else {}
        for value, kind in sure.items():
            kind = kind or made.get(value) or self._as_constant(value)
            if kind is None or schema is None or not self.guessed.isdisjoint(ref.inputs):
                self.guessed.add(value)
            kind = kind or onnx.helper.make_tensor_type_proto(TensorProto.FLOAT, None)
            self._note(value, _shortened(kind, self.cuts.get(value, ())))
        if constant and ref.op != "Constant":
            self._keep(ref.outputs[0])

    def _keep(self, value: str) -> None:
        array = self._vector(value)
        if array is not None and array.dtype.kind == "i":
            self.vectors[value] = array

    def _note(self, value: str, kind: onnx.TypeProto) -> None:
        self.types[value] = kind
        _note(self.found, value, kind)

    def _infer(self, ref: NodeRef, schema: Any) -> Mapping[str, onnx.TypeProto]:
        """What the inference says of one node; nothing of an operator that ONNX does not know."""
        if schema is None or ref.results or not all(value in self.types for value in ref.inputs if value):
            return {}
        data = {value: tensor for value in ref.inputs if (tensor := self._data(value)) is not None}
        types = {value: self.types[value] for value in ref.inputs if value}
        try:
            return self._infer_from(ref, schema, types, data)
        except _FAILURES as error:
            self.complaint = self.complaint or str(error)
        try:
            return self._infer_from(
                ref, schema, {value: _rank_alone(kind) for value, kind in types.items()}, {}
            )
        except _FAILURES:
            return {}

    def _infer_from(
        self,
        ref: NodeRef,
        schema: Any,
        types: Mapping[str, onnx.TypeProto],
        data: Mapping[str, TensorProto],
    ) -> Mapping[str, onnx.TypeProto]:
        found: Mapping[str, onnx.TypeProto] = onnx.shape_inference.infer_node_outputs(
            schema, ref.node, dict(types), dict(data), opset_imports=self.opsets
        )
        return found

    def _as_inferred(self, value: str) -> onnx.TypeProto | None:
        """What the inference of the whole model says, where that leaves nothing open but sizes of the inputs."""
        shape, kind = self.inferred.shapes.get(value, (None,)), self.inferred.types.get(value)
        numbers = [self.sizes.get(size) if isinstance(size, str) else size for size in shape]
        return onnx.helper.make_tensor_type_proto(kind, numbers) if kind and None not in numbers else None

    def _as_constant(self, value: str) -> onnx.TypeProto | None:
        array = self.known.get(value)
        if array is None:
            return None
        return onnx.helper.make_tensor_type_proto(
            onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )

    def _data(self, value: str) -> TensorProto | None:
        """The numbers of a small constant."""
        array = self._vector(value) if value in self.known else None
        return None if array is None else onnx.numpy_helper.from_array(array)

    def _vector(self, value: str) -> Vector | None:
        size = self.known.size(value)
        array = self.known.get(value) if size is not None and size <= VECTOR else None
        return array if array is not None and array.ndim < 2 else None


def _rank_alone(kind: onnx.TypeProto) -> onnx.TypeProto:
    """A type without its sizes: what is left to go on with behind a contradiction."""
    bare = onnx.TypeProto()
    bare.CopyFrom(kind)
    for dim in bare.tensor_type.shape.dim:
        dim.Clear()
    return bare


def _filled(kind: onnx.TypeProto, sizes: Mapping[str, int]) -> onnx.TypeProto:
    """A type with numbers in the place of symbols."""
    filled = onnx.TypeProto()
    filled.CopyFrom(kind)
    for dim in filled.tensor_type.shape.dim:
        if dim.dim_param in sizes:
            dim.dim_value = sizes[dim.dim_param]
    return filled


def _schema(node: onnx.NodeProto, opsets: Iterable[onnx.OperatorSetIdProto]) -> Any:
    """ONNX's own description of an operator; None where it has none."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    versions = [entry.version for entry in opsets if entry.domain in (domain, domain or "ai.onnx")]
    try:
        return onnx.defs.get_schema(node.op_type, versions[0], domain) if versions else None
    except (onnx.defs.SchemaError, TypeError):
        return None


def _agree(found: Shapes, readings: list[_Reading], symbols: Iterable[str]) -> None:
    """Take over what all readings say; a size that differs between them is a symbol."""
    taken = not any(reading.complaint for reading in readings) or bool(found.complaint)
    sizes = zip(*(reading.sizes.values() for reading in readings), strict=True)
    names = dict(zip(sizes, symbols, strict=False)) if taken else None
    for value in readings[0].found.shapes if readings else ():
        shapes = [reading.found.shapes.get(value, ()) for reading in readings]
        if len({len(shape) for shape in shapes}) == 1:
            seen = tuple(_common(sizes, names) for sizes in zip(*shapes, strict=True))
            found.shapes[value] = _merge(found.shapes.get(value, seen), seen)
    for value, kind in readings[0].found.types.items() if readings else ():
        if value not in readings[0].guessed:
            found.types.setdefault(value, kind)


def _common(sizes: tuple[Dim, ...], names: Mapping[tuple[Dim, ...], str] | None) -> Dim:
    """What several readings of one size have in common; no name at sizes that the model does not take."""
    if not all(isinstance(size, int) for size in sizes) or (names is None and len(set(sizes)) > 1):
        return None
    return sizes[0] if names is None or len(set(sizes)) == 1 else names.get(sizes, "|".join(map(str, sizes)))


def _merge(known: Shape, better: Shape) -> Shape:
    if len(known) != len(better):
        return known
    return tuple(a if b is None or isinstance(a, int) else b for a, b in zip(known, better, strict=True))


def _alike(vectors: list[Mapping[str, Vector]]) -> dict[str, Vector]:
    """The vectors that are the same in every reading."""
    first, *others = vectors or [{}]
    shared = {value for value in first if all(value in other for other in others)}
    return {v: first[v] for v in shared if all(np.array_equal(other[v], first[v]) for other in others)}


# ---------------------------------------------------------------- one inference


def _infer_plainly(bare: onnx.ModelProto) -> onnx.GraphProto:
    """What follows from the inputs alone, without any number that is computed."""
    free = onnx.ModelProto()
    free.CopyFrom(bare)
    _forget_sizes(free.graph)
    try:
        return onnx.shape_inference.infer_shapes(free).graph
    except _FAILURES:
        return free.graph


def _declares_one_run(whole: FlatModel, plain: onnx.GraphProto) -> bool:
    """Whether the file declares a number for a size of an inner value that is one of an input's open sizes."""
    opened = {dim.dim_param for given in plain.input for dim in given.type.tensor_type.shape.dim} - {""}
    follows = declared_types(onnx.ModelProto(graph=plain))
    inner = [(whole.types[value], follows[value]) for value in whole.types.keys() & follows.keys()]
    carried = [
        (given.type, follows[value])
        for ref in whole.refs
        for given, value in _carried(ref)
        if value in follows
    ]
    return any(
        mine.dim_param in opened and declared.HasField("dim_value")
        for said, kind in (*inner, *carried)
        for mine, declared in zip(kind.tensor_type.shape.dim, said.tensor_type.shape.dim, strict=False)
    )


def _carried(ref: NodeRef) -> Iterator[tuple[onnx.ValueInfoProto, str]]:
    """What a Loop or Scan hands on from turn to turn: the input of its body, and the value with which it begins."""
    for body in bodies(ref.node) if ref.op in ("Loop", "Scan") else ():
        places = ref.inputs if ref.op == "Loop" else ref.inputs[: -_scanned(ref.node)]
        first = 2 if ref.op == "Loop" else 0
        yield from zip(body.input[first:], places[first:], strict=False)


def _scanned(node: onnx.NodeProto) -> int:
    return int(attribute(node, "num_scan_inputs", 1))


def _has_long_vectors(plain: onnx.GraphProto) -> bool:
    """Whether a vector is so long that ONNX's inference, which follows each of its numbers, would take all memory."""
    shapes = (info.type.tensor_type.shape.dim for info in (*plain.input, *plain.value_info, *plain.output))
    return any(len(dims) == 1 and dims[0].dim_value > LONG for dims in shapes)


def _forget_sizes(graph: onnx.GraphProto) -> None:
    """Drop what a graph and its bodies say of the sizes of anything but its inputs; those of bodies keep their rank."""
    for info in (*graph.value_info, *graph.output):
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    for body in (body for node in graph.node for body in bodies(node)):
        for given in body.input:
            for dim in given.type.tensor_type.shape.dim:
                dim.Clear()
        _forget_sizes(body)


def _infer_once(
    bare: onnx.ModelProto,
    declared: Mapping[str, onnx.TypeProto],
    tensors: Mapping[str, TensorProto],
    propagate: bool,
) -> Shapes:
    """What the inference of the whole model says, and then what is declared."""
    complaint = ""
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=propagate)
    except _FAILURES as error:
        complaint = str(error)
        try:
            inferred = onnx.shape_inference.infer_shapes(bare, data_prop=propagate)
        except _FAILURES:
            inferred = bare
    found = Shapes({}, {}, complaint)
    for types in (declared_types(inferred), declared):
        for value, kind in types.items():
            _note(found, value, kind)
    for value, tensor in tensors.items():
        found.shapes[value], found.types[value] = tuple(tensor.dims), tensor.data_type
    return found


def _note(found: Shapes, value: str, declared: onnx.TypeProto) -> None:
    if not declared.HasField("tensor_type"):
        return
    tensor = declared.tensor_type
    if tensor.elem_type:
        found.types.setdefault(value, tensor.elem_type)
    if tensor.HasField("shape"):
        found.shapes.setdefault(value, tuple(_dim(dim) for dim in tensor.shape.dim))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    return dim.dim_param or None


# ---------------------------------------------------------------- a model without its weights


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model in which large tensors have a shape and a type, but no numbers."""
    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    _copy_graph(model.graph, bare.graph)
    return bare


def _copy_graph(graph: onnx.GraphProto, bare: onnx.GraphProto) -> None:
    bare.name = graph.name
    for part in ("input", "output", "value_info", "sparse_initializer"):
        getattr(bare, part).extend(getattr(graph, part))
    for tensor in graph.initializer:
        _copy_tensor(tensor, bare.initializer.add())
    for node in graph.node:
        _copy_node(node, bare.node.add())


def _copy_node(node: onnx.NodeProto, bare: onnx.NodeProto) -> None:
    if node.op_type != "Constant" and not any(True for _ in bodies(node)):
        bare.CopyFrom(node)
        return
    bare.op_type, bare.domain, bare.name = node.op_type, node.domain, node.name
    bare.input.extend(node.input)
    bare.output.extend(node.output)
    for item in node.attribute:
        copy = bare.attribute.add()
        if item.type == onnx.AttributeProto.TENSOR:
            copy.name, copy.type = item.name, item.type
            _copy_tensor(item.t, copy.t)
        elif item.type == onnx.AttributeProto.GRAPH:
            copy.name, copy.type = item.name, item.type
            _copy_graph(item.g, copy.g)
        else:
            copy.CopyFrom(item)


def _copy_tensor(tensor: TensorProto, bare: TensorProto) -> None:
    if tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) <= LARGE:
        bare.CopyFrom(tensor)
        return
    bare.name, bare.data_type = tensor.name, tensor.data_type
    bare.dims.extend(tensor.dims)
    bare.data_location = TensorProto.EXTERNAL
    bare.external_data.add(key="location", value="left-out")
