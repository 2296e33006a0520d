"""The graph of a model on which folding is decided: who computes what from what. Immutable, and of no framework.

A frontend's `read` imports it, `travel` returns another one, and the frontend's `write` applies the difference to a
copy of the model: a node that is gone is bypassed, a `linear` that has absorbed something gives a new weight and bias.

The vocabulary is ONNX's operator names, in a canonical form that `read` makes once, whatever the file or module says:

- `inputs` holds computed values only. Constants (weights, statistics, axes, pads, shapes) are in `linear`, `affine` or
  `attributes`; axes are not negative.
- A linear operator with a constant weight is Gemm, MatMul, Conv, ConvTranspose or Embedding and has a `linear`.
- Bilinear and DeformConv are linear in their first input, with that `linear`; they read others besides.
- A recurrent layer (LSTM, GRU, RNN) reads its input only by way of a matrix and a bias of its own: it is an
  InputProduct, with that `linear`, and a node under its own name that reads what the product makes.
- A BatchNorm in any disguise is BatchNormalization and has an `affine`; one that cannot be moved at all (it is in
  training mode, say) has none, and a `reason`. So has a linear operator that cannot absorb.
- Any other Add, Sub, Mul or Div by a constant is Affine, with its `affine`.
- What picks positions along some axes by numbers that the model computes is Select; those numbers are read by a node
  of their own, through which nothing travels.
- A body (If, Loop, Scan, a scripted call) is one node that reads every value it captures.
- What the table in `rules` does not know stands under its own name, and nothing travels through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from bnfold.algebra import Affine, Linear

__all__ = ["Dim", "Graph", "Node", "Shape"]

Dim = int | str | None
"""A size: known, known by a symbol (two equal symbols are one size), or unknown."""

Shape = tuple[Dim, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operation.

    Attributes:
        name: unique in its graph; what a reader of the report will recognise (`layer1.0.bn2`).
        op: its ONNX operator name.
        inputs, outputs: names of values.
        attributes: what the operator's row in `rules` asks for.
        site: where its numbers are stored, by default its own name. Nodes of one site share their numbers (one module
            called twice), so they must come out of folding alike: all erased, or all with the same new weight.
        linear: of a linear operator.
        affine: of a BatchNormalization or an Affine, with the rank of `inputs[0]`.
        reason: why there is no `affine`, or no `linear`, where there should be one ("it is in training mode").
        partial: of what mixes positions, why the weights of some mean do not sum to one ("it counts zero padding").
        absorbed: of a BatchNormalization that took in another one below it, the affine of that one.
        copied: of a copy that `duplicate` made, the node that it is a copy of and the BatchNorm that reads it.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    site: str = ""
    linear: Linear | None = None
    affine: Affine | None = None
    reason: str = ""
    partial: str = ""
    absorbed: Affine | None = None
    copied: tuple[str, str] | None = None

    @property
    def place(self) -> str:
        """Its site, or its own name where it has none."""
        return self.site or self.name

    @property
    def original(self) -> str:
        """The name of the node that it is a copy of, or its own."""
        return self.copied[0] if self.copied else self.name

    @property
    def is_batchnorm(self) -> bool:
        """Whether it is owed a verdict."""
        return self.op == "BatchNormalization"

    def leave(self, affine: Affine) -> Node:
        """The plain affine, no longer owed a verdict, that is left in its place."""
        return replace(self, op="Affine", affine=affine)


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in an order in which they can be computed, with the shapes of the values that are known.

    `shapes` may lack a value (nothing is known of it) or hold None for a size. `sizes` are those of one example, where
    there was one; they say what something costs, never whether it is right. `held_in` are outputs that
    the caller is not given, with the name under which the model keeps them.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    held_in: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _producers(self) -> dict[str, Node]:
        return {value: node for node in self.nodes for value in node.outputs if value}

    @cached_property
    def _readers(self) -> dict[str, list[Node]]:
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                readers.setdefault(value, []).append(node)
        return readers

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    def __getitem__(self, name: str) -> Node:
        """The node of this name (KeyError where there is none)."""
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def producer(self, value: str) -> Node | None:
        """The node that computes a value; None for an input of the model."""
        return self._producers.get(value)

    def readers(self, value: str) -> tuple[Node, ...]:
        """The nodes that read a value, each once, in order."""
        return tuple(self._readers.get(value, ()))

    def replace(self, nodes: Mapping[str, Node]) -> Graph:
        """The graph with these nodes (by name) in the place of their namesakes."""
        return replace(self, nodes=tuple(nodes.get(node.name, node) for node in self.nodes))

    def bypass(self, names: frozenset[str] | set[str]) -> Graph:
        """The graph without these nodes; who read the output of one now reads its first input."""
        alias: dict[str, str] = {}
        kept = []
        for node in self.nodes:
            inputs = tuple(alias.get(value, value) for value in node.inputs)
            if node.name in names:
                alias[node.outputs[0]] = inputs[0]
            else:
                kept.append(node if inputs == node.inputs else replace(node, inputs=inputs))
        outputs = tuple(alias.get(value, value) for value in self.outputs)
        return replace(self, nodes=tuple(kept), outputs=outputs)
