"""ONNX models that select: compared where both choose alike, so that a jump hides nothing and refuses nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import bnfold
from bnfold.errors import InputError, NotEquivalent
from bnfold.onnx.choices import find_choices
from bnfold.onnx.read import read
from bnfold.onnx.run import Runner

FACTOR = np.array([1.0, 3.0, 7.0, 0.3])


def selecting(*after: Any, kind: type = np.float32, opset: int = 18) -> onnx.ModelProto:
    """Scores of which three are equal but for rounding, the nodes given from `s` and the values `h` to `y`."""
    random = np.random.default_rng(3)
    tensors = {
        "score": random.normal(size=(1, 3, 3, 3)) * FACTOR.reshape(4, 1, 1, 1),
        "score_bias": random.normal(size=1) * FACTOR,
        "gamma": np.ones(4),
        "beta": np.zeros(4),
        "mean": 0.2 * FACTOR,
        "var": 1.7 * FACTOR**2 * [1, 1, 1, 2],
        "value": random.normal(size=(4, 3, 3, 3)),
        "mean2": random.normal(size=4),
        "var2": random.uniform(0.5, 1.5, 4),
    }
    stored = [numpy_helper.from_array(array.astype(kind), name) for name, array in tensors.items()]
    stored += [numpy_helper.from_array(np.array([2]), "two")]
    nodes = [
        helper.make_node("Conv", ["x", "score", "score_bias"], ["c"]),
        helper.make_node(
            "BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["s"], epsilon=0.0, name="bn"
        ),
        helper.make_node("Conv", ["x", "value"], ["v"]),
        helper.make_node("BatchNormalization", ["v", "gamma", "beta", "mean2", "var2"], ["h"], name="bn2"),
        *after,
    ]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    x = helper.make_tensor_value_info("x", element, [2, 3, 12, 12])
    y = helper.make_tensor_value_info("y", element, None)
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


TOPK = (
    helper.make_node("TopK", ["s", "two"], ["best", "places"], axis=1),
    helper.make_node("GatherElements", ["h", "places"], ["y"], axis=1),
)
ARGMAX = (
    helper.make_node("ArgMax", ["s"], ["places"], axis=1),
    helper.make_node("GatherElements", ["h", "places"], ["y"], axis=1),
)
STEP = (
    helper.make_node("Sub", ["s", "first"], ["d"]),
    helper.make_node("Sign", ["d"], ["sign"]),
    helper.make_node("Mul", ["sign", "h"], ["y"]),
)
WAYS = {
    "topk": TOPK,
    "argmax": ARGMAX,
    "sign": (helper.make_node("Split", ["s"], ["first", "_1", "_2", "_3"], axis=1, num_outputs=4), *STEP),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_model_that_selects_folds_and_is_compared_where_both_choose_alike(way: str, kind: type) -> None:
    folded, report = bnfold.fold(selecting(*WAYS[way], kind=kind))
    assert [verdict.outcome for verdict in report.verdicts] == ["folded", "folded"]
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph.node)
    assert any("fall otherwise" in note for note in report.notes)
    assert all(item.deviation <= item.bound < 1e-4 for item in report.evidence)


@pytest.mark.parametrize("weight", ["score", "value"])
def test_a_wrong_weight_is_caught_in_what_is_selected_and_in_what_that_is_made_from(
    weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnfold.onnx.runs import ModelRuns

    right = ModelRuns.run_after, ModelRuns.run_alike

    def spoilt(model: onnx.ModelProto) -> onnx.ModelProto:
        conv = next(node for node in model.graph.node if node.op_type == "Conv" and weight in node.input[1])
        tensor = next(t for t in model.graph.initializer if t.name == conv.input[1])
        array = numpy_helper.to_array(tensor).copy()
        array[2] *= 1.01
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return model

    monkeypatch.setattr(ModelRuns, "run_after", lambda runs, model: right[0](runs, spoilt(model)))
    with pytest.raises(NotEquivalent, match="in float32"):
        bnfold.fold(selecting(*TOPK))


def test_a_model_that_follows_gathers_its_values_at_the_recorded_places() -> None:
    model = selecting(*TOPK, helper.make_node("Identity", ["best"], ["b"]))
    model.graph.output.append(onnx.ValueInfoProto(name="b"))
    choices = find_choices(model, read(model, None).context)
    assert [choice.op for choice in choices.made] == ["TopK"]
    x = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
    recorded = choices.feed(Runner(choices.record(model))({"x": x}))
    other = {name: 3 - array for name, array in recorded.items()}
    outputs = Runner(choices.follow(model, other))({"x": x, **other})
    assert choices.count_otherwise(outputs, other) == 1
    assert (
        choices.count_otherwise(Runner(choices.follow(model, recorded))({"x": x, **recorded}), recorded) == 0
    )
    told = choices.tell(model, outputs)
    (scores,) = (array for name, array in told.items() if name.startswith("<what TopK"))
    assert np.array_equal(outputs["b"], np.take_along_axis(scores, other["places"], 1))


def test_sizes_are_no_choices_and_neither_are_comparisons_of_whole_numbers() -> None:
    more = (
        helper.make_node("Shape", ["s"], ["size"]),
        helper.make_node("Greater", ["size", "two"], ["large"]),
        helper.make_node("Identity", ["h"], ["y"]),
    )
    model = selecting(*more)
    assert not find_choices(model, read(model, None).context)


def test_a_choice_by_other_attributes_is_another_one() -> None:
    model = selecting(*TOPK)
    choices = find_choices(model, read(model, None).context)
    node = next(node for node in model.graph.node if node.op_type == "TopK")
    node.attribute.append(helper.make_attribute("largest", 0))
    with pytest.raises(InputError, match="does not make the choice"):
        choices.record(model)


def test_a_threshold_that_is_stored_is_compared_too() -> None:
    more = (
        helper.make_node("Greater", ["s", "threshold"], ["large"]),
        helper.make_node("Where", ["large", "h", "s"], ["y"]),
    )

    def build(threshold: float) -> onnx.ModelProto:
        model = selecting(*more)
        model.graph.initializer.append(numpy_helper.from_array(np.float32(threshold), "threshold"))
        return model

    right, wrong = build(0.1), build(0.5)
    choices = find_choices(right, read(right, None).context)
    x = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
    outputs = Runner(choices.record(right))({"x": x})
    fed = choices.feed(outputs)
    told = [
        choices.tell(model, Runner(choices.follow(model, fed))({"x": x, **fed})) for model in (right, wrong)
    ]
    title = next(name for name in told[0] if name.startswith("<what Greater") and name.endswith("[1]"))
    assert [float(each[title]) for each in told] == [np.float32(0.1), 0.5]
