"""The documentation site, built as `make docs` builds it: nothing is dead, and nothing is fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnfold

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that it was built into."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_document_is_a_page(site):
    documents = {
        path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")
    }
    pages = {path.relative_to(site) for path in site.rglob("*.html")}
    assert documents <= pages
    assert {
        Path(f"project/{name}.html") for name in ("contributing", "releasing", "security", "changelog")
    } <= pages


def test_the_notebooks_can_be_had_from_it(site):
    linked = (site / "notebooks" / "index.html").read_text(encoding="utf-8")
    for source in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        assert (site / "notebooks" / source.name).read_bytes() == source.read_bytes()
        assert re.search(f'href="?{source.name}', linked)


def test_no_page_loads_anything_from_elsewhere(site):
    loads = re.compile(
        r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
    )
    found = {
        address
        for page in site.rglob("*.html")
        for address in loads.findall(page.read_text(encoding="utf-8"))
    }
    styles = [
        text
        for path in site.rglob("*.css")
        for text in re.findall(r"url\((?:https?:)?//.*?\)", path.read_text())
    ]
    assert (found, styles) == (set(), [])


def test_the_reference_has_all_of_the_public_interface(site):
    """As functions: a module of the same name has no signature."""
    text = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html"))
    anchors = set(re.findall(r'id="?(bnfold[\w.]*)', text))
    homes = {name: getattr(bnfold, name).__module__ for name in bnfold.__all__}
    assert {f"{home}.{name}" for name, home in homes.items()} <= anchors
    assert "bnfold.fold.main" not in anchors


def test_the_commands_show_their_options(site):
    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "--freeze-initializers" in text
    assert "--tolerance" in text
