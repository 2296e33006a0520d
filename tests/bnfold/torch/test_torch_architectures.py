"""Each small architecture comes out of folding with no BatchNorm that algebra could have removed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.torch_architectures import ARCHITECTURES
from tests.torch_models import check, has_norm


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    build, inputs, stay = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = build()
    norms = [path for path, module in model.named_modules() if has_norm(module)]
    after, _ = check(model, inputs, folded=[path for path in norms if path not in stay], kept=stay)
    left = {path for path, module in after.named_modules() if has_norm(module)}
    assert left == stay
    assert set(after.state_dict()) - set(model.state_dict()) <= {
        f"{p}.bias" for p, m in after.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)
    }
