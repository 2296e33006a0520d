"""What lowering the nodes of a model may look at: the flattened model, its shapes and types, and what is constant."""

from __future__ import annotations

from dataclasses import dataclass, field

from bnfold import reasons
from bnfold.ir import Shape
from bnfold.onnx.constant_folding import Constants
from bnfold.onnx.flatten import FlatModel, NodeRef
from bnfold.onnx.shapes import Shapes
from bnfold.onnx.sizes import Sizes

__all__ = ["ImportContext"]


@dataclass(eq=False)
class ImportContext:
    """What drawing a node may look at.

    Attributes:
        whole: the flattened model.
        found: shapes and types.
        constants: what is known before the model runs.
        sizes: what is known of what the model computes from sizes.
        opset: the version of ONNX's own operator set.
        overridable: initializers that a caller may override.
        copies: values that are the copy of another one, which stands for them in the graph.
    """

    whole: FlatModel
    found: Shapes
    constants: Constants
    sizes: Sizes
    opset: int
    overridable: frozenset[str] = field(default_factory=frozenset)
    copies: dict[str, str] = field(default_factory=dict)

    def shape(self, value: str) -> Shape | None:
        """The shape of a value, as far as it is known."""
        return self.found.shapes.get(value)

    def rank(self, value: str) -> int | None:
        """The rank of a value, if it is known."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def type(self, value: str) -> int:
        """The element type of a value, 0 if it is not known."""
        return self.found.types.get(value, 0)

    def computed(self, ref: NodeRef) -> tuple[str, ...]:
        """The values that a node reads and that are not constant, what its bodies return included."""
        return tuple(v for v in (*ref.inputs, *ref.results) if v and v not in self.constants)

    def why(self, role: str, value: str) -> str:
        """Why a value that should be constant is not, as a clause."""
        raw = self.whole.raw.get(value, value)
        if value in self.overridable:
            return reasons.OVERRIDABLE(role=role, value=raw)
        maker = self.whole.makers.get(value)
        if maker is None:
            return reasons.IS_INPUT(role=role, value=raw)
        if maker.op in ("DequantizeLinear", "QuantizeLinear"):
            return reasons.QUANTISED(role=role)
        return reasons.COMPUTED_BY(role=role, node=maker)
