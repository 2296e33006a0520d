"""Every disguise of a BatchNorm, and everything that hangs on a module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from bnfold import UnreadableModel
from bnfold.torch import fold, load_folded
from tests.torch_models import agree, check, randomise

IMAGES = torch.randn(2, 3, 6, 6)


def pair(norm: nn.Module, conv: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(conv or nn.Conv2d(3, 4, 3), norm)


class FrozenNorm(nn.Module):
    """As in torchvision and detectron2: four buffers, spelt out."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        scale = w * (self.running_var.reshape(1, -1, 1, 1) + self.eps).rsqrt()
        return x * scale + (b - self.running_mean.reshape(1, -1, 1, 1) * scale)


class FrozenByFunction(FrozenNorm):
    """As in detectron2 without gradients."""

    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class HandWritten(nn.Module):
    """As in the lecture: no eps, and the standard deviation is what is tracked."""

    def __init__(self, channels):
        super().__init__()
        self.gain, self.bias = (
            nn.Parameter(torch.rand(1, channels) + 0.5),
            nn.Parameter(torch.randn(1, channels)),
        )
        self.register_buffer("mean_running", torch.randn(1, channels))
        self.register_buffer("std_running", torch.rand(1, channels) + 0.5)

    def forward(self, x):
        if self.training:
            mean, std = x.mean(0, keepdim=True), x.std(0, keepdim=True)
        else:
            mean, std = self.mean_running, self.std_running
        return self.gain * (x - mean) / std + self.bias


class PlainTensors(nn.Module):
    """Statistics that are neither parameters nor buffers."""

    def __init__(self, channels):
        super().__init__()
        self.gamma, self.mean, self.var = (
            torch.rand(channels) + 0.5,
            torch.randn(channels),
            torch.rand(channels) + 0.5,
        )

    def forward(self, x):
        return self.gamma * ((x - self.mean) / torch.sqrt(self.var + 1e-5))


class NormAct(nn.BatchNorm2d):
    """As in timm: the activation is a child, and so is a dropout."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(y))


class NormLeaky(nn.BatchNorm2d):
    """As in inplace_abn: the activation is a function."""

    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.2, inplace=True)


class NormPRelu(nn.BatchNorm2d):
    """A child with a parameter, which keeps its name."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.PReLU(channels)

    def forward(self, x):
        return self.act(super().forward(x))


@pytest.mark.parametrize(
    "norm",
    [
        FrozenNorm(4),
        FrozenByFunction(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, momentum=None),
    ],
)
def test_every_kind_of_batchnorm_is_one(norm):
    after, _ = check(pair(norm), IMAGES, folded=["1"])
    assert type(after[1]) is nn.Identity
    assert set(after.state_dict()) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("norm", [HandWritten(4), PlainTensors(4)])
def test_batchnorms_written_by_hand_are_found_by_what_they_compute(norm):
    linear = nn.Linear(3, 4)
    if isinstance(norm, PlainTensors):
        norm.gamma, norm.mean, norm.var = norm.gamma.double(), norm.mean.double(), norm.var.double()
    check(pair(norm, linear), torch.randn(5, 3), folded=["1"])


@pytest.mark.parametrize("kind", [NormAct, NormLeaky, NormPRelu])
def test_of_a_batchnorm_with_an_activation_only_the_affine_map_goes(kind):
    model = pair(kind(4))
    after, _ = check(model, IMAGES, folded=["1"])
    assert not isinstance(after[1], nn.BatchNorm2d)
    names = {name for name in model.state_dict() if name.startswith("1.act")}
    assert names == {name for name in after.state_dict() if name.startswith("1.")}


def test_before_a_border_an_activation_is_what_a_batchnorm_with_one_ends_in():
    check(nn.Sequential(NormLeaky(3), nn.Conv2d(3, 4, 3)), IMAGES, kept=["0"])


class ScaleOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x):
        return x * self.gamma


def test_a_layer_scale_is_no_batchnorm_and_lets_one_through():
    check(nn.Sequential(nn.Conv2d(3, 4, 3), ScaleOnly(), nn.BatchNorm2d(4)), IMAGES, folded=["2"])


def test_batch_statistics_in_eval_are_not_foldable():
    check(
        pair(nn.BatchNorm2d(4, track_running_stats=False)),
        IMAGES,
        kept=["1"],
        because="track_running_stats=False",
    )


def test_a_batchnorm_without_a_bias_is_folded():
    norm = nn.BatchNorm2d(4)
    norm.bias = None
    check(pair(norm), IMAGES, folded=["1"])


@pytest.mark.parametrize("which", ["bn", "all"])
def test_training_mode_is_refused_and_never_changed(which):
    model = randomise(pair(nn.BatchNorm2d(4))).double()
    (model if which == "all" else model[1]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after, report = fold(model, IMAGES.double())
    assert report.verdicts[0].outcome == "kept"
    assert "call model.eval() first" in report.verdicts[0].reason
    assert model[1].training
    assert after[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_hand_written_batchnorm_in_training_mode_is_not_folded():
    model = pair(HandWritten(4), nn.Linear(3, 4)).train()
    _, report = fold(model, torch.randn(5, 3))
    assert report.count("folded") == 0


SPELLINGS = {
    "the lecture's": lambda n, h: n.gain * (h - n.mean) / n.std + n.bias,
    "in brackets": lambda n, h: n.gain * ((h - n.mean) / n.std) + n.bias,
    "by a root": lambda n, h: (h - n.mean) / torch.sqrt(n.var + 1e-5) * n.gain + n.bias,
    "by a power": lambda n, h: n.gain * (h - n.mean) / (n.var + n.eps) ** 0.5 + n.bias,
    "by an inverse power": lambda n, h: (h - n.mean) * (n.var + n.eps) ** -0.5 * n.gain + n.bias,
    "by an inverse root": lambda n, h: (h - n.mean) * torch.rsqrt(n.var + 1e-5),
    "one over a root": lambda n, h: (h - n.mean) * (1 / (n.var + 1e-5).sqrt()) * n.gain + n.bias,
    "without a gain": lambda n, h: (h - n.mean) / torch.sqrt(n.var + 1e-5) + n.bias,
    "without a bias": lambda n, h: n.gain * (h - n.mean) / torch.sqrt(n.var + 1e-5),
    "at once": lambda n, h: torch.addcmul(n.bias, (h - n.mean) / n.std, n.gain),
    "ahead": lambda n, h: h * scale_of(n) + (n.bias - n.mean * scale_of(n)),
    "ahead and at once": lambda n, h: torch.addcmul(n.bias - n.mean * scale_of(n), h, scale_of(n)),
    "in place": lambda n, h: h.sub_(n.mean).div_(n.std).mul_(n.gain).add_(n.bias),
    "an addition first": lambda n, h: (h + n.bias - n.mean) / torch.sqrt(n.var + 1e-5) * n.gain,
}


def scale_of(n):
    return n.gain / torch.sqrt(n.var + n.eps)


class WrittenOut(nn.Module):
    """The lecture's net, with the formula in its own code."""

    def __init__(self, formula, first=None, width=5, trailing=()):
        super().__init__()
        self.first, self.formula, self.eps = first or nn.Linear(6, width), formula, 1e-5
        shape = (1, width, *trailing)
        self.gain, self.bias = nn.Parameter(torch.rand(shape) + 0.5), nn.Parameter(torch.randn(shape))
        for name, numbers in (
            ("mean", torch.randn(shape)),
            ("std", torch.rand(shape) + 1),
            ("var", torch.rand(shape) + 0.2),
        ):
            self.register_buffer(name, numbers)

    def forward(self, x):
        return torch.tanh(self.formula(self, self.first(x)))


def only(report):
    (verdict,) = report.verdicts
    return verdict


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_formula_written_out_in_other_code_folds_and_its_lines_change_nothing_any_more(spelling):
    model = WrittenOut(SPELLINGS[spelling]).eval().double()
    after, report = fold(model, torch.randn(4, 6).double())
    agree(model, after, torch.randn(4, 6).double())
    assert (only(report).outcome, only(report).into) == ("folded", ("first",))
    assert any("run on, with numbers that change nothing; delete them" in note for note in report.notes)
    values = torch.randn(4, 5).double()
    assert torch.allclose(after.formula(after, values.clone()), values, rtol=0, atol=1e-14)
    assert after.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_formula_written_out_folds_in_every_type(dtype):
    model = WrittenOut(SPELLINGS["by a power"]).eval().to(dtype)
    _, report = fold(model, torch.randn(4, 6).to(dtype))
    assert only(report).outcome == "folded"
    assert report.verified


def test_the_formula_written_out_goes_down_and_along_the_channels_of_images():
    class Below(WrittenOut):
        def forward(self, x):
            return self.first(self.formula(self, x))

    formula = SPELLINGS["by a root"]
    for kind, into in ((WrittenOut, "first"), (Below, "first")):
        first = nn.Conv2d(3, 4, 3) if kind is WrittenOut else nn.Conv2d(4, 3, 3)
        model = kind(formula, first, 4, (1, 1)).eval().double()
        images = torch.randn(2, first.in_channels, 6, 6).double()
        after, report = fold(model, images)
        assert (only(report).outcome, only(report).into) == ("folded", (into,))
        agree(model, after, images)


class ByHand(nn.Module):
    """`x @ W` without a bias, which is useless there, as the lecture has it."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5, 3))
        self.gain, self.bias = nn.Parameter(torch.rand(1, 5) + 0.5), nn.Parameter(torch.randn(1, 5))
        self.register_buffer("mean", torch.randn(1, 5))
        self.register_buffer("std", torch.rand(1, 5) + 0.5)

    def forward(self, x):
        h = x @ self.w1
        return torch.tanh(self.gain * (h - self.mean) / self.std + self.bias) @ self.w2


def test_a_product_without_a_bias_leaves_the_shift_to_the_bias_of_the_formula():
    model = ByHand().double()
    after, report = fold(model, torch.randn(4, 6).double())
    agree(model, after, torch.randn(4, 6).double())
    assert (only(report).outcome, only(report).into) == ("scale folded", ("w1",))
    assert torch.equal(after.mean, torch.zeros(1, 5).double())
    for name in ("gain", "std"):
        assert torch.equal(getattr(after, name), torch.ones(1, 5).double())
    shift = model.bias - model.gain * model.mean / model.std
    assert torch.allclose(after.bias, shift, rtol=1e-13)


def test_of_a_batchnorm_and_a_formula_in_a_row_one_takes_the_other_in():
    class Above(WrittenOut):
        def __init__(self):
            super().__init__(SPELLINGS["the lecture's"], nn.BatchNorm1d(5))

    model = randomise(Above()).double()
    after, report = fold(model, torch.randn(4, 5).double())
    agree(model, after, torch.randn(4, 5).double())
    assert sorted(verdict.outcome for verdict in report.verdicts) == ["folded", "kept"]


KEPT = {
    "read by other code": lambda n, h: SPELLINGS["the lecture's"](n, h).sin() * n.gain,
    "one number in two roles": lambda n, h: SPELLINGS["the lecture's"](n, h) + n.gain,
    "twice the gain": lambda n, h: torch.addcmul(n.bias, (h - n.mean) / n.std, n.gain, value=2),
    "another formula": lambda n, h: SPELLINGS["by a root"](n, SPELLINGS["by a root"](n, h).tanh()),
    "a power of two": lambda n, h: (h - n.mean) / torch.sqrt(n.var + 1e-5).exp2() * n.gain + n.bias,
}


@pytest.mark.parametrize("why", KEPT)
def test_a_formula_whose_numbers_cannot_be_changed_is_owed_a_verdict_and_lets_others_pass(why):
    class Both(WrittenOut):
        def __init__(self, formula):
            super().__init__(formula)
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            return torch.tanh(self.formula(self, self.norm(self.first(x))))

    model = randomise(Both(KEPT[why])).double()
    after, report = fold(model, torch.randn(4, 6).double())
    agree(model, after, torch.randn(4, 6).double())
    verdicts = {verdict.name: verdict for verdict in report.verdicts}
    assert verdicts["norm"].outcome == "folded"
    assert verdicts["mean"].outcome == "kept"
    assert "written out in the code of `Both`" in verdicts["mean"].reason
    assert "make it a module of its own" in verdicts["mean"].reason
    for name in ("gain", "bias", "mean", "var"):
        assert torch.equal(getattr(after, name), getattr(model, name))


def test_numbers_that_other_code_reads_given_another_flag_stay_as_they_are():
    class Flagged(WrittenOut):
        def forward(self, x, scaled=False):
            h = super().forward(x)
            return h * self.gain if scaled else h

    model, inputs = Flagged(SPELLINGS["the lecture's"]).eval().double(), torch.randn(4, 6).double()
    after, _ = fold(model, inputs)
    assert torch.allclose(after(inputs, scaled=True), model(inputs, scaled=True), rtol=1e-12)


def test_a_formula_on_a_buffer_that_is_not_saved_stays_since_a_state_dict_would_lose_the_fold():
    model = WrittenOut(SPELLINGS["the lecture's"])
    model.register_buffer("mean", torch.randn(1, 5), persistent=False)
    _, report = fold(model.double(), torch.randn(4, 6).double())
    assert "`mean` is not saved with the model" in only(report).reason


def test_a_folded_formula_comes_back_from_its_state_dict():
    model = WrittenOut(SPELLINGS["by a root"]).eval().double()
    inputs = torch.randn(4, 6).double()
    after, _ = fold(model, inputs)
    loaded = load_folded(WrittenOut(SPELLINGS["by a root"]).eval().double(), inputs, after.state_dict())
    agree(model, loaded, inputs)


def test_a_value_that_is_standardised_is_not_taken_for_a_batchnorm():
    model = WrittenOut(lambda n, h: (h - n.mean) / n.std)
    check(model, torch.randn(4, 6))


class KeepsItsOutput(nn.Module):
    """As the lecture's own layers do, for its pictures."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        self.out = self.layer(x)
        return self.out


def test_an_output_that_a_layer_keeps_when_it_has_run_stays_as_it_is_and_the_reason_says_where_it_is_kept():
    model = randomise(nn.Sequential(KeepsItsOutput(nn.Linear(6, 5)), nn.BatchNorm1d(5), nn.Tanh()))
    _, report = check(
        model, torch.randn(4, 6), kept=["1"], because="is kept in `0.out` when the model has run"
    )
    assert "return it without assigning it" in only(report).reason


def test_what_a_batchnorm_keeps_does_not_hinder_it_from_going_up():
    check(
        nn.Sequential(nn.Linear(6, 5), KeepsItsOutput(nn.BatchNorm1d(5)), nn.Tanh()),
        torch.randn(4, 6),
        folded=["1.layer"],
    )


class DirectCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        n = self.norm
        return F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps).relu()


def test_a_functional_call_has_a_verdict_and_a_way_out():
    check(DirectCall(), IMAGES, kept=["norm"], because="nn.BatchNorm")


class Observed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.seen = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), []

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


@pytest.mark.parametrize("module", ["conv", "bn"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_sees_what_folding_would_change_is_in_the_way(module, kind):
    model = Observed()
    getattr(model.get_submodule(module), kind)(lambda *args: None)
    if (module, kind) == ("conv", "register_forward_pre_hook"):
        check(model, IMAGES, folded=["bn"])
    else:
        check(model, IMAGES, kept=["bn"], because="hook")


def test_a_hook_that_changes_the_value_is_followed():
    model = Observed()
    model.conv.register_forward_hook(lambda module, given, made: made.tanh())
    check(model, IMAGES, kept=["bn"])


def test_a_hook_on_every_module_is_in_the_way():
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        check(Observed(), IMAGES, kept=["bn"], because="hook")
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda m: prune.l1_unstructured(m, "weight", 0.3),
    ],
)
def test_a_computed_weight_is_materialised(wrap):
    conv = nn.Conv2d(3, 4, 3).eval()
    model = randomise(pair(nn.BatchNorm2d(4), wrap(conv))).double()
    model(IMAGES.double())
    after, _ = check(model, IMAGES, folded=["1"])
    assert set(after.state_dict()) == {"0.weight", "0.bias"}
    assert type(after[0]) is nn.Conv2d
    assert not after[0]._forward_pre_hooks


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_a_parametrization_of_ones_own_is_materialised():
    conv = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(conv, "weight", Halved())
    check(pair(nn.BatchNorm2d(4), conv), IMAGES, folded=["1"])


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        return F.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True), self.bias)


def test_a_module_that_computes_its_weight_becomes_one_that_holds_it():
    check(pair(nn.BatchNorm2d(4), Standardised(3, 4, 3)), IMAGES, folded=["1"])


class SameConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class BiaslessConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight)


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class SquashedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "outcome"),
    [(SameConv, "folded"), (BiaslessConv, "half"), (DoubledConv, "folded"), (SquashedConv, "kept")],
)
def test_a_subclass_is_judged_by_what_its_forward_runs(kind, outcome, bias):
    check(pair(nn.BatchNorm2d(4), kind(3, 4, 3, bias=bias)), IMAGES, **{outcome: ["1"]})


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class SkippedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + x


def test_subclasses_of_batchnorm_are_judged_by_what_runs():
    check(pair(DoubledNorm(4)), IMAGES, folded=["1"])
    check(pair(SkippedNorm(4)), IMAGES, kept=["1"])


def test_a_forward_put_on_the_instance_is_what_runs():
    model = pair(nn.BatchNorm2d(4))
    model[1].forward = lambda x: x * 3
    check(model, IMAGES, kept=["1"])


class Uses(Observed):
    def forward(self, x):
        return self.bn(self.conv(x)).to(self.bn.weight.dtype)


def test_a_batchnorm_whose_tensors_other_code_uses_stays():
    check(Uses(), IMAGES, kept=["bn"], because="is used by the code of")


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_batchnorm_without_numbers_has_a_reason():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval()
    after, report = fold(model, IMAGES)
    assert report.verdicts[0].outcome == "kept"
    assert "run the model once" in report.verdicts[0].reason
    assert isinstance(after[1], nn.LazyBatchNorm2d)
    assert isinstance(model[0].weight, nn.UninitializedParameter)
    model(IMAGES)
    check(model, IMAGES, folded=["1"])


def test_a_batchnorm_that_does_not_run_has_a_reason():
    class Auxiliary(Observed):
        def __init__(self):
            super().__init__()
            self.aux = nn.BatchNorm2d(4)

    _, report = fold(randomise(Auxiliary()), IMAGES)
    assert {v.name: v.outcome for v in report.verdicts} == {"bn": "folded", "aux": "kept"}
    assert "did not run" in report.verdicts[1].reason


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_scripted_parts_are_one_opaque_call():
    scripted = torch.jit.script(randomise(pair(nn.BatchNorm2d(4))))
    model = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), scripted, nn.BatchNorm2d(4)))
    after, report = fold(model, IMAGES)
    outcomes = {v.name: v.outcome for v in report.verdicts}
    assert outcomes == {"1": "folded", "3": "kept", "2.1": "kept"}
    agree(model, after, IMAGES, 1e-5)


def test_a_model_that_cannot_run_is_refused_by_name():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 4)

        def forward(self, x):
            return self.inner(x)

    with pytest.raises(UnreadableModel, match="inner"):
        fold(Broken(), torch.randn(2, 5))


class Ragged(nn.Module):
    """Rows of several lengths, normalised each."""

    def __init__(self, layout):
        super().__init__()
        self.net, self.layout = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), layout

    def forward(self, x):
        rows = self.net(x)
        return torch.nested.as_nested_tensor([rows[:1], rows[1:]], layout=self.layout).to_padded_tensor(0.0)


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_of_nested_tensors_it_is_said_that_they_are_not_followed(layout):
    net, rows = Ragged(layout).eval(), torch.randn(4, 3)
    net(rows)
    with pytest.raises(UnreadableModel, match="nested tensors, which cannot be followed"):
        fold(net, rows)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("keepdim", [True, False])
def test_a_scale_goes_up_through_a_norm_and_its_shift_stays(order, keepdim):
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if keepdim else nn.BatchNorm1d(4)

        def forward(self, x):
            return self.bn(torch.linalg.vector_norm(self.conv(x), order, (2, 3), keepdim))

    torch.manual_seed(0)
    model = Norms()
    model(torch.randn(8, 3, 6, 6))
    _, report = fold(model.eval(), torch.randn(2, 3, 6, 6))
    assert [(v.outcome, v.into) for v in report.verdicts] == [("scale folded", ("conv",))]
    assert report.verified


class QuantizedBatchNorm(nn.Module):
    """What torch's quantisation makes of a BatchNorm, by its place; such a module says that it is training."""

    __module__ = "torch.ao.nn.quantized.modules.batchnorm"

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        return torch.fake_quantize_per_tensor_affine(
            (x - self.running_mean[:, None, None]), 0.1, 0, -128, 127
        )


def test_a_quantised_batchnorm_is_not_told_to_go_to_eval_mode():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), QuantizedBatchNorm(4).train())
    verdicts = fold(net, (IMAGES,))[1].verdicts
    assert [v.reason for v in verdicts] == ["it is quantised; fold the model before it is quantised"]
