"""Every way in which bnfold fails, and how a command reports it.

    BnfoldError
    |-- InputError        a file, model or argument that cannot be used        exit code 2
    |-- UnreadableModel   a model whose computation could not be followed      exit code 2
    |-- NotEquivalent     two models that should agree and do not              exit code 1

One way to fail: raise. A BatchNorm that is left where it is, is not a failure but a `Verdict`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = [
    "BnfoldError",
    "InputError",
    "NotEquivalent",
    "UnreadableModel",
    "check_target",
    "replacing",
    "run_command",
]

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
    """Two models that should compute the same and do not; the message names the worst input and element."""

    exit_code = 1


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's `main` and return its exit code, with any `BnfoldError` as one line on stderr.

    A full disk, a missing folder, a refused permission (`OSError`) or an extra that is not installed is the caller's
    to mend as well: exit code 2. Ctrl-C gives 130, as shells expect.
    """
    try:
        return main() or 0
    except BnfoldError as error:
        code, message = error.exit_code, str(error)
    except OSError as error:
        code, message = 2, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except ModuleNotFoundError as error:
        if error.name not in _INSTALLED_BY:
            raise
        code, message = 2, f'{error.name} is not installed; pip install "{_INSTALLED_BY[error.name]}"'
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path on the same file system; on success it takes the place of `path`, in one step.

    An existing `path` survives every failure. The temporary file lies in a temporary folder beside `path` and keeps
    its name, so that formats that write companions (external data) can find both.

    Raises:
        InputError: the folder of `path` does not exist, or `path` is itself a folder.
    """
    path = Path(path)
    check_target(path)
    with TemporaryDirectory(prefix=".bnfold-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        temporary.replace(path)


def check_target(path: Path) -> None:
    """Raise `InputError` where no file can be written at `path`, before much work has gone into what it would hold."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder; make it first, or write elsewhere")
