"""Sentences that say the same of other names are one kind, and nothing of what they say is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfold.wording import enumerate_some, group, shorten_number, spell_out

names = st.text("abc.[]<>\\1", min_size=1, max_size=6)


def sentences(*texts: str) -> list[str]:
    return [kind.sentence() for kind in group(texts, str)]


def test_sentences_that_differ_in_names_alone_are_one_kind() -> None:
    assert sentences("`a` (Relu) is not linear", "`b.1` (Relu) is not linear") == [
        "`...` (Relu) is not linear"
    ]
    assert len(sentences("`a` (Relu) is not linear", "`a` (Tanh) is not linear")) == 2


def test_a_name_that_all_of_them_have_stays() -> None:
    assert sentences("`a` is read by `x`", "`a` is read by `y`") == ["`a` is read by `...`"]
    assert sentences("`a` is read by `x`") == ["`a` is read by `x`"]


def test_numbers_that_differ_are_a_range() -> None:
    assert sentences("`a` is used 9 times", "`b` is used 1,200 times", "`c` is used 10 times") == [
        "`...` is used 9 to 1,200 times"
    ]
    assert sentences("it is float16", "it is float32") == ["it is float16", "it is float32"]
    assert sentences("off by 1.0e-12", "off by 2.0e-12") == ["off by 1.0e-12", "off by 2.0e-12"]


def test_the_largest_kind_comes_first() -> None:
    found = group(["x", "y", "y"], str)
    assert [kind.items for kind in found] == [("y", "y"), ("x",)]


@given(st.lists(st.tuples(names, names, st.integers(0, 10**7)), min_size=1, max_size=9))
def test_every_sentence_comes_back_from_its_kind_and_its_values(drawn: list[tuple[str, str, int]]) -> None:
    texts = [f"the output of `{a}` (Conv) is read {n:,} times by `{b}`" for a, b, n in drawn]
    kinds = group(texts, str)
    assert len(kinds) == 1
    for kind in kinds:
        again = (kind.sentence(values) for values in kind.values)
        assert list(again) == list(kind.items) == texts


@given(st.lists(st.text(max_size=30)))
def test_any_text_belongs_to_one_kind(texts: list[str]) -> None:
    kinds = group(texts, str)
    assert sorted(text for kind in kinds for text in kind.items) == sorted(texts)
    for kind in kinds:
        assert tuple(kind.sentence(values) for values in kind.values) == kind.items
        kind.sentence()


@given(st.text())
def test_text_that_is_spelt_out_can_be_printed_and_encoded(text: str) -> None:
    shown = spell_out(text)
    assert shown.isprintable()
    shown.encode()
    assert text != shown or text.isprintable()


def test_a_few_names_and_how_many_more() -> None:
    assert enumerate_some(["a", "b"]) == "a, b"
    assert enumerate_some(list("abcde"), 2, "; ") == "a; b; and 3 more"


@pytest.mark.parametrize(("number", "short"), [(7, "7"), (94_300, "94.3 k"), (1_070_000_000, "1.07 G")])
def test_large_numbers_are_short(number: int, short: str) -> None:
    assert shorten_number(number) == short
