"""Make whole operators again of those that `ExportedProgram.run_decompositions` leaves of the layers of a net.

The core set of ATen has one convolution for all, a BatchNorm in evaluation that gives three values, and a product with
a transposed parameter in place of a linear layer. What the exporter writes for a layer is undone; anything else stays.

Not covered: a linear layer without a bias on a value whose axes were permuted; that is a batched product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["arguments_of", "rank_of", "recompose"]

aten = torch.ops.aten

_CONVOLUTIONS = {
    (1, False): aten.conv1d.default,
    (2, False): aten.conv2d.default,
    (3, False): aten.conv3d.default,
    (1, True): aten.conv_transpose1d.default,
    (2, True): aten.conv_transpose2d.input,
    (3, True): aten.conv_transpose3d.input,
}


def recompose(module: fx.GraphModule) -> None:
    """Undo `run_decompositions` where a parameter is read: the operators of the core set that layers are made of."""
    for node in list(module.graph.nodes):
        whole = _WHOLE.get(node.target, _leave)(node) if node.op == "call_function" else None
        if whole is None:
            continue
        function, arguments, old = whole
        with module.graph.inserting_before(node):
            new = module.graph.call_function(function, arguments)
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        module.graph.erase_node(old)
        if node is not old:
            module.graph.erase_node(node)
    for node in reversed(module.graph.nodes):
        if node.target in (aten.permute.default, *_VIEWS) and not node.users:
            module.graph.erase_node(node)
    module.recompile()


_Whole = tuple[Any, tuple[Any, ...], fx.Node]
"""The operator that a call is a part of, what that is called with, and the node whose value it gives."""


def _leave(node: fx.Node) -> _Whole | None:
    return None


def _whole_convolution(node: fx.Node) -> _Whole | None:
    given = arguments_of(node)
    transposed, stride = given["transposed"], given["stride"]
    function = _CONVOLUTIONS.get((len(stride), transposed))
    if function is None or node.kwargs:
        return None
    first = given["input"], given["weight"], given["bias"], stride, given["padding"]
    if transposed:
        return function, (*first, given["output_padding"], given["groups"], given["dilation"]), node
    return function, (*first, given["dilation"], given["groups"]), node


def _whole_norm(node: fx.Node) -> _Whole | None:
    """A BatchNorm in evaluation gives three values, of which only the first is any."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not operator.getitem or users[0].args[1] != 0 or node.kwargs:
        return None
    given = arguments_of(node)
    tensors = [given[name] for name in ("input", "weight", "bias", "running_mean", "running_var")]
    return aten.batch_norm.default, (*tensors, False, given["momentum"], given["eps"], True), users[0]


def _whole_linear(node: fx.Node) -> _Whole | None:
    """A product with a transposed parameter, with a bias or without."""
    biased = node.target is aten.addmm.default
    given: Any = node.args
    bias, x, turned = given if biased and len(given) == 3 else (None, *given)
    plain = isinstance(turned, fx.Node) and turned.target is aten.permute.default and not node.kwargs
    if not plain or list(turned.args[1]) != [1, 0] or (biased and rank_of(bias) != 1):
        return None
    x, node = _without_views(x, node)
    return aten.linear.default, (x, turned.args[0], bias), node


_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def _without_views(x: Any, node: fx.Node) -> tuple[Any, fx.Node]:
    """What a product of rows is made of, and gives, where its rows are only another shape of more axes."""
    users = list(node.users)
    if not (x.target in _VIEWS and len(users) == 1 and users[0].target in _VIEWS):
        return x, node
    given, made = (_shape_of(each) for each in (x.args[0], users[0]))
    same = given and made and given[:-1] == made[:-1] and given[-1] == _shape_of(x)[-1]
    return (x.args[0], users[0]) if same and made[-1] == _shape_of(node)[-1] else (x, node)


def _shape_of(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


_WHOLE: dict[Any, Callable[[fx.Node], _Whole | None]] = {
    aten.convolution.default: _whole_convolution,
    aten._native_batch_norm_legit_no_training.default: _whole_norm,
    aten.addmm.default: _whole_linear,
    aten.mm.default: _whole_linear,
}


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the names of the operator's schema."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values = list(node.args) + [argument.default_value for argument in schema[len(node.args) :]]
    return {argument.name: value for argument, value in zip(schema, values, strict=True)}


def rank_of(node: fx.Node) -> int:
    """How many axes the value of a node has; 4 where nobody noted it."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 4
