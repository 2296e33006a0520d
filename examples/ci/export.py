"""Write the three files of this project: the weights, the net as ONNX, and the same without BatchNorms.

python export.py    after every training; what is committed is what this wrote
"""

from __future__ import annotations

import onnx
import torch
from net import FOLDER, build
from torch import nn

import bnfold


def train(net: nn.Sequential) -> None:
    """Stand in for a training: give the BatchNorms statistics, and weights that are not one and zero."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    net.train()
    for _ in range(50):
        net(torch.randn(64, 3, 16, 16))
    net.eval()


def export(net: nn.Sequential) -> None:
    """Write `net.onnx`, with its BatchNorms, and without the exporter's notes on the machine that it ran on."""
    batch = {0: torch.export.Dim("batch")}
    image = torch.randn(2, 3, 16, 16)
    program = torch.onnx.export(net, (image,), dynamic_shapes=(batch,), optimize=False, verbose=False)
    assert program is not None
    model = program.model_proto
    for thing in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del thing.metadata_props[:]
    onnx.save(model, FOLDER / "net.onnx")


if __name__ == "__main__":
    net = build()
    train(net)
    torch.save(net.state_dict(), FOLDER / "net.pt")
    export(net)
    print(bnfold.fold_file(FOLDER / "net.onnx", FOLDER / "net.folded.onnx").summary())
