"""Values that a file splits into a sequence, or puts into one, and takes out again (as torch's newer exporter does)."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

import bnfold
from bnfold.onnx import certify
from bnfold.simulation import NotProved
from tests.onnx_models import fold, kept, model, norm, weights

INTEGERS = {
    "zero": np.int64(0),
    "one": np.int64(1),
    "last": np.int64(-1),
    "sizes": np.array([2, 3, 1]),
    "threes": np.int64(3),
    "fours": np.int64(4),
}


def split_up(how: str, channels: int, place: str = "one", more: str = "", also: str = "") -> onnx.ModelProto:
    """A convolution, split; a BatchNorm on a part, then a Relu; `more` reads the sequence."""
    text = f"""g (float[2, 4, 5] x) => (float[2, {channels}, 5] y, float[2, first, 5] z{also}) {{
        c = Conv(x, k) q = {how} h = SequenceAt(q, {place}) n = BatchNormalization(h, s, b, m, v) y = Relu(n)
        e = SequenceAt(q, zero) z = Relu(e) {more} }}"""
    return model(text, {"k": weights(6, 4, 1), **norm(channels), **INTEGERS})


@pytest.mark.parametrize("place", ["one", "last"])
@pytest.mark.parametrize("how", ["SplitToSequence<axis=1>(c, threes)", "SplitToSequence<axis=-2>(c, threes)"])
def test_a_part_that_is_taken_out_of_a_split_value_takes_its_rows_with_it(how, place):
    fold(split_up(how, 3, place), 1)


def test_the_last_part_may_be_smaller():
    fold(split_up("SplitToSequence<axis=1>(c, fours)", 2), 1)


def test_parts_of_given_sizes_are_told_apart():
    fold(split_up("SplitToSequence<axis=1>(c, sizes)", 3), 1)


def test_parts_of_one_are_values_without_their_axis_where_it_is_said_so():
    text = """g (float[2, 4, 5] x) => (float[2, 4] y) {
        n = BatchNormalization(x, s, b, m, v) q = SplitToSequence<axis=2, keepdims=0>(n)
        h = SequenceAt(q, last) y = MatMul(h, w) }"""
    fold(model(text, {"w": weights(4, 4), **norm(4), **INTEGERS}), 1)


def test_a_value_goes_through_a_sequence_that_it_is_put_into():
    text = """g (float[2, 4, 5] x) => (float[2, 6, 5] y, float[2, 6, 5] z) {
        c = Conv(x, k) d = Relu(x) e = Conv(d, k) q = SequenceConstruct(c, e) h = SequenceAt(q, zero)
        y = BatchNormalization(h, s, b, m, v) o = SequenceAt(q, last) z = Relu(o) }"""
    fold(model(text, {"k": weights(6, 4, 1), **norm(6), **INTEGERS}), 1)


@pytest.mark.parametrize(
    ("more", "also"),
    [
        ("l = SequenceLength(q) w = Cast<to=1>(l)", ", float w"),
        ("j = ConcatFromSequence<axis=1>(q) w = Relu(j)", ", float[2, 6, 5] w"),
    ],
)
def test_a_sequence_that_others_read_as_a_whole_keeps_what_was_put_into_it(more, also):
    kept(split_up("SplitToSequence<axis=1>(c, sizes)", 3, more=more, also=also), "also read by")


def test_a_part_at_a_place_that_is_not_known_stays():
    text = """g (float[2, 4, 5] x, int64 place) => (float[2, 3, 5] y) {
        c = Conv(x, k) q = SplitToSequence<axis=1>(c, threes) h = SequenceAt(q, place)
        y = BatchNormalization(h, s, b, m, v) }"""
    some = model(text, {"k": weights(6, 4, 1), **norm(3), "threes": np.int64(3)})
    kept(some, "unusual SequenceAt", inputs={"x": weights(2, 4, 5), "place": np.int64(1)})


def test_the_certificate_of_a_fold_through_a_sequence_is_checked(tmp_path):
    some = split_up("SplitToSequence<axis=1>(c, sizes)", 3)
    source, target, told = (tmp_path / name for name in ("a.onnx", "b.onnx", "a.json"))
    onnx.save(some, source)
    bnfold.fold_file(source, target, runtime="any", certificate=told)
    assert certify.check_files(source, target, told)

    damaged, stated = onnx.load(target), json.loads(told.read_text())
    split = next(node for node in damaged.graph.node if node.op_type == "SplitToSequence")
    split.input[1] = "threes"
    stated["result"] = certify.digest(damaged)
    with pytest.raises(NotProved, match="proves nothing"):
        certify.check(some, damaged, certify.Certificate.from_json(json.dumps(stated)))
