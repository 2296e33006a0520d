"""The private parts of torch that this package stands on, all named here, and each used by `test_internals`.

Dispatch, for `modes`, `capture` and `aten`:

- `torch._C._AutoDispatchBelowAutograd`: lets operators reach a dispatch mode before autograd takes composite ones
  apart, so that `conv2d`, `linear` and `batch_norm` are seen whole;
- `torch._C.DisableTorchFunction`: no `TorchFunctionMode` sees what we ask of a tensor ourselves;
- `torch._C._DisableTorchDispatch`: no `TorchDispatchMode` sees the memory that we ask for;
- `torch._C._dispatch_has_kernel_for_dispatch_key`, `OpOverload._can_decompose`, `OpOverload.decompose`: whether an
  operator is composite (`CompositeImplicitAutograd`), and its parts; whether autocast wraps it (`AutocastCPU`,
  `AutocastCUDA`);
- `torch._C._is_any_autocast_enabled`, which says no inside a dispatch mode;
- `torch._C._set_grad_enabled` and `torch._VF._make_dual`, as a `TorchFunctionMode` sees them where a model
  differentiates by itself;
- `torch._ops.OpOverload`, with `_schema`, `tags`, `namespace` and `overloadpacket`;
- `torch.utils._python_dispatch.TorchDispatchMode`, with `_should_skip_dynamo`, and `Tensor.__torch_dispatch__`;
- `torch._subclasses.FakeTensorMode`, `torch._subclasses.FakeTensor`, and the logger `torch._subclasses.fake_tensor`;
- `Tensor._base`: what a tensor is a view of; `StorageWeakRef` of `torch.multiprocessing.reductions`, with `cdata`.

Modules:

- `nn.Module.__call__`, `__getattr__` and `__setattr__`, which `capture` replaces while a model runs;
- `_parameters`, `_buffers`, `_modules`, `_forward_hooks`, `_forward_pre_hooks`, `_backward_hooks`,
  `_backward_pre_hooks`, `_state_dict_hooks`, `_load_state_dict_pre_hooks` of modules;
  `torch.nn.modules.module._global_forward_hooks` and `_global_forward_pre_hooks`;
- `nn.modules.batchnorm._BatchNorm`, `nn.modules.conv._ConvNd`, `nn.modules.conv._ConvTransposeNd`;
- `_tensor_name` of the hooks of `torch.nn.utils.prune`.

Trees: `torch.utils._pytree` (`tree_map_only`, `tree_structure`, `tree_unflatten`).

Exported programs, for `archive`: `torch._export.serde`, of it `schema`, `ExportedProgramDeserializer` and
`_dict_to_dataclass`, which are given nothing but what `archive` has looked at. For `recompose`, of the core set of
ATen: `_native_batch_norm_legit_no_training` and `_unsafe_view`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BelowAutograd",
    "autocast_devices",
    "has_composite_kernel",
    "is_fake",
    "make_fake_mode",
    "passed_on",
    "with_autocast",
    "without_dispatch",
    "without_functions",
]


class BelowAutograd(ExitStack):
    """Keeps the dispatcher below autograd; where a model differentiates, only while it does not.

    Attributes:
        differentiates: whether the model is known to differentiate by itself.
        dual: whether it does so by dual numbers, which no setting tells.
    """

    def __init__(self, differentiates: bool) -> None:
        super().__init__()
        self.differentiates, self.dual = differentiates, False

    def settle(self) -> None:
        """Be where operators have to go from now on."""
        self.close()
        if not self.differentiates or not (self.dual or torch.is_grad_enabled()):
            self.enter_context(torch._C._AutoDispatchBelowAutograd())


def without_functions() -> AbstractContextManager[Any]:
    """Ask something of tensors unseen by any `TorchFunctionMode`, by ours and by subclasses."""
    guard: AbstractContextManager[Any] = torch._C.DisableTorchFunction()
    return guard


def without_dispatch() -> AbstractContextManager[Any]:
    """Ask for memory unseen by any `TorchDispatchMode`."""
    guard: AbstractContextManager[Any] = torch._C._DisableTorchDispatch()
    return guard


def has_composite_kernel(name: str) -> bool:
    """Whether an operator ("aten::dropout") is made of others on every device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def autocast_devices() -> tuple[str, ...]:
    """The kinds of device on which autocast is on."""
    if not torch._C._is_any_autocast_enabled():
        return ()
    return tuple(device for device in _AUTOCAST if torch.is_autocast_enabled(device))


@contextmanager
def with_autocast(devices: tuple[str, ...], name: str) -> Iterator[None]:
    """Run an operator inside a dispatch mode as outside of it: with autocast on, unless autocast wraps it already."""
    devices = tuple(device for device in devices if not _is_wrapped(name, device))
    before = _around.set(devices)
    for device in devices:
        torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        for device in devices:
            torch.set_autocast_enabled(device, False)
        _around.reset(before)


def passed_on(operator: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator that another dispatch mode has passed on, with the autocast that was meant for it."""
    if not (devices := _around.get()):
        return operator(*args, **kwargs)
    with with_autocast(devices, operator.name()):
        return operator(*args, **kwargs)


_around: ContextVar[tuple[str, ...]] = ContextVar("autocast", default=())
"""Where autocast is on around the operator under way: a dispatch mode is told that it is off."""


@cache
def _is_wrapped(name: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, _AUTOCAST[device])


def make_fake_mode() -> Any:
    """A mode in which tensors have shapes and no numbers."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers."""
    from torch._subclasses import FakeTensor

    return isinstance(tensor, FakeTensor)
