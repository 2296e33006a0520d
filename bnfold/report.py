"""What became of every BatchNorm, and how the folded model was compared: the records, and the forms they can take.

A `Report` is what `bnfold.fold` returns beside the model. `print(report)` shows what fits a screen (`bnfold.printed`),
`report.to_html()` all of it to a reader (`bnfold.page`), `report.to_json()` all of it to a program.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

from bnfold.wording import shorten_number

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

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
        less = f"{shorten_number(work[0])} to {shorten_number(work[1])} multiply-adds"
        return f"{count[0]} linear operators before, {count[1]} after merging ({less})"

    def __str__(self) -> str:
        """The report as it is printed: at most a screenful, 110 columns wide."""
        return self.to_text()

    def to_text(self, *, full: bool = False, width: int = 110) -> str:
        """The report as lines of text.

        Args:
            full: give every BatchNorm and every merge an entry, however many lines that takes.
            width: how many columns a line may have.
        """
        from rich.console import Console

        from bnfold.printed import Printed

        text = StringIO()
        console = Console(
            file=text,
            width=width,
            color_system=None,
            highlight=False,
            legacy_windows=False,
            force_jupyter=False,
        )
        console.print(Printed(self, full))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def to_html(self, title: str = "What became of every BatchNorm") -> str:
        """The whole report as one page that opens anywhere, offline, in light and in dark."""
        from bnfold.page import compose

        return compose(self, title)

    def _repr_html_(self) -> str:
        """The whole report for a notebook, in the notebook's own colours."""
        from bnfold.page import fragment

        return fragment(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """What `rich.print` shows."""
        from bnfold.printed import Printed

        yield Printed(self)
