"""Give a BatchNorm a linear operator of its own where somebody else reads the same output.

    x -- conv --+-- bn -- ...            x --+-- conv --------- ...
                +-- other                    +-- conv.copy(bn folded) -- ...

Only in a file can an operator be copied; a module's code names its operators. A copy costs a second convolution for
the price of a BatchNorm, so this is off unless asked for (`docs/leftover.md` has the figures). Copies are made of
operators that a BatchNorm reads directly; one that does not let its BatchNorm be folded is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from bnfold.ir import Graph, Node

__all__ = ["copy_producers", "original"]


def copy_producers(graph: Graph, batchnorms: Iterable[str]) -> tuple[Graph, frozenset[str]]:
    """Let each of these BatchNorms read a linear operator of its own, where it shares one.

    Args:
        graph: as it was read.
        batchnorms: names of nodes.

    Returns:
        The graph with a copy behind each operator that is copied (see `Node.copied`), and the names of the BatchNorms
        that read one.
    """
    copies: dict[str, list[Node]] = {}
    readers: dict[str, Node] = {}
    for name in batchnorms:
        node = graph[name]
        producer = graph.producer(node.inputs[0])
        if producer is None or producer.linear is None or not _is_shared(graph, node.inputs[0]):
            continue
        copy = _copy(producer, node)
        copies.setdefault(producer.name, []).append(copy)
        readers[name] = replace(node, inputs=copy.outputs)
    nodes = tuple(new for node in graph.nodes for new in (node, *copies.get(node.name, ())))
    shapes = {
        **graph.shapes,
        **{c.outputs[0]: graph.shapes[node.inputs[0]] for node, c in _pairs(graph, copies)},
    }
    return replace(graph, nodes=nodes, shapes=shapes).replace(readers), frozenset(readers)


def original(question: Callable[[Node], str]) -> Callable[[Node], str]:
    """Ask a question about a linear node of the operator that it is a copy of."""
    return lambda node: question(replace(node, name=node.original))


def _is_shared(graph: Graph, value: str) -> bool:
    return len(graph.readers(value)) > 1 or value in graph.outputs


def _copy(producer: Node, reader: Node) -> Node:
    name = f"{producer.name}.for.{reader.name}"
    return replace(
        producer, name=name, outputs=(f"{name}.output",), site="", copied=(producer.name, reader.name)
    )


def _pairs(graph: Graph, copies: dict[str, list[Node]]) -> list[tuple[Node, Node]]:
    """Each copy's BatchNorm, with the copy; of those whose shape is known."""
    pairs = [(graph[copy.copied[1]], copy) for made in copies.values() for copy in made if copy.copied]
    return [(node, copy) for node, copy in pairs if node.inputs[0] in graph.shapes]
