"""A size that depends on numbers is no branch: what stands beside a selection folds, and nothing rests on that size.

Each case is judged from outside: folded with verification off, then both modules in float64 on other inputs.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bnfold
from tests.torch_models import randomise

SELECTIONS = {
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0).sum(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x[:, 0] > 0)[0],
    "unique": lambda x: x.round().unique(),
    "bincount": lambda x: torch.bincount((x[:, 0] > 0).long(), minlength=2),
    "repeat_interleave": lambda x: x.repeat_interleave((x[:, 0] > 0).long() + 1, 0),
    "one_hot": lambda x: nn.functional.one_hot((x[:, 0] > 0).long(), 2),
}


class Net(nn.Module):
    """Two linear layers and a BatchNorm, in a forward that a test gives."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def rows(seed, positive):
    """Eight rows, the first numbers of so many of which are positive."""
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(8) < positive, 1.0, -1.0)
    return x


def fold(forward, positive=5):
    """The net in float64, and what becomes of it; the outcome of its BatchNorm."""
    model = randomise(Net(forward)).eval().double()
    folded, report = bnfold.fold(model, (rows(0, positive).double(),), verify=False)
    return model, folded, report.verdicts[0]


def deviation(model, folded):
    worst = 0.0
    for seed, positive in enumerate((0, 1, 2, 5, 8)):
        x = rows(seed, positive).double()
        with torch.no_grad():
            old, new = model(x), copy.deepcopy(folded)(x)
        for before, after in zip(*((y if isinstance(y, tuple) else (y,)) for y in (old, new)), strict=True):
            assert before.shape == after.shape
            if before.numel():
                scale = float(before.double().abs().max()) or 1.0
                worst = max(worst, float((before.double() - after.double()).abs().max()) / scale)
    return worst


@pytest.mark.parametrize("name", SELECTIONS)
def test_what_stands_beside_a_selection_folds(name):
    def forward(net, x):
        selected = SELECTIONS[name](x)
        return net.b(torch.relu(net.bn(net.a(x)))), selected

    model, folded, verdict = fold(forward)
    assert verdict.outcome == "folded"
    assert deviation(model, folded) < 1e-12


def test_selected_rows_go_through_a_linear_layer_and_its_batchnorm_that_fold():
    model, folded, verdict = fold(lambda net, x: net.b(torch.relu(net.bn(net.a(x[x[:, 0] > 0])))))
    assert verdict.outcome == "folded"
    assert deviation(model, folded) < 1e-12


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.b(net.bn(net.a(x)) if len(x[x[:, 0] > 0]) > 4 else net.a(x)),
        lambda net, x: net.b(net.bn(net.a(x)) if x.nonzero().shape[0] > 32 else net.a(x)),
        lambda net, x: net.b(sum([net.bn(net.a(x)) for _ in x[x[:, 0] > 0]], start=net.a(x))),
        lambda net, x: net.b(net.bn(net.a(x)) if len(x[x[:, 0] > 0].split(2)) > 2 else net.a(x)),
        lambda net, x: net.b(net.bn(net.a(x[x[:, 0] > 0])).sum(0)),
        lambda net, x: net.b(net.bn(net.a(x[x[:, 0] > 0]).sum(0, keepdim=True))),
        lambda net, x: net.b(net.a(x[x[:, 0] > 0]).sum(0, keepdim=True) + net.bn(net.a(x))),
        lambda net, x: net.b(net.bn(net.a(x[x[:, 0] > 0])).mean(0, keepdim=True) + x),
    ],
)
@pytest.mark.parametrize("positive", [1, 5])
def test_nothing_rests_on_a_size_that_numbers_decide(forward, positive):
    model, folded, _ = fold(forward, positive)
    assert deviation(model, folded) < 1e-12
