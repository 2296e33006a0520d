"""Verdicts and evidence as what is printed, and as a record that can be parsed."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.cells import cell_len
from rich.console import Console

from bnfold.printed import LINES
from bnfold.report import Evidence, Merge, Report, Verdict

VERDICTS = (
    Verdict("layer1.0.bn1", "folded", ("layer1.0.conv1",)),
    Verdict("norm[0]", "scale folded", ("conv",), "`conv` (Conv) cannot take the shift: it pads with zeros"),
    Verdict("bn3", "kept", (), "`tanh` (Tanh) is not linear"),
)
EVIDENCE = (
    Evidence("float64", 19_683, True, 3.2e-16, 1e-12, "of the largest output", 0.9),
    Evidence("float32", 19_683, False, 2.1e-7, 1e-5, "8 x 4 roundings", None),
)
REPORT = Report(VERDICTS, EVIDENCE, ("calibrate first",), (100, 90))


def dense(count: int) -> Report:
    """A net in which every second BatchNorm stays, for reasons of one kind that all name other nodes."""
    kept = "not into what comes before: the output of `block{0}.conv` (Conv) is also read by `block{0}.cat` (Concat)"
    folded = (Verdict(f"block{i}.norm1", "folded", (f"block{i}.conv1",)) for i in range(count))
    left = (Verdict(f"block{i}.norm2", "kept", (), kept.format(i)) for i in range(count))
    merges = (Merge(f"m{i}", (f"a{i}", f"b{i}"), (2000, 1000), (80, 40)) for i in range(count))
    return Report((*folded, *left), EVIDENCE, merges=tuple(merges), operators=(2, 1), multiply_adds=(2, 1))


def test_the_table_of_a_small_net_shows_every_verdict_every_comparison_and_every_note() -> None:
    text = str(REPORT)
    for words in ("layer1.0.bn1", "norm[0]", "scale folded", "kept", "`tanh` (Tanh) is not linear", "all 19,683",
                  "3.2e-16", "1.0e-12", "calibrate first", "100 before, 90 after"):  # fmt: skip
        assert words in text
    assert max(map(len, text.splitlines())) <= 110
    assert "report.to_text" not in text, "all of it is there"


def test_its_text_is_the_same_in_a_notebook_and_where_colours_are_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = str(REPORT)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert str(REPORT) == text


def test_the_summary_comes_first_but_for_what_it_rests_on() -> None:
    summary = "1 of 3 BatchNorms folded, 1 scale folded, 1 kept, verified"
    assert str(REPORT).splitlines()[0] == summary
    limits = tuple(f"`head{i}` does not run" for i in range(30))
    lines = str(Report(VERDICTS, EVIDENCE, limits=limits)).splitlines()
    assert lines[0] == "`head0` does not run"
    assert lines.index(summary) <= 4


def test_the_table_of_a_fold_without_leftovers_has_no_column_for_reasons() -> None:
    assert "why" not in str(Report(VERDICTS[:1]))
    assert "why" in str(REPORT)


def test_a_large_net_is_a_screenful_by_kinds_of_reasons_with_how_many_and_three_names() -> None:
    text = str(dense(100))
    assert len(text.splitlines()) < 20
    assert text.count("is also read by") == 1
    assert "100 kept: not into what comes before: the output of `...` (Conv) is also read by `...`" in text
    assert "block0.norm2, block1.norm2, block2.norm2, and 97 more" in text
    assert "block0.norm1 into block0.conv1, block1.norm1 into" in text
    assert "m0 from a0, b0; m1 from a1, b1; m2 from a2, b2; and 97 more" in text
    assert text.splitlines()[-1].startswith("in full: ")


def test_many_kinds_of_reasons_are_cut_to_a_screen_and_the_most_frequent_stay() -> None:
    verdicts = [Verdict(f"n{i}", "kept", (), f"reason {'x' * (i % 60)}") for i in range(120)]
    verdicts += [Verdict("f", "folded", ("c",)), *[Verdict(f"o{i}", "kept", (), "often") for i in range(3)]]
    text = str(Report(tuple(verdicts), EVIDENCE))
    assert len(text.splitlines()) <= LINES
    assert "3 kept: often" in text
    assert "more reasons" in text
    assert "1 folded" in text
    assert "all 19,683" in text


def test_the_whole_text_names_everything_and_repeats_what_is_said_of_each() -> None:
    report = dense(100)
    text = report.to_text(full=True)
    for verdict in report.verdicts:
        assert f"\n{verdict.name}: {verdict.outcome}" in text
    joined = " ".join(text.split())
    assert all(f"`block{i}.cat` (Concat)" in joined for i in range(100))
    assert all(f"m{i} merged from a{i}, b{i}; multiply-adds 2 k to 1 k" in joined for i in range(100))
    assert "more" not in joined.replace("not more", "")


def test_a_sentence_or_a_name_that_does_not_end_is_cut_and_what_comes_after_it_stays() -> None:
    verdicts = [
        Verdict("n" * 9_000, "kept", (), "word " * 9_000),
        *[Verdict(f"f{i}", "folded", ("c",)) for i in range(20)],
    ]
    text = str(Report(tuple(verdicts), EVIDENCE, ("note " * 9_000,)))
    assert len(text.splitlines()) < 30
    assert "1 kept: word word" in text
    assert "    nnn" in text
    assert text.count(" ...\n") == 3
    assert "f0 into c" in text
    assert "all 19,683" in text


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_a_report_is_as_wide_as_its_console(width: int) -> None:
    for report in (REPORT, dense(100)):
        file = StringIO()
        Console(file=file, width=width).print(report)
        lines = [line.rstrip() for line in file.getvalue().splitlines()]
        assert max(map(len, lines)) <= width
        assert "\n".join(lines) == report.to_text(width=width)
    assert len(dense(100).to_text(width=60).splitlines()) > len(dense(100).to_text(width=200).splitlines())


def test_what_goes_on_in_the_next_line_of_a_table_stands_below_what_it_goes_on_with() -> None:
    lines = Report((Verdict("漢字", "kept", (), "word " * 40),)).to_text(width=80).splitlines()
    first = next(line for line in lines if "漢字" in line)
    onward = lines[lines.index(first) + 1]
    assert cell_len(first[: first.index("word")]) == cell_len(onward[: onward.index("word")])


def test_the_whole_text_says_how_far_the_output_moves() -> None:
    assert "9.0e-01" in REPORT.to_text(full=True)
    assert "movement 9.0e-01" in REPORT.to_text(full=True, width=60)


def test_a_console_that_writes_ascii_gets_rules_of_it() -> None:
    class Ascii(StringIO):
        encoding = "ascii"

    file = Ascii()
    Console(file=file, width=110).print(REPORT)
    assert file.getvalue().isascii()


@pytest.mark.parametrize("name", ["[red]bn[/red]", "[/]", "a" * 300, "bn 2", ":smile:"])
def test_any_name_can_be_shown(name: str) -> None:
    text = str(Report((Verdict(name, "kept", (), f"`{name}` is in the way"),)))
    assert "".join(name.split())[:40] in "".join(text.split())


@pytest.mark.parametrize("name", ["bn\n2", "a\x1b[31mred", "\r", "a\u202eb", "\ud800", "x\x9b31m"])
def test_what_a_name_cannot_show_is_spelt_out(name: str) -> None:
    report = Report((Verdict(name, "kept", (), f"`{name}` is in the way"),) * 20, notes=(name,))
    for text in (str(report), report.to_text(full=True)):
        assert text.replace("\n", "").isprintable()
        assert name.encode("unicode_escape").decode() in text


def test_a_report_without_batchnorms_or_comparisons_says_so() -> None:
    assert str(Report(())) == "there is no BatchNorm in it"
    assert str(Report(VERDICTS)).splitlines()[0].endswith("1 kept, unverified")
    assert not Report(VERDICTS).verified


def test_a_report_comes_back_from_its_json() -> None:
    record = json.loads(REPORT.to_json())
    assert record["counts"] == {"folded": 1, "scale folded": 1, "kept": 1}
    assert record["verified"] is True
    again = Report(
        tuple(Verdict(**{**verdict, "into": tuple(verdict["into"])}) for verdict in record["verdicts"]),
        tuple(Evidence(**evidence) for evidence in record["evidence"]),
        tuple(record["notes"]),
        tuple(record["parameters"]),
    )
    assert again == REPORT


def test_outcomes_are_counted() -> None:
    assert [REPORT.count(outcome) for outcome in ("folded", "scale folded", "kept")] == [1, 1, 1]
