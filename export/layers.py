"""The table: which ONNX nodes a layer of a checkpoint becomes.

A row of `ROWS` names classes of torch.nn and a function that draws the nodes of such a layer into a `Sketch` and
returns the name of the value that they compute. Most rows are one node. Everything that does not depend on the
input is worked out here and stands in the file as an initializer: no Constant, Shape or Concat is left to run time.
Sizes are static but for the batch, so a pool that adapts to a size has a fixed window, and a Reshape a fixed target.

Written with `onnx.helper` and not with `torch.onnx.export`, which takes seconds, needs onnxscript, and folds
BatchNorms on its own; here a BatchNorm stays what it is. Operators are those of the ONNX operator pages, opset 20.

A layer that cannot be drawn raises `NoRow` with its name: BatchNorm without running statistics, pools with windows of
unequal size, `ceil_mode` or `divisor_override`, and layers that mix the examples of a batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from bnfold.errors import InputError

__all__ = ["OPSET", "ROWS", "NoRow", "Sketch", "draw"]

OPSET = 20
"""Read by onnxruntime 1.17 and later, with the IR version that goes with it."""


class NoRow(InputError):
    """A layer that the table cannot express; the message names it."""


class Sketch:
    """The nodes and initializers drawn so far, and where the layer in hand stands.

    Attributes:
        layer: the name of the layer in hand; its nodes and initializers are named after it.
        before, after: the shapes of its input and output, the batch axis included but its size meaningless.
        dtype: the dtype of its output.
    """

    def __init__(self, batch: int | str, reserved: set[str]) -> None:
        self.batch = batch
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.layer = ""
        self.before: tuple[int, ...] = ()
        self.after: tuple[int, ...] = ()
        self.dtype = torch.float32
        self._taken = set(reserved)

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Draw one node with one output; return the output's name, which is also the node's."""
        name = self._name(self.layer if self.layer not in self._taken else f"{self.layer}/{op}")
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def constant(self, name: str, value: Any) -> str:
        """Store a tensor or array as an initializer named after the layer; return its name."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        name = self._name(f"{self.layer}.{name}")
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def reshape(self, x: str, sizes: tuple[int, ...]) -> str:
        """Give every example these sizes."""
        batch = -1 if isinstance(self.batch, str) else self.batch
        return self.node("Reshape", x, self.constant("shape", np.array([batch, *sizes], np.int64)))

    def refuse(self, reason: str) -> NoRow:
        """Return the error that says why the layer in hand cannot be drawn."""
        return NoRow(f"layer `{self.layer}` {reason}")

    def _name(self, wanted: str) -> str:
        spellings = itertools.chain([wanted], (f"{wanted}_{i}" for i in itertools.count(1)))
        name = next(spelling for spelling in spellings if spelling not in self._taken)
        self._taken.add(name)
        return name


Row = Callable[[Sketch, str, Any], str]


def draw(model: nn.Sequential, example: Tensor, sketch: Sketch, x: str) -> str:
    """Draw every layer of a net in eval mode, the first reading `x`; return the name of the last value.

    `example` (2, ...) is run through the net for the shapes. A layer that no checkpoint holds brings its row as a
    method, `row(sketch, x)` (`export.tables`).

    Raises:
        NoRow: a layer has no row, or its row cannot express it.
    """
    for name, layer in model.named_children():
        sketch.layer, sketch.before = name, tuple(example.shape)
        row = _own if hasattr(layer, "row") else ROWS.get(type(layer))
        if row is None:
            raise sketch.refuse(f"is a {type(layer).__name__}, which has no row in export/layers.py")
        example = layer(example)
        sketch.after, sketch.dtype = tuple(example.shape), example.dtype
        if sketch.after[:1] != (2,):
            raise sketch.refuse("mixes the examples of a batch")
        x = row(sketch, x, layer)
    return x


def _own(sketch: Sketch, x: str, layer: Any) -> str:
    drawn: str = layer.row(sketch, x)
    return drawn


def _nothing(sketch: Sketch, x: str, layer: nn.Module) -> str:
    return x


def _one(op: str, **named: str) -> Row:
    """Return the row of a layer that is one node; `named` tells which of its attributes the node takes."""

    def row(sketch: Sketch, x: str, layer: Any) -> str:
        return sketch.node(op, x, **{key: getattr(layer, value) for key, value in named.items()})

    return row


def _embedding(sketch: Sketch, x: str, layer: nn.Embedding) -> str:
    return sketch.node("Gather", sketch.constant("weight", layer.weight), x, axis=0)


def _linear(sketch: Sketch, x: str, layer: nn.Linear) -> str:
    """Gemm as torch stores its weight; MatMul with the transpose where there is more than the feature axis."""
    bias = [] if layer.bias is None else [sketch.constant("bias", layer.bias)]
    if len(sketch.before) == 2:
        return sketch.node("Gemm", x, sketch.constant("weight", layer.weight), *bias, transB=1)
    x = sketch.node("MatMul", x, sketch.constant("weight", layer.weight.T))
    return sketch.node("Add", x, *bias) if bias else x


def _padding(layer: Any) -> tuple[list[int], list[int]]:
    """Return how much a convolution pads before and after each spatial axis."""
    both = list(layer._reversed_padding_repeated_twice)
    return both[-2::-2], both[::-2]


def _pad(sketch: Sketch, x: str, begin: list[int], end: list[int], mode: str) -> str:
    still = [0] * (len(sketch.before) - len(begin))
    pads = np.array([*still, *begin, *still, *end], np.int64)
    return sketch.node("Pad", x, sketch.constant("pads", pads), mode=mode)


_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _convolution(sketch: Sketch, x: str, layer: Any) -> str:
    begin, end = _padding(layer)
    if layer.padding_mode != "zeros":
        x = _pad(sketch, x, begin, end, _PAD_MODES[layer.padding_mode])
        begin = end = [0] * len(begin)
    return _convolve("Conv", sketch, x, layer, pads=begin + end)


def _transposed(sketch: Sketch, x: str, layer: Any) -> str:
    pads = list(layer.padding) * 2
    return _convolve("ConvTranspose", sketch, x, layer, pads=pads, output_padding=layer.output_padding)


def _convolve(op: str, sketch: Sketch, x: str, layer: Any, **attributes: Any) -> str:
    inputs = [x, sketch.constant("weight", layer.weight)]
    if layer.bias is not None:
        inputs.append(sketch.constant("bias", layer.bias))
    shape = {"kernel_shape": layer.kernel_size, "strides": layer.stride, "dilations": layer.dilation}
    return sketch.node(op, *inputs, group=layer.groups, **shape, **attributes)


def _scale_and_bias(sketch: Sketch, layer: Any, shape: tuple[int, ...]) -> list[str]:
    """Store the two, as ones and zeros where the layer has none."""
    weight = torch.ones(shape, dtype=sketch.dtype) if layer.weight is None else layer.weight
    bias = torch.zeros(shape, dtype=sketch.dtype) if layer.bias is None else layer.bias
    return [sketch.constant("weight", weight), sketch.constant("bias", bias)]


def _batchnorm(sketch: Sketch, x: str, layer: Any) -> str:
    if layer.running_mean is None or layer.running_var is None:
        raise sketch.refuse("has no running statistics and would normalise by the batch")
    affine = _scale_and_bias(sketch, layer, (layer.num_features,))
    statistics = [sketch.constant(name, getattr(layer, name)) for name in ("running_mean", "running_var")]
    return sketch.node("BatchNormalization", x, *affine, *statistics, epsilon=layer.eps)


def _instancenorm(sketch: Sketch, x: str, layer: Any) -> str:
    if layer.running_mean is not None:
        return _batchnorm(sketch, x, layer)
    affine = _scale_and_bias(sketch, layer, (layer.num_features,))
    return sketch.node("InstanceNormalization", x, *affine, epsilon=layer.eps)


def _layernorm(sketch: Sketch, x: str, layer: nn.LayerNorm) -> str:
    affine = _scale_and_bias(sketch, layer, layer.normalized_shape)
    return sketch.node("LayerNormalization", x, *affine, axis=-len(layer.normalized_shape), epsilon=layer.eps)


def _groupnorm(sketch: Sketch, x: str, layer: nn.GroupNorm) -> str:
    """One InstanceNormalization over the groups; GroupNormalization is an operator from opset 21 on only."""
    groups, size = layer.num_groups, math.prod(sketch.before[1:])
    x = sketch.reshape(x, (groups, size // groups))
    unit = [sketch.constant("ones", torch.ones(groups, dtype=sketch.dtype))]
    unit += [sketch.constant("zeros", torch.zeros(groups, dtype=sketch.dtype))]
    x = sketch.node("InstanceNormalization", x, *unit, epsilon=layer.eps)
    x = sketch.reshape(x, sketch.after[1:])
    if layer.weight is None:
        return x
    sizes = (-1, *[1] * (len(sketch.before) - 2))
    x = sketch.node("Mul", x, sketch.constant("weight", layer.weight.reshape(sizes)))
    return sketch.node("Add", x, sketch.constant("bias", layer.bias.reshape(sizes)))


def _flatten(sketch: Sketch, x: str, layer: nn.Flatten) -> str:
    if len(sketch.after) == 2 and layer.start_dim != 0:
        return sketch.node("Flatten", x, axis=1)
    return sketch.reshape(x, sketch.after[1:])


def _unflatten(sketch: Sketch, x: str, layer: nn.Unflatten) -> str:
    return sketch.reshape(x, sketch.after[1:])


def _zeropad(sketch: Sketch, x: str, layer: Any) -> str:
    both = list(layer.padding)
    return _pad(sketch, x, both[-2::-2], both[::-2], "constant")


def _pool(op: str) -> Row:
    def row(sketch: Sketch, x: str, layer: Any) -> str:
        if layer.ceil_mode or getattr(layer, "divisor_override", None):
            raise sketch.refuse("has ceil_mode or divisor_override, on which runtimes differ")
        rank = len(sketch.before) - 2
        attributes = {"kernel_shape": _each(layer.kernel_size, rank), "strides": _each(layer.stride, rank)}
        attributes["pads"] = _each(layer.padding, rank) * 2
        if op == "MaxPool":
            return sketch.node(op, x, **attributes, dilations=_each(layer.dilation, rank))
        return sketch.node(op, x, **attributes, count_include_pad=int(layer.count_include_pad))

    return row


def _each(value: int | tuple[int, ...], rank: int) -> list[int]:
    return [value] * rank if isinstance(value, int) else list(value) * (rank // len(value))


def _adaptive(op: str) -> Row:
    def row(sketch: Sketch, x: str, layer: Any) -> str:
        sizes, wanted = sketch.before[2:], sketch.after[2:]
        if all(size == 1 for size in wanted):
            return sketch.node(f"Global{op}", x)
        if any(size % out for size, out in zip(sizes, wanted, strict=True)):
            raise sketch.refuse(f"pools {list(sizes)} to {list(wanted)}, with windows of unequal size")
        window = [size // out for size, out in zip(sizes, wanted, strict=True)]
        return sketch.node(op, x, kernel_shape=window, strides=window)

    return row


def _scalar(sketch: Sketch, name: str, value: float) -> str:
    return sketch.constant(name, torch.tensor(value, dtype=sketch.dtype))


def _clip(sketch: Sketch, x: str, layer: nn.Hardtanh) -> str:
    return sketch.node(
        "Clip", x, _scalar(sketch, "min", layer.min_val), _scalar(sketch, "max", layer.max_val)
    )


def _hardsigmoid(sketch: Sketch, x: str, layer: nn.Hardsigmoid) -> str:
    return sketch.node("HardSigmoid", x, alpha=1 / 6, beta=0.5)


def _prelu(sketch: Sketch, x: str, layer: nn.PReLU) -> str:
    slope = layer.weight.reshape(-1, *[1] * (len(sketch.before) - 2))
    return sketch.node("PRelu", x, sketch.constant("weight", slope))


def _silu(sketch: Sketch, x: str, layer: nn.SiLU) -> str:
    return sketch.node("Mul", x, sketch.node("Sigmoid", x))


def _tanhshrink(sketch: Sketch, x: str, layer: nn.Tanhshrink) -> str:
    return sketch.node("Sub", x, sketch.node("Tanh", x))


def _logsigmoid(sketch: Sketch, x: str, layer: nn.LogSigmoid) -> str:
    """-softplus(-x), which does not lose small probabilities as log(sigmoid(x)) does."""
    return sketch.node("Neg", sketch.node("Softplus", sketch.node("Neg", x)))


def _softplus(sketch: Sketch, x: str, layer: nn.Softplus) -> str:
    """softplus(beta x) / beta; torch's switch to the identity above a threshold of 20 changes 2e-9 at most."""
    if layer.threshold < 20:
        raise sketch.refuse(
            f"turns linear at a threshold of {layer.threshold}, which ONNX's Softplus does not"
        )
    if layer.beta == 1:
        return sketch.node("Softplus", x)
    beta = _scalar(sketch, "beta", layer.beta)
    return sketch.node("Div", sketch.node("Softplus", sketch.node("Mul", x, beta)), beta)


def _over(op: str) -> Row:
    def row(sketch: Sketch, x: str, layer: Any) -> str:
        axis = layer.dim % len(sketch.before)
        if axis == 0:
            raise sketch.refuse("mixes the examples of a batch")
        return sketch.node(op, x, axis=axis)

    return row


_ROWS: dict[str, Row] = {
    "Identity Dropout Dropout{}d AlphaDropout FeatureAlphaDropout": _nothing,
    "Embedding": _embedding,
    "Linear": _linear,
    "Conv{}d": _convolution,
    "ConvTranspose{}d": _transposed,
    "BatchNorm{}d": _batchnorm,
    "InstanceNorm{}d": _instancenorm,
    "LayerNorm": _layernorm,
    "GroupNorm": _groupnorm,
    "Flatten": _flatten,
    "Unflatten": _unflatten,
    "ZeroPad{}d": _zeropad,
    "MaxPool{}d": _pool("MaxPool"),
    "AvgPool{}d": _pool("AveragePool"),
    "AdaptiveMaxPool{}d": _adaptive("MaxPool"),
    "AdaptiveAvgPool{}d": _adaptive("AveragePool"),
    "Tanh": _one("Tanh"),
    "Sigmoid": _one("Sigmoid"),
    "Softsign": _one("Softsign"),
    "ReLU": _one("Relu"),
    "SELU": _one("Selu"),
    "Mish": _one("Mish"),
    "Hardswish": _one("HardSwish"),
    "ELU": _one("Elu", alpha="alpha"),
    "CELU": _one("Celu", alpha="alpha"),
    "GELU": _one("Gelu", approximate="approximate"),
    "LeakyReLU": _one("LeakyRelu", alpha="negative_slope"),
    "Hardsigmoid": _hardsigmoid,
    "Hardtanh ReLU6": _clip,
    "PReLU": _prelu,
    "SiLU": _silu,
    "Tanhshrink": _tanhshrink,
    "LogSigmoid": _logsigmoid,
    "Softplus": _softplus,
    "Softmax": _over("Softmax"),
    "LogSoftmax": _over("LogSoftmax"),
}

ROWS: dict[type[nn.Module], Row] = {
    getattr(nn, name.format(rank)): row
    for names, row in _ROWS.items()
    for name in names.split()
    for rank in (1, 2, 3)
}
