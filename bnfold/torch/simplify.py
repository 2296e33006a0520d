"""Join and drop drafted nodes, so that what folding decides on holds no more nodes than there are operators.

Each pass takes a list of nodes and returns another one; what it keeps, it may have edited. None decides whether
anything folds: a bias that is added to a matrix product becomes its bias, a copy of a value becomes the value, and an
operator that reads one value twice gets a copy for the second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bnfold.ir import Shape
from bnfold.torch.draft import DraftNode, readers_of

__all__ = ["drop_identities", "join_biases", "part_twins"]


def join_biases(items: Sequence[DraftNode], outputs: Sequence[str]) -> list[DraftNode]:
    """Make one operator of a matrix product and the parameter that is added to it, reshaped in between or not."""
    readers = readers_of(items)
    gone: set[int] = set()
    for item in items:
        if (
            item.linear is None
            or item.bias is not None
            or item.op not in ("Gemm", "MatMul", "Einsum", "Bilinear")
        ):
            continue
        last = item
        read = readers.get(item.outputs[0], [])
        if len(read) == 1 and item.outputs[0] not in outputs and _keeps_last(read[0]):
            last = read[0]
            read = readers.get(last.outputs[0], [])
        if len(read) == 1 and last.outputs[0] not in outputs and _is_bias(read[0], item):
            item.bias = next(v for v in read[0].call.reads.values() if v.slots)
            item.linear = replace(item.linear, biasless="", bare=False)
            last.outputs, item.joined = read[0].outputs, read[0].call
            gone.add(id(read[0]))
    return [item for item in items if id(item) not in gone]


def _keeps_last(item: DraftNode) -> bool:
    """Whether an item regroups all axes of a value but the last."""
    given = [value for value in item.call.reads.values() if value.name in item.inputs]
    made = item.call.made
    plain = item.op == "Reshape" and len(given) == len(made) == 1
    return plain and given[0].rank > 0 and given[0].shape[-1:] == made[0].shape[-1:]


def _is_bias(item: DraftNode, linear: DraftNode) -> bool:
    """Whether an item adds a stored vector to the product of a matrix."""
    assert linear.linear is not None
    values = [v for v in item.call.reads.values() if v.slots]
    added = item.op in ("Affine", "Identity") and item.call.label == "add"
    if not added or len(values) != 1 or len(item.call.args) != 2 or item.call.kwargs:
        return False
    bias, outputs = values[0], linear.linear.outputs
    last = linear.linear.out_axis == linear.call.made[0].rank - 1
    whole = bias.tensor is not None and bias.tensor.numel() == outputs
    return bias.constant and last and whole and bias.shape[-1:] == (outputs,)


def drop_identities(items: Sequence[DraftNode]) -> tuple[list[DraftNode], dict[str, str]]:
    """Let who reads a copy of a value read the value; with the value that stands for each copy."""
    alias: dict[str, str] = {}
    kept = []
    for item in items:
        item.inputs = [alias.get(name, name) for name in item.inputs]
        if item.op in ("Identity", "Dropout") and len(item.outputs) == 1:
            alias[item.outputs[0]] = item.inputs[0]
        else:
            kept.append(item)
    return kept, alias


def part_twins(items: Sequence[DraftNode], shapes: dict[str, Shape]) -> list[DraftNode]:
    """Let no operator read one value twice: a copy stands between."""
    count = 0
    parted: list[DraftNode] = []
    for item in items:
        if len(set(item.inputs)) < len(item.inputs):
            seen: set[str] = set()
            for place, name in enumerate(item.inputs):
                if name in seen:
                    count += 1
                    again = f"{name} again {count}"
                    shapes[again] = shapes.get(name, ())
                    if name not in shapes:
                        del shapes[again]
                    parted.append(
                        DraftNode("Identity", [name], [again], item.call, name=f"{item.name} again {count}")
                    )
                    item.inputs[place] = again
                seen.add(name)
        parted.append(item)
    return parted
