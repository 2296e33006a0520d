"""Models that select: compared where both choose alike, so that a jump hides nothing and refuses nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfold
from bnfold.equivalence import Comparison, Unavailable
from bnfold.errors import NotEquivalent
from bnfold.torch.choices import Choosing
from bnfold.torch.fold import ModuleRuns

CHOICES: dict[str, Callable[[Tensor], Any]] = {
    "topk": lambda x: x.topk(3, dim=1),
    "topk of the least": lambda x: torch.topk(x, 2, largest=False),
    "sort": lambda x: torch.sort(x, dim=0, descending=True),
    "max along an axis": lambda x: x.max(1),
    "min along an axis, kept": lambda x: x.min(0, keepdim=True),
    "median": lambda x: x.median(1),
    "argmax": lambda x: x.argmax(1),
    "a comparison": lambda x: x > 0.1,
    "a comparison of two": lambda x: torch.ge(x, x.flip(0)),
    "a cast": lambda x: (10 * x).long(),
    "a rounding": lambda x: torch.round(10 * x),
    "a sign": lambda x: x.sign(),
}


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_falls_as_it_was_recorded(name: str) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(5, 6), torch.randn(5, 6)
    with Choosing() as recording:
        recorded = tensors(CHOICES[name](first))
    with Choosing(recording.tally.made) as following:
        followed = tensors(CHOICES[name](second))
    assert [choice.name for choice in recording.tally.made] == [c.name for c in following.tally.made]
    assert following.tally.otherwise
    assert torch.equal(recorded[-1], followed[-1])
    grounds = list(following.tally.grounds.values())
    assert grounds[0].shape == (5, 6)
    assert not torch.equal(grounds[0], next(iter(recording.tally.grounds.values())))


@pytest.mark.parametrize(("name", "axis"), [("topk", 1), ("sort", 0), ("max along an axis", 1)])
def test_values_are_read_at_the_recorded_places(name: str, axis: int) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(5, 6), torch.randn(5, 6)
    with Choosing() as recording:
        _, places = CHOICES[name](first)
    with Choosing(recording.tally.made):
        values, _ = CHOICES[name](second)
    places = places.unsqueeze(axis) if places.dim() < 2 else places
    assert torch.equal(values.reshape(places.shape), second.gather(axis, places))


def test_what_is_no_choice_is_left_alone() -> None:
    x = torch.randn(2, 3, 8, 8)
    with Choosing() as mode:
        torch.where(x.relu().bool().logical_not(), x, -x)  # one: the cast to truths
        nn.functional.max_pool2d(x, 2)
        x.mean()
        torch.arange(3).topk(1)
    assert [choice.name for choice in mode.tally.made] == ["_to_copy"]


def test_another_choice_than_the_recorded_one_is_not_led() -> None:
    with Choosing() as recording:
        torch.randn(4).argmax()
    with pytest.raises(Unavailable), Choosing(recording.tally.made):
        torch.randn(4).sign()
    with Choosing() as recording:
        torch.randn(4).sort()
    with pytest.raises(Unavailable), Choosing(recording.tally.made):
        torch.randn(3, 5, 2).sort()


class Selecting(nn.Module):
    """Picks the best two of four scores, which are equal but for rounding, and what another layer says there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.score, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.value = nn.Conv2d(3, 4, 3)
        self.end = nn.BatchNorm2d(4)

    def tie(self) -> Selecting:
        """Make the scores equal as nearly as its dtype allows."""
        with torch.no_grad():
            factor = torch.tensor([1.0, 3.0, 7.0, 0.3], dtype=self.score.weight.dtype)
            self.score.weight.copy_(torch.randn(1, 3, 3, 3) * factor.reshape(4, 1, 1, 1))
            self.score.bias.copy_(torch.randn(1) * factor)
            self.norm.running_var.copy_(1.7 * factor**2)
            self.norm.running_mean.copy_(0.2 * factor)
            self.norm.eps = 0.0
            self.end.running_var.copy_(torch.rand(4) + 0.5)
        return self.eval()

    def forward(self, x: Tensor) -> Tensor:
        best = self.norm(self.score(x)).topk(2, dim=1).indices
        return self.end(self.value(x)).gather(1, best)


def example() -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_selects_folds_and_is_compared_where_both_choose_alike(dtype: torch.dtype) -> None:
    model = Selecting().to(dtype).tie()
    folded, report = bnfold.fold(model, (example().to(dtype),))
    assert {verdict.outcome for verdict in report.verdicts} == {"folded"}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any("fall otherwise" in note for note in report.notes)
    assert all(item.deviation <= item.bound < 1e-4 for item in report.evidence)


@pytest.mark.parametrize("name", ["score.weight", "value.bias"])
def test_a_wrong_weight_is_caught_in_what_is_selected_and_in_what_that_is_made_from(name: str) -> None:
    model = Selecting().tie()
    folded, _ = bnfold.fold(model, (example(),))
    twin = bnfold.fold(model.double(), (example().double(),))[0]
    with torch.no_grad():
        folded.get_parameter(name)[2] += 1e-2
    comparison = Comparison(ModuleRuns(model.float(), (example(),), lambda _: twin), 2)
    with pytest.raises(NotEquivalent, match="in float32"):
        comparison.judge(folded)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x > 0.1, lambda x: x > 0.5),
        (lambda x: x.topk(2), lambda x: x.topk(2, largest=False)),
        (lambda x: x.argmax(0), lambda x: x.argmax(1)),
        (torch.round, lambda x: torch.round(x, decimals=2)),
    ],
)
def test_a_choice_by_another_rule_is_not_led(one: Any, other: Any) -> None:
    x = torch.randn(3, 3)
    with Choosing() as recording:
        one(x)
    with pytest.raises(Unavailable), Choosing(recording.tally.made):
        other(x)
