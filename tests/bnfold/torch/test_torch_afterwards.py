"""What can still be done with a folded module: everything that could be done before."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
from torch import nn

from bnfold.torch import fold, read, run
from tests.torch_models import randomise

IMAGES = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    """A bit of everything that folding leaves behind: plain, halved, with a tail."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = TailNorm(4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.bn1(self.stem(x)).relu()
        x = self.norm(self.conv2(self.bn2(x)))
        return self.head(x.mean((2, 3)))


class TailNorm(nn.BatchNorm2d):
    def forward(self, x):
        return torch.nn.functional.silu(super().forward(x))


@pytest.fixture
def folded():
    model = randomise(Block())
    after, report = fold(model, IMAGES)
    assert [(v.name, v.outcome) for v in report.verdicts] == [
        ("bn1", "folded"),
        ("bn2", "scale folded"),
        ("norm", "folded"),
    ]
    return model, after


def same(after, other, bound=1e-6):
    torch.testing.assert_close(after(IMAGES), other, rtol=bound, atol=bound)


def test_names_of_what_remains_stay(folded):
    model, after = folded
    assert type(after) is Block
    assert list(after.state_dict()) == [
        "stem.weight",
        "stem.bias",
        "bn2.bias",
        "conv2.weight",
        "conv2.bias",
        "head.weight",
        "head.bias",
    ]
    assert {name for name, _ in after.named_modules()} - {name for name, _ in model.named_modules()} == {
        "norm.step0"
    }


def test_a_state_dict_goes_round(folded):
    _, after = folded
    other = copy.deepcopy(after)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(after.state_dict())
    same(after, other(IMAGES))


def test_it_is_copied_and_pickled(folded):
    _, after = folded
    same(after, copy.deepcopy(after)(IMAGES))
    same(after, pickle.loads(pickle.dumps(after))(IMAGES))


def test_it_is_exported_by_torch(folded):
    _, after = folded
    program = torch.export.export(after, (IMAGES,))
    same(after, program.module()(IMAGES))
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_it_is_exported_to_onnx(folded, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    _, after = folded
    torch.onnx.export(after, (IMAGES,), tmp_path / "m.onnx", verbose=False)
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (name,) = [each.name for each in session.get_inputs()]
    made = torch.from_numpy(session.run(None, {name: IMAGES.numpy()})[0])
    same(after, made, 1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_it_is_compiled(folded):
    _, after = folded
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a compiler")
    same(after, torch.compile(after)(IMAGES), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_is_converted(folded, dtype):
    _, after = folded
    made = after.to(dtype)(IMAGES.to(dtype))
    assert made.dtype == dtype


def test_it_trains(folded):
    _, after = folded
    after(IMAGES).sum().backward()
    assert all(p.grad is not None for p in after.parameters() if p.requires_grad)


def test_it_shares_nothing_with_the_original(folded):
    model, after = folded
    before = run(model, IMAGES)[""]
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.zero_()
    assert (run(model, IMAGES)[""] == before).all()


def test_reading_is_deterministic():
    model = randomise(Block())
    first, second = read(model, IMAGES).graph, read(model, IMAGES).graph
    assert [(n.name, n.op, n.inputs, n.outputs) for n in first.nodes] == [
        (n.name, n.op, n.inputs, n.outputs) for n in second.nodes
    ]


def test_folding_twice_changes_nothing_more(folded):
    _, after = folded
    again, report = fold(after, IMAGES)
    assert report.verdicts == ()
    assert all(
        torch.equal(a, b)
        for a, b in zip(after.state_dict().values(), again.state_dict().values(), strict=True)
    )
