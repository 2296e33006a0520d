"""What `train.diagnostics` saw, for TensorBoard: `pip install tensorboard`, then `tensorboard --logdir DIR`.

    write_events(diagnostics, folder)

Scalars of every step: `loss`. Of the steps that were watched: `saturated`, `dead` and `std` of each layer, `update`
(log10 of update:data) and `grad:data` of each weight; and, as histograms, outputs and gradients. The package is asked
for only here; neither the project nor its tests need it otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.errors import InputError
from train.diagnostics import BINS, Diagnostics, Record, Spread

__all__ = ["check_tensorboard", "write_events"]


def write_events(diagnostics: Diagnostics, folder: str | Path) -> None:
    """Write an event file into `folder`, made if need be, beside those of earlier runs.

    Raises:
        InputError: the package tensorboard is missing, or `folder` is a file.
    """
    with _open(folder) as writer:
        for step, loss in enumerate(diagnostics.losses):
            writer.add_scalar("loss", loss, step)
        for record in diagnostics.records:
            for name, value in _scalars(record):
                if math.isfinite(value):
                    writer.add_scalar(name, value, record.step)
            for name, spread in _spreads(record):
                _add_histogram(writer, name, spread, record.step)


def check_tensorboard() -> Any:
    """Return what writes an event file.

    Raises:
        InputError: the package tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs the package tensorboard; pip install tensorboard") from error
    return SummaryWriter


def _open(folder: str | Path) -> Any:
    writer = check_tensorboard()
    if Path(folder).is_file():
        raise InputError(f"{folder} is a file; name a folder for the events")
    return writer(str(folder))


def _scalars(record: Record) -> Iterator[tuple[str, float]]:
    for layer in record.layers:
        yield f"saturated/{layer.name}", layer.saturated
        yield f"dead/{layer.name}", layer.dead
        yield f"std/{layer.name}", layer.output.std
    for parameter in record.parameters:
        if len(parameter.shape) > 1:
            yield f"update/{parameter.name}", parameter.update_ratio
            yield f"grad:data/{parameter.name}", parameter.gradient_ratio


def _spreads(record: Record) -> Iterator[tuple[str, Spread]]:
    named = [(f"outputs/{layer.name}", layer.output) for layer in record.layers]
    named += [(f"output gradients/{layer.name}", layer.gradient) for layer in record.layers if layer.gradient]
    named += [(f"gradients/{p.name}", p.gradient) for p in record.parameters if p.gradient]
    yield from named


def _add_histogram(writer: Any, name: str, spread: Spread, step: int) -> None:
    count = spread.counts.sum()
    if not count:
        return
    std = spread.std if math.isfinite(spread.std) else 0.0
    writer.add_histogram_raw(
        name,
        min=spread.least,
        max=spread.most,
        num=int(count),
        sum=spread.mean * count,
        sum_squares=std**2 * (count - 1) + spread.mean**2 * count,
        bucket_limits=np.linspace(spread.least, spread.most, BINS + 1)[1:].tolist(),
        bucket_counts=spread.counts.tolist(),
        global_step=step,
    )
