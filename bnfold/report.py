"""What became of every BatchNorm, and how the folded model was compared: as a table and as a record.

A `Report` is what `bnfold.fold` returns beside the model. `print(report)` is a table, `report.to_json()` a record.
"""

from __future__ import annotations

import json
from collections import Counter
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
    """

    verdicts: tuple[Verdict, ...]
    evidence: tuple[Evidence, ...] = ()
    notes: tuple[str, ...] = ()
    parameters: tuple[int, int] | None = field(default=None)
    limits: tuple[str, ...] = ()

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
        if not total:
            return "there is no BatchNorm in it"
        parts = [f"{gone} of {total} BatchNorm{'s' * (total != 1)} folded"]
        parts += [f"{self.count(o)} {o}" for o in ("scale folded", "kept") if self.count(o)]
        return ", ".join([*parts, "verified" if self.verified else "unverified"])

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
