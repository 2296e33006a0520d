"""Backpropagation by hand: the lecture's nets forward and backward, without autograd.

With d the gradient of a layer's output y, x its input, and n the number of rows of the batch:

    Embedding    y = E[x]                                  dE[k] = sum of d where x is k
    Linear       y = x W^T + b                             dW = d^T x    db = sum d    dx = d W
    BatchNorm    y = gamma z + beta, z = (x - mean) / s    dgamma = sum d z    dbeta = sum d
                 s^2 = sum (x - mean)^2 / c + eps          dx = gamma / s (d - dbeta / n - z dgamma / c)
    Tanh, ReLU   y = tanh x, max(x, 0)                     dx = d - d y^2, d where y > 0
    loss         L = -sum w log softmax(x)                 dx = softmax(x) sum w - w

(Ioffe & Szegedy 2015 for BatchNorm.) c is n, or n - 1 for the lecture's kinds, which divide by the unbiased variance
(see `train.layers`). w is how often a character follows, as a share of the batch.

All of it is recorded on a tape when a batch of some size first comes, and played for each that follows (`train.tape`).
The numbers are those of autograd but for rounding, and the tests hold both to float64.

The running statistics move when the whole pass has come through, so one that breaks off leaves the net as it was. Hooks
see what they would see with autograd: the outputs of layers, and the gradients of these and of the parameters.

Where the rows of a batch are spread over processes, `add` adds a tensor up over all of them: the sums of each
BatchNorm, forward and backward, so that it normalises by the whole batch, and at the end the loss and the gradients.

Not covered: layers without a row in `_LAYERS`; for nets that have any, `differentiate` goes by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfold.errors import InputError
from train import layers as scratch
from train.tape import Add, Tape

__all__ = ["ByHand", "Pass", "by_autograd", "differentiate"]

Pass = Callable[[Tensor, Tensor, int], float]
"""Contexts, targets, and the rows of the whole batch, of which these are some, to the loss; leaves gradients behind."""

Backward = Callable[[Tensor], Tensor]
"""Records how the gradient of an output becomes that of the input, and those of parameters on the way."""


def differentiate(net: nn.Sequential, gradients: Tensor, add: Add | None = None) -> Pass:
    """Return what takes a net through one batch.

    Args:
        net: in training mode; its parameters have gradients, which are overwritten.
        gradients: all of them, in one vector.
        add: where a batch is spread over processes.

    Raises:
        InputError: it is, and a layer has no row here.
    """
    strange = [name for name, layer in net.named_children() if not _is_known(layer)]
    if not strange and all(p.requires_grad for p in net.parameters()):
        return ByHand(net, gradients, add)
    if add is not None:
        raise InputError(f"{', '.join(strange)}: no layer that several processes can train; start one")
    return by_autograd(net, gradients)


def by_autograd(net: nn.Module, gradients: Tensor) -> Pass:
    """Return a pass in the plain way."""

    def run(x: Tensor, y: Tensor, rows: int) -> float:
        gradients.zero_()
        logits, y = net(x.to(gradients.device)), y.to(gradients.device)
        loss = F.cross_entropy(logits, y, reduction="sum" if y.is_floating_point() else "mean")
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    return run


class ByHand:
    """Takes a net through a batch by a tape, which is recorded when a batch of its size first comes."""

    def __init__(self, net: nn.Sequential, gradients: Tensor, add: Add | None = None) -> None:
        self._net, self._gradients, self._add = net, gradients, add
        self._recordings: dict[Any, _Recording] = {}

    def __call__(self, x: Tensor, y: Tensor, rows: int) -> float:
        """Return the loss; the gradients are in their places, and the running statistics have moved."""
        watched = _is_watched(self._net)
        key = x.shape, y.dtype, rows, watched
        if key not in self._recordings:
            self._recordings[key] = _Recording(self._net, (x, y), rows, self._add, self._gradients, watched)
        loss = self._recordings[key].play(x, y)
        if watched:
            _show_gradients(self._net)
        return loss


class _Recording:
    """A tape, and where what comes in and goes out of it lies."""

    def __init__(
        self,
        net: nn.Sequential,
        batch: tuple[Tensor, Tensor],
        rows: int,
        add: Add | None,
        gradients: Tensor,
        watched: bool,
    ) -> None:
        self._x, self._y = (torch.zeros_like(each, device=gradients.device) for each in batch)
        tape = Tape(gradients, rows, add)
        self._loss = _record(tape, net, self._x, self._y, watched)
        tape.reduce(gradients)
        tape.reduce(self._loss)
        alone = gradients.is_cuda and add is None and not watched
        self._play = tape.as_graph() if alone else tape.play

    def play(self, x: Tensor, y: Tensor) -> float:
        """Return the loss of a batch."""
        self._x.copy_(x)
        self._y.copy_(y)
        self._play()
        return -self._loss.item()


def _record(tape: Tape, net: nn.Sequential, x: Tensor, y: Tensor, watched: bool) -> Tensor:
    """Record a pass through a net, and return where minus its loss will be."""
    backwards: list[Backward] = []
    for layer in net:
        given = x
        x, backward = _LAYERS[type(layer)](tape, layer, given)
        backwards += [backward, *([_show(tape, layer, given, x)] if watched else [])]
    loss, d = _cross_entropy(tape, x, y)
    for backward in reversed(backwards):
        d = backward(d)
    return loss


# ---------------------------------------------------------------- the layers


def _embedding(tape: Tape, module: Any, x: Tensor) -> tuple[Tensor, Backward]:
    rows, size = x.numel(), module.weight.shape[1]
    weight, is_letter = module.weight.detach(), tape.new(rows, len(module.weight))
    tape("equal", x.view(-1, 1), tape.count(len(weight)), out=is_letter)
    y = tape("matmul", is_letter, weight, out=tape.new(rows, size))

    def backward(d: Tensor) -> Tensor:
        tape("matmul", is_letter.T, d.view(rows, size), out=module.weight.grad)
        return d

    return y.view(*x.shape, size), backward


def _flatten(tape: Tape, module: Any, x: Tensor) -> tuple[Tensor, Backward]:
    return x.flatten(module.start_dim, module.end_dim), lambda d: d.view(x.shape)


def _linear(tape: Tape, module: Any, x: Tensor) -> tuple[Tensor, Backward]:
    weight = module.weight.detach()
    y = tape("matmul", x, weight.T, out=tape.new(len(x), len(weight)))
    if module.bias is not None:
        tape("add", y, module.bias.detach(), out=y)

    def backward(d: Tensor) -> Tensor:
        tape("matmul", d.T, x, out=module.weight.grad)
        if module.bias is not None:
            tape("sum", d, out=module.bias.grad)
        return tape("matmul", d, weight, out=tape.new(*x.shape))

    return y, backward


def _batchnorm(tape: Tape, module: Any, x: Tensor) -> tuple[Tensor, Backward]:
    gamma, beta, divisor = module.weight.detach(), module.bias.detach(), tape.rows - _lost(module)
    mean, squares, std = (tape.new(len(gamma)) for _ in range(3))
    y, z, product = (tape.new(*x.shape) for _ in range(3))
    tape.reduce(tape("sum", x, out=mean))
    tape("divide", mean, tape.rows, out=mean)
    tape("subtract", x, mean, out=z)
    tape("multiply", z, z, out=product)
    tape.reduce(tape("sum", product, out=squares))
    tape("divide", squares, divisor, out=std)
    tape("add", std, getattr(module, "eps", 0.0), out=std)
    tape("sqrt", std, out=std)
    tape("divide", z, std, out=z)
    tape("multiply", z, gamma, out=y)
    tape("add", y, beta, out=y)
    _track(tape, module, mean, squares)

    def backward(d: Tensor) -> Tensor:
        part, slope = tape.new(len(gamma)), tape.new(len(gamma))
        dbeta = tape.total(tape("sum", d, out=module.bias.grad))
        tape("multiply", d, z, out=product)
        dgamma = tape.total(tape("sum", product, out=module.weight.grad))
        tape("subtract", d, tape("divide", dbeta, tape.rows, out=part), out=d)
        tape("multiply", z, tape("divide", dgamma, divisor, out=part), out=product)
        tape("subtract", d, product, out=d)
        return tape("multiply", d, tape("divide", gamma, std, out=slope), out=d)

    return y, backward


def _lost(module: Any) -> int:
    """What is taken from n where a BatchNorm divides by the variance."""
    return int(getattr(module, "unbiased", isinstance(module, scratch.StdBatchNorm1d)))


def _track(tape: Tape, module: Any, mean: Tensor, squares: Tensor) -> None:
    """Record that running statistics move towards those of the batch."""
    spread = tape("divide", squares, tape.rows - 1, out=tape.new(len(mean)), late=True)
    if isinstance(module, scratch.StdBatchNorm1d):
        pairs = (module.running_mean, mean), (module.running_std, tape("sqrt", spread, out=spread, late=True))
    else:
        pairs = (module.running_mean, mean), (module.running_var, spread)
        tape("add", module.num_batches_tracked, 1, out=module.num_batches_tracked, late=True)
    for running, now in pairs:
        apart = tape("subtract", now, running, out=tape.new(len(mean)), late=True)
        tape("multiply", apart, module.momentum, out=apart, late=True)
        tape("add", running, apart, out=running, late=True)


def _tanh(tape: Tape, module: Any, x: Tensor) -> tuple[Tensor, Backward]:
    y = tape("tanh", x, out=tape.new(*x.shape))

    def backward(d: Tensor) -> Tensor:
        lost = tape("multiply", y, y, out=tape.new(*y.shape))
        return tape("subtract", d, tape("multiply", lost, d, out=lost), out=d)

    return y, backward


def _relu(tape: Tape, module: Any, x: Tensor) -> tuple[Tensor, Backward]:
    y = tape("relu", x, out=tape.new(*x.shape))

    def backward(d: Tensor) -> Tensor:
        passes = tape("greater", y, 0.0, out=tape.new(*y.shape))
        return tape("multiply", d, passes, out=d)

    return y, backward


def _cross_entropy(tape: Tape, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Record minus the loss of logits `x`, and their gradient; targets are characters, or shares of the batch."""
    column, d, shares = tape.new(len(x), 1), tape.new(*x.shape), y
    if not y.is_floating_point():
        shares = tape("equal", y.view(-1, 1), tape.count(x.shape[1]), out=tape.new(*x.shape))
        tape("divide", shares, tape.rows, out=shares)
    logs = tape("subtract", x, tape("row max", x, out=column), out=tape.new(*x.shape))
    tape("exp", logs, out=d)
    tape("row sum", d, out=column)
    tape("divide", d, column, out=d)
    tape("subtract", logs, tape("log", column, out=column), out=logs)
    tape("multiply", d, tape("row sum", shares, out=column), out=d)
    tape("subtract", d, shares, out=d)
    tape("multiply", logs, shares, out=logs)
    return tape("sum of all", logs, out=tape.new()), d


_Record = Callable[[Tape, Any, Tensor], tuple[Tensor, Backward]]


def _by_class() -> dict[type, _Record]:
    kits: tuple[ModuleType, ...] = (nn, scratch)
    rows: dict[str, _Record] = {
        "Embedding": _embedding,
        "Flatten": _flatten,
        "Linear": _linear,
        "BatchNorm1d": _batchnorm,
        "Tanh": _tanh,
        "ReLU": _relu,
    }
    own = {scratch.UnbiasedBatchNorm1d: _batchnorm, scratch.StdBatchNorm1d: _batchnorm}
    return {getattr(kit, name): row for kit in kits for name, row in rows.items()} | own


_LAYERS: Mapping[type, _Record] = _by_class()


def _is_known(layer: Any) -> bool:
    """Whether a layer has a row, and no option that the row does not know."""
    options = getattr(layer, "padding_idx", None), getattr(layer, "max_norm", None)
    switched = getattr(layer, "sparse", False) or getattr(layer, "scale_grad_by_freq", False)
    whole = getattr(layer, "affine", True) and getattr(layer, "track_running_stats", True)
    averages = getattr(layer, "momentum", 0.0) is None
    return type(layer) in _LAYERS and options == (None, None) and whole and not (switched or averages)


# ---------------------------------------------------------------- who looks on


def _is_watched(net: nn.Sequential) -> bool:
    return any(layer._forward_hooks for layer in net) or any(p._backward_hooks for p in net.parameters())


def _show_gradients(net: nn.Sequential) -> None:
    for parameter in net.parameters():
        for hook in list((parameter._backward_hooks or {}).values()):
            hook(parameter.grad)  # type: ignore[arg-type]


def _show(tape: Tape, layer: nn.Module, x: Tensor, y: Tensor) -> Backward:
    """Record that the hooks of a layer see its output, and the hooks that those set the gradient of it."""
    shown: list[Tensor] = []

    def forward() -> None:
        output = y.clone().requires_grad_()
        shown[:] = [output]
        for hook in list(layer._forward_hooks.values()):
            hook(layer, (x,), output)

    def backward(d: Tensor) -> Tensor:
        tape.operations.append(lambda: shown[0].backward(d.clone()))  # type: ignore[no-untyped-call]
        return d

    tape.operations.append(forward)
    return backward
