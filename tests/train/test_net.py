"""train.net: the layers, their scale at the beginning, and the first guess."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, nn

import data
from bnfold.checkpoint import Checkpoint, InputDomain, load, save
from bnfold.errors import InputError
from train.net import Sizes, build, count_parameters


def standard(seed: int = 1, **sizes: int) -> nn.Sequential:
    """Return a net for 27 characters."""
    return build(Sizes(27, **sizes), Generator().manual_seed(seed))


def test_the_layers_have_the_lectures_names_and_order() -> None:
    names = "embedding flatten linear1 bn1 tanh1 linear2 bn2 tanh2 linear3 bn3"
    assert [name for name, _ in standard().named_children()] == names.split()
    assert all(layer.bias is None for layer in standard() if isinstance(layer, nn.Linear))
    assert [type(layer).__name__ for layer in standard(layers=1)] == [
        "Embedding",
        "Flatten",
        "Linear",
        "BatchNorm1d",
    ]


@pytest.mark.parametrize(("sizes", "count"), [({}, 52_524), ({"hidden": 100, "layers": 6}, 47_024)])
def test_the_parameters_are_as_many_as_the_lecture_counts(sizes: dict[str, int], count: int) -> None:
    assert count_parameters(standard(**sizes)) == Sizes(27, **sizes).parameters == count


def test_weights_have_the_kaiming_scale() -> None:
    net = standard(hidden=500)
    for layer in net:
        if isinstance(layer, nn.Linear):
            wanted = 5 / 3 / math.sqrt(layer.in_features)
            assert layer.weight.std().item() == pytest.approx(
                wanted, rel=4 / math.sqrt(2 * layer.weight.numel())
            )
            assert layer.weight.mean().item() == pytest.approx(
                0, abs=4 * wanted / math.sqrt(layer.weight.numel())
            )
    assert net.bn1.weight.eq(1).all()
    assert torch.allclose(net.bn3.weight, torch.tensor(0.1))
    assert net.bn3.bias.eq(0).all()


def test_activations_keep_their_scale_from_layer_to_layer_without_batchnorm() -> None:
    net = standard(hidden=400, layers=7)
    plain = nn.Sequential(*(layer for layer in net if not isinstance(layer, nn.BatchNorm1d)))
    value, scales = torch.randint(0, 27, (500, 3), generator=Generator().manual_seed(0)), []
    for layer in plain:
        value = layer(value)
        if isinstance(layer, nn.Tanh):
            scales.append(value.std().item())
    assert all(0.6 < scale < 0.8 for scale in scales)


def test_the_first_guess_is_nearly_uniform() -> None:
    x = torch.randint(0, 27, (1000, 3), generator=Generator().manual_seed(0))
    targets = torch.randint(0, 27, (1000,), generator=Generator().manual_seed(1))
    loss = nn.functional.cross_entropy(standard()(x), targets).item()
    assert loss == pytest.approx(data.uniform_loss(27), abs=0.01)


def test_numbers_are_drawn_as_the_notebook_draws_them() -> None:
    generator = Generator().manual_seed(2147483647)
    embedding = torch.randn((27, 10), generator=generator)
    first = torch.randn((30, 200), generator=generator) / 30**0.5 * (5 / 3)
    net = standard(seed=2147483647)
    assert torch.equal(net.embedding.weight, embedding)
    assert torch.equal(net.linear1.weight, first.T)


def test_a_net_is_a_checkpoint_whatever_its_sizes(tmp_path) -> None:
    net = standard(context=5, embedding=2, hidden=3, layers=4).eval()
    save(tmp_path / "ckpt.pt", Checkpoint(net, InputDomain((5,), "int64", 0, 27)))
    x = torch.randint(0, 27, (9, 5))
    assert torch.equal(load(tmp_path / "ckpt.pt").model(x), net(x))


def test_sizes_that_no_net_can_have_are_refused() -> None:
    with pytest.raises(InputError, match="hidden = 0"):
        Sizes(27, hidden=0)
    with pytest.raises(InputError, match="make the net smaller"):
        Sizes(27, hidden=100_000)
