"""The comparison of merging: operators are counted, a wrong model is called wrong, and what falls short is said."""

from __future__ import annotations

import copy
import warnings

import pytest
from torch import nn

from benchmarks import merging
from benchmarks.merging import Result, by_module, shortfalls


@pytest.fixture(autouse=True)
def _quiet_exporters():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_breaking(case):
    """Every BatchNorm dropped."""
    module = copy.deepcopy(case.module)
    for part in module.modules():
        for name, child in part.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(part, name, nn.Identity())
    return by_module(module, case)


def by_failing(case):
    raise ValueError("no such operator\nand more")


def case(name):
    return dict(merging.branch_cases(small=True))[name]()


def test_operators_are_counted_as_trained_and_in_the_models_own_form_and_both_are_timed():
    ways = {way: merging.WAYS[way] for way in ("trained", "own")}
    results = merging.examine(case("RepVGG-B1g4"), 2, ways)
    assert results["trained"].counts == {"Conv": 10, "Gemm": 1, "Add": 7, "BN": 12}
    assert results["own"].counts == {"Conv": 5, "Gemm": 1, "Add": 0, "BN": 0}
    for result in results.values():
        assert result.error < 1e-5
        assert all(milliseconds > 0 for milliseconds, _ in (result.onnxruntime, result.torch))


def test_bnfold_on_the_file_leaves_no_batchnorm_and_has_no_module_to_be_timed():
    ways = {way: merging.WAYS[way] for way in ("trained", "as file")}
    result = merging.examine(case("ACNet"), 1, ways)["as file"]
    assert (result.counts["BN"], result.problem, result.torch) == (0, "", None)
    assert result.onnxruntime[0] > 0


def test_a_wrong_model_is_called_wrong_a_failing_way_failing_and_neither_is_timed():
    ways = {"trained": merging.WAYS["trained"], "broken": by_breaking, "failing": by_failing}
    results = merging.examine(case("ACNet"), 1, ways)
    assert (results["broken"].problem, results["broken"].counts["BN"]) == ("wrong output", 0)
    assert results["failing"].problem == "fails: ValueError: no such operator"
    assert results["broken"].onnxruntime is results["failing"].torch is None


def result(counts, onnxruntime=1.0, torch=1.0, problem=""):
    columns = dict(zip(merging.COLUMNS, counts, strict=True))
    return Result(columns, 0.0, problem, (onnxruntime, 1.0), torch and (torch, 1.0))


@pytest.mark.parametrize(
    ("merged", "own", "lines"),
    [
        (result((5, 1, 0, 0)), result((5, 1, 0, 0)), []),
        (result((4, 1, 0, 0), 1.04, 1.14), result((5, 1, 2, 0)), []),
        (result((6, 1, 1, 0)), result((5, 1, 0, 0)), ["6 Conv rather than 5", "1 Add rather than 0"]),
        (result((5, 1, 0, 2)), result((5, 1, 0, 9)), ["2 BN rather than 0"]),
        (result((5, 1, 0, 0), 1.06), result((5, 1, 0, 0)), ["1.06 times as long in onnxruntime"]),
        (result((5, 1, 0, 0), torch=1.2), result((5, 1, 0, 0)), ["1.20 times as long in torch"]),
        (result((5, 1, 0, 0), torch=None), result((5, 1, 0, 0)), []),
        (Result(problem="wrong output"), result((5, 1, 0, 0)), ["wrong output"]),
        (result((5, 1, 0, 0)), Result(problem="fails: KeyError: x"), []),
    ],
)
def test_what_falls_short_of_the_own_form_is_said(merged, own, lines):
    assert list(shortfalls(merged, own)) == lines
