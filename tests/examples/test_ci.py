"""examples/ci: its tests and its hooks pass as they stand, and fail once a weight is another."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from shutil import copytree

import onnx
import pytest

import bnfold.onnx.side
import bnfold.torch.side  # noqa: F401 imported here, since the runs inside of this one forget what they import
from bnfold import cli

pytest_plugins = "pytester"

CHECKOUT = Path(__file__).parents[2]
EXAMPLE = CHECKOUT / "examples" / "ci"


@pytest.fixture
def project(pytester, monkeypatch) -> Path:
    """A copy of the example, in which the test runs."""
    copytree(EXAMPLE, pytester.path, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(str(pytester.path))
    return pytester.path


def tamper(path: Path) -> None:
    """Change one weight of the last layer by a thousandth."""
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [10, 16])
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[3, 5] *= 1.001
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)


def hooks() -> list[list[str]]:
    """The command lines of the project's pre-commit hooks."""
    entries = re.findall(
        r"^ +entry: bnfold (.*)$", (EXAMPLE / ".pre-commit-config.yaml").read_text(), re.MULTILINE
    )
    assert len(entries) == 2
    return [entry.split() for entry in entries]


def test_its_tests_pass_and_one_weight_that_is_another_makes_them_fail(project, pytester):
    plugin = ("-p", "bnfold.pytest_plugin", "--bnfold-report", "models.html")
    pytester.runpytest_inprocess(*plugin).assert_outcomes(passed=3)
    assert "3 equivalent, 0 different" in (project / "models.html").read_text()
    tamper(project / "net.folded.onnx")
    result = pytester.runpytest_inprocess(*plugin)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.re_match_lines([r"E +layer: +`linear` \(Gemm\) differs by"])


def test_its_hooks_pass_and_one_weight_that_is_another_makes_them_fail(project, capsys):
    assert [cli.main(entry) for entry in hooks()] == [0, 0]
    tamper(project / "net.folded.onnx")
    assert [cli.main(entry) for entry in hooks()] == [1, 0]
    tamper(project / "net.onnx")
    assert [cli.main(entry) for entry in hooks()] == [0, 1]


def test_its_workflow_runs_the_same_command():
    steps = (EXAMPLE / ".github" / "workflows" / "models.yml").read_text()
    assert f"run: bnfold {' '.join(hooks()[0])} --json" in steps
    assert "run: pytest --bnfold-report models.html" in steps


def test_the_hook_for_other_projects_needs_what_an_onnx_file_needs():
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (CHECKOUT / ".pre-commit-hooks.yaml").read_text()
    assert re.search(r"^  entry: bnfold verify$", text, re.MULTILINE)
    needs = re.search(r"additional_dependencies: \[(.*)\]", text)[1].replace('"', "").split(", ")
    assert set(needs) == set(extras["onnx"]) - {"rich>=13"}
