"""Fold the weights of a model that the user names: a state dict in a file, and the factory that builds the module.

    fold_checkpoint_file("weights.pt", "out.pt", model="package.module:factory", shapes=["1x3x224x224"])

The file holds a state dict, a dict with one under `state_dict`, `model` or `model_state_dict`, or is a `.safetensors`
file; it is read within the limits of `bnfold.archive`, and nothing in it chooses what is imported. The output has the
form of the input: the same other entries, and the same prefix that a wrapper gave every name (`module.` of a model
trained in parallel, `_orig_mod.` of a compiled one, `model.` of a Lightning module). It belongs to the *folded* module,
which `load_folded` makes of what the factory builds. With `-o out.pt2` the folded module is written as an exported
program instead, which needs no factory any more.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.archive import load_plain, name_stranger
from bnfold.errors import InputError
from bnfold.merge import Merged
from bnfold.output import replacing
from bnfold.report import Report
from bnfold.torch.draft import NormPlace
from bnfold.torch.fold import fold
from bnfold.torch.merging import compute_merged, merge_as_stored, put_merged, touched_modules
from bnfold.torch.modules import ChannelAdd, ChannelMulAdd
from bnfold.torch.read import read
from bnfold.torch.tensors import inside
from bnfold.torch.write import become, settle_weight

__all__ = ["fold_checkpoint_file", "load_factory", "load_folded", "load_state", "make_inputs"]

MOST_NUMBERS = 2**28
"""An example input has so many numbers at most: 1 GiB of float32, and each is held several times."""

_KEYS = ("state_dict", "model_state_dict", "model")

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that only a wrapper gives."""

_OWNERS = (*_WRAPPERS, "model.", "net.", "network.", "backbone.")
"""Prefixes that an owner of the model gives, or that are the model's own."""

_COUNTERS = ("total_ops", "total_params")
"""Buffers that a profiler (thop) leaves in every module."""


def fold_checkpoint_file(
    source: str | Path,
    target: str | Path | None,
    *,
    model: str | None = None,
    shapes: Sequence[str] | None = None,
    **options: Any,
) -> Report:
    """Fold the weights in a file and write them to another one.

    Args:
        source: a state dict (see above), or an exported program (`.pt2`), which needs no `model`.
        target: where to write; None writes nothing.
        model: "package.module:factory"; the factory is called without arguments.
        shapes: one per positional argument, see `make_inputs`.
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
    module = load_factory(model)
    container, state, prefix = load_state(source, module.state_dict())
    _fill(module, state, source)
    folded, report = fold(module.eval(), inputs, **options)
    if target is not None:
        _save(folded, inputs, Path(target), container, prefix)
    note = "these are weights of the folded module; bnfold.torch.load_folded(model, inputs, state) loads them"
    notes = [*_describe_choice(container), *([note] if Path(target or "").suffix != ".pt2" else [])]
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
    for place in dict.fromkeys(reading.linears.values()):
        if any(inside(place.weight.module, path) for path in gone):
            continue
        module = model.get_submodule(place.weight.module)
        if place.computed and f"{place.weight.module}.weight" in state:
            settle_weight(module, place.computed)
            module.register_parameter("weight", nn.Parameter(torch.empty_like(state[place.weight.name])))
        if place.bias is not None and place.bias.name in state:
            owner = model.get_submodule(place.bias.module)
            if getattr(owner, place.bias.attribute) is None:
                owner.register_parameter(
                    place.bias.attribute, nn.Parameter(torch.empty_like(state[place.bias.name]))
                )
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


def load_factory(name: str) -> nn.Module:
    """Import and call what builds a module, "package.module:factory", as named by the user on the command line.

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
    return _build(name, factory)


def _build(name: str, factory: Callable[[], Any]) -> nn.Module:
    try:
        module = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise InputError(
            f"{name} cannot be called without arguments: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{name} builds a {type(module).__name__}, which is no nn.Module")
    return module


def make_inputs(shapes: Sequence[str]) -> tuple[Tensor, ...]:
    """Random inputs of given shapes: "1x3x224x224" for float32, "2x16:int64" (or bool, float16, ...) for others.

    Whole numbers are 0 and 1, so that they are rows of any embedding.

    Raises:
        InputError: a shape cannot be read, has more than `MOST_NUMBERS` numbers, or a type of which torch makes none.
    """
    generator = torch.Generator().manual_seed(0)
    return tuple(_make_input(text, generator) for text in shapes)


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


def load_state(path: str | Path, names: Collection[str] | None = None) -> tuple[Any, dict[str, Tensor], str]:
    """The state dict in a file: what was read, the tensors by name, and the prefix that every name had.

    Args:
        path: the file.
        names: those that the model has. They tell a prefix from a part of the model, and a profiler's counters from
            its buffers; without them, what only a wrapper gives is taken off.

    Raises:
        InputError: it cannot be read, or holds no state dict.
    """
    container = _read(Path(path))
    key = _find_key(container)
    state = container if key is None else container[key]
    if not _is_state(state):
        raise InputError(f"{path} holds no state dict: it should be one, or have one under `state_dict`")
    if names is not None:
        state = {name: t for name, t in state.items() if name in names or not name.endswith(_COUNTERS)}
    prefix = _find_prefix(state, names)
    return container, {name.removeprefix(prefix): tensor for name, tensor in state.items()}, prefix


def _is_state(value: Any) -> bool:
    """Whether a value is a dict of tensors by name, and not empty."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _find_key(container: Any) -> str | None:
    """Where in a container the state dict lies that is folded; None where it is the container itself."""
    given = container if isinstance(container, dict) else {}
    return next((key for key in _KEYS if isinstance(given.get(key), dict)), None)


def _find_prefix(state: Mapping[str, Tensor], names: Collection[str] | None) -> str:
    """What wrappers and owners put before every name: as much as it takes to find one of the model's names."""
    prefix, known = "", _WRAPPERS if names is None else _OWNERS
    while not (names and any(name.removeprefix(prefix) in names for name in state)):
        more = next((one for one in known if all(name.startswith(prefix + one) for name in state)), None)
        if more is None:
            break
        prefix += more
    return prefix


def _describe_choice(container: Any) -> list[str]:
    """One note where a file holds more than one state dict; none where there was nothing to choose."""
    taken = _find_key(container)
    others = (
        [] if taken is None else [key for key, one in container.items() if key != taken and _is_state(one)]
    )
    if not others:
        return []
    named = ", ".join(f"`{key}`" for key in others)
    return [f"the weights under `{taken}` were folded; those under {named} are left as they are"]


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    name_stranger(path)
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
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise InputError(f"{source} holds the weights of another model: {lines[0]:.300}") from error


def _save(folded: nn.Module, inputs: tuple[Tensor, ...], target: Path, container: Any, prefix: str) -> None:
    with replacing(target) as temporary:
        if target.suffix == ".pt2":
            torch.export.save(torch.export.export(folded, inputs), temporary)
            return
        state = {f"{prefix}{name}": tensor.detach() for name, tensor in folded.state_dict().items()}
        if target.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, temporary)
            return
        key = _find_key(container)
        torch.save(state if key is None else {**container, key: state}, temporary)
