"""Commands that do what no reader may, one fault each, for the test of the fuzzer itself."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import pickle
import sys
import zipfile
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Commit the fault that the second argument names."""
    return FAULTS[arguments[1]]()


def _raises() -> int:
    raise KeyError("shape")


def _starts() -> int:
    return os.system("exit 7")


def _starts_and_hides_it() -> int:
    with contextlib.suppress(OSError):
        os.system("exit 7")
    return 0


def _writes_elsewhere() -> int:
    return Path("../../elsewhere").write_text("here")


def _writes_beside() -> int:
    return Path("in.txt.bak").write_text("here")


def _changes() -> int:
    return Path("in.txt").write_text("other")


def _empties() -> int:
    Path("out.txt").write_text("")
    return 2


def _prints() -> int:
    print("error: one", "error: two", sep="\n", file=sys.stderr)
    return 2


def _grows() -> int:
    return len(bytearray(5 << 30))


def _dies() -> int:
    return len(ctypes.string_at(0))


def _unpickles() -> int:
    """Load every pickle in the archive, and in archives inside it, as `torch.load` does without `weights_only`."""
    _unpickle(Path("in.pt2").read_bytes())
    return 2


def _unpickle(data: bytes) -> None:
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            _unpickle(content)
            with contextlib.suppress(Exception):
                pickle.loads(content)


FAULTS = {
    "raises": _raises,
    "starts": _starts,
    "starts and hides it": _starts_and_hides_it,
    "writes elsewhere": _writes_elsewhere,
    "writes beside": _writes_beside,
    "changes": _changes,
    "empties": _empties,
    "prints": _prints,
    "grows": _grows,
    "dies": _dies,
    "unpickles": _unpickles,
}
