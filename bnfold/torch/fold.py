"""Fold a module and prove it: read, travel, write, compare.

The comparison runs both models on the example inputs and on perturbed ones, in float64 and in the model's own dtype
(`equivalence`). It leaves the model's buffers and every random state as they were; a model that draws random numbers
is run with the same seed each time. What cannot be compared (a model on the `meta` device, one that fixes its own
dtypes and so cannot run in float64) is said in the report's notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.equivalence import UNIT_ROUNDOFF, Outputs, judge, measure
from bnfold.errors import NotEquivalent, UnreadableModel
from bnfold.exclusive import exclusive
from bnfold.report import Evidence, Report
from bnfold.torch.double import double
from bnfold.torch.idle import Idle
from bnfold.torch.read import Reading, read
from bnfold.torch.rehearse import find_fault, read_again, refuse_everything, runs_alike
from bnfold.torch.running import (
    arrange,
    copied,
    copy_structure,
    first_line,
    is_same,
    restored,
    undisturbed,
)
from bnfold.torch.tensors import leaves, put_back
from bnfold.torch.write import check_fit, widen, write
from bnfold.travel import Journey, Options, travel

__all__ = ["fold", "plan", "run", "verify"]


@exclusive()
def fold(
    model: nn.Module,
    example_inputs: Any,
    *,
    inplace: bool = False,
    verify: bool = True,
    **options: Any,
) -> tuple[nn.Module, Report]:
    """Fold every BatchNorm of a module that can be folded.

    Args:
        model: any module, in eval mode (a BatchNorm in training mode is kept, with that reason).
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a pair of a tuple
            and a dict. Their values matter only to models that branch on them.
        inplace: edit the module itself instead of a copy.
        verify: compare the outputs before and after.
        **options: see `travel.Options` (`halves`, `lower`).

    Returns:
        The folded module, of the same class, and a report with a verdict for every BatchNorm.

    Raises:
        UnreadableModel: the module cannot be run on the example inputs, or not copied.
        NotEquivalent: the folded module computes something else. With `inplace` it has been edited by then.
    """
    reading, journey = plan(model, example_inputs, Options(**options))
    size = _count(model)
    changed = sum(node.linear is not None and node.linear.changed for node in journey.graph.nodes)
    comparison = _Comparison(model, example_inputs, changed) if verify else None
    if comparison is not None:
        comparison.writes, comparison.dtype = reading.writes, _coarsest(model, reading.dtypes)
        comparison.run_before(model)
        comparison.run_exact(model, lambda twin: write(twin, reading, journey, inplace=True))
    folded = write(model, reading, journey, inplace)
    evidence, notes = (
        ((), ["unverified: verification was switched off"])
        if comparison is None
        else comparison.judge(folded, unfolded=None if inplace else model)
    )
    limits = tuple(_rests_on(head) for head in reading.heads)
    sizes = (size, _count(folded))
    return folded, Report(journey.verdicts, tuple(evidence), (*notes, *reading.notes), sizes, limits)


def _rests_on(head: Idle) -> str:
    """What is said first of a fold that a part of the model which did not run could find out."""
    return f"this fold holds only as long as `{head.path}` does not run: it did not on the example inputs"


def plan(model: nn.Module, example_inputs: Any, options: Options) -> tuple[Reading, Journey]:
    """Read a module and decide; take back what the module's own code would not go along with (see `rehearse`).

    Raises:
        UnreadableModel: the module cannot be run on the example inputs, or not copied.
    """
    reading, journey = _read_and_decide(model, example_inputs, options)
    for repair in (read_again, find_fault, refuse_everything):
        if not reading.steps or _is_rehearsed(model, example_inputs, reading, journey):
            break
        reading = repair(model, example_inputs, reading)
        journey = travel(reading.graph, options, check_fit(model, reading))
    return reading, journey


def _read_and_decide(model: nn.Module, example_inputs: Any, options: Options) -> tuple[Reading, Journey]:
    """Where heads that did not run cost a fold, it is made all the same, and rests on their not running."""
    reading = read(model, example_inputs)
    journey = travel(reading.graph, options, check_fit(model, reading))
    if not reading.heads or all(verdict.outcome == "folded" for verdict in journey.verdicts):
        return replace(reading, heads=()), journey
    other = read(model, example_inputs, headless=True)
    farther = travel(other.graph, options, check_fit(model, other))
    if farther.verdicts == journey.verdicts:
        return replace(reading, heads=()), journey
    return other, farther


def _is_rehearsed(model: nn.Module, example_inputs: Any, reading: Reading, journey: Journey) -> bool:
    """Whether nothing changes, or the folded module runs the calls that were read."""
    if not any(verdict.outcome != "kept" for verdict in journey.verdicts):
        return True
    try:
        twin = copy_structure(model)
    except UnreadableModel:
        return True
    return runs_alike(write(twin, reading, journey, inplace=True), example_inputs, reading, journey)


@exclusive()
def verify(before: nn.Module, after: nn.Module, inputs: Any) -> tuple[Evidence, ...]:
    """Compare two modules on the same inputs and on perturbed ones, in float64 and in their own dtype.

    Raises:
        NotEquivalent: they differ; the message names the worst input and element.
        UnreadableModel: one of them does not run on these inputs.
    """
    weights = sum(isinstance(getattr(module, "weight", None), Tensor) for module in after.modules())
    comparison = _Comparison(before, inputs, weights)
    comparison.run_before(before)
    comparison.run_exact(before, lambda twin: None, after)
    if comparison.before is None and comparison.exact is None:
        raise UnreadableModel(" ".join(comparison.notes) or "nothing could be compared")
    return tuple(comparison.judge(after, rounded=True, unfolded=before)[0])


def _count(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    lazy = nn.parameter.is_lazy
    return sum(t.numel() for t in tensors.values() if not lazy(t) and t.dtype.is_floating_point)


def run(model: nn.Module, example_inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The outputs of a module as arrays, by their path in what it returns.

    No gradient, no change of the module's tensors or of the inputs, no use of the global random state; a fixed seed.
    """
    return _run(model, example_inputs, True)


def _run(model: nn.Module, example_inputs: Any, writes: bool) -> dict[str, np.ndarray[Any, Any]]:
    """The same, with no care for the parameters of a module that does not write to any."""
    args, kwargs = arrange(example_inputs)
    given = copied(tensor for _, tensor in leaves((args, kwargs)))
    with undisturbed(seed=0), restored(model, writes), torch.no_grad():
        try:
            result = model(*args, **kwargs)
            return {path: np.array(_array(tensor)) for path, tensor in leaves(result)}
        finally:
            for tensor, content in given:
                if not is_same(tensor, content):
                    put_back(tensor, content)


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    narrow = tensor.is_floating_point() and tensor.dtype not in (torch.float64, torch.float32, torch.float16)
    array: np.ndarray[Any, Any] = (tensor.float() if narrow else tensor).numpy()
    return array


class _Narrow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches whether a model that should compute in float64 computes in less."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never: skipping it would import the compiler, which takes seconds."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.dtype != torch.float64:
            self.seen = True
        return result


class _Comparison:
    """The outputs before and after, in two precisions."""

    def __init__(self, model: nn.Module, example_inputs: Any, changed: int) -> None:
        self.inputs = [example_inputs, *_perturbed(example_inputs)]
        self.dtype = _coarsest(model)
        self.changed = changed
        self.before: list[Outputs] | None = None
        self.exact: tuple[list[Outputs], list[Outputs]] | None = None
        self.narrow = False
        self.writes = True
        self.notes: list[str] = []
        tensors = [tensor for _, tensor in leaves(example_inputs)]
        everything = (*model.parameters(), *model.buffers(), *tensors)
        self.possible = not any(t.device.type == "meta" or nn.parameter.is_lazy(t) for t in everything)
        if not self.possible:
            self.notes.append("unverified: there are tensors without numbers (lazy, or on the meta device)")

    def run_before(self, model: nn.Module) -> None:
        if self.possible:
            try:
                self.before = [_run(model, each, self.writes) for each in self.inputs]
            except Exception as error:  # noqa: BLE001 a dtype that some operator lacks
                self.notes.append(
                    f"not compared in {self.dtype}: the model does not run in it: {first_line(error)}"
                )

    def run_exact(self, model: nn.Module, edit: Any, other: nn.Module | None = None) -> None:
        """Run the model in float64, and then another one, or the same one after an edit."""
        if not self.possible:
            return
        try:
            twin = widen(model)
            wide = [torch.utils._pytree.tree_map_only(Tensor, _wide, each) for each in self.inputs]
            with double(), _Narrow() as watch:
                before: list[Outputs] = [_run(twin, each, self.writes) for each in wide]
        except Exception as error:  # noqa: BLE001 a dtype that the model fixes by itself
            self.notes.append(f"not compared in float64: the model does not run in it: {first_line(error)}")
            return
        self.narrow = watch.seen
        edit(twin)
        folded = twin if other is None else widen(other)
        with double():
            self.exact = (before, self._run_folded(folded, wide))

    def _run_folded(self, model: nn.Module, inputs: Sequence[Any]) -> list[Outputs]:
        try:
            return [_run(model, each, self.writes) for each in inputs]
        except Exception as error:
            raise UnreadableModel(
                f"the folded model does not run: {type(error).__name__}: {first_line(error)}; "
                "some code uses a BatchNorm otherwise than by calling it"
            ) from error

    def judge(
        self, folded: nn.Module, rounded: bool = False, unfolded: nn.Module | None = None
    ) -> tuple[Sequence[Evidence], Sequence[str]]:
        """Compare; a model that jumps (a hard attention) is asked how far one rounding of its inputs moves it."""
        if not self.possible or (self.before is None and self.exact is None):
            return (), self.notes or ["unverified"]
        count = len(self.inputs)
        if self.before is None:
            assert self.exact is not None
            return judge(
                self.exact,
                self.exact,
                self.dtype if rounded else "float64",
                self.changed,
                count,
                rounded=rounded,
            ), self.notes
        own = (self.before, self._run_folded(folded, self.inputs))
        try:
            return judge(own, self.exact, self.dtype, self.changed, count, rounded=rounded), self.notes
        except NotEquivalent:
            if not self.narrow or self.exact is None:
                if unfolded is None:
                    raise
                noise = self._sensitivity(unfolded)
                return judge(
                    own, self.exact, self.dtype, self.changed, count, rounded=rounded, noise=noise
                ), self.notes
        self.notes.append("not compared in float64: the model fixes a narrower dtype by itself")
        return judge(own, None, self.dtype, self.changed, count), self.notes

    def _sensitivity(self, unfolded: nn.Module) -> float:
        """How far the outputs move when every input moves by one unit roundoff: what any rounding may do to them."""
        assert self.before is not None
        near = [_nudged(each, UNIT_ROUNDOFF[self.dtype]) for each in self.inputs]
        try:
            moved = [_run(unfolded, each, self.writes) for each in near]
        except Exception:  # noqa: BLE001 an input that only these values suit
            return 0.0
        return measure(self.before, moved, discrete=False).deviation


def _nudged(example_inputs: Any, unit: float) -> Any:
    """The example inputs, each float moved up or down by one unit roundoff."""
    generator = torch.Generator().manual_seed(1)

    def nudge(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.layout is not torch.strided:
            return tensor
        signs = torch.randint(2, tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return tensor.detach() * (1 + 2 * unit * signs).to(tensor.device, tensor.dtype)

    return torch.utils._pytree.tree_map_only(Tensor, nudge, example_inputs)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _coarsest(model: nn.Module, computed: Iterable[torch.dtype] = ()) -> str:
    """The float dtype of the largest roundoff among those that a module holds and computes in."""
    dtypes = [*computed, *(tensor.dtype for tensor in (*model.parameters(), *model.buffers()))]
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes} & set(UNIT_ROUNDOFF)
    return max(names, key=UNIT_ROUNDOFF.__getitem__, default="float32")


def _perturbed(example_inputs: Any) -> list[Any]:
    """The example inputs with some noise, where they hold floats."""
    generator = torch.Generator().manual_seed(0)
    floats = 0

    def shake(tensor: Tensor) -> Tensor:
        nonlocal floats
        if (
            not tensor.is_floating_point()
            or tensor.device.type == "meta"
            or tensor.layout is not torch.strided
        ):
            return tensor
        floats += 1
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        spread = float(tensor.detach().double().std()) if tensor.numel() > 1 else 1.0
        return tensor.detach() + (0.5 * spread * noise).to(tensor.device, tensor.dtype)

    shaken = torch.utils._pytree.tree_map_only(Tensor, shake, example_inputs)
    return [shaken] if floats else []
