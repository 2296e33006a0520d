"""Random torch modules with much to merge, folded without verification and judged as in `modules`.

What `modules` draws stands between sums and sequences of linear operators: in blocks of their own and in the code of
the model, weighted, subtracted, written in place, with code that looks at what lies between, keeps it, measures it or
changes what it was made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnfold.torch import fold
from tests.fuzz import modules
from tests.fuzz.drawing import Draw, Features, Unsuitable, apply
from tests.fuzz.modules import CHANNELS, Drawn, Sketch, Values, calls, distance, example, outputs, read
from tests.torch_models import randomise

Join = Callable[[Tensor, Tensor], Tensor]


# ---------------------------------------------------------------- operators


def operator(s: Sketch) -> nn.Module:
    """A linear operator that keeps the size, but for its border."""
    kinds = (
        (nn.Conv1d, nn.AvgPool1d, nn.BatchNorm1d)
        if s.rank == 3
        else (nn.Conv2d, nn.AvgPool2d, nn.BatchNorm2d)
    )
    kind = s.choose("conv", "conv", "conv", "pool", "norm", "low rank", "nothing")
    if kind == "pool":
        return kinds[1](3, 1, 1, count_include_pad=s.chance(0.7))
    if kind == "norm":
        return randomise(kinds[2](CHANNELS), s.random.randrange(2**31))
    if kind == "low rank":
        return nn.Sequential(
            convolution(s, kinds[0], CHANNELS, 2, 1), convolution(s, kinds[0], 2, CHANNELS, 1)
        )
    if kind == "nothing":
        return s.choose(nn.Identity, nn.Dropout)()
    return convolution(s, kinds[0], CHANNELS, CHANNELS, s.choose(1, 1, 3, 3, 5))


def convolution(s: Sketch, kind: type[nn.Module], inputs: int, outputs: int, kernel: int) -> nn.Module:
    step, groups = s.choose(1, 1, 2), s.choose(1, 1, 2)
    pad, bias = step * (kernel // 2), s.chance(0.4)
    mode = s.choose("zeros", "zeros", "zeros", "zeros", "replicate")
    return s.seeded(lambda: kind(inputs, outputs, kernel, 1, pad, step, groups, bias, padding_mode=mode))


def term(s: Sketch) -> nn.Module:
    """One operator, or some in a row."""
    layers = [operator(s) for _ in range(s.choose(1, 1, 1, 2, 3))]
    return nn.Sequential(*layers) if len(layers) > 1 or s.chance(0.2) else layers[0]


JOINS: tuple[Join, ...] = (
    torch.add,
    torch.add,
    torch.sub,
    lambda x, y: x + 0.5 * y,
    lambda x, y: torch.add(x, y, alpha=3),
    lambda x, y: x.add_(y) if x.dim() and x.grad_fn is None and x.is_contiguous() else x + y,
)

ENDS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    torch.relu,
    F.relu_,
    torch.tanh,
    lambda x: F.leaky_relu(x, 0.3),
    lambda x: F.leaky_relu(x, 1 / x.shape[-1]),
    lambda x: x * 2 if len(x) == 1 else x,
    lambda x: x.abs() if x.shape[-1] % 2 else x,
    lambda x: x / x.shape[1],
)


def summed(terms: Sequence[nn.Module], joins: Sequence[Join], x: Tensor) -> Tensor:
    """The terms one after another; what writes in place writes to a value of its own."""
    y = terms[0](x)
    for term, join in zip(terms[1:], joins, strict=True):
        y = join(y.clone() if y.data_ptr() == x.data_ptr() else y, term(x))
    return y


class Branches(nn.Module):
    """A sum of terms and what comes after it, in a module of their own."""

    def __init__(
        self, terms: Sequence[nn.Module], joins: Sequence[Join], end: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.terms, self.joins, self.end, self.size = nn.ModuleList(terms), joins, end, ()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(summed(list(self.terms), self.joins, x))


class Keeping(Branches):
    """The same, that keeps the size of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        self.size = tuple(x.shape)
        return super().forward(x)


# ---------------------------------------------------------------- features


def drawn_sum(s: Sketch) -> tuple[list[nn.Module], list[Join]]:
    terms = [term(s) for _ in range(s.choose(2, 2, 3, 4))]
    return terms, [s.choose(*JOINS) for _ in terms[1:]]


def block(s: Sketch) -> None:
    """A sum in a module of its own; now and then called twice."""
    terms, joins = drawn_sum(s)
    kind, end, twice = s.choose(Branches, Branches, Branches, Keeping), s.choose(*ENDS), s.chance(0.1)
    place = s.hold(kind(terms, joins, end))
    s.step(lambda m, x: m.layers[place](m.layers[place](x)) if twice else m.layers[place](x))


def sum_in_code(s: Sketch) -> None:
    """A sum in the code of the model, beside a value that others read."""
    terms, joins = drawn_sum(s)
    places, also = [s.hold(each) for each in terms], s.choose("", "", "value", "shape", "type")

    def run(m: Drawn, values: Values, flag: bool) -> Tensor:
        x = read(values, -1)
        y = summed([m.layers[place] for place in places], joins, x)
        if also == "value" and y.shape == values[-2 % len(values)].shape:
            return y + values[-2 % len(values)]
        if also == "type":
            return y + (x > 0).half()
        return y * y.shape[-1] if also == "shape" else y

    s.module.parts.append(run)


def sequence(s: Sketch) -> None:
    """Some operators in a row, held by one module."""
    place = s.hold(nn.Sequential(*(operator(s) for _ in range(s.choose(2, 2, 3)))))
    s.step(lambda m, x: m.layers[place](x))


def sequence_in_code(s: Sketch) -> None:
    """Two operators in a row, and code that does something between."""
    first, second = s.hold(operator(s)), s.hold(operator(s))
    between = s.choose("", "", "change", "view", "measure", "keep", "odd", "copy")

    def run(m: Drawn, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        y = m.layers[first](x)
        if between == "change":
            x.mul_(3)
        elif between == "view":
            x.flatten(1)[:, :2].zero_()
        elif between == "measure" and y.numel() > 10**6:
            return y
        elif between == "keep":
            return torch.cat([m.layers[second](y), y], 1)[:, ::2]
        elif between == "odd" and x.shape[-1] % 2:
            y = y.abs()
        return m.layers[second](y.clone() if between == "copy" else y)

    s.step(run)


def elsewhere(s: Sketch) -> None:
    """A layer of a block, or its weight, that is used once more."""
    blocks = [layer for layer in s.module.layers if isinstance(layer, Branches | nn.Sequential)]
    if not blocks:
        raise Unsuitable
    kinds = (nn.Conv1d, nn.Conv2d)
    layers = [part for each in blocks for part in each.modules() if isinstance(part, kinds)]
    layers = [part for part in layers if part.in_channels == part.out_channels]
    if not layers:
        raise Unsuitable
    place, whole, odd = s.hold(s.choose(*layers)), s.chance(0.5), s.chance(0.3)

    def run(m: Drawn, x: Tensor) -> Tensor:
        layer = m.layers[place]
        if odd and not x.shape[-1] % 2:
            return x
        return layer(x) if whole else x * layer.weight.abs().mean()

    s.step(run)


FEATURES: Features = {
    **{
        name: modules.FEATURES[name] for name in ("elementwise", "norm", "conv", "tap", "in place", "combine")
    },
    "hooked": (1, modules.hooked),
    "block": (12, block),
    "sum in code": (12, sum_in_code),
    "sequence": (8, sequence),
    "sequence in code": (8, sequence_in_code),
    "elsewhere": (3, elsewhere),
}
"""How often each is drawn, and what adds it."""


# ---------------------------------------------------------------- folding and judging


def build(one: Draw) -> Drawn:
    sketch = Sketch(one.choices())
    apply(FEATURES, one, sketch, Sketch.take)
    return sketch.module.double().eval()


def judge(one: Draw) -> str:
    """What is wrong with the fold of a draw; nothing where it is right."""
    module, given = build(one), example(one)
    if not module.parts or outputs(module, given, True) is None:
        raise Unsuitable
    try:
        folded, report = fold(module, given, verify=False)
    except Exception as error:  # noqa: BLE001 the module is sound, so whatever comes out is the finding
        return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
    for x, flag, excused in calls(given):
        before = outputs(module, x, flag)
        if before is None or report.limits or (excused and report.notes[1:]):
            continue
        off = distance(before, outputs(folded, x, flag))
        sizes = [part.size for part in folded.modules() if isinstance(part, Keeping)]
        kept = {part.size for part in module.modules() if isinstance(part, Keeping)}
        if off > 1e-10 or not kept.issuperset(sizes):
            return (
                f"off by {off:.2g}, given {tuple(x.shape)}; {[one.into for one in report.merges if one.into]}"
            )
    return ""
