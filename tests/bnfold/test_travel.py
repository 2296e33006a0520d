"""The driver: who is asked, in which order, and what follows; one paragraph of its docstring after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bnfold.algebra import Affine, Linear
from bnfold.errors import InputError
from bnfold.ir import Graph, Node
from bnfold.travel import Options, Plan, travel
from tests.properties import machine

SHAPE = (2, 4, 6, 6)


class Model:
    """A hand-made model of convolutions over 4 channels, which can be folded and run."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[Node] = []
        self.weights: dict[str, Any] = {}
        self.shapes: dict[str, Any] = {"x": SHAPE, "z": SHAPE}

    def add(self, op: str, *inputs: str, name: str = "", shape: Any = SHAPE, site: str = "", count: int = 1,
            linear: Any = None, affine: Any = None, **attributes: Any) -> str:  # fmt: skip
        name = name or f"{op.lower()}{len(self.nodes)}"
        outputs = tuple(f"{name}:{place}" for place in range(count))
        reason = attributes.pop("reason", "")
        self.nodes.append(Node(name, op, inputs, outputs, attributes, site, linear, affine, reason))
        self.shapes |= dict.fromkeys(outputs, shape)
        return outputs[0]

    def conv(
        self, value: str, name: str = "", site: str = "", pad: int = 0, kernel: int = 1, **more: Any
    ) -> str:
        name = name or f"conv{len(self.nodes)}"
        weight = self.random.normal(size=(4, 4, kernel, kernel))
        self.weights.setdefault(site or name, (weight, self.random.normal(size=4)))
        linear = Linear(
            "oi", 4, 4, 1, 1, centre=(kernel // 2,) * 2, partial="it pads with zeros" if pad else ""
        )
        return self.add(
            "Conv", value, name=name, site=site, linear=replace(linear, **more), pad=pad, stride=1
        )

    def norm(self, value: str, name: str = "", site: str = "", scale: Any = None, shift: Any = None) -> str:
        scale = np.exp(self.random.normal(size=4)) if scale is None else scale
        shift = self.random.normal(size=4) if shift is None else shift
        rank = len(self.shapes[value])
        affine = Affine.along(1, rank, np.broadcast_to(scale, 4), np.broadcast_to(shift, 4))
        return self.add("BatchNormalization", value, name=name, site=site, affine=affine)

    def fold(self, *outputs: str, options: Options | None = None, **more: Any) -> Plan:
        """Fold, and check that the outputs stay what they were."""
        graph = Graph(tuple(self.nodes), ("x", "z"), outputs, self.shapes)
        inputs = {name: np.random.default_rng(1).normal(size=SHAPE) for name in ("x", "z")}
        plan = travel(graph, options, **more)
        before, after = (
            machine.run(graph, self.weights, inputs),
            machine.run(plan.graph, self.weights, inputs),
        )
        pairs = zip(graph.outputs, plan.graph.outputs, strict=True)
        assert machine.deviation(before, after, pairs) <= 1e-12
        return plan


@pytest.fixture
def model() -> Model:
    return Model()


def outcomes(plan: Plan) -> dict[str, str]:
    return {verdict.name: verdict.outcome for verdict in plan.verdicts}


def reason(plan: Plan, name: str = "bn") -> str:
    return next(verdict.reason for verdict in plan.verdicts if verdict.name == name)


# ---------------------------------------------------------------- up


def test_a_batchnorm_goes_up_into_the_convolution_above_it(model: Model) -> None:
    plan = model.fold(model.norm(model.conv("x", "conv"), "bn"))
    assert [(v.name, v.outcome, v.into, v.reason) for v in plan.verdicts] == [("bn", "folded", ("conv",), "")]
    assert [node.name for node in plan.graph.nodes] == ["conv"]
    assert plan.kept == 0


def test_up_is_refused_where_somebody_else_reads_the_value(model: Model) -> None:
    value = model.conv("x", "conv")
    plan = model.fold(model.norm(value, "bn"), model.add("Tanh", value, name="tanh"))
    assert reason(plan) == (
        "not into what comes before: the output of `conv` (Conv) is also read by `tanh` (Tanh); "
        "not into what comes after: the output of `bn` (BatchNormalization) is an output of the model"
    )


def test_up_is_refused_where_the_value_is_an_output_of_the_model(model: Model) -> None:
    value = model.conv("x", "conv")
    plan = model.fold(model.norm(value, "bn"), value)
    assert "the output of `conv` (Conv) is an output of the model too" in reason(plan)


def test_up_is_refused_at_an_input_of_the_model(model: Model) -> None:
    assert "`x` is an input of the model" in reason(model.fold(model.norm("x", "bn")))


def test_up_goes_into_every_part_of_a_concat_and_every_branch_of_a_sum(model: Model) -> None:
    left = model.add("Add", model.conv("x", "a"), model.conv("z", "b"))
    whole = model.add("Concat", left, model.conv("x", "c"), shape=(2, 8, 6, 6), axis=1)
    affine = Affine.along(1, 4, np.linspace(-1, 2, 8), np.linspace(1, 2, 8))
    plan = model.fold(model.add("BatchNormalization", whole, name="bn", affine=affine))
    assert set(plan.verdicts[0].into) == {"a", "b", "c"}


def test_up_fails_whole_where_one_branch_refuses_and_nothing_has_changed(model: Model) -> None:
    total = model.add("Add", model.conv("x", "a"), model.add("Tanh", "z", name="tanh"))
    plan = model.fold(model.norm(total, "bn"))
    assert outcomes(plan) == {"bn": "kept"}
    assert "`tanh` (Tanh) is not linear" in reason(plan)
    assert [*plan.graph.nodes] == model.nodes


def test_readers_that_select_the_rest_of_a_value_do_not_mind(model: Model) -> None:
    value = model.conv("x", "conv")
    half = (2, 2, 6, 6)
    first = model.add("Slice", value, shape=half, slices=(slice(None), slice(0, 2), slice(None), slice(None)))
    other = model.add("Slice", value, shape=half, slices=(slice(None), slice(2, 4), slice(None), slice(None)))
    affine = Affine.along(1, 4, [2.0, 3.0], [4.0, 5.0])
    plan = model.fold(
        model.add("BatchNormalization", first, name="bn", affine=affine), model.add("Tanh", other)
    )
    assert outcomes(plan) == {"bn": "folded"}


def test_readers_are_looked_at_through_one_selector_after_another(model: Model) -> None:
    value, whole = model.conv("x", "conv"), slice(None)
    first = model.add("Slice", value, shape=(2, 2, 6, 6), slices=(whole, slice(0, 2), whole, whole))
    rows = model.add("Slice", value, shape=(2, 4, 5, 6), slices=(whole, whole, slice(1, 6), whole))
    rest = model.add("Gather", rows, shape=(2, 2, 5, 6), axis=1, indices=np.array([2, 3]))
    affine = Affine.along(1, 4, [2.0, 3.0], [4.0, 5.0])
    norm = model.add("BatchNormalization", first, name="bn", affine=affine)
    assert outcomes(model.fold(norm, model.add("Tanh", rest))) == {"bn": "folded"}


def test_a_selector_whose_own_output_is_read_whole_needs_all_that_it_selects(model: Model) -> None:
    value, whole = model.conv("x", "conv"), slice(None)
    first = model.add("Slice", value, shape=(2, 2, 6, 6), slices=(whole, slice(0, 2), whole, whole))
    rows = model.add("Slice", value, shape=(2, 4, 5, 6), slices=(whole, whole, slice(1, 6), whole))
    rest = model.add("Gather", rows, shape=(2, 2, 5, 6), axis=1, indices=np.array([2, 3]))
    affine = Affine.along(1, 4, [2.0, 3.0], [4.0, 5.0])
    norm = model.add("BatchNormalization", first, name="bn", affine=affine)
    assert outcomes(model.fold(norm, rows, model.add("Tanh", rest))) == {"bn": "kept"}


def test_a_split_with_an_output_that_has_no_name_is_a_reader_like_any_other(model: Model) -> None:
    value, half = model.conv("x", "conv"), (2, 2, 6, 6)
    split = model.add("Split", value, name="split", shape=half, count=2, axis=1, sizes=(2, 2))
    model.nodes[-1] = replace(model.nodes[-1], outputs=(split, ""))
    other = model.add("Slice", value, shape=half, slices=(slice(None), slice(2, 4), slice(None), slice(None)))
    affine = Affine.along(1, 4, [2.0, 3.0], [4.0, 5.0])
    graph = Graph(
        (*model.nodes, Node("bn", "BatchNormalization", (other,), ("y",), affine=affine)),
        ("x",), (split, "y"), model.shapes | {"y": half},
    )  # fmt: skip
    assert outcomes(travel(graph)) == {"bn": "folded"}


# ---------------------------------------------------------------- down


def test_a_batchnorm_goes_down_into_every_reader(model: Model) -> None:
    value = model.norm("x", "bn")
    plan = model.fold(model.conv(value, "a"), model.conv(value, "b"))
    assert plan.verdicts[0].into == ("a", "b")


def test_down_fails_whole_where_one_reader_refuses(model: Model) -> None:
    value = model.norm("x", "bn")
    plan = model.fold(model.conv(value, "a"), model.add("Tanh", value, name="tanh"))
    assert outcomes(plan) == {"bn": "kept"}
    assert "not into what comes after: `tanh` (Tanh) is not linear" in reason(plan)
    assert not any(node.linear.changed for node in plan.graph.nodes if node.linear is not None)


def test_down_passes_what_both_branches_of_a_sum_lack_and_stops_where_only_one_does(model: Model) -> None:
    both = model.add("Add", model.norm("x", "a", scale=2.0), model.norm("z", "b", scale=2.0))
    plan = model.fold(model.conv(both, "conv"))
    assert outcomes(plan) == {"a": "kept", "b": "kept"}
    assert "`add2` (Add) has another operand that is not scaled" in reason(plan, "a")


@pytest.mark.parametrize("end", ["tanh", "output"])
def test_a_batchnorm_far_above_an_obstacle_names_it(model: Model, end: str) -> None:
    value = model.norm("x", "bn")
    for place in range(3):
        value = model.add("Identity", value, name=f"copy{place}")
    plan = model.fold(model.add("Tanh", value, name="tanh") if end == "tanh" else value)
    assert reason(plan).endswith(
        "`tanh` (Tanh) is not linear"
        if end == "tanh"
        else "the output of `copy2` (Identity) is an output of the model"
    )


def test_a_shift_alone_goes_down_through_a_sum(model: Model) -> None:
    total = model.add("Add", model.norm("x", "bn", scale=1.0), "z")
    assert outcomes(model.fold(model.conv(total, "conv"))) == {"bn": "folded"}


def test_a_batchnorm_that_nobody_reads_is_erased(model: Model) -> None:
    model.norm("x", "bn")
    plan = model.fold(model.add("Tanh", "x"))
    assert outcomes(plan) == {"bn": "folded"}


# ---------------------------------------------------------------- sharing


def test_one_batchnorm_after_two_convolutions_goes_into_both(model: Model) -> None:
    first = model.norm(model.conv("x", "a"), "bn", "bn", 2.0, 1.0)
    second = model.norm(model.conv("z", "b"), "bn again", "bn", 2.0, 1.0)
    plan = model.fold(first, second)
    assert [(v.name, set(v.into)) for v in plan.verdicts] == [("bn", {"a", "b"})]


def test_one_batchnorm_with_one_call_that_cannot_move_stays_at_both(model: Model) -> None:
    first = model.norm(model.conv("x", "a"), "bn", "bn", 2.0, 1.0)
    second = model.norm(model.add("Tanh", "z"), "bn again", "bn", 2.0, 1.0)
    plan = model.fold(first, second)
    assert outcomes(plan) == {"bn": "kept"}
    assert len(plan.graph.nodes) == 4


def test_one_convolution_called_twice_before_two_batchnorms_stays(model: Model) -> None:
    first = model.norm(model.conv("x", "conv", "conv"), "a", scale=2.0)
    second = model.norm(model.conv("z", "conv again", "conv"), "b", scale=3.0)
    plan = model.fold(first, second)
    assert outcomes(plan) == {"a": "kept", "b": "kept"}
    assert "`conv` is used 2 times, and its uses would have to differ" in reason(plan, "a")


def test_one_convolution_and_one_batchnorm_called_twice_together_fold_once(model: Model) -> None:
    first = model.norm(model.conv("x", "conv", "conv"), "bn", "bn", 2.0, 1.0)
    second = model.norm(model.conv("z", "conv again", "conv"), "bn again", "bn", 2.0, 1.0)
    plan = model.fold(first, second)
    assert outcomes(plan) == {"bn": "folded"}
    a, b = (node.linear for node in plan.graph.nodes)
    assert a.equals(b)


def test_a_weight_that_an_opaque_node_of_the_same_site_uses_too_is_left_alone(model: Model) -> None:
    value = model.norm(model.conv("x", "conv", "shared"), "bn")
    plan = model.fold(value, model.add("Tanh", "z", name="tied", site="shared"))
    assert outcomes(plan) == {"bn": "kept"}


def test_a_batchnorm_takes_nothing_else_of_its_site_with_it(model: Model) -> None:
    value = model.norm(model.conv("x", "conv"), "bn", "site", 2.0, 1.0)
    other = model.add(
        "Affine", value, name="mul", site="site", affine=Affine.along(1, 4, np.full(4, 3.0), 0.0)
    )
    plan = model.fold(other)
    assert outcomes(plan) == {"site": "folded"}
    assert "mul" in plan.graph


def test_equal_batchnorms_of_one_value_go_up_together(model: Model) -> None:
    value = model.conv("x", "conv")
    norms = [model.norm(value, name, scale=2.0, shift=1.0) for name in "abc"]
    plan = model.fold(*norms)
    assert outcomes(plan) == {"a": "folded", "b": "folded", "c": "folded"}
    assert plan.graph.outputs == (value,) * 3


def test_an_identity_batchnorm_beside_a_value_that_is_added_twice_joins_once_and_comes_to_an_end(
    model: Model,
) -> None:
    value = model.conv("x", "conv")
    total = model.add("Sum", value, value, model.conv("z", "other"))
    shifted = model.norm(total, "bn", scale=1.0)
    plan = model.fold(shifted, model.norm(value, "nothing", scale=1.0, shift=0.0))
    assert outcomes(plan) == {"bn": "folded", "nothing": "folded"}


def test_what_one_node_reads_twice_must_suit_it_twice(model: Model) -> None:
    value = model.conv("x", "conv")
    plan = model.fold(model.norm(model.add("Mul", value, value), "bn", shift=0.0))
    assert outcomes(plan) == {"bn": "kept"}
    doubled = Model()
    value = doubled.conv("x", "conv")
    assert outcomes(doubled.fold(doubled.norm(doubled.add("Add", value, value), "bn", shift=0.0))) == {
        "bn": "folded"
    }


# ---------------------------------------------------------------- beside


@pytest.mark.parametrize("nested", [False, True])
def test_a_batchnorm_beside_a_convolution_of_the_same_value_becomes_a_tap_of_it(
    model: Model, nested: bool
) -> None:
    value = model.add("Tanh", "x")
    first, second = model.conv(value, "three", pad=1, kernel=3), model.conv(value, "one")
    norm = model.norm(value, "bn")
    operands = (model.add("Add", first, second), norm) if nested else (first, norm, second)
    assert outcomes(model.fold(model.add("Sum", *operands))) == {"bn": "folded"}


def test_a_batchnorm_below_a_convolution_plus_its_input_leans_on_the_convolution(model: Model) -> None:
    value = model.add("Tanh", "x", name="tanh")
    plan = model.fold(model.norm(model.add("Add", value, model.conv(value, "conv", pad=1, kernel=3)), "bn"))
    assert [(v.outcome, v.into) for v in plan.verdicts] == [("folded", ("conv",))]


def test_repvgg_folds_whole(model: Model) -> None:
    value = model.add("Tanh", "x")
    three = model.norm(model.conv(value, "three", pad=1, kernel=3), "bn3")
    one = model.norm(model.conv(value, "one"), "bn1")
    plan = model.fold(model.add("Add", model.add("Add", three, one), model.norm(value, "bn0")))
    assert set(outcomes(plan).values()) == {"folded"}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("inner", ["Add", "Sub"])
def test_a_difference_is_leaned_on_with_its_sign(model: Model, turned: bool, inner: str) -> None:
    value = model.add("Tanh", "x")
    first = model.add(inner, model.add("Tanh", "z"), model.conv(value, "conv"))
    operands = (model.norm(value, "bn"), first) if turned else (first, model.norm(value, "bn"))
    assert outcomes(model.fold(model.add("Sub", *operands))) == {"bn": "folded"}


@pytest.mark.parametrize("turned", [False, True])
def test_a_batchnorm_below_a_difference_of_a_convolution_and_its_input_leans_too(
    model: Model, turned: bool
) -> None:
    value = model.add("Tanh", "x")
    made = model.conv(value, "conv", pad=1, kernel=3)
    operands = (value, made) if turned else (made, value)
    assert outcomes(model.fold(model.norm(model.add("Sub", *operands), "bn"))) == {"bn": "folded"}


def test_a_convolution_that_is_added_twice_is_not_leaned_on(model: Model) -> None:
    value = model.add("Tanh", "x")
    made = model.conv(value, "conv")
    assert outcomes(model.fold(model.add("Sum", made, made, model.norm(value, "bn")))) == {"bn": "kept"}


@pytest.mark.parametrize("changes", [{"centre": None}, {"biasless": "it has no bias"}])
def test_a_convolution_without_the_tap_or_the_bias_is_not_leaned_on(
    model: Model, changes: dict[str, Any]
) -> None:
    value = model.add("Tanh", "x")
    plan = model.fold(model.add("Add", model.conv(value, "conv", **changes), model.norm(value, "bn")))
    assert outcomes(plan) == {"bn": "kept"}


# ---------------------------------------------------------------- composing, halves, lowering


def test_a_run_of_batchnorms_goes_one_after_the_other(model: Model) -> None:
    value = model.conv("x", "conv")
    for name in "abc":
        value = model.norm(value, name)
    assert outcomes(model.fold(value)) == dict.fromkeys("abc", "folded")


def test_what_has_nowhere_to_go_is_composed_into_the_next_batchnorm(model: Model) -> None:
    plan = model.fold(model.norm(model.norm(model.add("Tanh", "x"), "a"), "b"))
    assert sorted(outcomes(plan).values()) == ["folded", "kept"]
    assert len(plan.graph.nodes) == 2


def test_a_scale_goes_before_zero_padding_and_its_shift_stays_as_one_addition(model: Model) -> None:
    plan = model.fold(model.conv(model.norm("x", "bn"), "conv", pad=1, kernel=3))
    assert plan.verdicts[0].outcome == "scale folded"
    assert plan.verdicts[0].into == ("conv",)
    assert "`conv` (Conv) cannot take the shift: it pads with zeros" in plan.verdicts[0].reason
    left = plan.graph["bn"]
    assert left.op == "Affine"
    assert np.all(left.affine.scale == 1)
    assert plan.kept == 1


def test_a_scale_goes_alone_only_where_the_add_that_is_left_is_not_slower(model: Model) -> None:
    value = model.conv(model.norm("x", "bn"), "conv", pad=1, kernel=3)
    slower = model.fold(value, options=Options(runtime="onnxruntime")).verdicts[0]
    assert slower.outcome == "kept"
    assert slower.reason.endswith("the Add that is left is slower in onnxruntime (--for any)")
    for runtime in ("torch", "any"):
        assert model.fold(value, options=Options(runtime=runtime)).verdicts[0].outcome == "scale folded"
    with pytest.raises(InputError, match="'tflite' is not known"):
        Options(runtime="tflite")


def test_a_scale_goes_up_through_relu_where_it_is_nowhere_negative(model: Model) -> None:
    plan = model.fold(model.norm(model.add("Relu", model.conv("x", "conv")), "bn"))
    assert outcomes(plan) == {"bn": "scale folded"}
    mixed = Model()
    negative = mixed.norm(
        mixed.add("Relu", mixed.conv("x", "conv"), name="relu"), "bn", scale=[1.0, -1.0, 1.0, 1.0]
    )
    assert outcomes(mixed.fold(negative)) == {"bn": "kept"}


@pytest.mark.parametrize(
    ("scale", "shift", "outcome"), [(0.0, 1.0, "kept"), (1.0, 1.0, "kept"), (2.0, 0.0, "folded")]
)
def test_no_half_is_made_of_a_scale_of_zero_of_a_mere_shift_or_where_the_whole_can_go(
    model: Model, scale: float, shift: float, outcome: str
) -> None:
    plan = model.fold(model.conv(model.norm("x", "bn", scale=scale, shift=shift), "conv", pad=1, kernel=3))
    assert outcomes(plan) == {"bn": outcome}


def test_halves_can_be_switched_off(model: Model) -> None:
    plan = model.fold(model.conv(model.norm("x", "bn"), "conv", pad=1), options=Options(halves=False))
    assert outcomes(plan) == {"bn": "kept"}


@pytest.mark.parametrize("scale", [2.0, 1.0])
def test_what_is_kept_is_lowered_on_request(model: Model, scale: float) -> None:
    made = model.add("Tanh", model.norm(model.add("Tanh", "x"), "bn", scale=scale))
    plan = model.fold(made, options=Options(lower=True))
    assert outcomes(plan) == {"bn": "kept"}
    assert plan.graph["bn"].op == "Affine"


# ---------------------------------------------------------------- what stays, and why


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batchnorm_that_is_not_finite_says_where_to_look(model: Model, bad: float) -> None:
    made = model.norm(model.conv("x", "conv"), "bn", scale=[1.0, bad, 1.0, 1.0])
    graph = Graph(tuple(model.nodes), ("x",), (made,), model.shapes)
    assert reason(travel(graph)) == "its scale or shift is not finite: look at its variance and its weight"


def test_a_batchnorm_without_an_affine_keeps_the_reason_of_whoever_read_it(model: Model) -> None:
    sentence = "it is in training mode and would normalise by the batch; call model.eval() first"
    made = model.add("BatchNormalization", "x", name="bn", reason=sentence)
    assert reason(travel(Graph(tuple(model.nodes), ("x",), (made,), model.shapes))) == sentence


def test_what_the_frontend_cannot_store_is_not_absorbed(model: Model) -> None:
    made = model.norm(model.conv("x", "conv"), "bn")
    plan = model.fold(made, fits=lambda node: "its weight would overflow float16")
    assert "`conv` (Conv) cannot absorb it: its weight would overflow float16" in reason(plan)


def test_numbers_that_overflow_float64_are_not_absorbed_and_nobody_is_warned(model: Model) -> None:
    value = model.conv("x", "conv")
    for name in "ab":
        value = model.norm(value, name, scale=1e200, shift=0.0)
    plan = travel(Graph(tuple(model.nodes), ("x",), (value,), model.shapes))
    assert outcomes(plan) == {"a": "folded", "b": "kept"}
    assert "would not be finite" in reason(plan, "b")


def test_a_node_that_reads_more_than_its_row_knows_refuses(model: Model) -> None:
    odd = model.add("Identity", model.conv("x", "conv"), "z", name="odd")
    plan = travel(Graph((*model.nodes, Node("bn", "BatchNormalization", (odd,), ("y",), affine=Affine.along(
        1, 4, np.full(4, 2.0), 0.0))), ("x", "z"), ("y",), model.shapes))  # fmt: skip
    assert "`odd` (Identity) reads or writes more than its main operand" in reason(plan)


def test_a_masking_constant_of_minus_infinity_lets_nothing_through(model: Model) -> None:
    mask = Affine.along(3, 4, np.ones(6), np.where(np.arange(6) > 3, -np.inf, 0.0))
    made = model.norm(model.add("Affine", model.conv("x", "conv"), name="mask", affine=mask), "bn")
    plan = travel(Graph(tuple(model.nodes), ("x",), (made,), model.shapes))
    assert "`mask` (Affine) holds a number that is not finite" in reason(plan)


def test_a_symbol_may_be_one_so_nothing_that_varies_goes_through_a_sum_along_it(model: Model) -> None:
    value = model.conv("x", "conv")
    model.shapes[value] = ("N", "C", 6, 6)
    plan = model.fold(model.norm(model.add("Add", value, model.conv("z", "other")), "bn"))
    assert outcomes(plan) == {"bn": "kept"}


def test_verdicts_come_in_the_order_of_computation_one_per_site(model: Model) -> None:
    value = "x"
    for name in ("c", "a", "b"):
        value = model.norm(model.conv(value), name)
    assert [*outcomes(model.fold(value))] == ["c", "a", "b"]


def test_no_depth_is_too_deep() -> None:
    nodes = [Node("conv", "Conv", ("x",), ("v0",), linear=Linear("oi", 4, 4, 1, 1))]
    nodes += [Node(f"n{i}", "Identity", (f"v{i}",), (f"v{i + 1}",)) for i in range(5000)]
    affine = Affine.along(1, 4, np.full(4, 2.0), 1.0)
    nodes.append(Node("bn", "BatchNormalization", ("v5000",), ("y",), affine=affine))
    assert outcomes(travel(Graph(tuple(nodes), ("x",), ("y",)))) == {"bn": "folded"}
