"""What folding a file costs by the count of its nodes, and in memory by the size of its external data.

    python -m benchmarks.files [NODES ...]             CPU seconds, verified and not
    python -m benchmarks.files --external GIGABYTES    peak memory, verified and not
    python -m benchmarks.files --against FILE ...      against onnx.load with onnx.save, and against `import onnx`

The nodes are a chain of small convolutions, BatchNorms and ReLUs. The external file is made up, of square 1x1
convolutions that store 64 MiB each, in a folder for temporary files, and deleted. Each figure is CPU time, or the peak
of memory, of a process of its own; commands that are compared take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

NODES = (1_000, 3_000, 10_000)

Command = Sequence[str]


def measure(command: Command) -> tuple[float, float]:
    """The CPU seconds and the peak of memory, in MB, of a process."""
    quiet, one = subprocess.DEVNULL, os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=quiet, env=one)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def fold(path: Path, *options: str) -> Command:
    """The command that folds a file."""
    return [sys.executable, "-m", "bnfold.fold", str(path), "-o", str(path.with_name("out.onnx")), *options]


# ---------------------------------------------------------------- made-up files


def write(folder: Path, layers: int, channels: int, external: bool) -> Path:
    """Write a chain of 1x1 convolutions, BatchNorms and ReLUs."""
    draw, path = np.random.default_rng(0), folder / "net.onnx"
    weight = (draw.standard_normal((channels, channels, 1, 1)) / channels**0.5).astype(np.float32)
    stored: list[TensorProto] = []
    nodes, value = [], "x"
    with (folder / "net.onnx.data").open("wb") as data:
        for place in range(layers):
            if external:
                tensor = refer(f"w{place}", weight, data.tell())
                data.write(np.roll(weight, place, 0).data)
            else:
                tensor = onnx.numpy_helper.from_array(weight, f"w{place}")
            numbers = np.abs(draw.standard_normal((4, channels))).astype(np.float32) + np.float32(0.5)
            names = [f"{kind}{place}" for kind in "sbmv"]
            stored += [tensor, *map(onnx.numpy_helper.from_array, numbers, names)]
            nodes += [
                helper.make_node("Conv", [value, f"w{place}"], [f"c{place}"], f"conv{place}"),
                helper.make_node("BatchNormalization", [f"c{place}", *names], [f"n{place}"], f"norm{place}"),
                helper.make_node("Relu", [f"n{place}"], [f"r{place}"], f"relu{place}"),
            ]
            value = f"r{place}"
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 2, 2]) for name in ("x", value)
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def refer(name: str, array: np.ndarray, offset: int) -> TensorProto:
    """A tensor that says that its data lies beside the model; it never held any, which protobuf would keep."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", "net.onnx.data"), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(text))
    return tensor


# ---------------------------------------------------------------- the figures


def grow(sizes: Sequence[int]) -> None:
    """Print seconds by the count of nodes."""
    print(f"{'nodes':>8} {'--no-verify':>12} {'us a node':>10} {'verified':>10} {'us a node':>10}")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder), size // 3, 4, external=False)
            plain, whole = (measure(fold(path, *options))[0] for options in (["--no-verify"], []))
        each = 1e6 / size
        print(
            f"{size:>8,} {plain:>11.2f}s {plain * each:>10.0f} {whole:>9.2f}s {whole * each:>10.0f}",
            flush=True,
        )


def fill(gigabytes: float) -> None:
    """Print the peak of memory for a file of external data."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), max(1, round(gigabytes * 16)), 4096, external=True)
        for options in (["--no-verify"], []):
            seconds, peak = measure(fold(path, *options))
            print(
                f"{gigabytes:g} GiB {' '.join(options) or 'verified'}: {peak:.0f} MB, {seconds:.1f} s",
                flush=True,
            )


def compare(paths: Sequence[Path], rounds: int = 5) -> None:
    """Print the command's CPU time as a multiple of what reads and writes the file, and of `import onnx`."""
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder) / "out.onnx")
            plain = f"import onnx; onnx.save(onnx.load({str(path)!r}), {target!r})"
            ours = [sys.executable, "-m", "bnfold.fold", str(path), "-o", target]
            commands: dict[str, Command] = {
                "import onnx": [sys.executable, "-c", "import onnx"],
                "load and save": [sys.executable, "-c", plain],
                "--no-verify": [*ours, "--no-verify"],
                "verified": ours,
            }
            seen = [{name: measure(command) for name, command in commands.items()} for _ in range(rounds)]
        print(path.name)
        for name in commands:
            seconds = statistics.median(each[name][0] for each in seen)
            first, second = (
                statistics.median(e[name][0] / e[other][0] for e in seen) for other in list(commands)[:2]
            )
            peak = max(each[name][1] for each in seen)
            print(
                f"  {name:<14} {seconds:7.2f} s {first:7.2f} x import {second:7.2f} x load and save {peak:7.0f} MB"
            )


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nodes", nargs="*", type=int, help="how many nodes")
    parser.add_argument("--external", type=float, metavar="GIGABYTES", help="peak memory instead")
    parser.add_argument(
        "--against", nargs="+", type=Path, metavar="FILE", help="ratios on these files instead"
    )
    options = parser.parse_args()
    if options.against:
        compare(options.against)
    elif options.external:
        fill(options.external)
    else:
        grow(options.nodes or NODES)


if __name__ == "__main__":
    main()
