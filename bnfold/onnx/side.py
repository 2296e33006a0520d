"""An ONNX model as one side of a verification: run by onnxruntime and in float64, and looked into.

See `bnfold.verification.Side`. A model that takes a fixed number of examples is given more in pieces, the last one
filled up with copies of the last example. Nothing here is differentiated, and torch is never imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bnfold.algebra import is_float
from bnfold.ascent import LEAK
from bnfold.cases import Array, Case
from bnfold.divergence import Recording
from bnfold.equivalence import Outputs, Unavailable
from bnfold.errors import InputError
from bnfold.onnx import files, to_proto
from bnfold.onnx.flatten import bodies
from bnfold.onnx.inputs import Feed
from bnfold.onnx.nudge import nudge
from bnfold.onnx.protos import FLOATS
from bnfold.onnx.read import read
from bnfold.onnx.run import Runner, run_exactly, to_float64
from bnfold.onnx.runs import DOUBTFUL, HEAVY, SLOW, ModelRuns, agree

__all__ = ["ModelSide", "open_file", "open_model"]


class ModelSide:
    """An ONNX model, and the folder in which its external data lies."""

    def __init__(self, model: onnx.ModelProto, folder: Path | None, label: str) -> None:
        """Read the model; see `bnfold.onnx.read`.

        Raises:
            InputError: it cannot be read.
        """
        self.model, self.folder, self.label = model, folder, label
        self.imported = read(model, folder)
        self.names = tuple(self.imported.context.whole.inputs)
        self.doubt, self.seconds = "", 0.0
        self._types = {item.name: item.type.tensor_type.elem_type for item in model.graph.input}

    @cached_property
    def dtype(self) -> str:
        """The coarsest floating-point type of the model."""
        return self._runs.dtype

    @cached_property
    def _runs(self) -> ModelRuns:
        return ModelRuns(self.imported, lambda wide: wide)

    @cached_property
    def weights(self) -> int:
        """How many linear operators there are."""
        return sum(node.linear is not None for node in self.imported.graph.nodes)

    # -- the inputs

    def read(self, inputs: Any) -> list[Case]:
        """Nothing: what an ONNX model takes are arrays by name, which need no reading.

        Raises:
            InputError: always.
        """
        raise InputError("inputs are a dict of arrays by input name, a list of those, or .npz files")

    def meet(self, first: Any) -> None:
        """Nothing: inputs are cast to what the model declares."""

    def make_up(self) -> tuple[list[Case], bool]:
        """Inputs such as the model declares.

        Raises:
            InputError: it runs on none that could be made up.
        """
        try:
            self._runs.run_before()
        except Unavailable:
            pass
        except InputError as error:
            raise InputError(f"{str(error).partition('; give real inputs')[0]}; give inputs") from error
        return [
            Case(f"made up {number}", tuple(feed.values()), tuple(feed))
            for number, feed in enumerate(self._runs.feeds, start=1)
        ], False

    def accept(self, case: Case) -> Case:
        """The same by the names of the inputs, in their types.

        Raises:
            InputError: they are not as many, or not as the inputs are called.
        """
        names = case.names if self._suits(case.names) else self.names
        if len(names) != len(case.arrays):
            given = f"{len(case.arrays)} ({', '.join(case.names)})" if case.names else f"{len(case.arrays)}"
            fact = f"{self.label} takes {len(self.names)} inputs ({', '.join(self.names)})"
            raise InputError(f"{fact}, and {given} are given")
        arrays = tuple(self._cast(name, array) for name, array in zip(names, case.arrays, strict=True))
        return Case(case.label, arrays, names, case.form)

    def _suits(self, names: Sequence[str]) -> bool:
        return set(self.names) <= set(names) <= set(self._types)

    def _cast(self, name: str, array: Array) -> Array:
        """An array in the type of an input, where one kind of number is only stored otherwise."""
        wanted = self._types.get(name, 0)
        if wanted in (0, onnx.TensorProto.STRING):
            return array
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(wanted))
        floats = wanted in FLOATS and is_float(array)
        whole = dtype.kind in "iu" and array.dtype.kind in "iu"
        return np.asarray(array.astype(dtype)) if floats or whole else array

    def _feeds(self, case: Case) -> list[Feed]:
        accepted = self.accept(case)
        feed = dict(zip(accepted.names, accepted.arrays, strict=True))
        rows = {len(array) if array.ndim else 0 for array in feed.values()}
        if self._batch is None or len(rows) != 1 or 0 in rows or rows == {self._batch}:
            return [feed]
        return list(_pieces(feed, rows.pop(), self._batch))

    @cached_property
    def _batch(self) -> int | None:
        """How many examples the model takes at once, if that is fixed."""
        ends = [item for item in self.model.graph.input if item.name in self.names]
        dims = [item.type.tensor_type.shape.dim for item in (*ends, *self.model.graph.output)]
        sizes = {dim[0].dim_value if dim else 0 for dim in dims}
        return sizes.pop() if len(sizes) == 1 and 0 not in sizes else None

    # -- the runs

    def run(self, case: Case) -> Outputs:
        """What onnxruntime computes with every optimisation off.

        Raises:
            Unavailable: onnxruntime has no kernels for the model's types.
            InputError: it cannot load or run it.
        """
        start = time.thread_time()
        outputs = _joined(case, [self._runner(feed) for feed in self._feeds(case)])
        self.seconds = time.thread_time() - start
        return outputs

    @cached_property
    def _runner(self) -> Runner:
        try:
            return Runner(self.model, self.folder)
        except InputError as error:
            if "NOT_IMPLEMENTED" not in str(error):
                raise
            raise Unavailable(f"compared in float64 only: {error}") from error

    def run_exactly(self, cases: Sequence[Case], own: Sequence[Outputs] | None) -> list[Outputs]:
        """What the model computes with every type in float64.

        Raises:
            Unavailable: it does not run in it, is too large, or does not do there what it does in onnxruntime.
        """
        try:
            if self.seconds > SLOW or self._is_heavy:
                raise InputError(f"{self.label} is too large to be run in float64")
            outputs = self._run_each(cases, lambda feeds: run_exactly(self._wide, feeds, self.folder))
            if own is not None and not agree(outputs, self._renamed(own), DOUBTFUL):
                raise InputError("the reference implementation disagrees with onnxruntime here")
        except InputError as error:
            raise Unavailable(f"not compared in float64: {error}") from error
        return list(outputs)

    def run_nudged(self, cases: Sequence[Case], exact: bool, units: float, seed: int) -> list[Outputs]:
        """What it computes with its weights moved by units in their last place.

        Raises:
            Unavailable: it does not run with those.
        """
        try:
            model = nudge(self._wide if exact else self.model, self.folder, units, seed, exact)
            if exact:
                return list(self._run_each(cases, lambda feeds: run_exactly(model, feeds)))
            runner = Runner(model, self.folder)
            return list(self._run_each(cases, lambda feeds: map(runner, feeds)))
        except InputError as error:
            raise Unavailable(str(error)) from error

    def _run_each(
        self, cases: Sequence[Case], run: Callable[[list[Feed]], Iterable[Outputs]]
    ) -> list[dict[str, Array]]:
        """What a run of all pieces of all cases gives for each case."""
        feeds = [self._feeds(case) for case in cases]
        ran = iter(run([feed for pieces in feeds for feed in pieces]))
        pairs = zip(cases, feeds, strict=True)
        return [_joined(case, [next(ran) for _ in pieces]) for case, pieces in pairs]

    def _renamed(self, own: Sequence[Outputs]) -> list[dict[str, Array]]:
        """Outputs that may go by the names of another model, by those of this one."""
        names = [item.name for item in self.model.graph.output]
        return [
            dict(zip(names, each.values(), strict=True)) if len(each) == len(names) else dict(each)
            for each in own
        ]

    @cached_property
    def _wide(self) -> onnx.ModelProto:
        return to_float64(self.model, self.folder)

    @cached_property
    def _is_heavy(self) -> bool:
        return files.count_floats(self.model) > HEAVY

    # -- for the ascent

    def soften(self) -> Callable[[Case], Outputs]:
        """Run a copy of the model in which every Relu is a LeakyRelu; the model itself, where that does not run."""
        if self._is_heavy:
            return self.run
        soft = onnx.ModelProto()
        soft.CopyFrom(self.model)
        for node in _nodes(soft.graph):
            if node.op_type == "Relu" and node.domain in ("", "ai.onnx"):
                node.op_type = "LeakyRelu"
                node.attribute.append(onnx.helper.make_attribute("alpha", LEAK))
        try:
            runner = Runner(soft, self.folder)
        except InputError:
            return self.run
        return lambda case: _joined(case, [runner(feed) for feed in self._feeds(case)])

    def differentiate(self, other: Any, case: Case, objective: Any) -> None:
        """Nothing: the difference to an ONNX model is climbed without a gradient."""

    # -- for the layer

    def record(self, case: Case, output: str) -> Recording:
        """The values of the main graph by name, the operators that make them, and what they are made of.

        Raises:
            InputError: it cannot be run with all of them as outputs.
        """
        graph, looked = self.model.graph, onnx.ModelProto()
        looked.CopyFrom(self.model)
        given = {item.name for item in graph.output}
        values = [name for node in graph.node for name in node.output if name]
        looked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name not in given)
        runner = Runner(looked, self.folder)
        outputs = _joined(case, [runner(feed) for feed in self._feeds(case)])
        makers = {name: node.op_type for node in graph.node for name in node.output}
        sources = {name: _read_by(node) for node in graph.node for name in node.output}
        end = output if output in makers else next((item.name for item in graph.output), "")
        arrays = {name: outputs[name] for name in values if name in outputs}
        return Recording("ONNX", arrays, makers, {**sources, "": (end,)})


def open_model(model: Any, label: str = "the model", folder: Path | None = None) -> ModelSide:
    """An ONNX model, as a protobuf or of onnx_ir, as one side.

    Raises:
        InputError: it is none that can be read.
    """
    proto, own = to_proto(model)
    files.check(proto, label)
    return ModelSide(proto, folder or own, label)


def open_file(path: Path, label: str) -> ModelSide:
    """An ONNX file as one side.

    Raises:
        InputError: it is none that can be read.
    """
    return ModelSide(files.load_file(path), path.parent, label)


def _pieces(feed: Feed, rows: int, size: int) -> Iterator[Feed]:
    """A feed in pieces of `size` examples."""
    for begin in range(0, rows, size):
        places = np.minimum(np.arange(begin, begin + size), rows - 1)
        yield {name: array[places] for name, array in feed.items()}


def _joined(case: Case, outputs: Sequence[Outputs]) -> dict[str, Array]:
    """The outputs of all pieces, as long as the input is."""
    if len(outputs) == 1:
        return dict(outputs[0])
    rows = len(case.arrays[0])
    return {name: np.concatenate([each[name] for each in outputs])[:rows] for name in outputs[0]}


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from _nodes(body)


def _read_by(node: onnx.NodeProto) -> tuple[str, ...]:
    """What a node reads, inside of its bodies too; names that are theirs alone lead nowhere."""
    inner = (name for body in bodies(node) for one in _nodes(body) for name in one.input)
    return tuple(dict.fromkeys([*(name for name in node.input if name), *inner]))
