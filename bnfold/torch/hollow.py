"""What a costly operator makes, without its numbers: for passes of which the calls count, and nothing that they compute.

A convolution takes a hundred times as long as to say how large its result is, and most of a forward pass is
convolutions. So in a pass on other inputs they give memory that nobody has set. Everything else is computed of that, as
it would be of numbers, until somebody asks for one (see `capture.NeedsNumbers`).

The size of a convolution's result (Dumoulin & Visin 2016, "A guide to convolution arithmetic", relationship 14):
`floor((n + 2 padding - dilation (kernel - 1) - 1) / stride) + 1` along each axis. Poolings are asked on the `meta`
device.

Not covered, and computed: operators in other forms (words for a padding, other dtypes or layouts beside each other),
which raise where it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["HOLLOW", "hollow"]

_Made = Tensor | None
_ATEN: Any = torch.ops.aten


def hollow(operator: Any, args: Any, kwargs: Any) -> Tensor | None:
    """A tensor as an operator of `HOLLOW` would make it, with unset numbers; None for a form that is not covered."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    first = tensors[0]
    plain = all(
        each.dtype is first.dtype and each.device == first.device and each.is_contiguous() for each in tensors
    )
    return HOLLOW[operator](*args) if plain and first.layout is torch.strided and not kwargs else None


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: _Made = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> _Made:
    rank = weight.dim() - 2
    if x.dim() != rank + 2 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    given = (x.shape[2:], weight.shape[2:], *(_each(one, rank) for one in (stride, padding, dilation)))
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(*given, strict=True)]
    return x.new_empty((x.shape[0], weight.shape[0], *sizes)) if min(sizes) > 0 else None


def _each(numbers: Sequence[int], rank: int) -> Sequence[int]:
    return numbers if len(numbers) == rank else [*numbers] * rank


def _multiply(x: Tensor, weight: Tensor, bias: _Made = None) -> _Made:
    if not x.dim() or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _normalise(x: Tensor, *rest: Any) -> _Made:
    *numbers, training = rest[:5]
    known = x.dim() > 1 and all(each is not None and each.shape == x.shape[1:2] for each in numbers)
    return torch.empty_like(x) if known and not training else None


def _pool(operator: Any) -> Callable[..., _Made]:
    def pool(x: Tensor, *settings: Any) -> _Made:
        return x.new_empty(operator(x.to("meta"), *settings).shape)

    return pool


_POOLS = (_ATEN.max_pool2d, _ATEN.max_pool3d, _ATEN.avg_pool2d, _ATEN.avg_pool3d)

HOLLOW: dict[Any, Callable[..., _Made]] = {
    **dict.fromkeys((_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default), _convolve),
    **{pool.default: _pool(pool.default) for pool in _POOLS},
    _ATEN.linear.default: _multiply,
    _ATEN.batch_norm.default: _normalise,
    _ATEN.relu.default: torch.empty_like,
    _ATEN.relu_.default: lambda x: x,
}
"""Operators whose result has a shape that their settings say, and which raise for no other reason than a shape."""
