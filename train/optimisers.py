"""Gradient descent and Adam on one flat vector.

`flatten` moves all parameters of a net into one vector, and all gradients into another, and leaves views behind. A
step is then a handful of operations however many parameters there are; on nets as small as these that is what a step
costs. The rules are those of torch.optim.SGD and torch.optim.Adam (Kingma & Ba 2015), to which the tests hold them;
torch.optim itself would import the compiler at its first use, which takes longer than the whole of a quick training.

Not covered: weight decay, groups of parameters.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Adam", "Descent", "Optimiser", "flatten"]


class Optimiser(Protocol):
    """What the loop asks of an optimiser."""

    gradients: Tensor
    """Those of all parameters, one vector that somebody fills before a step."""

    def step(self, rate: float) -> None:
        """Change the parameters by their gradients."""

    def state(self) -> dict[str, Any]:
        """What it remembers of the steps before, in tensors of its own and plain values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Remember that."""


class Descent:
    """p <- p - rate * g."""

    def __init__(self, net: nn.Module) -> None:
        self._values, self.gradients = flatten(net)

    def step(self, rate: float) -> None:
        """Take one step down the gradient."""
        self._values.sub_(self.gradients, alpha=rate)

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing."""


class Adam:
    """p <- p - rate * m' / (sqrt(v') + eps): m', v' the unbiased running means of g and g^2."""

    def __init__(self, net: nn.Module, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self._values, self.gradients = flatten(net)
        self._first, self._second = torch.zeros_like(self._values), torch.zeros_like(self._values)
        self._betas, self._eps, self._taken = betas, eps, 0

    def step(self, rate: float) -> None:
        """Take one step down the running mean of the gradient, scaled by its running size."""
        self._taken += 1
        (first, second), gradients = self._betas, self.gradients
        self._first.lerp_(gradients, 1 - first)
        self._second.mul_(second).addcmul_(gradients, gradients, value=1 - second)
        size = self._second.sqrt().div_((1 - second**self._taken) ** 0.5).add_(self._eps)
        self._values.addcdiv_(self._first, size, value=-rate / (1 - first**self._taken))

    def state(self) -> dict[str, Any]:
        """The running means, and of how many steps."""
        first, second = (mean.to("cpu", copy=True) for mean in (self._first, self._second))
        return {"first": first, "second": second, "taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with these running means."""
        self._first.copy_(state["first"])
        self._second.copy_(state["second"])
        self._taken = state["taken"]


@torch.no_grad()
def flatten(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the parameters of `net` as one vector and their gradients, zero, as another; the net keeps views."""
    parameters = list(net.parameters())
    values = torch.cat([parameter.flatten() for parameter in parameters])
    gradients = torch.zeros_like(values)
    begin = 0
    for parameter in parameters:
        end = begin + parameter.numel()
        parameter.data = values[begin:end].view_as(parameter)
        parameter.grad = gradients[begin:end].view_as(parameter)
        begin = end
    return values, gradients
