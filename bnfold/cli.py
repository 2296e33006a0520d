"""The console script: `bnfold fold FILE` is `python -m bnfold.fold FILE`, and so is `bnfold verify A B`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from bnfold import __version__
from bnfold.command import Parser
from bnfold.errors import run_command

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `bnfold COMMAND ...` and return its exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="bnfold", description="Fold BatchNorms, exactly, and prove it.")
    parser.add_argument("--version", action="version", version=f"bnfold {__version__}")
    parser.add_argument(
        "command", choices=["fold", "verify"], help="`bnfold COMMAND --help` lists its options"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = parser.parse_args(given[:1]).command
    code: int = import_module(f"bnfold.{command}").main(given[1:])
    return code
