"""The whole road as a reader walks it: the commands of the README in an empty folder, and the code of the pages."""

import re
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/first_steps.md", "docs/why.md", *(f"docs/guides/{name}.md" for name in (
    "fold_a_file", "fold_a_module", "in_ci", "before_quantisation", "for_the_lecture",
))]  # fmt: skip


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the road was walked; what each command said lies beside what it made."""
    folder = tmp_path_factory.mktemp("road")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for number, line in enumerate(
        re.findall(r"^python -m (?:train|bnfold\.fold ckpt|export).*$", text, re.MULTILINE)
    ):
        words = line.partition("#")[0].split()
        done = subprocess.run(
            [sys.executable, "-W", "error", *words[1:]],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert "Warning" not in done.stderr
        (folder / f"said{number}.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def test_the_commands_of_the_readme_work_in_an_empty_folder(road):
    assert {"ckpt.pt", "ckpt.folded.pt", "ckpt.onnx"} <= {path.name for path in road.iterdir()}
    assert "all 19,683" in (road / "said1.txt").read_text()
    assert "3 of 3 BatchNorms folded, verified" in (road / "said1.txt").read_text()
    assert "nodes: Gather, Flatten, 3 Gemm, 2 Tanh" in (road / "said2.txt").read_text()
    assert "wrote ckpt.onnx" in (road / "said2.txt").read_text()
    assert len((road / "said3.txt").read_text().split()) == 20


def test_the_readme_shows_what_the_fold_prints(road):
    """But for its numbers, which depend on the processor that trained."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("$ python -m bnfold.fold ckpt.pt\n")[2].partition("\n\n$ ")[0]
    said = (road / "said1.txt").read_text(encoding="utf-8").strip()
    assert re.sub(r"[0-9]", "0", said) == re.sub(r"[0-9]", "0", shown)


def test_the_readme_is_short_and_has_the_road_in_one_piece():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    commands = [line for line in lines if line.startswith(("make ", "python -m "))]
    assert [line.partition("  ")[0] for line in commands[:5]] == [
        "make demo", "make test", "python -m train", "python -m bnfold.fold ckpt.pt", "python -m export",
    ]  # fmt: skip


def test_every_guide_is_read_here():
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in found if "```python" in (ROOT / page).read_text(encoding="utf-8")} <= {*PAGES}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, road, tmp_path, monkeypatch):
    """From top to bottom, in a folder of its own with the files of the road."""
    copytree(road, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_the_map_of_the_repository_is_up_to_date():
    if not (ROOT / ".git").exists():
        pytest.skip("the map lists what git tracks")
    subprocess.run([sys.executable, str(ROOT / "docs" / "write_map.py"), "--check"], check=True)
