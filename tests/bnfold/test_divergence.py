"""The layer in which two models part: the first whose difference lasts, not one that arrives scaled."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bnfold
from bnfold.cases import Case
from bnfold.divergence import Recording, find_divergence
from bnfold.equivalence import Worst
from bnfold.verification import open_side, verify_sides
from tests.onnx_models import model, norm, weights
from tests.torch_models import randomise

CASE = Case("given 1", ())


@dataclass
class Side:
    """A side whose values are said."""

    values: dict[str, float]
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kind: str = "module"

    def record(self, case, output):
        values = {name: np.array([value, 1.0]) for name, value in self.values.items()}
        return Recording(self.kind, values, dict.fromkeys(values, "Layer"), self.sources)


def find(before: Side, after: Side):
    return find_divergence(before, after, CASE, Worst(0.5, output="y", bound=1e-6))


CHAIN = {"": ("c",), "c": ("b",), "b": ("a",)}


def test_a_difference_that_is_set_right_is_passed_over():
    old = Side({"a": 0.5, "b": 0.5, "c": 0.5}, CHAIN)
    found = find(old, Side({"a": 0.9, "b": 0.5, "c": 0.7}))
    assert (found.layer, found.fed_by) == ("c", ("b",))
    assert str(found).endswith("`b` before it agrees")


def test_the_first_of_those_that_last_is_named_even_if_one_model_lacks_a_value_on_the_way():
    old = Side({"a": 0.5, "b": 0.5, "c": 0.5}, CHAIN)
    found = find(old, Side({"a": 0.9, "c": 0.7}))
    assert (found.layer, found.fed_by) == ("a", ())
    assert found.deviation == pytest.approx(0.4)


def test_a_branch_that_agrees_beside_it_does_not_hide_it():
    sources = {"": ("sum",), "sum": ("left", "right"), "left": ("stem",), "right": ("stem",)}
    old = Side({"stem": 0.5, "left": 0.5, "right": 0.5, "sum": 0.5}, sources)
    found = find(old, Side({"stem": 0.5, "left": 0.7, "right": 0.5, "sum": 0.6}))
    assert (found.layer, found.fed_by) == ("left", ("stem",))


def test_models_of_two_kinds_or_without_common_values_have_none():
    old = Side({"a": 0.5}, {"": ("a",)})
    assert find(old, Side({"a": 0.7}, kind="ONNX")) is None
    assert find(old, Side({"b": 0.7})) is None
    assert find_divergence(old, old, CASE, None) is None


class Residual(nn.Module):
    """Two convolutions with BatchNorms on one road, one on the other, and functions between them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)
        self.conv2, self.bn2 = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.short, self.bn3 = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.tanh(self.bn1(self.conv1(x)))
        return self.head(
            (torch.tanh(self.bn2(self.conv2(x))) + torch.sigmoid(self.bn3(self.short(x)))).mean(-1)
        )


@pytest.mark.parametrize(
    ("layer", "named", "fed"),
    [
        ("conv1", "conv1", ()),
        ("conv2", "conv2", ("bn1",)),
        ("short", "short", ("bn1",)),
        ("head", "head", ("bn2", "bn3")),
    ],
)
def test_in_a_folded_module_the_layer_that_was_tampered_with_is_named(layer, named, fed):
    torch.manual_seed(0)
    before, given = randomise(Residual()), torch.randn(3, 3, 8)
    after, report = bnfold.fold(before, given)
    assert report.count("folded") == 3
    with torch.no_grad():
        after.get_submodule(layer).weight *= 1.01
    found = verify_sides(open_side(before), open_side(after), given, locate=True)
    assert (found.divergence.layer, found.divergence.fed_by) == (named, fed)


def test_a_module_without_gradients_is_followed_in_the_order_of_its_calls():
    torch.manual_seed(0)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        @torch.no_grad()
        def forward(self, x):
            return self.second(self.first(x).tanh())

    before = Whole().eval()
    after = copy.deepcopy(before)
    after.second.weight.data *= 1.01
    found = verify_sides(open_side(before), open_side(after), torch.randn(4, 3), locate=True)
    assert (found.divergence.layer, found.divergence.fed_by) == ("second", ("first",))


def test_in_a_folded_file_the_value_behind_the_tampered_weight_is_named():
    text = """net (float[N,3,8] x) => (float[N,4,6] y) {
        c = Conv(x, w)
        n = BatchNormalization(c, s, b, m, v)
        r = Tanh(n)
        y = Conv(r, q)
    }"""
    before = model(text, {"w": weights(4, 3, 3), "q": weights(4, 4, 1), **norm(4)})
    folded, _ = bnfold.fold(before)
    tensor = next(tensor for tensor in folded.graph.initializer if tensor.name == "q")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), "q"))
    found = verify_sides(open_side(before), open_side(folded), locate=True)
    assert (found.divergence.layer, found.divergence.maker, found.divergence.fed_by) == ("y", "Conv", ("r",))
