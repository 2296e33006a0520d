"""The comparison with other tools: it counts what is left, and calls a wrong model wrong and a failing tool failing."""

from __future__ import annotations

import warnings
from collections import Counter

import onnx
import pytest

import bnfold
from benchmarks import duplicate, worth


@pytest.fixture(autouse=True)
def _quiet_exporters():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_breaking(case):
    """A folder that drops every BatchNorm."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    return model


def by_failing(case):
    raise ValueError("no such operator")


def test_every_tool_is_counted_compared_and_timed():
    tools = {"broken": by_breaking, "failing": by_failing, "onnxruntime": worth.by_onnxruntime}
    results = worth.examine("tabular", "positive", 2, tools)

    assert results["unfolded"].left == results["onnxruntime"].left == 3
    assert results["bnfold"].left == results["bnfold, whole"].left == 0
    assert results["bnfold"].error < 1e-5
    assert (results["broken"].left, results["broken"].problem) == (0, "wrong output")
    assert results["failing"].problem == "fails: ValueError: no such operator"
    assert results["best other"].problem == "onnxruntime"
    for tool in ("unfolded", *worth.MEASURED):
        assert set(results[tool].latency) == {"default", "off"}
        assert all(milliseconds > 0 for milliseconds, _ in results[tool].latency.values())


def test_a_cell_says_what_is_left():
    assert worth.show_left(None) == "-"
    assert worth.show_left(worth.Result(3)) == "3"
    assert worth.show_left(worth.Result(0, 5)) == "0 + 5 Add"
    assert worth.show_left(worth.Result(0, 5), ours=False) == "0"
    assert worth.show_left(worth.Result(problem="fails: KeyError: x")) == "fails"


@pytest.mark.parametrize("sizes", [(4, 4, 3, 4, 5), (2, 6, 1, 1, 5), (6, 8, 0, 1, 1)])
def test_a_shared_operator_is_copied_where_that_is_asked_for(sizes):
    kept = duplicate.make_model(*sizes)
    copied, report = bnfold.fold(kept, duplicate=True)
    nodes = Counter(node.op_type for node in copied.graph.node)
    assert report.count("folded") == 1
    assert nodes["BatchNormalization"] == 0
    assert nodes["Conv"] + nodes["Gemm"] == 2
    assert bnfold.fold(kept)[1].count("kept") == 1
