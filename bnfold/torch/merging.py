"""Put merged operators into a module: which of its modules can become one, and what becomes of the others.

User code is not edited, so a merged operator must stand where a module is called:

- a chain of modules, each of which is one operator: the last one becomes the merged operator, the others
  `nn.Identity`;
- a module whose whole work it is, but for activations at its end: the module becomes an `nn.Conv`, `nn.Linear` or
  `nn.Embedding`, with its activations after it (`modules.Tail`);
- a sum in somebody's code of what modules give, each of which is one operator: the dearest one becomes the merged
  operator, and the others give a zero that broadcasts (`modules.Zero`).

The model itself is never replaced, so the caller's class stays. Not covered: convolutions that pad differently on two
sides, which torch's modules cannot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfold.algebra import Array
from bnfold.candidates import Candidate
from bnfold.errors import Refuse
from bnfold.ir import Graph, Node
from bnfold.merge import Merge, Merged, merge
from bnfold.operators import Numbers, Operator
from bnfold.torch.calls import ModuleCalls, ModulePlace
from bnfold.torch.modules import Tail, Zero, turn_into
from bnfold.torch.read import Reading
from bnfold.torch.stored import round_like, stored_numbers, stored_tensors
from bnfold.torch.tensors import inside
from bnfold.torch.trace import Frame

__all__ = ["compute_merged", "merge_as_stored", "merge_read", "put_merged", "put_operator", "touched_modules"]


def merge_read(model: nn.Module, reading: Reading, graph: Graph, refused: Collection[str] = ()) -> Merged:
    """Merge the linear operators of a module.

    Args:
        model: the module that was read.
        reading: what was read.
        graph: as `travel` left it.
        refused: paths of modules that must stay as they are.
    """
    if reading.calls is None or reading.fake:
        return Merged(graph)
    return merge(graph, _Host(model, reading, graph, reading.calls, frozenset(refused)))


def merge_as_stored(
    model: nn.Module, reading: Reading, state: Mapping[str, Tensor], folded: Collection[str]
) -> Merged:
    """What was merged in the folded model that a state dict belongs to, by the names and shapes in it.

    The numbers of what is returned are those of an unfolded model, and are to be replaced.

    Args:
        model: unfolded.
        reading: of the model.
        state: the state dict.
        folded: the paths of BatchNorms that are no more.
    """
    gone = {name for name, place in reading.norms.items() if place.path in folded}
    graph = reading.graph.bypass(gone)
    if reading.calls is None:
        return Merged(graph)
    host = _Loading(model, reading, graph, reading.calls, frozenset(), state)
    return merge(graph, host, at_any_cost=True)


@dataclass(frozen=True)
class MergePlace:
    """Which modules a merged operator takes.

    Attributes:
        host: the module that becomes it.
        like: the node whose weight says how numbers are stored.
        idle: paths of modules that pass on what they are given.
        zeros: paths of modules that give zero.
    """

    host: ModulePlace
    like: str
    idle: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.host.path

    @property
    def paths(self) -> tuple[str, ...]:
        """Every module that becomes another one."""
        return (self.host.path, *self.idle, *self.zeros)


def touched_modules(merged: Merged) -> set[str]:
    """The paths of all modules that become others."""
    return {path for one in merged.merges for path in one.place.paths}


@dataclass(eq=False)
class _Host:
    """A module as a host of merged operators; see `bnfold.candidates.Host`."""

    model: nn.Module
    reading: Reading
    graph: Graph
    calls: ModuleCalls
    refused: frozenset[str]
    bypassed: Mapping[str, tuple[str, str]] = field(init=False)
    measured: Mapping[str, list[Frame]] = field(init=False)

    def __post_init__(self) -> None:
        gone = [node for node in self.reading.graph.nodes if node.name not in self.graph]
        self.bypassed = {node.name: (node.outputs[0], node.inputs[0]) for node in gone if node.inputs}
        self.measured = self.calls.measured(self.bypassed)

    def stored(self, node: Node) -> Any:
        """The weight and bias of a linear node."""
        place = self.reading.linears.get(node.name)
        if place is None:
            raise Refuse("its numbers are not stored in a place of their own")
        return stored_numbers(self.model, place)

    def itemsize(self, node: Node) -> int:
        """How many bytes one number of its weight takes."""
        place = self.reading.linears.get(node.name)
        return 4 if place is None else stored_tensors(self.model, place)[0].element_size()

    @property
    def adds_in_place(self) -> bool:
        """Code may accumulate, and no zero without axes takes in what has some."""
        return True

    def can_drop(self, term: Candidate) -> bool:
        """Whether a term of a sum is a module of its own, which can give zero."""
        try:
            return bool(term.node) and not self._find(term, term.nodes).tail
        except Refuse:
            return False

    def place(self, candidate: Candidate) -> MergePlace:
        """The modules that a merged operator can take."""
        like = self._like(candidate)
        _check_form(self.graph, candidate)
        place = self._modules(candidate, like)
        if any(path in self.refused for path in place.paths):
            raise Refuse(f"the code around `{place.host.path}` would not run as it did")
        tensor = stored_tensors(self.model, self.reading.linears[like])[0]
        lookup = isinstance(candidate.operator, Operator) and candidate.operator.lookup
        if tensor.dtype != place.host.dtype and not lookup:
            raise Refuse("their numbers are of different types")
        self._check_numbers(candidate, tensor)
        return place

    def _like(self, candidate: Candidate) -> str:
        linears = [name for name in candidate.nodes if name in self.reading.linears]
        if not linears:
            raise Refuse("there is no weight among them")
        tensors = [stored_tensors(self.model, self.reading.linears[name])[0] for name in linears]
        if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
            raise Refuse("their numbers are of different types, or on different devices")
        return max(linears, key=lambda name: tensors[linears.index(name)].numel())

    def _check_numbers(self, candidate: Candidate, like: Tensor) -> None:
        assert isinstance(candidate.operator, Operator)
        with np.errstate(all="ignore"):
            arrays = candidate.operator.numbers(self.stored)
        if not all(_is_within(array, like) for array in arrays):
            raise Refuse(f"its numbers would overflow {str(like.dtype).removeprefix('torch.')}")
        self.reading.rounded[id(candidate.operator)] = candidate.operator, arrays

    def _modules(self, candidate: Candidate, like: str) -> MergePlace:
        if candidate.dropped:
            self._check_types(candidate)
            host, *others = (self._find(term, term.nodes) for term in candidate.terms)
            if host.tail or any(other.tail for other in others):
                raise Refuse("one of the modules does more than one operator")
            place = MergePlace(host, like, zeros=tuple(other.path for other in others))
            self._check_sizes(place, [term.result for term in candidate.terms[1:]])
            return place
        try:
            links = list(_chain(candidate))
            *idle, host = [self._find(link, (link.node,)) for link in links]
            if any(one.tail for one in idle):
                raise Refuse("one of the modules does more than one operator")
            paths = tuple(one.path for one in idle)
            self.calls.check_idle(paths, host.path)
            place = MergePlace(host, like, idle=paths)
            self._check_sizes(place, [link.result for link in links[:-1]])
            return place
        except Refuse:
            return MergePlace(self._find(candidate, candidate.nodes), like)

    def _check_types(self, candidate: Candidate) -> None:
        """Refuse where a term decides on the type of a sum, which a zero without axes would not."""
        for name, _ in candidate.dropped:
            node = self.graph[name]
            if len({self.calls.dtypes.get(value) for value in (*node.inputs, *node.outputs)}) > 1:
                raise Refuse("they are added to numbers of another type")

    def _check_sizes(self, place: MergePlace, values: Sequence[str]) -> None:
        """Refuse where code that is left asks for the size or type of a value that is gone."""
        for value in values:
            for frame in self.measured.get(value, ()):
                if not any(inside(frame.path or "", path) for path in place.paths):
                    where = frame.path or type(self.model).__name__
                    raise Refuse(f"the code of `{where}` asks for the size or type of what would be gone")

    def _find(self, candidate: Candidate, nodes: Sequence[str]) -> ModulePlace:
        source = candidate.source if len(nodes) > 1 else self.graph[nodes[0]].inputs[0]
        return self.calls.find(nodes, source, candidate.result, self.bypassed)


def _is_within(array: Array, like: Tensor) -> bool:
    """Whether all numbers are finite as they will be stored, which far from the largest ones need not be tried."""
    largest = max(-array.min(), array.max()) if array.size else 0.0  # NaN, where one is
    near = not (like.is_floating_point() and largest < torch.finfo(like.dtype).max / 2)
    return not near or bool(torch.isfinite(round_like(array, like)).all())


@dataclass(eq=False)
class _Loading(_Host):
    """A module as a host of the merged operators that a state dict has weights for."""

    state: Mapping[str, Tensor] = field(default_factory=dict)

    def stored(self, node: Node) -> Any:
        """The weight, and a bias that stands in no rule's way: it is not known whether there was one."""
        return super().stored(node)[0], None

    def place(self, candidate: Candidate) -> MergePlace:
        """The modules that the operator has taken."""
        place, operator = super().place(candidate), candidate.operator
        assert isinstance(operator, Operator)
        path = (
            f"{place.host.path}.merged"
            if _is_wrapped(self.model, self.reading, place, operator)
            else place.host.path
        )
        tail = tuple(f"{place.host.path}.{name}." for name, _ in place.host.tail)
        held = {
            name: tuple(tensor.shape)
            for name, tensor in self.state.items()
            if any(inside(name, gone) for gone in place.paths)
            and not name.startswith(tail)
            and isinstance(tensor, Tensor)
        }
        if held.get(f"{path}.weight") != _weight_shape(operator) or len(held) > 1 + (f"{path}.bias" in held):
            raise Refuse("it is not what the state dict has weights for")
        return place


def _is_wrapped(model: nn.Module, reading: Reading, place: MergePlace, operator: Operator) -> bool:
    """Whether the operator is a child of the module that it stands for.

    It is where something comes after it, and where a state dict would otherwise look as that of a model that was folded
    and not merged. What a module keeps there besides tensors (`get_extra_state`) tells nothing.
    """
    norms = {norm.path for norm in reading.norms.values()}
    held = {
        f"{path}.{name}": tuple(tensor.shape)
        for path in place.paths
        for name, tensor in model.get_submodule(path).state_dict().items()
        if isinstance(tensor, Tensor) and not any(inside(f"{path}.{name}", norm) for norm in norms)
    }
    weight, bias = f"{place.host.path}.weight", f"{place.host.path}.bias"
    return bool(place.host.tail) or (
        held.get(weight) == _weight_shape(operator) and held.keys() <= {weight, bias}
    )


def _weight_shape(operator: Operator) -> tuple[int, ...]:
    """The shape in which torch stores the weight of an operator."""
    if operator.lookup:
        return operator.inputs, operator.outputs
    return operator.outputs, operator.inputs // operator.groups, *operator.kernel


def _chain(candidate: Candidate) -> Iterator[Candidate]:
    """The links of a chain of single operators, from the first to the last.

    Raises:
        Refuse: it is no chain.
    """
    links = [candidate]
    while links[-1].parts:
        if len(links[-1].parts) > 1:
            raise Refuse("it is a sum")
        links.append(links[-1].parts[0])
    yield from reversed(links)


def _check_form(graph: Graph, candidate: Candidate) -> None:
    """Refuse what no module of torch.nn computes."""
    operator, rank = candidate.operator, len(graph.shapes.get(candidate.result, ()))
    assert isinstance(operator, Operator)
    if operator.window is None:
        if not operator.lookup and {operator.in_axis, operator.out_axis} != {rank - 1}:
            raise Refuse("torch has no module for a matrix along another axis than the last")
    elif any(before != after for before, after in operator.window.pads or ()):
        raise Refuse("torch's convolutions pad alike on both sides")
    elif len(operator.window.kernel) not in _CONVOLUTIONS:
        raise Refuse("torch has no such convolution")


# ---------------------------------------------------------------- writing


@dataclass(frozen=True, eq=False)
class Computed:
    """A merged operator that is ready to be written.

    Attributes:
        place: the modules that it takes.
        operator, numbers: what it is, and its weight and bias in float64.
        like: a tensor that says how they are to be stored.
        wrapped: whether it is to be a child of the module that it stands for.
        trained: whether a gradient was wanted of any weight that it was made of.
    """

    place: MergePlace
    operator: Operator
    numbers: Numbers
    like: Tensor
    wrapped: bool
    trained: bool


def compute_merged(
    model: nn.Module, reading: Reading, merged: Merged, known: dict[Any, Any] | None = None
) -> list[Computed]:
    """All merged operators of a module that is as it was read.

    Args:
        known: numbers that were computed before, by the identity of their operator, with that; what is missing is put
            there.
    """
    known = {} if known is None else known

    def stored(node: Node) -> Any:
        return stored_numbers(model, reading.linears[node.name])

    def compute(one: Merge) -> Computed:
        like = stored_tensors(model, reading.linears[one.place.like])[0]
        wrapped = _is_wrapped(model, reading, one.place, one.operator)
        places = [reading.linears[name] for name in one.candidate.nodes if name in reading.linears]
        trained = any(stored_tensors(model, place)[0].requires_grad for place in places)
        if id(one.operator) not in known:
            known[id(one.operator)] = one.operator, one.operator.numbers(stored)
        return Computed(one.place, one.operator, known[id(one.operator)][1], like, wrapped, trained)

    return [compute(one) for one in merged.merges]


def put_merged(model: nn.Module, computed: Sequence[Computed]) -> list[Tensor]:
    """Let modules become merged operators; return the tensors that are new."""
    made: list[Tensor] = []
    for one in computed:
        for path in one.place.idle:
            turn_into(model.get_submodule(path), nn.Identity())
        for path in one.place.zeros:
            turn_into(model.get_submodule(path), Zero())
        operator = _module(one.operator, one.numbers, one.like)
        module = model.get_submodule(one.place.host.path)
        made += operator.requires_grad_(one.trained).parameters()
        turn_into(
            module, Tail({"merged": operator}, module, one.place.host.tail) if one.wrapped else operator
        )
    return made


def put_operator(
    model: nn.Module, host: ModulePlace, operator: Operator, numbers: Numbers, like: Tensor
) -> list[Tensor]:
    """Let a module become an operator, and what it does after it; return the new tensors."""
    made, module = _module(operator, numbers, like), model.get_submodule(host.path)
    turn_into(module, Tail({"merged": made}, module, host.tail))
    return list(made.parameters())


_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _module(operator: Operator, numbers: Numbers, like: Tensor) -> nn.Module:
    """The module of torch.nn that an operator is."""
    weight, bias = numbers
    biased = bool(np.any(bias != 0))
    if operator.lookup:
        module = _bare(nn.Embedding, operator.inputs, operator.outputs)
        return _fill(module, {"weight": weight[0].T + bias}, like)
    window = operator.window
    if window is None:
        module = _bare(nn.Linear, operator.inputs, operator.outputs, bias=biased)
    else:
        assert window.pads is not None
        pads = tuple(before for before, _ in window.pads)
        sizes = (operator.inputs, operator.outputs, window.kernel, window.strides, pads, window.dilations)
        module = _bare(_CONVOLUTIONS[len(window.kernel)], *sizes, groups=operator.groups, bias=biased)
    return _fill(
        module,
        {"weight": weight.reshape(_weight_shape(operator)), **({"bias": bias} if biased else {})},
        like,
    )


def _bare(kind: type[nn.Module], *arguments: Any, **options: Any) -> nn.Module:
    """A module whose parameters are not initialised, which would draw random numbers."""
    quiet: Any = type(kind.__name__, (kind,), {"reset_parameters": lambda module: None})
    module: nn.Module = quiet(*arguments, **options)
    module.__class__ = kind
    return module


def _fill(module: nn.Module, arrays: Mapping[str, Array], like: Tensor) -> nn.Module:
    """Give a module its numbers, of another tensor's dtype and device, in its memory format."""
    for name, array in arrays.items():
        tensor = round_like(np.ascontiguousarray(array), like)
        if array.ndim == like.dim() == 4 and _is_channels_last(like):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        module._parameters[name] = nn.Parameter(tensor, like.requires_grad)
    return module


def _is_channels_last(tensor: Tensor) -> bool:
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()
