"""Run a module otherwise than on its example: in other batches, at other sizes, with the other value of a flag.

Each trial is one more recorded pass. Sizes are changed together where they are equal, since they tend to mean one
thing: the batch of all inputs, the height and width of images, the length of a sequence and of its mask. Smaller
inputs are cut from the example, larger ones repeat it.

    batch     1, and 4 or 5, whichever is odd where the example is even; a third where those two part or are not taken
    size      half, and one that is odd where the example is even, larger, and not square; where that is not taken, one
              axis at a time, and so those of length 1
    rank      without the batch axis, or with one more
    flag      bools among the arguments, and those that `forward` has a default for
    chance    another random state, where the pass drew from one

A trial that the module does not take ends where it raises. What could not be run is said in `Trials.notes`.

Not covered: code that does something else at a size which no trial meets (`if width == 56`, `if length > 4096`, `if
batch > 64`, or a `squeeze` where the length is that of the channels): sizes are tried, not proved. Nor inputs of
another rank for which modules of torch do something else, as BatchNorm1d behind a Linear does; nor code that asks
whether gradients are wanted (`torch.is_grad_enabled()`, `x.requires_grad`) or how memory lies (`x.is_contiguous()`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from bnfold.torch.alignment import Alignment
from bnfold.torch.trace import Trace

__all__ = ["Trial", "Trials", "run_trials", "two_or_more"]

Run = Callable[[Any, Any, int], Trace]
"""Records one pass on arguments and keyword arguments, from a random state that a number stands for."""

Sizes = Mapping[tuple[int, int], int]
"""New sizes, by the place of the tensor among the arguments and the axis."""


@dataclass(frozen=True)
class Trial:
    """One more pass.

    Attributes:
        words: what it was given, to be read after "given".
        given: the arguments and keyword arguments.
        alignment: of the pass on the example and this one.
        ranked: whether every input has as many axes as in the example.
    """

    words: str
    given: tuple[Any, dict[str, Any]]
    recording: Trace
    alignment: Alignment
    ranked: bool = True


@dataclass
class Trials:
    """The passes that could be made, and a sentence on each kind of them that could not."""

    made: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run_trials(model: nn.Module, args: Any, kwargs: Any, run: Run, recording: Trace) -> Trials:
    """Make every trial that promises something.

    Args:
        model: the module, for the flags that its `forward` takes.
        run: see `Run`.
        recording: the pass on the example.
    """
    desk = _Desk(args, kwargs, run, recording)
    desk.try_sizes()
    desk.try_ranks()
    desk.try_flags(model)
    if recording.draws:
        desk.try_chances()
    return desk.trials


def two_or_more(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The same inputs, those of a single example twice."""
    leaves, form = tree_flatten((args, kwargs))
    found: tuple[Any, Any] = tree_unflatten([_twice(leaf) for leaf in leaves], form)
    return found


def _twice(leaf: Any) -> Any:
    single = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == 1
    return _resized(leaf, {0: 2}) if single else leaf


class _Desk:
    def __init__(self, args: Any, kwargs: Any, run: Run, recording: Trace) -> None:
        self.run, self.recording = run, recording
        self.args, self.kwargs = args, kwargs
        self.leaves, self.form = tree_flatten((args, kwargs))
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.trials = Trials()
        self.batch: Sizes = {}
        self.sized = False
        self.untaken: Sizes = {}

    # -- sizes

    def try_sizes(self) -> None:
        """Another batch and other sizes at once where that works; else one after the other."""
        batches, spaces = list(_batch_axes(self.tensors)), list(_space_axes(self.tensors))
        batch, space = next(iter(batches), {}), next(iter(spaces), {})
        both = self._resize({**_several(batch), **_half(space)}) if batch and _half(space) else None
        halved = both is not None
        if both:
            single = _single(batch)
            self.batch = single if not single or self._resize_batch(single) else _several(batch)
        else:
            combined, self.trials.made = self.trials.made, []
            taken = self._try_batch(batch)
            halved = self._try_half(space) is not None if halved or not taken else False
            self.trials.made += combined
        self._try_odd(space, halved)
        for other in batches[1:]:
            self._try_batch(other)
        for other in spaces[1:]:
            self._try_odd(other, self._try_half(other) is not None)
        if self.untaken and not self.sized:
            self._note_untaken(self.untaken)

    def _try_batch(self, axes: Sizes) -> bool:
        """One, and several, which it returns whether the model takes; where neither does as the example, two or three.

        Where none is taken, the same along all axes of that size, as of the nodes of a graph and its adjacency.
        """
        if not axes:
            return False
        size = next(iter(axes.values()))
        wide = {
            (at, axis): size
            for at, t in enumerate(self.tensors)
            for axis in range(t.dim())
            if t.shape[axis] == size
        }
        single, several = (self._resize_batch(sizes) for sizes in (_single(axes), _several(axes)))
        alike = [_single(axes)] * bool(single) + [_several(axes)] * bool(several)
        for sizes in (_third(axes), _third(wide if len(wide) > len(axes) else {})):
            if not alike and self._resize_batch(sizes):
                alike = [sizes]
        self.batch = self.batch or next(iter(alike), {})
        if not self.trials.made:
            self.trials.notes.append("not read with another batch size: the model does not take one")
        return several is not None

    def _resize_batch(self, sizes: Sizes) -> bool | None:
        return self._resize(sizes, f"a batch of {next(iter(sizes.values()), 0)}")

    def _try_half(self, axes: Sizes) -> bool | None:
        return self._resize(_half(axes)) if axes else None

    def _try_odd(self, axes: Sizes, halved: bool) -> None:
        """Sizes of the other parity; where those are not taken but half of the example is, one and a half of it."""
        if not axes:
            return
        odd = {place: size + 1 + 2 * (place[1] % 2) for place, size in axes.items()}
        if taken := self._try_larger(odd):
            self.sized = True
            return
        if halved:
            taken = self._try_larger({place: size + size // 2 for place, size in axes.items()})
        left = {place: odd[place] for place, size in axes.items() if size == 1 or not (taken or halved)}
        alone = {axis: {p: size for p, size in left.items() if p[1] == axis} for _, axis in left}
        missed = [sizes for sizes in alone.values() if sizes == odd or not self._try_larger(sizes)]
        if taken or halved or len(missed) < len(alone):
            self.sized = True
            self._note_untaken(*(sizes for sizes in missed if all(axes[place] == 1 for place in sizes)))
        else:
            self.untaken = self.untaken or odd

    def _note_untaken(self, *missed: Sizes) -> None:
        for sizes in missed:
            words = _words(self._resized(sizes))
            self.trials.notes.append(f"not read at another size: the model does not take {words}")

    def _try_larger(self, sizes: Sizes) -> bool:
        """Whether the model takes other sizes, in the smallest batch that it takes."""
        fewer = {p: size for p, size in self.batch.items() if size <= self.tensors[p[0]].shape[p[1]]}
        return self._resize({**fewer, **sizes}) is not None

    def _resize(self, sizes: Sizes, words: str = "") -> bool | None:
        """Whether a pass with other sizes does the same; None where it cannot be made."""
        if not sizes:
            return None
        try:
            tensors = self._resized(sizes)
        except Exception:  # noqa: BLE001 a tensor of a kind that cannot be cut
            return None
        return self._try(tensors, words or _words(tensors))

    def _resized(self, sizes: Sizes) -> list[Tensor]:
        made = []
        for place, tensor in enumerate(self.tensors):
            wanted = {axis: size for (at, axis), size in sizes.items() if at == place}
            made.append(_resized(tensor, wanted) if wanted else tensor)
        return made

    # -- other trials

    def try_ranks(self) -> None:
        """Inputs without their batch axis; with one more where they may be lacking it."""
        ranks = [tensor.dim() for tensor in self.tensors if tensor.dim() > 1]
        if not ranks or any(tensor.layout is not torch.strided for tensor in self.tensors):
            return
        self._try([t[0] if t.dim() > 1 and len(t) else t for t in self.tensors], "no batch axis", False)
        if max(ranks) < 4:
            self._try([t[None] if t.dim() > 1 else t for t in self.tensors], "one more axis", False)

    def try_flags(self, model: nn.Module) -> None:
        """The other value of each bool that the model is given, or has a default for."""
        for name, args, kwargs in _flags(model, self.args, self.kwargs):
            self._record(args, kwargs, name, True)

    def try_chances(self) -> None:
        """Other random states."""
        for seed in (1, 2, 3):
            self._record(self.args, self.kwargs, "another random state", True, seed)

    def _try(self, tensors: list[Tensor], words: str, ranked: bool = True) -> bool | None:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.form)
        return self._record(args, kwargs, words, ranked)

    def _record(self, args: Any, kwargs: Any, words: str, ranked: bool, seed: int = 0) -> bool | None:
        try:
            recording = self.run(args, kwargs, seed)
        except Exception:  # noqa: BLE001 whatever the model says of inputs that it does not take
            return None
        alignment = Alignment.of(self.recording, recording)
        self.trials.made.append(Trial(words, (args, kwargs), recording, alignment, ranked))
        return not (alignment.partings or alignment.apart)


def _batch_axes(tensors: list[Tensor]) -> Iterator[Sizes]:
    """The first axes, those of one size together."""
    sizes = dict.fromkeys(tensor.shape[0] for tensor in tensors if tensor.dim() and len(tensor))
    for size in list(sizes)[:3]:
        yield {(at, 0): size for at, t in enumerate(tensors) if t.dim() and t.shape[0] == size}


def _space_axes(tensors: list[Tensor]) -> Iterator[Sizes]:
    """The axes of images together; else those of sequences, by size, from the last to the second."""
    images = {
        (at, axis): t.shape[axis] for at, t in enumerate(tensors) if t.dim() > 3 for axis in range(2, t.dim())
    }
    if images:
        yield images
        return
    whole = [not t.is_floating_point() for t in tensors]
    sizes = dict.fromkeys(
        t.shape[axis]
        for at, t in enumerate(tensors)
        for axis in range(t.dim() - 1, 0, -1)
        if t.dim() == 3 or (t.dim() == 2 and whole[at])
    )
    for size in [each for each in sizes if each > 1][:3] + [1] * (1 in sizes):
        yield {(at, a): size for at, t in enumerate(tensors) for a in range(1, t.dim()) if t.shape[a] == size}


def _single(axes: Sizes) -> Sizes:
    """A batch of one; nothing where the example is one."""
    return dict.fromkeys(axes, 1) if max(axes.values(), default=1) > 1 else {}


def _several(axes: Sizes) -> Sizes:
    """A batch that is even where the example is odd, and odd where it is even, and small, for what it costs."""
    return {place: 4 + (size + 1) % 2 for place, size in axes.items()}


def _third(axes: Sizes) -> Sizes:
    return {place: 2 if size != 2 else 3 for place, size in axes.items()}


def _half(axes: Sizes) -> Sizes:
    """Half of the sizes; nothing where none can be halved."""
    return (
        {place: max(1, size // 2) for place, size in axes.items()}
        if max(axes.values(), default=1) > 1
        else {}
    )


def _resized(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """A tensor cut, or repeated from its start, along some axes."""
    layout = tensor.layout
    dense = tensor if layout is torch.strided else tensor.detach().to_dense()
    for axis, size in sizes.items():
        places = torch.arange(size, device=dense.device) % dense.shape[axis]
        dense = dense.index_select(axis, places)
    return dense if layout is torch.strided else dense.to_sparse(layout=layout)


def _words(tensors: list[Tensor]) -> str:
    """The shapes of inputs, as they are given to the command."""
    return ", ".join("x".join(map(str, tensor.shape)) or "1" for tensor in tensors)


def _flags(model: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The arguments with one bool at a time turned over, and what that is called."""
    try:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return
    bound.apply_defaults()
    for name, parameter in signature.parameters.items():
        value = bound.arguments.get(name)
        if value is None and "bool" in str(parameter.annotation):
            value = False
        leaves, form = tree_flatten_with_path(value)
        for at, (path, leaf) in enumerate(leaves):
            if isinstance(leaf, bool):
                given = [not each if place == at else each for place, (_, each) in enumerate(leaves)]
                arguments = {**bound.arguments, name: tree_unflatten(given, form)}
                turned = inspect.BoundArguments(signature, arguments)
                yield f"{name}{keystr(path)}={not leaf}", turned.args, turned.kwargs
