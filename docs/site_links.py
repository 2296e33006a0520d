"""What the documentation site takes from outside of docs/: pages of the root, and what becomes of links to the code.

A page links to files as they lie in the repository, so that it can be read there, too. On the site a link to a page
goes to it; one to any other file goes to the repository where mkdocs.yml names one (`repo_url`), and else is its text.
A link to a file that does not exist is a warning, which a strict build does not let pass.
"""

from __future__ import annotations

import logging
import re
from os.path import normpath, relpath
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "project/contributing.md": "CONTRIBUTING.md",
    "project/releasing.md": "RELEASING.md",
    "project/security.md": "SECURITY.md",
    "project/changelog.md": "CHANGELOG.md",
    "guides/example_project.md": "examples/ci/README.md",
}
"""Pages of the site, by the file of the repository that they are."""

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
USAGE = "<!-- usage -->"
log = logging.getLogger("mkdocs.hooks.site_links")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links of a page at what they mean on the site."""
    path = page.file.src_uri
    parts = FENCE.split(markdown.replace(USAGE, _usage() if USAGE in markdown else ""))
    return "".join(
        part if part.startswith("```") else _redirect(part, path, config.repo_url) for part in parts
    )


def _redirect(text: str, path: str, repository: str | None) -> str:
    """The text of a page with other targets."""

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        found = _place(path, target)
        if found is not None:
            return f"[{label}]({relpath(found, PurePosixPath(path).parent)}{anchor})"
        source = _source(path, target)
        if not (ROOT / source).exists():
            log.warning("%s links to %s, and there is no such file", path, target)
        return f"[{label}]({repository.rstrip('/')}/blob/main/{source})" if repository else label

    return LINK.sub(link, text)


def _source(path: str, target: str) -> str:
    """The file of the repository that a link of a page leads to."""
    here = PurePosixPath(PAGES.get(path, f"docs/{path}")).parent
    return PurePosixPath(normpath(here / target)).as_posix()


def _place(path: str, target: str) -> str | None:
    """The page of the site that a link leads to; None where it leads out of it."""
    source = _source(path, target)
    pages = {file: page for page, file in PAGES.items()}
    if source.startswith("docs/") and not source.endswith(".py"):
        return source.removeprefix("docs/")
    return pages.get(source)


def _usage() -> str:
    """What both commands say of themselves."""
    from bnfold.fold import _parser as fold
    from bnfold.verify import _parser as verify

    usages = {"bnfold fold": fold(), "bnfold verify": verify()}
    return "\n\n".join(f"## {name}\n\n```\n{parser.format_help()}```" for name, parser in usages.items())
