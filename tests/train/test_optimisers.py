"""train.optimisers: the rules of torch.optim, on one vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.optimisers import Adam, Descent, flatten


def net() -> nn.Sequential:
    """Return the same small float64 net each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def losses(model: nn.Sequential, zero, step) -> list[float]:
    """Return the losses of a few steps on changing data."""
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(20):
        x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
        loss = model(x).square().sum()
        zero()
        loss.backward()
        step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Descent, lambda parameters: torch.optim.SGD(parameters, lr=0.01)),
        (
            lambda model: Adam(model, betas=(0.8, 0.95)),
            lambda parameters: torch.optim.Adam(parameters, lr=0.01, betas=(0.8, 0.95)),
        ),
    ],
    ids=["descent", "adam"],
)
def test_the_same_losses_as_torch_optim(ours, theirs) -> None:
    model, reference = net(), net()
    optimiser, other = ours(model), theirs(reference.parameters())
    found = losses(model, optimiser.gradients.zero_, lambda: optimiser.step(0.01))
    assert found == pytest.approx(losses(reference, other.zero_grad, other.step), rel=1e-12)
    assert found[-1] < found[0]


def test_flattening_changes_no_value_and_leaves_views() -> None:
    model, before = net(), [parameter.clone() for parameter in net().parameters()]
    values, gradients = flatten(model)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
    values.fill_(2)
    gradients.fill_(3)
    assert all(parameter.eq(2).all() and parameter.grad.eq(3).all() for parameter in model.parameters())
