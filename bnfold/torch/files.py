"""Fold the weights of a model that the user names: a state dict in a file, and the factory that builds the module.

    fold_checkpoint_file("weights.pt", "out.pt", model="package.module:factory", shapes=["1x3x224x224"])

The file holds a state dict, or a dict with one (see `bnfold.torch.states`), or is a `.safetensors` file; it is read
within the limits of `bnfold.archive`, and nothing in it chooses what is imported. The output has the form of the input:
the same other entries, and the same prefix that a wrapper gave every name (`module.` of a model trained in parallel,
`_orig_mod.` of a compiled one, `model.` of a Lightning module, any other). It belongs to the *folded* module,
which `load_folded` makes of what the factory builds. With `-o out.pt2` the folded module is written as an exported
program instead, which needs no factory any more.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.archive import load_plain, name_stranger
from bnfold.checkpoint import refuse_torchscript
from bnfold.errors import InputError
from bnfold.merge import Merged
from bnfold.output import replacing
from bnfold.report import Report
from bnfold.torch.draft import NormPlace
from bnfold.torch.fold import fold
from bnfold.torch.merging import (
    compute_merged,
    merge_as_stored,
    put_merged,
    put_operator,
    touched_modules,
)
from bnfold.torch.modules import ChannelAdd, ChannelMulAdd
from bnfold.torch.read import read
from bnfold.torch.sandbox import arrange
from bnfold.torch.states import Stored, find_state
from bnfold.torch.tensors import inside
from bnfold.torch.write import become, compute_coded, settle_weight

__all__ = [
    "Arguments",
    "fold_checkpoint_file",
    "load_factory",
    "load_folded",
    "load_state",
    "make_inputs",
    "read_arguments",
    "refuse_complex",
]

Arguments = Mapping[str, Any] | Sequence[Any]
"""What a factory is called with: by name, or one after the other."""

MOST_NUMBERS = 2**28
"""An example input has so many numbers at most: 1 GiB of float32, and each is held several times."""


def fold_checkpoint_file(
    source: str | Path,
    target: str | Path | None,
    *,
    model: str | None = None,
    shapes: Sequence[str] | None = None,
    arguments: Arguments = (),
    key: str | None = None,
    prefix: str | None = None,
    **options: Any,
) -> Report:
    """Fold the weights in a file and write them to another one.

    Args:
        source: a state dict (see above), or an exported program (`.pt2`), which needs no `model`.
        target: where to write; None writes nothing.
        model: "package.module:factory".
        shapes: one per argument, see `make_inputs`.
        arguments: what the factory is called with.
        key: where in the file the weights lie; see `load_state`.
        prefix: what stands before their names.
        **options: see `bnfold.torch.fold`.

    Raises:
        InputError: the file, the factory or a shape cannot be used, or the weights are of another model.
        UnreadableModel, NotEquivalent: see `bnfold.torch.fold`.
    """
    if model is None:
        from bnfold.torch.program import fold_program_file

        return fold_program_file(source, target, **options)
    if not shapes:
        raise InputError("name the shape of each input of the model, as in --input 1x3x224x224")
    inputs = make_inputs(shapes)
    module = load_factory(model, arguments)
    stored = find_state(_read(Path(source)), source, module.state_dict(), key, prefix)
    _fill(module, stored.state, source)
    folded, report = fold(module.eval(), inputs, **options)
    if target is not None:
        _save(folded, inputs, Path(target), stored)
    note = "these are weights of the folded module; bnfold.torch.load_folded(model, inputs, state) loads them"
    notes = [*stored.describe(), *([note] if Path(target or "").suffix != ".pt2" else [])]
    return replace(report, notes=(*report.notes, *notes))


def load_folded(model: nn.Module, example_inputs: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """Load folded weights into what the factory builds: its BatchNorms that have no weights any more are taken out.

    Args:
        model: unfolded, in eval mode; it is edited and returned.
        example_inputs: see `bnfold.torch.fold`; only shapes matter.
        state: the state dict of the folded model.

    Raises:
        UnreadableModel: the model cannot be run on the example inputs.
        InputError: the weights are of another model.
    """
    reading = read(model, example_inputs)
    norms = [norm for norm in dict.fromkeys(reading.norms.values()) if _is_folded(norm, model, state)]
    merged = merge_as_stored(model, reading, state, {norm.path for norm in norms})
    gone = touched_modules(merged)
    operators = compute_merged(model, reading, merged)
    for norm in norms:
        if not any(inside(norm.path, path) for path in gone):
            become(model.get_submodule(norm.path), norm, _leftover(norm, state))
    places = {
        place: name
        for name, place in reading.linears.items()
        if not any(inside(place.weight.module, path) for path in gone)
    }
    coded = [
        (place.weight.module, *compute_coded(model, place, reading.graph[name]))
        for place, name in places.items()
        if place.code is not None and place.weight.name in state
    ]
    for place in places:
        if place.code is not None:
            continue
        module = model.get_submodule(place.weight.module)
        if place.computed and f"{place.weight.module}.weight" in state:
            settle_weight(module, place.computed)
            module.register_parameter("weight", nn.Parameter(torch.empty_like(state[place.weight.name])))
        if place.bias is not None and place.bias.whole in state:
            owner = model.get_submodule(place.bias.module)
            if getattr(owner, place.bias.attribute) is None:
                vars(owner).pop(place.bias.attribute, None)
                owner.register_parameter(
                    place.bias.attribute, nn.Parameter(torch.empty_like(state[place.bias.whole]))
                )
    for path, host, operator, (weight, _), like in coded:
        biased = float(f"{path}.bias" in state)
        put_operator(model, host, operator, (weight, np.full(operator.outputs, biased)), like)
    put_merged(model, operators)
    _give_biases(model, merged, state)
    _fill(model, dict(state), "the state dict")
    return model


def _is_folded(norm: NormPlace, model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether a BatchNorm is no more, by the names in a state dict."""
    own = [name for name in model.get_submodule(norm.path).state_dict() if f"{norm.path}.{name}" in state]
    others = any("." not in name and name not in ("weight", "bias") for name in own)
    return f"{norm.path}.running_mean" not in state and not others


def _give_biases(model: nn.Module, merged: Merged, state: Mapping[str, Tensor]) -> None:
    """Let merged operators have a bias where the folded ones have."""
    for one in merged.merges:
        path, owner = one.place.host.path, model.get_submodule(one.place.host.path)
        if "merged" in owner._modules:
            path, owner = f"{path}.merged", owner.get_submodule("merged")
        if "bias" in owner._parameters:
            bias = state.get(f"{path}.bias")
            owner._parameters["bias"] = None if bias is None else nn.Parameter(torch.empty_like(bias))


def _leftover(norm: NormPlace, state: Mapping[str, Tensor]) -> nn.Module | None:
    """What stands where a BatchNorm was, by the names of what is left."""
    path = f"{norm.path}.affine" if norm.tail else norm.path
    weight, bias = state.get(f"{path}.weight"), state.get(f"{path}.bias")
    if bias is None:
        return None
    return ChannelAdd(bias) if weight is None else ChannelMulAdd(weight, bias)


def load_factory(name: str, arguments: Arguments = ()) -> nn.Module:
    """Import and call what builds a module, "package.module:factory", as named by the user on the command line.

    Args:
        name: of the factory, or of a module that is there.
        arguments: what it is called with, positional ones or those by name.

    Raises:
        InputError: it cannot be imported, or builds no module.
    """
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise InputError(f"{name!r} is no package.module:factory")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if path.startswith("."):
        raise InputError(f"{name!r} is relative to nothing; write package.module:factory, as in an import")
    try:
        factory: Any = importlib.import_module(path)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except Exception as error:  # whatever the user's own module runs into
        raise InputError(f"{name} cannot be imported: {error or type(error).__name__}") from error
    return _build(name, factory, arguments)


def _build(name: str, factory: Callable[..., Any], arguments: Arguments) -> nn.Module:
    if isinstance(factory, nn.Module):
        if arguments:
            raise InputError(f"{name} is a module already and takes no arguments; leave --model-args out")
        return factory
    named = arguments if isinstance(arguments, Mapping) else {}
    try:
        module = factory(**named) if named else factory(*arguments)
    except Exception as error:
        how = "with these arguments" if arguments else "without arguments"
        way = "" if arguments else "; name them with --model-args"
        raise InputError(f"{name} cannot be called {how}: {type(error).__name__}: {error}{way}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{name} builds a {type(module).__name__}, which is no nn.Module")
    return module


def read_arguments(text: str | None) -> Arguments:
    """What a factory is called with, as JSON: an object for arguments by name, a list for positional ones.

    Raises:
        InputError: it is neither.
    """
    try:
        arguments = json.loads(text) if text else []
    except ValueError as error:
        raise InputError(f"--model-args {text!r:.100} is no JSON: {error}") from error
    if not isinstance(arguments, dict | list):
        raise InputError(
            f'--model-args {text!r:.100} is neither an object, as {{"depth": 50}}, nor a list, as [50]'
        )
    return arguments


def make_inputs(shapes: Sequence[str]) -> Any:
    """Random inputs of given shapes: "1x3x224x224" for float32, "2x16:int64" (or bool, float16, ...) for others.

    Whole numbers are 0 and 1, so that they are rows of any embedding. "mask=2x16:bool" is an argument by name;
    "batch.image=1x3x8x8" is the entry `image` of a dict that is one, and so on.

    Returns:
        A tuple of tensors; where some have names, the pair of it and a dict, as `bnfold.fold` takes it.

    Raises:
        InputError: a shape cannot be read, has more than `MOST_NUMBERS` numbers, or a type of which torch makes none;
            or a name is no place of its own.
    """
    generator = torch.Generator().manual_seed(0)
    positional: list[Tensor] = []
    named: dict[str, Any] = {}
    for text in shapes:
        name, equals, shape = text.rpartition("=")
        tensor = _make_input(shape, generator)
        if equals:
            _put_input(named, name.split("."), tensor, text)
        else:
            positional.append(tensor)
    return (tuple(positional), named) if named else tuple(positional)


def _put_input(entries: dict[str, Any], names: list[str], tensor: Tensor, text: str) -> None:
    """Put a tensor where its name says, in dicts that are made on the way."""
    *outer, last = names
    for name in outer:
        inner = entries.setdefault(name, {})
        if not isinstance(inner, dict):
            raise InputError(f"--input {text}: `{name}` is a tensor already, and no dict; name another one")
        entries = inner
    if last in entries or not all(names):
        fact = "is named twice" if last in entries else "has no name"
        raise InputError(f"--input {text}: it {fact}; write NAME=SHAPE, once each")
    entries[last] = tensor


def _make_input(text: str, generator: torch.Generator) -> Tensor:
    shape, dtype = _read_shape(text)
    try:
        if dtype == torch.complex32:
            raise NotImplementedError("torch's complex32 is an experiment")
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f"an input of {text} cannot be made: {str(error).splitlines()[0]:.100}") from error


def _read_shape(text: str) -> tuple[list[int], torch.dtype]:
    """The sizes and the type that a text such as 2x16:int64 names."""
    sizes, _, kind = text.partition(":")
    try:
        shape = [int(size) for size in sizes.split("x")] if sizes else []
        dtype = getattr(torch, kind or "float32")
        if min(shape, default=1) < 1 or not isinstance(dtype, torch.dtype):
            raise ValueError(text)
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{text!r} is no shape; write 1x3x224x224, or 2x16:int64 for whole numbers"
        ) from error
    if math.prod(shape) > MOST_NUMBERS:
        raise InputError(f"an input of {text} has more than {MOST_NUMBERS:,} numbers; write a smaller one")
    return shape, dtype


def load_state(
    path: str | Path,
    names: Collection[str] | None = None,
    key: str | None = None,
    prefix: str | None = None,
) -> tuple[Any, dict[str, Tensor], str]:
    """The state dict in a file: what was read, the tensors by name, and the prefix that every name had.

    Args:
        path: the file.
        names: those that the model has. They tell a prefix from a part of the model, a profiler's counters from
            its buffers, and one of several state dicts; without them, what only a wrapper gives is taken off.
        key: where it is, instead of what is found (see `bnfold.torch.states`).
        prefix: what to take off its names, instead of what is found.

    Raises:
        InputError: it cannot be read, holds no state dict, or several of which none is the model's before others.
    """
    stored = find_state(_read(Path(path)), path, names, key, prefix)
    return stored.container, stored.state, stored.prefix


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    name_stranger(path)
    refuse_torchscript(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return load_plain(path)
    except ImportError as error:
        raise InputError(f"{path}: reading it needs the package safetensors") from error
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        if first.startswith("Weights only load failed"):
            first = "it holds more than tensors and plain values; save model.state_dict()"
        raise InputError(f"{path} cannot be read as weights: {first}") from error


def _fill(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    refuse_complex(module, state, source)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise InputError(
            f"{source} holds the weights of another model: {lines[0]:.300}; --key and --prefix choose others"
        ) from error


def refuse_complex(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse complex numbers in the place of real ones, of which torch would load the real part.

    Raises:
        InputError: there are some; the message names them.
    """
    for name, held in module.state_dict().items():
        given = state.get(name)
        if isinstance(given, Tensor) and isinstance(held, Tensor) and given.is_complex() > held.is_complex():
            raise InputError(f"`{name}` is complex in {source}, and real in the model")


def _save(folded: nn.Module, inputs: Any, target: Path, stored: Stored) -> None:
    with replacing(target) as temporary:
        if target.suffix == ".pt2":
            args, kwargs = arrange(inputs)
            torch.export.save(torch.export.export(folded, args, kwargs), temporary)
            return
        held = folded.state_dict()
        state = {name: thing.detach() if isinstance(thing, Tensor) else thing for name, thing in held.items()}
        if target.suffix == ".safetensors":
            from safetensors.torch import save_file

            named = stored.named(state)
            if other := [name for name, thing in named.items() if not isinstance(thing, Tensor)]:
                raise InputError(
                    f"{target}: `{other[0]}` is no tensor, and safetensors hold no others; write a .pt file"
                )
            save_file({name: tensor.contiguous().clone() for name, tensor in named.items()}, temporary)
            return
        torch.save(stored.replaced(state), temporary)
