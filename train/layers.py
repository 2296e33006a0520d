"""The lecture's layers in plain tensor operations, with torch.nn's names, arguments, parameters and buffers.

    Embedding    W[x]
    Flatten      x as (batch, everything else)
    Linear       x W^T + b
    BatchNorm1d  (x - mean) / sqrt(var + eps) * weight + bias              (Ioffe & Szegedy 2015)
    Tanh, ReLU

In training mode a BatchNorm takes mean and variance from the batch, and moves its running statistics towards them; in
eval mode it uses those. It normalises by the biased variance (divided by n) and tracks the unbiased one (n - 1), as
torch does. The lecture's own do not, and come with their own classes:

    UnbiasedBatchNorm1d   its module: normalises by the unbiased variance as well
    StdBatchNorm1d        its first one, before there were modules: divides by the unbiased std, tracks that std, no eps

In eval mode the first is torch's; the second is torch's with eps = 0 and running_var = running_std ** 2. `to_torch`
says so with torch.nn's layers, for a checkpoint, which holds no others.

A Linear or Embedding begins as the lecture's does, N(0, 1 / fan_in) and N(0, 1), and not as torch's. Not covered:
whatever arguments of torch.nn's are missing here, such as an embedding's padding_idx.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.layers import WithoutStorage

__all__ = [
    "BatchNorm1d",
    "Embedding",
    "Flatten",
    "Linear",
    "ReLU",
    "StdBatchNorm1d",
    "Tanh",
    "UnbiasedBatchNorm1d",
    "to_torch",
]


class Embedding(nn.Module):
    """A row of `weight` (num_embeddings, embedding_dim) for each number."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = nn.Parameter(torch.randn(num_embeddings, embedding_dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, embedding_dim) for integers (*)."""
        return self.weight[x]

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Flatten(nn.Module):
    """Axes `start_dim` to `end_dim` as one."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return the same values with fewer axes."""
        first, last = self.start_dim % x.ndim, self.end_dim % x.ndim
        return x.reshape(*x.shape[:first], -1, *x.shape[last + 1 :])

    def extra_repr(self) -> str:
        """Show the axes."""
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Linear(nn.Module):
    """`weight` (out_features, in_features) and `bias` (out_features,) or None."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        drawn = torch.randn(out_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(drawn / math.sqrt(in_features))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, out_features) for (*, in_features)."""
        out = x @ self.weight.T
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """Show the sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class BatchNorm1d(nn.Module):
    """Normalises each of `num_features` channels over the batch, and over the length where there is one.

    Raises:
        ValueError: an input that is not (n, num_features) or (n, num_features, length), or one value per channel
            in training mode.
    """

    unbiased = False
    """Whether training mode normalises by the variance divided by n - 1."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        ones, zeros = (make(num_features, device=device, dtype=dtype) for make in (torch.ones, torch.zeros))
        self.weight = nn.Parameter(ones.clone()) if affine else None
        self.bias = nn.Parameter(zeros.clone()) if affine else None
        tracked = torch.tensor(0, device=device)
        self.register_buffer("running_mean", zeros if track_running_stats else None)
        self.register_buffer("running_var", ones if track_running_stats else None)
        self.register_buffer("num_batches_tracked", tracked if track_running_stats else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` normalised, (n, num_features) or (n, num_features, length)."""
        if x.ndim not in (2, 3) or x.shape[1] != self.num_features:
            raise ValueError(
                f"{list(x.shape)} is not (n, {self.num_features}) or (n, {self.num_features}, length)"
            )
        mean, var = self._statistics(x)
        shape = (-1, 1) if x.ndim == 3 else (-1,)
        out = (x - mean.view(shape)) / torch.sqrt(var + self.eps).view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape)
        return out if self.bias is None else out + self.bias.view(shape)

    def extra_repr(self) -> str:
        """Show the arguments."""
        names = ("eps", "momentum", "affine", "track_running_stats")
        return f"{self.num_features}, " + ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance to normalise by, and track those of the batch in training mode."""
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return self.running_mean, self.running_var
        axes = (0, 2) if x.ndim == 3 else (0,)
        count = x.numel() // self.num_features
        if count < 2:
            raise ValueError(f"one value per channel in {list(x.shape)} has no variance; use a larger batch")
        mean, biased = x.mean(axes), x.var(axes, correction=0)
        unbiased = biased * (count / (count - 1))
        if self.training:
            self._track(mean.detach(), unbiased.detach())
        return mean, unbiased if self.unbiased else biased

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics by `momentum`, or by 1 / count without one, so that they are plain averages."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean += share * (mean - self.running_mean)
        self.running_var += share * (var - self.running_var)


class UnbiasedBatchNorm1d(BatchNorm1d):
    """The lecture's module: in training mode it normalises by the unbiased variance. The same as torch's in eval."""

    unbiased = True


class StdBatchNorm1d(nn.Module):
    """The lecture's first BatchNorm: (x - mean) / std * weight + bias, std unbiased, without eps, and tracked as it is.

    Buffers `running_mean` (num_features,), 0 at first, and `running_std` (num_features,), 1 at first. For (n,
    num_features) alone. A channel that is the same in the whole batch becomes nan, as there.
    """

    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self, num_features: int, momentum: float = 0.001, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.num_features, self.momentum = num_features, momentum
        ones, zeros = (make(num_features, device=device, dtype=dtype) for make in (torch.ones, torch.zeros))
        self.weight, self.bias = nn.Parameter(ones.clone()), nn.Parameter(zeros.clone())
        self.register_buffer("running_mean", zeros)
        self.register_buffer("running_std", ones)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (n, num_features) normalised."""
        if not self.training:
            return (x - self.running_mean) / self.running_std * self.weight + self.bias
        mean, std = x.mean(0), x.std(0)
        with torch.no_grad():
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_std += self.momentum * (std - self.running_std)
        return (x - mean) / std * self.weight + self.bias

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.num_features}, momentum={self.momentum}"


class Tanh(nn.Module):
    """(e^x - e^-x) / (e^x + e^-x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        return torch.tanh(x)


class ReLU(nn.Module):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        return torch.where(x <= 0, 0, x)


def to_torch(net: nn.Sequential) -> nn.Sequential:
    """Return a copy of `net` in layers of torch.nn that computes the same in eval mode; its own are left alone."""
    twin = nn.Sequential()
    for name, layer in net.named_children():
        twin.add_module(name, _twin(layer))
    return twin.train(net.training)


def _twin(layer: nn.Module) -> nn.Module:
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    if isinstance(layer, StdBatchNorm1d):
        state |= {"running_var": state.pop("running_std").square(), "num_batches_tracked": torch.tensor(0)}
    with WithoutStorage():
        twin = _empty_twin(layer)
    twin.load_state_dict(state, assign=True)
    return twin


def _empty_twin(layer: nn.Module) -> nn.Module:
    match layer:
        case Embedding():
            return nn.Embedding(layer.num_embeddings, layer.embedding_dim)
        case Flatten():
            return nn.Flatten(layer.start_dim, layer.end_dim)
        case Linear():
            return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        case BatchNorm1d():
            statistics = layer.affine, layer.track_running_stats
            return nn.BatchNorm1d(layer.num_features, layer.eps, layer.momentum, *statistics)
        case StdBatchNorm1d():
            return nn.BatchNorm1d(layer.num_features, 0.0, layer.momentum)
        case Tanh():
            return nn.Tanh()
        case ReLU():
            return nn.ReLU()
    return copy.deepcopy(layer)
