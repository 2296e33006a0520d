"""python -m train.resnet: the lecture's ResNet walk-through, from the motif to a file without BatchNorms.

    python -m train.resnet                      ResNet-50, one image of 224 x 224
    python -m train.resnet --small -o DIR       the same shape at a tenth of the size, files kept in DIR

The motif is conv, BatchNorm, ReLU, the conv with `bias=False`, since the BatchNorm after it would take a bias away. A
bottleneck has three of them, 1 x 1, 3 x 3 (with the stride, as in torchvision) and 1 x 1, the last ReLU after the sum
with the way around (He et al. 2016); parameters have torchvision's names, so that its weights can be loaded.

Folded by `bnfold.fold`, each BatchNorm goes into the conv before it. Both nets are written as ONNX, the first with
`optimize=False`, as the exporter would otherwise fold its BatchNorms itself, and both files are held to the unfolded
net in torch, with onnxruntime's optimisations and without. Printed is what was there before and after. onnxruntime
folds most BatchNorms itself when it loads a file, so the difference shows in torch and where a file runs as written.

The net is not trained; its statistics are made as training would make them. Free random ones would kill or explode
so deep a net, and a dead net hides a wrong fold; so they are calibrated on a batch, then moved a little, and 30 % of
the gammas are negative. How far the output moves between two images is printed beside how far the files are off.

Exit code 0; 1 where a file computes something else; 2 where an argument cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor, nn

import bnfold
from bnfold.command import Parser
from bnfold.errors import InputError, run_command
from bnfold.output import replacing, together
from bnfold.report import Evidence
from export.convert import Exported, export_module
from export.latency import measure
from export.prove import Examples, prove
from export.session import open_session
from export.write import write

__all__ = ["Bottleneck", "ResNet", "anchor", "build", "main"]

IMAGES = 4
"""As many images make the batch that calibrates, folds and compares."""


class Bottleneck(nn.Module):
    """Three motifs, from `channels` by `width` to 4 x `width`, and the way around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != out:
            conv = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, 4 x width, h / stride, w / stride) for (n, channels, h, w)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class ResNet(nn.Module):
    """A bottleneck ResNet of four stages with `blocks` each; as it stands ResNet-50 (He et al. 2016)."""

    def __init__(self, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = width
        for number, count in enumerate(blocks):
            stage, wide = [], width * 2**number
            for block in range(count):
                stage.append(Bottleneck(channels, wide, 2 if number and not block else 1))
                channels = 4 * wide
            self.add_module(f"layer{number + 1}", nn.Sequential(*stage))
        self.stages = len(blocks)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, classes) of images (n, 3, h, w)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(self.stages):
            x = self.get_submodule(f"layer{number + 1}")(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def build(images: Tensor, small: bool = False, seed: int = 0) -> nn.Module:
    """Return an anchored ResNet-50, or one with an eighth of its width and 9 of its 16 blocks, in eval mode.

    Args:
        images: (n, 3, h, w), what the statistics are calibrated on.
        small: which of the two.
        seed: of all weights and statistics.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ResNet((2, 2, 3, 2), 8, 10) if small else ResNet()
    return anchor(net.eval(), images, Generator().manual_seed(seed))


@torch.no_grad()
def anchor(net: nn.Module, images: Tensor, generator: Generator) -> nn.Module:
    """Return a copy with gammas from 0.5 to 1.5, 30 % of them negative, and statistics near those of `images`."""

    def draw(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator)

    norms = _batchnorms(net)
    for norm in norms:
        sign = torch.where(draw(norm.weight) < 0.3, -1.0, 1.0)
        norm.weight.copy_((draw(norm.weight) + 0.5) * sign)
        norm.bias.copy_(draw(norm.bias) - 0.5)
    anchored = bnfold.calibrate(net, [images])
    for norm in _batchnorms(anchored):
        mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        mean += (draw(norm.weight) - 0.5) * var.sqrt() * 0.2
        var *= 0.8 + draw(norm.weight) * 0.4
    return anchored


def run(options: argparse.Namespace) -> None:
    """Walk through: build, fold, write, prove, time, print."""
    if options.output and not options.output.is_dir():
        raise InputError(f"{options.output} is no folder; make it first")
    torch.set_num_threads(1)
    size = options.size or (64 if options.small else 224)
    images = torch.rand(IMAGES, 3, size, size, generator=Generator().manual_seed(options.seed))
    net = build(images, options.small, options.seed)
    keep = nullcontext(options.output) if options.output else TemporaryDirectory()
    with keep as folder:
        files = [Path(folder) / name for name in ("resnet.onnx", "resnet.folded.onnx")]
        plain = _write_unfolded(net, images[:2])
        evidence = prove(plain, net, Examples(images))
        with together():
            with replacing(files[0]) as temporary:
                temporary.write_bytes(plain)
            exported = export_module(net, images, files[1])
        contents = [file.read_bytes() for file in files]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    table = _tabulate(net, exported, contents, evidence)
    if options.timing:
        _add_times(table, (net, exported.model), contents, images[:1])
    console.print(table)
    console.print(f"between two images the output moves by {exported.evidence.movement or 0:.1e} of its size")
    if options.output:
        console.print(f"wrote {files[0]} and {files[1]}", soft_wrap=True)


def _write_unfolded(net: nn.Module, images: Tensor) -> bytes:
    """Return the ONNX model with its BatchNorms, rid of the constants that the exporter computes at run time."""
    proto = write(net, images, optimise=False)
    from onnxscript import optimizer

    optimizer.fold_constants(proto, onnx_shape_inference=True)
    optimizer.remove_unused_nodes(proto)
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _tabulate(net: nn.Module, exported: Exported, contents: Sequence[bytes], evidence: Evidence) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    nets, deviations = (net, exported.model), (evidence.deviation, exported.evidence.deviation)
    table.add_row("BatchNorms", *(f"{len(_batchnorms(each))}" for each in nets))
    table.add_row("parameters and statistics", *(f"{_count(each):,}" for each in nets))
    table.add_row("ONNX nodes", *(f"{_count_nodes(each):,}" for each in contents))
    table.add_row("ONNX file, MB", *(f"{len(each) / 1e6:.2f}" for each in contents))
    table.add_row("off from the net in torch", *(f"{deviation:.1e}" for deviation in deviations))
    return table


def _add_times(
    table: Table, nets: tuple[nn.Module, nn.Module], contents: Sequence[bytes], image: Tensor
) -> None:
    """Add the median milliseconds of one image, all contestants taking turns on one thread."""
    runs: dict[str, Callable[[], object]] = {}
    for when, net, content in zip(("before", "after"), nets, contents, strict=True):
        runs[f"torch {when}"] = _call_torch(net, image)
        runs[f"onnxruntime, as written {when}"] = _call_onnx(content, image, False)
        runs[f"onnxruntime {when}"] = _call_onnx(content, image, True)
    medians = measure(runs, 200, 30.0)
    for name in ("torch", "onnxruntime, as written", "onnxruntime"):
        times = (f"{medians[f'{name} {when}'] * 1e3:.2f}" for when in ("before", "after"))
        table.add_row(f"{name}: one image, ms", *times)


def _call_torch(net: nn.Module, image: Tensor) -> Callable[[], object]:
    return torch.inference_mode()(lambda: net(image))


def _call_onnx(content: bytes, image: Tensor, optimise: bool) -> Callable[[], object]:
    session, array = open_session(content, optimise), image.numpy()
    return lambda: session.run(None, {"input": array})


def _batchnorms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def _count(net: nn.Module) -> int:
    return sum(tensor.numel() for tensor in net.state_dict().values() if tensor.is_floating_point())


def _count_nodes(content: bytes) -> int:
    import onnx

    return len(onnx.load_from_string(content).graph.node)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(prog="python -m train.resnet", description="Fold and export a bottleneck ResNet.")
    add = parser.add_argument
    add("--small", action="store_true", help="a tenth of the size, images of 64 x 64")
    add("--size", type=int, metavar="N", help="height and width of the image (224)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, statistics and images (0)")
    add("-o", "--output", type=Path, metavar="DIR", help="keep resnet.onnx and resnet.folded.onnx there")
    add("--no-timing", dest="timing", action="store_false", help="skip the measurement of latency")
    options = parser.parse_args(arguments)
    if options.size is not None and options.size < 32:
        parser.error(f"--size {options.size}: the net halves an image five times; it takes 32 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
