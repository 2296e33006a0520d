"""Einsum, and matrices that work along another axis than the channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.torch_models import check

SEQUENCES = torch.randn(2, 6, 5)


class Contraction(nn.Module):
    """BatchNorm, an einsum with one parameter, an addition or none, BatchNorm."""

    def __init__(self, equation, shape, channels, adds=False):
        super().__init__()
        self.weight, self.equation = nn.Parameter(torch.randn(shape)), equation
        self.first, self.last = nn.BatchNorm1d(6), nn.BatchNorm1d(channels)
        self.bias = nn.Parameter(torch.randn(channels)) if adds else None

    def forward(self, x):
        operands = (self.first(x), self.weight)
        y = torch.einsum(self.equation, *(operands[::-1] if self.equation[:3] == "oc," else operands))
        return self.last(y if self.bias is None else y + self.bias)


@pytest.mark.parametrize(
    ("equation", "shape"),
    [("oc,bcn->bon", (7, 6)), ("bcn,co->bon", (6, 7)), ("bcn,oc->bon", (7, 6)), ("bc...,co->bo...", (6, 7))],
)
def test_an_einsum_by_a_matrix_takes_scales_and_leaves_one_addition(equation, shape):
    check(Contraction(equation, shape, 7), SEQUENCES, half=["first", "last"])


@pytest.mark.parametrize("equation", ["bi,io->bo", "bi,io", "...i,io->...o"])
def test_an_einsum_with_an_addition_is_a_linear_layer(equation):
    check(Contraction(equation, (6, 8), 8, adds=True), torch.randn(4, 6), folded=["first", "last"])


class Graphs(nn.Module):
    """As in ST-GCN: a convolution, a constant mixing of the vertices, BatchNorm, ReLU."""

    def __init__(self, mix, shape):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("graph", torch.rand(shape))
        self.importance, self.mix = nn.Parameter(torch.rand(shape)), mix

    def forward(self, x):
        return torch.relu(self.bn(self.mix(self.conv(x), self.graph * self.importance)))


VERTICES = torch.randn(2, 3, 6, 5)

MIXINGS = {
    "as a product": (lambda x, a: torch.einsum("nctv,vw->nctw", x, a), (5, 5)),
    "as a matmul": (lambda x, a: x @ a, (5, 5)),
    "with axes swapped": (lambda x, a: torch.einsum("nctv,vw->ntcw", x, a).transpose(1, 2), (5, 5)),
    "by several graphs": (lambda x, a: torch.einsum("nkctv,kvw->nctw", x.unflatten(1, (1, 4)), a), (1, 5, 5)),
}


@pytest.mark.parametrize("form", MIXINGS)
def test_a_scale_passes_a_mixing_of_positions_and_one_addition_stays(form):
    check(Graphs(*MIXINGS[form]), VERTICES, half=["bn"])


def test_a_mixing_of_positions_with_a_bias_lets_nothing_through():
    class Biased(Graphs):
        def forward(self, x):
            return self.bn(nn.functional.linear(self.conv(x), self.graph, self.shift))

    model = Biased(None, (5, 5))
    model.shift = nn.Parameter(torch.randn(5))
    check(model, VERTICES, kept=["bn"], because="varies along axis 1")


def test_a_matrix_that_has_taken_a_shift_lets_no_scale_by():
    """Along one axis the matrix absorbs a BatchNorm; through its new bias a scale along another axis would not go."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.along, self.across = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(5), nn.BatchNorm1d(4)
            self.mix = nn.Linear(5, 5, bias=False)

        def forward(self, x):
            y = self.mix(self.conv(x))
            return self.across(self.along(y.transpose(1, 2)).transpose(1, 2))

    check(Both(), torch.randn(2, 3, 5), folded=["along"], kept=["across"])


def test_an_einsum_that_repeats_an_axis_of_size_one_is_not_taken_for_a_matrix():
    """What comes in is summed over six channels, though the matrix has one row: a bias would take one shift of them."""

    class Repeats(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(1, 7)), nn.Parameter(torch.randn(7))
            self.bn = OneNumber()

        def forward(self, x):
            return torch.einsum("bi,io->bo", self.bn(x), self.weight) + self.bias

    check(Repeats(), torch.randn(4, 6), kept=["bn.bn"])


class OneNumber(nn.Module):
    """A BatchNorm of one channel, over all numbers of an example."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(1)

    def forward(self, x):
        return self.bn(x.unsqueeze(1)).squeeze(1)


def test_a_scale_goes_by_where_the_mixing_is_computed():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)

        def forward(self, x):
            weights = torch.einsum("bcn,bcm->bnm", x, x).softmax(-1)
            return self.bn(torch.einsum("bnm,bcm->bcn", weights, self.conv(x)))

    check(Attends(), torch.randn(2, 3, 5), half=["bn"])


class Form(nn.Module):
    """BatchNorms of both operands of a bilinear form, and one of what it gives."""

    def __init__(self, *norms, **settings):
        super().__init__()
        self.form, self.last = nn.Bilinear(4, 6, 5, **settings), nn.BatchNorm1d(5)
        self.left = nn.BatchNorm1d(4) if "left" in norms else nn.Identity()
        self.right = nn.BatchNorm1d(6) if "right" in norms else nn.Identity()

    def forward(self, x, y):
        return torch.tanh(self.last(self.form(self.left(x), self.right(y))))


PAIRS = (torch.randn(3, 4), torch.randn(3, 6))


@pytest.mark.parametrize("bias", [True, False])
def test_a_bilinear_form_absorbs_what_comes_after_it(bias):
    _, report = check(Form(bias=bias), PAIRS, folded=["last"])
    assert report.verdicts[0].into == ("form",)


def test_a_bilinear_form_takes_the_scale_of_its_first_operand_and_nothing_of_its_second():
    check(Form("left"), PAIRS, folded=["last"], half=["left"])
    _, report = check(Form("right"), PAIRS, folded=["last"], kept=["right"])
    assert "no other one" in report.verdicts[0].reason


def test_a_bilinear_form_of_one_value_absorbs_nothing_of_what_comes_in():
    class Square(Form):
        def forward(self, x):
            h = self.left(x)
            return torch.tanh(self.last(self.form(h, h)))

    model = Square("left")
    model.form = nn.Bilinear(4, 4, 5)
    check(model, torch.randn(3, 4), folded=["last"], kept=["left"])


def test_a_bilinear_form_over_several_axes_absorbs_along_the_last():
    class Sequences(Form):
        def forward(self, x, y):
            return torch.tanh(self.last(self.form(x, y).transpose(1, 2)))

    check(Sequences(), (torch.randn(3, 7, 4), torch.randn(3, 7, 6)), folded=["last"])


def test_a_parameter_that_is_added_after_a_reshape_is_the_bias_of_a_product():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            rows = x.flatten(0, 1) @ self.weight
            return torch.tanh(self.norm((rows.view(*x.shape[:2], 6) + self.bias).transpose(1, 2)))

    check(Product(), torch.randn(3, 7, 4), folded=["norm"])
