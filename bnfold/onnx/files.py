"""Read and write ONNX files, with their external data.

The data of a large model lies in files beside it. It is never loaded as a whole: tensors are memory-mapped when they
are read, and copied from file to file when the model is written. A tensor that was external stays external, in a file
that is named after the new model as the old one was named after the old (`net.onnx.data`, `net.folded.onnx.data`).

Everything is written beside the target first and then put in its place by renaming, companions before the model; if
that fails half way, what was there before is put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import TensorProto

from bnfold.archive import name_stranger
from bnfold.errors import InputError
from bnfold.onnx.constants import check_external, map_bytes, width
from bnfold.onnx.scope import bodies

__all__ = ["load_file", "save_file", "size", "stored_tensors", "writing"]

LIMIT = 2**31 - 1
"""A protobuf message is smaller than this."""


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
        InputError: it has no graph, or no operator set.
    """
    if not model.HasField("graph") or not model.ir_version or not model.opset_import:
        raise InputError(f"{label} is no ONNX model: it has no graph, no IR version or no operator set")
    if not model.graph.output:
        raise InputError(f"{label} has no outputs")


def stored_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor that a model stores: initializers and attributes, in bodies too."""
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop()
        yield from graph.initializer
        for node in graph.node:
            yield from (item.t for item in node.attribute if item.type == onnx.AttributeProto.TENSOR)
            waiting += bodies(node)


def size(model: onnx.ModelProto) -> int:
    """About how many bytes the tensors of a model take in its file."""
    inside = (tensor for tensor in stored_tensors(model) if tensor.data_location != TensorProto.EXTERNAL)
    return sum(math.prod(tensor.dims) * width(tensor.data_type) for tensor in inside)


# ---------------------------------------------------------------- writing


@contextmanager
def writing(target: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield a path to write a model to, and the function that puts it and its companions in their places.

    Raises:
        InputError: the target is a folder, or lies in none.
    """
    if target.is_dir():
        raise InputError(f"{target} is a folder; name a file to write")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is no folder; make it first, or write elsewhere")
    with TemporaryDirectory(prefix=".bnfold-", dir=target.parent) as folder:
        new = Path(folder) / "new"
        new.mkdir()
        yield new / target.name, lambda: _place(new, target, Path(folder) / "old")


def _place(new: Path, target: Path, old: Path) -> None:
    """Move everything in `new` beside the target, the model last; undo it all if one move fails."""
    files = sorted(
        (path for path in new.rglob("*") if path.is_file()), key=lambda path: path == new / target.name
    )
    moved: list[tuple[Path, Path | None]] = []
    try:
        for number, path in enumerate(files):
            final = target.parent / path.relative_to(new)
            final.parent.mkdir(parents=True, exist_ok=True)
            kept = old / str(number) if final.exists() and path != files[-1] else None
            if kept is not None:
                old.mkdir(exist_ok=True)
                final.replace(kept)
            moved.append((final, kept))
            path.replace(final)
    except BaseException:
        for final, kept in moved:
            if kept is not None:
                kept.replace(final)
        raise


def save_file(
    model: onnx.ModelProto, path: Path, source: Path | None = None, external: Mapping[str, str] | None = None
) -> None:
    """Write a model and its external data.

    Args:
        model: what to write. Where its tensors are external, their data is read from beside `source`; afterwards it
            refers to the data beside `path`.
        path: the model's file; companions are written beside it.
        source: the file that the model came from.
        external: new tensors by name, with the location whose place they take.
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
            files[location] = _Companion(path.parent / location)
        files[location].append(tensor, None if source is None else source.parent, location)
    path.write_bytes(model.SerializeToString())


def _large(model: onnx.ModelProto) -> Iterator[TensorProto]:
    return (tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= 1024)


def _location(tensor: TensorProto) -> str:
    if tensor.data_location != TensorProto.EXTERNAL:
        return ""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


class _Locations:
    """How companions are named: after the new model as they were after the old one."""

    def __init__(self, target: Path, source: Path | None) -> None:
        self.target, self.source = target, source or target

    def __call__(self, old: str) -> str:
        folder, name = Path(old).parent, Path(old).name
        if name.startswith(self.source.name):
            name = self.target.name + name.removeprefix(self.source.name)
        elif name.startswith(self.source.stem):
            name = self.target.stem + name.removeprefix(self.source.stem)
        elif self.target.name != self.source.name:
            name = f"{self.target.stem}.{name}"
        return (folder / name).as_posix()


class _Companion:
    """A file of external data that is being written, one tensor after the other."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.size = path, 0
        path.write_bytes(b"")

    def append(self, tensor: TensorProto, folder: Path | None, location: str) -> None:
        """Write the data of a tensor and let the tensor say where."""
        if tensor.data_location == TensorProto.EXTERNAL:
            path, start, length = check_external(tensor, folder)
            data = map_bytes(path, start, length).data
            step = 4096 if start % 4096 == 0 else 64 if start % 64 == 0 else 1
        else:
            data, step = memoryview(tensor.raw_data), 64
        with self.path.open("ab") as file:
            self.size += file.write(bytes(-self.size % step))
            offset = self.size
            self.size += file.write(data)
        checksum = [
            (e.key, e.value) for e in tensor.external_data if e.key not in ("location", "offset", "length")
        ]
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        tensor.data_location = TensorProto.EXTERNAL
        entries = [("location", location), ("offset", str(offset)), ("length", str(len(data))), *checksum]
        for key, value in entries:
            tensor.external_data.add(key=key, value=value)
