"""Random torch modules, folded without verification and judged from outside.

A module computes a list of values, each step from earlier ones; layers are shared, tied, hooked, hidden behind
arguments and sizes, and written to in place. A fold is judged in float64 on other numbers, in batches of 1, 2, 3 and
5, in two other sizes where the module takes them, and with the flag set and not. A report that begins with a limit
of the fold is believed; one that notes what it could not read is, about other sizes and the other flag.

Not judged: a way that code goes at one size alone, if it is none of those that the fold tried (see
`bnfold.torch.trials`). Not drawn: recurrent layers, training mode, scripted and compiled code, other devices, sparse
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bnfold.torch import fold
from tests.fuzz.drawing import Draw, Features, Unsuitable, apply
from tests.torch_models import randomise

CHANNELS = 4

Values = list[Tensor]
Part = Callable[["Drawn", Values, bool], Tensor]
"""One step of a forward pass: the module, the values so far, the flag of the call -> one value more."""


class Drawn(nn.Module):
    """Runs its parts in order; its outputs are the last value and those that are tapped.

    Attributes:
        ways: which way its code has gone, this module's or a copy's, where it asks for one size and no other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.parts: list[Part] = []
        self.taps: list[int] = []
        self.ways: set[tuple[int, bool]] = set()

    def forward(self, x: Tensor, flag: bool = True) -> list[Tensor]:
        values = [x]
        for part in self.parts:
            values.append(part(self, values, flag))
        return [values[-1], *(values[place % len(values)] for place in self.taps)]


class Sketch:
    """A module while it is drawn. Every value is `(batch, 4, ...)` of one rank."""

    def __init__(self, choices: Random) -> None:
        self.random = choices
        self.rank = choices.choice((4, 4, 4, 3))
        self.module = Drawn()
        self.straight = False

    def take(self, random: Random) -> None:
        self.random = random

    def choose(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def seeded(self, layer: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(self.random.randrange(2**31))
        return layer()

    def hold(self, layer: nn.Module) -> int:
        """Give the module a layer; its place among the layers."""
        self.module.layers.append(layer)
        return len(self.module.layers) - 1

    def norm(self) -> int:
        kind = nn.BatchNorm2d if self.rank == 4 else nn.BatchNorm1d
        layer = randomise(kind(CHANNELS, affine=self.chance(0.9)), self.random.randrange(2**31))
        with torch.no_grad():
            if layer.weight is not None and self.chance(0.5):
                layer.weight.abs_()
        return self.hold(layer)

    def conv(self) -> int:
        kind = nn.Conv2d if self.rank == 4 else nn.Conv1d
        kernel, mode = self.choose(1, 3, 3), self.choose("zeros", "zeros", "reflect")
        more = {"groups": self.choose(1, 1, 2, 4), "bias": self.chance(0.6), "padding": kernel // 2}
        return self.hold(self.seeded(lambda: kind(CHANNELS, CHANNELS, kernel, padding_mode=mode, **more)))

    def earlier(self, *kinds: type[nn.Module]) -> int:
        """A layer that is there already.

        Raises:
            Unsuitable: there is none.
        """
        places = [place for place, layer in enumerate(self.module.layers) if isinstance(layer, kinds)]
        if not places:
            raise Unsuitable
        return int(self.choose(*places))

    def value(self) -> int:
        """Which value to read, counted from the end; the last one in a chain."""
        return -1 if self.straight else int(self.choose(-1, -1, -1, -2, -3))

    def step(self, compute: Callable[[Drawn, Tensor], Tensor]) -> None:
        """A part that computes a value from one."""
        place = self.value()
        self.module.parts.append(lambda m, values, flag: compute(m, read(values, place)))


def read(values: Values, place: int) -> Tensor:
    return values[max(place, -len(values))]


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


# ---------------------------------------------------------------- layers


def norm(s: Sketch) -> None:
    place = s.norm()
    s.step(lambda m, x: m.layers[place](x))


def conv(s: Sketch) -> None:
    place = s.conv()
    s.step(lambda m, x: m.layers[place](x))


def conv_norm(s: Sketch) -> None:
    first, second = s.conv(), s.norm()
    s.step(lambda m, x: m.layers[second](m.layers[first](x)))


def again(s: Sketch) -> None:
    """A layer that is called once more."""
    place = s.earlier(*CONVOLUTIONS, *NORMS)
    s.step(lambda m, x: m.layers[place](x))


def tied(s: Sketch) -> None:
    """A convolution with the weight of an earlier one."""
    place = s.conv()
    other = s.earlier(*CONVOLUTIONS)
    weight = s.module.layers[other].weight
    if isinstance(weight, nn.Parameter) and weight.shape == s.module.layers[place].weight.shape:
        s.module.layers[place].weight = weight
    s.step(lambda m, x: m.layers[place](x))


def functional(s: Sketch) -> None:
    """A BatchNorm called as a function, a convolution likewise."""
    first, second = s.conv(), s.norm()
    rank = s.rank

    def run(m: Drawn, x: Tensor) -> Tensor:
        c, n = m.layers[first], m.layers[second]
        call = F.conv2d if rank == 4 else F.conv1d
        h = call(x, c.weight, c.bias, padding=c.padding, groups=c.groups)
        return F.batch_norm(h, n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)

    s.step(run)


class Bank(nn.Module):
    """A weight, and mostly a bias, of twice as many channels, of which code takes parts."""

    def __init__(self, rank: int, kernel: int, biased: bool) -> None:
        super().__init__()
        wide = 2 * CHANNELS
        self.weight = nn.Parameter(torch.randn(wide, wide, *[kernel] * (rank - 2)))
        self.bias = nn.Parameter(torch.randn(wide)) if biased else None


def part(s: Sketch) -> None:
    """A convolution by a part of a bank, of which others may take the same, another, or one that overlaps."""
    banks = [place for place, layer in enumerate(s.module.layers) if isinstance(layer, Bank)]
    new = not banks or s.chance(0.4)
    kernel, biased = s.choose(1, 3), s.chance(0.6)
    place = s.hold(s.seeded(lambda: Bank(s.rank, kernel, biased))) if new else int(s.choose(*banks))
    halves = (slice(0, 4), slice(4, 8), slice(0, 8, 2), slice(1, 8, 2), slice(2, 6))
    rows, columns, passes = s.choose(*halves), s.choose(*halves), s.chance(0.8)
    second = s.norm() if s.chance(0.8) else None

    def run(m: Drawn, x: Tensor) -> Tensor:
        bank: Any = m.layers[place]
        call = F.conv2d if bank.weight.dim() == 4 else F.conv1d
        bias = bank.bias[rows] if passes and bank.bias is not None else None
        h = call(x, bank.weight[rows, columns], bias, padding=bank.weight.shape[-1] // 2)
        return h if second is None else m.layers[second](h)

    s.step(run)


def by_hand(s: Sketch) -> None:
    """The formula of a BatchNorm, in some spelling, written on its buffers or on those of one that is called, too."""
    first, second = s.conv(), s.norm() if s.chance(0.7) else s.earlier(*NORMS)
    spelling = s.choose("divided", "inverse", "ahead", "at once")

    def run(m: Drawn, x: Tensor) -> Tensor:
        n = m.layers[second]
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean, variance = n.running_mean.view(shape), n.running_var.view(shape) + n.eps
        gain, bias = (None if t is None else t.view(shape) for t in (n.weight, n.bias))
        h = m.layers[first](x)
        if spelling == "ahead" and gain is not None:
            scale = gain / variance.sqrt()
            return h * scale + (bias - mean * scale)
        y = (h - mean) * variance**-0.5 if spelling == "inverse" else (h - mean) / torch.sqrt(variance)
        if gain is None:
            return y
        return torch.addcmul(bias, y, gain) if spelling == "at once" else y * gain + bias

    s.step(run)


class Standardised(nn.Conv2d):
    """A convolution that computes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.square().mean() + 0.1).sqrt()
        return self._conv_forward(x, weight, self.bias)


def computed(s: Sketch) -> None:
    """A convolution that computes its weight, now and then from the weight of another one, and a BatchNorm."""
    if s.rank != 4:
        raise Unsuitable
    more = {"bias": s.chance(0.6), "padding": 1, "groups": s.choose(1, 2)}
    place, norm = s.hold(s.seeded(lambda: Standardised(CHANNELS, CHANNELS, 3, **more))), s.norm()
    if s.chance(0.2):
        other = s.module.layers[s.earlier(nn.Conv2d)].weight
        if isinstance(other, nn.Parameter) and other.shape == s.module.layers[place].weight.shape:
            s.module.layers[place].weight = other
    s.step(lambda m, x: m.layers[norm](m.layers[place](x)))


def parts(s: Sketch) -> None:
    """Two linear layers whose weights and biases are parts of one, apart or not, and a BatchNorm between them."""
    place, norm = s.hold(s.seeded(lambda: nn.Linear(CHANNELS, 3 * CHANNELS))), s.norm()
    starts, whole = s.choose((0, 4), (8, 0), (0, 0), (1, 3)), s.chance(0.1)

    def run(m: Drawn, x: Tensor) -> Tensor:
        layer, rows = m.layers[place], [slice(start, start + CHANNELS) for start in starts]
        y = F.linear(x.movedim(1, -1), layer.weight[rows[0]], layer.bias[rows[0]]).movedim(-1, 1)
        y = m.layers[norm](y).movedim(1, -1)
        y = F.linear(y, layer.weight[rows[1]], layer.bias[rows[1]]).movedim(-1, 1)
        return y * layer.weight.mean() if whole else y

    s.step(run)


def bilinear(s: Sketch) -> None:
    """A bilinear form of two values, or of one with itself, and a BatchNorm."""
    place = s.hold(s.seeded(lambda: nn.Bilinear(CHANNELS, CHANNELS, CHANNELS, bias=s.chance(0.6))))
    norm, other = s.norm(), s.choose(-1, -2, -3)

    def run(m: Drawn, values: Values, flag: bool) -> Tensor:
        x, y = read(values, -1), read(values, other)
        y = y if y.shape == x.shape else x.sin()
        return m.layers[norm](m.layers[place](x.movedim(1, -1), y.movedim(1, -1)).movedim(-1, 1))

    s.module.parts.append(run)


def windows(s: Sketch) -> None:
    """The means of the windows of an axis."""
    step = s.choose(1, 2)
    s.step(lambda m, x: x.unfold(-1, 2, step).mean(-1) if x.shape[-1] > 3 else x)


def parametrised(s: Sketch) -> None:
    first, second = s.conv(), s.norm()
    s.module.layers[first] = parametrizations.weight_norm(s.module.layers[first])
    s.step(lambda m, x: m.layers[second](m.layers[first](x)))


def hooked(s: Sketch) -> None:
    place, first, factor = s.earlier(*CONVOLUTIONS, *NORMS), s.chance(0.5), s.choose(1.0, 2.0)
    layer = s.module.layers[place]
    if first:
        layer.register_forward_pre_hook(lambda module, args: (args[0] * factor,))
    else:
        layer.register_forward_hook(lambda module, args, result: result * factor)


def linear(s: Sketch) -> None:
    """A Linear along the channels, which lie last for it, or along the last axis, if that is of their size."""
    place, turned = s.hold(s.seeded(lambda: nn.Linear(CHANNELS, CHANNELS, bias=s.chance(0.5)))), s.chance(0.7)
    ways = s.module.ways

    def run(m: Drawn, x: Tensor) -> Tensor:
        last = not turned and x.shape[-1] == CHANNELS
        ways.add((place, last))
        return m.layers[place](x) if last else m.layers[place](x.movedim(1, -1)).movedim(-1, 1)

    s.step(run)


def recurrent(s: Sketch) -> None:
    """A recurrent layer over the channels of a value, mostly of one that a BatchNorm makes."""
    kind, both = s.choose(nn.LSTM, nn.GRU, nn.RNN), s.chance(0.5)
    more = {"bidirectional": both, "bias": s.chance(0.7), "num_layers": s.choose(1, 1, 2)}
    place = s.hold(s.seeded(lambda: kind(CHANNELS, CHANNELS // (1 + both), batch_first=True, **more)))

    def run(m: Drawn, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        return m.layers[place](rows)[0].transpose(1, 2).reshape(x.shape)

    if s.chance(0.7):
        norm(s)
    s.step(run)


# ---------------------------------------------------------------- another way for another input


def skips_on_size(s: Sketch) -> None:
    """A BatchNorm that is left out, or another one, where the batch or the image has a certain size."""
    first, second, other = s.conv(), s.norm(), s.norm()
    axis, least, swapped = s.choose(0, 0, -1), s.choose(1, 2, 3), s.chance(0.3)
    least = least if axis == 0 else 7

    def run(m: Drawn, x: Tensor) -> Tensor:
        h = m.layers[first](x)
        if h.shape[axis] > least:
            return m.layers[second](h)
        return m.layers[other](h) if swapped else h

    s.step(run)


def skips_on_evenness(s: Sketch) -> None:
    first, second = s.conv(), s.norm()

    def run(m: Drawn, x: Tensor) -> Tensor:
        h = m.layers[first](x)
        return m.layers[second](h) if len(h) % 2 == 0 else h

    s.step(run)


def chosen_by_flag(s: Sketch) -> None:
    """A BatchNorm for each flag, both after one convolution; or none for one of them."""
    first, second, other, only = s.conv(), s.norm(), s.norm(), s.chance(0.4)
    place = s.value()

    def run(m: Drawn, values: Values, flag: bool) -> Tensor:
        h = m.layers[first](read(values, place))
        if flag:
            return m.layers[second](h)
        return h if only else m.layers[other](h)

    s.module.parts.append(run)


def chosen_by_value(s: Sketch) -> None:
    first, second = s.conv(), s.norm()

    def run(m: Drawn, x: Tensor) -> Tensor:
        h = m.layers[first](x)
        return m.layers[second](h) if h.mean() > 0 else h

    s.step(run)


def idle(s: Sketch) -> None:
    """A BatchNorm that nobody calls."""
    s.norm()


def pad_to_even(s: Sketch) -> None:
    mode = s.choose("constant", "constant", "replicate")
    s.step(lambda m, x: F.pad(x, (0, x.shape[-1] % 2), mode=mode))


def norm_pad_conv(s: Sketch) -> None:
    """SAME padding by hand below a BatchNorm."""
    first, second, amount = s.norm(), s.conv(), s.choose(2, 4)
    s.step(lambda m, x: m.layers[second](F.pad(m.layers[first](x), (0, -x.shape[-1] % amount))))


def crop_to_even(s: Sketch) -> None:
    s.step(lambda m, x: x[..., : x.shape[-1] - x.shape[-1] % 2])


def pool_if_large(s: Sketch) -> None:
    s.step(
        lambda m, x: F.max_pool1d(x.flatten(2), 2).unsqueeze(-1) if x.dim() == 4 and x.shape[-1] > 8 else x
    )


# ---------------------------------------------------------------- values


def elementwise(s: Sketch) -> None:
    function = s.choose(
        torch.relu, torch.tanh, torch.sigmoid, torch.abs, torch.neg, F.leaky_relu, F.gelu, torch.clone
    )
    s.step(lambda m, x: function(x))


def in_place(s: Sketch) -> None:
    """What writes to a value that others read, directly or through a view."""
    kind, place = s.choose("relu", "half", "view", "add", "copy"), s.value()

    def run(m: Drawn, values: Values, flag: bool) -> Tensor:
        x = read(values, place)
        if x is values[0]:
            x = x.clone()
        if kind == "relu":
            return F.relu_(x)
        if kind == "half":
            x[:, : CHANNELS // 2] *= 2
        elif kind == "view":
            x.flatten(2).add_(1)
        elif kind == "add":
            x += values[-1].detach()[:, :, :1].mean()
        else:
            x.copy_(x.flip(1))
        return x

    s.module.parts.append(run)


def combine(s: Sketch) -> None:
    function, one, two = s.choose(*COMBINED), s.value(), s.value()

    def run(m: Drawn, values: Values, flag: bool) -> Tensor:
        x, y = read(values, one), read(values, two)
        return function(x, y) if x.shape == y.shape else x

    s.module.parts.append(run)


COMBINED: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.add,
    torch.sub,
    torch.max,
    lambda x, y: x * torch.sigmoid(y),
    lambda x, y: torch.cat([x, y], 1)[:, ::2],
    lambda x, y: torch.stack([x, y]).mean(0),
    lambda x, y: torch.add(x, y, alpha=-0.5),
    lambda x, y: torch.where(x > 0, x, y),
    lambda x, y: x + y.mean(-1, keepdim=True),
)


def move(s: Sketch) -> None:
    function = s.choose(*MOVED)
    s.step(lambda m, x: function(x))


MOVED: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    lambda x: x.flip(1),
    lambda x: x[:, [3, 1, 1, 0]],
    lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
    lambda x: x.reshape(len(x), CHANNELS, -1).view(x.shape),
    lambda x: x - x.mean(1, keepdim=True),
    lambda x: x + x.mean(tuple(range(2, x.dim())), keepdim=True),
    lambda x: x.mean(0, keepdim=True).expand(x.shape),
    lambda x: x[..., :1].expand(x.shape),
    lambda x: F.pad(x, (1, 1), mode="replicate")[..., 1:-1],
    lambda x: F.pad(x, (1, 0))[..., :-1],
    lambda x: torch.roll(x, 1, -1),
)


def tap(s: Sketch) -> None:
    s.module.taps.append(s.random.randrange(1, 12))


def pool(s: Sketch) -> None:
    maximum, padding = s.choose(True, False), s.choose(0, 1)
    call = {3: (F.avg_pool1d, F.max_pool1d), 4: (F.avg_pool2d, F.max_pool2d)}[s.rank][maximum]
    s.step(lambda m, x: call(x, 2 + padding, 1, padding) if min(x.shape[2:]) > 2 else x)


def chain(s: Sketch) -> None:
    """A BatchNorm and a linear layer, in any order, with something between that passes it on or does not."""
    ends = [norm, s.choose(conv, conv, linear)]
    s.random.shuffle(ends)
    s.straight = True
    for add in (ends[0], s.choose(elementwise, move, move, pool, pad_to_even), ends[1]):
        add(s)
    s.straight = False


FEATURES: Features = {
    "chain": (16, chain),
    "pool": (3, pool),
    "norm": (8, norm),
    "conv": (6, conv),
    "conv norm": (8, conv_norm),
    "again": (3, again),
    "tied": (2, tied),
    "functional": (2, functional),
    "part": (2, part),
    "by hand": (2, by_hand),
    "parametrised": (1, parametrised),
    "computed": (1, computed),
    "parts": (1, parts),
    "bilinear": (1, bilinear),
    "windows": (1, windows),
    "hooked": (2, hooked),
    "linear": (3, linear),
    "recurrent": (2, recurrent),
    "skips on size": (2, skips_on_size),
    "skips on evenness": (1, skips_on_evenness),
    "chosen by flag": (2, chosen_by_flag),
    "chosen by value": (1, chosen_by_value),
    "idle": (1, idle),
    "pad to even": (2, pad_to_even),
    "norm pad conv": (1, norm_pad_conv),
    "crop to even": (1, crop_to_even),
    "pool if large": (1, pool_if_large),
    "elementwise": (4, elementwise),
    "in place": (3, in_place),
    "combine": (5, combine),
    "move": (6, move),
    "tap": (3, tap),
}
"""How often each is drawn, and what adds it. A new feature is a row here."""


# ---------------------------------------------------------------- folding and judging


def build(one: Draw) -> Drawn:
    sketch = Sketch(one.choices())
    apply(FEATURES, one, sketch, Sketch.take)
    return sketch.module.double().eval()


def options(one: Draw) -> dict[str, bool]:
    random = Random(f"options {one.seed}")
    return {
        name: random.random() < share for name, share in (("halves", 0.8), ("lower", 0.2), ("merge", 0.5))
    }


def example(one: Draw) -> Tensor:
    """What a module is folded with: any batch and size."""
    random = Random(f"example {one.seed}")
    size, rank = random.choice((4, 8, 8, 7)), Sketch(one.choices()).rank
    return other(0, random.choice((1, 2, 3, 4)), *[size] * (rank - 2))


def other(seed: int, batch: int, *sizes: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, *sizes, generator=generator, dtype=torch.float64)


def calls(given: Tensor) -> Iterator[tuple[Tensor, bool, bool]]:
    """Other inputs, the flag, and whether a report that notes what it could not read is believed there."""
    sizes = given.shape[2:]
    for batch in (1, 2, 3, 5):
        yield other(batch, batch, *sizes), True, False
    yield other(6, len(given), *(size + 1 for size in sizes)), True, True
    yield other(7, len(given), *(size + 2 for size in sizes)), True, True
    yield other(8, len(given), *sizes), False, True


def outputs(module: nn.Module, x: Tensor, flag: bool) -> list[Tensor] | None:
    """What a module computes; None where it does not run."""
    try:
        with torch.no_grad():
            return [tensor.clone() for tensor in module(x.clone(), flag)]
    except (RuntimeError, IndexError, ValueError):
        return None


def distance(before: list[Tensor], after: list[Tensor] | None) -> float:
    if after is None or [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.numel()]
    return max((float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in pairs), default=0.0)


def judge(one: Draw) -> str:
    """What is wrong with the fold of a draw; nothing where it is right."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return _judge(build(one), one)
    finally:
        torch.set_default_dtype(default)


def _judge(module: Drawn, one: Draw) -> str:
    given = example(one)
    if not module.parts or outputs(module, given, True) is None:
        raise Unsuitable
    try:
        folded, report = fold(module, given, verify=False, **options(one))
    except Exception as error:  # noqa: BLE001 the module is sound, so whatever comes out is the finding
        return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
    limits, notes, met = getattr(report, "limits", ()), report.notes[1:], set(module.ways)
    for x, flag, excused in calls(given):
        module.ways.clear()
        before = outputs(module, x, flag)
        believed = limits or (excused and notes) or not module.ways <= met
        off = 0.0 if before is None or believed else distance(before, outputs(folded, x, flag))
        if off > 1e-10:
            called = (
                f"{tuple(x.shape)} and the flag {flag}, folded with {tuple(given.shape)} and {options(one)}"
            )
            return f"{off:.1e} off on {called}"
    return ""
