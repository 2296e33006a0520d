"""Operations on buffers, recorded once by name and played as often as one likes: a step of training without its costs.

    tape = Tape(like, rows)
    y = tape("tanh", x, out=tape.new(32, 200))     # records; x and y are tensors that keep their place
    play = tape.ready()                            # what does all of it

In nets as small as the lecture's neither the numbers nor the matrices take the time: it is memory that is asked for and
given back, and what it costs to call an operation at all. A tape has a buffer for each result. On the CPU its
elementwise operations are NumPy's, on the same memory, which cost half as much to call as torch's; matrices are
torch's, on as many threads as torch has. On CUDA all are torch's, and the whole tape is one graph, played by one call.

Where a batch is spread over processes, `add` adds a tensor up over all of them. Not covered: operations that are not in
the table, and results whose size depends on the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Add", "Tape"]

Add = Callable[[Tensor], object]
"""Adds a tensor up over all processes, in place."""

Operation = Callable[[], object]


class Tape:
    """A list of operations.

    Attributes:
        rows: how many the whole batch has.
        operations: what is done, in order.
        afterwards: what is done when all that has come through.
    """

    def __init__(self, like: Tensor, rows: int, add: Add | None = None) -> None:
        """Begin an empty tape, for numbers of a dtype on a device."""
        self.rows, self._like, self._add = rows, like, add
        self.operations: list[Operation] = []
        self.afterwards: list[Operation] = []
        by_numpy = like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)
        self._functions, self._view = (_NUMPY, _as_array) if by_numpy else (_TORCH, _as_it_is)

    def __call__(self, name: str, *inputs: Tensor | float, out: Tensor, late: bool = False) -> Tensor:
        """Record an operation, `late` among those afterwards; return `out`."""
        function = self._functions[name]
        view = _as_it_is if function is torch.mm else self._view
        operation = partial(function, *map(view, inputs), out=view(out))
        (self.afterwards if late else self.operations).append(operation)
        return out

    def new(self, *shape: int) -> Tensor:
        """Return a buffer."""
        return self._like.new_zeros(shape)

    def count(self, end: int) -> Tensor:
        """Return the integers below `end`."""
        return torch.arange(end, device=self._like.device)

    def reduce(self, values: Tensor) -> None:
        """Record that a tensor is added up over all processes."""
        if self._add is not None:
            self.operations.append(partial(self._add, values))

    def total(self, values: Tensor) -> Tensor:
        """Return the same, added up over all processes, and leave `values` as they are."""
        if self._add is None:
            return values
        total = self("add", values, 0.0, out=torch.empty_like(values))
        self.reduce(total)
        return total

    def play(self) -> None:
        """Do all of it; numbers that are not finite are no news."""
        with np.errstate(all="ignore"):
            for operation in self.operations:
                operation()
            for operation in self.afterwards:
                operation()

    def as_graph(self) -> Operation:
        """Return what plays it as one CUDA graph; what is done now, to warm the device up, leaves nothing behind."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for operation in self.operations:
                operation()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.play()
        replay: Operation = graph.replay
        return replay


def _as_array(value: Any) -> Any:
    return value.detach().numpy() if isinstance(value, Tensor) else value


def _as_it_is(value: Any) -> Any:
    return value


def _named(package: Any) -> dict[str, Any]:
    names = ("add", "subtract", "multiply", "divide", "sqrt", "tanh", "exp", "log", "greater")
    return {name: getattr(package, name) for name in names}


_TORCH: Mapping[str, Any] = _named(torch) | {
    "equal": torch.eq,
    "relu": partial(torch.clamp, min=0.0),
    "sum": partial(torch.sum, dim=0),
    "row sum": partial(torch.sum, dim=1, keepdim=True),
    "row max": partial(torch.amax, dim=1, keepdim=True),
    "sum of all": partial(torch.sum, dim=(0, 1)),
    "matmul": torch.mm,
}
_NUMPY: Mapping[str, Any] = _named(np) | {
    "equal": np.equal,
    "relu": partial(np.maximum, 0.0),
    "sum": partial(np.add.reduce, axis=0),
    "row sum": partial(np.add.reduce, axis=1, keepdims=True),
    "row max": partial(np.maximum.reduce, axis=1, keepdims=True),
    "sum of all": partial(np.add.reduce, axis=(0, 1)),
    "matmul": torch.mm,
}
