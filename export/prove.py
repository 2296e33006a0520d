"""Prove an ONNX model before it is written: the checker, and the torch net's own outputs.

The bytes that are to be written are run by onnxruntime as a user would run them and once more with every graph
optimisation off, and held to the net they came from: the one in the checkpoint, before any fold. The truth is that
net in float64. onnxruntime computes the same sums in another order, so it may be off from the truth by a small
multiple of what torch is off by in its own dtype, plus a unit roundoff for each node: the rule of
`bnfold.equivalence.judge`, which also holds the folds.

Inputs are every example where they can be listed (19,683 contexts for the names), and the evidence says so. What this
cannot see is an input of another kind than those that were tried.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from bnfold.checkpoint import InputDomain
from bnfold.equivalence import UNIT_ROUNDOFF, Outputs, judge
from bnfold.errors import InputError
from bnfold.report import Evidence
from export.session import open_session

__all__ = ["Examples", "choose_examples", "prove", "run_double", "run_file"]

_NUMBERS = 2**20


@dataclass(frozen=True)
class Examples:
    """Inputs to compare two models on, (count, ...), and whether those are all there are."""

    inputs: Tensor
    exhaustive: bool = False


def choose_examples(domain: InputDomain) -> Examples:
    """Return every example where there are at most a million; else 64, or fewer where one is large."""
    numbers = max(1, int(np.prod(domain.shape)))
    return Examples(*domain.examples(min(64, max(4, _NUMBERS // numbers))))


def prove(content: bytes, model: nn.Module, examples: Examples) -> Evidence:
    """Check an ONNX file's bytes and compare it with the net it stands for.

    Returns:
        How far the two are apart at most, over both ways of running the file, and the bound.

    Raises:
        NotEquivalent: the bound is exceeded; the message names the worst element.
        InputError: the checker refuses the model, or one of the two cannot be run.
    """
    try:
        onnx.checker.check_model(content, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(
            f"the ONNX checker refuses the model: {str(error).strip().splitlines()[0]}"
        ) from error
    own, truth = _run_torch(model, examples.inputs), run_double(model, examples.inputs)
    nodes = len(onnx.load_from_string(content).graph.node)
    evidence = [
        _judge(
            own, truth, run_file(open_session(content, optimise), examples.inputs.numpy()), nodes, examples
        )
        for optimise in (True, False)
    ]
    return max(evidence, key=lambda one: one.deviation)


def _judge(
    own: npt.NDArray[Any],
    truth: npt.NDArray[Any] | None,
    ran: npt.NDArray[Any],
    nodes: int,
    examples: Examples,
) -> Evidence:
    dtype = str(own.dtype)
    if dtype not in UNIT_ROUNDOFF:
        raise InputError(f"the net computes {dtype}, and only floating-point outputs can be held to a bound")
    before, after, exact = _label(own), _label(ran), None if truth is None else _label(truth)
    pair = None if exact is None else (exact, after if dtype == "float64" else exact)
    last = judge((before, after), pair, dtype, nodes, len(examples.inputs), examples.exhaustive)[-1]
    source = last.source.replace("unfolded error", "torch's own error")
    return replace(last, question=f"onnxruntime, {dtype}", source=source)


def _label(array: npt.NDArray[Any]) -> list[Outputs]:
    return [{"output": array}]


def _run_torch(model: nn.Module, inputs: Tensor) -> npt.NDArray[Any]:
    with torch.inference_mode():
        outputs = [model(part.clone()) for part in torch.split(inputs, _rows(inputs))]
    joined: npt.NDArray[Any] = torch.cat(outputs).numpy()
    return joined


def run_double(model: nn.Module, inputs: Tensor) -> npt.NDArray[Any] | None:
    """Return the outputs in float64, or None where the model insists on its own dtype."""
    try:
        exact = inputs.double() if inputs.is_floating_point() else inputs
        return _run_torch(copy.deepcopy(model).double(), exact)
    except (RuntimeError, TypeError):
        return None


def _rows(inputs: Tensor) -> int:
    return max(1, min(4096, _NUMBERS // max(1, inputs[:1].numel())))


def run_file(session: onnxruntime.InferenceSession, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the outputs of all inputs, in batches of the model's own size; a free one is tried at several."""
    entry = session.get_inputs()[0]
    batch = entry.shape[0] if isinstance(entry.shape[0], int) else None
    parts = list(_batches(inputs, batch))
    try:
        outputs = [session.run(None, {entry.name: part})[0] for part in parts]
    except Exception as error:  # onnxruntime's exceptions share no class below this one
        raise InputError(
            f"onnxruntime cannot run the model: {str(error).strip().splitlines()[0]:.200}"
        ) from error
    joined: npt.NDArray[Any] = np.concatenate(outputs)[: len(inputs)]
    return joined


def _batches(inputs: npt.NDArray[Any], batch: int | None) -> Iterator[npt.NDArray[Any]]:
    """Yield the inputs in batches, the last one filled up; without a size one, two, then up to 4,096 at once."""
    if batch is None:
        cuts = [1, 3, *range(3 + 4096, len(inputs), 4096)]
        yield from (part for part in np.split(inputs, cuts) if len(part))
        return
    missing = -len(inputs) % batch
    filled = np.concatenate([inputs, np.repeat(inputs[-1:], missing, axis=0)])
    yield from np.split(filled, len(filled) // batch)
