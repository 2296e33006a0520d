"""What is installed: the wheel holds bnfold alone, and all that the project needs is pinned."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from itertools import chain
from pathlib import Path
from shutil import copytree, ignore_patterns
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parent.parent
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that nothing is left in the checkout."""
    pytest.importorskip("setuptools", minversion="77.0.3")
    copy, output = tmp_path_factory.mktemp("copy") / "bnfold", tmp_path_factory.mktemp("wheel")
    copytree(CHECKOUT, copy, ignore=ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", output, copy]
    subprocess.run(build, check=True, capture_output=True)
    return next(output.glob("*.whl"))


def test_the_wheel_holds_bnfold_alone_and_its_types(wheel):
    files = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in files} == {"bnfold"}
    sources = {path.relative_to(CHECKOUT).as_posix() for path in CHECKOUT.glob("bnfold/**/*.py")}
    assert files == sources | {"bnfold/py.typed"}


def test_the_wheel_says_who_may_use_it_and_what_it_needs(wheel):
    archive = ZipFile(wheel)
    folder = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    metadata = archive.read(f"{folder}/METADATA").decode()
    assert "License-Expression: MIT" in metadata
    assert f"{folder}/licenses/LICENSE" in archive.namelist()
    needs = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)]
    assert [need.name for need in needs if need.marker is None] == ["numpy"]
    assert "bnfold = bnfold.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()


def test_pytest_finds_the_plugin_of_the_wheel_by_itself(wheel, tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it(assert_equivalent):\n    assert_equivalent(1, 2)\n")
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path]
    variables = os.environ | {"PYTHONPATH": str(wheel)}
    ran = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "int is neither an nn.Module nor an ONNX model" in ran.stdout


def test_the_wheel_works_without_the_checkout(wheel, run_module, tmp_path):
    (tmp_path / "probe.py").write_text("import bnfold; print(bnfold.__file__, bnfold.__version__)")
    result = run_module("probe", PYTHONPATH=wheel)
    assert result.stdout.split() == [f"{wheel}/bnfold/__init__.py", wheel.name.split("-")[1]], result.stderr


def read_pins() -> dict[str, Requirement]:
    """The constraints by canonical name."""
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def walk(requirement: Requirement) -> set[str]:
    """The canonical names of all that `requirement` needs on this machine, itself included."""
    names, queue = set(), [requirement]
    while queue:
        need = queue.pop()
        name = canonicalize_name(need.name)
        if name == "bnfold":
            lists = [
                PROJECT["dependencies"],
                *(PROJECT["optional-dependencies"][extra] for extra in need.extras),
            ]
            queue += [Requirement(line) for lines in lists for line in lines]
        elif name not in names:
            names.add(name)
            try:
                found = [Requirement(line) for line in requires(name) or ()]
            except PackageNotFoundError:
                pytest.skip(f"{name} is not installed, so what it needs is not known")
            queue += [need for need in found if need.marker is None or need.marker.evaluate({"extra": ""})]
    return names


def test_every_distribution_that_a_make_target_installs_is_pinned():
    assert walk(Requirement("bnfold[dev]")) - set(read_pins()) == set()


def test_every_pin_is_exact_and_no_build_of_one_machine():
    for pin in read_pins().values():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"{pin} is no exact public version"


def test_every_pin_lies_in_the_range_that_the_project_declares():
    pins = read_pins()
    declared = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for need in map(Requirement, declared):
        if need.name != "bnfold":
            version = str(pins[canonicalize_name(need.name)].specifier).removeprefix("==")
            assert need.specifier.contains(version), f"{need} does not allow the pinned {version}"
