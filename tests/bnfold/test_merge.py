"""Which linear operators of a graph become one, which do not and why; each graph by hand, run before and after."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bnfold import report
from bnfold.algebra import Affine, Linear
from bnfold.candidates import Candidate, Cost
from bnfold.errors import Refuse
from bnfold.ir import Graph, Node
from bnfold.merge import Merged, merge, settle
from bnfold.window import Window
from tests.properties import blocks

SHAPE = (2, 4, 8, 8)
POINT = Window.point(2)
SAME = Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
VALID = Window((3, 3), (1, 1), (1, 1), ((0, 0), (0, 0)))
HALVING = Window((2, 2), (2, 2), (1, 1), ((0, 0), (0, 0)))
ROW = Window((1, 3), (1, 1), (1, 1), ((0, 0), (1, 1)))
COLUMN = Window((3, 1), (1, 1), (1, 1), ((1, 1), (0, 0)))


class Block:
    """A graph made by hand on the inputs x and z, which can be merged and run; values are known by their nodes."""

    def __init__(self, shape: tuple[int, ...] = SHAPE) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[Node] = []
        self.weights: dict[str, Any] = {}
        self.values = {name: self.random.normal(size=shape) for name in ("x", "z")}
        self.shapes: dict[str, Any] = {"x": shape, "z": shape}

    def add(self, op: str, *inputs: str, name: str = "", **parts: Any) -> str:
        name = name or f"{op.lower()}{len(self.nodes)}"
        node = Node(name, op, inputs, (name,), parts.pop("attributes", {}), **parts)
        self.values[name] = blocks.compute(node, self.weights, [self.values[value] for value in inputs])
        self.shapes[name] = self.values[name].shape
        self.nodes.append(node)
        return name

    def conv(
        self,
        x: str,
        name: str = "",
        window: Window = POINT,
        outputs: int = 4,
        groups: int = 1,
        bias: bool = True,
    ) -> str:
        name, inputs = name or f"conv{len(self.nodes)}", self.shapes[x][1]
        weight = self.random.normal(size=(outputs, inputs // groups, *window.kernel))
        self.weights[name] = (weight, self.random.normal(size=outputs) if bias else None)
        linear = Linear("oi", inputs, outputs, 1, 1, groups, window=window)
        return self.add("Conv", x, name=name, linear=linear)

    def matrix(self, x: str, outputs: int, axes: tuple[int, int] = (1, 1), name: str = "") -> str:
        op = "Gemm" if len(self.shapes[x]) == 2 and axes[1] == 1 else "MatMul"
        name, inputs = name or f"{op.lower()}{len(self.nodes)}", self.shapes[x][axes[0]]
        self.weights[name] = (self.random.normal(size=(outputs, inputs)), self.random.normal(size=outputs))
        return self.add(op, x, name=name, linear=Linear("oi", inputs, outputs, *axes))

    def table(self, x: str, rows: int, outputs: int, name: str = "") -> str:
        name, rank = name or f"table{len(self.nodes)}", len(self.shapes[x])
        self.weights[name] = (self.random.normal(size=(rows, outputs)), None)
        return self.add("Embedding", x, name=name, linear=Linear("io", rows, outputs, 0, rank))

    def affine(self, x: str, name: str = "", op: str = "Affine", shift: bool = True, axis: int = 1) -> str:
        size = self.shapes[x][axis]
        scale, offset = self.random.normal(size=(2, size))
        affine = Affine.along(axis, len(self.shapes[x]), scale, offset * shift)
        return self.add(op, x, name=name, affine=affine)

    def pool(self, x: str, window: Window, name: str = "") -> str:
        return self.add("AveragePool", x, name=name, attributes={"window": window})

    def graph(self, *outputs: str) -> Graph:
        return Graph(tuple(self.nodes), ("x", "z"), outputs, dict(self.shapes))

    def merge(self, *outputs: str, model: blocks.Model | None = None, **changes: Any) -> Merged:
        """Merge, and check that every output stays what it was."""
        model = model or blocks.Model(self.weights)
        merged = merge(replace(self.graph(*outputs), **changes), model)
        made = model.merged(merged)
        after = blocks.run(merged.graph, made, {name: self.values[name] for name in ("x", "z")})
        for old, new in zip(outputs, merged.graph.outputs, strict=True):
            assert np.allclose(after[new], self.values[old], rtol=1e-12, atol=1e-12)
        return merged


def names(merged: Merged) -> list[str]:
    """The nodes of the graph afterwards."""
    return [node.name for node in merged.graph.nodes]


def made_of(merged: Merged) -> dict[str, set[str]]:
    """What was merged, by what it became."""
    return {one.into: set(one.record.sources) for one in merged.merges}


def reasons(merged: Merged) -> dict[tuple[str, ...], str]:
    return {one.sources: one.reason for one in merged.refused}


# ---------------------------------------------------------------- side by side


def test_branches_on_one_value_become_the_dearest_of_them() -> None:
    block = Block()
    total = block.add("Add", block.conv("x", "small"), block.conv("x", "large", SAME), name="sum")
    merged = block.merge(total)
    assert names(merged) == ["large"]
    assert made_of(merged) == {"large": {"small", "large", "sum"}}
    assert merged.graph["large"].inputs == ("x",)
    assert merged.graph["large"].outputs == ("sum",)


def test_a_block_of_mobileone_becomes_one_convolution() -> None:
    block = Block()
    relu = block.add("Relu", "x")
    branches = [block.conv(relu, f"branch{place}", SAME, groups=4) for place in range(3)]
    branches += [block.conv(relu, "scale", groups=4), block.affine(relu, "skip", "BatchNormalization")]
    total = branches[0]
    for branch in branches[1:]:
        total = block.add("Add", total, branch)
    merged = block.merge(block.add("Relu", total, name="out"))
    assert names(merged) == ["relu0", "branch0", "out"]
    assert merged.graph["branch0"].linear is not None
    assert merged.graph["branch0"].linear.groups == 4


def test_a_value_is_an_operator_on_itself() -> None:
    block = Block()
    merged = block.merge(block.add("Add", "x", block.conv("x", "conv", SAME)))
    assert names(merged) == ["conv"]


def test_what_is_subtracted_counts_with_its_sign() -> None:
    block = Block()
    first = block.add("Sub", block.conv("x", "a", SAME), block.affine("x"))
    merged = block.merge(block.add("Sub", "x", first))
    assert names(merged) == ["a"]


def test_a_value_that_is_an_operand_twice_counts_twice() -> None:
    block = Block()
    merged = block.merge(block.add("Sum", "x", "x", block.conv("x", "conv")))
    assert names(merged) == ["conv"]
    block = Block()
    assert names(block.merge(block.conv(block.add("Add", "x", "x"), "below"))) == ["below"]


@pytest.mark.parametrize("spatial", [1, 3])
def test_a_row_a_column_and_a_square_are_one_square(spatial: int) -> None:
    block = Block((2, 4, *(5,) * spatial))
    whole = Window(*((size,) * spatial for size in (3, 1, 1)), ((1, 1),) * spatial)
    parts = [
        replace(
            whole,
            kernel=tuple(3 if axis == one else 1 for axis in range(spatial)),
            pads=tuple((1, 1) if axis == one else (0, 0) for axis in range(spatial)),
        )
        for one in range(spatial)
    ]
    merged = block.merge(
        block.add("Sum", block.conv("x", "whole", whole), *[block.conv("x", window=part) for part in parts])
    )
    assert names(merged) == ["whole"]


def test_a_row_and_a_column_alone_are_dearer_as_a_square() -> None:
    block = Block()
    merged = block.merge(block.add("Add", block.conv("x", "row", ROW), block.conv("x", "column", COLUMN)))
    assert len(names(merged)) == 3
    assert "as one it would be dearer: 9,216 multiply-adds" in reasons(merged)["column", "row"]


def test_a_pool_beside_a_convolution_goes_into_it() -> None:
    block = Block()
    merged = block.merge(block.add("Add", block.pool("x", SAME), block.conv("x", "conv", SAME)))
    assert names(merged) == ["conv"]


@pytest.mark.parametrize("order", [("pool", "affine"), ("affine", "pool")])
@pytest.mark.parametrize("window", [SAME, HALVING, POINT])
def test_no_weight_comes_to_be_where_none_was(order: tuple[str, str], window: Window) -> None:
    """Of three channels, a depthwise convolution takes longer than an affine map and a mean."""
    block = Block()
    last = "x"
    for kind in order:
        last = block.pool(last, window) if kind == "pool" else block.affine(last)
    beside = block.add("Sub", block.pool("x", SAME), "x")
    assert not block.merge(last, beside).merges


def test_a_mean_costs_the_additions_of_sums_along_one_axis_after_another() -> None:
    """A wide pool is cheap beside a small depthwise convolution, and dear as a depthwise convolution."""
    block, after = Block(), Block()
    wide = Window((5, 5), (1, 1), (1, 1), ((2, 2), (2, 2)))
    narrow = block.add("Add", block.conv("x", "a", SAME, groups=4), block.pool("x", SAME))
    broad = block.add("Add", block.conv("z", "b", SAME, groups=4), block.pool("z", wide, "wide"))
    merged = block.merge(narrow, broad)
    assert made_of(merged).keys() == {"a"}
    assert merged.merges[0].record.multiply_adds == (4 * 64 * (9 + 3 + 1), 4 * 64 * 9)
    assert not after.merge(after.pool(after.conv("x", "c", POINT, groups=4, bias=False), SAME)).merges


def test_operators_on_different_values_stay() -> None:
    block = Block()
    merged = block.merge(block.add("Add", block.conv("x", "a", SAME), block.conv("z", "b", SAME)))
    assert not merged.merges


def test_operands_that_broadcast_stay_operands() -> None:
    block = Block()
    small = block.pool("x", Window((8, 8), (8, 8), (1, 1), ((0, 0), (0, 0))))
    merged = block.merge(block.add("Add", block.conv("x", "a", SAME), block.conv(small, "b")))
    assert merged.graph.nodes[-1].op == "Add"


# ---------------------------------------------------------------- one after another


@pytest.mark.parametrize("windows", [(SAME, POINT), (POINT, VALID), (SAME, VALID)])
def test_one_after_another_becomes_one_where_the_second_one_pads_nothing(windows: Any) -> None:
    block = Block()
    merged = block.merge(block.conv(block.conv("x", "a", windows[0], 8), "b", windows[1], 1))
    assert len(names(merged)) == 1


def test_a_bias_under_padding_is_not_what_the_padding_is() -> None:
    block = Block()
    merged = block.merge(block.conv(block.conv("x", "a"), "b", SAME))
    assert reasons(merged) == {("a", "b"): "the second one pads with zeros, and the first one has a bias"}
    block = Block()
    assert names(block.merge(block.conv(block.conv("x", "a", bias=False), "b", SAME))) == ["b"]


def test_a_shift_under_padding_is_a_bias_too_and_a_scale_is_none() -> None:
    block = Block()
    assert not block.merge(block.conv(block.affine("x"), "b", SAME)).merges
    block = Block()
    assert names(block.merge(block.conv(block.affine("x", shift=False), "b", SAME))) == ["b"]


def test_padding_on_what_has_taps_is_refused() -> None:
    block = Block()
    merged = block.merge(block.conv(block.conv("x", "a", ROW, bias=False), "b", COLUMN))
    assert "not what the first one pads" in reasons(merged)["a", "b"]


def test_a_low_rank_branch_goes_into_the_matrix_that_it_corrects() -> None:
    block = Block((3, 16))
    branch = block.matrix(block.matrix("x", 2, name="down"), 16, name="up")
    merged = block.merge(block.add("Add", block.matrix("x", 16, name="full"), branch))
    assert names(merged) == ["full"]


def test_a_low_rank_product_alone_stays_two() -> None:
    block = Block((3, 16))
    merged = block.merge(block.matrix(block.matrix("x", 2, name="down"), 16, name="up"))
    assert names(merged) == ["down", "up"]
    assert reasons(merged)["down", "up"].startswith("as one it would be dearer")


def test_depthwise_and_pointwise_stay_two_where_there_are_many_channels() -> None:
    block = Block()
    merged = block.merge(block.conv(block.conv("x", "deep", SAME, groups=4), "wide", outputs=16))
    assert names(merged) == ["deep", "wide"]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_matrices_along_one_axis_become_one_along_any_axis(axis: int) -> None:
    block = Block((3, 4, 5))
    merged = block.merge(block.matrix(block.matrix("x", 6, (axis, axis)), 2, (axis, axis)))
    assert len(merged.graph.nodes) == 1


def test_matrices_along_two_axes_stay_two() -> None:
    block = Block((3, 4, 4))
    merged = block.merge(block.matrix(block.matrix("x", 4, (1, 1), "a"), 4, (2, 2), "b"))
    assert reasons(merged) == {("a", "b"): "they have their channels on other axes"}


def test_a_matrix_that_is_read_transposed_stays_so() -> None:
    block = Block((4, 3))
    inner = block.matrix(block.matrix("x", 6, (0, 0)), 6, (0, 1))
    merged = block.merge(block.matrix(inner, 2, (1, 1), "last"))
    (node,) = merged.graph.nodes
    assert node.op == "Gemm"
    assert node.linear is not None
    assert (node.linear.in_axis, node.linear.out_axis) == (0, 1)


# ---------------------------------------------------------------- tables


def rows(block: Block, count: int, shape: tuple[int, ...] = (3, 5)) -> Block:
    """The block, with rows of a table as its input."""
    block.values["x"] = block.random.integers(0, count, shape)
    block.shapes["x"] = shape
    return block


def test_a_table_and_what_is_linear_below_it_become_a_table_where_it_is_small() -> None:
    block = rows(Block(), 4)
    below = block.matrix(block.table("x", 4, 8, "table"), 6, (2, 2), "matrix")
    merged = block.merge(below)
    assert names(merged) == ["matrix"]
    assert merged.graph["matrix"].op == "Embedding"


def test_a_table_stays_where_it_would_become_too_large() -> None:
    block = rows(Block(), 5_000)
    merged = block.merge(block.matrix(block.table("x", 5_000, 8), 60, (2, 2)))
    assert not merged.merges
    assert "as one it would be dearer" in merged.refused[0].reason


def test_tables_that_are_looked_up_by_one_value_are_added() -> None:
    block = rows(Block(), 5)
    total = block.add("Add", block.table("x", 5, 3, "a"), block.table("x", 5, 3, "b"))
    merged = block.merge(total)
    assert [(node.name, node.op) for node in merged.graph.nodes] == [("a", "Embedding")]


def test_tables_of_different_lengths_stay() -> None:
    block = rows(Block(), 5)
    merged = block.merge(block.add("Add", block.table("x", 5, 3, "a"), block.table("x", 6, 3, "b")))
    assert reasons(merged) == {("a", "b"): "they read or write other channels, or along other axes"}


# ---------------------------------------------------------------- copies


def test_a_copy_of_a_value_is_the_value() -> None:
    block = Block()
    value = block.add("Relu", "x")
    copy = block.add("Identity", value, name="copy")
    merged = block.merge(block.add("Add", block.conv(value, "a", SAME), block.conv(copy, "b")))
    assert names(merged) == ["relu0", "a"]
    assert made_of(merged)["a"] >= {"a", "b", "copy"}


def test_a_value_and_its_copy_are_twice_the_value() -> None:
    block = Block()
    value = block.conv("x", "conv")
    double = block.add("Add", value, block.add("Identity", value))
    assert names(block.merge(block.conv(double, "below"))) == ["conv"]


@pytest.mark.parametrize("copies", [1, 3])
def test_a_copy_alone_is_nothing_to_merge(copies: int) -> None:
    block = Block()
    value = block.conv("x", "conv")
    for _ in range(copies):
        value = block.add("Identity", value)
    merged = block.merge(block.add("Relu", value))
    assert not merged.merges
    assert not merged.refused


def test_a_copy_between_two_goes_with_them() -> None:
    block = Block()
    below = block.conv(block.add("Identity", block.conv("x", "a")), "b")
    assert len(block.merge(below).graph.nodes) == 1


def test_a_row_of_copies_is_looked_through_as_far_as_other_nodes_are() -> None:
    block = Block((1, 1, 1, 1))
    value = block.conv("x", "above", outputs=1)
    for _ in range(2_000):
        value = block.add("Identity", value)
    block.merge(block.conv(value, "below", outputs=1))


# ---------------------------------------------------------------- who else reads


def test_what_somebody_else_reads_is_not_looked_through() -> None:
    block = Block()
    between = block.conv("x", "a")
    below = block.conv(between, "b")
    assert names(block.merge(below, block.add("Relu", between))) == ["a", "b", "relu2"]


def test_an_output_of_the_model_in_between_stays() -> None:
    block = Block()
    first, second = block.conv("x", "a", SAME), block.conv("x", "b", SAME)
    inner = block.add("Add", first, second, name="inner")
    outer = block.add("Add", inner, block.conv("x", "c", SAME), name="outer")
    merged = block.merge(outer, inner)
    assert made_of(merged) == {"a": {"a", "b", "inner"}}
    assert merged.graph.outputs == ("outer", "inner")
    assert made_of(block.merge(outer, first)) == {"b": {"b", "c"}}


def test_a_nonlinear_node_between_keeps_two_apart() -> None:
    block = Block()
    assert not block.merge(block.conv(block.add("Relu", block.conv("x")))).merges


def test_a_batchnorm_that_normalises_by_the_batch_is_not_linear() -> None:
    block = Block()
    batch = block.affine(block.conv("x"), "bn", "BatchNormalization")
    graph = block.graph(block.conv(batch))
    graph = graph.replace({"bn": replace(graph["bn"], affine=None, reason="it is in training mode")})
    assert not merge(graph, blocks.Model(block.weights)).merges


@pytest.mark.parametrize("change", [{"linear": None, "reason": "it is computed"}, {"op": "ConvTranspose"}])
def test_what_is_not_known_to_be_linear_stays(change: Any) -> None:
    block = Block()
    graph = block.graph(block.add("Add", block.conv("x", "a"), block.conv("x", "b")))
    graph = graph.replace({"a": replace(graph["a"], **change)})
    assert not merge(graph, blocks.Model(block.weights)).merges


def test_what_has_no_channels_stays() -> None:
    block = Block((2, 0, 8, 8))
    pools = block.pool(block.pool("x", SAME), POINT, name="pools")
    assert not block.merge(block.affine(pools, "affine")).merges
    wide, narrow = (
        Node(
            f"conv{channels}",
            "Conv",
            ("affine",),
            (f"conv{channels}",),
            linear=Linear("oi", 0, channels, 1, 1, window=POINT),
        )
        for channels in (4, 0)
    )
    total = Node("sum", "Add", ("conv0", "affine"), ("sum",))
    graph = replace(block.graph("sum", "conv4"), nodes=(*block.nodes, wide, narrow, total))
    graph = replace(graph, shapes=graph.shapes | dict.fromkeys(("conv0", "sum"), (2, 0, 8, 8)))
    assert not merge(graph, blocks.Model(block.weights)).merges


def test_numbers_that_are_not_finite_or_overflow_are_left_to_the_host_and_warn_nobody() -> None:
    block = Block()
    huge = Affine.along(1, 4, np.full(4, 1e300), np.zeros(4))
    with np.errstate(all="ignore"):
        affine = block.add("Affine", block.add("Affine", "x", affine=huge), affine=huge)
        last = block.conv(block.conv(affine, "a", bias=False), "b", bias=False)
        padded = block.conv(last, "c", SAME)
        total = block.add("Add", padded, block.affine(padded))
    block.weights["a"] = (np.full((4, 4, 1, 1), np.inf), None)
    block.weights["b"] = (np.zeros((4, 4, 1, 1)), None)
    (one,) = merge(block.graph(total), blocks.Model(block.weights)).merges
    with np.errstate(all="ignore"):
        weight, _ = one.operator.numbers(lambda node: block.weights[node.name])
    assert np.isnan(weight).any()


# ---------------------------------------------------------------- sums with other operands


def test_operands_on_one_value_are_gathered_in_the_dearest_and_the_others_dropped() -> None:
    block = Block()
    other = block.add("Relu", "z", name="other")
    total = block.add("Add", block.conv("x", "a", SAME), other, name="inner")
    total = block.add("Add", total, block.conv("x", "b"), name="outer")
    merged = block.merge(total)
    assert names(merged) == ["other", "a", "inner"]
    assert merged.left == {"outer": (0,)}
    assert merged.graph.outputs == ("inner",)


def test_a_term_that_is_subtracted_is_gathered_with_its_sign() -> None:
    block = Block()
    inner = block.add("Sub", "z", block.conv("x", "a", SAME), name="inner")
    inner = block.add("Add", inner, block.conv("x", "b"), name="middle")
    merged = block.merge(block.add("Add", inner, block.add("Relu", "z"), name="outer"))
    assert made_of(merged) == {"a": {"a", "b"}}
    assert merged.left == {"middle": (0,)}


def test_what_is_subtracted_from_takes_others_in_but_is_never_dropped() -> None:
    block = Block()
    rest = block.add("Sub", block.conv("x", "a"), block.add("Relu", "z"), name="rest")
    merged = block.merge(block.add("Add", rest, block.conv("x", "b", SAME), name="sum"))
    assert made_of(merged) == {"b": {"a", "b"}}
    assert merged.left == {"sum": (0,)}
    assert merged.graph["b"].outputs == ("a",)


def test_a_sum_that_something_is_subtracted_from_is_gathered_by_itself() -> None:
    block = Block()
    inner = block.add("Sum", block.conv("x", "a"), "z", block.conv("x", "b"), name="inner")
    merged = block.merge(block.add("Sub", inner, block.add("Relu", "z")))
    assert made_of(merged) == {"b": {"a", "b"}}
    assert merged.left == {"inner": (0, 1)}


def test_a_value_that_is_an_operand_twice_is_dropped_where_it_was_gathered_only() -> None:
    block = Block()
    value = block.add("Relu", "x")
    nothing = block.add("Sub", value, value, name="nothing")
    total = block.add("Add", nothing, block.conv(value, "conv", SAME))
    merged = block.merge(block.add("Add", total, "z"))
    assert merged.left == {"nothing": (0,)}
    block = Block()
    merged = block.merge(block.add("Sum", "x", "z", "x", block.conv("x", "conv", SAME), name="sum"))
    assert merged.left == {"sum": (1, 3)}


def test_of_one_sum_several_operands_are_gathered_value_by_value() -> None:
    block = Block()
    on_x, on_z = ([block.conv(value, f"{value}{place}", SAME) for place in range(2)] for value in ("x", "z"))
    merged = block.merge(block.add("Sum", on_x[0], on_z[0], on_x[1], on_z[1], name="sum"))
    assert made_of(merged) == {"x1": {"x0", "x1"}, "z1": {"z0", "z1"}}
    assert names(merged) == ["x1", "z1", "sum"]
    assert merged.left == {"sum": (0, 1)}


def test_what_it_would_be_dearer_to_gather_stays() -> None:
    block = Block()
    merged = block.merge(block.add("Sum", block.conv("x", "a", ROW), "z", block.conv("x", "b", COLUMN)))
    assert not merged.merges


def test_what_makes_a_gathered_sum_dearer_stays_though_others_save_more() -> None:
    block = Block()
    long = Window((1, 7), (1, 1), (1, 1), ((0, 0), (3, 3)))
    terms = [block.conv("x", "a", SAME), block.conv("x", "long", long), block.conv("x", "b", SAME)]
    merged = block.merge(block.add("Sum", *terms, "z", name="sum"))
    assert made_of(merged) == {"b": {"a", "b"}}
    assert merged.left == {"sum": (0, 1, 3)}


def test_where_a_sum_may_be_made_in_place_its_first_term_takes_the_others_in() -> None:
    block = Block()
    total = block.add("Sum", "z", block.conv("x", "first"), block.conv("x", "dear", SAME), name="sum")
    assert block.merge(total).left == {"sum": (0, 2)}
    assert block.merge(total, model=blocks.Model(block.weights, adds_in_place=True)).left == {"sum": (0, 1)}


def test_operators_that_do_not_fit_the_dearest_one_are_gathered_among_themselves() -> None:
    block = Block()
    far = [Window((size, 1), (1, 1), (1, 1), ((size // 2, size // 2), (0, 0))) for size in (5, 3)]
    terms = [block.conv("x", "long", Window((1, 7), (1, 1), (1, 1), ((0, 0), (3, 3))))]
    terms += [block.conv("x", f"high{place}", window) for place, window in enumerate(far)]
    merged = block.merge(block.add("Sum", *terms, "z", name="sum"))
    assert made_of(merged) == {"high0": {"high0", "high1"}}


# ---------------------------------------------------------------- hosts


class Reluctant(blocks.Model):
    """A model that has a place for some candidates only."""

    def __init__(self, weights: Any, *allowed: set[str]) -> None:
        super().__init__(weights)
        self.allowed = allowed
        self.asked: list[set[str]] = []

    def place(self, candidate: Candidate) -> Any:
        self.asked.append(set(candidate.nodes))
        if set(candidate.nodes) not in self.allowed:
            raise Refuse("there is no place for it")
        return None


def test_where_the_whole_has_no_place_a_part_is_taken() -> None:
    block = Block()
    inner = block.conv(block.conv("x", "a"), "b")
    last = block.conv(inner, "c")
    model = Reluctant(block.weights, {"a", "b"})
    merged = block.merge(last, model=model)
    assert made_of(merged) == {"a": {"a", "b"}}
    assert reasons(merged)["a", "b", "c"] == "there is no place for it"
    assert model.asked[0] == {"a", "b", "c"}


def test_a_host_without_any_place_changes_nothing() -> None:
    block = Block()
    total = block.add("Sum", block.conv("x", "a"), block.conv(block.conv("x", "b"), "c"), "z")
    model = Reluctant(block.weights)
    merged = block.merge(total, model=model)
    assert merged.graph.nodes == block.graph(total).nodes
    assert not merged.merges
    assert {one.reason for one in merged.refused} == {"there is no place for it"}


def test_numbers_that_cannot_be_read_are_a_reason() -> None:
    class Blind(blocks.Model):
        def stored(self, node: Node) -> Any:
            raise Refuse("they are not in the file")

    block = Block()
    merged = merge(block.graph(block.conv(block.conv("x", "a", bias=False), "b", SAME)), Blind(block.weights))
    assert reasons(merged) == {("a", "b"): "they are not in the file"}


def test_what_lies_within_a_merge_is_not_reported_as_refused() -> None:
    block = Block()
    parts = [block.conv("x", "row", ROW), block.conv("x", "column", COLUMN), block.conv("x", "square", SAME)]
    inner = block.add("Add", parts[0], parts[1])
    merged = block.merge(block.add("Add", inner, parts[2]))
    assert names(merged) == ["square"]
    assert not merged.refused


# ---------------------------------------------------------------- cost


def test_costs_add_up_and_weights_are_read_once() -> None:
    assert Cost(3, 8).plus(Cost(4, 1)) == Cost(7, 9)
    assert Cost(3, 8).times(10) == Cost(30, 8)
    assert Cost(30, 8).total == 38


def test_the_record_says_what_was_saved() -> None:
    block = Block()
    merged = block.merge(block.add("Add", block.conv("x", "a", SAME), block.conv("x", "b")))
    (one,) = merged.merges
    positions, weights = 8 * 8, 4 * 4 * 9
    assert one.record.multiply_adds == ((weights + 16 + 4) * positions, weights * positions)
    assert one.record.bytes == (4 * (weights + 4 + 16 + 4), 4 * (weights + 4))


def test_what_is_rounded_up_costs_what_it_costs() -> None:
    """A stride of 2 makes 1 element of 1, and 2 of 3: what lies above is not computed four times as often."""
    half = replace(SAME, strides=(2, 2))
    for size, pays in ((1, False), (3, False), (16, True)):
        block = Block((1, 8, size, size))
        below = block.conv(block.conv("x", outputs=3, bias=False), outputs=2, window=half)
        merged = block.merge(below, model=blocks.Model(block.weights, size=0))
        assert bool(merged.merges) == pays, size


def test_an_affine_map_costs_what_it_has_elements() -> None:
    block = Block((2, 4, 5))
    (one,) = block.merge(block.matrix(block.affine("x", axis=2), 3, (2, 2))).merges
    assert one.record.multiply_adds == (4 * (5 + 5 * 3), 4 * 5 * 3)
    block = Block()
    (one,) = block.merge(block.conv(block.add("Add", block.affine("x"), "x"))).merges
    assert one.record.multiply_adds == (64 * (4 + 4 + 16), 64 * 16)


def test_where_sizes_are_not_known_a_stride_says_how_often_what_lies_above_is_computed() -> None:
    block = Block((1, 8, 8, 8))
    below = block.conv(block.conv("x", bias=False), outputs=2, window=replace(SAME, strides=(2, 2)))
    shapes = {name: (1, shape[1], None, None) for name, shape in block.shapes.items()}
    (one,) = block.merge(below, model=blocks.Model(block.weights, size=0), shapes=shapes).merges
    assert one.record.multiply_adds == (4 * 8 * 4 + 4 * 2 * 9, 8 * 2 * 9)


def test_numbers_of_half_the_size_weigh_half() -> None:
    block = Block()
    total = block.add("Add", block.conv("x", "a", SAME), block.conv("x", "b"))
    (one,) = block.merge(total, model=blocks.Model(block.weights, size=2)).merges
    assert one.record.bytes == (2 * (148 + 20), 2 * 148)


def test_sizes_that_are_known_of_one_example_count_and_decide() -> None:
    block = rows(Block(), 300, (3, 400))
    below = block.matrix(block.table("x", 300, 8), 60, (2, 2))
    graph = block.graph(below)
    shapes = {name: (None, None, *shape[2:]) for name, shape in graph.shapes.items()}
    model = blocks.Model(block.weights)
    assert not merge(replace(graph, shapes=shapes), model).merges
    assert merge(replace(graph, shapes=shapes, sizes=graph.shapes), model).merges


# ---------------------------------------------------------------- what is reported


def test_the_report_counts_operators_and_their_work_before_and_after() -> None:
    block = Block()
    apart = block.conv(block.add("Relu", "z"), "apart")
    total = block.add("Add", block.conv("x", "a", SAME), block.pool("x", SAME, "pool"))
    merged = block.merge(block.add("Relu", total), apart)
    told = merged.tell(report.Report(()), block.graph(total, apart))
    positions, rest = 64, 64 * 16
    assert told.operators == (3, 2)
    assert told.multiply_adds == (rest + positions * (144 + 12 + 4), rest + positions * 144)
    assert told.merges == (*(one.record for one in merged.merges), *merged.refused)


def test_a_table_takes_no_multiply_adds_in_the_report() -> None:
    block = rows(Block(), 4)
    graph = block.graph(block.matrix(block.add("Tanh", block.table("x", 4, 8)), 6, (2, 2)))
    told = merge(graph, blocks.Model(block.weights)).tell(report.Report(()), graph)
    assert told.operators == (2, 2)
    assert told.multiply_adds == (5 * 8 * 6, 5 * 8 * 6)


def test_a_batchnorm_that_was_kept_is_folded_once_it_is_within_a_merge() -> None:
    block = Block()
    inner = block.affine(block.conv("x", "conv"), "norm", "BatchNormalization")
    outer = block.affine(block.add("Relu", inner), "other", "BatchNormalization")
    merged = block.merge(outer)
    verdicts = [
        report.Verdict("norm", "kept", reason="it was"),
        report.Verdict("other", "scale folded", ("x",), "it was"),
        report.Verdict("gone", "folded", ("y",)),
    ]
    assert settle(verdicts, block.graph(outer), merged) == (
        report.Verdict("norm", "folded", ("conv",)),
        *verdicts[1:],
    )


def test_a_batchnorm_of_two_calls_is_folded_once_both_are_within_merges() -> None:
    block = Block()
    affine = Affine.along(1, 4, np.ones(4), np.ones(4))
    first, second = (
        block.add("BatchNormalization", block.conv("x", window=SAME), affine=affine, site="norm")
        for _ in range(2)
    )
    verdict = report.Verdict("norm", "kept", reason="it was")
    outputs = block.add("Relu", first), block.add("Relu", second)
    (settled,) = settle([verdict], block.graph(*outputs), block.merge(*outputs))
    assert (settled.outcome, settled.into) == ("folded", ("conv0", "conv2"))
    half = Reluctant(block.weights, {"conv0", first})
    assert settle([verdict], block.graph(*outputs), block.merge(*outputs, model=half)) == (verdict,)


def test_of_some_merges_alone_a_sum_has_lost_their_operands_alone() -> None:
    block = Block()
    terms = [block.conv(value, f"{value}{place}", SAME) for value in ("x", "z") for place in range(2)]
    total = block.add("Sum", *terms, name="sum")
    merged = block.merge(total)
    assert merged.left == {"sum": (0, 2)}
    on_x = [one for one in merged.merges if one.candidate.source == "x"]
    assert merged.only(on_x, block.graph(total)).left == {"sum": (0, 2, 3)}
    assert merged.only((), block.graph(total)).left == {}


# ---------------------------------------------------------------- large graphs


class Large(Block):
    """A block of points over one channel that is not computed, whose shapes are all alike."""

    def __init__(self) -> None:
        super().__init__((1, 1, 1, 1))
        self.linear = Linear("oi", 1, 1, 1, 1, window=POINT)

    def add(self, op: str, *inputs: str, name: str = "", **parts: Any) -> str:
        name = name or f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(Node(name, op, inputs, (name,), **parts))
        self.shapes[name] = self.shapes["x"]
        return name

    def point(self, x: str) -> str:
        return self.add("Conv", x, linear=self.linear)

    def count(self, *outputs: str) -> tuple[int, int]:
        """How many nodes there are before and after."""
        merged = merge(self.graph(*outputs), blocks.Model({}))
        return len(self.nodes), len(merged.graph.nodes)


def long_chain(count: int, broken: int) -> Block:
    """Points in a row, an activation after every so many."""
    block = Block((1, 1, 1, 1))
    value = "x"
    for place in range(count):
        value = block.conv(value, outputs=1)
        if place % broken == broken - 1:
            value = block.add("Relu", value)
    return block


@pytest.mark.parametrize("broken", [7, 250, 1_001])
def test_long_chains_are_merged_without_running_out_of_stack(broken: int) -> None:
    block = long_chain(1_000, broken)
    merged = block.merge(block.nodes[-1].name)
    assert len(merged.graph.nodes) < len(block.nodes) / 3


def test_a_value_that_ten_thousand_nodes_read_is_merged_as_any_other() -> None:
    block = Large()
    assert block.count(*[block.point(block.point("x")) for _ in range(5_000)]) == (10_000, 5_000)


@pytest.mark.parametrize("flat", [True, False])
def test_sums_of_a_thousand_branches_are_merged_without_running_out_of_stack(flat: bool) -> None:
    block = Block((1, 1, 1, 1))
    terms = ["z", *(block.conv("x", outputs=1) for _ in range(1_200))]
    total = block.add("Sum", *terms) if flat else terms[0]
    for term in () if flat else terms[1:]:
        total = block.add("Add", total, term)
    merged = block.merge(total)
    assert len(merged.graph.nodes) < 60
    assert sum(len(one.candidate.nodes) for one in merged.merges) == 1_200


def test_a_value_that_is_an_operand_a_thousand_times_does_not_run_out_of_stack() -> None:
    block = Block((1, 1, 1, 1))
    merged = block.merge(block.add("Sum", *["x"] * 1_200, block.conv("x", outputs=1), "z"))
    assert len(merged.merges) == 1
    block = Block((1, 1, 1, 1))
    block.merge(block.add("Sum", *["x"] * 1_200, block.conv("x", outputs=1)))


def test_ten_thousand_nodes_are_merged() -> None:
    block, value = Large(), "x"
    for _ in range(2_000):
        branches = block.add("Sum", block.point(value), block.point(value), value)
        value = block.add("Relu", block.add("Add", branches, value))
    assert block.count(value) == (10_000, 4_000)
