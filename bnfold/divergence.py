"""Find the layer in which two models begin to differ for good.

Both models are run on one input, and what they call by the same name is compared. In a folded model values on the
way differ rightly: they arrive scaled, up to where the fold ends. So a difference counts only if it *lasts*: from the
output that differs, the computation is followed backwards, through values that differ and values that only one model
has, and not beyond a value that agrees. The first of those that differ is what is named, with the values that agree
and feed it: the fault lies between these and that.

Not covered: a fault before a value that differs rightly and lasts is named at that value, which may be a few layers
early; two models without common names have no such value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bnfold.cases import Case
from bnfold.equivalence import Outputs, Unavailable, Worst, measure
from bnfold.errors import BnfoldError

__all__ = ["Divergence", "Recording", "find_divergence"]


@dataclass(frozen=True)
class Recording:
    """What a model computed on the way to an output.

    Attributes:
        kind: of which models values can be compared by name.
        values: by name, in the order of computation.
        makers: what makes each value: a class or an operator.
        sources: the values that each value is made of, computed or not; the output stands under "".
    """

    kind: str
    values: Mapping[str, Any]
    makers: Mapping[str, str]
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Divergence:
    """Where a difference begins that lasts to the output.

    Attributes:
        layer: the value, by the name of the layer or the value itself.
        maker: its class or operator.
        deviation: how far it differs, relative to its largest element.
        fed_by: the values that agree and that it is computed from.
    """

    layer: str
    maker: str
    deviation: float
    fed_by: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(f"`{name}`" for name in self.fed_by)
        fed = f"; {names} before it agree{'s' * (len(self.fed_by) == 1)}" if names else ""
        lasts = "and so does all that leads from it to the output"
        return f"`{self.layer}` ({self.maker}) differs by {self.deviation:.1e}, {lasts}{fed}"


def find_divergence(before: Any, after: Any, case: Case | None, worst: Worst | None) -> Divergence | None:
    """The first layer whose difference lasts to the worst output; None where no common value tells.

    Args:
        before, after: see `bnfold.verification.Side`.
    """
    if case is None or worst is None or not worst.output:
        return None
    try:
        old, new = before.record(case, worst.output), after.record(case, worst.output)
    except (BnfoldError, Unavailable):
        return None
    if old.kind != new.kind:
        return None
    gaps = {name: _gap(old.values[name], new.values[name]) for name in old.values if name in new.values}
    bound = min(worst.bound, worst.deviation / 2)
    lasting, agreeing = _follow(old, {name: gap <= bound for name, gap in gaps.items() if gap is not None})
    if not lasting:
        return None
    first = next(name for name in old.values if name in lasting)
    feeding = _feeding(old, first, agreeing)
    return Divergence(first, old.makers.get(first, ""), float(gaps[first] or 0.0), feeding)


def _gap(old: Any, new: Any) -> float | None:
    """How far a value differs; None where the two cannot be compared."""
    outputs: tuple[Outputs, Outputs] = ({"": old}, {"": new})
    found = measure([outputs[0]], [outputs[1]]).deviation
    return None if getattr(old, "shape", None) != getattr(new, "shape", None) else found


def _follow(recording: Recording, agrees: Mapping[str, bool]) -> tuple[set[str], set[str]]:
    """The values that differ on every way to the output, and those that agree beside them."""
    lasting, agreeing, seen, waiting = set[str](), set[str](), {""}, [""]
    while waiting:
        for source in recording.sources.get(waiting.pop(), ()):
            if source in seen:
                continue
            seen.add(source)
            if agrees.get(source):
                agreeing.add(source)
                continue
            if source in agrees:
                lasting.add(source)
            waiting.append(source)
    return lasting, agreeing


def _feeding(recording: Recording, name: str, agreeing: set[str]) -> tuple[str, ...]:
    """The agreeing values that are the nearest before one."""
    found, seen, waiting = set[str](), {name}, [name]
    while waiting:
        for source in recording.sources.get(waiting.pop(), ()):
            if source in agreeing:
                found.add(source)
            elif source not in seen:
                seen.add(source)
                waiting.append(source)
    return tuple(one for one in recording.values if one in found)
