"""A report as it is printed: of any net at most a screenful, as wide as the console.

First what the verdicts rest on, and the summary. Then what was left and why, by kinds of reasons, each with how many
and with three names; what was folded and what was merged, likewise; and how the models were compared. A few rows that
fit the width are a table. What a screen does not hold is left out where there is most of it, and a line says how much.

In full, every BatchNorm and every merge has an entry of its own, and nothing is left out.

Not covered: a console of fewer than 30 columns, on which a summary and a few notes can be longer than a screen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from bnfold.wording import Group, enumerate_some, group, shorten_number, spell_out

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

    from bnfold.report import Evidence, Merge, Report, Verdict

__all__ = ["LINES", "PARTS", "Printed"]

LINES = 36
"""As many lines has a report at most: a command can still say what it wrote on a screen of 40."""

_ROWS, _TABLE, _WORDS = 12, 18, 36
"""A table has as many rows and lines at most, and its last column at least that width if a cell takes several lines."""

_SENTENCE, _NAMES = 5, 3
"""As many lines have a sentence, and the names below it, at most."""

_LIMITS, _INTO = 3, 3
"""As many limits stand above the summary, and as many operators behind a BatchNorm that they absorbed, at most."""

Item = TypeVar("Item")


@dataclass
class _Section:
    """Lines that belong together: a head, and entries (each a `noun`) of which the last ones can be left out."""

    noun: str = ""
    entries: list[list[Text]] = field(default_factory=list)
    head: list[Text] = field(default_factory=list)
    left_out: int = 0

    @property
    def height(self) -> int:
        """How many lines there are."""
        return len(self.head) + sum(map(len, self.entries)) + bool(self.left_out)

    def shorten(self) -> None:
        """Leave the last entry out."""
        self.entries.pop()
        self.left_out += 1


Part = Callable[["_Paper", "Report"], Iterator[_Section]]
"""Makes the sections of one part of a report."""

_Block = list[_Section]
"""Sections that stand together, with an empty line before and after."""


@dataclass(frozen=True)
class Printed:
    """A report for a `rich` console.

    Attributes:
        report: what is printed.
        full: whether every verdict and every merge has an entry, however many lines that takes.
        more: where all of it stands, for who reads a report in which something was left out; "" for no such line.
        parts: what of it is printed; None for all `PARTS`.
    """

    report: Report
    full: bool = False
    more: str = "in full: report.to_text(full=True), report.to_html()"
    parts: Sequence[Part] | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """The lines, none of which is wider than the console."""
        paper = _Paper(console, options, self.full)
        blocks = [
            block
            for make in self.parts or PARTS
            if (block := [one for one in make(paper, self.report) if one.height])
        ]
        if not self.full:
            self._fit(paper, blocks)
        for place, block in enumerate(blocks):
            yield from paper.lines("") if place else ()
            for section in block:
                yield from section.head
                for entry in section.entries:
                    yield from entry
                yield from paper.lines(_count_more(section)) if section.left_out else ()

    def _fit(self, paper: _Paper, blocks: list[_Block]) -> None:
        """Leave entries out where they take most lines, until the rest fits; then say where all of them are."""
        more = paper.lines(self.more) if self.more else []
        sections = [section for block in blocks for section in block]
        room = LINES - len(blocks) - len(more)
        while sum(section.height for section in sections) > room:
            open_ones = [s for s in sections if len(s.entries) > 1] or [s for s in sections if s.entries]
            if not open_ones:
                break
            max(open_ones, key=lambda section: section.height).shorten()
            paper.abridged = True
        if paper.abridged and more:
            blocks.append([_Section(head=more)])


def _count_more(section: _Section) -> str:
    noun = section.noun + "s" * (section.left_out > 1)
    return f"{'... and ' if section.entries else ''}{section.left_out:,} more {noun}"


@dataclass
class _Paper:
    """Makes lines of words, as wide as the console.

    Attributes:
        full: whether nothing may be left out.
        abridged: whether something was.
    """

    console: Console
    options: ConsoleOptions
    full: bool
    abridged: bool = False

    def lines(
        self, text: str, indent: int = 0, hang: int = 0, style: str = "", width: int | None = None
    ) -> list[Text]:
        """The lines of a paragraph, as wide as the console; those after the first are indented by `hang` more."""
        from rich.text import Text

        width = width or max(self.options.max_width - indent - hang, 10)
        wrapped = Text(spell_out(text), style).wrap(self.console, width)
        for place, line in enumerate(wrapped):
            line.rstrip()
            line.pad_left(indent + (hang if place else 0))
            line.no_wrap, line.overflow = True, "ignore"
        return list(wrapped) or [Text("")]

    def sentence(self, text: str) -> list[Text]:
        """A paragraph of a few lines."""
        return self._cut(self.lines(text, hang=2), _SENTENCE)

    def entry(self, text: str, names: Sequence[str], separator: str = ", ") -> list[Text]:
        """A sentence, and the names of whom it is true: three of them, or as many as fit on a few lines."""
        tries = (self.lines(enumerate_some(names, most, separator), 4) for most in (3, 2, 1))
        found = next((lines for lines in tries if len(lines) <= _NAMES), None)
        last = found or self._cut(self.lines(enumerate_some(names, 1, separator), 4), _NAMES)
        self.abridged |= len(names) > 3 or found is None
        return [*self.sentence(text), *last]

    def _cut(self, lines: list[Text], most: int) -> list[Text]:
        if self.full or len(lines) <= most:
            return lines
        self.abridged = True
        last = lines[most - 1]
        last.truncate(max(self.options.max_width - 4, 1), overflow="crop")
        last.append(" ...")
        return lines[:most]

    def section(
        self, noun: str, items: Sequence[Item], show: Callable[[Item], list[Text]], most: int = LINES
    ) -> _Section:
        """An entry for each item; for the first ones, where there are more than a screen holds."""
        shown = items if self.full else items[:most]
        self.abridged |= len(shown) < len(items)
        return _Section(noun, list(map(show, shown)), left_out=len(items) - len(shown))

    def kinds(
        self,
        noun: str,
        items: Sequence[Item],
        reason: Callable[[Item], str],
        show: Callable[[Group[Item]], list[Text]],
    ) -> _Section:
        """An entry for each kind of reason."""
        kinds = group(items, reason)
        self.abridged |= any(kind.values[0] for kind in kinds)
        return self.section(noun, kinds, show)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> _Section | None:
        """A table, where it is small and wide enough; in its last column a cell may take several lines."""
        from rich.cells import cell_len, set_cell_size

        if not 0 < len(rows) <= _ROWS:
            return None
        cells = [list(map(spell_out, row)) for row in (headings, *rows)]
        *widths, last = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
        taken = sum(widths) + 3 * len(widths) + 1
        last = min(last, max(self.options.max_width - taken, _WORDS))
        if taken + last > self.options.max_width:
            return None
        entries = []
        for *others, words in cells:
            start = " " + "".join(
                set_cell_size(cell, width) + "   " for cell, width in zip(others, widths, strict=True)
            )
            entries.append(self._row(start, self.lines(words, width=last)))
        heading, *entries = entries
        heading[0].stylize("bold")
        rule = ("-" if self.options.ascii_only else "─") * (taken + last - 1)
        table = _Section("row", entries, [*heading, *self.lines(f" {rule}")])
        return table if table.height <= _TABLE else None

    def _row(self, start: str, words: Sequence[Text]) -> list[Text]:
        from rich.cells import cell_len
        from rich.text import Text

        first, *rest = words
        first = Text(start, no_wrap=True, overflow="ignore").append_text(first)
        first.rstrip()
        for line in rest:
            line.pad_left(cell_len(start))
        return [first, *rest]


def _open(paper: _Paper, report: Report) -> Iterator[_Section]:
    yield paper.section("limit", report.limits, paper.sentence, _LIMITS)
    yield _Section(head=paper.lines(report.summary(), style="bold"))


def _verdicts(paper: _Paper, report: Report) -> Iterator[_Section]:
    headings = ("BatchNorm", "outcome", "into", "why")
    rows = [(one.name, one.outcome, ", ".join(one.into), one.reason) for one in report.verdicts]
    columns = 4 if any(row[3] for row in rows) else 3
    table = paper.table(headings[:columns], [row[:columns] for row in rows])
    if table is not None:
        yield table
    elif paper.full:
        yield paper.section("BatchNorm", report.verdicts, lambda one: paper.sentence(_tell(one)))
    else:
        yield _kinds(paper, "reason", [one for one in report.verdicts if one.outcome == "kept"])
        yield _kinds(paper, "reason", [one for one in report.verdicts if one.outcome == "scale folded"])
        yield _kinds(paper, "kind", [one for one in report.verdicts if one.outcome == "folded"])


def _tell(verdict: Verdict) -> str:
    into = f" into {', '.join(verdict.into)}" if verdict.into else ""
    return f"{verdict.name}: {verdict.outcome}{into}" + (f"; {verdict.reason}" if verdict.reason else "")


def _kinds(paper: _Paper, noun: str, verdicts: Sequence[Verdict]) -> _Section:
    """BatchNorms of one outcome, by kinds of reasons."""

    def show(kind: Group[Verdict]) -> list[Text]:
        reason = kind.sentence()
        names = [one.name if reason else _whither(one) for one in kind.items]
        paper.abridged |= any(len(one.into) > (0 if reason else _INTO) for one in kind.items)
        text = f"{len(kind.items):,} {kind.items[0].outcome}" + (f": {reason}" if reason else "")
        return paper.entry(text, names)

    return paper.kinds(noun, verdicts, lambda one: one.reason, show)


def _whither(verdict: Verdict) -> str:
    return f"{verdict.name} into {enumerate_some(verdict.into, _INTO)}" if verdict.into else verdict.name


def _merges(paper: _Paper, report: Report) -> Iterator[_Section]:
    rows = [(one.into, ", ".join(one.sources), *_costs(one)) for one in report.merged]
    table = paper.table(("merged into", "from", "multiply-adds", "bytes"), rows)
    if table is not None:
        yield table
    elif paper.full:
        words = "{} merged from {}; multiply-adds {}, bytes {}"
        yield paper.section("merge", rows, lambda row: paper.sentence(words.format(*row)))
    elif rows:
        paper.abridged = True
        names = [f"{one.into} from {enumerate_some(one.sources)}" for one in report.merged]
        yield _Section("merge", [paper.entry(f"{len(rows):,} merged", names, "; ")])
    yield _not_merged(paper, [one for one in report.merges if not one.into])


def _not_merged(paper: _Paper, merges: Sequence[Merge]) -> _Section:
    def show(kind: Group[Merge]) -> list[Text]:
        names = list(map(_between, kind.items))
        return paper.entry(f"{len(names):,} not merged: {kind.sentence()}", names, "; ")

    if paper.full:
        words = "{} not merged: {}"
        return paper.section(
            "merge", merges, lambda one: paper.sentence(words.format(_between(one), one.reason))
        )
    return paper.kinds("reason", merges, lambda one: one.reason, show)


def _between(merge: Merge) -> str:
    return " with ".join(merge.sources)


def _costs(merge: Merge) -> tuple[str, str]:
    work, size = (" to ".join(map(shorten_number, pair)) for pair in (merge.multiply_adds, merge.bytes))
    return work, size


def _proof(paper: _Paper, report: Report) -> Iterator[_Section]:
    """What was shown without running anything."""
    for shown in report.proof:
        yield _Section(head=paper.lines(f"proved: {spell_out(shown)}", hang=8))


def _evidence(paper: _Paper, report: Report) -> Iterator[_Section]:
    headings = ["compared in", "inputs", "deviation", "bound", "where the bound comes from"]
    words = "compared in {}, {} inputs: deviation {}, bound {}, {}"
    rows = [_compared(item) for item in report.evidence]
    if paper.full:
        headings.insert(4, "movement")
        words = "compared in {}, {} inputs: deviation {}, bound {}, movement {}, {}"
        rows = [[*row[:4], _movement(item), row[4]] for row, item in zip(rows, report.evidence, strict=True)]
    yield paper.table(headings, rows) or paper.section(
        "comparison", rows, lambda row: paper.sentence(words.format(*row))
    )


def _compared(item: Evidence) -> list[str]:
    inputs = f"all {item.inputs:,}" if item.exhaustive else f"{item.inputs:,}"
    return [item.question, inputs, f"{item.deviation:.1e}", f"{item.bound:.1e}", item.source]


def _movement(item: Evidence) -> str:
    return "unknown" if item.movement is None else f"{item.movement:.1e}"


def _close(paper: _Paper, report: Report) -> Iterator[_Section]:
    yield paper.section("note", report.notes, paper.sentence)
    if report.parameters is not None:
        before, after = report.parameters
        yield _Section(head=paper.lines(f"parameters and statistics: {before:,} before, {after:,} after"))


PARTS: tuple[Part, ...] = (_open, _verdicts, _merges, _proof, _evidence, _close)
"""The parts of a printed report, in order."""
