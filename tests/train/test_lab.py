"""python -m train.lab: one table, one page."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.train.names import NAMES
from train import lab
from train.recipes import RECIPES


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in an empty folder with a short list."""
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_table(text):
    """Return the cells of the printed rows by recipe."""
    lines = (re.split(r" {2,}", line.strip()) for line in text.splitlines())
    return {cells[0]: cells[1:] for cells in lines if cells[0] in RECIPES}


def test_recipes_become_rows_and_sections_of_a_page(folder, capsys):
    arguments = ["kaiming", "zeros", "linear", "--steps", "6", "--names", "names.txt", "--seed", "3"]
    assert lab.main(arguments) == 0
    table = read_table(capsys.readouterr().out)
    assert list(table) == ["kaiming", "zeros", "linear"]
    assert table["kaiming"][0] == "6 of 200,000"
    assert table["zeros"][0] == "6 of 5,000"
    page = (folder / "lab.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == list(table)
    assert page.count("<img ") == 1 + 3 + 3 + 3
    assert all(cell in page for cells in table.values() for cell in cells[:4])


def test_a_row_holds_what_the_run_gave(folder):
    from train.evaluate import measure
    from train.material import prepare

    material = prepare(NAMES)
    recipe = replace(RECIPES["deep"], hidden=8)
    found = lab.perform(recipe, material, 3, 12)
    assert found.recipe.steps == len(found.diagnostics.losses) == 12
    row = found.row
    assert row[:2] == ("deep", "12 of 200,000")
    assert row[2:5] == tuple(f"{value:.4f}" for value in (found.diagnostics.losses[0], *found.losses))
    again = lab.perform(recipe, material, 3, 12)
    assert again.row == row
    assert found.losses[0] != measure(
        lab.make(recipe, material, lab.Generator().manual_seed(3)), material.train
    )
    least, most = re.fullmatch(r"([\d.]+)-([\d.]+)%", row[5]).groups()
    shares = [100 * layer.saturated for layer in found.diagnostics.records[-1].layers]
    assert (float(least), float(most)) == pytest.approx((min(shares), max(shares)), abs=0.051)


def test_a_run_that_diverges_is_a_row_that_says_so(folder, capsys, monkeypatch):
    monkeypatch.setitem(RECIPES, "relu", replace(RECIPES["relu"], rate=1e38))
    assert lab.main(["relu", "tanh", "--steps", "9", "--names", "names.txt"]) == 0
    table = read_table(capsys.readouterr().out)
    assert "diverged" in table["relu"]
    assert "diverged" not in table["tanh"]
    assert "lower the learning rate" in (folder / "lab.html").read_text()


def test_an_experiment_prints_its_table_and_writes_nothing(folder, capsys):
    assert lab.main(["--experiment", "scale", "--names", "names.txt"]) == 0
    assert "5/3 / sqrt(10)" in capsys.readouterr().out
    assert not (folder / "lab.html").exists()


def test_everything_is_listed(folder, capsys):
    assert lab.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*RECIPES, *lab.EXPERIMENTS])


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["soup"], "there is no recipe soup"),
        (["--experiment", "soup"], "soup"),
        (["--steps", "0"], "0 is less than 1"),
        (["--names", "missing.txt", "tanh"], "missing.txt"),
        (["-o", "nowhere/lab.html", "tanh"], "nowhere is no folder"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, fragment, capsys):
    try:
        code = lab.main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert (code, len(error.splitlines())) == (2, 1)
    assert fragment in error


@pytest.mark.slow
def test_the_quick_laboratory_runs_everything(folder, capsys):
    assert lab.main(["--quick"]) == 0
    table = read_table(capsys.readouterr().out)
    assert set(table) == set(RECIPES)
    assert not any("diverged" in cells for cells in table.values())
    page = (folder / "lab.html").read_text()
    assert all(f"<h2>{name}</h2>" in page for name in [*RECIPES, *lab.EXPERIMENTS])
