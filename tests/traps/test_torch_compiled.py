"""Scripted, traced and frozen modules: every BatchNorm in them has a verdict, and the way out that it names works."""

from __future__ import annotations

import io
import subprocess
import sys

import onnx
import pytest
import torch
from torch import nn

import bnfold
from bnfold.onnx.run import run_exactly
from tests.conftest import CHECKOUT
from tests.torch_models import agree, randomise

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)

IMAGES = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """A convolution, a ReLU, and one more BatchNorm of every two after a layer that takes it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)
        )
        self.fc, self.bn = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.bn(self.fc(self.body(x).mean((2, 3))))


def traced(net):
    return torch.jit.trace(net, IMAGES)


def frozen(net):
    return torch.jit.freeze(traced(net), optimize_numerics=False)


def frozen_script(net):
    return torch.jit.freeze(torch.jit.script(net), optimize_numerics=False)


def loaded(net):
    """Traced, and read again from what was saved."""
    data = io.BytesIO()
    torch.jit.save(traced(net), data)
    data.seek(0)
    return torch.jit.load(data)


COMPILED = {
    "script": torch.jit.script,
    "trace": traced,
    "frozen": frozen,
    "frozen script": frozen_script,
    "file": loaded,
}
NORMS = ["body.1", "body.3", "bn"]


@pytest.mark.parametrize("form", COMPILED)
def test_every_batchnorm_that_is_compiled_has_a_verdict_with_a_way_out(form):
    _, report = bnfold.fold(COMPILED[form](randomise(Net())), IMAGES)
    assert sorted(v.name for v in report.verdicts) == sorted(NORMS)
    for verdict in report.verdicts:
        assert verdict.outcome == "kept"
        assert "compiled into the ScriptModule `Net`" in verdict.reason
        assert "torch.onnx.export" in verdict.reason


def test_a_frozen_file_keeps_no_names_and_its_batchnorms_are_counted_all_the_same():
    data = io.BytesIO()
    torch.jit.save(frozen(randomise(Net())), data)
    data.seek(0)
    _, report = bnfold.fold(torch.jit.load(data), IMAGES)
    assert [v.outcome for v in report.verdicts] == ["kept"] * 3


def test_a_batchnorm_of_functions_is_met_in_compiled_code():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.randn(3))
            self.register_buffer("var", torch.rand(3) + 0.5)

        def forward(self, x):
            return torch.batch_norm(x, None, None, self.mean, self.var, False, 0.1, 1e-5, False)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = torch.jit.trace(Functional(), IMAGES), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.last(self.inner(x))

    _, report = bnfold.fold(Outer(), IMAGES)
    assert [(v.name, v.outcome) for v in report.verdicts] == [("inner", "kept")]
    assert "`inner`" in report.verdicts[0].reason


def test_what_freezing_has_merged_by_itself_is_no_batchnorm_any_more():
    net = randomise(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)))
    _, report = bnfold.fold(torch.jit.freeze(torch.jit.trace(net, IMAGES)), IMAGES)
    assert report.verdicts == ()


@pytest.mark.parametrize("form", COMPILED)
def test_the_onnx_file_of_a_compiled_module_folds(form):
    """As the reason says; torch's exporter folds some by itself unless it is asked not to."""
    net = randomise(Net())
    data, keep = io.BytesIO(), torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        COMPILED[form](net), (IMAGES,), data, dynamo=False, training=keep, do_constant_folding=False
    )
    some = onnx.load_from_string(data.getvalue())
    folded, report = bnfold.fold(some, runtime="any")
    assert (report.count("folded"), len(report.verdicts), report.verified) == (3, 3, True)
    other = torch.randn(2, 3, 8, 8)
    (got,) = run_exactly(folded, [{some.graph.input[0].name: other.numpy()}])[0].values()
    torch.testing.assert_close(torch.from_numpy(got).float(), net(other), rtol=1e-4, atol=1e-4)


def test_the_state_dict_of_a_compiled_module_is_that_of_its_class():
    net = randomise(Net())
    again = Net().eval()
    again.load_state_dict(loaded(net).state_dict())
    folded, report = bnfold.fold(again.double(), IMAGES.double())
    assert report.count("folded") == 3
    agree(net.double(), folded, IMAGES.double())


def test_the_command_refuses_an_archive_of_code_in_one_line_that_names_the_ways_out(tmp_path):
    path = tmp_path / "net.pt"
    torch.jit.save(traced(randomise(Net())), path)
    for more in ([], ["--model", "tests.traps.test_torch_compiled:Net", "--input", "2x3x8x8"]):
        ran = subprocess.run(
            [sys.executable, "-m", "bnfold.fold", str(path), *more],
            capture_output=True, text=True, check=False, cwd=CHECKOUT,
        )  # fmt: skip
        assert ran.returncode == 2
        assert ran.stderr.count("\n") == 1
        assert "torch.onnx.export(torch.jit.load(FILE), inputs, 'model.onnx', dynamo=False)" in ran.stderr
        assert "--model" in ran.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["net.pt"]
