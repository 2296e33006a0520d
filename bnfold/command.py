"""What every command line of the project has in common: an argument that is wrong is one line and exit code 2."""

from __future__ import annotations

import argparse
from typing import NoReturn

__all__ = ["Parser", "add_weights"]


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
