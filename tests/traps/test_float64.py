"""A model in float64 shows no noise of its own: what roundings do is measured, and a wrong fold is still caught.

A shift that a BatchNorm takes away again costs as many digits as it is large, before the fold and after it, but in
other places.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import bnfold
import bnfold.onnx
from bnfold.equivalence import Comparison
from bnfold.torch.fold import ModuleRuns
from tests.onnx_models import model, norm, weights
from tests.torch_models import randomise
from tests.traps.test_torch_jumps import Jumps

SEEDS = range(3)


def far_out(shift: float, seed: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Linear(30, 10)).double().eval()
    with torch.no_grad():
        net[0].bias += shift
        net[1].running_mean += shift
    return net, torch.randn(8, 20, dtype=torch.float64)


def spoilt(folded: nn.Module, by: float) -> nn.Module:
    """A folded module whose first matrix is wrong by a relative error."""
    with torch.no_grad():
        folded[0].weight *= 1 + by
    return folded


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shift", [1e4, 1e6])
def test_a_right_fold_of_a_shift_that_cancels_is_not_refused(shift, inplace):
    for seed in SEEDS:
        net, inputs = far_out(shift, seed)
        folded, report = bnfold.fold(copy.deepcopy(net), inputs, inplace=inplace)
        assert report.count("folded") == 1
        assert report.verified
        assert all(item.bound < 1e-13 * shift for item in report.evidence)
        bnfold.verify(net, folded, inputs)


@pytest.mark.parametrize(("shift", "by"), [(0.0, 1e-10), (1e4, 1e-9), (1e6, 1e-7)])
def test_a_wrong_fold_of_it_is_refused(shift, by):
    for seed in SEEDS:
        net, inputs = far_out(shift, seed)
        wrong = spoilt(bnfold.fold(net, inputs)[0], by)
        runs = ModuleRuns(net, inputs, lambda twin, wrong=wrong: wrong)
        with pytest.raises(bnfold.NotEquivalent, match="differ in float64"):
            Comparison(runs, 1).judge(wrong)
        with pytest.raises(bnfold.NotEquivalent, match="differ in float64"):
            bnfold.verify(net, wrong, inputs)


def test_a_jump_in_float64_excuses_no_wrong_fold():
    torch.manual_seed(0)
    net = randomise(Jumps(height=1.0)).double()
    inputs = torch.randint(-16, 16, (8, 4, 16)).double() / 8
    wrong = bnfold.fold(net, inputs)[0]
    with torch.no_grad():
        wrong.conv.weight *= 1 + 1e-9
    with pytest.raises(bnfold.NotEquivalent, match="differ in float64"):
        Comparison(ModuleRuns(net, inputs, lambda twin: wrong), 1).judge(wrong)


FILES = {
    "MatMul": ("float[8, 20] x", "float[8, 10] y", "h = Gemm(x, w, c)", "y = MatMul(l, q)"),
    "Conv": ("float[2, 20, 5] x", "float[2, 10, 5] y", "h = Conv(x, w, c)", "y = Conv(l, q)"),
}


def far_out_file(name: str, shift: float, seed: int):
    given, gives, first, last = (text.replace("float", "double") for text in FILES[name])
    wide = {"dtype": np.float64, "seed": seed}
    numbers = {**norm(30, **wide), "c": weights(30, **wide) + shift}
    numbers["m"] = numbers["m"] + shift
    shapes = ((20, 30), (30, 10)) if name == "MatMul" else ((30, 20, 1), (10, 30, 1))
    numbers |= {"w": weights(*shapes[0], **wide), "q": weights(*shapes[1], **wide)}
    text = f"g ({given}) => ({gives}) {{ {first} k = BatchNormalization(h, s, b, m, v) l = Tanh(k) {last} }}"
    return model(text, numbers)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("shift", [1e4, 1e6])
def test_a_right_fold_of_a_file_in_float64_is_not_refused(name, shift):
    for seed in SEEDS:
        before = far_out_file(name, shift, seed)
        after, report = bnfold.onnx.fold(before)
        assert report.count("folded") == 1
        assert report.verified
        bnfold.verify(before, after)


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_fold_of_a_file_in_float64_is_refused(name):
    for seed in SEEDS:
        before = far_out_file(name, 1e4, seed)
        after, _ = bnfold.onnx.fold(before)
        tensor = next(tensor for tensor in after.graph.initializer if tensor.name == "q")
        wrong = np.frombuffer(tensor.raw_data) * (1 + 1e-9)
        tensor.raw_data = wrong.tobytes()
        with pytest.raises(bnfold.NotEquivalent, match="differ in float64"):
            bnfold.verify(before, after)
