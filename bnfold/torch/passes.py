"""Record passes of a module that is left as it was, and make one again where it must be.

`record_pass` captures one: with autograd where the model differentiates by itself, with all numbers where something
depends on one that was left out. `record_somehow` falls back on fake tensors where real ones cannot be had.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from bnfold.errors import UnreadableModel
from bnfold.torch.capture import capture
from bnfold.torch.recorder import Differentiates, NeedsNumbers
from bnfold.torch.sandbox import Snapshot, first_line, restored, undisturbed
from bnfold.torch.tensors import leaves
from bnfold.torch.trace import Trace

__all__ = ["is_meta", "quiet", "record_pass", "record_shapes", "record_somehow", "unreadable"]


def record_pass(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fake: bool,
    nondeterministic: frozenset[str] = frozenset(),
    touched: list[str] | None = None,
    seed: int = 0,
    numbers: bool = True,
    snapshot: Snapshot | None = None,
) -> Trace:
    """Record one pass of a model as it is, on real or on fake tensors; another one where it differentiates.

    Its random state is one that a number stands for. Without `numbers` the costly ones are computed only where
    something depends on them; then, too, the pass is made again.
    """

    def run(differentiates: bool, numbers: bool = True) -> Trace:
        with restored(model, False, touched, snapshot) as own, undisturbed(seed) as draws, quiet():
            trace = capture(
                model, args, kwargs, fake, nondeterministic, False, differentiates, numbers, own.held
            )
            trace.draws = draws.has_drawn()
            return trace

    with suppress(NeedsNumbers):
        with suppress(Differentiates):
            return run(False, numbers or fake)
        return run(True)
    del (touched or [])[:]
    trace = record_pass(model, args, kwargs, fake, nondeterministic, touched, seed, snapshot=snapshot)
    trace.asked = True
    return trace


def record_somehow(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    touched: list[str],
    snapshot: Snapshot | None = None,
    numbers: bool = False,
) -> Trace:
    """Record with real tensors, or with shapes alone where there are no numbers, or no memory or kernel for them.

    No more `numbers` are computed than are asked for: not so of a module that is no copy, since objects in it may keep
    what they see. Fake tensors are not the first choice: they take longer, and what a
    model caches outside of its modules (in an `lru_cache`, say) would be poisoned with them.
    """
    if is_meta(model, args, kwargs):
        try:
            return record_pass(model, args, kwargs, True, touched=touched, snapshot=snapshot)
        except Exception as error:
            raise unreadable(model, error) from error
    try:
        trace = record_pass(model, args, kwargs, False, touched=touched, numbers=numbers, snapshot=snapshot)
        trace.asked |= numbers
        return trace
    except (NotImplementedError, torch.OutOfMemoryError) as error:
        return record_shapes(model, args, kwargs, error, touched, snapshot)
    except Exception as error:
        if "not implemented" in str(error):
            return record_shapes(model, args, kwargs, error, touched, snapshot)
        raise unreadable(model, error) from error


def record_shapes(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    error: Exception,
    touched: list[str],
    snapshot: Snapshot | None = None,
) -> Trace:
    """Record what cannot be run here; where that fails as well, the first problem is the one to report."""
    try:
        return record_pass(model, args, kwargs, True, touched=touched, snapshot=snapshot)
    except Exception:  # noqa: BLE001
        raise unreadable(model, error) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging what a fake tensor cannot do."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def is_meta(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a tensor has no numbers."""
    tensors = (*model.parameters(), *model.buffers(), *(tensor for _, tensor in leaves((args, kwargs))))
    return any(tensor.device.type == "meta" for tensor in tensors)


def unreadable(model: nn.Module, error: BaseException) -> UnreadableModel:
    """What went wrong, by the name of the module in which it did."""
    where = getattr(error, "bnfold_frame", "")
    place = f"`{where}`" if where else f"`{type(model).__name__}`"
    if operator := re.search(r"HigherOrderOperator (\w+)", str(error)):
        return UnreadableModel(
            f"{place} calls torch.{operator[1]}, which cannot be followed; use Python's own control flow"
        )
    if re.search(r"Nested(IntNode|Tensor)", str(error)):
        return UnreadableModel(
            f"{place} works on nested tensors, which cannot be followed; give it tensors that are padded"
        )
    return UnreadableModel(
        f"{place} could not be run on the example inputs: {type(error).__name__}: {first_line(error)}"
    )
