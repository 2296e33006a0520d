"""The pictures of `docs/merge.md` are those that its script draws, and show what merging computes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = DOCS / "draw_merge.py"


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("matplotlib")
    return runpy.run_path(str(SCRIPT))


def test_every_picture_is_drawn_and_shown(script):
    shown = (DOCS / "merge.md").read_text(encoding="utf-8")
    assert all(f"pictures/merge/{name}.svg" in shown for name in script["PICTURES"])
    assert {path.stem for path in (DOCS / "pictures" / "merge").glob("*.svg")} == set(script["PICTURES"])


def test_the_sum_in_the_picture_is_the_sum_of_its_terms(script):
    """The centre of 3x3, 1x1 and identity: 0.8 + 0.7 + 1; all other taps are those of the 3x3."""
    *_, total = script["PICTURES"]["sum"].kernels
    weight = total.numbers(None)[0][0, 0, 0]
    assert weight[1, 1] == pytest.approx(2.5)
    assert weight[0].tolist() == [0.2, 0.5, 0.1]


def test_the_script_draws_into_any_folder(script, tmp_path):
    script["main"](tmp_path)
    assert len(list(tmp_path.glob("*.svg"))) == len(script["PICTURES"])
