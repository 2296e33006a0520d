"""The picture of a model: who computes what from what, and what is left when a node is taken out."""

from __future__ import annotations

import pytest

from bnfold.ir import Graph, Node

A = Node("a", "Conv", ("x",), ("a.out",))
B = Node("b", "BatchNormalization", ("a.out",), ("b.out",), site="shared")
C = Node("c", "BatchNormalization", ("b.out",), ("c.out",), site="shared")
D = Node("d", "Add", ("c.out", "c.out", "a.out"), ("d.out",))
GRAPH = Graph((A, B, C, D), ("x",), ("d.out", "c.out"))


def test_a_node_lies_at_its_site_or_at_its_own_name() -> None:
    assert (A.place, B.place) == ("a", "shared")


def test_producers_and_readers_are_found_and_a_reader_that_reads_twice_is_one() -> None:
    assert GRAPH.producer("b.out") is B
    assert GRAPH.producer("x") is None
    assert GRAPH.readers("c.out") == (D,)
    assert GRAPH.readers("a.out") == (B, D)
    assert GRAPH.readers("d.out") == ()


def test_nodes_are_found_by_name() -> None:
    assert GRAPH["b"] is B
    assert "b" in GRAPH
    assert "e" not in GRAPH
    with pytest.raises(KeyError):
        GRAPH["e"]


def test_bypassing_a_run_of_nodes_leads_their_readers_and_the_outputs_to_what_came_before() -> None:
    left = GRAPH.bypass({"b", "c"})
    assert [node.name for node in left.nodes] == ["a", "d"]
    assert left["d"].inputs == ("a.out", "a.out", "a.out")
    assert left.outputs == ("d.out", "a.out")


def test_replacing_and_bypassing_leave_the_graph_itself_alone() -> None:
    other = Node("b", "Affine", ("a.out",), ("b.out",))
    assert GRAPH.replace({"b": other})["b"] is other
    GRAPH.bypass({"b"})
    assert GRAPH.nodes == (A, B, C, D)
    assert GRAPH["d"].inputs == ("c.out", "c.out", "a.out")


def test_a_node_that_did_not_change_is_the_same_object_afterwards() -> None:
    assert GRAPH.bypass({"c"})["b"] is B
