"""docs/pictures/architecture.svg: drawn from the code's own imports, with every module in its place."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def script():
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_shows_the_imports_that_there_are():
    drawn = script()
    due = "the picture is out of date; run python docs/draw_architecture.py"
    assert drawn.PICTURE.read_text(encoding="utf-8") == drawn.draw(), due


def test_every_module_has_a_place():
    drawn = script()
    placed = set(drawn.modules())
    for lane, names in drawn.BESIDE.items():
        placed |= {f"{lane}.{name}".strip(".") for name in names.split()}
    found = {
        ".".join(path.relative_to(ROOT / "bnfold").with_suffix("").parts)
        for path in (ROOT / "bnfold").rglob("*.py")
        if not path.name.startswith("__")
    }
    assert placed == found


def test_no_frontend_imports_the_other_and_no_core_module_a_frontend():
    lanes = {module: lane for module, (lane, *_) in script().modules().items()}
    crossing = {(a, b) for a, b in script().arrows() if lanes[a] not in ("", lanes[b])}
    assert not crossing


def test_the_checkers_import_nothing_of_the_search():
    """What is checked without a line of it; a row of the table is what both trust."""
    into = {
        imported for imported, module in script().arrows() if module in ("simulation", "response", "weights")
    }
    assert into.isdisjoint({"travel", "merge", "candidates", "operators", "duplicate", "decide"})


def public(path):
    """What a module says that others may take from it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_a_module_says_of_all_that_others_import_of_it_that_they_may():
    hidden = []
    for path in (ROOT / "bnfold").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            source = ROOT / f"{(getattr(node, 'module', None) or '').replace('.', '/')}.py"
            if isinstance(node, ast.ImportFrom) and ROOT / "bnfold" in source.parents and source.exists():
                hidden += [
                    (source.stem, alias.name) for alias in node.names if alias.name not in public(source)
                ]
    assert not hidden
