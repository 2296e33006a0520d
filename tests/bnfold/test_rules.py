"""The table: whatever a row answers is an identity, whatever it refuses is refused for a stated reason."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfold.algebra import Affine, Linear
from bnfold.errors import Refuse
from bnfold.ir import Node, Shape
from bnfold.rules import LARGEST, TABLE, find, groups
from tests.properties import machine


@dataclass
class Around:
    """The surroundings of one node: the shapes of its values, and who takes a shift."""

    shapes: dict[str, Shape]
    able: frozenset[str] = frozenset()

    def shape(self, value: str) -> Shape | None:
        return self.shapes.get(value)

    def takes_shift(self, value: str) -> bool:
        return value in self.able


def an_affine(random: np.random.Generator, value: np.ndarray, holes: bool = False) -> Affine:
    """Any affine that acts on a value: along no axis, one or several; with some entries that may be anything."""
    axes = random.random(value.ndim) < random.choice([0.0, 0.3, 0.6])
    if value.ndim > 1 and random.random() < 0.5:
        axes = np.arange(value.ndim) == 1
    shape = [n if varies else 1 for n, varies in zip(value.shape, axes, strict=True)]
    scale = machine.gammas(random, shape) if random.random() < 0.8 else np.ones(shape)
    shift = random.normal(size=shape) * (random.random() < 0.6)
    if holes and random.random() < 0.3:
        hole = random.random(shape) < 0.3
        scale, shift = np.where(hole, np.nan, scale), np.where(hole, np.nan, shift)
    return Affine.of(scale, shift)


def apply(affine: Affine | None, value: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """What arrives; where anything will do, anything does."""
    if affine is None:
        return value
    hole = np.isnan(affine.scale) | np.isnan(affine.shift)
    scale = np.where(hole, random.normal(size=hole.shape), affine.scale)
    return value * scale + np.where(hole, random.normal(size=hole.shape), affine.shift)


def compute(node: Node, sketch: machine.Sketch, inputs: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    results = machine.COMPUTE[node.op](node, sketch.weights, *inputs)
    return results if isinstance(results, tuple) else (results,)


def absorbed(node: Node, answer: Any) -> tuple[Node, Any]:
    """The node with what it took in, and the flow that it passes on: nothing."""
    if isinstance(answer, Linear):
        return replace(node, linear=answer), None
    if isinstance(answer, Affine):
        return replace(node, affine=answer), None
    return node, answer


def assert_equal(actual: np.ndarray, expected: np.ndarray, where: np.ndarray | None = None) -> None:
    peak = np.max(np.abs(expected[np.isfinite(expected)]), initial=0.0) or 1.0
    off = np.where(actual == expected, 0.0, np.abs(actual - expected) / peak)
    assert np.max(off if where is None else np.where(where, off, 0.0), initial=0.0) <= 1e-12


def template(sentence: str) -> str:
    """A refusal without the names in it."""
    return re.sub(r"axis \d[\d and]*", "axis #", re.sub(r"`[^`]*`( \(\w+\))?", "`...`", sentence))


def some_affines(random: np.random.Generator, values: list[np.ndarray], holes: bool) -> list[Affine | None]:
    """An affine for each of several values, for one of them, one and the same scale for all, or the same shift, too."""
    flow = [an_affine(random, value, holes) if value.dtype.kind == "f" else None for value in values]
    kind = random.random()
    if len(flow) > 1 and kind < 0.4 and flow[1] is not None:
        flow[int(random.integers(2))] = None
    elif kind < 0.7 and not holes:
        flow = [Affine.of(np.full((1,) * value.ndim, 2.0), random.normal()) for value in values]
    elif kind < 0.85 and not holes:
        flow = [Affine.of(np.full((1,) * value.ndim, 2.0), 1.5) for value in values]
    return flow


def go_up(node: Node, sketch: machine.Sketch, random: np.random.Generator) -> None:
    inputs = [sketch.values[name] for name in node.inputs]
    wanted = some_affines(random, [sketch.values[name] for name in node.outputs], holes=True)
    around = Around({name: value.shape for name, value in sketch.values.items()}, frozenset(node.inputs[:1]))
    new, flow = absorbed(node, find(node).up(node, around, wanted))
    arriving = [apply(a, x, random) for a, x in zip(flow or [None] * len(inputs), inputs, strict=True)]
    for name, affine, actual in zip(node.outputs, wanted, compute(new, sketch, arriving), strict=True):
        old = sketch.values[name]
        expected = old if affine is None else old * affine.scale + affine.shift
        known = np.broadcast_to(True if affine is None else ~np.isnan(affine.scale), old.shape)
        assert actual.shape == old.shape
        assert_equal(np.where(known, actual, 0.0), np.where(known, expected, 0.0))


def go_down(node: Node, sketch: machine.Sketch, random: np.random.Generator) -> None:
    raw = [sketch.values[name] for name in node.inputs]
    given = some_affines(random, raw, holes=False)
    due = [
        value if affine is None else apply(affine, value, random)
        for affine, value in zip(given, raw, strict=True)
    ]
    around = Around({name: value.shape for name, value in sketch.values.items()})
    new, flow = absorbed(node, find(node).down(node, around, given))
    results = compute(new, sketch, raw)
    for actual, expected, lack in zip(
        results, compute(node, sketch, due), flow or [None] * len(results), strict=True
    ):
        assert actual.shape == expected.shape
        assert_equal(apply(lack, actual, random), expected)


def refusal_of(go: Any, node: Node, sketch: machine.Sketch, seed: int) -> str:
    try:
        go(node, sketch, np.random.default_rng(seed))
    except Refuse as refusal:
        return str(refusal)
    return ""


def test_the_machine_computes_and_draws_every_operator_of_the_table() -> None:
    assert TABLE.keys() <= machine.COMPUTE.keys()
    assert TABLE.keys() <= machine.STEPS.keys()


@pytest.mark.parametrize("op", TABLE)
@pytest.mark.parametrize("go", [go_up, go_down])
def test_what_a_row_answers_is_an_identity_and_what_it_refuses_is_stated(op: str, go: Any) -> None:
    answers = 0
    for seed in range(60):
        node, sketch = machine.draw_node(seed, op)
        refused = refusal_of(go, node, sketch, seed)
        assert not refused or template(refused) in STATED
        answers += not refused
    assert answers or (op == "Embedding" and go is go_down)


@pytest.mark.slow
@pytest.mark.parametrize("op", TABLE)
@pytest.mark.parametrize("go", [go_up, go_down])
def test_what_a_row_answers_is_an_identity_on_thousands_of_nodes(op: str, go: Any) -> None:
    for seed in range(1000, 2000):
        node, sketch = machine.draw_node(seed, op)
        with suppress(Refuse):
            go(node, sketch, np.random.default_rng(seed))


@pytest.mark.parametrize("op", TABLE)
def test_a_row_reads_no_attribute_that_it_does_not_ask_for(op: str) -> None:
    row, read = TABLE[op], set()

    class Watched(dict):  # type: ignore[type-arg]
        def __getitem__(self, key: str) -> Any:
            read.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

    for seed in range(20):
        node, sketch = machine.draw_node(seed, op)
        around = Around({name: value.shape for name, value in sketch.values.items()})
        node = replace(node, attributes=Watched(node.attributes))
        for transfer, values in ((row.up, node.outputs), (row.down, node.inputs)):
            flow = [Affine.identity(sketch.values[name].ndim) for name in values]
            with suppress(Refuse):
                transfer(node, around, flow)
    assert read <= {*row.asks}


# ---------------------------------------------------------------- what is refused, and in which words

CHANNELS = Affine.along(1, 4, [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 0.0])
SCALES = CHANNELS.scale_only()
NEGATIVE = Affine.along(1, 4, [1.0, -2.0, 3.0, 4.0], 0.0)
ZERO = Affine.along(1, 4, [0.0, 1.0, 1.0, 1.0], 0.0)
COLUMNS = Affine.along(3, 4, np.arange(1.0, 7.0), 0.0)
SHAPE = (2, 4, 6, 6)
HUGE = 1 << 58
IMAGES = {"x": SHAPE, "y": SHAPE, "z": SHAPE, "column": (4, 1, 1), "dim": ("N", "C", 6, 6)}
IMAGES |= {"long": (2, HUGE, 6, 6), "huge": (2, 4, 3, HUGE), "flat": (2, 12 * HUGE)}
DENSE = Linear("oi", 4, 4, 1, 1)


def node(
    op: str, inputs: str = "x", outputs: str = "y", linear: Any = None, affine: Any = None, **more: Any
) -> Node:
    typed = {key: more.pop(key) for key in ("reason", "partial") if key in more}
    ends = tuple(inputs.split()), tuple(outputs.split())
    return Node("n", op, *ends, more, linear=linear, affine=affine, **typed)


REFUSALS: list[tuple[str, Node, list[Affine | None], str]] = [
    ("up", node("Softmax"), [CHANNELS], "`n` (Softmax) is not linear"),
    ("down", node("Softmax"), [CHANNELS], "`n` (Softmax) is not linear"),
    ("up", node("Conv", reason="its weight is computed"), [CHANNELS],
     "`n` (Conv) cannot absorb: its weight is computed"),
    ("up", node("Conv"), [CHANNELS], "`n` (Conv) cannot absorb: it has no weight"),
    ("up", node("MatMul", linear=Linear("oi", 6, 6, 3, 3)), [CHANNELS],
     "`n` (MatMul) has its channels on axis 3, and the affine varies along axis 1"),
    ("down", node("MatMul", linear=Linear("oi", 6, 6, 3, 3)), [CHANNELS],
     "`n` (MatMul) has its channels on axis 3, and the affine varies along axis 1"),
    ("up", node("Conv", linear=replace(DENSE, biasless="it has no bias parameter")), [CHANNELS],
     "`n` (Conv) cannot take the shift: it has no bias parameter"),
    ("down", node("Conv", linear=replace(DENSE, biasless="it has no bias")), [CHANNELS],
     "`n` (Conv) cannot take the shift: it has no bias"),
    ("down", node("Conv", linear=replace(DENSE, partial="it pads with zeros")), [CHANNELS],
     "`n` (Conv) cannot take the shift: it pads with zeros"),
    ("down", node("ConvTranspose", linear=replace(DENSE, partial="it has stride 2")), [CHANNELS],
     "`n` (ConvTranspose) cannot take the shift: it has stride 2"),
    ("down", node("Bilinear", "x y", linear=replace(DENSE, partial="it has a second operand")), [CHANNELS, None],
     "`n` (Bilinear) cannot take the shift: it has a second operand"),
    ("down", node("DeformConv", "x y", linear=replace(DENSE, partial="zeros outside")), [CHANNELS, None],
     "`n` (DeformConv) cannot take the shift: zeros outside"),
    ("down", node("DeformConv", "x y", linear=DENSE), [None, CHANNELS],
     "`n` (DeformConv) absorbs what its first operand lacks, and no other one"),
    ("down", node("Embedding", linear=replace(DENSE, sealed="it looks rows up")), [CHANNELS],
     "`n` (Embedding) cannot absorb what comes in: it looks rows up"),
    ("up", node("BatchNormalization", reason="it is in training mode"), [CHANNELS],
     "`n` stays: it is in training mode"),
    ("up", node("Affine", affine=Affine.of([[[[1.0]]]], -np.inf)), [CHANNELS],
     "`n` (Affine) holds a number that is not finite"),
    ("down", node("Affine", affine=Affine.of([[[[np.nan]]]], 0.0)), [CHANNELS],
     "`n` (Affine) holds a number that is not finite"),
    ("up", node("Affine", affine=ZERO), [CHANNELS], "`n` multiplies by zero"),
    ("up", node("Cast", lossless=False), [CHANNELS], "`n` (Cast) rounds to a narrower type"),
    ("up", node("Reshape", "x", "unknown"), [CHANNELS], "the shape around `n` (Reshape) is not known"),
    ("down", node("Reshape", "dim", "unknown"), [CHANNELS], "the shape around `n` (Reshape) is not known"),
    ("up", node("Concat", "x dim", axis=1), [CHANNELS], "the shape around `n` (Concat) is not known"),
    ("up", node("Slice", "dim", slices=(slice(None), slice(0, 4), slice(None), slice(None))), [CHANNELS],
     "the shape around `n` (Slice) is not known"),
    ("down", node("Reshape", "x", "column"), [CHANNELS], "the shapes around `n` (Reshape) do not agree"),
    ("up", node("Gather", axis=1, indices=np.array([0, 1, 2, 0])), [CHANNELS.after(SCALES)],
     "`n` (Gather) repeats a channel that would have to differ"),
    ("up", node("Tile", repeats=(1, 2, 1, 1)), [CHANNELS], "`n` (Tile) repeats a channel that would have to differ"),
    ("up", node("Expand", "column"), [COLUMNS],
     "`n` (Expand) repeats `column` along an axis on which the affine varies"),
    ("up", node("Expand", "dim"), [CHANNELS], "`n` (Expand) repeats `dim` along an axis on which the affine varies"),
    ("up", node("Add", "x column"), [COLUMNS],
     "`n` (Add) repeats `column` along an axis on which the affine varies"),
    ("up", node("DepthToSpace", blocksize=2, mode="CRD"), [COLUMNS],
     "`n` (DepthToSpace) mixes the channels with an axis on which the affine varies"),
    ("up", node("DepthToSpace", blocksize=2, mode="CRD"), [Affine.along(1, 5, [1.0, 2.0], 0.0)],
     "`n` (DepthToSpace) mixes the channels with an axis on which the affine varies"),
    ("down", node("DepthToSpace", blocksize=2, mode="DCR"), [CHANNELS],
     "`n` (DepthToSpace) spreads channels that differ over one image"),
    ("up", node("SpaceToDepth", blocksize=2, mode="CRD"), [Affine.along(1, 3, [1.0, 2.0, 3.0, 4.0], 0.0)],
     "`n` (SpaceToDepth) spreads channels that differ over one image"),
    ("up", node("Add", "lone column", "y"), [CHANNELS], "the shape around `n` (Add) is not known"),
    ("down", node("Add", "x z"), [CHANNELS, None], "`n` (Add) has another operand that is not scaled"),
    ("down", node("Sub", "x z"), [SCALES, COLUMNS], "`n` (Sub) has another operand that is not scaled"),
    ("up", node("Mul", "x z"), [CHANNELS], "`n` (Mul) lets no shift through"),
    ("down", node("Mul", "x z"), [CHANNELS, None], "`n` (Mul) lets no shift through"),
    ("up", node("Mul", "column column"), [COLUMNS], "no operand of `n` (Mul) can take the scale"),
    ("up", node("Add", "column column"), [Affine.along(3, 4, 1.0, np.arange(6.0))],
     "no operand of `n` (Add) can take the shift"),
    ("up", node("Einsum", kept=((0, -1, 2, 3),)), [SCALES], "no operand of `n` (Einsum) can take the scale"),
    ("up", node("Einsum", "dim", kept=((0, 1, 2, 3),)), [SCALES], "no operand of `n` (Einsum) can take the scale"),
    ("up", node("Einsum", "unknown", kept=((0, 1, 2, 3),)), [SCALES], "the shape around `n` (Einsum) is not known"),
    ("down", node("Einsum", kept=((0, -1, 2, 3),)), [SCALES],
     "`n` (Einsum) mixes positions on which the affine differs"),
    ("down", node("Einsum", kept=((0, 1, 2, -1),)), [CHANNELS], "`n` (Einsum) lets no shift through"),
    ("up", node("MatMul", linear=Linear("oi", 6, 6, 3, 3, bare=True)), [CHANNELS],
     "`n` (MatMul) has its channels on axis 3, and the affine varies along axis 1"),
    ("down", node("Div", "x z"), [None, SCALES], "`n` (Div) divides by it"),
    ("up", node("AveragePool", axes=(2, 3), partial="it counts zero padding"), [CHANNELS],
     "`n` (AveragePool) lets no shift through: it counts zero padding"),
    ("down", node("Pad", axes=(2, 3), partial="it pads with zeros"), [CHANNELS],
     "`n` (Pad) lets no shift through: it pads with zeros"),
    ("up", node("Resize", axes=(2, 3)), [COLUMNS], "`n` (Resize) mixes positions on which the affine differs"),
    ("down", node("ReduceMean", axes=(1,)), [SCALES], "`n` (ReduceMean) mixes positions on which the affine differs"),
    ("down", node("ReduceSum", axes=(2,)), [CHANNELS], "`n` (ReduceSum) lets no shift through"),
    ("up", node("MaxPool", axes=(2, 3)), [NEGATIVE], "`n` (MaxPool) lets no negative scale through"),
    ("down", node("MaxPool", "x", "y z", axes=(2, 3)), [ZERO],
     "`n` (MaxPool) also says where the largest is, which only a positive scale keeps"),
    ("up", node("Max", "x z"), [NEGATIVE], "`n` (Max) lets no negative scale through"),
    ("down", node("Min", "x z"), [CHANNELS, None],
     "`n` (Min) has another operand that is not scaled and shifted alike"),
    ("up", node("Relu"), [CHANNELS], "`n` (Relu) lets no shift through"),
    ("down", node("PRelu"), [NEGATIVE], "`n` (PRelu) lets no negative scale through"),
    ("down", node("PRelu", "x z"), [None, SCALES], "an operand that cannot carry an affine would have to"),
]  # fmt: skip

WHOLE = slice(None)
TOO_LARGE: list[tuple[str, Node, list[Affine | None]]] = [
    ("down", node("Reshape", "huge", "flat"), [CHANNELS]),
    ("up", node("Reshape", "flat", "huge"), [CHANNELS]),
    ("up", node("Slice", "long", slices=(WHOLE, slice(0, 4), WHOLE, WHOLE)), [CHANNELS]),
    ("up", node("Gather", "long", axis=1, indices=np.arange(4)), [CHANNELS]),
    ("down", node("Gather", axis=1, indices=np.broadcast_to(0, HUGE)), [CHANNELS]),
    ("down", node("Concat", "x long", axis=1), [CHANNELS, None]),
    ("up", node("Split", "long", "y z", axis=1, sizes=(4, HUGE)), [CHANNELS, None]),
    ("down", node("Tile", repeats=(1, HUGE, 1, 1)), [CHANNELS]),
    ("up", node("DepthToSpace", blocksize=1 << 29, mode="CRD"), [CHANNELS]),
    ("down", node("SpaceToDepth", blocksize=1 << 29, mode="DCR"), [CHANNELS]),
]

REFUSALS += [
    (*case, f"`n` ({case[1].op}) would write the affine out in more than {LARGEST:,} numbers")
    for case in TOO_LARGE
]

STATED = {template(sentence) for *_, sentence in REFUSALS}


@pytest.mark.parametrize(
    ("direction", "asked", "flow", "sentence"), REFUSALS, ids=[f"{r[3]}, {r[0]}" for r in REFUSALS]
)
def test_a_refusal_names_the_node_and_the_fact(
    direction: str, asked: Node, flow: list[Affine | None], sentence: str
) -> None:
    with pytest.raises(Refuse) as refusal:
        getattr(find(asked), direction)(asked, Around(IMAGES), flow)
    assert str(refusal.value) == sentence


# ---------------------------------------------------------------- choices that an identity does not show


def test_the_shift_of_a_sum_goes_to_the_first_operand_that_can_take_it() -> None:
    first, second = find(node("Add")).up(node("Add", "x z"), Around(IMAGES, frozenset({"z"})), [CHANNELS])
    assert first.is_linear
    assert second.equals(CHANNELS)


def test_the_scale_of_a_product_goes_to_one_factor_only() -> None:
    first, second = find(node("Mul")).up(node("Mul", "x z"), Around(IMAGES, frozenset({"z"})), [SCALES])
    assert first is None
    assert second.equals(SCALES)


def test_what_a_selection_drops_may_be_anything() -> None:
    cut = node("Slice", "whole", slices=(slice(None), slice(4, 8), slice(None), slice(None)))
    (wanted,) = find(cut).up(cut, Around({"whole": (2, 9, 6, 6)}), [CHANNELS])
    assert np.isnan(wanted.scale.ravel()).tolist() == [True] * 4 + [False] * 4 + [True]


def test_a_selection_of_an_unknown_size_passes_what_does_not_vary_along_it() -> None:
    cut = node("Slice", "dim", slices=(slice(None), slice(None), slice(0, 2), slice(None)))
    (wanted,) = find(cut).up(cut, Around({"dim": ("N", 4, "H", 6)}), [CHANNELS])
    assert wanted.equals(CHANNELS)


def test_symbols_and_unknown_sizes_pass_where_nothing_varies_along_them() -> None:
    flat = node("Reshape", "image", "rows")
    around = Around({"image": ("N", 4, "H", "W"), "rows": ("N", 4, "H*W")})
    (below,) = find(flat).down(flat, around, [CHANNELS])
    assert below.equals(Affine.along(1, 3, CHANNELS.scale.ravel(), CHANNELS.shift.ravel()))


# ---------------------------------------------------------------- regrouping of axes


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of one value: the same factors in the same order, multiplied together in different places."""
    factors = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))

    def gather() -> tuple[int, ...]:
        cuts = sorted(draw(st.sets(st.integers(1, len(factors) - 1)))) if len(factors) > 1 else []
        return tuple(prod(factors[a:b]) for a, b in pairwise([0, *cuts, len(factors)]))

    return gather(), gather()


@given(reshapes(), st.data())
def test_numbers_that_vary_along_some_axes_are_regrouped_as_numpy_reshapes_them(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    source, target = shapes
    varies = data.draw(st.tuples(*[st.booleans() for _ in source]))
    kept = [n if v else 1 for n, v in zip(source, varies, strict=True)]
    small = np.arange(1.0, 1 + prod(kept)).reshape(kept)
    moved = node("Reshape", "a", "b")
    (lack,) = find(moved).down(moved, Around({"a": source, "b": target}), [Affine.of(small, -small)])
    expected = np.broadcast_to(small, source).reshape(target)
    np.testing.assert_array_equal(np.broadcast_to(lack.scale, target), expected)
    np.testing.assert_array_equal(np.broadcast_to(lack.shift, target), -expected)


@given(reshapes(), st.data())
def test_groups_cover_both_shapes_and_never_move_a_number_out_of_its_group(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    source, target = shapes
    names = {n: data.draw(st.sampled_from([n, n, None, f"size {n}"])) for n in {*source, *target}}
    found = groups(tuple(names[n] for n in source), tuple(names[n] for n in target))
    assert [axis for here, _ in found for axis in here] == [*range(len(source))]
    assert [axis for _, there in found for axis in there] == [*range(len(target))]
    assert all(prod(source[a] for a in here) == prod(target[b] for b in there) for here, there in found)


# ---------------------------------------------------------------- the document


def test_the_document_names_every_operator_and_shows_pictures_that_exist() -> None:
    folder = Path(__file__).parents[2] / "docs"
    text = (folder / "travel.md").read_text(encoding="utf-8")
    assert [op for op in TABLE if f"`{op}`" not in text] == []
    shown = set(re.findall(r"\((pictures/travel/\w+\.svg)\)", text))
    assert shown == {f"pictures/travel/{path.name}" for path in (folder / "pictures" / "travel").iterdir()}


@pytest.mark.parametrize(
    ("op", "says"),
    [
        *((op, "is not followed, though it is linear") for op in ("bmm", "rsub", "unusual Einsum")),
        ("Tanh", "is not linear"),
    ],
)
def test_a_linear_operator_without_a_row_is_not_called_anything_else(op, says):
    with pytest.raises(Refuse, match=says):
        find(Node("n", op, ("x",), ("y",)))
