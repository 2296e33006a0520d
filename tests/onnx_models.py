"""Small ONNX models written as text, and what every fold of one must satisfy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import bnfold.onnx
from bnfold.report import Report

Tensor = np.ndarray[Any, Any]


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def model(
    text: str,
    tensors: Mapping[str, Tensor] | None = None,
    opset: int = 17,
    ir: int = 8,
    extra: str = "",
    rest: str = "",
) -> onnx.ModelProto:
    """Parse a graph (and functions, in `rest`) and give it initializers."""
    header = f'<ir_version: {ir}, opset_import: ["" : {opset}{extra}]>\n'
    parsed = onnx.parser.parse_model(header + text + rest)
    for name, array in (tensors or {}).items():
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return parsed


def norm(channels: int, prefix: str = "", dtype: Any = np.float32, seed: int = 7) -> dict[str, Tensor]:
    """Numbers of a BatchNorm: s, b, m, v; some scales are negative."""
    draw = random(seed + channels)
    sign = np.where(draw.random(channels) < 0.3, -1, 1)
    return {
        f"{prefix}s": (draw.uniform(0.5, 1.5, channels) * sign).astype(dtype),
        f"{prefix}b": draw.standard_normal(channels).astype(dtype),
        f"{prefix}m": draw.standard_normal(channels).astype(dtype),
        f"{prefix}v": draw.uniform(0.5, 2, channels).astype(dtype),
    }


def weights(*shape: int, dtype: Any = np.float32, seed: int = 1) -> Tensor:
    return np.asarray(random(seed + sum(shape)).standard_normal(shape) * 0.5).astype(dtype)


def count(folded: onnx.ModelProto, op: str = "BatchNormalization") -> int:
    """How many nodes of an operator there are, bodies included."""
    total, waiting = 0, [folded.graph]
    while waiting:
        for node in waiting.pop().node:
            total += node.op_type == op
            waiting += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return total


def run(some: onnx.ModelProto, feed: Mapping[str, Tensor], optimised: bool = False) -> dict[str, Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_mem_reuse = False  # it believes sizes that a file declares, be they those of another run
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        some.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(
        zip(
            [o.name for o in session.get_outputs()],
            session.run(None, {name: np.asarray(array) for name, array in feed.items()}),
            strict=True,
        )
    )


def fold(
    some: onnx.ModelProto, gone: int, left: int = 0, tolerance: float = 2e-5, **options: Any
) -> tuple[onnx.ModelProto, Report]:
    """Fold, for any runtime, and hold the result to everything that is owed to any model."""
    options = {"runtime": "any", **options}
    bytes_before = some.SerializeToString(deterministic=True)
    folded, report = bnfold.onnx.fold(some, **options)
    assert some.SerializeToString(deterministic=True) == bytes_before, "the caller's model was changed"
    assert (report.count("folded"), len(report.verdicts)) == (gone, gone + left), str(report)
    onnx.checker.check_model(folded, full_check=True)
    assert [o.name for o in folded.graph.output] == [o.name for o in some.graph.output]
    context = bnfold.onnx.read(some).context
    from bnfold.onnx.inputs import candidates

    feed = options.get("inputs") or next(candidates(some, context, seed=5))
    wanted = run(some, feed)
    for optimised in (False, True):
        for name, array in run(folded, feed, optimised).items():
            assert array.dtype == wanted[name].dtype
            finite = np.isfinite(wanted[name])
            scale = max(float(np.abs(wanted[name][finite]).max(initial=0)), 1e-3)
            np.testing.assert_allclose(array.astype(np.float64), wanted[name], rtol=0, atol=tolerance * scale)
    assert report.verified or not gone
    return folded, report


def kept(some: onnx.ModelProto, reason: str, **options: Any) -> Report:
    """The one BatchNorm of this model must stay, with a reason that says so; the model's bytes stay, too."""
    folded, report = fold(some, 0, 1, **options)
    assert reason in report.verdicts[0].reason, report.verdicts[0].reason
    assert folded.SerializeToString(deterministic=True) == some.SerializeToString(deterministic=True)
    return report


def write(path: Path, some: onnx.ModelProto) -> Path:
    path.write_bytes(some.SerializeToString())
    return path
