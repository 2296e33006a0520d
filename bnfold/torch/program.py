"""Fold an exported program (`.pt2`): make modules of its calls, fold those, export again.

A program calls `aten.conv2d(x, p_conv_weight)` and `aten.batch_norm(x, ...)` on parameters that lie where the module's
lay; what `run_decompositions` made of these is put together again (`recompose`). Each such call, on the parameters of
one place and of nothing else there, becomes a call of an ordinary `nn` module at that place; what results is an
`nn.Module` like any other. Sizes that were dynamic are dynamic again, and the names of what remains in the state dict
stay.

Not covered: what `torch.export.save` cannot keep (Python objects of the caller's own); a program without example
inputs is given random ones of the recorded shapes.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from bnfold import reasons
from bnfold.archive import name_stranger
from bnfold.errors import InputError, UnreadableModel
from bnfold.exclusive import exclusive
from bnfold.output import replacing
from bnfold.report import Report
from bnfold.torch.fold import fold
from bnfold.torch.recompose import arguments_of, rank_of, recompose

__all__ = ["fold_program", "fold_program_file", "load_module", "without_own_advice"]

aten = torch.ops.aten


@contextmanager
def without_own_advice() -> Iterator[None]:
    """Torch loads and copies programs by what torch itself calls deprecated; that is no news to anybody here.

    Nor is that it stores together, as one, tensors that are parts of another one.
    """
    with exclusive(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        yield


@without_own_advice()
def fold_program_file(source: str | Path, target: str | Path | None, **options: Any) -> Report:
    """Fold a `.pt2` file into another one.

    Args:
        target: where to write; None writes nothing.
        **options: see `bnfold.torch.fold`.

    Raises:
        InputError: the file cannot be read as an exported program.
        UnreadableModel, NotEquivalent: see `bnfold.torch.fold`.
    """
    source = Path(source)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    name_stranger(source)
    from bnfold.torch.archive import load_program  # imports torch's compiler, which only this file needs

    program = load_program(source)
    folded, report = fold_program(program, **options)
    if target is not None:
        with replacing(target) as temporary:
            torch.export.save(folded, temporary.with_suffix(".pt2"))
            if temporary.suffix != ".pt2":
                temporary.with_suffix(".pt2").rename(temporary)
    if program.example_inputs is None:
        report = replace(report, notes=(*report.notes, _WITHOUT_EXAMPLES))
    return report


@without_own_advice()
def load_module(source: Path) -> tuple[nn.Module, Any]:
    """The program in a `.pt2` file as a module, and what it was exported with, or random inputs like that.

    Raises:
        InputError: the file cannot be read as an exported program.
    """
    from bnfold.torch.archive import load_program

    program = load_program(source)
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    _drop_guards(module)
    return module, _examples(program)


_WITHOUT_EXAMPLES = (
    "the file has no example inputs of tensors and plain values; random ones of the recorded shapes were used"
)


def fold_program(program: ExportedProgram, **options: Any) -> tuple[ExportedProgram, Report]:
    """Fold an exported program; the program itself is not changed.

    Its operators are calls of functions, no modules, so none are merged.

    Raises:
        UnreadableModel: it cannot be run or exported again.
        NotEquivalent: the folded program computes something else.
    """
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    args, kwargs = _examples(program)
    dynamic = _dynamic_sizes(module, args, kwargs)
    _drop_guards(module)
    recompose(module)
    _make_modules(module)
    folded, report = fold(module, (args, kwargs), inplace=True, **{**options, "merge": False})
    verdicts = (
        replace(each, reason=each.reason.replace(reasons.TRAINING(), reasons.TRAINING_PROGRAM()))
        for each in report.verdicts
    )
    report = replace(report, verdicts=tuple(verdicts))
    try:
        again = torch.export.export(folded, args, kwargs, dynamic_shapes=dynamic)
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnreadableModel(f"the folded program cannot be exported again: {first}") from error
    return again, report


def _examples(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs that the program was exported with, or random ones like them."""
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        return tuple(args), dict(kwargs or {})
    names = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    flat = [_example(node.meta.get("val")) for node in nodes]
    args, kwargs = torch.utils._pytree.tree_unflatten(flat, program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


def _example(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape = [size if isinstance(size, int) else int(size.node.hint or 2) for size in value.shape]
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(value.dtype)
    return torch.zeros(shape, dtype=value.dtype)


def _dynamic_sizes(
    module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Which sizes of the inputs may change, as `torch.export.export` wants to be told; None where none may."""
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    sizes = [_sizes(value) for value in values]
    if not any(sizes):
        return None
    names = list(inspect.signature(module.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    spec = torch.utils._pytree.tree_structure(given)
    named: dict[str, Any] = torch.utils._pytree.tree_unflatten(sizes, spec)
    return named


def _sizes(value: Any) -> dict[int, Any] | None:
    if not isinstance(value, Tensor):
        return None
    return {axis: Dim.AUTO for axis, size in enumerate(value.shape) if not isinstance(size, int)} or None


def _drop_guards(module: fx.GraphModule) -> None:
    """Take out the check of the inputs' shapes, which exporting again puts back."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            module.graph.erase_node(node)
    module._modules.pop("_guards_fn", None)
    module.recompile()


# ---------------------------------------------------------------- calls become modules


def _make_modules(module: fx.GraphModule) -> None:
    """Replace calls on the parameters of one place by calls of a module at that place."""
    made: dict[str, tuple[Any, ...]] = {}
    for node in list(module.graph.nodes):
        maker = _MAKERS.get(node.target) if node.op == "call_function" else None
        if maker is None or node.kwargs:
            continue
        arguments = arguments_of(node)
        place = _place(module, arguments)
        if place is None:
            continue
        path, tensors, settings = place
        key = (node.target, settings)
        if made.setdefault(path, key) != key:
            continue
        if type(module.get_submodule(path)) is nn.Module:
            _set_module(module, path, maker(tensors, settings, rank_of(node)))
        with module.graph.inserting_before(node):
            call = module.graph.call_module(path, (arguments["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    for node in reversed(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.recompile()


def _place(
    module: fx.GraphModule, arguments: dict[str, Any]
) -> tuple[str, dict[str, Tensor | None], tuple[Any, ...]] | None:
    """The path that holds every parameter of a call, the tensors by name, and the call's other arguments."""
    paths, tensors, settings = set(), {}, []
    for name, value in arguments.items():
        if name == "input":
            continue
        if isinstance(value, fx.Node):
            if value.op != "get_attr":
                return None
            path, _, attribute = str(value.target).rpartition(".")
            paths.add(path)
            tensors[name] = getattr(module.get_submodule(path), attribute)
            if attribute != name:
                return None
        elif name in ("weight", "bias", "running_mean", "running_var"):
            tensors[name] = None
        else:
            settings.append((name, tuple(value) if isinstance(value, list) else value))
    if len(paths) != 1 or not (path := paths.pop()):
        return None
    owner = module.get_submodule(path)
    held = {
        name for name, tensor in (*owner.named_parameters(), *owner.named_buffers()) if tensor is not None
    }
    known = {name for name, tensor in tensors.items() if tensor is not None} | {"num_batches_tracked"}
    fits = (held <= known and tensors.get("weight", 0) is not None) or "running_mean" in tensors
    plain = type(owner) is nn.Module or made_here(owner)
    return (path, tensors, tuple(settings)) if fits and plain else None


def made_here(owner: nn.Module) -> bool:
    """Whether a module was put there by `_make_modules`, for an earlier call."""
    return isinstance(owner, nn.modules.conv._ConvNd | nn.Linear | nn.modules.batchnorm._BatchNorm)


def _set_module(root: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    counted = root.get_submodule(path)._buffers.get("num_batches_tracked")
    if counted is not None:
        new._buffers["num_batches_tracked"] = counted
    root.get_submodule(parent)._modules[name] = new


def _make_conv(kind: type[nn.Module]) -> Callable[..., nn.Module]:
    def make(tensors: dict[str, Any], settings: tuple[Any, ...], rank: int) -> nn.Module:
        weight, options = tensors["weight"], dict(settings)
        groups, transposed = options["groups"], issubclass(kind, nn.modules.conv._ConvTransposeNd)
        given, made = (
            (weight.shape[0], weight.shape[1] * groups)
            if transposed
            else (weight.shape[1] * groups, weight.shape[0])
        )
        with torch.device("meta"):
            module = kind(given, made, tuple(weight.shape[2:]), bias=tensors["bias"] is not None, **options)
        return _hold(module, tensors)

    return make


def _make_linear(tensors: dict[str, Any], settings: tuple[Any, ...], rank: int) -> nn.Module:
    made, given = tensors["weight"].shape
    with torch.device("meta"):
        module = nn.Linear(given, made, bias=tensors["bias"] is not None)
    return _hold(module, tensors)


def _make_norm(tensors: dict[str, Any], settings: tuple[Any, ...], rank: int) -> nn.Module:
    options = dict(settings)
    kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank, nn.BatchNorm1d)
    tracked = tensors["running_mean"] is not None
    channels = next(tensor.numel() for tensor in tensors.values() if tensor is not None)
    affine = tensors["weight"] is not None
    with torch.device("meta"):
        module = kind(channels, options["eps"], options["momentum"], affine, tracked)
    module._buffers.pop("num_batches_tracked", None)
    return _hold(module, tensors).train(options["training"])


def _hold(module: nn.Module, tensors: dict[str, Any]) -> nn.Module:
    """Put tensors at the places of a module, as they are."""
    for name, tensor in tensors.items():
        holder = module._buffers if name in module._buffers else module._parameters
        holder[name] = tensor if tensor is None or holder is module._buffers else _as_parameter(tensor)
    return module


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


_MAKERS: dict[Any, Callable[..., nn.Module]] = {
    aten.conv1d.default: _make_conv(nn.Conv1d),
    aten.conv2d.default: _make_conv(nn.Conv2d),
    aten.conv3d.default: _make_conv(nn.Conv3d),
    aten.conv1d.padding: _make_conv(nn.Conv1d),
    aten.conv2d.padding: _make_conv(nn.Conv2d),
    aten.conv3d.padding: _make_conv(nn.Conv3d),
    aten.conv_transpose1d.default: _make_conv(nn.ConvTranspose1d),
    aten.conv_transpose2d.input: _make_conv(nn.ConvTranspose2d),
    aten.conv_transpose3d.input: _make_conv(nn.ConvTranspose3d),
    aten.linear.default: _make_linear,
    aten.batch_norm.default: _make_norm,
}
"""What makes a module of a call, by operator."""
