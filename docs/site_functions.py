"""Let the reference show the functions `bnfold.fold`, `verify` and `calibrate`, not the modules of the same names.

In the package the name of such a submodule stands for the function (see the end of `bnfold/__init__.py`). griffe, which
reads the docstrings without importing, lets the submodule win; this puts the functions back.
"""

from __future__ import annotations

from typing import Any

import griffe

__all__ = ["Functions"]


class Functions(griffe.Extension):
    """Remembers the functions of the package as they are read, and puts them in their places when all is."""

    def __init__(self) -> None:
        self.hidden: dict[str, griffe.Function] = {}

    def on_function_instance(self, *, func: griffe.Function, **rest: Any) -> None:
        """Keep what `bnfold/__init__.py` defines."""
        if func.parent is not None and func.parent.path == "bnfold":
            self.hidden[func.name] = func

    def on_package(self, *, pkg: griffe.Module, **rest: Any) -> None:
        """Put the functions before the submodules."""
        for name, function in self.hidden.items() if pkg.path == "bnfold" else ():
            pkg.set_member(name, function)
