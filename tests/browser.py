"""A page in headless Chromium, where there is one: what it prints and logs, and whether its colours can be read."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

LIGHT, DARK = 1, 0
"""The colour scheme that a reader prefers, as Chromium counts them."""

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_QUIET = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")

needs_browser = pytest.mark.skipif(
    _BROWSER is None, reason="there is no Chromium here (chromium, chromium-browser or google-chrome)"
)


def browse(path: Path, profile: Path, scheme: int, *options: str) -> tuple[str, str]:
    """Return what Chromium prints, and what it logs."""
    command = [_BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--{name}" for name in _QUIET]
    command += [f"--user-data-dir={profile / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"]
    done = subprocess.run(
        [*command, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, done.stderr


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """How far two colours (red, green, blue, to 255) stand apart, as WCAG 2 counts: from 1 to 21."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: Sequence[float]) -> float:
    parts = (value / 255 for value in colour)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
