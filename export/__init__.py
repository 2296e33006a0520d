"""From a checkpoint to an ONNX file for inference on single examples, and names from that file.

    python -m export ckpt.pt                                 writes ckpt.onnx
    python -m export.sample ckpt.onnx --count 20 --seed 1    invents names with it, without torch

    exported = export.export("ckpt.pt", "ckpt.onnx")         the same from Python
    exported = export.export_module(model, inputs, "model.onnx", batch="dynamic")    any nn.Module
    session = export.Session("ckpt.onnx"); logits = session(context)    call after call, without torch

`convert` folds, has the graph written by `write` (with the table in `layers`) and proven by `prove`, and only then
puts the file in its place; `tables` and `quantise` make it faster where that pays. `latency` times it; `session` and
`sample` use it and need NumPy and onnxruntime alone, which is why nothing is imported here until it is asked for.

None of this is in the wheel. Who has a module of their own folds it with `bnfold.fold` and exports it with
`torch.onnx.export`, or folds what that wrote with `bnfold.fold_file`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.convert import Exported, export, export_module
    from export.session import Session

__all__ = ["Exported", "Session", "export", "export_module"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("export.session" if name == "Session" else "export.convert"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
