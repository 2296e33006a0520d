"""A vocabulary numbers every character once, and its terminator is in no name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfold.errors import InputError
from data import Vocabulary, read_names

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def test_the_default_list_has_the_lectures_27_characters():
    vocabulary = Vocabulary.from_names(read_names())
    assert vocabulary.characters == tuple(".abcdefghijklmnopqrstuvwxyz")
    assert (len(vocabulary), vocabulary.terminator) == (27, ".")


@pytest.mark.parametrize(
    ("names", "terminator"),
    [(["ann"], "."), (["a.n"], "|"), (["a.|"], "#"), (["a.|#~"], "\ue000"), (["a.|#~", "\ue000b"], "\ue001")],
)
def test_the_terminator_is_the_first_candidate_that_no_name_uses(names, terminator):
    assert Vocabulary.from_names(names).terminator == terminator


@given(st.lists(texts.filter(bool), min_size=1, max_size=8))
def test_any_alphabet_survives_the_way_there_and_back(names):
    vocabulary = Vocabulary.from_names(names)
    assert not any(vocabulary.terminator in name for name in names)
    assert list(vocabulary.characters[1:]) == sorted(set("".join(names)))
    text = vocabulary.terminator.join(names)
    numbers = vocabulary.encode(text)
    assert numbers.dtype == np.int64
    assert numbers.tolist() == [vocabulary.characters.index(character) for character in text]
    assert vocabulary.decode(numbers) == text


@pytest.mark.parametrize("text", ["anx", "é", "\U0010ffff", "n\0", "Ann"])
def test_a_character_it_does_not_hold_is_named(text):
    with pytest.raises(InputError, match=r"is not among the 3 characters of the vocabulary") as caught:
        Vocabulary.from_names(["ann"]).encode(text)
    assert repr(next(character for character in text if character not in ".an")) in str(caught.value)


def test_the_empty_text_has_no_numbers():
    vocabulary = Vocabulary.from_names(["ann"])
    assert vocabulary.encode("").shape == (0,)
    assert vocabulary.decode([]) == ""


@pytest.mark.parametrize(
    ("characters", "message"),
    [((), "one or more"), ((".",), "one or more"), ((".", "ab"), "single"), ((".", "a", "a"), "once")],
)
def test_what_is_no_vocabulary_is_refused(characters, message):
    with pytest.raises(InputError, match=message):
        Vocabulary(characters)


def test_vocabularies_of_the_same_characters_are_equal_and_cannot_be_changed():
    vocabulary = Vocabulary((".", "a"))
    vocabulary.encode("a")
    assert vocabulary == Vocabulary((".", "a"))
    assert hash(vocabulary) == hash(Vocabulary((".", "a")))
    assert vocabulary != Vocabulary((".", "b"))
    with pytest.raises(FrozenInstanceError):
        vocabulary.characters = (".", "b")
