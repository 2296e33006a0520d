"""The whole road as a reader walks it: the commands of the README in an empty folder, and the README's own code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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


def test_the_python_of_the_readme_runs(road, monkeypatch):
    monkeypatch.chdir(road)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_map_of_the_repository_is_up_to_date():
    if not (ROOT / ".git").exists():
        pytest.skip("the map lists what git tracks")
    subprocess.run([sys.executable, str(ROOT / "docs" / "write_map.py"), "--check"], check=True)
