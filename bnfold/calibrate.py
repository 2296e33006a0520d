"""Recompute the statistics of every BatchNorm over a whole data set, exactly.

While a net trains, its BatchNorms keep running averages of the statistics of passing batches, each of another net.
After training they can be had for good: the lecture's "stage two", which others call precise BN (Wu & Johnson 2021).

**What is exact.** In a net of several BatchNorms the input of one depends on how those before it normalise. Here it is
what one training pass over the whole set would give, taken as a single batch:

    mean = 1/n sum x        var = 1/(n - 1) sum (x - mean)^2        x: what arrives at the layer, per channel

where every BatchNorm before normalises by its own statistics of the whole set (by the variance over n, as in training;
the unbiased one is what torch stores). So the result depends neither on the size of the batches nor on their order,
unlike the mean of batch statistics that precise BN takes. Everything but the BatchNorms runs in eval mode: no dropout.

**How.** In passes over the set. In the first a BatchNorm normalises by the batch at hand, afterwards by what the last
pass gave for the whole set. A pass makes right every BatchNorm that depends on right ones only, so after as many
passes as BatchNorms lie behind each other all are right, and one pass more changes nothing, which is how the end is
known; parallel branches share passes, and no graph is needed. There are never more passes than BatchNorms, and a set
that comes as one batch takes one. Keeping all activations instead would need a single pass and the memory of the whole
set; the alternative is the caller's, by the size of the batch.

**Numbers.** The net runs as a copy in float64. Each batch is summed up by mean and squared deviations, and batches are
merged by the formula of Chan, Golub & LeVeque (1983), all shifted by the mean of the first, so that a mean that is
large beside the deviations costs no digits. Results are rounded once, to the dtype of the buffers.

**Over processes.** A set may be spread over the processes of a group, in shares of any size. After each pass they tell
each other what arrived, and merge it in the order of their ranks, as one process merges batches; so all of them end
with the same statistics, to the last bit, and these are those of one process but for roundings of float64.

A BatchNorm that is called several times in a pass normalises each call by that call's own statistics, as in
training, and keeps those of all calls together. Not covered: `F.batch_norm` without a module, and InstanceNorm and
frozen BatchNorms, which are left as they are.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfold.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from bnfold.distributed import Processes

__all__ = ["Apply", "Batches", "calibrate"]

Model = TypeVar("Model", bound=nn.Module)
Batches = Iterable[Any] | Callable[[], Iterable[Any]]
Apply = Callable[[nn.Module, Any], object]
Weights = Callable[[Any], Tensor | None]

_Site = tuple[str, int]
"""A BatchNorm by name, and the number of its call within one forward pass."""


@dataclass(frozen=True)
class _Moments:
    """The count of numbers x per channel, mean and sum of squared deviations of x - shift; (channels,) float64 each.

    A shift near the mean keeps the digits that a mean large beside the deviations would cost.
    """

    count: float
    shift: Tensor
    rest: Tensor
    squares: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean of x."""
        return self.shift + self.rest

    def merge(self, other: _Moments) -> _Moments:
        """Return the moments of both sets together (Chan, Golub & LeVeque 1983)."""
        count = self.count + other.count
        apart = (other.shift - self.shift) + (other.rest - self.rest)
        rest = self.rest + apart * (other.count / count)
        between = apart.square() * (self.count * other.count / count)
        return _Moments(count, self.shift, rest, self.squares + other.squares + between)

    def equals(self, other: _Moments) -> bool:
        """Tell whether nothing differs, to the last bit."""
        return torch.equal(self.mean, other.mean) and torch.equal(self.squares, other.squares)


_Known = dict[_Site, _Moments]
_Go = Callable[[Iterable[Any], _Known], tuple[_Known, int]]
"""One pass over the set: the batches, and what is known, to what arrived at each site, and the number of batches."""


def calibrate(
    model: Model,
    batches: Batches,
    *,
    apply: Apply | None = None,
    weights: Weights | None = None,
    dtype: torch.dtype | None = torch.float64,
    group: ProcessGroup | None = None,
) -> Model:
    """Return a copy of `model` whose BatchNorms have the statistics of the whole set; `model` is not changed.

    A copy, as `bnfold.fold` returns one: a failure leaves nothing half done, and the two can be compared. Parameters,
    the mode of every module and `num_batches_tracked` are those of `model`; a BatchNorm that no pass reaches keeps
    its statistics.

    Args:
        model: with BatchNorms that keep running statistics, in training or eval mode. A module that is no torch
            BatchNorm counts as one if it has `momentum`, `running_mean`, and `running_var` or `running_std`, and its
            channels on axis 1.
        batches: the set, in batches of any size, read once for each pass: a list, a DataLoader, or a function that
            returns an iterable, such as a generator function. A batch is what `model` is called with: a tensor, a
            tuple of positional arguments, a dict of keyword arguments, or a pair `(args, kwargs)`.
        apply: how to call the model on a batch of any other kind: `lambda model, batch: model(batch[0])`.
        weights: how often the examples of a batch count, (examples,), for a set in which many are alike: a function
            of the batch. What arrives at each BatchNorm must have the examples on axis 0.
        dtype: what to compute in; floating-point parts of a batch are converted. None computes in the model's own,
            for models that insist on it; sums are kept in float64 all the same.
        group: of `torch.distributed` (`group.WORLD`): `batches` is the share of this process, which may be none, and
            every process of the group makes this call, with the same model.

    Raises:
        ProcessLost: another process of the group is gone.
        InputError: there is no BatchNorm to calibrate, or no batch; weights do not fit what arrives; a BatchNorm
            keeps no running statistics, got one value per channel, or got one that is not finite; a batch is of no
            kind to call a model with; the set can be read only once where more passes are needed, or changes
            between two passes; another process met any of that.
    """
    layers = _find(model)
    read = _reader(batches, len(layers))
    work = copy.deepcopy(model).eval()
    if dtype is not None:
        work.to(dtype)
    go: _Go = partial(_pass, work, apply or _call, weights or _weigh_alike, dtype)
    if group is not None:
        from bnfold.distributed import Processes

        sizes = {name: module.running_mean.numel() for name, module in layers.items()}
        go = partial(_pass_together, Processes(group), sizes, go)
    known, count = go(read(), {})
    if not count:
        raise InputError("there is no batch to calibrate on")
    for _ in range(len(known) - 1 if count > 1 else 0):
        before, (known, _) = known, go(read(), known)
        _compare_sets(before, known)
        if all(known[site].equals(before[site]) for site in known):
            break
    return _store(copy.deepcopy(model), known)


def _find(model: nn.Module) -> dict[str, Any]:
    """Return the BatchNorms by name; raise if there is none, or one that keeps no statistics."""
    layers = {name: module for name, module in model.named_modules() if _is_batchnorm(module)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no BatchNorm to calibrate")
    for name, module in layers.items():
        if not all(isinstance(buffer, Tensor) for buffer in _buffers(module)):
            raise InputError(
                f"`{name}` keeps no running statistics and normalises by each batch; "
                "build it with track_running_stats=True"
            )
    return layers


def _is_batchnorm(module: nn.Module) -> bool:
    """Tell whether a module normalises by statistics that follow the data: InstanceNorm and frozen ones do not."""
    alike = all(hasattr(module, name) for name in ("running_mean", "momentum"))
    alike = alike and (hasattr(module, "running_var") or hasattr(module, "running_std"))
    return isinstance(module, _BatchNorm) or (alike and not isinstance(module, _InstanceNorm))


def _buffers(module: Any) -> tuple[Any, Any]:
    """Return where a BatchNorm keeps its mean and its variance or std."""
    spread = "running_var" if hasattr(module, "running_var") else "running_std"
    return module.running_mean, getattr(module, spread)


def _reader(batches: Batches, layers: int) -> Callable[[], Iterable[Any]]:
    """Return what gives the batches once more with every call."""
    if isinstance(batches, Tensor):
        raise InputError(
            "`batches` is one tensor; give [tensor] to take it as one batch, or tensor.split(1024)"
        )
    if callable(batches):
        return batches
    if not isinstance(batches, Iterator):
        return lambda: batches
    once = iter((batches,))

    def read() -> Iterable[Any]:
        if layers > 1 or (unread := next(once, None)) is None:
            raise InputError(
                f"`batches` can be read only once, and {layers} BatchNorms that depend on each other may take a "
                "pass each; give a list, a DataLoader, or the generator function itself"
            )
        return unread

    return read


@torch.no_grad()
def _pass(
    work: nn.Module,
    apply: Apply,
    weights: Weights,
    dtype: torch.dtype | None,
    batches: Iterable[Any],
    known: _Known,
) -> tuple[_Known, int]:
    """Run every batch through `work`; return what arrived at each site, and the number of batches."""
    found: _Known = {}
    calls: Counter[str] = Counter()
    weighed: Tensor | None = None

    def see(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        site = name, calls[name]
        calls[name] += 1
        here = _measure(name, args[0] if args else kwargs["input"], weighed, found.get(site))
        if here is not None:
            _check_finite(name, here)
            found[site] = found[site].merge(here) if site in found else here
            _set(module, known.get(site, here), correction=0)

    hooks = [
        module.register_forward_pre_hook(partial(see, name), with_kwargs=True, prepend=False)
        for name, module in _find(work).items()
    ]
    try:
        count = 0
        for batch in batches:
            calls.clear()
            weighed = weights(batch)
            apply(work, batch if dtype is None else _convert(batch, dtype))
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
    return found, count


def _pass_together(
    processes: Processes, sizes: dict[str, int], go: _Go, batches: Iterable[Any], known: _Known
) -> tuple[_Known, int]:
    """Make a pass in each process; return what arrived in all of them, and the number of all batches."""
    failure, found, count = None, dict[_Site, _Moments](), 0
    try:
        found, count = go(batches, known)
    except InputError as error:
        failure = error
    if processes.any(failure is not None):
        raise failure or InputError("another process could not use its share of the set; it says why")
    calls = [1 + max((call for name, call in found if name == each), default=-1) for each in sizes]
    *most, count = torch.stack(processes.gather(torch.tensor([*calls, count]))).T
    sites = [(name, call) for name, n in zip(sizes, most, strict=True) for call in range(int(n.max()))]
    packed = torch.cat([_pack(found.get(site), sizes[site[0]]) for site in sites] or [torch.zeros(0)])
    return _merge(sites, sizes, processes.gather(packed)), int(count.sum())


def _pack(moments: _Moments | None, size: int) -> Tensor:
    """Moments as a vector on the CPU, zero where there are none."""
    if moments is None:
        return torch.zeros(1 + 3 * size, dtype=torch.float64)
    count = moments.rest.new_tensor([moments.count])
    return torch.cat([count, moments.shift, moments.rest, moments.squares]).cpu()


def _merge(sites: list[_Site], sizes: dict[str, int], packed: list[Tensor]) -> _Known:
    """What all processes have packed, merged in their order."""
    known: _Known = {}
    for everything in packed:
        parts = torch.split(everything, [1 + 3 * sizes[name] for name, _ in sites])
        for site, part in zip(sites, parts, strict=True):
            if count := float(part[0]):
                here = _Moments(count, *part[1:].view(3, -1))
                known[site] = known[site].merge(here) if site in known else here
    return known


def _measure(name: str, x: Tensor, weights: Tensor | None, like: _Moments | None) -> _Moments | None:
    """Return the moments of `x` (n, channels, ...), None if there is nothing; shifted as `like` or by their mean."""
    if weights is not None and weights.shape != x.shape[:1]:
        raise InputError(
            f"`{name}` gets {len(x)} rows where the batch has weights of shape {tuple(weights.shape)}; weights need a "
            "model that keeps its examples on axis 0"
        )
    values = x.to(torch.float64).transpose(1, -1)
    axes = tuple(range(values.ndim - 1))
    weigh = torch.ones(len(x)).to(values) if weights is None else weights.to(values)
    count = float(weigh.sum()) * math.prod(values.shape[1:-1])
    if not count:
        return None
    shift = values.mean(axes) if like is None else like.shift
    values = values - shift
    rest = _sum(values, weigh) / count
    values -= rest
    return _Moments(count, shift, rest, _sum(values.square_(), weigh))


def _sum(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of `values` (n, ..., channels) over all axes but the last."""
    return weights @ (values.flatten(1, -2).sum(1) if values.ndim > 2 else values)


def _check_finite(name: str, moments: _Moments) -> None:
    if not (moments.mean.isfinite() & moments.squares.isfinite()).all():
        raise InputError(
            f"what arrives at `{name}` is not finite; look at the inputs and at the layers before it"
        )


def _set(module: Any, moments: _Moments, correction: int) -> None:
    """Write mean and variance, or std, into a BatchNorm, rounded once."""
    variance = moments.squares / (moments.count - correction)
    spread = variance if hasattr(module, "running_var") else variance.sqrt()
    for buffer, value in zip(_buffers(module), (moments.mean, spread), strict=True):
        buffer.copy_(value.view_as(buffer))


def _convert(batch: Any, dtype: torch.dtype) -> Any:
    """Return a batch with its floating-point tensors in `dtype`."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: _convert(value, dtype) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_convert(value, dtype) for value in batch)
    return batch


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, tuple):
        pair = len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict)
        return model(*batch[0], **batch[1]) if pair else model(*batch)
    raise InputError(
        f"a batch is a {type(batch).__name__}; say how to call the model with it, such as "
        "apply=lambda model, batch: model(batch[0])"
    )


def _weigh_alike(batch: Any) -> None:
    """Every example counts once."""


def _compare_sets(before: _Known, after: _Known) -> None:
    for name, call in before.keys() | after.keys():
        counts = [known[name, call].count if (name, call) in known else 0 for known in (before, after)]
        if counts[0] != counts[1]:
            raise InputError(
                f"`{name}` got {counts[0]:,g} values per channel in one pass and {counts[1]:,g} in the next; "
                "every pass must read the same set"
            )


@torch.no_grad()
def _store(model: Model, known: _Known) -> Model:
    """Write what arrived at each BatchNorm, in all its calls, into `model`."""
    totals: dict[str, _Moments] = {}
    for (name, _), moments in known.items():
        totals[name] = totals[name].merge(moments) if name in totals else moments
    layers = _find(model)
    for name, moments in totals.items():
        if moments.count < 2:
            raise InputError(f"`{name}` got one value per channel, which has no variance; give more examples")
        _set(layers[name], moments, correction=1)
        for buffer in _buffers(layers[name]):
            if not buffer.isfinite().all():
                raise InputError(
                    f"a statistic of `{name}` does not fit {buffer.dtype}; call model.float() first"
                )
    return model
