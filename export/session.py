"""Open an ONNX model in onnxruntime on the CPU, quietly, or fail in one line. Imports neither torch nor onnx.

One thread inside an operator. The lecture's net is no work to share, so a pool of threads only makes the slow calls
slower: over 30,000 calls the median was 6.8 us with one thread and with two, the 99th percentile 7 to 9 us with one
and 10 with two. `python -m benchmarks.latency` shows both.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from bnfold.errors import InputError

__all__ = ["open_session"]

_FATAL = 4


def open_session(
    model: str | Path | bytes, optimise: bool = True, threads: int = 1
) -> onnxruntime.InferenceSession:
    """Return a session of a file or of its bytes; `optimise=False` runs the nodes as they are written.

    Raises:
        InputError: there is no such file, it is no ONNX model, or onnxruntime cannot run it.
    """
    name = "the model" if isinstance(model, bytes) else str(model)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise InputError(f"{name}: {'it is a folder' if Path(model).is_dir() else 'no such file'}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no class below this one
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name} is no ONNX model that onnxruntime can run: {reason:.200}") from error
