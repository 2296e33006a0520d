"""The pytest plugin: what the fixture says of a difference, and what `--bnfold-report` writes, with workers too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bnfold.torch.side
import bnfold.verification  # imported here, since the runs inside of this one forget what they import

pytest_plugins = "pytester"

PLUGIN = ("-p", "bnfold.pytest_plugin")

TESTS = """
import copy
import torch
from torch import nn
import pytest

@pytest.fixture
def nets():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval()
    return net, copy.deepcopy(net), torch.randn(5, 4)

def test_same(nets, assert_equivalent):
    assert_equivalent(*nets)

def test_other(nets, assert_equivalent):
    nets[1][2].weight.data[1] *= 1.01
    assert_equivalent(*nets)

def test_tolerance(nets, assert_equivalent):
    nets[1][2].weight.data[1] *= 1.01
    assert_equivalent(*nets, tolerance=0.1)

def test_no_model(assert_equivalent):
    assert_equivalent(1, 2)
"""


@pytest.fixture
def run(pytester):
    """Run the tests above, in this process, with more arguments."""
    pytester.makepyfile(TESTS)
    return lambda *arguments: pytester.runpytest_inprocess(*PLUGIN, *arguments)


def test_a_difference_is_told_by_layer_input_and_element(run):
    result = run()
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.re_match_lines(
        [
            r"E .*NotEquivalent: the models are not equivalent: they differ by .* in float64; the bound is .*",
            r"E +layer: +`2` \(Linear\) differs by .*; `1` before it agrees",
            r"E +input: +(perturbed )?given 1, the worst of 2",
            r"E +output: +output",
            r"E +element: \[\d, 1\]: -?[\d.]+ before, -?[\d.]+ after",
        ]
    )
    result.stdout.fnmatch_lines(["*InputError: int is neither an nn.Module nor an ONNX model"])


def test_the_report_has_every_comparison_with_its_test(run, pytester):
    run("--bnfold-report", "report.json").stdout.fnmatch_lines(["bnfold: 4 comparisons in *report.json"])
    page = json.loads((pytester.path / "report.json").read_text())
    assert (page["format"], page["version"]) == ("bnfold.assertions", 1)
    assert (page["equivalent"], page["different"], page["failed"]) == (2, 1, 1)
    found = {record["test"].partition("::")[2]: record for record in page["assertions"]}
    assert list(found) == ["test_same", "test_other", "test_tolerance", "test_no_model"]
    assert found["test_same"]["evidence"][0]["question"] == "float64"
    assert found["test_other"]["divergence"]["layer"] == "2"
    assert found["test_tolerance"]["evidence"][0]["source"] == "the tolerance that was given"
    assert found["test_no_model"]["equivalent"] is None
    assert found["test_same"]["before"] == "Sequential"


def test_a_name_that_ends_in_html_gives_a_page_without_a_script_the_differences_first(run, pytester):
    run("--bnfold-report", "report.html")
    page = (pytester.path / "report.html").read_text()
    assert page.index("test_other") < page.index("test_same")
    assert "2 equivalent, 1 different, 1 failed" in page
    assert "color-scheme: light dark" in page
    assert "<script" not in page
    assert "http" not in page


def test_names_in_a_page_are_text():
    from bnfold.pytest_report import draw

    record = {"test": "<b>", "before": "<i>", "after": "&", "equivalent": None, "failure": "<script>"}
    page = draw([record])
    assert "&lt;script&gt;" in page
    assert not {"<script>", "<b>", "<i>"} & set(page.replace(">", ">\n").split())


def test_a_report_that_could_not_be_written_is_refused_before_any_test(run):
    result = run("--bnfold-report", "nowhere/report.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --bnfold-report: *nowhere is no folder*"])


def test_without_the_option_nothing_is_written(run, pytester):
    run("-k", "no_model")
    assert not list(pytester.path.glob("*.json"))


def test_under_xdist_the_records_of_all_workers_come_together(pytester, monkeypatch):
    pytest.importorskip("xdist")
    monkeypatch.setenv("PYTHONPATH", str(Path(bnfold.__path__[0]).parent))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parametrize("number", range(4))
        def test_no_model(number, assert_equivalent):
            with pytest.raises(ValueError):
                assert_equivalent(number, 2)
    """)
    result = pytester.runpytest_subprocess(
        *PLUGIN, "-p", "xdist", "-n", "2", "--bnfold-report", "report.json"
    )
    result.assert_outcomes(passed=4)
    page = json.loads((pytester.path / "report.json").read_text())
    assert page["failed"] == 4
    assert {record["test"][-2] for record in page["assertions"]} == set("0123")


def test_the_plugin_imports_no_framework_and_not_even_numpy():
    heavy = "{'torch', 'onnx', 'onnxruntime', 'numpy', 'rich'}"
    code = f"import sys, bnfold.pytest_plugin; print({heavy} & sys.modules.keys())"
    command = [sys.executable, "-W", "error", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=bnfold.__path__[0] + "/..")
    assert ran.stdout == "set()\n"
