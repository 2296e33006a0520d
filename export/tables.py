"""Replace what a net computes of a few characters by a table of it, where one example at a time then takes less time.

    whole       every output there is, one row for each possible input: GatherND and nothing else
    positions   E(x_1) W_1 + ... + E(x_c) W_c + b, an embedding, Flatten and Linear, as a table for each position,
                T_p = E W_p (V, features), the bias in the first: GatherND, ReduceSum

Both are computed in float64 and rounded once. `choose` says which one pays, by sizes alone, after what
`python -m benchmarks.tables` measures in onnxruntime on one thread, one example at a time:

- A look-up takes as long as Gather and Flatten alone, from 2 MiB to 200 MiB of table alike. What speaks against it is
  the file, so a table has at most `LARGEST` bytes.
- Tables of positions save `positions * width * features` multiplications and cost two nodes, an addition for each
  number looked up and, once they outgrow the cache of a core, the wait for each of them. The three constants below are
  that in multiplications. By them the lecture's first layer stays a matrix, which is faster.

Not covered: inputs of another dtype than int64, embeddings with `max_norm`, and batches beyond one, of which a matrix
product makes more than single look-ups do: there no tables of positions are made.
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.checkpoint import InputDomain
from export.layers import Sketch
from export.prove import run_double
from export.write import Batch

__all__ = [
    "LARGEST",
    "Kind",
    "Lookup",
    "Positions",
    "choose",
    "positions_pay",
    "tabulate",
    "tabulate_positions",
    "whole_pays",
]

Kind = Literal["whole", "positions"]

LARGEST = 2**24
"""Bytes of a table. One of 16 MiB is read from a disk in 10 ms, as long as a thousand calls take."""

COUNTED = 1_000_000
"""So many inputs the proof lists; no row of a table goes unproven."""

CACHE = 2**21
"""Bytes beyond which tables are waited for: the second-level cache of a present core."""

NODES, ADDED, FETCHED = 8_000, 8, 16
"""Multiplications that take as long as two nodes more, as adding a number, and as waiting for one beyond the cache."""


class Lookup(nn.Module):
    """A net by its outputs: `table` (V, ..., V, *outputs), one axis for each of the positions of (batch, positions)."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, contexts: Tensor) -> Tensor:
        """Return `(batch, *outputs)`."""
        return self.table[tuple(contexts.unbind(1))]

    def row(self, sketch: Sketch, x: str) -> str:
        """Draw it; an index beyond the table is an error when it is run."""
        return sketch.node("GatherND", sketch.constant("table", self.table), x)


class Positions(nn.Module):
    """The sum of one row of each position's table: `table` (positions, V, features), input (batch, positions)."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, contexts: Tensor) -> Tensor:
        """Return `(batch, features)`."""
        return self.table[torch.arange(len(self.table)), contexts].sum(1)

    def row(self, sketch: Sketch, x: str) -> str:
        """Draw it, for a batch of one; an index beyond a table is an error, and no row of the next position's."""
        x = sketch.node("Reshape", x, sketch.constant("places", np.array([len(self.table), 1, 1])))
        x = sketch.node("GatherND", sketch.constant("table", self.table), x, batch_dims=1)
        return sketch.node("ReduceSum", x, sketch.constant("axis", np.array([0])), keepdims=0)


def tabulate(
    model: nn.Module, domain: InputDomain, batch: Batch = 1, unfolded: nn.Module | None = None
) -> tuple[nn.Module, Kind | None]:
    """Return the net with a table where one pays, else as it is, and which kind of table that is.

    Args:
        model: in eval mode, not changed.
        domain: its inputs.
        batch: the number of examples that one run takes.
        unfolded: the net that it was made of, whose outputs were not rounded on the way to new weights.
    """
    kind = choose(model, domain, batch)
    if (
        kind == "whole"
        and (table := _tabulate_whole(model if unfolded is None else unfolded, domain)) is not None
    ):
        return nn.Sequential(OrderedDict(table=Lookup(table))).eval(), kind
    if kind == "positions":
        return tabulate_positions(model), kind
    return model, None


def choose(model: nn.Module, domain: InputDomain, batch: Batch = 1) -> Kind | None:
    """Return the kind of table that pays for a net, None where none does."""
    if domain.dtype != "int64" or domain.low != 0 or domain.high is None or len(domain.shape) != 1:
        return None
    with torch.inference_mode():
        output = model(domain.sample(2))
    if whole_pays(domain.count, prod(output.shape[1:]), output.element_size()):
        return "whole"
    if batch != 1 or not _begins_with_embedding(model):
        return None
    embedding, _, linear = _first_layers(model)
    sizes = domain.shape[0], embedding.num_embeddings, embedding.embedding_dim, linear.out_features
    return "positions" if positions_pay(*sizes, linear.weight.element_size()) else None


def whole_pays(inputs: int | None, outputs: int, itemsize: int = 4) -> bool:
    """Whether a table of all outputs pays: it does as soon as it may be made at all."""
    return inputs is not None and inputs <= COUNTED and inputs * outputs * itemsize <= LARGEST


def positions_pay(positions: int, characters: int, width: int, features: int, itemsize: int = 4) -> bool:
    """Whether tables of positions pay in the place of an embedding `width` wide and a Linear to `features`."""
    size = positions * characters * features * itemsize
    cost = FETCHED if size > CACHE else ADDED
    return size <= LARGEST and positions * width * features > NODES + cost * positions * features


def _first_layers(model: nn.Module) -> tuple[Any, ...]:
    return tuple(model.children())[:3]


def _begins_with_embedding(model: nn.Module) -> bool:
    """Whether a net is an Embedding, a Flatten of all positions, a Linear, and what reads that."""
    layers = _first_layers(model)
    kinds = tuple(type(layer) for layer in layers)
    if type(model) is not nn.Sequential or kinds != (nn.Embedding, nn.Flatten, nn.Linear):
        return False
    return layers[0].max_norm is None and (layers[1].start_dim, layers[1].end_dim) in ((1, -1), (1, 2))


def _tabulate_whole(model: nn.Module, domain: InputDomain) -> Tensor | None:
    """Return the outputs for every input, from float64; None where the net does not compute in it."""
    exact = run_double(model, domain.every())
    if exact is None or domain.high is None:
        return None
    with torch.inference_mode():
        dtype = model(domain.sample(2)).dtype
    return torch.from_numpy(exact).to(dtype).reshape(*[domain.high] * domain.shape[0], *exact.shape[1:])


def tabulate_positions(model: nn.Module) -> nn.Module:
    """Return a net that begins with Embedding, Flatten and Linear with tables of positions in their place."""
    embedding, _, linear = _first_layers(model)
    name, *others = list(model.named_children())[2:]
    weight = linear.weight.detach().double().unflatten(1, (-1, embedding.embedding_dim))
    table = torch.einsum("vd,hpd->pvh", embedding.weight.detach().double(), weight)
    if linear.bias is not None:
        table[0] += linear.bias.detach().double()
    first = name[0], Positions(table.to(linear.weight.dtype))
    return nn.Sequential(OrderedDict([first, *others])).eval()
