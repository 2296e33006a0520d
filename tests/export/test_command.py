"""python -m export: what it prints, its exit codes, and what it leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from bnfold.checkpoint import Checkpoint, InputDomain, save
from bnfold.errors import NotEquivalent
from export import __main__ as command


@pytest.mark.slow
def test_the_road_from_a_checkpoint_to_names(run_module: Callable[..., Any], ckpt: Path) -> None:
    folded = run_module("bnfold.fold", "ckpt.pt")
    assert (folded.returncode, folded.stderr) == (0, "")
    exported = run_module("export")
    assert (exported.returncode, exported.stderr) == (0, "")
    for text in (
        "all 19,683",
        "3 of 3 BatchNorms folded, verified",
        "onnxruntime, unfolded, optimisations off",
        "nodes: Gather, Flatten, 3 Gemm, 2 Tanh",
        "wrote ckpt.onnx",
    ):
        assert text in exported.stdout
    last = exported.stdout.splitlines()[-1].split()
    assert last[:4] == ["next:", "python", "-m", "export.sample"]
    sampled = run_module(*last[3:])
    assert (sampled.returncode, sampled.stderr) == (0, "")
    assert len(sampled.stdout.splitlines()) == 20
    assert {path.name for path in ckpt.parent.iterdir()} == {"ckpt.pt", "ckpt.folded.pt", "ckpt.onnx"}


def test_without_an_argument_the_newer_checkpoint_is_meant(ckpt: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(ckpt.parent)
    older = ckpt.with_name("ckpt.folded.pt")
    older.write_bytes(b"of an earlier net")
    os.utime(older, (0, 0))
    assert command.main(["--no-timing"]) == 0
    ckpt.unlink()
    assert command.main(["--no-timing"]) == 2
    older.unlink()
    capsys.readouterr()
    assert command.main([]) == 2
    assert "python -m train" in capsys.readouterr().err


def test_the_table_shows_every_way_to_run_one_example(ckpt: Path, capsys: Any) -> None:
    assert command.main([str(ckpt), "-o", str(ckpt.with_name("other.onnx")), "--batch", "dynamic"]) == 0
    lines = {line.split("  ")[0].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    for name, nodes in {
        "torch": None,
        "torch, folded": None,
        "onnxruntime, unfolded, optimisations off": "10",
        "onnxruntime, unfolded": "10",
        "onnxruntime, folded": "7",
    }.items():
        assert lines[name][-2] == "us"
        assert nodes is None or nodes in lines[name]
    assert f"{ckpt.with_name('other.onnx').stat().st_size:,}" in lines["onnxruntime, folded"]
    assert not ckpt.with_suffix(".onnx").exists()


def test_a_folded_checkpoint_alone_is_timed_alone(ckpt: Path, capsys: Any) -> None:
    """The net with its BatchNorms counts only if it is the very file that was folded."""
    from bnfold.fold import main as fold

    assert fold([str(ckpt)]) == 0
    ckpt.write_bytes(ckpt.read_bytes() + b"\0")
    capsys.readouterr()
    assert command.main([str(ckpt.with_name("ckpt.folded.pt"))]) == 0
    out = capsys.readouterr().out
    assert "torch, folded" in out
    assert "optimisations off" not in out


def test_a_net_without_vocabulary_has_no_names_to_come(tmp_path: Path, capsys: Any) -> None:
    save(tmp_path / "net.pt", Checkpoint(nn.Sequential(nn.Linear(4, 2)).eval(), InputDomain((4,))))
    assert command.main([str(tmp_path / "net.pt"), "--no-timing"]) == 0
    out = capsys.readouterr().out
    assert "wrote" in out
    assert "export.sample" not in out
    assert "BatchNorm" not in out
    assert "one example in" not in out


def test_not_equivalent_is_exit_code_1_and_leaves_what_was_there(
    ckpt: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refuse(*_: Any) -> None:
        raise NotEquivalent("the models differ")

    monkeypatch.setattr("export.convert.prove", refuse)
    ckpt.with_suffix(".onnx").write_text("an earlier file")
    assert command.main([str(ckpt)]) == 1
    assert capsys.readouterr() == ("", "error: the models differ\n")
    assert ckpt.with_suffix(".onnx").read_text() == "an earlier file"
    assert {path.name for path in ckpt.parent.iterdir()} == {"ckpt.pt", "ckpt.onnx"}


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["missing.pt"], "no such file"),
        (["."], "is a folder"),
        (["text.pt"], "is no checkpoint"),
        (["state.pt"], "does not describe its net"),
        (["short.pt"], "damaged archive"),
        (["net.onnx"], "is no checkpoint"),
        (["ckpt.pt", "-o", "missing/net.onnx"], "is no folder"),
        (["ckpt.pt", "-o", "text.pt/net.onnx"], "is no folder"),
        (["ckpt.pt", "-o", "."], "is a folder"),
        (["ckpt.pt", "-o", "ckpt.pt"], "is the checkpoint itself"),
        (["ckpt.pt", "--batch", "0"], "--batch 0"),
        (["ckpt.pt", "--batch", "-1"], "--batch -1"),
        (["ckpt.pt", "--batch", "99999999999999999999"], "--batch 9"),
        (["ckpt.pt", "--batch", "many"], "--batch many"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], fragment: str, ckpt: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(ckpt.parent)
    Path("text.pt").write_text("emma\n")
    torch.save({"weight": torch.zeros(3)}, "state.pt")
    Path("short.pt").write_bytes(ckpt.read_bytes()[:-100])
    onnx.save(onnx.ModelProto(), "net.onnx")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    assert command.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert fragment in error
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_the_same_as_a_command(run_module: Callable[..., Any], ckpt: Path) -> None:
    result = run_module("export", "ckpt.pt", "-o", "missing/net.onnx")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert {path.name for path in ckpt.parent.iterdir()} == {"ckpt.pt"}


def test_a_record_of_a_fold_that_cannot_be_read(
    ckpt: Path, make_checkpoint: Callable[..., Checkpoint], capsys: Any
) -> None:
    from dataclasses import replace

    broken = replace(make_checkpoint(batchnorm=False), folded={"source": 7, "verdicts": [{"name": "bn1"}]})
    save(ckpt, broken)
    assert command.main([str(ckpt)]) == 2
    assert "has a verdict that cannot be read" in capsys.readouterr().err
    save(ckpt, replace(broken, folded={"source": 7, "verdicts": 3}))
    assert command.main([str(ckpt)]) == 2
    save(ckpt, replace(broken, folded=json.loads('{"note": "by hand"}')))
    assert command.main([str(ckpt), "--no-timing"]) == 0
