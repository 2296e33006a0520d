"""`python -m data` as a user runs it, in an empty folder: the table, or one clear line for bad input."""

from __future__ import annotations

import pytest

from data.__main__ import main

LECTURE = [
    "32,868 names",
    "188,106",
    "23,485",
    "23,512",
    "5,477",
    "19,683",
    "27 characters",
    "3.2958",
    "1.8689",
    "2.82",
]


def test_the_bare_command_shows_the_default_list(run_module, tmp_path):
    result = run_module("data")
    assert (result.returncode, result.stderr) == (0, "")
    assert [figure for figure in LECTURE if figure not in result.stdout] == []
    assert list(tmp_path.iterdir()) == []


def test_a_list_and_a_length_of_ones_own(tmp_path, capsys):
    path = tmp_path / "[bold]names.txt"
    path.write_text("Ångström\n.net\nжук\n李娜\na\nb\nc\n", encoding="utf-8")
    assert main(["show", "--names", str(path), "--context", "2"]) == 0
    shown = capsys.readouterr().out
    assert "[bold]names.txt: 7 names" in shown.replace("\n", "")
    assert "'|' ends a name" in shown
    assert "of 2 characters" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"emma", "holds 1 word"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a\n" * 9 + b"x" * 1000, "line 10 has a word of 1,000 characters; the longest allowed is 100"),
        (None, "no such file"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(run_module, tmp_path, content, message):
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    result = run_module("data", "show", "--names", "bad.txt")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: bad.txt")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_makemore_before_its_download_says_what_to_run(run_module, tmp_path):
    result = run_module("data", "show", "--names", "makemore", BNFOLD_CACHE=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "error: the makemore list has not been downloaded; run: python -m data fetch makemore\n"
    )


@pytest.mark.parametrize(
    "arguments", [["show", "--context", "none"], ["fetch"], ["fetch", "elsewhere"], ["fly"]], ids=" ".join
)
def test_a_command_line_that_makes_no_sense_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_context_of_nothing_is_refused(capsys):
    assert main(["show", "--context", "0"]) == 2
    assert capsys.readouterr().err == "error: a context of 0 characters; it takes 1 or more\n"


def test_the_package_needs_numpy_alone(run_module, tmp_path):
    (tmp_path / "probe.py").write_text(
        "import sys, data\n"
        "data.contexts(data.read_names(), data.Vocabulary.from_names(data.read_names()))\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'rich') if name in sys.modules])\n"
    )
    result = run_module("probe")
    assert (result.stdout, result.stderr) == ("[]\n", "")
