"""train.calibration: contexts with weights give what the examples themselves would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Generator

import bnfold
import data
from train import calibration
from train.batches import draw_contexts, presence
from train.calibration import AS_DRAWN, OVER_SET
from train.material import prepare
from train.recipes import RECIPES, make


@pytest.fixture(scope="module")
def material():
    return prepare(data.read_names(None)[::40])


def net_of(recipe, material):
    return make(recipe, material, Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["batchnorm", "deep"])
def test_weighted_contexts_stand_for_all_examples(name, material):
    net = net_of(RECIPES[name], material)
    found = calibration.calibrate(net, material, RECIPES[name])
    assert list(found) == [AS_DRAWN]
    expected = bnfold.calibrate(net, [material.examples[0]])
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found[AS_DRAWN].state_dict()[key], value, rtol=1e-6, atol=1e-7)


def test_as_drawn_is_what_the_batches_hold_and_over_the_set_is_not(material):
    recipe = replace(RECIPES["quick"], batch=64)
    net = net_of(recipe, material)
    found = calibration.calibrate(net, material, recipe)
    assert list(found) == [AS_DRAWN, OVER_SET]
    batches = draw_contexts(material, recipe.batch, Generator().manual_seed(0))
    inputs = torch.cat([net[:3](next(batches)[0]).detach() for _ in range(800)])
    scale = inputs.std(0)
    apart = {
        key: ((each.bn1.running_mean - inputs.mean(0)) / scale).abs().max() for key, each in found.items()
    }
    assert apart[AS_DRAWN] < 0.02
    assert apart[OVER_SET] > 0.1


def test_presence_sums_to_the_batch(material):
    for name in ("quick", "lecture"):
        recipe = RECIPES[name]
        assert float(presence(recipe.draw, material, recipe.batch).sum()) == pytest.approx(recipe.batch)
