"""Which axis, how many groups, what the border does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnfold
from tests.torch_models import check


def chain(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


class Call(nn.Module):
    """A module from a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize("length", [4, 5])
def test_linear_on_three_axes_writes_the_last_and_batchnorm_normalises_the_second(length):
    model = chain(nn.Linear(length, length), nn.BatchNorm1d(length))
    check(model, torch.randn(3, length, length), kept=["1"], because="axis")


def test_linear_then_transpose_then_batchnorm_follows_the_axis():
    model = chain(nn.Linear(5, 4), Call(lambda x: x.transpose(1, 2)), nn.BatchNorm1d(4))
    check(model, torch.randn(3, 6, 5), folded=["2"])


def test_linear_then_reshape_across_axes_is_left():
    model = chain(nn.Linear(5, 6), Call(lambda x: x.reshape(-1, 4, 6)), nn.BatchNorm1d(4))
    check(model, torch.randn(3, 4, 5), kept=["2"])


def test_tokens_flattened_into_the_batch_are_followed():
    model = chain(nn.Linear(5, 4), Call(lambda x: x.flatten(0, 1)), nn.BatchNorm1d(4))
    check(model, torch.randn(3, 6, 5), folded=["2"])


def test_batchnorm_then_flatten_then_linear_repeats_over_positions():
    model = chain(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    check(model, torch.randn(2, 3, 4, 4), folded=["0"])


def test_a_view_that_only_works_for_one_example_is_not_trusted():
    model = chain(nn.Conv2d(3, 4, 1), Call(lambda x: x.view(4, -1)), nn.BatchNorm1d(16, affine=False))
    check(model, torch.randn(1, 3, 4, 4), kept=["2"])


@pytest.mark.parametrize("batch", [1, 2])
def test_squeeze_and_pool_are_followed_whatever_the_batch(batch):
    model = chain(
        nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), Call(lambda x: x.flatten(1)), nn.BatchNorm1d(4)
    )
    check(model, torch.randn(batch, 3, 4, 4), folded=["3"])


CONVS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_convolution_takes_a_batchnorm_behind_it(rank, transposed, groups, bias):
    kind, norm = CONVS[rank][int(transposed)], CONVS[rank][2]
    conv = kind(4, 8, 3, stride=2, padding=1, groups=groups, bias=bias)
    after, _ = check(chain(conv, norm(8)), torch.randn(2, 4, *[5] * rank), folded=["1"])
    assert type(after[0]) is kind
    assert after[0].bias is not None


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_unpadded_pointwise_convolution_takes_a_batchnorm_before_it(transposed, groups):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    check(chain(nn.BatchNorm2d(4), kind(4, 4, 1, groups=groups)), torch.randn(2, 4, 5, 5), folded=["0"])


def test_depthwise_transpose_with_as_many_outputs_as_inputs():
    model = chain(nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4), nn.BatchNorm2d(4))
    check(model, torch.randn(2, 4, 3, 3), folded=["1"])


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 1, padding=1),
        nn.Conv2d(3, 4, (1, 3), padding=(0, 1)),
        nn.ConvTranspose2d(3, 4, 3),
        nn.ConvTranspose2d(3, 4, 2, stride=2, output_padding=1),
    ],
)
def test_before_a_border_only_the_scale_goes(conv):
    after, _ = check(chain(nn.BatchNorm2d(3), conv), torch.randn(2, 3, 5, 5), half=["0"])
    assert type(after[0]).__name__ == "ChannelAdd"


def test_before_a_separate_zero_pad_only_the_scale_goes():
    model = chain(nn.BatchNorm2d(3), nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3))
    check(model, torch.randn(2, 3, 5, 5), half=["0"])


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_border_made_of_the_image_itself_lets_everything_through(mode):
    model = chain(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode))
    check(model, torch.randn(2, 3, 5, 5), folded=["0"])


def test_a_border_of_another_constant_lets_nothing_through():
    model = chain(nn.BatchNorm2d(3), nn.ConstantPad2d(1, 0.5), nn.Conv2d(3, 4, 3))
    check(model, torch.randn(2, 3, 5, 5), kept=["0"])


def test_unpadded_convolution_takes_everything():
    check(
        chain(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding="valid")), torch.randn(2, 3, 5, 5), folded=["0"]
    )


@pytest.mark.parametrize("counted", [True, False])
def test_an_average_that_counts_padding_lets_the_scale_through_alone(counted):
    pool = nn.AvgPool2d(3, padding=1, count_include_pad=counted)
    outcome = {"half": ["2"]} if counted else {"folded": ["2"]}
    check(chain(nn.Conv2d(3, 4, 1), pool, nn.BatchNorm2d(4)), torch.randn(2, 3, 6, 6), **outcome)


def test_an_average_with_its_own_divisor_is_no_average():
    check(
        chain(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2, divisor_override=3), nn.BatchNorm2d(4)),
        torch.randn(2, 3, 6, 6),
        half=["2"],
    )


def test_convolution_without_a_batch_axis():
    model = chain(nn.Conv2d(3, 4, 3), Call(lambda x: x.unsqueeze(0)), nn.BatchNorm2d(4))
    check(model, torch.randn(3, 5, 5), folded=["2"])


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_resizing_lets_everything_through(mode):
    model = chain(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2, mode=mode), nn.BatchNorm2d(4))
    check(model, torch.randn(2, 3, 4, 4), folded=["2"])


def test_pixel_shuffle_repeats_each_channel():
    check(
        chain(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.BatchNorm2d(4)),
        torch.randn(2, 3, 4, 4),
        folded=["2"],
    )


def test_channel_shuffle_is_followed():
    shuffle = Call(lambda x: x.view(x.size(0), 2, 3, *x.shape[2:]).transpose(1, 2).flatten(1, 2))
    check(chain(nn.Conv2d(3, 6, 1), shuffle, nn.BatchNorm2d(6)), torch.randn(2, 3, 4, 4), folded=["2"])
    check(
        chain(nn.Conv2d(3, 6, 1), nn.ChannelShuffle(3), nn.BatchNorm2d(6)),
        torch.randn(2, 3, 4, 4),
        folded=["2"],
    )


def test_chunks_of_one_conv_that_are_all_normalised():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(4)

        def forward(self, x):
            first, second = self.conv(x).split([2, 4], 1)
            return self.a(first).relu(), self.b(second).tanh()

    check(Halves(), torch.randn(2, 3, 4, 4), folded=["a", "b"])


def test_slices_and_indices_are_followed():
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.a(y[:, ::3]).relu(), self.b(y[:, [1, 2, 4, 5], 1:]).tanh()

    check(Picks(), torch.randn(2, 3, 4, 4), folded=["a", "b"])


@pytest.mark.parametrize("spelling", ["matmul", "addmm", "left", "transposed", "linear"])
def test_matrix_products_by_a_parameter(spelling):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b, self.bn = (
                nn.Parameter(torch.randn(3, 4)),
                nn.Parameter(torch.randn(4)),
                nn.BatchNorm1d(4),
            )

        def forward(self, x):
            if spelling == "matmul":
                return self.bn(x @ self.w + self.b)
            if spelling == "addmm":
                return self.bn(torch.addmm(self.b, x, self.w))
            if spelling == "left":
                return self.bn((self.w.t() @ x.t() + self.b[:, None]).t())
            if spelling == "transposed":
                return self.bn(torch.matmul(x, self.w) + self.b)
            return self.bn(F.linear(x, self.w.t(), self.b))

    outcome = {"kept": ["bn"]} if spelling == "left" else {"folded": ["bn"]}
    check(Product(), torch.randn(5, 3), **outcome)


def test_what_is_left_of_a_batchnorm1d_stays_on_the_channels_of_inputs_of_the_other_rank():
    """Read on (N, C), called on (N, C, L) with L = C, where numbers along the last axis would suit as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(5), nn.Tanh())
    model(torch.randn(8, 5))
    model.eval()
    folded, report = bnfold.fold(model, torch.randn(2, 5), lower=True)
    assert report.verdicts[0].outcome == "kept"
    for x in (torch.randn(3, 5), torch.randn(3, 5, 5)):
        torch.testing.assert_close(folded(x), model(x), atol=1e-6, rtol=1e-6)
