"""The nets that are reparameterised: their own forms compute the same, and have as few operators as counted by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.branches import BRANCHES, build
from tests.end_to_end.test_nets import BOUND, deviation, double, export, run

CASES = [(name, gammas) for name in BRANCHES for gammas in ("positive", "mixed")]

# Convs, Gemms and MatMuls, Adds and Subs, BatchNorms of the small nets: as they are trained, and in their own form.
EXPECTED = {
    "MobileOne-S0": ((21, 1, 18, 19), (11, 1, 0, 0)),
    "RepVGG-B1g4": ((10, 1, 7, 12), (5, 1, 0, 0)),
    "ACNet": ((6, 2, 4, 6), (2, 2, 0, 0)),
    "UniRepLKNet": ((17, 1, 8, 12), (11, 1, 2, 0)),
    "FastViT-SA12": ((23, 1, 22, 22), (17, 1, 2, 0)),
    "RepViT-M0.9": ((22, 2, 11, 20), (19, 1, 4, 0)),
    "Diverse Branch Block": ((14, 1, 85, 17), (4, 1, 0, 0)),
    "OREPA": ((14, 1, 8, 2), (2, 1, 0, 0)),
    "ExpandNet": ((9, 4, 0, 3), (3, 2, 0, 0)),
    "LoRA": ((0, 8, 6, 0), (0, 4, 4, 0)),
}


def count(model, inputs):
    nodes = Counter(node.op_type for node in export(model, inputs).graph.node)
    kinds = ["Conv"], ["Gemm", "MatMul"], ["Add", "Sub"], ["BatchNormalization"]
    return tuple(sum(nodes[name] for name in names) for names in kinds)


def numbers(model):
    """Everything that the output of a net in eval mode should depend on."""
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            yield name, buffer


@pytest.mark.parametrize(("name", "gammas"), CASES)
def test_its_own_form_computes_the_same_in_float64(name, gammas):
    model, inputs = double(*build(name, gammas, small=True))
    before = run(model, inputs)
    assert deviation(before, run(model.reparameterize(), inputs)) <= BOUND
    assert deviation(before, run(model, inputs)) == 0, "the net itself is as it was"


@pytest.mark.parametrize("name", EXPECTED)
def test_its_own_form_has_as_few_operators_as_counted_by_hand(name):
    model, inputs = build(name, small=True)
    assert (count(model, inputs), count(model.reparameterize(), inputs)) == EXPECTED[name]


def test_every_net_has_its_expectation():
    assert EXPECTED.keys() == BRANCHES.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_every_weight_of_every_branch_shows_in_the_output(name):
    model, inputs = double(*build(name, "mixed", small=True))
    before, hidden = run(model, inputs), []
    for place, number in numbers(model):
        kept = number.detach().clone()
        with torch.no_grad():
            number.mul_(1.01)
        if deviation(before, run(model, inputs)) < 1000 * BOUND:
            hidden.append(place)
        with torch.no_grad():
            number.copy_(kept)
    assert not hidden
