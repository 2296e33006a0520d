"""The package itself: what importing it brings, and that a function and a command can both be called fold."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

import bnfold
from bnfold import cli
from bnfold.errors import InputError

Run = Callable[..., subprocess.CompletedProcess[str]]


def python(code: str) -> str:
    """Run code in an interpreter of its own, with warnings as errors, and return what it printed."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=bnfold.__path__[0] + "/.."
    ).stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import bnfold",
        "import bnfold.fold; import bnfold",
        "import bnfold; import bnfold.fold; import bnfold.cli",
        "from bnfold import cli, fold",
        "import importlib; importlib.import_module('bnfold.fold'); import bnfold",
        "import bnfold.fold; from bnfold import fold; import bnfold; assert bnfold.fold is fold",
        "import runpy, sys, bnfold; sys.argv[1:] = []; import bnfold.fold",
    ],
)
def test_bnfold_fold_is_the_function_whatever_was_imported_first(imports: str) -> None:
    assert python(f"{imports}; import bnfold; print(type(bnfold.fold).__name__, bnfold.fold.__module__)") == (
        "function bnfold\n"
    )


def test_the_command_stays_importable_beside_the_function() -> None:
    assert python("import sys, bnfold.fold; print(callable(sys.modules['bnfold.fold'].main))") == "True\n"


def test_importing_the_core_imports_no_framework_and_nothing_slow() -> None:
    heavy = "{'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'rich', 'matplotlib', 'ml_dtypes'}"
    names = (
        "bnfold, bnfold.algebra, bnfold.ir, bnfold.rules, bnfold.travel, bnfold.report, bnfold.equivalence"
    )
    assert python(f"import sys, {names}, bnfold.cli; print({heavy} & sys.modules.keys())") == "set()\n"


def test_every_public_name_is_there_and_documented() -> None:
    for name in bnfold.__all__:
        assert getattr(bnfold, name).__doc__


def test_what_is_no_model_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"str is neither an nn\.Module nor an ONNX model"):
        bnfold.fold("model.onnx")
    with pytest.raises(InputError, match="int is neither"):
        bnfold.verify(1, 2)


def test_the_command_prints_its_help_and_no_warning(run_module: Run) -> None:
    result = run_module("bnfold.fold", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--dry-run" in result.stdout


def test_the_command_refuses_a_file_that_is_not_there_in_one_line(run_module: Run) -> None:
    result = run_module("bnfold.fold", "missing.onnx")
    assert (result.returncode, result.stderr) == (2, "error: missing.onnx: no such file\n")


def test_the_console_script_hands_over_to_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fold", "missing.pt"]) == 2
    assert capsys.readouterr().err == "error: missing.pt: no such file\n"


@pytest.mark.parametrize("arguments", [[], ["unfold"], ["os"]])
def test_the_console_script_runs_its_own_commands_only(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "bnfold --help lists the options" in capsys.readouterr().err
