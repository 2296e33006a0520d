"""In-place operations, views, and code that runs otherwise on other data: read, or left alone, never wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.torch_models import check

IMAGES = torch.randn(2, 3, 6, 6)


class Net(nn.Module):
    """One convolution, one BatchNorm, and a forward that a test gives."""

    def __init__(self, forward, channels=3):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.run = nn.Conv2d(channels, channels, 1), forward

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def changed_after_reading(net, x):
    y = net.conv(x)
    z = net.bn(y)
    return z.relu_() + y


def changed_through_a_view(net, x):
    y = net.conv(x)
    y[:, 0].mul_(2)
    return net.bn(y)


def set_item(net, x):
    y = net.conv(x)
    y[:, 0] = 1.0
    return net.bn(y)


def out_argument(net, x):
    y = net.conv(x)
    torch.tanh(y, out=y)
    return net.bn(y)


def view_read_after_a_change(net, x):
    y = net.conv(x)
    v = y.view(y.size(0), -1)
    y.relu_()
    return net.bn(v.view_as(y))


def masked(net, x):
    y = net.conv(x)
    return net.bn(torch.where(y > 0, y, 2 * y))


def through_numpy(net, x):
    y = net.conv(x)
    return net.bn(y) + torch.from_numpy(y.numpy())


def branch_after_conv(net, x):
    y = net.conv(x)
    if y.mean() > 0:
        return net.bn(y)
    return y


def branch_between(net, x):
    return net.bn(net.conv(x)) if x.sum() > 0 else net.conv(x)


def branch_by_item(net, x):
    y = net.conv(x)
    scale = y.abs().max().item()
    return net.bn(y) / scale


KEPT = [
    changed_after_reading,
    changed_through_a_view,
    set_item,
    out_argument,
    view_read_after_a_change,
    masked,
    through_numpy,
    branch_after_conv,
    branch_between,
    branch_by_item,
]


@pytest.mark.parametrize("forward", KEPT, ids=lambda f: f.__name__)
def test_what_is_changed_or_may_run_otherwise_stays(forward):
    check(Net(forward), IMAGES, kept=["bn"])


def in_place_behind(net, x):
    return F.relu_(net.bn(net.conv(x)))


def doubled_in_place(net, x):
    y = net.conv(x)
    y *= 2
    y += 1
    return net.bn(y)


def loop(net, x):
    for _ in range(3):
        x = net.bn(net.conv(x)).tanh()
    return x


def list_and_cat(net, x):
    parts = [net.conv(x), net.conv(x.flip(3))]
    return net.bn(torch.cat(parts, 2))


def branch_first(net, x):
    y = net.bn(net.conv(x)).relu()
    if y.mean() > 0.1:
        y = y * 2
    return y


def checkpointed(net, x):
    return checkpoint(lambda y: net.bn(net.conv(y)), x, use_reentrant=False)


def old_checkpointed(net, x):
    return checkpoint(lambda y: net.bn(net.conv(y)), x, use_reentrant=True)


def under_autocast_off(net, x):
    with torch.autocast("cpu", enabled=False):
        return net.bn(net.conv(x))


def inference_mode(net, x):
    with torch.inference_mode():
        return net.bn(net.conv(x)) * 1


def gradients(net, x):
    with torch.enable_grad():
        return net.bn(net.conv(x)).detach()


def constant_branch(net, x):
    y = net.conv(x)
    if torch.arange(3).sum().item() == 3:
        y = net.bn(y)
    return y


def shape_only(net, x):
    y = net.conv(x)
    n, c, _, _ = y.shape
    assert y.dtype.is_floating_point
    assert len(y) == n
    return net.bn(y).new_zeros(n, c) + net.bn(y).mean((2, 3)) + torch.zeros_like(y).mean((2, 3))


def random_noise(net, x):
    return net.bn(net.conv(x)) + torch.randn(3, 1, 1)


def in_place_chain(net, x):
    y = net.bn(net.conv(x)).view(x.size(0), 3, -1)
    y.relu_()
    return y.mul_(2)


FOLDED = [
    in_place_behind,
    doubled_in_place,
    loop,
    list_and_cat,
    branch_first,
    checkpointed,
    old_checkpointed,
    under_autocast_off,
    inference_mode,
    gradients,
    constant_branch,
    shape_only,
    random_noise,
    in_place_chain,
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("forward", FOLDED, ids=lambda f: f.__name__)
def test_what_is_followed_is_folded(forward):
    model = Net(forward)
    state = torch.get_rng_state()
    check(model, IMAGES, folded=["bn"])
    assert torch.equal(state, torch.get_rng_state())


def scale_only_then_in_place_beside_a_skip(net, x):
    y = net.conv(x).tanh()
    z = net.bn(y)
    z.relu_()
    return net.conv2(z) + y


def test_a_scale_that_could_pass_a_relu_in_place_does_not_where_its_input_is_read():
    model = Net(scale_only_then_in_place_beside_a_skip)
    with torch.no_grad():
        model.bn.running_var.fill_(4)
    check(model.eval(), IMAGES, kept=["bn"], randomised=True)


def test_the_same_without_a_skip_is_folded():
    model = Net(lambda net, x: net.conv2(F.relu_(net.bn(net.conv(x).tanh()))))
    check(model.eval(), IMAGES, folded=["bn"], randomised=True)


def test_the_callers_input_is_not_what_gets_changed_in_place():
    model = Net(lambda net, x: net.conv2(F.relu_(net.bn(x)))).eval()
    after, _ = check(model, IMAGES, kept=["bn"], randomised=True)
    given = IMAGES.double().clone()
    after(given)
    assert torch.equal(given, IMAGES.double())


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Same(Sine):
    @staticmethod
    def forward(ctx, x):
        return x


@pytest.mark.parametrize("kind", [Sine, Same])
def test_custom_autograd_functions_are_not_passed(kind):
    check(Net(lambda net, x: net.bn(kind.apply(net.conv(x)))), IMAGES, kept=["bn"]) if kind is Sine else None
    check(Net(lambda net, x: kind.apply(net.bn(net.conv(x)))), IMAGES, folded=["bn"])


def test_a_custom_function_that_hands_its_input_on_counts_as_reading_it():
    def forward(net, x):
        y = net.conv(x)
        return net.bn(y) + Same.apply(y)

    check(Net(forward), IMAGES, kept=["bn"])


def test_vmap_is_not_passed():
    def forward(net, x):
        y = net.conv(x)
        return net.bn(y) + torch.vmap(torch.sin)(y)

    check(Net(forward), IMAGES, kept=["bn"])
    check(Net(lambda net, x: torch.vmap(torch.sin)(net.bn(net.conv(x)))), IMAGES, folded=["bn"])


def test_complex_values_are_not_passed():
    check(Net(lambda net, x: net.bn(torch.fft.fft2(net.conv(x)).real)), IMAGES, kept=["bn"])
    check(Net(lambda net, x: torch.fft.fft2(net.bn(net.conv(x))).abs()), IMAGES, folded=["bn"])


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    hidden: dict


class Holder:
    __slots__ = ("secret",)

    def __init__(self, secret):
        self.secret = secret


def test_outputs_of_any_kind_are_found():
    def forward(net, x, *, scale, options=None):
        y = net.conv(x["image"])
        return Result(net.bn(y) * scale, {"raw": [y] if options else []})

    arguments = ((), {"x": {"image": IMAGES}, "scale": 2.0, "options": None})
    check(Net(forward), arguments, folded=["bn"])
    arguments[1]["options"] = "raw"
    check(Net(forward), arguments, kept=["bn"])


def test_an_output_that_hides_a_tensor_counts_as_reading_it():
    def forward(net, x):
        y = net.conv(x)
        return net.bn(y), Holder(y)

    check(Net(forward), IMAGES, kept=["bn"])


def test_keyword_and_positional_arguments():
    def forward(net, x, other):
        return net.bn(net.conv(x)) + other

    check(Net(forward), (IMAGES, torch.randn(2, 3, 6, 6)), folded=["bn"])
    check(Net(forward), {"x": IMAGES, "other": torch.randn(6)}, folded=["bn"])
    check(Net(forward), ((IMAGES,), {"other": torch.randn(6)}), folded=["bn"])


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.cache = {}

    def forward(self, x):
        self.calls += 1
        self.cache["last"] = x.shape
        return self.bn(self.conv(x))


def test_a_model_that_counts_its_calls_is_left_at_the_same_count():
    model = Counting()
    check(model, IMAGES, folded=["bn"])
    assert model.calls == 0
    assert model.cache == {}


class Closure(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.run = lambda x: self.bn(self.conv(x))

    def forward(self, x):
        return self.run(x)


def test_code_bound_to_the_original_module_is_not_folded_into_a_copy():
    check(Closure(), IMAGES, kept=["bn"])


def test_modules_in_a_plain_list_are_no_part_of_the_model():
    class Unregistered(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.hidden = nn.BatchNorm2d(4), [nn.Conv2d(3, 4, 3).double()]

        def forward(self, x):
            return self.bn(self.hidden[0](x))

    check(Unregistered(), IMAGES, kept=["bn"])
