"""The checker of folds, step by step: what it lets pass, and what it stops, however it came about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from bnfold.algebra import Affine, Linear
from bnfold.ir import Graph, Node
from bnfold.simulation import _SAME_RANK, NotProved, check
from bnfold.travel import Options, travel
from tests.properties import machine

RANDOM = np.random.default_rng(0)
CHANNELS = 4
SHAPE = (2, CHANNELS, 6, 6)


def norm(name: str, x: str, scale: object = None, shift: object = None) -> Node:
    own = RANDOM.normal(1, 0.2, CHANNELS) if scale is None else scale
    other = RANDOM.normal(size=CHANNELS) if shift is None else shift
    return Node(name, "BatchNormalization", (x,), (name,), affine=Affine.along(1, 4, own, other))


def conv(name: str, x: str, **facts: object) -> Node:
    linear = Linear("oi", CHANNELS, CHANNELS, 1, 1, centre=(0, 0), **facts)  # type: ignore[arg-type]
    return Node(name, "Conv", (x,), (name,), linear=linear)


def graph(*nodes: Node, outputs: tuple[str, ...] = ()) -> Graph:
    values = {"x", *(node.name for node in nodes)}
    return Graph(nodes, ("x",), outputs or (nodes[-1].name,), dict.fromkeys(values, SHAPE))


def simple(op: str, name: str, *inputs: str, **attributes: object) -> Node:
    return Node(name, op, inputs, (name,), attributes)


def prove(before: Graph, options: Options | None = None) -> Graph:
    """Fold a graph, check that, and return it folded."""
    plan = travel(before, options)
    check(before, plan.graph, plan.absorbed)
    return plan.graph


# ---------------------------------------------------------------- what passes

RIGHT: dict[str, Callable[[], Graph]] = {
    "up": lambda: graph(conv("c", "x"), norm("b", "c")),
    "down": lambda: graph(norm("b", "x"), conv("c", "b")),
    "through an activation": lambda: graph(conv("c", "x"), simple("Relu", "r", "c"), norm("b", "r", [1, 2, 3, 0.5], 0)),
    "into a BatchNorm": lambda: graph(
        norm("a", "x"), simple("MaxPool", "p", "a", axes=(2, 3)), norm("b", "p", [1, 2, 3, 4])
    ),
    "beside a convolution, above": lambda: graph(conv("c", "x"), simple("Add", "s", "c", "x"), norm("b", "s")),
    "beside a convolution, below": lambda: graph(norm("b", "x"), conv("c", "x"), simple("Add", "s", "c", "b")),
    "scaled by zero, beside": lambda: graph(norm("b", "x", 0.0), conv("c", "x"), simple("Add", "s", "c", "b")),
    "one of two operands": lambda: graph(conv("c", "x"), conv("d", "x"), simple("Sub", "s", "c", "d"), norm("b", "s")),
    "two in a row": lambda: graph(conv("c", "x"), norm("a", "c"), norm("b", "a")),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_fold_is_proved(name: str) -> None:
    before = RIGHT[name]()
    after = prove(before)
    assert len(after.nodes) < len(before.nodes)


def test_half_a_fold_is_proved_in_either_direction() -> None:
    above = graph(conv("c", "x", biasless="it has none"), norm("b", "c"))
    below = graph(norm("b", "x"), conv("c", "b", partial="it pads with zeros"))
    for before in (above, below):
        assert [node.op for node in prove(before).nodes].count("Affine") == 1


def test_a_copy_is_proved_to_stand_for_what_it_is_a_copy_of() -> None:
    before = graph(conv("c", "x"), norm("b", "c"), simple("Tanh", "t", "c"), outputs=("b", "t"))
    assert any(node.copied for node in prove(before, Options(duplicate=True)).nodes)


# ---------------------------------------------------------------- what does not


def changed(after: Graph, name: str, **changes: object) -> Graph:
    return after.replace({name: replace(after[name], **changes)})  # type: ignore[arg-type]


def test_a_batchnorm_that_nobody_makes_up_for_is_missed() -> None:
    before = graph(conv("c", "x"), norm("b", "c"))
    with pytest.raises(NotProved, match="output"):
        check(before, before.bypass({"b"}))


def test_one_wrong_number_in_one_channel_is_seen() -> None:
    before = graph(conv("c", "x"), norm("b", "c"), conv("d", "b"))
    after = prove(before)
    linear = after["c"].linear
    assert linear is not None
    assert linear.after is not None
    for place in range(2):
        vectors = [np.array(vector) for vector in linear.after]
        vectors[place][2] *= 1 + 1e-9
        wrong = replace(linear, after=(vectors[0], vectors[1]))
        with pytest.raises(NotProved, match="`d`"):
            check(before, changed(after, "c", linear=wrong))


@pytest.mark.parametrize("fact", ["partial", "sealed", "biasless"])
def test_what_an_operator_cannot_absorb_is_not_proved(fact: str) -> None:
    before = graph(norm("b", "x"), conv("c", "b"))
    after = prove(before)
    forbidding = {
        name: replace(some["c"].linear, **{fact: "it cannot"})
        for name, some in (("old", before), ("new", after))
    }  # type: ignore[type-var]
    before, after = (
        changed(before, "c", linear=forbidding["old"]),
        changed(after, "c", linear=forbidding["new"]),
    )
    with pytest.raises(NotProved, match="it cannot"):
        check(before, after)


def test_another_operand_of_a_linear_operator_must_be_what_it_was() -> None:
    linear = Linear("oi", CHANNELS, CHANNELS, 1, 1)
    both = Node("d", "DeformConv", ("x", "b"), ("d",), linear=linear)
    before = graph(norm("b", "x"), both, norm("e", "d"))
    check(before, prove(before))
    with pytest.raises(NotProved, match="something else beside"):
        check(before, prove(before).bypass({"b"}))
    absorbed = prove(before)["d"].linear
    assert absorbed is not None
    forgotten = changed(
        prove(before).bypass({"b"}), "d", linear=absorbed.absorb_before(*np.ones((2, CHANNELS)))
    )
    with pytest.raises(NotProved, match="something else beside"):
        check(before, forgotten)


def test_a_reader_that_is_forgotten_is_found() -> None:
    before = graph(norm("b", "x"), conv("c", "b"), conv("d", "b"), outputs=("c", "d"))
    after = prove(before)
    with pytest.raises(NotProved, match="`d`"):
        check(before, changed(after, "d", linear=before["d"].linear))


def test_another_operator_another_setting_and_another_operand_are_found() -> None:
    before = graph(conv("c", "x"), norm("b", "c"), simple("Softmax", "s", "b", axis=1))
    after = prove(before)
    for changes in ({"op": "Tanh"}, {"attributes": {"axis": 2}}, {"inputs": ("x",)}):
        with pytest.raises(NotProved, match=r"`s`|`x`"):
            check(before, changed(after, "s", **changes))


def test_uses_of_one_weight_that_would_differ_are_found() -> None:
    nodes = [replace(conv(name, "x"), site="shared") for name in "cd"]
    before = graph(*nodes, norm("b", "c"), simple("Tanh", "t", "d"), outputs=("b", "t"))
    linear = nodes[0].linear
    assert linear is not None
    own = before["b"].affine
    assert own is not None
    taken = linear.absorb_after(own.scale.ravel(), own.shift.ravel())
    with pytest.raises(NotProved, match="shared"):
        check(before, before.replace({"c": replace(nodes[0], linear=taken)}).bypass({"b"}))


def test_a_shift_does_not_pass_an_activation_nor_a_negative_scale_a_maximum() -> None:
    for middle, scale, shift in (("Relu", 1.0, 1.0), ("Relu", -1.0, 0.0), ("MaxPool", -1.0, 0.0)):
        before = graph(conv("c", "x"), simple(middle, "r", "c", axes=(2, 3)), norm("b", "r", scale, shift))
        linear = before["c"].linear
        assert linear is not None
        taken = linear.absorb_after(np.full(CHANNELS, scale), np.full(CHANNELS, shift))
        after = before.replace({"c": replace(before["c"], linear=taken)}).bypass({"b"})
        with pytest.raises(NotProved, match="`r`"):
            check(before, after)


def test_what_is_said_to_have_been_absorbed_is_checked_too() -> None:
    before = RIGHT["into a BatchNorm"]()
    plan = travel(before)
    (name,) = plan.absorbed
    lie = {name: Affine.of(2.0 * plan.absorbed[name].scale, plan.absorbed[name].shift)}
    check(before, plan.graph, plan.absorbed)
    with pytest.raises(NotProved):
        check(before, changed(plan.graph, name, affine=lie[name]), lie)


# ---------------------------------------------------------------- pairs that no driver would make


def affine(name: str, scale: object, shift: object) -> Node:
    return replace(norm(name, "x", scale, shift), op="Affine")


def bare(node: Node) -> Node:
    return replace(node, linear=None, affine=None)


TANH = graph(conv("c", "x"), simple("Tanh", "t", "c"))
ONE, TWO = conv("c", "x"), affine("a", 2.0, 0.0)
SINGLE = graph(ONE, simple("Tanh", "t", "x"), conv("d", "c"), outputs=("d", "t"))
COPY = replace(ONE, name="q", outputs=("t",), copied=("c", "d"))


def taken(node: Node) -> Node:
    assert node.linear is not None
    return replace(node, linear=node.linear.absorb_after(np.full(CHANNELS, 2.0), np.ones(CHANNELS)))


WRONG: dict[str, tuple[Graph, Graph]] = {
    "another operator, else untouched": (TANH, changed(TANH, "t", op="Relu")),
    "another setting, else untouched": (TANH, changed(TANH, "t", attributes={"axis": 1})),
    "other outputs, else untouched": (TANH, replace(TANH, outputs=("c",))),
    "other inputs": (TANH, replace(TANH, inputs=("c",))),
    "an affine map that is another operator": (graph(TWO), graph(replace(bare(TWO), op="Tanh"))),
    "numbers where there were none": (graph(bare(norm("n", "x"))), graph(norm("n", "x"))),
    "an operator without a weight that absorbs": (graph(bare(ONE)), graph(taken(ONE))),
    "one name for two values": (
        SINGLE,
        replace(SINGLE, nodes=(ONE, COPY, SINGLE["t"], replace(SINGLE["d"], inputs=("t",)))),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_pair_of_graphs_that_differ_is_not_proved(name: str) -> None:
    before, after = WRONG[name]
    with pytest.raises(NotProved):
        check(before, after)


def test_a_map_of_a_value_whose_rank_is_not_known_is_not_passed_on() -> None:
    """The rows of `x` are the rows of the sum, too, but not on the axis of that number."""
    shapes = {"x": (4, 6, 6), "b": (4, 6, 6), "q": SHAPE, "f": SHAPE}
    rows = Affine.along(1, 3, np.ones(6), np.arange(6.0))
    nodes = (
        replace(norm("b", "x"), affine=rows),
        simple("Add", "s", "b", "z"),
        simple("AveragePool", "p", "s", axes=(2, 3)),
        simple("Add", "q", "p", "z"),
        replace(norm("f", "q"), affine=Affine.identity(4)),
    )
    before = Graph(nodes, ("x", "z"), ("f",), shapes)
    own = Affine.along(2, 4, np.ones(6), np.arange(6.0))
    after = changed(before.bypass({"b"}), "f", affine=own)
    with pytest.raises(NotProved, match="not known"):
        check(before, after)


@pytest.mark.parametrize("size", [1e13, 1.5e308])
def test_numbers_that_cancel_in_one_channel_excuse_nothing_in_another_one(size: float) -> None:
    large, scale = np.array([size, 0, 0, 0]), np.array([1.0, 3, 1, 1])
    before = graph(conv("c", "x"), conv("d", "c"))
    above, below = (before[name].linear for name in "cd")
    assert above is not None
    assert below is not None
    after = changed(before, "c", linear=above.absorb_after(np.ones(CHANNELS), large))
    after = changed(after, "d", linear=below.absorb_before(scale, -large))
    with pytest.raises(NotProved):
        check(before, after)


@pytest.mark.parametrize("op", sorted(_SAME_RANK))
def test_an_operator_that_is_taken_to_keep_the_rank_does(op: str) -> None:
    """One that is new in the table is taken so, unless it is named there."""
    for seed in range(30):
        node, sketch = machine.draw_node(seed, op)
        if node.attributes.get("keepdims", True):
            ranks = {sketch.values[value].ndim for value in (*node.inputs, *node.outputs)}
            assert len(ranks) == 1
