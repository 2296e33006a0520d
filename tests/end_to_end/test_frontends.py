"""Both frontends decide alike: a module, and the files that both of torch's exporters write of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnfold
from benchmarks import frontends
from benchmarks.branches import BRANCHES
from benchmarks.frontends import RIGHT, compare, differences, fold_all_ways, fold_net, reason_for
from benchmarks.nets import NETS
from benchmarks.onnx_folders import WAYS, export
from tests.torch_models import randomise

IMAGES = torch.randn(2, 3, 12, 12)


@pytest.mark.slow
@pytest.mark.parametrize("gammas", ["positive", "mixed"])
@pytest.mark.parametrize("net", [*NETS, *BRANCHES])
def test_a_net_has_one_outcome_as_a_module_and_as_either_file(net, gammas):
    """But for those in `RIGHT`, each with its reason; whatever differs there must go farther as a file."""
    name = f"nets/{net}"
    found = fold_net(name, net, gammas)
    assert all(found[f"{name}, {way}"].keys() == found[f"{name}, module"].keys() for way in WAYS)
    lines, said = compare(name, found)
    assert bool(lines) == bool(reason_for(name)), (lines, said)
    if lines:
        folded = [Counter(outcome for outcome, *_ in each.values())["folded"] for each in found.values()]
        assert min(folded) == folded[0]


class Split(nn.Module):
    """A convolution whose channels go three ways, each with a BatchNorm, by two of torch's ways to cut."""

    def __init__(self):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 12, 3), nn.ModuleList(nn.BatchNorm2d(n) for n in (2, 4, 3, 3))

    def forward(self, x):
        a, b, c = self.conv(x).split([2, 4, 6], 1)
        parts = (a, b, *c.chunk(2, 1))
        return torch.cat([F.gelu(norm(part)) for norm, part in zip(self.norms, parts, strict=True)], 1)


class Slim(nn.Conv2d):
    """A convolution of which the first few channels are used."""

    def forward(self, x):
        return F.conv2d(x, self.weight[:5, :3], None if self.bias is None else self.bias[:5])


MODELS = {
    "split": Split,
    "slim": lambda: nn.Sequential(Slim(6, 8, 3, bias=False), nn.BatchNorm2d(5), nn.GELU()),
}


@pytest.mark.parametrize("model", MODELS)
def test_parts_of_values_and_of_weights_are_folded_into_alike(model):
    found = fold_all_ways(model, randomise(MODELS[model]()), IMAGES)
    assert compare(model, found)[0] == []
    assert {record[0] for each in found.values() for record in each.values()} == {"folded"}
    assert found.keys() == {f"{model}, {way}" for way in ("module", *WAYS)}


# ---------------------------------------------------------------- what counts as a difference

FOLDED, KEPT = ["folded", ["conv"], ""], ["kept", [], "a Tanh is in the way"]


def test_another_outcome_is_a_difference_and_another_operator_is_none():
    module = {"a": FOLDED, "b": KEPT}
    assert list(differences(module, {"a": ["folded", ["/conv/Conv"], ""], "b": KEPT})) == []
    assert list(differences(module, {"a": FOLDED, "b": FOLDED})) == [
        "b: kept -> folded (a Tanh is in the way)"
    ]


def test_each_call_of_a_module_is_held_to_the_outcome_of_the_module():
    assert list(differences({"a": FOLDED}, {"a": FOLDED, "a (2)": FOLDED})) == []
    assert len(list(differences({"a": FOLDED}, {"a": FOLDED, "a (2)": KEPT}))) == 1


def test_what_a_file_does_not_hold_is_no_difference_and_what_has_another_name_is_counted():
    assert list(differences({"a": FOLDED, "idle": KEPT}, {"a": FOLDED})) == []
    assert list(differences({"a": FOLDED}, {"node_1": FOLDED})) == []
    assert list(differences({"a": FOLDED}, {"node_1": KEPT})) == ["1 folded -> 1 kept"]


def test_a_batchnorm_of_a_file_goes_by_the_name_of_its_running_mean(tmp_path):
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    path = tmp_path / "net.onnx"
    export(model, (IMAGES,), path, "TorchScript")
    assert list(frontends.of_file(bnfold.fold_file(path, None).verdicts, path)) == ["1"]


def test_only_listed_models_may_differ_and_each_has_a_reason():
    assert reason_for("nets/Diverse Branch Block") == RIGHT["nets/Diverse Branch Block"]
    assert reason_for("nets/DenseNet-121") == ""
    assert all(RIGHT.values())


def test_the_command_says_what_differs_and_fails_on_what_is_not_listed(monkeypatch, capsys):
    found = {"nets/a, module": {"a": FOLDED}, "nets/a, dynamo": {"a": KEPT}}
    monkeypatch.setattr(frontends, "nets", lambda: iter([("nets/a", lambda: found)]))
    assert frontends.main([]) == 1
    assert "nets/a, dynamo: a: folded -> kept" in capsys.readouterr().out
    monkeypatch.setitem(RIGHT, "nets/a", "it is so")
    assert frontends.main([]) == 0
    assert "right: it is so" in capsys.readouterr().out
