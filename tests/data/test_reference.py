"""The reference losses agree with the lecture's figures and with counting by hand."""

from __future__ import annotations

from collections import Counter
from math import inf, isnan, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import (
    Vocabulary,
    conditional_entropy,
    contexts,
    count_distinct,
    read_names,
    split,
    uniform_loss,
    unigram_loss,
)


@pytest.fixture(scope="module")
def parts():
    names = read_names()
    vocabulary = Vocabulary.from_names(names)
    return [contexts(part, vocabulary) for part in split(names)]


def test_the_default_list_has_the_lectures_reference_points(parts):
    (x, y), (_, dev_y), _ = parts
    assert uniform_loss(27) == pytest.approx(3.2958, abs=5e-5)
    assert unigram_loss(y, y) == pytest.approx(2.82, abs=5e-3)
    assert unigram_loss(y, dev_y) == pytest.approx(2.82, abs=5e-3)
    assert conditional_entropy(x, y) == pytest.approx(1.869, abs=5e-4)
    assert count_distinct(x) == 5_477


def test_the_makemore_list_has_the_lectures_reference_points(makemore):
    names = read_names(makemore)
    x, y = contexts(split(names).train, Vocabulary.from_names(names))
    assert unigram_loss(y, y) == pytest.approx(2.82, abs=5e-3)
    assert conditional_entropy(x, y) == pytest.approx(1.869, abs=5e-4)
    assert count_distinct(x) == 5_438


examples = st.integers(1, 3).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, 4), min_size=length + 1, max_size=length + 1), min_size=1)
)


@given(examples)
def test_the_entropy_is_the_mean_surprise_counted_by_hand(rows):
    table = np.array(rows)
    x, y = table[:, :-1], table[:, -1]
    given_context = Counter(map(tuple, x.tolist()))
    joint = Counter(map(tuple, rows))
    surprise = [log(given_context[tuple(row[:-1])] / joint[tuple(row)]) for row in rows]
    assert conditional_entropy(x, y) == pytest.approx(sum(surprise) / len(rows), abs=1e-12)
    assert count_distinct(x) == len(given_context)


@given(st.lists(st.integers(0, 6), min_size=1))
def test_the_unigram_loss_of_a_set_on_itself_is_the_entropy_without_context(targets):
    y = np.array(targets)
    no_context = np.zeros((len(y), 1), np.int64)
    assert unigram_loss(y, y) == pytest.approx(conditional_entropy(no_context, y), abs=1e-12)
    assert unigram_loss(y, y) <= uniform_loss(7) + 1e-12


def test_a_target_never_seen_in_training_costs_infinitely_much():
    assert unigram_loss(np.array([0, 1]), np.array([1, 2])) == inf
    assert unigram_loss(np.array([0, 1]), np.array([1, 0])) == pytest.approx(log(2))


def test_long_contexts_over_a_large_alphabet_do_not_overflow():
    x = np.random.default_rng(0).integers(0, 5000, (300, 40))
    assert count_distinct(x) == 300
    assert count_distinct(np.concatenate([x, x[::-1]])) == 300


def test_an_empty_set_has_no_loss():
    none, some = np.empty(0, np.int64), np.array([1])
    assert isnan(unigram_loss(none, some))
    assert isnan(unigram_loss(some, none))
    assert isnan(conditional_entropy(np.empty((0, 3), np.int64), none))
    assert count_distinct(np.empty((0, 3), np.int64)) == 0
