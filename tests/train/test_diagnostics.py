from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnfold import InputError, calibrate
from train import layers as scratch
from train.diagnostics import Diagnostics, compare_statistics, examine


def net_of(bend=nn.Tanh, count=3):
    torch.manual_seed(0)
    layers = [nn.Embedding(27, 4), nn.Flatten(), nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), bend()]
    return nn.Sequential(
        *layers, *(m for _ in range(count - 2) for m in (nn.Linear(8, 8), bend())), nn.Linear(8, 27)
    )


def train(net, steps, rate=0.1, optimiser=torch.optim.SGD):
    """Train as the loop does and yield the loss of each step after taking it."""
    generator, optimiser = torch.Generator().manual_seed(1), optimiser(net.train().parameters(), lr=rate)
    for _ in range(steps):
        x, y = torch.randint(27, (40, 3), generator=generator), torch.randint(27, (40,), generator=generator)
        optimiser.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimiser.step()
        yield loss.item()


def watch(net, steps, every=1, **options):
    with Diagnostics(net, every) as diagnostics:
        for loss in train(net, steps, **options):
            diagnostics.record(loss)
    return diagnostics


def hooks(net):
    held = [m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules()]
    return sum(map(bool, held)) + sum(bool(p._backward_hooks) for p in net.parameters())


@pytest.mark.parametrize("tanh", [nn.Tanh, scratch.Tanh])
def test_a_record_holds_what_a_second_pass_by_hand_gives(tanh):
    net = net_of(tanh)
    twin = copy.deepcopy(net)
    record = watch(net, 1).records[0]
    outputs = []
    for module in twin:
        if isinstance(module, tanh):
            module.register_forward_hook(
                lambda m, i, output: (output.retain_grad(), outputs.append(output))[1]
            )
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    (loss,) = train(twin, 1)
    assert record.loss == loss
    assert len(record.layers) == 2
    for layer, h in zip(record.layers, outputs, strict=True):
        assert layer.kind == "Tanh"
        assert layer.output.mean == pytest.approx(h.mean().item(), abs=1e-6)
        assert layer.output.std == pytest.approx(h.std().item(), rel=1e-5)
        assert layer.saturated == pytest.approx((h.abs() > 0.97).float().mean().item())
        assert layer.gradient.std == pytest.approx(h.grad.std().item(), rel=1e-5)
        assert layer.output.counts.sum() == h.numel()
        counts, edges = np.histogram(h.detach().numpy(), 100)
        assert (layer.output.least, layer.output.most) == pytest.approx((edges[0], edges[-1]))
        assert np.abs(layer.output.counts - counts).sum() <= 4  # a number on an edge may fall either way
        assert np.array_equal(layer.dead_map, (h.abs() > 0.99)[:32].numpy())
    for parameter, (name, p) in zip(record.parameters, twin.named_parameters(), strict=True):
        assert parameter.name == name
        assert parameter.gradient.std == pytest.approx(p.grad.std().item(), rel=1e-5)
        moved = (p.detach() - before[name]).std() / before[name].std()
        if before[name].std() > 0:
            assert parameter.update_ratio == pytest.approx(moved.log10().item(), rel=1e-5)
            assert parameter.gradient_ratio == pytest.approx(
                (p.grad.std() / before[name].std()).item(), rel=1e-5
            )


def test_watching_changes_nothing_and_leaves_no_hook():
    net, twin = net_of(), net_of()
    diagnostics = watch(net, 7, every=3, optimiser=torch.optim.Adam)
    assert list(train(twin, 7, optimiser=torch.optim.Adam)) == diagnostics.losses
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True)
    )
    assert [record.step for record in diagnostics.records] == [0, 3, 6]
    assert not hooks(net)


def test_between_watched_steps_and_after_a_failure_nothing_is_hooked():
    net, seen = net_of(), []
    with pytest.raises(ZeroDivisionError), Diagnostics(net, every=3) as diagnostics:  # noqa: PT012
        for loss in train(net, 6):
            seen.append(hooks(net))
            diagnostics.record(loss)
            if len(seen) == 6:
                assert hooks(net)
                raise ZeroDivisionError
    assert [bool(count) for count in seen] == [True, False, False, True, False, False]
    assert not hooks(net)


def test_a_loss_measured_in_between_is_not_taken_for_training():
    net = net_of()
    steps = train(net, 1)
    with Diagnostics(net) as diagnostics:
        loss = next(steps)
        expected = diagnostics._watch.layers()
        with torch.no_grad():
            net(torch.zeros(5, 3, dtype=torch.int64))
        net.eval()(torch.zeros(5, 3, dtype=torch.int64))
        diagnostics.record(loss)
    assert [layer.output.mean for layer in diagnostics.records[0].layers] == [e.output.mean for e in expected]


def test_dead_and_saturated_neurons_are_counted_for_every_kind_of_bend():
    x = torch.tensor([[-9.0, 9.0, 0.1, -0.2], [-8.0, 9.0, 9.0, 0.2]])
    expected = {nn.Tanh: (5 / 8, 0.5), nn.Sigmoid: (5 / 8, 0.5), nn.ReLU: (3 / 8, 0.25)}
    for bend, figures in expected.items():
        (layer,) = examine(nn.Sequential(bend()), x)
        assert (layer.saturated, layer.dead) == figures, bend
        assert layer.dead_map.all(0).tolist() == [True, bend is not nn.ReLU, False, False]


def test_without_a_bend_the_linears_but_the_last_are_watched_and_none_is_saturated():
    layers = watch(net_of(nn.Identity), 1).records[0].layers
    assert [(layer.kind, layer.saturated, layer.dead) for layer in layers] == [("Linear", 0, 0)] * 2


def test_zero_weights_stand_still_or_have_no_ratio():
    net = nn.Sequential(nn.Embedding(27, 4), nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 27))
    for p in net.parameters():
        nn.init.zeros_(p)
    diagnostics = watch(net, 2)
    parameters = {p.name: p for p in diagnostics.records[1].parameters}
    assert parameters["2.weight"].gradient.std == 0
    assert math.isnan(parameters["2.weight"].update_ratio)
    assert parameters["4.bias"].update > 0
    assert math.isnan(diagnostics.median_update())
    net[2].weight.data.normal_()
    frozen = copy.deepcopy(net)
    frozen[2].weight.requires_grad_(False)
    still = {p.name: p for p in watch(frozen, 1).records[0].parameters}["2.weight"]
    assert (still.update_ratio, still.gradient) == (-math.inf, None)


def test_numbers_that_are_not_finite_are_reported_and_not_counted():
    (layer,) = examine(nn.Sequential(nn.ReLU()), torch.tensor([[1.0, math.inf, 2.0, math.nan]]))
    assert math.isnan(layer.output.mean)
    assert layer.output.counts.sum() == 0


def test_running_statistics_stand_beside_the_calibrated_ones():
    x = torch.randn(64, 3) * 2 + 5
    for norm, key in ((nn.BatchNorm1d(3), "running_var"), (scratch.StdBatchNorm1d(3), "running_std")):
        net = nn.Sequential(norm)
        (one,) = compare_statistics(net, calibrate(net, [x]))
        assert one.name == "0"
        np.testing.assert_allclose(one.running_var, getattr(norm, key).numpy())
        np.testing.assert_allclose(one.mean, x.mean(0).numpy(), rtol=1e-6)
        np.testing.assert_allclose(one.var, x.var(0).numpy(), rtol=1e-5)


def test_watching_less_than_every_step_is_refused():
    with pytest.raises(InputError, match="every = 0"):
        Diagnostics(net_of(), every=0)
