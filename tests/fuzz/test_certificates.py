"""Certificates of random models: right folds are certified, and of folded models that were changed none is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import bnfold.onnx
from bnfold.onnx import certify
from bnfold.simulation import NotProved
from tests.fuzz.drawing import draw
from tests.fuzz.graphs import FEATURES, build, deviation, options, runtime
from tests.fuzz.tampering import tamper

WRONG = 1e-3


def certified(seed: int, folder: Path) -> tuple[onnx.ModelProto, onnx.ModelProto, certify.Certificate] | None:
    """A random model, the folded one and its certificate; None where the drawn model does not run."""
    one = draw(FEATURES, seed)
    try:
        model = build(one)
        runtime(model)
    except Exception:  # noqa: BLE001 no model
        return None
    onnx.save(model, folder / "net.onnx")
    paths = (folder / "net.onnx", folder / "out.onnx")
    bnfold.onnx.fold_file(*paths, verify=False, certificate=folder / "told.json", **options(one))
    return model, onnx.load(paths[1]), certify.load(folder / "told.json")


def missed(seeds: range, folder: Path, tries: int) -> tuple[Counter[str], list[str]]:
    """What was changed so that it shows, how often, and what was certified all the same."""
    tried, found = Counter[str](), list[str]()
    for seed in seeds:
        random = np.random.default_rng(seed)
        try:
            drawn = certified(seed, folder)
        except NotProved:
            tried["not certified"] += 1
            continue
        if drawn is None:
            continue
        tried["certified"] += 1
        model, folded, told = drawn
        for _ in range(tries):
            changed = onnx.ModelProto()
            changed.CopyFrom(folded)
            what = tamper(changed, random)
            try:
                if not what or not deviation(folded, changed, runtime) > WRONG:
                    continue
            except Exception:  # noqa: BLE001 it does not run any more
                continue
            tried[what.partition(":")[0]] += 1
            try:
                certify.check(model, changed, replace(told, result=certify.digest(changed)))
            except NotProved:
                continue
            found.append(f"{seed}: {what}")
    return tried, found


def test_no_changed_model_is_certified(tmp_path: Path) -> None:
    tried, found = missed(range(40), tmp_path, 4)
    assert not found
    assert tried["certified"] > 20
    assert len(tried) >= 5


@pytest.mark.slow
def test_of_hundreds_of_changed_models_none_is_certified(tmp_path: Path) -> None:
    tried, found = missed(range(1_000, 1_400), tmp_path, 8)
    assert not found
    assert tried["not certified"] <= tried["certified"] // 50
