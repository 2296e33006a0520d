"""What goes on inside a net while it trains: outputs, gradients, updates, saturated and dead neurons.

    with Diagnostics(net, every=100) as diagnostics:            # watches steps 0, 100, 200, ...
        for loss in descend(net, material, recipe, generator):
            diagnostics.record(loss)                            # after every step
    diagnostics.records[-1].layers[0].saturated                 # of the last step that was watched

    train.plots.draw(diagnostics, folder)                       # the lecture's pictures, and a page of them
    train.events.write_events(diagnostics, folder)              # the same numbers for TensorBoard

A step that is watched has a hook on every layer that bends (Tanh, ReLU, Sigmoid; the Linears but the last where
nothing bends), on its output and on every parameter; a hook sums up what it sees and keeps nothing else. `record`
takes the hooks away and puts them on again before the next step to be watched, so that all other steps cost what
they cost without; with no `Diagnostics` nothing is hooked at all. Only passes in training mode that are going to be
differentiated count, so a loss may be measured in between.

    saturated    share of |h| > 0.97 (of h <= 0 after ReLU; Sigmoid seen as the tanh of half its input)
    dead         share of neurons with |h| > 0.99 for every example of the batch (h <= 0 after ReLU): no gradient passes
    grad:data    std of a parameter's gradient over std of the parameter
    update:data  std of the change that the step made over std of the parameter before; the lecture wants 1e-3

The change is measured, not computed from rate and gradient, so it holds for any optimiser. Not covered: layers that are
called several times in one pass (the last call is kept), and steps of several backward passes (the last one is kept).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnfold.errors import InputError

__all__ = [
    "DEAD",
    "SATURATED",
    "Diagnostics",
    "Layer",
    "Parameter",
    "Record",
    "Spread",
    "Statistics",
    "compare_statistics",
    "examine",
]

SATURATED, DEAD = 0.97, 0.99
BINS = 100
EXAMPLES = 32
"""As many examples of a batch are kept for the map of saturated neurons."""

_BENDS = {"Tanh", "ReLU", "Sigmoid"}


@dataclass(frozen=True)
class Spread:
    """How numbers are spread: `counts` (BINS,) of those between `least` and `most`; the std is the unbiased one.

    With a number that is not finite, mean and std are not finite either, and nothing is counted.
    """

    mean: float
    std: float
    least: float
    most: float
    counts: NDArray[np.float64]

    @property
    def density(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The middles of BINS / 2 wider bins and the density there, both (BINS / 2,); without width there is none."""
        width = (self.most - self.least) / BINS * 2
        middles = np.asarray(self.least + width * (np.arange(BINS // 2) + 0.5), np.float64)
        area = self.counts.sum() * width
        counts: NDArray[np.float64] = self.counts.reshape(-1, 2).sum(1)
        return middles, counts / area if area else np.zeros(BINS // 2)


@dataclass(frozen=True)
class Layer:
    """The outputs of one layer in one pass.

    `kind` is its class; `dead_map` (examples, neurons) bool tells where no gradient to speak of passes; `gradient` is
    the spread of the loss's derivative by these outputs, None where no backward pass was seen.
    """

    name: str
    kind: str
    output: Spread
    saturated: float
    dead: float
    dead_map: NDArray[np.bool_]
    gradient: Spread | None = None


@dataclass(frozen=True)
class Parameter:
    """One parameter at one step; `gradient` is None where no gradient reached it, `std` is that before the step."""

    name: str
    shape: tuple[int, ...]
    std: float
    update: float
    gradient: Spread | None

    @property
    def gradient_ratio(self) -> float:
        """grad:data; not a number for a constant parameter."""
        return math.nan if self.gradient is None else _divide(self.gradient.std, self.std)

    @property
    def update_ratio(self) -> float:
        """log10 of update:data; minus infinity if it stood still, not a number for a constant parameter."""
        ratio = _divide(self.update, self.std)
        return -math.inf if ratio == 0 else math.log10(ratio)


@dataclass(frozen=True)
class Record:
    """A step that was watched, counted from 0, its loss, and what was seen, in the order of computation."""

    step: int
    loss: float
    layers: tuple[Layer, ...]
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Statistics:
    """One BatchNorm's running statistics and the calibrated ones, (channels,) float64 each."""

    name: str
    running_mean: NDArray[np.float64]
    running_var: NDArray[np.float64]
    mean: NDArray[np.float64]
    var: NDArray[np.float64]

    @property
    def apart(self) -> float:
        """How far the means of a channel are apart at most, in calibrated stds."""
        return float((np.abs(self.running_mean - self.mean) / self._floor**0.5).max())

    @property
    def ratios(self) -> tuple[float, float]:
        """The least and the largest ratio of running to calibrated std."""
        ratios = (self.running_var / self._floor) ** 0.5
        return float(ratios.min()), float(ratios.max())

    @property
    def _floor(self) -> NDArray[np.float64]:
        return np.maximum(self.var, np.finfo(float).tiny)


class Diagnostics:
    """Watches every `every`-th step of a net; a context manager, outside of which no hook is left.

    Attributes:
        losses: of every step.
        records: of the steps that were watched.

    Raises:
        InputError: `every` is below 1.
    """

    def __init__(self, net: nn.Module, every: int = 1) -> None:
        if every < 1:
            raise InputError(f"every = {every}; at most every step can be watched, so it takes 1 or more")
        self.losses: list[float] = []
        self.records: list[Record] = []
        self._net, self._every = net, every
        self._watch: _Watch | None = None

    def __enter__(self) -> Diagnostics:
        if len(self.losses) % self._every == 0:
            self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def record(self, loss: float) -> None:
        """Note the loss of the step just taken and, if it was watched, what was seen."""
        step = len(self.losses)
        self.losses.append(loss)
        if self._watch is not None:
            self.records.append(Record(step, loss, self._watch.layers(), self._watch.parameters()))
            self._end()
        if (step + 1) % self._every == 0:
            self._begin()

    def updates(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return for every parameter the steps that were watched and log10 of update:data at each."""
        lines: dict[str, tuple[list[int], list[float]]] = {}
        for record in self.records:
            for parameter in record.parameters:
                steps, ratios = lines.setdefault(parameter.name, ([], []))
                steps.append(record.step)
                ratios.append(parameter.update_ratio)
        return lines

    def median_update(self) -> float:
        """Return the median of log10 update:data over all weights (two axes or more) of the last record.

        Not a number if nothing was watched or no weight has a ratio.
        """
        last = self.records[-1].parameters if self.records else ()
        ratios = [p.update_ratio for p in last if len(p.shape) > 1 and not math.isnan(p.update_ratio)]
        return float(np.median(ratios)) if ratios else math.nan

    def _begin(self) -> None:
        self._watch = _Watch(self._net)

    def _end(self) -> None:
        if self._watch is not None:
            self._watch.remove()
        self._watch = None


def examine(net: nn.Module, inputs: Tensor) -> tuple[Layer, ...]:
    """Return the outputs of every layer that bends on `inputs` (examples, ...), in the mode that the net is in."""
    with torch.no_grad(), _watching(net) as seen:
        net(inputs)
    return tuple(seen.values())


def compare_statistics(net: nn.Module, calibrated: nn.Module) -> tuple[Statistics, ...]:
    """Return the running statistics of `net` beside those of the same net after `bnfold.calibrate`."""
    pairs = zip(net.named_modules(), calibrated.modules(), strict=True)
    return tuple(
        Statistics(name, *_statistics(left), *_statistics(right))
        for (name, left), right in pairs
        if isinstance(getattr(left, "running_mean", None), Tensor)
    )


def _statistics(module: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and variance, that of a layer that tracks the std too."""
    std = getattr(module, "running_std", None)
    mean, var = _to_numpy(module.running_mean), _to_numpy(module.running_var if std is None else std)
    return mean, var if std is None else np.square(var)


class _Watch:
    """The hooks of one step, and what they have seen."""

    def __init__(self, net: nn.Module) -> None:
        self._layers: dict[str, Layer] = {}
        self._layer_gradients: dict[str, Spread] = {}
        self._gradients: dict[str, Spread] = {}
        self._parameters = dict(net.named_parameters())
        self._before = {name: p.detach().clone() for name, p in self._parameters.items()}
        hooks: list[Any] = [m.register_forward_hook(partial(self._see, n)) for n, m in _bends(net).items()]
        hooks += [
            p.register_hook(partial(self._see_gradient, self._gradients, name))  # type: ignore[no-untyped-call]
            for name, p in self._parameters.items()
            if p.requires_grad
        ]
        self._hooks = hooks

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def layers(self) -> tuple[Layer, ...]:
        gradients = self._layer_gradients
        return tuple(_with_gradient(layer, gradients.get(name)) for name, layer in self._layers.items())

    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(self._parameter(name, p.detach()) for name, p in self._parameters.items())

    def _parameter(self, name: str, after: Tensor) -> Parameter:
        before = self._before[name]
        spreads = _std(before), _std(after - before)
        return Parameter(name, tuple(after.shape), *spreads, self._gradients.get(name))

    def _see(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.training and output.requires_grad:
            self._layers[name] = _summarise(name, module, output.detach())
            see = partial(self._see_gradient, self._layer_gradients, name)
            output.register_hook(see)  # type: ignore[no-untyped-call]

    def _see_gradient(self, gradients: dict[str, Spread], name: str, gradient: Tensor) -> None:
        gradients[name] = _spread(gradient.detach())


@contextmanager
def _watching(net: nn.Module) -> Iterator[dict[str, Layer]]:
    seen: dict[str, Layer] = {}

    def see(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen[name] = _summarise(name, module, output)

    hooks = [module.register_forward_hook(partial(see, name)) for name, module in _bends(net).items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _bends(net: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that bend, by name; the Linears but the last where there are none."""
    modules = dict(net.named_modules())
    bends = {name: m for name, m in modules.items() if type(m).__name__ in _BENDS}
    linears = [name for name, m in modules.items() if type(m).__name__ == "Linear"]
    return bends or {name: modules[name] for name in linears[:-1]}


def _summarise(name: str, module: nn.Module, output: Tensor) -> Layer:
    kind = type(module).__name__
    flat = output.flatten(1)
    dead = _beyond(kind, flat, DEAD)
    saturated = float(_beyond(kind, flat, SATURATED).float().mean())
    share = float(dead.all(0).float().mean())
    return Layer(name, kind, _spread(flat), saturated, share, dead[:EXAMPLES].numpy(force=True))


def _beyond(kind: str, values: Tensor, bound: float) -> Tensor:
    if kind == "ReLU":
        return values <= 0
    if kind == "Sigmoid":
        return (2 * values - 1).abs() > bound
    return values.abs() > bound if kind == "Tanh" else torch.zeros_like(values, dtype=torch.bool)


def _with_gradient(layer: Layer, gradient: Spread | None) -> Layer:
    return Layer(**{**vars(layer), "gradient": gradient})


def _spread(values: Tensor) -> Spread:
    values = values.flatten().to(torch.float32)
    mean, std = float(values.mean()), _std(values)
    least, most = (float(end) for end in values.aminmax()) if len(values) else (0.0, 0.0)
    if not math.isfinite(most - least):
        return Spread(mean, std, least, most, np.zeros(BINS))
    counts = torch.histc(values, BINS, least, most) if most > least else _spike(len(values))
    return Spread(mean, std, least, most, counts.double().numpy(force=True))


def _spike(count: int) -> Tensor:
    """Return the counts of equal values, which have no width."""
    counts = torch.zeros(BINS)
    counts[BINS // 2] = count
    return counts


def _std(values: Tensor) -> float:
    return float(values.std()) if values.numel() > 1 else math.nan


def _divide(left: float, right: float) -> float:
    return left / right if right else math.nan


def _to_numpy(values: Tensor) -> NDArray[np.float64]:
    return values.detach().double().numpy(force=True)
