"""One computation in several processes, as torchrun starts them: who this one is, its share, and sums over all.

    with join() as processes:                      # None where this process is the only one
        mine = processes.share(rows)
        processes.add(sums)

torchrun says in the environment how many there are (WORLD_SIZE), which one this is (RANK), which of its machine
(LOCAL_RANK) and where they meet. The collectives are gloo's on the CPU and NCCL's on GPUs. All processes are given the
same result, to the last bit: what is gathered stands in the order of the processes.

A process that was killed closes its connections, and the others notice at their next collective: `ProcessLost`. One
that hangs is given up after `PATIENCE`. Over NCCL it may be torchrun that ends the others first, with a signal.

Not covered: going on with fewer processes; a training that was kept can be resumed with any number of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from bnfold.command import is_started
from bnfold.errors import InputError, ProcessLost

__all__ = ["PATIENCE", "Processes", "join"]

PATIENCE = timedelta(minutes=2)
"""So long a process waits for the others before it gives them up."""


class Processes:
    """Those of a group, seen from one of them.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Take part in a group that was made already; None is that of all."""
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        on_gpu = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def add(self, values: Tensor) -> None:
        """Add a tensor up over all processes, in place.

        Raises:
            ProcessLost: one of them is gone.
        """
        with _noticing():
            dist.all_reduce(values, group=self._group)

    def share(self, rows: Tensor) -> Tensor:
        """The rows of this process; those of all are all, in order."""
        return rows[slice(*self.bounds(len(rows)))]

    def bounds(self, count: int) -> tuple[int, int]:
        """Where the share of this process begins and ends among so many."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def any(self, here: bool) -> bool:
        """Whether something is so in any process."""
        found = torch.tensor([int(here)], device=self._device)
        self.add(found)
        return bool(found.item())

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensors of all processes, which have one shape, on the device of this one's.

        Raises:
            ProcessLost: one of them is gone.
        """
        near = values.to(self._device).contiguous()
        found = [torch.empty_like(near) for _ in range(self.size)]
        with _noticing():
            dist.all_gather(found, near, group=self._group)
        return [one.to(values.device) for one in found]

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """What each process has to say."""
        lengths = [int(one) for one in self.gather(torch.tensor([len(content)]))]
        padded = torch.frombuffer(bytearray(content.ljust(max(lengths) or 1, b"\0")), dtype=torch.uint8)
        return [bytes(one[:n].tolist()) for one, n in zip(self.gather(padded), lengths, strict=True)]


@contextmanager
def join(device: str = "cpu") -> Iterator[Processes | None]:
    """Join the processes that torchrun started, and leave them at the end; None where it started none.

    Args:
        device: what the tensors of collectives will be on: the kind, cpu or cuda.

    Raises:
        InputError: there are fewer GPUs than processes.
        ProcessLost: the others did not come.
    """
    if not is_started():
        yield None
        return
    if device == "cuda":
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    with _noticing():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    yield Processes()
    dist.destroy_process_group()


def _take_gpu(number: int) -> None:
    """Make one GPU that of this process."""
    count = torch.cuda.device_count()
    if number >= count:
        raise InputError(f"there are more processes than GPUs ({count}); start as many with --nproc-per-node")
    torch.cuda.set_device(number)


@contextmanager
def _noticing() -> Iterator[None]:
    """Say of a collective that breaks off what it means: torch has no error of its own for it."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ProcessLost("another process of this computation is gone, or did not answer") from error
