"""Dtypes, extreme numbers, chains, and one rounding."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bnfold import NotEquivalent
from bnfold.torch import fold, run
from tests.torch_models import check, randomise

IMAGES = torch.randn(2, 3, 6, 6)


def pair(**options):
    return nn.Sequential(nn.Conv2d(3, 4, 3, **options), nn.BatchNorm2d(4))


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("statistics", [torch.float32, None])
def test_every_storage_dtype_is_kept(weights, statistics):
    model = randomise(pair()).to(weights)
    if statistics is not None and weights != torch.float64:
        model[1].to(statistics)
    after, report = fold(model, IMAGES.to(weights))
    assert report.count("folded") == 1
    assert {tensor.dtype for tensor in after.state_dict().values()} == {weights}
    assert after(IMAGES.to(weights)).dtype == weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_every_folded_number_is_within_half_a_unit_in_the_last_place(dtype, bias):
    model = randomise(nn.Sequential(nn.Conv2d(3, 64, 5, bias=bias), nn.BatchNorm2d(64)), 3).to(dtype)
    model[1].running_mean.mul_(50)
    after, _ = fold(model, torch.randn(1, 3, 6, 6, dtype=dtype), verify=False)
    norm = model[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    old = model[0].bias.double() if bias else 0.0
    exact = {
        "weight": model[0].weight.double() * scale.view(-1, 1, 1, 1),
        "bias": (old - norm.running_mean.double()) * scale + norm.bias.double(),
    }
    for name, truth in exact.items():
        stored = getattr(after[0], name).detach()
        spacing = (
            torch.nextafter(stored.abs(), torch.full_like(stored, torch.inf)).double() - stored.abs().double()
        )
        assert ((stored.double() - truth).abs() <= 0.5000001 * spacing).all()


def test_a_shift_that_cancels_is_computed_in_float64():
    model = randomise(pair())
    with torch.no_grad():
        model[1].running_mean.copy_(torch.tensor([1e6, -1e6, 3e5, 2e5]))
        model[0].bias.copy_(model[1].running_mean + 0.25)
    after, _ = fold(model, IMAGES, verify=False)
    norm = model[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    exact = (model[0].bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    assert torch.equal(after[0].bias.detach(), exact.float())


def set_(model, **numbers):
    randomise(model)
    with torch.no_grad():
        for name, value in numbers.items():
            getattr(model[1], name)[1] = value
    return model


@pytest.mark.parametrize(
    "numbers", [{"weight": 0.0}, {"weight": -2.0}, {"running_var": 0.0}, {"weight": 0.0, "bias": 0.0}]
)
def test_odd_but_honest_numbers_are_folded(numbers):
    check(set_(pair(), **numbers), IMAGES, folded=["1"], randomised=True)


def test_no_variance_and_next_to_no_eps():
    model = set_(pair(), running_var=0.0)
    model[1].eps = 1e-12
    check(model, IMAGES, folded=["1"], randomised=True)


@pytest.mark.parametrize(
    ("numbers", "because"),
    [
        ({"running_var": -1.0}, "the variance of channel 1 is not positive"),
        ({"running_var": float("nan")}, "not finite"),
        ({"running_mean": float("inf")}, "not finite"),
        ({"weight": float("nan")}, "not finite"),
    ],
)
def test_dishonest_numbers_have_a_reason(numbers, because):
    _, report = fold(set_(pair(), **numbers), IMAGES)
    assert report.verdicts[0].outcome == "kept"
    assert because in report.verdicts[0].reason


def test_no_variance_and_no_eps_has_a_reason():
    model = set_(pair(), running_var=0.0)
    model[1].eps = 0.0
    _, report = fold(model, IMAGES)
    assert report.verdicts[0].outcome == "kept"


def test_what_would_overflow_half_precision_is_kept():
    model = set_(pair(), running_var=0.0, weight=30000.0).half()
    model[1].eps = 1e-8
    model[1].float()
    _, report = fold(model, IMAGES.half(), verify=False)
    assert report.verdicts[0].outcome == "kept"
    assert "overflow float16" in report.verdicts[0].reason


def test_two_batchnorms_behind_one_conv():
    check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), IMAGES, folded=["1", "2"])


def test_two_batchnorms_before_one_linear():
    check(
        nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
        torch.randn(4, 5),
        folded=["0", "1"],
    )


def test_two_batchnorms_alone_become_one():
    model = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5))
    after, _ = check(model, torch.randn(4, 5), folded=["1"], kept=["0"])
    assert type(after[0]) is nn.BatchNorm1d
    assert set(after.state_dict()) == {name for name in model.state_dict() if name.startswith("0.")}


def test_an_activation_between_batchnorm_and_conv_says_so():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1))
    check(model, IMAGES, kept=["0"], because="`1` (Relu)")


def test_a_deep_net_is_at_least_as_close_to_the_truth_folded_as_not():
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.3)]
    ratios = []
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(*[copy.deepcopy(layer) for layer in layers])
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        images = torch.randn(8, 8, 8, 8)
        model.train()(images)
        model.eval()
        with torch.no_grad():
            for layer in model:
                if isinstance(layer, nn.BatchNorm2d):
                    layer.weight.uniform_(0.5, 1.5)
                    layer.running_var.mul_(torch.empty(8).uniform_(0.7, 1.4))
        after, _ = fold(model, images)
        truth = run(copy.deepcopy(model).double(), images.double())[""]
        errors = [np.sqrt(np.mean((run(net, images)[""] - truth) ** 2)) for net in (after, model)]
        ratios.append(errors[0] / errors[1])
    assert np.median(ratios) < 1.05


def test_a_fold_that_is_off_by_a_fifth_of_a_percent_is_caught(monkeypatch):
    from bnfold.algebra import Linear

    honest = Linear.fold

    def dishonest(self, weight, bias):
        folded, shift = honest(self, weight, bias)
        folded[0] *= 1.001
        return folded, shift

    monkeypatch.setattr(Linear, "fold", dishonest)
    with pytest.raises(NotEquivalent):
        fold(randomise(pair()), IMAGES)


def test_a_model_that_fixes_its_own_dtype_is_compared_in_that():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)).float().exp().bfloat16()

    _, report = fold(randomise(Fixed()), IMAGES)
    assert report.count("folded") == 1
    assert report.verified


@pytest.mark.parametrize("example", [IMAGES, IMAGES.to("meta")])
def test_a_meta_model_is_decided_and_not_verified(example):
    model = pair().eval().to("meta")
    after, report = fold(model, example.to("meta"))
    assert report.count("folded") == 1
    assert not report.verified
    assert after[0].weight.is_meta
    assert "without numbers" in report.notes[0]


@pytest.mark.parametrize(
    "move", [lambda y: y.view(y.shape[0], -1), lambda y: y.unsqueeze(1), lambda y: y[0], lambda y: y.chunk(2)]
)
def test_a_meta_model_may_take_views(move):
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return move(self.bn(self.conv(x)))

    _, report = fold(Moved().eval().to("meta"), IMAGES.to("meta"))
    assert report.count("folded") == 1


def test_a_meta_model_is_not_decided_as_if_all_channels_were_alike():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            n, _, h, w = x.shape
            return self.bn(self.conv(x).view(n, 8, h // 2, w))

    outcomes = [
        [verdict.outcome for verdict in fold(net, x)[1].verdicts]
        for net, x in ((randomise(Rows()), IMAGES), (Rows().eval().to("meta"), IMAGES.to("meta")))
    ]
    assert outcomes == [["kept"], ["kept"]]


def test_a_channels_last_weight_stays_so():
    model = randomise(pair()).to(memory_format=torch.channels_last)
    after, _ = fold(model, IMAGES)
    assert after[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_wanted_of_what_they_were_wanted_of():
    model = randomise(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, bias=False),
            nn.BatchNorm2d(4),
        )
    )
    model[0].requires_grad_(False)
    after, _ = fold(model, IMAGES, merge=False)
    assert [p.requires_grad for p in after.parameters()] == [False, False, True, True]
    assert all(isinstance(p, nn.Parameter) for p in after.parameters())


def test_in_place_edits_the_module_itself():
    model = randomise(pair())
    conv = model[0]
    after, _ = fold(model, IMAGES, inplace=True)
    assert after is model
    assert model[0] is conv
    assert type(model[1]) is nn.Identity
