"""What the torch tests share: random statistics that a dead net cannot hide, and one strict check of a fold."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.report import Report
from bnfold.torch import fold, run
from bnfold.torch.tensors import leaves

__all__ = ["agree", "check", "has_norm", "randomise"]


def has_norm(module: nn.Module) -> bool:
    """Whether a module keeps running statistics."""
    return isinstance(getattr(module, "running_var", None), Tensor)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every number of a module a random value; about 30 % of all gammas are negative. Returns it in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64).mul(high - low).add(low)

    with torch.no_grad():
        for module in model.modules():
            if not has_norm(module):
                continue
            module.running_mean.copy_(uniform(module.running_mean, -1, 1))
            module.running_var.copy_(uniform(module.running_var, 0.3, 2))
            if isinstance(getattr(module, "weight", None), Tensor):
                sign = torch.where(uniform(module.weight, 0, 1) < 0.3, -1.0, 1.0)
                module.weight.copy_(uniform(module.weight, 0.5, 1.5) * sign)
            if isinstance(getattr(module, "bias", None), Tensor):
                module.bias.copy_(uniform(module.bias, -1, 1))
    return model.eval()


def agree(before: nn.Module, after: nn.Module, example_inputs: Any, bound: float = 1e-12) -> None:
    """Hold two float64 models to each other, on other inputs than they were folded with, relative to the output."""
    generator = torch.Generator().manual_seed(5)

    def other(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    for _ in range(2):
        inputs = torch.utils._pytree.tree_map_only(Tensor, other, example_inputs)
        old, new = run(before, inputs), run(after, inputs)
        assert old.keys() == new.keys()
        for path in old:
            peak = np.abs(old[path]).max(initial=0.0) or 1.0
            assert np.abs(old[path].astype(float) - new[path]).max(initial=0.0) <= bound * peak, path


def check(
    model: nn.Module,
    example_inputs: Any,
    folded: Iterable[str] = (),
    kept: Iterable[str] = (),
    half: Iterable[str] = (),
    because: str = "",
    randomised: bool = False,
) -> tuple[nn.Module, Report]:
    """Fold a float64 copy of a model; assert the outcome of every BatchNorm by name, and that the outputs agree.

    Every reason given must contain `because`. The model itself must come out exactly as it was. Merged, it must agree
    as well; what is merged is not judged here.
    """
    if not randomised:
        randomise(model)
    model = model.double()
    example_inputs = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, example_inputs
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = {id(module): set(vars(module)) for module in model.modules()}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        after, report = fold(model, example_inputs, merge=False)
        outcomes = {verdict.name: verdict.outcome for verdict in report.verdicts}
        wanted = {"folded": folded, "kept": kept, "scale folded": half}
        assert outcomes == {name: outcome for outcome, names in wanted.items() for name in names}, report
        for verdict in report.verdicts:
            if verdict.outcome != "folded":
                assert verdict.reason, verdict
                assert because in verdict.reason, verdict
        agree(model, after, example_inputs)
        agree(model, fold(model, example_inputs)[0], example_inputs)
    finally:
        torch.set_default_dtype(default)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) or bool(tensor.isnan().any()), name
    assert held == {id(module): set(vars(module)) for module in model.modules()}
    assert report.verified
    copy.deepcopy(after)
    shared = {t.data_ptr() for t in model.state_dict().values()} & {
        t.data_ptr() for t in after.state_dict().values()
    }
    assert not shared - {0}
    assert not any(t.requires_grad and not t.is_leaf for _, t in leaves(list(after.parameters())))
    return after, report
