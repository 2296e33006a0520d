"""Fold BatchNorms into the linear layers around them, merge what is linear side by side, exactly, and prove it.

    folded, report = bnfold.fold(model, example_inputs)        # an nn.Module, or an ONNX model
    report = bnfold.fold_file("model.onnx", "model.folded.onnx")
    bnfold.verify(before, after, inputs)                       # raises NotEquivalent

Importing this imports neither torch nor onnx; a frontend is loaded when a model of its kind arrives.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from bnfold.errors import BnfoldError, InputError, NotEquivalent, UnreadableModel
from bnfold.report import Evidence, Merge, Report, Verdict

__version__: str

__all__ = [
    "BnfoldError",
    "Evidence",
    "InputError",
    "Merge",
    "NotEquivalent",
    "Report",
    "UnreadableModel",
    "Verdict",
    "calibrate",
    "fold",
    "fold_file",
    "verify",
]


Model = TypeVar("Model")


def fold(model: Model, example_inputs: Any = None, **options: Any) -> tuple[Model, Report]:
    """Fold every BatchNorm of a model that can be folded exactly, merge linear operators, and verify the result.

    Args:
        model: an `nn.Module` in eval mode, an `onnx.ModelProto` or an `onnx_ir.Model`. It is not changed.
        example_inputs: for a module what it is called with: a tensor, a tuple of positional arguments, a dict of
            keyword arguments, or a pair `(args, kwargs)`. For an ONNX model a dict of arrays by input name, or None
            to have them made from the declared types and shapes.
        **options: `verify=False` compares nothing, and the report says so. `merge=False` leaves linear operators apart
            that stand side by side or one after another. The rest is the frontend's: see
            `bnfold.torch.fold` and `bnfold.onnx.fold`.

    Returns:
        The folded model, of the caller's own class, and the report: one verdict for every BatchNorm, what was merged,
        and how the two models were compared.

    Raises:
        InputError: the model is of no kind that bnfold folds, or cannot be used as it is.
        UnreadableModel: its computation could not be followed.
        NotEquivalent: the folded model computes something else; nothing is returned.
    """
    folded, report = _frontend(model).fold(model, example_inputs, **options)
    return cast("Model", folded), report


def fold_file(source: str | Path, target: str | Path, **options: Any) -> Report:
    """Fold an ONNX file into another one; see `bnfold.onnx.fold_file`."""
    from bnfold import onnx as frontend

    return frontend.fold_file(source, target, **options)


def calibrate(model: Model, batches: Any, **options: Any) -> Model:
    """Return a copy of an `nn.Module` whose BatchNorms have the statistics of a whole data set; see `bnfold.calibrate`.

    Args:
        model: not changed.
        batches: the data set in batches that can be read several times: a list, a DataLoader, a generator function.
        **options: `apply=lambda model, batch: ...` to call the model, `weights=lambda batch: ...` for examples that
            count several times, `dtype=None` to compute in the model's own dtype, `group=dist.group.WORLD` where each
            of several processes has a share of the batches.

    Raises:
        InputError: the model or the batches cannot be used; the message names the layer.
    """
    return cast("Model", import_module("bnfold.calibrate").calibrate(model, batches, **options))


def verify(
    before: Any, after: Any, inputs: Any = None, tolerance: float | None = None
) -> tuple[Evidence, ...]:
    """Compare two models, in their own dtype and in float64, on inputs that matter; see `bnfold.verification`.

    Args:
        before: a module, an ONNX model, or the file of one (ONNX, a checkpoint, an exported program).
        after: what should compute the same, of any of these kinds.
        inputs: as `fold` takes them for a model of that kind. Arrays by name, several such dicts in a list, and
            `.npz` files are for any.
        tolerance: the largest difference, relative to the largest output, instead of the bounds that are derived.

    Returns:
        What was compared, with the bounds; see `bnfold.equivalence`.

    Raises:
        NotEquivalent: they differ; the message names the worst input and element.
        InputError: one of them cannot be used, or inputs are missing.
        UnreadableModel: they could not be compared at all.
    """
    from bnfold.verification import open_side, verify_sides

    sides = open_side(before, "the first model"), open_side(after, "the second model")
    found = verify_sides(*sides, inputs, tolerance)
    found.raise_if_different()
    return found.evidence


def _frontend(model: Any) -> Any:
    """The frontend of a model. Its framework was imported by whoever made the model, so nothing is imported to ask."""
    for framework, kind in (("torch.nn", "Module"), ("onnx", "ModelProto"), ("onnx_ir", "Model")):
        module = sys.modules.get(framework)
        if module is not None and isinstance(model, getattr(module, kind)):
            return import_module("bnfold.torch" if framework == "torch.nn" else "bnfold.onnx")
    raise InputError(f"{type(model).__name__} is neither an nn.Module nor an ONNX model")


class _Package(ModuleType):
    """This package, on which importing the module `bnfold.fold` must not hide the function; so the others."""

    @property
    def __version__(self) -> str:
        """The version that was installed, by the tag that it was built from; a checkout that never was has none."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("bnfold")
        except PackageNotFoundError:
            return "0+checkout"

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in ("fold", "calibrate", "verify") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
