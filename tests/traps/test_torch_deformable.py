"""Deformable convolutions of torchvision, where that is installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.torch_models import check

operators = pytest.importorskip("torchvision.ops")

IMAGES = torch.randn(2, 4, 7, 7)


class Deformable(nn.Module):
    """Taps are moved, and weighted or not, by what is computed from the image itself."""

    def __init__(self, before=False, masked=True, **settings):
        super().__init__()
        self.moves = nn.Conv2d(4, 18, 3, padding=1)
        self.mask = nn.Conv2d(4, 9, 3, padding=1) if masked else None
        self.conv = operators.DeformConv2d(4, 8, 3, padding=1, **settings)
        self.first = nn.BatchNorm2d(4) if before else None
        self.last = nn.BatchNorm2d(8)

    def forward(self, x):
        mask = None if self.mask is None else torch.sigmoid(self.mask(x))
        h = x if self.first is None else self.first(x)
        return torch.relu(self.last(self.conv(h, self.moves(x), mask)))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"groups": 2}], ids=str)
def test_what_comes_after_a_deformable_convolution_goes_into_it(settings, masked):
    _, report = check(Deformable(masked=masked, **settings), IMAGES, folded=["last"])
    assert report.verdicts[0].into == ("conv",)


def test_what_comes_before_a_deformable_convolution_leaves_its_shift():
    check(Deformable(before=True), IMAGES, folded=["last"], half=["first"])
