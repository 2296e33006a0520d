"""bnfold.distributed, and what is built on it: two processes come to what one comes to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import bnfold
from tests.onnx_models import model, norm, weights
from tests.processes import environment, errors, torchrun

CALIBRATE = """
import sys
import torch
import torch.distributed as dist
from torch import nn
import bnfold
from bnfold.distributed import join
from tests.bnfold.test_calibrate import Branches, Twice, mlp, statistics

CASES = [
    (mlp(), [torch.randn(n, 6, dtype=torch.float64) * 3 + 100 for n in (7, 1, 30, 12)]),
    (Branches().double(), [torch.randn(n, 3, 6, 6, dtype=torch.float64) for n in (4, 9, 2)]),
    (Twice().double(), [torch.randn(n, 4, dtype=torch.float64) for n in (5, 6, 3)]),
    (mlp().float(), [torch.randn(n, 6) for n in (7, 12, 30)]),
]
torch.manual_seed(0)
with join() as processes:
    assert (processes.rank, processes.size) in ((0, 2), (1, 2))
    for number, (model, batches) in enumerate(CASES):
        for batch in batches:
            dist.broadcast(batch, 0)
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
        whole = statistics(bnfold.calibrate(model, batches))
        for cut in (1, len(batches), 0):
            share = batches[:cut] if processes.rank == 0 else batches[cut:]
            found = statistics(bnfold.calibrate(model, lambda: iter(share), group=dist.group.WORLD))
            tolerance = 1e-12 if next(model.parameters()).dtype == torch.float64 else 1e-6
            for name in whole:
                torch.testing.assert_close(found[name], whole[name], rtol=tolerance, atol=tolerance, msg=name)
                both = processes.gather(found[name])
                assert torch.equal(both[0], both[1]), "the same bits in all processes"
    said = processes.gather_bytes(b"x" * (3 * processes.rank))
    assert said == [b"", b"xxx"]
    print("all the same")
"""

FAILS = """
import sys
import torch
import torch.distributed as dist
from torch import nn
import bnfold
from bnfold.distributed import join
from bnfold.errors import run_command

def main():
    with join() as processes:
        batch = torch.full((4, 3), float("inf") if processes.rank else 1.0)
        bnfold.calibrate(nn.Sequential(nn.BatchNorm1d(3)), [batch], group=dist.group.WORLD)

sys.exit(run_command(main))
"""


@pytest.fixture
def run(tmp_path: Path):
    def run(program: str, *arguments: object, count: int = 2):
        (tmp_path / "program.py").write_text(program, encoding="utf-8")
        return torchrun(tmp_path, "program.py", *arguments, count=count)

    return run


def test_two_processes_calibrate_as_one_does_whatever_their_shares(run) -> None:
    done = run(CALIBRATE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all the same") == 2  # two processes may write into one line


@pytest.mark.slow
def test_what_one_process_cannot_calibrate_ends_all(run) -> None:
    done = run(FAILS)
    assert done.returncode != 0
    assert errors(done)
    assert set(errors(done)) <= {
        "error: another process could not use its share of the set; it says why",
        "error: what arrives at `0` is not finite; look at the inputs and at the layers before it",
    }


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """a.onnx, b.onnx that is the same folded, wrong.onnx that is not, and two batches of inputs."""
    text = "net (float[N,3] x) => (float[N,2] y) { c = MatMul(x, w) n = BatchNormalization(c, s, b, m, v) "
    before = model(
        f"{text} r = Tanh(n) y = MatMul(r, q) }}", {"w": weights(3, 4), "q": weights(4, 2), **norm(4)}
    )
    folded, _ = bnfold.fold(before)
    onnx.save(before, tmp_path / "a.onnx")
    onnx.save(folded, tmp_path / "b.onnx")
    tensor = next(tensor for tensor in folded.graph.initializer if tensor.name == "q")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), "q"))
    onnx.save(folded, tmp_path / "wrong.onnx")
    random = np.random.default_rng(0)
    for name, rows in (("one", 7), ("two", 5)):
        np.savez(tmp_path / f"{name}.npz", x=random.standard_normal((rows, 3)).astype(np.float32))
    return [tmp_path / "one.npz", tmp_path / "two.npz"]


def verify(files, *arguments):
    return torchrun(files[0].parent, "-m", "bnfold.verify", "a.onnx", *arguments)


@pytest.mark.parametrize("batches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_processes_verify_a_share_each_and_the_first_reports(batches, files) -> None:
    given = [part for path in files[:batches] for part in ("--inputs", path.name)]
    done = verify(files, "b.onnx", *given, "--json", "record.json", "--worst", "worst.npz")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("equivalent") == 1
    record = json.loads((files[0].parent / "record.json").read_text())
    given_labels = [label for label in record["inputs"] if ", given" in label]
    assert given_labels == ["process 0, given 1", "process 1, given 1"]
    alone = verify_here(files, "b.onnx", *given)
    assert [item["question"] for item in record["evidence"]] == [
        item["question"] for item in alone["evidence"]
    ]
    examples = sum(7 if path.stem == "one" else 5 for path in files[:batches])
    assert all(item["inputs"] >= 2 * examples for item in record["evidence"])
    assert np.load(files[0].parent / "worst.npz")["x"].shape[1] == 3


def verify_here(files, *arguments):
    """What one process says of the same inputs."""
    done = subprocess.run(
        [sys.executable, "-m", "bnfold.verify", "a.onnx", *arguments, "--json", "alone.json"],
        cwd=files[0].parent, env=environment(), capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert done.stdout
    return json.loads((files[0].parent / "alone.json").read_text())


def test_a_difference_is_said_once_with_the_process_that_found_it(files) -> None:
    done = verify(files, "wrong.onnx", "--inputs", "one.npz", "--tolerance", "1e-5")
    assert done.returncode != 0
    (error,) = errors(done)
    assert error.startswith("error: process 0: the models differ in float32 by")
    assert "equivalent" not in done.stdout.splitlines()


@pytest.mark.slow
def test_inputs_that_cannot_be_spread_are_said_once(files) -> None:
    np.savez(files[0].parent / "scalar.npz", x=np.float32(1))
    for given, fact in (
        ([], "several processes compare shares"),
        (["--inputs", "scalar.npz"], "no rows that could"),
    ):
        (error,) = errors(verify(files, "b.onnx", *given))
        assert fact in error
