"""train.backprop: the same numbers as autograd's, for every recipe, watched or not, in pieces or whole."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

import data
from bnfold.errors import InputError
from tests.conftest import CHECKOUT
from train import layers as scratch
from train import tape
from train.backprop import ByHand, by_autograd, differentiate
from train.diagnostics import Diagnostics
from train.gradients import Ledger
from train.loop import Training
from train.material import Material, prepare
from train.optimisers import flatten
from train.recipes import RECIPES, make

STEPS = 100


@pytest.fixture(scope="module")
def material() -> Material:
    return prepare(data.read_names(None)[::20])


def net_of(recipe, material, dtype=torch.float64, **changes):
    """A net of a recipe before training, and the vector of its gradients."""
    net = make(replace(recipe, **changes), material, Generator().manual_seed(5)).to(dtype).train()
    return net, flatten(net)[1]


def batch_of(recipe, material, dtype=torch.float64, size=24):
    x, y = next(recipe.draw(material, size, Generator().manual_seed(2)))
    return x, y.to(dtype) if y.is_floating_point() else y


def agree(left: nn.Module, right: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, one), other in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=name)
    scale = max(float(p.grad.abs().max()) for p in right.parameters())
    for (name, one), other in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("kit", ["torch", "scratch"])
@pytest.mark.parametrize("name", [*RECIPES])
def test_loss_gradients_and_statistics_are_those_of_autograd(name, kit, material) -> None:
    recipe, sizes = RECIPES[name], {"kit": kit, "hidden": 12, "layers": min(RECIPES[name].layers, 6)}
    (net, gradients), (plain, others) = (net_of(recipe, material, **sizes) for _ in range(2))
    x, y = batch_of(recipe, material)
    run = differentiate(net, gradients)
    assert isinstance(run, ByHand)
    for _ in range(3):
        expected = by_autograd(plain, others)(x, y, len(x))
        assert run(x, y, len(x)) == pytest.approx(expected, rel=1e-12)
        agree(net, plain)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bend", [nn.Tanh, nn.ReLU, scratch.ReLU])
def test_any_order_of_the_known_layers_will_do(bend, bias) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Embedding(9, 4), nn.Flatten(), bend(), nn.BatchNorm1d(12, momentum=0.3, eps=1e-3), bend(),
        nn.Linear(12, 5, bias), nn.Linear(5, 7, bias), nn.BatchNorm1d(7), nn.BatchNorm1d(7), nn.Linear(7, 9), bend(),
    ).double()  # fmt: skip
    plain = copy.deepcopy(net)
    x, y = torch.randint(9, (11, 3)), torch.randint(9, (11,))
    loss = differentiate(net, flatten(net)[1])(x, y, 11)
    assert loss == pytest.approx(by_autograd(plain, flatten(plain)[1])(x, y, 11), rel=1e-12)
    agree(net, plain)


@pytest.mark.parametrize(
    "layer",
    [nn.Sigmoid(), nn.BatchNorm1d(6, momentum=None), nn.BatchNorm1d(6, affine=False),
     nn.BatchNorm1d(6, track_running_stats=False), nn.LayerNorm(6)],
    ids=lambda layer: f"{layer}",
)  # fmt: skip
def test_a_layer_without_a_row_goes_by_autograd_and_not_over_processes(layer) -> None:
    net = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(6, 6), layer, nn.Linear(6, 9))
    plain = copy.deepcopy(net)
    x, y, gradients = torch.randint(9, (11, 3)), torch.randint(9, (11,)), flatten(net)[1]
    assert differentiate(net, gradients)(x, y, 11) == F.cross_entropy(plain(x), y).item()
    assert gradients.abs().max() > 0
    with pytest.raises(InputError, match="3: no layer that several processes can train"):
        differentiate(net, gradients, lambda values: None)


def plain_loop(net, batches, recipe):
    """The notebook's loop, as it is written: the losses, and the net is trained."""
    losses = []
    for step, (x, y) in enumerate(batches):
        loss = F.cross_entropy(net(x), y)
        for p in net.parameters():
            p.grad = None
        loss.backward()
        rate = recipe.rate * recipe.schedule(step / recipe.steps)
        for p in net.parameters():
            p.data += -rate * p.grad
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def numbers(net) -> torch.Tensor:
    values = (v for v in net.state_dict().values() if v.is_floating_point())
    return torch.cat([v.double().flatten() for v in values])


@pytest.mark.parametrize("name", ["lecture", "batchnorm", "kaiming", "deep"])
def test_after_a_hundred_steps_it_is_as_near_to_float64_as_the_plain_loop(name, material) -> None:
    """Each rounding is as large in one loop as in the other, so the two errors are alike."""
    recipe = replace(RECIPES[name], hidden=40)
    draw = recipe.draw(material, recipe.batch, Generator().manual_seed(7))
    batches = [next(draw) for _ in range(STEPS)]
    (truth, _), (plain, _) = (
        net_of(recipe, material, dtype, hidden=40) for dtype in (torch.float64, torch.float32)
    )
    ours, _ = net_of(recipe, material, torch.float32, hidden=40)
    truth.load_state_dict(ours.state_dict())
    exact, theirs = (plain_loop(net, batches, recipe) for net in (truth, plain))
    training = Training(ours, material, recipe, Generator())
    training._batches = iter(batches)
    found = [training._take() for training.step in range(STEPS)]
    for mine, other, true in (
        (torch.tensor(found, dtype=torch.float64), theirs, exact),
        (numbers(ours), numbers(plain), numbers(truth)),
    ):
        error = (other - true).abs()
        assert 0 < float(error.max()) < 1e-3
        assert float((mine - true).abs().max()) < 8 * float(error.max())
        assert float((mine - true).norm()) < 4 * float(error.norm())


def test_watched_and_unwatched_steps_have_the_same_bits_and_hooks_see_what_autograd_shows(material) -> None:
    recipe = replace(RECIPES["lecture"], hidden=12, steps=7)
    nets = [make(recipe, material, Generator().manual_seed(1)) for _ in range(3)]
    trainings = [Training(net, material, recipe, Generator().manual_seed(2)) for net in nets]
    trainings[2]._differentiate = by_autograd(nets[2], trainings[2]._optimiser.gradients)
    assert isinstance(trainings[0]._differentiate, ByHand)
    seen = []
    for net, training in list(zip(nets, trainings, strict=True))[1:]:
        with Diagnostics(net, 3) as diagnostics, Ledger(net) as ledger:
            for loss in training:
                diagnostics.record(loss)
                ledger.count(loss)
        seen.append((diagnostics, ledger))
    list(trainings[0])
    for name, value in nets[0].state_dict().items():
        assert torch.equal(value, nets[1].state_dict()[name]), name
    (ours, entries), (theirs, others) = ((d, ledger.entries()) for d, ledger in seen)
    for mine, other in zip(ours.records, theirs.records, strict=True):
        assert (
            [layer.name for layer in mine.layers]
            == [layer.name for layer in other.layers]
            == ["tanh1", "tanh2"]
        )
        for a, b in zip(mine.layers, other.layers, strict=True):
            assert a.output.std == pytest.approx(b.output.std, rel=1e-4)
            assert a.gradient.std == pytest.approx(b.gradient.std, rel=1e-3)
        for a, b in zip(mine.parameters, other.parameters, strict=True):
            assert a.gradient.std == pytest.approx(b.gradient.std, rel=1e-3)
    for a, b in zip(entries, others, strict=True):
        assert (a.name, a.reason) == (b.name, b.reason)
        assert a.gradient == pytest.approx(b.gradient, rel=1e-3)


class Fault(Exception):
    """What a collective raises in the middle of a pass."""


@pytest.mark.parametrize("calls", [0, 1, 5, 12])
def test_a_pass_that_breaks_off_leaves_the_net_as_it_was(calls, material) -> None:
    net, gradients = net_of(RECIPES["lecture"], material, hidden=12)
    before, left = copy.deepcopy(net.state_dict()), [calls]

    def add(values: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Fault

    run = differentiate(net, gradients, add)
    with pytest.raises(Fault):
        run(*batch_of(RECIPES["lecture"], material), 24)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_with_torchs_operations_as_with_numpys(material, monkeypatch) -> None:
    """They are what CUDA has."""
    for name in ("lecture", "relu", "quick", "batchnorm"):
        nets = [net_of(RECIPES[name], material, hidden=12) for _ in range(2)]
        batch = batch_of(RECIPES[name], material)
        first = differentiate(*nets[0])(*batch, 24)
        with monkeypatch.context() as patch:
            patch.setattr(tape, "_NUMPY", tape._TORCH)
            patch.setattr(tape, "_as_array", tape._as_it_is)
            assert differentiate(*nets[1])(*batch, 24) == pytest.approx(first, rel=1e-12)
        agree(nets[0][0], nets[1][0])


def test_a_training_with_scratch_layers_imports_no_compiler(tmp_path) -> None:
    code = (
        "import sys; from train.__main__ import main; "
        "code = main(['--recipe', 'lecture', '--steps', '3', '-o', 'c.pt']); "
        "sys.exit(code or 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(CHECKOUT)}, capture_output=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
