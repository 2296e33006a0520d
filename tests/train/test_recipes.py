"""train.recipes: the notebook's first losses to the digit, and what each experiment says one should see."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

import data
from train.evaluate import measure
from train.loop import descend
from train.material import Material, prepare
from train.net import count_parameters
from train.recipes import RECIPES, Recipe, make

NOTEBOOK_SEED = 2147483647


@pytest.fixture(scope="module")
def material() -> Material:
    """Return the shipped list."""
    return prepare(data.read_names(None))


def begin(recipe: Recipe, material: Material) -> tuple[nn.Sequential, Generator]:
    """Return a net with the notebook's seed, and its generator."""
    generator = Generator().manual_seed(NOTEBOOK_SEED)
    return make(recipe, material, generator), generator


def train(name: str, material: Material, **changes: object) -> nn.Sequential:
    """Return a net after training."""
    recipe = replace(RECIPES[name], **changes)
    net, generator = begin(recipe, material)
    for _ in descend(net, material, recipe, generator):
        pass
    return net


def outputs(net: nn.Sequential, material: Material, kind: str) -> list[torch.Tensor]:
    """Return what the layers of a kind put out for 500 examples in training mode, with a gradient once backward ran."""
    value, kept = material.examples[0][:500], []
    for name, layer in net.named_children():
        value = layer(value)
        if name.startswith(kind):
            value.retain_grad()
            kept.append(value)
    F.cross_entropy(value, material.examples[1][:500]).backward()
    return kept


@pytest.mark.parametrize(
    ("name", "parameters", "printed"),
    [
        ("original", 11_897, "27.8817"),
        ("softmax", 11_897, "3.3221"),
        ("batchnorm", 12_097, "3.3239"),
        ("deep", 47_024, "3.2870"),
    ],
)
def test_the_first_loss_is_the_notebooks_to_the_printed_digit(
    name: str, parameters: int, printed: str, makemore: Path
) -> None:
    lecture = prepare(data.read_names(str(makemore)))
    net, generator = begin(RECIPES[name], lecture)
    assert count_parameters(net) == parameters
    assert f"{next(descend(net, lecture, RECIPES[name], generator)):.4f}" == printed


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_and_takes_a_step(name: str, material: Material) -> None:
    recipe = RECIPES[name]
    net, generator = begin(recipe, material)
    assert recipe.summary
    assert recipe.expect or name == "quick"
    losses = list(descend(net, material, replace(recipe, steps=2), generator))
    assert all(0 < loss < 100 for loss in losses)


def test_a_variation_changes_what_it_names_and_no_reference_figure_survives_it() -> None:
    deep = RECIPES["deep"]
    other = deep.vary("other", "summary", "expect", rate=0.5, batchnorm="after")
    assert (other.rate, other.design.batchnorm, other.reference) == (0.5, "after", {})
    assert replace(other, name=deep.name, summary=deep.summary, expect=deep.expect, rate=deep.rate,
                   design=deep.design, reference=deep.reference) == deep  # fmt: skip


def stds(name: str, material: Material, kind: str = "tanh") -> list[float]:
    """Return the std of the outputs of each layer of a kind before training."""
    return [value.std().item() for value in outputs(begin(RECIPES[name], material)[0], material, kind)]


def test_the_gain_sets_the_scale_of_the_activations(material: Material) -> None:
    assert stds("plain", material)[-1] == pytest.approx(0.65, abs=0.05)
    assert stds("gain-1", material)[-1] < 0.45
    assert stds("gain-half", material)[-1] < 0.05
    saturated = [(value.abs() > 0.97).float().mean().item() for value in
                 outputs(begin(RECIPES["gain-3"], material)[0], material, "tanh")]  # fmt: skip
    assert min(saturated) > 0.3


def test_batchnorm_makes_all_tanh_layers_alike_whatever_the_weights(material: Material) -> None:
    for name in ("deep", "unscaled-batchnorm", "fifty"):
        assert all(0.6 < std < 0.66 for std in stds(name, material))


def test_without_tanh_gain_one_is_right(material: Material) -> None:
    for name, low, high in (("linear", 0.7, 1.4), ("linear-gain", 5, 50), ("linear-half", 0, 0.1)):
        assert low < stds(name, material, "linear5")[-1] < high


def test_gradients_explode_in_fifty_plain_layers(material: Material) -> None:
    first, *_, last = outputs(begin(RECIPES["fifty-plain"], material)[0], material, "tanh")
    assert first.grad.std() > 1e8 * last.grad.std()


def test_a_bias_before_batchnorm_has_no_gradient(material: Material) -> None:
    net, _ = begin(RECIPES["bias"], material)
    outputs(net, material, "tanh")
    largest = max(
        layer.weight.grad.abs().max().item() for name, layer in net.named_children() if "linear" in name
    )
    for name, layer in net.named_children():
        if "linear" in name:
            assert layer.bias.grad.abs().max().item() < 1e-5 * largest


def dead(net: nn.Sequential, material: Material) -> torch.Tensor:
    """Return which neurons of the second ReLU are zero for every context."""
    with torch.no_grad():
        return net[: list(net._modules).index("relu2") + 1](material.train.contexts).eq(0).all(0)


@pytest.fixture(scope="module")
def killed(material: Material) -> nn.Sequential:
    """Return a net whose ReLUs were killed."""
    return train("dead-relu", material)


def test_too_high_a_rate_kills_relus(killed: nn.Sequential, material: Material) -> None:
    """Between 25 and 46 % of the second layer over ten seeds, and none at the good rate."""
    assert dead(train("relu", material), material).float().mean() < 0.02
    assert dead(killed, material).float().mean() > 0.1


def test_a_dead_relu_has_no_gradient_whatsoever(killed: nn.Sequential, material: Material) -> None:
    gone, net = dead(killed, material), copy.deepcopy(killed)
    net.zero_grad()
    F.cross_entropy(net(material.train.contexts), material.train.contexts[:, 0]).backward()
    assert 0 < gone.sum() < len(gone)
    assert net.linear2.weight.grad[gone].eq(0).all()
    assert net.linear2.bias.grad[gone].eq(0).all()
    assert net.linear3.weight.grad[:, gone].eq(0).all()
    assert net.linear2.bias.grad[~gone].ne(0).any()


def test_a_dead_relu_stays_dead_for_good_while_what_it_reads_stands_still(
    killed: nn.Sequential, material: Material
) -> None:
    """Its own weights never move again; only another layer below can bring it back."""
    gone, net = dead(killed, material), copy.deepcopy(killed)
    for name in ("embedding", "linear1"):
        net.get_submodule(name).requires_grad_(False)
    recipe = replace(RECIPES["relu"], steps=300)
    for _ in descend(net, material, recipe, Generator().manual_seed(0)):
        pass
    moved = (net.linear2.weight != killed.linear2.weight).any(1)
    assert dead(net, material)[gone].all()
    assert not moved[gone].any()
    assert moved[~gone].any()


@pytest.mark.parametrize(
    ("name", "mover"),
    [pytest.param("zeros", "linear3.bias", marks=pytest.mark.slow), ("zeros-batchnorm", "bn3.bias")],
)
def test_from_zeros_one_bias_moves_and_learns_the_letters_frequencies(
    name: str, mover: str, material: Material
) -> None:
    fresh, _ = begin(RECIPES[name], material)
    net = train(name, material)
    moved = [key for key, value in net.named_parameters() if not torch.equal(value, fresh.get_parameter(key))]
    assert moved == [mover]
    y = material.examples[1].numpy()
    assert measure(net, material.train) == pytest.approx(data.unigram_loss(y, y), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if "dev" in recipe.reference])
def test_a_full_run_lands_where_the_notebook_did(name: str, makemore: Path) -> None:
    lecture = prepare(data.read_names(str(makemore)))
    net = train(name, lecture)
    assert measure(net, lecture.dev) == pytest.approx(RECIPES[name].reference["dev"], abs=0.015)
    assert measure(net, lecture.train) == pytest.approx(RECIPES[name].reference["train"], abs=0.015)
