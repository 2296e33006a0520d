"""Where linear operators of a module become one, and where they must not: judged without bnfold's own comparison.

Every module is folded unverified, in float64, and judged on other numbers, batches and image sizes.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_flatten

from bnfold.torch import fold, load_folded
from tests.torch_models import randomise

SHAPES = ((2, 4, 8, 8), (1, 4, 8, 8), (3, 4, 7, 9), (2, 4, 20, 18))


def same(wanted, given):
    """Whether two results are the same, but for rounding."""
    (wanted, form), (given, other) = tree_flatten(wanted), tree_flatten(given)
    assert form == other
    for one, two in zip(wanted, given, strict=True):
        if isinstance(one, Tensor):
            assert (one.shape, one.dtype) == (two.shape, two.dtype)
            torch.testing.assert_close(two, one, rtol=1e-11, atol=1e-11)
        else:
            assert one == two


def draw(shape, generator, tokens):
    if tokens:
        return torch.randint(tokens, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def merged(net, *shapes, tokens=0):
    """Fold a module on an input of the first shape, without a comparison; compare on all of them."""
    shapes, net = shapes or SHAPES, randomise(net).double()
    state = copy.deepcopy(net.state_dict())
    generator = torch.Generator().manual_seed(3)
    inputs = [draw(shape, generator, tokens) for shape in shapes]
    folded, report = fold(net, inputs[0], verify=False)
    with torch.no_grad():
        for x in inputs:
            same(net(x.clone()), folded(x.clone()))
    same(state, net.state_dict())
    return folded, tuple(one for one in report.merges if one.into)


class Net(nn.Module):
    """Parts, and a forward that a test gives."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def pair(forward, **parts):
    """A 3x3 and a 1x1 that keep the size."""
    return Net(forward, wide=nn.Conv2d(4, 4, 3, padding=1), point=nn.Conv2d(4, 4, 1), **parts)


def chain(forward, stride=1):
    """A 3x3 and a 1x1, to be called one after another."""
    return Net(forward, first=nn.Conv2d(4, 4, 3, stride=stride), second=nn.Conv2d(4, 4, 1))


def within(block):
    """A block that is not the whole model."""
    return nn.Sequential(block, nn.Tanh(), nn.Conv2d(4, 4, 1))


# ---------------------------------------------------------------- what follows in the module


@pytest.mark.parametrize("name", ["act", "merged", "affine", "steps", "step0", "step1", "_steps"])
def test_an_activation_keeps_its_name_whatever_that_is(name):
    def forward(net, x):
        return torch.tanh(getattr(net, name)(net.wide(x) + net.point(x)))

    merged(within(pair(forward, **{name: nn.LeakyReLU(0.3)})))


def test_an_activation_that_is_called_twice_is_called_twice():
    net = within(pair(lambda net, x: net.act(net.act(net.wide(x) + net.point(x))), act=nn.Tanh()))
    assert len(merged(net)[1]) == 1


# ---------------------------------------------------------------- in place


@pytest.mark.parametrize("change", [lambda x: x.relu_(), lambda x: x.mul_(3.0), lambda x: x[:, 1:].zero_()])
def test_what_a_chain_reads_is_not_changed_before_its_last_operator_runs(change):
    def forward(net, x):
        x = torch.tanh(x)
        y = net.first(x)
        change(x)
        return net.second(y)

    merged(chain(forward))


# ---------------------------------------------------------------- other inputs


def more_when_large(net, x):
    y = net.wide(x) + net.point(x)
    return y * 2 if x.shape[-1] > 8 else y


def fewer_when_alone(net, x):
    y = net.wide(x)
    return y + net.point(x) if x.shape[0] > 1 else y


def another_activation_when_large(net, x):
    y = net.wide(x) + net.point(x)
    return torch.relu(y) if x.shape[-1] > 8 else torch.tanh(y)


def an_activation_by_size(net, x):
    return F.leaky_relu(net.wide(x) + net.point(x), 1 / x.shape[-1])


def once_more_when_large(net, x):
    y = torch.relu(net.wide(x) + net.point(x))
    return net.point(y) if x.shape[-1] > 8 else y


def by_its_weight_when_large(net, x):
    y = torch.relu(net.wide(x) + net.point(x))
    return F.conv2d(y, net.point.weight) if x.shape[-1] > 8 else y


@pytest.mark.parametrize(
    "forward",
    [
        more_when_large,
        fewer_when_alone,
        another_activation_when_large,
        an_activation_by_size,
        once_more_when_large,
        by_its_weight_when_large,
    ],
)
def test_a_block_that_does_something_else_for_other_inputs(forward):
    merged(pair(forward))
    merged(within(pair(forward)))


# ---------------------------------------------------------------- sizes and settings that code looks at


def returning_the_size_of_a_term(net, x):
    y = net.point(x)
    return net.wide(x) + y, y.shape, y.dim(), y.numel(), len(y), torch.ones_like(y)


def keeping_the_size_of_a_term(net, x):
    y = net.point(x)
    net.size = tuple(y.shape)
    return net.wide(x) + y


@pytest.mark.parametrize("forward", [returning_the_size_of_a_term, keeping_the_size_of_a_term])
def test_the_size_of_a_term_is_asked_for(forward):
    net = pair(forward)
    folded, merges = merged(net)
    assert [merge.into for merge in merges] == ["point"], "the other term may give a zero without a size"
    assert getattr(net, "size", 0) == getattr(folded, "size", 0)


def returning_the_size_between(net, x):
    y = net.first(x)
    return net.second(y), y.shape[-2:]


def keeping_the_size_between(net, x):
    y = net.first(x)
    net.size = tuple(y.size())
    return net.second(y)


@pytest.mark.parametrize("forward", [returning_the_size_between, keeping_the_size_between])
def test_the_size_of_what_lies_between_two_operators_is_asked_for(forward):
    net = chain(forward, stride=2)
    folded, merges = merged(net)
    assert not merges
    assert getattr(net, "size", 0) == getattr(folded, "size", 0)


class Measured(nn.Conv2d):
    """A convolution that asks for the size of its input."""

    def forward(self, x):
        return super().forward(x if min(x.shape[-2:]) > 0 else x.relu())


def test_a_module_that_asks_for_the_size_of_its_own_input_may_go():
    net = Net(lambda net, x: net.second(net.first(x)), first=Measured(4, 4, 3), second=Measured(4, 4, 1))
    assert len(merged(net)[1]) == 1


def counting_convolutions(net, x):
    return net.second(net.first(x)), sum(isinstance(part, nn.Conv2d) for part in net.children())


def telling_the_kernel(net, x):
    return net.second(net.first(x)), {"kernel": net.second.kernel_size}


def telling_a_type_if_there_is_one(net, x):
    return net.second(net.first(x)), getattr(getattr(net.first, "weight", None), "dtype", None)


@pytest.mark.parametrize(
    "forward", [counting_convolutions, telling_the_kernel, telling_a_type_if_there_is_one]
)
def test_what_a_model_returns_tells_of_a_module(forward):
    assert not merged(chain(forward))[1]


# ---------------------------------------------------------------- types


def test_a_term_decides_on_the_type_of_a_sum():
    def forward(net, x):
        halves = [(x * 100).half(), torch.tanh(x).half()]
        return net.point(x) + halves[0] + halves[1] + net.wide(x)

    merged(pair(forward))


def test_terms_are_gathered_beside_others_of_their_type():
    net = pair(lambda net, x: x + net.point(x) + net.wide(x) + torch.tanh(x))
    assert len(merged(net)[1]) == 1


TOKENS = ((2, 6), (1, 6), (4, 3))


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Tanh()),
        Net(lambda net, x: net.one(x) + net.other(x), one=nn.Embedding(10, 8), other=nn.Embedding(10, 8)),
        nn.Sequential(
            Net(lambda net, x: net.matrix(net.table(x)), table=nn.Embedding(10, 8), matrix=nn.Linear(8, 8)),
            nn.Tanh(),
        ),
    ],
)
def test_a_table_and_what_follows_it_or_stands_beside_it_are_one_table(net):
    folded, merges = merged(net, *TOKENS, tokens=10)
    assert len(merges) == 1
    assert sum(isinstance(part, nn.Embedding) for part in folded.modules()) == 1
    assert not any(isinstance(part, nn.Linear) for part in folded.modules())


def test_the_type_of_the_rows_of_a_table_is_asked_for():
    def forward(net, x):
        y = net.table(x)
        net.kind = y.dtype
        return net.matrix(y)

    net = Net(forward, table=nn.Embedding(10, 8), matrix=nn.Linear(8, 8))
    folded, _ = merged(net, *TOKENS, tokens=10)
    assert folded.kind == net.kind


# ---------------------------------------------------------------- weights that are computed


@pytest.mark.parametrize(
    "compute",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.spectral_norm,
    ],
)
@pytest.mark.parametrize("around", [within, lambda net: net])
def test_weights_that_are_computed_are_merged(compute, around):
    net = pair(lambda net, x: net.wide(x) + net.point(x))
    for part in (net.wide, net.point):
        compute(part)
    assert len(merged(around(net))[1]) == 1


# ---------------------------------------------------------------- what a module leaves behind


def test_a_module_that_keeps_the_size_of_what_it_is_given_stays():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.point, self.size = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), (8, 8)

        def forward(self, x):
            self.size = x.shape[-2:]
            return self.wide(x) + self.point(x)

    def forward(net, x):
        y = torch.tanh(net.block(x))
        return y.new_ones([*y.shape[:2], *getattr(net.block, "size", (8, 8))])

    merged(Net(forward, block=Keeping()))


# ---------------------------------------------------------------- what a merged module is good for


class Block(nn.Module):
    """Two operators and an activation, in code that can be compiled."""

    def __init__(self):
        super().__init__()
        self.wide, self.point, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x):
        return self.act(self.wide(x) + self.point(x))


class Sum(Block):
    """The same without the activation, as the whole model."""

    def forward(self, x):
        return self.wide(x) + self.point(x)


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
@pytest.mark.parametrize("net", [within(Block()), Sum()])
def test_a_merged_module_is_scripted_exported_and_pickled_as_before(net):
    folded, merges = merged(net)
    assert len(merges) == 1
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for again in (
        torch.jit.script(folded),
        torch.export.export(folded, (x,)).module(),
        torch.compile(folded, backend="eager", fullgraph=True),
        pickle.loads(pickle.dumps(folded)),
        copy.deepcopy(folded),
    ):
        same(folded(x), again(x))


class Stateful(nn.Conv2d):
    """Keeps more than tensors in its state dict, as layers with scales of their own do."""

    def get_extra_state(self):
        return {"scale": 1.0}

    def set_extra_state(self, state):
        pass


def test_a_module_with_more_than_tensors_in_its_state_dict_is_merged_and_loaded():
    def build():
        return Net(
            lambda net, x: net.bn(net.wide(x) + net.point(x)),
            wide=Stateful(4, 4, 3, padding=1),
            point=Stateful(4, 4, 1),
            bn=nn.BatchNorm2d(4),
        ).double()

    folded, merges = merged(build())
    assert len(merges) == 1
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    same(folded(x), load_folded(build().eval(), x, folded.state_dict())(x))


def test_the_parameters_of_a_merged_operator_are_trained():
    folded, _ = merged(within(Block()))
    folded.train()
    folded(torch.randn(2, 4, 8, 8, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in folded.parameters())


def test_a_merged_weight_wants_a_gradient_if_one_of_its_parts_did():
    for frozen in (["wide"], ["wide", "point"]):
        net = pair(lambda net, x: net.wide(x) + net.point(x))
        for name in frozen:
            net.get_submodule(name).requires_grad_(False)
        folded, merges = merged(net)
        assert merges
        wanted = {parameter.requires_grad for parameter in folded.parameters()}
        assert wanted == {len(frozen) == 1}
