"""The checker of merges against merging with a condition forgotten, and without: nothing wrong gets past it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from bnfold.decide import claim
from bnfold.response import Claim, check_merges
from bnfold.simulation import NotProved
from tests.properties import blocks
from tests.properties.test_merging import MUTATIONS, TOLERANCE, Draw

WRONG = 1e-6


def claims(draw: Draw) -> list[Claim]:
    """What is claimed of each merged operator, its numbers as they would be stored."""
    made = []
    for one in draw.merged.merges:
        said = claim(one, draw.model.stored)
        numbers = said.numbers()
        made.append(replace(said, numbers=lambda numbers=numbers: numbers))
    return made


def is_proved(draw: Draw, said: Sequence[Claim]) -> bool:
    try:
        check_merges(draw.graph, draw.merged.graph, said, draw.merged.left, draw.model.stored)
    except NotProved:
        return False
    return True


def test_every_right_merge_is_proved() -> None:
    merges = 0
    for seed in range(100):
        draw = Draw(seed)
        said = claims(draw)
        merges += len(said)
        assert is_proved(draw, said), seed
    assert merges > 50


def test_one_number_that_is_a_little_off_is_seen() -> None:
    tried = 0
    for seed in range(60):
        draw = Draw(seed)
        for place, own in enumerate(said := claims(draw)):
            weight, bias = own.numbers()
            off = weight.copy()
            off.flat[weight.size // 2] += 1e-6 * abs(weight).max()
            if not weight.any():
                continue
            wrong = [
                *said[:place],
                replace(own, numbers=lambda off=off, bias=bias: (off, bias)),
                *said[place + 1 :],
            ]
            shifted = [
                *said[:place],
                replace(own, numbers=lambda w=weight, b=bias: (w, b + 1.0)),
                *said[place + 1 :],
            ]
            assert not is_proved(draw, wrong), seed
            assert not is_proved(draw, shifted), seed
            tried += 1
    assert tried > 20


def test_a_sum_that_loses_an_operand_nobody_took_in_is_seen() -> None:
    tried = 0
    for seed in range(100):
        draw = Draw(seed)
        said = claims(draw)
        for place, own in enumerate(said):
            if own.dropped:
                less = replace(own, dropped=own.dropped[1:], signs=own.signs[1:])
                turned = replace(own, signs=tuple(-sign for sign in own.signs))
                for lie in (less, turned):
                    assert not is_proved(draw, [*said[:place], lie, *said[place + 1 :]]), seed
                tried += 1
    assert tried > 2


@pytest.mark.parametrize("forget", MUTATIONS, ids=lambda forget: forget.__name__)
def test_no_merge_is_proved_that_forgets_a_condition_and_is_wrong(
    forget: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: list[tuple[Draw, list[Claim]]] = []
    with monkeypatch.context() as mistaken:
        forget(mistaken)
        for seed in range(60):
            try:
                draw = Draw(seed)
                if draw.deviation > WRONG:
                    wrong.append((draw, claims(draw)))
            except (ValueError, LookupError, AssertionError, RuntimeError, blocks.Unsuitable):
                continue
    assert TOLERANCE < WRONG
    for draw, said in wrong:
        assert not is_proved(draw, said)
