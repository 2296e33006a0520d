"""torchrun -m train: several processes train the net that one trains, and end well where one of them is killed."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bnfold.checkpoint import load
from tests.processes import STARTER, environment, errors, torchrun
from tests.train.names import NAMES
from train import __main__ as command

SMALL = ["--names", "names.txt", "--hidden", "6", "--batch", "9", "--steps", "40"]

DRIVER = """
import os, signal, sys
from train import __main__ as command
from train.loop import Training

rank, at, *arguments = sys.argv[1:]
take = Training._take

def fall(self):
    if os.environ["RANK"] == rank and self.step == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self)

Training._take = fall
sys.exit(command.main(arguments))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a list of names, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    (tmp_path / "driver.py").write_text(DRIVER, encoding="utf-8")
    return tmp_path


def numbers(path: str) -> torch.Tensor:
    values = load(Path(path)).model.state_dict().values()
    return torch.cat([value.double().flatten() for value in values])


def assert_alike(path: str, other: str) -> None:
    torch.testing.assert_close(numbers(path), numbers(other), rtol=1e-4, atol=1e-5)
    for part, loss in load(Path(path)).record["losses"].items():
        assert loss == pytest.approx(load(Path(other)).record["losses"][part], rel=1e-5)


@pytest.mark.parametrize(
    "recipe", [["lecture"], pytest.param(["quick", "--calibrate"], marks=pytest.mark.slow)], ids=" ".join
)
def test_two_processes_train_the_net_of_one(recipe, folder, capsys) -> None:
    given = [*SMALL, "--recipe", *recipe]
    assert command.main([*given, "-o", "one.pt"]) == 0
    shown = capsys.readouterr().out
    done = torchrun(folder, "-m", "train", *given, "-o", "two.pt")
    assert done.returncode == 0, done.stderr
    assert_alike("two.pt", "one.pt")
    assert done.stdout.splitlines()[0] == shown.splitlines()[0]
    assert done.stdout.count("wrote two.pt") == 1
    assert {path.name for path in folder.glob("*.pt")} == {"one.pt", "two.pt"}


@pytest.mark.slow
def test_more_processes_than_rows_train_it_too(folder, capsys) -> None:
    given = [*SMALL, "--recipe", "lecture", "--batch", "3", "--steps", "3"]
    assert command.main([*given, "-o", "one.pt"]) == 0
    done = torchrun(folder, "-m", "train", *given, "-o", "two.pt", count=4)
    assert done.returncode == 0, done.stderr
    assert_alike("two.pt", "one.pt")


def test_when_another_is_killed_the_first_writes_the_last_whole_step_and_it_can_be_resumed(
    folder, capsys
) -> None:
    given = [*SMALL, "--recipe", "lecture"]
    assert command.main([*given, "-o", "whole.pt"]) == 0
    done = torchrun(folder, "driver.py", 1, 23, *given)
    assert done.returncode != 0
    (error,) = errors(done)
    assert "gone" in error
    assert "ckpt.pt holds the net of step 23 of 40; --resume goes on with it" in error
    assert load(folder / "ckpt.pt").record["steps"] == {"planned": 40, "taken": 23}
    assert load(folder / "ckpt.pt").model(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()
    capsys.readouterr()
    assert command.main([*given, "--resume"]) == 0
    assert "resumed after 23 of 40 steps" in capsys.readouterr().out
    assert_alike("ckpt.pt", "whole.pt")
    assert not (folder / "ckpt.training.pt").exists()


@pytest.mark.slow
def test_when_the_first_is_killed_what_it_kept_last_is_there(folder, capsys) -> None:
    given = [*SMALL, "--recipe", "lecture", "--save-every", "5"]
    assert command.main([*given, "-o", "whole.pt"]) == 0
    done = torchrun(folder, "driver.py", 0, 23, *given)
    assert done.returncode != 0
    (error,) = errors(done)
    assert "another process of this computation is gone" in error
    assert not (folder / "ckpt.pt").exists()
    capsys.readouterr()
    again = torchrun(folder, "-m", "train", *given, "--resume")
    assert again.returncode == 0, again.stderr
    assert "resumed after 20 of 40 steps" in again.stdout
    assert_alike("ckpt.pt", "whole.pt")


@pytest.mark.slow
def test_what_cannot_be_used_is_said_once(folder) -> None:
    for arguments, fact in ((["--rate", "nan"], "nan is no positive number"), (["-o", "."], "is a folder")):
        done = torchrun(folder, "-m", "train", *SMALL, *arguments)
        assert done.returncode != 0
        (error,) = errors(done)
        assert fact in error


def test_an_interrupt_ends_all_of_them_with_a_checkpoint(folder) -> None:
    given = [*SMALL, "--recipe", "lecture", "--steps", "100000000", "--save-every", "20"]
    starter = [*STARTER, "--nproc-per-node", "2", "-m", "train", *given]
    with subprocess.Popen(
        starter, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (folder / "ckpt.training.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=120)
    taken = load(folder / "ckpt.pt").record["steps"]["taken"]
    assert taken > 0, error
    assert f"stopped after {taken} of 100000000 steps" in out
