"""How much faster than the lecture's loop are `data.contexts`, on the default list; both give equal arrays.

    python -m benchmarks.contexts

Best of five of each in one run, on one thread. The loop fills lists, as the lecture does, then makes arrays.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from data import Vocabulary, contexts, read_names


def loop(names: list[str], numbers: dict[str, int], length: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The lecture's `build_dataset`, with its dictionary from characters to numbers."""
    x, y = [], []
    for name in names:
        context = [0] * length
        for character in name + ".":
            number = numbers[character]
            x.append(context)
            y.append(number)
            context = [*context[1:], number]
    return np.array(x), np.array(y)


def best_of(times: int, function, *arguments) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """Return the shortest duration in seconds, and what the function returned."""
    seconds = []
    for _ in range(times):
        start = perf_counter()
        result = function(*arguments)
        seconds.append(perf_counter() - start)
    return min(seconds), result


def main() -> None:
    """Print both durations and their ratio."""
    names = read_names()
    vocabulary = Vocabulary.from_names(names)
    numbers = {character: number for number, character in enumerate(vocabulary.characters)}
    slow, expected = best_of(5, loop, names, numbers)
    fast, found = best_of(5, contexts, names, vocabulary)
    for left, right in zip(expected, found, strict=True):
        np.testing.assert_array_equal(left, right)
    print(f"{len(found[1]):,} examples, loop {slow * 1e3:.1f} ms, data.contexts {fast * 1e3:.1f} ms")
    print(f"ratio {slow / fast:.1f}")


if __name__ == "__main__":
    main()
