"""bnfold.heap: the search for garbage is spared what was there before a fold, and finds all of it afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import bnfold
from bnfold.errors import UnreadableModel
from bnfold.heap import frozen_heap
from tests.onnx_models import model, norm, weights


@pytest.fixture
def thawed() -> Iterator[None]:
    """The heap as a user has it, and not as the tests do."""
    gc.unfreeze()
    yield
    gc.freeze()


class Counting(nn.Sequential):
    """Tells how many objects were frozen while it ran."""

    frozen: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counting.frozen = gc.get_freeze_count()
        return super().forward(x)


def net() -> nn.Module:
    return Counting(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()


@pytest.mark.usefixtures("thawed")
def test_while_a_module_is_folded_no_search_for_garbage_goes_through_what_was_there_before() -> None:
    bnfold.fold(net(), torch.randn(2, 3))
    assert Counting.frozen > 10_000
    assert not gc.get_freeze_count()


@pytest.mark.usefixtures("thawed")
def test_a_fold_that_is_refused_leaves_the_heap_as_it_was() -> None:
    with pytest.raises(UnreadableModel):
        bnfold.fold(net(), torch.randn(2, 5))
    assert not gc.get_freeze_count()


@pytest.mark.usefixtures("thawed")
def test_a_fold_of_a_file_leaves_the_heap_as_it_was() -> None:
    text = "net (float[N,3] x) => (float[N,2] y) { c = MatMul(x, w) y = BatchNormalization(c, s, b, m, v) }"
    bnfold.fold(model(text, {"w": weights(3, 2), **norm(2)}))
    assert not gc.get_freeze_count()


@pytest.mark.usefixtures("thawed")
def test_what_somebody_froze_stays_frozen() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    bnfold.fold(net(), torch.randn(2, 3))
    with frozen_heap():
        pass
    assert gc.get_freeze_count() > before / 2  # what is deleted is frozen no longer
