"""Networks that are trained with more branches than they are to be used with, each beside its authors' deployed form.

The blocks are written as their authors write them, BatchNorms in place, and have a `reparameterize()` that returns what
they are to become: by hand from the paper and with nothing of bnfold, it says how few operators are enough and what
they compute. `BRANCHES` has the networks by name, as `nets.NETS` has its own. What the papers have besides (attention,
distillation, normalised responses) is left out where it has no part in this.

    sum of branches: the sum of their kernels, brought to one size about their centres   (Ding et al. 2021)
    BatchNorm behind a kernel K with bias b: s K and beta + s (b - mean), with s = gamma / sqrt(var + eps)
    1x1 before or behind kxk: the product of their matrices, offset by offset
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.nets import Net, _images, _tokens, anchor

Sizes = Sequence[int]
Pair = tuple[Tensor, Tensor]
"""The kernel `(outputs, inputs / groups, height, width)` and the bias of a convolution, or those of a Linear."""


# ---------------------------------------------------------------- the algebra of the papers


def _with_norm(kernel: Tensor, bias: Tensor | float, norm: nn.Module) -> Pair:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    by_output = scale.reshape(-1, *[1] * (kernel.ndim - 1))
    return kernel * by_output, norm.bias + scale * (bias - norm.running_mean)


def _identity(channels: int, groups: int, like: Tensor) -> Tensor:
    return torch.eye(channels // groups).repeat(groups, 1)[:, :, None, None].to(like)


def _total(parts: Sequence[Pair]) -> Pair:
    height, width = (max(kernel.shape[axis] for kernel, _ in parts) for axis in (2, 3))
    grown = (F.pad(k, [(width - k.shape[3]) // 2] * 2 + [(height - k.shape[2]) // 2] * 2) for k, _ in parts)
    return sum(grown), sum(bias for _, bias in parts)


def _product(first: Pair, second: Pair, groups: int = 1) -> Pair:
    """The second behind the first, one of them 1x1, over what is padded with the first one's bias."""
    a, b = (k.reshape(groups, -1, *k.shape[1:]) for k in (first[0], second[0]))
    through = torch.einsum("gomhw,gm->go", b, first[1].reshape(groups, -1)).flatten()
    return torch.einsum("gmihw,gomhw->goihw", a, b).flatten(0, 1), through + second[1]


def _put(layer: nn.Module, pair: Pair) -> nn.Module:
    layer.weight, layer.bias = (nn.Parameter(part.detach().clone()) for part in pair)
    return layer


def _conv(pair: Pair, stride: int = 1, groups: int = 1, pad: bool = True) -> nn.Module:
    outputs, inputs, *size = pair[0].shape
    padding = [n // 2 * pad for n in size]
    return _put(nn.Conv2d(inputs * groups, outputs, size, stride, padding, groups=groups), pair)


def _linear(pair: Pair) -> nn.Module:
    return _put(nn.Linear(*reversed(pair[0].shape)), pair)


def reparameterize(model: nn.Module) -> nn.Module:
    """A copy of a model in which every block that has a deployed form is in it."""
    model = copy.deepcopy(model)
    for name, child in model.named_children():
        own = child.reparameterize if hasattr(child, "reparameterize") else partial(reparameterize, child)
        setattr(model, name, own())
    return model


# ---------------------------------------------------------------- what the networks have in common


class _Net(nn.Sequential):
    def reparameterize(self) -> nn.Module:
        """The deployed form of the whole network."""
        return reparameterize(self)


class _ConvNorm(nn.Sequential):
    """A convolution that keeps the size where its stride is 1, and its BatchNorm."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Sizes, stride: int = 1, groups: int = 1, dilation: int = 1
    ) -> None:
        padding = tuple(n // 2 * dilation for n in kernel)
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs))
        self.stride, self.groups, self.dilation = stride, groups, dilation

    def merge(self) -> Pair:
        taps, step = self[0].weight, self.dilation
        kernel = taps.new_zeros(*taps.shape[:2], *((n - 1) * step + 1 for n in taps.shape[2:]))
        kernel[:, :, ::step, ::step] = taps
        return _with_norm(kernel, 0.0, self[1])

    def reparameterize(self) -> nn.Module:
        return _conv(self.merge(), self.stride, self.groups)


class _Residual(nn.Module):
    """`x + scale * m(x)`, the scale one number per channel where there is one (Touvron et al. 2021)."""

    def __init__(self, module: nn.Module, channels: int = 0) -> None:
        super().__init__()
        self.module, self.scale = (
            module,
            nn.Parameter(1e-5 * torch.ones(channels, 1, 1)) if channels else None,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        return x + (y if self.scale is None else self.scale * y)


class _SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018)."""

    def __init__(self, channels: int, narrow: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, narrow, 1), nn.Conv2d(narrow, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


def _places(blocks: Sizes, widths: Sizes, channels: int) -> Iterator[tuple[int, int, int]]:
    """Inputs, outputs and stride of every block; the first of a stage halves the size."""
    for count, width in zip(blocks, widths, strict=True):
        for place in range(count):
            yield channels, width, 1 if place else 2
            channels = width


def _classifier(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


# ---------------------------------------------------------------- branches side by side


class _MobileOneBlock(nn.Module):
    """Any number of kxk convs, a 1x1 conv and the input, each with its BatchNorm; what is not there adds a zero."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1,
        branches: int = 1, scale: bool = True, last: Sequence[nn.Module] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        branch = partial(_ConvNorm, inputs, outputs, stride=stride, groups=groups)
        self.stride, self.groups, self.last = stride, groups, nn.Sequential(*last)
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.scale = branch((1, 1)) if scale and kernel > 1 else None
        self.convs = nn.ModuleList(branch((kernel, kernel)) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.skip is None else self.skip(x)
        out = (0 if self.scale is None else self.scale(x)) + skip
        for conv in self.convs:
            out += conv(x)
        return self.last(out)

    def merge(self) -> Pair:
        parts = [conv.merge() for conv in (self.scale, *self.convs) if conv is not None]
        if self.skip is not None:
            weight = self.skip.weight
            parts.append(_with_norm(_identity(len(weight), self.groups, weight), 0.0, self.skip))
        return _total(parts)

    def reparameterize(self) -> nn.Module:
        return nn.Sequential(_conv(self.merge(), self.stride, self.groups), self.last)


class MobileOne(_Net):
    """MobileOne-S0 (Vasu et al. 2023): depthwise and pointwise blocks, four branches each, and S4's gate at the end."""

    def __init__(
        self, blocks: Sizes = (2, 8, 10, 1), widths: Sizes = (48, 48, 128, 256, 1024), branches: int = 4
    ) -> None:
        block = partial(_MobileOneBlock, branches=branches)
        parts: list[nn.Module] = [_MobileOneBlock(3, widths[0], 3, 2, last=[nn.ReLU()])]
        for inputs, outputs, stride in _places(blocks, widths[1:], widths[0]):
            gate = [_SqueezeExcite(outputs, outputs // 4)] if outputs == widths[-1] else []
            parts += [
                block(inputs, inputs, 3, stride, inputs, last=[nn.ReLU()]),
                block(inputs, outputs, 1, last=[*gate, nn.ReLU()]),
            ]
        super().__init__(*parts, *_classifier(widths[-1], 1000))


class _RepVGGBlock(_MobileOneBlock):
    """The sum in the order, and with the zero, of its authors' code."""

    def forward(self, x: Tensor) -> Tensor:
        identity = 0 if self.skip is None else self.skip(x)
        return self.last(self.convs[0](x) + self.scale(x) + identity)


class RepVGGGroups(_Net):
    """RepVGG-B1g4 (Ding et al. 2021): 3x3, 1x1 and identity; every other layer in groups."""

    def __init__(
        self, blocks: Sizes = (1, 4, 6, 16, 1), widths: Sizes = (64, 128, 256, 512, 2048), groups: int = 4
    ) -> None:
        block = partial(_RepVGGBlock, kernel=3, last=[nn.ReLU()])
        parts = [
            block(inputs, outputs, stride=stride, groups=groups if number % 2 else 1)
            for number, (inputs, outputs, stride) in enumerate(_places(blocks, widths, 3))
        ]
        super().__init__(*parts, *_classifier(widths[-1], 1000))


class _Sum(nn.Module):
    """Convs of one stride, each with its BatchNorm, and, where asked for, a BatchNorm behind the sum."""

    def __init__(self, *convs: _ConvNorm, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.convs, self.norm = nn.ModuleList(convs), nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        out = self.convs[0](x)
        for conv in self.convs[1:]:
            out = out + conv(x)
        return self.norm(out)

    def reparameterize(self) -> nn.Module:
        pair, first = _total([conv.merge() for conv in self.convs]), self.convs[0]
        plain = isinstance(self.norm, nn.Identity)
        return _conv(pair if plain else _with_norm(*pair, self.norm), first.stride, first.groups)


class ACNet(_Net):
    """ACNet's cuda-convnet for CIFAR-10 (Ding et al. 2019): 5x5, 5x1 and 1x5, each with its BatchNorm."""

    def __init__(self, widths: Sizes = (32, 32, 64), size: int = 32) -> None:
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise((3, *widths)):
            convs = (_ConvNorm(inputs, outputs, shape) for shape in ((5, 5), (5, 1), (1, 5)))
            parts += [_Sum(*convs), nn.ReLU(), nn.MaxPool2d(2)]
        flat = widths[-1] * (size // 2 ** len(widths)) ** 2
        super().__init__(*parts, nn.Flatten(), nn.Linear(flat, 64), nn.ReLU(), nn.Linear(64, 10))


class UniRepLKNet(_Net):
    """Blocks of UniRepLKNet (Ding et al. 2024): depthwise 13x13 and dilated convs, a BatchNorm behind their sum."""

    def __init__(
        self, blocks: int = 6, width: int = 160, kernel: int = 13,
        dilated: Sequence[Sizes] = ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    ) -> None:  # fmt: skip
        parts: list[nn.Module] = [nn.Conv2d(3, width, 16, 16)]
        for _ in range(blocks):
            feed = nn.Conv2d(width, 4 * width, 1), nn.GELU(), _ConvNorm(4 * width, width, (1, 1))
            depthwise = partial(_ConvNorm, width, width, groups=width)
            convs = (depthwise((size, size), dilation=step) for size, step in ((kernel, 1), *dilated))
            mixer = _Sum(*convs, norm=nn.BatchNorm2d(width)), _SqueezeExcite(width, width // 4)
            parts.append(_Residual(nn.Sequential(*mixer, *feed), width))
        super().__init__(*parts, *_classifier(width, 1000))


# ---------------------------------------------------------------- with the input itself among the branches


class _RepMixer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        block = partial(_MobileOneBlock, channels, channels, 3, groups=channels)
        self.norm, self.mixer = block(branches=0, scale=False), block()
        self.layer_scale = nn.Parameter(1e-5 * torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))

    def reparameterize(self) -> nn.Module:
        scale, (kernel, bias) = self.layer_scale, self.norm.merge()
        kernel, bias = _total([self.mixer.merge(), (-kernel, -bias)])
        identity = _identity(len(scale), len(scale), scale)
        pair = _total([(scale[:, None] * kernel, scale.flatten() * bias), (identity, 0.0)])
        return _conv(pair, groups=len(scale))


class _PositionalEncoding(nn.Module):
    """Conditional positional encoding (Chu et al. 2023)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pos = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.pos(x) + x

    def reparameterize(self) -> nn.Module:
        kernel, bias = self.pos.weight, self.pos.bias
        pair = _total([(kernel, bias), (_identity(len(bias), len(bias), kernel), 0.0)])
        return _conv(pair, groups=len(bias))


class FastViT(_Net):
    """FastViT-SA12 (Vasu et al. 2023) with RepMixers in every stage; positional encoding where it has attention."""

    def __init__(self, blocks: Sizes = (2, 2, 6, 2), width: int = 64, ratio: int = 4) -> None:
        block, stem = partial(_MobileOneBlock, last=[nn.GELU()]), (width, width)
        parts: list[nn.Module] = [block(3, width, 3, 2), block(*stem, 3, 2, width), block(*stem, 1)]
        for stage, count in enumerate(blocks):
            if stage:
                down = (_ConvNorm(width, 2 * width, (size, size), 2, width) for size in (7, 3))
                parts += [_Sum(*down), block(2 * width, 2 * width, 1)]
                width *= 2
            parts += [_PositionalEncoding(width)] if stage == len(blocks) - 1 else []
            for _ in range(count):
                wide = nn.Conv2d(width, ratio * width, 1), nn.GELU(), nn.Conv2d(ratio * width, width, 1)
                feed = nn.Sequential(_ConvNorm(width, width, (7, 7), groups=width), *wide)
                parts += [_RepMixer(width), _Residual(feed, width)]
        last = [_SqueezeExcite(2 * width, width // 4), nn.GELU()]
        parts.append(_MobileOneBlock(width, 2 * width, 3, groups=width, last=last))
        super().__init__(*parts, *_classifier(2 * width, 1000))


class _RepVGGDW(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _ConvNorm(channels, channels, (3, 3), groups=channels)
        self.conv1, self.bn = nn.Conv2d(channels, channels, 1, groups=channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.conv(x) + self.conv1(x)) + x)

    def reparameterize(self) -> nn.Module:
        pair = _total([self.conv.merge(), (self.conv1.weight + 1, self.conv1.bias)])
        return _conv(_with_norm(*pair, self.bn), groups=self.conv.groups)


class _TwoHeads(nn.Module):
    """The mean of a classifier and of one for distillation, each a BatchNorm and a Linear."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(channels), nn.Linear(channels, classes)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.heads
        return (first(x) + second(x)) / 2

    def reparameterize(self) -> nn.Module:
        parts = []
        for norm, linear in self.heads:
            scale, shift = _with_norm(torch.eye(len(norm.weight)).to(norm.weight), 0.0, norm)
            parts.append((linear.weight @ scale, linear.weight @ shift + linear.bias))
        return _linear(tuple(sum(part) / 2 for part in zip(*parts, strict=True)))


class RepViT(_Net):
    """RepViT-M0.9 (Wang et al. 2024): `bn(conv(x) + conv1(x) + x)`, a gate in every other block, two heads."""

    def __init__(self, blocks: Sizes = (3, 3, 15, 2), width: int = 48) -> None:
        half = width // 2
        parts: list[nn.Module] = [_ConvNorm(3, half, (3, 3), 2), nn.GELU(), _ConvNorm(half, width, (3, 3), 2)]
        for stage, count in enumerate(blocks):
            if stage:
                down = _ConvNorm(width, width, (3, 3), 2, width), _ConvNorm(width, 2 * width, (1, 1))
                width *= 2
                parts += [*down, self._feed(width)]
            for place in range(count):
                gate = [] if place % 2 else [_SqueezeExcite(width, width // 4)]
                parts += [_RepVGGDW(width), *gate, self._feed(width)]
        super().__init__(*parts, *_classifier(width, 1000)[:-1], _TwoHeads(width, 1000))

    @staticmethod
    def _feed(width: int) -> nn.Module:
        wide, narrow = _ConvNorm(width, 2 * width, (1, 1)), _ConvNorm(2 * width, width, (1, 1))
        return _Residual(nn.Sequential(wide, nn.GELU(), narrow))


# ---------------------------------------------------------------- one after another


class _NormAndPad(nn.Module):
    """A BatchNorm, then a border of what it gives for zero."""

    def __init__(self, channels: int, pad: int) -> None:
        super().__init__()
        self.bn, self.pad = nn.BatchNorm2d(channels), pad

    def forward(self, x: Tensor) -> Tensor:
        y, pad = F.pad(self.bn(x), [self.pad] * 4), self.pad
        scale = self.bn.weight.detach() / torch.sqrt(self.bn.running_var + self.bn.eps)
        value = (self.bn.bias.detach() - self.bn.running_mean * scale).view(1, -1, 1, 1)
        y[:, :, :pad, :], y[:, :, -pad:, :] = value, value
        y[:, :, :, :pad], y[:, :, :, -pad:] = value, value
        return y


class _IdentityConv(nn.Conv2d):
    """A 1x1 conv by the identity and a weight that starts from zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def actual(self) -> Tensor:
        return self.weight + _identity(self.out_channels, self.groups, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.actual(), None, groups=self.groups)


class _DiverseBranchBlock(nn.Module):
    """kxk, 1x1, 1x1 and kxk, 1x1 and average; where it is depthwise kxk, 1x1 and kxk, average."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, kernel: int = 3) -> None:
        super().__init__()
        depthwise, pad, conv = groups == outputs, kernel // 2, partial(nn.Conv2d, groups=groups, bias=False)
        self.stride, self.groups = stride, groups
        self.origin = _ConvNorm(inputs, outputs, (kernel, kernel), stride, groups)
        self.point = None if depthwise else _ConvNorm(inputs, outputs, (1, 1), stride, groups)
        front = [] if depthwise else [conv(inputs, outputs, 1), _NormAndPad(outputs, pad)]
        pool = nn.AvgPool2d(kernel, stride, pad if depthwise else 0)
        self.average = nn.Sequential(*front, pool, nn.BatchNorm2d(outputs))
        middle = 2 * inputs if depthwise else inputs
        first = (
            conv(inputs, middle, 1)
            if depthwise
            else _IdentityConv(inputs, middle, 1, groups=groups, bias=False)
        )
        second = conv(middle, outputs, kernel, stride)
        self.pair = nn.Sequential(first, _NormAndPad(middle, pad), second, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin(x)
        if self.point is not None:
            out += self.point(x)
        out += self.average(x)
        out += self.pair(x)
        return F.relu(out)

    def reparameterize(self) -> nn.Module:
        first, padded, second, last = self.pair
        kernel = first.actual() if isinstance(first, _IdentityConv) else first.weight
        pair = _product(_with_norm(kernel, 0.0, padded.bn), (second.weight, 0.0), self.groups)
        parts = [self.origin.merge(), _with_norm(*pair, last)]
        *front, pool, norm = self.average
        mean = _identity(len(norm.weight), self.groups, norm.weight).repeat(1, 1, *[pool.kernel_size] * 2)
        average = mean / pool.kernel_size**2, 0.0
        if front:
            average = _product(_with_norm(front[0].weight, 0.0, front[1].bn), average, self.groups)
            parts.append(self.point.merge())
        parts.append(_with_norm(*average, norm))
        return nn.Sequential(_conv(_total(parts), self.stride, self.groups), nn.ReLU())


class DiverseBranches(_Net):
    """Diverse Branch Blocks (Ding et al. 2021) in a MobileNet; a conv's bias pads what it gives to the next."""

    def __init__(self, widths: Sizes = (32, 64, 128, 256, 512)) -> None:
        parts: list[nn.Module] = [_DiverseBranchBlock(3, widths[0], 2)]
        for inputs, outputs in pairwise(widths):
            point = _ConvNorm(inputs, outputs, (1, 1)), nn.ReLU()
            parts += [_DiverseBranchBlock(inputs, inputs, 2, inputs), *point]
            parts.append(_DiverseBranchBlock(outputs, outputs, groups=2))
        super().__init__(*parts, *_classifier(widths[-1], 1000))


class _LinearBlock(nn.Module):
    """kxk, 1x1, 1x1 and kxk, 1x1 and average, depthwise and 1x1, each scaled per channel; one BatchNorm behind."""

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int = 3) -> None:
        super().__init__()
        conv, self.stride = partial(nn.Conv2d, bias=False), stride
        wide, pool = (
            partial(conv, stride=stride, padding=kernel // 2),
            nn.AvgPool2d(kernel, stride, kernel // 2),
        )
        self.branches = nn.ModuleList([
            wide(inputs, outputs, kernel), conv(inputs, outputs, 1, stride),
            nn.Sequential(conv(inputs, inputs, 1), wide(inputs, outputs, kernel)),
            nn.Sequential(conv(inputs, outputs, 1), pool),
            nn.Sequential(wide(inputs, 4 * inputs, kernel, groups=inputs), conv(4 * inputs, outputs, 1)),
        ])  # fmt: skip
        self.scales, self.norm = nn.Parameter(torch.full((5, outputs, 1, 1), 0.5)), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(
            self.norm(sum(scale * part(x) for scale, part in zip(self.scales, self.branches, strict=True)))
        )

    def reparameterize(self) -> nn.Module:
        whole, point, pair, average, separable = self.branches
        inputs, size = whole.in_channels, whole.kernel_size
        matrices = separable[1].weight.reshape(-1, inputs, 4)
        kernels = [
            whole.weight, point.weight,
            torch.einsum("miab,omhw->oihw", pair[0].weight, pair[1].weight),
            average[0].weight.repeat(1, 1, *size) / (size[0] * size[1]),
            torch.einsum("oim,imhw->oihw", matrices, separable[0].weight.reshape(inputs, 4, *size)),
        ]  # fmt: skip
        parts = [(scale[:, None] * kernel, 0.0) for scale, kernel in zip(self.scales, kernels, strict=True)]
        return nn.Sequential(_conv(_with_norm(*_total(parts), self.norm), self.stride), nn.ReLU())


class LinearBlocks(_Net):
    """The linear blocks of OREPA (Hu et al. 2022): Diverse Branch Blocks with no BatchNorm in between."""

    def __init__(self, widths: Sizes = (32, 64, 128, 256)) -> None:
        blocks = (_LinearBlock(inputs, outputs, 2) for inputs, outputs in pairwise((3, *widths)))
        super().__init__(*blocks, *_classifier(widths[-1], 1000))


class _Expanded(nn.Sequential):
    """1x1, 3x3, 1x1 without padding, and a BatchNorm."""

    def __init__(self, inputs: int, outputs: int, rate: int) -> None:
        wide = (inputs if inputs == 3 else rate * inputs), rate * outputs
        convs = nn.Conv2d(inputs, wide[0], 1), nn.Conv2d(*wide, 3), nn.Conv2d(wide[1], outputs, 1)
        super().__init__(*convs, nn.BatchNorm2d(outputs))

    def reparameterize(self) -> nn.Module:
        *convs, norm = self
        first, second, third = ((conv.weight, conv.bias) for conv in convs)
        return _conv(_with_norm(*_product(_product(first, second), third), norm), pad=False)


class _Linears(nn.Sequential):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes)))

    def reparameterize(self) -> nn.Module:
        first, *others = self
        weight, bias = first.weight, first.bias
        for linear in others:
            weight, bias = linear.weight @ weight, linear.weight @ bias + linear.bias
        return _linear((weight, bias))


class ExpandNet(_Net):
    """ExpandNet-CL+FC (Guo et al. 2020) for CIFAR-10: three convs for one and three Linears for one, none padded."""

    def __init__(self, widths: Sizes = (8, 16, 32), rate: int = 4) -> None:
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise((3, *widths)):
            parts += [_Expanded(inputs, outputs, rate), nn.ReLU(), nn.MaxPool2d(2)]
        flat, hidden = 4 * widths[-1], 2 * widths[-1]
        dense = _Linears(flat, rate * flat, rate * hidden, hidden)
        super().__init__(*parts, nn.Flatten(), dense, nn.ReLU(), nn.Linear(hidden, 10))


class _LoRALinear(nn.Module):
    """`W x + b + scale B A dropout(x)`, B from zero."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float = 16.0) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout = nn.Linear(inputs, outputs), alpha / rank, nn.Dropout(0.05)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x))) * self.scaling

    def reparameterize(self) -> nn.Module:
        return _linear((self.base.weight + self.scaling * self.up.weight @ self.down.weight, self.base.bias))


class LoRA(_Net):
    """RoBERTa-base's feed-forward layers with LoRA (Hu et al. 2022), and a low-rank last layer (Sainath et al. 2013).

    One Linear in place of the last two would be dearer, so its own form leaves them. There is no BatchNorm.
    """

    def __init__(
        self, width: int = 768, wide: int = 3072, rank: int = 8, layers: int = 2, words: int = 10_000
    ) -> None:
        parts: list[nn.Module] = [nn.Embedding(words, width)]
        for _ in range(layers):
            feed = _LoRALinear(width, wide, rank), nn.GELU(), _LoRALinear(wide, width, rank)
            parts += [_Residual(nn.Sequential(*feed)), nn.LayerNorm(width)]
        super().__init__(*parts, nn.Linear(width, width // 4, bias=False), nn.Linear(width // 4, words))


# ---------------------------------------------------------------- all of them


BRANCHES = {
    "MobileOne-S0": Net(MobileOne, _images(224), partial(MobileOne, (1, 2), (4, 6, 8), 2), _images(24)),
    "RepVGG-B1g4": Net(
        RepVGGGroups, _images(224), partial(RepVGGGroups, (1, 2, 2), (4, 4, 8), 2), _images(24)
    ),
    "ACNet": Net(ACNet, _images(32), partial(ACNet, (4, 6), 16), _images(16)),
    "UniRepLKNet": Net(
        UniRepLKNet, _images(224), partial(UniRepLKNet, 2, 16, 7, ((3, 1), (3, 2), (3, 3))), _images(96)
    ),
    "FastViT-SA12": Net(FastViT, _images(256), partial(FastViT, (1, 1), 4, 2), _images(32)),
    "RepViT-M0.9": Net(RepViT, _images(224), partial(RepViT, (2, 1), 8), _images(32)),
    "Diverse Branch Block": Net(
        DiverseBranches, _images(224), partial(DiverseBranches, (4, 6)), _images(16)
    ),
    "OREPA": Net(LinearBlocks, _images(224), partial(LinearBlocks, (4, 6)), _images(16)),
    "ExpandNet": Net(ExpandNet, _images(32), partial(ExpandNet, (4, 4, 6), 2), _images(32)),
    "LoRA": Net(LoRA, _tokens(10_000, 128), partial(LoRA, 8, 12, 2, 1, 30), _tokens(30, 7)),
}  # fmt: skip


def build(name: str, gammas: str = "positive", small: bool = False) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network of `BRANCHES` in eval mode, with statistics, and a batch of one for it, as `nets.build` makes them."""
    net = BRANCHES[name]
    torch.manual_seed(0)
    model, inputs = (net.small(), net.small_inputs) if small else (net.full(), net.inputs)
    stir(model)
    anchor(model, inputs(8), 0.3 if gammas == "mixed" else 0.0, moved=False)
    return model, inputs(1)


def stir(model: nn.Module) -> None:
    """Move what training starts from a constant (scales of 1e-5, adapters of 0): every branch has to show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                parameter.add_(0.3 * torch.randn_like(parameter))
