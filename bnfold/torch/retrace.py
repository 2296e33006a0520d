"""Rehearse a fold: does the folded module still run the code that was read?

Folding takes modules out and adds biases, and Python code can look at both: `if self.conv.bias is None`,
`isinstance(layer, nn.BatchNorm2d)`, `self.bn.eps`, a forward that never passes its bias on. So the folded module is
recorded as well, and its calls are compared with those that were read, but for what the fold took out. Where they
differ, or the folded module does not run, the BatchNorms and biases in question are looked for by halving: each half
is taken out (or added) without its numbers, and the rest must still run the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import nn

from bnfold import reasons
from bnfold.ir import Graph, Node
from bnfold.merge import Merged
from bnfold.torch.merging import touched_modules
from bnfold.torch.read import Reading, draw_steps
from bnfold.torch.sandbox import copy_structure
from bnfold.torch.sizes import is_of_torch
from bnfold.torch.steps import TraceStep
from bnfold.torch.write import become, write
from bnfold.travel import Plan

__all__ = [
    "find_fault",
    "find_hidden_biases",
    "find_unmergeable",
    "read_again",
    "refuse_everything",
    "runs_alike",
]

_MOST_TRIALS = 20
"""As many twins are built to find the merges that a module's code does not go along with."""

_ALIKE = {"clamp": "hardtanh"}


def runs_alike(
    folded: nn.Module, example_inputs: Any, reading: Reading, plan: Plan, merged: Merged | None = None
) -> bool:
    """Whether the folded module runs the calls that were read, and passes on each bias that it was given.

    What runs within modules that became merged operators is not compared, nor the sums that have lost operands to one.
    """
    shifted = (node for node in plan.graph.nodes if node.linear is not None and node.linear.shifts)
    places = (reading.linears[node.name] for node in shifted if node.name in reading.linears)
    biased = _with_companions(reading, {place.weight.name for place in places if place.bias is not None})
    if merged is None or not merged.merges or reading.calls is None:
        return _matches(folded, example_inputs, reading, biased)
    paths = touched_modules(merged)
    inputs = {name: plan.graph[name].inputs for name in merged.left}
    gone = {
        name: inputs[name][places[0]] if places else inputs[name][0] for name, places in merged.left.items()
    }
    expected = replace(reading, steps=reading.calls.steps(paths, gone))
    return _matches(folded, example_inputs, expected, biased, paths)


def _matches(
    folded: nn.Module,
    example_inputs: Any,
    reading: Reading,
    biased: Mapping[str, str],
    replaced: Collection[str] = (),
) -> bool:
    try:
        steps = draw_steps(folded, example_inputs, reading, replaced)
    except Exception:  # noqa: BLE001 whatever the code raises that missed something
        return False
    return _all_same(reading.steps, steps, biased)


def _all_same(mine: Sequence[TraceStep], theirs: Sequence[TraceStep], biased: Mapping[str, str]) -> bool:
    pairs = zip(mine, theirs, strict=False)
    return len(mine) == len(theirs) and all(_same(one, other, biased) for one, other in pairs)


def _same(mine: TraceStep, theirs: TraceStep, biased: Mapping[str, str]) -> bool:
    if _ALIKE.get(mine.label, mine.label) != _ALIKE.get(theirs.label, theirs.label) or (
        mine.inputs,
        mine.sources,
        mine.settings,
    ) != (theirs.inputs, theirs.sources, theirs.settings):
        return False
    if (mine.affine is None) != (theirs.affine is None):
        return False
    if mine.affine is not None and theirs.affine is not None and not mine.affine.equals(theirs.affine):
        return False
    if not mine.weight:
        return True
    elsewhere = bool(theirs.weight) and theirs.weight != mine.weight
    return not elsewhere and theirs.bias == (mine.bias or biased.get(mine.weight, ""))


def _with_companions(reading: Reading, weights: Collection[str]) -> dict[str, str]:
    """The biases of some weights, and of those that have another part of one: it is there for all, or for none."""
    places = [place for place in reading.linears.values() if place.bias is not None]
    biases = [(place.weight.name, place.bias) for place in places if place.bias is not None]
    shared = {bias.whole for weight, bias in biases if weight in weights}
    return {weight: bias.name for weight, bias in biases if bias.whole in shared}


def read_again(model: nn.Module, example_inputs: Any, reading: Reading) -> Reading:
    """The reading with the calls of a further pass, which finds what a first one has left in caches."""
    try:
        return replace(reading, steps=draw_steps(copy_structure(model), example_inputs, reading))
    except Exception:  # noqa: BLE001 what runs once only has no second pass to compare
        return reading


def find_fault(model: nn.Module, example_inputs: Any, reading: Reading) -> Reading:
    """The reading without what cannot be taken out or added, as far as that can be told; else without anything."""
    norms = sorted({place.path for place in reading.norms.values()})
    biases = sorted({place.weight.name for place in reading.linears.values() if place.bias is not None})

    def take_out(paths: Sequence[str]) -> bool:
        return _matches(_without(model, reading, set(paths), ()), example_inputs, reading, {})

    def add(names: Sequence[str]) -> bool:
        biased = _with_companions(reading, names)
        return _matches(_without(model, reading, set(), biased), example_inputs, reading, biased)

    if reading.data_dependent:
        return refuse_everything(model, example_inputs, reading)
    return _refuse(reading, set(_culprits(norms, take_out)), set(_culprits(biases, add)))


def find_hidden_biases(model: nn.Module, reading: Reading, plan: Plan) -> Reading:
    """The reading without the new biases that code of the model's own passes on for some inputs only.

    A further pass on each of the other inputs must take them all; those of torch's modules are taken for granted.
    """
    shifted = [node.name for node in plan.graph.nodes if node.linear is not None and node.linear.shifts]
    own = [name for name in reading.linears if _is_own_bias(model, reading, name)]
    if set(own).isdisjoint(shifted):
        return reading
    before = [(given, _steps_of(model, given, reading)) for given in reading.tried]

    def take(some: Sequence[str]) -> bool:
        biased = _with_companions(reading, some)
        twin = _without(model, reading, set(), biased)
        tried = ((_steps_of(twin, given, reading), steps) for given, steps in before if steps is not None)
        return all(mine is not None and _all_same(steps, mine, biased) for mine, steps in tried)

    names = sorted({reading.linears[name].weight.name for name in own})
    hidden = set(_culprits(names, take))
    return _refuse(reading, set(), hidden) if hidden else reading


def _is_own_bias(model: nn.Module, reading: Reading, name: str) -> bool:
    """Whether the bias of an operator is new, in a module whose code is not torch's."""
    place = reading.linears.get(name)
    if place is None or place.bias is None or place.code is not None:
        return False
    owner = model.get_submodule(place.bias.module)
    return getattr(owner, place.bias.attribute, None) is None and not is_of_torch(owner)


def _steps_of(model: nn.Module, given: Any, reading: Reading) -> tuple[TraceStep, ...] | None:
    try:
        return draw_steps(model, given, reading)
    except Exception:  # noqa: BLE001 whatever the code raises
        return None


def find_unmergeable(
    model: nn.Module, example_inputs: Any, reading: Reading, plan: Plan, merged: Merged
) -> set[str]:
    """The modules that cannot become merged operators, since other code would not run as it did.

    Those of which that is not known after `_MOST_TRIALS` are taken for such.
    """
    merges = {one.place.host.path: one for one in merged.merges}
    trials = count()

    def works(paths: Sequence[str]) -> bool:
        if next(trials) >= _MOST_TRIALS:
            return False
        some = merged.only((merges[path] for path in paths), plan.graph)
        twin = write(copy_structure(model), reading, plan, inplace=True, merged=some)
        return runs_alike(twin, example_inputs, reading, plan, some)

    return set(_culprits(sorted(merges), works))


def refuse_everything(model: nn.Module, example_inputs: Any, reading: Reading) -> Reading:
    """The reading with every BatchNorm kept."""
    refused = _refuse(reading, {place.path for place in reading.norms.values()}, set())
    written = {
        name: replace(refused.graph[name], affine=None, reason=reasons.LOOKS_AT_NUMBERS())
        for name in reading.formulas
    }
    return replace(refused, graph=refused.graph.replace(written))


def _culprits(candidates: list[str], works: Callable[[Sequence[str]], bool]) -> list[str]:
    """Those that do not work, found by halving."""
    if not candidates or works(candidates):
        return []
    if len(candidates) == 1:
        return candidates
    half = len(candidates) // 2
    return _culprits(candidates[:half], works) + _culprits(candidates[half:], works)


def _without(model: nn.Module, reading: Reading, norms: set[str], biases: Collection[str]) -> nn.Module:
    """A copy without some BatchNorms and with some biases of zero, whatever that makes of its numbers."""
    twin = copy_structure(model)
    for norm in dict.fromkeys(reading.norms.values()):
        if norm.path in norms:
            become(twin.get_submodule(norm.path), norm, None)
    for name, place in reading.linears.items():
        linear = reading.graph[name].linear
        if place.weight.name in biases and place.bias is not None and linear is not None:
            owner = twin.get_submodule(place.bias.module)
            if getattr(owner, place.bias.attribute, None) is None:
                weight = getattr(owner, place.weight.attribute)
                size = len(weight) if place.bias.part else linear.outputs
                zeros = torch.zeros(size, dtype=weight.dtype, device=weight.device)
                vars(owner).pop(place.bias.attribute, None)
                owner._parameters[place.bias.attribute] = nn.Parameter(zeros, weight.requires_grad)
    return twin


def _refuse(reading: Reading, norms: set[str], biases: set[str]) -> Reading:
    """The reading with these BatchNorms kept and these biases not to be written."""
    nodes: dict[str, Node] = {}
    for node in reading.graph.nodes:
        norm, linear = reading.norms.get(node.name), reading.linears.get(node.name)
        if norm is not None and norm.path in norms and node.affine is not None:
            nodes[node.name] = replace(node, affine=None, reason=reasons.LOOKED_AT())
        if linear is not None and linear.weight.name in biases and node.linear is not None:
            own = replace(node.linear, biasless=node.linear.biasless or reasons.BIAS_CHANGES_CODE())
            nodes[node.name] = replace(node, linear=own)
    graph: Graph = reading.graph.replace(nodes)
    return replace(reading, graph=graph)
