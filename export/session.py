"""Open an ONNX model in onnxruntime on the CPU, quietly, or fail in one line. Imports neither torch nor onnx.

`open_session` gives onnxruntime's own session. `Session` is for call after call: its arrays are bound once, so that a
call is a copy in, the nodes, and a copy out, without dicts, names and allocations.

One thread inside an operator. The lecture's net is no work to share, so a pool of threads only makes the slow calls
slower: over 30,000 calls the median was 6.8 us with one thread and with two, the 99th percentile 7 to 9 us with one
and 10 with two. `python -m benchmarks.latency` shows both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from bnfold.errors import InputError

__all__ = ["Session", "open_session"]

Array = npt.NDArray[Any]

_FATAL = 4

_DTYPES = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(bool)": np.bool_,
    **{
        f"tensor({sign}int{bits})": getattr(np, f"{sign}int{bits}")
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


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
        raise InputError(f"{name} is no ONNX model that onnxruntime can run: {_explain(error)}") from error


class Session:
    """An ONNX model for call after call on the CPU, on one thread, its inputs and outputs bound to memory once.

        session = export.Session("ckpt.onnx")
        logits = session(np.array([[0, 5, 13]]))          # (1, 3) int64 -> (1, 27) float32, an array of its own

        session.inputs["context"][:] = 0, 5, 13           # or without a copy:
        session.run()
        session.outputs["logits"]                         # until the next call

    Threads: a session may be called from several, which then wait for each other; for speed give each thread one of
    its own. `run` with `inputs` and `outputs` is for one thread at a time. A forked process opens its own.

    Attributes:
        inputs: by name, in the model's order, the arrays that the model reads: write into them, never replace them.
        outputs: likewise the arrays that it writes.

    Not covered: strings, sequences, bfloat16, and outputs whose sizes depend on numbers.
    """

    def __init__(
        self, model: str | Path | bytes, shapes: Mapping[str, Sequence[int]] = MappingProxyType({})
    ) -> None:
        """Open a model and run it once on zeros, which tells the shapes of its outputs.

        Args:
            model: a file, or its bytes.
            shapes: the shape of each input that leaves a size open (`{"context": (8, 3)}` of `--batch dynamic`).

        Raises:
            InputError: the model cannot be opened or run, an input's shape is open or another one, or a value is of
                a kind that is not covered.
        """
        self._session = open_session(model)
        entries = self._session.get_inputs()
        unknown = set(shapes) - {entry.name for entry in entries}
        if unknown:
            raise InputError(f"the model has no input `{min(unknown)}`; its inputs: {_list(entries)}")
        self.inputs: Mapping[str, Array] = MappingProxyType(
            {entry.name: np.zeros(_settle(entry, shapes), _dtype(entry)) for entry in entries}
        )
        self.outputs: Mapping[str, Array] = MappingProxyType(self._allocate())
        self._binding = self._bind()
        self._slots = [(array, array.shape, array.dtype) for array in self.inputs.values()]
        self._only = next(iter(self.outputs.values())) if len(self.outputs) == 1 else None
        self._run, self._lock = self._session.run_with_iobinding, Lock()

    def __call__(self, *arrays: Array) -> Any:
        """Return the output for these inputs as a new array; a tuple of arrays where the model has several outputs.

        Args:
            arrays: one for each input, in the model's order, of exactly its shape and dtype.

        Raises:
            InputError: there are more or fewer, one has another shape or dtype, or the model refuses what is in it
                (an index beyond a table).
        """
        if len(arrays) != len(self._slots):
            raise InputError(f"{len(arrays)} arrays for a model with {len(self._slots)} inputs")
        with self._lock:
            for (bound, shape, dtype), array in zip(self._slots, arrays, strict=False):
                if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
                    raise InputError(f"an input takes {_tell(bound)}, and was given {_tell(array)}")
                bound[...] = array
            self.run()
            return self._only.copy() if self._only is not None else tuple(map(np.copy, self.outputs.values()))

    def run(self) -> None:
        """Compute `outputs` from what stands in `inputs`.

        Raises:
            InputError: the model refuses what stands there; what `outputs` hold then is undefined.
        """
        try:
            self._run(self._binding)
        except Exception as error:  # onnxruntime's exceptions share no class below this one
            raise InputError(f"the model cannot be run on this: {_explain(error)}") from error

    def _allocate(self) -> dict[str, Array]:
        """Return arrays of the shapes that the outputs for zeros have."""
        entries = self._session.get_outputs()
        dtypes = [_dtype(entry) for entry in entries]
        try:
            values = self._session.run(None, dict(self.inputs))
        except Exception as error:  # onnxruntime's exceptions share no class below this one
            raise InputError(f"the model cannot be run on zeros: {_explain(error)}") from error
        return {
            entry.name: np.zeros(value.shape, dtype)
            for entry, value, dtype in zip(entries, values, dtypes, strict=True)
        }

    def _bind(self) -> Any:
        binding = self._session.io_binding()
        for name, array in self.inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in self.outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding


def _settle(entry: Any, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Return the shape of an input: its own, with what it leaves open from `shapes`."""
    given = tuple(shapes.get(entry.name, entry.shape))
    fits = len(given) == len(entry.shape) and all(
        isinstance(size, int) and size >= 0 and (own == size or not isinstance(own, int))
        for size, own in zip(given, entry.shape, strict=True)
    )
    if not fits:
        told = "is left open" if entry.name not in shapes else f"is not {list(given)}"
        raise InputError(
            f"the shape {entry.shape} of input `{entry.name}` {told}; give one that fits it in `shapes`"
        )
    return given


def _dtype(entry: Any) -> Any:
    if entry.type not in _DTYPES:
        raise InputError(f"`{entry.name}` is a {entry.type}, which no session binds; use onnxruntime's own")
    return _DTYPES[entry.type]


def _tell(array: Any) -> str:
    given = isinstance(array, np.ndarray)
    return f"{array.dtype} {list(array.shape)}" if given else f"a {type(array).__name__}"


def _list(entries: Sequence[Any]) -> str:
    return ", ".join(f"`{entry.name}`" for entry in entries) or "none"


def _explain(error: Exception) -> str:
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.200}"
