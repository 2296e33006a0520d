"""Folding what was exported and exporting what was folded give the same weights, bit for bit.

A file keeps epsilon in float32 and a module in float64, so the one that is not a default is a power of two here.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bnfold
import bnfold.onnx
from bnfold.onnx.slots import find_slots
from tests.onnx_models import count
from tests.torch_models import randomise


class Tdnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(10, 12), nn.BatchNorm1d(12)
        self.conv, self.last = nn.Conv1d(12, 6, 3, bias=False), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.last(self.conv(torch.relu(self.norm(self.linear(x).transpose(1, 2)))))


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(12)

    def forward(self, x):
        return torch.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1)))


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear, self.norm = (
            nn.Embedding(27, 10),
            nn.Linear(30, 20, bias=False),
            nn.BatchNorm1d(20),
        )

    def forward(self, x):
        return torch.tanh(self.norm(self.linear(self.table(x).flatten(1))))


NETS = {
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False), nn.SiLU(),
            nn.ConvTranspose2d(8, 6, 4, stride=2, groups=2), nn.BatchNorm2d(6, eps=2**-10),
        ),
        torch.zeros(2, 3, 9, 9),
    ),
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 5)
        ),
        torch.zeros(4, 6),
    ),
    "tdnn": (Tdnn, torch.zeros(2, 9, 10)),
    "joined": (Joined, torch.zeros(2, 3, 8, 8)),
    "lookup": (Lookup, torch.zeros(4, 3, dtype=torch.int64)),
}  # fmt: skip


def export(module, example, dynamo):
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            torch.onnx.export(module, (example,), data, dynamo=True, optimize=False, verbose=False)
        else:
            keep = torch.onnx.TrainingMode.PRESERVE
            torch.onnx.export(
                module, (example,), data, dynamo=False, do_constant_folding=False, training=keep
            )
    return onnx.load_from_string(data.getvalue())


def numbers(file):
    """Every linear operator's stored weight and bias, in order; a bias of zeros is none."""
    imported = bnfold.onnx.read(file)
    constants = imported.context.constants
    found = []
    for node in imported.graph.nodes:
        if node.linear is None:
            continue
        slots = find_slots(imported, node.name)
        weight = constants.array(slots.ref.inputs[slots.weight])
        found.append(weight if node.linear.order == "oi" or weight.ndim > 2 else weight.T)
        found.append(
            constants.array(slots.bias_value)
            if slots.bias_value
            else np.zeros(node.linear.outputs, np.float32)
        )
    return found


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETS)
def test_folding_and_exporting_commute(name, dynamo):
    build, example = NETS[name]
    module = randomise(build(), seed=3)
    exported = export(module, example, dynamo)
    assert count(exported) > 0, "the exporter folded by itself"

    folded_file, report = bnfold.fold(exported, runtime="any")
    folded_module, module_report = bnfold.fold(module, example)
    exported_fold = export(folded_module, example, dynamo)

    assert report.count("folded") == module_report.count("folded") == len(report.verdicts)
    for mine, theirs in zip(numbers(folded_file), numbers(exported_fold), strict=True):
        np.testing.assert_array_equal(mine.view(np.uint32), theirs.view(np.uint32))
