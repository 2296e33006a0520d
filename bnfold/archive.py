"""Read zip archives and pickles of unknown origin within limits, and without running anything.

Torch's archives are zips whose members are stored, not compressed: what they hold is no larger than the file. Whatever
claims otherwise (compression, members that overlap, one name twice) is refused before any of it is read. Pickles are
read by torch's restricted unpickler alone (`weights_only=True`), which knows tensors and plain values and calls
nothing else; what it gives may be nested `DEEPEST` levels.

Not covered: how much a pickle of allowed values costs to build, which is bounded by a multiple of the file's size.
"""

from __future__ import annotations

import io
import tarfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from bnfold.errors import InputError
from bnfold.exclusive import exclusive

__all__ = [
    "DEEPEST",
    "check_members",
    "is_onnx",
    "load_arrays",
    "load_plain",
    "name_stranger",
    "open_archive",
]

DEEPEST = 100
"""Levels of containers in containers; a checkpoint of an optimiser has about five."""

_MOST_MEMBERS = 1 << 20

_STRANGERS = {
    (0, b"version https://git-lfs"): "is a Git-LFS pointer; fetch the file itself with `git lfs pull`",
    (4, b"TFL3"): "is a TensorFlow Lite model; fold the model that it was converted from",
    (4, b"ORTM"): "is a model in onnxruntime's own format (.ort); fold the .onnx file that it was made of",
    (0, b"\x89HDF\r\n"): "is an HDF5 file (Keras?), which bnfold does not read",
    (0, b"\x1f\x8b"): "is compressed by gzip; unpack it first",
    (0, b"<!DOCTYPE"): "is an HTML page: the download gave a page instead of the file",
    (0, b"<html"): "is an HTML page: the download gave a page instead of the file",
}
"""Where a file has which bytes -> what it is, and the way out."""


def name_stranger(path: Path) -> None:
    """Raise `InputError` where the first bytes of a file say that it is something which no reader here reads."""
    with path.open("rb") as file:
        head = file.read(64)
    for (start, magic), sentence in _STRANGERS.items():
        if head[start:].startswith(magic):
            raise InputError(f"{path} {sentence}")


def is_onnx(path: Path) -> bool:
    """Whether a file is to be read as ONNX: by its suffix, else because it is nothing that torch writes."""
    if path.suffix in (".onnx", ".pt", ".pth", ".pt2", ".ckpt", ".safetensors", ".bin", ".tar"):
        return path.suffix == ".onnx"
    with path.open("rb") as file:
        return file.read(2) not in (b"PK", b"\x80\x02")


@contextmanager
def open_archive(source: Path | IO[bytes]) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive whose members are what torch writes.

    Raises:
        InputError: see `check_members`.
        zipfile.BadZipFile: it is no zip archive.
    """
    size = source.stat().st_size if isinstance(source, Path) else source.seek(0, io.SEEK_END)
    with zipfile.ZipFile(source) as archive:
        check_members(archive.infolist(), size)
        yield archive


def check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Raise `InputError` unless reading every member costs no more than the file's `size`."""
    if len(members) > _MOST_MEMBERS:
        raise InputError(f"it has {len(members):,} members, and {_MOST_MEMBERS:,} are the limit")
    for member in members:
        stored = member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
        if not stored or member.flag_bits & 1:
            raise InputError(
                f"its member {member.filename!r:.80} is compressed or encrypted, and torch stores"
            )
    if sum(member.file_size for member in members) > size:
        raise InputError("its members claim more bytes than the file has")
    if len({member.filename for member in members}) < len(members):
        raise InputError("two of its members have one name")


def load_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Load the arrays of an `.npz` file by name; what NumPy warns of (a header as Python 2 wrote it) is not said.

    Raises:
        InputError: it is none.
    """
    if not path.is_file():
        raise InputError(
            f"{path} is no .npz file: {'it is no regular file' if path.exists() else 'no such file'}"
        )
    try:
        with (
            exclusive(),
            warnings.catch_warnings(action="ignore"),
            np.load(path, allow_pickle=False) as archive,
        ):
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        raise InputError(f"{path} is no .npz file of arrays: {error}") from error


def load_plain(source: Path | bytes) -> Any:
    """Load what `torch.save` wrote: tensors and plain values, on the CPU.

    Raises:
        InputError: an archive that is none of torch's, or one of long ago, or containers nested deeper than `DEEPEST`.
        Exception: what torch raises at anything else in it, and at damage.
    """
    import torch

    _check_archive(io.BytesIO(source) if isinstance(source, bytes) else source)
    given = io.BytesIO(source) if isinstance(source, bytes) else source
    with exclusive(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = torch.load(given, map_location="cpu", weights_only=True)
    _check_nesting(value)
    return value


def _check_archive(source: Path | io.BytesIO) -> None:
    """Check the members of a zip archive, and nothing of an old torch file, which is none; refuse a tar archive.

    Torch, which refuses that too, makes a folder for what it holds first.
    """
    with source.open("rb") if isinstance(source, Path) else source as file:
        if file.read(4) == b"PK\x03\x04":
            with open_archive(file):
                return
        file.seek(0)
        try:
            tarfile.open(fileobj=file, mode="r:").close()
        except tarfile.TarError:
            return
    raise InputError(
        "it is a tar archive, as torch wrote them before 2017; load it with torch and save it again"
    )


def _check_nesting(value: Any) -> None:
    """Raise unless every path from a value to what it holds is at most `DEEPEST` containers long, and none is a ring.

    A container is looked at again only where it lies deeper than it was seen before.
    """
    depths: dict[int, int] = {}
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > DEEPEST:
            raise InputError(f"it holds containers nested more than {DEEPEST} deep")
        if depths.get(id(one), -1) < depth and (held := list(_held(one))):
            depths[id(one)] = depth
            waiting += [(child, depth + 1) for child in held]


def _held(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return (child for child in value.values() if isinstance(child, Mapping | list | tuple | set))
    if isinstance(value, list | tuple | set):
        return (child for child in value if isinstance(child, Mapping | list | tuple | set))
    return ()
