"""Which module calls are BatchNorms, and what is said of those that cannot be taken out."""

from __future__ import annotations

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


class Frozen(nn.Module):
    def __init__(self, keep):
        super().__init__()
        keep(self, "scale", torch.rand(3) + 1)

    def forward(self, x):
        return x * self.scale[:, None, None]


def by_buffer(module, name, tensor):
    module.register_buffer(name, tensor)


def by_parameter(module, name, tensor):
    module.register_parameter(name, nn.Parameter(tensor))


def norm_of(forward, **layers):
    model = Net(forward, **({"conv": nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3)} | layers)).eval()
    reading = read(model, torch.ones(2, 3, 4, 4))
    norms = [node for node in reading.graph.nodes if node.op == "BatchNormalization"]
    return reading, norms


def test_a_batchnorm_module_is_found_at_its_path():
    reading, (norm,) = norm_of(lambda net, x: net.bn(net.conv(x)))
    assert (norm.name, norm.site, norm.reason) == ("bn", "bn", "")
    assert norm.affine is not None
    assert reading.norms["bn"].tail == ()


def test_an_affine_map_by_a_buffer_is_a_batchnorm():
    _, (norm,) = norm_of(lambda net, x: net.bn(net.conv(x)), bn=Frozen(by_buffer))
    assert norm.site == "bn"


def test_an_affine_map_by_a_parameter_is_none():
    _, norms = norm_of(lambda net, x: net.bn(net.conv(x)), bn=Frozen(by_parameter))
    assert norms == []


def test_the_activation_after_the_affine_map_is_a_tail():
    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    reading, (norm,) = norm_of(lambda net, x: net.bn(net.conv(x)), bn=NormAct(3))
    ((_, stand_in),) = reading.norms[norm.name].tail
    assert isinstance(stand_in, nn.ReLU)


def test_more_than_an_activation_after_it_leaves_no_batchnorm_to_take_out():
    class NormSum(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + x

    reading, (norm,) = norm_of(lambda net, x: net.bn(net.conv(x)), bn=NormSum(3))
    assert norm.name not in reading.norms
    assert "does more than normalise and activate" in norm.reason


def test_numbers_that_other_code_reads_keep_the_module():
    _, (norm,) = norm_of(lambda net, x: net.bn(net.conv(x)) + net.bn.weight[:, None, None])
    assert norm.affine is None
    assert "as well" in norm.reason


def test_a_batchnorm_that_is_called_as_a_function_is_owed_a_verdict():
    def forward(net, x):
        return F.batch_norm(net.conv(x), net.bn.running_mean, net.bn.running_var)

    reading, (norm,) = norm_of(forward)
    assert norm.site == "bn"
    assert "called as a function in the code of `Net`" in norm.reason
    assert reading.norms == {}


def test_a_batchnorm_that_did_not_run_is_owed_a_verdict():
    _, (norm,) = norm_of(lambda net, x: net.conv(x))
    assert (norm.site, norm.reason) == ("bn", "it did not run on the example inputs")


def test_one_module_that_is_called_twice_is_one_site_with_two_nodes():
    _, norms = norm_of(lambda net, x: net.bn(net.conv(net.bn(x))))
    assert [norm.name for norm in norms] == ["bn", "bn (call 2)"]
    assert {norm.site for norm in norms} == {"bn"}
