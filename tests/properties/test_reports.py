"""Random reports: printed on a screen, as wide as the console, and a page on which nothing of a model is markup."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from html import unescape

from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from bnfold.printed import LINES
from bnfold.report import Evidence, Merge, Report, Verdict
from bnfold.wording import spell_out

WIDTHS = (60, 80, 110, 200)
MARKUP = (
    "[bold]",
    "[/]",
    "<script>alert(1)</script>",
    "</style>",
    "&lt;",
    "`",
    "a`b",
    "\x1b[2J",
    "\n",
    "\ud800",
    ":x:",
)

plain = st.from_regex(r"[a-z]{1,6}(\.[a-z0-9]{1,5}){0,6}", fullmatch=True)
names = st.one_of(
    plain,
    st.sampled_from(MARKUP),
    st.text(max_size=12),
    st.builds(str.__mul__, st.sampled_from(["weight/", "x", "漢字", "a b "]), st.integers(1, 300)),
)
sentences = st.one_of(
    st.just(""),
    st.text(max_size=40),
    st.builds("`{}` (Relu) is not linear".format, names),
    st.builds(
        "not into what comes before: the output of `{}` ({}) is also read by `{}` (Concat); not into what comes"
        " after: `{}` (Relu) lets no shift through".format,
        names,
        st.sampled_from(["Conv", "Add", "MaxPool"]),
        names,
        names,
    ),
    st.builds(
        "as one it would be dearer: {:,} multiply-adds, now {:,}".format, *[st.integers(0, 10**12)] * 2
    ),
)
pairs = st.tuples(*[st.integers(0, 10**15)] * 2)
finite = st.floats(0, 1e30)


def many(values: st.SearchStrategy, most: int) -> st.SearchStrategy:
    """As many as `most`: a few, over and over."""
    few = st.lists(values, max_size=8)
    return st.builds(
        lambda drawn, count: tuple((drawn * count)[:count]) if drawn else (), few, st.integers(0, most)
    )


def numbered(items: tuple, name: str) -> tuple:
    """The same, with other names."""
    return tuple(
        replace(item, **{name: f"{getattr(item, name)}{place}"}) if getattr(item, name) else item
        for place, item in enumerate(items)
    )


into = st.lists(names, max_size=5).map(tuple)
outcomes = st.sampled_from(["folded", "scale folded", "kept"])
verdicts = st.builds(Verdict, names, outcomes, into, sentences)
evidence = st.builds(
    Evidence, names, st.integers(0, 10**9), st.booleans(), finite, finite, sentences, st.none() | finite
)
merges = st.builds(Merge, st.just("") | names, into, pairs, pairs, sentences)


def reports(most: int) -> st.SearchStrategy[Report]:
    """Reports with as many verdicts and merges as `most`, and with more notes and limits than any has."""
    return st.builds(
        Report,
        many(verdicts, most).map(lambda items: numbered(items, "name")),
        many(evidence, 9),
        many(sentences, 60),
        st.none() | pairs,
        many(sentences, 60),
        many(merges, most).map(lambda items: numbered(items, "into")),
        pairs,
        pairs,
    )


def distinct(count: int) -> Report:
    """As many kinds of reasons as BatchNorms, and no two names alike."""
    words = (f"r{'x' * (i % 90)}{'y' * (i // 90)}" for i in range(count))
    verdicts = (Verdict(f"bn{i}", "kept", (), f"`n{i}` {word} " * 9) for i, word in enumerate(words))
    merges = (Merge("", (f"m{i}", f"o{i}"), reason=f"because {'z' * i}") for i in range(200))
    return Report(tuple(verdicts), (), ("a note " * 30,) * 50, (9, 8), ("a limit " * 90,) * 50, tuple(merges))


@given(reports(2000))
@example(distinct(2000))
@settings(max_examples=60)
def test_what_is_printed_fits_a_screen_and_the_width_of_the_console(report: Report) -> None:
    for width in WIDTHS:
        lines = report.to_text(width=width).splitlines()
        assert len(lines) <= LINES <= 40
        assert max(map(cell_len, lines)) <= width
        assert "".join(lines).isprintable()
        summary = "".join(report.summary().split())
        assert summary in "".join("".join(lines).split())


@given(reports(100))
@settings(max_examples=25)
def test_the_whole_text_leaves_nothing_out_and_keeps_to_the_width(report: Report) -> None:
    for width in (60, 200):
        lines = report.to_text(full=True, width=width).splitlines()
        assert max(map(cell_len, lines)) <= width
        text = "".join("".join(lines).split())
        apart = [merge for merge in report.merges if not merge.into]
        said = {one.reason for one in (*report.verdicts, *apart)} | {*report.notes, *report.limits}
        for words in every_name(report) | said:
            assert "".join(spell_out(words).split()) in text


@given(reports(500))
@settings(max_examples=40)
def test_every_name_is_on_the_page_and_none_is_markup(report: Report) -> None:
    for html in (report.to_html("<title>"), report._repr_html_()):
        html.encode()
        text = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
        tags = set(re.findall(r"<[^>]*>", text))
        assert all(re.fullmatch(TAG, tag) for tag in tags), tags
        shown = unescape(re.sub(r"<[^>]*>", "", text))
        assert "".join(shown.split("\n")).isprintable()
        for name in every_name(report):
            assert spell_out(name) in shown


TAG = (
    r"</?(html|head|body|title|h1|h2|section|div|dl|dt|dd|p|b|ul|li|code|var|span|details|summary|table|tr|th|td|meta)"
    r'( [a-z-]+(="[^"<>]*")?)*>|<!doctype html>'
)


def every_name(report: Report) -> set[str]:
    """What the model's author has named: BatchNorms, what they went into, what was merged."""
    named = {name for verdict in report.verdicts for name in (verdict.name, *verdict.into)}
    return named | {name for merge in report.merges for name in (merge.into, *merge.sources)}


@given(reports(500))
@settings(max_examples=20)
def test_the_record_holds_what_the_report_holds(report: Report) -> None:
    counts = {outcome: report.count(outcome) for outcome in ("folded", "scale folded", "kept")}
    record = json.loads(report.to_json())
    assert record == json.loads(json.dumps({"counts": counts, "verified": report.verified, **asdict(report)}))
    assert list(record) == [
        "counts", "verified", "verdicts", "evidence", "notes", "parameters", "limits", "merges", "operators",
        "multiply_adds", "proof",
    ]  # fmt: skip
