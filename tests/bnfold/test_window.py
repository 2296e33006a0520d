"""Windows: which offsets two of them have together, and of which size their outputs are, at every size."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import gcd

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bnfold.errors import Refuse
from bnfold.window import Window, union


def line(kernel: int, before: int = 0, after: int = 0, stride: int = 1, dilation: int = 1) -> Window:
    """A window over one axis."""
    return Window((kernel,), (stride,), (dilation,), ((before, after),))


def offsets(window: Window) -> list[int]:
    """Where the taps of a window over one axis lie, by the definition of a convolution."""
    assert window.pads is not None
    return [tap * window.dilations[0] - window.pads[0][0] for tap in range(window.kernel[0])]


def size(window: Window, elements: int) -> int:
    """How many positions a window over one axis has: those at which it lies within the padded input."""
    assert window.pads is not None
    (before, after), (reach,) = window.pads[0], window.extent
    return len(range(0, before + elements + after - reach + 1, window.strides[0]))


LINES = st.builds(
    line, st.integers(1, 5), st.integers(0, 6), st.integers(0, 6), st.integers(1, 3), st.integers(1, 3)
)

# ---------------------------------------------------------------- one


def test_a_point_reads_its_own_position() -> None:
    point = Window.point(2)
    assert point == Window((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))
    assert point.is_point
    assert point.keeps_size
    assert not point.is_padded
    assert Window.point(0).extent == ()


def test_a_point_may_stride_but_not_pad() -> None:
    assert line(1, stride=2).is_point
    assert not line(1, before=1).is_point
    assert not line(2).is_point


def test_the_extent_counts_what_lies_between_the_taps() -> None:
    assert Window((3, 1), (1, 1), (4, 7), ((0, 0), (0, 0))).extent == (9, 1)


def test_padding_that_depends_on_the_size_is_padding_and_has_no_offset() -> None:
    unknown = Window((3,), (2,), (1,), None)
    assert unknown.is_padded
    for ask in (unknown.offset, unknown.slack, lambda axis: unknown.after(Window.point(1))):
        with pytest.raises(Refuse, match="depends on the size"):
            ask(0)


def test_the_offset_is_what_is_padded_before_and_the_slack_what_goes_on_after_the_last_tap() -> None:
    assert (line(3, 1, 1).offset(0), line(3, 1, 1).slack(0)) == (-1, 0)
    assert (line(3, 0, 0).offset(0), line(3, 0, 0).slack(0)) == (0, -2)
    assert line(3, 2, 2, dilation=2).slack(0) == 0
    assert line(1, 0, 1).slack(0) == 1
    second = Window((1, 3), (1, 1), (1, 1), ((0, 0), (2, 0)))
    assert (second.offset(1), second.slack(1)) == (-2, 0)


@given(LINES, st.integers(1, 30))
def test_the_size_is_that_of_the_slack_over_the_stride(window: Window, elements: int) -> None:
    positions = size(window, elements)
    by_slack = (elements + window.slack(0) - 1) // window.strides[0] + 1
    assert positions == max(by_slack, 0)


@given(LINES)
@example(line(3, 1, 1))
@example(line(3, 1, 1, stride=2))
@example(line(3, 2, 2, dilation=2))
@example(line(2, 1, 1))
@example(line(4, 3, 3, dilation=2))
@example(line(1, 1, 1))
def test_a_size_is_kept_where_the_taps_lie_around_their_own_position_and_nothing_strides(
    window: Window,
) -> None:
    around = offsets(window) == [-offset for offset in reversed(offsets(window))]
    assert window.keeps_size == (
        around and len(offsets(window)) % 2 == 1 and window.slack(0) == 0 == window.strides[0] - 1
    )
    assert not replace(window, output_pads=True).keeps_size


# ---------------------------------------------------------------- side by side


def test_a_point_beside_three_taps_lies_in_their_middle() -> None:
    assert union(Window.point(2), Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))).kernel == (3, 3)


def test_a_row_beside_a_column_is_a_square() -> None:
    row = Window((1, 3), (1, 1), (1, 1), ((0, 0), (1, 1)))
    column = Window((3, 1), (1, 1), (1, 1), ((1, 1), (0, 0)))
    assert union(row, column) == Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))


def test_taps_that_are_far_apart_stay_so_where_all_fit_one_grid() -> None:
    two, four = line(3, 2, 2, dilation=2), line(3, 4, 4, dilation=4)
    assert union(two, four) == line(5, 4, 4, dilation=2)
    three = line(3, 3, 3, dilation=3)
    assert union(two, three) == line(7, 3, 3)


def test_a_tap_between_the_taps_of_another_makes_the_grid_finer() -> None:
    assert union(line(2, 1, 1, dilation=2), line(1)) == line(3, 1, 1)
    assert union(line(2, 2, 2, dilation=4), line(1)) == line(3, 2, 2, dilation=2)


def test_uneven_padding_moves_the_taps() -> None:
    assert union(line(2, 1, 0), line(2, 0, 1)) == line(3, 1, 1)


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (line(1, stride=2), line(1), "strides differ"),
        (line(3, 1, 1), line(3), "pad by different amounts"),
        (line(3, 1, 1, stride=2), line(2, 0, 0, stride=2), "pad by different amounts"),
        (line(3, 1, 1), Window((3,), (1,), (1,), None), "depends on the size"),
    ],
)
def test_two_windows_that_could_give_different_sizes_have_no_union(
    first: Window, second: Window, why: str
) -> None:
    for pair in ((first, second), (second, first)):
        with pytest.raises(Refuse, match=why):
            union(*pair)


@given(LINES, LINES)
def test_a_union_has_the_offsets_of_both_and_their_size_for_every_size(a: Window, b: Window) -> None:
    sizes = [(size(a, n), size(b, n)) for n in range(20, 40)]
    try:
        both = union(a, b)
    except Refuse:
        assert any(mine != theirs for mine, theirs in sizes)
        return
    assert set(offsets(both)) >= set(offsets(a)) | set(offsets(b))
    assert [size(both, n) for n in range(20, 40)] == [mine for mine, _ in sizes] == [n for _, n in sizes]
    assert union(b, a) == both


@given(LINES, LINES)
def test_a_union_is_no_larger_than_the_offsets_ask_for(a: Window, b: Window) -> None:
    b = replace(b, strides=a.strides, pads=((b.pads[0][0], a.slack(0) + offsets(b)[-1]),))
    taps = sorted({*offsets(a), *offsets(b)})
    both = union(a, b)
    assert (offsets(both)[0], offsets(both)[-1]) == (taps[0], taps[-1])
    assert both.dilations[0] == (gcd(*(tap - taps[0] for tap in taps)) or 1)


# ---------------------------------------------------------------- one after another


def test_two_taps_after_three_are_four() -> None:
    assert line(2).after(line(3)) == line(4)
    assert line(2).after(line(3, 1, 1)) == line(4, 1, 1)


def test_the_taps_of_the_second_one_lie_a_stride_of_the_first_one_apart() -> None:
    assert line(3).after(line(1, stride=2)) == line(3, stride=2, dilation=2)
    assert line(2, stride=3).after(line(2, stride=2)) == line(4, stride=6)


def test_what_is_padded_after_a_point_that_strides_is_padded_by_as_many_strides() -> None:
    assert line(3, 1, 2).after(line(1, stride=2)) == line(3, 2, 4, stride=2, dilation=2)


def test_padding_after_a_point_stays_and_after_anything_else_is_refused() -> None:
    assert line(3, 1, 1).after(line(1)) == line(3, 1, 1)
    for first in (line(3, 1, 1), line(2), line(1, 1, 0)):
        with pytest.raises(Refuse, match="not what the first one pads"):
            line(3, 1, 1).after(first)


@given(LINES, LINES)
def test_one_after_another_has_all_sums_of_offsets_and_the_size_of_both_passes(a: Window, b: Window) -> None:
    try:
        both = b.after(a)
    except Refuse:
        assert b.is_padded
        assert not a.is_point
        return
    reached = {outer * a.strides[0] + inner for outer, inner in product(offsets(b), offsets(a))}
    assert set(offsets(both)) >= reached
    assert (offsets(both)[0], offsets(both)[-1]) == (min(reached), max(reached))
    assert [size(both, n) for n in range(20, 60)] == [size(b, size(a, n)) for n in range(20, 60)]
