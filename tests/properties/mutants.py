"""The driver with one mistake in it, in as many ways as here are lines: a guard dropped, a sign, a reader, a shift.

Each is a change to the text of a module. The mutated copy decides; what it decided is judged by the real checker, and by
the numbers. A row of the table is mutated on the way up only, since the way down is what the checker itself asks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bnfold import algebra, rules, travel


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: what it is.
        module: `travel`, `rules` or `algebra`.
        old, new: the text, which is there once, and what stands there instead.
    """

    name: str
    module: str
    old: str
    new: str


def _of(module: str, *mutants: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(name, module, old, new) for name, old, new in mutants]


MUTANTS = [
    *_of(
        "travel",
        ("sharing unchecked", "if not all(name in self.changed and _same", "if False and not all(name in self.changed and _same"),
        ("an output scaled", "if self.driver.is_output(value):\n            raise Refuse(f\"{name}", "if False:\n            raise Refuse(f\"{name}"),
        ("readers forgotten above", "yield reader.name, self._need(reader, demand.rank)", "yield reader.name, demand"),
        ("contradiction ignored", "            if both is None:\n                raise", "            if both is None:\n                continue\n                raise"),
        ("an output below", "                if self.driver.is_output(value):\n", "                if False:\n"),
        ("a reader forgotten below", "for reader in self.driver.readers(value):\n                    if reader.name not in seen:", "for reader in list(self.driver.readers(value))[:1]:\n                    if reader.name not in seen:"),
        ("own map first, above", "wanted.after(own)", "own.after(wanted)"),
        ("own map last, below", "own.after(given)", "given.after(own)"),
        ("own map alone, above", "return own if wanted is None else wanted.after(own)", "return own"),
        ("own map alone, below", "return own if given is None else own.after(given)", "return own"),
        ("half a shift left", "self._leave(node, own.shift)", "self._leave(node, own.shift / 2)"),
        ("shift of a half not divided", "own.shift / own.scale", "own.shift"),
        ("whole map moved as a half", "        self._leave(node, own.shift)\n        return own.scale_only()", "        self._leave(node, own.shift)\n        return own"),
        ("half erased as well", "        if not self.half:\n            for node in self._members()", "        if True:\n            for node in self._members()"),
        ("nothing left of a half", "self.changed[node.name] = node.leave(Affine.of(1.0, shift))", "self.changed[node.name] = node.leave(Affine.of(1.0, 0.0 * shift))"),
        ("beside, not less one, above", "parallel[2] * (vectors[0] - 1.0)", "parallel[2] * vectors[0]"),
        ("beside, sign lost, above", "parallel[2] * (vectors[0] - 1.0)", "(vectors[0] - 1.0)"),
        ("beside, not less one, below", "absorb_parallel(sign * (scale - 1.0), sign * shift)", "absorb_parallel(sign * scale, sign * shift)"),
        ("beside, shift lost", "absorb_parallel(sign * (scale - 1.0), sign * shift)", "absorb_parallel(sign * (scale - 1.0), 0 * shift)"),
        ("beside, sign of shift lost", "absorb_parallel(sign * (scale - 1.0), sign * shift)", "absorb_parallel(sign * (scale - 1.0), shift)"),
        ("beside, forgotten", "for scale in self.extra.get(node.name, ()):", "for scale in ():"),
        ("beside, shared", "if self.driver.is_shared(value) or self.driver.is_output(value):", "if False:"),
        ("beside, of another value", "if self._origin(producer.inputs[0], members) == origin:", "if True:"),
        ("beside, nothing is read", "origin not in self.driver.centred", "not origin"),
        ("sign of a shift that leans", "sign_of(node, 1) * wanted[0].shift", "-sign_of(node, 1) * wanted[0].shift"),
        ("readers not handed on", "        names.update(self._reads(below))\n", ""),
        ("outputs not handed on", "        if below in self.outputs:\n            self.outputs.add(above)\n", ""),
        ("an input scaled", "                if producer is None:\n                    raise", "                if producer is None:\n                    continue\n                    raise"),
        ("one use of two speaks", "                    if sources.count(value) > 1:\n", "                    if False:\n"),
    ),
    *_of(
        "rules",
        ("composed the wrong way above", "_only(wanted).settle(None).after(_affine(node))", "_affine(node).after(_only(wanted).settle(None))"),
        ("composed without settling a sign", "_only(wanted).settle(None).after(_affine(node))", "Affine(-_only(wanted).scale, _only(wanted).shift).settle(None).after(_affine(node))"),
        ("a transpose not undone", "inverse = np.argsort(node.attributes[\"perm\"])", "inverse = node.attributes[\"perm\"]"),
        ("a repeated channel", "if not np.array_equal(full[indices.ravel()], array, equal_nan=True):", "if False:"),
        ("pieces cut at the wrong place", "ends = np.cumsum(sizes)[:-1]", "ends = np.cumsum(sizes[::-1])[:-1]"),
        ("pieces in the wrong order", "    return [Affine(scale, shift).collapse() for scale, shift in cut]", "    return [Affine(scale, shift).collapse() for scale, shift in cut][::-1]"),
        ("a copied axis", "    if any(axis in copied for axis in affine.axes):\n", "    if False:\n"),
        ("a tile that differs", "if not all(np.array_equal(block, blocks[0], equal_nan=True) for block in blocks):", "if False:"),
        ("shift into every operand", "            *scaled[place + 1 :],\n        ]", "            *[_narrow(node, around, affine, value) for value in node.inputs[place + 1 :]],\n        ]"),
        ("scale into one operand", "            *scaled[place + 1 :],\n        ]", "            *[None for value in node.inputs[place + 1 :]],\n        ]"),
        ("sign of a shift in a difference", "Affine(whole.scale, sign_of(node, place) * whole.shift)", "Affine(whole.scale, whole.shift)"),
        ("scale into every factor", "return [factor if here == place else None for here in range(len(node.inputs))]", "return [factor for here in range(len(node.inputs))]"),
        ("scale into the divisor", "places = range(1 if node.op == \"Div\" else len(node.inputs))", "places = range(len(node.inputs))[::-1]"),
        ("a shift through", "    if not affine.is_linear:\n        because", "    if False:\n        because"),
        ("a negative scale through", "    if not affine.is_monotone:\n", "    if False:\n"),
        ("mixed positions", "    if any(axis in axes for axis in affine.axes):\n        raise Refuse(f\"`{node.name}` ({node.op}) mixes positions", "    if False:\n        raise Refuse(f\"`{node.name}` ({node.op}) mixes positions"),
        ("weights that do not sum to one", "return _linear_only(node, affine, node.partial) if node.partial else affine", "return affine"),
        ("conjugated without its shift", "(affine.shift + own.shift * (affine.scale - 1)) / own.scale", "affine.shift / own.scale"),
        ("conjugated with the wrong shift", "(affine.shift + own.shift * (affine.scale - 1)) / own.scale", "(affine.shift + own.shift * affine.scale) / own.scale"),
        ("a shift where there is no bias", "    if linear.biasless and np.any(shift != 0):\n", "    if False:\n"),
        ("channels spread the other way", "if node.attributes[\"mode\"] == \"CRD\":", "if node.attributes[\"mode\"] != \"CRD\":"),
    ),
    *_of(
        "algebra",
        ("after: an older shift not scaled", "            shift = scale * self.after[1] + shift\n", "            shift = self.after[1] + shift\n"),
        ("after: an older shift lost", "            shift = scale * self.after[1] + shift\n", "            pass\n"),
        ("after: what is beside not scaled", "parallel = None if self.parallel is None else scale * self.parallel", "parallel = self.parallel"),
        ("after: an older scale lost", "return replace(self, after=(scale * first, shift), parallel=parallel)", "return replace(self, after=(scale, shift), parallel=parallel)"),
        ("before: an older shift lost", "before = (outer[0] * scale, outer[0] * shift + outer[1])", "before = (outer[0] * scale, outer[0] * shift)"),
        ("before: a shift not scaled", "before = (outer[0] * scale, outer[0] * shift + outer[1])", "before = (outer[0] * scale, shift + outer[1])"),
        ("before: beside not scaled", "            parallel=self.parallel * scale,\n", "            parallel=self.parallel,\n"),
        ("before: shift beside lost", "after=(after[0], after[1] + self.parallel * shift),", "after=after,"),
        ("beside: an older one lost", "parallel = scale if self.parallel is None else self.parallel + scale", "parallel = scale"),
        ("composed the wrong way", "return Affine.of(self.scale * first.scale, self.scale * first.shift + self.shift)", "return Affine.of(self.scale * first.scale, first.scale * self.shift + first.shift)"),
    ),
]  # fmt: skip


@cache
def _mutated(mutant: Mutant) -> ModuleType:
    """The module with the mistake in it."""
    real = import_module(f"bnfold.{mutant.module}")
    source = Path(str(real.__file__)).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.name}: the text is there {source.count(mutant.old)} times"
    module = ModuleType(f"mutant_of_{mutant.module}")
    sys.modules[module.__name__] = module
    exec(compile(source.replace(mutant.old, mutant.new), str(real.__file__), "exec"), vars(module))
    return module


@contextmanager
def driver(mutant: Mutant) -> Iterator[Any]:
    """The function `travel`, with the mistake in it."""
    module = _mutated(mutant)
    with pytest.MonkeyPatch.context() as patch:
        if mutant.module == "travel":
            yield module.travel
            return
        if mutant.module == "rules":
            for op, row in rules.TABLE.items():
                patch.setitem(rules.TABLE, op, replace(row, up=module.TABLE[op].up))
        else:
            for kind in (algebra.Linear, algebra.Affine):
                for name in ("absorb_after", "absorb_before", "absorb_parallel", "after"):
                    if callable(vars(kind).get(name)):
                        patch.setattr(kind, name, vars(getattr(module, kind.__name__))[name])
        yield travel.travel
