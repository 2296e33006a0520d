"""train.net: the layers, their scale at the beginning, and the first guess."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, nn

import data
from bnfold.checkpoint import Checkpoint, InputDomain, load, save
from bnfold.errors import InputError
from train.net import Design, Scale, Sizes, build, count_parameters


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
    assert count_parameters(standard(**sizes)) == count


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


def names_of(design: Design, **sizes: int) -> str:
    """Return the names of the layers between flatten and the logits."""
    net = build(Sizes(27, **sizes), Generator().manual_seed(0), design)
    return " ".join(name for name, _ in list(net.named_children())[2:])


def test_a_design_says_which_layers_there_are() -> None:
    two = {"layers": 2}
    assert names_of(Design(batchnorm="after"), **two) == "linear1 tanh1 bn1 linear2 bn2"
    assert names_of(Design(batchnorm="none", nonlinearity="ReLU"), **two) == "linear1 relu1 linear2"
    assert names_of(Design(nonlinearity="none", last_batchnorm=False), **two) == "linear1 bn1 linear2"


def test_a_design_says_how_the_weights_begin() -> None:
    design = Design(
        weights=Scale(2.0),
        last_weights=Scale(0.0),
        biases=Scale(0.5),
        last_bias=Scale(3.0),
        embeddings=Scale(0.0),
        last_gamma=0.25,
        momentum=0.01,
    )
    net = build(Sizes(500, hidden=300, layers=2), Generator().manual_seed(0), design)
    assert net.linear1.weight.std().item() == pytest.approx(2, rel=0.05)
    assert net.linear1.bias.std().item() == pytest.approx(0.5, rel=0.2)
    assert net.linear2.bias.std().item() == pytest.approx(3, rel=0.2)
    assert net.linear2.weight.eq(0).all()
    assert net.embedding.weight.eq(0).all()
    assert net.bn2.weight.eq(0.25).all()
    assert net.bn1.momentum == net.bn2.momentum == 0.01


@pytest.mark.parametrize("statistics", ["torch", "unbiased", "std"])
def test_scratch_and_torch_layers_begin_alike_and_give_the_same_in_eval_mode(statistics: str) -> None:
    design, x = (
        Design(statistics=statistics),
        torch.randint(0, 27, (50, 3), generator=Generator().manual_seed(0)),
    )
    torchs, ours = (build(Sizes(27), Generator().manual_seed(1), design, kit) for kit in ("torch", "scratch"))
    assert {type(layer).__module__ for layer in ours} == {"train.layers"}
    assert [name for name, _ in torchs.named_children()] == [name for name, _ in ours.named_children()]
    for name, parameter in torchs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=1e-4, atol=1e-5)


def test_sizes_that_no_net_can_have_are_refused() -> None:
    with pytest.raises(InputError, match="hidden = 0"):
        Sizes(27, hidden=0)
    with pytest.raises(InputError, match="make the net smaller"):
        Sizes(27, hidden=100_000)
