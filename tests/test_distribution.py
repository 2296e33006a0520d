"""What is installed: both distributions are built, hold what they should, and work where the checkout is not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from itertools import chain
from pathlib import Path
from shutil import copyfile, copytree, ignore_patterns
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parent.parent
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of what `python -m build` makes of a repository of these files, tagged v9.8.7."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools_scm")
    pytest.importorskip("setuptools", minversion="80")
    copy, output = tmp_path_factory.mktemp("copy") / "bnfold", tmp_path_factory.mktemp("dist")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=CHECKOUT, capture_output=True, text=True, check=False).stdout.split(
        "\0"
    )
    if names == [""]:
        pytest.skip("what belongs to the project is what git tracks")
    for name in filter(lambda name: (CHECKOUT / name).is_file(), names):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        copyfile(CHECKOUT / name, copy / name)
    run_git(copy, "init -q", "add -A", "-c user.name=x -c user.email=x@y.z commit -q -m all", "tag v9.8.7")
    build(copy, output)
    return output


def run_git(folder: Path, *commands: str) -> None:
    for command in commands:
        subprocess.run(["git", *command.split()], cwd=folder, check=True, capture_output=True)


def build(source: Path, output: Path, *options: str) -> None:
    """Build both, the wheel from the sdist, with the tools that are installed."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, *options, source]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(built):
    return next(built.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """The Python of an environment with the wheel, before what this one has, which stands for its dependencies."""
    folder = tmp_path_factory.mktemp("fresh")
    python = make_environment(folder)
    install(python, "--no-index", "--no-deps", wheel)
    (next(folder.glob("lib/python*/site-packages")) / "borrowed.pth").write_text("\n".join(borrowed()))
    return python


def make_environment(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def install(python: Path, *arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def borrowed() -> list[str]:
    """Where this environment's packages lie, without the checkout."""
    return [path for path in sys.path if path.endswith("site-packages")]


def run_away(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command where no variable leads to the checkout."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    line = [str(word) for word in command]
    return subprocess.run(line, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_the_version_is_the_tag(wheel, sdist, fresh, tmp_path):
    assert (wheel.name, sdist.name) == ("bnfold-9.8.7-py3-none-any.whl", "bnfold-9.8.7.tar.gz")
    assert run_away(tmp_path, fresh.with_name("bnfold"), "--version").stdout == "bnfold 9.8.7\n"


@pytest.mark.parametrize("git", [False, True], ids=["without git", "without a tag"])
def test_a_version_is_found_without_a_tag(git, tmp_path):
    pytest.importorskip("setuptools_scm")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copyfile(CHECKOUT / name, tmp_path / name)
    (tmp_path / "bnfold").mkdir()
    (tmp_path / "bnfold" / "__init__.py").touch()
    if git:
        run_git(tmp_path, "init -q", "add -A", "-c user.name=x -c user.email=x@y.z commit -q -m all")
    command = [sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_wheel('.'))"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert re.search(r"bnfold-0\.1\.0\.(dev1\+g\w+|dev0)-py3-none-any\.whl\n$", made), made
    assert ("+g" in made) == git


def test_a_checkout_that_was_never_installed_says_so(tmp_path):
    copytree(CHECKOUT / "bnfold", tmp_path / "bnfold", ignore=ignore_patterns("__pycache__"))
    ran = run_away(tmp_path, sys.executable, "-S", "-c", "import bnfold; print(bnfold.__version__)")
    assert ran.stdout == "0+checkout\n", ran.stderr


def test_the_sdist_holds_what_it_takes_to_test_and_to_document(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    asked = "bnfold/py.typed tests/conftest.py docs/why.md mkdocs.yml constraints.txt Makefile SECURITY.md CITATION.cff"
    assert set(asked.split()) <= names


def test_what_is_installed_folds_a_file_without_the_checkout(fresh, tmp_path):
    (tmp_path / "make.py").write_text(MAKE)
    made = run_away(tmp_path, fresh, "-W", "error", "make.py")
    assert made.returncode == 0, made.stderr
    assert "site-packages" in made.stdout
    assert str(CHECKOUT) not in made.stdout
    folded = run_away(tmp_path, fresh.with_name("bnfold"), "fold", "net.onnx")
    assert folded.returncode == 0, folded.stderr
    assert "1 of 1 BatchNorm folded, verified" in folded.stdout
    same = run_away(tmp_path, fresh.with_name("bnfold"), "verify", "net.onnx", "net.folded.onnx")
    assert same.returncode == 0, same.stderr


def test_what_is_installed_folds_a_module_without_the_checkout(fresh, tmp_path):
    pytest.importorskip("torch")
    ran = run_away(tmp_path, fresh, "-c", MODULE)
    assert ran.stdout == "folded ('0',)\n", ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_from_the_index_where_there_is_nothing_else(kind, request, tmp_path):
    """Downloads onnx and what it needs. torch is left out: hundreds of megabytes for one more import."""
    python = make_environment(tmp_path / "environment")
    file = request.getfixturevalue(kind)
    install(python, "--constraint", CHECKOUT / "constraints.txt", f"bnfold[onnx] @ {file.as_uri()}")
    (tmp_path / "make.py").write_text(MAKE)
    assert run_away(tmp_path, python, "make.py").returncode == 0
    folded = run_away(tmp_path, python.with_name("bnfold"), "fold", "net.onnx")
    assert "1 of 1 BatchNorm folded, verified" in folded.stdout, folded.stderr
    other = run_away(tmp_path, python.with_name("bnfold"), "fold", "net.pt")
    assert other.returncode == 2
    assert len(other.stderr.splitlines()) == 1


MAKE = """
import bnfold, numpy as np, onnx.helper as h, onnx
arrays = dict(w=np.eye(2), g=np.ones(2), b=np.ones(2), m=np.zeros(2), v=np.ones(2))
stored = [onnx.numpy_helper.from_array(array.astype("f"), name) for name, array in arrays.items()]
nodes = [h.make_node("MatMul", ["x", "w"], ["y"]), h.make_node("BatchNormalization", [*"ygbmv"], ["z"])]
x, z = (h.make_tensor_value_info(name, 1, ["n", 2]) for name in "xz")
made = h.make_model(h.make_graph(nodes, "net", [x], [z], stored), opset_imports=[h.make_opsetid("", 21)], ir_version=10)
onnx.save(made, "net.onnx")
print(bnfold.__file__)
"""
MODULE = """
import bnfold, torch
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval()
verdict = bnfold.fold(net, torch.randn(2, 3))[1].verdicts[0]
print(verdict.outcome, verdict.into)
"""


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


@pytest.mark.slow
def test_the_first_cell_of_the_lecture_fetches_the_sources_where_there_is_no_checkout(sdist, tmp_path):
    """As in Colab, but with the sdist of this checkout and the packages of this environment; once, and again."""
    notebook = json.loads((CHECKOUT / "docs" / "notebooks" / "lecture.ipynb").read_text(encoding="utf-8"))
    code = next("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    where = "import data, train.lab\nprint(data.__file__, train.__file__)"
    (tmp_path / "cell.py").write_text(f"{code}\n{where}\n")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "environment"], check=True)
    packages = next((tmp_path / "environment").glob("lib/python*/site-packages"))
    (packages / "borrowed.pth").write_text(f"import sys; sys.path[1:1] = {borrowed()!r}\n")
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": sdist.parent,
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
    }
    line = ["env", *(f"{name}={value}" for name, value in offline.items())]
    for _ in range(2):
        ran = run_away(tmp_path, *line, tmp_path / "environment" / "bin" / "python", "cell.py")
        assert ran.returncode == 0, ran.stderr
        assert set(map(Path, ran.stdout.split()[-2:])) == {
            tmp_path / "bnfold-9.8.7" / name / "__init__.py" for name in ("data", "train")
        }


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


def test_all_stands_for_what_folds_every_kind_of_file():
    extras = PROJECT["optional-dependencies"]
    found = walk(Requirement("bnfold[all]"))
    assert {"torch", "onnx", "onnxruntime", "safetensors", "rich"} <= found
    assert extras["all"][0] == "bnfold[torch,onnx]"


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


def test_the_workflow_tests_the_declared_pythons_and_the_lower_ends_of_the_ranges():
    workflow = (CHECKOUT / ".github" / "workflows" / "ci.yml").read_text()
    declared = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert set(re.findall(r"\"(3\.\d+)\"", workflow)) == set(declared)
    oldest = dict(re.findall(r"(\S+?)==(\S+)", re.search(r"install: (numpy==.*)", workflow)[1]))
    lists = [
        PROJECT["dependencies"],
        *(PROJECT["optional-dependencies"][extra] for extra in ("torch", "onnx")),
    ]
    for need in {need.name: need for line in chain(*lists) for need in [Requirement(line)]}.values():
        low = next(iter(need.specifier)).version
        assert oldest[need.name].removesuffix(".*").startswith(low), need
