"""One HTML file with pictures and tables in it, that opens anywhere, offline, in light and in dark.

Nothing is loaded: pictures are SVG in data URLs, and the page around them is that of `bnfold.page`. Pictures follow the
reader's colour scheme by themselves (see `train.plots`).

A notebook shows a picture or a table that is the value of a cell, in the notebook's own ink, which follows a theme that
the browser knows nothing of.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bnfold.output import replacing
from bnfold.page import document

__all__ = ["Part", "Picture", "Section", "Table", "compose", "write_page"]


@dataclass(frozen=True)
class Picture:
    """A drawing with its title in it: `name` for its file, `caption` for the reader, `svg` its text."""

    name: str
    title: str
    caption: str
    svg: str

    def _repr_html_(self) -> str:
        drawing = re.sub(r"<style.*?</style>", "", self.svg[self.svg.index("<svg") :], flags=re.DOTALL)
        return f'<figure class="train">{_NOTEBOOK}{drawing}<figcaption>{escape(self.caption)}</figcaption></figure>'


@dataclass(frozen=True)
class Table:
    """Cells as text, (rows, headings); columns but the first and those in `words` are numbers, set to the right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: Sequence[int] = ()

    def is_text(self, column: int) -> bool:
        """Tell whether a column holds words."""
        return not column or column in self.words

    def _repr_html_(self) -> str:
        return f'<div class="train">{_NOTEBOOK}{_render_table(self)}</div>'


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Part]


Part = Picture | Table | Section | str
"""A string is a paragraph of plain text."""

_STYLE = """
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
figure { margin: 1.5rem 0; overflow-x: auto; }
figcaption, caption { color: var(--faint); text-align: left; }
img { display: block; width: 100%; height: auto; min-width: 30rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
.words { text-align: left; white-space: normal; }
th:first-child, td:first-child { padding-left: 0; }
"""

_NOTEBOOK = """<style>
.train { margin: .5em 0; overflow-x: auto; }
.train figure { margin: 0; }
.train svg { display: block; max-width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
.train figcaption, .train caption { color: inherit; opacity: .75; text-align: left; max-width: 60em; }
.train caption { white-space: nowrap; }
.train table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0; }
.train th, .train td { padding: .2em .8em; text-align: right; white-space: nowrap; }
.train .words { text-align: left; white-space: normal; min-width: 14em; }
.train .words:first-child { min-width: 0; white-space: nowrap; }
</style>""".replace(".train", ".train.train")
"""What a piece of a notebook brings along: the page's own style is not there, and Jupyter's is (see `bnfold.page`)."""


def compose(title: str, parts: Sequence[Part]) -> str:
    """Return the text of the page."""
    body = "\n".join(_render(part, 2) for part in parts)
    return document(title, body, _STYLE)


def write_page(path: str | Path, title: str, parts: Sequence[Part]) -> None:
    """Write the page in one step; an existing file survives any failure.

    Raises:
        InputError: the folder of `path` does not exist.
    """
    with replacing(path) as temporary:
        temporary.write_text(compose(title, parts), encoding="utf-8")


def _render(part: Part, level: int) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>"
    if isinstance(part, Picture):
        return _render_picture(part)
    if isinstance(part, Table):
        return _render_table(part)
    inner = "\n".join(_render(each, level + 1) for each in part.parts)
    heading = f"h{min(level, 6)}"
    return f"<section>\n<{heading}>{escape(part.title)}</{heading}>\n{inner}\n</section>"


def _render_picture(picture: Picture) -> str:
    source = b64encode(picture.svg.encode()).decode()
    return (
        f'<figure>\n<img alt="{escape(picture.title)}" src="data:image/svg+xml;base64,{source}">\n'
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"
    )


def _render_table(table: Table) -> str:
    caption = f"<caption>{escape(table.caption)}</caption>\n" if table.caption else ""
    rows = "\n".join(_render_row("td", table, row) for row in table.rows)
    return f"<figure><table>\n{caption}{_render_row('th', table, table.headings)}\n{rows}\n</table></figure>"


def _render_row(tag: str, table: Table, cells: Sequence[str]) -> str:
    marks = (' class="words"' if table.is_text(column) else "" for column in range(len(cells)))
    row = "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))
    return f"<tr>{row}</tr>"
