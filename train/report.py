"""What a run shows: a bar while it trains, a table when it has trained. Numbers come from elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from train import page
from train.recipes import Recipe

__all__ = ["Bar", "open_console", "print_losses", "print_recipes", "print_table"]

_REFRESH_SECONDS = 0.1
_SMOOTHING = 0.98
_WIDTH = 130


def open_console(quiet: bool = False) -> Console:
    """Return a console on stdout, wide where that is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH, quiet=quiet)


class Bar:
    """A progress bar on stderr with the smoothed loss and the steps per second; silent where that is no terminal."""

    def __init__(self, title: str, steps: int, done: int = 0) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[pace]:,.0f} steps/s"),
            TimeRemainingColumn(),
        )
        silent = not console.is_terminal
        self._progress = Progress(*columns, console=console, auto_refresh=False, disable=silent)
        self._task = self._progress.add_task(title, total=steps, loss="", pace=0.0)
        self._smooth = 0.0
        self._done = self._before = done
        self._begun = self._drawn = time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._draw(time.monotonic())
        self._progress.stop()

    def advance(self, loss: float) -> None:
        """Count a step; redraw if the last time was long enough ago."""
        self._done += 1
        self._smooth += (1 - _SMOOTHING) * (loss - self._smooth)
        now = time.monotonic()
        if now - self._drawn > _REFRESH_SECONDS:
            self._draw(now)

    def _draw(self, now: float) -> None:
        self._drawn = now
        loss = self._smooth / (1 - _SMOOTHING ** max(self._done - self._before, 1))
        pace = (self._done - self._before) / max(now - self._begun, 1e-9)
        self._progress.update(self._task, completed=self._done, loss=f"{loss:.4f}", pace=pace, refresh=True)


def print_losses(console: Console, rows: Mapping[str, Mapping[str, float | None]]) -> None:
    """Print one row for each entry: its name, then the losses on train, dev and test; None leaves a gap."""
    table = Table()
    table.add_column("loss, nats per character")
    for part in ("train", "dev", "test"):
        table.add_column(part, justify="right")
    for name, losses in rows.items():
        cells = (losses.get(part) for part in ("train", "dev", "test"))
        table.add_row(name, *("" if cell is None else f"{cell:.4f}" for cell in cells))
    console.print(table)


def print_table(console: Console, table: page.Table) -> None:
    """Print the same table that a page shows."""
    if table.caption:
        console.print(f"\n{escape(table.caption)}", soft_wrap=True)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, heading in enumerate(table.headings):
        shown.add_column(heading, justify="left" if table.is_text(column) else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)


def print_recipes(console: Console, recipes: Mapping[str, Recipe]) -> None:
    """Print one row for each recipe: its name, its steps, what it is, and what one should see."""
    table = Table("recipe", "steps", "what it is", "what one should see")
    for recipe in recipes.values():
        table.add_row(recipe.name, f"{recipe.steps:,}", recipe.summary, recipe.expect)
    console.print(table)
