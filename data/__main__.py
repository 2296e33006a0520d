"""python -m data: what a list of names holds, and a download of the lecture's own list.

    python -m data [show] [--names FILE|makemore] [--context 3]   a table of counts and reference losses
    python -m data fetch makemore [--url URL]                     the lecture's list, into the cache

Exit code 0, or 2 with one line on stderr where a list cannot be used or fetched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bnfold.command import Parser
from bnfold.errors import run_command
from data.contexts import contexts, split
from data.fetch import MAKEMORE_URL, fetch_makemore
from data.names import DEFAULT_LIST, is_makemore, locate_makemore, read_names
from data.reference import conditional_entropy, count_distinct, uniform_loss, unigram_loss
from data.vocabulary import Vocabulary


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line; without a command it is `show`."""
    parser = Parser(prog="python -m data", description="What a list of names holds.")
    parser.set_defaults(run=show, names=None, context=3)
    commands = parser.add_subparsers(title="commands")
    table = commands.add_parser("show", help="counts and reference losses of a list (the default)")
    table.add_argument("--names", help="a UTF-8 file with one name on a line, or makemore", metavar="FILE")
    table.add_argument("--context", type=int, default=3, help="characters of context (3)", metavar="N")
    download = commands.add_parser("fetch", help="download a list into the cache")
    download.add_argument("list", choices=["makemore"], help="the lecture's own 32,033 names")
    download.add_argument("--url", default=MAKEMORE_URL, help="where to fetch it from instead")
    download.set_defaults(run=fetch)
    return parser.parse_args(arguments)


def show(options: argparse.Namespace) -> None:
    """Print the table of a list: names, examples, distinct contexts and unigram loss of each part."""
    names = read_names(options.names)
    vocabulary = Vocabulary.from_names(names)
    parts = split(names)
    examples = [contexts(part, vocabulary, options.context) for part in parts]
    table = Table(title=f"{options.names or DEFAULT_LIST.name}: {len(names):,} names", title_justify="left")
    table.add_column("part")
    for heading in ("names", "examples", "distinct contexts", "unigram loss"):
        table.add_column(heading, justify="right")
    train_x, train_y = examples[0]
    for name, part, (x, y) in zip(parts._fields, parts, examples, strict=True):
        loss = f"{unigram_loss(train_y, y):.4f}"
        table.add_row(name, f"{len(part):,}", f"{len(y):,}", f"{count_distinct(x):,}", loss)
    console = Console(highlight=False, markup=False)
    console.print(table)
    size, length = len(vocabulary), options.context
    console.print(f"vocabulary   {size} characters, {vocabulary.terminator!r} ends a name", soft_wrap=True)
    console.print(f"contexts     {size**length:,} of {length} characters can be written", soft_wrap=True)
    console.print(f"uniform      {uniform_loss(size):.4f}, the loss of knowing nothing", soft_wrap=True)
    floor = conditional_entropy(train_x, train_y)
    console.print(f"floor        {floor:.4f}, the entropy of train given {length} characters", soft_wrap=True)


def fetch(options: argparse.Namespace) -> None:
    """Download the makemore list, unless a sound copy is in the cache, and say where it lies."""
    path = locate_makemore()
    if path.is_file() and is_makemore(path.read_bytes()):
        print(f"{path} is there already, and sound")
    else:
        print(f"{fetch_makemore(options.url)} downloaded and checked; use it with --names makemore")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return run_command(lambda: _run(parse(arguments)))


def _run(options: argparse.Namespace) -> None:
    options.run(options)


if __name__ == "__main__":
    sys.exit(main())
