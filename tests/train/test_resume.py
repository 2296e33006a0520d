"""A training that was killed and resumed ends in the same bytes as one that was not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Generator
from torch.utils._pytree import tree_leaves

from tests.conftest import CHECKOUT
from tests.train.names import NAMES
from train import __main__ as command
from train import resume
from train.diagnostics import Diagnostics
from train.gradients import Ledger
from train.loop import Training
from train.material import prepare
from train.recipes import RECIPES, make

SMALL = ["--names", "names.txt", "--hidden", "6", "--batch", "8", "--steps", "40"]


class Killed(BaseException):
    """What no code of the training catches."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a list of names, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    return tmp_path


def train(*arguments: object) -> int:
    return command.main([*SMALL, *map(str, arguments)])


def train_until(step: int, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Train, and end as a kill would after so many steps."""
    keep = resume.Keeper.step

    def stop(keeper: resume.Keeper, loss: float) -> None:
        keep(keeper, loss)
        if keeper.training.step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(resume.Keeper, "step", stop)
        with pytest.raises(Killed):
            train(*arguments)


@pytest.mark.parametrize(
    "recipe",
    [
        ["quick"],
        ["batchnorm"],
        ["zeros"],
        ["quick", "--layers", "scratch"],
        ["lecture", "--calibrate"],
    ],
    ids=" ".join,
)
def test_resumed_after_any_step_it_ends_in_the_same_bytes(recipe, monkeypatch, capsys) -> None:
    arguments = ["--recipe", *recipe, "--save-every", "3"]
    assert train(*arguments, "-o", "whole.pt") == 0
    whole = Path("whole.pt").read_bytes()
    shown = capsys.readouterr().out.replace("whole.pt", "ckpt.pt").splitlines()
    for steps in ((3,), (5, 20), (16, 17, 39)):
        for number, step in enumerate(steps):
            train_until(step, monkeypatch, *arguments, *(["--resume"] if number else []))
        assert not Path("ckpt.pt").exists()
        capsys.readouterr()
        assert train(*arguments, "--resume") == 0
        assert Path("ckpt.pt").read_bytes() == whole, steps
        assert not Path("ckpt.training.pt").exists()
        again = capsys.readouterr().out.splitlines()
        assert again.pop(1) == f"resumed after {steps[-1] // 3 * 3} of 40 steps"
        assert again == shown
        Path("ckpt.pt").unlink()


def test_killed_before_anything_was_kept_it_begins_anew(monkeypatch) -> None:
    assert train("-o", "whole.pt") == 0
    train_until(5, monkeypatch)
    assert not Path("ckpt.training.pt").exists()
    assert train("--resume") == 0
    assert Path("ckpt.pt").read_bytes() == Path("whole.pt").read_bytes()


def test_what_was_watched_is_kept_too() -> None:
    material = prepare(NAMES)

    def start() -> resume.Keeper:
        recipe = RECIPES["deep"].vary("small", "", "", hidden=6, steps=14, batch=4)
        generator = Generator().manual_seed(1)
        net = make(recipe, material, generator)
        watched = Diagnostics(net, 3), Ledger(net)
        return resume.Keeper(Path("t.pt"), {}, Training(net, material, recipe, generator), [], watched, 1)

    def go_on(keeper: resume.Keeper, until: int) -> None:
        with keeper.diagnostics, keeper.ledger:
            for loss in keeper.training:
                keeper.history.append(loss)
                keeper.diagnostics.record(loss)
                keeper.ledger.count(loss)
                keeper.step(loss)
                if keeper.training.step == until:
                    break

    whole, first, second, third = start(), start(), start(), start()
    go_on(whole, 14)
    Path("t.pt").unlink()
    assert not first.take_up()
    go_on(first, 4)
    assert second.take_up()
    go_on(second, 9)
    assert third.take_up()
    go_on(third, 14)
    assert third.history == whole.history == third.diagnostics.losses
    assert [record.step for record in third.diagnostics.records] == [0, 3, 6, 9, 12]
    for old, new in zip(whole.diagnostics.records, third.diagnostics.records, strict=True):
        pairs = zip(tree_leaves(resume._pack(old)), tree_leaves(resume._pack(new)), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else repr(a) == repr(b) for a, b in pairs)
    assert third.ledger.entries() == whole.ledger.entries()


def test_an_interrupt_can_be_resumed(monkeypatch) -> None:
    assert train("-o", "whole.pt") == 0
    keep = resume.Keeper.step

    def press(keeper: resume.Keeper, loss: float) -> None:
        keep(keeper, loss)
        if keeper.training.step == 11:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patch:
        patch.setattr(resume.Keeper, "step", press)
        assert train() == 130
    assert Path("ckpt.pt").read_bytes() != Path("whole.pt").read_bytes()
    assert train("--resume") == 0
    assert Path("ckpt.pt").read_bytes() == Path("whole.pt").read_bytes()


def test_the_training_of_another_run_is_left_alone(monkeypatch, capsys) -> None:
    train_until(5, monkeypatch, "--save-every", "5")
    kept = Path("ckpt.training.pt").read_bytes()
    capsys.readouterr()
    Path("other.txt").write_text("\n".join(NAMES[1:]), encoding="utf-8")
    for other, fact in (
        (["--rate", "0.5"], "whose rate is 0.06 and not 0.5"),
        (["--seed", "3"], "whose seed is"),
        (["--names", "other.txt"], "whose names is"),
        (["--explain"], "whose explained is False and not True"),
    ):
        assert train("--resume", *other) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert fact in error
        assert Path("ckpt.training.pt").read_bytes() == kept
    assert train("--rate", "0.5") == 0
    assert "ckpt.training.pt holds a training that did not end" in capsys.readouterr().out
    assert Path("ckpt.training.pt").read_bytes() == kept
    assert not Path("ckpt.pt").with_name("nothing").exists()


@pytest.mark.parametrize(
    "fault", ["empty", "cut", "text", "checkpoint", "no net", "other shapes", "other steps"]
)
def test_a_damaged_file_is_one_line_and_exit_code_2(fault, monkeypatch, capsys) -> None:
    train_until(5, monkeypatch, "--save-every", "5")
    path = Path("ckpt.training.pt")
    content = path.read_bytes()
    if fault in ("no net", "other shapes", "other steps"):
        state = torch.load(path, weights_only=True)
        if fault == "no net":
            del state["net"]
        elif fault == "other steps":
            state["batches"]["since"] = 10**12
        else:
            state["net"] = {name: tensor[..., :1] for name, tensor in state["net"].items() if tensor.ndim}
        torch.save(state, path)
    elif fault == "checkpoint":
        assert train("-o", "other.pt") == 0
        path.write_bytes(Path("other.pt").read_bytes())
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"text\n"}[fault])
    capsys.readouterr()
    assert train("--resume") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ckpt.training.pt ")
    assert "leave --resume out" in error
    assert not Path("ckpt.pt").exists()


def test_what_ends_in_a_device_is_not_kept(capsys) -> None:
    assert train("-o", "/dev/null", "--save-every", "1") == 0
    assert {path.name for path in Path().iterdir()} == {"names.txt"}
    capsys.readouterr()
    assert train("-o", "/dev/null", "--resume") == 2
    assert "no plain file" in capsys.readouterr().err


DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import torch._dynamo  # once, and not by every process below
from train import __main__ as command

def run(*more, half=False):
    # A process of its own, which shares what is imported; returns its number.
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if half:
        def save(state, file):
            file.write(b"PK" * 500)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save = save
    os._exit(command.main([*sys.argv[2:], "--save-every", "7", *more]))

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert wait(run("-o", "whole.pt")) == 0
chance, kept = random.Random(int(sys.argv[1])), Path("ckpt.training.pt")
for turn in range(3):
    before = kept.stat().st_mtime_ns if kept.exists() else 0
    child = run("--resume", half=turn == 1)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if turn != 1 and kept.exists() and kept.stat().st_mtime_ns > before:
            time.sleep(chance.random() * 0.02)
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    killed = wait(child) == -signal.SIGKILL
    assert killed or turn != 1
assert wait(run("--resume")) == 0
print(Path("ckpt.pt").read_bytes() == Path("whole.pt").read_bytes(), kept.exists())
"""


def test_killed_at_any_moment_in_the_middle_of_writing_too_it_ends_in_the_same_bytes(folder) -> None:
    """The moments are others in every run; the second kill is in the middle of writing."""
    seed = str(random.randrange(1000))
    arguments = [
        "--names",
        "names.txt",
        "--recipe",
        "lecture",
        "--hidden",
        "6",
        "--batch",
        "8",
        "--steps",
        "400",
    ]
    variables = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, seed, *arguments],
        cwd=folder, env=variables, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert ran.stdout.split() == ["True", "False"], (seed, ran.stdout, ran.stderr)
