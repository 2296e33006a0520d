"""The torch.nn layers that a checkpoint may hold, and the way from layer to plain values and back.

A row of `LAYERS` names a class of torch.nn and the arguments it is given, all of them attributes of the layer by the
same name; `_CHECKS` says which values an argument may have. A new layer is a row, and a line there if it has an
argument that no other layer has. Classes and arguments outside the table are neither written nor built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnfold.errors import InputError

__all__ = ["LAYERS", "WithoutStorage", "build_layer", "describe_layer", "is_integer", "is_sizes"]

Check = Callable[[Any], bool]
_LARGEST_SIZE = 2**31


def is_integer(value: Any) -> bool:
    """Tell whether a value is an int, and no bool, of at most 31 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST_SIZE


def _is_size(value: Any) -> bool:
    return is_integer(value) and value > 0


def _is_extent(value: Any) -> bool:
    return is_integer(value) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def is_sizes(value: Any) -> bool:
    """Tell whether a value is a list or tuple of at most 8 positive sizes."""
    return isinstance(value, list | tuple) and len(value) <= 8 and all(map(_is_size, value))


def _is_extents(value: Any) -> bool:
    return _is_extent(value) or (
        isinstance(value, list | tuple) and len(value) <= 6 and all(map(_is_extent, value))
    )


def _is_output_size(value: Any) -> bool:
    each = value if isinstance(value, list | tuple) else [value]
    return len(each) <= 3 and all(one is None or _is_size(one) for one in each)


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _one_of(*allowed: Any) -> Check:
    return lambda value: any(value is one or (isinstance(one, str) and value == one) for one in allowed)


def _is_padding(value: Any) -> bool:
    return _is_extents(value) or value in ("same", "valid")


_CHECKS: dict[str, Check] = {
    **dict.fromkeys(
        ("in_features", "out_features", "num_features", "num_embeddings", "embedding_dim"), _is_size
    ),
    **dict.fromkeys(("in_channels", "out_channels", "num_channels", "groups", "num_groups"), _is_size),
    **dict.fromkeys(("kernel_size", "stride", "dilation", "output_padding"), _is_extents),
    **dict.fromkeys(("start_dim", "end_dim", "dim"), is_integer),
    **dict.fromkeys(("affine", "track_running_stats", "elementwise_affine", "bias"), _is_switch),
    **dict.fromkeys(("inplace", "ceil_mode", "count_include_pad"), _is_switch),
    **dict.fromkeys(
        ("eps", "p", "alpha", "negative_slope", "min_val", "max_val", "beta", "threshold"), _is_number
    ),
    **dict.fromkeys(("unflattened_size", "normalized_shape"), is_sizes),
    "num_parameters": _is_size,
    "momentum": _optional(_is_number),
    "padding_idx": _optional(is_integer),
    "divisor_override": _optional(_is_size),
    "max_norm": _one_of(None),
    "return_indices": _one_of(False),
    "padding": _is_padding,
    "padding_mode": _one_of("zeros", "reflect", "replicate", "circular"),
    "approximate": _one_of("none", "tanh"),
    "output_size": _is_output_size,
}

_NORMALISATION = "num_features eps momentum affine bias track_running_stats"
_CONVOLUTION = "in_channels out_channels kernel_size stride padding dilation groups bias padding_mode"
_WINDOW = "kernel_size stride padding ceil_mode"

LAYERS: dict[str, list[str]] = {
    kind.format(rank=rank): arguments.split()
    for kind, arguments in {
        "Embedding": "num_embeddings embedding_dim padding_idx max_norm",
        "Linear": "in_features out_features bias",
        "Conv{rank}d": _CONVOLUTION,
        "ConvTranspose{rank}d": _CONVOLUTION + " output_padding",
        "BatchNorm{rank}d": _NORMALISATION,
        "InstanceNorm{rank}d": _NORMALISATION,
        "LayerNorm": "normalized_shape eps elementwise_affine bias",
        "GroupNorm": "num_groups num_channels eps affine bias",
        "Identity": "",
        "Flatten": "start_dim end_dim",
        "Unflatten": "dim unflattened_size",
        "ZeroPad{rank}d": "padding",
        "MaxPool{rank}d": _WINDOW + " dilation return_indices",
        "AvgPool1d": _WINDOW + " count_include_pad",
        "AvgPool2d": _WINDOW + " count_include_pad divisor_override",
        "AvgPool3d": _WINDOW + " count_include_pad divisor_override",
        "AdaptiveAvgPool{rank}d": "output_size",
        "AdaptiveMaxPool{rank}d": "output_size return_indices",
        "Dropout": "p inplace",
        "Dropout{rank}d": "p inplace",
        "AlphaDropout": "p inplace",
        "FeatureAlphaDropout": "p inplace",
        **dict.fromkeys(("Tanh", "Sigmoid", "LogSigmoid", "Softsign", "Tanhshrink"), ""),
        **dict.fromkeys(("ReLU", "ReLU6", "SELU", "SiLU", "Mish", "Hardswish", "Hardsigmoid"), "inplace"),
        "ELU": "alpha inplace",
        "CELU": "alpha inplace",
        "GELU": "approximate",
        "LeakyReLU": "negative_slope inplace",
        "PReLU": "num_parameters",
        "Hardtanh": "min_val max_val inplace",
        "Softplus": "beta threshold",
        "Softmax": "dim",
        "LogSoftmax": "dim",
    }.items()
    for rank in (1, 2, 3)
}


class WithoutStorage(TorchFunctionMode):
    """While it lasts, layers are built without memory of their own, and not initialised: shapes and dtypes alone.

    Every tensor is one number that is repeated. torch's meta device would do as well, but imports a compiler.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            sizes = args[0] if isinstance(args[0], tuple | list) else args
            return torch.empty((), dtype=given.get("dtype")).expand(*sizes)
        if getattr(func, "__module__", None) == nn.init.__name__:
            return given["tensor"] if "tensor" in given else args[0]
        return args[0] if func in _LEFT_OUT else func(*args, **given)


_LEFT_OUT = (torch.empty_like, Tensor.copy_, Tensor.fill_, Tensor.zero_, Tensor.normal_, Tensor.uniform_)
"""What would allocate or fill a tensor like another one."""


def describe_layer(name: str, layer: nn.Module) -> dict[str, Any]:
    """Return name, torch.nn class and arguments of a layer as plain values.

    Raises:
        InputError: the class is not torch.nn's own, or has no row.
    """
    kind = type(layer).__name__
    if kind not in LAYERS or type(layer) is not getattr(nn, kind):
        raise InputError(f"layer `{name}` is a {type(layer).__qualname__}, which a checkpoint cannot hold")
    arguments = {argument: getattr(layer, argument) for argument in LAYERS[kind]}
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"] is not None
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    return {"name": name, "class": kind, "arguments": listed}


def build_layer(entry: Any) -> tuple[str, nn.Module]:
    """Return the name and the layer, without memory for its tensors, that a description of plain values stands for.

    Raises:
        InputError: the description is none that `describe_layer` gives, or torch cannot build the layer.
    """
    if not isinstance(entry, dict) or set(entry) != {"name", "class", "arguments"}:
        raise InputError("each layer of `architecture` needs a name, a class and arguments")
    name, kind, arguments = entry["name"], entry["class"], entry["arguments"]
    if not isinstance(name, str) or not isinstance(kind, str) or kind not in LAYERS:
        raise InputError(f"layer {name!r:.80} is a {kind!r:.80}, which is not in the table of layers")
    label = f"layer `{name:.80}` ({kind})"
    _check_arguments(label, LAYERS[kind], arguments)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    try:
        with WithoutStorage():
            return name, getattr(nn, kind)(**given)
    except Exception as error:  # sizes that do not go together or overflow
        raise InputError(f"{label} cannot be built: {str(error).splitlines()[0]:.200}") from error


def _check_arguments(label: str, wanted: list[str], arguments: Any) -> None:
    if not isinstance(arguments, dict) or set(arguments) != set(wanted):
        raise InputError(f"{label} takes exactly {', '.join(wanted) or 'no arguments'}")
    for argument in wanted:
        if not _CHECKS[argument](arguments[argument]):
            raise InputError(f"{label} has {argument} = {arguments[argument]!r:.80}")
