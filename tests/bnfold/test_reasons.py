"""The table of reasons: complete, each with a way out, and on the page."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from bnfold import reasons
from bnfold.reasons import Reason, explain, sections

ROOT = Path(__file__).parents[2]
ROWS = {name: row for rows in sections().values() for name, row in rows.items()}
OF_PROOFS_AND_MERGES = frozenset(
    """simulation response certificate certify likeness operators window candidates merge merging calls
    """.split()  # noqa: SIM905
)
"""Modules whose refusals are not about BatchNorms."""
DECIDING = """travel rules canonical decide duplicate onnx/lower onnx/context onnx/write torch/norms torch/storage
    torch/aliasing torch/retrace torch/sizes torch/tails torch/lower torch/draft torch/write""".split()  # noqa: SIM905
"""Modules that say why a BatchNorm stays, or why an operator cannot take one in."""
FILLERS = {"it keeps what it computes", "the output of the model", "the code of `"}
"""What stands in the places of sentences, and is none."""


def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "bnfold").rglob("*.py")}


def strings(tree):
    """The string literals of a tree that are no docstrings."""
    skipped = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def test_every_reason_is_on_the_page_with_its_way_out():
    page = (ROOT / "docs" / "why.md").read_text(encoding="utf-8")
    due = "docs/why.md is out of date; run python docs/write_why.py"
    assert page == runpy.run_path(str(ROOT / "docs" / "write_why.py"))["draw"](), due
    missing = [name for name, row in ROWS.items() if f"**{row.sentence()}**" not in page]
    assert not missing
    assert all(row.way_out.endswith(".") and len(row.way_out) > 20 for row in ROWS.values())


def test_every_document_that_a_way_out_names_exists():
    named = {name for row in ROWS.values() for name in re.findall(r"docs/[\w/]+\.md", row.way_out)}
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_no_two_reasons_say_the_same_or_are_of_one_name():
    names = re.findall(r"^(\w+) = Reason\(", Path(reasons.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(names) == sorted(ROWS)
    assert len({row.says for row in ROWS.values()}) == len(ROWS)


def test_no_refusal_about_a_batchnorm_is_worded_outside_of_the_table():
    worded = []
    for path, tree in trees().items():
        if path.stem in OF_PROOFS_AND_MERGES:
            continue
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            said = [text for part in call.args for text in strings(part) if " " in text]
            if name in ("Refuse", "refuse", "absent") and [text for text in said if text not in FILLERS]:
                worded.append(f"{path.name}:{call.lineno}: {said}")
    assert not worded


@pytest.mark.parametrize("module", DECIDING)
def test_no_deciding_module_words_a_reason(module):
    """Whatever begins as a reason does; what is raised to the caller has other words."""
    found = strings(ast.parse((ROOT / "bnfold" / f"{module}.py").read_text(encoding="utf-8")))
    worded = [
        text
        for text in found
        if re.match(r"(its?|the|some|what|no) \w|[^`]*` \(", text) and text not in FILLERS
    ]
    assert not worded


def test_no_filler_is_left_over():
    found = {text for tree in trees().values() for text in strings(tree)}
    assert found >= FILLERS


def test_every_reason_is_given_what_it_asks_for():
    """Said here, since a sentence that is seldom said would fail when it is."""
    wrong, used = [], set()
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "reasons":
                used.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ROWS:
                given = {keyword.arg for keyword in node.keywords}
                if node.args or given != ROWS[node.func.attr].fields:
                    wrong.append(f"{path.name}:{node.lineno}: {node.func.attr} is given {given}")
    assert not wrong
    assert set(ROWS) - used == set(), "nothing says these"


class Thing:
    name, op = "some.layer", "Conv"


@pytest.mark.parametrize("name", ROWS)
def test_a_reason_is_found_by_what_it_says(name):
    row = ROWS[name]
    inner = reasons.PADS()
    filled = {"node": Thing, "reader": Thing, "limit": 7} | dict.fromkeys(
        ("because", "above", "below"), inner
    )
    said = row(**{field: filled.get(field, field) for field in row.fields})
    found = explain(said)
    assert found[0] is row
    assert [one is reasons.PADS for one in found[1:]] == [True] * len(
        row.fields & {"because", "above", "below"}
    )


def test_what_nothing_says_is_explained_by_nothing():
    assert explain("the moon is full") == []


def test_the_fields_of_a_reason_are_its_places():
    row = Reason("`{node.name}` of {what} is {limit:,}", "None.")
    assert row.fields == {"node", "what", "limit"}
    assert row.sentence() == "`...` of ... is ..."
    assert row(node=Thing, what="x", limit=1000) == "`some.layer` of x is 1,000"
