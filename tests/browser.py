"""A page in headless Chromium, where there is one: what it prints, logs and shows, and how well that can be read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest

LIGHT, DARK = 1, 0
"""The colour scheme that a reader prefers, as Chromium counts them."""

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)

needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="there is no Chromium here (chromium, chromium-browser or google-chrome)"
)


def browse(path: Path, profile: Path, scheme: int, *options: str) -> tuple[str, str]:
    """Return what Chromium prints, and what it logs."""
    command = [BROWSER, *OPTIONS.split(), f"--user-data-dir={profile / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


_JUPYTER = """<!doctype html>
<style>
.jp-RenderedHTMLCommon td, .jp-RenderedHTMLCommon th { white-space: normal; max-width: none; border: none; }
:not(.jp-RenderedMarkdown).jp-RenderedHTMLCommon td, :not(.jp-RenderedMarkdown).jp-RenderedHTMLCommon th
  { text-align: right; }
.jp-OutputArea-output dt { font-weight: bold; float: left; width: 20%; }
.jp-OutputArea-output dd { float: left; width: 80%; }
</style>
<div class="jp-RenderedHTMLCommon jp-OutputArea-output">PIECE</div>
<pre id="found"></pre>
<script>
const styles = [...document.querySelectorAll("SELECTOR")].map(each => getComputedStyle(each).PROPERTY);
document.getElementById("found").textContent = JSON.stringify(styles);
</script>"""
"""Some of what JupyterLab says of the tables and lists in an output."""


def style_in_jupyter(piece: str, folder: Path, selector: str, name: str) -> set[str]:
    """What a property of the elements of a piece is, where it stands in the output of a notebook."""
    page = _JUPYTER.replace("SELECTOR", selector).replace("PROPERTY", name).replace("PIECE", piece)
    (folder / "jupyter.html").write_text(page, encoding="utf-8")
    dom, _ = browse(folder / "jupyter.html", folder, LIGHT, "--dump-dom")
    return set(json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1])))


_PROBE = """<!doctype html>
<meta charset="utf-8">
<style>html { color-scheme: light dark } iframe { border: 0; height: 900px }</style>
<pre id="found"></pre>
<script>
function look(frame, width) {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const colours = new Set(), shown = [], clipped = [];
  for (const details of page.querySelectorAll("details")) details.open = true;
  const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const holder = texts.currentNode.parentElement, style = view.getComputedStyle(holder);
    if (!texts.currentNode.data.trim() || holder.closest("style")) continue;
    const range = page.createRange(), layers = [];
    range.selectNodeContents(texts.currentNode);
    const box = range.getBoundingClientRect();
    const visible = box.width && box.height && style.visibility == "visible";
    const inside = holder.closest(".wide") || (box.left >= 0 && box.right <= width);
    (visible && inside ? shown : clipped).push(texts.currentNode.data);
    for (let each = holder; each; each = each.parentElement) {
      const below = view.getComputedStyle(each);
      layers.push([below.backgroundColor, below.opacity]);
    }
    colours.add(JSON.stringify([style.color, layers]));
  }
  const headings = [...page.querySelectorAll("h2")].filter(each => each.getBoundingClientRect().height > 10);
  return {
    width, shown, clipped, headings: headings.map(each => each.textContent),
    colours: [...colours].map(JSON.parse), paper: view.getComputedStyle(page.body).backgroundColor,
    scroll: root.scrollWidth, loaded: view.performance.getEntriesByType("resource").length,
    strangers: page.querySelectorAll("script, img, iframe, link, object").length,
  };
}
Promise.all(PAGES.flatMap(html => [360, 1100].map(width => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px";
  frame.onload = () => done(look(frame, width));
  frame.srcdoc = html;
  document.body.append(frame);
})))).then(all => {
  for (const frame of [...document.querySelectorAll("iframe")]) frame.remove();
  document.getElementById("found").textContent = JSON.stringify(all);
});
</script>"""


def look(pages: Sequence[str], folder: Path, scheme: int) -> list[dict[str, Any]]:
    """What each page shows in frames of 360 and of 1,100 pixels, with all its lists open; nothing may be complained of.

    `shown` and `clipped` are texts, `colours` pairs of a text's colour and what is painted below it, from the text
    outwards: a colour and an opacity each.
    """
    data = json.dumps(list(pages)).replace("<", "\\u003c")
    (folder / "probe.html").write_text(_PROBE.replace("PAGES", data), encoding="utf-8")
    dom, log = browse(folder / "probe.html", folder, scheme, "--dump-dom", "--virtual-time-budget=5000")
    assert "CONSOLE" not in log, log
    return json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))


def readability(colour: str, layers: Sequence[tuple[str, str]]) -> float:
    """The contrast of a text with all that is painted below it."""
    paper, cover = [0.0, 0.0, 0.0], 1.0
    for background, opacity in layers:
        assert opacity == "1", "how legible that is depends on what is below"
        *paint, alpha = _numbers(background)
        paper = [seen + cover * alpha * channel for seen, channel in zip(paper, paint, strict=True)]
        cover *= 1 - alpha
    assert cover < 1e-6, "what is below the page is not known"
    *ink, alpha = _numbers(colour)
    return contrast([alpha * i + (1 - alpha) * p for i, p in zip(ink, paper, strict=True)], paper)


def _numbers(colour: str) -> list[float]:
    """Red, green, blue and alpha of a colour as a browser computes it."""
    found = [float(number) for number in re.fullmatch(r"rgba?\((.*)\)", colour)[1].split(",")]
    return found if len(found) == 4 else [*found, 1.0]


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """How far two colours (red, green, blue, to 255) stand apart, as WCAG 2 counts: from 1 to 21."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: Sequence[float]) -> float:
    parts = (value / 255 for value in colour)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
