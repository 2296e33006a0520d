"""Random modules with random statistics: whatever was folded, the outputs agree in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bnfold.torch import fold
from tests.torch_models import agree, randomise

CHANNELS = 4


def convolution(kind):
    options = {
        "plain": {"kernel_size": 3},
        "padded": {"kernel_size": 3, "padding": 1},
        "biasless": {"kernel_size": 1, "bias": False},
        "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
        "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False},
        "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    }
    if kind == "transposed":
        return nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1, groups=2)
    return nn.Conv2d(CHANNELS, CHANNELS, **options[kind])


def same_size(x, y):
    """Cut the larger of two images to the smaller."""
    h, w = min(x.shape[2], y.shape[2]), min(x.shape[3], y.shape[3])
    return x[:, :, :h, :w], y[:, :, :h, :w]


ONE = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu_(x * 1.0),
    "relu of itself": lambda x: F.relu(x, inplace=True),
    "leaky": lambda x: F.leaky_relu(x, 0.3),
    "tanh": torch.tanh,
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "mean": lambda x: x - 0.7 * x.mean((2, 3), keepdim=True),
    "turn": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "shuffle": lambda x: x.view(x.size(0), 2, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "swap": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "flip": lambda x: x.flip(1),
    "pick": lambda x: x[:, [2, 0, 3, 1]],
    "scale": lambda x: x * torch.tensor([1.0, -2.0, 0.5, 3.0]).view(1, -1, 1, 1) + 0.25,
    "pad": lambda x: F.pad(x, (1, 0, 0, 1)),
    "resize": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest")[:, :, ::2, ::2],
}
TWO = {
    "add": lambda x, y: x + y,
    "add in place": lambda x, y: x.clone().add_(y),
    "subtract": lambda x, y: x - y,
    "weighted": lambda x, y: torch.add(x, y, alpha=0.5),
    "multiply": lambda x, y: x * torch.sigmoid(y),
    "concatenate": lambda x, y: torch.cat([x, y], 1)[:, ::2],
    "stack": lambda x, y: torch.stack([x, y]).sum(0),
}
CONVS = ["plain", "padded", "biasless", "grouped", "depthwise", "reflect", "transposed"]

STEP = st.one_of(
    st.tuples(st.just("norm"), st.integers(0, 3), st.integers(0, 9)),
    st.tuples(st.just("conv"), st.integers(0, 4), st.integers(0, 9)),
    st.tuples(st.sampled_from(sorted(ONE)), st.just(0), st.integers(0, 9)),
    st.tuples(st.sampled_from(sorted(TWO)), st.integers(0, 9), st.integers(0, 9)),
)


class RandomNet(nn.Module):
    """Runs drawn steps; each reads one of the values made so far (0: the last one), modules may be called again."""

    def __init__(self, steps, convs, outputs):
        super().__init__()
        self.steps, self.outputs = steps, outputs
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in range(4))
        self.convs = nn.ModuleList(convolution(kind) for kind in convs)

    def forward(self, x):
        values = [self.convs[0](x)]
        for kind, which, place in self.steps:
            value = values[-1 - place % len(values)] if place > 3 else values[-1]
            if kind == "norm":
                values.append(self.norms[which](value))
            elif kind == "conv":
                values.append(self.convs[which % len(self.convs)](F.pad(value, (1, 1, 1, 1), "replicate")))
            elif kind in ONE:
                values.append(ONE[kind](value))
            else:
                values.append(TWO[kind](*same_size(value, values[-1 - which % len(values)])))
        return values[-1], [value.mean() for value in values[-self.outputs :]]


def examine(steps, convs, outputs, seed, positive):
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = randomise(RandomNet(steps, convs, outputs), seed).double()
        if positive:
            for norm in model.norms:
                norm.weight.data.abs_()
        images = torch.randn(2, CHANNELS, 7, 7)
        after, report = fold(model, images, verify=False)
        agree(model, after, images, 2e-12)
        left = sum(isinstance(module, nn.BatchNorm2d) for module in after.modules())
        assert left == report.count("kept")
    finally:
        torch.set_default_dtype(default)


ARGUMENTS = {
    "steps": st.lists(STEP, min_size=1, max_size=9),
    "convs": st.lists(st.sampled_from(CONVS), min_size=1, max_size=4),
    "outputs": st.integers(1, 3),
    "seed": st.integers(0, 9),
    "positive": st.booleans(),
}
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=20, suppress_health_check=QUIET)
@given(**ARGUMENTS)
def test_random_modules(steps, convs, outputs, seed, positive):
    examine(steps, convs, outputs, seed, positive)


@pytest.mark.slow
@settings(max_examples=4000, suppress_health_check=QUIET)
@given(**ARGUMENTS)
def test_very_many_random_modules(steps, convs, outputs, seed, positive):
    examine(steps, convs, outputs, seed, positive)
