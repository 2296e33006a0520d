"""The loop: draw, forward, backward, step. All that differs between runs is in the recipe.

`descend` is a generator that yields the loss of every step after taking it, so that who drives it decides what to
show, to keep and when to stop; a net is whole between any two steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch import Generator, nn
from torch.nn import functional as F

from bnfold.errors import InputError
from train.material import Material
from train.recipes import Recipe

__all__ = ["descend", "postponed_interrupt"]


def descend(net: nn.Sequential, material: Material, recipe: Recipe, generator: Generator) -> Iterator[float]:
    """Train `net` in place and yield the loss of each batch, as it was before the step.

    Raises:
        InputError: the loss is no longer finite; the message names the step.
    """
    optimiser = recipe.optimiser(net.train())
    batches = recipe.draw(material, recipe.batch, generator)
    for step in range(recipe.steps):
        x, y = next(batches)
        loss = F.cross_entropy(net(x), y, reduction="sum" if y.is_floating_point() else "mean")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step(recipe.rate * recipe.schedule(step / recipe.steps))
        value = loss.item()
        if not abs(value) < float("inf"):
            raise InputError(f"the loss is {value} at step {step + 1}; lower the learning rate")
        yield value


@contextmanager
def postponed_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed; the second press interrupts at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def press(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
