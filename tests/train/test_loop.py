"""train.loop, train.evaluate and train.sample: what training does, and what is said of it."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

import data
from bnfold.errors import InputError
from train.evaluate import measure
from train.loop import descend, postponed_interrupt
from train.material import Material, prepare
from train.net import Sizes, build
from train.recipes import RECIPES
from train.sample import invent


@pytest.fixture(scope="module")
def material() -> Material:
    """Return an eighth of the shipped list."""
    return prepare(data.read_names(None)[::8])


def trained(
    material: Material, recipe: str = "quick", seed: int = 1, **changes
) -> tuple[nn.Sequential, list[float]]:
    """Return a small net after training, and the loss of every step."""
    generator = Generator().manual_seed(seed)
    net = build(Sizes(len(material.vocabulary), hidden=50), generator)
    chosen = replace(RECIPES[recipe], **({"steps": 150} | changes))
    return net, list(descend(net, material, chosen, generator))


@pytest.mark.parametrize(("recipe", "steps"), [("quick", 300), ("lecture", 1500)])
def test_training_beats_the_letters_frequencies_on_names_it_has_not_seen(
    recipe: str, steps: int, material: Material
) -> None:
    """By 0.2 and more over six seeds, for either recipe."""
    net, losses = trained(material, recipe, steps=steps)
    assert len(losses) == steps
    assert losses[0] == pytest.approx(data.uniform_loss(27), abs=0.1)
    seen, unseen = (
        data.contexts(names, material.vocabulary, 3)[1]
        for names in (material.names.train, material.names.dev)
    )
    assert measure(net, material.dev) < data.unigram_loss(seen, unseen) - 0.1


def test_the_same_seed_gives_the_same_net_bit_for_bit(material: Material) -> None:
    (first, losses), (second, repeated), (other, _) = (trained(material, seed=seed) for seed in (7, 7, 8))
    assert losses == repeated
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert not torch.equal(first.linear1.weight, other.linear1.weight)


def test_all_parameters_and_statistics_move(material: Material) -> None:
    fresh, (net, _) = build(Sizes(27, hidden=50), Generator().manual_seed(1)), trained(material)
    for name, tensor in net.state_dict().items():
        assert not torch.equal(tensor, fresh.state_dict()[name]), name


def test_a_loss_that_is_no_number_ends_the_training_with_its_step(material: Material) -> None:
    with pytest.raises(InputError, match=r"the loss is nan at step \d+; lower the learning rate"):
        trained(material, rate=1e38)


def test_a_loss_is_measured_in_eval_mode_over_every_example(material: Material) -> None:
    net, _ = trained(material)
    x, y = data.contexts(material.names.dev, material.vocabulary, 3)
    net.eval()
    with torch.no_grad():
        wanted = F.cross_entropy(net(torch.from_numpy(x)).double(), torch.from_numpy(y)).item()
    net.train()
    assert measure(net, material.dev) == pytest.approx(wanted, rel=1e-7)
    assert net.training
    assert net.bn1.running_mean.requires_grad is False


def test_measuring_changes_nothing(material: Material) -> None:
    net, _ = trained(material)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    measure(net, material.dev)
    invent(net, material.vocabulary, 3, 5, Generator().manual_seed(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_measuring_in_pieces_is_measuring_at_once(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = trained(material)
    whole = measure(net, material.train)
    monkeypatch.setattr("train.evaluate._CHUNK", 7)
    assert measure(net, material.train) == pytest.approx(whole, rel=1e-6)


def test_invented_names_repeat_with_their_seed_and_hold_no_terminator(material: Material) -> None:
    net, _ = trained(material)
    names = invent(net, material.vocabulary, 3, 20, Generator().manual_seed(3))
    assert names == invent(net, material.vocabulary, 3, 20, Generator().manual_seed(3))
    assert len(names) == 20
    assert len(set(names)) > 10
    assert not any("." in name for name in names)


def test_names_follow_the_nets_own_probabilities() -> None:
    vocabulary = data.Vocabulary((".", "a", "b"))
    net = nn.Sequential(nn.Embedding(3, 3), nn.Flatten()).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[-99.0, 0, -99.0], [-99.0, -99.0, 0], [0, -99.0, -99.0]]))
    assert invent(net, vocabulary, 1, 2, Generator().manual_seed(0)) == ["ab", "ab"]
    with torch.no_grad():
        net[0].weight[2] = torch.tensor([-99.0, 0, -99.0])
    endless = invent(net, vocabulary, 1, 1, Generator().manual_seed(0))
    assert endless == ["ab" * (data.LONGEST_NAME // 2)]


def test_the_first_interrupt_is_postponed_and_the_second_is_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    with postponed_interrupt() as pressed:
        assert not pressed()
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_is_caught_and_nothing_fails() -> None:
    found = []

    def work() -> None:
        with postponed_interrupt() as pressed:
            found.append(pressed())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
