"""Make one finding of the fuzzers again.

python -m tests.fuzz onnx 104 FOLDER           damages the file, leaves it in FOLDER and says what it did
python -m tests.fuzz graphs 48 chain pad       folds one random model again, of these steps only, and prints it
python -m tests.fuzz modules 3                 folds one random module again
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from tests.fuzz import graphs, modules, readers
from tests.fuzz.drawing import complaint, draw

FOUND_NOTHING = "nothing to complain of"


def read(target: str, seed: int, folder: Path | None) -> str:
    """Damage one file, keep it, and have it read."""
    if folder is not None:
        folder.mkdir(exist_ok=True)
        for name, content in readers.damage(target, seed).items():
            (folder / name).write_bytes(content)
    with tempfile.TemporaryDirectory() as scratch:
        return "\n".join(readers.survive(target, range(seed, seed + 1), Path(scratch)))


def fold(generator: Any, seed: int, wanted: list[str]) -> str:
    """Draw one model, keep the steps that are wanted, print it and fold it."""
    whole = draw(generator.FEATURES, seed)
    one = replace(whole, steps=tuple(step for step in whole.steps if not wanted or step[0] in wanted))
    built = generator.build(one)
    print(onnx.printer.to_text(built) if isinstance(built, onnx.ModelProto) else built, one, sep="\n")
    return complaint(generator.judge, one)


def main(kind: str, seed: str, *rest: str) -> int:
    """Make one finding again and say what it was; exit code 1 where it still is."""
    if kind in readers.TARGETS:
        found = read(kind, int(seed), Path(rest[0]) if rest else None)
    else:
        found = fold({"graphs": graphs, "modules": modules}[kind], int(seed), list(rest))
    print(found or FOUND_NOTHING)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
