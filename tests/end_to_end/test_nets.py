"""Small versions of well-known nets, folded as modules and as ONNX files: the same verdicts, and the same numbers."""

from __future__ import annotations

import io
import warnings
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

import bnfold
from benchmarks import branches
from benchmarks.nets import NETS, DenseNet, anchor, build
from bnfold.onnx.run import run_exactly

BOUND = 1e-12

# How many BatchNorms there are, and of how many the scale alone goes and how many stay, with all gammas positive and
# with 30 % of them negative. Counted by hand from what stands before and behind each BatchNorm; the reasons are in
# docs/worth.md.
EXPECTED = {
    "DenseNet-121": (13, (7, 0), (0, 7)),
    "pre-activation ResNet-50": (13, (4, 0), (0, 5)),
    "IResNet-50": (17, (4, 0), (4, 0)),
    "x-vector": (5, (1, 0), (0, 1)),
    "TDNN": (5, (0, 0), (0, 0)),
    "TDNN, ReLU first": (5, (0, 0), (0, 0)),
    "CREPE": (3, (2, 0), (0, 3)),
    "CREPE, no padding": (3, (0, 0), (0, 3)),
    "InceptionTime": (4, (0, 0), (0, 0)),
    "Inception v1": (57, (0, 0), (0, 0)),
    "airbench94": (6, (0, 0), (0, 0)),
    "RepVGG-A0": (12, (0, 0), (0, 0)),
    "LeViT-128S": (20, (0, 0), (0, 0)),
    "ShuffleNet v2": (18, (0, 0), (0, 0)),
    "ConvE": (3, (0, 0), (0, 0)),
    "tabular": (3, (0, 0), (0, 0)),
    "tagger": (2, (0, 0), (0, 0)),
}


def case(name, gammas):
    """Where the signs of gamma decide nothing, gammas of one sign are left to the slow tests."""
    _, positive, mixed = EXPECTED[name]
    tedious = gammas == "positive" and positive == mixed
    return pytest.param(name, gammas, marks=pytest.mark.slow if tedious else ())


CASES = [case(name, gammas) for name in EXPECTED for gammas in ("positive", "mixed")]


def double(model, inputs):
    return model.double(), tuple(each.double() if each.is_floating_point() else each for each in inputs)


def export(model, inputs):
    data = io.BytesIO()
    keep = torch.onnx.TrainingMode.PRESERVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, inputs, data, dynamo=False, do_constant_folding=False, training=keep)
    return onnx.load_from_string(data.getvalue())


def test_the_report_of_a_deep_net_fits_a_screen_and_says_each_reason_once():
    """DenseNet at its depth: 121 BatchNorms, half of which stay for reasons of a few kinds."""
    torch.manual_seed(0)
    model, inputs = DenseNet(growth=2, classes=3), (torch.randn(2, 3, 64, 64),)
    anchor(model, inputs, 0.0)
    _, report = bnfold.fold(model, inputs, verify=False)
    assert (report.count("folded"), report.count("scale folded")) == (59, 62)
    assert len(report.to_text(width=60).splitlines()) <= 40
    lines = str(report).splitlines()
    assert " ".join(lines).startswith(report.summary())
    assert len(lines) < 30
    assert len([line for line in lines if "not into what comes before" in line]) < 6


def count(model):
    return Counter(node.op_type for node in model.graph.node)["BatchNormalization"]


def run(model, inputs):
    with torch.no_grad():
        return model(*inputs).numpy()


def run_file(model, inputs):
    feed = dict(
        zip((item.name for item in model.graph.input), (each.numpy() for each in inputs), strict=True)
    )
    (output,) = run_exactly(model, [feed])[0].values()
    return output


def deviation(before, after):
    return np.abs(before - after).max() / np.abs(before).max()


def outcomes(report):
    return [verdict.outcome for verdict in report.verdicts]


def test_every_net_has_its_expectation():
    assert EXPECTED.keys() == NETS.keys()


@pytest.mark.parametrize(("name", "gammas"), CASES)
def test_both_frontends_decide_alike_and_compute_the_same_in_float64(name, gammas):
    norms, positive, mixed = EXPECTED[name]
    module, inputs = double(*build(name, gammas, small=True))
    file = export(module, inputs)
    assert count(file) == norms, "the exporter folded by itself"

    folded, report = bnfold.fold(module, inputs, verify=False)
    folded_file, file_report = bnfold.fold(file, verify=False, runtime="any")

    halves, kept = positive if gammas == "positive" else mixed
    assert (report.count("folded"), report.count("scale folded"), report.count("kept")) == (
        norms - halves - kept,
        halves,
        kept,
    )
    assert outcomes(file_report) == outcomes(report)
    assert count(folded_file) == kept
    assert deviation(run(module, inputs), run(folded, inputs)) <= BOUND
    assert deviation(run_file(file, inputs), run_file(folded_file, inputs)) <= BOUND
    # the file holds eps, and constants of the activations, in float32
    assert deviation(run(module, inputs), run_file(folded_file, inputs)) <= 1e-6


@pytest.mark.parametrize("gammas", [pytest.param("positive", marks=pytest.mark.slow), "mixed"])
@pytest.mark.parametrize("name", branches.BRANCHES)
def test_nets_with_branches_compute_the_same_folded_as_a_module_and_as_a_file(name, gammas):
    module, inputs = double(*branches.build(name, gammas, small=True))
    file = export(module, inputs)
    folded, _ = bnfold.fold(module, inputs, verify=False)
    folded_file, _ = bnfold.fold(file, verify=False, runtime="any")
    assert deviation(run(module, inputs), run(folded, inputs)) <= BOUND
    assert deviation(run_file(file, inputs), run_file(folded_file, inputs)) <= BOUND


def operators(file):
    nodes = Counter(node.op_type for node in file.graph.node)
    kinds = {
        "Conv": "Conv",
        "Gemm": "Gemm MatMul",
        "Add": "Add Sub Sum",
        "BatchNormalization": "BatchNormalization",
    }
    return {kind: sum(nodes[name] for name in names.split()) for kind, names in kinds.items()}


@pytest.mark.parametrize("way", ["module", "file"])
@pytest.mark.parametrize("name", [name for name in branches.BRANCHES if name != "Diverse Branch Block"])
def test_merged_a_net_has_at_most_the_operators_of_its_own_form(name, way):
    """But for Diverse Branch Blocks, whose border between two convs is written by code that reads the BatchNorm."""
    module, inputs = branches.build(name, "mixed", small=True)
    own = operators(export(module.reparameterize(), inputs))
    file = export(bnfold.fold(module, inputs)[0] if way == "module" else module, inputs)
    left = operators(file if way == "module" else bnfold.fold(file, runtime="any")[0])
    assert not {kind: (left[kind], most) for kind, most in own.items() if left[kind] > most}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_output_depends_on_every_input_enough_for_a_wrong_fold_to_show(name):
    module, inputs = build(name, "mixed", small=True)
    other = NETS[name].small_inputs(1)
    assert deviation(run(module, inputs), run(module, other)) > 1e-2


@pytest.mark.parametrize("name", ["DenseNet-121", "x-vector", "LeViT-128S", "ShuffleNet v2", "tabular"])
def test_a_variance_off_by_a_fraction_of_a_percent_is_caught(name):
    module, inputs = double(*build(name, "mixed", small=True))
    folded, _ = bnfold.fold(module, inputs, verify=False)
    norm = next(part for part in module.modules() if hasattr(part, "running_var"))
    norm.running_var[0] *= 1.002
    assert deviation(run(module, inputs), run(folded, inputs)) > 1000 * BOUND


@pytest.mark.parametrize("name", ["DenseNet-121", "IResNet-50", "CREPE"])
def test_halves_can_be_left_alone(name):
    norms, (halves, _), _ = EXPECTED[name]
    module, inputs = build(name, small=True)
    _, report = bnfold.fold(module, inputs, halves=False)
    assert (report.count("folded"), report.count("kept")) == (norms - halves, halves)
