"""One folder with a page that invents names in the browser: onnxruntime-web runs the ONNX file, nothing else is asked.

    python -m export.page ckpt.onnx --serve      writes ckpt.page/ and serves it on localhost

The folder is all that the page needs, and works offline on any server of plain files:

    index.html, page.css, page.js    the page: a beginning is typed, names and the odds of the next character appear
    draw.js                          names for a seed, the same as those of `export.sample`
    fold.js                          one neuron's numbers, from BatchNorm to W2 and b2, step by step
    net.onnx, net.json               the file as it was given, and its vocabulary, context and batch
    unfolded.onnx, fold.json         the net with its BatchNorms, and the numbers of both (see `export.page.folded`)
    ort.wasm.bundle.min.mjs, ort-wasm-simd-threaded.wasm    onnxruntime-web (see `export.page.runtime`)

Names are drawn by comparing float64 sums of what onnxruntime computes in float32. Two builds of onnxruntime may round
differently in the last bit, so names may part where a draw falls within that of a boundary: one draw in a million.

Not covered: nets that are not over characters, and files with external data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from bnfold.errors import InputError
from bnfold.output import replacing
from export.page.folded import tell_fold
from export.page.runtime import fetch_runtime
from export.sample import Net

__all__ = ["locate_page", "write_page"]

_ASSETS = ("index.html", "page.css", "page.js", "draw.js", "fold.js")
_MARK = "net.json"


def locate_page(model: str | Path) -> Path:
    """Return `ckpt.page` for `ckpt.onnx`."""
    return Path(model).with_suffix(".page")


def write_page(
    model: Path, folder: Path, checkpoint: Path | None = None, runtime: Path | None = None
) -> str | None:
    """Write the folder of a page, and return why it does not show the fold, or None where it does.

    Args:
        model: what `python -m export` wrote.
        folder: where to; made if need be. What an earlier page left there is replaced.
        checkpoint: the net before its fold; by default `ckpt.pt` beside `ckpt.onnx`, if that is the file's source.
        runtime: the package onnxruntime-web as a `.tgz`; by default it is downloaded once.

    Raises:
        InputError: the file is of no net over characters, `checkpoint` is not its source, the runtime cannot be had, or
            the folder is somebody else's.
    """
    net = Net(str(model))
    _check_folder(folder)
    fold = tell_fold(model, checkpoint)
    told = {
        "file": model.name,
        "vocabulary": net.vocabulary,
        "length": net.length,
        "batch": net.at_once,
        "fold": fold.missing,
    }
    files = {**fetch_runtime(runtime), "net.onnx": model.read_bytes(), _MARK: json.dumps(told).encode()}
    files |= {name: Path(__file__).with_name(name).read_bytes() for name in _ASSETS}
    _put(folder, {**files, **fold.files})
    return fold.missing


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder with -o")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARK).is_file():
        raise InputError(f"{folder} holds something else than a page; name another folder with -o")


def _put(folder: Path, files: Mapping[str, bytes]) -> None:
    """Let all files appear in the folder, `index.html` last, and what an earlier page had besides them go."""
    folder.mkdir(parents=True, exist_ok=True)
    old = [
        path for path in (folder / name for name in ("unfolded.onnx", "fold.json")) if path.name not in files
    ]
    with replacing(folder / "index.html", lambda *_: old) as temporary:
        for name, content in files.items():
            temporary.with_name(name).write_bytes(content)
