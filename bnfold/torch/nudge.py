"""Move every number that a module computes with a little, to see what roundings do to its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bnfold.equivalence import UNIT_ROUNDOFF
from bnfold.torch.stored import copy_with

__all__ = ["nudge", "nudge_inputs"]


def nudge(model: nn.Module, units: float, seed: int, whole: bool) -> nn.Module:
    """A copy of a module, each float in it moved up or down by units in its last place.

    Args:
        model: the module.
        units, seed: how many, and of the directions.
        whole: whether tensors of whole numbers are moved, too: they may be indices, which roundings do not touch.

    Raises:
        Exception: whatever the module raises when it is copied.
    """
    move = _moving(units, seed)
    return copy_with(model, lambda tensor: move(tensor) if whole or not _is_whole(tensor) else tensor)


def nudge_inputs(inputs: list[Any], units: float, seed: int) -> list[Any]:
    """The same of what a module is called with."""
    moved: list[Any] = tree_map_only(Tensor, _moving(units, seed), inputs)
    return moved


def _moving(units: float, seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def move(tensor: Tensor) -> Tensor:
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in UNIT_ROUNDOFF or tensor.layout is not torch.strided or tensor.device.type == "meta":
            return tensor
        signs = torch.randint(2, tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        step = (2 * units * UNIT_ROUNDOFF[kind] * signs).to(tensor.device)
        return (tensor.detach().double() * (1 + step)).to(tensor.dtype)

    return move


def _is_whole(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and bool((tensor.detach().round() == tensor.detach()).all())
