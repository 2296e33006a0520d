"""Runs a program in several processes, as torchrun does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import CHECKOUT

STARTER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "0"]


def environment() -> dict[str, str]:
    """That of a program which is run from a folder of its own."""
    return os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}


def torchrun(folder: Path, *program: object, count: int = 2) -> subprocess.CompletedProcess[str]:
    """Run `program` in `folder` in so many processes; returns code, stdout and stderr of all."""
    command = [*STARTER, "--nproc-per-node", str(count), *map(str, program)]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines in which the program itself says what is wrong; torchrun has a report of its own."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]
