"""What a fold may not rest on, judged from outside: with verification off, both modules in float64, on other inputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnfold
from tests.torch_models import randomise

IMAGES = torch.randn(3, 3, 6, 6).double()


class Net(nn.Module):
    """A convolution, a BatchNorm, and a forward that a test gives."""

    def __init__(self, forward, conv=None):
        super().__init__()
        self.conv, self.bn = conv or nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.run, self.calls = forward, [0]

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def folded(model, *example):
    """A model in float64, and what becomes of it unverified."""
    model = randomise(model).eval().double()
    return model, bnfold.fold(model, example, verify=False)[0]


def deviation(model, other, *inputs):
    with torch.no_grad():
        old, new = (copy.deepcopy(each)(*inputs) for each in (model, other))
    old, new = (each if isinstance(each, tuple) else (each,) for each in (old, new))
    return max(float((a - b).detach().abs().max()) for a, b in zip(old, new, strict=True))


# ---------------------------------------------------------------- a new bias that the code does not take as it is


class Biased(nn.Conv2d):
    """A convolution whose code makes something of its bias, if there is one."""

    def __init__(self, rows, shift):
        super().__init__(3, 8, 3, bias=False)
        self.rows, self.shift = rows, shift

    def forward(self, x):
        return F.conv2d(x, self.weight[: self.rows], None if self.bias is None else self.shift(self.bias))


SHIFTS = {
    "other rows": (4, lambda bias: bias[4:]),
    "every second row": (4, lambda bias: bias[::2]),
    "in another order": (4, lambda bias: bias[:4].flip(0)),
    "twice": (4, lambda bias: bias[:4] * 2),
    "a view": (4, lambda bias: bias.view(2, 4)[1]),
    "all, in another order": (8, lambda bias: bias.flip(0)),
    "all, negated": (8, lambda bias: -bias),
    "nothing of it": (8, lambda bias: bias * 0),
}


@pytest.mark.parametrize("name", SHIFTS)
def test_a_new_bias_is_added_only_where_the_code_takes_it_as_it_is(name):
    rows, shift = SHIFTS[name]
    model, other = folded(nn.Sequential(Biased(rows, shift), nn.BatchNorm2d(rows)), IMAGES)
    assert deviation(model, other, torch.randn_like(IMAGES)) < 1e-12


def test_a_new_bias_is_added_where_the_code_takes_the_rows_of_the_weight():
    model, other = folded(nn.Sequential(Biased(4, lambda bias: bias[:4]), nn.BatchNorm2d(4)), IMAGES)
    assert isinstance(other[1], nn.Identity)
    assert deviation(model, other, torch.randn_like(IMAGES)) < 1e-12


class Sometimes(nn.Conv2d):
    """A convolution that passes its bias on where a flag, or the number of images, says so."""

    def __init__(self):
        super().__init__(3, 4, 3, bias=False)

    def forward(self, x, flag):
        return F.conv2d(x, self.weight, self.bias if flag else None)


@pytest.mark.parametrize(
    "ask", [lambda x, flag: flag, lambda x, flag: len(x) > 1, lambda x, flag: x.shape[2] % 2 == 0]
)
def test_no_bias_is_added_that_code_passes_on_for_some_inputs_only(ask):
    net = Net(lambda net, x, flag: net.bn(net.conv(x, ask(x, flag))), Sometimes())
    model, other = folded(net, IMAGES, True)
    assert deviation(model, other, IMAGES, False) < 1e-12
    assert deviation(model, other, IMAGES[:1, :, :5], True) < 1e-12


class Held(nn.Module):
    """A weight that its own code reads from another module, which holds it as well."""

    def __init__(self):
        super().__init__()
        self.weight, self.bn, self.other = (
            nn.Parameter(torch.randn(4, 3, 3, 3)),
            nn.BatchNorm2d(4),
            nn.Module(),
        )
        self.other.weight = self.weight

    def forward(self, x):
        return F.relu(self.bn(F.conv2d(x, self.other.weight)))


def test_a_weight_is_written_where_the_code_reads_it():
    model, other = folded(Held(), IMAGES)
    assert deviation(model, other, torch.randn_like(IMAGES)) < 1e-12


# ---------------------------------------------------------------- flags


def asks_for_the_norm(net, x, flag):
    y = net.bn(net.conv(x))
    return y * float(net.conv.weight.norm()) if flag else y


def returns_the_weight(net, x, flag):
    y = net.bn(net.conv(x))
    return (y, net.conv.weight) if flag else y


def returns_what_is_made_of_it(net, x, flag):
    y = net.bn(net.conv(x))
    return (y, net.conv.weight * 2) if flag else y


@pytest.mark.parametrize("use", [asks_for_the_norm, returns_the_weight, returns_what_is_made_of_it])
def test_a_flag_that_a_forward_only_passes_on_is_tried(use):
    model, other = folded(Net(use), IMAGES, False)
    assert deviation(model, other, IMAGES, True) < 1e-12


@pytest.mark.parametrize("given", [[False, 1], {"flag": False}])
def test_a_flag_in_a_container_is_tried(given):
    def forward(net, x, options):
        flag = options["flag"] if isinstance(options, dict) else options[0]
        return asks_for_the_norm(net, x, flag)

    model, other = folded(Net(forward), IMAGES, given)
    turned = {"flag": True} if isinstance(given, dict) else [True, 1]
    assert deviation(model, other, IMAGES, turned) < 1e-12


def test_a_parameter_that_is_returned_under_a_flag_stays():
    class Returning(Net):
        def forward(self, x, flag=False):
            return returns_the_weight(self, x, flag)

    model, other = folded(Returning(None), IMAGES)
    assert deviation(model, other, IMAGES, True) < 1e-12


# ---------------------------------------------------------------- what a pass leaves behind


class Standardised(nn.Conv2d):
    """A convolution by a weight that is centred and multiplied by the number of its calls."""

    def __init__(self):
        super().__init__(3, 4, 3)
        self.calls = [0]

    def forward(self, x):
        self.calls[0] += 1
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, centred * self.calls[0], self.bias)


def counts(net, x):
    net.calls[0] += 1
    return net.bn(net.conv(x) * net.calls[0])


def grows(net, x):
    net.calls.append(0)
    return net.bn(net.conv(x) * len(net.calls))


@pytest.mark.parametrize(
    "net", [Net(counts), Net(grows), Net(lambda net, x: net.bn(net.conv(x)), Standardised())]
)
def test_a_number_that_each_pass_changes_is_no_constant(net):
    model, other = map(copy.deepcopy, folded(net, IMAGES))
    with torch.no_grad():
        for _ in range(3):
            assert float((model(IMAGES) - other(IMAGES)).abs().max()) < 1e-10


# ---------------------------------------------------------------- numbers that leave tensors


@pytest.mark.parametrize("written", [repr, str, "{}".format, lambda x: f"{x}", lambda x: f"{x[0]}"])
def test_numbers_that_are_written_down_decide_a_branch(written):
    def forward(net, x):
        y = net.conv(x)
        return y if "-" in written(x.sum((1, 2, 3))) else net.bn(y)

    model, other = folded(Net(forward), IMAGES.abs())
    assert deviation(model, other, -IMAGES.abs()) < 1e-12


class Rows(nn.Module):
    """Rows that are chosen by their numbers, a linear layer, and a BatchNorm along another axis if they are four."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.bn(self.linear(x[x[:, 0] > 0].squeeze(0)[None]))


def test_nothing_rests_on_a_rank_that_numbers_decide():
    rows = torch.randn(6, 4).double().abs()
    one = torch.cat([rows[:1], -rows[1:]])
    model, other = folded(Rows(), one)
    assert deviation(model, other, rows[:4]) < 1e-12


class TwoUses(nn.Module):
    """A weight, or parts of one, in two convolutions; the bias of the first is read by other code, so that it stays."""

    def __init__(self, first, second):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(4))
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.first, self.second = first, second

    def forward(self, x):
        one = self.norms[0](F.conv2d(x, self.weight[self.first], self.bias))
        two = self.norms[1](F.conv2d(x, self.weight[self.second]))
        return one, torch.relu(two), self.bias.sum() * x.mean()


@pytest.mark.parametrize(
    ("first", "second", "goes"),
    [
        (slice(0, 4), slice(0, 4), False),
        (slice(0, 8, 2), slice(0, 4), False),
        (slice(0, 4), slice(3, 7), False),
        (slice(0, 4), slice(4, 8), True),
        (slice(0, 8, 2), slice(1, 8, 2), True),
    ],
)
def test_what_an_operator_that_stays_reads_is_written_by_no_other(first, second, goes):
    model = randomise(TwoUses(first, second)).eval().double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    new, report = bnfold.fold(model, (x,), verify=False)
    assert report.verdicts[0].outcome == "kept"
    assert (report.verdicts[1].outcome != "kept") == goes
    for before, after in zip(model(x), new(x), strict=True):
        torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-12)
