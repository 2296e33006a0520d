"""The modules that folding leaves behind where a BatchNorm was: as little as there is left to compute.

`nn.Identity` stands where nothing is left. These are ordinary modules: they have a state dict, move between devices and
dtypes, can be pickled, exported and compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["TAILS", "ChannelAdd", "ChannelMulAdd", "Tail", "Zero", "turn_into"]


class ChannelAdd(nn.Module):
    """`x + bias`, with one number per channel; what is left of a BatchNorm whose scale was folded.

    `bias` has the rank of the input without its first axis, with 1 along every axis but that of the channels:
    `(channels, 1, 1)` for images. Inputs of a smaller rank are taken as well.
    """

    def __init__(self, bias: Tensor, requires_grad: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias, requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        return x + _fit(self.bias, x)


class ChannelMulAdd(nn.Module):
    """`x * weight + bias`, with one number of each per channel; a BatchNorm that was lowered.

    Both have the rank of the input without its first axis, as in `ChannelAdd`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, requires_grad: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad)
        self.bias = nn.Parameter(bias, requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add, in one pass."""
        return torch.addcmul(_fit(self.bias, x), x, _fit(self.weight, x))


def _fit(numbers: Tensor, x: Tensor) -> Tensor:
    """One number per channel, in the rank that an input has."""
    return numbers if numbers.dim() < x.dim() else numbers.reshape(numbers.shape[: x.dim() - 1])


class Zero(nn.Module):
    """A zero that broadcasts; what is left of a term of a sum that another term computes as well."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero, of the type and on the device of the input, without axes."""
        return x.new_zeros(())


class Tail(nn.Sequential):
    """An operator, and what the module that it replaces does after it.

    Holds children of that module under their own names, so that names in state dicts stay; one that runs twice has
    another name besides.
    """

    def __init__(
        self, first: Mapping[str, nn.Module], module: nn.Module, steps: Iterable[tuple[str, nn.Module | None]]
    ) -> None:
        """Take the children that are steps.

        Args:
            first: what runs before them.
            module: the one that is replaced.
            steps: names of its children, and modules that stand for a function.
        """
        super().__init__()
        self._modules.update(first)
        for name, stand_in in steps:
            child = module._modules[name] if stand_in is None else stand_in
            assert child is not None
            while name in self._modules:
                name += "_"
            self._modules[name] = child


TAILS: dict[str, Callable[..., nn.Module]] = {
    "relu": lambda inplace=False: nn.ReLU(),
    "relu6": lambda inplace=False: nn.ReLU6(),
    "leaky_relu": lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
    "elu": lambda alpha=1.0, inplace=False: nn.ELU(alpha),
    "celu": lambda alpha=1.0, inplace=False: nn.CELU(alpha),
    "selu": lambda inplace=False: nn.SELU(),
    "silu": lambda inplace=False: nn.SiLU(),
    "mish": lambda inplace=False: nn.Mish(),
    "hardswish": lambda inplace=False: nn.Hardswish(),
    "hardsigmoid": lambda inplace=False: nn.Hardsigmoid(),
    "hardtanh": lambda min_val=-1.0, max_val=1.0, inplace=False: nn.Hardtanh(min_val, max_val),
    "clamp": lambda min, max: nn.Hardtanh(min, max),  # noqa: A006
    "gelu": lambda approximate="none": nn.GELU(approximate),
    "softplus": lambda beta=1.0, threshold=20.0: nn.Softplus(beta, threshold),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
"""Activations that can stand as a module, by the name of the function."""


def turn_into(module: nn.Module, other: nn.Module) -> None:
    """Make an object what another one is; everyone who holds it sees the change."""
    training = module.training
    module.__class__ = type(other)
    vars(module).clear()
    vars(module).update(vars(other))
    module.training = training
