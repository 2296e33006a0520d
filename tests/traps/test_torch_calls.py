"""Code that does not always run alike: calls that differ from one another, and passes that leave something behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnfold.torch import fold
from tests.torch_models import agree, check, randomise

IMAGES = torch.randn(2, 3, 6, 6)


class Centred(nn.Module):
    """A hand-written BatchNorm that does something else with small images."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.randn(channels))

    def forward(self, x):
        y = (x - self.mean.view(1, -1, 1, 1)) * 3
        return y.abs() if x.shape[-1] == 2 else y


class Activated(nn.BatchNorm2d):
    """A BatchNorm whose activation is another one with small images."""

    def forward(self, x):
        y = super().forward(x)
        return torch.relu(y) if x.shape[-1] > 2 else torch.tanh(y)


class Scaled(nn.BatchNorm2d):
    """A BatchNorm with a setting."""

    def forward(self, x, k=1.0):
        return super().forward(x) * k


class Net(nn.Module):
    """Two convolutions, a BatchNorm, a block, and a forward that a test gives."""

    def __init__(self, forward, bn=None):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.bn = bn or nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.register_buffer("count", torch.zeros(1))
        self.turn, self.grid, self.run = 0, None, forward

    def forward(self, x):
        return self.run(self, x)


def twice(net, x):
    return net.block(
        net.bn(net.conv(x)).sum((2, 3), keepdim=True)
        + net.bn(net.conv2(x[..., :2])).sum((2, 3), keepdim=True)
    )


@pytest.mark.parametrize("kind", [Centred, Activated])
def test_two_calls_of_a_batchnorm_that_do_not_do_the_same(kind):
    net = randomise(Net(twice, kind(4)))
    _, report = check(net, IMAGES, kept=["bn"], folded=["block.1"], randomised=True)
    assert "does not do the same each time" in report.verdicts[0].reason


def test_a_batchnorm_with_a_setting():
    net = Net(lambda net, x: net.block(net.bn(net.conv(x), 2.0)), Scaled(4))
    check(net, IMAGES, kept=["bn"], folded=["block.1"], because="more than one argument")


def test_a_functional_call_does_not_keep_others_from_folding():
    net = Net(lambda net, x: net.block(F.batch_norm(net.conv(x), net.bn.running_mean, net.bn.running_var)))
    check(net, IMAGES, kept=["bn"], folded=["block.1"])


def taking_turns(net, x):
    net.turn = 1 - net.turn
    return net.block(net.bn(net.conv(x)) if net.turn else net.bn(net.conv2(x)))


def taking_turns_by_a_buffer(net, x):
    net.count.add_(1)
    return net.block(net.bn(net.conv(x) if net.count % 2 == 1 else net.conv2(x)))


def swapping_modules(net, x):
    net.conv, net.conv2 = net.conv2, net.conv
    return net.block(net.bn(net.conv(x)))


@pytest.mark.parametrize("forward", [taking_turns, taking_turns_by_a_buffer, swapping_modules])
def test_a_pass_that_decides_what_the_next_one_does(forward):
    net = Net(forward)
    after, _ = check(net, IMAGES, kept=["bn"], folded=["block.1"])
    for turn in range(2):
        net.turn = after.turn = turn
        agree(net, after, IMAGES.double())
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(net(IMAGES.double()), after(IMAGES.double()), rtol=1e-12)


def caching_a_grid(net, x):
    if net.grid is None:
        net.grid = torch.arange(x.shape[-1]).to(x)
    return net.block(net.bn(net.conv(x)) + net.grid)


def counting_calls(net, x):
    net.turn += 1
    net.count.add_(1)
    return net.block(net.bn(net.conv(x)))


@pytest.mark.parametrize("forward", [caching_a_grid, counting_calls])
def test_what_a_first_pass_leaves_behind_is_no_obstacle_where_nothing_depends_on_it(forward):
    check(Net(forward), IMAGES, folded=["bn", "block.1"])


def test_inputs_of_different_leading_sizes_are_stretched_apart():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4)

        def forward(self, x, y):
            return self.bn(self.conv(x).reshape(1, 4, -1)).mean() + y.sum()

    check(Pair(), (torch.randn(1, 3, 4, 4), torch.randn(5)), kept=["bn"])


def test_a_batchnorm_on_sequences_and_on_rows_leaves_what_fits_both():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)

        def forward(self, x):
            y = self.conv(x).tanh()
            return self.bn(y), self.bn(y.mean(2))

    model, x = randomise(Pair()).double(), torch.randn(4, 3, 5).double()
    after, report = fold(model, x, lower=True)
    assert report.verified
    assert not isinstance(after.bn, nn.BatchNorm1d)
    agree(model, after, x)


def test_one_batchnorm_is_a_model_with_one_verdict():
    _, report = check(nn.BatchNorm2d(3), IMAGES, kept=["BatchNorm2d"], because="the whole model")
    assert len(report.verdicts) == 1


LOOKS = {
    "parameters": lambda net: sum(p.pow(2).sum() for p in net.bn.parameters()),
    "state dict": lambda net: net.state_dict()["bn.running_mean"].sum(),
    "buffers": lambda net: net.bn._buffers["running_var"].sum(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_numbers_of_a_batchnorm_that_other_code_finds_by_itself(look):
    def parallel(net, x):
        return net.block(net.bn(net.conv(x))) + look(net)

    def returned(net, x):
        return net.block(net.bn(net.conv(x))), look(net)

    for forward in (parallel, returned):
        _, report = check(Net(forward), IMAGES, kept=["bn"], folded=["block.1"])
        assert "its numbers are used by" in report.verdicts[0].reason


def test_a_part_that_computes_in_bfloat16_is_held_to_its_roundoff():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(self.bn(x.bfloat16()).float())

    _, report = fold(randomise(Narrow()), IMAGES)
    assert [verdict.outcome for verdict in report.verdicts] == ["scale folded"]
    assert report.evidence[-1].question == "bfloat16"


class LastAxis(nn.BatchNorm1d):
    """A BatchNorm for channels at the end."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_what_lives_on_only_as_the_base_of_a_view_is_not_kept_by_anybody():
    check(nn.Sequential(nn.Linear(4, 5), LastAxis(5)), torch.randn(3, 6, 4), folded=["1"])


def test_what_somebody_keeps_and_views_is_kept():
    class Keeping(LastAxis):
        def forward(self, x):
            self.cache = nn.BatchNorm1d.forward(self, x.transpose(1, 2))
            return self.cache.transpose(1, 2)

    check(nn.Sequential(nn.Linear(4, 5), Keeping(5)), torch.randn(3, 6, 4), kept=["1"])


def test_example_inputs_that_ask_for_a_gradient():
    net = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    _, report = fold(net, torch.randn(2, 3, 4, 4, requires_grad=True))
    assert report.count("folded") == 1


def test_the_kernel_of_a_batchnorm_called_by_its_own_name():
    class Native(nn.BatchNorm2d):
        def forward(self, x):
            numbers = (self.weight, self.bias, self.running_mean, self.running_var)
            return torch.native_batch_norm(x, *numbers, False, 0.1, self.eps)[0]

    check(Net(lambda net, x: net.block(net.bn(net.conv(x))), Native(4)), IMAGES, folded=["bn", "block.1"])


def chosen_by_class(net, x):
    y = net.bn(net.conv(x))
    return net.block(y.relu() if isinstance(net.bn, nn.BatchNorm2d) else y.tanh())


def passed_on_by_class(net, x):
    y = net.bn(net.conv(x))
    one, other = y.relu(), y.tanh()
    return net.block(one if isinstance(net.bn, nn.BatchNorm2d) else other) + one + other


def set_by_class(net, x):
    return net.block(F.leaky_relu(net.bn(net.conv(x)), 0.1 if isinstance(net.bn, nn.BatchNorm2d) else 0.5))


@pytest.mark.parametrize("forward", [chosen_by_class, passed_on_by_class, set_by_class])
def test_code_that_runs_otherwise_without_the_batchnorm(forward):
    check(Net(forward), IMAGES, kept=["bn"], folded=["block.1"], because="looks at it otherwise")


@pytest.mark.parametrize("pre", [True, False])
def test_a_batchnorm_whose_hook_computes_takes_another_one_in_without_computing_twice(pre):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Tanh())
    model(torch.randn(8, 4, 6) + 1)
    if pre:
        model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    else:
        model[0].register_forward_hook(lambda module, args, result: result * 2.0)
    folded, _ = fold(model.eval(), torch.randn(2, 4, 6), verify=False)
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)
