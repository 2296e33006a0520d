"""Load an exported program (`.pt2`) of unknown origin: no byte of the file is executed.

`torch.export.load` trusts its file. It unpickles sample inputs, weights, constants and objects without restriction,
opens compiled libraries, gives symbolic sizes to `eval`, guards to `exec`, imports the modules that a container's type
names, looks operators up by `getattr` from `torch` onwards (`torch.os.system`), and writes names into the Python source
that the program is run as. So the file is read here, in three parts, and torch gets objects that were checked:

    tensors   raw bytes with a type, sizes and strides; pickled ones by the restricted unpickler (`bnfold.archive`)
    objects   of the exporter's own, compiled libraries: refused
    program   JSON. Every string in it is one of the kinds in `_STRINGS`, by the key that it stands under, and a plain
              name under any other key. Metadata and guards are dropped: neither changes what is computed

An operator is one of ATen's (or of the few other libraries in `_LIBRARIES`) that computes with tensors and names no
file. An expression is a tree of calls of `_FUNCTIONS` on symbols and numbers, which is parsed, never evaluated, before
torch sees it. A container is one of Python's own. Both the present format and that of torch 2.7 are read.

Not covered: what an allowed operator costs. Folding runs the program, and a program may ask for all time and memory.
"""

from __future__ import annotations

import ast
import json
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.serde import schema
from torch._export.serde.serialize import (
    ExportedProgramDeserializer,
    _dict_to_dataclass,
    deserialize_device,
    deserialize_scalar_type,
)
from torch.export import ExportedProgram

from bnfold.archive import DEEPEST, load_plain, open_archive
from bnfold.errors import InputError

__all__ = ["load_program"]

_LARGEST_TEXT = 1 << 28
"""Bytes of JSON; the program of a net of 10,000 nodes has about 2^24."""

_LARGEST_EXPANDED = 1 << 24
"""Elements of a tensor that has more of them than its bytes hold, being a view that repeats some."""


def load_program(path: Path) -> ExportedProgram:
    """Load an exported program; without example inputs where those are more than tensors and plain values.

    Raises:
        InputError: the file is damaged, or asks for something that only a trusted file may ask for.
    """
    try:
        with open_archive(path) as archive:
            parts = _read_parts(_Members(archive))
        program = _dict_to_dataclass(schema.ExportedProgram, parts.program)  # type: ignore[no-untyped-call]
        return ExportedProgramDeserializer().deserialize(
            program, parts.state, parts.constants, parts.examples
        )
    except RecursionError as error:
        raise InputError(f"{path} cannot be read as an exported program: it is nested too deeply") from error
    except Exception as error:  # torch fails in as many ways as a program can be damaged
        raise InputError(f"{path} cannot be read as an exported program: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """The one line of an error that says most: torch ends its own with the traceback of the cause."""
    if isinstance(error, KeyError):
        return f"nothing in it is called {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return f"{lines[-1] if 'Original exception Traceback' in str(error) else lines[0]:.300}"


# ---------------------------------------------------------------- the parts of the archive


@dataclass(frozen=True)
class _Parts:
    """What an archive holds, checked: the program as plain values, and tensors by name."""

    program: Any
    state: dict[str, Any]
    constants: dict[str, Any]
    examples: Any


class _Members:
    """The members of an archive, by their names below the one folder that holds them all."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive, names = archive, archive.namelist()
        folders = {name.partition("/")[0] for name in names}
        root = f"{folders.pop()}/" if len(folders) == 1 and "archive_format" not in names else ""
        self.names = {name.removeprefix(root): name for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str) -> bytes:
        if name not in self:
            raise InputError(f"it has no {name}")
        return self.archive.read(self.names[name])

    def read_storage(self, name: str) -> Tensor:
        """The bytes of a member as a tensor of bytes."""
        if name not in self:
            raise InputError(f"it has no {name}")
        content = bytearray(self.archive.getinfo(self.names[name]).file_size)
        with self.archive.open(self.names[name]) as file:
            file.readinto(memoryview(content))  # type: ignore[attr-defined]
        return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)

    def read_json(self, name: str) -> Any:
        content = self.read(name)
        if len(content) > _LARGEST_TEXT:
            raise InputError(f"{name} has {len(content):,} bytes, and {_LARGEST_TEXT:,} are the limit")
        return _clean(json.loads(content))


def _read_parts(members: _Members) -> _Parts:
    if any(name.startswith("data/aotinductor/") for name in members.names):
        raise InputError("it holds a compiled library, which is never run; export the program alone")
    if "serialized_exported_program.json" in members:
        return _Parts(
            members.read_json("serialized_exported_program.json"),
            _plain_tensors(members.read("serialized_state_dict.pt")),
            _plain_tensors(members.read("serialized_constants.pt")),
            _examples(members, "serialized_example_inputs.pt"),
        )
    return _Parts(
        members.read_json("models/model.json"),
        _read_tensors(members, "data/weights", "model_weights_config.json"),
        _read_tensors(members, "data/constants", "model_constants_config.json"),
        _examples(members, "data/sample_inputs/model.pt"),
    )


def _examples(members: _Members, name: str) -> Any:
    """The inputs that the program was exported with: `(args, kwargs)`, or None where they are not plain."""
    try:
        value = load_plain(members.read(name))
    except Exception:  # noqa: BLE001  whatever the restricted unpickler says of what it does not know
        return None
    shaped = isinstance(value, tuple) and len(value) == 2
    return value if shaped and isinstance(value[0], tuple) and isinstance(value[1], dict) else None


def _plain_tensors(content: bytes) -> dict[str, Any]:
    """A dict of tensors by name, as `torch.save` writes it."""
    value = load_plain(content) if content else {}
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise InputError("its weights or constants are more than tensors; bnfold loads no objects")
    for name in value:
        _check_path(name)
    return value


def _read_tensors(members: _Members, folder: str, listing: str) -> dict[str, Any]:
    """The tensors of a folder by name; those that share bytes in the file share them again."""
    if f"{folder}/model.pt" in members:
        return _plain_tensors(members.read(f"{folder}/model.pt"))
    entries = members.read_json(f"{folder}/{listing}")
    listed = _dict_to_dataclass(schema.PayloadConfig, entries)  # type: ignore[no-untyped-call]
    storages: dict[str, Tensor] = {}
    return {
        name: _read_tensor(members, folder, name, entry, storages) for name, entry in listed.config.items()
    }


def _read_tensor(
    members: _Members, folder: str, name: str, entry: Any, storages: dict[str, Tensor]
) -> Tensor:
    file, meta = f"{folder}/{entry.path_name}", entry.tensor_meta
    if not entry.path_name.startswith(("weight_", "tensor_")) or (meta is None and not entry.use_pickle):
        raise InputError(
            f"`{name}` is an object, which would have to be unpickled; bnfold loads tensors only"
        )
    if entry.use_pickle:
        return _read_pickled(members, file, name)
    if file not in storages:
        storages[file] = members.read_storage(file)
    dtype = deserialize_scalar_type(meta.dtype)
    tensor = _view(name, storages[file].view(dtype), meta).to(deserialize_device(meta.device))
    if not entry.is_param:
        return tensor
    return nn.Parameter(tensor, requires_grad=bool(meta.requires_grad) and tensor.is_floating_point())


def _read_pickled(members: _Members, file: str, name: str) -> Tensor:
    try:
        tensor: Tensor = load_plain(members.read(file))
    except Exception as error:
        raise InputError(
            f"`{name}` is pickled, and holds more than a tensor; bnfold unpickles no objects"
        ) from error
    if type(tensor) not in (Tensor, nn.Parameter):
        raise InputError(f"`{name}` is pickled, and is a {type(tensor).__name__}, not a tensor")
    return tensor


def _view(name: str, storage: Tensor, meta: Any) -> Tensor:
    """The tensor that sizes, strides and an offset cut out of a flat one; torch refuses what lies outside."""
    sizes, strides = ([size.as_int for size in sizes] for sizes in (meta.sizes, meta.strides))
    if not all(type(size) is int and size >= 0 for size in (*sizes, *strides)):
        raise InputError(f"`{name}` has sizes or strides that are no sizes")
    if math.prod(sizes) > max(storage.numel(), _LARGEST_EXPANDED if storage.numel() else 0):
        raise InputError(
            f"`{name}` claims {math.prod(sizes):,} elements, and its file holds {storage.numel():,}"
        )
    return torch.as_strided(storage, sizes, strides, meta.storage_offset.as_int)


# ---------------------------------------------------------------- the strings of the program

_NAME = re.compile(r"(?:[^\W\d]\w*)?")
_PATH = re.compile(r"(?!(?:.*\.)?__\w*__(?:\.|$))[\w.@/: +-]*")
_SYMBOL = re.compile(r"[a-z]+\d{1,6}")
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)(?:\.(\w+))?")

_LIBRARIES = frozenset({"aten", "prims", "quantized_decomposed", "torchvision"})
"""Whose operators a program may call: torch's others reach files, the profiler, other processes, compiled code."""

_WITHOUT_TENSORS = frozenset({"_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"})
"""The operators that neither take nor give a tensor and do nothing but check a size."""

_HIGHER_ORDER = frozenset({
    "associative_scan", "cond", "invoke_subgraph", "map_impl", "scan", "while_loop", "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
})  # fmt: skip

_SCALAR = frozenset({
    *(f"_operator.{name}" for name in (
        "eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv", "mod", "pow", "truediv",
        "and_", "or_", "lshift", "rshift", "getitem",
    )),
    *(f"math.{name}" for name in ("trunc", "ceil", "floor", "sqrt")),
    *(f"torch.{name}" for name in (
        "sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sqrt", "sym_sum", "_sym_sqrt",
    )),
})  # fmt: skip
"""Functions of sizes."""

_FUNCTIONS = frozenset({
    "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Equality", "Float", "FloatTrueDiv", "FloorDiv", "FloorToInt",
    "GreaterThan", "Identity", "IntTrueDiv", "Integer", "LessThan", "Max", "Min", "Mod", "ModularIndexing", "Mul",
    "Not", "Or", "Pow", "PythonMod", "Rational", "RoundToInt", "StrictGreaterThan", "StrictLessThan", "Symbol",
    "ToFloat", "TruncToFloat", "TruncToInt", "Unequality", "Where", "Eq", "Ne", "Ge", "Gt", "Le", "Lt",
})  # fmt: skip
_ASSUMPTIONS = frozenset(
    {"positive", "nonnegative", "integer", "real", "zero", "nonzero", "finite", "precision"}
)
_LARGEST_EXPRESSION = 2000
_LARGEST_POWER = 8

_PLAIN_TYPES = frozenset({
    "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict",
    "torch.fx.immutable_collections.immutable_list", "torch.fx.immutable_collections.immutable_dict",
})  # fmt: skip


def _clean(value: Any, key: str = "") -> Any:
    """The same JSON without metadata and guards; raise unless every string in it is of its kind."""
    if isinstance(value, dict):
        for name in value:
            _check_path(name)
        dropped: dict[str, Any] = {"metadata": {}, "guards_code": []}
        return {
            name: dropped[name] if name in dropped else _check_ranges(name, _clean(one, name))
            for name, one in value.items()
        }
    if isinstance(value, list):
        return [_clean(one, key) for one in value]
    if isinstance(value, str):
        _STRINGS.get(key, _check_name)(value)
    return value


def _check_ranges(key: str, value: Any) -> Any:
    """Refuse ranges of what are no symbols: torch counts up to the number in a symbol's name."""
    if key == "range_constraints":
        for name in value:
            _match(_SYMBOL, name, "is no symbol of a size")
    return value


def _match(pattern: re.Pattern[str], text: str, fault: str) -> re.Match[str]:
    found = pattern.fullmatch(text)
    if found is None:
        raise InputError(f"{text!r:.80} {fault}")
    return found


def _check_name(text: str) -> None:
    _match(_NAME, text, "is no plain name")


def _check_path(text: str) -> None:
    _match(_PATH, text, "is no name of a parameter or module")


def _check_version(text: str) -> None:
    _match(re.compile(r"[\w.+<=-]*"), text, "is no version")


def _check_number(text: str) -> None:
    _match(re.compile(r"-?Infinity|NaN"), text, "is no number")


def _check_operator(text: str) -> None:
    """Raise unless a name is that of an operator that computes with tensors or sizes, and does nothing else."""
    if text in _SCALAR:
        return
    library, name, overload = _match(_OPERATOR, text, "is no operator that a program may call").groups()
    if library == "higher_order" and name in _HIGHER_ORDER and overload is None:
        return
    if library not in _LIBRARIES or overload is None:
        raise InputError(f"{text!r:.80} is no operator that a program may call")
    operator = getattr(getattr(getattr(torch.ops, library), name, None), overload, None)
    if not isinstance(operator, torch._ops.OpOverload):
        raise InputError(f"{text!r:.80} is no operator that is known here")
    _check_schema(text, name, operator._schema)


def _check_schema(text: str, name: str, signature: Any) -> None:
    kinds = [str(value.type) for value in (*signature.arguments, *signature.returns)]
    if any(argument.name == "filename" for argument in signature.arguments):
        raise InputError(f"{text!r:.80} reads or writes a file, which no program may do")
    if name not in _WITHOUT_TENSORS and not any("Tensor" in kind for kind in kinds):
        raise InputError(f"{text!r:.80} computes nothing with tensors")


def _check_expression(text: str) -> None:
    """Raise unless a symbolic size is a tree of calls of `_FUNCTIONS`: sympy would evaluate anything else as Python."""
    if len(text) > _LARGEST_EXPRESSION:
        raise InputError(f"the size {text!r:.80} is longer than {_LARGEST_EXPRESSION} characters")
    powers = [_check_part(part) for part in ast.walk(ast.parse(text, mode="eval"))]
    if math.prod(power for power in powers if power) > _LARGEST_POWER:
        raise InputError(f"the size {text!r:.80} raises to powers above {_LARGEST_POWER}")


def _check_part(part: ast.AST) -> int | None:
    """Raise unless a part of an expression is allowed; return the exponent of a power."""
    match part:
        case ast.Call(func=ast.Name("Symbol"), args=[ast.Constant(str(name))]):
            _match(_SYMBOL, name, "is no symbol of a size")
        case ast.Call(func=ast.Name("Pow"), args=[_, exponent], keywords=[]):
            return _exponent(exponent)
        case ast.BinOp(op=ast.Pow(), right=exponent):
            return _exponent(exponent)
        case ast.Call(func=ast.Name(function)) if function in _FUNCTIONS - {"Symbol", "Pow"}:
            pass
        case ast.keyword(arg=str(name)) if name in _ASSUMPTIONS:
            pass
        case ast.Name(name) if name in _FUNCTIONS or _SYMBOL.fullmatch(name):
            pass
        case ast.Constant(bool() | float()):
            pass
        case ast.Constant(int(number)) if abs(number) < 1 << 64:
            pass
        case ast.Constant(str(text)) if _is_short_number(text) or _SYMBOL.fullmatch(text):
            pass
        case ast.Expression() | ast.BinOp() | ast.UnaryOp() | ast.Compare() | ast.Load():
            pass
        case ast.unaryop() | ast.cmpop():
            pass
        case ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod() | ast.Pow():
            pass
        case ast.BitAnd() | ast.BitOr():
            pass
        case _:
            raise InputError(f"{ast.unparse(part)!r:.80} may not stand in the expression of a size")
    return None


def _is_short_number(text: str) -> bool:
    return re.fullmatch(r"-?\d{1,30}(\.\d{1,30})?", text) is not None


def _exponent(part: ast.expr) -> int:
    match part:
        case ast.Constant(int(number)) | ast.Call(func=ast.Name("Integer"), args=[ast.Constant(int(number))]):
            return max(number, 1)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(int())):
            return 1
        case ast.Call(
            func=ast.Name("Integer"), args=[ast.UnaryOp(op=ast.USub(), operand=ast.Constant(int()))]
        ):
            return 1
    raise InputError(f"{ast.unparse(part)!r:.80} may not be an exponent in the expression of a size")


def _check_treespec(text: str) -> None:
    """Raise unless nested inputs or outputs are described with containers of Python's own."""
    if not text:
        return
    protocol, tree = json.loads(text)
    waiting, depth = [tree], 0
    while waiting:
        for one in waiting:
            _check_container(one)
        waiting, depth = [child for one in waiting for child in one["children_spec"]], depth + 1
        if depth > DEEPEST or protocol != 1:
            raise InputError(f"its inputs or outputs are nested more than {DEEPEST} deep")


def _check_container(tree: dict[str, Any]) -> None:
    if tree["type"] is not None and tree["type"] not in _PLAIN_TYPES:
        raise InputError(
            f"its inputs or outputs are a {tree['type']!r:.80}, and only tuples, lists and dicts are read"
        )
    context = tree["context"]
    keys = json.loads(context) if isinstance(context, str) else context
    for key in keys if isinstance(keys, list) else [] if keys is None else [{}]:
        if type(key) not in (str, int):
            raise InputError(
                f"its inputs or outputs have the key {key!r:.80}, and only names and numbers are read"
            )
        _check_path(str(key))


def _allow(text: str) -> None:
    """A string that torch hands to an operator, which is quoted wherever it is written."""


_STRINGS: dict[str, Callable[[str], None]] = {
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_expression,
    "in_spec": _check_treespec,
    "out_spec": _check_treespec,
    "as_string": _allow,
    "as_strings": _allow,
    "torch_version": _check_version,
    **dict.fromkeys(("as_float", "as_floats", "as_float_lists", "real", "imag"), _check_number),
    **dict.fromkeys(("fqn", "parameter_name", "buffer_name", "tensor_constant_name"), _check_path),
}
"""What a string of the program must be, by the key that it stands under; a plain name under every other key."""
