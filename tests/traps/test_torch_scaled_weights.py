"""Weights that a module's code multiplies by constants on every pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.torch_models import check

IMAGES = torch.randn(2, 3, 6, 6)
WHITE = torch.randn(4, 6)


class Between(nn.Module):
    """BatchNorm, a convolution whose weight is computed by `weigh` and its bias by `shift`, BatchNorm."""

    def __init__(self, weigh, shift=lambda net: net.bias, **more):
        super().__init__()
        self.first, self.bn = nn.BatchNorm2d(3), nn.BatchNorm2d(8)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))
        self.register_buffer("mask", (torch.rand(8, 3, 3, 3) > 0.5).double())
        self.register_buffer("rows", torch.rand(8, 1, 1, 1) - 0.5)
        for name, thing in more.items():
            setattr(self, name, thing)
        self.weigh, self.shift = weigh, shift

    def forward(self, x):
        return self.bn(F.conv2d(self.first(x), self.weigh(self), self.shift(self)))


SCALED = {
    "equalised": lambda net: net.weight * 0.3,
    "on the left": lambda net: 0.3 * net.weight,
    "pruned": lambda net: net.weight * net.mask,
    "pruned, the mask first": lambda net: net.mask * net.weight,
    "by rows": lambda net: net.weight * net.rows,
    "divided": lambda net: net.weight / 3,
    "negated": lambda net: -net.weight,
    "twice": lambda net: (net.weight * net.mask).contiguous() * net.rows.exp(),
    "by nothing": lambda net: net.weight * 0.0,
}


@pytest.mark.parametrize("form", SCALED)
def test_a_weight_scaled_by_constants_takes_affines_from_both_sides(form):
    folded, _ = check(Between(SCALED[form]), IMAGES, folded=["first", "bn"])
    assert isinstance(folded.bn, nn.Identity)


def test_a_scaled_bias_is_divided_by_its_constant():
    check(Between(lambda net: net.weight * 0.3, lambda net: net.bias * 0.01), IMAGES, folded=["first", "bn"])


def test_a_bias_scaled_by_zero_somewhere_stays():
    model = Between(lambda net: net.weight, lambda net: net.bias * torch.arange(8.0).double())
    check(model, IMAGES, kept=["first", "bn"], because="its bias is computed while the model runs")


@pytest.mark.parametrize(
    "weigh",
    [
        lambda net: (
            (net.weight - net.weight.mean((1, 2, 3), keepdim=True)) / net.weight.std((1, 2, 3), keepdim=True)
        ),
        lambda net: net.weight * net.weight.abs().mean(),
        lambda net: net.weight / net.weight.norm(),
        lambda net: 1 / net.weight,
        lambda net: net.weight.clamp(-1, 1),
        lambda net: net.weight + net.mask,
    ],
)
def test_a_weight_that_is_not_its_parameter_times_constants_stays(weigh):
    check(Between(weigh), IMAGES, kept=["first", "bn"], because="its weight is computed while the model runs")


class Linears(nn.Module):
    """Two products with one stored matrix, or with two that scale one another."""

    def __init__(self, first, second):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
        self.bias, self.one, self.two = nn.Parameter(torch.randn(6)), nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.register_buffer("rows", torch.rand(6) + 0.5)
        self.first, self.second = first, second

    def forward(self, x):
        y = F.relu(self.one(F.linear(x, self.first(self), self.bias.clone())))
        return self.two(F.linear(y, self.second(self)))


def test_a_parameter_that_scales_another_one_stays():
    model = Linears(lambda net: net.a * net.b, lambda net: net.b * net.a)
    check(model, WHITE, kept=["one", "two"], because="as well")


def test_a_parameter_that_is_scaled_in_two_ways_stays():
    model = Linears(lambda net: net.a * 2, lambda net: net.a * 3)
    check(model, WHITE, kept=["one", "two"], because="in another way")


def test_a_matrix_is_scaled_before_and_after_it_is_transposed():
    def weigh(net):
        return ((net.a * net.rows).t() * net.rows / 2).contiguous()

    check(Linears(weigh, lambda net: net.b), WHITE, folded=["one"], half=["two"])


class BySize(nn.Module):
    """As attention divides by a size; below a BatchNorm the bias would depend on it."""

    def __init__(self, *below):
        super().__init__()
        self.below, self.bn = nn.Sequential(*below), nn.BatchNorm1d(8)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 3, 1)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.bn(F.conv1d(self.below(x), self.weight * (1 / x.shape[-1]), self.bias))


def test_a_weight_that_is_scaled_by_a_size_of_the_input_stays():
    check(BySize(), torch.randn(2, 3, 7), kept=["bn"], because="(conv1d) is not linear")
    check(
        BySize(nn.BatchNorm1d(3)),
        torch.randn(2, 3, 7),
        kept=["below.0", "bn"],
        because="(conv1d) is not linear",
    )


class WithoutBias(nn.Module):
    """A module with a place for a bias that its code passes on, or not."""

    def __init__(self, passes):
        super().__init__()
        self.weight, self.bias, self.passes = nn.Parameter(torch.randn(8, 3, 3, 3)), None, passes

    def forward(self, x):
        return F.conv2d(x, self.weight * 0.5, self.bias if self.passes else None)


def test_a_bias_goes_only_where_the_code_of_a_scaled_weight_passes_it_on():
    check(nn.Sequential(WithoutBias(True), nn.BatchNorm2d(8)), IMAGES, folded=["1"])
    check(nn.Sequential(WithoutBias(False), nn.BatchNorm2d(8)), IMAGES, half=["1"])


class Equalised(nn.Linear):
    """As in StyleGAN 2."""

    def forward(self, x):
        return F.linear(x, self.weight * 0.3, self.bias * 0.1)


def test_scaled_layers_are_merged_as_what_they_compute():
    model = nn.Sequential(Equalised(6, 5), nn.BatchNorm1d(5), Equalised(5, 4), nn.BatchNorm1d(4))
    check(model, WHITE, folded=["1", "3"])


def test_a_layer_beside_its_own_input_is_not_given_an_identity_that_its_constant_would_scale():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.bn = Equalised(6, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.layer(x) + self.bn(x)

    check(Beside(), WHITE, kept=["bn"])
