"""What is shared by a whole process: folds in several threads, nested ones and forks give what one alone gives."""

from __future__ import annotations

import copy
import logging
import os
import random
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import bnfold
from bnfold.torch import sandbox
from bnfold.torch.double import double

FEW, MANY = 10, 200


class Noisy(nn.Module):
    """Draws from every global generator there is, and makes new tensors."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        noise = torch.randn(4) + float(np.random.rand()) + random.random()  # noqa: NPY002
        return self.layers(x) + 0.0 * noise.to(x.dtype) + torch.ones(4)


class Stubborn(nn.Module):
    """Fails after some passes, in the middle of what a fold has changed; its copies count with it."""

    def __init__(self, error, passes):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.passes = iter([None] * passes + [error] * 99)

    def __deepcopy__(self, memo):
        twin = copy.copy(self)
        twin._modules = copy.deepcopy(self._modules, memo)
        return twin

    def forward(self, x):
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002
        random.seed(7)
        torch.rand(3)
        if (error := next(self.passes)) is not None:
            raise error
        return self.layers(x)


def convolutional():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1),
                         nn.BatchNorm2d(2)), (2, 3, 5, 5)  # fmt: skip


def draw(seed):
    """A small net with statistics, and an input."""
    generator = Generator().manual_seed(seed)
    model, shape = (
        convolutional,
        lambda: (Noisy(), (3, 4)),
        lambda: (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)), (3, 4)),
    )[seed % 3]()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval(), torch.randn(shape, generator=generator)


SMALL = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
NETS = [draw(seed) for seed in range(6)]


def fold(number):
    """All that a fold gives, to the last bit."""
    folded, report = bnfold.fold(*copy.deepcopy(NETS[number]))
    state = {name: tensor.numpy().tobytes() for name, tensor in folded.state_dict().items()}
    return state, report.verdicts, report.evidence, report.notes


def settings():
    """What a process, and this thread, have one of."""
    return {
        "dtype": torch.get_default_dtype(),
        "torch random": torch.get_rng_state().numpy().tobytes(),
        "seed": torch.initial_seed(),
        "numpy random": [np.asarray(part).tolist() for part in np.random.get_state()],  # noqa: NPY002
        "python random": random.getstate(),
        "threads": torch.get_num_threads(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "warnings": list(warnings.filters),
        "numpy errors": np.geterr(),
        "methods": (nn.Module.__call__, nn.Module.__getattr__),
        "modes": (len(torch.overrides._get_current_function_mode_stack()),
                  len(torch.utils._python_dispatch._get_current_dispatch_mode_stack())),
        "loggers": (logging.root.manager.disable, logging.getLogger("torch._subclasses.fake_tensor").disabled),
    }  # fmt: skip


@contextmanager
def unchanged():
    """All settings are in the end as they were."""
    before = settings()
    try:
        yield
    finally:
        after = settings()
        torch.set_default_dtype(before["dtype"])
        nn.Module.__call__, nn.Module.__getattr__ = before["methods"]
    assert after == before


@pytest.fixture(autouse=True)
def switching_often():
    """Threads take turns a thousand times as often as they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def together(*works):
    """What each work gives in a thread of its own, all of them begun at once."""
    start = threading.Barrier(len(works))

    def begin(work):
        start.wait()
        return work(), (torch.is_grad_enabled(), torch.get_default_dtype())

    with unchanged(), ThreadPoolExecutor(len(works)) as pool:
        results = list(pool.map(begin, works))
    assert {state for _, state in results} == {(True, torch.float32)}
    return [result for result, _ in results]


@pytest.mark.parametrize("pairs", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_two_folds_at_once_give_what_each_gives_alone(pairs):
    alone = [fold(seed) for seed in range(6)]
    for pair in range(pairs):
        first, second = pair % 6, (pair * 5 + 1) % 6
        assert together(lambda: fold(first), lambda: fold(second)) == [alone[first], alone[second]]  # noqa: B023


def test_two_folds_of_one_model_give_what_each_gives_alone():
    model, x = NETS[1]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def again():
        folded, report = bnfold.fold(model, x)
        return [tensor.tolist() for tensor in folded.state_dict().values()], str(report)

    alone = again()
    for _ in range(4):
        assert together(again, again) == [alone, alone]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_failure_in_one_thread_changes_nothing_for_the_other(error):
    alone = fold(0)

    def fail():
        model, x = stubborn.pop(), torch.ones(2, 4)
        try:
            bnfold.fold(model, x)
        except BaseException as caught:  # noqa: BLE001
            return isinstance(caught, error | bnfold.UnreadableModel)
        return issubclass(error, Exception)  # a pass that only checks something may fail

    stubborn = [Stubborn(error("no more"), after).eval() for after in range(5)]
    for _ in range(5):
        assert together(fail, lambda: fold(0)) == [True, alone]


@pytest.mark.parametrize("seed", range(3))
def test_another_threads_own_models_are_neither_recorded_nor_disturbed(seed):
    """It trains and infers while a model is folded; its tensors are float32, and its generator is its own."""

    def work(rounds):
        generator, seen = Generator().manual_seed(1), []
        net = copy.deepcopy(SMALL)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
        for _ in range(rounds):
            x = torch.rand(8, 3, generator=generator) + torch.tensor([0.1, 0.2, 0.3])
            loss = net(x).square().mean() + torch.zeros(1).sum()
            loss.backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
                seen.append((loss.item(), str(loss.dtype), str((torch.arange(3) / 2).dtype)))
                net.eval()(x)
                net.train()
        return seen

    alone, folded = work(60), fold(seed)
    for _ in range(3):
        assert together(lambda: work(60), lambda: [fold(seed) for _ in range(3)]) == [alone, [folded] * 3]


def test_a_model_is_served_while_it_is_folded():
    model, x = NETS[0]
    with torch.no_grad():
        wanted = model(x)

    def serve():
        with torch.no_grad():
            return all(torch.equal(model(x), wanted) for _ in range(300))

    assert together(serve, lambda: [bnfold.fold(model, x) for _ in range(5)])[0]


def test_numbers_that_another_thread_draws_go_on_where_the_model_draws_none(own_stream):
    """Folding takes no part in the stream of the global generator."""
    generator = Generator().manual_seed(3)
    wanted = torch.cat([torch.rand(20, generator=generator) for _ in range(10)])
    torch.manual_seed(3)
    folding = threading.Thread(target=lambda: [fold(0) for _ in range(3)])
    folding.start()
    drawn = torch.cat([torch.rand(20) for _ in range(10) if folding.join(0.03) is None])
    folding.join()
    assert torch.equal(drawn, wanted)


@pytest.fixture
def own_stream():
    """The global generator as it is, for a test that draws from it."""
    with torch.random.fork_rng(devices=[]):
        yield


class Parallel(nn.Module):
    """Runs a part of itself in a thread of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        with ThreadPoolExecutor(1) as pool:
            return self.bn(y) + pool.submit(self.head, y).result()


def test_a_model_that_runs_a_part_of_itself_in_another_thread_is_refused_by_name():
    """Who reads what in there is not seen; the convolution must not take what its other reader needs as it is."""
    with pytest.raises(bnfold.UnreadableModel, match=r"`head` .* called in another thread than the model"):
        bnfold.fold(Parallel().eval(), torch.ones(2, 3, 5, 5), verify=False)


FOUND = []


class Folding(nn.Module):
    """Folds another model in its own forward."""

    def __init__(self, inner):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.inner = [inner]

    def forward(self, x):
        FOUND.append(bnfold.fold(self.inner[0], torch.ones(3, 4))[1].verdicts)
        return self.layers(x)


def test_a_model_that_folds_another_in_its_own_forward_is_folded():
    inner, x = NETS[2]
    alone = bnfold.fold(inner, torch.ones(3, 4))[1].verdicts
    outer = Folding(inner).eval()
    FOUND.clear()
    with unchanged():
        folded, report = bnfold.fold(outer, x)
    assert FOUND
    assert all(verdicts == alone for verdicts in FOUND)
    assert {verdict.name: verdict.outcome for verdict in report.verdicts}["layers.1"] == "folded"
    torch.testing.assert_close(folded(x), outer(x))


def test_a_model_whose_hook_folds_another_computes_the_same_afterwards():
    inner, x = NETS[2]
    outer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    outer[0].register_forward_pre_hook(lambda module, args: bnfold.fold(inner, x) and None)
    with unchanged():
        folded, report = bnfold.fold(outer, x)
    assert "1" in [verdict.name for verdict in report.verdicts]
    torch.testing.assert_close(folded(x), outer(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_is_forked_during_a_fold_finds_all_settings_and_folds():
    """The fork waits until nothing is changed, and the lock is free in the child."""
    inside, go = threading.Event(), threading.Event()

    class Slow(nn.Sequential):
        def forward(self, x):
            inside.set()
            go.wait(0.3)
            return super().forward(x)

    model = Slow(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    before = settings()
    thread = threading.Thread(target=bnfold.fold, args=(model, torch.ones(2, 4)))
    thread.start()
    inside.wait()
    child = os.fork()
    if not child:
        same = settings() | {"python random": None} == before | {
            "python random": None
        }  # a child seeds it anew
        worker = threading.Thread(target=bnfold.fold, args=(model[0], torch.ones(2, 4)), daemon=True)
        worker.start()
        worker.join(60)
        os._exit(0 if same and not worker.is_alive() else 1)
    go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_number_is_drawn_as_the_model_seeds_it_and_otherwise_as_ever():
    class Seeded(nn.Module):
        def forward(self, x):
            torch.manual_seed(int(x))
            return torch.rand(3)

    class Free(nn.Module):
        def forward(self, x):
            return torch.rand(3) + x

    before = torch.get_rng_state()
    seeded = bnfold.torch.run(Seeded(), torch.tensor(5))[""]
    free = [bnfold.torch.run(Free(), torch.zeros(1))[""] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded.tolist() == torch.rand(3, generator=Generator().manual_seed(5)).tolist()
    assert (
        free[0].tolist() == free[1].tolist() == torch.rand(3, generator=Generator().manual_seed(0)).tolist()
    )


def test_what_a_pass_leaves_in_a_container_is_taken_out_and_nothing_else_is_touched():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.log, self.quiet = [], {"a": 1}

        def forward(self, x):
            self.log.append(x)
            self.late = x
            return x

    class Watched(dict):
        def clear(self):
            raise AssertionError("nobody changed it")

    model = Keeping()
    model._modules = Watched()
    with sandbox.restored(model):
        model(torch.ones(1))
    assert (model.log, model.quiet, hasattr(model, "late")) == ([], {"a": 1}, False)


MADE = {
    "zeros": lambda i: torch.zeros(2),
    "rand": lambda i: torch.rand(2),
    "normal": lambda i: torch.normal(0.0, 1.0, (2,)),
    "randint": lambda i: torch.randint(3, (4,)),
    "randperm": lambda i: torch.randperm(4),
    "full": lambda i: torch.full((2,), 0.1),
    "full of integers": lambda i: torch.full((2,), 1),
    "arange": lambda i: torch.arange(0.0, 1.0, 0.1),
    "arange of integers": lambda i: torch.arange(3),
    "linspace": lambda i: torch.linspace(0, 1, 7),
    "window": lambda i: torch.hann_window(5),
    "tensor": lambda i: torch.tensor([0.1, 2]),
    "tensor of complex": lambda i: torch.tensor([0.1 + 0.3j]),
    "tensor of integers": lambda i: torch.tensor([1, 2]),
    "as_tensor": lambda i: torch.as_tensor(0.1),
    "asarray": lambda i: torch.asarray([0.1]),
    "as_tensor of NumPy": lambda i: torch.as_tensor(np.float32(0.1)),
    "scalar_tensor": lambda i: torch.scalar_tensor(0.1),
    "integers times a number": lambda i: i * 0.1,
    "a mask times a number": lambda i: (i > 1) * 0.1,
    "division": lambda i: i / 7,
    "reciprocal": lambda i: 1 / (i + 1),
    "sqrt": lambda i: i.sqrt(),
    "pow": lambda i: torch.pow(2.5, i),
    "where of two numbers": lambda i: torch.where(i > 0, 0.1, 0.2),
    "where of integers": lambda i: torch.where(i > 0, 0.1, i),
    "complex": lambda i: torch.zeros(1) * 1j,
    "explicit": lambda i: torch.zeros(2, dtype=torch.float32),
    "cast": lambda i: i.float(),
    "bits": lambda i: i.to(torch.int32).view(torch.float32),
    "layer": lambda i: nn.Linear(2, 2).weight.detach(),
    "scripted": lambda i: SCRIPTED(i),
}


class Division(nn.Module):
    def forward(self, i: Tensor) -> Tensor:
        return i / 7 + torch.full([3], 0.1)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SCRIPTED = torch.jit.script(Division())


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_in_double_is_what_a_default_of_float64_would_make(name, own_stream):
    i = torch.arange(3)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        wanted = MADE[name](i)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    with double():
        made = MADE[name](i)
    assert made.dtype == wanted.dtype
    assert torch.equal(made, wanted)


@pytest.mark.parametrize("name", ["where of two numbers", "where of integers"])
def test_a_choice_of_numbers_is_made_in_double_where_the_dispatcher_takes_nothing_apart(name):
    i = torch.arange(3)
    with torch._C._AutoDispatchBelowAutograd(), double():
        made = MADE[name](i)
    assert made.dtype is torch.float64
    assert made[-1] == 0.1  # of float64, and not of what float32 makes of it
