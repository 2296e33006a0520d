"""The numbers of a fold, for a page to go through them: of the net with its BatchNorms, and of the file.

    h = W x + b,   y = gamma (h - mean) / sqrt(var + eps) + beta            in the checkpoint
    y = W2 x + b2,   W2 = s W,   b2 = s (b - mean) + beta,   s = gamma / sqrt(var + eps)      in the file

A file has the second line alone. The first comes from the checkpoint that it was made from, known by the hash in its
metadata (`source_sha256`, `unfolded_sha256`). That net is written as `unfolded.onnx`, with x and y among its outputs,
and `fold.json` lists, for each BatchNorm that was folded into the Linear before it, the numbers of both lines.

Not covered: a BatchNorm that went anywhere else, or whose Linear absorbed more than that; such a one is not listed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from bnfold.errors import InputError

if TYPE_CHECKING:
    from bnfold.checkpoint import Checkpoint

__all__ = ["Fold", "tell_fold"]

_CLOSE = 1e-4
"""Relative: that the numbers of a file are those of the fold, and not of another one."""

Numbers = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Fold:
    """What a page shows of a fold: files by name; or none, and in `missing` why."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    missing: str | None = None


def tell_fold(model: Path, checkpoint: Path | None = None) -> Fold:
    """Return what a page shows of the fold of an ONNX file; `checkpoint` is by default `ckpt.pt` beside it.

    Raises:
        InputError: `checkpoint` was named and is not what the file was made from.
    """
    place = checkpoint or model.with_suffix(".pt")
    if not place.is_file():
        if checkpoint:
            raise InputError(f"{place}: no such file")
        return Fold(missing=f"there is no {place.name} beside {model.name}")
    proto = onnx.load(model)
    if sha256(place.read_bytes()).hexdigest() not in _sources(proto):
        reason = f"{place.name} is not the checkpoint with BatchNorms that {model.name} was made from"
        if checkpoint:
            raise InputError(f"{place}: {reason}")
        return Fold(missing=reason)
    return _tell(proto, place)


def _sources(proto: onnx.ModelProto) -> set[str]:
    """The hashes of the checkpoints that a file says it was made from."""
    keys = ("source_sha256", "unfolded_sha256")
    return {entry.value for entry in proto.metadata_props if entry.key in keys}


def _tell(folded: onnx.ModelProto, place: Path) -> Fold:
    from bnfold import checkpoint as checkpoints

    unfolded = _write_unfolded(checkpoints.load(place))
    layers = list(_pair(unfolded.graph, folded.graph))
    if not layers:
        return Fold(missing=f"{place.name} has no BatchNorm that was folded into the Linear before it")
    shown = dict.fromkeys(layer[end] for layer in layers for end in ("x", "y"))
    given = {output.name for output in unfolded.graph.output}
    unfolded.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in shown if name not in given
    )
    return Fold({"unfolded.onnx": unfolded.SerializeToString(), "fold.json": json.dumps(layers).encode()})


def _write_unfolded(source: Checkpoint) -> onnx.ModelProto:
    from export.write import write

    return write(source.model, source.input.sample(2), 1, ("context", "logits"))


def _pair(unfolded: onnx.GraphProto, folded: onnx.GraphProto) -> Iterator[dict[str, Any]]:
    """Yield what is told of each BatchNorm whose Linear holds in the file what the fold makes of it."""
    before, after = _tensors(unfolded), _tensors(folded)
    makers = {node.output[0]: node for node in unfolded.node}
    products = {node.name: node for node in folded.node if node.op_type == "Gemm"}
    for norm in unfolded.node:
        linear = makers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if linear is None or linear.op_type != "Gemm" or linear.name not in products:
            continue
        told = _read(linear, norm, before) | _read_folded(products[linear.name], after)
        if _holds(told):
            yield {
                "batchnorm": norm.name,
                "linear": linear.name,
                "x": linear.input[0],
                "y": norm.output[0],
            } | {key: _spell(value) for key, value in told.items()}


def _read(linear: onnx.NodeProto, norm: onnx.NodeProto, tensors: Mapping[str, Numbers]) -> dict[str, Numbers]:
    names = ("gamma", "beta", "mean", "var")
    told = {name: tensors[key] for name, key in zip(names, norm.input[1:], strict=True)}
    eps = next(entry.f for entry in norm.attribute if entry.name == "epsilon")
    return told | {"eps": np.array([eps], np.float32)} | _affine(linear, tensors, "W", "b")


def _read_folded(linear: onnx.NodeProto, tensors: Mapping[str, Numbers]) -> dict[str, Numbers]:
    return _affine(linear, tensors, "W2", "b2")


def _affine(
    linear: onnx.NodeProto, tensors: Mapping[str, Numbers], weight: str, bias: str
) -> dict[str, Numbers]:
    """The weight and the bias of a Gemm as `export` writes it, with its weight as torch stores it."""
    rows = tensors[linear.input[1]]
    offset = tensors[linear.input[2]] if len(linear.input) > 2 else np.zeros(len(rows), rows.dtype)
    return {weight: rows, bias: offset}


def _tensors(graph: onnx.GraphProto) -> dict[str, Numbers]:
    return {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}


def _holds(told: Mapping[str, Numbers]) -> bool:
    """Tell whether W2 and b2 are what the formula makes of the other numbers."""
    if told["W"].shape != told["W2"].shape:
        return False
    scale = told["gamma"] / np.sqrt(told["var"].astype(np.float64) + told["eps"])
    wanted = {"W2": scale[:, None] * told["W"], "b2": scale * (told["b"] - told["mean"]) + told["beta"]}
    return all(
        np.abs(told[key] - value).max() <= _CLOSE * np.abs(value).max() for key, value in wanted.items()
    )


def _spell(numbers: Numbers) -> Any:
    """Nested lists of the shortest decimals that stand for the same float32 numbers."""
    if numbers.ndim:
        return [_spell(one) for one in numbers]
    return float(str(numbers))
