"""What every command line of the project has in common: an argument that is wrong is one line and exit code 2.

One line also where torchrun starts a command several times: the first process speaks for all.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from typing import NoReturn

from bnfold.errors import InputError, NotEquivalent

__all__ = ["Parser", "add_weights", "is_first", "is_started", "report_once"]

GRACE = 10.0
"""So many seconds the other processes wait for the first to say what is wrong, upon which torchrun ends them."""

_SAID_BY_ALL = (InputError.exit_code, NotEquivalent.exit_code)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that says what is wrong in one line, and where the options are listed."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with code 2."""
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def add_weights(group: argparse._ArgumentGroup) -> None:
    """Add the options that say which weights a file holds: of what module, called with what, and where they lie."""
    add = group.add_argument
    add("--model", metavar="PACKAGE.MODULE:FACTORY", help="what builds the module; imported and called")
    add("--model-args", metavar="JSON", help="""what the factory is called with: '{"depth": 50}', or [50]""")
    add(
        "--input",
        action="append",
        metavar="[NAME=]SHAPE",
        help="1x3x224x224, once per argument; mask=1x16:bool by name, batch.image=1x3x8x8 in a dict",
    )
    add("--key", help="where in the file the weights lie (ema, ema.state_dict)")
    add("--prefix", help="what stands before the names of the weights (net.)")


def is_started() -> bool:
    """Whether torchrun started this process, perhaps as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Whether this process speaks for all."""
    return not is_started() or os.environ.get("RANK") == "0"


def report_once(main: Callable[[], int]) -> int:
    """Run `main`, which returns an exit code; what is wrong in all processes is said by the first of them.

    The others say what they have to say where it did not come to that, and at once if a process is gone.
    """
    if is_first():
        return main()
    with redirect_stderr(StringIO()) as said:
        try:
            code = main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    if code in _SAID_BY_ALL:
        time.sleep(GRACE)
    print(said.getvalue(), end="", file=sys.stderr)
    return code
