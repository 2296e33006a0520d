"""What is made without numbers is made as torch makes it, and no pass rests on a number that was left out."""

from __future__ import annotations

import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, Thread

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnfold
from bnfold.torch.capture import capture
from bnfold.torch.hollow import HOLLOW, hollow
from bnfold.torch.passes import record_pass
from bnfold.torch.recorder import NeedsNumbers

IMAGES = torch.randn(2, 4, 11, 8)
ROWS = torch.randn(2, 3, 4)


class Beside(TorchDispatchMode):
    """Holds what `hollow` makes to what the operator makes; lists the operators of which it made something."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        empty = hollow(operator, args, kwargs or {}) if operator in HOLLOW else None
        result = operator(*args, **(kwargs or {}))
        if empty is not None:
            self.made.append(str(operator))
            assert (empty.shape, empty.dtype, empty.device) == (result.shape, result.dtype, result.device)
            assert empty.stride() == result.stride()
            assert (empty is args[0]) == (result is args[0])
        return result


def beside(function) -> list[str]:
    """The operators of a function of which something was made without numbers, in the right form."""
    with torch._C._AutoDispatchBelowAutograd(), torch.no_grad(), Beside() as mode:
        function()
    return mode.made


WEIGHT = torch.randn(6, 2, 3, 2)
FORMS = {
    "conv1d": lambda: F.conv1d(ROWS, torch.randn(5, 3, 2), torch.randn(5), 2, 1),
    "conv2d": lambda: F.conv2d(IMAGES, WEIGHT, None, (2, 3), (1, 2), (2, 1), 2),
    "conv3d": lambda: F.conv3d(torch.randn(1, 2, 5, 6, 7), torch.randn(4, 2, 3, 3, 3), stride=2),
    "linear": lambda: F.linear(ROWS, torch.randn(5, 4), torch.randn(5)),
    "batch_norm": lambda: F.batch_norm(IMAGES, *torch.rand(4, 4)),
    "max_pool2d": lambda: F.max_pool2d(IMAGES, 3, 2, 1, 2, ceil_mode=True),
    "max_pool2d, up": lambda: F.max_pool2d(IMAGES, 2, 3, 1, ceil_mode=True),
    "max_pool2d, its own stride": lambda: F.max_pool2d(IMAGES, (3, 2)),
    "max_pool2d, one number in a list": lambda: F.max_pool2d(IMAGES[0], [2], [1]),
    "avg_pool2d, one number in a list": lambda: F.avg_pool2d(IMAGES, [2]),
    "max_pool3d": lambda: F.max_pool3d(torch.randn(1, 2, 5, 6, 7), 2),
    "avg_pool2d": lambda: F.avg_pool2d(IMAGES, 3, 2, 1, ceil_mode=True),
    "avg_pool3d": lambda: F.avg_pool3d(torch.randn(2, 5, 6, 7), 2),
    "relu": lambda: F.relu(IMAGES),
    "relu_": lambda: F.relu(IMAGES.clone(), inplace=True),
    "prelu": lambda: F.prelu(IMAGES, torch.rand(4)),
    "add": lambda: IMAGES + IMAGES,
    "add_": lambda: IMAGES.clone().add_(IMAGES),
    "cat": lambda: torch.cat([IMAGES, IMAGES], -2),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_left_out_has_the_form_that_torch_gives_it(form):
    assert beside(FORMS[form])


REFUSED = {
    "a padding in words": lambda: F.conv2d(IMAGES, torch.randn(6, 4, 3, 3), padding="same"),
    "a batch that is none": lambda: F.conv2d(IMAGES[0], torch.randn(6, 4, 3, 3)),
    "channels last": lambda: F.relu(IMAGES.to(memory_format=torch.channels_last)),
    "a sum of two shapes": lambda: IMAGES + IMAGES[:1],
    "a sum of two types": lambda: IMAGES + IMAGES.double(),
    "a scaled sum": lambda: torch.add(IMAGES, IMAGES, alpha=2),
    "no images": lambda: F.relu(IMAGES[:0]),
    "a weight in channels last": lambda: F.conv2d(
        IMAGES, torch.randn(4, 1, 3, 3).to(memory_format=torch.channels_last), groups=4
    ),
    "a number": lambda: IMAGES * 2.0,
    "another device": lambda: torch.relu(IMAGES.to("meta")),
    "whole numbers": lambda: torch.relu(torch.arange(3)),
    "statistics of the batch": lambda: F.batch_norm(IMAGES, *torch.rand(4, 4), training=True),
}


@pytest.mark.parametrize("form", REFUSED)
def test_other_forms_are_computed(form):
    assert not beside(REFUSED[form])


WRONG = {
    "channels": lambda: F.conv2d(IMAGES, torch.randn(6, 3, 3, 3)),
    "a bias": lambda: F.conv2d(IMAGES, torch.randn(6, 4, 3, 3), torch.randn(5)),
    "a kernel": lambda: F.conv2d(IMAGES, torch.randn(6, 4, 3, 9)),
    "columns": lambda: F.linear(ROWS, torch.randn(5, 3)),
    "types": lambda: F.linear(ROWS, torch.randn(5, 4).double()),
    "a padding": lambda: F.max_pool2d(IMAGES, 3, padding=2),
    "a window": lambda: F.max_pool2d(IMAGES, 12),
    "a window in the padding": lambda: F.avg_pool3d(IMAGES, (3, 3, 9), 1, (0, 0, 1)),
    "a stride": lambda: F.conv2d(IMAGES, torch.randn(6, 4, 3, 3), stride=0),
    "a negative padding": lambda: F.conv2d(IMAGES, torch.randn(6, 4, 1, 1), padding=-1),
    "a divisor": lambda: F.avg_pool2d(IMAGES, 2, divisor_override=0),
    "an axis": lambda: torch.cat([IMAGES, IMAGES], 7),
    "a matrix of slopes": lambda: F.prelu(IMAGES, torch.rand(1, 1)),
    "statistics": lambda: F.batch_norm(IMAGES, *torch.rand(4, 3)),
    "slopes": lambda: F.prelu(IMAGES, torch.rand(3)),
    "rows": lambda: torch.cat([IMAGES, IMAGES[:1]], 1),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_an_error_is_the_same_error(what):
    """It is a reason for which a module does not take a size."""
    with pytest.raises((RuntimeError, IndexError)) as plain:
        WRONG[what]()
    with pytest.raises((RuntimeError, IndexError)) as captured:
        capture(Net(lambda net, x: WRONG[what]()), (IMAGES,), {}, numbers=False)
    assert str(captured.value) == str(plain.value)


class Net(nn.Module):
    """A convolution and a BatchNorm, and what some function makes of both."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.eval()

    def forward(self, x: Tensor):
        return self.function(self, x)


def block(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x))


def asks_a_number(net: Net, x: Tensor) -> Tensor:
    y = block(net, x)
    return y if y.sum() > 0 else -y


def asks_a_size(net: Net, x: Tensor) -> Tensor:
    y = block(net, x)
    return y[y > 0]


def asks_numpy(net: Net, x: Tensor) -> Tensor:
    return torch.from_numpy(block(net, x).numpy())


def gives_each_number_to_code(net: Net, x: Tensor) -> Tensor:
    return block(net, x).clone().apply_(lambda number: number if number > 0 else 0.0)


def counts_on_numbers(net: Net, x: Tensor) -> Tensor:
    """An error that no shape is the reason for."""
    return torch.linalg.cholesky(block(net, x).flatten(1).T.cov() * 0.0)


def calls_other_code(net: Net, x: Tensor) -> Tensor:
    """An operator of which torch does not know what it does with numbers."""
    return twice(block(net, x))


@torch.library.custom_op("bnfold_hollow::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x + x


def catches_everything(net: Net, x: Tensor) -> Tensor:
    y = block(net, x)
    try:
        return y if y.mean() > 0 else -y
    except:  # noqa: E722
        return y


def returns_in_the_end(net: Net, x: Tensor) -> Tensor:
    y = block(net, x)
    try:
        y = y if y.mean() > 0 else -y
    finally:
        return y  # noqa: B012


def turn(y: Tensor) -> Tensor:
    if bool(y.mean() > 0):
        return y
    return -y


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scripted = torch.jit.script(turn)


def asks_in_compiled_code(net: Net, x: Tensor) -> Tensor:
    """There, whatever is raised is an error."""
    return scripted(block(net, x))


def asks_where_it_lies(net: Net, x: Tensor) -> Tensor:
    """Whoever knows that can look."""
    y = block(net, x)
    return y if y.data_ptr() % 2 else -y


def rounds_to_whole_numbers(net: Net, x: Tensor) -> Tensor:
    """Of NaN and what is too large a processor makes the smallest there is, which can end a process when divided."""
    return torch.gcd(block(net, x).long(), torch.tensor(6))


def draws_as_often_as_told(net: Net, x: Tensor) -> Tensor:
    """It never ends where that is no number."""
    return torch.binomial(block(net, x).abs().round(), torch.full((2, 4, 9, 6), 0.3))


def counts_on_indices(net: Net, x: Tensor) -> Tensor:
    """An error of an operator that is made of others, and of none of these."""
    rows = block(net, x).flatten().argsort()[None] - 10
    return torch.sparse_coo_tensor(rows, torch.ones(rows.numel())).to_dense()


ASKING = [
    asks_where_it_lies,
    rounds_to_whole_numbers,
    draws_as_often_as_told,
    counts_on_indices,
    catches_everything,
    returns_in_the_end,
    asks_in_compiled_code,
    asks_a_number,
    asks_a_size,
    asks_numpy,
    gives_each_number_to_code,
    counts_on_numbers,
    calls_other_code,
]


@pytest.mark.parametrize("function", ASKING)
def test_a_number_that_was_left_out_is_told_to_nobody(function):
    with pytest.raises(NeedsNumbers):
        capture(Net(function), (IMAGES,), {}, numbers=False)


@pytest.mark.parametrize(
    "function", [asks_a_number, asks_a_size, asks_numpy, catches_everything, calls_other_code]
)
def test_a_pass_that_needs_numbers_is_made_again_with_them(function):
    net = Net(function)
    pair = [record_pass(net, (IMAGES,), {}, False, numbers=numbers) for numbers in (False, True)]
    calls = [[(call.label, [v.shape for v in call.made]) for call in trace.calls] for trace in pair]
    assert calls[0] == calls[1]
    assert pair[0].asked


def test_nothing_is_computed_that_is_as_large_as_an_unset_number_says():
    """It would be larger than any memory."""

    def count(net: Net, x: Tensor) -> Tensor:
        return torch.bincount(block(net, x).abs().long().flatten())

    watched = Computed("bincount")
    with watched, pytest.raises(NeedsNumbers):
        capture(Net(count), (IMAGES,), {}, numbers=False)
    assert not watched.count


def test_a_number_that_is_asked_for_before_any_is_left_out_costs_no_other_pass():
    """Such as one of a mask, which the caller gives."""

    def masked(net: Net, x: Tensor) -> Tensor:
        return block(net, x) if x.isfinite().all() else x

    trace = capture(Net(masked), (IMAGES,), {}, numbers=False)
    assert trace.asked


def test_a_pass_that_needs_none_computes_no_convolution(monkeypatch):
    """Where it did, it would take as long as the model."""
    watched = Computed("conv")
    with watched:
        trace = record_pass(Net(block), (IMAGES,), {}, False, numbers=False)
    assert not watched.count
    assert not trace.asked
    with watched:
        record_pass(Net(block), (IMAGES,), {}, False)
    assert watched.count


class Computed(TorchDispatchMode):
    """Counts how often some operator is computed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += self.name in str(operator)
        return operator(*args, **(kwargs or {}))


def test_a_module_keeps_nothing_of_what_was_left_out():
    net = Net(block)
    net.bn.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    record_pass(net, (IMAGES,), {}, False, numbers=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_weights_that_are_computed_are_computed():
    """A constant is no number that depends on the inputs, whatever makes it."""
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        net[0].parametrizations.weight.original0.mul_(3.0)
    _, report = bnfold.fold(net, IMAGES)
    assert [verdict.outcome for verdict in report.verdicts] == ["folded"]


def mean(y: Tensor) -> Tensor:
    return y.detach().transpose(0, -3).flatten(1).mean(1)


@pytest.mark.parametrize("numbers", [True, False])
def test_a_tensor_that_no_module_holds_is_put_back(numbers):
    """One in a dict of the model, or in a name of the file: a running mean would never forget what was left out."""
    outside = torch.zeros(4)

    def track(net: Net, x: Tensor) -> Tensor:
        y = block(net, x)
        for each in (outside[:2], net.state["mean"]):
            each.lerp_(mean(y)[: len(each)], 0.5)
        return y

    net = Net(track)
    net.state = {"mean": torch.zeros(4)}
    record_pass(net, (IMAGES,), {}, False, numbers=numbers)
    bnfold.fold(net, IMAGES, verify=False)
    assert torch.equal(torch.stack([outside, net.state["mean"]]), torch.zeros(2, 4))


def test_a_hook_is_shown_numbers():
    """It may keep them where nobody puts anything back."""
    seen = []
    net = Net(block)
    net.bn.register_forward_hook(lambda module, given, made: seen.append(made))
    bnfold.fold(net, IMAGES, verify=False)
    with torch.no_grad():
        assert torch.equal(seen[0], net(IMAGES))


def huge(*given) -> Tensor | None:
    """What `hollow` makes, as if there were such numbers in that memory."""
    made = hollow(*given)
    return None if made is None else made.data.fill_(1e30)


def test_an_error_that_a_number_is_the_reason_for_is_not_believed(monkeypatch):
    """The number may have come a way that nobody sees."""

    def check_unseen(net: Net, x: Tensor) -> Tensor:
        y = block(net, x)
        with torch.utils._python_dispatch._disable_current_modes():
            fine = bool((y.abs() < 1e3).all())
        if not fine:
            raise ValueError("too large")
        return y

    net = Net(check_unseen)
    monkeypatch.setattr("bnfold.torch.modes.hollow", huge)
    with pytest.raises(NeedsNumbers):
        capture(net, (IMAGES,), {}, numbers=False)
    assert record_pass(net, (IMAGES,), {}, False, numbers=False).calls


def starts_a_thread(function) -> object:
    found = []
    thread = Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def gives_a_thread_work(function) -> object:
    with ThreadPoolExecutor(1) as others:
        return others.submit(function).result()


@pytest.mark.parametrize("elsewhere", [starts_a_thread, gives_a_thread_work])
def test_another_thread_is_shown_numbers(elsewhere):
    """Nothing that it does is seen."""

    def check_elsewhere(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        return net.bn(y) + (y if elsewhere(lambda: bool((y.abs() < 1e3).all())) else 0.0)

    with pytest.raises(NeedsNumbers):
        capture(Net(check_elsewhere), (IMAGES,), {}, numbers=False)


def test_an_object_in_a_module_that_cannot_be_copied_keeps_numbers(monkeypatch):
    """It is not put back."""

    def keep(net: Net, x: Tensor) -> Tensor:
        y = block(net, x)
        net.kept.append(y) if not net.kept else None
        return y

    monkeypatch.setattr("bnfold.torch.modes.hollow", huge)
    net = Net(keep)
    net.kept, net.lock = deque(), Lock()
    with torch.no_grad():
        made = block(net, IMAGES)
    bnfold.fold(net, IMAGES, verify=False, inplace=True)
    assert torch.equal(net.kept[0], made)
