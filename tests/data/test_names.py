"""A list is read as it stands, or refused in one line that names the file, the fact and the way out."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from bnfold.errors import InputError
from data import FEWEST_NAMES, LONGEST_NAME, names, read_names

SIX = ["emma", "olivia", "ava", "isabella", "sophia", "charlotte"]


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "names.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, in which a list of six stands for the makemore list."""
    content = "\n".join(SIX).encode()
    monkeypatch.setenv("BNFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(names, "MAKEMORE_SHA256", sha256(content).hexdigest())
    return tmp_path / "makemore-names.txt", content


def test_the_default_list_is_the_one_whose_source_is_noted_beside_it():
    shipped = Path(names.__file__).with_name("ssa-2016.txt")
    assert sha256(shipped.read_bytes()).hexdigest() in shipped.with_name("README.md").read_text()
    assert read_names(None) == shipped.read_text().split()
    assert len(read_names()) == 32_868
    assert read_names()[:3] == ["emma", "olivia", "ava"]


def test_the_lectures_list_has_its_32033_names(makemore):
    found = read_names(makemore)
    assert (len(found), found[0], found[-1]) == (32_033, "emma", "zzyzx")
    assert names.is_makemore(makemore.read_bytes())


def test_order_repetition_case_and_inner_spaces_are_kept(write):
    words = ["Zoë", "anna", "Anna", "mary ann", "anna", "李娜"]
    assert read_names(write("\n".join(words))) == words
    assert read_names(str(write("\n".join(words)))) == words


@pytest.mark.parametrize(
    "text",
    ["{}\n", "{}", "\n\n{}\n \n\t\n", "\ufeff{}"],
    ids=["newline at the end", "none at the end", "blank lines", "byte order mark"],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n", "  \n\t"], ids=repr)
def test_blank_lines_and_white_space_around_a_word_do_not_count(write, text, newline):
    assert read_names(write(text.format(newline.join(SIX)))) == SIX


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names.txt is empty; put one name on a line"),
        (" \n\n\t\n", "names.txt is empty; put one name on a line"),
        ("emma\n", "names.txt holds 1 word, too few to split .* at least 6"),
        ("\n".join(SIX[:5]), "names.txt holds 5 words, too few to split .* at least 6"),
        (b"emma\nzo\xeb\nava\n", r"names.txt is not UTF-8 text \(byte 7\); save it as UTF-8"),
        ("\n".join(SIX).encode("utf-16"), "names.txt is not UTF-8 text .byte 0"),
        ("\n".join(SIX).encode("utf-16-le"), "names.txt is not UTF-8 text .*NUL"),
        ("\n".join([*SIX, "", "x" * 101]), "line 8 has a word of 101 characters; the longest allowed is 100"),
        ("once upon a time " * 60, "line 1 has a word of 1,019 characters"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_with_its_name_and_the_way_out(write, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_names(write(content))
    assert "\n" not in str(caught.value)


def test_the_limits_are_inclusive(write):
    longest = ["é" * LONGEST_NAME] * FEWEST_NAMES
    assert read_names(write("\n".join(longest))) == longest


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.txt", "absent.txt: no such file"),
        (".", "cannot be read: Is a directory"),
        ("a\0b", "cannot be read"),
    ],
)
def test_a_path_that_cannot_be_read_is_named(source, message):
    with pytest.raises(InputError, match=message):
        read_names(source)


def test_makemore_is_read_from_the_cache_once_it_is_there(cache, monkeypatch):
    path, content = cache
    with pytest.raises(InputError, match="has not been downloaded; run: python -m data fetch makemore"):
        read_names("makemore")
    path.write_bytes(content)
    assert read_names("makemore") == SIX
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match="not the makemore list any more; run: python -m data fetch"):
        read_names("makemore")


def test_a_file_called_makemore_is_reached_by_a_path(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("makemore").write_text("\n".join(reversed(SIX)))
    assert read_names("./makemore") == SIX[::-1]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"BNFOLD_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b/makemore-names.txt"),
        ({"BNFOLD_CACHE": "~/b"}, "/u/ann/b/makemore-names.txt"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/bnfold/makemore-names.txt"),
        ({"XDG_CACHE_HOME": "relative"}, "/u/ann/.cache/bnfold/makemore-names.txt"),
        ({}, "/u/ann/.cache/bnfold/makemore-names.txt"),
    ],
)
def test_the_cache_is_where_the_environment_says(variables, place, monkeypatch):
    for name in ("BNFOLD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/u/ann"} | variables).items():
        monkeypatch.setenv(name, value)
    assert names.locate_makemore() == Path(place)
