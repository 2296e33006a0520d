"""train.material and train.batches: counting loses nothing, and the batches estimate the loss of all examples."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from torch import Generator
from torch.nn import functional as F

import data
from train.batches import ROUND, draw_contexts, draw_examples, inclusion
from train.material import ContextCounts, Material, count_contexts, prepare

NAMES = ["emma", "olivia", "ava", "isabella", "sophia", "amelia", "mia", "ella", "anna", "eva"]


@pytest.fixture(scope="module")
def material() -> Material:
    """Return a tenth of the shipped list."""
    return prepare(data.read_names(None)[::10])


def pairs_of(table: ContextCounts) -> Counter[tuple[int, ...]]:
    """Return how often each (context..., target) was counted."""
    found: Counter[tuple[int, ...]] = Counter()
    for number, context in enumerate(table.contexts.tolist()):
        for pair in range(table.starts[number], table.starts[number + 1]):
            found[(*context, int(table.targets[pair]))] += int(table.counts[pair])
    return found


@pytest.mark.parametrize("length", [1, 3, 8])
def test_every_example_is_counted_once(length: int) -> None:
    vocabulary = data.Vocabulary.from_names(NAMES)
    x, y = data.contexts(NAMES, vocabulary, length)
    table = count_contexts(x, y)
    expected = Counter(
        (*context, target) for context, target in zip(map(tuple, x.tolist()), y.tolist(), strict=True)
    )
    assert pairs_of(table) == expected
    assert len(table) == len({context[:-1] for context in expected})
    assert table.examples == len(y)
    assert table.frequencies.sum() == len(y)
    assert table.contexts.tolist() == sorted(table.contexts.tolist())


def test_the_parts_are_those_of_the_split(material: Material) -> None:
    names = material.names
    for part in ("train", "dev", "test"):
        assert getattr(material, part).examples == sum(len(name) + 1 for name in getattr(names, part))
    assert len(material.examples[0]) == material.train.examples


def test_examples_are_drawn_as_the_notebook_draws_them(material: Material) -> None:
    chosen = torch.randint(0, material.train.examples, (32,), generator=Generator().manual_seed(5))
    x, y = next(draw_examples(material, 32, Generator().manual_seed(5)))
    assert torch.equal(x, material.examples[0][chosen])
    assert torch.equal(y, material.examples[1][chosen])


@pytest.mark.parametrize("size", [1, 2, 100, 1999])
def test_inclusion_probabilities_sum_to_the_size_and_go_with_the_root(size: int) -> None:
    frequencies = torch.arange(1, 2001, dtype=torch.float64) ** 3
    probabilities = inclusion(frequencies, size)
    assert probabilities.sum().item() == pytest.approx(size)
    assert probabilities.max() <= 1
    free = probabilities < 1
    ratios = probabilities[free] / frequencies[free].sqrt()
    assert torch.allclose(ratios, ratios[0].expand_as(ratios))


def test_a_batch_as_large_as_the_table_holds_every_context() -> None:
    small = prepare(NAMES)
    assert inclusion(small.train.frequencies, 10_000).eq(1).all()
    x, weights = next(draw_contexts(small, 10_000, Generator().manual_seed(0)))
    assert sorted(x.tolist()) == small.train.contexts.tolist()
    assert weights.sum().item() == pytest.approx(1)


def test_a_batch_holds_different_contexts_and_the_frequent_ones_always(material: Material) -> None:
    always = {
        tuple(c) for c in material.train.contexts[inclusion(material.train.frequencies, 300) == 1].tolist()
    }
    assert always
    for x, weights in islice(draw_contexts(material, 300, Generator().manual_seed(1)), 20):
        drawn = set(map(tuple, x.tolist()))
        assert len(drawn) == len(x) == len(weights) == 300
        assert always <= drawn


def test_contexts_turn_up_as_often_as_they_should(material: Material) -> None:
    probabilities = inclusion(material.train.frequencies, 100)
    keys = {tuple(context): number for number, context in enumerate(material.train.contexts.tolist())}
    seen = torch.zeros(len(keys))
    rounds = 200
    for x, _ in islice(draw_contexts(material, 100, Generator().manual_seed(2)), rounds * ROUND):
        seen[[keys[tuple(context)] for context in x.tolist()]] += 1
    wanted = probabilities * rounds * ROUND
    assert (seen.sum() - wanted.sum()).abs() < 1e-6
    assert (
        (seen - wanted).abs() < 6 * (rounds * ROUND * probabilities * (1 - probabilities)).sqrt() + 1e-6
    ).all()


@pytest.mark.parametrize("draw", [draw_examples, draw_contexts])
def test_the_mean_over_batches_is_the_loss_over_all_examples(draw, material: Material) -> None:
    table = torch.randn(27, 27, generator=Generator().manual_seed(3))
    x, y = material.examples
    wanted = F.cross_entropy(table[x[:, -1]], y).item()
    losses = []
    for contexts, targets in islice(draw(material, 200, Generator().manual_seed(4)), 40 * ROUND):
        reduction = "sum" if targets.is_floating_point() else "mean"
        losses.append(F.cross_entropy(table[contexts[:, -1]], targets, reduction=reduction).item())
    found = torch.tensor(losses)
    error = found.std().item() / len(losses) ** 0.5
    assert error < 0.01
    assert abs(found.mean().item() - wanted) < 4 * error + 0.005
