"""python -m benchmarks.cuda_checks [--device cuda]: training, calibration and folding on CUDA, held to the CPU.

Each line is a check: what it holds to what, and by how much that is off. All run even where one fails. Exit code 0: all
passed; 1: one did not; 2 with one line where there is no such device. With `--device cpu` it holds the CPU to itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Generator, Tensor, nn

import bnfold
import data
from bnfold.checkpoint import InputDomain, load
from bnfold.errors import run_command
from train.arguments import pick_device
from train.evaluate import measure
from train.layers import to_torch
from train.loop import Training
from train.material import Material, prepare
from train.recipes import RECIPES, make

STEPS = 100
CHECKOUT = Path(__file__).resolve().parent.parent


class Off(Exception):
    """What was held to something, and is not."""


def hold(found: float, bound: float, what: str) -> str:
    """Return a line where `found` is within `bound`; raise where it is not, or is no number."""
    if not found <= bound:
        raise Off(f"{what}: {found:.2e}, the bound is {bound:.2e}")
    return f"{what}: {found:.2e} (bound {bound:.2e})"


def train(material: Material, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the losses of some steps, and all numbers of the net after them, in float64 on the CPU."""
    recipe, generator = replace(RECIPES[name], steps=STEPS), Generator().manual_seed(3)
    net = make(recipe, material, generator).to(device, dtype)
    losses = torch.tensor(list(Training(net, material, recipe, generator)), dtype=torch.float64)
    return losses, numbers(net)


def numbers(net: nn.Module) -> Tensor:
    """All floating-point numbers of a net, in float64 on the CPU."""
    values = (v for v in net.state_dict().values() if v.is_floating_point())
    return torch.cat([v.detach().double().cpu().flatten() for v in values])


def check_losses(material: Material, device: torch.device) -> Iterator[str]:
    """Hold both devices to float64 on the CPU: a device may be off by eight times what the CPU is off by."""
    for name in ("lecture", "batchnorm", "relu", "quick"):
        truth, theirs = (
            train(material, name, torch.device("cpu"), t) for t in (torch.float64, torch.float32)
        )
        ours = train(material, name, device, torch.float32)
        for what, true, other, mine in zip(("losses", "parameters"), truth, theirs, ours, strict=True):
            error, bound = float((mine - true).abs().max()), 8 * float((other - true).abs().max())
            yield hold(error, bound, f"{name}, {what} of {STEPS} steps, off float64")


def check_checkpoint(material: Material, device: torch.device, folder: Path) -> Iterator[str]:
    """Train by the command on the device, and read what it wrote where there is none; so with --calibrate."""
    for more in ((), ("--calibrate",)):
        command(folder, "-o", "near.pt", "--device", str(device), *more)
        code = "import sys; from train.compare import load_side; "
        code += "from bnfold.checkpoint import load; print(load('near.pt').record['losses']['dev'])"
        alone = run_python(folder, "-c", code, CUDA_VISIBLE_DEVICES="")
        found = load(folder / "near.pt")
        written, again = float(alone.stdout), measure(found.model, material.dev)
        yield hold(
            abs(written - again), 1e-5, f"dev loss {again:.4f}, as written and as measured on the CPU {more}"
        )
        command(folder, "-o", "far.pt", *more)
        far = load(folder / "far.pt").record["losses"]["dev"]
        yield hold(abs(written - far), 0.01, f"dev loss, device against CPU {more}")


def check_resume(device: torch.device, folder: Path) -> Iterator[str]:
    """Kill a training, go on with it on the device, and compare with one that was not killed."""
    given = ("--device", str(device), "--recipe", "lecture", "--steps", "600", "--save-every", "50")
    command(folder, "-o", "whole.pt", *given)
    arguments = [sys.executable, "-m", "train", "-o", "cut.pt", *given, "--steps", "600"]
    kept = folder / "cut.training.pt"
    with subprocess.Popen(arguments, cwd=folder, env=environment(), stdout=subprocess.DEVNULL) as process:
        while not kept.exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
    if not kept.exists():
        raise Off("the training was over before it could be killed")
    shown = command(folder, "-o", "cut.pt", *given, "--resume").splitlines()
    whole, cut = (numbers(load(folder / name).model) for name in ("whole.pt", "cut.pt"))
    yield f"{next(line for line in shown if line.startswith('resumed'))}: " + hold(
        float((whole - cut).abs().max()), 0.0, "off the one that was not killed"
    )


def check_watched(device: torch.device, folder: Path) -> Iterator[str]:
    """Look on, which a graph does not allow, and compare with a training that nobody watched."""
    given = ("--device", str(device), "--recipe", "lecture", "--steps", "200")
    command(folder, "-o", "plain.pt", *given)
    command(folder, "-o", "watched.pt", *given, "--explain", "--plots", "pictures", "--every", "7")
    plain, watched = (numbers(load(folder / name).model) for name in ("plain.pt", "watched.pt"))
    yield hold(float((plain - watched).abs().max()), 0.0, "watched, off the one that was not")


def check_calibrate(material: Material, device: torch.device) -> Iterator[str]:
    """Calibrate on either device."""
    net = to_torch(make(RECIPES["deep"], material, Generator().manual_seed(2)))
    batches = material.examples[0][:20_000].split(1024)
    near = bnfold.calibrate(net.to(device), [batch.to(device) for batch in batches])
    where = {value.device.type for value in near.state_dict().values()}
    far = bnfold.calibrate(net.cpu(), list(batches))
    yield hold(float((numbers(near) - numbers(far)).abs().max()), 1e-6, f"calibrate on {where}, off the CPU")


def check_fold(material: Material, device: torch.device) -> Iterator[str]:
    """Fold and verify modules that are on the device."""
    net = to_torch(make(RECIPES["lecture"], material, Generator().manual_seed(2)))
    net(material.examples[0][:500])
    images = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.BatchNorm2d(8),
        nn.Flatten(), nn.Linear(8 * 15 * 15, 10),
    )  # fmt: skip
    images(torch.randn(16, 3, 32, 32))
    contexts = InputDomain((3,), "int64", 0, 27).every()
    for what, model, x in (
        ("the lecture's net", net, contexts),
        ("images", images, torch.randn(4, 3, 32, 32)),
    ):
        model, x = model.eval().to(device), x.to(device)
        folded, report = bnfold.fold(model, x)
        kinds = {p.device.type for p in folded.parameters()}
        evidence = ", ".join(f"{e.question} {e.deviation:.1e} <= {e.bound:.1e}" for e in report.evidence)
        left = [verdict for verdict in report.verdicts if verdict.into == ()]
        if left or kinds != {device.type} or len(report.evidence) != 2:
            raise Off(f"{what}: {len(left)} BatchNorms stay, on {kinds}, evidence {evidence}")
        with torch.no_grad():
            apart = float((folded(x) - model(x)).abs().max() / model(x).abs().max())
        yield f"{what}: folded on {kinds}, {evidence}; " + hold(apart, 1e-5, "outputs apart")
        found = bnfold.verify(model, folded, x)
        yield f"{what}: verified, " + ", ".join(f"{e.question} {e.deviation:.1e}" for e in found)


def check_processes(device: torch.device, folder: Path) -> Iterator[str]:
    """One process under torchrun, whose collectives are the device's, trains the same net."""
    given = ("--recipe", "lecture", "--steps", "300", "--device", device.type)
    command(folder, "-o", "one.pt", *given)
    starter = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    run_python(folder, *starter, "-m", "train", "-o", "run.pt", *given)
    one, run = (numbers(load(folder / name).model) for name in ("one.pt", "run.pt"))
    yield hold(float((one - run).abs().max()), 1e-3, "numbers after 300 steps, torchrun against one process")


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def run_python(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder; raise with the end of stderr where it fails."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment(**more), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Off(f"{' '.join(arguments[:6])}: exit code {done.returncode}, {done.stderr[-600:]}")
    return done


def command(folder: Path, *arguments: str) -> str:
    return run_python(folder, "-m", "train", *arguments).stdout


def run(options: argparse.Namespace) -> int:
    """Make all checks; return the exit code."""
    device = pick_device(options.device)
    torch.set_num_threads(1)
    material, failed = prepare(data.read_names(None)), 0
    about = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {about}")
    with TemporaryDirectory() as name:
        folder = Path(name)
        checks: dict[str, Callable[[], Iterator[str]]] = {
            "losses": lambda: check_losses(material, device),
            "checkpoint": lambda: check_checkpoint(material, device, folder),
            "resume": lambda: check_resume(device, folder),
            "watched": lambda: check_watched(device, folder),
            "calibrate": lambda: check_calibrate(material, device),
            "fold": lambda: check_fold(material, device),
            "processes": lambda: check_processes(device, folder),
        }
        for title, check in checks.items():
            failed += not passes(title, check)
    print(f"{len(checks) - failed} of {len(checks)} passed")
    return int(failed > 0)


def passes(title: str, check: Callable[[], Iterator[str]]) -> bool:
    """Print what a check finds."""
    begin = time.perf_counter()
    try:
        for line in check():
            print(f"  {title}: {line}", flush=True)
    except Off as error:
        print(f"FAILED {title}: {error}", flush=True)
        return False
    except Exception:
        print(f"FAILED {title}: {traceback.format_exc()}", flush=True)
        return False
    print(f"ok {title}, {time.perf_counter() - begin:.0f} s", flush=True)
    return True


def main() -> int:
    """Run the checks and return the exit code."""
    parser = argparse.ArgumentParser(description="Does CUDA do what the CPU does?")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda, cuda:1, cpu (cuda)")
    return run_command(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
