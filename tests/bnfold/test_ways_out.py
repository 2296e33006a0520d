"""The ways out of the table work: a net in which a BatchNorm stays for a reason, and the same mended as that says.

Not covered: advice that no test can follow (repair the file, train again), and the rarer reasons.
"""

from __future__ import annotations

import onnx.parser
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnfold
from bnfold import reasons
from tests.torch_models import randomise

IMAGES, ROWS = (2, 3, 8, 8), (4, 6)


class Code(nn.Module):
    """A net of named parts and a forward."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def in_training_mode():
    stuck = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).train()
    return stuck, stuck, lambda net: net.eval()


def untracked():
    nets = (
        nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=tracked))
        for tracked in (False, True)
    )
    return *nets, None


def function():
    def call(net, x):
        norm = net.norm
        return F.batch_norm(net.linear(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)

    parts = {"linear": nn.Linear(6, 4), "norm": nn.BatchNorm1d(4)}
    return Code(call, **parts), Code(lambda net, x: net.norm(net.linear(x)), **parts), None


def written_out():
    def formula(net, x):
        y = net.linear(x)
        return (y - net.mean) / torch.sqrt(net.var + 1e-5) * net.gamma + net.beta

    gamma, beta = (nn.Parameter(torch.rand(4) + 0.5) for _ in range(2))
    stuck = Code(formula, linear=nn.Linear(6, 4), gamma=gamma, beta=beta)
    stuck.register_buffer("mean", torch.rand(4))
    stuck.register_buffer("var", torch.rand(4) + 0.5)
    return stuck, nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), None


def homeless():
    def run(net, x):
        return net.kept[0](net.linear(x))

    stuck = Code(run, linear=nn.Linear(6, 4), kept=[nn.BatchNorm1d(4).eval()])
    return stuck, Code(run, linear=nn.Linear(6, 4), kept=nn.ModuleList([nn.BatchNorm1d(4)])), None


def padded():
    def net(mode):
        return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode))

    return net("zeros"), net("replicate"), None


def padding_counted():
    def net(counted):
        pool = nn.AvgPool2d(3, 1, 1, count_include_pad=counted)
        return nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3), pool, nn.Conv2d(3, 4, 1))

    return net(True), net(False), None


def not_linear():
    stuck = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Sigmoid())
    return stuck, nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Sigmoid()), None


def also_read():
    stuck = Code(lambda net, x: (lambda y: net.norm(y) * torch.tanh(y))(net.linear(x)),
                 linear=nn.Linear(6, 4), norm=nn.BatchNorm1d(4))  # fmt: skip
    mended = Code(lambda net, x: net.norm(net.linear(x)) * torch.tanh(net.again(x)),
                  linear=nn.Linear(6, 4), again=nn.Linear(6, 4), norm=nn.BatchNorm1d(4))  # fmt: skip
    return stuck, mended, None


def used_twice():
    def net(first, second):
        run = lambda net, x: net.b(net.second(torch.tanh(net.a(net.first(x)))))  # noqa: E731
        return Code(run, first=first, second=second, a=nn.BatchNorm1d(6), b=nn.BatchNorm1d(6))

    shared = nn.Linear(6, 6)
    return net(shared, shared), net(nn.Linear(6, 6), nn.Linear(6, 6)), None


def not_scaled():
    def net(behind):
        def run(net, x):
            y = net.linear(x)
            return torch.tanh(
                net.norm(y + torch.tanh(x)) if behind else net.norm(torch.tanh(y)) + torch.tanh(x)
            )

        return Code(run, linear=nn.Linear(6, 6), norm=nn.BatchNorm1d(6))

    return net(behind=False), nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), None


def bare_product():
    stuck = Code(
        lambda net, x: net.norm(x @ net.weight),
        weight=nn.Parameter(torch.randn(6, 4)),
        norm=nn.BatchNorm1d(4),
    )
    return stuck, nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)), None


def weight_read_as_well():
    def net(tied):
        def run(net, x):
            y = torch.tanh(net.norm(net.linear(x)))
            return y * (net.linear if tied else net.other).weight.sum()

        return Code(run, linear=nn.Linear(6, 4), norm=nn.BatchNorm1d(4), other=nn.Linear(6, 4))

    return net(tied=True), net(tied=False), None


def compiled():
    inner = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    return torch.jit.script(inner), inner, None


def looked_at():
    def asks(net, x):
        y = net.norm(net.linear(x))
        return y * 2 if net.norm.eps > 0 and isinstance(net.norm, nn.BatchNorm1d) else y

    parts = {"linear": nn.Linear(6, 4), "norm": nn.BatchNorm1d(4)}
    return Code(asks, **parts), Code(lambda net, x: net.norm(net.linear(x)) * 2, **parts), None


MODULES = {
    reasons.TRAINING: (in_training_mode, ROWS),
    reasons.UNTRACKED: (untracked, ROWS),
    reasons.FUNCTION: (function, ROWS),
    reasons.WRITTEN_OUT: (written_out, ROWS),
    reasons.HOMELESS: (homeless, ROWS),
    reasons.PADS: (padded, IMAGES),
    reasons.COUNTS_PADDING: (padding_counted, IMAGES),
    reasons.NOT_LINEAR: (not_linear, ROWS),
    reasons.ALSO_READ: (also_read, ROWS),
    reasons.USED_TWICE: (used_twice, ROWS),
    reasons.NOT_SCALED: (not_scaled, ROWS),
    reasons.BARE_PRODUCT: (bare_product, ROWS),
    reasons.READ_AS_WELL: (weight_read_as_well, ROWS),
    reasons.COMPILED: (compiled, ROWS),
    reasons.LOOKED_AT: (looked_at, ROWS),
}


def outcomes(net, shape, **options):
    return bnfold.fold(net, torch.randn(shape, generator=torch.Generator().manual_seed(3)), **options)[
        1
    ].verdicts


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("reason", MODULES, ids=lambda reason: reason.sentence())
def test_a_module_folds_once_it_is_mended_as_the_way_out_says(reason):
    make, shape = MODULES[reason]
    stuck, mended, mend = make()
    if mend is None:
        for net in (stuck, mended):
            if not isinstance(net, torch.jit.ScriptModule):
                randomise(net, seed=1)
            net.eval()
    before = outcomes(stuck, shape)
    said = [row for verdict in before for row in reasons.explain(verdict.reason)]
    assert reason in said, [verdict.reason for verdict in before]
    after = outcomes(mended if mend is None else mend(mended), shape)
    assert [verdict.outcome for verdict in after] == ["folded"] * len(after), after


NUMBERS = """float[3, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3},
    float[4] gamma = {1, 2, 3, 4}, float[4] beta = {1, 0, 1, 0},
    float[4] mean = {0, 1, 0, 1}, float[4] var = {1, 2, 1, 2}"""
FILES = {
    reasons.OVERRIDABLE: (
        "float[n, 3] x, float[3, 4] w",
        "y = MatMul(x, w)  z = BatchNormalization(y, gamma, beta, mean, var)",
        {"freeze_initializers": True},
    ),
    reasons.ALSO_READ: (
        "float[n, 3] x",
        "y = MatMul(x, w)  a = BatchNormalization(y, gamma, beta, mean, var)  b = Tanh(y)  z = Mul(a, b)",
        {"duplicate": True},
    ),
}


@pytest.mark.parametrize("reason", FILES, ids=lambda reason: reason.sentence())
def test_a_file_folds_with_the_option_that_the_way_out_names(reason):
    inputs, nodes, options = FILES[reason]
    text = f'<ir_version: 10, opset_import: ["": 21]> net ({inputs}) => (float[n, 4] z) <{NUMBERS}> {{ {nodes} }}'
    model = onnx.parser.parse_model(text)
    (stuck,) = bnfold.fold(model)[1].verdicts
    assert reason in reasons.explain(stuck.reason), stuck
    assert all(f"`{name}=True`" in reason.way_out for name in options)
    (mended,) = bnfold.fold(model, **options)[1].verdicts
    assert mended.outcome == "folded", mended
