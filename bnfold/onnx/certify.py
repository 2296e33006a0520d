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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from itertools import zip_longest
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
from bnfold.onnx.constant_folding import load as load_tensor
from bnfold.onnx.files import load_file
from bnfold.onnx.flatten import NodeRef
from bnfold.onnx.functions import inline
from bnfold.onnx.read import ImportedModel, read
from bnfold.onnx.slots import RECURRENT, find_slots, state_bias, stored_bias, stored_weight
from bnfold.report import Report
from bnfold.response import check_merges
from bnfold.simulation import NotProved
from bnfold.simulation import check as check_algebra
from bnfold.weights import measure_bias, measure_weight, smallest

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
            return Certificate(done=done, **data)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
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
        _feed(found, part.SerializeToString(deterministic=True))
    for sparse in graph.sparse_initializer:
        _feed(found, sparse.SerializeToString(deterministic=True))
    for tensor in sorted(graph.initializer, key=lambda tensor: tensor.name):
        array = load_tensor(tensor, folder)
        content = array.tobytes() if array.dtype != object else repr(array.tolist()).encode()
        for piece in (tensor.name.encode(), repr((tensor.data_type, array.shape)).encode(), content):
            _feed(found, piece)
    return found.hexdigest()


def _feed(found: Any, piece: bytes) -> None:
    found.update(len(piece).to_bytes(8, "little"))
    found.update(piece)


# ---------------------------------------------------------------- checking


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
    before, after = load_file(source), load_file(result)
    found = [item.value for item in after.metadata_props if item.key == KEY]
    if not found:
        return []
    told = Certificate.from_json(found[0], f"the certificate that {result} carries")
    pairs = ((before, source, told.source), (after, result, told.result))
    if any(digest(model, path.parent) != wanted for model, path, wanted in pairs):
        return []
    return check(before, after, told, source.parent, result.parent)


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
    for name, model, place, wanted in (
        ("first", source, folder, certificate.source),
        ("second", result, other, certificate.result),
    ):
        if digest(model, place) != wanted:
            raise NotProved(
                f"the certificate is of other models: the {name} one is not that of which it speaks"
            )
    try:
        with np.errstate(all="ignore"):
            return _Check(source, result, certificate, folder, other).run()
    except (Refuse, Unworkable, ValueError, TypeError, LookupError) as gap:
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
        frozen = bool(reading.get("frozen"))
        self.before = read(source, folder, freeze_initializers=frozen, demote=reading.get("plain", ()))
        self.after = read(
            result, other, freeze_initializers=frozen, demote=self._plain(result, other, frozen)
        )
        self.applied = apply(self.before.graph, self.done)

    def _plain(self, result: onnx.ModelProto, folder: Path | None, frozen: bool) -> frozenset[str]:
        """Spelt-out affines count as what they are: whether one is a BatchNorm matters to nobody here."""
        return read(result, folder, freeze_initializers=frozen).tentative

    def run(self) -> list[str]:
        before, applied = self.before.graph, self.applied
        check_algebra(before, applied.folded, applied.absorbed)
        found = match(applied.merged, self.after.graph)
        self._check_files(found.nodes)
        worst = self._check_numbers(found)
        self._check_merges(found.nodes)
        return [
            f"equal for every input over the real numbers, by {len(before.nodes):,} steps",
            f"each weight is what it should be, the worst number within {worst / 2:.3f} units in its last place",
        ]

    # -- the files

    def _check_files(self, found: Mapping[str, Node]) -> None:
        """What the graphs do not show."""
        first, second = self.before, self.after
        if _inputs(first) != _inputs(second):
            raise Refuse("the models have other inputs")
        outputs = [[item.name for item in each.model.graph.output] for each in (first, second)]
        if outputs[0] != outputs[1]:
            raise Refuse("the models have other outputs")
        if first.context.opset != second.context.opset:
            raise Refuse("the models are of different operator sets")
        for value in (*first.context.overridable, *self.applied.merged.outputs):
            if not _are_equal(_constant(first, value), _constant(second, value)):
                raise Refuse(f"`{value}` is another constant")
        merged = {one["into"] for one in self.done.merges}
        for name, twin in found.items():
            node = self.applied.merged[name]
            if name not in merged:
                mine = first.refs[node.copied[0] if node.copied else name]
                self._check_settings(node, mine, second.refs[twin.name])

    def _check_settings(self, node: Node, mine: list[NodeRef], theirs: list[NodeRef]) -> None:
        linear = node.linear is not None
        pairs = list(zip(mine, theirs, strict=not linear))[: 1 if linear else None]
        for ref, twin in pairs:
            same = (ref.op, ref.node.domain) == (twin.op, twin.node.domain)
            if not same or list(_settings(ref.node, linear)) != list(_settings(twin.node, linear)):
                raise Refuse(f"`{node.name}` ({node.op}) has other settings")
            if not linear:
                self._check_constants(node, ref, twin)

    def _check_constants(self, node: Node, ref: NodeRef, twin: NodeRef) -> None:
        inputs = list(zip_longest(ref.inputs, twin.inputs, fillvalue=""))
        if self._has_product(node):
            inputs = [pair for place, pair in enumerate(inputs) if place not in (1, 3)]
            if not np.array_equal(state_bias(self.before, ref), state_bias(self.after, twin)):
                raise Refuse(f"`{node.name}` ({node.op}) has another bias for its state")
        for value, other in (*inputs, *zip(ref.results, twin.results, strict=True)):
            if not _are_equal(_constant(self.before, value), _constant(self.after, other)):
                raise Refuse(f"`{node.name}` ({node.op}) reads another constant")

    def _has_product(self, node: Node) -> bool:
        """Whether it is what follows the product of a recurrent layer, whose weight and bias are checked as such."""
        first = self.applied.merged.producer(node.inputs[0]) if node.op in RECURRENT and node.inputs else None
        return first is not None and first.op == "InputProduct" and first.linear is not None

    # -- the numbers

    def _check_numbers(self, found: Matched) -> float:
        """How far the worst number of an operator is off, as a share of what it may be."""
        linears = [(self.applied.merged[name], twin) for name, twin in found.nodes.items()]
        shares = {twin.name: self._share(node, twin) for node, twin in linears if node.linear is not None}
        shares |= {value: self._affine_share(value, *pair) for value, *pair in found.affines}
        for name, share in shares.items():
            if not share <= 1.0:
                raise Refuse(f"the numbers of `{name}` are not what they should be")
        return max(shares.values(), default=0.0)

    def _share(self, node: Node, twin: Node) -> float:
        assert node.linear is not None
        assert twin.linear is not None
        mine = find_slots(self.before, node.copied[0] if node.copied else node.name)
        theirs = find_slots(self.after, twin.name)
        weight, bias = stored_weight(self.before, mine), stored_bias(self.before, mine, node.linear)
        new, own = stored_weight(self.after, theirs), stored_bias(self.after, theirs, twin.linear)
        looks_up = bool(node.linear.sealed)
        dtype = _dtype(self.after, theirs.ref.inputs[theirs.weight])
        share = measure_weight(node.linear, weight, new, dtype, looks_up)
        return share if looks_up else max(share, measure_bias(node.linear, weight, bias, own, dtype))

    def _affine_share(self, value: str, should: Affine, does: Affine) -> float:
        """The same of affine maps that are left: of each the largest number decides, and each may be rounded twice."""
        unit = 4 * UNIT_ROUNDOFF[_dtype(self.after, value)]
        pairs = ((should.scale, does.scale), (should.shift, does.shift))
        size = max(float(np.abs(own).max(initial=0.0)) for own, _ in pairs)
        return max(float(np.max(np.abs(own - other), initial=0.0)) for own, other in pairs) / (
            unit * size or 1.0
        )

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
            slots = find_slots(self.before, node.copied[0] if node.copied else node.name)
            return stored_weight(self.before, slots), stored_bias(self.before, slots, node.linear)

        def numbers(name: str) -> Any:
            twin = into[name]
            assert twin.linear is not None
            slots = find_slots(self.after, twin.name)
            bias = stored_bias(self.after, slots, twin.linear)
            seen = twin.linear.view(np.asarray(stored_weight(self.after, slots), np.float64))
            kernel = twin.linear.window.kernel if twin.linear.window is not None else ()
            own = np.zeros(twin.linear.outputs) if bias is None else bias
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


def _settings(node: onnx.NodeProto, linear: bool) -> Iterator[bytes]:
    """The attributes of a node, without bodies, and without what is in the numbers of a linear operator."""
    for item in sorted(node.attribute, key=lambda item: item.name):
        inner = item.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
        if not inner and not (linear and item.name in ("alpha", "beta")):
            yield item.SerializeToString(deterministic=True)


def _inputs(imported: ImportedModel) -> list[str]:
    """What a caller may give a model: its inputs, and the initializers that may be overridden."""
    stored = {tensor.name for tensor in imported.model.graph.initializer} - imported.context.overridable
    return [item.name for item in imported.model.graph.input if item.name not in stored]


def _are_equal(first: Any, second: Any) -> bool:
    """Whether two constants are one, to the bit; None is no constant."""
    if first is None or second is None:
        return first is second
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    return same and (
        first.tobytes() == second.tobytes() if first.dtype != object else bool((first == second).all())
    )


def _constant(imported: ImportedModel, value: str) -> Any:
    """The array that a value is; None where it is none."""
    constants = imported.context.constants
    return constants.array(value) if value and value in constants else None


def _dtype(imported: ImportedModel, value: str) -> str:
    return helper.tensor_dtype_to_np_dtype(imported.context.type(value) or onnx.TensorProto.FLOAT).name
