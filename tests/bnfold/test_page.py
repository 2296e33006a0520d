"""The page of a report: all of it is there, nothing of it is markup, and a browser shows it so that it can be read."""

from __future__ import annotations

import re
from html import escape
from html.parser import HTMLParser

import pytest

from bnfold import page
from bnfold.report import Evidence, Merge, Report, Verdict
from tests.browser import DARK, LIGHT, browse, look, needs_browser, readability, style_in_jupyter

READ = "not into what comes before: the output of `block{0}.pool` (Concat) is also read by `block{0}.next` (Relu)"
MARKUP = '<script>alert("x")</script>&amp;[bold]'
REPORT = Report(
    (
        *(Verdict(f"block{i}.norm1", "folded", (f"block{i}.conv1", f"block{i}.conv2")) for i in range(40)),
        *(Verdict(f"block{i}.norm2", "kept", (), READ.format(i)) for i in range(20)),
        Verdict(
            "stem.norm" + ".inner" * 50, "scale folded", ("stem.conv",), "`relu` (Relu) lets no shift through"
        ),
        Verdict(MARKUP, "kept", (), f"`{MARKUP}` (Tanh) is not linear"),
    ),
    (
        Evidence("float64", 19_683, True, 3.2e-16, 1e-12, "of the largest output", 0.9),
        Evidence(
            "float32", 64, False, 2.1e-7, 1e-5, "8 x (unfolded error 3.2e-07 + 4 roundings of 6.0e-08)", None
        ),
    ),
    ("not read with another batch size: the model does not take one", MARKUP),
    (1_234_567, 1_200_000),
    ("`aux` does not run on the example inputs",),
    (
        Merge("stage", ("stage.conv3x3", "stage.conv1x1"), (2_031_616, 1_769_472), (8192, 7168)),
        Merge("", ("expand", "project"), reason="as one it would be dearer: 9 multiply-adds, now 4"),
        Merge("", ("up", "down"), reason="as one it would be dearer: 8 multiply-adds, now 3"),
    ),
    (44, 43),
    (69_581_824, 68_527_104),
)

SECTIONS = ["Left, and why", "Folded", "Merged", "Compared", "Notes", "Before and after"]


class Reader(HTMLParser):
    """What is text on a page, and which tags there are."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def test_everything_in_the_report_is_on_the_page():
    text = Reader(REPORT.to_html("net.onnx")).text
    for verdict in REPORT.verdicts:
        assert verdict.name in text
        assert ", ".join(verdict.into) in text
    for merge in REPORT.merges:
        assert all(name in text for name in (merge.into, *merge.sources))
    for number in (
        "2,031,616 to 1,769,472",
        "8,192 to 7,168",
        "all 19,683",
        "3.2e-16",
        "9.0e-01",
        "1,234,567",
    ):
        assert number in text
    for words in (*REPORT.notes, *(limit.replace("`", "") for limit in REPORT.limits), REPORT.summary()):
        assert words in text
    assert all(item.source in text for item in REPORT.evidence)


def test_what_is_said_of_many_is_said_once_and_each_has_its_own_names():
    html = REPORT.to_html()
    assert html.count("is also read by") == 1
    said = "the output of <var>A</var> (Concat) is also read by <var>B</var> (Relu)"
    assert said in html
    own = "<span><var>A</var> <code>block{0}.pool</code></span> <span><var>B</var> <code>block{0}.next</code></span>"
    assert all(own.format(i) in html for i in range(20))


def test_a_long_list_is_closed_and_a_short_one_open():
    html = REPORT.to_html()
    assert "<details>\n<summary><b>40</b> folded" in html
    assert "<details open>\n<summary><b>1</b> scale folded" in html


def test_nothing_of_a_report_is_markup_and_no_letter_is_invisible():
    names = [
        MARKUP,
        "a\x1b[31mb",
        "\ud800",
        "a\u202eb",
        "' onmouseover='x",
        "]]>",
        "</style>",
        "<!--",
        "`",
        "a`b",
    ]
    verdicts = tuple(Verdict(name, "kept", (name,), f"`{name}` stays: {name}") for name in names)
    evidence = (Evidence(MARKUP, 1, False, 0.0, 0.0, MARKUP, None),)
    merges = tuple(Merge(name, (name, name), reason=name) for name in names)
    merges += tuple(Merge("", (name,), reason=name) for name in names)
    report = Report(verdicts, evidence, tuple(names), None, tuple(names), merges)
    for html in (report.to_html("</title><script>"), report._repr_html_()):
        html.encode()
        reader = Reader(html)
        assert set(reader.tags) <= set(Reader(REPORT.to_html()).tags)
        assert "<script" not in html
        assert reader.text.replace("\n", "").isprintable()
        assert escape(MARKUP) in html
        assert "a\\x1b[31mb" in reader.text


def test_the_page_loads_nothing_and_runs_nothing():
    html = REPORT.to_html()
    assert "default-src 'none'" in html
    assert not re.search(
        r"https?:|<script|<link|<img|@import|url\(|\son\w+=", html.replace(escape(MARKUP), "")
    )


def test_a_report_of_nothing_is_a_page_too():
    text = Reader(Report(()).to_html()).text
    assert "there is no BatchNorm in it" in text
    assert not any(section in text for section in SECTIONS)
    assert "was not compared with the original" in Reader(Report(REPORT.verdicts).to_html()).text


def test_a_notebook_is_given_the_same_without_a_page_around_it():
    piece = REPORT._repr_html_()
    assert piece.startswith("<div")
    assert piece in REPORT.to_html()
    assert set(re.findall(r"[\s{]color: *([^;]+)", piece)) == {"inherit"}


def test_another_section_is_a_function_more_in_the_list(monkeypatch):
    more = (*page.SECTIONS, lambda report: page._section("Proof", f"<p>{len(report.verdicts)} nodes</p>"))
    monkeypatch.setattr(page, "SECTIONS", more)
    assert "<h2>Proof</h2>\n<p>62 nodes</p>" in REPORT.to_html()


# ---------------------------------------------------------------- in a browser


@needs_browser
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_a_browser_shows_all_of_the_page_legibly_in_either_scheme_narrow_and_wide(scheme, tmp_path):
    for seen in look([REPORT.to_html("net.onnx")], tmp_path, scheme):
        assert seen["headings"] == SECTIONS
        assert seen["clipped"] == []
        assert {verdict.name for verdict in REPORT.verdicts} <= set(seen["shown"])
        assert min(readability(*pair) for pair in seen["colours"]) >= 4.5
        assert seen["scroll"] == seen["width"]
        assert (seen["loaded"], seen["strangers"]) == (0, 0)
        assert seen["paper"] == ("rgb(255, 255, 255)" if scheme == LIGHT else "rgb(13, 17, 23)")


@needs_browser
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_a_notebook_shows_it_in_its_own_colours_whatever_the_reader_prefers(scheme, tmp_path):
    notebook = "<!doctype html><body style='margin: 0; color: {}; background: {}'>{}"
    themes = (("rgba(255, 255, 255, 0.87)", "#111111"), ("rgba(0, 0, 0, 0.87)", "#ffffff"))
    seen = look([notebook.format(*theme, REPORT._repr_html_()) for theme in themes], tmp_path, scheme)
    assert len(seen) == 4
    for one in seen:
        assert one["headings"] == SECTIONS
        assert one["clipped"] == []
        assert min(readability(*pair) for pair in one["colours"]) >= 4.5
        assert one["scroll"] == one["width"]


@needs_browser
def test_jupyter_does_not_lay_its_tables_and_lists_out_anew(tmp_path):
    asked = {
        "dd": ("float", "none"),
        "td:first-child": ("textAlign", "left"),
        "td.number": ("textAlign", "right"),
    }
    for selector, (name, value) in asked.items():
        assert style_in_jupyter(REPORT._repr_html_(), tmp_path, selector, name) == {value}, selector


@needs_browser
def test_the_policy_of_the_page_stops_what_would_be_loaded_and_run(tmp_path):
    added = "<img src='https://example.org/a.png'><script>document.title = 'run'</script>"
    intruder = REPORT.to_html().replace("<h1>", f"{added}<h1>")
    (tmp_path / "page.html").write_text(intruder, encoding="utf-8")
    dom, log = browse(tmp_path / "page.html", tmp_path, LIGHT, "--dump-dom")
    assert "<title>run" not in dom
    assert log.count("CONSOLE") >= 2
