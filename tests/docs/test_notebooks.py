"""docs/notebooks: what is written is what the sources say, and it runs from top to bottom without a complaint."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def draw():
    """The function that makes a notebook of its source."""
    pytest.importorskip("jupytext")
    return runpy.run_path(str(ROOT / "docs" / "write_notebooks.py"))["draw"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs a notebook in a folder and returns its code cells, of which none wrote to stderr."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(name, folder):
        notebook = nbformat.read(FOLDER / name, 4)
        resources = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        streams = [out for cell in cells for out in cell.outputs if out.output_type == "stream"]
        assert [stream.text for stream in streams if stream.name == "stderr"] == []
        return cells

    return run


def shown(cells, kind="text/html"):
    """What the cells show of a kind."""
    data = (out.data for cell in cells for out in cell.outputs if "data" in out)
    return [each[kind] for each in data if kind in each]


def printed(cells):
    return "".join(out.text for cell in cells for out in cell.outputs if out.output_type == "stream")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_up_to_date(source, draw):
    due = f"{source.stem}.ipynb is out of date; run python docs/write_notebooks.py"
    assert source.with_suffix(".ipynb").read_text(encoding="utf-8") == draw(source), due


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_holds_no_output_and_nothing_of_the_run_that_wrote_it(source, draw):
    nbformat = pytest.importorskip("nbformat")
    text = draw(source)
    notebook = nbformat.reads(text, 4)
    assert text == draw(source)
    assert {cell.execution_count for cell in notebook.cells if cell.cell_type == "code"} == {None}
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert {*notebook.metadata} == {"kernelspec", "language_info"}


@pytest.mark.filterwarnings("default")
def test_the_one_for_engineers_runs_anywhere(run, tmp_path):
    cells = run("fold_your_model.ipynb", tmp_path)
    assert "3 of 4 BatchNorms folded, 1 kept, verified" in printed(cells)
    assert 'class="bnfold"' in shown(cells)[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_one_of_the_lecture_runs_where_it_lies_and_shows_every_station(run):
    cells = run("lecture.ipynb", FOLDER)
    pictures = re.findall(r"<figure.*?<svg", "".join(shown(cells)), re.DOTALL)
    assert len(pictures) == 13
    assert "no answer yet" in printed(cells)
    assert "3 of 3 BatchNorms folded, verified" in "".join(shown(cells))


def test_solutions_are_hidden_in_jupyter_and_in_colab(draw):
    nbformat = pytest.importorskip("nbformat")
    cells = nbformat.reads(draw(FOLDER / "lecture.py"), 4).cells
    hidden = [cell for cell in cells if "hide-input" in cell.metadata.get("tags", [])]
    assert ["W2 = linear.weight" in cell.source for cell in hidden] == [False, True]
    for cell in hidden:
        assert cell.metadata.jupyter.source_hidden
        assert cell.metadata.cellView == "form"
        assert cell.source.startswith("# @title ")
