"""What a graph knows before it runs: tensors in every disguise, evaluated lazily and without rounding.

A weight may be an initializer, the value of a Constant node, or the end of a chain of nodes that read nothing but
constants (`Expand(CastLike(c, x), shape)` is how one exporter writes a bias). `Constants` answers whether a value is
one and computes it when it is first asked for, one tensor at a time.

Floating-point chains are evaluated in float64 and casts between floating-point types are not carried out, so that what
a chain stands for is rounded once, when the folded number is written. The storage type of a slot is the type of the
value, not that of the array returned here.

Where rounding decides (`Floor(10 * 0.7)`, a comparison, a cast to whole numbers), what the model computes in its own
types counts, and a constant that is another one in float64 is not worked out.

Not evaluated: random operators, control flow, calls of functions, and (De)QuantizeLinear, since a number written in
the place of a quantised one would undo the quantisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from bnfold import reasons
from bnfold.algebra import is_float
from bnfold.errors import InputError
from bnfold.ir import Shape
from bnfold.onnx.protos import FLOATS, Tensor, attribute, attributes, densify, load

__all__ = ["Constants", "Unworkable"]

SMALL = 1 << 16
"""Evaluated values with at most this many elements are remembered."""

LARGEST = 1 << 27
"""No constant with more elements is worked out, unless the model stores a tensor that has as many."""


class Unworkable(InputError):
    """A constant that cannot be worked out: its nodes do not hang together, or it would be too large."""


class Constants:
    """Which values are constant, and what they are."""

    def __init__(
        self,
        folder: Path | None,
        shapes: Mapping[str, Shape],
        types: Mapping[str, int],
        opset: int,
        tensors: Mapping[str, TensorProto],
    ) -> None:
        self.folder, self.shapes, self.types, self.opset = folder, shapes, types, opset
        self._tensors = tensors
        self.limit = max([LARGEST, *(math.prod(tensor.dims) for tensor in tensors.values())])
        self._nodes: dict[str, tuple[onnx.NodeProto, tuple[str, ...], int]] = {}
        self._memory: dict[str, Tensor] = {}

    def __contains__(self, value: str) -> bool:
        return value in self._tensors or value in self._nodes or value in self._memory

    def add_sizes(self, value: str, sizes: Tensor) -> None:
        """Note what shape inference found a value to be."""
        if value not in self:
            self._memory[value] = np.asarray(sizes, np.int64)

    def add_node(self, node: onnx.NodeProto, inputs: Sequence[str], outputs: Sequence[str]) -> bool:
        """Note a node if it computes constants; return whether it does."""
        if node.domain not in ("", "ai.onnx") or not self._is_constant(node, inputs):
            return False
        for place, output in enumerate(outputs):
            if output:
                self._nodes[output] = (node, tuple(inputs), place)
        return True

    def _is_constant(self, node: onnx.NodeProto, inputs: Sequence[str]) -> bool:
        operator = node.op_type
        if operator not in EVALUATE and operator not in _OF_FORM:
            return (
                operator in _REFERENCE
                and bool(inputs)
                and all(not value or value in self for value in inputs)
            )
        if operator != "Constant" and len(inputs) < (2 if operator == "CastLike" else 1):
            return False
        if operator in ("Shape", "Size"):
            return inputs[0] in self or self._has_numbers_for_sizes(inputs[0])
        if operator == "CastLike":
            return inputs[0] in self and inputs[1] in self.types
        if operator == "Dropout" and (len([o for o in node.output if o]) > 1 or len(inputs) > 2):
            return False
        return all(not value or value in self for value in inputs)

    def is_workable(self, value: str) -> bool:
        """Whether a constant is stored, or by its shape small enough to be worked out."""
        return value in self._tensors or (self.size(value) or 0) <= self.limit

    def size(self, value: str) -> int | None:
        """How many elements a constant has, without computing it where its shape is known."""
        shape = self.dims(value)
        return None if shape is None else math.prod(shape)

    def dims(self, value: str) -> tuple[int, ...] | None:
        """The shape of a constant; None where it cannot be computed."""
        if value in self._tensors:
            return tuple(self._tensors[value].dims)
        shape = self.shapes.get(value)
        if shape is not None and all(isinstance(size, int) for size in shape):
            return tuple(int(size) for size in shape if size is not None)
        array = self.get(value)
        return None if array is None else array.shape

    def get(self, value: str) -> Tensor | None:
        """The numbers of a value; None where it is no constant or cannot be computed."""
        if value not in self:
            return None
        try:
            return self.array(value)
        except Unworkable:
            return None

    def array(self, value: str) -> Tensor:
        """The numbers of a constant.

        Raises:
            Unworkable: it cannot be worked out.
            InputError: its data cannot be read.
        """
        known: dict[str, Tensor] = {}
        waiting, budget = [value], 16 * self.limit
        while waiting:
            name = waiting[-1]
            missing = [] if name in known else self._missing(name, known)
            if not missing:
                if name not in known:
                    known[name] = self._read(name, known)
                    budget -= known[name].size
                waiting.pop()
            elif budget < 0 or name in missing:
                raise Unworkable(reasons.CONSTANT_TOO_MUCH(value=value))
            waiting += missing
        return known[value]

    def _missing(self, value: str, known: Mapping[str, Tensor]) -> list[str]:
        """What a value is worked out from that is not known yet."""
        if value in self._memory or value in self._tensors:
            return []
        node, inputs, _ = self._nodes[value]
        if node.op_type in ("Shape", "Size") and self._has_numbers_for_sizes(inputs[0]):
            return []
        needed = inputs[:1] if node.op_type in _OF_FORM else inputs
        return [name for name in dict.fromkeys(needed) if name and name not in known]

    def _has_numbers_for_sizes(self, value: str) -> bool:
        return all(isinstance(size, int) for size in self.shapes.get(value, (None,)))

    def _read(self, value: str, known: Mapping[str, Tensor]) -> Tensor:
        """A value whose makings are known."""
        if value in self._memory:
            return self._memory[value]
        stored = self._tensors.get(value)
        result = self._evaluate(value, known) if stored is None else load(stored, self.folder)
        if result.size <= SMALL:
            self._memory[value] = result
        return result

    def floats(self, value: str) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """The numbers of a floating-point constant in float64; None where it is none."""
        array = self.get(value)
        if array is None or not is_float(array):
            return None
        with np.errstate(invalid="ignore"):
            return np.asarray(array, np.float64)

    def integers(self, value: str) -> list[int] | None:
        """The numbers of an integer constant (of any rank), or None."""
        if (self.size(value) or 0) > SMALL:
            return None
        array = self.get(value)
        return None if array is None or array.dtype.kind not in "iu" else [int(n) for n in array.ravel()]

    def _evaluate(self, value: str, known: Mapping[str, Tensor]) -> Tensor:
        try:
            return self._compute(*self._nodes[value], known)
        except InputError:
            raise
        except Exception as error:  # a node may ask for anything
            raise Unworkable(reasons.CONSTANT_BROKEN(value=value, error=error)) from error

    def _compute(
        self, node: onnx.NodeProto, inputs: Sequence[str], place: int, known: Mapping[str, Tensor]
    ) -> Tensor:
        if node.op_type in ("Shape", "Size"):
            return self._measure(node, inputs[0], known)
        result = self._apply(node, inputs, place, known)
        if self._jumps(node, inputs, known):
            self._hold_to_rounded(node, inputs, place, result)
        return result

    def _jumps(self, node: onnx.NodeProto, inputs: Sequence[str], known: Mapping[str, Tensor]) -> bool:
        """Whether a little more or less of a float that is computed can make a whole step of a result."""
        if node.op_type not in _JUMPS and not _casts_to_whole(node, inputs, self.types):
            return False
        return any(is_float(known[name]) and name not in self._tensors for name in inputs if name)

    def _hold_to_rounded(
        self, node: onnx.NodeProto, inputs: Sequence[str], place: int, result: Tensor
    ) -> None:
        """Refuse what is another number where every step is rounded."""
        rounded = _Rounded(self)
        operands = {name: rounded.array(name) for name in inputs if name}
        as_run = rounded._apply(node, inputs, place, operands)
        same = as_run.shape == result.shape and (node.op_type == "Range" or np.array_equal(as_run, result))
        if not same:
            raise Unworkable(reasons.ROUNDING_DECIDES(value=node.output[place], op=node.op_type))

    def _apply(
        self, node: onnx.NodeProto, inputs: Sequence[str], place: int, known: Mapping[str, Tensor]
    ) -> Tensor:
        if node.op_type == "CastLike":
            return self.cast(known[inputs[0]], self.types[inputs[1]])
        arrays = [known[name] if name else None for name in inputs]
        if elements(node, arrays) > self.limit:
            raise MemoryError("it is too large")
        if node.op_type in EVALUATE:
            result = EVALUATE[node.op_type](self, node, arrays)
        else:
            result = _evaluate_by_reference(
                node, [a if a is None else self.widen(a) for a in arrays], self.opset
            )
        return np.asarray(result[place] if isinstance(result, (list, tuple)) else result)

    def _measure(self, node: onnx.NodeProto, value: str, known: Mapping[str, Tensor]) -> Tensor:
        shape = self.shapes[value] if self._has_numbers_for_sizes(value) else known[value].shape
        if node.op_type == "Size":
            return np.asarray(math.prod(int(size or 0) for size in shape), np.int64)
        options = attributes(node)
        return np.asarray(shape[slice(options.get("start", 0), options.get("end"))], np.int64)

    def widen(self, array: Tensor) -> Tensor:
        """An operand as it is computed with."""
        return np.asarray(array, np.float64) if is_float(array) else array

    def cast(self, array: Tensor, data_type: int) -> Tensor:
        """What a Cast makes of an array."""
        return cast(array, data_type)


class _Rounded(Constants):
    """The same constants as the model computes them, each step rounded to its own type."""

    def __init__(self, exact: Constants) -> None:
        self.__dict__.update(exact.__dict__)
        self._memory = {value: array for value, array in exact._memory.items() if not is_float(array)}

    def _jumps(self, node: onnx.NodeProto, inputs: Sequence[str], known: Mapping[str, Tensor]) -> bool:
        return False

    def widen(self, array: Tensor) -> Tensor:
        return array

    def cast(self, array: Tensor, data_type: int) -> Tensor:
        with np.errstate(all="ignore"):
            return array.astype(onnx.helper.tensor_dtype_to_np_dtype(data_type))


def _casts_to_whole(node: onnx.NodeProto, inputs: Sequence[str], types: Mapping[str, int]) -> bool:
    """Whether a node casts to a type in which no affine can travel."""
    if node.op_type == "CastLike":
        return types[inputs[1]] not in FLOATS
    return node.op_type == "Cast" and attribute(node, "to") not in FLOATS


def cast(array: Tensor, data_type: int) -> Tensor:
    """Convert as Cast does, except that a float becomes another float without being rounded."""
    if data_type in FLOATS:
        return array if is_float(array) else array.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return array.astype(onnx.helper.tensor_dtype_to_np_dtype(data_type))


# ---------------------------------------------------------------- operators


def elements(node: onnx.NodeProto, arrays: Sequence[Tensor | None]) -> int:
    """At most how many elements a node makes of these arrays."""
    given = [array for array in arrays if array is not None]
    measure = _ELEMENTS.get(node.op_type)
    if measure is not None:
        return measure(node, *given)
    whole = sum(array.size for array in given)
    try:
        return max(whole, math.prod(np.broadcast_shapes(*(array.shape for array in given))))
    except ValueError:
        return whole


def _gathered(node: onnx.NodeProto, data: Tensor, indices: Tensor) -> int:
    return int(data.size // max(data.shape[attribute(node, "axis", 0)], 1) * indices.size)


def _multiplied(node: onnx.NodeProto, left: Tensor, right: Tensor) -> int:
    return math.prod(np.broadcast_shapes((*left.shape[:-1], 1), (*right.shape[:-2], 1, *right.shape[-1:])))


def _padded(node: onnx.NodeProto, data: Tensor, pads: Tensor, *rest: Tensor) -> int:
    widest = max((abs(int(n)) for n in pads), default=0)
    return math.prod(size + 2 * widest for size in data.shape)


_ELEMENTS: dict[str, Callable[..., int]] = {
    "ConstantOfShape": lambda node, shape: math.prod(int(n) for n in shape),
    "Expand": lambda node, data, shape: math.prod(np.broadcast_shapes(data.shape, [int(n) for n in shape])),
    "Tile": lambda node, data, repeats: data.size * math.prod(int(n) for n in repeats),
    "Range": lambda node, start, limit, delta: int(max(0, (limit.item() - start.item()) / delta.item())),
    "OneHot": lambda node, indices, depth, values: indices.size * int(depth.ravel()[0]),
    "Gather": _gathered,
    "GatherND": lambda node, data, indices: data.size * indices.size,
    "MatMul": _multiplied,
    "Pad": _padded,
}
"""Of operators whose result may be larger than what their operands broadcast to."""

Operator = Callable[[Constants, onnx.NodeProto, list[Any]], Any]


def _arithmetic(compute: Callable[..., Any]) -> Operator:
    def operator(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
        with np.errstate(all="ignore"):
            return compute(*(constants.widen(array) for array in arrays))

    return operator


def _divide(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype.kind == "f":
        return np.asarray(left / right)
    return np.asarray(np.trunc(left / right)).astype(left.dtype)


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    return np.asarray(np.power(base.astype(np.float64), exponent)).astype(base.dtype)


def _constant(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    options = attributes(node)
    if "value" in options:
        return load(options["value"], constants.folder)
    if "sparse_value" in options:
        return load(densify(options["sparse_value"]), None)
    for name, dtype in (("value_float", np.float32), ("value_int", np.int64)):
        for key in (name, name + "s"):
            if key in options:
                return np.asarray(options[key], dtype)
    raise NotImplementedError("a Constant of another kind")


def _constant_of_shape(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    value = attribute(node, "value")
    filling = np.float32(0) if value is None else load(value, constants.folder).ravel()[0]
    return np.broadcast_to(filling, tuple(int(n) for n in arrays[0]))


def _cast(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    return constants.cast(arrays[0], attribute(node, "to"))


def _transpose(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    return np.transpose(arrays[0], attribute(node, "perm"))


def _reshape(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    data, shape = arrays
    keep = not attribute(node, "allowzero", 0)
    return data.reshape([data.shape[i] if n == 0 and keep else int(n) for i, n in enumerate(shape)])


def _axes(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> list[int] | None:
    if len(arrays) > 1 and arrays[1] is not None:
        return [int(axis) for axis in np.ravel(arrays[1])]
    return attribute(node, "axes")  # type: ignore[no-any-return]


def _squeeze(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    axes = _axes(constants, node, arrays)
    return np.squeeze(arrays[0], None if axes is None else tuple(axes))


def _unsqueeze(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    return np.expand_dims(arrays[0], tuple(_axes(constants, node, arrays) or ()))


def _flatten(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    axis = attribute(node, "axis", 1)
    axis = axis + arrays[0].ndim if axis < 0 else axis
    return arrays[0].reshape(math.prod(arrays[0].shape[:axis]), -1)


def _expand(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    shape = np.broadcast_shapes(arrays[0].shape, tuple(int(n) for n in arrays[1]))
    return np.broadcast_to(arrays[0], shape)


def _gather(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    return np.take(arrays[0], arrays[1], attribute(node, "axis", 0))


def _concat(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    return np.concatenate(arrays, attribute(node, "axis", 1))


def _slice(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    data, options = arrays[0], attributes(node)
    names = ("starts", "ends", "axes", "steps")
    given = (
        [options.get(name) for name in names] if "starts" in options else [*arrays[1:], None, None, None][:4]
    )
    starts, ends, axes, steps = ([int(n) for n in np.ravel(a)] if a is not None else None for a in given)
    assert starts is not None
    assert ends is not None
    cut = [slice(None)] * data.ndim
    for place, axis in enumerate(axes or range(len(starts))):
        cut[axis] = bounded(starts[place], ends[place], steps[place] if steps else 1, data.shape[axis])
    return data[tuple(cut)]


def bounded(start: int, end: int, step: int, size: int) -> slice:
    """ONNX's start, end and step on an axis of a known size as a Python slice without negative bounds."""
    first, last, step = slice(start, end, step).indices(size)
    return slice(first, None if last < 0 else last, step)


def _identity(constants: Constants, node: onnx.NodeProto, arrays: list[Any]) -> Any:
    return arrays[0]


EVALUATE: dict[str, Operator] = {
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Identity": _identity,
    "Dropout": _identity,
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Expand": _expand,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "Add": _arithmetic(np.add),
    "Sub": _arithmetic(np.subtract),
    "Mul": _arithmetic(np.multiply),
    "Div": _arithmetic(_divide),
    "Neg": _arithmetic(np.negative),
    "Abs": _arithmetic(np.abs),
    "Sqrt": _arithmetic(np.sqrt),
    "Reciprocal": _arithmetic(lambda x: 1 / x),
    "Pow": _arithmetic(_power),
    "Exp": _arithmetic(np.exp),
    "Log": _arithmetic(np.log),
}

_OF_FORM = frozenset({"Shape", "Size", "CastLike"})
"""Operators that ask for the shape or the type of an operand, which can be known where its numbers are not."""

_REFERENCE = frozenset({
    "And", "ArgMax", "ArgMin", "Ceil", "Clip", "CumSum", "Equal", "Floor", "GatherElements", "GatherND",
    "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "MatMul", "Max", "Mean", "Min", "Mod", "Not",
    "OneHot", "Or", "Pad", "Range", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Round", "ScatterElements", "ScatterND", "Sigmoid", "Sign", "Split",
    "Sum", "Tile", "Trilu", "Where", "Xor",
})  # fmt: skip
"""Other operators that are evaluated, by ONNX's reference implementation."""


_JUMPS = frozenset({
    "ArgMax", "ArgMin", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mod", "OneHot",
    "Range", "Round", "Sign",
})  # fmt: skip
"""Operators whose result makes a step where an operand changes a little."""


def _evaluate_by_reference(node: onnx.NodeProto, arrays: list[Any], opset: int) -> list[Any]:
    from onnx.reference import ReferenceEvaluator

    names = [f"x{place}" if array is not None else "" for place, array in enumerate(arrays)]
    outputs = [f"y{place}" if name else "" for place, name in enumerate(node.output)]
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    del alone.input[:], alone.output[:]
    alone.input.extend(names)
    alone.output.extend(outputs)
    graph = onnx.helper.make_graph(
        [alone],
        "one",
        [onnx.helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in names if name],
        [onnx.helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs if name],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    feeds = {name: array for name, array in zip(names, arrays, strict=True) if name}
    found = iter(ReferenceEvaluator(model).run(None, feeds))
    return [next(found) if name else None for name in outputs]
