"""Random ONNX models: folded without verification they compute what they did, and a row that lies is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest

from bnfold import decide
from bnfold import operators as kernels
from bnfold import rules as operators
from bnfold.algebra import Affine, Linear
from bnfold.ir import Node
from tests.fuzz.drawing import Finding, complaint, draw, findings
from tests.fuzz.graphs import FEATURES, judge

FEW, MANY, SHARDS = range(150), range(150, 20_000), 40
LINEAR = operators._linear
HOST = import_module("bnfold.onnx.merging")._Host
WRITER = import_module("bnfold.onnx.write")._Writer


def search(seeds: range, enough: int = 5) -> list[Finding]:
    return findings(FEATURES, judge, seeds, enough)


def test_a_hundred_random_models_and_more_compute_the_same_folded() -> None:
    found = search(FEW)
    assert not found, "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_tens_of_thousands_of_random_models_compute_the_same_folded(shard: int) -> None:
    found = search(MANY[shard::SHARDS])
    assert not found, "\n".join(map(str, found))


def _without_border(node: Node) -> Linear:
    return replace(LINEAR(node), partial="")


def _any(node: Node, affine: Affine, *more: Any) -> Affine:
    return affine


def _last_axis(self: Any, slots: Any, linear: Linear, bias: Any) -> Any:
    return bias


def _in_the_corner(own: Any, whole: Any) -> Any:
    return (...,) if own is None else (..., *(slice(0, size) for size in own.kernel))


LIES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a zero border takes a shift": (operators, "_linear", _without_border),
    "a shift passes a ReLU": (operators, "_linear_only", _any),
    "a negative scale passes a maximum": (operators, "_monotone", _any),
    "a bias lies along the last axis": (WRITER, "_place_bias", _last_axis),
    "a small kernel lies in the corner of a large one": (kernels, "_taps", _in_the_corner),
    "what is merged may be read by others": (HOST, "_check_between", lambda *given: None),
}
SHOWN = {"what is merged may be read by others": ("low rank", "crop")}
"""By which features alone a lie shows that others seldom show."""


@pytest.mark.parametrize("lie", LIES)
def test_a_fold_that_is_wrong_is_found(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for proof in ("check", "check_merges"):  # which would not let it be wrong
        monkeypatch.setattr(decide, proof, lambda *given: None)
    monkeypatch.setattr(*LIES[lie])
    features = {name: FEATURES[name] for name in SHOWN.get(lie, FEATURES)}
    found = next(one for seed in range(600) if complaint(judge, one := draw(features, seed)))
    monkeypatch.undo()
    assert not complaint(judge, found), "it is wrong without the lie, too"
