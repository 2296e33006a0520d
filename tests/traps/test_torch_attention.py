"""The projections of attention, and other weights that are a part of a parameter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnfold.torch import fold
from tests.torch_models import check, randomise

SEQUENCES = torch.randn(3, 6, 8)

BEFORE = {
    "of one value": lambda h, x: (h, h, h),
    "whose queries alone are normalised": lambda h, x: (h, x, x),
    "whose keys and values alone are normalised": lambda h, x: (x, h, h),
    "of three values": lambda h, x: (x, h, x.sin()),
}


class Attention(nn.Module):
    """BatchNorm, attention, BatchNorm."""

    def __init__(self, roles, masked=False, weights=True, **settings):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, **settings)
        with torch.no_grad():
            for tensor in self.attend.parameters():
                tensor.copy_(torch.randn(tensor.shape) / 2)
        self.roles, self.masked, self.weights = roles, masked, weights
        self.first, self.last = nn.BatchNorm1d(8), nn.BatchNorm1d(8)

    def forward(self, x):
        batch_first = self.attend.batch_first
        turn = (0, 2, 1) if batch_first else (1, 2, 0)
        back = (0, 2, 1) if batch_first else (2, 0, 1)
        h = self.first(x.permute(turn)).permute(back)
        count, length = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        mask = torch.arange(length).expand(count, length) >= length - 2 if self.masked else None
        y = self.attend(*self.roles(h, x), key_padding_mask=mask, need_weights=self.weights)[0]
        return torch.tanh(self.last(y.permute(turn)))


@pytest.mark.parametrize("settings", [{"batch_first": True}, {"batch_first": False}])
@pytest.mark.parametrize("roles", BEFORE)
def test_batchnorms_around_attention_go_into_its_projections(roles, settings):
    model = Attention(BEFORE[roles], **settings)
    _, report = check(model, SEQUENCES, folded=["first", "last"])
    assert report.verdicts[1].into == ("attend.out_proj",)


@pytest.mark.parametrize(
    "settings",
    [
        {"masked": True},
        {"weights": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 8, "vdim": 8, "weights": False},
    ],
    ids=str,
)
def test_whatever_else_attention_does_its_projections_take_batchnorms(settings):
    check(
        Attention(BEFORE["of one value"], batch_first=True, **settings), SEQUENCES, folded=["first", "last"]
    )


def test_projections_of_keys_and_values_that_have_weights_of_their_own_share_one_bias():
    class Narrow(Attention):
        def __init__(self):
            super().__init__(None, batch_first=True, kdim=4, vdim=5)
            self.first, self.other = nn.BatchNorm1d(4), nn.BatchNorm1d(5)

        def forward(self, x):
            keys = self.first(x[..., :4].transpose(1, 2)).transpose(1, 2)
            values = self.other(x[..., 3:].transpose(1, 2)).transpose(1, 2)
            return torch.tanh(self.last(self.attend(x, keys, values)[0].transpose(1, 2)))

    _, report = check(Narrow(), SEQUENCES, folded=["first", "other", "last"])
    into = {verdict.name: verdict.into for verdict in report.verdicts}
    assert into["first"] == ("attend.k_proj_weight",)
    assert into["other"] == ("attend.v_proj_weight",)


def test_projections_without_a_bias_take_the_scale():
    check(Attention(BEFORE["of one value"], batch_first=True, bias=False), SEQUENCES, half=["first", "last"])


class Parts(nn.Module):
    """Linear layers whose weights are parts of one parameter."""

    def __init__(self, *starts):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24))
        self.starts, self.norms = starts, nn.ModuleList(nn.BatchNorm1d(8) for _ in starts)

    def forward(self, x):
        for start, norm in zip(self.starts, self.norms, strict=True):
            rows = slice(start, start + 8)
            x = torch.tanh(norm(F.linear(x, self.weight[rows], self.bias[rows])))
        return x


ROWS = torch.randn(5, 8)


def test_each_part_of_a_parameter_absorbs_and_the_rest_of_it_stays_as_it_is():
    model = Parts(0, 12)
    after, _ = check(model, ROWS, folded=["norms.0", "norms.1"])
    for rows in (slice(8, 12), slice(20, 24)):
        assert torch.equal(after.weight[rows], model.weight[rows])
        assert torch.equal(after.bias[rows], model.bias[rows])
    assert not torch.equal(after.weight[:8], model.weight[:8])


def test_parts_that_overlap_stay():
    check(Parts(0, 7), ROWS, kept=["norms.0", "norms.1"], because="is used in another way by")


def test_a_part_of_a_parameter_that_is_read_as_a_whole_stays():
    class Summed(Parts):
        def forward(self, x):
            return super().forward(x) * self.weight.sum()

    check(Summed(0, 12), ROWS, kept=["norms.0", "norms.1"], because="is read by")


def test_a_part_that_two_calls_use_before_different_batchnorms_stays():
    check(Parts(4, 4), ROWS, kept=["norms.0", "norms.1"], because="is used 2 times")


STACKED = {
    "by a number": lambda m, place: (m.weight[place], m.bias[place]),
    "by unbind": lambda m, place: (m.weight.unbind(0)[place], m.bias.unbind(0)[place]),
    "by chunks": lambda m, place: (m.weight.chunk(3)[place].squeeze(0), m.bias[place]),
    "by columns": lambda m, place: (m.weight.view(3, 8, 8)[place], m.bias[place]),
}


class Stacked(nn.Module):
    """The weights of all layers in one parameter."""

    def __init__(self, take):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.randn(3, 8))
        self.take, self.norms = take, nn.ModuleList(nn.BatchNorm1d(8) for _ in range(3))

    def forward(self, x):
        for place, norm in enumerate(self.norms):
            weight, bias = self.take(self, place)
            x = torch.tanh(norm(F.linear(x, weight, bias)))
        return x


@pytest.mark.parametrize("how", ["by a number", "by unbind"])
def test_weights_that_are_stacked_absorb_each_for_itself(how):
    check(Stacked(STACKED[how]), ROWS, folded=["norms.0", "norms.1", "norms.2"])


@pytest.mark.parametrize("how", ["by chunks", "by columns"])
def test_a_part_that_is_also_seen_in_another_shape_stays(how):
    check(Stacked(STACKED[how]), ROWS, kept=["norms.0", "norms.1", "norms.2"], because="is computed while")


def test_columns_that_are_cut_out_and_turned_are_a_part_too():
    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(5))
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            return torch.tanh(self.norm(torch.addmm(self.bias, x, self.table[:, 3:8] * 0.5)))

    model = Columns()
    after, _ = check(model, ROWS, folded=["norm"])
    for columns in (slice(0, 3), slice(8, 12)):
        assert torch.equal(after.table[:, columns], model.table[:, columns])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_keeps_its_type_and_the_rest_of_it_every_bit(dtype):
    model = randomise(Parts(0)).to(dtype)
    after, report = fold(model, ROWS.to(dtype))
    assert report.count("folded") == 1
    assert report.verified
    assert torch.equal(after.weight[8:], model.weight[8:])
