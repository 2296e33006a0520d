"""Keep a training beside its checkpoint, and go on with it after a kill, bit for bit as if nothing had been.

    ckpt.training.pt    what the next steps depend on: the net with its running statistics, the optimiser, where the
                        generator was, the loss of every step, and what was watched; read without running any code

It is written in one step (`bnfold.output`), so a kill in the middle of that leaves the one before. When the checkpoint
stands in its place, it is removed; one that another run left, and this one had no time to replace, stays. It belongs to
one command line: names, recipe, seed and the version of torch must be the same.

Not covered: another machine or another build of torch may round otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnfold.archive import load_plain
from bnfold.errors import InputError
from bnfold.output import replacing
from train.diagnostics import Diagnostics, Layer, Parameter, Record, Spread
from train.gradients import Ledger
from train.loop import Training

__all__ = ["Keeper", "beside"]

FORMAT, VERSION = "bnfold.training", 1
SECONDS = 10.0
"""So often a training is kept, unless it is said after how many steps."""


def beside(out: Path) -> Path:
    """Where the training is kept that ends in a checkpoint.

    Raises:
        InputError: there is no place beside a device or a pipe.
    """
    if out.exists() and not out.is_file():
        raise InputError(f"{out} is no plain file, beside which a training could be kept")
    return out.with_name(f"{out.stem}.training.pt")


class Keeper:
    """Keeps one training, and what was seen of it."""

    def __init__(
        self,
        path: Path,
        run: Mapping[str, Any],
        training: Training,
        history: list[float],
        watched: tuple[Diagnostics | None, Ledger | None],
        every: int | None = None,
    ) -> None:
        """Prepare to keep a training.

        Args:
            path: the file.
            run: what tells it from others, in plain values.
            history: the loss of every step, to which somebody else adds.
            watched: what looks on.
            every: keep it after so many steps; None after some seconds.
        """
        self.path, self.run, self.training, self.history, self.every = (
            path,
            dict(run),
            training,
            history,
            every,
        )
        self.diagnostics, self.ledger = watched
        self._last, self._is_own = time.monotonic(), False

    def step(self, loss: float) -> None:
        """Keep the training, if it is time."""
        if self.every is None and time.monotonic() - self._last < SECONDS:
            return
        if self.every is None or self.training.step % self.every == 0:
            self.keep()
            self._last = time.monotonic()

    def keep(self) -> None:
        """Write the file."""
        state: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "run": self.run,
            **self.training.state(),
        }
        state["history"] = torch.tensor(self.history, dtype=torch.float64)
        state["records"] = [_pack(record) for record in self.diagnostics.records] if self.diagnostics else []
        state["ledger"] = self.ledger.state() if self.ledger else {}
        with replacing(self.path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
        self._is_own = True

    def take_up(self) -> bool:
        """Go on with what is in the file; False where there is none.

        Raises:
            InputError: it is the training of another run, or damaged.
        """
        if not self.path.exists():
            return False
        state = _read(self.path)
        self._compare(state["run"])
        try:
            self._restore(state)
        except Exception as error:  # as many as a file can be damaged in
            raise InputError(f"{self.path} is damaged; remove it, or leave --resume out") from error
        self._is_own = True
        return True

    def drop(self) -> None:
        """Remove the file, if it is of this training, which has come to its end."""
        if self._is_own:
            self.path.unlink(missing_ok=True)

    def _compare(self, run: Mapping[str, Any]) -> None:
        for name, value in self.run.items():
            if run.get(name) != value:
                fact = f"{self.path} is the training of another run, whose {name} is {run.get(name)!r:.80} "
                raise InputError(f"{fact}and not {value!r:.80}; leave --resume out to begin anew")

    def _restore(self, state: dict[str, Any]) -> None:
        step, since = state["step"], state["batches"]["since"]
        if not 0 <= since <= step == len(state["history"]) <= self.training.recipe.steps:
            raise ValueError("it counts steps that were not taken")
        self.training.restore(state)
        self.history[:] = state["history"].tolist()
        if self.diagnostics is not None:
            self.diagnostics.losses[:] = self.history
            self.diagnostics.records[:] = [_unpack(record) for record in state["records"]]
        if self.ledger is not None:
            self.ledger.restore(state["ledger"])


def _read(path: Path) -> dict[str, Any]:
    try:
        state = load_plain(path)
    except Exception as error:  # the restricted unpickler fails in as many ways as a file can be damaged
        raise InputError(f"{path} is damaged; remove it, or leave --resume out") from error
    if not isinstance(state, dict) or (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{path} is no training that was kept; leave --resume out")
    if not isinstance(state.get("run"), dict):
        raise InputError(f"{path} is damaged; remove it, or leave --resume out")
    return state


_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Record, Layer, Parameter, Spread)}


def _pack(value: Any) -> Any:
    """Records as plain values and tensors."""
    if is_dataclass(value):
        parts = {field.name: _pack(getattr(value, field.name)) for field in fields(value)}
        return {"class": type(value).__name__, **parts}
    if isinstance(value, tuple):
        return tuple(map(_pack, value))
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _unpack(value: Any) -> Any:
    """The records that became these."""
    if isinstance(value, dict):
        kind = _KINDS[value["class"]]
        return kind(**{name: _unpack(part) for name, part in value.items() if name != "class"})
    if isinstance(value, tuple):
        return tuple(map(_unpack, value))
    return value.numpy() if isinstance(value, Tensor) else value
