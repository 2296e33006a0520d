"""What torch's operators are, by their schemas: an operator says itself what it returns, changes and draws by lot.

An operator is one `OpOverload` (`aten.add.Tensor`), which is what a dispatch mode sees, whatever Python spelled:
`x + y`, `torch.add`, `Tensor.add`, `Tensor.__radd__` and `x.add_(y)`, but for the mark of the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from bnfold.torch.internals import has_composite_kernel
from bnfold.torch.tensors import returned

__all__ = [
    "depends_on_numbers",
    "gives_number",
    "is_composite",
    "is_metadata",
    "is_pure",
    "is_view",
    "makes_list",
    "makes_whole",
    "name_of",
    "reads_shape",
    "sized_axes",
    "written",
]


@cache
def name_of(function: Any) -> str:
    """An operator in one word, without the mark of its in-place form; one that is not torch's with its namespace.

    Any other function by its name, and a word as it is.
    """
    if not isinstance(function, OpOverload):
        return str(getattr(function, "__name__", function))
    name = str(function.overloadpacket.__name__)
    name = name if name.endswith("__") else name.removesuffix("_")
    return name if function.namespace == "aten" else f"{function.namespace}.{name}"


@cache
def is_composite(operator: OpOverload) -> bool:
    """Whether an operator is made of others, the same ones on every device; torch's `prim` are not even dispatched."""
    if operator.namespace == "prim":
        return False
    return operator._can_decompose() and has_composite_kernel(str(operator.name()))  # type: ignore[no-untyped-call]


def _makes_tensors(operator: OpOverload) -> bool:
    return any("Tensor" in str(each.type) for each in operator._schema.returns)


@cache
def is_metadata(operator: OpOverload) -> bool:
    """Whether it tells of a tensor what is known without its numbers, and makes none: a size, a device, a layout.

    A composite operator is no such thing, whatever it returns: `is_nonzero` has no tag that says what its parts do.
    """
    if not operator._schema.returns or _makes_tensors(operator) or is_composite(operator):
        return False
    return operator.namespace in ("aten", "prim") and torch.Tag.data_dependent_output not in operator.tags


@cache
def is_pure(operator: Any) -> bool:
    """Whether all that it does is to make tensors of its arguments: constants go through it."""
    if not isinstance(operator, OpOverload) or operator.namespace != "aten" or operator._schema.is_mutable:
        return False
    drawn = torch.Tag.nondeterministic_seeded in operator.tags
    unset = name_of(operator).startswith(("empty", "new_empty"))
    return _makes_tensors(operator) and not drawn and not unset and not _tells_by_shape(operator)


@cache
def _tells_by_shape(operator: OpOverload) -> bool:
    """Whether the shape of the result depends on numbers; that of an index only where it is a mask."""
    dynamic = torch.Tag.dynamic_output_shape in operator.tags
    return dynamic and operator.overloadpacket is not torch.ops.aten.index


@cache
def is_view(operator: OpOverload) -> bool:
    """Whether all that it makes is another look at memory that it is given: its numbers say nothing."""
    returns = operator._schema.returns
    return (
        bool(returns)
        and all(each.alias_info is not None for each in returns)
        and not operator._schema.is_mutable
    )


def reads_shape(operator: Any) -> bool:
    """Whether it reads no more of its first argument than the shape and the dtype: `zeros_like`, `new_full`."""
    name = name_of(operator)
    return name.endswith("_like") or name.startswith("new_")


@cache
def gives_number(operator: OpOverload) -> bool:
    """Whether it gives away a number of a tensor, as no tensor."""
    return torch.Tag.data_dependent_output in operator.tags


@cache
def depends_on_numbers(operator: OpOverload) -> bool:
    """Whether more than the numbers of its result depend on numbers: what it tells, how much it makes, when it ends."""
    name = name_of(operator)
    endless = name == "binomial" or "_polynomial_" in name
    return gives_number(operator) or _tells_by_shape(operator) or endless


def makes_whole(operator: OpOverload, args: Any, result: Any) -> bool:
    """Whether it rounds floats to whole numbers: of one that is none, or is too large, it makes any."""
    if name_of(operator) not in ("to", "_to_copy", "type_as", "copy", "view"):
        return False
    floats = any(tensor.is_floating_point() for tensor in returned(args))
    return floats and any(_is_whole(tensor) for tensor in returned(result))


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)


_FIRST = {"nonzero", "masked_select", "bincount", "unique", "_unique", "_unique2", "unique_consecutive"}
"""Operators of whose result only the first axis is as long as the numbers say."""


def sized_axes(operator: Any, args: Any, rank: int) -> range:
    """Those axes of a result of that rank that may be as long as the numbers of the arguments say."""
    if not isinstance(operator, OpOverload):
        return range(0)
    if operator.overloadpacket is torch.ops.aten.index:
        masks = any(value.dtype in (torch.bool, torch.uint8) for value in _parts(args[1:]))
        return range(rank if masks else 0)
    if not _tells_by_shape(operator):
        return range(0)
    return range(min(rank, 1) if name_of(operator) in _FIRST else rank)


def _parts(thing: Any) -> Iterator[Any]:
    """What has a dtype in nested tuples."""
    if isinstance(thing, tuple | list):
        for part in thing:
            yield from _parts(part)
    elif hasattr(thing, "dtype"):
        yield thing


@cache
def makes_list(operator: Any) -> bool:
    """Whether it gives as many tensors as a size says."""
    return isinstance(operator, OpOverload) and any(
        str(each.type) == "List[Tensor]" for each in operator._schema.returns
    )


def written(operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors among the arguments that it changes."""
    if operator._schema.is_mutable:
        for place, argument in enumerate(operator._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from returned(args[place] if place < len(args) else kwargs.get(argument.name))
