"""The larger or the smaller of two values, element by element: what grows with its argument passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.torch_models import check, randomise

IMAGES = torch.randn(2, 3, 6, 6)


class MaxFeatureMap(nn.Module):
    """As in LightCNN: half of the channels against the other half, or one convolution against another one."""

    def __init__(self, larger, split=True):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(8)
        self.one, self.two, self.split, self.larger = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), split, larger

    def forward(self, x):
        first, second = self.conv(x).chunk(2, 1) if self.split else (self.one(x), self.two(x))
        return self.bn(self.larger(first, second))


class Below(MaxFeatureMap):
    """BatchNorms above a comparison, both of one layer, or of two."""

    def __init__(self, larger, *norms):
        super().__init__(larger)
        self.norms, self.last = nn.ModuleList(norms), nn.Conv2d(3, 4, 1)
        del self.bn, self.conv, self.one, self.two

    def forward(self, x):
        first, second = self.norms[0](x), self.norms[-1](x.flip(2))
        return self.last(self.larger(first, second))


def positive(model):
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.abs_()
    return model


COMPARISONS = {
    "max": torch.max,
    "min": torch.min,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmax": torch.fmax,
    "amax of a stack": lambda a, b: torch.stack([a, b]).amax(0),
    "amin of a stack": lambda a, b: torch.stack([a, b]).amin(0),
}


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("larger", COMPARISONS)
def test_positive_scales_and_any_shift_pass_a_comparison(larger, split):
    check(positive(MaxFeatureMap(COMPARISONS[larger], split)), IMAGES, folded=["bn"], randomised=True)


@pytest.mark.parametrize("larger", [torch.max, torch.minimum])
def test_a_negative_scale_does_not_pass_a_comparison(larger):
    model = positive(MaxFeatureMap(larger))
    model.bn.weight.data[3] *= -1
    check(model, IMAGES, kept=["bn"], because="lets no negative scale through", randomised=True)


def test_a_comparison_with_a_constant_bends_the_map():
    check(
        positive(MaxFeatureMap(lambda a, b: torch.maximum(a + b, torch.zeros(())))),
        IMAGES,
        kept=["bn"],
        randomised=True,
    )


def test_what_both_operands_lack_alike_passes_down():
    check(positive(Below(torch.max, nn.BatchNorm2d(3))), IMAGES, folded=["norms.0"], randomised=True)


def test_what_two_operands_lack_otherwise_stays():
    model = positive(Below(torch.max, nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    reason = "has another operand that is not scaled and shifted alike"
    check(model, IMAGES, kept=["norms.0", "norms.1"], because=reason, randomised=True)
