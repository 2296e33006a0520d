"""Which BatchNorms have to stay because memory is changed in place."""

from __future__ import annotations

import torch
from torch import nn

from bnfold.torch.read import read


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.bn, self.run = nn.BatchNorm1d(4), forward
        nn.init.normal_(self.bn.bias)

    def forward(self, x):
        return self.run(self, x)


def norm_of(forward):
    (norm,) = (n for n in nodes_of(forward) if n.op == "BatchNormalization")
    return norm


def nodes_of(forward):
    return read(Net(forward).eval(), torch.ones(2, 4)).graph.nodes


def test_nothing_that_is_changed_in_place_keeps_no_batchnorm():
    assert norm_of(lambda net, x: net.bn(x.exp()).relu()).reason == ""


def test_a_change_of_the_output_is_none_of_the_input_that_nobody_else_reads():
    norm = norm_of(lambda net, x: net.bn(x.exp()).relu_())
    assert norm.reason == ""
    assert norm.affine is not None


def test_a_change_of_the_output_lets_nothing_travel_down_while_the_input_is_read():
    def forward(net, x):
        y = x.exp()
        return net.bn(y).relu_() + y

    assert any(node.op.endswith(", in place") for node in nodes_of(forward))


def test_a_change_of_the_input_keeps_a_batchnorm_whose_output_is_read():
    def forward(net, x):
        y = x.exp()
        z = net.bn(y)
        return y.relu_() + z

    norm = norm_of(forward)
    assert norm.affine is None
    assert "changes its input in place" in norm.reason


def test_a_change_of_the_input_before_the_batchnorm_keeps_none():
    assert norm_of(lambda net, x: net.bn(x.exp().relu_())).reason == ""
