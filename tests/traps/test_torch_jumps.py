"""A model that jumps: where one rounding of its inputs moves its outputs far, rounding alone may move them as far."""

import copy

import pytest
import torch
from torch import nn

import bnfold
from tests.torch_models import randomise


class Jumps(nn.Module):
    """Adds `height` wherever the first channel is no multiple of 1/8, as a hard attention turns on a near-tie."""

    def __init__(self, height: float):
        super().__init__()
        self.conv, self.bn, self.height = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), height

    def forward(self, x):
        return self.bn(self.conv(x)) + self.height * ((x[:, :1] * 8) % 1 != 0)


def verify_a_slightly_wrong_fold(height: float) -> None:
    torch.manual_seed(0)
    model = randomise(Jumps(height))
    inputs = torch.randint(-16, 16, (8, 4, 16)) / 8
    folded, report = bnfold.fold(copy.deepcopy(model), inputs)
    assert [verdict.outcome for verdict in report.verdicts] == ["folded"]
    with torch.no_grad():
        folded.conv.weight *= 1 + 1e-4
    bnfold.verify(model, folded, inputs)


def test_a_model_that_one_rounding_moves_is_given_that_much():
    verify_a_slightly_wrong_fold(height=1.0)


def test_a_model_that_one_rounding_does_not_move_is_given_nothing():
    with pytest.raises(bnfold.NotEquivalent, match="differ in float64"):
        verify_a_slightly_wrong_fold(height=0.0)
