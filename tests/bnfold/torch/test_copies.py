"""A module is copied as `copy.deepcopy` copies it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bnfold.torch.sandbox import copy_module, copy_structure


class Holding(nn.Module):
    """Holds what a module may hold besides tensors and modules."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.again = self.linear
        self.names, self.sizes, self.nothing = ["a", ["b"]], (1, (2, [3])), {}
        self.same = self.names
        self.by_module = {self.linear: [self.bn]}
        self.hidden = [nn.Linear(2, 2)]
        self.weight = self.linear.weight
        self.call = self.forward
        self.register_forward_hook(self.look)
        self.seen = 0

    def look(self, module, given, made) -> None:
        self.seen += 1

    def forward(self, x):
        return self.bn(self.linear(x))


class Settling(nn.Module):
    """Asks what it holds, when its state is set."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self.outputs = self.linear.out_features

    def forward(self, x):
        return self.linear(x)


class Shared(nn.Module):
    """Is not copied."""

    def __deepcopy__(self, memo):
        return self


def test_a_copy_holds_nothing_of_the_module_but_what_deepcopy_leaves_it():
    net = Holding()
    for twin in (copy_module(net, {}), copy.deepcopy(net)):
        assert type(twin) is Holding
        assert twin.again is twin.linear is not net.linear
        assert twin.same is twin.names is not net.names
        assert twin.names[1] is not net.names[1]
        assert (twin.names, twin.sizes) == (net.names, net.sizes)
        assert twin.sizes[1][1] is not net.sizes[1][1]
        assert list(twin.by_module) == [twin.linear]
        assert twin.by_module[twin.linear][0] is twin.bn
        assert twin.hidden[0] is not net.hidden[0]
        assert twin.weight is twin.linear.weight is not net.weight
        assert twin.call.__self__ is twin
        assert twin._backward_hooks is not net._backward_hooks
        twin(torch.ones(2, 3))
        assert (twin.seen, net.seen) == (1, 0)


def test_a_copy_of_the_structure_has_the_tensors_of_the_module():
    net = Holding()
    twin = copy_structure(net)
    assert twin.weight is twin.linear.weight is net.linear.weight
    assert twin.bn.running_mean is net.bn.running_mean
    assert twin.linear is not net.linear


def test_a_module_that_settles_its_state_finds_what_it_holds():
    twin = copy_module(nn.Sequential(Settling()), {})
    assert twin[0].outputs == 2


def test_a_module_that_says_how_it_is_copied_is_copied_so():
    net = nn.Sequential(Shared(), nn.Linear(2, 2))
    assert copy_module(net, {})[0] is net[0]
    own = nn.Linear(2, 2)
    vars(own)["__deepcopy__"] = lambda memo: "itself"
    assert copy_module(nn.ModuleDict({"a": nn.Sequential(own)}), {})["a"]._modules["0"] == "itself"


@pytest.mark.parametrize(
    "make", [lambda: nn.GRU(3, 4, 2), lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True)]
)
def test_a_copy_computes_what_the_module_does(make):
    net = make().eval()
    x = torch.randn(2, 5, 3 if isinstance(net, nn.GRU) else 8)
    twin = copy_module(net, {})
    pair = [each(x) for each in (net, twin)]
    pair = [each[0] if isinstance(each, tuple) else each for each in pair]
    assert torch.equal(*pair)
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in twin.parameters()}
