"""python -m benchmarks.latency: one example at a time through the lecture's net, in torch and in onnxruntime.

The net has the lecture's sizes (context 3, embedding 10, hidden 200, 27 characters) and statistics of its own; how well
it was trained does not change its time. All contestants run in one process and take turns, so the ratios hold even
where the times do not; a second table gives onnxruntime two threads, which is no help at this size.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from torch import nn

from bnfold.checkpoint import Checkpoint, InputDomain
from export.__main__ import tabulate
from export.convert import Exported, export
from export.latency import Timing, compare_latencies, measure
from export.session import open_session

CALLS = 20_000


def build_net(hidden: int = 200) -> nn.Sequential:
    """Return the lecture's three-layer net in eval mode, its running statistics those of random contexts."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(27, 10), nn.Flatten())
    for before, after in pairwise([30, hidden, hidden, 27]):
        net += nn.Sequential(nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.Tanh())
    net = net[:-1]
    for _ in range(50):
        net(torch.randint(0, 27, (256, 3)))
    return net.eval()


def time_threads(exported: Exported) -> list[Timing]:
    """Return the time of one example in onnxruntime with one and with two threads."""
    context = {"input": torch.zeros(1, 3, dtype=torch.int64).numpy()}
    sessions = {f"onnxruntime, folded, {n} threads": open_session(exported.path, threads=n) for n in (1, 2)}
    runs = {name: lambda s=session: s.run(None, context) for name, session in sessions.items()}
    return [Timing(name, seconds) for name, seconds in measure(runs, CALLS, budget=10).items()]


def main() -> None:
    """Export the net into a temporary folder and print both tables."""
    net, console = build_net(), Console(highlight=False)
    with TemporaryDirectory() as folder:
        exported = export(Checkpoint(net, InputDomain((3,), "int64", 0, 27)), Path(folder) / "net.onnx")
        example = torch.zeros(1, 3, dtype=torch.int64)
        content = exported.path.read_bytes()
        console.print(tabulate(compare_latencies(exported.model, net, example, content, CALLS)))
        console.print(tabulate(time_threads(exported)))


if __name__ == "__main__":
    main()
