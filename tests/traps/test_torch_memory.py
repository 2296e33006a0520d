"""What lies in one memory once a BatchNorm is gone, and what a forward pass writes to: weights, inputs, itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.torch_models import check

IMAGES = torch.randn(2, 3, 6, 6)


class Net(nn.Module):
    """Three convolutions, a BatchNorm, and a forward that a test gives."""

    def __init__(self, forward, **held):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.conv3 = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
        self.run = forward
        for name, thing in held.items():
            setattr(self, name, thing)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def changed_after(net, x):
    y = net.conv(x).tanh()
    z = net.bn(y)
    y.mul_(3)
    return net.conv2(z) + net.conv3(y)


def changed_through_a_view_after(net, x):
    y = net.conv(x).tanh()
    z = net.bn(y)
    y.flatten(1).mul_(3)
    return net.conv2(z) + net.conv3(y)


def a_view_of_the_output_is_read(net, x):
    y = net.conv(x).tanh()
    z = net.bn(y).view(y.shape)
    y.clamp_(-0.1, 0.1)
    return net.conv2(z)


def two_in_a_row(net, x):
    y = net.conv(x).tanh()
    z = net.bn2(net.bn(y))
    y.mul_(3)
    return net.conv2(z) + net.conv3(y)


@pytest.mark.parametrize("forward", [changed_after, changed_through_a_view_after, a_view_of_the_output_is_read])
def test_an_input_that_changes_while_the_output_is_still_read(forward):
    check(Net(forward), IMAGES, kept=["bn"], because="changes its input in place")


def test_the_input_of_two_batchnorms_in_a_row_changes():
    _, report = check(Net(two_in_a_row, bn2=nn.BatchNorm2d(4)), IMAGES, kept=["bn"], folded=["bn2"])
    assert "changes its input in place" in report.verdicts[0].reason


def test_an_input_that_changes_when_the_output_was_read():
    def forward(net, x):
        y = net.conv(x).tanh()
        z = net.conv2(net.bn(y))
        y.mul_(3)
        return z + net.conv3(y)

    check(Net(forward), IMAGES, folded=["bn"])
