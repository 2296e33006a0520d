"""Weights that a module's code multiplies by constants on every pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnfold.torch import fold, load_folded
from tests.torch_models import agree, check, randomise

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


class Standardised(nn.Conv2d):
    """A convolution whose code standardises its weight on every pass, and applies an activation or none."""

    def __init__(self, *sizes, after=None, **settings):
        super().__init__(*sizes, **settings)
        self.after = after

    def forward(self, x):
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = centred / (centred.std((1, 2, 3), keepdim=True) + 1e-5)
        y = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return y if self.after is None else self.after(y)


class Cosine(nn.Module):
    """A matrix of rows of length one."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return F.linear(x, F.normalize(self.rows, dim=1))


@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": False}, {"padding": 1, "stride": 2}, {"groups": 2, "dilation": 2}, {"padding": (1, 0)}],
    ids=str,
)
def test_a_module_that_computes_its_weight_becomes_the_convolution_that_it_is(settings):
    model = nn.Sequential(Standardised(4, 6, 3, **settings), nn.BatchNorm2d(6), nn.ReLU())
    after, report = check(model, torch.randn(2, 4, 7, 7), folded=["1"])
    assert report.verdicts[0].into == ("0",)
    assert [name for name in after.state_dict() if name.startswith("0.")] == [
        "0.merged.weight",
        "0.merged.bias",
    ]


def test_a_matrix_that_is_normalised_takes_what_comes_before_it_and_after_it():
    check(
        nn.Sequential(nn.BatchNorm1d(3), Cosine(), nn.BatchNorm1d(5), nn.Tanh()),
        torch.randn(4, 3),
        folded=["0", "2"],
    )


def test_an_activation_behind_a_computed_weight_stays_in_its_place():
    model = nn.Sequential(nn.BatchNorm2d(4), Standardised(4, 6, 3, after=nn.SiLU()))
    after, _ = check(model, torch.randn(2, 4, 7, 7), folded=["0"])
    assert isinstance(after[1].after, nn.SiLU)


def test_a_weight_that_is_computed_in_the_middle_of_other_code_stays_with_the_way_out():
    class Inline(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.norm = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.BatchNorm2d(6)

        def forward(self, x):
            return torch.relu(self.norm(F.conv2d(x, self.weight / self.weight.norm())))

    check(
        Inline(), torch.randn(2, 4, 7, 7), kept=["norm"], because="no module does that alone; make one of it"
    )


def test_a_module_that_computes_its_weight_and_is_called_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = Standardised(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.relu(self.norm(self.conv(torch.tanh(self.conv(x)))))

    check(Twice(), torch.randn(2, 4, 7, 7), kept=["norm"], because="is called 2 times")


def test_a_weight_that_two_modules_compute_from_one_parameter_stays_one_for_the_other():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.raw, self.own = nn.Conv2d(4, 4, 3), Standardised(4, 4, 3)
            self.own.weight = self.raw.weight
            self.first, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.relu(self.first(self.raw(x))) + torch.relu(self.last(self.own(x)))

    check(Tied(), torch.randn(2, 4, 7, 7), folded=["last"], kept=["first"])


def test_two_modules_that_compute_their_weights_from_one_parameter_both_fold_and_come_back_from_a_state_dict():
    def build():
        model = nn.Sequential(
            Standardised(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Standardised(4, 4, 3), nn.BatchNorm2d(4)
        )
        model[3].weight = model[0].weight
        return model.double()

    model, images = randomise(build()), torch.randn(2, 4, 7, 7).double()
    after, report = fold(model, images)
    assert report.count("folded") == 2
    agree(model, after, images)
    agree(model, load_folded(build().eval(), images, after.state_dict()), images)


def test_what_becomes_of_a_module_that_computes_its_weight_comes_back_from_a_state_dict():
    def build():
        first = nn.Sequential(Standardised(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        return nn.Sequential(first, Standardised(6, 6, 3)).double()

    model, images = randomise(build()), torch.randn(2, 4, 7, 7).double()
    after, report = fold(model, images)
    assert report.count("folded") == 1
    agree(model, load_folded(build().eval(), images, after.state_dict()), images)
    with pytest.raises(RuntimeError, match="merged"):
        build().load_state_dict(after.state_dict())
