"""The command `bnfold verify A B`: what it takes, what it says, and its exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bnfold
from bnfold import cli
from bnfold.checkpoint import Checkpoint, InputDomain, save
from export.write import write
from tests.onnx_models import model, norm, weights
from tests.torch_models import randomise


def build() -> nn.Sequential:
    """What the tests name as a factory."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2))
    return randomise(layers)


def build_folded() -> nn.Module:
    return bnfold.fold(build(), torch.randn(2, 3, 8))[0]


HERE = "tests.bnfold.test_verify"
ONE, SHAPE = f"{HERE}:build", "2x3x8"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """a.onnx, the same folded, and one with a wrong weight; the working folder is theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(bnfold.__path__[0] + "/..")
    text = """net (float[N,3] x) => (float[N,2] y) {
        c = MatMul(x, w)
        n = BatchNormalization(c, s, b, m, v)
        r = Tanh(n)
        y = MatMul(r, q)
    }"""
    before = model(text, {"w": weights(3, 4), "q": weights(4, 2), **norm(4)})
    folded, _ = bnfold.fold(before)
    onnx.save(before, "a.onnx")
    onnx.save(folded, "b.onnx")
    tensor = next(tensor for tensor in folded.graph.initializer if tensor.name == "q")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), "q"))
    onnx.save(folded, "wrong.onnx")
    return tmp_path


def verify(*arguments: str) -> int:
    return cli.main(["verify", *arguments])


def test_two_files_that_agree_end_with_0_and_the_evidence(files, capsys):
    assert verify("a.onnx", "b.onnx") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tried: made up 1, ")
    assert [line.partition(":")[0] for line in lines[1:]] == ["float64", "float32", "worst", "equivalent"]


def test_two_files_that_differ_end_with_1_and_one_line_on_stderr(files, capsys):
    assert verify("a.onnx", "wrong.onnx") == 1
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1
    assert "error: the models differ in float64 by" in shown.err
    assert "begins: `y` (MatMul) differs by" in shown.out
    assert "equivalent" not in shown.out


def test_the_record_says_the_same_and_is_written_whatever_was_found(files, capsys):
    assert verify("a.onnx", "b.onnx", "--json", "good.json") == 0
    good = json.loads((files / "good.json").read_text())
    assert (good["equivalent"], good["before"], good["after"]) == (True, "a.onnx", "b.onnx")
    assert [item["question"] for item in good["evidence"]] == ["float64", "float32"]
    capsys.readouterr()
    assert verify("a.onnx", "wrong.onnx", "--json", "-") == 1
    shown = capsys.readouterr()
    bad = json.loads(shown.out)
    assert (bad["equivalent"], bad["divergence"]["layer"]) == (False, "y")
    assert bad["worst"]["kind"] in bad["inputs"]
    assert bad["failure"] in shown.err
    assert "tried: " in shown.err


def test_the_worst_input_is_kept_and_shows_the_difference_again(files, capsys):
    assert verify("a.onnx", "wrong.onnx", "--worst", "worst.npz", "--json", "first.json") == 1
    assert list(np.load("worst.npz")) == ["x"]
    assert verify("a.onnx", "wrong.onnx", "--inputs", "worst.npz", "--json", "second.json") == 1
    first, second = (
        json.loads((files / name).read_text())["worst"] for name in ("first.json", "second.json")
    )
    assert second["values"] == first["values"] or second["deviation"] >= first["deviation"]


def test_a_tolerance_takes_the_place_of_the_bounds(files, capsys):
    assert verify("a.onnx", "wrong.onnx", "--tolerance", "0.1") == 0
    assert "the tolerance that was given" in capsys.readouterr().out
    assert verify("a.onnx", "b.onnx", "--tolerance", "0") == 1


def test_a_checkpoint_is_held_to_its_file_on_every_input(files, capsys):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 4)).eval()
    save("net.pt", Checkpoint(net, InputDomain((2,), "int64", 0, 4)))
    onnx.save(write(net, torch.zeros(2, 2, dtype=torch.int64), 1), "net.onnx")
    assert verify("net.pt", "net.onnx") == 0
    assert "all 16 examples" in capsys.readouterr().out
    assert verify("net.onnx", "net.pt") == 0


def test_weights_folded_weights_factories_and_files_go_with_each_other(files, capsys):
    net = build()
    torch.save(net.state_dict(), "w.pt")
    assert bnfold.torch.fold_checkpoint_file("w.pt", "w.folded.pt", model=ONE, shapes=[SHAPE]).verified
    onnx.save(write(net, torch.zeros(2, 3, 8), "N", ("image", "y")), "net.onnx")
    given = ["--model", ONE, "--input", SHAPE]
    assert verify("w.pt", "w.folded.pt", *given) == 0
    assert verify("w.folded.pt", "net.onnx", *given) == 0
    assert verify(ONE, f"{HERE}:build_folded", "--input", SHAPE) == 0
    assert verify("net.onnx", "w.pt", "--model-b", ONE) == 0
    capsys.readouterr()
    wrong = net.state_dict()
    wrong["4.bias"][1] += 0.01
    torch.save(wrong, "w.pt")
    assert verify("w.pt", "net.onnx", *given) == 1
    assert re.search(r"output output\[\d, 1\]", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_exported_program_is_held_to_what_it_was_made_of(files, capsys):
    torch.export.save(torch.export.export(build(), (torch.randn(2, 3, 8),)), "net.pt2")
    assert verify("net.pt2", ONE) == 0
    assert "tried: recorded 1, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a.onnx", "missing.onnx"], "missing.onnx: no such file"),
        (["a.onnx", "."], "it is a folder"),
        (["a.onnx", "no.module:factory"], "no.module:factory cannot be imported"),
        (["a.onnx", "text.onnx"], "text.onnx is no ONNX model"),
        (["a.onnx", "b.onnx", "--inputs", "missing.npz"], "missing.npz is no .npz file"),
        (["a.onnx", "b.onnx", "--inputs", "two.npz"], "takes 1 inputs (x), and 2 (x, z) are given"),
        (["a.onnx", "b.onnx", "--tolerance", "-1"], "give a number of 0 or more"),
        (["a.onnx", "b.onnx", "--json", "a.onnx"], "a.onnx is read"),
        (["a.onnx", "b.onnx", "--json", "x", "--worst", "x"], "x is where the input goes"),
        (["a.onnx", "b.onnx", "--worst", "-"], "arrays are not written to stdout"),
        (["a.onnx", "b.onnx", "--json", "no/where.json"], "no is no folder"),
        ([ONE, ONE], "give inputs"),
        ([ONE, ONE, "--input", "2x4x8"], "does not run"),
        (["state.pt", "state.pt", "--model", ONE], "give --input SHAPE"),
        (["state.pt", "state.pt"], "does not describe its net"),
    ],
    ids=lambda value: " ".join(value).replace("/", "_") if isinstance(value, list) else "",
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(arguments, says, files, capsys):
    (files / "text.onnx").write_text("not a model at all, but a line of text")
    np.savez(files / "two.npz", x=np.zeros((1, 3), np.float32), z=np.zeros(1))
    torch.save({"weight": torch.zeros(2)}, files / "state.pt")
    before = {path.name for path in files.iterdir()}
    assert verify(*arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert says in error
    assert {path.name for path in files.iterdir()} == before


def test_two_files_are_compared_without_torch(files):
    run = "main(['verify', 'a.onnx', 'wrong.onnx'])"
    code = f"import sys; from bnfold.cli import main; print({run}, 'torch' in sys.modules)"
    command = [sys.executable, "-W", "error", "-c", code]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=files, env={"PYTHONPATH": sys.path[0]}
    )
    assert ran.stdout.splitlines()[-1] == "1 False"
