"""Sliding blocks: what a kernel sees at each place is data movement, but for the zeros that it pads with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.torch_models import check

IMAGES = torch.randn(2, 3, 6, 6)


class Patches(nn.Module):
    """As in a patch embedding: BatchNorm, blocks, a linear layer on each."""

    def __init__(self, **settings):
        super().__init__()
        self.bn, self.layer = nn.BatchNorm2d(3), nn.Linear(3 * 6, 5)
        self.unfold = nn.Unfold(kernel_size=(2, 3), **settings)

    def forward(self, x):
        return torch.relu(self.layer(self.unfold(self.bn(x)).transpose(1, 2)))


@pytest.mark.parametrize(
    "settings", [{}, {"stride": (2, 3)}, {"dilation": (2, 1)}, {"stride": 2, "dilation": 2}]
)
def test_a_batchnorm_before_sliding_blocks_goes_into_the_layer_behind_them(settings):
    check(Patches(**settings), IMAGES, folded=["bn"])


def test_zeros_around_sliding_blocks_let_no_shift_through():
    check(Patches(padding=(1, 0)), IMAGES, half=["bn"])


class Columns(nn.Module):
    """A convolution by hand, whose BatchNorm comes after the columns, or between the image and them."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4 * 4)

    def forward(self, x):
        return self.bn(F.unfold(self.conv(x), 2))


def test_a_batchnorm_that_tells_taps_apart_stays_behind_sliding_blocks():
    check(Columns(), IMAGES, kept=["bn"])


def test_a_batchnorm_that_tells_no_taps_apart_goes_up_through_sliding_blocks():
    model = Columns()
    model.bn = Repeated(4, 4)
    check(model, IMAGES, folded=["bn.bn"])


class Repeated(nn.Module):
    """One number per channel for all of its taps."""

    def __init__(self, channels, taps):
        super().__init__()
        self.bn, self.taps = nn.BatchNorm2d(channels), taps

    def forward(self, x):
        return self.bn(x.unflatten(1, (-1, self.taps))).flatten(1, 2)


class Windows(nn.Module):
    """`Tensor.unfold` along some axes, and a linear layer on each window."""

    def __init__(self, axes, step):
        super().__init__()
        self.axes, self.step = axes, step
        self.bn, self.layer = nn.BatchNorm2d(3), nn.Linear(3 * 2 ** len(axes), 5)

    def forward(self, x):
        h = self.bn(x)
        for axis in self.axes:
            h = h.unfold(axis, 2, self.step)
        h = h.movedim(1, 3).flatten(3)
        return torch.relu(self.layer(h))


@pytest.mark.parametrize("axes", [(2,), (3,), (-1,), (2, 3), (3, 2)])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_windows_of_a_tensor_are_data_movement(axes, step):
    check(Windows(axes, step), IMAGES, folded=["bn"])


def test_windows_that_overlap_let_no_batchnorm_up_that_differs_within_them():
    class Up(nn.Module):
        def __init__(self, step):
            super().__init__()
            self.layer, self.bn, self.step = nn.Linear(6, 6), nn.BatchNorm1d(2), step

        def forward(self, x):
            windows = self.layer(x).unfold(1, 2, self.step)
            return torch.tanh(self.bn(windows.flatten(0, 1)))

    check(Up(2), torch.randn(3, 6), folded=["bn"])
    check(Up(1), torch.randn(3, 6), kept=["bn"], because="repeats a channel that would have to differ")
