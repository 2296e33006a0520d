"""train.gradients: the factor that it names is the factor that was zero, in nets made for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

from train import layers as scratch
from train.gradients import Ledger, tabulate


def net_of(bend=nn.Tanh, kit=nn):
    torch.manual_seed(0)
    parts = {
        "embedding": kit.Embedding(27, 4), "flatten": kit.Flatten(),
        "linear1": kit.Linear(12, 8), "bn1": kit.BatchNorm1d(8), "bend1": bend(),
        "linear2": kit.Linear(8, 8), "bend2": bend(), "linear3": kit.Linear(8, 27),
    }  # fmt: skip
    net = nn.Sequential()
    for name, part in parts.items():
        net.add_module(name, part)
    return net


def study(net, steps=4):
    """Train a few steps under the ledger; return its entries by name and the gradients seen beside it."""
    generator, largest = Generator().manual_seed(1), {}
    optimiser = torch.optim.SGD(net.train().parameters(), lr=0.1)
    with Ledger(net) as ledger:
        for _ in range(steps):
            x, y = (torch.randint(27, size, generator=generator) for size in ((40, 3), (40,)))
            optimiser.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            for name, p in net.named_parameters():
                largest[name] = max(largest.get(name, 0), p.grad.abs().max().item())
            optimiser.step()
            ledger.count(loss.item())
    return SimpleNamespace(entries={e.name: e for e in ledger.entries()}, largest=largest, ledger=ledger)


@pytest.mark.parametrize("kit", [nn, scratch])
def test_a_net_in_which_nothing_is_zero_gets_no_excuse(kit):
    net = net_of(kit.Tanh, kit)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    seen = study(net)
    for name, entry in seen.entries.items():
        assert entry.gradient == seen.largest[name] > 0
        assert entry.moved == (net.get_parameter(name) - before[name]).abs().max().item()
        assert entry.reason == ""
    assert not any(layer._forward_hooks for layer in net)


def test_a_weight_of_zero_lets_no_gradient_through_but_gets_one():
    net = net_of()
    nn.init.zeros_(net.linear3.weight)
    entries = study(net, 1).entries
    blocked = [
        "embedding.weight",
        "linear1.weight",
        "bn1.weight",
        "bn1.bias",
        "linear2.weight",
        "linear2.bias",
    ]
    for name in blocked:
        assert entries[name].gradient == 0
        assert entries[name].reason == "none comes back through linear3, whose weight is 0 in every step"
    assert entries["linear3.weight"].gradient > 0
    assert study(net_after(net), 1).entries["linear2.weight"].gradient > 0


def net_after(net):
    """Return the net, whose zero weight has moved by now."""
    assert net.linear3.weight.abs().max() > 0
    return net


def test_the_layer_nearest_the_loss_is_named():
    net = net_of()
    nn.init.zeros_(net.bn1.weight)
    nn.init.zeros_(net.linear2.weight)
    entries = study(net, 1).entries
    assert (
        entries["linear1.weight"].reason == "none comes back through linear2, whose weight is 0 in every step"
    )
    nn.init.normal_(net.linear2.weight)
    nn.init.zeros_(net.bn1.weight)
    assert (
        study(net, 1)
        .entries["linear1.weight"]
        .reason.startswith("none comes back through bn1, whose gamma is 0")
    )


def test_saturated_tanhs_and_dead_relus_are_named():
    for bend, value, what in ((nn.Tanh, 100.0, "slope is 0"), (nn.ReLU, -100.0, "outputs are 0")):
        net = net_of(bend)
        nn.init.constant_(net.linear2.bias, value)
        entries = study(net).entries
        assert (
            entries["linear1.weight"].reason == f"none comes back through bend2, whose {what} in every step"
        )


def test_what_a_layer_gets_is_named_where_the_gradient_arrives():
    net = net_of()
    nn.init.zeros_(net.linear2.weight)
    nn.init.zeros_(net.linear2.bias)
    assert study(net, 1).entries["linear3.weight"].reason == "what linear3 gets is 0 in every step"
    net = net_of()
    nn.init.zeros_(net.linear1.weight)
    nn.init.constant_(net.linear1.bias, 0.5)
    found = study(net, 1).entries["bn1.weight"]
    assert (found.gradient, found.reason) == (0, "what bn1 gets is the same for all examples in every step")


def test_the_table_says_exactly_zero_only_of_what_is():
    net = net_of()
    nn.init.zeros_(net.linear3.weight)
    rows = {row[0]: row for row in tabulate(list(study(net, 1).entries.values()), 1).rows}
    assert rows["linear2.bias"][1:3] == ("stood still", "exactly 0")
    assert float(rows["linear3.bias"][2]) > 0
