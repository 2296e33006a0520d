"""python -m export.sample: names from an ONNX file, with onnxruntime and NumPy alone.

    python -m export.sample ckpt.onnx [--count 20] [--seed 1] [--temperature 1] [--longest 30] [--start ""]

A name begins with a context of terminators (character 0), and with `--start`, if that is given. One character after
the other is drawn from softmax(logits / temperature), by inverting the cumulative distribution at a uniform number,
until the terminator ends the name. Every attempt has a stream of uniform numbers of its own, from seed and attempt, so
a seed gives the same names whatever batch the file takes: the doubles of NumPy's PCG64, seeded by its SeedSequence of
the two numbers. `export/page/draw.js` computes the same in a browser.

Every name is printed once. Thrown away are empty names, repeats, and names that have not ended after `--longest`
characters; if a hundred attempts for each name asked for are not enough, fewer are printed and stderr says so.
Vocabulary and context length are the file's own (`vocabulary` in its metadata, the shape of its input).

Exit code 0, or 2 with one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.command import Parser
from bnfold.errors import InputError, run_command
from export.session import open_session

__all__ = ["Net", "invent"]

_ATTEMPTS = 100
_AT_ONCE = 64


class Net:
    """The file as a function from contexts (n, length) int64 to logits (n, characters), with its vocabulary.

    Raises:
        InputError: the file is no ONNX model, or none of a net over characters.
    """

    def __init__(self, path: str) -> None:
        self._session = open_session(path)
        self._path = path
        self.vocabulary = self._read_vocabulary()
        entry = self._find_input()
        self._input, (self._batch, self.length) = entry.name, entry.shape

    @property
    def at_once(self) -> int:
        """How many names are best drawn together."""
        return self._batch if isinstance(self._batch, int) else _AT_ONCE

    def __call__(self, contexts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the logits of at most `at_once` contexts, the missing ones of a fixed batch filled with zeros."""
        filled = contexts
        if isinstance(self._batch, int) and len(contexts) < self._batch:
            filled = np.concatenate(
                [contexts, np.zeros((self._batch - len(contexts), self.length), np.int64)]
            )
        try:
            logits = np.asarray(self._session.run(None, {self._input: filled})[0], np.float64)
        except Exception as error:  # onnxruntime's exceptions share no class below this one
            raise self._refuse(f"cannot be run: {str(error).splitlines()[0]:.200}") from error
        if logits.shape != (len(filled), len(self.vocabulary)) or not np.isfinite(logits).all():
            raise self._refuse(f"gives no finite logits for its {len(self.vocabulary)} characters")
        return logits[: len(contexts)]

    def read(self, start: str, longest: int) -> list[int]:
        """Return the indices of the characters that a name of at most `longest` begins with."""
        if len(start) > longest:
            raise InputError(f"{start!r} has more than the {longest} characters that a name may have")
        for one in start:
            if one not in self.vocabulary[1:]:
                raise InputError(
                    f"a name cannot begin with {start!r}: {one!r} is none of the net's characters"
                )
        return [self.vocabulary.index(one, 1) for one in start]

    def _read_vocabulary(self) -> list[str]:
        text = self._session.get_modelmeta().custom_metadata_map.get("vocabulary")
        if text is None:
            raise self._refuse("has no `vocabulary` in its metadata; write it with python -m export")
        try:
            characters = json.loads(text)
        except ValueError:
            characters = None
        if (
            not isinstance(characters, list)
            or len(characters) < 2
            or not all(isinstance(one, str) and len(one) == 1 for one in characters)
        ):
            raise self._refuse("has a `vocabulary` that is no list of characters")
        return characters

    def _find_input(self) -> Any:
        entries = self._session.get_inputs()
        fits = len(entries) == 1 and entries[0].type == "tensor(int64)" and len(entries[0].shape) == 2
        if not fits or not isinstance(entries[0].shape[1], int) or entries[0].shape[1] < 1:
            raise self._refuse("does not take one int64 input (batch, context)")
        return entries[0]

    def _refuse(self, reason: str) -> InputError:
        return InputError(f"{self._path} {reason}")


def invent(
    net: Net, count: int, seed: int, temperature: float = 1.0, longest: int = 30, start: str = ""
) -> Iterator[str]:
    """Yield `count` different names, or fewer if a hundred attempts for each do not give them.

    Raises:
        InputError: a character of `start` is none of the net's, or the terminator, or there are more than `longest`.
    """
    seen, attempts, begun = {""}, range(_ATTEMPTS * count), net.read(start, longest)
    for first in range(0, len(attempts), net.at_once):
        for name in _draw(net, attempts[first : first + net.at_once], seed, temperature, longest, begun):
            if name not in seen:
                seen.add(name)
                yield name
                if len(seen) > count:
                    return


def _draw(
    net: Net, attempts: range, seed: int, temperature: float, longest: int, begun: list[int]
) -> list[str]:
    """Return the names of these attempts that came to an end, in order."""
    steps = longest + 1 - len(begun)
    chances = np.stack([np.random.default_rng((seed, one)).random(steps) for one in attempts])
    contexts = np.tile(np.array([*[0] * net.length, *begun][-net.length :], np.int64), (len(attempts), 1))
    drawn, alive = np.zeros_like(chances, np.int64), np.arange(len(attempts))
    for step in range(steps):
        drawn[alive, step] = choose(net(contexts[alive]), chances[alive, step], temperature)
        contexts[alive] = np.column_stack([contexts[alive, 1:], drawn[alive, step]])
        alive = alive[drawn[alive, step] > 0]
        if not len(alive):
            break
    ended = np.setdiff1d(np.arange(len(attempts)), alive)
    return ["".join(net.vocabulary[one] for one in (*begun, *drawn[row]) if one) for row in ended]


def choose(
    logits: npt.NDArray[np.float64], chances: npt.NDArray[np.float64], temperature: float
) -> npt.NDArray[np.int64]:
    """Return the character that each uniform number (n,) picks from softmax(logits / temperature), (n, characters)."""
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    sums = np.cumsum(weights, axis=1)
    picked: npt.NDArray[np.int64] = np.sum(sums <= chances[:, None] * sums[:, -1:], axis=1, dtype=np.int64)
    return picked


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(prog="python -m export.sample", description="Names from an ONNX file.")
    parser.add_argument("model", help="what python -m export wrote", metavar="ONNX")
    parser.add_argument("--count", type=int, default=20, help="how many names (20)")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other names (1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 plainer, above 1 wilder (1)")
    parser.add_argument("--longest", type=int, default=30, help="characters that a name may have (30)")
    parser.add_argument("--start", default="", help="what every name begins with (nothing)", metavar="TEXT")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Print the names, one on a line."""
    for name in ("count", "longest"):
        if not 1 <= getattr(options, name) <= 1_000_000:
            raise InputError(f"--{name} {getattr(options, name)}: it takes a number from 1 to 1,000,000")
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: it takes a number from 0 up")
    if not (isfinite(options.temperature) and options.temperature > 0):
        raise InputError(f"--temperature {options.temperature}: it takes a number above 0")
    net, found = Net(options.model), 0
    settings = options.count, options.seed, options.temperature, options.longest, options.start
    for name in invent(net, *settings):
        print(_printable(name))
        found += 1
    if found < options.count:
        print(
            f"no more than {found} different names in {_ATTEMPTS * options.count:,} attempts", file=sys.stderr
        )


def _printable(name: str) -> str:
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
