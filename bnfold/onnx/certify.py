"""Certificates of folded ONNX files: made when a file is folded, checked again anywhere, from the two files alone.

    bnfold fold net.onnx --certificate net.json        makes one, and checks it on the files as they were written
    bnfold verify net.onnx net.folded.onnx --certificate net.json

A certificate is JSON text: what was done (`bnfold.certificate.Record`), digests of both models, versions, verdicts and
what was measured. It lies in a file, and without what was measured in the metadata of the folded model. `check` reads
both models anew and shows, in this order:

1. they are the models that it is of (SHA-256 of nodes and numbers, however those are stored);
2. what is said to be done computes the same for every input (`simulation`, `response`);
3. the second model is what that makes of the first one: each node, setting and constant is there, and nothing else;
4. its weights hold what they should, each to half a unit in its last place (`weights`), merged ones together.

Nothing is run, and nothing of the search is trusted. What is: `read`, by which both models are seen.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from bnfold.algebra import Affine
from bnfold.certificate import Matched, Record, apply, claims, match
from bnfold.equivalence import UNIT_ROUNDOFF
from bnfold.errors import InputError, Refuse
from bnfold.ir import Graph, Node
from bnfold.onnx.constant_folding import Unworkable
from bnfold.onnx.files import load_file
from bnfold.onnx.flatten import NodeRef
from bnfold.onnx.functions import inline
from bnfold.onnx.likeness import (
    Values,
    are_equal,
    check_constants,
    constant,
    content,
    default,
    feed,
    inputs_of,
    overload,
    surroundings,
)
from bnfold.onnx.protos import load as load_tensor
from bnfold.onnx.read import ImportedModel, read
from bnfold.onnx.slots import RECURRENT, find_slots, state_bias, stored_numbers
from bnfold.report import Report
from bnfold.response import check_merges
from bnfold.simulation import NotProved
from bnfold.simulation import check as check_algebra
from bnfold.weights import measure, smallest

__all__ = ["KEY", "Certificate", "carried", "check", "check_files", "digest", "load", "make"]

FORMAT, VERSION = "bnfold certificate", 1
KEY = "bnfold.certificate"
"""Under which name the metadata of a folded model hold its certificate."""


@dataclass(frozen=True)
class Certificate:
    """What is said of two models.

    Attributes:
        source, result: their digests.
        done: what was done to the first one.
        reading: how it was read: `inlined` functions, `frozen` initializers, affines drawn as `plain` ones.
        versions: of what it was made with.
        verdicts: what became of each BatchNorm.
        evidence: what was measured.
    """

    source: str
    result: str
    done: Record
    reading: Mapping[str, Any]
    versions: Mapping[str, str]
    verdicts: tuple[Mapping[str, Any], ...] = ()
    evidence: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> str:
        """The certificate as text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, allow_nan=False)

    @staticmethod
    def from_json(text: str, name: str = "the certificate") -> Certificate:
        """A certificate, of its text.

        Raises:
            InputError: it is none, or of another version.
        """
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise InputError(f"{name} is no certificate of bnfold")
            version = data.pop("version", None)
            if version != VERSION:
                raise InputError(f"{name} is of version {version}, and this bnfold reads version {VERSION}")
            done = Record(**data.pop("done"))
            if not all(isinstance(getattr(done, each.name), list | dict) for each in fields(Record)):
                raise TypeError("a list, or a table, is something else")
            if not isinstance(data["reading"], dict):
                raise TypeError("how it was read is no table")
            return Certificate(done=done, **data)
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{name} cannot be read: {error}") from error


def make(
    source: str,
    result: onnx.ModelProto,
    folder: Path | None,
    done: Record,
    reading: Mapping[str, Any],
    report: Report,
) -> Certificate:
    """Certify a folded model.

    Args:
        source: the digest of the model that was folded.
        result: the folded one.
        folder: where its external data lies.
        done, reading: what was done, and how the source was read.
        report: of the fold, whatever there is of it.
    """
    from bnfold import __version__

    versions = {"bnfold": __version__, "onnx": onnx.__version__, "numpy": np.__version__}
    data = report.to_dict()
    return Certificate(
        source,
        digest(result, folder),
        done,
        reading,
        {**versions, "python": platform.python_version()},
        tuple(data["verdicts"]),
        tuple(data["evidence"]),
    )


def load(path: Path) -> Certificate:
    """The certificate in a file.

    Raises:
        InputError: there is none in it.
    """
    try:
        return Certificate.from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def digest(model: onnx.ModelProto, folder: Path | None = None) -> str:
    """SHA-256 of what a model computes with: nodes, functions, inputs, outputs and numbers, however they are stored.

    Names of producers, documentation and metadata do not count.
    """
    found = sha256()
    graph = model.graph
    for part in (*model.opset_import, *graph.input, *graph.output, *graph.node, *model.functions):
        feed(found, part.SerializeToString(deterministic=True))
    for sparse in graph.sparse_initializer:
        feed(found, sparse.SerializeToString(deterministic=True))
    for tensor in sorted(graph.initializer, key=lambda tensor: tensor.name):
        array = load_tensor(tensor, folder)
        for piece in (tensor.name.encode(), repr((tensor.data_type, array.shape)).encode(), content(array)):
            feed(found, piece)
    return found.hexdigest()


# ---------------------------------------------------------------- checking

_FAILURES = (
    *(Refuse, Unworkable, ValueError, TypeError, LookupError),
    *(ArithmeticError, AssertionError, AttributeError, MemoryError, RecursionError),
)
"""What comes of a certificate that holds one thing where another one should be."""


def check_files(source: Path, result: Path, certificate: Path) -> list[str]:
    """Check a certificate on two files; see `check`.

    Raises:
        NotProved: it does not follow, and why.
        InputError: a file cannot be read.
    """
    told = load(certificate)
    return check(load_file(source), load_file(result), told, source.parent, result.parent)


def carried(source: Path, result: Path) -> list[str]:
    """Check the certificate that a folded file carries, if it is of these two files; nothing if it carries none.

    Raises:
        NotProved: it does not follow, and why.
    """
    after = load_file(result)
    found = [item.value for item in after.metadata_props if item.key == KEY]
    if not found:
        return []
    before = load_file(source)
    told = Certificate.from_json(found[0], f"the certificate that {result} carries")
    folders = source.parent, result.parent
    return [] if _stranger(before, after, told, *folders) else _show(before, after, told, *folders)


def check(
    source: onnx.ModelProto,
    result: onnx.ModelProto,
    certificate: Certificate,
    folder: Path | None = None,
    other: Path | None = None,
) -> list[str]:
    """Check a certificate on the two models.

    Args:
        source, result: the models before and after.
        certificate: what is said of them.
        folder, other: where their external data lie.

    Returns:
        What was shown, a sentence each.

    Raises:
        NotProved: it does not follow, and why.
    """
    stranger = _stranger(source, result, certificate, folder, other)
    if stranger:
        raise NotProved(
            f"the certificate is of other models: the {stranger} one is not that of which it speaks"
        )
    return _show(source, result, certificate, folder, other)


def _stranger(
    source: onnx.ModelProto,
    result: onnx.ModelProto,
    certificate: Certificate,
    folder: Path | None,
    other: Path | None,
) -> str:
    """Which one of two models a certificate is not of; empty where it is of both."""
    if digest(source, folder) != certificate.source:
        return "first"
    return "second" if digest(result, other) != certificate.result else ""


def _show(
    source: onnx.ModelProto,
    result: onnx.ModelProto,
    certificate: Certificate,
    folder: Path | None,
    other: Path | None,
) -> list[str]:
    """Check a certificate on the models that it is of."""
    try:
        with np.errstate(all="ignore"):
            return _Check(source, result, certificate, folder, other).run()
    except NotProved:
        raise
    except _FAILURES as gap:
        if isinstance(gap, InputError) and not isinstance(gap, Unworkable):
            raise
        raise NotProved(f"the certificate proves nothing: {gap}") from gap


class _Check:
    """The two models as they were read, and what one should become."""

    def __init__(
        self,
        source: onnx.ModelProto,
        result: onnx.ModelProto,
        certificate: Certificate,
        folder: Path | None,
        other: Path | None,
    ) -> None:
        reading, self.done = certificate.reading, certificate.done
        if reading.get("inlined"):
            source = inline(source)[0] or source
        frozen = self.frozen = bool(reading.get("frozen"))
        self.before = read(source, folder, freeze_initializers=frozen, demote=reading.get("plain", ()))
        self.after = _read_plainly(result, other, frozen)
        self.applied = apply(self.before.graph, self.done)

    def run(self) -> list[str]:
        before, applied = self.before.graph, self.applied
        check_algebra(before, applied.folded, applied.absorbed)
        found = match(applied.merged, self.after.graph)
        self._check_sizes(found)
        self._check_files(found)
        worst = self._check_numbers(found)
        self._check_merges(found.nodes)
        frozen = bool(self.frozen) * ", its initializers taken for constants"
        return [
            f"equal for every input over the real numbers{frozen}, by {len(before.nodes):,} steps",
            f"each weight is what it should be, the worst number within {worst / 2:.3f} units in its last place",
        ]

    # -- the files

    def _check_sizes(self, found: Matched) -> None:
        """Sizes by which the second model was read must be those of the first one, or follow from what both declare."""
        told, declared = (each.context.whole.types for each in (self.before, self.after))
        alike = all(
            (value, value) in found.values and told.get(value) == kind
            for value, kind in declared.items()
            if value not in self.after.context.whole.inputs
        )
        for value, stands_for in found.values:
            mine, theirs = self.applied.merged.shapes.get(value), self.after.graph.shapes.get(stands_for)
            if theirs is None or not any(isinstance(size, int) for size in theirs):
                continue
            if mine is None or len(mine) != len(theirs):
                pairs: list[tuple[Any, int]] = [] if alike and mine is None else [(0, 1)]
            else:
                pairs = [(own, size) for own, size in zip(mine, theirs, strict=True) if isinstance(size, int)]
            if any(own != size and (isinstance(own, int) or not alike) for own, size in pairs):
                raise Refuse(f"`{stands_for}` is of another size than `{value}`, or is declared so")

    def _check_files(self, found: Matched) -> None:
        """What the graphs do not show."""
        self._check_declarations()
        self._check_constants()
        values = Values(
            self.before, self.after, self.applied.alias, frozenset(found.values), set(found.values)
        )
        self._check_nodes(found, values)
        self._check_idle(values)

    def _check_declarations(self) -> None:
        """What the models are given, what they return, and what their operators mean."""
        first, second = self.before, self.after
        if inputs_of(first) != inputs_of(second):
            raise Refuse("the models have other inputs")
        outputs = [[item.name for item in each.model.graph.output] for each in (first, second)]
        if outputs[0] != outputs[1]:
            raise Refuse("the models have other outputs")
        kept = [surroundings(each.model) for each in (first, second)]
        calls = {(ref.node.domain, ref.node.op_type, overload(ref.node)) for ref in second.context.whole.refs}
        if not kept[1].items() <= kept[0].items() or not calls.isdisjoint(kept[0].keys() - kept[1].keys()):
            raise Refuse("the models are of different operator sets, or call other functions")

    def _check_constants(self) -> None:
        """What is worked out, what is returned as it is stored, and what a caller may leave out."""
        first, second = self.before, self.after
        check_constants(first, second)
        for value in self.applied.merged.outputs:
            if not are_equal(constant(first, value), constant(second, value)):
                raise Refuse(f"`{value}` is another constant")
        for value in first.context.overridable:
            if not are_equal(default(first, value), default(second, value)):
                raise Refuse(f"`{value}` is another number where the caller gives none")

    def _check_nodes(self, found: Matched, values: Values) -> None:
        """The settings and operands of every node that is there before and after."""
        first, second = self.before, self.after
        merged = {one["into"] for one in self.done.merges}
        for name, twin in found.nodes.items():
            node = self.applied.merged[name]
            if name not in merged:
                mine, theirs = first.refs[node.original], second.refs[twin.name]
                apart, linear = self._apart(node, mine[0], theirs[0]), node.linear is not None
                pairs = zip(mine, theirs, strict=not linear)
                for ref, other in islice(pairs, 1 if linear else None):
                    values.check_node(ref, other, linear, apart, self._dropped(node, ref))

    def _check_idle(self, values: Values) -> None:
        """What nobody reads runs all the same, and may fail: it must do what it did, to what it read."""
        makers = self.before.context.whole.makers
        for twin in _unread(self.after.graph):
            for ref in self.after.refs[twin.name]:
                own = makers.get(next(filter(None, ref.outputs), ""))
                if own is None:
                    raise Refuse(f"`{twin.name}` ({twin.op}), which nobody reads, is new")
                values.check_node(own, ref, False)

    def _apart(self, node: Node, ref: NodeRef, twin: NodeRef) -> tuple[int, ...]:
        """The inputs of a node whose numbers are checked by themselves: those of a recurrent layer's product."""
        if not self._has_product(node):
            return ()
        if not np.array_equal(state_bias(self.before, ref), state_bias(self.after, twin)):
            raise Refuse(f"`{node.name}` ({node.op}) has another bias for its state")
        return (1, 3)

    def _dropped(self, node: Node, ref: NodeRef) -> frozenset[int]:
        """The operands of a sum that an operator beside computes as well; that it reads the others, the graphs show."""
        operands = len(self.before.graph[node.original].inputs)
        left = self.done.left.get(node.name, range(operands))
        return frozenset(range(operands)) - frozenset(left) if operands == len(ref.inputs) else frozenset()

    def _has_product(self, node: Node) -> bool:
        """Whether it is what follows the product of a recurrent layer, whose weight and bias are checked as such."""
        first = self.applied.merged.producer(node.inputs[0]) if node.op in RECURRENT and node.inputs else None
        return first is not None and first.op == "InputProduct" and first.linear is not None

    # -- the numbers

    def _check_numbers(self, found: Matched) -> float:
        """How far the worst number of an operator is off, as a share of what it may be."""
        linears = [(self.applied.merged[name], twin) for name, twin in found.nodes.items()]
        shares = [(twin.name, self._share(node, twin)) for node, twin in linears if node.linear is not None]
        shares += [(value, self._affine_share(value, *maps)) for value, *maps in found.affines]
        for name, share in shares:
            if not share <= 1.0:
                raise Refuse(f"the numbers of `{name}` are not what they should be")
        return max((share for _, share in shares), default=0.0)

    def _share(self, node: Node, twin: Node) -> float:
        assert node.linear is not None
        assert twin.linear is not None
        numbers = stored_numbers(self.before, node.original, node.linear)
        new = stored_numbers(self.after, twin.name, twin.linear)
        theirs = find_slots(self.after, twin.name)
        dtype = _dtype(self.after, theirs.ref.inputs[theirs.weight])
        return measure(node.linear, numbers, new, dtype, bool(node.linear.sealed))

    def _affine_share(self, value: str, should: Affine, does: Affine, size: Affine) -> float:
        """The same of affine maps that are left: each number may be rounded twice, and each term of it."""
        dtype = _dtype(self.after, value)
        unit, least = 4 * UNIT_ROUNDOFF[dtype], smallest(dtype)
        threes = ((should.scale, does.scale, size.scale), (should.shift, does.shift, size.shift))
        shares = [abs(own - other) / (unit * terms + least) for own, other, terms in threes]
        return max(float(np.max(share, initial=0.0)) for share in shares)

    def _check_merges(self, found: Mapping[str, Node]) -> None:
        """What was merged, by the numbers of the result."""
        into = {one["into"]: found[one["into"]] for one in self.done.merges}
        after = Graph(
            tuple(self._formed(node, into) for node in self.applied.merged.nodes),
            self.applied.merged.inputs,
            self.applied.merged.outputs,
        )
        dtypes = {_dtype(self.after, self.after.refs[twin.name][0].outputs[0]) for twin in into.values()}
        units = [(2 * UNIT_ROUNDOFF[dtype], smallest(dtype)) for dtype in dtypes]

        def stored(node: Node) -> Any:
            assert node.linear is not None
            return stored_numbers(self.before, node.original, node.linear)

        def numbers(name: str) -> Any:
            twin = into[name]
            assert twin.linear is not None
            weight, bias = stored_numbers(self.after, twin.name, twin.linear)
            seen = twin.linear.view(np.asarray(weight, np.float64))
            kernel = twin.linear.window.kernel if twin.linear.window is not None else ()
            own = np.zeros(twin.linear.outputs) if bias is None else bias
            if any(size != 1 for size in own.shape[:-1]):
                raise Refuse(f"the bias of `{name}` differs between rows")
            return seen.reshape(*seen.shape[:3], *kernel), np.broadcast_to(own.ravel(), twin.linear.outputs)

        check_merges(
            self.applied.folded,
            after,
            claims(self.done, numbers),
            self.done.left,
            stored,
            max(units, default=(0.0, 0.0)),
        )

    def _formed(self, node: Node, into: Mapping[str, Node]) -> Node:
        """A node of the graph that should be, with the form that the result gives a merged one."""
        if node.name not in into:
            return node
        twin = into[node.name]
        return Node(node.name, twin.op, node.inputs, node.outputs, linear=twin.linear)


def _unread(graph: Graph) -> list[Node]:
    """The nodes that no output of a graph is made of."""
    wanted, unread = set(graph.outputs), list[Node]()
    for node in reversed(graph.nodes):
        if wanted.isdisjoint(node.outputs):
            unread.append(node)
        else:
            wanted.update(node.inputs)
    return unread


def _read_plainly(model: onnx.ModelProto, folder: Path | None, frozen: bool) -> ImportedModel:
    """A model whose spelt-out affines count as what they are: whether one is a BatchNorm matters to nobody here."""
    imported = read(model, folder, freeze_initializers=frozen)
    plain = imported.tentative
    return read(model, folder, freeze_initializers=frozen, demote=plain) if plain else imported


def _dtype(imported: ImportedModel, value: str) -> str:
    return helper.tensor_dtype_to_np_dtype(imported.context.type(value) or onnx.TensorProto.FLOAT).name
