"""Networks with BatchNorms in different places, in plain `torch.nn`, at the sizes of their papers and small.

Each class says in its first line where it comes from. `NETS` has them by name, and `build` gives one its statistics:
anchored to a batch of inputs and then moved a little, so that the activations neither vanish nor explode and a wrong
fold shows. Trained gammas are positive almost everywhere; ``"mixed"`` makes 30 % of them negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def _images(size: int, channels: int = 3) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, channels, size, size),)


def _sequence(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape),)


def _tokens(count: int, *lengths: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: tuple(torch.randint(0, count, (batch, n) if n else (batch,)) for n in lengths)


# ---------------------------------------------------------------- BatchNorm before the activation before the conv


class _DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(4 * growth),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class _DenseBlock(nn.Module):
    def __init__(self, channels: int, growth: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_DenseLayer(channels + i * growth, growth) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """DenseNet-BC (Huang et al. 2017; torchvision's densenet121): concat, BatchNorm, ReLU, 1x1 conv."""

    def __init__(
        self, blocks: Sequence[int] = (6, 12, 24, 16), growth: int = 32, classes: int = 1000
    ) -> None:
        super().__init__()
        channels = 2 * growth
        stem = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        parts: list[nn.Module] = [stem, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        for place, count in enumerate(blocks):
            parts.append(_DenseBlock(channels, growth, count))
            channels += count * growth
            if place < len(blocks) - 1:
                conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
                parts += [nn.BatchNorm2d(channels), nn.ReLU(), conv, nn.AvgPool2d(2)]
                channels //= 2
        parts += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.layers = nn.Sequential(*parts, nn.Linear(channels, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _PreActBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, outputs, 1, bias=False)
        plain = stride == 1 and inputs == outputs
        self.shortcut = None if plain else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv3(F.relu(self.norm3(self.conv2(F.relu(self.norm2(self.conv1(y)))))))
        return y + shortcut


class PreActResNet(nn.Module):
    """Pre-activation ResNet-50 (He et al. 2016, "Identity mappings in deep residual networks")."""

    def __init__(self, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        parts: list[nn.Module] = [
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
            nn.MaxPool2d(3, 2, 1),
        ]
        channels = width
        for stage, count in enumerate(blocks):
            for place in range(count):
                parts.append(_PreActBlock(channels, width << stage, 2 if stage and not place else 1))
                channels = 4 * (width << stage)
        parts += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.layers = nn.Sequential(*parts, nn.Linear(channels, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _FaceBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 3, 1, 1, bias=False)
        self.norm2, self.slope = nn.BatchNorm2d(width), nn.PReLU(width)
        self.conv2, self.norm3 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = None
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm3(self.conv2(self.slope(self.norm2(self.conv1(self.norm1(x))))))
        return y + (x if self.shortcut is None else self.shortcut(x))


class FaceResNet(nn.Module):
    """IResNet-50 (Deng et al. 2019, "ArcFace"; insightface): BatchNorm before padded convs, and before a Flatten."""

    def __init__(
        self, blocks: Sequence[int] = (3, 4, 14, 3), width: int = 64, size: int = 112, features: int = 512
    ) -> None:
        super().__init__()
        stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        parts: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.PReLU(width)]
        channels = width
        for stage, count in enumerate(blocks):
            for place in range(count):
                parts.append(_FaceBlock(channels, width << stage, 1 if place else 2))
                channels = width << stage
        flat = channels * (size // 2 ** len(blocks)) ** 2
        parts += [nn.BatchNorm2d(channels), nn.Dropout(0.4), nn.Flatten()]
        self.layers = nn.Sequential(*parts, nn.Linear(flat, features), nn.BatchNorm1d(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


# ---------------------------------------------------------------- speech, music and series


class _Statistics(nn.Module):
    """Mean and standard deviation over time of a `(batch, channels, time)` value."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(2)
        centred = x - mean[:, :, None]
        return torch.cat([mean, torch.sqrt((centred * centred).mean(2) + 1e-5)], 1)


class XVector(nn.Module):
    """X-vector (Snyder et al. 2018; SpeechBrain's Xvector): conv padded by reflection, LeakyReLU, BatchNorm."""

    def __init__(
        self, features: int = 24, channels: Sequence[int] = (512, 512, 512, 512, 1500), size: int = 512
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        shapes = zip([features, *channels], channels, (5, 3, 3, 1, 1), (1, 2, 3, 1, 1), strict=False)
        for inputs, outputs, kernel, dilation in shapes:
            pad = dilation * (kernel - 1) // 2
            conv = nn.Conv1d(
                inputs,
                outputs,
                kernel,
                padding=pad,
                dilation=dilation,
                padding_mode="reflect" if pad else "zeros",
            )
            parts += [conv, nn.LeakyReLU(), nn.BatchNorm1d(outputs)]
        self.layers = nn.Sequential(*parts, _Statistics(), nn.Linear(2 * channels[-1], size))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Splice(nn.Module):
    def __init__(self, inputs: int, outputs: int, context: Sequence[int], late: bool) -> None:
        super().__init__()
        self.context, self.late = context, late
        self.kernel, self.norm = nn.Linear(inputs * len(context), outputs), nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.context[0], self.context[-1]
        frames = x.shape[1] - (last - first)
        x = self.kernel(torch.cat([x[:, c - first : c - first + frames] for c in self.context], 2))
        if self.late:
            return self.norm(F.relu(x).transpose(1, 2)).transpose(1, 2)
        return F.relu(self.norm(x.transpose(1, 2)).transpose(1, 2))


class TDNN(nn.Module):
    """TDNN (Peddinti et al. 2015) over spliced frames: Linear, transpose, BatchNorm1d, transpose.

    `late` puts the ReLU before the BatchNorm, as Kaldi does.
    """

    def __init__(self, features: int = 40, width: int = 512, late: bool = False, targets: int = 2000) -> None:
        super().__init__()
        contexts = [(-2, -1, 0, 1, 2), (-2, 0, 2), (-3, 0, 3), (0,), (0,)]
        sizes = [features] + [width] * len(contexts)
        self.layers = nn.Sequential(*(_Splice(sizes[i], width, c, late) for i, c in enumerate(contexts)))
        self.head = nn.Linear(width, targets)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class Crepe(nn.Module):
    """CREPE (Kim et al. 2018; torchcrepe): padded conv, ReLU, BatchNorm, MaxPool.

    Without `pad` the convs are "valid".
    """

    def __init__(
        self,
        channels: Sequence[int] = (1024, 128, 128, 128, 256, 512),
        kernels: Sequence[int] = (512, 64, 64, 64, 64, 64),
        frame: int = 1024,
        pad: bool = True,
        bins: int = 360,
    ) -> None:
        super().__init__()
        self.pad, size = pad, frame
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for place, (inputs, outputs, kernel) in enumerate(
            zip([1, *channels], channels, kernels, strict=False)
        ):
            self.convs.append(nn.Conv2d(inputs, outputs, (kernel, 1), stride=(1 if place else 4, 1)))
            self.norms.append(nn.BatchNorm2d(outputs, eps=0.0010000000474974513, momentum=0.0))
            size = ((size - (0 if pad else kernel - 1) - 1) // (1 if place else 4) + 1) // 2
        self.head = nn.Linear(channels[-1] * size, bins)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if self.pad:
                total = conv.kernel_size[0] - (1 if place else 4)
                x = F.pad(x, (0, 0, total // 2, total - total // 2))
            x = F.max_pool2d(norm(F.relu(conv(x))), (2, 1), (2, 1))
        return torch.sigmoid(self.head(x.permute(0, 2, 1, 3).flatten(1)))


class _InceptionModule(nn.Module):
    def __init__(self, inputs: int, filters: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(inputs, filters, 1, bias=False) if inputs > 1 else nn.Identity()
        narrow = filters if inputs > 1 else inputs
        self.convs = nn.ModuleList(nn.Conv1d(narrow, filters, k, padding=k // 2, bias=False) for k in kernels)
        self.pool = nn.Sequential(nn.MaxPool1d(3, 1, 1), nn.Conv1d(inputs, filters, 1, bias=False))
        self.norm = nn.BatchNorm1d(4 * filters)

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.bottleneck(x)
        return F.relu(self.norm(torch.cat([*(conv(narrow) for conv in self.convs), self.pool(x)], 1)))


class InceptionTime(nn.Module):
    """InceptionTime (Ismail Fawaz et al. 2020): convs side by side, concat, BatchNorm."""

    def __init__(
        self, depth: int = 6, filters: int = 32, kernels: Sequence[int] = (39, 19, 9), classes: int = 10
    ) -> None:
        super().__init__()
        wide = 4 * filters
        self.modules_ = nn.ModuleList(
            _InceptionModule(wide if i else 1, filters, kernels) for i in range(depth)
        )
        shortcuts = [nn.Conv1d(wide if i else 1, wide, 1, bias=False) for i in range(depth // 3)]
        self.shortcuts = nn.ModuleList(nn.Sequential(conv, nn.BatchNorm1d(wide)) for conv in shortcuts)
        self.head = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        start = x
        for place, module in enumerate(self.modules_):
            x = module(x)
            if place % 3 == 2:
                x = start = F.relu(x + self.shortcuts[place // 3](start))
        return self.head(x.mean(2))


# ---------------------------------------------------------------- behind a pool, beside a conv, right behind it


class _Group(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding="same", bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding="same", bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs, eps=1e-12), nn.BatchNorm2d(outputs, eps=1e-12)
        self.norm1.weight.requires_grad = self.norm2.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class Airbench(nn.Module):
    """airbench94 (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds"): conv, MaxPool, BatchNorm whose gammas stay 1."""

    def __init__(self, widths: Sequence[int] = (64, 256, 256), classes: int = 10) -> None:
        super().__init__()
        groups = [_Group(a, b) for a, b in zip([24, *widths], widths, strict=False)]
        self.layers = nn.Sequential(nn.Conv2d(3, 24, 2), nn.GELU(), *groups, nn.MaxPool2d(3), nn.Flatten())
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)) / 9


class _RepBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        point = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.wide, self.point = (nn.Sequential(conv, nn.BatchNorm2d(outputs)) for conv in (wide, point))
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x) + self.point(x)
        return F.relu(y if self.identity is None else y + self.identity(x))


class RepVGG(nn.Module):
    """RepVGG-A0 as it is trained (Ding et al. 2021): 3x3 conv, 1x1 conv and a BatchNorm side by side."""

    def __init__(
        self,
        blocks: Sequence[int] = (1, 2, 4, 14, 1),
        widths: Sequence[int] = (48, 48, 96, 192, 1280),
        classes: int = 1000,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        channels = 3
        for count, width in zip(blocks, widths, strict=True):
            for place in range(count):
                parts.append(_RepBlock(channels, width, 1 if place else 2))
                channels = width
        self.layers = nn.Sequential(
            *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *[nn.ReLU()] * relu)


class _Inception(nn.Module):
    def __init__(
        self, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int
    ) -> None:
        super().__init__()
        self.one, self.pool = (
            _conv_norm(inputs, one, 1),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv_norm(inputs, pool, 1)),
        )
        self.three, self.five = (
            nn.Sequential(_conv_norm(inputs, a, 1), _conv_norm(a, b, 3)) for a, b in (three, five)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


_INCEPTION = [
    (64, (96, 128), (16, 32), 32), (128, (128, 192), (32, 96), 64), None,
    (192, (96, 208), (16, 48), 64), (160, (112, 224), (24, 64), 64), (128, (128, 256), (24, 64), 64),
    (112, (144, 288), (32, 64), 64), (256, (160, 320), (32, 128), 128), None,
    (256, (160, 320), (32, 128), 128), (384, (192, 384), (48, 128), 128),
]  # fmt: skip


class GoogLeNet(nn.Module):
    """Inception v1 with BatchNorm (Szegedy et al. 2015; torchvision): every BatchNorm right behind a conv."""

    def __init__(self, part: int = 1, classes: int = 1000) -> None:
        super().__init__()
        channels = 192 // part
        stem = [
            _conv_norm(3, 64 // part, 7, 2),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            _conv_norm(64 // part, 64 // part, 1),
        ]
        parts: list[nn.Module] = [
            *stem,
            _conv_norm(64 // part, channels, 3),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        ]
        for row in _INCEPTION:
            if row is None:
                parts.append(nn.MaxPool2d(3, 2, ceil_mode=True))
                continue
            one, three, five, pool = row
            three, five = (three[0] // part, three[1] // part), (five[0] // part, five[1] // part)
            parts.append(_Inception(channels, one // part, three, five, pool // part))
            channels = one // part + three[1] + five[1] + pool // part
        self.layers = nn.Sequential(
            *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _ShuffleUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        given = inputs if stride > 1 else half
        self.left = None
        if stride > 1:
            self.left = nn.Sequential(
                _conv_norm(inputs, inputs, 3, 2, inputs, relu=False), _conv_norm(inputs, half, 1)
            )
        around = _conv_norm(given, half, 1), _conv_norm(half, half, 1)
        self.right = nn.Sequential(around[0], _conv_norm(half, half, 3, stride, half, relu=False), around[1])

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.left is None else (self.left(x), x)
        y = torch.cat([left, self.right(right)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleNet(nn.Module):
    """ShuffleNet v2 x1.0 (Ma et al. 2018): chunks, concats and shuffles, but every BatchNorm right behind a conv."""

    def __init__(
        self,
        blocks: Sequence[int] = (4, 8, 4),
        widths: Sequence[int] = (24, 116, 232, 464, 1024),
        classes: int = 1000,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = [_conv_norm(3, widths[0], 3, 2), nn.MaxPool2d(3, 2, 1)]
        for stage, count in enumerate(blocks):
            inputs, outputs = widths[stage : stage + 2]
            parts += [_ShuffleUnit(outputs if i else inputs, outputs, 1 if i else 2) for i in range(count)]
        parts += [_conv_norm(widths[-2], widths[-1], 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.layers = nn.Sequential(*parts, nn.Linear(widths[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


# ---------------------------------------------------------------- Linear, embeddings, and views


class _LinearNorm(nn.Module):
    """Linear, flatten to `(batch * tokens, channels)`, BatchNorm1d, back (LeViT's `Linear_BN`)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


class _Attention(nn.Module):
    """LeViT's attention, which halves the grid where `shrink` is set."""

    def __init__(
        self, inputs: int, outputs: int, heads: int, key: int, ratio: int, side: int, shrink: bool
    ) -> None:
        super().__init__()
        self.heads, self.key, self.value, self.side, self.shrink = heads, key, ratio * key, side, shrink
        self.kv = _LinearNorm(inputs, heads * (key + self.value))
        self.q = _LinearNorm(inputs, heads * key)
        self.project = nn.Sequential(nn.Hardswish(), _LinearNorm(heads * self.value, outputs))
        queries = ((side + 1) // 2 if shrink else side) ** 2
        self.bias = nn.Parameter(0.1 * torch.randn(heads, queries, side * side))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        key, value = self.kv(x).view(n, tokens, self.heads, -1).split([self.key, self.value], 3)
        if self.shrink:
            x = x.view(n, self.side, self.side, -1)[:, ::2, ::2].flatten(1, 2)
        query = self.q(x).view(n, -1, self.heads, self.key).transpose(1, 2)
        weights = (query @ key.permute(0, 2, 3, 1)) * self.key**-0.5 + self.bias
        y = (
            (weights.softmax(-1) @ value.transpose(1, 2))
            .transpose(1, 2)
            .reshape(n, -1, self.heads * self.value)
        )
        return self.project(y)


class _Feed(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(_LinearNorm(width, 2 * width), nn.Hardswish(), _LinearNorm(2 * width, width))


class LeViT(nn.Module):
    """LeViT-128S (Graham et al. 2021): Linear, flatten, BatchNorm1d in every attention; a BatchNorm before the head.

    Query and keys have projections of their own, and the attention biases are stored per pair of positions.
    """

    def __init__(
        self,
        widths: Sequence[int] = (128, 256, 384),
        depths: Sequence[int] = (2, 3, 4),
        heads: Sequence[int] = (4, 6, 8),
        key: int = 16,
        size: int = 224,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        channels = [3, *(widths[0] // n for n in (8, 4, 2, 1))]
        stem = [_conv_norm(channels[i], channels[i + 1], 3, 2, relu=False) for i in range(4)]
        self.stem = nn.Sequential(*(m for part in stem[:-1] for m in (part, nn.Hardswish())), stem[-1])
        side = size // 16
        self.stages = nn.ModuleList()
        for place, (width, depth, count) in enumerate(zip(widths, depths, heads, strict=True)):
            for _ in range(depth):
                self.stages += [_Attention(width, width, count, key, 2, side, False), _Feed(width)]
            if place < len(widths) - 1:
                shrink = _Attention(width, widths[place + 1], width // key, key, 4, side, True)
                self.stages += [shrink, _Feed(widths[place + 1])]
                side = (side + 1) // 2
        self.norm, self.head = nn.BatchNorm1d(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for part in self.stages:
            shrinks = isinstance(part, _Attention) and part.shrink
            x = part(x) if shrinks else x + part(x)
        return self.head(self.norm(x.mean(1)))


class ConvE(nn.Module):
    """ConvE on FB15k-237 (Dettmers et al. 2018): embeddings, concat, BatchNorm, conv; tied output layer."""

    def __init__(
        self, entities: int = 14_541, relations: int = 474, height: int = 10, width: int = 20
    ) -> None:
        super().__init__()
        size = height * width
        self.grid = (-1, 1, height, width)
        self.entity, self.relation = nn.Embedding(entities, size), nn.Embedding(relations, size)
        self.norm0, self.conv, self.norm1 = nn.BatchNorm2d(1), nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32 * (2 * height - 2) * (width - 2), size)
        self.norm2, self.bias = nn.BatchNorm1d(size), nn.Parameter(torch.zeros(entities))

    def forward(self, entity: Tensor, relation: Tensor) -> Tensor:
        pair = [self.entity(entity).view(self.grid), self.relation(relation).view(self.grid)]
        x = F.relu(self.norm1(self.conv(self.norm0(torch.cat(pair, 2)))))
        x = F.relu(self.norm2(self.fc(x.flatten(1))))
        return torch.sigmoid(F.linear(x, self.entity.weight, self.bias))


class Tabular(nn.Module):
    """fastai's TabularModel on Adult: embeddings beside BatchNorm(numbers), then Linear, ReLU, BatchNorm, Linear."""

    def __init__(
        self,
        cards: Sequence[int] = (10, 17, 8, 16, 7, 6, 3, 43),
        numbers: int = 6,
        hidden: Sequence[int] = (200, 100),
    ) -> None:
        super().__init__()
        widths = [min(600, round(1.6 * card**0.56)) for card in cards]
        self.embeds = nn.ModuleList(
            nn.Embedding(card, width) for card, width in zip(cards, widths, strict=True)
        )
        self.norm = nn.BatchNorm1d(numbers)
        parts: list[nn.Module] = []
        for inputs, outputs in zip([sum(widths) + numbers, *hidden], hidden, strict=False):
            parts += [nn.Linear(inputs, outputs, bias=False), nn.ReLU(), nn.BatchNorm1d(outputs)]
        self.layers = nn.Sequential(*parts, nn.Linear(hidden[-1], 2))

    def forward(self, names: Tensor, numbers: Tensor) -> Tensor:
        embedded = [embed(names[:, place]) for place, embed in enumerate(self.embeds)]
        return self.layers(torch.cat([*embedded, self.norm(numbers)], 1))

    @staticmethod
    def inputs(batch: int) -> tuple[Tensor, ...]:
        """Indices below the smallest table's size, and numbers."""
        return torch.randint(0, 3, (batch, 8)), torch.randn(batch, 6)


class Tagger(nn.Module):
    """A plain tagger, of no paper: Embedding, BatchNorm1d over the channels, GRU, BatchNorm1d, Linear."""

    def __init__(self, words: int = 10_000, width: int = 128, hidden: int = 128, tags: int = 20) -> None:
        super().__init__()
        self.embed, self.norm1 = nn.Embedding(words, width), nn.BatchNorm1d(width)
        self.gru, self.norm2 = nn.GRU(width, hidden, batch_first=True), nn.BatchNorm1d(hidden)
        self.head = nn.Linear(hidden, tags)

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm1(self.embed(words).transpose(1, 2)).transpose(1, 2)
        x = self.norm2(self.gru(x)[0].transpose(1, 2)).transpose(1, 2)
        return self.head(x)


# ---------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Net:
    """One network at the size of its paper and small, each with what makes a batch of inputs for it."""

    full: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    small: Callable[[], nn.Module]
    small_inputs: Callable[[int], tuple[Tensor, ...]]


NETS = {
    "DenseNet-121": Net(DenseNet, _images(224), partial(DenseNet, (2, 3), 4, 5), _images(32)),
    "pre-activation ResNet-50": Net(PreActResNet, _images(224), partial(PreActResNet, (2, 2), 4, 5), _images(32)),
    "IResNet-50": Net(FaceResNet, _images(112), partial(FaceResNet, (2, 2), 4, 12, 7), _images(12)),
    "x-vector": Net(XVector, _sequence(24, 300), partial(XVector, 4, (6, 6, 6, 6, 10), 5), _sequence(4, 20)),
    "TDNN": Net(TDNN, _sequence(150, 40), partial(TDNN, 4, 6, False, 5), _sequence(19, 4)),
    "TDNN, ReLU first": Net(
        partial(TDNN, late=True), _sequence(150, 40), partial(TDNN, 4, 6, True, 5), _sequence(19, 4)
    ),
    "CREPE": Net(Crepe, _sequence(1024), partial(Crepe, (6, 4, 5), (16, 8, 8), 128, True, 7), _sequence(128)),
    "CREPE, no padding": Net(
        partial(Crepe, kernels=(512, 15, 15, 8, 3, 2), frame=1920, pad=False), _sequence(1920),
        partial(Crepe, (6, 4, 5), (16, 3, 2), 128, False, 7), _sequence(128),
    ),
    "InceptionTime": Net(
        InceptionTime, _sequence(1, 512), partial(InceptionTime, 3, 4, (9, 5, 3), 3), _sequence(1, 24)
    ),
    "Inception v1": Net(GoogLeNet, _images(224), partial(GoogLeNet, 8, 5), _images(64)),
    "airbench94": Net(Airbench, _images(32), partial(Airbench, (4, 6, 8), 5), _images(32)),
    "RepVGG-A0": Net(RepVGG, _images(224), partial(RepVGG, (1, 2, 2), (4, 4, 6), 5), _images(24)),
    "LeViT-128S": Net(
        LeViT, _images(224), partial(LeViT, (16, 32), (1, 1), (2, 2), 4, 64, 5), _images(64)
    ),
    "ShuffleNet v2": Net(
        ShuffleNet, _images(224), partial(ShuffleNet, (2, 2), (4, 8, 12, 16), 5), _images(32)
    ),
    "ConvE": Net(ConvE, _tokens(474, 0, 0), partial(ConvE, 30, 20, 3, 4), _tokens(20, 0, 0)),
    "tabular": Net(Tabular, Tabular.inputs, partial(Tabular, (4, 5, 3, 3, 6, 7, 3, 9), 6, (8, 5)), Tabular.inputs),
    "tagger": Net(Tagger, _tokens(10_000, 32), partial(Tagger, 30, 6, 5, 4), _tokens(30, 7)),
}  # fmt: skip


def build(name: str, gammas: str = "positive", small: bool = False) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network of `NETS` in eval mode, with statistics, and a batch of one for it.

    Args:
        name: a key of `NETS`.
        gammas: ``"positive"``, or ``"mixed"`` for 30 % negative ones. Gammas that are never trained stay as they are.
        small: the small version.
    """
    net = NETS[name]
    torch.manual_seed(0)
    model, inputs = (net.small(), net.small_inputs) if small else (net.full(), net.inputs)
    anchor(model, inputs(8), 0.3 if gammas == "mixed" else 0.0)
    return model, inputs(1)


def anchor(model: nn.Module, inputs: tuple[Tensor, ...], negative: float, moved: bool = True) -> None:
    """Give every BatchNorm the moments of these inputs and this share of negative gammas.

    The moments are moved a little unless told otherwise: through some hundred BatchNorms activations explode of it.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    model.eval()
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(_gammas(norm, negative))
            norm.bias.copy_(0.3 * torch.randn_like(norm.bias))
            norm.momentum, norm.training = 1.0, True
        model(*inputs)
        for norm in norms:
            norm.training = False
            if moved:
                _move(norm)
            norm.running_var.clamp_(min=1e-4)


def _move(norm: _BatchNorm) -> None:
    spread = norm.running_var.sqrt()
    norm.running_mean.add_(0.2 * spread * torch.randn_like(spread))
    norm.running_var.mul_(torch.empty_like(spread).uniform_(0.6, 1.6))


def _gammas(norm: _BatchNorm, negative: float) -> Tensor:
    if not norm.weight.requires_grad:
        return norm.weight
    sign = torch.where(torch.rand_like(norm.weight) < negative, -1.0, 1.0)
    return torch.empty_like(norm.weight).uniform_(0.5, 1.5) * sign
