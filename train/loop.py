"""The loop: draw, forward, backward, step. All that differs between runs is in the recipe.

`Training` yields the loss of every step after taking it, so that who drives it decides what to show, to keep and when
to stop; a net is whole between any two steps, and a training can be kept there and taken up by another process, bit for
bit (see `train.resume`). `descend` is the same for who only wants to go down.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bnfold.distributed import Processes
from bnfold.errors import InputError, ProcessLost
from train.backprop import differentiate
from train.material import Material
from train.recipes import Recipe

__all__ = ["Training", "descend", "postponed_interrupt"]


class Training:
    """A net on its way down, between two steps, on the device that it is on; chances are those of the CPU anywhere.

    Several processes have the same net, draw the same batches, and take each a share of the rows. What they add up
    makes the step that one process would make with all of them, so their nets stay the same.

    Attributes:
        step: how many steps were taken.
    """

    def __init__(
        self,
        net: nn.Sequential,
        material: Material,
        recipe: Recipe,
        generator: Generator,
        processes: Processes | None = None,
    ) -> None:
        self.net, self.recipe, self.step = net.train(), recipe, 0
        self._optimiser = recipe.optimiser(net)
        gradients = self._optimiser.gradients
        self._differentiate = differentiate(net, gradients, processes.add if processes else None)
        self._share = processes.share if processes else _keep_all
        x, y = (each.to(gradients.device) for each in material.examples)
        near = replace(material, examples=(x, y))
        self._batches = _Batches(lambda: recipe.draw(near, recipe.batch, generator), generator)

    def __iter__(self) -> Iterator[float]:
        """Take the steps that are left, and yield the loss of each batch, as it was before the step.

        Raises:
            InputError: the loss is no longer finite; the message names the step.
            ProcessLost: another process is gone; the net is that after the last step that was taken.
        """
        while self.step < self.recipe.steps:
            value = self._take()
            self.step += 1
            if not abs(value) < float("inf"):
                raise InputError(f"the loss is {value} at step {self.step}; lower the learning rate")
            yield value

    def _take(self) -> float:
        x, y = next(self._batches)
        try:
            loss = self._differentiate(self._share(x), self._share(y), len(x))
        except ProcessLost:
            self._batches.put_back()
            raise
        self._optimiser.step(self.recipe.rate * self.recipe.schedule(self.step / self.recipe.steps))
        return loss

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, in plain values and tensors of its own."""
        net = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.net.state_dict().items()}
        optimiser, batches = self._optimiser.state(), self._batches.state()
        return {"step": self.step, "net": net, "optimiser": optimiser, "batches": batches}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same training."""
        self.net.load_state_dict(state["net"])
        self._optimiser.restore(state["optimiser"])
        self._batches.restore(state["batches"])
        self.step = state["step"]


class _Batches:
    """Batches that can be drawn again from where they were.

    What is drawn depends on nothing but the generator, so it is known by what the generator was before it last gave
    numbers, and by how many batches have come since; a draw that gives many batches is made once more, and these are
    passed over.
    """

    def __init__(self, draw: Callable[[], Iterator[tuple[Tensor, Tensor]]], generator: Generator) -> None:
        self._draw, self._generator, self._drawn = draw, generator, draw()
        self._before = self._now = generator.get_state()
        self._since = 0

    def __next__(self) -> tuple[Tensor, Tensor]:
        batch = next(self._drawn)
        now = self._generator.get_state()
        if not torch.equal(now, self._now):
            self._before, self._now, self._since = self._now, now, 0
        self._since += 1
        return batch

    def put_back(self) -> None:
        """Count the last batch among those that are to come."""
        self._since -= 1

    def state(self) -> dict[str, Any]:
        return {"generator": self._before.clone(), "since": self._since}

    def restore(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._drawn, self._before, self._since = self._draw(), state["generator"], state["since"]
        for _ in range(self._since):
            next(self._drawn)
        self._now = self._generator.get_state()


def descend(net: nn.Sequential, material: Material, recipe: Recipe, generator: Generator) -> Iterator[float]:
    """Train `net` in place and yield the loss of each batch, as it was before the step.

    Raises:
        InputError: the loss is no longer finite; the message names the step.
    """
    return iter(Training(net, material, recipe, generator))


def _keep_all(rows: Tensor) -> Tensor:
    return rows


@contextmanager
def postponed_interrupt(several: bool = False) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed; the second press interrupts at once.

    One of several processes gets the signal again from torchrun, and SIGTERM when another one is gone, so neither
    interrupts it, to its end: torchrun may send one while it still says what happened.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def press(number: int, frame: FrameType | None) -> None:
        if pressed.is_set() and not several:
            raise KeyboardInterrupt
        pressed.set()

    caught = (signal.SIGINT, signal.SIGTERM) if several else (signal.SIGINT,)
    before = {number: signal.signal(number, press) for number in caught}
    try:
        yield pressed.is_set
    finally:
        for number, handler in before.items() if not several else ():
            signal.signal(number, handler)
