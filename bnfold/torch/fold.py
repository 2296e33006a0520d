"""Fold a module and prove it: read, travel, write, compare.

The comparison runs both models on the example inputs and on perturbed ones, in float64 and in the model's own dtype
(`equivalence`). It leaves the model's buffers and every random state as they were; a model that draws random numbers
is run with the same seed each time. What cannot be compared (a model on the `meta` device, one that fixes its own
dtypes and so cannot run in float64) is said in the report's notes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold import decide as proved
from bnfold.cases import count_by_shapes
from bnfold.equivalence import UNIT_ROUNDOFF, Alike, Comparison, Outputs, Unavailable
from bnfold.errors import UnreadableModel
from bnfold.exclusive import exclusive
from bnfold.heap import frozen_heap
from bnfold.ir import Node
from bnfold.merge import Merged, settle
from bnfold.report import Report
from bnfold.simulation import NotProved
from bnfold.torch.choices import Choice, Choosing, Tally
from bnfold.torch.double import double
from bnfold.torch.idle import Idle
from bnfold.torch.merging import merge_read
from bnfold.torch.nudge import nudge, nudge_inputs
from bnfold.torch.read import Reading, read
from bnfold.torch.retrace import (
    find_fault,
    find_hidden_biases,
    find_unmergeable,
    read_again,
    refuse_everything,
    runs_alike,
)
from bnfold.torch.sandbox import (
    Snapshot,
    arrange,
    copied,
    copy_structure,
    first_line,
    is_same,
    restored,
    undisturbed,
)
from bnfold.torch.stored import measure, stored_numbers, to_float64
from bnfold.torch.tensors import leaves, put_back
from bnfold.torch.write import check_fit, write
from bnfold.travel import Options, Plan

_SMALL = 1 << 20
"""Of a model of as many numbers, each new one is checked, unless it is said otherwise."""

__all__ = ["Narrow", "coarsest_dtype", "decide", "fold", "run", "widened"]


@exclusive()
@frozen_heap()
def fold(
    model: nn.Module,
    example_inputs: Any,
    *,
    inplace: bool = False,
    verify: bool = True,
    check_weights: bool | None = None,
    **options: Any,
) -> tuple[nn.Module, Report]:
    """Fold every BatchNorm of a module that can be folded.

    Args:
        model: any module, in eval mode (a BatchNorm in training mode is kept, with that reason).
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a pair of a tuple
            and a dict. Their values matter only to models that branch on them.
        inplace: edit the module itself instead of a copy.
        verify: compare the outputs before and after.
        check_weights: check each new number to half a unit in its last place, a second for a million; None: of models
            of up to a million numbers. Not with `inplace`, which leaves nothing to check against.
        **options: see `travel.Options` (`halves`, `lower`, `merge`).

    Returns:
        The folded module, of the same class, and a report with a verdict for every BatchNorm.

    Raises:
        UnreadableModel: the module cannot be run on the example inputs, or not copied.
        NotEquivalent: the folded module computes something else. With `inplace` it has been edited by then.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UnreadableModel("DistributedDataParallel copies buffers in every pass; fold its `module`")
    reading, plan, merged = decide(model, example_inputs, Options(**options))
    size = _count(model)
    comparison = _compare(model, example_inputs, reading, plan, merged, inplace) if verify else None
    folded = write(model, reading, plan, inplace, merged, reading.rounded)
    evidence = comparison.judge(folded) if comparison else ()
    notes = comparison.notes if comparison else ["unverified: verification was switched off"]
    notes = [*notes, *_written_out(model, reading, plan)]
    limits = tuple(_rests_on(head) for head in reading.heads)
    sizes = (size, _count(folded))
    verdicts = settle(plan.verdicts, plan.graph, merged)
    proof = proved.describe(reading.graph, plan, merged)
    if not inplace and (size <= _SMALL if check_weights is None else check_weights):
        proof += tuple(_check_weights(model, folded, reading, plan, merged))
    report = Report(verdicts, evidence, (*notes, *reading.notes), sizes, limits, proof=proof)
    return folded, merged.tell(report, plan.graph)


def _written_out(model: nn.Module, reading: Reading, plan: Plan) -> Iterator[str]:
    """What is said of BatchNorms whose lines are still there."""
    left = {node.name: node for node in plan.graph.nodes}
    for name, place in reading.formulas.items():
        own, new = reading.graph[name], left.get(name)
        lines = f"the lines of `{own.place}` in the code of `{place.path or type(model).__name__}` run on"
        if new is None:
            yield f"{lines}, with numbers that change nothing; delete them"
        elif new.affine is not own.affine:
            yield f"{lines}, with the numbers of what is left"


def _check_weights(
    before: nn.Module, after: nn.Module, reading: Reading, plan: Plan, merged: Merged
) -> Iterator[str]:
    """One sentence on how right the new numbers are, those of merged operators and of scaled weights aside.

    Raises:
        NotProved: one is wrong.
    """
    shares = {
        node.name: measure(before, after, reading.linears[node.name], node.linear)
        for node in plan.graph.nodes
        if node.linear is not None and node.linear.changed and node.name not in merged.nodes
    }
    known = {name: share for name, share in shares.items() if share is not None}
    for name, share in known.items():
        if not share <= 1.0:
            raise NotProved(f"the numbers of `{name}` are not what they should be")
    if known:
        worst = max(known.values()) / 2
        yield f"the weights of {len(known)} operators, the worst number within {worst:.3f} units in its last place"


def _compare(
    model: nn.Module, example_inputs: Any, reading: Reading, plan: Plan, merged: Merged, inplace: bool
) -> Comparison:
    changed = sum(
        node.name in merged.nodes or (node.linear is not None and node.linear.changed)
        for node in plan.graph.nodes
    )
    runs = ModuleRuns(
        model,
        example_inputs,
        lambda twin: write(twin, reading, plan, inplace=True, merged=merged, rounded=_exact(reading.rounded)),
        dtypes=reading.dtypes,
        writes=reading.writes,
        inplace=inplace,
    )
    return Comparison(runs, changed)


def _exact(rounded: dict[Any, Any]) -> dict[Any, Any]:
    """Those of the numbers that were computed for some copy that suit one in float64: of merged operators."""
    return {key: found for key, found in rounded.items() if isinstance(key, int)}


def _rests_on(head: Idle) -> str:
    """What is said first of a fold that a part of the model which did not run could find out."""
    return f"this fold holds only as long as `{head.path}` does not run: it did not on the example inputs"


def decide(model: nn.Module, example_inputs: Any, options: Options) -> tuple[Reading, Plan, Merged]:
    """Read a module and decide; take back what the module's own code would not go along with (see `retrace`).

    Raises:
        UnreadableModel: the module cannot be run on the example inputs, or not copied.
    """
    reading, plan, merged = _decide(model, example_inputs, options)

    def stored(node: Node) -> Any:
        return stored_numbers(model, reading.linears[node.name])

    return reading, plan, proved.prove(plan.graph, merged, stored, reading.rounded)


def _decide(model: nn.Module, example_inputs: Any, options: Options) -> tuple[Reading, Plan, Merged]:
    reading, plan = _read_and_decide(model, example_inputs, options)
    if (taken := find_hidden_biases(model, reading, plan)) is not reading:
        reading, plan = taken, proved.decide(taken.graph, options, check_fit(model, taken))
    merged = merge_read(model, reading, plan.graph) if options.merge else Merged(plan.graph)
    if merged.merges and _is_rehearsed(model, example_inputs, reading, plan, merged):
        return reading, plan, merged
    for repair in (read_again, find_fault, refuse_everything):
        if not reading.steps or _is_rehearsed(model, example_inputs, reading, plan):
            break
        reading = repair(model, example_inputs, reading)
        plan = proved.decide(reading.graph, options, check_fit(model, reading))
    return reading, plan, _merge_what_runs(model, example_inputs, reading, plan, merged)


def _merge_what_runs(
    model: nn.Module, example_inputs: Any, reading: Reading, plan: Plan, wanted: Merged
) -> Merged:
    """The merges of a plan that the module's own code goes along with, once it did not with all of them."""
    if not wanted.merges:
        return replace(wanted, graph=plan.graph)
    merged = merge_read(model, reading, plan.graph)
    refused = find_unmergeable(model, example_inputs, reading, plan, merged) if merged.merges else ()
    merged = merge_read(model, reading, plan.graph, refused)
    if merged.merges and not _is_rehearsed(model, example_inputs, reading, plan, merged):
        return Merged(plan.graph)
    return merged


def _read_and_decide(model: nn.Module, example_inputs: Any, options: Options) -> tuple[Reading, Plan]:
    """Where heads that did not run cost a fold, it is made all the same, and rests on their not running."""
    reading = read(model, example_inputs)
    plan = proved.decide(reading.graph, options, check_fit(model, reading))
    if not reading.heads or all(verdict.outcome == "folded" for verdict in plan.verdicts):
        return replace(reading, heads=()), plan
    other = read(model, example_inputs, headless=True)
    farther = proved.decide(other.graph, options, check_fit(model, other))
    if farther.verdicts == plan.verdicts:
        return replace(reading, heads=()), plan
    return other, farther


def _is_rehearsed(
    model: nn.Module, example_inputs: Any, reading: Reading, plan: Plan, merged: Merged | None = None
) -> bool:
    """Whether nothing changes, or the folded module runs the calls that were read."""
    if not any(verdict.outcome != "kept" for verdict in plan.verdicts) and merged is None:
        return True
    try:
        twin = copy_structure(model)
    except UnreadableModel:
        return True
    folded = write(twin, reading, plan, inplace=True, merged=merged, rounded=reading.rounded)
    return runs_alike(folded, example_inputs, reading, plan, merged)


def _count(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    lazy = nn.parameter.is_lazy
    return sum(t.numel() for t in tensors.values() if not lazy(t) and t.dtype.is_floating_point)


def run(model: nn.Module, example_inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The outputs of a module as arrays, by their path in what it returns.

    No gradient, no change of the module's tensors or of the inputs, no use of the global random state; a fixed seed.
    """
    return _run(model, example_inputs, True)


def _run(
    model: nn.Module, example_inputs: Any, writes: bool, snapshot: Snapshot | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """The same, with no care for the parameters of a module that does not write to any."""
    args, kwargs = arrange(example_inputs)
    given = copied(tensor for _, tensor in leaves((args, kwargs)))
    with restored(model, writes, snapshot=snapshot), undisturbed(seed=0), torch.no_grad():
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


class Narrow(TorchDispatchMode):  # type: ignore[no-untyped-call]
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


class ModuleRuns:
    """The runs of one comparison, on the example inputs and on perturbed ones; see `bnfold.equivalence.Runs`."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        edit: Callable[[nn.Module], nn.Module],
        *,
        dtypes: Iterable[torch.dtype] = (),
        writes: bool = True,
        inplace: bool = False,
    ) -> None:
        """Prepare to run a module and what becomes of it.

        Args:
            model: the unfolded module.
            example_inputs: see `fold`.
            edit: makes the folded module in float64 of the unfolded one in float64, which may be changed.
            dtypes: what the module computes in, besides the dtypes that it holds.
            writes: whether it may write to its own parameters.
            inplace: whether it will have become the folded module, so that it cannot be run again.
        """
        self.model, self.edit, self.writes, self.inplace = model, edit, writes, inplace
        self.inputs = [example_inputs, *_perturbed(example_inputs)]
        self.dtype, self.examples = (
            coarsest_dtype(model, dtypes),
            sum(count_by_shapes(tensor.shape for _, tensor in leaves(each)) for each in self.inputs),
        )
        self.doubt, self.gone = "", False
        tensors = [tensor for _, tensor in leaves(example_inputs)]
        everything = (*model.parameters(), *model.buffers(), *tensors)
        self.possible = not any(t.device.type == "meta" or nn.parameter.is_lazy(t) for t in everything)

    def run_before(self) -> list[Outputs]:
        """Run the unfolded module.

        Raises:
            Unavailable: it does not run in its own dtype, which some operator may lack.
        """
        self._require_numbers()
        try:
            return self._run_all(self.model, self.inputs)
        except Exception as error:
            why = f"the model does not run in it: {first_line(error)}"
            raise Unavailable(f"not compared in {self.dtype}: {why}") from error

    def run_exactly(self) -> tuple[list[Outputs], list[Outputs]]:
        """Run a copy in float64, edit it, and run it again; be in doubt of it where it computes in less.

        Raises:
            Unavailable: it does not run in float64, since it fixes a dtype by itself.
            UnreadableModel: it does not run once it is folded.
        """
        self._require_numbers()
        try:
            twin, wide = to_float64(self.model), self._wide()
            with double(), Narrow() as watch:
                before = self._run_all(twin, wide)
        except Exception as error:
            why = f"the model does not run in it: {first_line(error)}"
            raise Unavailable(f"not compared in float64: {why}") from error
        if watch.seen:
            self.doubt = "not compared in float64: the model fixes a narrower dtype by itself"
        folded = self.edit(twin)
        with double():
            return before, self._run_folded(folded, wide)

    def run_after(self, folded: nn.Module) -> list[Outputs]:
        """Run the folded module.

        Raises:
            UnreadableModel: it does not run.
        """
        self.gone = self.inplace
        return self._run_folded(folded, self.inputs)

    def run_nudged(self, exact: bool, units: float, seed: int) -> list[Outputs]:
        """Run the unfolded module with numbers that lie beside its own and those of the inputs.

        Raises:
            Unavailable: it is not there any more, or only those values suit it.
        """
        if self.gone:
            raise Unavailable("the module was folded in place")
        try:
            model = nudge(to_float64(self.model) if exact else self.model, units, seed, whole=exact)
            inputs = nudge_inputs(self._wide() if exact else self.inputs, units, seed)
            with double() if exact else nullcontext():
                return self._run_all(model, inputs)
        except Exception as error:
            raise Unavailable(first_line(error)) from error

    def run_alike(self, folded: nn.Module) -> Alike:
        """Run both with the choices of the unfolded module.

        Raises:
            Unavailable: the module makes no choices, is not there any more, or other ones are made.
        """
        if self.gone and self.inplace:
            raise Unavailable("the module was folded in place")
        try:
            first = [self._choose(self.model, each) for each in self.inputs]
            made = [tally.made for _, tally in first]
            if not any(made):
                raise Unavailable("the model makes no choices")
            late = [self._choose(folded, *each) for each in zip(self.inputs, made, strict=True)]
            twin, wide = to_float64(self.model), self._wide()
            with double():
                truth = [self._choose(twin, *each) for each in zip(wide, made, strict=True)]
                edited = self.edit(twin)
                exact = [self._choose(edited, *each) for each in zip(wide, made, strict=True)]
        except Exception as error:
            raise Unavailable(first_line(error)) from error
        outputs = [[each for each, _ in runs] for runs in (first, late, truth, exact)]
        fell = [
            {(at, name) for at, (_, tally) in enumerate(run) for name in tally.otherwise}
            for run in (late, truth)
        ]
        proof = None if self.doubt else (outputs[2], outputs[3])
        return Alike((outputs[0], outputs[1]), proof, sum(map(len, made)), *map(len, fell))

    def _choose(
        self, model: nn.Module, inputs: Any, recorded: Sequence[Choice] | None = None
    ) -> tuple[Outputs, Tally]:
        """The outputs and the choices of one run, and among the outputs what those are made from."""
        with Choosing(recorded) as mode:
            outputs = _run(model, inputs, self.writes)
        if recorded is not None and len(mode.tally.made) != len(recorded):
            raise Unavailable("the model makes more choices, or fewer")
        return {
            **outputs,
            **{name: _array(tensor) for name, tensor in mode.tally.grounds.items()},
        }, mode.tally

    def _wide(self) -> list[Any]:
        """The inputs in float64."""
        return [torch.utils._pytree.tree_map_only(Tensor, widened, each) for each in self.inputs]

    def _require_numbers(self) -> None:
        if not self.possible:
            raise Unavailable("unverified: there are tensors without numbers (lazy, or on the meta device)")

    def _run_all(self, model: nn.Module, inputs: Sequence[Any]) -> list[Outputs]:
        """The outputs for one input after the other."""
        snapshot = Snapshot(model, self.writes)
        return [_run(model, each, self.writes, snapshot) for each in inputs]

    def _run_folded(self, model: nn.Module, inputs: Sequence[Any]) -> list[Outputs]:
        try:
            return self._run_all(model, inputs)
        except Exception as error:
            raise UnreadableModel(
                f"the folded model does not run: {type(error).__name__}: {first_line(error)}; "
                "some code uses a BatchNorm otherwise than by calling it"
            ) from error


def widened(tensor: Tensor) -> Tensor:
    """A tensor in float64 if it holds floats."""
    return tensor.double() if tensor.is_floating_point() else tensor


def coarsest_dtype(model: nn.Module, computed: Iterable[torch.dtype] = ()) -> str:
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
