"""Contexts and targets are the lecture's, for any length and alphabet; so is the split, to the word."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfold.errors import InputError
from data import FEWEST_NAMES, Vocabulary, all_contexts, contexts, read_names, split

name_lists = st.lists(st.text("aé李b", min_size=1, max_size=7), min_size=1, max_size=9)


def loop_over(names, vocabulary, length):
    """The lecture's own loop over the characters of each name, as the reference."""
    x, y = [], []
    for name in names:
        context = [0] * length
        for character in name + vocabulary.terminator:
            number = vocabulary.characters.index(character)
            x.append(context)
            y.append(number)
            context = [*context[1:], number]
    return np.array(x, np.int64).reshape(-1, length), np.array(y, np.int64)


def test_emma_gives_the_five_examples_of_the_lecture():
    vocabulary = Vocabulary.from_names(read_names())
    x, y = contexts(["emma"], vocabulary)
    pairs = [
        f"{vocabulary.decode(context)} -> {vocabulary.decode([target])}"
        for context, target in zip(x, y, strict=True)
    ]
    assert pairs == ["... -> e", "..e -> m", ".em -> m", "emm -> a", "mma -> ."]


@given(name_lists, st.integers(1, 9))
def test_any_names_and_any_length_give_what_the_loop_gives(names, length):
    vocabulary = Vocabulary.from_names(names)
    x, y = contexts(names, vocabulary, length)
    expected_x, expected_y = loop_over(names, vocabulary, length)
    np.testing.assert_array_equal(x, expected_x, strict=True)
    np.testing.assert_array_equal(y, expected_y, strict=True)
    assert x.flags.c_contiguous


def test_no_names_give_no_examples_of_the_right_shape():
    x, y = contexts([], Vocabulary.from_names(["ann"]), 4)
    assert (x.shape, y.shape) == ((0, 4), (0,))


@pytest.mark.parametrize("part", [0, 1, 2], ids=["train", "dev", "test"])
def test_the_default_list_has_the_figures_of_the_lecture(part):
    names = read_names()
    x, y = contexts(split(names)[part], Vocabulary.from_names(names))
    assert len(x) == len(y) == [188_106, 23_485, 23_512][part]


def test_the_makemore_list_has_the_figures_of_the_lecture(makemore):
    names = read_names(makemore)
    vocabulary = Vocabulary.from_names(names)
    parts = split(names)
    assert [len(contexts(part, vocabulary)[1]) for part in parts] == [182_625, 22_655, 22_866]
    x, _ = contexts(parts.train, vocabulary)
    assert [vocabulary.decode(context) for context in x[:5]] == ["...", "..y", ".yu", "yuh", "uhe"]


def test_the_split_is_what_seeding_the_global_generator_would_give():
    names = read_names()
    state = random.getstate()
    random.seed(42)
    shuffled = list(names)
    random.shuffle(shuffled)
    random.setstate(state)
    parts = split(names)
    assert parts.train + parts.dev + parts.test == shuffled
    assert list(map(len, parts)) == [26_294, 3_287, 3_287]
    assert random.getstate() == state


@given(st.lists(st.text(max_size=3), min_size=FEWEST_NAMES, max_size=40), st.integers(0, 2**32))
def test_a_split_loses_no_name_leaves_no_part_empty_and_leaves_its_argument(names, seed):
    before = list(names)
    parts = split(names, seed)
    assert sorted(parts.train + parts.dev + parts.test) == sorted(before)
    assert all(parts)
    assert names == before
    assert parts == split(names, seed)


def test_one_name_less_than_the_fewest_would_leave_a_part_empty():
    assert not all(split(["ann"] * (FEWEST_NAMES - 1)))


def test_another_seed_gives_another_split():
    assert split(read_names(), 1).train != split(read_names(), 2).train


def test_a_name_that_holds_the_terminator_is_refused():
    with pytest.raises(InputError, match=r"a name holds '\.', which ends names"):
        contexts(["a.n"], Vocabulary((".", "a", "n")))


def test_a_name_of_another_alphabet_is_refused():
    with pytest.raises(InputError, match="'z' is not among the 3 characters"):
        contexts(["ann", "liz"[2:]], Vocabulary.from_names(["ann"]))


@pytest.mark.parametrize("length", [0, -3])
def test_a_context_of_no_characters_is_refused(length):
    with pytest.raises(InputError, match=f"a context of {length} characters; it takes 1 or more"):
        contexts(["ann"], Vocabulary.from_names(["ann"]), length)
    with pytest.raises(InputError, match=f"a context of {length} characters; it takes 1 or more"):
        all_contexts(27, length)


def test_all_contexts_of_three_are_the_19683_numbers_in_base_27():
    every = all_contexts(27, 3)
    assert (every.shape, every.dtype, every.flags.c_contiguous) == ((19_683, 3), np.int64, True)
    np.testing.assert_array_equal(every @ [27**2, 27, 1], np.arange(19_683))


@pytest.mark.parametrize(("size", "length"), [(1, 1), (5, 1), (3, 4), (2, 10)])
def test_every_context_occurs_once(size, length):
    every = all_contexts(size, length)
    assert every.shape == (size**length, length)
    assert len(np.unique(every, axis=0)) == len(every)
    assert set(every.flat) == set(range(size))


def test_more_contexts_than_fit_are_refused_before_memory_is_asked_for():
    with pytest.raises(
        InputError, match="27 characters make 282,429,536,481 contexts of 8; at most 16,777,216"
    ):
        all_contexts(27, 8)
