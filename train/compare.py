"""Two checkpoints side by side: python -m train --compare a.pt b.pt.

Both are measured here and now, on the same list and with the same seeds, in eval mode: sizes, losses, what the layers
that bend put out for every context of the training set, how far the two distributions over characters are apart, and
the names that each invents. So a folded net stands beside the one it came from, a recipe beside another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

from torch import Generator, Tensor, nn

import data
from bnfold.checkpoint import Checkpoint
from bnfold.errors import InputError
from train.diagnostics import Layer, examine
from train.evaluate import evaluating, measure
from train.material import Material, prepare
from train.net import count_parameters
from train.page import Table
from train.sample import invent, load_characters

__all__ = ["Side", "compare", "load_side"]

_PARTS = ("train", "dev", "test")


@dataclass(frozen=True)
class Side:
    """A checkpoint with the material that fits its context."""

    checkpoint: Checkpoint
    material: Material

    @property
    def net(self) -> nn.Sequential:
        """Its net, in eval mode."""
        return self.checkpoint.model

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The outputs of the layers that bend, for every context of the training set."""
        return {layer.name: layer for layer in examine(self.net, self.material.train.contexts)}

    def logs(self, contexts: Tensor) -> Tensor:
        """Return log probabilities (n, characters) float64."""
        with evaluating(self.net):
            logits: Tensor = self.net(contexts)
        return logits.double().log_softmax(1)


def load_side(path: str, names: Sequence[str]) -> Side:
    """Load a checkpoint and prepare `names` for it.

    Raises:
        InputError: the file is no checkpoint of a net over the characters of `names`.
    """
    checkpoint, vocabulary, context = load_characters(path)
    material = prepare(names, context)
    if vocabulary != material.vocabulary:
        raise InputError(
            f"{path} was trained on other characters than this list has; name its list with --names"
        )
    return Side(checkpoint, material)


def compare(left: Side, right: Side, titles: tuple[str, str], count: int, seed: int) -> list[Table]:
    """Return what is to be shown: sizes and losses, the layers, the distance, the first `count` names of each."""
    sides = (left, right)
    return [
        Table(("", *titles), [*_describe(sides), *_measure(sides), *_measure_distance(left, right)]),
        Table(("std, saturated, dead of", *titles), _list_layers(sides), words=(1, 2)),
        Table(("names of", *titles), list(_list_names(sides, count, seed)), words=(1, 2)),
    ]


def _describe(sides: tuple[Side, Side]) -> list[tuple[str, ...]]:
    norms = (sum(isinstance(layer, nn.BatchNorm1d) for layer in side.net) for side in sides)
    return [
        ("recipe", *(_tell(side, "recipe") for side in sides)),
        ("seed", *(_tell(side, "seed") for side in sides)),
        ("steps taken", *(_tell(side, "steps", "taken") for side in sides)),
        ("folded", *("yes" if side.checkpoint.folded else "no" for side in sides)),
        ("BatchNorms", *map(str, norms)),
        ("parameters", *(f"{count_parameters(side.net):,}" for side in sides)),
    ]


def _tell(side: Side, *keys: str) -> str:
    """Return an entry of the record, a dash where there is none."""
    value: Any = side.checkpoint.record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return "-" if value is None else f"{value}"


def _measure(sides: tuple[Side, Side]) -> list[tuple[str, ...]]:
    return [
        (f"{part} loss", *(f"{measure(side.net, getattr(side.material, part)):.4f}" for side in sides))
        for part in _PARTS
    ]


def _measure_distance(left: Side, right: Side) -> list[tuple[str, ...]]:
    """Return KL(left || right) and KL(right || left) over the training examples, in the order of the columns."""
    if left.material.context != right.material.context:
        return []
    table = left.material.train
    logs = left.logs(table.contexts), right.logs(table.contexts)
    apart = (
        float((p.exp() * (p - q)).sum(1) @ table.frequencies) / table.examples for p, q in (logs, logs[::-1])
    )
    return [("KL from the other, nats", *(f"{max(value, 0):.3g}" for value in apart))]


def _list_layers(sides: tuple[Side, Side]) -> list[tuple[str, ...]]:
    names = dict.fromkeys(name for side in sides for name in side.layers)
    return [(name, *(_tell_layer(side.layers.get(name)) for side in sides)) for name in names]


def _tell_layer(layer: Layer | None) -> str:
    return f"{layer.output.std:.3f}, {layer.saturated:.1%}, {layer.dead:.1%}" if layer else ""


def _list_names(sides: tuple[Side, Side], count: int, seed: int) -> Sequence[tuple[str, ...]]:
    columns = (
        invent(side.net, _vocabulary(side), side.material.context, count, Generator().manual_seed(seed))
        for side in sides
    )
    return [(f"{number}", *names) for number, names in enumerate(zip_longest(*columns, fillvalue=""), 1)]


def _vocabulary(side: Side) -> data.Vocabulary:
    return side.material.vocabulary
