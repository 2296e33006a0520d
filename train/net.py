"""The lecture's net: Embedding, Flatten, then Linear, BatchNorm1d and Tanh in turn, the last without Tanh.

    embedding  flatten  linear1  bn1  tanh1  linear2  bn2  tanh2  linear3  bn3

The Linears have no bias: the BatchNorm that follows would take it away. Kaiming initialisation with the gain of tanh,

    W ~ N(0, (5/3)^2 / fan_in)                                   (He et al. 2015; torch.nn.init.calculate_gain)

keeps the scale of the activations; the last gamma x 0.1 makes the first guess nearly uniform, so that training does
not begin by unlearning confidence. Numbers are drawn as the lecture's notebook draws them (embedding first, each
weight as (fan_in, fan_out)), so that its seeds give its nets.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Generator, nn

from bnfold.errors import InputError

__all__ = ["MOST_PARAMETERS", "TANH_GAIN", "Sizes", "build", "count_parameters"]

TANH_GAIN = 5 / 3
MOST_PARAMETERS = 2**27
"""Half a gigabyte of float32; a larger net is taken for a slip of the hand."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a net; `layers` counts the Linears.

    Raises:
        InputError: a size below 1, or more than `MOST_PARAMETERS` parameters.
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
        if self.parameters > MOST_PARAMETERS:
            raise InputError(
                f"{self.parameters:,} parameters are more than {MOST_PARAMETERS:,}; make the net smaller"
            )

    @property
    def widths(self) -> list[int]:
        """The number of values between the Linears, from the flattened embedding to the logits."""
        return [self.context * self.embedding, *[self.hidden] * (self.layers - 1), self.vocabulary]

    @property
    def parameters(self) -> int:
        """The number of trained values: embedding, weights, and a gamma and a beta for each output of a Linear."""
        return self.vocabulary * self.embedding + sum(
            (fan_in + 2) * out for fan_in, out in pairwise(self.widths)
        )


def build(
    sizes: Sizes, generator: Generator, gain: float = TANH_GAIN, last_gamma: float = 0.1
) -> nn.Sequential:
    """Return a net in training mode, its weights drawn from `generator`."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["embedding"] = nn.Embedding(sizes.vocabulary, sizes.embedding)
    layers["flatten"] = nn.Flatten()
    for number, (fan_in, out) in enumerate(pairwise(sizes.widths), 1):
        layers[f"linear{number}"] = nn.Linear(fan_in, out, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm1d(out)
        if number < sizes.layers:
            layers[f"tanh{number}"] = nn.Tanh()
    net = nn.Sequential(layers)
    _initialise(net, generator, gain, last_gamma)
    return net


@torch.no_grad()
def _initialise(net: nn.Sequential, generator: Generator, gain: float, last_gamma: float) -> None:
    for layer in net:
        if isinstance(layer, nn.Embedding):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        elif isinstance(layer, nn.Linear):
            drawn = torch.randn(layer.in_features, layer.out_features, generator=generator)
            layer.weight.copy_((drawn / layer.in_features**0.5 * gain).T)
    last = net[-1]
    if isinstance(last, nn.BatchNorm1d):
        last.weight.mul_(last_gamma)


def count_parameters(net: nn.Module) -> int:
    """Return the number of trained values."""
    return sum(parameter.numel() for parameter in net.parameters())
