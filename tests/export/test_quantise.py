"""export.quantise: int8 weights are near the float ones, and are written only within the budget of dev loss."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser
from torch import nn

import data
import export
from bnfold.checkpoint import Checkpoint, InputDomain, save
from bnfold.errors import InputError, NotEquivalent
from export import __main__ as command
from export import quantise
from export.quantise import BLOCK, DevLoss, Int8, count_dev, hold
from export.session import open_session
from train.evaluate import measure

NAMES = ["emma", "olivia", "ava", "mia", "zoe", "lily", "ella", "noah", "liam", "theo", "oscar", "hugo"] * 3


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """Return the file of a short list."""
    path = tmp_path / "names.txt"
    path.write_text("\n".join(NAMES))
    return path


@pytest.fixture
def source(names: Path, make_checkpoint: Callable[..., Checkpoint]) -> Path:
    """Return the file of a net over the characters of that list, with matrices of 256 rows."""
    letters = data.Vocabulary.from_names(NAMES).characters
    save(names.with_name("ckpt.pt"), make_checkpoint("".join(letters), hidden=256))
    return names.with_name("ckpt.pt")


def arguments(source: Path, names: Path, most: str) -> list[str]:
    given = ["--weights", "int8", "--names", str(names), "--max-loss-increase", most, "--no-timing"]
    return [str(source), *given]


# ---------------------------------------------------------------- the file


def test_large_matrices_are_int8_within_a_step_and_the_rest_stays(source: Path, names: Path) -> None:
    floats = onnx.load(export.export(source, source.with_name("float.onnx")).path)
    exported = export.export(source, weights=Int8(1.0, names))
    proto = onnx.load(exported.path)
    assert exported.operators == (
        "Gather",
        "Flatten",
        "Gemm",
        "Tanh",
        *["MatMulNBits", "Add", "Tanh"],
        *["MatMulNBits", "Add"],
    )
    assert {one.key: one.value for one in proto.metadata_props}["weights"] == "int8"
    before = {one.name: numpy_helper.to_array(one) for one in floats.graph.initializer}
    stored = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
    for name in ("embedding.weight", "linear1.weight", "linear1.bias", "linear2.bias", "linear3.bias"):
        np.testing.assert_array_equal(stored[name], before[name])
    nodes = [node for node in proto.graph.node if node.op_type == "MatMulNBits"]
    for node, layer in zip(nodes, ("linear2", "linear3"), strict=True):
        weight = before[f"{layer}.weight"]
        scales = stored[node.input[2]].reshape(len(weight), -1)
        steps = stored[node.input[1]].reshape(len(weight), -1, BLOCK).astype(float) - 128
        expanded = (steps * scales[..., None]).reshape(len(weight), -1)[:, : weight.shape[1]]
        step = np.abs(scales).repeat(BLOCK, 1)[:, : weight.shape[1]]
        assert (np.abs(expanded - weight) <= 1.01 * step).all()
        assert np.abs(expanded - weight).mean() < 0.3 * step.mean()
    assert exported.size < 0.4 * source.with_name("float.onnx").stat().st_size


def test_the_dev_loss_of_the_file_is_that_of_its_logits(source: Path, names: Path) -> None:
    exported = export.export(source, weights=Int8(1.0, names))
    assert exported.loss is not None
    words = data.split(data.read_names(names)).dev
    x, y = data.contexts(words, data.Vocabulary.from_names(NAMES), 3)
    session = open_session(exported.path)
    logits = [session.run(None, {"context": context[None]})[0][0] for context in x]
    loss = nn.functional.cross_entropy(torch.from_numpy(np.stack(logits)).double(), torch.from_numpy(y))
    assert exported.loss.file == pytest.approx(float(loss), abs=1e-9)
    assert exported.loss.net == pytest.approx(
        measure(_net(source), count_dev(_given(source), names)), abs=1e-9
    )
    assert 0 < abs(exported.loss.increase) < 0.01


def _given(source: Path) -> Checkpoint:
    from bnfold.checkpoint import load

    return load(source)


def _net(source: Path) -> nn.Sequential:
    return _given(source).model


def test_the_same_checkpoint_gives_the_same_bytes(source: Path, names: Path) -> None:
    files = [export.export(source, source.with_name(f"{i}.onnx"), weights=Int8(1.0, names)) for i in (1, 2)]
    assert files[0].path.read_bytes() == files[1].path.read_bytes()


def test_the_float_file_is_proven_before_its_weights_are_rounded(
    source: Path, names: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that the dev loss would let pass is seen by the proof."""
    write = export.convert.write

    def write_wrongly(*given: Any) -> onnx.ModelProto:
        proto = write(*given)
        tensor = next(one for one in proto.graph.initializer if one.name == "linear2.weight")
        array = numpy_helper.to_array(tensor).copy()
        array.flat[0] += 1e-3
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return proto

    monkeypatch.setattr(export.convert, "write", write_wrongly)
    with pytest.raises(NotEquivalent):
        export.export(source, weights=Int8(1.0, names))
    assert not source.with_suffix(".onnx").exists()


def test_gemms_of_any_form_become_products_and_what_cannot_stays() -> None:
    text = """<ir_version: 9, opset_import: ["" : 20]>
        g (float[2, 128] x, float[2, 64] u) => (float[2, 3] y, float[2, 128] z, float[2, 9] v) {
        v = MatMul(u, small)
        a = Gemm<transB = 1>(x, turned, bias)
        b = Gemm(a, square)
        c = Gemm<alpha = 0.5>(b, square, bias)
        z = MatMul(c, square)
        y = Gemm<transB = 0>(z, last) }"""
    proto, rng = parser.parse_model(text), np.random.default_rng(1)
    shapes = {"turned": (128, 128), "square": (128, 128), "bias": (128,), "last": (128, 3), "small": (64, 9)}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(np.float32) / 8
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    before = proto.SerializeToString()
    rounded = quantise.quantise(proto)
    assert proto.SerializeToString() == before
    assert [node.op_type for node in rounded.graph.node] == [
        *["MatMul", "MatMulNBits", "Add", "MatMulNBits", "Gemm", "MatMulNBits", "MatMulNBits"]
    ]
    x = {
        name: rng.standard_normal((2, size)).astype(np.float32) for name, size in {"x": 128, "u": 64}.items()
    }
    wanted, ran = (open_session(one.SerializeToString()).run(None, x) for one in (proto, rounded))
    np.testing.assert_array_equal(ran[2], wanted[2])
    for exact, near in zip(wanted[:2], ran[:2], strict=True):
        assert 0 < np.abs(near - exact).max() < 0.05 * np.abs(exact).max()


def test_a_net_without_a_large_matrix_is_told_so(
    names: Path, make_checkpoint: Callable[..., Checkpoint]
) -> None:
    given = make_checkpoint("".join(data.Vocabulary.from_names(NAMES).characters), hidden=BLOCK - 1)
    with pytest.raises(InputError, match="matrices of 128 rows or more, and here is none"):
        export.export(given, names.with_name("net.onnx"), weights=Int8(1.0, names))
    assert not names.with_name("net.onnx").exists()


def test_the_quantiser_leaves_the_log_of_the_process_alone() -> None:
    """In a process of its own: the import of the quantiser is what would add a handler, and only where none is."""
    code = """
import logging, numpy as np
from onnx import numpy_helper, parser
from export.quantise import quantise
proto = parser.parse_model('<ir_version: 9, opset_import: ["" : 20]> g (float[1, 128] x) => (float[1, 2] y) '
                           '{ y = MatMul(x, w) }')
proto.graph.initializer.append(numpy_helper.from_array(np.ones((128, 2), np.float32), "w"))
assert quantise(proto).graph.node[0].op_type == "MatMulNBits"
assert (logging.root.handlers, logging.root.level, logging.root.manager.disable) == ([], logging.WARNING, 0)
"""
    folder = Path(export.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------- the budget


def test_a_loss_above_the_budget_is_one_line_and_exit_code_2_and_keeps_what_was_there(
    source: Path, names: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    target = source.with_suffix(".onnx")
    target.write_text("an earlier file")
    before = {path.name for path in source.parent.iterdir()}
    monkeypatch.setattr("export.convert.measure_loss", lambda *_: DevLoss(2.0, 2.0011))
    assert command.main(arguments(source, names, "0.001")) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error == (
        "error: int8 weights raise the dev loss from 2.00000 to 2.00110, by 0.0011, and --max-loss-increase allows "
        "0.001; allow more, or keep float weights\n"
    )
    assert target.read_text() == "an earlier file"
    assert {path.name for path in source.parent.iterdir()} == before
    assert command.main(arguments(source, names, "0.0012")) == 0
    assert "dev loss 2.00000 before, 2.00110 after, +0.00110 of 0.0012 allowed" in capsys.readouterr().out
    assert target.read_bytes() != b"an earlier file"


def test_a_kernel_that_computes_something_else_is_above_any_small_budget(
    source: Path, names: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is that of the rounded file: scales that are doubled show."""
    rounded = quantise.quantise

    def double(*given: Any) -> onnx.ModelProto:
        proto = rounded(*given)
        tensor = next(one for one in proto.graph.initializer if one.name.endswith("scales"))
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, tensor.name))
        return proto

    loss = export.export(source, weights=Int8(1.0, names)).loss
    assert loss is not None
    monkeypatch.setattr("export.convert.quantise", double)
    with pytest.raises(InputError, match="int8 weights raise the dev loss"):
        export.export(source, weights=Int8(max(loss.increase, 0) + 1e-3, names))


def test_a_budget_is_kept_to_the_letter() -> None:
    hold(DevLoss(2.0, 2.5), 0.5)
    hold(DevLoss(2.0, 1.5), 0.0)
    for loss in (DevLoss(2.0, 2.6), DevLoss(2.0, math.nan), DevLoss(2.0, math.inf)):
        with pytest.raises(InputError, match="raise the dev loss from 2"):
            hold(loss, 0.5)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--max-loss-increase", "-1"], "--max-loss-increase -1"),
        (["--max-loss-increase", "nan"], "--max-loss-increase nan"),
        (["--max-loss-increase", "inf"], "--max-loss-increase inf"),
        (["--max-loss-increase", "little"], "--max-loss-increase little"),
        (["--names", "missing.txt"], "missing.txt"),
        (["--names", "others.txt"], "another list than others.txt; name it with --names"),
        ([], "another list than the shipped one"),
        (["--weights", "float", "--names", "names.txt"], "go with --weights int8"),
        (["--weights", "float", "--max-loss-increase", "1"], "go with --weights int8"),
    ],
    ids=" ".join,
)
def test_bad_options_are_one_line_and_exit_code_2(
    options: list[str], fragment: str, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(source.parent)
    Path("others.txt").write_text("\n".join(["anna", "nana", "ann"] * 4))
    before = {path.name for path in Path().iterdir()}
    assert command.main(["ckpt.pt", "--weights", "int8", *options]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert fragment in error
    assert {path.name for path in Path().iterdir()} == before


def test_a_net_is_held_to_the_list_it_was_trained_on(source: Path, names: Path) -> None:
    own = sha256("\n".join(NAMES).encode()).hexdigest()
    given = replace(_given(source), record={"names": {"sha256": own}})
    assert count_dev(given, names).examples > 0
    names.write_text("\n".join(NAMES[::-1]))
    with pytest.raises(InputError, match="was trained on another list"):
        count_dev(given, names)
    assert count_dev(replace(given, record={}), names).examples > 0


def test_a_net_that_has_no_dev_loss_has_no_int8_weights(tmp_path: Path) -> None:
    given = Checkpoint(nn.Sequential(nn.Linear(256, 2)).eval(), InputDomain((256,)))
    with pytest.raises(InputError, match="no net over characters"):
        export.export(given, tmp_path / "net.onnx", weights=Int8())
    assert not list(tmp_path.iterdir())
