"""Read and write ONNX files, with their external data.

The data of a large model lies in files beside it. It is never loaded as a whole: tensors are memory-mapped when they
are read, and copied from file to file when the model is written. A tensor that was external stays external, in a file
that is named after the new model as the old one was named after the old, and after its content (`net.onnx.data`,
`net.folded.onnx-0a1b2c3d4e5f6789.data`).

So the data of a model never takes the place of other data. It is put in its place before the model (see
`bnfold.output`), and the data of a model that was replaced is removed after it: whenever the process is killed, the
old model with its data stands there, or the new one. What may then be left is data that no model refers to; the next
run that writes the same model removes it.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from bnfold.archive import name_stranger
from bnfold.errors import InputError
from bnfold.onnx.accept import accept
from bnfold.onnx.flatten import bodies
from bnfold.onnx.protos import FLOATS, check_external, map_bytes, width
from bnfold.output import replacing

__all__ = ["count_floats", "load_file", "save_file", "size", "stored_tensors", "writing"]

LIMIT = 2**31 - 1
"""A protobuf message is smaller than this."""

_HASH = re.compile(r"-[0-9a-f]{16}(?=\.[^.]*$|$)")
"""What bnfold puts into the name of a file of external data: the beginning of the SHA-256 of its content."""


def load_file(path: Path) -> onnx.ModelProto:
    """Load a model without its external data.

    Raises:
        InputError: the file is not there, or is no ONNX model.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    name_stranger(path)
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except Exception as error:
        raise InputError(f"{path} is no ONNX model, or not a whole one: {error}") from error
    check(model, str(path))
    for tensor in stored_tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            check_external(tensor, path.parent)
    return model


def check(model: onnx.ModelProto, label: str = "the model") -> None:
    """Refuse what parses but is no model.

    Raises:
        InputError: it has no graph, or no operator set, or see `bnfold.onnx.accept`.
    """
    if not model.HasField("graph") or not model.ir_version or not model.opset_import:
        raise InputError(f"{label} is no ONNX model: it has no graph, no IR version or no operator set")
    if not model.graph.output:
        raise InputError(f"{label} has no outputs")
    accept(model, label)


def stored_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor that a model stores: initializers and attributes, in bodies too."""
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop()
        yield from graph.initializer
        for node in graph.node:
            yield from (item.t for item in node.attribute if item.type == onnx.AttributeProto.TENSOR)
            waiting += bodies(node)


def count_floats(model: onnx.ModelProto) -> int:
    """How many floating-point numbers a model stores."""
    tensors = (tensor for tensor in stored_tensors(model) if tensor.data_type in FLOATS)
    return sum(math.prod(tensor.dims) for tensor in tensors)


def size(model: onnx.ModelProto) -> int:
    """About how many bytes the tensors of a model take in its file."""
    inside = (tensor for tensor in stored_tensors(model) if tensor.data_location != TensorProto.EXTERNAL)
    return sum(math.prod(tensor.dims) * width(tensor.data_type) for tensor in inside)


# ---------------------------------------------------------------- writing


@contextmanager
def writing(target: Path, source: Path | None = None) -> Iterator[Path]:
    """Yield a path to write a model to, which is put in its place at the end; its external data comes along.

    Afterwards the data that the replaced model had, and left-overs of killed runs, are removed: see `_find_outdated`.

    Raises:
        InputError: no file can be written there.
    """
    with replacing(target, lambda place, new: _find_outdated(place, new, source)) as path:
        yield path


def _find_outdated(place: Path, companions: Sequence[Path], source: Path | None) -> list[Path]:
    """Data that will belong to nobody once a model stands at `place`, with the companions that it refers to.

    It is the replaced model's own: it lies in the folder of that model or below, bears its name (`net.onnx.data` of
    `net.onnx`) or a hash by which bnfold names data, and no other model refers to it: none in its folder or the
    model's, and not `source`. Or it was named by bnfold as one of the new companions is, and no model refers to it.
    Where one of the models beside it cannot be read, nothing is.
    """
    mine = re.compile(rf"{re.escape(place.name)}\b|{re.escape(place.stem)}(?![A-Za-z0-9])|.*{_HASH.pattern}")
    before = _referred(place) if _mentions_data(place) else ()
    owned = [path for path in before or () if mine.match(path.name)]
    owned += [
        path
        for new in companions
        for path in Path(os.path.realpath(new.parent)).glob("*")
        if _HASH.search(path.name) and _HASH.sub("", path.name) == _HASH.sub("", new.name)
    ]
    found = {path for path in owned if path.is_file() and not path.is_symlink()}
    found -= {Path(os.path.realpath(path)) for path in companions}
    if not found:
        return []
    folders = {place.parent, *(path.parent for path in found)}
    models = {
        path for folder in folders for path in folder.glob("*") if path.suffix in (".onnx", place.suffix)
    }
    models |= set() if source is None else {Path(os.path.realpath(source))}
    referred = [_referred(path) for path in models - {place}]
    if any(paths is None for paths in referred):
        return []
    return sorted(found - {path for paths in referred for path in paths or ()})


def _referred(path: Path) -> set[Path] | None:
    """The files of external data that a model refers to, in its folder or below; None where it cannot be read."""
    if not path.is_file():
        return set()
    folder = Path(os.path.realpath(path)).parent
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
        locations = {_location(tensor) for tensor in stored_tensors(model)} - {""}
        paths = {Path(os.path.realpath(folder / location)) for location in locations}
    except (DecodeError, OSError, ValueError):
        return None
    return {path for path in paths if path.is_relative_to(folder)}


def _mentions_data(path: Path) -> bool:
    """Whether there is a file with the word without which no tensor of it can lie in another one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(b"location") >= 0


def save_file(
    model: onnx.ModelProto,
    path: Path,
    source: Path | None = None,
    external: Mapping[str, str] | None = None,
    late: Mapping[str, Callable[[], Any]] | None = None,
) -> None:
    """Write a model and its external data.

    Args:
        model: what to write. Where its tensors are external, their data is read from beside `source`; afterwards it
            refers to the data beside `path`.
        path: the model's file; companions are written beside it.
        source: the file that the model came from.
        external: new tensors by name, with the location whose place they take.
        late: what computes the bytes of those of them that the model does not hold, so that one is held at a time.
    """
    external = dict(external or {})
    names = _Locations(path, source)
    if size(model) >= LIMIT - (1 << 26):
        external = {
            t.name: external.get(t.name, f"{(source or path).name}.data") for t in _large(model)
        } | external
    files: dict[str, _Companion] = {}
    for tensor in stored_tensors(model):
        old = _location(tensor) or external.get(tensor.name, "")
        if not old:
            continue
        location = names(old)
        if location not in files:
            files[location] = _Companion(path.parent, location)
        given = late[tensor.name]().data if late and tensor.name in late else None
        files[location].append(tensor, None if source is None else source.parent, given)
    for companion in files.values():
        companion.finish()
    path.write_bytes(model.SerializeToString())


def _large(model: onnx.ModelProto) -> Iterator[TensorProto]:
    return (tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= 1024)


def _location(tensor: TensorProto) -> str:
    if tensor.data_location != TensorProto.EXTERNAL:
        return ""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


class _Locations:
    """How companions are named, without their hash: after the new model as they were after the old one."""

    def __init__(self, target: Path, source: Path | None) -> None:
        self.target, self.source = target, source or target

    def __call__(self, old: str) -> str:
        folder, name = Path(old).parent, _HASH.sub("", Path(old).name)
        if name.startswith(self.source.name):
            name = self.target.name + name.removeprefix(self.source.name)
        elif name.startswith(self.source.stem):
            name = self.target.stem + name.removeprefix(self.source.stem)
        elif self.target.name != self.source.name:
            name = f"{self.target.stem}.{name}"
        return name if ".." in folder.parts else (folder / name).as_posix()


class _Companion:
    """A file of external data that is being written, one tensor after the other; its name ends with its hash."""

    def __init__(self, folder: Path, location: str) -> None:
        from hashlib import sha256  # 5 ms, a twentieth of a small file's fold

        self.folder, self.location = folder, location
        self.path, self.size, self.tensors, self.hash = folder / location, 0, list[TensorProto](), sha256()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(b"")

    def append(self, tensor: TensorProto, folder: Path | None, given: memoryview | None = None) -> None:
        """Write the data of a tensor, its own or given, and let it say where, but for the name of the file."""
        if given is not None:
            data, step = given, 64
        elif tensor.data_location == TensorProto.EXTERNAL:
            path, start, length = check_external(tensor, folder)
            data = map_bytes(path, start, length).data
            step = 4096 if start % 4096 == 0 else 64 if start % 64 == 0 else 1
        else:
            data, step = memoryview(tensor.raw_data), 64
        with self.path.open("ab") as file:
            for part in (bytes(-self.size % step), data):
                offset, self.size = self.size, self.size + file.write(part)
                self.hash.update(part)
        checksum = [
            (e.key, e.value) for e in tensor.external_data if e.key not in ("location", "offset", "length")
        ]
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in [("offset", str(offset)), ("length", str(len(data))), *checksum]:
            tensor.external_data.add(key=key, value=value)
        self.tensors.append(tensor)

    def finish(self) -> None:
        """Give the file its name, and tell the tensors."""
        path = self.path.with_name(f"{self.path.stem}-{self.hash.hexdigest()[:16]}{self.path.suffix}")
        self.path.rename(path)
        for tensor in self.tensors:
            location = path.relative_to(self.folder).as_posix()
            tensor.external_data.insert(0, onnx.StringStringEntryProto(key="location", value=location))
