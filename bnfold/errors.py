"""Every way in which bnfold fails, and how a command reports it.

    BnfoldError
    |-- InputError        a file, model or argument that cannot be used        exit code 2
    |-- UnreadableModel   a model whose computation could not be followed      exit code 2
    |-- NotEquivalent     two models that should agree and do not              exit code 1
    |-- ProcessLost       one of several processes that went away              exit code 3

One way to fail: raise. A BatchNorm that is left where it is, is not a failure but a `Verdict`; what the rules say on
the way there is a `Refuse`, which never leaves the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from bnfold.equivalence import Worst

__all__ = [
    "BnfoldError",
    "InputError",
    "NotEquivalent",
    "ProcessLost",
    "Refuse",
    "UnreadableModel",
    "run_command",
]

BROKEN_PIPE = 141
"""The exit code that shells report for a command whose reader went away."""

_INSTALLED_BY = {
    "torch": "bnfold[torch]",
    "onnx": "bnfold[onnx]",
    "onnx_ir": "bnfold[onnx]",
    "onnxruntime": "bnfold[onnx]",
    "rich": "rich",
}
"""Package that is no dependency of the base install -> what to ask pip for."""


class BnfoldError(Exception):
    """The root of the tree; its message is one line that names the thing, the fact and the way out."""

    exit_code = 2


class InputError(BnfoldError, ValueError):
    """A file, a model or an argument that cannot be used as it is."""


class UnreadableModel(BnfoldError):
    """A model whose computation could not be followed, with the name of what is in the way."""


class NotEquivalent(BnfoldError, AssertionError):
    """Two models that should compute the same and do not; the message names the worst input and element.

    Attributes:
        worst: the same as a record; None where the difference has no one place.
    """

    exit_code = 1

    def __init__(self, message: str = "", worst: Worst | None = None) -> None:
        super().__init__(message)
        self.worst = worst


class ProcessLost(BnfoldError):
    """One of several processes that compute together went away, or did not answer in time."""

    exit_code = 3


class Refuse(Exception):
    """Algebra that cannot be done here; the message is a clause for the report that names the node in the way."""


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's `main` and return its exit code, with any `BnfoldError` as one line on stderr.

    A full disk, a missing folder, a refused permission (`OSError`), an extra that is not installed, and what is larger
    than the memory, nested too deeply or no text, is the caller's to mend as well: exit code 2. Ctrl-C gives 130, and a
    reader of stdout that went away (`| head -1`) quietly 141, as shells expect. A closed stdout is written to in vain.

    Not covered: mistakes in the program, which show where they are.
    """
    _prepare_streams()
    try:
        code = main() or 0
        sys.stdout.flush()
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):  # what rich makes of one
            return _leave(end)
        code = BROKEN_PIPE
    except BrokenPipeError:
        code = BROKEN_PIPE
    except KeyboardInterrupt:
        code = _complain("interrupted", 130)
    except Exception as error:
        message = _explain(error)
        if not message:
            raise
        code = _complain(message, getattr(error, "exit_code", 2))
    _let_go_of_stdout()
    return code


def _leave(end: SystemExit) -> NoReturn:
    """Leave as argparse does after --help, or a wrong argument."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _let_go_of_stdout()
        raise SystemExit(BROKEN_PIPE if isinstance(error, BrokenPipeError) else 2) from None
    raise end


def _explain(error: Exception) -> str:
    """One line about a failure that the caller can mend; nothing about any other."""
    match error:
        case BnfoldError():
            return str(error)
        case OSError():
            return f"{error.filename}: {error.strerror}" if error.filename else str(error)
        case ModuleNotFoundError() if error.name in _INSTALLED_BY:
            return f'{error.name} is not installed; pip install "{_INSTALLED_BY[error.name]}"'
        case RecursionError():
            return "the model is nested too deeply to be followed"
        case UnicodeError():
            return f"there is text that cannot be read or written as what it should be: {error}"
        case MemoryError():
            return f"there is not enough memory: {str(error) or 'use a smaller model or smaller inputs'}"
        case RuntimeError() if "can't allocate memory" in str(error):
            return f"there is not enough memory: {str(error).rpartition('memory: ')[2]}"
    return ""


def _complain(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _prepare_streams() -> None:
    """Open what the caller closed, so that no file is opened in its stead, and let any name be printed."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(nowhere, "r" if name == "stdin" else "w", encoding="utf-8"))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _let_go_of_stdout() -> None:
    """Where stdout takes nothing any more, let what is still to be written to it go nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
