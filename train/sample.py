"""python -m train.sample: names that a net invents, from a checkpoint of any recipe, folded or not.

    python -m train.sample ckpt.pt [--count 20] [--seed 1]

One character after the other is drawn from the net's own probabilities, in eval mode, until the terminator ends the
name. Two checkpoints with the same probabilities give the same names for the same seed. `export.sample` does this
without torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Generator, nn

import data
from bnfold.checkpoint import Checkpoint, load
from bnfold.command import Parser
from bnfold.errors import InputError, run_command
from train.arguments import at_least
from train.evaluate import evaluating

__all__ = ["invent", "load_characters"]


def invent(
    net: nn.Sequential, vocabulary: data.Vocabulary, context: int, count: int, generator: Generator
) -> list[str]:
    """Return `count` names, all written at once; one that does not end is cut at `data.LONGEST_NAME` characters."""
    window = torch.zeros(count, context, dtype=torch.int64)
    written = torch.zeros(count, 0, dtype=torch.int64)
    with evaluating(net):
        while written.shape[1] < data.LONGEST_NAME and not (written == 0).any(1).all():
            drawn = torch.multinomial(net(window).softmax(1), 1, generator=generator)
            window, written = torch.cat([window[:, 1:], drawn], 1), torch.cat([written, drawn], 1)
    names = (vocabulary.decode(numbers) for numbers in written.tolist())
    return [name.partition(vocabulary.terminator)[0] for name in names]


def load_characters(path: str) -> tuple[Checkpoint, data.Vocabulary, int]:
    """Load a checkpoint of a net over characters; return it, its vocabulary and its context.

    Raises:
        InputError: the file is no checkpoint, or the net reads or writes something else.
    """
    checkpoint = load(path)
    shape, characters = checkpoint.input.shape, checkpoint.vocabulary
    if not characters or len(shape) != 1:
        raise InputError(f"{path} holds no net over characters; make one with `python -m train`")
    out = checkpoint.model(checkpoint.input.sample(1))
    if out.shape != (1, len(characters)):
        raise InputError(f"{path} gives {list(out.shape)[1:]} numbers for {len(characters)} characters")
    return checkpoint, data.Vocabulary(characters), shape[0]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(prog="python -m train.sample", description="Names from a checkpoint of python -m train.")
    parser.add_argument("checkpoint", help="ckpt.pt, folded or not")
    parser.add_argument("--count", type=at_least(1), default=20, metavar="N", help="how many (20)")
    parser.add_argument("--seed", type=at_least(0), default=1, metavar="N", help="(1)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Print the names, one on a line."""
    checkpoint, vocabulary, context = load_characters(options.checkpoint)
    generator = Generator().manual_seed(options.seed)
    print(*invent(checkpoint.model, vocabulary, context, options.count, generator), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
