"""Verdicts and evidence as a table that can be read, and as a record that can be parsed."""

from __future__ import annotations

import json

import pytest

from bnfold.report import Evidence, Report, Verdict

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


def test_the_table_shows_every_verdict_every_comparison_and_every_note() -> None:
    text = str(REPORT)
    for words in ("layer1.0.bn1", "norm[0]", "scale folded", "kept", "`tanh` (Tanh) is not linear", "all 19,683",
                  "3.2e-16", "1.0e-12", "calibrate first"):  # fmt: skip
        assert words in text
    assert text.splitlines()[-1] == "1 of 3 BatchNorms folded, 1 scale folded, 1 kept, verified"
    assert max(map(len, text.splitlines())) <= 110


def test_the_table_of_a_fold_without_leftovers_has_no_column_for_reasons() -> None:
    assert "why" not in str(Report(VERDICTS[:1]))
    assert "why" in str(REPORT)


@pytest.mark.parametrize("name", ["[red]bn[/red]", "[/]", "a" * 300, "bn\n2"])
def test_any_name_can_be_shown(name: str) -> None:
    text = str(Report((Verdict(name, "kept", (), f"`{name}` is in the way"),)))
    assert "".join(name.split())[:40] in "".join(text.split())


def test_a_report_without_batchnorms_or_comparisons_says_so() -> None:
    assert str(Report(())) == "there is no BatchNorm in it"
    assert str(Report(VERDICTS)).endswith("1 kept, unverified")
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
