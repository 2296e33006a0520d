"""export.export: the file that the issue promises, or none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import bnfold
import export
from bnfold import checkpoint as checkpoints
from bnfold.checkpoint import Checkpoint, InputDomain, drop_identities
from bnfold.errors import InputError, NotEquivalent
from export import convert

ROAD = ["Gather", "Flatten", "Gemm", "Tanh", "Gemm", "Tanh", "Gemm"]


@pytest.fixture(scope="module")
def source(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a checkpoint, in a folder in which nobody but `exported` writes."""
    path = tmp_path_factory.mktemp("exported") / "ckpt.pt"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def exported(source: Path) -> convert.Exported:
    """Return what became of it."""
    return export.export(source)


def test_the_signature_the_nodes_and_nothing_to_compute_but_the_net(
    source: Path, exported: convert.Exported
) -> None:
    proto = onnx.load(exported.path)
    assert exported.path == source.with_suffix(".onnx")
    assert exported.size == exported.path.stat().st_size
    assert list(exported.operators) == [node.op_type for node in proto.graph.node] == ROAD
    entry, result = proto.graph.input[0], proto.graph.output[0]
    assert len(proto.graph.input) == len(proto.graph.output) == 1
    assert entry == onnx.helper.make_tensor_value_info("context", onnx.TensorProto.INT64, [1, 3])
    assert result == onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 27])
    stored = {tensor.name for tensor in proto.graph.initializer}
    assert all(set(node.input) - stored for node in proto.graph.node)
    assert stored == {
        "embedding.weight",
        *(f"linear{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")),
    }


def test_every_context_gives_what_the_net_with_its_batchnorms_gives(
    source: Path, exported: convert.Exported
) -> None:
    given = checkpoints.load(source)
    contexts = given.input.every()
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    ran = np.concatenate([session.run(None, {"context": one[None].numpy()})[0] for one in contexts])
    truth = given.model.double()(contexts).detach().numpy()
    assert len(contexts) == 19_683
    assert np.abs(ran - truth).max() <= exported.evidence.bound * np.abs(truth).max()
    assert exported.evidence.exhaustive
    assert exported.evidence.inputs == 19_683
    assert exported.evidence.bound < 1e-5


def test_the_metadata_tells_where_it_came_from_and_no_more(source: Path, exported: convert.Exported) -> None:
    proto = onnx.load(exported.path)
    metadata: dict[str, Any] = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata.pop("source_sha256") == sha256(source.read_bytes()).hexdigest()
    read = {key: json.loads(value) for key, value in metadata.items()}
    assert set(read) == {"vocabulary", "input", "verdicts", "versions"}
    assert "".join(read["vocabulary"]) == ".abcdefghijklmnopqrstuvwxyz"
    assert read["input"] == {"shape": [3], "dtype": "int64", "low": 0, "high": 27}
    outcomes = [(verdict["name"], verdict["outcome"], verdict["into"]) for verdict in read["verdicts"]]
    assert outcomes == [(f"bn{i}", "folded", [f"linear{i}"]) for i in (1, 2, 3)]
    assert read["versions"]["torch"] == torch.__version__
    assert read["versions"]["trained"]["bnfold"] == bnfold.__version__
    assert str(source.parent).encode() not in exported.path.read_bytes()


def test_the_same_checkpoint_gives_the_same_bytes(
    ckpt: Path, tmp_path: Path, exported: convert.Exported
) -> None:
    export.export(ckpt, tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").read_bytes() == exported.path.read_bytes()


def test_a_folded_checkpoint_gives_the_same_net_and_keeps_its_verdicts(ckpt: Path) -> None:
    given = checkpoints.load(ckpt)
    model, report = bnfold.fold(given.model, given.input.every())
    verdicts = [dict(one) for one in report.to_dict()["verdicts"]]
    record = {"source": sha256(ckpt.read_bytes()).hexdigest(), "verdicts": verdicts}
    path = ckpt.with_name("ckpt.folded.pt")
    checkpoints.save(path, replace(given, model=drop_identities(model), folded=record))
    whole = onnx.load(export.export(ckpt).path)
    exported = export.export(path)
    assert exported.path == ckpt.with_suffix(".onnx")
    assert exported.verdicts == report.verdicts
    again = onnx.load(exported.path)
    assert again.graph == whole.graph
    metadata = {entry.key: entry.value for entry in again.metadata_props}
    assert metadata["source_sha256"] == sha256(path.read_bytes()).hexdigest()
    assert metadata["unfolded_sha256"] == record["source"]


@pytest.mark.parametrize("batch", [4, "dynamic"])
def test_other_batches(batch: int | str, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    given = make_checkpoint(".abcde")
    exported = export.export(given, tmp_path / "net.onnx", batch)
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    assert list(exported.operators) == ROAD
    assert session.get_inputs()[0].shape == [4 if batch == 4 else "batch", 3]
    contexts = given.input.every()
    for count in [4] if batch == 4 else [1, 2, 216]:
        logits = session.run(None, {"context": contexts[:count].numpy()})[0]
        np.testing.assert_allclose(logits, given.model(contexts[:count]).detach().numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, "many"])
def test_a_batch_that_is_none(batch: Any, ckpt: Path) -> None:
    with pytest.raises(InputError, match="a batch of"):
        export.export(ckpt, batch=batch)
    assert not ckpt.with_suffix(".onnx").exists()


def test_a_net_over_numbers_has_other_names_and_no_vocabulary(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )
    exported = export.export(Checkpoint(net.eval(), InputDomain((2, 8))), tmp_path / "net.onnx")
    proto = onnx.load(exported.path)
    assert list(exported.operators) == ["Conv", "Relu", "Flatten", "Gemm"]
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["input", "output"]
    assert "vocabulary" not in {entry.key for entry in proto.metadata_props}
    assert not exported.evidence.exhaustive


def test_a_batchnorm_that_cannot_be_folded_is_kept_and_says_why(tmp_path: Path) -> None:
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), nn.Tanh()).eval()
    exported = export.export(Checkpoint(net, InputDomain((8,))), tmp_path / "net.onnx")
    assert exported.operators[1] == "BatchNormalization"
    assert [(one.outcome, bool(one.reason)) for one in exported.verdicts] == [("kept", True)]


def test_a_batchnorm_whose_shift_stays_leaves_one_add(tmp_path: Path) -> None:
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 3, padding=1), nn.Tanh())
    net(torch.randn(16, 8, 5))
    exported = export.export(Checkpoint(net.eval(), InputDomain((8, 5))), tmp_path / "net.onnx", "dynamic")
    assert exported.operators == ("Relu", "Add", "Conv", "Tanh")
    assert [one.outcome for one in exported.verdicts] == ["scale folded"]


class Residual(nn.Module):
    """The motif of a ResNet, which is no nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(x + self.bn2(self.conv2(x))).mean((2, 3)))


class TestAnyModule:
    def test_it_is_folded_exported_and_run_with_parity(self, tmp_path: Path, capfd: Any) -> None:
        torch.manual_seed(0)
        net, images = Residual(), torch.randn(5, 3, 8, 8)
        net(images)
        state = {name: tensor.clone() for name, tensor in net.eval().state_dict().items()}
        exported = export.export_module(net, images, tmp_path / "net.onnx", "dynamic")
        assert [verdict.outcome for verdict in exported.verdicts] == ["folded", "folded"]
        assert sorted(exported.operators) == ["Add", "Conv", "Conv", "Gemm", "ReduceMean", "Relu", "Relu"]
        assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
        content = exported.path.read_bytes()
        assert b".py" not in content
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        ran = session.run(None, {"input": images.numpy()})[0]
        np.testing.assert_allclose(ran, net(images).detach().numpy(), rtol=0, atol=1e-5)
        assert capfd.readouterr() == ("", "")

    def test_a_layer_without_a_row_goes_the_same_way(self, tmp_path: Path) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.GLU()).eval()
        exported = export.export_module(net, torch.randn(5, 4), tmp_path / "net.onnx")
        assert set(exported.operators) == {"Gemm", "Split", "Sigmoid", "Mul"}

    def test_what_cannot_be_written_is_named_in_one_line(self, tmp_path: Path, capfd: Any) -> None:
        class Branch(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * 2 if x.sum() > 0 else x

        with pytest.raises(
            InputError, match=r"Branch is no nn.Sequential, and torch.onnx.export cannot"
        ) as caught:
            export.export_module(Branch().eval(), torch.randn(5, 4), tmp_path / "net.onnx")
        assert "\n" not in str(caught.value)
        assert capfd.readouterr() == ("", "")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("net", "reason"),
        [
            (nn.Linear(4, 4), "training mode"),
            (nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16)).eval(), "`0.weight` is bfloat16"),
            (nn.Sequential(nn.GRU(4, 4)).eval(), "tensor"),
        ],
        ids=["training", "bfloat16", "two outputs"],
    )
    def test_what_cannot_be_used(self, net: nn.Module, reason: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=reason):
            export.export_module(net, torch.randn(5, 4), tmp_path / "net.onnx")
        assert not list(tmp_path.iterdir())


class TestNothingUnprovenIsWritten:
    @pytest.mark.parametrize("name", ["embedding.weight", "linear1.weight", "linear2.bias", "linear3.weight"])
    def test_one_weight_that_is_off_by_a_thousandth(
        self, name: str, ckpt: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = convert.write

        def write_wrongly(*arguments: Any) -> onnx.ModelProto:
            proto = write(*arguments)
            tensor = next(one for one in proto.graph.initializer if one.name == name)
            array = onnx.numpy_helper.to_array(tensor).copy()
            array.flat[0] += 1e-3
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
            return proto

        target = ckpt.with_suffix(".onnx")
        target.write_text("an earlier file")
        monkeypatch.setattr(convert, "write", write_wrongly)
        with pytest.raises(NotEquivalent, match=r"the bound is .*e-06"):
            export.export(ckpt)
        assert target.read_text() == "an earlier file"
        assert {path.name for path in ckpt.parent.iterdir()} == {"ckpt.pt", "ckpt.onnx"}

    def test_a_graph_that_the_checker_refuses(self, ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = convert.write

        def write_wrongly(*arguments: Any) -> onnx.ModelProto:
            proto = write(*arguments)
            proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 26
            return proto

        monkeypatch.setattr(convert, "write", write_wrongly)
        with pytest.raises(InputError, match="the ONNX checker refuses"):
            export.export(ckpt)
        assert {path.name for path in ckpt.parent.iterdir()} == {"ckpt.pt"}

    def test_a_fold_that_is_wrong(self, ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The file is held to the net with its BatchNorms, so a wrong fold does not get past either."""
        fold = bnfold.fold

        def fold_wrongly(model: nn.Module, inputs: torch.Tensor) -> Any:
            folded, report = fold(model, inputs)
            folded.get_parameter("linear2.weight").data[3, 4] += 1e-3
            return folded, report

        monkeypatch.setattr(bnfold, "fold", fold_wrongly)
        with pytest.raises(NotEquivalent):
            export.export(ckpt)
        assert not ckpt.with_suffix(".onnx").exists()


def test_the_target_is_looked_at_before_the_work(ckpt: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the checkpoint itself"):
        export.export(ckpt, ckpt)
    with pytest.raises(InputError, match="no folder"):
        export.export(ckpt, tmp_path / "missing" / "net.onnx")
    with pytest.raises(InputError, match="is a folder"):
        export.export(ckpt, tmp_path)


def test_what_needs_onnxscript_says_so(tmp_path: Path) -> None:
    code = """
import sys; sys.modules["onnxscript"] = None
import torch; from torch import nn; import export
export.export_module(nn.Sequential(nn.GLU()).eval(), torch.randn(5, 4), sys.argv[1])
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "net.onnx")],
        cwd=Path(convert.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "InputError: layer `0` is a GLU" in result.stderr
    assert result.stderr.endswith("needs onnxscript; pip install onnxscript\n")
    assert not list(tmp_path.iterdir())


def test_importing_the_package_imports_no_framework() -> None:
    code = "import sys, export; assert not {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(convert.__file__).parent.parent)
