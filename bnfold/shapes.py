"""The shape that a layer of a checkpoint gives, by formula: nothing is run, nothing is allocated, nothing imported.

    shape_after(nn.Linear(30, 200), (2, 30)) == (2, 200)

A rule of `_RULES` takes a layer and the shape of a batch, and raises `Misfit` where torch would, or would give nothing.
Formulas are those of the pages of torch.nn. A layer without a rule keeps its input's shape. torch's own meta device
gives the same shapes, but imports its compiler on the way, which takes longer than training the lecture's net does.

Not covered: the unbatched forms of convolutions and normalisations, in which the batch would be taken for the channels,
and adaptive pools of size 1 over more axes than their name says. They are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Misfit", "Shape", "shape_after", "takes_integers"]

Shape = tuple[int, ...]


class Misfit(ValueError):
    """A layer that cannot take an input of this shape."""


def shape_after(layer: Any, shape: Shape) -> Shape:
    """The shape of what a layer gives, in eval mode, for a batch of a shape.

    Raises:
        Misfit: it cannot take one.
    """
    kind = type(layer).__name__
    rank = int(kind[-2]) if kind[-2:] in ("1d", "2d", "3d") else 0
    rule = _RULES.get(kind[:-2] if rank else kind)
    return shape if rule is None else rule(layer, shape, rank)


def takes_integers(layer: nn.Module) -> bool:
    """Whether a layer takes whole numbers: tables do, and what only moves numbers about."""
    return isinstance(layer, nn.Embedding | nn.Flatten | nn.Unflatten | nn.Identity | nn.ReLU) or (
        type(layer).__name__.startswith(("ZeroPad", "Dropout"))
    )


def _need(condition: bool) -> None:
    if not condition:
        raise Misfit


def _each(value: Any, rank: int) -> list[Any]:
    """A setting for each axis of space, where one number stands for all."""
    values = list(value) if isinstance(value, list | tuple) else [value] * rank
    _need(len(values) == rank)
    return values


def _split(shape: Shape, *ranks: int) -> tuple[Shape, Shape]:
    """The axes before space, and those of space, which are the last `ranks[0] - 2` of a batch."""
    _need(len(shape) in ranks)
    start = len(shape) - (ranks[0] - 2)
    return shape[:start], shape[start:]


def _axis(axis: int, rank: int) -> int:
    _need(-rank <= axis < rank)
    return axis % rank


# ---------------------------------------------------------------- the rules


def _embedding(layer: nn.Embedding, shape: Shape, rank: int) -> Shape:
    return (*shape, layer.embedding_dim)


def _linear(layer: nn.Linear, shape: Shape, rank: int) -> Shape:
    _need(shape[-1] == layer.in_features)
    return (*shape[:-1], layer.out_features)


def _conv(layer: Any, shape: Shape, rank: int) -> Shape:
    (batch, channels), space = _split(shape, rank + 2)
    _need(channels == layer.in_channels)
    settings = (layer.kernel_size, layer.stride, layer.dilation, _paddings(layer, rank))
    sizes = [
        _window(layer.padding_mode, size, *setting)
        for size, *setting in zip(space, *(_each(one, rank) for one in settings), strict=True)
    ]
    return (batch, layer.out_channels, *sizes)


def _paddings(layer: Any, rank: int) -> list[tuple[int, int]]:
    """How much is put before and after each axis of space."""
    if layer.padding == "valid":
        return [(0, 0)] * rank
    if layer.padding == "same":
        totals = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(size, size) for size in _each(layer.padding, rank)]


def _window(mode: str, size: int, kernel: int, stride: int, dilation: int, padding: tuple[int, int]) -> int:
    _need(min(size, kernel, stride, dilation) > 0)
    _need(mode not in ("reflect", "circular") or max(padding) <= size - (mode == "reflect"))
    made = (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
    _need(made > 0)
    return made


def _conv_transpose(layer: Any, shape: Shape, rank: int) -> Shape:
    (batch, channels), space = _split(shape, rank + 2)
    _need(channels == layer.in_channels)
    settings = (layer.kernel_size, layer.stride, layer.dilation, layer.padding, layer.output_padding)
    sizes = [
        _widened(size, *setting)
        for size, *setting in zip(space, *(_each(one, rank) for one in settings), strict=True)
    ]
    return (batch, layer.out_channels, *sizes)


def _widened(size: int, kernel: int, stride: int, dilation: int, padding: int, more: int) -> int:
    _need(min(size, kernel, stride, dilation) > 0 and more < max(stride, dilation))
    made = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + more + 1
    _need(made > 0)
    return made


def _pool(layer: Any, shape: Shape, rank: int) -> Shape:
    before, space = _split(shape, rank + 2, rank + 1)
    if isinstance(layer, nn.AvgPool3d):
        _need(all(size >= kernel for size, kernel in zip(space, _each(layer.kernel_size, 3), strict=True)))
    settings = (layer.kernel_size, layer.stride, getattr(layer, "dilation", 1), layer.padding)
    sizes = [
        _pooled(layer.ceil_mode, size, *setting)
        for size, *setting in zip(space, *(_each(one, rank) for one in settings), strict=True)
    ]
    return (*before, *sizes)


def _pooled(ceil: bool, size: int, kernel: int, stride: int, dilation: int, padding: int) -> int:
    _need(min(size, kernel, stride, dilation) > 0 and 2 * padding <= kernel)
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    made = (room + (stride - 1 if ceil else 0)) // stride + 1
    made -= ceil and (made - 1) * stride >= size + padding
    _need(made > 0)
    return made


def _adaptive_pool(layer: Any, shape: Shape, rank: int) -> Shape:
    before, space = _split(shape, rank + 2, rank + 1)
    wanted = _each(layer.output_size, rank)
    _need(rank > 1 or wanted != [None])
    return (*before, *(size if one is None else one for one, size in zip(wanted, space, strict=True)))


def _zero_pad(layer: Any, shape: Shape, rank: int) -> Shape:
    amounts = _each(layer.padding, 2 * rank)
    _need(len(shape) >= rank)
    start = len(shape) - rank
    added = [amounts[2 * axis] + amounts[2 * axis + 1] for axis in reversed(range(rank))]
    return (*shape[:start], *(size + more for size, more in zip(shape[start:], added, strict=True)))


def _flatten(layer: nn.Flatten, shape: Shape, rank: int) -> Shape:
    start, end = _axis(layer.start_dim, len(shape)), _axis(layer.end_dim, len(shape))
    _need(start <= end)
    return (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


def _unflatten(layer: Any, shape: Shape, rank: int) -> Shape:
    axis = _axis(layer.dim, len(shape))
    _need(math.prod(layer.unflattened_size) == shape[axis])
    return (*shape[:axis], *layer.unflattened_size, *shape[axis + 1 :])


def _batch_norm(layer: Any, shape: Shape, rank: int) -> Shape:
    _need(len(shape) in ((2, 3) if rank == 1 else (rank + 2,)) and shape[1] == layer.num_features)
    return shape


def _instance_norm(layer: Any, shape: Shape, rank: int) -> Shape:
    held = layer.affine or layer.track_running_stats
    _need(len(shape) == rank + 2 and (shape[1] == layer.num_features or not held))
    _need(layer.track_running_stats or math.prod(shape[2:]) > 1)
    return shape


def _group_norm(layer: nn.GroupNorm, shape: Shape, rank: int) -> Shape:
    _need(len(shape) > 1 and shape[1] == layer.num_channels)
    return shape


def _layer_norm(layer: nn.LayerNorm, shape: Shape, rank: int) -> Shape:
    _need(shape[-len(layer.normalized_shape) :] == tuple(layer.normalized_shape))
    return shape


def _softmax(layer: Any, shape: Shape, rank: int) -> Shape:
    _axis(layer.dim, len(shape))
    return shape


def _prelu(layer: nn.PReLU, shape: Shape, rank: int) -> Shape:
    _need(layer.num_parameters in (1, shape[1] if len(shape) > 1 else 1))
    return shape


def _dropout(layer: Any, shape: Shape, rank: int) -> Shape:
    _need(rank != 1 or len(shape) in (2, 3))
    return shape


_RULES: dict[str, Callable[[Any, Shape, int], Shape]] = {
    "Embedding": _embedding,
    "Linear": _linear,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _pool,
    "AvgPool": _pool,
    "AdaptiveAvgPool": _adaptive_pool,
    "AdaptiveMaxPool": _adaptive_pool,
    "ZeroPad": _zero_pad,
    "Flatten": _flatten,
    "Unflatten": _unflatten,
    "BatchNorm": _batch_norm,
    "InstanceNorm": _instance_norm,
    "GroupNorm": _group_norm,
    "LayerNorm": _layer_norm,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "PReLU": _prelu,
    "Dropout": _dropout,
}
