"""docs/lecture.md: its commands are commands, its pictures are there, and no recipe or experiment is missing."""

from __future__ import annotations

import re
import shlex

from tests.conftest import CHECKOUT
from train import lab, resnet
from train.__main__ import parse
from train.experiments import EXPERIMENTS
from train.recipes import RECIPES

PAGE = (CHECKOUT / "docs" / "lecture.md").read_text(encoding="utf-8")
PARSERS = {"train": parse, "train.lab": lab.parse, "train.resnet": resnet.parse}


def test_every_command_of_its_own_is_one():
    found = re.findall(r"(?:^    |`)python -m (train[.\w]*)([^`#\n]*)", PAGE, re.MULTILINE)
    assert len(found) > 10
    for module, arguments in found:
        if module in PARSERS:
            PARSERS[module](["scale" if one == "NAME" else one for one in shlex.split(arguments)])
    for arguments in re.findall(r"\| `(--recipe [^`]*)` \|", PAGE):
        assert parse(arguments.split()).recipe in RECIPES


def test_every_picture_is_there_and_shown():
    shown = set(re.findall(r"\]\((pictures/lecture/[\w-]+\.svg)\)", PAGE))
    assert shown == {
        f"pictures/lecture/{path.name}" for path in (CHECKOUT / "docs/pictures/lecture").iterdir()
    }


def test_no_recipe_and_no_experiment_is_missing():
    for name in {*RECIPES, *EXPERIMENTS}:
        assert f"`{name}`" in PAGE or f"--recipe {name}`" in PAGE or f"--experiment {name}`" in PAGE, name


def test_its_reference_figures_are_those_of_the_recipes():
    rows = {match[1]: match[0] for match in re.finditer(r"^\|.*`--recipe ([\w-]+)`.*$", PAGE, re.MULTILINE)}
    for name, row in rows.items():
        for value in RECIPES[name].reference.values():
            assert re.search(rf"\| {value:.4f}".rstrip("0") + "0* ", row), (name, value)
