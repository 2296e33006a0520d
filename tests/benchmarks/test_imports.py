"""What the benchmarks take from the packages that they measure is there: all of them can be imported."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

import benchmarks


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(benchmarks.__path__[0]).glob("*.py")))
def test_every_benchmark_can_be_imported(name: str) -> None:
    assert import_module(f"benchmarks.{name}")
