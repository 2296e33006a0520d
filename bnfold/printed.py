"""A report as it is printed: of any net at most a screenful, as wide as the console.

First what the verdicts rest on, and the summary. Then what was left and why, by kinds of reasons, each with how many and
with three names; what was folded and what was merged, likewise; and how the models were compared. A dozen rows that fit
the width are a table. What the screen does not hold is left out where there is most of it, and a line says how much.

In full, every BatchNorm and every merge has an entry of its own, and nothing is left out.

Not covered: a console of fewer than 30 columns, on which a summary and a few notes can be longer than a screen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bnfold.wording import enumerate_some, group, shorten_number, spell_out

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

    from bnfold.report import Evidence, Merge, Report, Verdict

__all__ = ["LINES", "Printed"]

LINES = 36
"""As many lines has a report at most: a command can still say what it wrote on a screen of 40."""

_ROWS = 12
"""More rows are no table."""

_SENTENCE, _NAMES = 5, 3
"""As many lines have a sentence, and the names below it, at most."""


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


_Block = list[_Section]
"""Sections that stand together, with an empty line before and after."""


@dataclass(frozen=True)
class Printed:
    """A report for a `rich` console.

    Attributes:
        report: what is printed.
        full: whether every verdict and every merge has an entry, however many lines that takes.
        more: where all of it stands, for who reads a report in which something was left out; "" for no such line.
    """

    report: Report
    full: bool = False
    more: str = "in full: report.to_text(full=True), report.to_html()"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """The lines, none of which is wider than the console."""
        paper = _Paper(console, options, self.full)
        blocks = [block for make in BLOCKS if (block := [one for one in make(paper, self.report) if one.height])]
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

    def lines(self, text: str, indent: int = 0, hang: int = 0, style: str = "") -> list[Text]:
        """The lines of a paragraph; those after the first are indented by `hang` more."""
        from rich.text import Text

        width = max(self.options.max_width - indent - hang, 10)
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
        """A sentence, and the names of whom it is true: three of them, fewer where they are long."""
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
        last.truncate(max(self.options.max_width - 4, 1))
        last.append(" ...")
        return lines[:most]

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> _Section | None:
        """A table, where each of the rows, not many, fits on a line."""
        from rich.cells import cell_len, set_cell_size

        cells = [list(map(spell_out, row)) for row in (headings, *rows)]
        widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
        width = sum(widths) + 3 * len(widths) - 2
        if len(rows) > _ROWS or width > self.options.max_width:
            return None
        padded = [map(set_cell_size, row, widths) for row in cells]
        heading, *others = (self._row(" " + "   ".join(row)) for row in padded)
        heading.stylize("bold")
        rule = ("-" if self.options.ascii_only else "─") * (width - 1)
        return _Section("row", [[row] for row in others], [heading, self._row(f" {rule}")])

    def _row(self, text: str) -> Text:
        from rich.text import Text

        return Text(text.rstrip(), no_wrap=True, overflow="ignore")


def _open(paper: _Paper, report: Report) -> Iterator[_Section]:
    yield _Section("limit", [paper.sentence(limit) for limit in report.limits])
    yield _Section(head=paper.lines(report.summary(), style="bold"))


def _verdicts(paper: _Paper, report: Report) -> Iterator[_Section]:
    headings = ("BatchNorm", "outcome", "into", "why")
    rows = [(one.name, one.outcome, ", ".join(one.into), one.reason) for one in report.verdicts]
    columns = 4 if any(row[3] for row in rows) else 3
    table = paper.table(headings[:columns], [row[:columns] for row in rows]) if rows else None
    if table is not None:
        yield table
    elif paper.full:
        yield _Section("BatchNorm", [paper.sentence(_tell(verdict)) for verdict in report.verdicts])
    else:
        yield from _kinds(paper, report.verdicts)


def _tell(verdict: Verdict) -> str:
    into = f" into {', '.join(verdict.into)}" if verdict.into else ""
    return f"{verdict.name}: {verdict.outcome}{into}" + (f"; {verdict.reason}" if verdict.reason else "")


def _kinds(paper: _Paper, verdicts: Sequence[Verdict]) -> Iterator[_Section]:
    """What was left, by kinds of reasons; then what was folded."""
    for noun, outcomes in (("reason", ("kept", "scale folded")), ("kind", ("folded",))):
        section = _Section(noun)
        for outcome in outcomes:
            for kind in group([one for one in verdicts if one.outcome == outcome], lambda one: one.reason):
                paper.abridged |= bool(kind.values[0])
                said = kind.sentence()
                names = [_name(one, bool(said)) for one in kind.items]
                text = f"{len(names):,} {outcome}" + (f": {said}" if said else "")
                section.entries.append(paper.entry(text, names))
        yield section


def _name(verdict: Verdict, alone: bool) -> str:
    return verdict.name if alone or not verdict.into else f"{verdict.name} into {enumerate_some(verdict.into)}"


def _merges(paper: _Paper, report: Report) -> Iterator[_Section]:
    made = [(one.into, ", ".join(one.sources), *_costs(one)) for one in report.merged]
    table = paper.table(("merged into", "from", "multiply-adds", "bytes"), made) if made else None
    if table is not None:
        yield table
    elif paper.full:
        texts = [f"{into}: merged from {names}; multiply-adds {work}, bytes {size}" for into, names, work, size in made]
        yield _Section("merge", [paper.sentence(text) for text in texts])
    elif made:
        paper.abridged = True
        names = [f"{one.into} from {enumerate_some(one.sources)}" for one in report.merged]
        yield _Section("merge", [paper.entry(f"{len(made):,} merged", names, "; ")])
    yield _not_merged(paper, [one for one in report.merges if not one.into])


def _not_merged(paper: _Paper, merges: Sequence[Merge]) -> _Section:
    if paper.full:
        return _Section("merge", [paper.sentence(f"{_between(one)}: not merged; {one.reason}") for one in merges])
    section = _Section("reason")
    for kind in group(merges, lambda one: one.reason):
        paper.abridged |= bool(kind.values[0])
        names = [_between(one) for one in kind.items]
        section.entries.append(paper.entry(f"{len(names):,} not merged: {kind.sentence()}", names, "; "))
    return section


def _between(merge: Merge) -> str:
    return " with ".join(merge.sources)


def _costs(merge: Merge) -> tuple[str, str]:
    work, size = (" to ".join(map(shorten_number, pair)) for pair in (merge.multiply_adds, merge.bytes))
    return work, size


def _evidence(paper: _Paper, report: Report) -> Iterator[_Section]:
    headings = ("compared in", "inputs", "deviation", "bound", "where the bound comes from")
    rows = [_compared(item) for item in report.evidence]
    table = paper.table(headings, rows) if rows else None
    words = "compared in {}, {} inputs: deviation {}, bound {}, {}"
    yield table or _Section("comparison", [paper.sentence(words.format(*row)) for row in rows])


def _compared(item: Evidence) -> tuple[str, ...]:
    inputs = f"all {item.inputs:,}" if item.exhaustive else f"{item.inputs:,}"
    return item.question, inputs, f"{item.deviation:.1e}", f"{item.bound:.1e}", item.source


def _close(paper: _Paper, report: Report) -> Iterator[_Section]:
    yield _Section("note", [paper.sentence(note) for note in report.notes])
    if report.parameters is not None:
        before, after = report.parameters
        yield _Section(head=paper.lines(f"parameters and statistics: {before:,} before, {after:,} after"))


BLOCKS: tuple[Callable[[_Paper, Report], Iterator[_Section]], ...] = (_open, _verdicts, _merges, _evidence, _close)
"""The parts of a printed report, in order."""
