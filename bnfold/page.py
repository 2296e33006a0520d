"""A report as HTML: a page of its own that opens anywhere, offline, in light and in dark; and a piece of a notebook.

The page loads nothing and runs nothing: styles are inline, there is no script, and a content security policy makes the
browser refuse anything else. All of the report is in it. What is said of several BatchNorms is said once, with letters
for the names that differ, and each of them is listed with its own; a long list is closed until a reader opens it.

All text is the model's, so a stranger's: every piece passes through `_text` or `_sentence`, which escape it.

The piece for a notebook is the same without a title. It sets no colour of text or paper, so that it takes on those of
whatever it stands in. Not covered: a notebook that is not trusted drops the styles; what is left is plain HTML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import chain, count
from typing import TYPE_CHECKING, TypeVar

from bnfold.wording import Group, group, spell_out

if TYPE_CHECKING:
    from bnfold.report import Evidence, Merge, Outcome, Report, Verdict

__all__ = ["PAPER", "SECTIONS", "compose", "document", "fragment"]

Item = TypeVar("Item")

_OPEN = 12
"""A list of so many is open from the start."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

PAPER = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --faint: #59636e; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --faint: #9198a1; --line: #3d444d; }
}
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.35rem, 6vw, 2rem); }
"""
"""The colours of a page, in light and in dark, and its measures."""

_STYLE = """
.bnfold { overflow-wrap: anywhere; --edge: rgba(128, 128, 128, .45); --wash: rgba(128, 128, 128, .09); }
.bnfold h2 { font-size: 1.2em; margin: 1.8em 0 .5em; padding-bottom: .25em; border-bottom: 1px solid var(--edge); }
.bnfold code { font-family: ui-monospace, monospace; font-size: .9em; color: inherit; background: none; padding: 0; }
.bnfold .summary { font-size: 1.1em; font-weight: 600; margin: .8em 0; }
.bnfold .limit { border: 1px solid var(--edge); border-left: .35em solid #bf8700; padding: .5em .8em; margin: .5em 0; }
.bnfold .counts { display: flex; flex-wrap: wrap; gap: .6em; margin: 1em 0; padding: 0; }
.bnfold .counts div { display: flex; flex-direction: column-reverse; background: var(--wash);
  border-left: .35em solid var(--edge); padding: .35em 1em .35em .7em; }
.bnfold .counts div.folded { border-color: #2f8f4e; }
.bnfold .counts div.scale { border-color: #bf8700; }
.bnfold .counts div.kept { border-color: #c2564b; }
.bnfold .counts dt, .bnfold .counts dd { float: none; width: auto; margin: 0; padding: 0; font-weight: 400; }
.bnfold .counts dd { font-size: 1.5em; line-height: 1.2; font-variant-numeric: tabular-nums; }
.bnfold details { margin: .5em 0; border: 1px solid var(--edge); border-radius: .3em; }
.bnfold summary { cursor: pointer; padding: .5em .8em; background: var(--wash); }
.bnfold summary b { font-variant-numeric: tabular-nums; }
.bnfold details ul { list-style: none; margin: 0; padding: .2em .8em; }
.bnfold details li { margin: 0; padding: .35em 0; }
.bnfold details li + li { border-top: 1px solid var(--edge); }
.bnfold .where { display: block; padding-left: 1.2em; font-size: .9em; }
.bnfold .where span { display: inline-flex; align-items: baseline; gap: .35em; max-width: 100%; margin-right: 1em; }
.bnfold var { font-style: normal; font-weight: 700; border: 1px solid var(--edge); border-radius: .2em; padding: 0 .3em;
  font-size: .85em; }
.bnfold .wide { overflow-x: auto; }
.bnfold table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .3em 0; font-size: inherit; }
.bnfold th, .bnfold td { padding: .3em 1em .3em 0; border-bottom: 1px solid var(--edge); text-align: left;
  white-space: nowrap; vertical-align: top; background: none; color: inherit; }
.bnfold .number { text-align: right; }
.bnfold .words { white-space: normal; min-width: 12em; }
""".replace(".bnfold", ".bnfold.bnfold")
"""A class that is named twice outweighs what Jupyter says of the tables and lists of an output."""


def compose(report: Report, title: str) -> str:
    """The page."""
    return document(title, fragment(report))


def document(title: str, body: str, style: str = "") -> str:
    """A page around a body, which is HTML already; its title is text."""
    name = _text(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{PAPER}{style}</style>\n</head>\n"
        f"<body>\n<h1>{name}</h1>\n{body}\n</body>\n</html>\n"
    )


def fragment(report: Report) -> str:
    """All of the report, to stand in a page."""
    parts = "\n".join(part for make in SECTIONS if (part := make(report)))
    return f'<div class="bnfold">\n<style>{_STYLE}</style>\n{parts}\n</div>'


# -- text


def _text(text: str) -> str:
    return escape(spell_out(text))


def _sentence(text: str) -> str:
    """A sentence in which what stands in backticks is a name."""
    pieces = re.split(r"`([^`]*)`", text)
    return "".join(_code(piece) if place % 2 else _text(piece) for place, piece in enumerate(pieces))


def _code(name: str) -> str:
    return f"<code>{_text(name)}</code>"


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(_code, names))


def _section(title: str, *parts: str) -> str:
    """A heading and what stands below it; nothing where there is nothing to say."""
    body = "\n".join(filter(None, parts))
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


# -- lists


def _groups(
    items: Sequence[Item], what: str, reason: Callable[[Item], str], show: Callable[[Item], str]
) -> str:
    """Lists of items, one for each kind of reason."""
    return "\n".join(_group(one, what, show) for one in group(items, reason))


def _group(kind: Group[Item], what: str, show: Callable[[Item], str]) -> str:
    marks = [f"<var>{letter}</var>" for letter, _ in zip(_letters(), kind.values[0], strict=False)]
    said = _fill(kind, marks)
    heading = f"<b>{len(kind.items):,}</b> {escape(what)}" + (f": {said}" if said else "")
    rows = zip(kind.items, kind.values, strict=True)
    return _list(heading, [show(item) + _where(marks, values) for item, values in rows])


def _letters() -> Iterable[str]:
    """A, B, ..., Z, then A1, B1, ..."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return chain(alphabet, (f"{letter}{turn}" for turn in count(1) for letter in alphabet))


def _fill(kind: Group[Item], marks: Sequence[str]) -> str:
    """What is said of a group, with a mark where its members differ."""
    pieces = [_sentence(part) for part in kind.parts]
    return pieces[0] + "".join(chain.from_iterable(zip(marks, pieces[1:], strict=True)))


def _where(marks: Sequence[str], values: Sequence[str]) -> str:
    pairs = (f"<span>{mark} {_sentence(value)}</span>" for mark, value in zip(marks, values, strict=True))
    return f' <span class="where">{" ".join(pairs)}</span>' if values else ""


def _list(heading: str, entries: Sequence[str]) -> str:
    """A heading, and a list below it that a reader can open and close."""
    is_open = " open" if len(entries) <= _OPEN else ""
    items = "\n".join(f"<li>{entry}</li>" for entry in entries)
    return f"<details{is_open}>\n<summary>{heading}</summary>\n<ul>\n{items}\n</ul>\n</details>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of names, numbers and, after five columns, words. It scrolls by itself where the page is too narrow."""
    lines = "\n".join([_row("th", [escape(each) for each in headings]), *(_row("td", row) for row in rows)])
    return f'<div class="wide" tabindex="0"><table>\n{lines}\n</table></div>'


def _row(tag: str, cells: Sequence[str]) -> str:
    kinds = ("name", *["number"] * 4, "words")
    row = "".join(f'<{tag} class="{kind}">{cell}</{tag}>' for kind, cell in zip(kinds, cells, strict=False))
    return f"<tr>{row}</tr>"


# -- the sections


def _open(report: Report) -> str:
    limits = [f'<p class="limit" role="note">{_sentence(limit)}</p>' for limit in report.limits]
    return "\n".join([*limits, f'<p class="summary">{_text(report.summary())}</p>', _counts(report)])


def _counts(report: Report) -> str:
    outcomes: tuple[Outcome, ...] = ("folded", "scale folded", "kept")
    tiles = (
        f'<div class="{outcome.split()[0]}"><dt>{outcome}</dt><dd>{report.count(outcome):,}</dd></div>'
        for outcome in outcomes
    )
    return f'<dl class="counts">{"".join(tiles)}</dl>' if report.verdicts else ""


def _left(report: Report) -> str:
    kept, halved = _outcome(report, "kept"), _outcome(report, "scale folded")
    rest = "<p>Where the scale is folded, one addition per channel is left.</p>" if halved else ""
    return _section("Left, and why", kept, rest, halved)


def _folded(report: Report) -> str:
    return _section("Folded", _outcome(report, "folded"))


def _outcome(report: Report, outcome: Outcome) -> str:
    verdicts = [verdict for verdict in report.verdicts if verdict.outcome == outcome]
    return _groups(verdicts, outcome, lambda verdict: verdict.reason, _verdict)


def _verdict(verdict: Verdict) -> str:
    return _code(verdict.name) + (f" into {_names(verdict.into)}" if verdict.into else "")


def _merged(report: Report) -> str:
    entries = [_merge(merge) for merge in report.merged]
    made = _list(f"<b>{len(entries):,}</b> merged", entries) if entries else ""
    apart = [merge for merge in report.merges if not merge.into]
    return _section("Merged", made, _groups(apart, "not merged", lambda merge: merge.reason, _apart))


def _merge(merge: Merge) -> str:
    pairs = (("multiply-adds", merge.multiply_adds), ("bytes", merge.bytes))
    costs = (f"{name} {before:,} to {after:,}" for name, (before, after) in pairs)
    return f'{_code(merge.into)} from {_names(merge.sources)} <span class="where">{", ".join(costs)}</span>'


def _apart(merge: Merge) -> str:
    return " with ".join(map(_code, merge.sources))


def _proved(report: Report) -> str:
    items = "\n".join(f"<li>{_sentence(shown)}</li>" for shown in report.proof)
    return _section("Proved", f"<ul>\n{items}\n</ul>" if items else "")


def _evidence(report: Report) -> str:
    if report.evidence:
        return _section("Compared", _table(_COMPARED, map(_compared, report.evidence)), _SCALE)
    return _section("Compared", _UNVERIFIED if report.verdicts or report.merges else "")


_COMPARED = ("compared in", "inputs", "deviation", "bound", "movement", "where the bound comes from")
_SCALE = (
    "<p>The deviation is how far the folded model is from the original, the movement how far the output moves from one"
    " input to another, each relative to the largest output. Where that hardly moves, a comparison says little.</p>"
)
_UNVERIFIED = "<p>The folded model was not compared with the original.</p>"


def _compared(item: Evidence) -> list[str]:
    inputs = f"all {item.inputs:,}" if item.exhaustive else f"{item.inputs:,}"
    movement = "" if item.movement is None else f"{item.movement:.1e}"
    numbers = [inputs, f"{item.deviation:.1e}", f"{item.bound:.1e}", movement]
    return [_sentence(item.question), *numbers, _sentence(item.source)]


def _notes(report: Report) -> str:
    items = "\n".join(f"<li>{_sentence(note)}</li>" for note in report.notes)
    return _section("Notes", f"<ul>\n{items}\n</ul>" if items else "")


def _sizes(report: Report) -> str:
    pairs = (
        ("parameters and statistics", report.parameters),
        ("linear operators", report.operators),
        ("multiply-adds of one example", report.multiply_adds),
    )
    rows = [[name, *(f"{number:,}" for number in pair)] for name, pair in pairs if pair is not None]
    return _section("Before and after", _table(("", "before", "after"), rows) if rows else "")


SECTIONS: tuple[Callable[[Report], str], ...] = (
    _open,
    _left,
    _folded,
    _merged,
    _proved,
    _evidence,
    _notes,
    _sizes,
)
"""What stands on the page, in order: each makes its HTML of a report, or nothing."""
