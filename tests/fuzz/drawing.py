"""Random models as lists of steps, so that one that comes out wrong can be cut down to the steps that matter.

A generator is a table of features, one row each: a name and a function that adds the feature to a sketch, or raises
`Unsuitable` where nothing is there that it could read. A draw is a seed and some steps; a step is the name of a feature
and a number from which it draws its own choices, so that leaving a step out leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

Features = Mapping[str, tuple[int, Callable[..., None]]]
"""By name: how often a feature is drawn beside the others, and what adds it."""


class Unsuitable(Exception):
    """A step that finds nothing to read, or a model that does not run by itself."""


@dataclass(frozen=True)
class Draw:
    """A model to be built, and how it is folded.

    Attributes:
        seed: whence the choices come that concern the whole model.
        steps: features, each with the number that it draws from.
    """

    seed: int
    steps: tuple[tuple[str, int], ...]

    def choices(self) -> Random:
        return Random(f"draw {self.seed}")

    def __str__(self) -> str:
        return f"seed {self.seed}: {', '.join(f'{name} {number}' for name, number in self.steps)}"


Judge = Callable[[Draw], str]
"""What is wrong with the fold of a drawn model, in a line; nothing where it is right.

Raises:
    Unsuitable: there is nothing to fold.
"""


def draw(features: Features, seed: int, least: int = 3, most: int = 12) -> Draw:
    random = Random(f"steps {seed}")
    weights = [often for often, _ in features.values()]
    names = random.choices(list(features), weights, k=random.randint(least, most))
    return Draw(seed, tuple((name, random.randrange(10_000)) for name in names))


def apply(features: Features, one: Draw, sketch: Any, take: Callable[[Any, Random], None]) -> None:
    """Add every step of a draw to a sketch, those aside that find nothing to read there."""
    for name, number in one.steps:
        take(sketch, Random(f"{name} {number}"))
        try:
            features[name][1](sketch)
        except Unsuitable:
            continue


def complaint(judge: Judge, one: Draw) -> str:
    try:
        return judge(one)
    except Unsuitable:
        return ""


def shrink(judge: Judge, one: Draw) -> Draw:
    """Leave out one step after the other for as long as something is still wrong."""
    place = 0
    while place < len(one.steps):
        fewer = replace(one, steps=one.steps[:place] + one.steps[place + 1 :])
        if complaint(judge, fewer):
            one, place = fewer, 0
        else:
            place += 1
    return one


@dataclass(frozen=True)
class Finding:
    """A fold that is wrong, cut down: print it to see the steps, and hand `draw` to `build` to have the model."""

    draw: Draw
    says: str

    def __str__(self) -> str:
        return f"{self.draw}\n    {self.says}"


def findings(features: Features, judge: Judge, seeds: Iterable[int], enough: int = 5) -> list[Finding]:
    """Judge the draws of these seeds; the first few that are wrong, cut down."""
    found: list[Finding] = []
    for seed in seeds:
        one = draw(features, seed)
        if complaint(judge, one):
            one = shrink(judge, one)
            found.append(Finding(one, complaint(judge, one)))
            if len(found) == enough:
                break
    return found
