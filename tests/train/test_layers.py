"""train.layers against torch.nn: forward, backward, buffers and arguments; and where the lecture's own differ."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from bnfold.checkpoint import Checkpoint, InputDomain, load, save
from train import layers

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return float64 numbers with a mean and a scale of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1


def hold(ours: nn.Module, theirs: nn.Module, *inputs: torch.Tensor) -> None:
    """Run both on each input in turn, and compare outputs, gradients of inputs and parameters, and buffers."""
    theirs.load_state_dict(ours.state_dict())
    for x in inputs:
        outputs, gradients = [], []
        for layer in (ours, theirs):
            leaf = x.clone().requires_grad_(x.is_floating_point())
            layer.zero_grad()
            out = layer(leaf)
            if out.requires_grad:
                (out * numbers(*out.shape, seed=9)).sum().backward()
            outputs.append(out)
            gradients.append([leaf.grad, *(parameter.grad for parameter in layer.parameters())])
        torch.testing.assert_close(outputs[0], outputs[1], **EXACT)
        torch.testing.assert_close(gradients[0], gradients[1], **EXACT)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **EXACT)


@pytest.mark.parametrize("name", ["Embedding", "Flatten", "Linear", "BatchNorm1d"])
def test_arguments_have_torchs_names_order_and_defaults(name: str) -> None:
    mine, torchs = (inspect.signature(getattr(place, name)).parameters for place in (layers, nn))
    shared = [key for key in torchs if key in mine]
    assert list(mine) == shared
    assert all(mine[key].default == torchs[key].default for key in shared)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    pair = (place.Linear(5, 4, bias=bias, dtype=torch.float64) for place in (layers, nn))
    hold(*pair, numbers(7, 5), numbers(2, 3, 5))


def test_embedding() -> None:
    pair = (place.Embedding(9, 4, dtype=torch.float64) for place in (layers, nn))
    hold(*pair, torch.tensor([[1, 1, 8], [0, 2, 1]]), torch.tensor(3))


@pytest.mark.parametrize("axes", [(1, -1), (0, 1), (2, 3), (0, -1), (-2, -1)])
def test_flatten(axes: tuple[int, int]) -> None:
    hold(layers.Flatten(*axes), nn.Flatten(*axes), numbers(2, 3, 4, 5))


@pytest.mark.parametrize("name", ["Tanh", "ReLU"])
def test_nonlinearities(name: str) -> None:
    hold(getattr(layers, name)(), getattr(nn, name)(), numbers(6, 5), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(8, 5), (4, 5, 3)], ids=["flat", "with length"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"affine": False},
        {"momentum": 0.01, "eps": 0.1},
        {"momentum": None},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_batchnorm_in_training_and_then_in_eval_mode(arguments: dict, shape: tuple[int, ...]) -> None:
    ours, theirs = (place.BatchNorm1d(5, dtype=torch.float64, **arguments) for place in (layers, nn))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(numbers(5, seed=3))
    hold(ours, theirs, *(numbers(*shape, seed=seed) for seed in range(4)))
    hold(ours.eval(), theirs.eval(), numbers(*shape), numbers(2, *shape[1:]))


@pytest.mark.parametrize("shape", [(5,), (8, 4), (8, 5, 2, 2), (1, 5)])
def test_batchnorm_refuses_the_shapes_that_torch_refuses(shape: tuple[int, ...]) -> None:
    for place in (layers, nn):
        with pytest.raises((ValueError, RuntimeError)):
            place.BatchNorm1d(5)(torch.ones(shape))


def test_a_whole_net_trains_the_same(tmp_path) -> None:
    def build(place) -> nn.Sequential:
        kinds = (
            place.Embedding(9, 4),
            place.Flatten(),
            place.Linear(12, 6, False),
            place.BatchNorm1d(6),
            place.Tanh(),
        )
        return nn.Sequential(*kinds, place.Linear(6, 9)).double()

    ours, theirs = build(layers), build(nn)
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        x, y = (torch.randint(0, 9, size, generator=generator) for size in ((16, 3), (16,)))
        for net in (ours, theirs):
            net.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-11, atol=1e-11)


def test_the_lectures_module_normalises_by_the_unbiased_variance() -> None:
    x, ours = numbers(8, 5), layers.UnbiasedBatchNorm1d(5, dtype=torch.float64)
    wanted = (x - x.mean(0)) / torch.sqrt(x.var(0) + 1e-5)
    theirs, out = nn.BatchNorm1d(5, dtype=torch.float64), ours(x)
    torch.testing.assert_close(out, wanted, **EXACT)
    torch.testing.assert_close(ours.running_var, 0.9 + 0.1 * x.var(0), **EXACT)
    assert ((theirs(x) / out) ** 2).allclose(torch.tensor(8 / 7, dtype=torch.float64), rtol=1e-4)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **EXACT)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **EXACT)


def test_the_lectures_first_batchnorm_tracks_the_std_without_eps() -> None:
    x, ours = numbers(8, 5), layers.StdBatchNorm1d(5, momentum=0.25, dtype=torch.float64)
    torch.testing.assert_close(ours(x), (x - x.mean(0)) / x.std(0), **EXACT)
    torch.testing.assert_close(ours.running_std, 0.75 + 0.25 * x.std(0), **EXACT)
    torch.testing.assert_close(ours.running_mean, 0.25 * x.mean(0), **EXACT)
    torch.testing.assert_close(ours.eval()(x), (x - ours.running_mean) / ours.running_std, **EXACT)
    assert layers.StdBatchNorm1d(5)(torch.ones(8, 5)).isnan().all()


def scratch_net(norm: type[nn.Module]) -> nn.Sequential:
    """Return a trained-looking net of scratch layers in eval mode."""
    torch.manual_seed(2)
    net = nn.Sequential()
    kinds = layers.Embedding(5, 4), layers.Flatten(), layers.Linear(12, 7, False), norm(7), layers.Tanh()
    for name, layer in zip(("embedding", "flatten", "linear1", "bn1", "tanh1"), kinds, strict=True):
        net.add_module(name, layer)
    net.add_module("linear2", layers.Linear(7, 5, False))
    net.add_module("bn2", norm(5))
    with torch.no_grad():
        net.bn1.weight.copy_(torch.linspace(-2, 2, 7))
        net.bn2.bias.copy_(torch.linspace(-1, 1, 5))
    for _ in range(50):
        net(torch.randint(0, 5, (64, 3)))
    return net.eval()


NORMS = [layers.BatchNorm1d, layers.UnbiasedBatchNorm1d, layers.StdBatchNorm1d]


@pytest.mark.parametrize("norm", NORMS)
def test_the_torch_twin_computes_the_same_and_goes_into_a_checkpoint(norm, tmp_path) -> None:
    net, domain = scratch_net(norm), InputDomain((3,), "int64", 0, 5)
    twin = layers.to_torch(net)
    assert all(type(layer).__module__.startswith("torch.nn") for layer in twin)
    assert [name for name, _ in twin.named_children()] == [name for name, _ in net.named_children()]
    save(tmp_path / "ckpt.pt", Checkpoint(twin, domain))
    contexts = domain.every()
    loaded = load(tmp_path / "ckpt.pt").model
    torch.testing.assert_close(loaded(contexts), net(contexts), rtol=1e-5, atol=1e-5)
    twin.linear1.weight.data.zero_()
    assert net.linear1.weight.abs().sum() > 0


def test_the_twin_of_torchs_own_layers_is_a_copy() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).train()
    twin = layers.to_torch(net)
    assert repr(twin) == repr(net)
    assert twin[0] is not net[0]
    assert twin.training
