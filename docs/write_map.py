"""Write the map at the end of CONTRIBUTING.md: one line for each file, which is the first line of its docstring.

python docs/write_map.py          writes it
python docs/write_map.py --check  fails where it is out of date
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- map: written by docs/write_map.py -->\n", "<!-- end of the map -->\n"
FOLDERS = {
    "bnfold": "the library, and the only package in the wheel",
    "bnfold/onnx": "the ONNX frontend",
    "bnfold/torch": "the PyTorch frontend",
    "data": "names, vocabulary, contexts, splits",
    "train": "the lecture's nets, recipes, diagnostics and laboratory",
    "export": "from a checkpoint to ONNX, and names out of onnxruntime",
    "export/page": "a page that runs the ONNX file in the browser, and shows the fold",
    "examples/ci": "a project that holds its models to each other: tests, a commit hook, a workflow",
    "benchmarks": "everything that is claimed about speed and about other tools, to be run again",
    "docs": "the documentation site: what was decided, measured and drawn",
    "docs/guides": "a page for each use",
    "docs/notebooks": "two notebooks, and the sources that they are written from",
    "docs/reference": "the Python interface, from the docstrings",
}


ROOT_FILES = {
    "Makefile": "demo, page, test, test-all, lint, docs, bench, clean: each does its own set-up",
    "pyproject.toml": "the package, its extras, and how strict the linters are",
    "constraints.txt": "every pin",
    "mkdocs.yml": "the documentation site: its pages, and how strictly it is built",
    ".pre-commit-hooks.yaml": "`bnfold verify`, for the commit hooks of other projects",
    ".ci/run": "what continuous integration runs",
    "README.md": "what it is, on two screens",
    "CHANGELOG.md": "what users notice",
    "RELEASING.md": "how a version comes about",
    "CITATION.cff": "how to cite it",
    ".github/workflows/ci.yml": "all Pythons, and both ends of the ranges of torch and onnx",
    "SECURITY.md": "what reads what, why nothing of a file is executed, and within which limits",
    "tests/conftest.py": "what every test may use; the rest of `tests/` mirrors the packages",
}


def describe(path: Path) -> str:
    """The first sentence of a Python file's docstring, or the heading of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0].lstrip("# ")
    else:
        line = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
    return line.removesuffix(".")


def draw() -> str:
    """The whole map."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    lines = ["\n| file | |", "|---|---|"]
    lines += [f"| [`{name}`]({name}) | {says} |" for name, says in ROOT_FILES.items()]
    for folder, says in FOLDERS.items():
        lines += [f"\n**`{folder}/`** {says}\n", "| file | |", "|---|---|"]
        for name in tracked:
            path = Path(name)
            if (
                str(path.parent) == folder
                and path.suffix in (".py", ".md")
                and (says := describe(ROOT / path))
            ):
                lines.append(f"| [`{path.name}`]({name}) | {says.replace('|', '&#124;')} |")
    return "\n".join(lines) + "\n\n"


def main() -> int:
    """Write the map, or check it."""
    page = ROOT / "CONTRIBUTING.md"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    new = before + START + draw() + END + after
    if "--check" in sys.argv:
        return int(new != text)
    page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
