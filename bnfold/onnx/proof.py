"""Run a model before and after folding and hold the outputs against each other (see `bnfold.equivalence`).

The original is run first, in its own types and, where the operators allow it, in float64; so is a float64 copy to
which the same journey is applied, whose new weights are therefore not rounded to the storage type. What cannot be
answered is left out of the evidence, with a note that says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from bnfold.equivalence import UNIT_ROUNDOFF, judge, measure
from bnfold.errors import InputError, NotEquivalent
from bnfold.graph import Graph
from bnfold.onnx import inputs as made
from bnfold.onnx.constants import FLOATS
from bnfold.onnx.files import stored_tensors
from bnfold.onnx.inputs import Feed
from bnfold.onnx.read import Picture, read
from bnfold.onnx.run import Outputs, Runner, is_random, run_exactly, widen
from bnfold.onnx.write import write
from bnfold.report import Evidence

__all__ = ["Proof", "check_runs"]

SLOW = 2.0
"""A model whose run takes more seconds than this is not run in float64, which is much slower."""

HEAVY = 400_000_000
"""Nor is one that stores more floating-point numbers than this."""

FEEDS = ((0.03, 3), (0.15, 2))
"""How many feeds are made up for a model that runs in less than so many seconds; one for any other."""

TRIES = 4
"""On how many made-up inputs a model is tried that is unlikely to run on any."""

_NAMES = {
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT16: "float16",
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
}
"""From the coarsest on."""

DOUBTFUL = 0.5
"""A model whose float64 outputs differ by more than this from its own is not the same model."""


class Proof:
    """The original's outputs, waiting for those of the folded model.

    Attributes:
        notes: what could not be compared, and why.
    """

    def __init__(self, picture: Picture, inputs: Any = None, original: onnx.ModelProto | None = None) -> None:
        """Run the original, which is the picture's model unless that one has inlined functions.

        Where it draws random numbers, the picture's model is run: the nodes of a function share a seed in all calls.

        Raises:
            InputError: it cannot be run on these inputs, or on any that were made up.
        """
        self.picture, self.notes = picture, list[str]()
        self.seconds = 0.0
        self._folded: list[Outputs] | None = None
        try:
            first = picture.model if original is None or is_random(picture.model) else original
            self.runner: Callable[[Feed], Outputs] = Runner(first, picture.folder)
            self.is_exact_only = False
        except InputError as error:
            if "NOT_IMPLEMENTED" not in str(error):
                raise
            self.runner, self.is_exact_only = self._run_wide_instead(error), True
        self.feeds, self.before = self._try_feeds(_given(inputs))
        self.noise = self._sensitivity()
        del self.runner
        exact = self.before if self.is_exact_only else self.run_wide(picture.model, picture.folder)
        self.exact = self._trusted(exact)

    def _run_wide_instead(self, error: InputError) -> Callable[[Feed], Outputs]:
        """Run in float64 what onnxruntime has no kernel for (bfloat16 on a CPU)."""
        wide = widen(self.picture.model, self.picture.folder)
        self.notes.append(f"compared in float64 only: {error}")

        def run(feed: Feed) -> Outputs:
            try:
                return run_exactly(wide, [feed])[0]
            except InputError:
                raise error from None

        return run

    def _try_feeds(self, given: Sequence[Feed] | None) -> tuple[list[Feed], list[Outputs]]:
        if given is not None:
            self._check_names(given)
            return list(given), [self._time(feed) for feed in given]
        first, failure = None, InputError("the model has no inputs that could be made up")
        tried = 0
        for feed in self._candidates(0):
            try:
                first = self._time(feed)
                break
            except InputError as error:
                failure, tried = error, tried + 1
        if first is None:
            ways = "give real inputs (--inputs FILE.npz), or fold without verifying (--no-verify)"
            raise InputError(f"{failure}; {ways}")
        count = next((count for limit, count in FEEDS if self.seconds < limit), 1)
        others = [next(islice(self._candidates(seed), tried, None)) for seed in range(1, count)]
        return [feed, *others], [first, *(self._time(other) for other in others)]

    def _candidates(self, seed: int) -> Iterator[Feed]:
        return made.candidates(self.picture.model, self.picture.scene, seed)

    def _check_names(self, feeds: Sequence[Feed]) -> None:
        known = {item.name for item in self.picture.model.graph.input}
        for feed in feeds:
            wrong = set(feed) - known or set(self.picture.scene.whole.inputs) - set(feed)
            if wrong:
                has = f"the model has {sorted(known)}"
                raise InputError(f"the inputs do not suit the model: {has}; look at {sorted(wrong)}")

    def _time(self, feed: Feed) -> Outputs:
        start = time.perf_counter()
        outputs = self.runner(feed)
        self.seconds = time.perf_counter() - start
        return outputs

    def run_wide(self, model: onnx.ModelProto, folder: Path | None) -> list[Outputs] | None:
        """The outputs of a model in float64, for every feed; None where that cannot be done, with a note."""
        return self._exactly(lambda: widen(model, folder))

    def _trusted(self, exact: list[Outputs] | None) -> list[Outputs] | None:
        """Float64 outputs that agree with onnxruntime's up to rounding; others prove nothing."""
        if exact is None or _agree(exact, self.before, DOUBTFUL):
            return exact
        self.notes.append(
            "not compared in float64: the reference implementation disagrees with onnxruntime here"
        )
        return None

    def prepare(self, graph: Graph, freeze: bool, demoted: frozenset[str]) -> None:
        """Run the folded model in float64, from a copy of the original that is not changed yet."""
        if self.exact is None:
            return

        def fold() -> onnx.ModelProto:
            wide = widen(self.picture.model, self.picture.folder)
            picture = read(wide, freeze_initializers=freeze, demote=demoted)
            write(picture, graph)
            return wide

        self._folded = self._exactly(fold)

    def folded(self) -> list[Outputs] | None:
        """What `prepare` computed."""
        return self._folded

    def _exactly(self, make: Callable[[], onnx.ModelProto]) -> list[Outputs] | None:
        numbers = sum(
            int(np.prod(t.dims)) for t in stored_tensors(self.picture.model) if t.data_type in FLOATS
        )
        try:
            if self.seconds > SLOW or numbers > HEAVY:
                raise InputError("it is too large to be run in float64")
            return run_exactly(make(), self.feeds)
        except InputError as error:
            note = f"not compared in float64: {error}"
            self.notes += [note] if note not in self.notes else []
            return None

    def judge(
        self,
        make: Callable[[], Runner],
        exact: Callable[[], list[Outputs] | None],
        changed: int,
        rounded: bool = False,
    ) -> tuple[Evidence, ...]:
        """Compare with the folded model, which `make` gets ready to run; see `bnfold.equivalence.judge`.

        Raises:
            NotEquivalent: it computes something else.
        """
        wide = exact()
        if self.is_exact_only:
            if self.exact is None or wide is None:
                raise InputError("the folded model could not be run in float64")
            dtype = self._dtype() if rounded else "float64"
            return judge(
                (self.exact, wide), (self.exact, wide), dtype, changed, self._examples(), rounded=rounded
            )
        runner = make()
        after = [runner(feed) for feed in self.feeds]
        pair = (self.exact, wide) if self.exact is not None and wide is not None else None
        asked = ((self.before, after), pair, self._dtype(), changed, self._examples())
        try:
            return judge(*asked, rounded=rounded)
        except NotEquivalent:
            return judge(*asked, rounded=rounded, noise=self.noise)

    def _sensitivity(self) -> float:
        """How far the outputs move when every input moves by one unit roundoff: what any rounding may do to them."""
        unit, random = UNIT_ROUNDOFF[self._dtype()], np.random.default_rng(1)
        near = ({name: _nudge(array, unit, random) for name, array in feed.items()} for feed in self.feeds)
        return measure(self.before, [self.runner(feed) for feed in near], discrete=False).deviation

    def _dtype(self) -> str:
        """The coarsest floating-point type of the model."""
        kinds = set(self.picture.scene.found.types.values())
        return next((name for kind, name in _NAMES.items() if kind in kinds), "float32")

    def _examples(self) -> int:
        """How many examples the feeds hold: their first axes where those agree."""
        total = 0
        for feed in self.feeds:
            sizes = {array.shape[0] for array in feed.values() if array.ndim > 1}
            total += sizes.pop() if len(sizes) == 1 else 1
        return total


def check_runs(picture: Picture, inputs: Any = None, once: bool = False) -> None:
    """Load a model in onnxruntime and, with `once`, run it on the first of a few inputs that it takes.

    Raises:
        InputError: it cannot be loaded, or runs on none.
    """
    runner = Runner(picture.model, picture.folder)
    failure: InputError | None = None
    feeds = _given(inputs) or islice(made.candidates(picture.model, picture.scene), TRIES)
    for feed in feeds if once else ():
        try:
            runner(feed)
            return
        except InputError as error:
            failure = error
    if failure is not None:
        raise failure


def _agree(exact: Sequence[Outputs], own: Sequence[Outputs], tolerance: float) -> bool:
    """Whether outputs agree, relative to the largest of each; what a sigmoid has squashed to nothing is noise."""
    for name in exact[0]:
        pairs = [(np.asarray(a.get(name)), np.asarray(b.get(name))) for a, b in zip(exact, own, strict=True)]
        if any(a.shape != b.shape for a, b in pairs):
            return False
        if pairs[0][0].dtype.kind != "f":
            continue
        with np.errstate(invalid="ignore"):
            wide = [(a, b.astype(np.float64)) for a, b in pairs]
            peak = max(
                (float(np.nanmax(np.abs(a[np.isfinite(a)]), initial=0.0)) for a, _ in wide), default=0.0
            )
            if any(np.nanmax(np.abs(a - b), initial=0.0) > tolerance * max(peak, 1e-4) for a, b in wide):
                return False
    return True


def _nudge(array: np.ndarray[Any, Any], unit: float, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Move every number by up to two unit roundoffs, of those that are floats."""
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        return array
    moved = array.astype(np.float64) * (1 + 2 * unit * random.uniform(-1, 1, array.shape))
    return np.asarray(moved.astype(array.dtype))


def _given(inputs: Any) -> list[Feed] | None:
    """The caller's feeds as arrays by name.

    Raises:
        InputError: they are none.
    """
    if inputs is None:
        return None
    if isinstance(inputs, (str, Path)):
        return [_load(Path(inputs))]
    if isinstance(inputs, Mapping):
        inputs = [inputs]
    if (
        not isinstance(inputs, Sequence)
        or not all(isinstance(feed, Mapping) for feed in inputs)
        or not inputs
    ):
        raise InputError("inputs are a dict of arrays by input name, a list of those, or an .npz file")
    return [{name: np.asarray(array) for name, array in feed.items()} for feed in inputs]


def _load(path: Path) -> Feed:
    if not path.is_file():
        raise InputError(
            f"{path} is no .npz file: {'it is no regular file' if path.exists() else 'no such file'}"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        raise InputError(f"{path} is no .npz file of arrays: {error}") from error
