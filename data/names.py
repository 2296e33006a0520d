"""Lists of names: the one that ships with the project, the lecture's own in a cache, or any text file.

A list is UTF-8 text with one word a line. White space around a word is dropped, blank lines are skipped, the
order and any repetition are kept. Characters are taken as they stand: no folding of case, no Unicode
normalisation.

A source is `None` (the shipped list), the word `makemore` (the downloaded list; write `./makemore` for a file
of that name) or a path. The cache is the folder `$BNFOLD_CACHE`, or else `bnfold` in `$XDG_CACHE_HOME` or
`~/.cache`.
"""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

from bnfold.errors import InputError

__all__ = [
    "FEWEST_NAMES",
    "LONGEST_NAME",
    "MAKEMORE_SHA256",
    "is_makemore",
    "locate_cache",
    "locate_makemore",
    "read_names",
]

DEFAULT_LIST = Path(__file__).with_name("ssa-2016.txt")
MAKEMORE_SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"

LONGEST_NAME = 100
"""Characters; a longer line is taken for prose, not for a name."""

FEWEST_NAMES = 6
"""The shortest list of which an 80 / 10 / 10 split by word leaves no part empty."""


def read_names(source: str | Path | None = None) -> list[str]:
    """Return the words of a list, in the order of the file.

    Args:
        source: `None` for the shipped list, `"makemore"` for the downloaded one, or the path of a text file.

    Raises:
        InputError: no such file, unreadable, empty, not UTF-8 text, fewer than `FEWEST_NAMES` words, a word
            of more than `LONGEST_NAME` characters, or `makemore` without a sound download in the cache.
    """
    path = _locate(source)
    words = [line.strip() for line in _decode(_read(path), path).splitlines()]
    for number, word in enumerate(words, start=1):
        if len(word) > LONGEST_NAME:
            raise InputError(
                f"{path}, line {number} has a word of {len(word):,} characters; the longest allowed is "
                f"{LONGEST_NAME}: put one name on a line"
            )
    names = [word for word in words if word]
    if not names:
        raise InputError(f"{path} is empty; put one name on a line")
    if len(names) < FEWEST_NAMES:
        raise InputError(
            f"{path} holds {len(names)} word{'s' * (len(names) > 1)}, too few to split into train, dev and "
            f"test; give at least {FEWEST_NAMES}"
        )
    return names


def locate_makemore() -> Path:
    """Return where the lecture's list lies once `python -m data fetch makemore` has fetched it."""
    return locate_cache() / "makemore-names.txt"


def locate_cache() -> Path:
    """Return the folder of what was downloaded, whether it is there or not."""
    if folder := os.environ.get("BNFOLD_CACHE"):
        return Path(folder).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not shared.is_absolute():
        shared = Path.home() / ".cache"
    return shared / "bnfold"


def is_makemore(content: bytes) -> bool:
    """Whether `content` is the lecture's list, byte for byte."""
    return sha256(content).hexdigest() == MAKEMORE_SHA256


def _locate(source: str | Path | None) -> Path:
    if source is None:
        return DEFAULT_LIST
    if source != "makemore":
        return Path(source)
    path = locate_makemore()
    if not path.exists():
        raise InputError("the makemore list has not been downloaded; run: python -m data fetch makemore")
    if not is_makemore(_read(path)):
        raise InputError(f"{path} is not the makemore list any more; run: python -m data fetch makemore")
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name a text file with one name on a line") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _decode(content: bytes, path: Path) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start:,}); save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{path} is not UTF-8 text (it holds NUL bytes); save it as UTF-8")
    return text
