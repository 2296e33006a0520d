"""Code that looks at a module otherwise than by calling it: what folding changes there is found beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.torch_models import check

IMAGES = torch.randn(2, 3, 6, 6)


class Net(nn.Module):
    def __init__(self, forward, bias=False):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.run = forward

    def forward(self, x):
        return self.bn2(self.conv2(self.run(self, x).relu()))


def by_class(net, x):
    for layer in (net.conv, net.bn):
        x = layer(x)
        if isinstance(layer, nn.BatchNorm2d):
            x = x.sigmoid()
    return x


def by_setting(net, x):
    return net.bn(net.conv(x)) * net.bn.num_features


def by_parameters(net, x):
    return net.bn(net.conv(x)) + sum(p.sum() for p in net.bn.parameters())


def by_state(net, x):
    return net.bn(net.conv(x)) + net.state_dict()["bn.running_mean"].sum()


@pytest.mark.parametrize("forward", [by_class, by_setting, by_parameters, by_state], ids=lambda f: f.__name__)
def test_a_batchnorm_that_code_looks_at_stays_and_the_other_one_goes(forward):
    check(Net(forward), IMAGES, folded=["bn2"], kept=["bn"])


def test_a_bias_that_code_looks_at_is_not_written():
    def forward(net, x):
        y = net.bn(net.conv(x))
        return y * 2 if net.conv.bias is None else y

    check(Net(forward), IMAGES, folded=["bn2"], half=["bn"], because="where there is a bias")
    check(Net(forward, bias=True), IMAGES, folded=["bn", "bn2"])


class Looks(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if self.bias is None else y


def test_a_convolution_that_looks_at_its_own_bias_gets_none():
    model = nn.Sequential(Looks(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    check(model, IMAGES, half=["1"])


class Scratch(nn.Module):
    """As in the lecture: a linear layer written by hand."""

    def __init__(self, given, made, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(given, made) / given**0.5)
        self.bias = nn.Parameter(torch.zeros(made)) if bias else None

    def forward(self, x):
        out = x @ self.weight
        if self.bias is not None:
            out += self.bias
        return out


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_written_by_hand_takes_a_bias(bias):
    after, _ = check(nn.Sequential(Scratch(3, 4, bias), nn.BatchNorm1d(4)), torch.randn(5, 3), folded=["1"])
    assert isinstance(after[0].bias, nn.Parameter)


def test_what_a_first_pass_leaves_in_a_cache_is_no_difference():
    from functools import lru_cache

    @lru_cache
    def positions(size):
        return torch.arange(size, dtype=torch.float64).cos() + 1

    check(Net(lambda net, x: net.bn(net.conv(x + positions(x.shape[-1])))), IMAGES, folded=["bn", "bn2"])
