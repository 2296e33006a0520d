"""What the command lines of `train` have in common: numbers with bounds, folders to write to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from bnfold.errors import InputError

__all__ = ["at_least", "check_folder", "pick_device", "positive"]


def at_least(least: int) -> Callable[[str], int]:
    """Return a type for arguments: an integer of `least` or more, of 63 bits."""

    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        if value >= 2**63:
            raise argparse.ArgumentTypeError(f"{value} is more than 63 bits hold")
        return value

    return integer


def positive(text: str) -> float:
    """Return a number above 0 that is finite: a type for arguments."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def pick_device(name: str) -> torch.device:
    """Return the device of a name: cpu, cuda or cuda:N.

    Raises:
        InputError: it is of another kind, or this machine has none of it.
    """
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or name == "cpu:":
        raise InputError(f"--device {name}: a device is cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InputError(
            f"--device {name}: torch finds {found} CUDA device{'s' * (found != 1)} here; leave it out"
        )
    return torch.device(kind, int(number)) if number else torch.device(kind)


def check_folder(path: Path, what: str) -> None:
    """Raise, before the work and not after it, unless `path` is a folder or can become one."""
    for folder in (path, *path.parents):
        if folder.exists():
            if not folder.is_dir():
                raise InputError(f"{folder} is a file; name a folder for {what}")
            return
