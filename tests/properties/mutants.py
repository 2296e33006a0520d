"""The driver with one mistake in it: a guard dropped, a sign, a reader or a shift forgotten, an order turned round.

Each is a change to the text of a module (`mutants.toml`). The mutated copy decides, and the real checker judges. A row
of the table is mutated on the way up only, since the way down is what the checker itself asks; that of linear
operators both ways, since it asks none of theirs.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bnfold import algebra, rules, travel


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: what it is.
        module: of bnfold.
        seed: of a random graph that comes out wrong by it.
        old, new: the text, which is there once, and what stands there instead.
    """

    name: str
    module: str
    seed: int
    old: str
    new: str


ENTRIES = Path(__file__).with_suffix(".toml")
MUTANTS = [Mutant(**entry) for entry in tomllib.loads(ENTRIES.read_text("utf-8"))["mutant"]]


@cache
def _mutated(mutant: Mutant) -> ModuleType:
    """The module with the mistake in it."""
    real = import_module(f"bnfold.{mutant.module}")
    source = Path(str(real.__file__)).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.name}: the text is there {source.count(mutant.old)} times"
    module = ModuleType(f"mutant_of_{mutant.module}")
    sys.modules[module.__name__] = module
    exec(compile(source.replace(mutant.old, mutant.new), str(real.__file__), "exec"), vars(module))
    return module


@contextmanager
def driver(mutant: Mutant) -> Iterator[Any]:
    """The function `travel`, with the mistake in it."""
    module = _mutated(mutant)
    with pytest.MonkeyPatch.context() as patch:
        if mutant.module == "rules":
            for op, row in rules.TABLE.items():
                down = module.TABLE[op].down if row is rules.ABSORB else row.down
                patch.setitem(rules.TABLE, op, replace(row, up=module.TABLE[op].up, down=down))
        if mutant.module == "algebra":
            for kind in (algebra.Affine, algebra.Linear):
                for name in vars(kind).keys() & {"after", "absorb_after", "absorb_before", "absorb_parallel"}:
                    own = vars(vars(module)[kind.__name__])[name]
                    if callable(own):
                        patch.setattr(kind, name, own)
            patch.setattr(module, "Affine", algebra.Affine)
        yield module.travel if mutant.module == "travel" else travel.travel
