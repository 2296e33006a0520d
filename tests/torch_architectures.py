"""A dozen small architectures, each with a motif of a public family, and what a complete fold leaves of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def conv_norm(given, made, size=3, **options):
    """Conv without bias, BatchNorm, ReLU: the lecture's motif."""
    options = {"padding": size // 2, "bias": False, **options}
    return nn.Sequential(nn.Conv2d(given, made, size, **options), nn.BatchNorm2d(made), nn.ReLU(inplace=True))


class Bottleneck(nn.Module):
    """He et al. 2015, as the lecture walks through it."""

    def __init__(self, given, width, made, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(given, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, made, 1, bias=False), nn.BatchNorm2d(made)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or given != made:
            self.downsample = nn.Sequential(
                nn.Conv2d(given, made, 1, stride, bias=False), nn.BatchNorm2d(made)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3, 8, 7, stride=2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(Bottleneck(8, 4, 16), Bottleneck(16, 4, 16), Bottleneck(16, 8, 16, 2))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.layers(self.pool(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PreActivation(nn.Module):
    """He et al. 2016: BatchNorm and ReLU before each convolution; the first of each block reads the skip."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bns = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        for block in range(2):
            y = self.convs[2 * block](F.relu(self.bns[2 * block](x)))
            y = self.convs[2 * block + 1](F.relu(self.bns[2 * block + 1](y)))
            x = x + y
        return x


class DenseBlock(nn.Module):
    """Huang et al. 2017."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.ModuleList(nn.BatchNorm2d(4 + 2 * i) for i in range(3))
        self.squeeze = nn.ModuleList(nn.Conv2d(4 + 2 * i, 5, 1, bias=False) for i in range(3))
        self.second = nn.ModuleList(nn.BatchNorm2d(5) for _ in range(3))
        self.grow = nn.ModuleList(nn.Conv2d(5, 2, 3, padding=1, bias=False) for _ in range(3))

    def forward(self, x):
        features = [self.stem(x)]
        for bn1, conv1, bn2, conv2 in zip(self.first, self.squeeze, self.second, self.grow, strict=True):
            x = torch.cat(features, 1)
            features.append(conv2(F.relu(bn2(conv1(F.relu(bn1(x)))))))
        return torch.cat(features, 1)


class InvertedResidual(nn.Module):
    """Sandler et al. 2018."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True),
            nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x)


class Inception(nn.Module):
    """Szegedy et al. 2015: branches, then one BatchNorm over all of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(3, 3, 3, padding=1)
        self.c, self.bn = nn.Conv2d(3, 4, 5, padding=2, bias=False), nn.BatchNorm2d(9)
        self.pooled = nn.Sequential(
            nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
        )

    def forward(self, x):
        return torch.cat(
            [F.relu(self.bn(torch.cat([self.a(x), self.b(x), self.c(x)], 1))), self.pooled(x)], 1
        )


class UNet(nn.Module):
    """Ronneberger et al. 2015, with a BatchNorm behind each transposed convolution."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = conv_norm(3, 4), conv_norm(4, 8)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, 2), nn.BatchNorm2d(4))
        self.last = conv_norm(8, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        return self.head(self.last(torch.cat([one, self.up(two)], 1)))


class Tdnn(nn.Module):
    """Linear over (N, L, C) and BatchNorm1d over (N, C, L), then a dilated convolution."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn1 = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.conv, self.bn2 = nn.Conv1d(6, 6, 3, dilation=2), nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.bn1(self.linear(x).transpose(1, 2))
        return self.bn2(self.conv(x)).relu().mean(-1)


class PointNet(nn.Module):
    """Qi et al. 2017: shared layers over points, a maximum over all of them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6)
        self.conv2, self.bn2 = nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8)
        self.fc, self.bn3 = nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return F.relu(self.bn3(self.fc(torch.max(x, 2, keepdim=True)[0].view(-1, 8))))


class Attention(nn.Module):
    """LeViT's attention (Graham et al. 2021): Linear and BatchNorm1d over flattened tokens, before a ViT's heads."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 4, 4, bias=False), nn.BatchNorm2d(8)
        self.qkv, self.bn = nn.Linear(8, 24, bias=False), nn.BatchNorm1d(24)
        self.out, self.out_bn = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.stem_bn(self.stem(x)).flatten(2).transpose(1, 2)
        n, length, _ = x.shape
        qkv = self.bn(self.qkv(x).flatten(0, 1)).view(n, length, 2, 12)
        q, k, v = qkv.split([4, 4, 4], 3)
        q, k, v = (part.permute(0, 2, 1, 3) for part in (q, k, v))
        y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(n * length, 8)
        return x + self.out_bn(self.out(F.hardswish(y))).view_as(x)


class Generator(nn.Module):
    """Radford et al. 2016: from a vector to an image."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn0 = nn.Linear(7, 8 * 2 * 2), nn.BatchNorm1d(32)
        self.up1, self.bn1 = nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.up2 = nn.ConvTranspose2d(4, 3, 4, 2, 1)

    def forward(self, z):
        x = F.relu(self.bn0(self.fc(z))).view(-1, 8, 2, 2)
        return torch.tanh(self.up2(F.relu(self.bn1(self.up1(x)))))


class RepVgg(nn.Module):
    """Ding et al. 2021: a 3x3, a 1x1 and a bare BatchNorm side by side."""

    def __init__(self):
        super().__init__()
        self.three = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.one = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.identity = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.three(x) + self.one(x) + self.identity(x))


class Squeeze(nn.Module):
    """Hu et al. 2018: a gate computed from the value that it scales."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.down, self.up = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


IMAGES = torch.randn(2, 3, 16, 16)
WIDE = torch.randn(2, 4, 8, 8)

ARCHITECTURES = {
    "resnet": (ResNet, IMAGES, set()),
    "preactivation": (PreActivation, IMAGES, {"bns.0", "bns.2"}),
    "densenet": (DenseBlock, IMAGES, {"first.0", "first.1", "first.2"}),
    "inverted residual": (InvertedResidual, WIDE, set()),
    "inception": (Inception, IMAGES, set()),
    "unet": (UNet, IMAGES, set()),
    "tdnn": (Tdnn, torch.randn(3, 9, 5), set()),
    "pointnet": (PointNet, torch.randn(2, 3, 10), set()),
    "attention": (Attention, IMAGES, set()),
    "generator": (Generator, torch.randn(2, 7), set()),
    "repvgg": (RepVgg, WIDE, set()),
    "squeeze": (Squeeze, IMAGES, set()),
}
"""By name: the class, inputs for it, and the BatchNorms that no algebra removes."""
