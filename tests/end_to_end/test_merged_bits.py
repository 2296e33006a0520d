"""Merged as a module and merged as a file, a net has the same numbers to the last bit, where both merge the same."""

from __future__ import annotations

import io

import numpy as np
import onnx
import pytest
import torch

import bnfold
from benchmarks import branches

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)

SAME = ("MobileOne-S0", "RepVGG-B1g4", "ACNet", "RepViT-M0.9", "OREPA", "ExpandNet", "LoRA")
"""Nets in which no code of a module computes what a file would merge (a layer scale beside a call)."""


def exported(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    """A file in which every BatchNorm is left."""
    file = io.BytesIO()
    keep = torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(module, inputs, file, dynamo=False, training=keep, do_constant_folding=False)
    return onnx.load_from_string(file.getvalue())


def numbers(model: onnx.ModelProto) -> list[bytes]:
    """All weights and biases, whatever their names and in whichever order their axes are stored."""
    stored = (t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    return sorted({np.sort(onnx.numpy_helper.to_array(tensor).ravel()).tobytes() for tensor in stored})


@pytest.mark.parametrize("name", SAME)
def test_merging_and_exporting_commute_to_the_last_bit(name):
    module, inputs = branches.build(name, small=True)
    for norm in (
        part for part in module.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
    ):
        norm.eps = float(np.float32(norm.eps))  # as a file has it
    file, report = bnfold.fold(exported(module, inputs), verify=False, runtime="any")
    folded, _ = bnfold.fold(module, inputs, verify=False)
    assert report.merged
    assert numbers(file) == numbers(exported(folded, inputs))
