"""What every command line of the project has in common: an argument that is wrong is one line and exit code 2."""

from __future__ import annotations

import argparse
from typing import NoReturn

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that says what is wrong in one line, and where the options are listed."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with code 2."""
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")
