"""Who else reads a value, a module, a parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.torch_models import check

IMAGES = torch.randn(2, 3, 6, 6)


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y.sigmoid()


class AlsoAnOutput(TwoReaders):
    def forward(self, x):
        y = self.conv(x)
        return {"raw": y, "normal": self.bn(y)}


class KeptInAttribute(TwoReaders):
    def forward(self, x):
        self.seen = self.conv(x)
        return self.bn(self.seen)


class KeptInList(TwoReaders):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(self.conv(x))
        return self.bn(self.seen[-1])


def test_a_producer_with_a_second_reader_is_left():
    check(TwoReaders(), IMAGES, kept=["bn"])


def test_a_producer_that_is_an_output_is_left():
    check(AlsoAnOutput(), IMAGES, kept=["bn"])


def test_a_value_that_the_module_keeps_counts_as_read():
    check(KeptInAttribute(), IMAGES, kept=["bn"])
    model = KeptInList()
    check(model, IMAGES, kept=["bn"])
    assert model.seen == []


class ConvTwice(nn.Module):
    def __init__(self, second):
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.bn2 = nn.BatchNorm2d(3) if second else nn.Identity()

    def forward(self, x):
        return self.bn1(self.conv(x)), self.bn2(self.conv(x.tanh()))


def test_one_conv_before_two_batchnorms_is_left():
    check(ConvTwice(True), IMAGES, kept=["bn1", "bn2"])


def test_one_conv_with_a_batchnorm_on_one_path_is_left():
    check(ConvTwice(False), IMAGES, kept=["bn1"])


class NormTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.bn = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
        )

    def forward(self, x):
        return self.bn(self.conv1(x)).relu() + self.bn(self.conv2(x)).tanh()


def test_one_batchnorm_after_two_convs_goes_into_both():
    check(NormTwice(), IMAGES, folded=["bn"])


class NormTwiceOnceBlocked(NormTwice):
    def forward(self, x):
        return self.bn(self.conv1(x)).relu() + self.bn(self.conv2(x).tanh())


def test_one_batchnorm_that_cannot_leave_one_of_its_places_stays_in_both():
    check(NormTwiceOnceBlocked(), IMAGES, kept=["bn"])


class BothTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        for _ in range(3):
            x = self.bn(self.conv(x)).relu()
        return x


def test_a_pair_called_three_times_is_folded_once():
    check(BothTwice(), IMAGES, folded=["bn"])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return self.bn(self.a(x)) + self.b(x).tanh()


def test_a_module_that_ties_its_weight_gets_one_of_its_own():
    model = Tied()
    after, _ = check(model, IMAGES, folded=["bn"])
    assert after.a.weight is not after.b.weight
    assert torch.equal(after.b.weight, model.b.weight)
    assert set(after.state_dict()) == {"a.weight", "a.bias", "b.weight", "b.bias"}


class ReadByName(Tied):
    def forward(self, x):
        return self.bn(self.a(x)) + F.conv2d(x.tanh(), self.b.weight)


def test_a_weight_that_two_modules_hold_and_other_code_reads_is_left():
    check(ReadByName(), IMAGES, kept=["bn"], because="weight")


class Regulariser(TwoReaders):
    def forward(self, x):
        return self.bn(self.conv(x)), self.conv.weight.square().sum()


def test_a_weight_that_is_read_as_data_is_left():
    check(Regulariser(), IMAGES, kept=["bn"], because="read by")


class BiasRead(TwoReaders):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.conv.bias.mean()


def test_a_bias_that_is_read_as_data_is_left():
    check(BiasRead(), IMAGES, kept=["bn"], because="bias")


class SharedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
        self.bias, self.bn = nn.Parameter(torch.randn(4)), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.bn(F.linear(x, self.a, self.bias)) + F.linear(x, self.b, self.bias).tanh()


def test_a_bias_parameter_of_two_calls_is_left():
    check(SharedBias(), torch.randn(5, 3), kept=["bn"], because="bias")


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.bn, self.head = nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.bn(self.embed(tokens)).tanh())


def test_an_embedding_used_as_the_output_layer_is_untied():
    model = TiedEmbedding()
    after, _ = check(model, torch.tensor([0, 3, 6]), folded=["bn"])
    assert torch.equal(after.head.weight, model.head.weight)


class FunctionalEmbedding(TiedEmbedding):
    def forward(self, tokens):
        return F.linear(self.bn(self.embed(tokens)).tanh(), self.embed.weight)


def test_an_embedding_whose_weight_is_read_by_name_is_left():
    check(FunctionalEmbedding(), torch.tensor([0, 3, 6]), kept=["bn"])


class SharedModuleUnderTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.layers = nn.Sequential(self.conv, self.bn)
        self.plain = [self.bn]

    def forward(self, x):
        return self.plain[0](self.layers[0](x))


def test_a_batchnorm_held_under_several_names_is_gone_under_each():
    after, _ = check(SharedModuleUnderTwoNames(), IMAGES, folded=["bn"])
    assert all(type(each) is nn.Identity for each in (after.bn, after.layers[1], after.plain[0]))


class StoresShareMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Linear(3, 4), nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.b.weight.data = self.a.weight.data

    def forward(self, x):
        return self.bn(self.a(x)) + self.b(x).tanh()


def test_two_parameters_over_one_memory_are_parted():
    check(StoresShareMemory(), torch.randn(5, 3), folded=["bn"])
