"""Module calls as places for one operator: which module that is, what it does afterwards, why another one is not."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnfold.errors import Refuse, UnreadableModel
from bnfold.torch.fold import fold
from bnfold.torch.read import read

IMAGES = torch.randn(2, 4, 6, 6)


class Block(nn.Module):
    """Two convolutions and an activation, in a forward that a test gives."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.LeakyReLU(0.3)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


class Outer(nn.Module):
    """A block, and code around it that a test gives."""

    def __init__(self, block, forward=None):
        super().__init__()
        self.block, self.run = block, forward or (lambda net, x: torch.tanh(net.block(x)))

    def forward(self, x):
        return self.run(self, x)


def plain(net, x):
    return net.a(x) + net.b(x)


def find(net, names=("block.a", "block.b"), bypassed=None):
    """The place of the sum of two convolutions."""
    reading = read(net.eval(), IMAGES)
    inner = [node for node in reading.graph.nodes if node.name in names]
    last = next(n for n in reading.graph.nodes if inner[-1].outputs[0] in n.inputs and n.op == "Add")
    nodes = (*names, last.name)
    return reading.calls.find(nodes, inner[0].inputs[0], last.outputs[0], bypassed or {})


@pytest.mark.parametrize(
    ("forward", "tail"),
    [
        (plain, ()),
        (lambda net, x: net.act(plain(net, x)), ("act",)),
        (lambda net, x: torch.relu(plain(net, x)), ("step0",)),
        (lambda net, x: F.hardtanh(net.act(plain(net, x)), -1, 2), ("act", "step1")),
    ],
)
def test_the_module_that_does_nothing_else_is_found_with_its_tail(forward, tail):
    place = find(Outer(Block(forward)))
    assert (place.path, tuple(name for name, _ in place.tail)) == ("block", tail)
    assert place.dtype == torch.float32


def test_a_function_in_a_tail_keeps_its_settings():
    place = find(Outer(Block(lambda net, x: F.leaky_relu(plain(net, x), 0.4))))
    assert place.tail[0][1].negative_slope == 0.4


def test_a_module_within_another_is_found():
    assert find(Outer(nn.Sequential(Block(plain))), ("block.0.a", "block.0.b")).path == "block.0"


def hooked(block):
    block.a.register_full_backward_hook(lambda module, given, made: None)
    return block


def called_otherwise(block):
    kind = type(block)
    block.__class__ = type("Loud", (kind,), {"__call__": lambda self, x: nn.Module.__call__(self, x)})
    return block


def counting(net, x):
    net.count = getattr(net, "count", 0) + 1
    return plain(net, x)


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (Outer(Block(lambda net, x: torch.cumsum(plain(net, x), 1))), "`block` does more than that"),
        (Outer(Block(lambda net, x: net.act(plain(net, torch.tanh(x))))), "`block` does more than that"),
        (Outer(Block(plain), lambda net, x: net.block(net.block(x))), "`block` is called 2 times"),
        (Outer(hooked(Block(plain))), "`block` has hooks, or a module in it"),
        (Outer(called_otherwise(Block(plain))), "its class has a `__call__` of its own"),
        (Outer(Block(counting)), "the code of `block` sets an attribute of a module"),
        (
            Outer(Block(plain), lambda net, x: F.conv2d(torch.tanh(net.block(x)), net.block.b.weight)),
            "`block.b.weight` is read outside of `block`",
        ),
        (
            Outer(Block(plain), lambda net, x: net.block(x).to(net.block.b.weight.dtype)),
            "`block.b.weight` is fetched outside of `block`",
        ),
        (
            Outer(Block(lambda net, x: plain(net, x) if x.shape[-1] > 5 else plain(net, x) * 2)),
            "`block` does something else, given",
        ),
        (
            Outer(Block(lambda net, x: plain(net, x) if x.sum() < 1e9 else net.a(x))),
            "its code does not always do the same",
        ),
        (Block(plain), "no module does that alone"),
    ],
)
def test_a_module_is_refused_with_the_reason(net, why):
    names = ("a", "b") if isinstance(net, Block) else ("block.a", "block.b")
    with pytest.raises((Refuse, StopIteration), match=re.escape(why)):
        find(net, names)


def calls_of(forward):
    net = Block(forward).eval()
    return read(net, IMAGES).calls


def test_the_order_of_two_modules_matters_where_what_the_first_is_given_is_changed_between():
    def changing(net, x):
        x = torch.tanh(x)
        y = net.a(x)
        x.relu_()
        return net.b(y)

    with pytest.raises(Refuse, match="what `a` is given is changed in place before `b` runs"):
        calls_of(changing).check_idle(["a"], "b")
    calls_of(lambda net, x: net.b(net.a(torch.tanh(x)))).check_idle(["a"], "b")


def test_who_asks_for_the_size_of_a_value_is_known_by_the_name_that_is_left_of_it():
    def measuring(net, x):
        y = net.act(net.a(x))
        assert y.dim() == 4
        return net.b(y) / y.shape[-1]

    calls = calls_of(measuring)
    made, acted = (item.outputs[0] for item in calls.items[:2])
    assert [frame.path for frame in calls.measured({})[acted]] == ["", ""]
    assert made not in calls.measured({})
    assert [frame.path for frame in calls.measured({"act": (acted, made)})[made]] == ["", ""]


def test_the_steps_leave_out_modules_and_the_nodes_that_are_gone():
    calls = calls_of(lambda net, x: torch.tanh(net.a(x) + net.b(x)))
    assert [step.label for step in calls.steps((), {})] == ["conv2d", "conv2d", "add", "tanh", "return"]
    added = next(item for item in calls.items if item.op == "Add")
    left = calls.steps({"b"}, {added.name: added.inputs[0]})
    assert [step.label for step in left] == ["conv2d", "tanh", "return"]
    assert left[1].sources == (0,)


def test_a_wrapper_that_copies_buffers_in_every_pass_names_the_module_in_it(monkeypatch):
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", nn.Sequential)
    with pytest.raises(UnreadableModel, match="fold its `module`"):
        fold(nn.Sequential(nn.Linear(3, 3)), (torch.randn(2, 3),))


def test_the_evidence_counts_examples_and_not_calls():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    report = fold(net, (torch.randn(7, 3),))[1]
    assert {item.inputs for item in report.evidence} == {14}  # the rows, and the rows with noise
