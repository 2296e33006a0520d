"""The self-describing, code-free checkpoint of a sequential model.

A checkpoint is one plain dict in the form that `torch.save` gives it; `torch.load(path, weights_only=True)` reads it
anywhere:

    format        "bnfold.checkpoint"
    version       1
    architecture  the layers in running order, each
                  {"name": "linear1", "class": "Linear", "arguments": {"in_features": 30, ...}}
    input         {"shape": [3], "dtype": "int64", "low": 0, "high": 27}   one example, no batch axis
    vocabulary    [".", "a", ...]   the character of every index; empty where the inputs are no characters
    state         {"linear1.weight": tensor, ...}   the state dict, on the CPU, one storage per tensor
    record        how it was trained: plain values
    versions      {"bnfold": ..., "python": ..., "torch": ...}
    folded        the record of a fold (verdicts, hash of the source); None before one

An integer input has an alphabet, `low` to `high` (exclusive), so that all its inputs can be counted and tried; other
inputs have None for both. The same checkpoint always gives the same bytes: no time, path or host is kept.

`load` needs no code but torch's. A layer is built only if its class and every argument stand in the table of
`bnfold.layers`; it is built without memory for its tensors, must fit the layer before it (`bnfold.shapes`), and is
then given the tensors of the file, which must fit it. Archives with compressed members are refused, since a few bytes
of them may unpack to any number. So an odd file ends in an `InputError` of one line and never in code or memory of its
choosing.

Not covered: nested and branching models, layers that are not in the table, tied weights (saved once for each name),
hooks (not saved), optimiser state.
"""

from __future__ import annotations

import math
import platform
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnfold import __version__
from bnfold.archive import load_plain, name_stranger
from bnfold.errors import InputError
from bnfold.layers import build_layer, describe_layer, is_integer, is_sizes
from bnfold.output import replacing
from bnfold.shapes import Misfit, Shape, shape_after, takes_integers

__all__ = [
    "FORMAT",
    "Checkpoint",
    "InputDomain",
    "describe",
    "drop_identities",
    "identify",
    "is_checkpoint",
    "load",
    "refuse_torchscript",
    "save",
]

FORMAT = "bnfold.checkpoint"
VERSION = 1

Kind = Literal["checkpoint", "torch archive", "exported program", "torchscript", "zip", "pickle", "other"]

_DTYPES = {
    name: getattr(torch, name)
    for name in ("int64", "int32", "uint8", "bool", "float16", "bfloat16", "float32", "float64")
}
_STATE_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64}
_LARGEST_LISTING = 2**31
_LARGEST_RECORD = 1_000_000
_MOST_EXAMPLES = 1_000_000


@dataclass(frozen=True)
class InputDomain:
    """What one example may be: shape without the batch axis, dtype and, for integers, the alphabet."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: int | None = None
    high: int | None = None

    def __post_init__(self) -> None:
        """Raise `InputError` for a shape, dtype or alphabet that no tensor can have."""
        if not (is_sizes(self.shape) and isinstance(self.shape, tuple)):
            raise InputError(f"input shape {self.shape!r} is no tuple of sizes")
        if not isinstance(self.dtype, str) or self.dtype not in _DTYPES:
            raise InputError(f"input dtype {self.dtype!r} is none of {', '.join(_DTYPES)}")
        if self.low is None and self.high is None:
            return
        if not (is_integer(self.low) and is_integer(self.high)) or _DTYPES[self.dtype].is_floating_point:
            raise InputError(
                f"an alphabet from {self.low!r} to {self.high!r} needs integers and an integer dtype"
            )
        if not self.low < self.high:  # type: ignore[operator]
            raise InputError(f"the alphabet from {self.low} to {self.high} (exclusive) is empty")

    @property
    def count(self) -> int | None:
        """The number of different examples; None where it has no alphabet or no 64 bits can count them."""
        if self.low is None or self.high is None:
            return None
        base, size = self.high - self.low, math.prod(self.shape)
        return base**size if size * math.log2(base) < 63 else None

    def every(self) -> Tensor:
        """Return every possible example, `(count, *shape)`, the last position running fastest."""
        count, size = self.count, math.prod(self.shape)
        if count is None or self.low is None or self.high is None:
            raise InputError(
                f"{self.dtype} inputs of shape {list(self.shape)} cannot be counted; sample some instead"
            )
        if count * size > _LARGEST_LISTING:
            raise InputError(f"{count} possible inputs are too many to list; sample some instead")
        base = self.high - self.low
        places = base ** torch.arange(size - 1, -1, -1)
        digits = torch.arange(count)[:, None] // places % base + self.low
        return digits.reshape(count, *self.shape).to(_DTYPES[self.dtype])

    def examples(self, sampled: int = 64) -> tuple[Tensor, bool]:
        """Return inputs to compare nets on, and whether they are all there are: a million at most, else a sample."""
        exhaustive = self.count is not None and self.count <= _MOST_EXAMPLES
        return (self.every() if exhaustive else self.sample(sampled)), exhaustive

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Draw `(count, *shape)` examples: uniform over the alphabet, or else standard normal."""
        generator, size = torch.Generator().manual_seed(seed), (count, *self.shape)
        if self.low is not None and self.high is not None:
            return torch.randint(self.low, self.high, size, generator=generator).to(_DTYPES[self.dtype])
        return torch.randn(size, generator=generator, dtype=torch.float64).to(_DTYPES[self.dtype])


@dataclass(frozen=True)
class Checkpoint:
    """A model with all that is needed to use it: what `save` writes and `load` returns."""

    model: nn.Sequential
    input: InputDomain
    vocabulary: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    folded: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: _current_versions())


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in one step; an existing file survives any failure.

    Raises:
        InputError: the model has a layer that `load` could not build, a record holds more than plain values,
            or the file cannot be written there.
    """
    payload = _pack(checkpoint)
    _unpack(payload)
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(payload, file)


def load(path: str | Path) -> Checkpoint:
    """Rebuild a checkpoint from its file, the model in eval mode on the CPU.

    Raises:
        InputError: there is no such file, it is something else, or its tensors do not fit its net.
    """
    _refuse_strangers(path)
    try:
        return _unpack(_read(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read(path: str | Path) -> Any:
    try:
        return load_plain(Path(path))
    except InputError:
        raise
    except Exception as error:  # the restricted unpickler fails in as many ways as a file can be damaged
        raise InputError(
            "it is damaged or holds more than tensors and plain values; save it again"
        ) from error


def identify(path: str | Path) -> Kind:
    """Tell from a file's outside what it is, without unpickling and without trust.

    Raises:
        InputError: there is no such file, or it is a folder or unreadable.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if head != b"PK\x03\x04":
            return "pickle" if head[:1] == b"\x80" else "other"
        with zipfile.ZipFile(path) as archive:
            return _identify_archive(archive)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; name the checkpoint inside it") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as error:
        raise InputError(f"{path} is a damaged archive, perhaps cut short; save or copy it again") from error


def is_checkpoint(path: str | Path) -> bool:
    """Tell whether a file claims to be such a checkpoint; `load` then says whether it is a sound one."""
    return identify(path) == "checkpoint"


def describe(model: nn.Sequential) -> list[dict[str, Any]]:
    """Return the architecture as plain values: name, torch.nn class and arguments of each layer, in order.

    Raises:
        InputError: the model is no flat `nn.Sequential` of layers in the table; the message names the layer.
    """
    if type(model) is not nn.Sequential:
        raise InputError(f"a checkpoint holds an nn.Sequential, and this is a {type(model).__name__}")
    return [describe_layer(name, layer) for name, layer in model._modules.items() if layer is not None]


def drop_identities(model: nn.Sequential) -> nn.Sequential:
    """Return the same layers under the same names, without the `nn.Identity` that a fold leaves behind."""
    kept = nn.Sequential()
    for name, layer in model._modules.items():
        if type(layer) is not nn.Identity:
            kept.add_module(name, layer)
    return kept.train(model.training)


def _current_versions() -> dict[str, str]:
    return {"bnfold": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}


def _plain(value: Any) -> Any:
    """Return tuples as lists and mappings as dicts; anything else as it is, for `_check_plain` to judge."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _check_plain(where: str, value: Any) -> None:
    """Raise unless `value` is a finite tree of None, bool, int, float, str, list and dict keyed by str."""
    waiting, seen = [value], 0
    while waiting:
        one, seen = waiting.pop(), seen + 1
        if seen > _LARGEST_RECORD:
            raise InputError(f"`{where}` holds more than {_LARGEST_RECORD} values")
        if type(one) is list:
            waiting.extend(one)
        elif type(one) is dict and all(type(key) is str for key in one):
            waiting.extend(one.values())
        elif one is not None and type(one) not in (bool, int, float, str):
            raise InputError(f"`{where}` holds a {type(one).__name__}, which is no plain value")


def _pack(checkpoint: Checkpoint) -> dict[str, Any]:
    domain = checkpoint.input
    return {
        "format": FORMAT,
        "version": VERSION,
        "architecture": describe(checkpoint.model),
        "input": {"shape": list(domain.shape), "dtype": domain.dtype, "low": domain.low, "high": domain.high},
        "vocabulary": list(checkpoint.vocabulary),
        "state": {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in checkpoint.model.state_dict().items()
        },
        "record": _plain(checkpoint.record),
        "versions": _plain(checkpoint.versions),
        "folded": _plain(checkpoint.folded),
    }


def _unpack(payload: Any) -> Checkpoint:
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise InputError("is a torch archive but no checkpoint of bnfold's; make one with `python -m train`")
    version = payload.get("version")
    if not is_integer(version) or version != VERSION:
        raise InputError(f"has format version {version!r:.20}, and this bnfold reads {VERSION}")
    for key, kind in _SECTIONS.items():
        if not isinstance(payload.get(key), kind):
            raise InputError(f"has no readable `{key}`")
        if key != "state":
            _check_plain(key, payload.get(key))
    domain = _build_domain(payload["input"])
    vocabulary = _check_vocabulary(payload["vocabulary"], domain)
    model = _build(payload["architecture"], domain)
    _fill(model, payload["state"])
    folded = payload.get("folded")
    return Checkpoint(model.eval(), domain, vocabulary, payload["record"], folded, payload["versions"])


_SECTIONS: dict[str, Any] = {
    "architecture": list,
    "input": dict,
    "vocabulary": list,
    "state": dict,
    "record": dict,
    "versions": dict,
    "folded": dict | None,
}


def _build_domain(entry: dict[str, Any]) -> InputDomain:
    if set(entry) != {"shape", "dtype", "low", "high"} or not isinstance(entry["shape"], list):
        raise InputError("`input` needs a shape, a dtype, low and high")
    return InputDomain(tuple(entry["shape"]), entry["dtype"], entry["low"], entry["high"])


def _check_vocabulary(characters: list[Any], domain: InputDomain) -> tuple[str, ...]:
    if not all(isinstance(one, str) for one in characters) or len(set(characters)) != len(characters):
        raise InputError("`vocabulary` must be a list of different characters")
    if characters and (domain.low, domain.high) != (0, len(characters)):
        raise InputError(
            f"`vocabulary` has {len(characters)} characters, the input {domain.low} to {domain.high}"
        )
    return tuple(characters)


def _build(architecture: list[Any], domain: InputDomain) -> nn.Sequential:
    """Return the layers without storage, in the order in which each fits the one before."""
    model = nn.Sequential()
    for entry in architecture:
        _add_layer(model, *build_layer(entry))
    shape, whole = (2, *domain.shape), domain.low is not None
    for name, layer in model.eval().named_children():
        if isinstance(layer, nn.Embedding):
            _check_rows(name, layer.num_embeddings, domain)
        shape = _pass(name, layer, shape, whole)
        whole = whole and not isinstance(layer, nn.Embedding)
    return model


def _pass(name: str, layer: nn.Module, shape: Shape, whole: bool) -> Shape:
    """The shape after a layer; `whole` says whether the numbers before it are integers."""
    fits = takes_integers(layer) if whole else not isinstance(layer, nn.Embedding)
    try:
        if fits:
            return shape_after(layer, shape)
    except Misfit:
        pass
    kind = "integers" if whole else "numbers"
    raise InputError(f"layer `{name}` does not fit its input of shape {list(shape)[1:]} ({kind})")


def _check_rows(name: str, rows: int, domain: InputDomain) -> None:
    if domain.low is None or domain.high is None or domain.low < 0 or domain.high > rows:
        raise InputError(f"layer `{name}` has {rows} rows, the input runs from {domain.low} to {domain.high}")


def _add_layer(model: nn.Sequential, name: str, layer: nn.Module) -> None:
    if name in model._modules:
        raise InputError(f"layer `{name:.80}` stands twice in `architecture`")
    try:
        model.add_module(name, layer)
    except KeyError as error:
        raise InputError(f"no layer can have the name {name!r:.80}") from error


def _fill(model: nn.Sequential, state: dict[Any, Any]) -> None:
    """Give the layers their tensors; raise unless names, shapes and kinds of dtype are the layers' own."""
    wanted = model.state_dict()
    _compare_names(wanted, state)
    for name, template in wanted.items():
        tensor = state[name]
        if (
            not isinstance(tensor, Tensor)
            or tensor.layout != torch.strided
            or tensor.dtype not in _STATE_DTYPES
        ):
            raise InputError(f"`{name}` is no tensor of numbers that a layer can hold")
        if tensor.shape != template.shape:
            raise InputError(
                f"`{name}` has shape {list(tensor.shape)}, its layer needs {list(template.shape)}"
            )
        if tensor.is_floating_point() != template.is_floating_point() or not tensor.is_contiguous():
            raise InputError(f"`{name}` is stored as {tensor.dtype} in a form that its layer cannot use")
    model.load_state_dict(state, assign=True)


def _compare_names(wanted: Iterable[Any], given: Iterable[Any]) -> None:
    missing, surplus = set(wanted) - set(given), set(given) - set(wanted)
    if missing:
        raise InputError(f"`state` lacks `{min(missing)}`")
    if surplus:
        raise InputError(f"`state` has {min(map(repr, surplus)):.80}, which belongs to no layer")


def _identify_archive(archive: zipfile.ZipFile) -> Kind:
    members = {name.partition("/")[2]: name for name in archive.namelist()}
    if "archive_format" in members or "serialized_exported_program.json" in archive.namelist():
        return "exported program"
    if "constants.pkl" in members:
        return "torchscript"
    if "data.pkl" not in members:
        return "zip"
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        return "zip"
    claimed = FORMAT.encode() in archive.read(members["data.pkl"])
    return "checkpoint" if claimed else "torch archive"


def refuse_torchscript(path: str | Path) -> None:
    """Refuse an archive of compiled code, with the ways out.

    Raises:
        InputError: it is one.
    """
    if identify(path) == "torchscript":
        raise InputError(f"{path} {_STRANGERS['torchscript']}")


def _refuse_strangers(path: str | Path) -> None:
    kind = identify(path)
    if kind != "checkpoint":
        name_stranger(Path(path))
        raise InputError(f"{path} {_STRANGERS[kind]}")


_STRANGERS: dict[Kind, str] = {
    "torch archive": "is a torch archive (a state dict?) that does not describe its net; `bnfold fold` reads it with "
    "--model package.module:factory --input 1x3x224x224",
    "exported program": "is an exported program (.pt2); fold the module before exporting it",
    "torchscript": "is a TorchScript archive, which holds code and is not loaded; if you trust it, fold the ONNX file "
    "that torch.onnx.export(torch.jit.load(FILE), inputs, 'model.onnx', dynamo=False) writes, or save its state_dict() "
    "and fold that with --model package.module:factory",
    "zip": "is a zip archive but none that torch.save writes; make a checkpoint with `python -m train`",
    "pickle": "is a bare pickle, which can run code when read; make a checkpoint with `python -m train`",
    "other": "is no checkpoint; make one with `python -m train`",
}
