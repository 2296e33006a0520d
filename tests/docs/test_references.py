"""What documents and docstrings refer to is there: `rules.LARGEST` names something that `bnfold/rules.py` defines."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted((ROOT / "bnfold").rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

REFERENCE = re.compile(r"`(?:bnfold\.)?(?:(?:torch|onnx)\.)?(\w+)\.(?!py`|md`)(\w+)`")

NONE = {"`report.limits`": "a field of the report that a caller has", "`fold.json`": "a file of a page"}
"""What looks like a name in a module and is something else."""


def names(path: Path) -> set[str]:
    """What a module defines or imports at its top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {part.id for each in targets for part in ast.walk(each) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def docstrings(path: Path) -> str:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    texts = [
        node.value for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    return "\n\n".join(text.value for text in texts if isinstance(text.value, str))


def dangling(text: str) -> list[str]:
    """References to a module of bnfold, by its name, that name nothing in any module of that name."""
    found = []
    for reference in REFERENCE.finditer(text):
        module, name = reference.groups()
        paths = [path for path in CODE if path.stem == module]
        if paths and reference[0] not in NONE and not any(name in names(path) for path in paths):
            found.append(reference[0])
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_refer_to_what_there_is(path):
    assert not dangling(docstrings(path))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_refer_to_what_there_is(path):
    assert not dangling(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("package", ["torch", "onnx"])
def test_a_frontend_says_what_each_of_its_modules_is_for(package):
    folder = ROOT / "bnfold" / package
    told = set(re.findall(r"\w+", docstrings(folder / "__init__.py")))
    assert not {path.stem for path in folder.glob("*.py")} - told - {"__init__"}


def listed(docstring: str, heading: str) -> set[str]:
    """The names that a docstring explains under a heading."""
    section = re.search(rf"{heading}:\n((?:    .*\n?|\n)+)", docstring)
    lines = re.findall(r"^    ([\w*]+(?:, [\w*]+)*):", section[1], re.MULTILINE) if section else []
    return {name.lstrip("*") for line in lines for name in line.split(", ")}


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_explain_arguments_and_attributes_that_there_are(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert listed(ast.get_docstring(node) or "", "Args") <= {
                part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)
            }, node.name
        elif isinstance(node, ast.ClassDef):
            there = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
            there |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            assert listed(ast.get_docstring(node) or "", "Attributes") <= there, node.name
