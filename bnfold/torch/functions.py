"""What is known of torch's functions by name: which read no numbers, which are pure, and every alias of each.

`x + y`, `torch.add`, `Tensor.add`, `Tensor.add_`, `Tensor.__add__` and `Tensor.__iadd__` are different objects that the
recording meets; `variants("add")` finds them all. A function that is not listed is neither free of reading nor pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LIKE", "METADATA", "PURE", "getter", "name_of", "variants"]

_HOMES: tuple[Any, ...] = (torch, Tensor, torch._C.TensorBase, F, torch._C._nn, torch.special, torch._VF)


def variants(name: str) -> Iterator[Callable[..., Any]]:
    """Every function of this name: of torch, of tensors, in place, and as an operator."""
    for home in _HOMES:
        for spelled in (name, f"{name}_", f"__{name}__", f"__i{name}__"):
            found = getattr(home, spelled, None)
            if callable(found):
                yield found


def getter(name: str) -> Any:
    """The function that a tensor's property is, as a `TorchFunctionMode` sees it."""
    return getattr(Tensor, name).__get__


def name_of(function: Any) -> str:
    """A function in one word, as the model's code calls it."""
    if isinstance(function, str):
        return function
    if isinstance(function, torch._ops.OpOverload):
        return str(function.overloadpacket.__name__)
    name = getattr(function, "__name__", None) or type(function).__name__
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return str(name).strip("_")


_TELLING = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})

_QUIET = """
    size dim ndimension stride numel nelement storage_offset element_size get_device is_floating_point is_complex
    is_signed is_contiguous is_pinned is_shared is_set_to is_same_size is_inference is_neg is_conj is_coalesced
    is_distributed __len__ __hash__ __repr__ __str__ __format__ __dir__ _is_view has_names untyped_storage storage
    _typed_storage typed_storage storage_type data_ptr dense_dim sparse_dim result_type can_cast promote_types
    retain_grad register_hook dim_order is_storage _is_zerotensor is_tensor is_grad_enabled has_torch_function
    broadcast_shapes get_default_dtype is_autocast_enabled get_autocast_dtype is_conj is_neg
    _has_compatible_shallow_copy_type finfo iinfo
"""


def _metadata() -> Iterator[Any]:
    for name in (
        "sym_size",
        "sym_numel",
        "sym_stride",
        "sym_storage_offset",
        "sym_is_contiguous",
        "size",
        "stride",
        "dim",
    ):
        packet = getattr(torch.ops.aten, name, None)
        yield from (getattr(packet, each) for each in (packet.overloads() if packet is not None else ()))
    for home in _HOMES:
        for name in _QUIET.split():
            if callable(found := getattr(home, name, None)):
                yield found
    for name in dir(Tensor):
        held: Any = getattr(Tensor, name, None)
        if name not in _TELLING and not callable(held) and hasattr(held, "__get__"):
            yield held.__get__
            if hasattr(held, "__set__"):
                yield held.__set__


METADATA = frozenset(_metadata()) - {Tensor.data.__set__}  # type: ignore[attr-defined]
"""Functions that read no numbers and make no tensor; they pass unrecorded."""

_LIKE = {
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like": 0,
    "new_zeros new_ones new_empty new_full new_tensor new_empty_strided": 0,
    "to type_as view_as reshape_as expand_as": 1,
}

LIKE = {
    function: place for names, place in _LIKE.items() for name in names.split() for function in variants(name)
}
"""Functions that read of one argument (the place is given) no more than its shape and dtype."""

_PURE_NAMES = """
    add sub subtract mul multiply div divide true_divide rsub neg negative reciprocal sqrt rsqrt square pow
    exp exp2 log log2 log1p expm1 abs absolute sign clamp clamp_min clamp_max clip maximum minimum where
    floor ceil round trunc remainder fmod floor_divide sin cos tan tanh sigmoid softmax log_softmax relu
    softplus addcmul addcdiv lerp mean sum amax amin prod var std norm cumsum arange linspace zeros ones
    full eye tensor as_tensor scalar_tensor zeros_like ones_like full_like new_zeros new_ones new_full
    new_tensor view view_as reshape reshape_as flatten unflatten squeeze unsqueeze expand expand_as
    broadcast_to broadcast_tensors repeat tile transpose permute movedim moveaxis t swapaxes swapdims
    adjoint contiguous clone detach to type float double half bfloat16 long int type_as cpu cuda cat concat
    concatenate stack chunk split tensor_split unbind getitem narrow select index_select gather flip roll
    tril triu meshgrid outer matmul mm bmm mv dot einsum linear truediv rtruediv radd rmul rmatmul rpow eq
    ne lt le gt ge logical_and logical_or logical_not bool diag diagonal diag_embed repeat_interleave pad
    positive resolve_conj resolve_neg atleast_1d atleast_2d atleast_3d kron hstack vstack normalize std_mean
    var_mean _weight_norm batch_norm
"""


def _pure() -> Iterator[Any]:
    for name in _PURE_NAMES.split():
        for function in variants(name):
            spelled = getattr(function, "__name__", "")
            if not (spelled.endswith("_") and not spelled.endswith("__")) and not spelled.startswith("__i"):
                yield function
    for name in ("vector_norm", "matrix_norm", "norm", "inv", "multi_dot"):
        yield getattr(torch.linalg, name)
    yield from (getter(name) for name in ("data", "T", "mT", "H", "mH"))


PURE = frozenset(_pure())
"""Functions whose result depends on their arguments alone and that change nothing: constants go through them."""
