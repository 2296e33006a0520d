"""The quick recipe beside the lecture's own loop: seconds to train, and the dev loss that each arrives at.

    python -m benchmarks.train_recipe [--names FILE] [--quick]

The lecture's loop is written out below as its notebook has it: hand-written layers in plain tensor operations, 200,000
steps of 32 examples, gradient descent at 0.1, then 0.01. Both run on one thread, the two in turns, so that whatever
else the machine does falls on both. `--quick` takes a fiftieth of the lecture's steps and multiplies the time; its loss
is then not the lecture's, and is not shown.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from itertools import pairwise
from statistics import mean, median

import torch
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor
from torch.nn import functional as F

import data
from bnfold.errors import run_command
from train.evaluate import measure
from train.loop import descend
from train.material import Material, count_contexts, prepare
from train.net import Sizes, build
from train.recipes import RECIPES

STEPS = 200_000
TURNS = 5


class Linear:
    """The notebook's Linear, without bias."""

    def __init__(self, fan_in: int, fan_out: int, generator: Generator) -> None:
        self.weight = torch.randn((fan_in, fan_out), generator=generator) / fan_in**0.5

    def __call__(self, x: Tensor) -> Tensor:
        """(batch, fan_in) to (batch, fan_out)."""
        return x @ self.weight

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [self.weight]


class BatchNorm1d:
    """The notebook's BatchNorm1d."""

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        self.eps, self.momentum, self.training = eps, momentum, True
        self.gamma, self.beta = torch.ones(dim), torch.zeros(dim)
        self.running_mean, self.running_var = torch.zeros(dim), torch.ones(dim)

    def __call__(self, x: Tensor) -> Tensor:
        """(batch, dim) to the same, normalised by the batch or, in eval, by the running statistics."""
        if self.training:
            mean, var = x.mean(0, keepdim=True), x.var(0, keepdim=True)
            with torch.no_grad():
                self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
                self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var
        else:
            mean, var = self.running_mean, self.running_var
        return self.gamma * ((x - mean) / torch.sqrt(var + self.eps)) + self.beta

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [self.gamma, self.beta]


class Tanh:
    """The notebook's Tanh."""

    def __call__(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return torch.tanh(x)

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return []


class Notebook:
    """The lecture's three-layer net and its loop, to be run in pieces."""

    def __init__(self, material: Material, batch: int = 32) -> None:
        characters, context = len(material.vocabulary), material.context
        self.x, self.y = material.examples
        self.generator = Generator().manual_seed(2147483647)
        self.embedding = torch.randn((characters, 10), generator=self.generator)
        sizes = [context * 10, 200, 200, characters]
        self.layers: list[Linear | BatchNorm1d | Tanh] = []
        for fan_in, fan_out in pairwise(sizes):
            self.layers += [Linear(fan_in, fan_out, self.generator), BatchNorm1d(fan_out), Tanh()]
        self.layers.pop()
        self.layers[-1].gamma *= 0.1
        for layer in self.layers:
            if isinstance(layer, Linear):
                layer.weight *= 5 / 3
        self.parameters = [self.embedding, *(p for layer in self.layers for p in layer.parameters())]
        for parameter in self.parameters:
            parameter.requires_grad = True
        self.step, self.batch = 0, batch

    def forward(self, x: Tensor) -> Tensor:
        """Contexts (batch, length) to logits (batch, characters)."""
        out = self.embedding[x].view(len(x), -1)
        for layer in self.layers:
            out = layer(out)
        return out

    def run(self, steps: int) -> float:
        """Take some steps and return the seconds they took."""
        begin = time.perf_counter()
        for _ in range(steps):
            chosen = torch.randint(0, len(self.x), (self.batch,), generator=self.generator)
            loss = F.cross_entropy(self.forward(self.x[chosen]), self.y[chosen])
            for parameter in self.parameters:
                parameter.grad = None
            loss.backward()
            rate = 0.1 if self.step < STEPS // 2 else 0.01
            for parameter in self.parameters:
                parameter.data += -rate * parameter.grad
            self.step += 1
        return time.perf_counter() - begin

    @torch.no_grad()
    def loss(self, x: Tensor, y: Tensor) -> float:
        """Return the mean loss over some examples with the running statistics; ends the training."""
        for layer in self.layers:
            if isinstance(layer, BatchNorm1d):
                layer.training = False
        return F.cross_entropy(self.forward(x), y).item()


def train_quick(material: Material, seed: int) -> tuple[float, float]:
    """Return the seconds that the quick recipe takes, counting the contexts included, and its dev loss."""
    begin = time.perf_counter()
    material = replace(material, train=count_contexts(*(tensor.numpy() for tensor in material.examples)))
    generator = Generator().manual_seed(seed)
    net = build(Sizes(len(material.vocabulary), material.context), generator)
    for _ in descend(net, material, RECIPES["quick"], generator):
        pass
    return time.perf_counter() - begin, measure(net, material.dev)


def compare(source: str | None, quick: bool) -> None:
    """Run both in turns and print the table and the ratio."""
    torch.set_num_threads(1)
    material = prepare(data.read_names(source))
    Notebook(material).run(100)
    notebook, share = Notebook(material), 50 if quick else 1
    theirs, ours = 0.0, []
    for turn in range(TURNS):
        ours.append(train_quick(material, turn))
        theirs += notebook.run(STEPS // TURNS // share) * share
    seconds, losses = [one[0] for one in ours], [one[1] for one in ours]
    parts = (data.contexts(part, material.vocabulary) for part in (material.names.train, material.names.dev))
    train, dev = (notebook.loss(*map(torch.from_numpy, part)) for part in parts)
    table = Table("", "seconds", "dev loss", title="one thread")
    table.add_row(
        "the lecture's loop", f"{theirs:.1f}" + " (extrapolated)" * quick, "" if quick else f"{dev:.4f}"
    )
    table.add_row("quick (median of five seeds)", f"{median(seconds):.2f}", f"{mean(losses):.4f}")
    table.add_row("quick (the worst of five)", f"{max(seconds):.2f}", f"{max(losses):.4f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{theirs / median(seconds):.0f} times as fast ({theirs / max(seconds):.0f} at worst)")
    if not quick:
        console.print(f"the lecture's train loss: {train:.4f}")


def main() -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description="The quick recipe beside the lecture's own loop.")
    parser.add_argument("--names", metavar="FILE", help="as for python -m train")
    parser.add_argument(
        "--quick", action="store_true", help="extrapolate the lecture's loop from a fiftieth of it"
    )
    options = parser.parse_args()
    return run_command(lambda: compare(options.names, options.quick))


if __name__ == "__main__":
    sys.exit(main())
