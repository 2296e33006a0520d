"""What a costly operator makes, without its numbers: for passes of which the calls count, and not what they compute.

A convolution takes a hundred times as long as to say how large its result is, and most of a forward pass is
convolutions. So in a pass on other inputs they give memory that nobody has set. Everything else is computed of that, as
it would be of numbers, until somebody asks for one: `recorder.NeedsNumbers`, and `passes.record_pass` starts again.

The size of what a window slides over (Dumoulin & Visin 2016, "A guide to convolution arithmetic", relationship 14):
`floor((n + 2 padding - dilation (kernel - 1) - 1) / stride) + 1` along each axis. A pooling can round up instead, and
then has no window that begins behind the last number.

Not covered, and computed: operators in other forms (words for a padding, other dtypes or layouts beside each other,
tensors without any number), which raise where it is an error; and all on other devices than the CPU, which are fast,
and where an index or a probability that is none ends the process instead of raising.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from bnfold.torch.internals import without_dispatch
from bnfold.torch.tensors import returned

__all__ = ["HOLLOW", "hollow"]

_Made = Tensor | None
_ATEN: Any = torch.ops.aten


def hollow(operator: Any, args: Any, kwargs: Any) -> Tensor | None:
    """A tensor as an operator of `HOLLOW` would make it, with unset numbers; None for a form that is not covered."""
    tensors = list(returned(args))
    first = tensors[0]
    plain = first.device.type == "cpu" and first.is_floating_point() and first.layout is torch.strided
    alike = all(
        t.dtype is first.dtype and t.device == first.device and t.stride() == _packed(t.shape)
        for t in tensors
    )
    if kwargs or not plain or not alike:
        return None
    with without_dispatch():
        return HOLLOW[operator](*args)


@lru_cache(maxsize=4096)
def _packed(shape: torch.Size) -> tuple[int, ...] | None:
    """The strides of numbers in the order of the axes, if there are any; torch acts on those of one place, too."""
    return None if 0 in shape else tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


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
    sizes = _slide(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *sizes)) if min(sizes) > 0 else None


def _slide(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    up: bool = False,
) -> list[int]:
    """How often a window fits along each axis; not at all, where that is an error."""
    rank = len(sizes)
    kernel, stride, padding, dilation = (_each(one, rank) for one in (kernel, stride, padding, dilation))
    axes = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return [_fits(size, k, s, p, d, up) for size, k, s, p, d in axes]


def _each(numbers: Sequence[int], rank: int) -> Sequence[int]:
    return numbers if len(numbers) == rank else [*numbers] * rank


def _fits(size: int, kernel: int, stride: int, padding: int, dilation: int, up: bool) -> int:
    if min(kernel, stride, dilation) < 1 or padding < 0:
        return 0
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if up else 0)) // stride + 1
    return count - 1 if up and (count - 1) * stride >= size + padding else count


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


def _pool(
    rank: int,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    up: bool = False,
) -> _Made:
    if x.dim() not in (rank + 1, rank + 2) or 2 * max(padding) > min(kernel):
        return None
    sizes = _slide(x.shape[-rank:], kernel, stride or kernel, padding, dilation, up)
    return x.new_empty((*x.shape[:-rank], *sizes)) if min(sizes) > 0 else None


def _average(
    rank: int,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    up: bool = False,
    counts_padding: bool = True,
    divisor: int | None = None,
) -> _Made:
    if divisor == 0 or any(n < k for n, k in zip(x.shape[-rank:], _each(kernel, rank), strict=False)):
        return None
    return _pool(rank, x, kernel, stride, padding, (1,), up)


def _join(tensors: Sequence[Tensor], axis: int = 0) -> _Made:
    first = tensors[0]
    shapes = [list(each.shape) for each in tensors]
    if not -first.dim() <= axis < first.dim() or any(len(shape) != first.dim() for shape in shapes):
        return None
    size = sum(shape[axis] for shape in shapes)
    for shape in shapes:
        shape[axis] = size
    return first.new_empty(shapes[0]) if all(shape == shapes[0] for shape in shapes) else None


def _like(x: Tensor, *settings: Any) -> _Made:
    return torch.empty_like(x)


def _itself(x: Tensor, *settings: Any) -> _Made:
    return x


def _combine(x: Tensor, other: Any) -> _Made:
    return torch.empty_like(x) if isinstance(other, Tensor) and other.shape == x.shape else None


def _combine_in_place(x: Tensor, other: Any) -> _Made:
    return x if isinstance(other, Tensor) and other.shape == x.shape else None


_ELEMENTWISE = ("relu", "leaky_relu", "silu", "hardtanh", "hardswish", "sigmoid", "tanh")


def _named(names: Sequence[str], overload: str = "default") -> list[Any]:
    return [getattr(getattr(_ATEN, name), overload) for name in names]


HOLLOW: dict[Any, Callable[..., _Made]] = {
    **dict.fromkeys(_named(("conv1d", "conv2d", "conv3d")), _convolve),
    _ATEN.max_pool2d.default: partial(_pool, 2),
    _ATEN.max_pool3d.default: partial(_pool, 3),
    _ATEN.avg_pool2d.default: partial(_average, 2),
    _ATEN.avg_pool3d.default: partial(_average, 3),
    **dict.fromkeys(_named(_ELEMENTWISE), _like),
    **dict.fromkeys(_named([f"{name}_" for name in _ELEMENTWISE]), _itself),
    **dict.fromkeys(_named(("add", "sub", "mul"), "Tensor"), _combine),
    **dict.fromkeys(_named(("add_", "sub_", "mul_"), "Tensor"), _combine_in_place),
    _ATEN.linear.default: _multiply,
    _ATEN.batch_norm.default: _normalise,
    _ATEN.prelu.default: lambda x, slope: (
        _like(x) if slope.dim() < 2 and (slope.shape == x.shape[1:2] or slope.numel() == 1) else None
    ),
    _ATEN.cat.default: _join,
}
"""Operators whose result has a shape that their settings say, and which raise for no other reason than a shape."""
