"""Which parameters of a net move, and where the gradient of the others is lost: exercise E01, for any net.

    with Ledger(net) as ledger:                     # hooks on every layer and every parameter
        for loss in descend(net, material, recipe, generator):
            ledger.count(loss)                      # after every step
    ledger.entries()                                # one for each parameter

Backpropagation writes every gradient as a product. With d the gradient of a layer's output and x its input,

    Linear       dL/dW = d^T x       dL/db = sum d              dL/dx = d W
    BatchNorm    dL/dgamma = sum d (x - mean) / std             dL/dbeta = sum d             dL/dx holds gamma
    Tanh         dL/dx = d (1 - h^2)                            h: its output
    ReLU         dL/dx = d where h > 0

The ledger keeps the largest |factor| of all steps. Where a parameter's gradient was exactly 0 in every step, it names
the factor that was: what the layer got, or, where d was 0, the first layer towards the loss whose own d was not. What
it names was measured, so a net in which no factor is 0 gets no excuse.

For a flat `nn.Sequential` whose layers are called once in a pass. A gradient that is 0 but for rounding, such as that
of a bias before a BatchNorm, is not exactly 0; its size stands beside the others.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from train.page import Table

__all__ = ["Entry", "Ledger", "tabulate"]


@dataclass(frozen=True)
class Entry:
    """One parameter: the |change| since the beginning, the largest |gradient| of all steps, and why that is 0.

    `reason` is empty for a gradient that is not exactly 0, or that no factor explains.
    """

    name: str
    moved: float
    gradient: float
    reason: str


class Ledger:
    """Keeps the largest |factor| of every product of backpropagation; a context manager, its hooks gone after it."""

    def __init__(self, net: nn.Sequential) -> None:
        self._net = net
        self._start = {name: p.detach().to("cpu", copy=True) for name, p in net.named_parameters()}
        self._steps = 0
        self._inputs: dict[str, float] = defaultdict(float)
        self._outputs: dict[str, float] = defaultdict(float)
        self._gradients: dict[str, float] = defaultdict(float)
        self._passes: dict[str, float] = defaultdict(float)
        self._hooks: list[Any] = []

    def __enter__(self) -> Ledger:
        for name, layer in self._net.named_children():
            self._hooks.append(layer.register_forward_hook(partial(self._see, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def count(self, loss: float) -> None:
        """Note the gradients of the step just taken; its loss is somebody else's to keep."""
        self._steps += 1
        for name, parameter in self._net.named_parameters():
            if parameter.grad is not None:
                self._raise(self._gradients, name, parameter.grad)

    def state(self) -> dict[str, Any]:
        """What was seen so far, in plain values and tensors."""
        books = {name: dict(getattr(self, name)) for name in _BOOKS}
        return {"start": self._start, "steps": self._steps, "books": books}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with what was seen by another ledger of the same net."""
        self._start, self._steps = state["start"], state["steps"]
        for name in _BOOKS:
            getattr(self, name).update(state["books"][name])

    def entries(self) -> list[Entry]:
        """Return what was seen, one entry for each parameter, in the order of computation."""
        return [self._enter(name, p.detach()) for name, p in self._net.named_parameters()]

    def _enter(self, name: str, value: Tensor) -> Entry:
        gradient = self._gradients[name]
        moved = float((value.cpu() - self._start[name]).abs().max())
        return Entry(name, moved, gradient, "" if gradient or not self._steps else self._explain(name))

    def _explain(self, name: str) -> str:
        """Return the factor that was 0 in every step, in words."""
        owner, _, kind = name.rpartition(".")
        if not self._outputs[owner]:
            return self._trace(owner)
        if kind == "weight" and not self._inputs[owner]:
            return f"what {owner} gets is {_INPUTS.get(_kind(self._net, owner), '0')} in every step"
        return ""

    def _trace(self, owner: str) -> str:
        """Return which layer after `owner` lost the gradient on its way back."""
        names = [name for name, _ in self._net.named_children()]
        after = names[names.index(owner) + 1 :]
        culprit = next((name for name in after if self._outputs[name]), None)
        if culprit is None or self._passes[culprit]:
            return ""
        what = _PASSES[_kind(self._net, culprit)]
        return f"none comes back through {culprit}, whose {what} 0 in every step"

    def _see(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not (layer.training and output.requires_grad):
            return
        x, kind = inputs[0].detach(), _kind(self._net, name)
        if kind == "BatchNorm":
            x = x - x.mean(0)
        if kind != "Embedding":
            self._raise(self._inputs, name, x)
        self._raise(self._passes, name, _slope(kind, layer, output.detach()))
        output.register_hook(partial(self._raise, self._outputs, name))  # type: ignore[no-untyped-call]

    def _raise(self, book: dict[str, float], name: str, values: Tensor) -> None:
        book[name] = max(book[name], float(values.detach().abs().max()))


_BOOKS = ("_inputs", "_outputs", "_gradients", "_passes")
_INPUTS = {"BatchNorm": "the same for all examples"}
_PASSES = {
    "Linear": "weight is",
    "BatchNorm": "gamma is",
    "Tanh": "slope is",
    "ReLU": "outputs are",
    "": "slope is",
}


def _kind(net: nn.Sequential, name: str) -> str:
    """Return the kind of a layer, torch.nn's or a scratch one."""
    kind = type(net.get_submodule(name)).__name__
    return "BatchNorm" if "BatchNorm" in kind else kind if kind in {*_PASSES, "Embedding"} else ""


def _slope(kind: str, layer: nn.Module, output: Tensor) -> Tensor:
    """Return the factor by which a layer passes a gradient on to its input."""
    if kind == "Tanh":
        return 1 - output.square()
    if kind == "ReLU":
        return output
    weight = getattr(layer, "weight", None)
    return weight.detach() if kind in ("Linear", "BatchNorm") and weight is not None else torch.ones(1)


def tabulate(entries: list[Entry], steps: int) -> Table:
    """Return the entries as a table."""
    rows = [
        (e.name, f"{e.moved:.4g}" if e.moved else "stood still", f"{e.gradient:.2e}" if e.gradient else "exactly 0",
         e.reason)
        for e in entries
    ]  # fmt: skip
    heading = f"largest |gradient| of {steps:,} steps"
    return Table(("parameter", "largest change", heading, "why it is 0"), rows, words=(3,))
