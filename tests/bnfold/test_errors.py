"""How a command fails: one line and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (RecursionError("maximum depth"), 2, "error: the model is nested too deeply to be followed"),
        (
            MemoryError("Unable to allocate 9 EiB"),
            2,
            "error: there is not enough memory: Unable to allocate 9 EiB",
        ),
        (
            MemoryError(),
            2,
            "error: there is not enough memory: use a smaller model or smaller inputs",
        ),
        (
            RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            2,
            "error: there is not enough memory: you tried to allocate 9 bytes.",
        ),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            2,
            "error: there is text that cannot be read or written as what it should be: "
            "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
    ],
)
def test_a_command_that_fails_prints_one_line_and_returns_its_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    assert run_command(main) == code
    assert capsys.readouterr().err == (f"{line}\n" if line else "")


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


# ---------------------------------------------------------------- a stdout that takes nothing

PRINTS = {
    "print": "for _ in range(100000): print('a line')",
    "print a line": "print('a line')",
    "rich": "from rich.console import Console\nfor _ in range(5000): Console().print('a line')",
    "argparse": "from bnfold.command import Parser; Parser().parse_args(['--help'])",
}


def run_with_stdout(body: str, stdout: int | None) -> subprocess.CompletedProcess[str]:
    """Run a command with this stdout, or with none at all."""
    lines = "\n".join(f"    {line}" for line in body.split("\n"))
    code = f"import sys; from bnfold.errors import run_command\ndef main():\n{lines}\nsys.exit(run_command(main))"
    given = [sys.executable, "-c", code]
    if stdout is None:
        given = ["sh", "-c", 'exec "$@" >&-', "sh", *given]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(given, env=buffered, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize("body", PRINTS.values(), ids=PRINTS)
def test_a_reader_that_went_away_is_no_failure_of_the_command_and_no_traceback(body: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run_with_stdout(body, writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("body", PRINTS.values(), ids=PRINTS)
def test_a_closed_stdout_is_written_to_in_vain(body: str) -> None:
    done = run_with_stdout(body, None)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_a_command_opens_never_takes_the_place_of_a_closed_stdout(tmp_path: Path) -> None:
    body = f"import os\nwith open({str(tmp_path / 'file')!r}, 'w') as file:\n    assert file.fileno() > 2"
    assert run_with_stdout(body, None).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("body", ["print('a line')", PRINTS["print"]])
def test_a_full_disk_under_stdout_is_one_line(body: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = run_with_stdout(body, full.fileno())
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")


def test_an_error_keeps_its_code_where_nobody_reads_what_was_printed_before() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    body = "from bnfold.errors import NotEquivalent\nprint('a line')\nraise NotEquivalent('they differ')"
    done = run_with_stdout(body, writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "error: they differ\n")


def test_a_name_that_is_no_text_can_be_printed() -> None:
    reader, writer = os.pipe()
    done = run_with_stdout("import os; print(os.fsdecode(b'caf\\xe9.onnx'))", writer)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert said.read() == "caf\\udce9.onnx\n"
    assert done.returncode == 0
