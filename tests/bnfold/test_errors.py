"""How a command fails: one line and an exit code."""

from __future__ import annotations

import pytest

from bnfold.errors import BnfoldError, InputError, NotEquivalent, UnreadableModel, run_command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("model.onnx: no such file"), 2, "error: model.onnx: no such file"),
        (UnreadableModel("`bn`\ncould not be\n  followed"), 2, "error: `bn` could not be followed"),
        (NotEquivalent("the models differ"), 1, "error: the models differ"),
        (BnfoldError("anything"), 2, "error: anything"),
        (
            FileNotFoundError(2, "No such file or directory", "there"),
            2,
            "error: there: No such file or directory",
        ),
        (OSError("the disk is full"), 2, "error: the disk is full"),
        (
            ModuleNotFoundError("No module named 'onnx'", name="onnx"),
            2,
            'error: onnx is not installed; pip install "bnfold[onnx]"',
        ),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_a_command_that_fails_prints_one_line_and_returns_its_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    assert run_command(main) == code
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_command_that_ends_returns_its_own_code_and_prints_nothing(
    returned: int | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: returned) == code
    assert capsys.readouterr().err == ""


def test_a_mistake_in_the_program_is_not_dressed_up_as_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)
    with pytest.raises(ModuleNotFoundError):
        run_command(lambda: __import__("bnfold.misspelt").fold())


def test_every_error_of_the_tree_is_caught_by_its_root_and_by_what_python_calls_it() -> None:
    assert issubclass(InputError, BnfoldError) and issubclass(InputError, ValueError)  # noqa: PT018
    assert issubclass(NotEquivalent, BnfoldError) and issubclass(NotEquivalent, AssertionError)  # noqa: PT018
    assert issubclass(UnreadableModel, BnfoldError)
