"""What became of every BatchNorm, and how the folded model was compared: as a table and as a record.

A `Report` is what `bnfold.fold` returns beside the model. `print(report)` is a table, `report.to_json()` a record.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any, Literal

__all__ = ["Evidence", "Merge", "Outcome", "Report", "Verdict"]

Outcome = Literal["folded", "scale folded", "kept"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one BatchNorm.

    Attributes:
        name: the BatchNorm, as the model names it.
        outcome: ``"folded"`` (gone), ``"scale folded"`` (one per-channel Add is left) or ``"kept"``.
        into: the operators that absorbed it.
        reason: one sentence where it was not folded: the node in the way and, where there is one, the way out.
    """

    name: str
    outcome: Outcome
    into: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Merge:
    """Linear operators that became one, or could have and did not.

    Attributes:
        into: the operator that they are now, as the model names it; empty where they are not merged.
        sources: the operators that it was made of, as the model names them.
        multiply_adds: how many multiply-adds one example takes, before and after; a size that is not known counts as 1.
        bytes: how many bytes of weights it reads, before and after.
        reason: why they are not merged.
    """

    into: str
    sources: tuple[str, ...]
    multiply_adds: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One comparison of the model before and after.

    Attributes:
        question: what was compared ("float64: is the algebra right?").
        inputs: how many examples went through both models.
        exhaustive: whether those are all the inputs there are.
        deviation: the largest difference, relative to the largest output.
        bound: what it was held to.
        source: where the bound comes from, in words.
        movement: how far the output moves between two inputs, relative to the largest output. Where this is near
            zero the output hardly depends on the input, and the comparison says little.
    """

    question: str
    inputs: int
    exhaustive: bool
    deviation: float
    bound: float
    source: str
    movement: float | None


@dataclass(frozen=True)
class Report:
    """Every verdict, and the evidence that the folded model computes the same.

    Attributes:
        verdicts: one for every BatchNorm, in the order of computation.
        evidence: the comparisons that were made; empty where none was.
        notes: what else there is to say, each one sentence ("unverified: ...").
        parameters: how many floating-point numbers the model holds, statistics included, before and after.
        limits: what the verdicts rest on that no comparison shows, each one sentence; printed first.
        merges: linear operators that became one, then those that could have and did not.
        operators: how many linear operators there are, before and after merging.
        multiply_adds: how many multiply-adds those take for one example, before and after merging.
        proof: what was shown without running anything, each one sentence.
    """

    verdicts: tuple[Verdict, ...]
    evidence: tuple[Evidence, ...] = ()
    notes: tuple[str, ...] = ()
    parameters: tuple[int, int] | None = field(default=None)
    limits: tuple[str, ...] = ()
    merges: tuple[Merge, ...] = ()
    operators: tuple[int, int] | None = field(default=None)
    multiply_adds: tuple[int, int] | None = field(default=None)
    proof: tuple[str, ...] = ()

    @property
    def merged(self) -> tuple[Merge, ...]:
        """The merges that were made."""
        return tuple(merge for merge in self.merges if merge.into)

    @property
    def verified(self) -> bool:
        """Whether the folded model was compared with the original."""
        return bool(self.evidence)

    def count(self, outcome: Outcome) -> int:
        """How many BatchNorms came out like this."""
        return Counter(verdict.outcome for verdict in self.verdicts)[outcome]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        counts = {outcome: self.count(outcome) for outcome in ("folded", "scale folded", "kept")}
        return {"counts": counts, "verified": self.verified, **asdict(self)}

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, default=str)

    def summary(self) -> str:
        """One line: how many of how many, and whether that was verified."""
        total, gone = len(self.verdicts), self.count("folded")
        if not total and not self.merged:
            return "there is no BatchNorm in it"
        parts = [f"{gone} of {total} BatchNorm{'s' * (total != 1)} folded"] if total else []
        parts += [f"{self.count(o)} {o}" for o in ("scale folded", "kept") if self.count(o)]
        parts += [self._sum_up()] if self.merged else []
        return ", ".join([*parts, "verified" if self.verified else "unverified"])

    def _sum_up(self) -> str:
        """What merging has gained."""
        count, work = self.operators or (0, 0), self.multiply_adds or (0, 0)
        less = f"{_short(work[0])} to {_short(work[1])} multiply-adds"
        return f"{count[0]} linear operators before, {count[1]} after merging ({less})"

    def __str__(self) -> str:
        """The table of verdicts, the evidence and the notes, 110 columns wide."""
        from rich.console import Console

        text = StringIO()
        console = Console(file=text, width=110, no_color=True, highlight=False, legacy_windows=False)
        for part in self.renderables():
            console.print(part)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def renderables(self) -> list[Any]:
        """The parts of the report for a `rich` console."""
        from rich.markup import escape

        parts: list[Any] = [escape(limit) for limit in self.limits]
        parts += [_verdict_table(self.verdicts)] if self.verdicts else []
        parts += [_merge_table(self.merged)] if self.merged else []
        parts += [escape(line) for line in _not_merged(self.merges)]
        parts += [escape(f"proved: {shown}") for shown in self.proof]
        parts += [_evidence_table(self.evidence)] if self.evidence else []
        parts += [escape(note) for note in self.notes]
        if self.parameters is not None:
            before, after = self.parameters
            parts.append(f"parameters and statistics: {before:,} before, {after:,} after")
        return [*parts, escape(self.summary())]


def _verdict_table(verdicts: tuple[Verdict, ...]) -> Any:
    from rich.markup import escape

    table = _table("BatchNorm", "outcome", "into", "why")
    if not any(verdict.reason for verdict in verdicts):
        table = _table("BatchNorm", "outcome", "into")
    for verdict in verdicts:
        cells = (verdict.name, verdict.outcome, ", ".join(verdict.into), verdict.reason)
        table.add_row(*map(escape, cells[: len(table.columns)]))
    return table


def _merge_table(merges: tuple[Merge, ...]) -> Any:
    from rich.markup import escape

    table = _table("merged into", "from", "multiply-adds", "bytes")
    for merge in merges:
        pairs = (
            f"{_short(before)} to {_short(after)}" for before, after in (merge.multiply_adds, merge.bytes)
        )
        table.add_row(escape(merge.into), escape(", ".join(merge.sources)), *pairs)
    return table


def _not_merged(merges: tuple[Merge, ...]) -> Iterator[str]:
    """One line for each kind of reason, with how many and the first of them."""
    kinds: dict[str, list[Merge]] = {}
    for merge in merges:
        if not merge.into:
            kinds.setdefault(merge.reason.partition(":")[0], []).append(merge)
    for reason, alike in kinds.items():
        more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        yield f"not merged: {' with '.join(alike[0].sources)}{more}; {reason}"


def _short(number: int) -> str:
    """A number in three digits or so: 1.07 G, 94.3 k."""
    for factor, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)


def _evidence_table(evidence: tuple[Evidence, ...]) -> Any:
    table = _table("compared in", "inputs", "deviation", "bound", "where the bound comes from")
    for item in evidence:
        inputs = f"all {item.inputs:,}" if item.exhaustive else f"{item.inputs:,}"
        table.add_row(item.question, inputs, f"{item.deviation:.1e}", f"{item.bound:.1e}", item.source)
    return table


def _table(*headings: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
