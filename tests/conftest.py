"""What every test may use: the two lists of names, and a command run as a user would run it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

CHECKOUT = Path(__file__).parent.parent
MAKEMORE = CHECKOUT.parent / "shared" / "data" / "makemore-names.txt"

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("bnfold", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("bnfold")


def pytest_collection_finish() -> None:
    """Let no search for garbage go through all that was imported: a fold whose model keeps something makes ten."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def makemore() -> Path:
    """The lecture's own list, which the project does not hold; without it the test is skipped."""
    if not MAKEMORE.is_file():
        pytest.skip("the lecture's list of names lies beside the checkout only where it was put there")
    return MAKEMORE


@pytest.fixture
def run_module(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `python -W error -m MODULE ARGUMENTS...` in the test's own empty folder.

    Keyword arguments are added to the environment; the result has `returncode`, `stdout` and `stderr`.
    """

    def run(module: str, *arguments: object, **environment: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", module, *map(str, arguments)]
        added = {"PYTHONPATH": CHECKOUT, "COLUMNS": 120, **environment}
        variables = os.environ | {name: str(value) for name, value in added.items()}
        return subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300, check=False
        )

    return run
