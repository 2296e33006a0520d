"""Merged operators in a module: which modules they take, what those become, and what is said of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnfold.torch import fold
from bnfold.torch.merging import merge_read, touched_modules
from bnfold.torch.modules import Tail, Zero
from bnfold.torch.read import read
from tests.torch_models import randomise

IMAGES = (2, 4, 8, 8)


class Net(nn.Module):
    """Parts, and a forward that a test gives."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def pair(forward=lambda net, x: net.wide(x) + net.point(x), **parts):
    return Net(forward, wide=nn.Conv2d(4, 4, 3, padding=1), point=nn.Conv2d(4, 4, 1), **parts).eval()


def reasons(net, x):
    """Why nothing was merged."""
    _, report = fold(net.eval(), x, verify=False)
    assert not any(one.into for one in report.merges)
    return " ".join(one.reason for one in report.merges)


def decided(net, x, refused=()):
    reading = read(net.eval(), x)
    return merge_read(net, reading, reading.graph, refused)


# ---------------------------------------------------------------- which modules


def test_of_a_chain_the_last_module_becomes_the_operator_and_the_others_are_idle():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Dropout(), nn.Conv2d(4, 4, 3), nn.Tanh())
    merged = decided(net, torch.randn(IMAGES))
    place = merged.merges[0].place
    assert (place.name, place.idle, place.zeros) == ("3", ("0", "1"), ())
    assert touched_modules(merged) == {"0", "1", "3"}
    folded, _ = fold(net, torch.randn(IMAGES))
    kinds = ["Identity", "Identity", "Dropout", "Conv2d", "Tanh"]
    assert [type(part).__name__ for part in folded] == kinds


def test_of_a_sum_in_code_the_dearest_module_becomes_the_operator_and_the_others_zero():
    net = pair()
    place = decided(net, torch.randn(IMAGES)).merges[0].place
    assert (place.name, place.idle, place.zeros) == ("wide", (), ("point",))
    folded, _ = fold(net, torch.randn(IMAGES))
    assert (type(folded), type(folded.wide), type(folded.point)) == (Net, nn.Conv2d, Zero)


def test_a_module_whose_whole_work_it_is_becomes_the_operator_with_its_activations():
    block = pair(lambda net, x: net.act(net.wide(x) + net.point(x) + x), act=nn.PReLU())
    folded, _ = fold(nn.Sequential(block, nn.Conv2d(4, 4, 1)).eval(), torch.randn(IMAGES))
    assert isinstance(folded[0], Tail)
    assert list(folded.state_dict()) == [
        *("0.merged.weight", "0.merged.bias", "0.act.weight"),
        *("1.weight", "1.bias"),
    ]


def test_a_refused_module_stays():
    merged = decided(pair(), torch.randn(IMAGES), {"point", "wide"})
    assert not merged.merges
    assert "would not run as it did" in merged.refused[0].reason


def test_what_was_read_without_numbers_is_not_merged():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)).to("meta")
    assert not decided(net, torch.randn(IMAGES, device="meta")).merges


# ---------------------------------------------------------------- what is said


def test_the_report_names_the_module_what_it_is_made_of_and_the_cost():
    net = nn.Sequential(pair(), nn.Tanh())
    _, report = fold(net.eval(), torch.randn(IMAGES))
    (one,) = report.merges
    assert (one.into, one.sources) == ("0", ("0.wide", "0.point", "0"))
    assert one.multiply_adds == ((144 + 16 + 4) * 64, 144 * 64)
    assert one.bytes == ((148 + 20) * 4, 148 * 4)
    assert report.operators == (2, 1)


def test_a_batchnorm_that_only_merging_erases_is_folded():
    block = pair(lambda net, x: net.wide(x) + net.norm(x), norm=nn.BatchNorm2d(4))
    _, report = fold(randomise(nn.Sequential(nn.Tanh(), block, nn.Tanh())), torch.randn(IMAGES))
    assert report.count("folded") == 1


# ---------------------------------------------------------------- what they become


@pytest.mark.parametrize(
    ("net", "shape", "kind"),
    [
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 3)), (2, 4, 8), nn.Conv1d),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)), IMAGES, nn.Conv2d),
        (nn.Sequential(nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 3)), (2, 4, 5, 5, 5), nn.Conv3d),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (2, 3, 4), nn.Linear),
    ],
)
def test_a_merged_operator_is_a_module_of_torch(net, shape, kind):
    assert type(fold(net.eval(), torch.randn(shape))[0][1]) is kind


def test_a_table_and_a_matrix_are_one_table():
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 6)).eval()
    folded, report = fold(net, torch.randint(10, (2, 3)))
    assert type(folded[1]) is nn.Embedding
    assert folded[1].weight.shape == (10, 6)
    assert report.verified


def test_no_bias_is_made_where_there_is_none():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).eval()
    assert fold(net, torch.randn(2, 4))[0][1].bias is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_new_numbers_are_stored_as_the_old_ones_were(dtype):
    net = pair().to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)
    weight = fold(net, torch.randn(IMAGES, dtype=dtype))[0].wide.weight
    assert (weight.dtype, weight.requires_grad) == (dtype, False)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_no_random_number_is_drawn():
    net, state = pair(), torch.get_rng_state()
    fold(net, torch.ones(IMAGES))
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------- why not


def half_of(net, scale):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(scale)
    return net.half()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("net", "x", "why"),
    [
        (
            nn.Sequential(
                Net(
                    lambda net, x: net.even(x) + net.point(x),
                    even=nn.Conv2d(4, 4, 2, padding="same"),
                    point=nn.Conv2d(4, 4, 1),
                )
            ),
            torch.randn(IMAGES),
            "torch's convolutions pad alike on both sides",
        ),
        (
            half_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 300.0),
            torch.zeros(2, 4).half(),
            "its numbers would overflow float16",
        ),
        (
            pair(
                lambda net, x: net.wide(x) * net.scale + F.conv2d(x, net.point.weight),
                scale=nn.Parameter(torch.ones(())),
            ),
            torch.randn(IMAGES),
            "no module does that alone",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_with_the_reason(net, x, why):
    assert why in reasons(net, x)
