"""What a fold rests on must hold for inputs that the example is not: another batch, another size, another flag.

Each case is judged from outside: folded with verification off, then both modules in float64 on inputs of other kinds.
"""

from __future__ import annotations

import copy
import random
import warnings
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnfold
from tests.torch_models import randomise

BOUND = 1e-11


class Net(nn.Module):
    """The layers that a test names, and a forward that it gives."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def net(forward, channels=8, padding=0, **layers):
    layers = {"conv": nn.Conv2d(3, channels, 3, padding=padding), "bn": nn.BatchNorm2d(channels), **layers}
    return randomise(Net(forward, **layers))


def images(batch, size=8, other=None):
    return torch.randn(batch, 3, size, other or size, generator=torch.Generator().manual_seed(batch + size))


def deviation(before, after, *args, **kwargs):
    """The largest difference in float64, relative to the largest output."""

    def double(thing):
        return thing.double() if isinstance(thing, torch.Tensor) and thing.is_floating_point() else thing

    args, kwargs = tuple(map(double, args)), {key: double(value) for key, value in kwargs.items()}
    with torch.no_grad():
        old, new = (copy.deepcopy(model).double()(*args, **kwargs) for model in (before, after))
    old, new = (each if isinstance(each, tuple | list) else [each] for each in (old, new))
    assert [each.shape for each in old] == [each.shape for each in new]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(old, new, strict=True))


def fold(model, example):
    """Fold in float64, so that no rounding hides a small mistake, with verification off."""
    wide = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.double, example)
    return bnfold.fold(model.double(), wide, verify=False)


def check(model, example, outcomes, others=(), because=""):
    """Fold with verification off; assert the outcome of each BatchNorm, and that the outputs agree on other inputs."""
    folded, report = fold(model, example)
    assert {verdict.name: verdict.outcome for verdict in report.verdicts} == outcomes, str(report)
    for verdict in report.verdicts:
        assert verdict.outcome == "folded" or because in verdict.reason, verdict
    for other in others:
        assert deviation(model, folded, *(other if isinstance(other, tuple) else (other,))) < BOUND
    return report


BATCHES = [images(batch) for batch in (1, 2, 3, 5)]
SIZES = [images(2, size) for size in (5, 6, 7, 9, 11, 16)] + [images(1, 7, 10)]


# ---------------------------------------------------------------- code that looks at a shape


def more_than_one(net, x):
    y = net.conv(x)
    return net.bn(y) if x.shape[0] > 1 else y


def by_length(net, x):
    y = net.conv(x)
    if len(y) > 1:
        y = net.bn(y)
    return y


def early_return(net, x):
    y = net.conv(x)
    if y.size(0) == 1:
        return y.relu()
    return net.bn(y).relu()


def chosen_at_the_end(net, x):
    y = net.conv(x)
    z = net.bn(y)
    return z if len(x) > 1 else y


def below_the_convolution(net, x):
    y = net.bn(x.repeat(1, 3, 1, 1)[:, :8]) if len(x) > 1 else x.repeat(1, 3, 1, 1)[:, :8]
    return net.last(y)


def two_convolutions(net, x):
    return net.bn(net.conv(x)) if len(x) > 1 else net.bn(net.other(x))


def another_batchnorm(net, x):
    return (net.bn if len(x) > 1 else net.other)(net.conv(x))


def scaled_by_the_batch(net, x):
    return net.bn(net.conv(x) / len(x))


BATCH = [
    more_than_one,
    by_length,
    early_return,
    chosen_at_the_end,
    below_the_convolution,
    two_convolutions,
    another_batchnorm,
    scaled_by_the_batch,
]
LAYERS = {
    "below_the_convolution": lambda: {"last": nn.Conv2d(8, 4, 3)},
    "two_convolutions": lambda: {"other": nn.Conv2d(3, 8, 3)},
    "another_batchnorm": lambda: {"other": nn.BatchNorm2d(8)},
}


@pytest.mark.parametrize("example", [1, 2, 3, 5])
@pytest.mark.parametrize("forward", BATCH, ids=lambda f: f.__name__)
def test_code_that_does_something_else_for_a_batch_of_one_keeps_its_batchnorm(forward, example):
    model = net(forward, **LAYERS.get(forward.__name__, dict)())
    names = ["bn", "other"] if "another" in forward.__name__ else ["bn"]
    check(model, images(example), dict.fromkeys(names, "kept"), BATCHES)


def larger_batch(net, x):
    """A BatchNorm for small batches and one for large ones, which runs for all of them elsewhere."""
    return net.bn(net.last((net.bn if len(x) > 3 else net.other)(net.conv(x))))


def even_batch(net, x):
    y = net.conv(x)
    return net.bn(net.last(y if len(x) % 2 else net.bn(y)))


@pytest.mark.parametrize("example", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("forward", [larger_batch, even_batch], ids=lambda f: f.__name__)
def test_code_that_does_something_else_for_a_larger_or_an_even_batch_is_not_folded_into(forward, example):
    model = net(forward, last=nn.Conv2d(8, 8, 3))
    if forward is larger_batch:
        model.other = randomise(nn.BatchNorm2d(8), 1)
    folded, _ = fold(model, images(example))
    for batch in (1, 2, 3, 4, 5, 6, 9):
        assert deviation(model, folded, images(batch)) < BOUND, batch


def larger_than(net, x):
    y = net.conv(x)
    return net.bn(y) if x.shape[-1] > 6 else y


def odd_sizes(net, x):
    y = net.conv(x)
    return y if x.shape[-1] % 2 else net.bn(y)


def not_square(net, x):
    y = net.conv(x)
    return net.bn(y) if x.shape[-1] == x.shape[-2] else y


def scaled_by_the_size(net, x):
    return net.bn(net.conv(x) / x.shape[-1])


def padded_convolution(net, x):
    return F.conv2d(net.bn(x.repeat(1, 3, 1, 1)[:, :8]), net.last.weight, padding=x.shape[-1] % 2)


@pytest.mark.parametrize(
    "forward", [larger_than, odd_sizes, not_square, scaled_by_the_size], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("example", [1, 2])
def test_code_that_does_something_else_at_another_size_keeps_its_batchnorm(forward, example):
    check(net(forward), images(example), {"bn": "kept"}, [*BATCHES, *SIZES])


def test_a_convolution_whose_padding_comes_from_a_shape_takes_no_shift_from_above():
    model = net(padded_convolution, last=nn.Conv2d(8, 4, 3))
    check(model, images(2), {"bn": "scale folded"}, [*BATCHES, *SIZES])


def unbatched(net, x):
    y = net.conv(x)
    return y if x.dim() == 3 else net.bn(y)


def test_code_that_skips_a_batchnorm_without_a_batch_axis_keeps_it():
    check(net(unbatched), images(2), {"bn": "kept"}, [*BATCHES, images(1)[0]])


def test_a_batch_axis_that_is_added_where_there_is_none_costs_nothing():
    def forward(net, x):
        return net.bn(net.conv(x[None] if x.dim() == 3 else x))

    check(net(forward), images(1)[0], {"bn": "folded"}, [*BATCHES, images(1)[0]])


def test_only_what_the_two_ways_share_is_kept():
    """Blocks that run whole, or not at all, are as foldable as before."""

    def forward(net, x):
        y = net.block(x)
        if len(x) > 1:
            y = net.more(y)
        return net.bn(net.conv(y)) if y.shape[0] > 1 else net.conv(y)

    def block(given):
        return nn.Sequential(nn.Conv2d(given, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

    model = net(forward, block=block(3), more=block(3))
    check(model, images(2), {"block.1": "folded", "more.1": "folded", "bn": "kept"}, BATCHES, "given")


def test_the_reason_names_the_code_and_the_input():
    report = check(net(more_than_one), images(2), {"bn": "kept"})
    assert "Net, given a batch of 1" in report.verdicts[0].reason


def test_a_module_whose_own_code_looks_at_the_batch_is_no_batchnorm():
    class Lenient(nn.BatchNorm2d):
        def forward(self, x):
            return x if len(x) == 1 else super().forward(x)

    model = net(lambda net, x: net.bn(net.conv(x)), bn=Lenient(8))
    check(model, images(2), {"bn": "kept"}, BATCHES)


def squeezed(net, x):
    return net.last(net.bn(net.conv(x)).mean((2, 3), keepdim=True).squeeze())


def test_a_squeeze_that_drops_a_batch_of_one_as_well():
    check(net(squeezed, last=nn.Linear(8, 3)), images(2), {"bn": "folded"}, BATCHES)


# ---------------------------------------------------------------- one axis at a time, and axes of length 1


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


ONE_FREE = {
    "length": (nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), (6, 1), (6, 6), (6, 16)),
    "height": (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), (6,), (3, 6, 6), (3, 16, 6)),
    "width": (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), (6, 1), (3, 6, 6), (3, 6, 16)),
    "height of one": (nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), (6,), (3, 1, 6), (3, 16, 6)),
    "length of one": (nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8), (6, 1), (6, 1), (6, 16)),
}
"""Layers, the shape of a table that keeps an axis as it is, an example, and what else the layers take."""


@pytest.mark.parametrize("free", ONE_FREE)
def test_code_that_looks_at_the_one_axis_that_may_be_another_keeps_its_batchnorm(free):
    conv, bn, table, example, other = ONE_FREE[free]

    def forward(net, x):
        y = net.conv(x + net.table)
        return net.bn(y) if x[0].numel() <= prod(example) else y

    model = randomise(Net(forward, conv=conv, bn=bn, table=nn.Parameter(drawn(*table))))
    others = [drawn(2, *example), drawn(1, *other), drawn(2, *other)]
    check(model, drawn(2, *example), {"bn": "kept"}, others, "is also read by `Net, given")


def test_a_squeeze_that_leaves_a_length_which_batchnorm_takes_for_channels():
    """Another length than one, or than the channels, is an error."""
    model = randomise(
        Net(lambda net, x: net.bn(net.linear(x.squeeze(1))), linear=nn.Linear(5, 4), bn=nn.BatchNorm1d(4))
    )
    check(model, drawn(2, 1, 5), {"bn": "kept"}, [drawn(3, 1, 5), drawn(2, 4, 5)])


SHORT = {
    "squeezed": (lambda net, x: net.bn(net.linear(x.squeeze(1))), nn.BatchNorm1d(8), (1, 5)),
    "turned": (lambda net, x: net.bn(net.linear(x).transpose(1, 2)), nn.BatchNorm1d(8), (1, 5)),
    "in one row": (lambda net, x: net.bn(net.linear(x).reshape(-1, 8)), nn.BatchNorm1d(8), (1, 5)),
    "flat": (lambda net, x: net.bn(net.linear(x.flatten(1))), nn.BatchNorm1d(8), (1, 5)),
    "its last": (lambda net, x: net.bn(net.linear(x)[:, -1]), nn.BatchNorm1d(8), (1, 5)),
    "its mean": (lambda net, x: net.bn(net.linear(x.mean(1))), nn.BatchNorm1d(8), (1, 5)),
    "pooled": (lambda net, x: net.bn(net.linear(x.mean((2, 3)).squeeze())), nn.BatchNorm1d(8), (5, 1, 6)),
    "an image": (
        lambda net, x: net.bn(net.linear(x.movedim(1, -1)).movedim(-1, 1)),
        nn.BatchNorm2d(8),
        (5, 1, 6),
    ),
    "a row": (lambda net, x: net.bn(net.linear(x.squeeze(2).mT).mT), nn.BatchNorm1d(8), (5, 1, 6)),
}
"""What nets do with an axis of length 1."""


@pytest.mark.parametrize("index", [0, -1, 2])
def test_one_position_of_a_length_that_may_be_another_folds_above_it(index):
    model = randomise(
        Net(lambda net, x: net.bn(net.linear(x)[:, index]), linear=nn.Linear(5, 8), bn=nn.BatchNorm1d(8))
    )
    check(model, drawn(2, 6, 5), {"bn": "folded"}, [drawn(3, 6, 5), drawn(1, 8, 5), drawn(2, 3, 5)])


def test_a_position_that_others_do_not_want_keeps_what_all_positions_are_computed_by():
    def forward(net, x):
        y = net.linear(x)
        return net.bn(y[:, 0]), y[:, -1].relu()

    model = randomise(Net(forward, linear=nn.Linear(5, 8), bn=nn.BatchNorm1d(8)))
    check(model, drawn(2, 6, 5), {"bn": "kept"}, [drawn(3, 6, 5), drawn(1, 1, 5)])


@pytest.mark.parametrize("way", SHORT)
def test_a_length_of_one_costs_no_fold(way):
    forward, bn, shape = SHORT[way]
    model = randomise(Net(forward, linear=nn.Linear(5, 8), bn=bn))
    others = [drawn(batch, *shape) for batch in (2, 3, 7)]
    check(model, drawn(2, *shape), {"bn": "folded"}, others)


def test_a_height_of_one_that_the_model_does_not_take_otherwise_is_said():
    def forward(net, x):
        return net.bn(net.conv(x.squeeze(2)))

    model = randomise(Net(forward, conv=nn.Conv1d(3, 8, 3), bn=nn.BatchNorm1d(8)))
    report = check(model, drawn(2, 3, 1, 16), {"bn": "folded"}, [drawn(1, 3, 1, 9)])
    assert [note for note in report.notes if "size" in note] == [
        "not read at another size: the model does not take 2x3x2x16"
    ]


# ---------------------------------------------------------------- sizes that cost nothing


def resized(net, x):
    y = net.bn(net.conv(x))
    return F.interpolate(y, size=x.shape[-2:], mode="bilinear")


def resized_before(net, x):
    return net.bn(F.interpolate(net.conv(x), size=(x.shape[-2] * 2, x.shape[-1] + 3)))


def tokens(net, x):
    y = net.conv(x)
    return net.bn(y.flatten(2).transpose(1, 2).transpose(1, 2).reshape(len(x), 8, *y.shape[2:]))


def cropped(net, x):
    y = net.conv(x)
    return net.bn(y[:, :, : x.shape[2] // 2, 1 : y.shape[3] - 1])


def rolled(net, x):
    return net.bn(torch.roll(net.conv(x), (1, 1), (2, 3)))


def split_in_halves(net, x):
    y = net.conv(x)
    left, right = y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]
    return net.bn(torch.cat((right, left), -1))


def pooled_to_a_size(net, x):
    return net.bn(F.adaptive_avg_pool2d(net.conv(x), (x.shape[-1] // 4, 1)))


def chunked(net, x):
    first, second = net.conv(x).chunk(2, 2)
    return net.bn(torch.cat((second, first), 2))


def cropped_to_even(net, x):
    y = net.conv(x)
    return net.bn(y[:, :, : y.shape[2] - y.shape[2] % 2, : y.shape[3] - y.shape[3] % 2])


EQUAL = [
    resized,
    resized_before,
    tokens,
    cropped,
    cropped_to_even,
    rolled,
    split_in_halves,
    pooled_to_a_size,
    chunked,
]


@pytest.mark.parametrize("forward", EQUAL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("example", [1, 2])
def test_code_whose_settings_alone_depend_on_the_size_folds(forward, example):
    check(net(forward), images(example), {"bn": "folded"}, [*BATCHES, *SIZES])


def test_channels_that_are_cut_by_the_size_of_the_image_fold_above_the_cut():
    def forward(net, x):
        return net.bn(net.conv(x))[:, : x.shape[-1]].mean(1)

    model = net(forward)
    check(model, images(2), {"bn": "folded"}, [*BATCHES, *SIZES])


# ---------------------------------------------------------------- pads and crops of nothing


def same_padding(net, x):
    h, w = x.shape[-2:]
    return net.last(F.pad(net.bn(x), (0, w % 2, 0, h % 2)))


def same_padding_of_timm(net, x):
    pads = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in (x.shape[-1], x.shape[-2])]
    return net.last(F.pad(net.bn(x), [0, max(pads[0] - 1, 0), 0, max(pads[1] - 1, 0)]))


def pad_or_crop(net, x):
    return net.last(F.pad(net.bn(x), (0, 8 - x.shape[-1], 0, 8 - x.shape[-2])))


def window_padding(net, x):
    return net.last(F.pad(net.bn(x), (0, -x.shape[-1] % 4, 0, -x.shape[-2] % 4), "constant", 0.0))


PADS = [same_padding, same_padding_of_timm, pad_or_crop, window_padding]


@pytest.mark.parametrize("forward", PADS, ids=lambda f: f.__name__)
def test_a_pad_that_pads_nothing_at_the_size_of_the_example_is_a_pad(forward):
    model = net(forward, conv=nn.Identity(), bn=nn.BatchNorm2d(3), last=nn.Conv2d(3, 4, 3, stride=2))
    check(model, images(2), {"bn": "scale folded"}, [*BATCHES, *SIZES])


def test_a_pad_by_a_number_that_is_no_zero_lets_nothing_through():
    def forward(net, x):
        return net.last(F.pad(net.bn(x), (0, x.shape[-1] % 2), value=1.0))

    model = net(forward, conv=nn.Identity(), bn=nn.BatchNorm2d(3), last=nn.Conv2d(3, 4, 3))
    check(model, images(2), {"bn": "kept"}, [*BATCHES, *SIZES])


def test_a_pad_of_nothing_that_no_other_size_was_asked_about_is_a_pad():
    def forward(net, x):
        return net.head(net.last(F.pad(net.bn(x), (0, x.shape[-1] % 8, 0, 0))).flatten(1))

    layers = {
        "conv": nn.Identity(),
        "bn": nn.BatchNorm2d(3),
        "last": nn.Conv2d(3, 4, 3),
        "head": nn.Linear(144, 2),
    }
    check(net(forward, **layers), images(2), {"bn": "scale folded"}, BATCHES)


@pytest.mark.parametrize("amounts", [(0, 0, 0, 0), (0, -1, -1, 0)])
def test_a_pad_by_settings_that_pad_nothing_is_none(amounts):
    def forward(net, x):
        return net.last(F.pad(net.bn(x), amounts))

    model = net(forward, conv=nn.Identity(), bn=nn.BatchNorm2d(3), last=nn.Conv2d(3, 4, 3))
    check(model, images(2), {"bn": "folded"}, [*BATCHES, *SIZES])


def test_a_module_that_pads_by_nothing_is_none():
    parts = nn.BatchNorm2d(3), nn.ZeroPad2d(0), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)
    check(randomise(nn.Sequential(*parts)), images(2), {"0": "folded"}, BATCHES)


# ---------------------------------------------------------------- flags, and what did not run


class Flagged(nn.Module):
    """A flag of its forward, or of its own, chooses."""

    def __init__(self, choose):
        super().__init__()
        self.conv, self.clean = nn.Conv2d(3, 8, 3), True
        self.bn_clean, self.bn_adv, self.choose = nn.BatchNorm2d(8), nn.BatchNorm2d(8), choose

    def forward(self, x, clean: bool = True):
        return self.choose(self, self.conv(x), clean).relu()


def by_argument(net, y, clean):
    return (net.bn_clean if clean else net.bn_adv)(y)


def by_argument_or_not_at_all(net, y, clean):
    return net.bn_clean(y) if clean else y


@pytest.mark.parametrize("given", [{}, {"clean": True}, {"clean": False}])
@pytest.mark.parametrize("choose", [by_argument, by_argument_or_not_at_all], ids=lambda f: f.__name__)
def test_what_a_flag_of_the_forward_chooses_stays(choose, given):
    model = randomise(Flagged(choose))
    folded, report = fold(model, ((images(2),), given))
    assert [verdict.outcome for verdict in report.verdicts] == ["kept", "kept"], str(report)
    for clean in (True, False):
        assert all(deviation(model, folded, batch, clean=clean) < BOUND for batch in BATCHES)


def asks_between(net, x, clean):
    y = net.conv(x)
    return net.bn(y if clean or x.sum() > 0 else 2 * y)


def asks_before(net, x, clean):
    times = 1 if clean or x.sum() > 0 else 2
    return net.bn(net.conv(x) * times)


def asks_what_it_hands_on(net, x, clean):
    y = net.conv(x)
    dark = not clean and bool(y.sum() < -1e9)
    return net.bn(2 * y if dark else y)


@pytest.mark.parametrize("way", [asks_between, asks_before, asks_what_it_hands_on], ids=lambda f: f.__name__)
def test_what_a_number_chooses_given_another_flag_stays_though_the_example_has_the_usual_one(way):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x, clean: bool = True):
            return way(self, x, clean).relu()

    model, bright = randomise(Asking()), images(2).abs()
    folded, report = fold(model, bright)
    assert [verdict.outcome for verdict in report.verdicts] == ["kept"], str(report)
    for batch in (bright, -bright, -1e12 * bright):
        assert all(deviation(model, folded, batch, clean=clean) < BOUND for clean in (True, False))


def by_attribute(net, y, clean):
    return (net.bn_clean if net.clean else net.bn_adv)(y)


def test_what_an_attribute_chooses_stays():
    model = randomise(Flagged(by_attribute))
    folded, report = fold(model, images(2))
    assert [verdict.outcome for verdict in report.verdicts] == ["kept", "kept"], str(report)
    assert "bn_adv did not run" in report.verdicts[0].reason
    model.clean = folded.clean = False
    assert deviation(model, folded, images(2)) < BOUND


@pytest.mark.parametrize(
    "container", [nn.ModuleList, lambda norms: nn.ModuleDict(dict(zip("abc", norms, strict=True)))]
)
def test_what_an_index_chooses_stays(container):
    class Domains(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.at = nn.Conv2d(3, 8, 3), 0
            self.bns = container([nn.BatchNorm2d(8) for _ in range(3)])

        def forward(self, x):
            return list(self.bns.children())[self.at](self.conv(x))

    model = randomise(Domains())
    folded, report = fold(model, images(2))
    assert {verdict.outcome for verdict in report.verdicts} == {"kept"}, str(report)
    for model.at in range(3):
        folded.at = model.at
        assert deviation(model, folded, images(2)) < BOUND


def test_what_a_module_chooses_of_batchnorms_alone_stays():
    class Domains(nn.Module):
        def __init__(self):
            super().__init__()
            self.bns, self.at = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(2)]), 0

        def forward(self, x):
            return self.bns[self.at](x)

    parts = nn.Conv2d(3, 8, 3), Domains(), nn.Conv2d(8, 4, 3)
    model = randomise(nn.Sequential(*parts))
    folded, report = fold(model, images(2))
    assert [verdict.outcome for verdict in report.verdicts] == ["kept", "kept"], str(report)
    model[1].at = folded[1].at = 1
    assert deviation(model, folded, images(2)) < BOUND


def test_a_flag_that_only_returns_more_keeps_only_what_it_returns():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.second, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x, features: bool = False):
            y = self.first(x)
            z = self.bn2(self.second(self.bn1(y).relu()))
            return (z, y) if features else z

    model = randomise(Features())
    folded, report = fold(model, images(2))
    assert [verdict.outcome for verdict in report.verdicts] == ["kept", "folded"], str(report)
    assert deviation(model, folded, images(2), features=True) < BOUND


def conv_norm(given, made):
    return nn.Sequential(nn.Conv2d(given, made, 3), nn.BatchNorm2d(made), nn.ReLU())


class Auxiliary(nn.Module):
    """A second head while training, as in Inception."""

    def __init__(self, when):
        super().__init__()
        self.stem, self.aux, self.rest, self.when = conv_norm(3, 8), conv_norm(8, 4), conv_norm(8, 4), when

    def forward(self, x):
        y = self.stem(x)
        return (self.rest(y), self.aux(y)) if self.when(self) else self.rest(y)


def test_a_head_that_runs_in_training_only_costs_nothing():
    model = randomise(Auxiliary(lambda net: net.training))
    report = check(
        model, images(2), {"stem.1": "folded", "rest.1": "folded", "aux.1": "kept"}, BATCHES, "did not run"
    )
    assert not report.limits


def test_a_head_that_an_attribute_switches_costs_nothing_that_it_cannot_see():
    model = randomise(Auxiliary(lambda net: getattr(net, "both", False)))
    folded, report = fold(model, images(2))
    assert [verdict.outcome for verdict in report.verdicts] == ["folded", "folded", "kept"], str(report)
    assert not report.limits
    model.both = folded.both = True
    assert deviation(model, folded, images(2)) < BOUND


def test_a_fold_that_rests_on_a_head_that_did_not_run_says_so_first():
    def forward(net, x):
        y = net.conv(x)
        return (net.bn(y), net.aux(y)) if getattr(net, "both", False) else net.bn(y)

    _, report = fold(net(forward, aux=conv_norm(8, 4)), images(2))
    assert [verdict.outcome for verdict in report.verdicts] == ["folded", "kept"], str(report)
    assert "`aux` does not run" in str(report).splitlines()[0]
    assert any("`aux`" in limit for limit in report.to_dict()["limits"])


def test_a_batchnorm_that_splits_its_batch_in_training_only_is_folded():
    class Split(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.aux_bn = nn.ModuleList([nn.BatchNorm2d(channels)])

        def forward(self, x):
            if not self.training:
                return super().forward(x)
            first, second = x.chunk(2)
            return torch.cat([super().forward(first), self.aux_bn[0](second)])

    model = net(lambda net, x: net.bn(net.conv(x)), bn=Split(8))
    check(model, images(2), {"bn": "folded", "bn.aux_bn.0": "kept"}, BATCHES)


# ---------------------------------------------------------------- chance, and what cannot be read


@pytest.mark.parametrize("seed", range(4))
def test_code_that_throws_dice_has_one_verdict(seed):
    def forward(net, x):
        y = net.conv(x)
        return net.bn(y) if random.random() < 0.5 else y

    random.seed(seed)
    state = random.getstate()
    check(net(forward), images(2), {"bn": "kept"})
    assert random.getstate() == state


@pytest.mark.parametrize("seed", range(4))
def test_code_that_throws_the_dice_of_torch_has_one_verdict(seed):
    def forward(net, x):
        y = net.conv(x)
        return net.bn(y) if torch.rand(()) < 0.5 else y

    torch.manual_seed(seed)
    check(net(forward), images(2), {"bn": "kept"})


def test_a_size_that_the_model_does_not_take_is_said_once():
    parts = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)
    report = check(randomise(nn.Sequential(*parts)), images(2), {"1": "folded"}, BATCHES)
    assert sum("another size" in note for note in report.notes) == 1
    assert not any("another size" in note for note in check(net(resized), images(2), {"bn": "folded"}).notes)


# ---------------------------------------------------------------- sparse tensors


class GraphLayer(nn.Module):
    def __init__(self, adjacency=None):
        super().__init__()
        self.linear, self.bn, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        if adjacency is not None:
            self.register_buffer("adjacency", adjacency)

    def forward(self, x, adjacency=None):
        adjacency = self.adjacency if adjacency is None else adjacency
        return torch.spmm(adjacency, self.last(self.bn(self.linear(x)).relu()))


@pytest.fixture(autouse=True)
def beta():
    """Torch warns once of each layout that it calls new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def adjacency(count):
    dense = (torch.rand(count, count, generator=torch.Generator().manual_seed(count)) < 0.5).float()
    return dense + torch.eye(count)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_input_folds_what_is_right(layout):
    model = randomise(GraphLayer())
    folded, report = bnfold.fold(model, (torch.randn(6, 4), adjacency(6).to_sparse(layout=layout)))
    assert [verdict.outcome for verdict in report.verdicts] == ["folded"], str(report)
    assert deviation(model, folded, torch.randn(9, 4), adjacency(9).to_sparse(layout=layout)) < 1e-6


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_buffer_folds_what_is_right(layout):
    model = randomise(GraphLayer(adjacency(6).to_sparse(layout=layout)))
    folded, report = bnfold.fold(model, torch.randn(6, 4))
    assert [verdict.outcome for verdict in report.verdicts] == ["folded"], str(report)
    x = torch.randn(6, 4)
    with torch.no_grad():
        assert torch.allclose(model(x), folded(x), atol=1e-5)
    assert folded.adjacency.layout == layout
    assert folded.adjacency is not model.adjacency
