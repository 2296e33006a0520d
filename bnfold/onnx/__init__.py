"""Fold the BatchNorms of ONNX models and files.

    folded, report = fold(model)                      # onnx.ModelProto or onnx_ir.Model
    report = fold_file("model.onnx", "model.folded.onnx")

    read (flatten, shapes, constant_folding, lower) -> Graph -> travel -> Plan -> merge -> write -> run -> compare

`read` imports the model as a graph, `travel` decides, `write` turns the difference into edits, which are applied to a
copy, and the copy is run against the original before anybody gets it. torch is never imported here, onnxruntime only
when something is run.

What a file says:

    files        ONNX files and their external data          accept      what is refused before anything is computed
    protos       attributes and stored tensors, as values    functions   a model's own functions, inlined
    flatten      every node, bodies included, in one list    shapes      shapes and types of all values
    sizes        vectors of sizes, at every size of inputs   context     all of that, as lowering asks it
    constant_folding  what is constant, without rounding

What is drawn and made of it:

    lower        how each operator is drawn as a node        read        nodes -> Graph
    slots        where linear operators keep their numbers   write       the difference of two Graphs -> edits
    merging      merged operators -> edits                   edit        edits, for any copy of the model
    copies       copies without some of the tensors          certify     what was done, to be checked elsewhere

What runs:

    run          onnxruntime as it is, or float64            reference   float64 where onnxruntime has none
    runs         the runs of a comparison                    inputs      made-up inputs
    nudge        every number moved a little                 choices     a model that chooses as another run did
    likeness     what two files must have alike              side         a model as one side of a verification

A model's own functions are inlined where they hold a BatchNorm or a linear operator, if that erases more BatchNorms:
a function's body is shared by all of its calls, so nothing can be folded into it as it stands.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto

from bnfold.decide import decide, describe
from bnfold.errors import BnfoldError, InputError
from bnfold.heap import frozen_heap
from bnfold.merge import Merged, settle
from bnfold.onnx import files
from bnfold.onnx.copies import copy_without, without_weights
from bnfold.onnx.edit import Edit, Forget, Store, apply, new_data
from bnfold.onnx.functions import inline, left_in_functions
from bnfold.onnx.merging import merge_imported
from bnfold.onnx.read import ImportedModel, read
from bnfold.onnx.run import most_at_once, run
from bnfold.onnx.write import fits, write
from bnfold.output import replacing
from bnfold.report import Evidence, Report, Verdict
from bnfold.travel import Options, Plan

if TYPE_CHECKING:
    from bnfold.equivalence import Comparison
    from bnfold.onnx.certify import Certificate

__all__ = ["apply", "fold", "fold_file", "read", "run", "to_proto", "write"]

Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | Path | None
"""A feed, several feeds, a `.npz` file with one, or None to make them up."""


@dataclass(frozen=True)
class _Choices:
    """The options of a fold."""

    inputs: Inputs = None
    verify: bool = True
    freeze_initializers: bool = False
    travel: Options = field(default_factory=Options)


@dataclass(frozen=True)
class _Folded:
    """A folded model that is not compared yet.

    Attributes:
        external: the new tensors that belong into other files, by name.
    """

    model: onnx.ModelProto
    report: Report
    decision: _Decision
    external: Mapping[str, Store] = field(default_factory=dict)
    comparison: Comparison | None = None

    def save(self, path: Path, source: Path) -> None:
        """Write the model that was folded from a file, with numbers that were left out of it."""
        places = {name: edit.location for name, edit in self.external.items()}
        missing = {
            tensor.name: partial(new_data, self.external[tensor.name], tensor.data_type)
            for tensor in self.model.graph.initializer
            if tensor.name in self.external and tensor.data_location == TensorProto.EXTERNAL
        }
        files.save_file(self.model, path, source, places, missing)

    def judge(self, written: onnx.ModelProto | Path) -> Report:
        """The report, with the evidence that the model, as it is now or as it was written, is equivalent."""
        if self.comparison is None:
            return self.report
        evidence = _judge(self.comparison, written)
        return replace(self.report, evidence=evidence, notes=(*self.report.notes, *self.comparison.notes))


@frozen_heap()
def fold(
    model: Any,
    inputs: Inputs = None,
    *,
    verify: bool = True,
    freeze_initializers: bool = False,
    folder: str | Path | None = None,
    **options: Any,
) -> tuple[Any, Report]:
    """Fold every BatchNorm of an ONNX model that can be folded exactly, and verify the result.

    Args:
        model: an `onnx.ModelProto` or `onnx_ir.Model`. It is not changed.
        inputs: what to verify on: arrays by input name, several such feeds, or a `.npz` file; made from the declared
            types and shapes where None.
        verify: run both models and compare; the report says unverified without.
        freeze_initializers: take initializers that are also inputs for constants, and take them off the inputs.
        folder: where external data lies, if the model refers to any.
        **options: see `bnfold.travel.Options` (`halves`, `lower`, `merge`, ...); `runtime` is onnxruntime by default.

    Returns:
        The folded model, of the caller's own class, and the report.

    Raises:
        InputError: the model cannot be used as it is, or cannot be run and `verify` is set.
        NotEquivalent: the folded model computes something else.
    """
    choices = _Choices(inputs, verify, freeze_initializers, Options(**{"runtime": "onnxruntime", **options}))
    proto, base = to_proto(model)
    where = Path(folder) if folder is not None else base
    files.check(proto)
    with _within_memory():
        folded = _fold(proto, where, choices)
        report = folded.judge(folded.model)
    return folded.model if isinstance(model, onnx.ModelProto) else _to_ir(folded.model, where), report


@frozen_heap()
def fold_file(
    source: str | Path,
    target: str | Path | None,
    inputs: Inputs = None,
    *,
    verify: bool = True,
    freeze_initializers: bool = False,
    certificate: str | Path | None = None,
    **options: Any,
) -> Report:
    """Fold an ONNX file into another one; external data comes along. See `fold` for the options.

    Args:
        source: the file to fold.
        target: the file to write, which appears in one step and only if the two models agree. It may be the source.
            None writes nothing.
        certificate: where to write a certificate of the two files (see `bnfold.onnx.certify`), which the folded one
            holds in its metadata too; it is checked on the files as they were written.

    Raises:
        InputError: the file cannot be used as it is, or the model cannot be run and `verify` is set.
        NotEquivalent: the folded model computes something else.
    """
    source = Path(source)
    choices = _Choices(inputs, verify, freeze_initializers, Options(**{"runtime": "onnxruntime", **options}))
    proto = files.load_file(source)
    with _within_memory():
        if target is None:
            folded = _fold(proto, source.parent, choices, source)
            return folded.judge(folded.model)
        with files.writing(Path(target), source) as path:
            folded = _fold(proto, source.parent, choices, source, later=certificate is None)
            told = None if certificate is None else _certify(proto, source.parent, folded, choices)
            folded.save(path, source)
            folded = replace(folded, model=onnx.ModelProto())  # it is in the file
            report = folded.judge(path)
            if told is None:
                return report
            return _seal(proto, source.parent, path, told, report, Path(certificate or ""))


def _certify(source: onnx.ModelProto, folder: Path, folded: _Folded, choices: _Choices) -> Certificate:
    """The certificate of a folded model that is not compared yet, which goes into its metadata."""
    from bnfold.certificate import record
    from bnfold.onnx import certify

    decision = folded.decision
    done = record(decision.imported.graph, decision.plan, decision.merged)
    reading = {
        "inlined": decision.inlined,
        "frozen": choices.freeze_initializers,
        "plain": sorted(decision.plain),
    }
    before = certify.digest(source, folder)
    told = certify.make(before, folded.model, folder, done, reading, folded.report)
    kept = [item for item in folded.model.metadata_props if item.key != certify.KEY]
    del folded.model.metadata_props[:]
    folded.model.metadata_props.extend(kept)
    folded.model.metadata_props.add(key=certify.KEY, value=told.to_json())
    return told


def _seal(
    source: onnx.ModelProto, folder: Path, written: Path, told: Certificate, report: Report, target: Path
) -> Report:
    """Check a certificate on the files, and write it with what was measured."""
    from bnfold.onnx import certify

    whole = replace(told, evidence=tuple(report.to_dict()["evidence"]))
    shown = certify.check(source, files.load_file(written), whole, folder, written.parent)
    with replacing(target) as temporary:
        temporary.write_text(whole.to_json() + "\n", encoding="utf-8")
    return replace(report, proof=(*report.proof, *shown[1:]))


# ---------------------------------------------------------------- one fold


@dataclass(frozen=True)
class _Decision:
    imported: ImportedModel
    plan: Plan
    merged: Merged
    plain: frozenset[str] = frozenset()
    inlined: bool = False

    @property
    def changed(self) -> int:
        """How many nodes get new numbers."""
        new = [node for node in self.plan.graph.nodes if node.linear is not None or node.affine is not None]
        old = {node.name: node for node in self.imported.graph.nodes}
        merged = sum(self.plan.graph[name].linear is not None for name in self.merged.nodes)
        return merged + sum(
            node.name not in old or _differs(old[node.name], node)
            for node in new
            if node.name not in self.merged.nodes
        )

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        return settle(self.plan.verdicts, self.plan.graph, self.merged)

    @property
    def erased(self) -> int:
        return sum(verdict.outcome == "folded" for verdict in self.verdicts)

    @property
    def does_something(self) -> bool:
        return bool(self.changed) or len(self.merged.graph.nodes) != len(self.imported.graph.nodes)


def _differs(old: Any, new: Any) -> bool:
    if new.linear is not None:
        return bool(new.linear.changed)
    return bool(old.op != new.op or old.affine is None or not new.affine.equals(old.affine))


def _decide(model: onnx.ModelProto, folder: Path | None, choices: _Choices) -> _Decision:
    """Read and travel; spelt-out affines that stay are drawn as plain ones, and it is tried again."""
    demoted: frozenset[str] = frozenset()
    while True:
        imported = read(model, folder, freeze_initializers=choices.freeze_initializers, demote=demoted)
        plan = decide(imported.graph, choices.travel, fits(imported))
        stay = {v.name for v in plan.verdicts if v.outcome != "folded"} & imported.tentative
        if not stay:
            merged = merge_imported(imported, plan.graph) if choices.travel.merge else Merged(plan.graph)
            return _Decision(imported, plan, merged, demoted)
        demoted |= stay


@contextmanager
def _within_memory() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise InputError(f"the model asks for more memory than there is: {error}") from error


def _fold(
    model: onnx.ModelProto,
    folder: Path | None,
    choices: _Choices,
    file: Path | None = None,
    later: bool = False,
) -> _Folded:
    """Fold a copy of a model.

    Args:
        model: the model; its external data lies in `folder`.
        folder, choices: see `fold`.
        file: where the model came from.
        later: leave out the new numbers that belong into other files, to be computed when those are written.

    Raises:
        InputError: the model is not valid, or cannot be run and is to be compared.
    """
    decision, hidden, notes = _choose(model, folder, choices)
    imported, verdicts = decision.imported, (*decision.verdicts, *hidden)
    notes += imported.notes
    before = files.count_floats(imported.model)
    if not choices.verify:
        _refuse(imported.contradiction)
    if not decision.does_something:
        notes += _check_unchanged(imported, choices)
        notes += ["nothing was changed, so there was nothing to compare"] if verdicts else []
        report = Report(verdicts, notes=tuple(notes), parameters=(before, before))
        report = decision.merged.tell(report, decision.plan.graph)
        return _Folded(_copy(imported.model), report, decision)
    edits = write(imported, decision.plan.graph, decision.merged)
    comparison = _compare(decision, edits, choices, model, file) if choices.verify else None
    dropped = {name for edit in edits if isinstance(edit, Forget) and not edit.graph for name in edit.names}
    external = {edit.name: edit for edit in edits if isinstance(edit, Store) and edit.location}
    folded = apply(edits, copy_without(imported.model, dropped), late=external if later else ())
    if choices.freeze_initializers:
        _freeze(folded)
    _check_validity(folded, model, choices.verify)
    proof = describe(imported.graph, decision.plan, decision.merged)
    report = Report(
        verdicts, notes=tuple(notes), parameters=(before, files.count_floats(folded)), proof=proof
    )
    report = decision.merged.tell(report, decision.plan.graph)
    return _Folded(folded, report, decision, external, comparison)


def _choose(
    model: onnx.ModelProto, folder: Path | None, choices: _Choices
) -> tuple[_Decision, list[Verdict], list[str]]:
    """What to do, with the model's functions inlined where that erases more.

    Where it does not, the BatchNorms in their bodies are owed a verdict all the same.
    """
    decision = _decide(model, folder, choices)
    left = left_in_functions(model)
    inlined, names = inline(model)
    if inlined is None or not names:
        return decision, left, []
    other = _decide(inlined, folder, choices)
    if other.erased > decision.erased:
        return (
            replace(other, inlined=True),
            left,
            [f"the functions {', '.join(names)} were inlined, since all calls share their bodies"],
        )
    seen = {verdict.name for verdict in decision.verdicts}
    return decision, [*left, *(verdict for verdict in other.verdicts if verdict.name not in seen)], []


def _compare(
    decision: _Decision,
    edits: tuple[Edit, ...],
    choices: _Choices,
    original: onnx.ModelProto,
    file: Path | None,
) -> Comparison:
    from bnfold.equivalence import Comparison
    from bnfold.onnx.runs import ModelRuns

    imported, most = decision.imported, most_at_once(decision.imported.model)
    late = {e.name: e.numbers for e in edits if isinstance(e, Store) and math.prod(e.dims) > most}
    edit = partial(apply, edits, exact=True, late=late)
    runs = ModelRuns(imported, edit, choices.inputs, original, imported.folder, file, late)
    return Comparison(runs, decision.changed)


def _judge(comparison: Comparison, folded: onnx.ModelProto | Path) -> tuple[Evidence, ...]:
    evidence = comparison.judge(folded)
    if not evidence and comparison.before is None:
        raise InputError("the folded model could not be run in float64")
    return evidence


def _check_unchanged(imported: ImportedModel, choices: _Choices) -> list[str]:
    """Refuse a model that nothing was changed in and that is not valid; return what should be said otherwise.

    Where onnxruntime may be asked, what it can run is valid; what it has no kernel for, and nobody else objects to, is
    given back with a note.
    """
    complaint = _complaint(imported.model) or imported.context.found.complaint or imported.contradiction
    if not choices.verify:
        _refuse(complaint)
        return []
    from bnfold.onnx.runs import check_runs

    try:
        check_runs(imported, choices.inputs, once=bool(complaint))
    except InputError as error:
        if complaint:
            raise
        return [f"it could not be run, only checked: {error}"]
    return []


def _refuse(complaint: str) -> None:
    if complaint:
        raise InputError(f"the model is not valid: {' '.join(complaint.split())[:300]}")


def _check_validity(model: onnx.ModelProto, unfolded: onnx.ModelProto, runs: bool) -> None:
    """Refuse what ONNX's checker refuses, unless it refuses the original too and onnxruntime is to judge."""
    complaint = _complaint(model)
    if not complaint:
        return
    original = _complaint(unfolded)
    if not original:
        raise BnfoldError(f"the folded model would not be valid: {complaint}")
    if not runs:
        _refuse(original)


def _complaint(model: onnx.ModelProto) -> str:
    """What ONNX's checker has against a model; nothing where, large weights aside, it has data elsewhere."""
    bare = without_weights(model)
    external = any(t.data_location == TensorProto.EXTERNAL for t in files.stored_tensors(bare))
    if external or files.size(bare) >= files.LIMIT // 2:
        return ""
    try:
        onnx.checker.check_model(_with_shapes(bare))
        onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True)
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        ValueError,
        RuntimeError,
    ) as error:
        return " ".join(str(error).split())[:300]
    return ""


def _with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model for the checker, which wants inputs and outputs to have a shape, as onnxruntime does not."""
    given = [
        item.type for item in (*model.graph.input, *model.graph.output) if item.type.HasField("tensor_type")
    ]
    if all(kind.tensor_type.HasField("shape") for kind in given):
        return model
    copy = _copy(model)
    for item in (*copy.graph.input, *copy.graph.output):
        if item.type.HasField("tensor_type"):
            item.type.tensor_type.shape.SetInParent()
    return copy


def _freeze(model: onnx.ModelProto) -> None:
    """Take initializers off the inputs."""
    stored = {tensor.name for tensor in model.graph.initializer}
    if model.ir_version >= 4:
        for place in range(len(model.graph.input) - 1, -1, -1):
            if model.graph.input[place].name in stored:
                del model.graph.input[place]


# ---------------------------------------------------------------- model classes


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def to_proto(model: Any) -> tuple[onnx.ModelProto, Path | None]:
    """The protobuf of a model, which may be the caller's own, and the folder of external data where it is known."""
    if isinstance(model, onnx.ModelProto):
        return model, None
    framework = sys.modules.get("onnx_ir")
    if framework is None or not isinstance(model, framework.Model):
        raise InputError(f"{type(model).__name__} is neither an onnx.ModelProto nor an onnx_ir.Model")
    return framework.to_proto(model), _data_folder(model, framework)


def _data_folder(model: Any, framework: Any) -> Path | None:
    stored = (value.const_value for value in model.graph.initializers.values())
    return next((Path(t.base_dir) for t in stored if isinstance(t, framework.ExternalTensor)), None)


def _to_ir(model: onnx.ModelProto, folder: Path | None) -> Any:
    import onnx_ir

    result = onnx_ir.from_proto(model)
    if folder is not None:
        onnx_ir.external_data.set_base_dir(result.graph, folder)
    return result
