from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bnfold.calibrate import calibrate
from bnfold.errors import InputError


def take_whole_set_as_one_batch(model, *inputs):
    """The definition: one training pass over everything at once that leaves its statistics alone."""
    model = copy.deepcopy(model).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.momentum = 1.0
    with torch.no_grad():
        model(*inputs)
    return statistics(model)


def statistics(model):
    return {k: v.double() for k, v in model.named_buffers() if "running" in k}


def assert_same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    assert found
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5),
        nn.Linear(8, 5), nn.BatchNorm1d(5, momentum=None), nn.Tanh(), nn.Linear(5, 3), nn.BatchNorm1d(3, affine=False),
    ).double()  # fmt: skip


class Branches(nn.Module):
    """Two branches, one of them deeper, a sum, and BatchNorms in two and in one dimension."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        )
        self.right = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.last = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.last((self.left(x) + self.right(x)).relu().mean((2, 3)))


class Twice(nn.Module):
    """One BatchNorm that is called twice, the second time on what depends on the first."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        first = self.bn(x)
        return self.bn(self.linear(first).tanh())


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.end = nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3), nn.SyncBatchNorm(3)

    def forward(self, x, scale):
        return self.end(self.bn(self.conv(x)) * scale)


def test_deep_net_gets_the_statistics_of_the_whole_set_taken_as_one_batch():
    model, x = mlp(), torch.randn(101, 6, dtype=torch.float64) * 3 + 2
    assert_same(statistics(calibrate(model, x.split(17))), take_whole_set_as_one_batch(model, x))


def test_branches_and_four_dimensions():
    torch.manual_seed(1)
    model, x = Branches().double(), torch.randn(23, 3, 5, 6, dtype=torch.float64)
    assert_same(statistics(calibrate(model, x.split(4))), take_whole_set_as_one_batch(model, x))


def test_five_dimensions_and_keyword_arguments():
    torch.manual_seed(2)
    model, x = Volume(), torch.randn(9, 2, 2, 3, 2, dtype=torch.float64)
    scale = torch.rand(9, 1, 1, 1, 1, dtype=torch.float64)
    expected = take_whole_set_as_one_batch(model, x, scale)
    parts = list(zip(x.split(2), scale.split(2), strict=True))
    for batches in (
        parts,
        [{"x": a, "scale": b} for a, b in parts],
        [((a,), {"scale": b}) for a, b in parts],
    ):
        assert_same(statistics(calibrate(model.double(), batches)), expected)


def test_float32_net_is_computed_in_float64_and_rounded_once():
    model, x = mlp().float(), torch.randn(101, 6)
    found = calibrate(model, x.split(17))
    for name, value in take_whole_set_as_one_batch(model, x.double()).items():
        assert found.get_buffer(name).dtype == torch.float32
        difference = (found.get_buffer(name).double() - value).abs()
        assert (difference <= value.abs() * 2**-24 * (1 + 1e-6) + 1e-20).all(), name


def test_own_dtype_is_kept_when_asked_for():
    class Insists(nn.Sequential):
        def forward(self, x):
            assert x.dtype == torch.float32
            return super().forward(x)

    model, x = Insists(*mlp().float()), torch.randn(40, 6)
    with pytest.raises(AssertionError):
        calibrate(model, x.split(9))
    expected = take_whole_set_as_one_batch(nn.Sequential(*model), x.double())
    assert_same(statistics(calibrate(model, x.split(9), dtype=None)), expected, 1e-5)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 1), st.booleans()
)
def test_the_result_does_not_depend_on_the_size_or_the_order_of_the_batches(sizes, backwards):
    model, x = (
        mlp(),
        torch.randn(sum(sizes), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    )
    batches = list(x.split(sizes))[:: -1 if backwards else 1]
    assert_same(statistics(calibrate(model, batches)), take_whole_set_as_one_batch(model, x), 1e-11)


def test_a_mean_that_is_large_beside_the_deviations_costs_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3)).double()
    whole = torch.arange(3000, dtype=torch.float64).view(1000, 3) % 7
    found = calibrate(model, (whole + 1e9).split(7))
    torch.testing.assert_close(found[0].running_var, whole.var(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(found[0].running_mean, whole.mean(0) + 1e9, rtol=1e-15, atol=0)


def test_a_batchnorm_that_is_called_twice_keeps_the_statistics_of_both_calls():
    torch.manual_seed(4)
    model, x = Twice().double(), torch.randn(31, 4, dtype=torch.float64) + 1
    arrived = []
    training = copy.deepcopy(model).train()
    training.bn.register_forward_pre_hook(lambda module, args: arrived.append(args[0]))
    with torch.no_grad():
        training(x)
    both, found = torch.cat(arrived), calibrate(model, x.split(5)).bn
    assert_same(
        {"mean": found.running_mean, "var": found.running_var}, {"mean": both.mean(0), "var": both.var(0)}
    )


def test_layers_that_are_no_batchnorm_of_torch_are_calibrated_and_frozen_ones_are_not():
    class Written(nn.Module):
        def __init__(self, momentum=None):
            super().__init__()
            if momentum is not None:
                self.momentum = momentum
            self.register_buffer("running_mean", torch.zeros(4, dtype=torch.float64))
            self.register_buffer("running_var", torch.ones(4, dtype=torch.float64))

        def forward(self, x):
            return (x - self.running_mean) / (self.running_var + 1e-5).sqrt()

    x = torch.randn(30, 4, dtype=torch.float64) * 2 + 1
    model = nn.Sequential(Written(), Written(0.1), nn.Tanh(), nn.BatchNorm1d(4, dtype=torch.float64))
    frozen, written, _, last = calibrate(model, x.split(8))
    assert torch.equal(frozen.running_mean, torch.zeros(4, dtype=torch.float64))
    y = x / (1 + 1e-5) ** 0.5
    assert_same({"": written.running_var}, {"": y.var(0)})
    z = ((y - y.mean(0)) / (y.var(0, correction=0) + 1e-5).sqrt()).tanh()
    assert_same({"": last.running_mean}, {"": z.mean(0)})


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_not_touched_and_the_copy_keeps_all_but_the_statistics(training):
    model, x = mlp().train(training), torch.randn(50, 6, dtype=torch.float64)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    found = calibrate(model, x.split(10))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in found.modules()] == [m.training for m in model.modules()]
    for name, value in found.state_dict().items():
        assert torch.equal(value, before[name]) == ("running" not in name), name
    assert all(p.requires_grad for p in found.parameters())
    assert not any(m._forward_pre_hooks for net in (model, found) for m in net.modules())


def test_passes_are_as_few_as_batchnorms_lie_behind_each_other_and_one_to_see_it():
    read = []

    def batches():
        read.append(None)
        return x.split(5)

    x = torch.randn(20, 3, 5, 5)
    calibrate(Branches(), batches)
    assert len(read) == 4  # three lie behind each other, four there are
    read.clear()
    calibrate(Branches(), lambda: read.append(None) or [x])
    assert len(read) == 1


def test_a_set_that_can_be_read_only_once_will_do_for_one_batchnorm_alone():
    x = torch.randn(20, 3)
    assert_same(
        statistics(calibrate(nn.Sequential(nn.BatchNorm1d(3)), iter(x.split(5)))),
        take_whole_set_as_one_batch(nn.Sequential(nn.BatchNorm1d(3)), x.double()), 1e-6,
    )  # fmt: skip
    with pytest.raises(InputError, match="read only once, and 3 BatchNorms"):
        calibrate(mlp(), iter([torch.randn(20, 6)]))
    with pytest.raises(InputError, match="read only once"):
        calibrate(Twice(), iter(torch.randn(20, 4).split(5)))


def test_what_cannot_be_calibrated_is_refused_with_the_reason():
    x = torch.randn(20, 6)
    untracked = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False))
    nan = x.clone()
    nan[3, 2] = torch.nan
    for model, batches, reason in [
        (nn.Linear(6, 2), [x], "Linear has no BatchNorm"),
        (untracked, [x], "`1` keeps no running statistics.*track_running_stats=True"),
        (mlp(), [], "there is no batch"),
        (mlp(), [x[:1]], "`1` got one value per channel"),
        (mlp(), [x, nan], "what arrives at `1` is not finite"),
        (mlp(), x, r"`batches` is one tensor; give \[tensor\]"),
        (mlp(), [[x, x]], r"a batch is a list; say how .*apply=lambda model, batch: model\(batch\[0\]\)"),
        (nn.Sequential(nn.BatchNorm1d(6)).half(), [x * 1e5], "a statistic of `0` does not fit torch.float16"),
    ]:
        with pytest.raises(InputError, match=reason):
            calibrate(model, batches)


def test_a_set_that_changes_between_passes_is_noticed():
    sets = iter([torch.randn(20, 6).split(5), torch.randn(15, 6).split(5)])
    with pytest.raises(InputError, match="got 20 values per channel in one pass and 15 in the next"):
        calibrate(mlp(), lambda: next(sets))


def test_a_batch_of_inputs_and_targets_needs_apply():
    x, model = torch.randn(20, 6), mlp()
    found = calibrate(model, [[x[:9], 0], [x[9:], 0]], apply=lambda model, batch: model(batch[0]))
    assert_same(statistics(found), take_whole_set_as_one_batch(model, x.double()))


def test_weights_count_examples_as_often_as_if_they_were_repeated():
    torch.manual_seed(5)
    x, often = torch.randn(12, 3, 4, 4, dtype=torch.float64), torch.randint(0, 5, (12,))
    model = Branches().double()
    batches = list(zip(x.split(5), often.split(5), strict=True))
    options = {"apply": lambda model, batch: model(batch[0]), "weights": lambda batch: batch[1]}
    found = calibrate(model, batches, **options)
    assert_same(statistics(found), take_whole_set_as_one_batch(model, x.repeat_interleave(often, 0)))
    flat = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(4).double())
    with pytest.raises(InputError, match="`1` gets 15 rows where the batch has weights of shape"):
        calibrate(flat, batches, **options)


def test_bnfold_offers_it_without_importing_torch():
    program = "import sys, bnfold; assert callable(bnfold.calibrate); assert 'torch' not in sys.modules"
    program += "; import bnfold.calibrate as module; import torch; from torch import nn"
    program += "; m = bnfold.calibrate(nn.Sequential(nn.BatchNorm1d(2)), [torch.eye(2)])"
    program += "; assert m[0].running_mean.tolist() == [0.5, 0.5]"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_a_layer_that_tracks_the_std_gets_the_std():
    class Std(nn.Module):
        def __init__(self):
            super().__init__()
            self.momentum = 0.001
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_std", torch.ones(3))

        def forward(self, x):
            return (x - self.running_mean) / self.running_std

    x = torch.randn(50, 3, dtype=torch.float64) * 3 + 1
    found = calibrate(Std().double(), x.split(9))
    assert_same({"": found.running_std}, {"": x.std(0)})
