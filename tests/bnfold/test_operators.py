"""Operators made of operators: against hand calculations, and why some are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnfold.algebra import Affine, Linear
from bnfold.errors import Refuse
from bnfold.ir import Node
from bnfold.operators import Operator, add, average, beside, compose, diagonal, of_linear, sequence
from bnfold.window import Window


def line(kernel: int, before: int = 0, after: int = 0, stride: int = 1, dilation: int = 1) -> Window:
    return Window((kernel,), (stride,), (dilation,), ((before, after),))


def conv(weight: Any, bias: Any = None, window: Window | None = None, groups: int = 1) -> Operator:
    """A convolution over one axis, of a weight `(outputs, inputs/groups, taps)`."""
    array = np.asarray(weight, float)
    outputs, inputs, taps = array.shape
    shift = np.zeros(outputs) if bias is None else np.asarray(bias, float)
    seen = array.reshape(groups, outputs // groups, inputs, taps)
    return Operator(
        inputs * groups, outputs, groups, 1, 1, window or line(taps), lambda stored: (seen, shift)
    )


def matrix(weight: Any, bias: Any = None, axes: tuple[int, int] = (1, 1), lookup: bool = False) -> Operator:
    array = np.asarray(weight, float)
    shift = np.zeros(len(array)) if bias is None else np.asarray(bias, float)
    return Operator(*array.shape[::-1], 1, *axes, None, lambda stored: (array[None], shift), lookup)


def nothing(node: Node) -> Any:
    raise AssertionError("no operator here is stored in a model")


def numbers(operator: Operator) -> tuple[Any, Any]:
    """The weight, without groups where there is one, and the bias."""
    weight, bias = operator.numbers(nothing)
    kernel = operator.kernel
    assert weight.shape == (
        operator.groups,
        operator.outputs // operator.groups,
        operator.inputs // operator.groups,
        *kernel,
    )
    assert bias.shape == (operator.outputs,)
    return (weight[0] if operator.groups == 1 else weight).tolist(), bias.tolist()


# ---------------------------------------------------------------- side by side


def test_two_matrices_side_by_side_are_added_with_their_biases() -> None:
    both = add(matrix([[1, 2], [3, 4]], [1, 0]), matrix([[10, 0], [0, 10]], [5, 7]))
    assert numbers(both) == ([[11, 2], [3, 14]], [6, 7])


def test_the_second_one_is_subtracted_with_its_bias_where_its_sign_says_so() -> None:
    both = add(matrix([[1, 2], [3, 4]], [1, 0]), matrix([[10, 0], [0, 10]], [5, 7]), -1.0)
    assert numbers(both) == ([[-9, 2], [3, -6]], [-4, -7])


def test_one_tap_beside_three_is_added_to_the_middle_one() -> None:
    both = add(conv([[[5]]], [1]), conv([[[1, 2, 3]]], [10], line(3, 1, 1)))
    assert both.window == line(3, 1, 1)
    assert numbers(both) == ([[[1, 7, 3]]], [11])


def test_padding_that_is_uneven_puts_the_taps_side_by_side() -> None:
    both = add(conv([[[1, 2]]], window=line(2, 1, 0)), conv([[[10, 20]]], window=line(2, 0, 1)))
    assert numbers(both) == ([[[1, 12, 20]]], [0])


def test_taps_of_different_dilations_meet_where_their_offsets_do() -> None:
    two = conv([[[1, 2, 3]]], window=line(3, 2, 2, dilation=2))
    four = conv([[[10, 20, 30]]], window=line(3, 4, 4, dilation=4))
    both = add(two, four)
    assert both.window == line(5, 4, 4, dilation=2)
    assert numbers(both) == ([[[10, 1, 22, 3, 30]]], [0])


def test_operators_of_more_groups_are_blocks_on_the_diagonal_of_one_of_fewer() -> None:
    depthwise = conv([[[1]], [[2]]], groups=2)
    full = conv([[[10], [20]], [[30], [40]]])
    assert numbers(add(depthwise, full)) == ([[[11], [20]], [[30], [42]]], [0, 0])


def test_operators_of_four_and_of_six_groups_have_two_in_common() -> None:
    four = conv(np.arange(36.0).reshape(12, 3, 1), groups=4)
    six = conv(np.zeros((12, 2, 1)), groups=6)
    both = add(four, six)
    assert both.groups == 2
    weight, _ = both.numbers(nothing)
    assert weight[0, :3, :3, 0].tolist() == np.arange(9.0).reshape(3, 3).tolist()
    assert weight[1, 3:, 3:, 0].tolist() == np.arange(27.0, 36).reshape(3, 3).tolist()
    assert np.count_nonzero(weight) == 35


def test_two_tables_side_by_side_are_one() -> None:
    both = add(
        matrix([[1, 2, 3]], axes=(0, 1), lookup=True), matrix([[10, 20, 30]], axes=(0, 1), lookup=True)
    )
    assert both.lookup
    assert both.multiply_adds == 0
    assert numbers(both) == ([[11, 22, 33]], [0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (matrix([[1, 2]]), matrix([[1]])),
        (matrix([[1, 2]]), matrix([[1, 2], [3, 4]])),
        (matrix([[1]]), matrix([[1]], axes=(0, 0))),
        (matrix([[1]], axes=(0, 1)), matrix([[1]])),
        (matrix([[1]]), conv([[[1]]])),
        (matrix([[1]], axes=(0, 1)), matrix([[1]], axes=(0, 1), lookup=True)),
    ],
)
def test_operators_of_other_channels_or_axes_are_not_added(first: Operator, second: Operator) -> None:
    with pytest.raises(Refuse, match="other channels, or along other axes"):
        add(first, second)


def test_operators_that_could_give_other_sizes_are_not_added() -> None:
    with pytest.raises(Refuse, match="pad by different amounts"):
        add(conv([[[1]]]), conv([[[1, 2, 3]]]))


# ---------------------------------------------------------------- one after another


def test_one_matrix_after_another_is_their_product_and_the_second_one_sees_the_bias_of_the_first() -> None:
    first, second = matrix([[1, 2], [3, 4]], [1, -1]), matrix([[1, 1], [0, 2]], [10, 20])
    assert numbers(compose(first, second, nothing)) == ([[4, 6], [6, 8]], [10, 18])


def test_one_kernel_after_another_is_as_polynomials_are_multiplied() -> None:
    both = compose(conv([[[1, 2, 3]]], [1]), conv([[[1, 1]]], [5]), nothing)
    assert both.window == line(4)
    assert numbers(both) == ([[[1, 3, 5, 3]]], [7])


def test_taps_of_the_second_one_are_a_stride_of_the_first_one_apart() -> None:
    both = compose(conv([[[1, 10]]], window=line(2, stride=2)), conv([[[1, 2]]]), nothing)
    assert both.window == line(4, stride=2)
    assert numbers(both) == ([[[1, 10, 2, 20]]], [0])
    both = compose(conv([[[3]]], window=line(1, stride=2)), conv([[[1, 2]]], window=line(2, 1, 0)), nothing)
    assert both.window == line(2, 2, 0, stride=2, dilation=2)
    assert numbers(both) == ([[[3, 6]]], [0])


def test_taps_that_meet_are_added() -> None:
    both = compose(
        conv([[[1, 2, 3]]], window=line(3, dilation=2)), conv([[[1, 1]]], window=line(2, dilation=2)), nothing
    )
    assert both.window == line(4, dilation=2)
    assert numbers(both) == ([[[1, 3, 5, 3]]], [0])


def test_a_depthwise_and_a_pointwise_convolution_are_a_full_one() -> None:
    depthwise, pointwise = conv([[[1, 2]], [[3, 4]]], [1, 2], groups=2), conv([[[1], [10]]], [0.5])
    both = compose(depthwise, pointwise, nothing)
    assert both.groups == 1
    assert numbers(both) == ([[[1, 2], [30, 40]]], [21.5])


def test_two_depthwise_convolutions_stay_one() -> None:
    both = compose(conv([[[2]], [[3]]], groups=2), conv([[[1, 2]], [[3, 4]]], groups=2), nothing)
    assert (both.groups, both.weights) == (2, 4)
    assert numbers(both) == ([[[[2, 4]]], [[[9, 12]]]], [0, 0])


def test_a_table_with_a_matrix_after_it_is_a_table() -> None:
    table = matrix([[1, 2, 3], [4, 5, 6]], axes=(0, 1), lookup=True)
    both = compose(table, matrix([[1, 1]], [100]), nothing)
    assert both.lookup
    assert numbers(both) == ([[5, 7, 9]], [100])


def test_a_matrix_from_one_axis_to_another_goes_on_along_the_other() -> None:
    both = compose(matrix([[2]], axes=(0, 1)), matrix([[3]]), nothing)
    assert (both.in_axis, both.out_axis) == (0, 1)
    both = compose(matrix([[2]], axes=(0, 0)), matrix([[3]], axes=(0, 1)), nothing)
    assert (both.in_axis, both.out_axis) == (0, 1)
    assert numbers(both) == ([[6]], [0])


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (matrix([[1]]), matrix([[1, 2]]), "channels on other axes"),
        (matrix([[1]]), matrix([[1]], axes=(0, 0)), "channels on other axes"),
        (matrix([[1]]), matrix([[1]], axes=(1, 2), lookup=True), "channels on other axes"),
        (conv([[[1]]]), matrix([[1]]), "a convolution and the other one a matrix"),
        (matrix([[1]]), conv([[[1]]]), "a convolution and the other one a matrix"),
        (conv([[[1, 2]]]), conv([[[1]]], window=line(1, 1, 0)), "not what the first one pads"),
        (conv([[[1]]], [1]), conv([[[1, 2]]], window=line(2, 1, 0)), "pads with zeros, and the first one has a bias"),
        (conv([[[1]]], [np.nan]), conv([[[1]]], window=line(1, 0, 1)), "the first one has a bias"),
    ],
)  # fmt: skip
def test_operators_that_do_not_meet_are_not_composed(first: Operator, second: Operator, why: str) -> None:
    with pytest.raises(Refuse, match=why):
        compose(first, second, nothing)


def test_a_bias_is_seen_by_all_taps_where_nothing_is_padded() -> None:
    assert numbers(compose(conv([[[1]]], [1]), conv([[[2, 3]]]), nothing)) == ([[[2, 3]]], [5])


# ---------------------------------------------------------------- of one node


def test_an_average_pool_is_diagonal_with_one_over_its_taps() -> None:
    pool = average(line(4, stride=4), 2, 1)
    assert (pool.groups, pool.weights) == (2, 8)
    assert numbers(pool) == ([[[[0.25] * 4]], [[[0.25] * 4]]], [0, 0])


def test_a_pool_beside_a_convolution_and_before_one() -> None:
    pool = average(line(3, 1, 1), 1, 1)
    both = add(pool, conv([[[1, 1, 1]]], window=line(3, 1, 1)))
    assert np.allclose(both.numbers(nothing)[0], 4 / 3)
    assert np.allclose(
        compose(average(line(2), 1, 1), conv([[[2, 4]]]), nothing).numbers(nothing)[0], [1, 3, 2]
    )


def test_an_affine_map_is_a_diagonal_of_the_kind_that_its_neighbour_is() -> None:
    affine = Affine.along(1, 3, [2.0, 3.0], [1.0, -1.0])
    beside = diagonal(affine, conv(np.ones((2, 2, 3))), 1, 2)
    assert beside.window == Window.point(1)
    assert numbers(beside) == ([[[[2]]], [[[3]]]], [1, -1])
    plain = diagonal(Affine.identity(2), matrix(np.ones((3, 3))), 1, 3)
    assert plain.window is None
    assert numbers(plain) == ([[[1]], [[1]], [[1]]], [0, 0, 0])


@pytest.mark.parametrize("axis", [0, 2])
def test_an_affine_map_along_another_axis_is_none(axis: int) -> None:
    affine = Affine.along(axis, 3, [2.0, 3.0], [0.0, 0.0])
    with pytest.raises(Refuse, match="along another axis than that of the channels"):
        diagonal(affine, conv(np.ones((2, 2, 1))), 1, 2)


def node(op: str, linear: Linear | None, reason: str = "") -> Node:
    return Node("n", op, ("x",), ("y",), linear=linear, reason=reason)


def stored(weight: Any, bias: Any = None) -> Any:
    return lambda node: (np.asarray(weight, float), None if bias is None else np.asarray(bias, float))


@pytest.mark.parametrize(("order", "weight"), [("oi", [[1, 2]]), ("io", [[1], [2]])])
def test_a_matrix_is_read_in_either_order(order: str, weight: Any) -> None:
    operator = of_linear(node("Gemm", Linear(order, 2, 1, 1, 1)))
    seen, bias = operator.numbers(stored(weight, [5]))
    assert seen.tolist() == [[[1, 2]]]
    assert bias.tolist() == [5]


@pytest.mark.parametrize("bias", [[3.0], 3.0, [[3.0]]])
def test_a_bias_of_one_number_is_that_of_every_output(bias: Any) -> None:
    operator = of_linear(node("Gemm", Linear("oi", 1, 2, 1, 1)))
    assert operator.numbers(stored([[1], [2]], bias))[1].tolist() == [3, 3]


@pytest.mark.parametrize("bias", [[[1.0], [2.0]], [[1.0, 2.0], [3.0, 4.0]], [[1.0], [2.0], [3.0]]])
def test_a_bias_that_differs_from_row_to_row_is_refused(bias: Any) -> None:
    operator = of_linear(node("Gemm", Linear("oi", 1, 2, 1, 1)))
    with pytest.raises(Refuse, match="no vector along its outputs"):
        operator.numbers(stored([[1], [2]], bias))


def test_a_convolution_is_read_by_groups_with_what_it_has_absorbed() -> None:
    linear = Linear("oi", 2, 2, 1, 1, 2, window=line(2)).absorb_after(
        np.array([2.0, 3.0]), np.array([1.0, 1.0])
    )
    operator = of_linear(node("Conv", linear))
    weight, bias = operator.numbers(stored([[[1, 2]], [[3, 4]]], [10, 20]))
    assert weight.tolist() == [[[[2, 4]]], [[[9, 12]]]]
    assert bias.tolist() == [21, 61]


def test_a_table_is_an_operator_on_its_rows() -> None:
    operator = of_linear(node("Embedding", Linear("io", 3, 2, 0, 1)))
    assert (operator.inputs, operator.outputs, operator.lookup, operator.multiply_adds) == (3, 2, True, 0)
    assert operator.numbers(stored([[1, 2], [3, 4], [5, 6]]))[0].tolist() == [[[1, 3, 5], [2, 4, 6]]]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (node("Conv", None, "its weight is computed"), "its weight is computed"),
        (node("Conv", None), "not constant"),
        (node("Conv", Linear("oi", 1, 1, 1, 1)), "depends on the size"),
        (node("ConvTranspose", Linear("io", 1, 1, 1, 1, window=line(1))), "transposed"),
        (node("Einsum", Linear("io", 1, 1, 1, 1)), "of a kind"),
        (node("Blur", Linear("oi", 1, 1, 1, 1)), "of a kind"),
    ],
)
def test_what_is_not_known_to_be_linear_is_none(given: Node, why: str) -> None:
    with pytest.raises(Refuse, match=why):
        of_linear(given)


def test_weights_and_multiply_adds_are_counted_by_groups() -> None:
    full, grouped = conv(np.ones((6, 4, 5))), conv(np.ones((6, 2, 5)), groups=2)
    assert (full.weights, full.multiply_adds) == (120, 120)
    assert (grouped.weights, grouped.multiply_adds) == (60, 60)


# ---------------------------------------------------------------- operators and affine maps

TWICE = Affine.along(1, 2, [2.0, 3.0], [1.0, -1.0])
SQUARE = matrix([[1, 2], [3, 4]], [10, 20])


def test_an_affine_map_beside_an_operator_is_added_to_its_diagonal() -> None:
    assert numbers(beside(SQUARE, TWICE, -1.0)) == ([[-1, 2], [3, 1]], [9, 21])
    assert numbers(beside(TWICE, SQUARE, -1.0)) == ([[1, -2], [-3, -1]], [-9, -21])
    assert numbers(beside(SQUARE, SQUARE)) == ([[2, 4], [6, 8]], [20, 40])


def test_an_affine_map_above_or_below_an_operator_scales_its_columns_or_its_rows() -> None:
    assert numbers(sequence(SQUARE, TWICE, nothing)) == ([[2, 4], [9, 12]], [21, 59])
    assert numbers(sequence(TWICE, SQUARE, nothing)) == ([[2, 6], [6, 12]], [9, 19])
    assert numbers(sequence(SQUARE, SQUARE, nothing)) == ([[7, 10], [15, 22]], [60, 130])


def test_two_affine_maps_stay_one() -> None:
    both, after = beside(TWICE, TWICE, -1.0), sequence(TWICE, Affine.identity(2), nothing)
    assert isinstance(both, Affine)
    assert isinstance(after, Affine)
    assert (both.scale.tolist(), both.shift.tolist()) == ([[0, 0]], [[0, 0]])
    assert after.equals(TWICE)


def test_affine_maps_along_different_axes_stay_two() -> None:
    rows = Affine.along(0, 2, [1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    for join in (lambda: beside(TWICE, rows), lambda: sequence(rows, TWICE, nothing)):
        with pytest.raises(Refuse, match="along another axis"):
            join()


def test_nothing_scales_the_whole_numbers_that_a_table_reads() -> None:
    table = matrix([[1, 2]], axes=(0, 1), lookup=True)
    with pytest.raises(Refuse, match="looks up rows"):
        sequence(Affine.identity(1), table, nothing)
    assert numbers(sequence(table, Affine.along(1, 2, [5.0], [1.0]), nothing)) == ([[5, 10]], [1])


def test_what_would_have_too_many_weights_is_none_unless_its_parts_have_as_many() -> None:
    wide, tall = (Operator(*sizes, 1, 1, 1, None, nothing) for sizes in ((1 << 15, 1), (1, 1 << 15)))
    with pytest.raises(Refuse, match="as one it would have 1,073,741,824 weights"):
        compose(wide, tall, nothing)
    whole = Operator(1 << 15, 1 << 15, 1, 1, 1, None, nothing)
    assert add(whole, whole).weights == 1 << 30
    with pytest.raises(Refuse, match="weights"):
        average(Window((1 << 14, 1 << 14), (1, 1), (1, 1), ((0, 0), (0, 0))), 2, 1)
