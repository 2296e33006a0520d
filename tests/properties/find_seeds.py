"""Find, for each mistake in `mutants.toml`, a random graph that comes out wrong by it, and write the seeds there.

    python -m tests.properties.find_seeds

Needed whenever `machine.draw` draws other graphs. A seed that still does is left; a mistake without one is named.
"""

from __future__ import annotations

import re
import sys

from bnfold.travel import travel
from tests.properties.mutants import ENTRIES, MUTANTS, Mutant
from tests.properties.test_simulation import drawn, is_wrong, mistaken_fold

TRIED = 6_000


def shows(mutant: Mutant, seed: int) -> bool:
    """Whether the graph of a seed comes out wrong by a mistake, and right without it."""
    found = mistaken_fold(mutant, seed)
    if found is None or not found[2]:
        return False
    graph, weights, inputs = drawn(seed)
    return not is_wrong(graph, travel(graph), weights, inputs)


def main() -> int:
    """Write the seeds; the exit code counts the mistakes that no graph shows."""
    text, missing = ENTRIES.read_text(encoding="utf-8"), 0
    for mutant in MUTANTS:
        seed = next((s for s in (mutant.seed, *range(TRIED)) if shows(mutant, s)), None)
        if seed is None:
            print(f"{mutant.name}: none of {TRIED} graphs comes out wrong")
            missing += 1
            continue
        head = re.escape(f'name = "{mutant.name}"\nmodule = "{mutant.module}"\n')
        text = re.sub(rf"({head}seed = )\d+", rf"\g<1>{seed}", text)
        ENTRIES.write_text(text, encoding="utf-8")
    return missing


if __name__ == "__main__":
    sys.exit(main())
