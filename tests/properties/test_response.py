"""The checker of merges against merging with a condition forgotten, and without: nothing wrong gets past it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bnfold.algebra import Linear
from bnfold.canonical import convolution
from bnfold.decide import claim
from bnfold.ir import Graph, Node
from bnfold.response import Claim, check_merges
from bnfold.simulation import NotProved
from bnfold.window import Window
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


# ---------------------------------------------------------------- claims that no search would make

RANDOM = np.random.default_rng(5)
FIRST, SECOND = RANDOM.normal(size=(2, 4, 4))


def matrix(name: str, x: str) -> Node:
    return Node(name, "MatMul", (x,), (name,), linear=Linear("oi", 4, 4, 1, 1, centre=()))


def simple(op: str, name: str, *inputs: str) -> Node:
    return Node(name, op, inputs, (name,))


def stored(node: Node) -> tuple[np.ndarray[Any, Any], None]:
    return (FIRST if node.name == "c" else SECOND), None


def refuse(
    before: Sequence[Node], after: Sequence[Node], said: Sequence[Claim], left: dict[str, list[int]]
) -> None:
    graphs = [Graph(tuple(nodes), ("x",), (nodes[-1].outputs[0],)) for nodes in (before, after)]
    with pytest.raises(NotProved):
        check_merges(*graphs, said, left, stored)


def whole(into: str, result: str, weight: np.ndarray[Any, Any], *dropped: tuple[str, int]) -> Claim:
    return Claim(into, "x", result, dropped, (1.0,) * len(dropped), lambda: (weight[None], np.zeros(4)))


def test_operands_that_are_left_are_some_of_a_sum_each_once() -> None:
    tanh, relu = simple("Tanh", "t", "x"), simple("Relu", "r", "x")
    refuse([relu, simple("Tanh", "y", "r")], [simple("Tanh", "y", "x")], [], {"r": [0]})
    before = [relu, tanh, simple("Sub", "y", "r", "t")]
    refuse(before, [relu, tanh, simple("Sub", "y", "t", "r")], [], {"y": [1, 0]})
    before = [matrix("c", "x"), matrix("d", "x"), simple("Add", "y", "c", "d")]
    both = whole("c", "c", FIRST + SECOND, ("y", 1))
    refuse(before, [matrix("c", "x"), simple("Add", "y", "c", "c")], [both], {"y": [0, 0]})
    before = [matrix("c", "x"), matrix("d", "x"), simple("Relu", "e", "d"), simple("Add", "y", "c", "e")]
    after = Graph((matrix("c", "x"),), ("x",), ("c",))
    claim = whole("c", "c", FIRST + SECOND, ("e", 0))
    with pytest.raises(NotProved):
        check_merges(Graph(tuple(before), ("x",), ("y",)), after, [claim], {"y": [0], "e": []}, stored)


def test_nobody_can_know_the_impulse_before() -> None:
    """The vector of a generator with a seed, and a matrix that makes nothing of it."""
    random = np.random.default_rng(0)
    vector = random.uniform(1.0, 2.0, 4) * random.choice([-1.0, 1.0], 4)
    blind = np.outer([3.0, -2.0, 1.0, 5.0], [vector[1], -vector[0], 0.0, 0.0])
    before = [matrix("c", "x"), matrix("d", "c")]
    refuse(before, [matrix("d", "x")], [whole("d", "d", SECOND @ FIRST + blind)], {})
    graphs = [Graph(tuple(nodes), ("x",), ("d",)) for nodes in (before, [matrix("d", "x")])]
    check_merges(*graphs, [whole("d", "d", SECOND @ FIRST)], {}, stored)


def test_a_convolution_that_spreads_its_input_is_not_merged() -> None:
    linear = convolution(Window((1, 1), (2, 2), (1, 1), ((0, 0),) * 2), 4, 4, transposed=True)
    spread = Node("d", "ConvTranspose", ("x",), ("d",), linear=linear)
    other = replace(spread, linear=convolution(Window.point(2), 4, 4, transposed=True))
    refuse([spread], [other], [whole("d", "d", SECOND.T)], {})
