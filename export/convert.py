"""From a checkpoint, or any module, to a proven ONNX file: fold, write, prove, then put the file in its place.

A file is held to the net as it was given, BatchNorms and all, so that one comparison covers the fold and the export.
Its `metadata_props` say where it came from, in JSON but for the hashes:

    vocabulary      the character of every index (of a net over characters)
    input           shape, dtype and alphabet of one example
    source_sha256   of the checkpoint file; unfolded_sha256 of the one that was folded into it, if it was folded before
    verdicts        what became of every BatchNorm
    weights         int8, where they are
    tables          which table stands for layers, where one does: whole or positions (`export.tables`)
    versions        of bnfold, torch and onnx here, and under `trained` of what made the checkpoint

and nothing of the time, the machine or the path, so the same checkpoint gives the same file.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

import bnfold
from bnfold import checkpoint as checkpoints
from bnfold.checkpoint import Checkpoint, InputDomain, drop_identities
from bnfold.errors import InputError
from bnfold.output import replacing
from bnfold.report import Evidence, Verdict
from export.prove import Examples, choose_examples, prove
from export.quantise import DevLoss, Int8, count_dev, hold, measure_loss, quantise
from export.tables import Kind, tabulate
from export.write import Batch, write
from train.material import ContextCounts

__all__ = ["Exported", "export", "export_module", "has_batchnorm", "locate_output"]

_BATCHNORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class Exported:
    """What was written, and why it can be relied on.

    Attributes:
        path: the file.
        operators: the ONNX operator of each node, in order.
        size: of the file, in bytes.
        verdicts: what became of each BatchNorm.
        evidence: the comparison that let the file be written.
        model: the folded net that the file stands for.
        tables: which kind of table stands for layers of it, if one does.
        loss: where the file has int8 weights, what these do to the dev loss; `evidence` then is of the file without.
    """

    path: Path
    operators: tuple[str, ...]
    size: int
    verdicts: tuple[Verdict, ...]
    evidence: Evidence
    model: nn.Module
    tables: Kind | None = None
    loss: DevLoss | None = None

    @property
    def counts(self) -> str:
        """The operators with their numbers: `Gather, 3 Gemm, 2 Tanh`."""
        return ", ".join(f"{n} {op}" if n > 1 else op for op, n in Counter(self.operators).items())


@dataclass(frozen=True)
class _Options:
    """What only a checkpoint has: inputs that a table can list, a dev loss that int8 weights are held to."""

    tables: InputDomain | None = None
    weights: Int8 | None = None
    dev: ContextCounts | None = None


def export(
    source: Checkpoint | str | Path,
    path: str | Path | None = None,
    batch: Batch = 1,
    tables: Literal["never", "auto"] = "never",
    weights: Int8 | None = None,
) -> Exported:
    """Export a checkpoint as ONNX, its BatchNorms folded, proven on every input that there is.

    The input is named `context` and the output `logits` where the net has a vocabulary, else `input` and `output`.

    Args:
        source: a checkpoint or its file.
        path: where to write; by default `ckpt.onnx` beside `ckpt.pt` or `ckpt.folded.pt`.
        batch: how many examples one run takes, or `"dynamic"`.
        tables: `"auto"` for a table in the place of layers where one example then takes less time.
        weights: for large weights as int8, which onnxruntime alone reads, within a budget of dev loss.

    Raises:
        InputError: the checkpoint cannot be read or expressed, or the file not be written there; int8 weights cost more
            than they may, or the net has no dev loss.
        NotEquivalent: onnxruntime computes something else; nothing is written.
    """
    given = source if isinstance(source, Checkpoint) else checkpoints.load(source)
    if path is None:
        if isinstance(source, Checkpoint):
            raise InputError("a checkpoint in memory has no file to name the ONNX after; give a path")
        path = locate_output(source)
    _keep_source(source, path)
    names = ("context", "logits") if given.vocabulary else ("input", "output")
    metadata = _describe(given)
    if not isinstance(source, Checkpoint):
        metadata["source_sha256"] = sha256(Path(source).read_bytes()).hexdigest()
    options = _Options(
        tables=given.input if tables == "auto" else None,
        weights=weights,
        dev=count_dev(given, weights.names) if weights else None,
    )
    examples = choose_examples(given.input)
    return _convert(given.model, examples, path, batch, names, metadata, given.folded, options)


def export_module(model: nn.Module, inputs: Tensor, path: str | Path, batch: Batch = 1) -> Exported:
    """Export any module in eval mode that maps one tensor to one, its BatchNorms folded, proven on `inputs`.

    Args:
        model: not changed.
        inputs: examples to fold and to compare with, `(count, ...)`.
        path: where to write.
        batch: how many examples one run takes, or `"dynamic"`.

    Raises:
        InputError: the module cannot be expressed, or the file not be written there.
        NotEquivalent: onnxruntime computes something else; nothing is written.
    """
    if not isinstance(inputs, Tensor) or not len(inputs):
        raise InputError("`inputs` must be a tensor of at least one example, the batch first")
    metadata = {"versions": _versions({})}
    return _convert(model, Examples(inputs), path, batch, ("input", "output"), metadata, None)


def locate_output(source: str | Path) -> Path:
    """Return `ckpt.onnx` for `ckpt.pt` and for `ckpt.folded.pt`."""
    path = Path(source)
    return path.with_name(path.stem.removesuffix(".folded") + ".onnx")


def has_batchnorm(model: nn.Module) -> bool:
    """Tell whether a net has a layer that `bnfold.fold` would give a verdict on."""
    return any(isinstance(layer, _BATCHNORMS) for layer in model.modules())


def _convert(
    model: nn.Module,
    examples: Examples,
    path: str | Path,
    batch: Batch,
    names: tuple[str, str],
    metadata: dict[str, Any],
    folded_before: Any,
    options: _Options = _Options(),
) -> Exported:
    axis = _axis(batch)
    with replacing(path) as temporary:
        folded, verdicts = _fold(model, examples.inputs, folded_before)
        metadata["verdicts"] = [asdict(verdict) for verdict in verdicts]
        net, kind = tabulate(folded, options.tables, axis, model) if options.tables else (folded, None)
        if kind:
            metadata["tables"] = kind
        proto = write(net, _pair(examples.inputs), axis, names, _encode(metadata))
        content = proto.SerializeToString(deterministic=True)
        evidence, loss = prove(content, model, examples), None
        if options.weights and options.dev:
            helper.set_model_props(proto, _encode({**metadata, "weights": "int8"}))
            proto = quantise(proto)
            content = proto.SerializeToString(deterministic=True)
            loss = measure_loss(model, content, options.dev)
            hold(loss, options.weights.max_loss_increase)
        temporary.write_bytes(content)
    operators = tuple(node.op_type for node in proto.graph.node)
    return Exported(Path(path), operators, len(content), verdicts, evidence, folded, kind, loss)


def _fold(model: nn.Module, inputs: Tensor, before: Any) -> tuple[nn.Module, tuple[Verdict, ...]]:
    """Return the net without its BatchNorms, and the verdicts, those of an earlier fold first."""
    verdicts = _recall(before or {})
    if not has_batchnorm(model):
        return model, verdicts
    folded, report = bnfold.fold(model, inputs)
    known = {verdict.name for verdict in report.verdicts}
    verdicts = tuple(verdict for verdict in verdicts if verdict.name not in known) + report.verdicts
    return drop_identities(folded) if type(folded) is nn.Sequential else folded, verdicts


def _recall(record: Any) -> tuple[Verdict, ...]:
    """Return the verdicts in the record of an earlier fold."""
    try:
        return tuple(
            Verdict(str(one["name"]), one["outcome"], tuple(map(str, one["into"])), str(one["reason"]))
            for one in record.get("verdicts", ())
        )
    except (KeyError, TypeError) as error:
        raise InputError("the checkpoint's record of its fold has a verdict that cannot be read") from error


def _pair(inputs: Tensor) -> Tensor:
    return inputs[[0, -1]]


def _axis(batch: Batch) -> Batch:
    if batch == "dynamic":
        return "batch"
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise InputError(f"a batch of {batch!r}; it takes a number from 1 up, or 'dynamic'")
    return batch


def _keep_source(source: Any, path: str | Path) -> None:
    if not isinstance(source, Checkpoint) and Path(path).exists() and Path(path).samefile(source):
        raise InputError(f"{path} is the checkpoint itself; write elsewhere with -o")


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    metadata: dict[str, Any] = {"input": asdict(checkpoint.input), "versions": _versions(checkpoint.versions)}
    if checkpoint.vocabulary:
        metadata["vocabulary"] = checkpoint.vocabulary
    if checkpoint.folded:
        metadata["unfolded_sha256"] = str(checkpoint.folded.get("source"))
    return metadata


def _versions(trained: Any) -> dict[str, Any]:
    here = {"bnfold": bnfold.__version__, "onnx": onnx.__version__, "torch": str(torch.__version__)}
    return {**here, "trained": dict(trained)}


def _encode(metadata: dict[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in metadata.items()
    }
