"""ONNX's reference implementation in float64, with convolutions that are fast enough for real nets.

A convolution is a matrix product of the weight with what its taps see ("im2col"), some rows of outputs at a time.
ConvTranspose is the same, scattered instead of gathered. BatchNormalization is written here as well, since before
operator set 14 the reference normalises by the batch; and the poolings, since it fails on padded sequences and on
windows that reach too far. A value is forgotten once nobody will read it, and a stored tensor is read, and widened,
when a node asks for it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_max_pool import MaxPool as ReferenceMaxPool

from bnfold.errors import InputError
from bnfold.onnx.flatten import bodies
from bnfold.onnx.lower import EPSILON
from bnfold.onnx.protos import FLOATS, load
from bnfold.onnx.run import Numbers, fixed_values, widen

__all__ = ["evaluate"]

Tensor = np.ndarray[Any, Any]


def evaluate(
    model: onnx.ModelProto,
    feeds: Sequence[dict[str, Tensor]],
    folder: Path | None = None,
    late: Mapping[str, Numbers] | None = None,
) -> list[list[Any]]:
    """The outputs of a model for each feed; see `bnfold.onnx.run.run_exactly`.

    Raises:
        InputError: the reference implementation cannot run it.
    """
    try:
        ops = [Conv, ConvTranspose, BatchNormalization, MaxPool, AveragePool]
        evaluator = Evaluator(model, folder=folder, late=late, new_ops=ops)
        with np.errstate(all="ignore"):
            return [list(evaluator.run(None, feed)) for feed in feeds]
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"the reference implementation cannot run it in float64: {line}") from error


class Evaluator(ReferenceEvaluator):
    """ONNX's own, but that of a large net only a few values and tensors live at once.

    A value is forgotten once nobody will read it, and a stored tensor is read when a node asks for it. Functions and
    bodies are run as ONNX's own evaluator runs them.
    """

    def __init__(
        self,
        proto: Any,
        *given: Any,
        folder: Path | None = None,
        late: Mapping[str, Numbers] | None = None,
        **options: Any,
    ) -> None:
        self.folder, self.late, self.stored = folder, late or {}, dict[str, onnx.TensorProto]()
        super().__init__(proto, *given, **options)

    def _init(self) -> None:
        if isinstance(self.proto_, onnx.ModelProto):
            self.stored = {item.name: item for item in self.inits_ if isinstance(item, onnx.TensorProto)}
            self.fixed = fixed_values(self.proto_.graph)
            self.inits_ = [item for item in self.inits_ if not isinstance(item, onnx.TensorProto)]
        super()._init()

    def _read(self, name: str) -> Tensor:
        tensor = self.stored[name]
        if name in self.late:
            return self.late[name](onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        array = load(tensor, self.folder)
        return widen(array) if tensor.data_type in FLOATS and name not in self.fixed else array

    def run(self, output_names: Any, feed_inputs: dict[str, Any], *given: Any, **options: Any) -> Any:
        """The outputs by their names, in order."""
        if not isinstance(self.proto_, onnx.ModelProto):
            return super().run(output_names, feed_inputs, *given, **options)
        wanted = self.output_names if output_names is None else output_names
        found: dict[str, Any] = {"": None, **self.rt_inits_, **feed_inputs}
        waiting = Counter(name for node in self.rt_nodes_ for name in _reads(node.onnx_node))
        waiting.update(wanted)
        for node in self.rt_nodes_:
            read = list(_reads(node.onnx_node))
            found |= {name: self._read(name) for name in read if name not in found and name in self.stored}
            context = {"context": found} if node.need_context() else {}
            made = node.run(*(found[name] for name in node.input), **context)
            found.update(zip(node.output, made, strict=False))
            del made
            waiting.subtract(read)
            for name in {*read, *node.output} - {""}:
                if not waiting[name]:
                    found.pop(name, None)
        return [found[name] if name in found else self._read(name) for name in wanted]


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node and the bodies in it read, of which some may be theirs."""
    yield from node.input
    for body in bodies(node):
        yield from (item.name for item in body.output)
        for inner in body.node:
            yield from _reads(inner)


BLOCK = 2**19
"""How many numbers that the taps of a convolution see are laid out at once."""


class Conv(OpRun):
    """The convolution of the ONNX operator page."""

    op_domain = ""

    def _run(
        self,
        data: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Tensor]:
        kernel = weight.shape[2:]
        strides, dilations = strides or [1] * len(kernel), dilations or [1] * len(kernel)
        both = _padding(data.shape[2:], kernel, auto_pad, pads, strides, dilations)
        padded = np.pad(data, [(0, 0), (0, 0), *both]) if np.any(both) else data
        sizes = [
            (n - (k - 1) * d - 1) // s + 1
            for n, k, d, s in zip(padded.shape[2:], kernel, dilations, strides, strict=True)
        ]
        taps = np.moveaxis(weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1), 3, 0)
        result = np.empty((data.shape[0], weight.shape[0], *sizes), np.result_type(data, weight))
        product = (
            partial(_scale, taps) if taps.shape[-1] == 1 else partial(_multiply, np.concatenate(taps, 2))
        )
        seen = data.shape[0] * data.shape[1] * math.prod(kernel) * math.prod(sizes[1:])
        is_view = math.prod(kernel) == 1 and all(step == 1 for step in strides)
        rows = sizes[0] if is_view else max(1, BLOCK // max(1, seen))
        for first in range(0, sizes[0], rows):
            some = [min(rows, sizes[0] - first), *sizes[1:]]
            cuts = [
                _window(offset, some, strides, dilations) for offset in itertools.product(*map(range, kernel))
            ]
            block = product(_lay_out(padded[:, :, first * strides[0] :], cuts, group))
            result[:, :, first : first + rows] = block.reshape(data.shape[0], -1, *some)
        if bias is not None:
            result += bias.reshape(-1, *[1] * len(kernel))
        return (result,)


def _lay_out(data: Tensor, cuts: Sequence[tuple[slice, ...]], group: int) -> list[Tensor]:
    """What each tap sees, of shape `(batch, group, channels, positions)`."""
    seen = (data[(slice(None), slice(None), *cut)] for cut in cuts)
    return [each.reshape(data.shape[0], group, -1, math.prod(each.shape[2:])) for each in seen]


def _scale(taps: Tensor, seen: Sequence[Tensor]) -> Tensor:
    """The products of taps that read one channel each with what they see, added up."""
    return functools.reduce(np.add, (tap * each for tap, each in zip(taps, seen, strict=True)))


def _multiply(taps: Tensor, seen: Sequence[Tensor]) -> Tensor:
    """The product of taps, side by side, with what they see."""
    product: Tensor = taps @ (seen[0] if len(seen) == 1 else np.concatenate(seen, 2))
    return product


class ConvTranspose(OpRun):
    """The transposed convolution of the ONNX operator page."""

    op_domain = ""

    def _run(
        self,
        data: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        kernel_shape: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Tensor]:
        kernel, spatial = weight.shape[2:], len(weight.shape[2:])
        strides, dilations = strides or [1] * spatial, dilations or [1] * spatial
        extra = list(output_padding or [0] * spatial)
        whole = [
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(data.shape[2:], strides, kernel, dilations, strict=True)
        ]
        begin, sizes = _cropping(data.shape[2:], whole, extra, auto_pad, output_shape, pads, strides)
        rows = weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
        room = [max(w, b + n) for w, b, n in zip(whole, begin, sizes, strict=True)]
        result = np.zeros((data.shape[0], group * weight.shape[1], *room), np.result_type(data, weight))
        seen = data.reshape(data.shape[0], group, rows.shape[1], -1)
        for tap, offset in enumerate(itertools.product(*map(range, kernel))):
            part = rows[..., tap].swapaxes(1, 2) @ seen
            cut = _window(offset, data.shape[2:], strides, dilations)
            result[(slice(None), slice(None), *cut)] += part.reshape(data.shape[0], -1, *data.shape[2:])
        cropped = tuple(slice(b, b + n) for b, n in zip(begin, sizes, strict=True))
        result = result[(slice(None), slice(None), *cropped)]
        return (result if bias is None else result + bias.reshape(-1, *[1] * spatial),)


class MaxPool(OpRun):
    """Of floats, without indices: the reference implementation fails on padded sequences, and is slow."""

    op_domain = ""

    def _run(self, data: Tensor, **options: Any) -> Any:
        if len(self.onnx_node.output) > 1 or data.dtype.kind != "f":
            return ReferenceMaxPool._run(self, data, **options)  # type: ignore[no-untyped-call, arg-type]
        return (functools.reduce(np.maximum, _taps(data, options, -np.inf)),)


class AveragePool(OpRun):
    """The mean over what lies inside a window; what lies in the padding counts where the node says so."""

    op_domain = ""

    def _run(self, data: Tensor, **options: Any) -> tuple[Tensor]:
        counted = _taps(np.ones_like(data[:1, :1]), options, float(bool(options.get("count_include_pad"))))
        return (functools.reduce(np.add, _taps(data, options, 0.0)) / functools.reduce(np.add, counted),)


def _taps(data: Tensor, options: dict[str, Any], padding: float) -> Iterator[Tensor]:
    """What each tap of a sliding window sees, at all positions; a last window may reach beyond the padding."""
    kernel = options["kernel_shape"]
    strides = options.get("strides") or [1] * len(kernel)
    dilations = options.get("dilations") or [1] * len(kernel)
    pads = _padding(
        data.shape[2:], kernel, options.get("auto_pad") or "NOTSET", options.get("pads"), strides, dilations
    )
    sizes, beyond = [], []
    for n, k, d, s, (before, after) in zip(data.shape[2:], kernel, dilations, strides, pads, strict=True):
        span = n + before + after - (k - 1) * d - 1
        one_more = bool(options.get("ceil_mode")) and span % s > 0 and (span // s + 1) * s < n + before
        sizes.append(span // s + 1 + one_more)
        beyond.append((0, max(0, (sizes[-1] - 1) * s + (k - 1) * d + 1 - n - before - after)))
    padded = np.pad(data, [(0, 0), (0, 0), *pads], constant_values=padding)
    padded = np.pad(padded, [(0, 0), (0, 0), *beyond], constant_values=min(padding, 0.0))
    for offset in itertools.product(*map(range, kernel)):
        yield padded[(slice(None), slice(None), *_window(offset, sizes, strides, dilations))]


class BatchNormalization(OpRun):
    """Inference only: before operator set 14 the reference implementation normalises by the batch."""

    op_domain = ""

    def _run(
        self, data: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, **options: Any
    ) -> tuple[Tensor]:
        if len(self.onnx_node.output) > 1 or options.get("training_mode"):
            raise NotImplementedError("BatchNormalization in training mode")
        shape = (1, -1, *[1] * (data.ndim - 2)) if scale.ndim == 1 else (1, *scale.shape)
        scale, bias, mean, var = (np.reshape(a, shape) for a in (scale, bias, mean, var))
        result: Tensor = data - mean
        result *= scale / np.sqrt(var + options.get("epsilon", EPSILON))
        result += bias
        return (result,)


def _window(
    offset: Sequence[int], sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[slice, ...]:
    """Where one tap of a kernel reads (or writes), for all outputs (or inputs) at once."""
    return tuple(
        slice(o * d, o * d + (n - 1) * s + 1, s)
        for o, n, s, d in zip(offset, sizes, strides, dilations, strict=True)
    )


def _padding(
    data: Sequence[int],
    kernel: Sequence[int],
    auto_pad: str,
    pads: Sequence[int] | None,
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        both = list(pads or [0] * 2 * len(kernel)) if auto_pad == "NOTSET" else [0] * 2 * len(kernel)
        return list(zip(both[: len(kernel)], both[len(kernel) :], strict=True))
    result = []
    for n, k, s, d in zip(data, kernel, strides, dilations, strict=True):
        total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
        less = total // 2
        result.append((less, total - less) if auto_pad == "SAME_UPPER" else (total - less, less))
    return result


def _cropping(
    data: Sequence[int],
    whole: Sequence[int],
    extra: Sequence[int],
    auto_pad: str,
    output_shape: Sequence[int] | None,
    pads: Sequence[int] | None,
    strides: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Where the output of a ConvTranspose begins in the whole of what it computes, and its sizes."""
    spatial = len(data)
    wanted = list(output_shape) if output_shape else None
    if wanted is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(data, strides, strict=True)]
    if wanted is None:
        both = list(pads or [0] * 2 * spatial)
        ends = [
            w + e - b - a for w, e, b, a in zip(whole, extra, both[:spatial], both[spatial:], strict=True)
        ]
        return both[:spatial], ends
    begin = []
    for w, e, n in zip(whole, extra, wanted[-spatial:], strict=True):
        total = max(0, w + e - n)
        begin.append(total // 2 if auto_pad == "SAME_UPPER" else total - total // 2)
    return begin, wanted[-spatial:]
