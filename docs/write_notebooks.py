"""Write the notebooks in docs/notebooks from the Python files beside them, which are what is edited.

python docs/write_notebooks.py          writes them
python docs/write_notebooks.py --check  fails where one is out of date

A source is in jupytext's percent format, its texts as strings. A notebook has no outputs, and nothing in it depends on
when or where it was written: a cell's id is made of its text, so it stays when cells before it come and go.
"""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEPT = ("cellView", "jupyter", "tags")
"""What a cell may say of itself; the last two hide a solution in Jupyter, the first one does in Colab."""


def draw(source: Path) -> str:
    """The notebook of a source, as it stands in its file."""
    notebook = jupytext.read(source)
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.id = sha256(f"{cell.cell_type} {cell.source}".encode()).hexdigest()[:12]
        cell.metadata = {name: cell.metadata[name] for name in KEPT if name in cell.metadata}
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def main() -> int:
    """Write them, or check them."""
    due = 0
    for source in sorted(FOLDER.glob("*.py")):
        target, new = source.with_suffix(".ipynb"), draw(source)
        if "--check" not in sys.argv:
            target.write_text(new, encoding="utf-8")
        due |= not target.exists() or target.read_text(encoding="utf-8") != new
    return int(due)


if __name__ == "__main__":
    sys.exit(main())
