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


@pytest.mark.parametrize(
    "forward", [changed_after, changed_through_a_view_after, a_view_of_the_output_is_read]
)
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


SUMS = {
    "0 + bn": lambda y: 0 + y,
    "bn * 1": lambda y: y * 1,
    "a clone": lambda y: y.clone(),
    "bn += 0": lambda y: y.add_(0),
    "contiguous": lambda y: y.contiguous(),
    "bn itself": lambda y: y,
}


@pytest.mark.parametrize("sums", SUMS)
def test_branches_added_in_place_to_a_batchnorm_or_to_a_copy_of_it(sums):
    """Without the BatchNorm the sum must not be made in the memory of what the other branch reads."""

    def forward(net, x):
        y = net.conv(x).relu()
        total = SUMS[sums](net.bn(y))
        total += net.same(y)
        return (total + y).relu()

    copied = list(SUMS).index(sums) < 3
    net = Net(forward, same=nn.Conv2d(4, 4, 3, padding=1))
    check(net, IMAGES, folded=["bn"] if copied else [], kept=[] if copied else ["bn"])


def weight_decays(net, x):
    net.conv3.weight.data.mul_(0.9)
    return net.conv3(net.bn(net.conv(x)))


def weight_is_clipped(net, x):
    with torch.no_grad():
        net.conv3.weight.clamp_(-0.1, 0.1)
    return net.conv3(net.bn(net.conv(x)))


def weight_is_replaced(net, x):
    net.conv3.weight.data = net.conv3.weight.data / net.conv3.weight.data.norm()
    return net.conv3(net.bn(net.conv(x)))


def attribute_grows(net, x):
    net.count.add_(1)
    return net.conv3(net.bn(net.conv(x))) * net.count


@pytest.mark.parametrize("forward", [weight_decays, weight_is_clipped, weight_is_replaced, attribute_grows])
def test_a_forward_pass_that_writes_to_its_own_tensors_leaves_no_trace(forward):
    net = Net(forward, count=torch.ones(1))
    check(net, IMAGES, folded=["bn"])
    assert net.count == 1


def test_rows_of_an_embedding_that_are_renormalised_when_read():
    net = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5))
    check(net, torch.randint(9, (6, 3)), folded=["3"])


@pytest.mark.parametrize(
    "change", [lambda x: x.mul_(2), lambda x: x.data.mul_(2), lambda x: x[:, :1].zero_()]
)
def test_example_inputs_are_left_alone(change):
    def forward(net, batch):
        change(batch["x"])
        return net.conv2(net.bn(net.conv(batch["x"])))

    images = IMAGES.double()
    before = images.clone()
    check(Net(forward), ({"x": images},), folded=["bn"])
    assert torch.equal(images, before)
