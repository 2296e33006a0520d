"""Situations out of public reports on fusing BatchNorms, rebuilt small; `docs/reports.md` says which they are.

Each is judged from outside: folded with verification off, then both models on inputs that the fold has not seen.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bnfold
from bnfold.torch import fold_program, load_folded
from bnfold.torch.program import without_own_advice
from tests.torch_models import randomise

REPORTS = Path(__file__).parents[2] / "docs" / "reports.md"


class Net(nn.Module):
    """The layers that a test names, and a forward that it gives."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, *args):
        return self.run(self, *args)


def outcomes(report):
    return {verdict.name: verdict.outcome for verdict in report.verdicts}


def deviation(before, after, *shapes):
    """The largest difference in float64 on inputs of these shapes, relative to the largest output."""
    generator, worst = torch.Generator().manual_seed(11), 0.0
    old, new = copy.deepcopy(before).double(), copy.deepcopy(after).double()
    for batch in (1, 3):
        args = [torch.randn(batch, *s, generator=generator, dtype=torch.float64) for s in shapes]
        with torch.no_grad():
            pairs = zip(*(y if isinstance(y, tuple) else (y,) for y in (old(*args), new(*args))), strict=True)
        worst = max(worst, *(float((a - b).abs().max() / a.abs().max()) for a, b in pairs))
    return worst


def fold(model, *shapes):
    """A net with random statistics in evaluation, folded in float64 with verification off; what became of it."""
    model = randomise(model).eval().double()
    examples = tuple(torch.randn(2, *shape, dtype=torch.float64) for shape in shapes)
    folded, report = bnfold.fold(model, examples, verify=False)
    assert deviation(model, folded, *shapes) < 1e-12
    return folded, outcomes(report)


IMAGE = (3, 8, 8)


def test_a_convolution_that_is_called_again_without_the_batchnorm():
    layers = {"conv": nn.Conv2d(3, 8, 3, padding=1), "bn": nn.BatchNorm2d(8)}
    _, became = fold(Net(lambda net, x, y: (net.bn(net.conv(x)), net.conv(y)), **layers), IMAGE, IMAGE)
    assert became == {"bn": "kept"}


def test_a_convolution_whose_output_somebody_else_reads():
    def forward(net, x):
        y = net.conv(x)
        return net.bn(y), torch.relu(y)

    _, became = fold(Net(forward, conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8)), IMAGE)
    assert became == {"bn": "kept"}


def test_two_convolutions_of_a_file_that_share_one_weight():
    random = np.random.default_rng(0)
    tensors = {"w": random.normal(size=(4, 3, 3, 3))}
    tensors |= {name + end: random.uniform(0.5, 1.5, 4) for name in "sbmv" for end in "12"}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h1"], name="conv1"),
        helper.make_node("BatchNormalization", ["h1", "s1", "b1", "m1", "v1"], ["y1"], name="bn1"),
        helper.make_node("Conv", ["x", "w"], ["h2"], name="conv2"),
        helper.make_node("BatchNormalization", ["h2", "s2", "b2", "m2", "v2"], ["y2"], name="bn2"),
    ]
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])]
    made = [helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, 4, 4, 4]) for y in ("y1", "y2")]
    stored = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", values, made, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    folded, report = bnfold.fold(model)
    assert outcomes(report) == {"bn1": "folded", "bn2": "folded"}
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph.node)


def test_a_linear_layer_on_the_last_axis_of_a_sequence_with_as_many_outputs_as_channels():
    layers = {"linear": nn.Linear(6, 4, bias=False), "bn": nn.BatchNorm1d(4)}
    _, became = fold(Net(lambda net, x: net.bn(net.linear(x)), **layers), (4, 6))
    assert became == {"bn": "kept"}


def test_the_bias_that_the_convolution_has_already():
    folded, became = fold(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), IMAGE)
    assert became == {"1": "folded"}
    assert isinstance(folded[1], nn.Identity)


@pytest.mark.parametrize(("given", "made", "groups"), [(6, 4, 1), (6, 4, 2), (6, 12, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_transposed_convolution_of_other_inputs_than_outputs(given, made, groups, bias):
    conv = nn.ConvTranspose2d(given, made, 3, stride=2, groups=groups, bias=bias)
    _, became = fold(nn.Sequential(conv, nn.BatchNorm2d(made)), (given, 5, 5))
    assert became == {"1": "folded"}


def test_a_head_of_flattened_images_between_two_batchnorms():
    head = (
        nn.BatchNorm2d(8),
        nn.Dropout(0.4),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
        nn.BatchNorm1d(5, affine=False),
    )
    _, became = fold(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *head), IMAGE)
    assert set(became.values()) == {"folded"}


def test_a_flatten_between_a_linear_layer_and_its_batchnorm():
    def forward(net, x):
        y = net.linear(x)
        return net.bn(y.flatten(0, 1)).reshape_as(y)

    _, became = fold(Net(forward, linear=nn.Linear(6, 8, bias=False), bn=nn.BatchNorm1d(8)), (5, 6))
    assert became == {"bn": "folded"}


def test_folded_weights_in_a_net_that_is_built_without_biases():
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    model = randomise(build()).eval()
    x = torch.randn(2, *IMAGE)
    folded, _ = bnfold.fold(model, (x,))
    again = load_folded(build().eval(), (x,), folded.state_dict())
    assert torch.equal(again(x), folded(x))


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program(decomposed):
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).eval()
    x = torch.randn(2, *IMAGE)
    with without_own_advice():
        program = torch.export.export(model, (x,))
        program = program.run_decompositions() if decomposed else program
    folded, report = fold_program(program)
    assert outcomes(report) == {"1": "folded"}
    torch.testing.assert_close(folded.module()(x), model(x), rtol=1e-4, atol=1e-5)


class Frozen(nn.Module):
    """A BatchNorm that normalises by what it holds in a net that trains, too."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        held = self.running_mean, self.running_var, self.weight, self.bias
        return nn.functional.batch_norm(x, *held, training=False, eps=1e-5)


def test_a_batchnorm_that_is_frozen_by_its_call_in_a_net_that_trains():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(8), nn.ReLU()).double().train()
    folded, report = bnfold.fold(model, (torch.randn(2, *IMAGE, dtype=torch.float64),), verify=False)
    assert deviation(model, folded, IMAGE) < 1e-12
    assert outcomes(report) == {"1": "folded"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_deep_net_in_half_precision_is_held_to_its_own_noise(dtype):
    blocks = [
        layer for _ in range(6) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), *blocks)).eval().to(dtype)
    _, report = bnfold.fold(model, (torch.randn(2, *IMAGE).to(dtype),))
    assert set(outcomes(report).values()) == {"folded"}
    assert [item.question for item in report.evidence] == ["float64", str(dtype).removeprefix("torch.")]


def test_a_net_under_autocast():
    def forward(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            return net.act(net.bn(net.conv(x)))

    layers = {"conv": nn.Conv2d(3, 8, 3, bias=False), "bn": nn.BatchNorm2d(8), "act": nn.PReLU(8)}
    model = randomise(Net(forward, **layers)).eval()
    x = torch.randn(2, *IMAGE)
    folded, report = bnfold.fold(model, (x,))
    assert outcomes(report) == {"bn": "folded"}
    assert folded(x).dtype == model(x).dtype
    assert folded.conv.weight.dtype == torch.float32


def test_every_report_of_the_page_is_a_test_and_every_test_is_on_the_page():
    tests = set(re.findall(r"`(test_\w+)`", REPORTS.read_text(encoding="utf-8")))
    here = {name for name in globals() if name.startswith("test_")} - {
        "test_every_report_of_the_page_is_a_test_and_every_test_is_on_the_page"
    }
    assert tests == here
