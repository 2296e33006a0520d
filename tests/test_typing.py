"""What a user's type checkers see of the installed wheel: ten lines that are right, and some that are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from shutil import which

import pytest

from tests.test_distribution import built, fresh, run_away, wheel  # noqa: F401 fixtures

USER = """\
import bnfold

class Net: ...

folded, report = bnfold.fold(Net(), {"x": [1.0]}, merge=False)
same: Net = folded
kept: list[str] = [verdict.reason for verdict in report.verdicts if verdict.outcome == "kept"]
evidence: tuple[bnfold.Evidence, ...] = bnfold.verify(Net(), folded, tolerance=1e-6)
assert isinstance(bnfold.calibrate(same, [[1.0]]), Net) and bnfold.fold_file("a.onnx", "b.onnx").verified
print(bnfold.__version__ + report.to_text(full=True), *kept, *(each.deviation / each.bound for each in evidence))
"""
TORCH = """\
from torch import Tensor, nn, randn

import bnfold

net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
folded, report = bnfold.fold(net, randn(2, 3))
last: nn.Module = folded[-1]
outputs: Tensor = folded(randn(2, 3))
"""
WRONG = """\
import bnfold

report = bnfold.fold_file("a.onnx", "b.onnx")
number: int = report.verdicts[0].name
report.verdicts[0].outcome == "gone"
bnfold.fould()
"""
"""Wrong in the last three lines: a name is no number, no outcome is called gone, and there is no such function."""


@pytest.fixture
def user(fresh, tmp_path):  # noqa: F811
    """A folder with the files of a user."""
    for name, text in {"user": USER, "user_of_torch": TORCH, "wrong": WRONG}.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def mypy(folder, python, *files):
    """Where mypy finds errors."""
    options = ["--strict", "--no-error-summary", "--python-executable", python]
    ran = run_away(folder, sys.executable, "-m", "mypy", *options, *files)
    assert not ran.stderr
    return [
        line.partition(": error:")[0] for line in ran.stdout.splitlines() if ": error:" in line
    ], ran.stdout


@pytest.mark.slow
def test_mypy_in_strict_mode_agrees_with_ten_lines_of_a_user_and_catches_what_is_wrong(user, fresh):  # noqa: F811
    """It catches it: so the types are those of the wheel, and not `Any`."""
    errors, said = mypy(user, fresh, "user.py", "wrong.py")
    assert errors == ["wrong.py:4", "wrong.py:5", "wrong.py:6"], said


@pytest.mark.slow
def test_mypy_in_strict_mode_agrees_with_a_user_of_torch(user, fresh):  # noqa: F811
    """Slow, since mypy reads all of torch."""
    errors, said = mypy(user, fresh, "user_of_torch.py")
    assert not errors, said


@pytest.mark.slow
def test_pyright_agrees_with_mypy(user, fresh):  # noqa: F811
    """pyright is no dependency: what PyPI has of it fetches the rest from npm when it first runs."""
    pyright = which("pyright", path=f"{sys.prefix}/bin") or which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed; the workflow installs it")
    command = [pyright, "--outputjson", "--pythonpath", fresh, "user.py", "user_of_torch.py", "wrong.py"]
    found = json.loads(subprocess.run(command, cwd=user, capture_output=True, text=True, check=False).stdout)
    wrong = [
        (d["file"].rpartition("/")[2], d["range"]["start"]["line"] + 1)
        for d in found["generalDiagnostics"]
        if d["severity"] == "error"
    ]
    assert ("wrong.py", 4) in wrong
    assert ("wrong.py", 6) in wrong
    assert not [place for place in wrong if place[0] != "wrong.py"], found
