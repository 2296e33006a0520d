"""The runs that a comparison of two ONNX models is made of (see `bnfold.equivalence`).

The original runs in its own types and, where the operators allow it, in float64; then that float64 copy is edited as
the model is, with new weights that are not rounded to the storage type, and runs again. What cannot be answered is left
out of the evidence, with a note that says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto

from bnfold.archive import load_arrays
from bnfold.cases import count_by_shapes, move
from bnfold.equivalence import UNIT_ROUNDOFF, Alike, Pair, Unavailable
from bnfold.errors import InputError
from bnfold.onnx import inputs as made
from bnfold.onnx.files import count_floats
from bnfold.onnx.inputs import Feed
from bnfold.onnx.nudge import nudge
from bnfold.onnx.read import ImportedModel
from bnfold.onnx.run import Numbers, Outputs, Runner, is_random, run_exactly, to_float64, widen

if TYPE_CHECKING:
    from bnfold.onnx.choices import Choices

__all__ = ["DOUBTFUL", "HEAVY", "SLOW", "ModelRuns", "agree", "check_runs"]

SLOW = 2.0
"""A model whose run takes more seconds of a thread than this is not run in float64, which is much slower."""

HEAVY = 400_000_000
"""Nor is one that stores more floating-point numbers than this."""

FEEDS = ((0.03, 3), (0.06, 2))
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


class ModelRuns:
    """The runs of one comparison, on inputs that are given or made up; see `bnfold.equivalence.Runs`."""

    doubt = ""

    def __init__(
        self,
        imported: ImportedModel,
        edit: Callable[[onnx.ModelProto], onnx.ModelProto],
        inputs: Any = None,
        original: onnx.ModelProto | None = None,
        folder: Path | None = None,
        file: Path | None = None,
        late: Mapping[str, Numbers] | None = None,
    ) -> None:
        """Prepare to run a model and what becomes of it.

        Where it draws random numbers, the imported model is run: the nodes of a function share a seed in all calls.

        Args:
            imported: the unfolded model, as it was read.
            edit: makes the folded model in float64 of the unfolded one in float64, which may be changed.
            inputs: one feed, several, a file with one, or None to make them up.
            original: the unfolded model, if the imported one is that with functions inlined.
            folder: where the external data of the folded model lies.
            file: the file that the original came from, if it did.
            late: the numbers of tensors that `edit` adds without them.

        Raises:
            InputError: the inputs are none.
        """
        self.imported, self.edit, self.folder, self.file = imported, edit, folder, file
        self.late = dict(late or {})
        self.given = _given(inputs)
        self.original = imported.model if original is None or is_random(imported.model) else original
        self.feeds: list[Feed] = []
        self.before: list[Outputs] = []
        self.seconds, self.is_wide = 0.0, False

    @property
    def dtype(self) -> str:
        """The coarsest floating-point type of the model."""
        kinds = set(self.imported.context.found.types.values())
        return next((name for kind, name in _NAMES.items() if kind in kinds), "float32")

    @property
    def examples(self) -> int:
        """How many examples the feeds hold: their first axes where those agree."""
        return sum(count_by_shapes(array.shape for array in feed.values()) for feed in self.feeds)

    # -- the runs

    def run_before(self) -> list[Outputs]:
        """Find inputs that the original runs on, and run it, in float64 if onnxruntime has no kernels for its type.

        Raises:
            InputError: it cannot be run on these inputs, or on any that were made up.
            Unavailable: it ran in float64.
        """
        try:
            runner: Callable[[Feed], Outputs] = Runner(self.original, self.imported.folder, self.file)
        except InputError as error:
            if "NOT_IMPLEMENTED" not in str(error):
                raise
            self._try_feeds(self._run_wide_instead(error))
            raise Unavailable(f"compared in float64 only: {error}") from error
        self._try_feeds(runner)
        return self.before

    def run_exactly(self) -> tuple[list[Outputs], list[Outputs]]:
        """Run the model in float64, edit it, and run it again.

        Raises:
            Unavailable: it cannot be, or does not do what onnxruntime does.
        """
        try:
            wide = self._widened()
            before = run_exactly(wide, self.feeds, self.imported.folder)
            if not agree(before, self.before, DOUBTFUL):
                raise InputError("the reference implementation disagrees with onnxruntime here")
            return before, run_exactly(self.edit(wide), self.feeds, self.imported.folder, self.late)
        except InputError as error:
            raise Unavailable(f"not compared in float64: {error}") from error

    def run_after(self, folded: onnx.ModelProto | Path) -> list[Outputs]:
        """Run the folded model, or the file of it.

        Raises:
            InputError: it cannot be run.
        """
        runner = Runner(folded, self.folder)
        return [runner(feed) for feed in self.feeds]

    def run_nudged(self, exact: bool, units: float, seed: int) -> list[Outputs]:
        """Run the original with numbers that lie beside its own and those of the inputs.

        Raises:
            Unavailable: it does not run with those.
        """
        unit = UNIT_ROUNDOFF["float64" if exact else self.dtype] * units
        random = np.random.default_rng(seed)
        try:
            source = self._widened() if exact else self.original
            model = nudge(source, self.imported.folder, units, seed, exact)
            feeds = [
                {name: widen(array) if exact else array for name, array in feed.items()}
                for feed in self.feeds
            ]
            near = [{name: move(array, unit, random) for name, array in feed.items()} for feed in feeds]
            if exact:
                return run_exactly(model, near)
            runner = Runner(model, self.imported.folder)
            return [runner(feed) for feed in near]
        except InputError as error:
            raise Unavailable(str(error)) from error

    def run_alike(self, folded: onnx.ModelProto | Path) -> Alike:
        """Run all four with the choices of the unfolded model.

        Raises:
            Unavailable: it makes none, or other ones are made.
        """
        from bnfold.onnx.choices import find_choices

        model = self.imported.model
        choices = find_choices(model, self.imported.context)
        if not choices:
            raise Unavailable("the model makes no choices")
        try:
            if self.is_wide:
                run = _exactly(choices.record(self._widened()), self.imported.folder)
            else:
                run = Runner(choices.record(model), self.imported.folder)
            recorded = [run(feed) for feed in self.feeds]
            first = [choices.tell(model, outputs) for outputs in recorded]
            made = [choices.feed(outputs) for outputs in recorded]
            exact, fell = self._follow_exactly(choices, first, made)
            if not self.is_wide:
                late, after = self._follow(choices, folded, made)
                return Alike((first, late), exact, len(choices) * len(made), after, fell[0])
        except InputError as error:
            raise Unavailable(str(error)) from error
        if exact is None:
            raise Unavailable("it could not be run in float64")
        return Alike(exact, exact, len(choices) * len(made), fell[1], fell[0])

    def _follow_exactly(
        self, choices: Choices, first: Sequence[Outputs], made: Sequence[Feed]
    ) -> tuple[Pair | None, tuple[int, int]]:
        """Both models in float64, where that proves anything, and how many choices of each are others."""
        made = [{name: widen(array) for name, array in feed.items()} for feed in made]
        try:
            wide = self._widened()
            before, old = self._follow(choices, wide, made, exact=True)
            if not agree(before, first, DOUBTFUL):
                return None, (0, 0)
            after, new = self._follow(choices, self.edit(wide), made, exact=True)
        except InputError:
            return None, (0, 0)
        return (before, after), (old, new)

    def _follow(
        self, choices: Choices, model: onnx.ModelProto | Path, made: Sequence[Feed], exact: bool = False
    ) -> tuple[list[Outputs], int]:
        """What a model computes with recorded choices, and how many of its own are others."""
        folder = self.imported.folder if exact else self.folder
        if isinstance(model, Path):
            model, folder = onnx.load_model(model, load_external_data=False), model.parent
        led = choices.follow(model, made[0])
        run = _exactly(led, folder, self.late) if exact else Runner(led, folder)
        outputs = [run({**feed, **also}) for feed, also in zip(self.feeds, made, strict=True)]
        otherwise = sum(choices.count_otherwise(*each) for each in zip(outputs, made, strict=True))
        return [choices.tell(model, each) for each in outputs], otherwise

    def _run_wide_instead(self, error: InputError) -> Callable[[Feed], Outputs]:
        """Run in float64 what onnxruntime has no kernel for (bfloat16 on a CPU)."""
        wide, self.is_wide = to_float64(self.imported.model, self.imported.folder), True

        def run(feed: Feed) -> Outputs:
            try:
                return run_exactly(wide, [feed], self.imported.folder)[0]
            except InputError:
                raise error from None

        return run

    def _widened(self) -> onnx.ModelProto:
        if self.seconds > SLOW or count_floats(self.imported.model) > HEAVY:
            raise InputError("it is too large to be run in float64")
        return to_float64(self.imported.model, self.imported.folder)

    # -- the inputs

    def _try_feeds(self, runner: Callable[[Feed], Outputs]) -> None:
        """Settle on inputs; note what the model made of them."""
        if self.given is not None:
            self._check_names(self.given)
            for feed in self.given:
                self._run(runner, feed)
            return
        failure, tried = InputError("the model has no inputs that could be made up"), 0
        for feed in self._candidates(0):
            try:
                self._run(runner, feed)
                break
            except InputError as error:
                failure, tried = error, tried + 1
        if not self.feeds:
            ways = "give real inputs (--inputs FILE.npz), or fold without verifying (--no-verify)"
            raise InputError(f"{failure}; {ways}")
        count = next((count for limit, count in FEEDS if self.seconds < limit), 1)
        for seed in range(1, count):
            self._run(runner, next(islice(self._candidates(seed), tried, None)))

    def _candidates(self, seed: int) -> Iterator[Feed]:
        return made.candidates(self.imported.model, self.imported.context, seed)

    def _check_names(self, feeds: Sequence[Feed]) -> None:
        known = {item.name for item in self.imported.model.graph.input}
        for feed in feeds:
            wrong = set(feed) - known or set(self.imported.context.whole.inputs) - set(feed)
            if wrong:
                has = f"the model has {sorted(known)}"
                raise InputError(f"the inputs do not suit the model: {has}; look at {sorted(wrong)}")

    def _run(self, runner: Callable[[Feed], Outputs], feed: Feed) -> None:
        start = time.thread_time()
        self.before.append(runner(feed))
        self.feeds.append(feed)
        self.seconds = time.thread_time() - start


def check_runs(imported: ImportedModel, inputs: Any = None, once: bool = False) -> None:
    """Load a model in onnxruntime and, with `once`, run it on the first of a few inputs that it takes.

    Raises:
        InputError: it cannot be loaded, or runs on none.
    """
    runner = Runner(imported.model, imported.folder)
    failure: InputError | None = None
    feeds = _given(inputs) or islice(made.candidates(imported.model, imported.context), TRIES)
    for feed in feeds if once else ():
        try:
            runner(feed)
            return
        except InputError as error:
            failure = error
    if failure is not None:
        raise failure


def agree(exact: Sequence[Outputs], own: Sequence[Outputs], tolerance: float) -> bool:
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


def _exactly(
    model: onnx.ModelProto, folder: Path | None, late: Mapping[str, Numbers] | None = None
) -> Callable[[Feed], Outputs]:
    """Runs a model that `to_float64` made."""
    return lambda feed: run_exactly(model, [feed], folder, late)[0]


def _given(inputs: Any) -> list[Feed] | None:
    """The caller's feeds as arrays by name.

    Raises:
        InputError: they are none.
    """
    if inputs is None:
        return None
    if isinstance(inputs, (str, Path)):
        return [load_arrays(Path(inputs))]
    if isinstance(inputs, Mapping):
        inputs = [inputs]
    if (
        not isinstance(inputs, Sequence)
        or not all(isinstance(feed, Mapping) for feed in inputs)
        or not inputs
    ):
        raise InputError("inputs are a dict of arrays by input name, a list of those, or an .npz file")
    return [{name: np.asarray(array) for name, array in feed.items()} for feed in inputs]
