"""Where a linear operator keeps its weight and its bias, and which it has to share."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnfold.torch.read import read


class Net(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def read_net(forward, **layers):
    return read(
        Net(forward, **({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)} | layers)).eval(), torch.ones(2, 4)
    )


def place_of(forward, **layers):
    (place,) = read_net(forward, **layers).linears.values()
    return place


def test_an_operator_is_bound_to_the_parameters_of_its_module():
    place = place_of(lambda net, x: net.a(x))
    assert (place.weight.name, place.transposed, place.computed) == ("a.weight", False, "")
    assert place.bias.name == "a.bias"


def test_a_module_without_a_bias_has_a_place_for_one():
    assert place_of(lambda net, x: net.a(x), a=nn.Linear(4, 4, bias=False)).bias.name == "a.bias"


def test_code_that_passes_no_bias_has_no_place_for_one():
    assert place_of(lambda net, x: F.linear(x, net.a.weight)).bias is None


@pytest.mark.parametrize("turn", [lambda w: w.t(), lambda w: w.transpose(0, 1), lambda w: w.permute(1, 0)])
def test_a_weight_is_found_through_a_transpose(turn):
    stored = place_of(lambda net, x: F.linear(x, net.a.weight))
    turned = place_of(lambda net, x: F.linear(x, turn(net.a.weight)))
    assert turned.weight == stored.weight
    assert turned.transposed != stored.transposed


def test_a_vector_that_is_added_to_a_product_is_its_bias():
    place = place_of(lambda net, x: x @ net.a.weight.t() + net.a.bias)
    assert (place.weight.name, place.bias.name) == ("a.weight", "a.bias")


def test_a_parametrized_weight_is_bound_to_the_module_that_computes_it():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    layer = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Double())
    place = place_of(lambda net, x: net.a(x), a=layer)
    assert (place.weight.name, place.computed) == ("a.weight", "parametrization")


def test_a_weight_that_is_computed_while_the_model_runs_has_no_place():
    assert read_net(lambda net, x: F.linear(x, net.a.weight.exp())).linears == {}


def test_a_weight_that_is_scaled_by_constants_has_the_place_of_its_parameter():
    place = place_of(lambda net, x: F.linear(x, (net.a.weight * 2).t(), net.a.bias / 4))
    assert (place.weight.name, place.bias.name, place.transposed) == ("a.weight", "a.bias", True)
    assert (place.scaling == 2).all()
    assert (place.bias_scaling == 0.25).all()


def test_a_weight_that_is_read_otherwise_as_well_has_no_place():
    reading = read_net(lambda net, x: net.a(x) + net.a.weight.sum())
    assert reading.linears == {}
    (node,) = (node for node in reading.graph.nodes if "its weight" in node.reason)
    assert "as well" in node.reason


def test_one_parameter_of_two_modules_has_two_places():
    tied = nn.Linear(4, 4)
    tied.weight = (first := nn.Linear(4, 4)).weight
    places = read_net(lambda net, x: net.b(net.a(x)), a=first, b=tied).linears.values()
    assert sorted(place.weight.name for place in places) == ["a.weight", "b.weight"]


def test_two_calls_of_one_module_have_one_place():
    places = read_net(lambda net, x: net.a(net.a(x))).linears.values()
    assert [place.weight.name for place in places] == ["a.weight", "a.weight"]


def test_one_parameter_that_is_used_in_two_ways_has_no_place():
    reading = read_net(lambda net, x: F.linear(F.linear(x, net.a.weight), net.a.weight.t()))
    assert reading.linears == {}
    assert all("is used in another way" in node.reason for node in reading.graph.nodes if node.reason)
