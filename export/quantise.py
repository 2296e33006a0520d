"""Store the weights of matrix products as int8, after the fold, and measure what that does to the dev loss.

onnxruntime's own quantiser does it: of each weight (K, N), every `BLOCK` numbers along K become int8 with one scale,
rounded to nearest, symmetric about 0, and MatMul becomes MatMulNBits (onnxruntime's contrib operators). Weights with
fewer than `BLOCK` rows, embeddings, convolutions and biases stay, and so do activations between the nodes; inside, the
kernel rounds a block of them to int8 in every call (accuracy level 4). The kernels that do not (level 1) expand the
weights to float in every call, and take five times as long as float weights, or longer.

This changes the numerics, which no proof covers. The float file is proven first; then the int8 file is run on every
context of the dev names, and is refused where its loss is above the net's by more than the budget.

What it buys is a smaller file and memory traffic (`python -m benchmarks.int8`): time from about 512 x 512 numbers on,
and none for the lecture's net. The file runs in onnxruntime alone, since MatMulNBits is no operator of ONNX.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import data
from bnfold.checkpoint import Checkpoint
from bnfold.errors import InputError
from bnfold.exclusive import exclusive
from export.prove import run_file
from export.session import open_session
from train.evaluate import measure
from train.material import ContextCounts, prepare

__all__ = ["BLOCK", "DevLoss", "Int8", "count_dev", "hold", "measure_loss", "quantise"]

BLOCK = 128
"""Numbers with a common scale. `python -m benchmarks.int8` has the others."""


@dataclass(frozen=True)
class Int8:
    """Weights as int8, if they raise the dev loss by no more than this.

    Attributes:
        max_loss_increase: nats.
        names: the list that the net was trained on, as for `python -m train --names`.
    """

    max_loss_increase: float = 1e-3
    names: str | Path | None = None


@dataclass(frozen=True)
class DevLoss:
    """The mean dev loss in nats: of the net, and of its file with int8 weights."""

    net: float
    file: float

    @property
    def increase(self) -> float:
        """By how much the second is above the first."""
        return self.file - self.net


class _Ran(nn.Module):
    """An ONNX file as a module."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.session = open_session(content)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.from_numpy(run_file(self.session, inputs.numpy()))


def count_dev(given: Checkpoint, names: str | Path | None) -> ContextCounts:
    """Return the dev part of the list that a net was trained on.

    Raises:
        InputError: the net is none over characters, or was trained on another list.
    """
    if not given.vocabulary or len(given.input.shape) != 1:
        raise InputError(
            "int8 weights are held to a dev loss, and this is no net over characters that has one"
        )
    words = data.read_names(names)
    material = prepare(words, given.input.shape[0])
    record = given.record.get("names")
    trained = record.get("sha256") if isinstance(record, dict) else None
    own = sha256("\n".join(words).encode()).hexdigest()
    if tuple(given.vocabulary) != material.vocabulary.characters or trained not in (None, own):
        raise InputError(
            f"the net was trained on another list than {names or 'the shipped one'}; name it with --names"
        )
    return material.dev


def measure_loss(model: nn.Module, content: bytes, dev: ContextCounts) -> DevLoss:
    """Return the dev loss of a net and of a file that stands for it."""
    return DevLoss(*(measure(nn.Sequential(one), dev) for one in (model, _Ran(content))))


def hold(loss: DevLoss, most: float) -> None:
    """Raise `InputError` where a dev loss rose by more than `most` nats, or is no number."""
    if not loss.increase <= most:
        raise InputError(
            f"int8 weights raise the dev loss from {loss.net:.5f} to {loss.file:.5f}, by {loss.increase:.2g}, and "
            f"--max-loss-increase allows {most:g}; allow more, or keep float weights"
        )


def quantise(proto: onnx.ModelProto, block: int = BLOCK, level: int = 4) -> onnx.ModelProto:
    """Return the model with its large weights as int8; the given one is not changed.

    Args:
        proto: its weights as initializers.
        block: how many numbers have a common scale, a power of two from 16 up.
        level: the accuracy level of MatMulNBits: 1 computes in float32, 4 in int8.

    Raises:
        InputError: it has no weight of `block` rows or more, or the quantiser is not installed whole.
    """
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = [one for node in proto.graph.node for one in _as_product(node, weights, block)]
    chosen = {node.name for node in nodes if _is_large(node, weights, block)}
    if not chosen:
        raise InputError(
            f"int8 is for matrices of {block} rows or more, and here is none; keep float weights"
        )
    used = {name for node in nodes for name in node.input}
    initializers = [tensor for name, tensor in weights.items() if name in used]
    product = onnx.ModelProto()
    product.CopyFrom(proto)
    product.graph.CopyFrom(
        helper.make_graph(nodes, proto.graph.name, proto.graph.input, proto.graph.output, initializers)
    )
    others = [node.name for node in nodes if node.name not in chosen]
    settings = {"block_size": block, "is_symmetric": True, "accuracy_level": level, "bits": 8}
    return _run_quantiser(product, settings, others)


def _as_product(
    node: onnx.NodeProto, weights: dict[str, TensorProto], block: int
) -> Iterator[onnx.NodeProto]:
    """Yield a Gemm with a large weight as MatMul and Add, with the weight (K, N) in `weights`; others as they are."""
    settings = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    plain = settings.get("alpha", 1) == settings.get("beta", 1) == 1 and not settings.get("transA", 0)
    turned = settings.get("transB", 0)
    if (
        node.op_type != "Gemm"
        or not plain
        or not _is_matrix(node.input[1], weights, block, 1 if turned else 0)
    ):
        yield _named(node)
        return
    result, bias = node.output[0], [name for name in node.input[2:3] if name]
    array, name = numpy_helper.to_array(weights[node.input[1]]), f"{result}/weight"
    weights[name] = numpy_helper.from_array(np.ascontiguousarray(array.T if turned else array), name)
    product = f"{result}/product" if bias else result
    yield helper.make_node("MatMul", [node.input[0], name], [product], f"{result}/MatMul")
    if bias:
        yield helper.make_node("Add", [product, *bias], [result], result)


def _named(node: onnx.NodeProto) -> onnx.NodeProto:
    """Return a copy with a name of its own, by which the quantiser can be told to leave it."""
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    copied.name = f"{next(filter(None, node.output))}/{node.op_type}"
    return copied


def _is_matrix(name: str, weights: dict[str, TensorProto], block: int, axis: int) -> bool:
    """Whether this is a float32 matrix with at least `block` numbers along an axis."""
    tensor = weights.get(name)
    return (
        tensor is not None
        and len(tensor.dims) == 2
        and tensor.dims[axis] >= block
        and tensor.data_type == TensorProto.FLOAT
    )


def _is_large(node: onnx.NodeProto, weights: dict[str, TensorProto], block: int) -> bool:
    return node.op_type == "MatMul" and _is_matrix(node.input[1], weights, block, 0)


def _run_quantiser(proto: onnx.ModelProto, settings: dict[str, Any], excluded: list[str]) -> onnx.ModelProto:
    with _quiet():
        try:
            from onnxruntime.quantization import matmul_nbits_quantizer as nbits
        except ImportError as error:
            raise InputError(
                f"onnxruntime's quantiser needs {error.name}; pip install {error.name}"
            ) from error
        config = nbits.DefaultWeightOnlyQuantConfig(**settings)
        quantiser = nbits.MatMulNBitsQuantizer(proto, nodes_to_exclude=excluded, algo_config=config)
        quantiser.process()
    model: onnx.ModelProto = quantiser.model.model
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's log off the terminal, and the handler that its import adds out of the process."""
    with exclusive():
        level, handlers, root = logging.root.manager.disable, list(logging.root.handlers), logging.root.level
        try:
            logging.disable(logging.CRITICAL)
            yield
        finally:
            logging.disable(level)
            logging.root.handlers[:] = handlers
            logging.root.setLevel(root)
