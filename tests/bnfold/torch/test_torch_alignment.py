"""What corresponds to what in two passes of one module, and where they part."""

from __future__ import annotations

import torch
from torch import nn

from bnfold.torch.alignment import Alignment
from bnfold.torch.passes import record_pass


class Net(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def align(forward, first=2, second=1, **layers):
    model = Net(forward, **({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)} | layers)).eval()
    passes = [record_pass(model, (torch.ones(batch, 4),), {}, False) for batch in (first, second)]
    return Alignment(*passes)


def test_a_pass_corresponds_to_itself():
    alignment = align(lambda net, x: net.b(net.a(x).relu()))
    assert len(alignment.calls) == 3
    assert not alignment.partings
    assert not alignment.apart


def test_a_call_that_is_left_out_parts_what_it_read_and_made():
    alignment = align(lambda net, x: net.b(net.a(x) if len(x) > 1 else x))
    assert {parting.value for parting in alignment.partings} == {"input", "v1"}
    assert not alignment.apart


def test_a_call_that_comes_in_uses_its_parameters_apart():
    alignment = align(lambda net, x: net.b(x) if len(x) > 1 else net.a(net.b(x)))
    assert set(alignment.apart) == {"a.weight", "a.bias"}
    assert alignment.partings


def test_what_is_returned_instead_of_something_else_parts():
    def forward(net, x):
        first, second = net.a(x), net.b(x)
        return first if len(x) > 1 else second

    assert len(align(forward).partings) == 2


def test_the_same_calls_on_each_others_values_part():
    def forward(net, x):
        first, second = x + 1, x + 2
        return net.a(first) + net.b(second) if len(x) > 1 else net.a(second) + net.b(first)

    assert len(align(forward).partings) == 2


def test_the_modules_in_whose_own_code_values_part_are_named():
    class Inner(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y.relu() if len(x) > 1 else y.tanh()

    partings = align(lambda net, x: net.b(net.a(x)), a=Inner(4, 4)).partings
    assert {parting.frame.path for parting in partings} == {"a", ""}


def test_another_weight_in_the_same_call_does_not_correspond():
    def forward(net, x):
        return nn.functional.linear(x, net.a.weight if len(x) > 1 else net.b.weight)

    alignment = align(forward)
    assert not alignment.calls
    assert set(alignment.apart) == {"b.weight"}
