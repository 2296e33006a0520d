"""The lecture's nets: Embedding, Flatten, then Linear, BatchNorm1d and Tanh in turn, the last without Tanh.

    embedding  flatten  linear1  bn1  tanh1  linear2  bn2  tanh2  linear3  bn3

`Sizes` says how large a net is, `Design` how it begins and what it is made of. Unless a design says otherwise, Linears
have no bias, since the BatchNorm that follows would take it away; weights have the Kaiming scale with the gain of tanh,

    W ~ N(0, (5/3)^2 / fan_in)                                   (He et al. 2015; torch.nn.init.calculate_gain)

which keeps the scale of the activations; and the last gamma is 0.1, which makes the first guess nearly uniform, so that
training does not begin by unlearning confidence.

Numbers are drawn as the lecture's notebook draws them (embedding, then weight as (fan_in, fan_out) and bias of each
layer), so that its seeds give its nets.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from bnfold.errors import InputError
from train import layers as scratch

__all__ = ["MOST_PARAMETERS", "TANH_GAIN", "Design", "Kit", "Scale", "Sizes", "build", "count_parameters"]

TANH_GAIN = 5 / 3
MOST_PARAMETERS = 2**27
"""Half a gigabyte of float32; a larger net is taken for a slip of the hand."""

Kit = Literal["torch", "scratch"]

_BATCHNORMS: dict[str, type[nn.Module]] = {
    "torch": scratch.BatchNorm1d,
    "unbiased": scratch.UnbiasedBatchNorm1d,
    "std": scratch.StdBatchNorm1d,
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a net; `layers` counts the Linears.

    Raises:
        InputError: a size below 1, or more than `MOST_PARAMETERS` weights.
    """

    vocabulary: int
    context: int = 3
    embedding: int = 10
    hidden: int = 200
    layers: int = 3

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1:
                raise InputError(f"{name} = {size}; a net needs at least 1")
        weights = self.vocabulary * self.embedding + self.context * self.embedding * self.hidden
        weights += self.hidden * (self.hidden * max(self.layers - 2, 0) + self.vocabulary)
        if weights > MOST_PARAMETERS or self.layers > 1000:
            raise InputError(
                f"{weights:,} weights in {self.layers} layers are too many; make the net smaller"
            )

    @property
    def widths(self) -> list[int]:
        """The number of values between the Linears, from the flattened embedding to the logits."""
        return [self.context * self.embedding, *[self.hidden] * (self.layers - 1), self.vocabulary]


@dataclass(frozen=True)
class Scale:
    """A normal distribution around 0: its std is `factor`, divided by sqrt(fan_in) if `fan_in`."""

    factor: float
    fan_in: bool = False

    def draw(self, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Return numbers of `shape`, whose first size is the fan-in."""
        drawn = torch.randn(shape, generator=generator)
        return (drawn / shape[0] ** 0.5 if self.fan_in else drawn) * self.factor


@dataclass(frozen=True)
class Design:
    """How a net begins, and what it is made of.

    `last_weights` None: as `weights`. A bias of None: the Linear has none. `batchnorm` is before or after the bend.
    `statistics` is the kind of BatchNorm that a net of scratch layers has (see `train.layers`).
    """

    weights: Scale = Scale(TANH_GAIN, fan_in=True)
    last_weights: Scale | None = None
    biases: Scale | None = None
    last_bias: Scale | None = None
    embeddings: Scale = Scale(1.0)
    nonlinearity: Literal["Tanh", "ReLU", "none"] = "Tanh"
    batchnorm: Literal["before", "after", "none"] = "before"
    last_batchnorm: bool = True
    last_gamma: float = 0.1
    momentum: float = 0.1
    statistics: Literal["torch", "unbiased", "std"] = "torch"


def build(
    sizes: Sizes, generator: Generator, design: Design | None = None, kit: Kit = "torch"
) -> nn.Sequential:
    """Return a net in training mode, of torch.nn's layers or the scratch ones, its weights drawn from `generator`."""
    design, place = design or Design(), scratch if kit == "scratch" else nn
    layers: OrderedDict[str, Any] = OrderedDict()
    layers["embedding"] = place.Embedding(sizes.vocabulary, sizes.embedding)
    layers["flatten"] = place.Flatten()
    for number, (fan_in, out) in enumerate(pairwise(sizes.widths), 1):
        bias = design.biases if number < sizes.layers else design.last_bias
        layers[f"linear{number}"] = place.Linear(fan_in, out, bias=bias is not None)
        layers.update(_follow(number, out, number == sizes.layers, design, place))
    _initialise(layers, sizes, generator, design)
    return nn.Sequential(layers)


def _follow(number: int, out: int, last: bool, design: Design, place: ModuleType) -> dict[str, nn.Module]:
    """Return what stands between a Linear and the next: BatchNorm, nonlinearity, both in some order, or nothing."""
    norm, bend = {}, {}
    if design.batchnorm != "none" and (design.last_batchnorm or not last):
        kind = _BATCHNORMS[design.statistics] if place is scratch else nn.BatchNorm1d
        norm[f"bn{number}"] = kind(out, momentum=design.momentum)
    if design.nonlinearity != "none" and not last:
        bend[f"{design.nonlinearity.lower()}{number}"] = getattr(place, design.nonlinearity)()
    return bend | norm if design.batchnorm == "after" else norm | bend


@torch.no_grad()
def _initialise(layers: OrderedDict[str, Any], sizes: Sizes, generator: Generator, design: Design) -> None:
    embedding = layers["embedding"].weight
    embedding.copy_(design.embeddings.draw(tuple(embedding.shape), generator))
    for number in range(1, sizes.layers + 1):
        linear, last = layers[f"linear{number}"], number == sizes.layers
        scale = design.last_weights or design.weights if last else design.weights
        linear.weight.copy_(scale.draw((linear.in_features, linear.out_features), generator).T)
        bias = design.last_bias if last else design.biases
        if bias is not None:
            linear.bias.copy_(bias.draw((linear.out_features,), generator))
    if f"bn{sizes.layers}" in layers:
        layers[f"bn{sizes.layers}"].weight.mul_(design.last_gamma)


def count_parameters(net: nn.Module) -> int:
    """Return the number of trained values."""
    return sum(parameter.numel() for parameter in net.parameters())
