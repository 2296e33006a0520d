"""python -m benchmarks.latency: one example at a time through the lecture's net, in torch and in onnxruntime.

The net has the lecture's sizes (context 3, embedding 10, hidden 200, 27 characters) and statistics of its own; how well
it was trained does not change its time. All contestants run in one process and take turns, so the ratios hold even
where the times do not; a second table gives onnxruntime two threads, which is no help at this size.

The third table is for the file alone, against what `torch.onnx.export` makes of the same folded module: other layouts
of the weights, a look-up instead of layers (`--tables auto`), and `export.Session`. Each call has another context. A
ratio is that of one turn, in random order; shown are the median over all turns and the middle half of them. The session
that a process opens first is one or two percent slower, whatever is in it, so the yardstick is not that one.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from itertools import cycle, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from bnfold.checkpoint import Checkpoint, InputDomain
from export.__main__ import tabulate
from export.convert import Exported, export
from export.latency import Timing, compare_latencies, measure
from export.session import Session, open_session

CALLS = 20_000
TURNS = 1000
YARDSTICK = "torch.onnx.export of the folded net"
DOMAIN = InputDomain((3,), "int64", 0, 27)


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


def lay_out(content: bytes, layout: str) -> bytes:
    """Return a file of ours with its weights transposed, for `Gemm`, `MatMul` and Add, or onnxruntime's `FusedGemm`."""
    model = onnx.load_from_string(content)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "Gemm":
            tensor = weights[node.input[1]]
            array = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            nodes += draw_product(node, layout)
        elif node.op_type == "Tanh" and layout == "FusedGemm":
            settings = {"domain": "com.microsoft", "activation": "Tanh"}
            nodes[-1] = helper.make_node(layout, nodes[-1].input, node.output, **settings)
        else:
            nodes.append(node)
    domains = [*model.opset_import, helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "net", model.graph.input, model.graph.output, model.graph.initializer)
    return helper.make_model(graph, opset_imports=domains, ir_version=model.ir_version).SerializeToString()


def draw_product(node: onnx.NodeProto, layout: str) -> list[onnx.NodeProto]:
    """Return the nodes for a Gemm whose weight has been transposed."""
    x, weight, bias = node.input
    if layout != "MatMul":
        return [helper.make_node("Gemm", node.input, node.output)]
    product = f"{node.name}/product"
    return [
        helper.make_node("MatMul", [x, weight], [product]),
        helper.make_node("Add", [product, bias], node.output),
    ]


def collect_calls(exported: Exported, looked_up: Exported) -> dict[str, Callable[[], object]]:
    """Return the calls that the third table compares, `YARDSTICK` among them."""
    contexts = DOMAIN.sample(4096).numpy()[:, None]
    content = exported.path.read_bytes()
    program = torch.onnx.export(
        exported.model, (torch.from_numpy(contexts[0]),), input_names=["input"], verbose=False
    )
    assert program is not None
    traced = program.model_proto.SerializeToString()
    files = {
        "ours, opened first": content,
        YARDSTICK: traced,
        "the same once more": traced,
        "ours": content,
        "ours, weights transposed": lay_out(content, "Gemm"),
        "ours, MatMul and Add": lay_out(content, "MatMul"),
        "ours, Gemm and Tanh as one": lay_out(content, "FusedGemm"),
        "ours, --tables auto": looked_up.path.read_bytes(),
    }
    calls = {name: call_plainly(open_session(file), contexts) for name, file in files.items()}
    plain = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    calls["ours, options of onnxruntime"] = call_plainly(plain, contexts)
    for name, file in (("ours", content), ("ours, --tables auto", files["ours, --tables auto"])):
        session, following = Session(file), cycle(contexts)
        calls[f"{name}, export.Session"] = lambda s=session, f=following: s(next(f))
    calls["ours, export.Session, no copies"] = call_bound(Session(content), contexts)
    return calls


def call_plainly(session: Any, contexts: Any) -> Callable[[], object]:
    feeds = cycle([{"input": context} for context in contexts])
    return lambda: session.run(None, next(feeds))


def call_bound(session: Session, contexts: Any) -> Callable[[], object]:
    bound, following = session.inputs["input"], cycle(contexts)

    def call() -> None:
        bound[...] = next(following)
        session.run()

    return call


def compare_files(calls: Mapping[str, Callable[[], object]]) -> Table:
    """Return the third table."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(TURNS):
        random.shuffle(names)
        for name in names:
            times[name] += measure({name: calls[name]}, 41).values()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("one example in onnxruntime, one thread")
    for heading in ("median", "ratio", "middle half"):
        table.add_column(heading, justify="right")
    for name, each in times.items():
        low, middle, high = statistics.quantiles(
            (a / b for a, b in zip(each, times[YARDSTICK], strict=True)), n=4
        )
        micros = f"{statistics.median(each) * 1e6:.2f} us"
        table.add_row(name, micros, f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    return table


def main() -> None:
    """Export the net into a temporary folder and print the three tables."""
    net, console = build_net(), Console(highlight=False)
    with TemporaryDirectory() as folder:
        given = Checkpoint(net, DOMAIN)
        exported = export(given, Path(folder) / "net.onnx")
        looked_up = export(given, Path(folder) / "table.onnx", tables="auto")
        example = torch.zeros(1, 3, dtype=torch.int64)
        content = exported.path.read_bytes()
        console.print(tabulate(compare_latencies(exported.model, net, example, content, CALLS)))
        console.print(tabulate(time_threads(exported)))
        console.print(compare_files(collect_calls(exported, looked_up)))


if __name__ == "__main__":
    main()
