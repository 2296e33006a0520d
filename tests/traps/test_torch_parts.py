"""Weights and biases that are a part of a parameter: of slimmable nets, octave convolutions, matrices in a stack."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnfold
from bnfold.torch import load_folded
from tests.torch_models import agree, check, randomise

IMAGES = torch.randn(2, 3, 6, 6)
WHITE = torch.randn(4, 6)


class Part(nn.Module):
    """BatchNorm, a convolution by a part of a weight and of a bias, BatchNorm."""

    def __init__(self, weigh, shift):
        super().__init__()
        self.first, self.bn = nn.BatchNorm2d(3), nn.BatchNorm2d(8)
        self.weight, self.bias = nn.Parameter(torch.randn(11, 5, 3, 3)), nn.Parameter(torch.randn(11))
        self.stack = nn.Parameter(torch.randn(3, 8, 3, 3, 3))
        self.register_buffer("mask", (torch.rand(8, 3, 3, 3) > 0.5).double())
        self.weigh, self.shift = weigh, shift

    def forward(self, x):
        return self.bn(F.conv2d(self.first(x), self.weigh(self), self.shift(self)))


PARTS = {
    "first rows and columns": lambda weight: weight[:8, :3],
    "last ones": lambda weight: weight[-8:, -3:],
    "between": lambda weight: weight[1:9][:, 2:],
    "every second column": lambda weight: weight[:8, ::2],
    "split": lambda weight: weight.split([2, 8, 1])[1].split(3, 1)[0],
    "chunked": lambda weight: weight[:8].chunk(2, 1)[0],
    "narrowed": lambda weight: weight.narrow(0, 3, 8).narrow(1, 2, 3),
}


@pytest.mark.parametrize("form", PARTS)
def test_a_part_of_a_weight_takes_affines_from_both_sides_and_the_rest_stays(form):
    take = PARTS[form]
    model = Part(lambda net: take(net.weight), lambda net: net.bias[2:10])
    folded, _ = check(model, IMAGES, folded=["first", "bn"])
    assert isinstance(folded.bn, nn.Identity)
    assert folded.weight.requires_grad
    assert folded.weight.is_leaf
    places = take(torch.arange(model.weight.numel()).reshape(model.weight.shape)).flatten()
    same = (model.weight == folded.weight).flatten()
    assert not same[places].any()
    assert same.sum() == same.numel() - len(places)
    assert (model.bias == folded.bias).tolist() == [True] * 2 + [False] * 8 + [True]


@pytest.mark.parametrize("take", [lambda stack: stack[1], lambda stack: stack.unbind(0)[-2]])
def test_one_matrix_of_a_stack_is_a_place_of_its_own(take):
    folded, _ = check(
        Part(lambda net: take(net.stack), lambda net: net.bias[:8]), IMAGES, folded=["first", "bn"]
    )
    assert folded.stack.shape == (3, 8, 3, 3, 3)


def test_a_part_may_be_scaled_by_constants():
    model = Part(lambda net: net.weight[:8, :3] * net.mask * 0.3, lambda net: net.bias[:8] * 0.3)
    check(model, IMAGES, folded=["first", "bn"])


def test_a_part_of_a_product_stays():
    model = Part(lambda net: (net.weight * 0.3)[:8, :3], lambda net: net.bias[:8])
    check(model, IMAGES, kept=["first", "bn"], because="its weight is computed while the model runs")


class Two(nn.Module):
    """Two products by parts of one matrix, with a BatchNorm behind each."""

    def __init__(self, first, second, shifts=(lambda net: net.bias[:6], lambda net: net.bias[6:])):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(12))
        self.one, self.two = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.first, self.second, self.shifts = first, second, shifts

    def forward(self, x):
        y = F.relu(self.one(F.linear(x, self.first(self), self.shifts[0](self))))
        return self.two(F.linear(y, self.second(self), self.shifts[1](self)))


def test_two_parts_of_one_parameter_are_two_places():
    check(Two(lambda net: net.weight[:6], lambda net: net.weight[6:]), WHITE, folded=["one", "two"])


def test_parts_may_lie_between_one_another():
    shifts = (lambda net: net.bias[::2], lambda net: net.bias[1::2])
    model = Two(lambda net: net.weight[::2], lambda net: net.weight[1::2], shifts)
    check(model, WHITE, folded=["one", "two"])


def test_a_part_of_a_transposed_matrix_is_one_of_the_matrix():
    model = Two(lambda net: net.weight.t()[:, :6].t(), lambda net: net.weight[6:])
    check(model, WHITE, folded=["one", "two"])


@pytest.mark.parametrize("second", [lambda net: net.weight[5:11], lambda net: net.weight.t()[:, 5:11].t()])
def test_parts_that_overlap_stay(second):
    model = Two(lambda net: net.weight[:6], second)
    check(model, WHITE, kept=["one", "two"], because="in another way")


def test_parts_stay_whose_parameter_is_read_as_a_whole_too():
    class Penalised(Two):
        def forward(self, x):
            return super().forward(x), self.weight.square().sum() * x.sum()

    model = Penalised(lambda net: net.weight[:6], lambda net: net.weight[6:])
    check(model, WHITE, kept=["one", "two"], because="as well")


def test_two_parts_with_one_bias_stay():
    def shift(net):
        return net.bias[:6]

    model = Two(lambda net: net.weight[:6], lambda net: net.weight[6:], (shift, shift))
    check(model, WHITE, kept=["one", "two"], because="`bias[0:6]` is used in another way")


def test_one_part_that_is_used_twice_is_one_place():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(9, 6)), nn.Parameter(torch.randn(9))
            self.bn = nn.BatchNorm1d(6)

        def forward(self, x):
            return [self.bn(F.linear(each, self.weight[:6], self.bias[:6])) for each in (x, x.tanh())]

    check(Twice(), WHITE, folded=["bn"])


def test_a_part_that_a_size_of_the_input_picks_stays():
    """More columns would be read of a longer sequence, which are not scaled."""

    class BySize(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 9)), nn.Parameter(torch.randn(8))
            self.bn = nn.BatchNorm1d(8)

        def forward(self, x):
            mixed = F.linear(x, self.weight[:, : x.shape[-1]], self.bias)
            return self.bn(mixed.transpose(1, 2))

    check(BySize(), torch.randn(2, 5, 7), kept=["bn"], because="(linear) is not linear")


# ---------------------------------------------------------------- biases that are not there yet


class Octave(nn.Module):
    """A convolution into images of two sizes, by parts of one weight, as octave convolutions have it."""

    def __init__(self, passes=True):
        super().__init__()
        self.weight, self.bias, self.passes = nn.Parameter(torch.randn(7, 3, 3, 3)), None, passes

    def _bias(self, part):
        return self.bias[part] if self.passes and self.bias is not None else None

    def forward(self, x):
        small = F.avg_pool2d(x, 2)
        high = F.conv2d(x, self.weight[:4], self._bias(slice(0, 4)), padding=1)
        return high, F.conv2d(small, self.weight[4:], self._bias(slice(4, 7)), padding=1)


class OctaveNorm(nn.Module):
    def __init__(self, passes=True, both=True):
        super().__init__()
        self.conv, self.high, self.low = Octave(passes), nn.BatchNorm2d(4), nn.BatchNorm2d(3)
        self.both = both

    def forward(self, x):
        high, low = self.conv(x)
        return F.relu(self.high(high)), F.relu(self.low(low)) if self.both else low


def test_a_bias_is_added_for_all_parts_at_once_where_the_code_passes_it_on():
    folded, _ = check(OctaveNorm(), IMAGES, folded=["high", "low"])
    assert folded.conv.bias.shape == (7,)


def test_folded_weights_with_a_new_bias_of_parts_are_loaded():
    model = randomise(OctaveNorm().double())
    folded, _ = bnfold.fold(model, IMAGES.double())
    loaded = load_folded(OctaveNorm().double().eval(), IMAGES.double(), folded.state_dict())
    agree(folded, loaded, IMAGES.double())


def test_a_part_without_a_batchnorm_is_given_zeros():
    model = OctaveNorm(both=False)
    del model.low
    folded, _ = check(model, IMAGES, folded=["high"])
    assert torch.equal(folded.conv.bias[4:], torch.zeros(3, dtype=torch.float64))


def test_the_scale_goes_alone_where_the_code_passes_no_bias_on():
    check(OctaveNorm(passes=False), IMAGES, half=["high", "low"])


def test_the_scale_goes_alone_where_a_bias_would_be_that_of_two_parts():
    """As inside of octave convolutions: it would be added twice."""

    class Sum(Octave):
        def forward(self, x):
            first, rest = self.weight[:, :1], self.weight[:, 1:]
            bias = self._bias(slice(0, 7))
            return F.conv2d(x[:, :1], first, bias) + F.conv2d(x[:, 1:], rest, bias)

    model = nn.Sequential(Sum(), nn.BatchNorm2d(7), nn.ReLU())
    check(
        model, IMAGES, half=["1"], because="a bias of its module would be that of several parts of its weight"
    )


def test_a_slimmed_convolution_is_given_a_bias_of_its_whole_width():
    class Slim(nn.Conv2d):
        def forward(self, x):
            bias = None if self.bias is None else self.bias[:5]
            return F.conv2d(x, self.weight[:5, :3], bias)

    folded, _ = check(nn.Sequential(Slim(6, 8, 3, bias=False), nn.BatchNorm2d(5)), IMAGES, folded=["1"])
    assert folded[0].bias.shape == (8,)


def test_a_matrix_of_a_stack_that_a_number_of_the_input_picks_stays():
    """On other inputs it would be another one, which is not scaled."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack, self.bias = nn.Parameter(torch.randn(2, 5, 6)), nn.Parameter(torch.randn(2, 5))
            self.bn = nn.BatchNorm1d(5)

        def forward(self, x):
            expert = int(x.sum() > 0)
            return self.bn(F.linear(x, self.stack[expert], self.bias[expert]))

    check(Experts(), WHITE, kept=["bn"])
