"""Run a model as it stands: in onnxruntime with every optimisation off, or in float64.

onnxruntime folds BatchNorms by itself from its basic level up, so a comparison with optimisations on would compare two
folds. In float64 a *copy* of the model is run, in which every floating-point type has become float64; onnxruntime has
no convolution in float64, so a model with one runs in ONNX's reference implementation (`reference`). That widens a
stored tensor when a node reads it, so the copy of such a model keeps its large ones as they are.

What draws random numbers (a Dropout in training mode, RandomNormal, Bernoulli, ...), in bodies and functions too, gets
a seed where it has none, and a session of its own for each run, since a session goes on drawing where it stopped: the
same feed then gives the same numbers before and after folding.

Not covered: operators whose types are fixed (they keep theirs, and a copy that does not hold together is not run).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from bnfold.algebra import is_float
from bnfold.errors import InputError
from bnfold.onnx.files import size
from bnfold.onnx.flatten import bodies
from bnfold.onnx.functions import write_out_defaults
from bnfold.onnx.inputs import Feed
from bnfold.onnx.protos import FLOATS, densify, load

__all__ = [
    "Numbers",
    "Outputs",
    "Runner",
    "fixed_values",
    "is_random",
    "most_at_once",
    "run",
    "run_exactly",
    "to_float64",
    "widen",
]

Outputs = dict[str, np.ndarray[Any, Any]]

KEPT = 1 << 12
"""Weights of more numbers than this are widened only when they are read, where that can be."""

TOO_LARGE = 1_500_000_000
"""A model of more bytes than this goes to onnxruntime by way of a file."""


def run(model: onnx.ModelProto, inputs: Feed, folder: Path | None = None) -> Outputs:
    """The outputs of a model, by name, computed in its own types with all optimisations off.

    Raises:
        InputError: onnxruntime cannot load or run it.
    """
    return Runner(model, folder)(inputs)


class Runner:
    """A model (or the file of one) that is ready to run in onnxruntime."""

    def __init__(
        self, model: onnx.ModelProto | Path, folder: Path | None = None, file: Path | None = None
    ) -> None:
        """Load a model.

        Args:
            model: the model, or the file of one.
            folder: where the external data of the model lies.
            file: where the model lies, as it is; onnxruntime reads that, if the model can be run as it is.

        Raises:
            InputError: onnxruntime cannot load it.
        """
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        try:
            seeded = onnx.load_model(model, load_external_data=False) if isinstance(model, Path) else model
            self._is_random = is_random(seeded)
            if isinstance(model, Path) and _must_change(seeded):
                model, folder = seeded, model.parent
            elif file is not None and not _must_change(seeded):
                model = file
            del seeded
            self._open: Callable[[], Any] = lambda: _session(model, folder, options)
            self.session = self._open()
            self.names = [output.name for output in self.session.get_outputs()]
        except Exception as error:
            raise InputError(f"onnxruntime cannot load the model: {brief(error)}") from error

    def __call__(self, inputs: Feed) -> Outputs:
        """Run on one feed.

        Raises:
            InputError: onnxruntime refuses.
        """
        try:
            session = self._open() if self._is_random else self.session
            return name_outputs(self.names, session.run(None, inputs))
        except Exception as error:
            raise InputError(f"onnxruntime cannot run the model: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """The first line of an error, without the address of its source."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _session(model: onnx.ModelProto | Path, folder: Path | None, options: Any) -> Any:
    import onnxruntime

    more: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "enable_fallback": 0}
    if isinstance(model, Path):
        return onnxruntime.InferenceSession(str(model), options, **more)
    seeded = seed(model)
    if size(seeded) < TOO_LARGE:
        if folder is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(folder.resolve())
            )
        return onnxruntime.InferenceSession(seeded.SerializeToString(), options, **more)
    with TemporaryDirectory(prefix="bnfold-") as scratch:
        path = Path(scratch) / "model.onnx"
        onnx.save_model(seeded, path, save_as_external_data=True)
        return onnxruntime.InferenceSession(str(path), options, **more)


def name_outputs(names: Sequence[str], results: Sequence[Any]) -> Outputs:
    """Outputs by name; the members of a sequence or a map by name and place."""
    found: Outputs = {}
    for name, result in zip(names, results, strict=True):
        if isinstance(result, dict):
            found.update(name_outputs([f"{name}.{key}" for key in result], list(result.values())))
        elif isinstance(result, list):
            found.update(name_outputs([f"{name}[{place}]" for place in range(len(result))], result))
        elif result is not None:
            found[name] = np.asarray(result)
    return found


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of the main graph, of the functions, and of the bodies in them."""
    waiting: list[Any] = [*model.functions, model.graph]
    while waiting:
        for node in waiting.pop().node:
            yield node
            waiting += bodies(node)


_RANDOM = (
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
)


def is_random(model: onnx.ModelProto) -> bool:
    """Whether a model draws random numbers."""
    return any(_draws(node) for node in nodes(model))


def _draws(node: onnx.NodeProto) -> bool:
    """Whether a node draws random numbers; a Dropout may where it is told by an input whether it trains."""
    trains = node.op_type == "Dropout" and len(node.input) > 2 and bool(node.input[2])
    return node.domain in ("", "ai.onnx") and (node.op_type in _RANDOM or trains)


def seed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, or where it cannot be run as it is, a copy that can.

    What draws random numbers draws the same ones every time; outputs without a name at the end of a node are left out,
    since onnxruntime ends the whole process over those of a BatchNormalization.
    """
    if not _must_change(model):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    number = itertools.count(1)
    for node in nodes(copy):
        while len(node.output) > 1 and not node.output[-1]:
            del node.output[-1]
        if _draws(node) and not any(item.name == "seed" for item in node.attribute):
            value = next(number) if node.op_type == "Dropout" else float(next(number))
            node.attribute.append(onnx.helper.make_attribute("seed", value))
    return copy


def _must_change(model: onnx.ModelProto) -> bool:
    return any(_draws(node) or not all(node.output[-1:]) for node in nodes(model))


# ---------------------------------------------------------------- float64


Numbers = Callable[[np.dtype[Any]], np.ndarray[Any, Any]]
"""The numbers of a tensor in a type, computed when a node reads them."""


def run_exactly(
    model: onnx.ModelProto,
    feeds: Sequence[Feed],
    folder: Path | None = None,
    late: Mapping[str, Numbers] | None = None,
) -> list[Outputs]:
    """The outputs of a model that `to_float64` made, computed in float64, for each feed.

    Args:
        model: the model; external data that it refers to lies in `folder`.
        feeds: inputs by name, which are widened.
        folder: see there.
        late: the numbers of large initializers that it has none of.

    Raises:
        InputError: some operator has no float64.
    """
    wide = [{name: widen(array) for name, array in feed.items()} for feed in feeds]
    names = [output.name for output in model.graph.output]
    if not _convolves(model):
        try:
            runner = Runner(model)
            return [runner(feed) for feed in wide]
        except InputError:
            pass
    from bnfold.onnx.reference import evaluate

    return [name_outputs(names, results) for results in evaluate(seed(model), wide, folder, late)]


def _convolves(model: onnx.ModelProto) -> bool:
    """Whether a model has what onnxruntime has not in float64."""
    return any(node.op_type in ("Conv", "ConvTranspose") for node in nodes(model))


def widen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An array in float64 if it holds floats."""
    return array.astype(np.float64) if is_float(array) else array


def most_at_once(model: onnx.ModelProto) -> float:
    """Of how many numbers a weight is widened at once in the float64 copy of a model; a larger one when it is read."""
    return KEPT if _convolves(model) else math.inf


def to_float64(model: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    """A copy of a model in which every floating-point type is float64, external data included.

    Of a model that onnxruntime cannot run in float64 large weights stay as they are, and where they are.
    """
    wide = onnx.ModelProto(ir_version=max(model.ir_version, 3))
    wide.opset_import.extend(model.opset_import)
    wide.functions.extend(model.functions)
    _graph_to_float64(model.graph, wide.graph, folder, most_at_once(model))
    write_out_defaults(wide)
    return wide


def _graph_to_float64(
    graph: onnx.GraphProto, wide: onnx.GraphProto, folder: Path | None, kept: float = math.inf
) -> None:
    wide.name = graph.name
    for name in ("input", "output", "value_info"):
        for item in getattr(graph, name):
            copy = getattr(wide, name).add()
            copy.CopyFrom(item)
            _type_to_float64(copy.type)
    fixed = fixed_values(graph)
    for tensor in graph.initializer:
        if tensor.data_type in FLOATS and math.prod(tensor.dims) > kept:
            wide.initializer.add().CopyFrom(tensor)
        else:
            _tensor_to_float64(tensor, wide.initializer.add(), folder, tensor.name in fixed)
    for sparse in graph.sparse_initializer:
        _tensor_to_float64(densify(sparse), wide.initializer.add(), folder, sparse.values.name in fixed)
    for node in graph.node:
        _node_to_float64(node, wide.node.add(), folder, bool(fixed.intersection(node.output)))


def fixed_values(graph: onnx.GraphProto) -> set[str]:
    """What is float32 whatever the data is, and says sizes."""
    return {
        node.input[place] for node in graph.node for place in _fixed_inputs(node) if place < len(node.input)
    }


def _fixed_inputs(node: onnx.NodeProto) -> tuple[int, ...]:
    """The inputs that are float32 whatever the data is."""
    if node.op_type == "Resize":
        return (1, 2) if len(node.input) > 2 else (1,)
    return (1,) if node.op_type == "Upsample" else ()


def _type_to_float64(kind: onnx.TypeProto) -> None:
    if kind.HasField("sequence_type"):
        _type_to_float64(kind.sequence_type.elem_type)
    elif kind.HasField("optional_type"):
        _type_to_float64(kind.optional_type.elem_type)
    elif kind.tensor_type.elem_type in FLOATS:
        kind.tensor_type.elem_type = TensorProto.DOUBLE


def _tensor_to_float64(
    tensor: TensorProto, wide: TensorProto, folder: Path | None, fixed: bool = False
) -> None:
    if tensor.data_type not in FLOATS or fixed:
        wide.CopyFrom(onnx.numpy_helper.from_array(np.asarray(load(tensor, folder)), tensor.name))
        return
    wide.name, wide.data_type = tensor.name, TensorProto.DOUBLE
    wide.dims.extend(tensor.dims)
    with np.errstate(invalid="ignore"):
        wide.raw_data = np.asarray(load(tensor, folder), np.float64).tobytes()


def _node_to_float64(node: onnx.NodeProto, wide: onnx.NodeProto, folder: Path | None, fixed: bool) -> None:
    wide.op_type, wide.domain, wide.name, wide.overload = node.op_type, node.domain, node.name, node.overload
    wide.input.extend(node.input)
    wide.output.extend(node.output)
    for item in node.attribute:
        copy = wide.attribute.add()
        if item.type == onnx.AttributeProto.TENSOR:
            copy.name, copy.type = item.name, item.type
            _tensor_to_float64(item.t, copy.t, folder, fixed)
        elif item.type == onnx.AttributeProto.GRAPH:
            copy.name, copy.type = item.name, item.type
            _graph_to_float64(item.g, copy.g, folder)
        else:
            copy.CopyFrom(item)
            _attribute_to_float64(node, copy, fixed)
    if node.op_type == "ConstantOfShape" and not node.attribute and node.domain in ("", "ai.onnx"):
        zero = onnx.numpy_helper.from_array(np.zeros(1))
        wide.attribute.append(onnx.helper.make_attribute("value", zero))


def _attribute_to_float64(node: onnx.NodeProto, item: onnx.AttributeProto, fixed: bool) -> None:
    if item.name in ("to", "dtype", "output_dtype") and item.i in FLOATS:
        item.i = TensorProto.DOUBLE
    if node.op_type == "Constant" and item.name in ("value_float", "value_floats") and not fixed:
        values = np.asarray(item.f if item.name == "value_float" else list(item.floats), np.float64)
        item.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(values)))
