"""The golden verdicts: what is recorded, what counts as a difference, and that no model can stop the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks import verdicts
from benchmarks.verdicts import differences, first_of_families, isolated, main, records
from bnfold.report import Verdict
from tests.conftest import CHECKOUT

OLD = {
    "nets/a": {"bn1": ["folded", ["conv"], ""], "bn2": ["kept", [], "a Tanh is in the way"]},
    "tests/test_a.py::test_b#1": {"bn": ["folded", ["linear"], ""]},
}


def changed(name, norm, record):
    return OLD | {name: OLD[name] | {norm: record}}


def test_a_verdict_is_recorded_with_what_absorbed_it_and_two_of_one_name_are_kept_apart():
    found = records([Verdict("bn", "folded", ("conv",)), Verdict("bn", "kept", (), "why")])
    assert found == {"bn": ["folded", ["conv"], ""], "bn (2)": ["kept", [], "why"]}


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (["kept", [], "why"], "nets/a: bn1: folded into conv -> kept"),
        (["folded", ["conv", "x"], ""], "nets/a: bn1: folded into conv -> folded into conv, x"),
    ],
)
def test_another_outcome_and_another_place_are_a_difference(record, line):
    assert list(differences(OLD, changed("nets/a", "bn1", record))) == [line]


def test_other_words_are_a_difference_only_where_words_are_asked_for():
    new = changed("nets/a", "bn2", ["kept", [], "`tanh` is in the way"])
    assert list(differences(OLD, new)) == []
    assert len(list(differences(OLD, new, reasons=True))) == 1


def test_what_is_gone_is_a_difference_and_what_is_new_is_none():
    assert list(differences(OLD, OLD | {"nets/b": {}})) == []
    assert list(differences(OLD, {"nets/a": OLD["nets/a"]})) == ["tests/test_a.py::test_b#1: is gone"]
    assert list(differences(OLD, OLD | {"nets/a": {"bn1": OLD["nets/a"]["bn1"]}})) == [
        "nets/a: bn2: kept -> no verdict"
    ]


def test_a_test_that_moved_to_another_file_is_found_by_its_name():
    moved = {"nets/a": OLD["nets/a"], "tests/else/test_c.py::test_b#1": OLD["tests/test_a.py::test_b#1"]}
    assert list(differences(OLD, moved)) == []


def test_of_each_family_the_smallest_variants_are_taken():
    cases = [(name,) for name in ("resnet101", "resnet18", "resnet50", "vgg16", "wide_resnet50_2")]
    assert [name for (name,) in first_of_families(cases, 2)] == [
        "resnet18", "resnet50", "vgg16", "wide_resnet50_2",
    ]  # fmt: skip


def test_a_model_that_fails_takes_too_long_or_dies_is_recorded_as_such():
    def fail():
        raise ValueError("no such layer\nand more")

    assert isolated("m", fail, 20) == {"m": {"": ["ValueError", [], "no such layer"]}}
    assert isolated("m", lambda: time.sleep(60), 0.2)["m"][""][0] == "too slow"
    assert isolated("m", lambda: os.kill(os.getpid(), 9), 20)["m"][""][0] == "crash"


def record(folder, monkeypatch, text):
    """What is recorded while a file of tests runs in a checkout of its own."""
    file = folder / "tests" / "test_two.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    options = '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\n'
    (folder / "pyproject.toml").write_text(options)
    monkeypatch.setattr(verdicts, "CHECKOUT", folder)
    return isolated("tests", lambda: verdicts.run_tests(file), 120)


def test_the_examples_of_a_property_do_not_depend_on_numbers_in_the_code(tmp_path, monkeypatch):
    text = """
from hypothesis import given, settings, strategies as st
from bnfold.report import Report, Verdict

@given(st.integers(0, 2**40))
@settings(derandomize=True, database=None)
def test_any_number(number):
    Report((Verdict(str(number), "kept"),))
"""
    first = record(tmp_path, monkeypatch, text)
    assert len(first) > 50
    (tmp_path / "numbers_of_its_own.py").write_text(f"NUMBERS = {list(range(10**6, 10**6 + 500))}")
    monkeypatch.syspath_prepend(tmp_path)
    assert record(tmp_path, monkeypatch, f"import numbers_of_its_own\n{text}") == first


def test_tests_are_run_where_a_warning_is_an_error(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nfilterwarnings = ["error"]\n')
    (tmp_path / "test_one.py").write_text(
        "from bnfold.report import Report, Verdict\n\ndef test_one():\n    Report((Verdict('bn', 'kept'),))\n"
    )
    code = (
        "import sys; from pathlib import Path; from benchmarks import verdicts; verdicts.CHECKOUT = Path.cwd();"
        "sys.exit(not verdicts.run_tests(Path('test_one.py')))"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, check=True)


def test_every_report_that_a_test_makes_and_every_graph_that_it_sends_travelling_is_recorded(
    tmp_path, monkeypatch
):
    text = """
import torch
from torch import nn
import bnfold
from bnfold.ir import Graph
from bnfold.travel import travel

def test_fold():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)).eval()
    bnfold.fold(model, torch.randn(2, 3))
    bnfold.fold(model[:2], torch.randn(2, 3), verify=False)

def test_travel():
    travel(Graph((), ("x",), ("x",)))
"""
    found = record(tmp_path, monkeypatch, text)
    outcomes = {
        name.partition("::")[2]: {norm: r[:2] for norm, r in each.items()} for name, each in found.items()
    }
    assert outcomes == {
        "test_fold#1": {"1": ["folded", ["0"]], "3": ["kept", []]},
        "test_fold#2": {"1": ["folded", ["0"]]},
        "test_travel#1": {},
    }


def test_the_command_writes_what_it_found_and_compares_it_with_another_file(tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert main([str(first), "--only", "graphs"]) == 0
    golden = json.loads(first.read_text())
    assert golden["graphs/gemm with transA"] == {"y": ["folded", ["h"], ""]}

    golden = {name: golden[name] for name in ("graphs/gemm with transA", "graphs/second reader")}
    golden["graphs/second reader"] = {"y": ["folded", ["h"], ""]}
    first.write_text(json.dumps(golden | {"nets/a": {}}))
    assert main([str(second), "--only", "graphs", "--against", str(first)]) == 1
    assert "graphs/second reader: y: folded into h -> kept\n1 differences" in capsys.readouterr().out
    assert json.loads(second.read_text()).keys() == {"graphs/gemm with transA", "graphs/second reader"}


def test_a_run_that_stopped_goes_on_with_what_is_missing(tmp_path, capsys):
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"graphs/gemm with transA": {"y": ["marked", [], ""]}}))
    assert main([str(out), "--only", "graphs", "--resume"]) == 0
    found = json.loads(out.read_text())
    assert found["graphs/gemm with transA"]["y"][0] == "marked"
    assert len(found) == 14
