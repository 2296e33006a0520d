"""Draw `docs/pictures/architecture.svg`: the data path, with an arrow for every import between the modules on it.

    python docs/draw_architecture.py

What stands in which place is said here, in `PLACES`; the arrows are read from the code. Each goes from the module that
is imported to the one that imports it, as the data does. A test holds the file to what this script would write, and the
places to the modules that there are.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "pictures" / "architecture.svg"

STAGES = ("see", "lower", "import", "decide", "write", "run and compare")
LANES = ("torch", "", "onnx")
TITLES = {"torch": "nn.Module: bnfold/torch", "": "no framework: bnfold", "onnx": "model.onnx: bnfold/onnx"}

PLACES: dict[tuple[str, str], str] = {
    ("torch", "see"): "passes capture modes recorder hooks trace memory hollow aten internals tensors",
    ("torch", "lower"): "lower draft constants",
    (
        "torch",
        "import",
    ): "read simplify norms formulas aliasing storage steps determinism naming tails calls trials alignment sizes "
    "idle compiled",
    ("torch", "write"): "write merging stored modules",
    ("torch", "run and compare"): "fold retrace sandbox double nudge choices",
    ("", "lower"): "canonical algebra window",
    ("", "import"): "ir",
    ("", "decide"): "travel rules duplicate merge candidates operators decide",
    ("", "run and compare"): "simulation response weights certificate equivalence report",
    ("onnx", "see"): "accept protos functions flatten shapes sizes constant_folding",
    ("onnx", "lower"): "lower context",
    ("onnx", "import"): "read",
    ("onnx", "write"): "write merging slots edit copies",
    ("onnx", "run and compare"): "runs run reference inputs certify likeness nudge choices",
}
"""Which modules stand where, by lane and stage."""

BESIDE = {
    "torch": "archive files program recompose side states",
    "": "archive ascent calibrate cases checkpoint cli command distributed divergence errors exclusive fold heap "
    "layers output page printed pytest_plugin pytest_report reasons shapes shares verification verify wording",
    "onnx": "files side",
}
"""Modules that are not on the path of a fold: files, commands, verification, and what is shared by all."""

WIDTH, HEIGHT, GAP, COLUMN, TOP = 132, 24, 8, 176, 58
INK, QUIET, LINE, FILL = (
    "#24292f",
    "#6b7178",
    "#9aa4b2",
    {"torch": "#fde8d7", "": "#cfe3f5", "onnx": "#ddf0dc"},
)


def modules() -> dict[str, tuple[str, str, int]]:
    """Every module on the path, with its lane, its stage and its place among those."""
    return {
        f"{lane}.{name}".strip("."): (lane, stage, place)
        for (lane, stage), names in PLACES.items()
        for place, name in enumerate(names.split())
    }


def arrows() -> Iterator[tuple[str, str]]:
    """From each module to those that import it."""
    known = modules()
    for module in known:
        path = ROOT / "bnfold" / f"{module.replace('.', '/')}.py"
        for imported in sorted(set(_imports(path)) & known.keys() - {module}):
            yield imported, module


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bnfold":
            inside = (node.module or "").removeprefix("bnfold").strip(".")
            yield inside
            yield from (f"{inside}.{alias.name}".strip(".") for alias in node.names)


def draw() -> str:
    """The picture as SVG."""
    tops = _tops()
    corners = {
        module: (16 + STAGES.index(stage) * COLUMN, tops[lane] + place * (HEIGHT + GAP))
        for module, (lane, stage, place) in modules().items()
    }
    width, height = 16 + len(STAGES) * COLUMN, max(y for _, y in corners.values()) + HEIGHT + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *(_text(16 + place * COLUMN, 22, stage, QUIET) for place, stage in enumerate(STAGES)),
        *(_text(16, tops[lane] - 10, TITLES[lane], QUIET) for lane in LANES),
        *(_arrow(corners[a], corners[b]) for a, b in arrows()),
        *(_box(*corners[module], module) for module in modules()),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _tops() -> dict[str, int]:
    """Where each lane begins."""
    tops, y = {}, TOP
    for lane in LANES:
        tops[lane] = y
        rows = max(len(names.split()) for (other, _), names in PLACES.items() if other == lane)
        y += rows * (HEIGHT + GAP) + 40
    return tops


def _text(x: int, y: int, text: str, colour: str) -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}">{escape(text)}</text>'


def _box(x: int, y: int, module: str) -> str:
    lane, name = ("", module) if "." not in module else tuple(module.split("."))
    return (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="{FILL[lane]}" stroke="{INK}"/>'
        f'<text x="{x + WIDTH // 2}" y="{y + 16}" text-anchor="middle" fill="{INK}">{escape(name)}</text>'
    )


def _arrow(source: tuple[int, int], target: tuple[int, int]) -> str:
    """A curve from the right edge to the left one; beside the boxes where both stand in one column."""
    (x, y), (u, v) = source, target
    y, v = y + HEIGHT // 2, v + HEIGHT // 2
    if x == u:
        path = f"M{x + WIDTH},{y} C{x + WIDTH + 26},{y} {x + WIDTH + 26},{v} {x + WIDTH},{v}"
    elif x < u:
        path = f"M{x + WIDTH},{y} C{x + WIDTH + 40},{y} {u - 40},{v} {u},{v}"
    else:
        path = f"M{x},{y} C{x - 40},{y} {u + WIDTH + 40},{v} {u + WIDTH},{v}"
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1" opacity="0.7"/>'


def main() -> int:
    """Write the picture."""
    PICTURE.write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
