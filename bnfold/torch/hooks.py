"""Whether somebody looks at what goes through a module: its hooks, but for those that only compute its weight.

`capture` notes a call "Hook" that reads what the observer sees. Nothing travels through it, so a value that a hook sees
stays as it is (`reasons.ALSO_READ` upwards, `reasons.NOT_LINEAR` downwards).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

__all__ = ["computes_weight", "observers"]


def observers(module: nn.Module) -> str:
    """Whether somebody looks at what goes through a module: its hooks, or those on every module."""
    everywhere = torch.nn.modules.module
    if module._forward_hooks or everywhere._global_forward_hooks:
        return "hook"
    known = {id(hook) for hook in module._forward_pre_hooks.values() if computes_weight(hook)}
    if len(known) < len(module._forward_pre_hooks) or everywhere._global_forward_pre_hooks:
        return "pre-hook"
    return ""


def computes_weight(hook: Any) -> bool:
    """Whether a pre-hook is one of torch's that only compute the module's weight."""
    return type(hook).__module__ in _WEIGHT_HOOKS or isinstance(hook, prune.BasePruningMethod)


_WEIGHT_HOOKS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")
