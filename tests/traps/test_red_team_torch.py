"""Modules that were built to mislead the torch reader, each of another kind, with the outcome that algebra gives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from tests.torch_models import check

IMAGES = torch.randn(3, 3, 6, 6)
ROWS = torch.randn(5, 4)
SEQUENCE = torch.randn(3, 4, 7)


class Net(nn.Module):
    """The layers that a test names, and a forward that it gives."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def net(forward, channels=4, **layers):
    layers = {"conv": nn.Conv2d(3, channels, 3, padding=1), "bn": nn.BatchNorm2d(channels), **layers}
    return Net(forward, **layers)


# ---------------------------------------------------------------- sharing


def test_one_convolution_over_several_levels_with_a_batchnorm_each():
    norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(2)])
    levels = Net(
        lambda s, x: [bn(s.conv(x[..., :: 1 + i])) for i, bn in enumerate(s.bns)],
        conv=nn.Conv2d(3, 4, 3),
        bns=norms,
    )
    check(levels, IMAGES, kept=["bns.0", "bns.1"], because="its uses would have to differ")


def test_a_block_under_two_names_is_folded_once():
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    check(Net(lambda s, x: s.a(x) + s.b(x + 1), a=block, b=block), IMAGES, ["a.1"])


def test_one_linear_on_rows_and_on_sequences_with_one_batchnorm():
    def forward(s, x):
        return s.bn(s.linear(x.mean(1))), s.bn(s.linear(x).transpose(1, 2))

    check(Net(forward, linear=nn.Linear(7, 4), bn=nn.BatchNorm1d(4)), SEQUENCE, ["bn"])


def test_a_batchnorm_whose_scale_is_a_bias_elsewhere():
    some = net(lambda s, x: s.bn(s.conv(x)))
    some.conv.bias = some.bn.bias
    check(some, IMAGES, kept=["bn"], because="is read by")


def test_an_autoencoder_that_uses_one_weight_both_ways():
    def forward(s, x):
        return s.bn2(F.linear(s.bn(s.encode(x)), s.encode.weight.t()))

    layers = {"encode": nn.Linear(4, 3), "bn": nn.BatchNorm1d(3), "bn2": nn.BatchNorm1d(4)}
    check(Net(forward, **layers), ROWS, kept=["bn", "bn2"], because="in another way")


def test_two_weights_that_lie_in_one_tensor():
    whole = torch.randn(8, 3, 3, 3)
    some = net(
        lambda s, x: s.bn(s.conv(x)) * s.bn2(s.conv2(x)),
        conv2=nn.Conv2d(3, 4, 3, padding=1),
        bn2=nn.BatchNorm2d(4),
    )
    some.conv.weight, some.conv2.weight = nn.Parameter(whole[:4]), nn.Parameter(whole[4:])
    check(some, IMAGES, ["bn", "bn2"])


# ---------------------------------------------------------------- who else reads


READERS = {
    "scale": lambda s, x: s.bn(s.conv(x)) * s.bn.weight.abs().mean(),
    "weight": lambda s, x: (s.bn(s.conv(x)), s.conv.weight.norm()),
    "bias": lambda s, x: s.bn(s.conv(x)) + s.conv.bias.sum(),
    "number": lambda s, x: s.bn(s.conv(x)) * s.conv.weight.sum().item(),
    "statistics": lambda s, x: (s.bn(s.conv(x)), s.bn.running_mean),
    "function": lambda s, x: s.bn(s.conv(x)) + F.conv2d(x, s.conv.weight, padding=1),
    "forward": lambda s, x: s.bn.forward(s.conv(x)),
    "both": lambda s, x: s.bn.forward(s.conv(x)) + s.bn(s.conv(x)),
}


@pytest.mark.parametrize("reader", READERS)
def test_numbers_that_somebody_else_reads_stay(reader):
    check(net(READERS[reader]), IMAGES, kept=["bn"])


def test_a_feature_kept_for_later_stays():
    class Keeping(Net):
        def forward(self, x):
            self.features = [self.conv(x)]
            return self.bn(self.features[0])

    some = Keeping(None, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    check(some, IMAGES, kept=["bn"], because="output of the model")


@dataclass
class Result:
    value: torch.Tensor
    other: dict


def test_a_dataclass_that_holds_what_comes_before():
    some = net(lambda s, x: (lambda y: Result(s.bn(y), {"raw": [y]}))(s.conv(x)))
    check(some, IMAGES, kept=["bn"], because="output of the model")


# ---------------------------------------------------------------- axes


def test_a_sequence_without_a_batch_whose_length_is_its_width():
    some = Net(lambda s, x: s.bn(s.conv(x)), conv=nn.Conv1d(4, 7, 3, padding=1), bn=nn.BatchNorm1d(7))
    check(some, torch.randn(4, 7), kept=["bn"], because="axis 0")


def test_a_view_of_channels_as_fewer_channels():
    some = net(lambda s, x: s.bn(s.conv(x).view(x.shape[0], 2, -1)), bn=nn.BatchNorm1d(2))
    check(some, IMAGES, ["bn"])


def test_a_view_that_mixes_channels_and_positions():
    some = net(lambda s, x: s.bn(s.conv(x).view(x.shape[0], 6, -1)), bn=nn.BatchNorm1d(6))
    check(some, IMAGES, kept=["bn"])


def test_frames_folded_into_the_batch():
    def forward(s, x):
        return s.bn(s.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]).mean(1)

    check(net(forward), torch.randn(2, 3, 3, 6, 6), ["bn"])


def test_slices_that_part_the_channels_and_slices_that_overlap():
    layers = {"conv": nn.Conv2d(3, 8, 1), "b1": nn.BatchNorm2d(4), "b2": nn.BatchNorm2d(4)}
    check(
        Net(lambda s, x: (lambda y: s.b1(y[:, ::2]) * s.b2(y[:, 1::2]))(s.conv(x)), **layers),
        IMAGES,
        ["b1", "b2"],
    )
    some = Net(lambda s, x: (lambda y: s.b1(y[:, :4]) * s.b2(y[:, 3:7]))(s.conv(x)), **layers)
    check(some, IMAGES, kept=["b1", "b2"])


def test_a_product_of_two_computed_values_is_not_passed():
    some = Net(
        lambda s, x: (lambda y: y @ y.transpose(1, 2))(s.bn(s.conv(x).tanh())),
        conv=nn.Conv1d(4, 4, 1),
        bn=nn.BatchNorm1d(4),
    )
    check(some, SEQUENCE, kept=["bn"])


PADDED = {
    "zeros": ((1, 1, 0, 2), {}, "half"),
    "cropped": ((0, -1, -1, 0), {}, "folded"),
    "both": ((1, -1, 2, 0), {}, "half"),
    "constant": ((1, 1), {"value": 0.7}, "kept"),
}


@pytest.mark.parametrize("kind", PADDED)
def test_a_pad_between(kind):
    amounts, options, outcome = PADDED[kind]
    check(net(lambda s, x: s.bn(F.pad(s.conv(x), amounts, **options))), IMAGES, **{outcome: ["bn"]})


# ---------------------------------------------------------------- arithmetic


SUMS = {
    "alpha": lambda s, x: s.bn(torch.sub(s.conv(x), s.conv2(x), alpha=2)),
    "reflected": lambda s, x: s.bn(1 - (-s.conv(x)) / 3 + s.conv2(x)),
    "by parameters": lambda s, x: s.bn(s.conv(x) * s.gain / 2 - s.conv2(x)),
}


@pytest.mark.parametrize("kind", SUMS)
def test_sums_of_convolutions_and_constants(kind):
    gain = nn.Parameter(torch.tensor([1.5, -2.0, 0.5, 3.0]).view(4, 1, 1))
    check(net(SUMS[kind], conv2=nn.Conv2d(3, 4, 1, bias=False), gain=gain), IMAGES, ["bn"])


def test_a_weight_computed_from_two_parameters_is_not_one():
    def forward(s, x):
        return s.bn(F.linear(x, s.linear.weight + s.up @ s.down, s.linear.bias))

    layers = {"up": nn.Parameter(torch.randn(6, 2)), "down": nn.Parameter(torch.randn(2, 4))}
    some = Net(forward, linear=nn.Linear(4, 6), bn=nn.BatchNorm1d(6), **layers)
    check(some, ROWS, kept=["bn"], because="computed while the model runs")


def test_two_linears_one_after_another_beside_a_third():
    def forward(s, x):
        return s.bn(s.linear(x) + s.up(s.down(x)) * 0.5)

    layers = {"down": nn.Linear(4, 2, bias=False), "up": nn.Linear(2, 6, bias=False)}
    check(Net(forward, linear=nn.Linear(4, 6), bn=nn.BatchNorm1d(6), **layers), ROWS, ["bn"])


@pytest.mark.parametrize(
    ("bag", "because"), [("sum", "though it is"), ("mean", "though it is"), ("max", "not")]
)
def test_a_bag_of_embeddings_is_no_embedding_but_linear_unless_it_takes_the_largest(bag, because):
    some = Net(lambda s, i: s.bn(s.table(i)), table=nn.EmbeddingBag(9, 4, mode=bag), bn=nn.BatchNorm1d(4))
    check(some, torch.randint(0, 9, (3, 5)), kept=["bn"], because=f"{because} linear")


# ---------------------------------------------------------------- code


def test_a_branch_inside_a_module_leaves_whole_blocks_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    def forward(s, x):
        for block in s.blocks:
            x = block(x)
            if x.max() > 50:
                break
        return x

    check(Net(forward, blocks=nn.ModuleList([Block(), Block()])), IMAGES, ["blocks.0.bn", "blocks.1.bn"])


def test_rows_that_are_chosen_by_their_numbers():
    def forward(s, x):
        y = s.linear(x)
        chosen = y.sum(1) > 0
        return torch.zeros_like(y).masked_scatter(chosen[:, None], s.bn(y[chosen]))

    check(Net(forward, linear=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)), ROWS, kept=["bn"])


def test_experts_that_are_blocks_of_their_own():
    def forward(s, x):
        first = x.mean((1, 2, 3)) > 0
        result = x.new_zeros(x.shape[0], 4, 4, 4)
        result[first], result[~first] = s.a(x[first]), s.b(x[~first])
        return result

    experts = {name: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for name in "ab"}
    check(Net(forward, **experts), torch.randn(6, 3, 6, 6), ["a.1", "b.1"])


class Between(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


CODE = {
    "own activation after": lambda s, x: Between.apply(s.bn(s.conv(x))),
    "a runtime sequence": lambda s, x: nn.Sequential(s.conv, s.bn)(x),
    "checkpoints": lambda s, x: checkpoint_sequential(nn.Sequential(s.conv, s.bn), 1, x, use_reentrant=False),
    "functional call": lambda s, x: s.bn(
        torch.func.functional_call(s.conv, dict(s.conv.named_parameters()), (x,))
    ),
    "the convolution's parameters": lambda s, x: s.bn(F.conv2d(x, s.conv.weight, s.conv.bias)),
    "keywords": lambda s, x: s.bn(input=s.conv(input=x)),
    "inference mode": torch.inference_mode()(lambda s, x: s.bn(s.conv(x))),
}


@pytest.mark.parametrize("way", CODE)
def test_other_ways_to_call_the_two(way):
    check(net(CODE[way]), IMAGES, ["bn"])


class OwnTensor(torch.Tensor):
    pass


STANDING_FOR = {
    "jvp": lambda s, x: torch.func.jvp(lambda y: s.bn(s.conv(y)), (x,), (x,)),
    "jacrev": lambda s, x: torch.func.jacrev(lambda y: s.bn(s.conv(y)).sum((0, 2, 3)))(x),
    "a subclass": lambda s, x: s.bn(s.conv(x).as_subclass(OwnTensor)).as_subclass(torch.Tensor),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("way", STANDING_FOR)
def test_a_plain_batchnorm_whose_tensors_are_stood_for_is_not_said_to_do_more_than_normalise(way):
    check(net(STANDING_FOR[way]), IMAGES, kept=["bn"], because="which stand for them")


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.fx.symbolic_trace])
def test_wrapped_models(wrap):
    wrapped = wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval())
    name = "module.1" if wrap is nn.DataParallel else "1"
    check(wrapped, IMAGES, [name])
