"""Write a net in eval mode as an ONNX model: one input, one output, the batch first, and as few nodes as there can be.

Nets whose layers all stand in the table of `export.layers` are drawn with it, in milliseconds. Any other module goes
through `torch.onnx.export`, with what it notes of the machine it ran on (stack traces in every node) taken out.

The same net gives the same bytes. Not covered: several inputs or outputs, bfloat16 (onnxruntime's CPU kernels do not
compute in it), and models beyond the 2 GiB that one protobuf message can hold.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import chain

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from bnfold import __version__
from bnfold.errors import InputError
from bnfold.exclusive import exclusive
from export.layers import OPSET, NoRow, Sketch, draw

__all__ = ["Batch", "write"]

Batch = int | str
"""A number of examples, or the name of an axis that takes any number."""

_LARGEST = 2**31 - 2**20


def write(
    model: nn.Module,
    example: Tensor,
    batch: Batch = 1,
    names: tuple[str, str] = ("input", "output"),
    metadata: Mapping[str, str] | None = None,
    optimise: bool = True,
) -> onnx.ModelProto:
    """Return the ONNX model of a net.

    Args:
        model: in eval mode, one tensor in and one out, `(batch, ...)` each.
        example: two examples, (2, ...), with the dtype of the input.
        batch: the number of examples that the model takes, or the name of its batch axis.
        names: of the input and of the output.
        metadata: what goes into its `metadata_props`.
        optimise: whether `torch.onnx.export`, where that is needed, may simplify; it then folds BatchNorms itself.

    Raises:
        InputError: the net cannot be written; the message names the layer or the tensor.
    """
    _check(model)
    with torch.inference_mode():
        result = model(example.clone())
    if not isinstance(result, Tensor):
        raise InputError(f"{type(model).__name__} returns a {type(result).__name__} and no tensor")
    try:
        proto = _draw(model, (example, result), batch, names)
    except NoRow as reason:
        proto = _trace(model, example, batch, names, optimise, reason)
    proto.producer_name, proto.producer_version = "bnfold", __version__
    helper.set_model_props(proto, dict(sorted((metadata or {}).items())))
    return proto


def _check(model: nn.Module) -> None:
    size = 0
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        size += tensor.numel() * tensor.element_size()
        if tensor.dtype == torch.bfloat16:
            raise InputError(
                f"`{name}` is bfloat16, which onnxruntime's CPU kernels lack; call model.float() first"
            )
    if size > _LARGEST:
        raise InputError(f"the net holds {size:,} bytes, and an ONNX file of one piece at most 2 GiB")
    training = next((name for name, layer in model.named_modules() if layer.training), None)
    if training is not None:
        raise InputError(f"`{training or type(model).__name__}` is in training mode; call model.eval() first")


def _draw(
    model: nn.Module, values: tuple[Tensor, Tensor], batch: Batch, names: tuple[str, str]
) -> onnx.ModelProto:
    if type(model) is not nn.Sequential:
        raise NoRow(f"{type(model).__name__} is no nn.Sequential")
    sketch = Sketch(batch, set(names))
    with torch.inference_mode():
        draw(model, values[0].clone(), sketch, names[0])
    if not sketch.nodes:
        sketch.node("Identity", names[0])
    sketch.nodes[-1].output[0] = names[1]
    ends = [_declare(name, value, batch) for name, value in zip(names, values, strict=True)]
    graph = helper.make_graph(sketch.nodes, "net", ends[:1], ends[1:], sketch.initializers)
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=helper.find_min_ir_version_for(opset))


def _declare(name: str, value: Tensor, batch: Batch) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(value.numpy().dtype)
    return helper.make_tensor_value_info(name, dtype, [batch, *value.shape[1:]])


def _trace(
    model: nn.Module, example: Tensor, batch: Batch, names: tuple[str, str], optimise: bool, reason: NoRow
) -> onnx.ModelProto:
    given = example if isinstance(batch, str) else example[:1].repeat(batch, *[1] * (example.ndim - 1))
    shapes = ({0: torch.export.Dim(batch)},) if isinstance(batch, str) else None
    try:
        with _quiet():
            program = torch.onnx.export(
                copy.deepcopy(model),
                (given,),
                input_names=names[:1],
                output_names=names[1:],
                dynamic_shapes=shapes,
                optimize=optimise,
                verbose=False,
            )
    except ImportError as error:
        raise InputError(
            f"{reason}, and torch.onnx.export needs {error.name}; pip install onnxscript"
        ) from error
    except Exception as error:  # whatever its many stages make of a net
        raise InputError(f"{reason}, and torch.onnx.export cannot write it: {_explain(error)}") from error
    assert program is not None
    return _strip(program.model_proto)


def _explain(error: BaseException) -> str:
    """Return the first line of what went wrong at the root, which the exporter buries under advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in re.sub(r"\x1b\[\d*m", "", str(error)).splitlines() if line.strip()]
    return f"{lines[0] if lines else type(error).__name__:.200}"


def _strip(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what `torch.onnx.export` notes of the place it ran in, down to the paths of source files."""
    graph = proto.graph
    for part in (
        proto,
        graph,
        *graph.node,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *graph.initializer,
    ):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    graph.name = "net"
    return proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings, its log of optional packages and its dumps of a failed trace off the terminal."""
    with exclusive(), warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        level = logging.root.manager.disable
        try:
            logging.disable(logging.CRITICAL)
            warnings.simplefilter("ignore")
            yield
        finally:
            logging.disable(level)
