"""The numbers that make the lines of a formula compute something else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bnfold.algebra import Affine
from bnfold.errors import Refuse
from bnfold.torch.read import read


class Written(nn.Module):
    """The formula, with a gain and a bias or without."""

    def __init__(self, gain=True, bias=True):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(5) + 0.5) if gain else None
        self.bias = nn.Parameter(torch.randn(5)) if bias else None
        self.register_buffer("mean", torch.randn(5))
        self.register_buffer("var", torch.rand(5) + 0.5)
        self.first = nn.Linear(3, 5)

    def forward(self, x):
        h = (self.first(x) - self.mean) / torch.sqrt(self.var + 1e-3)
        h = h if self.gain is None else h * self.gain
        return torch.tanh(h if self.bias is None else h + self.bias)


def solve(model, affine):
    """The module with the numbers that are found for an affine."""
    model.double()
    (place,) = read(model, torch.randn(2, 3).double()).formulas.values()
    for slot, array in place.solve(affine).items():
        getattr(model, slot.attribute).data = torch.from_numpy(array)
    model.first = nn.Identity()
    return model


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_lines_can_be_made_any_positive_affine_with_whatever_numbers_they_have(gain, bias):
    scale, shift = np.random.default_rng(1).uniform(0.5, 2, (2, 1, 5))
    model, values = solve(Written(gain, bias), Affine(scale, shift)), torch.randn(4, 5).double()
    wanted = torch.tanh(values * torch.from_numpy(scale) + torch.from_numpy(shift))
    assert torch.allclose(model(values), wanted, rtol=0, atol=1e-13)


def test_a_variance_is_left_alone_where_only_a_negative_one_would_do():
    with pytest.raises(Refuse, match="no numbers in its lines"):
        solve(Written(gain=False), Affine(np.full((1, 5), -2.0), np.zeros((1, 5))))


def test_an_affine_that_varies_along_another_axis_is_refused():
    with pytest.raises(Refuse, match="no numbers in its lines"):
        solve(Written(), Affine(np.ones((2, 1)), np.array([[1.0], [2.0]])))
