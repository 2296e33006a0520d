"""What the lecture shows without a long training, each as a function that computes a table.

    EXPERIMENTS["jitter"].run(material, seed)        # a list of tables, as `python -m train.lab` prints them

Every number in a table was computed by the call that returned it, and nothing is known beforehand: where a table says
"exactly 0", a maximum over all that was seen was 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

import bnfold
import data
from bnfold.checkpoint import InputDomain, drop_identities
from train import calibration, gradients, layers
from train.diagnostics import Diagnostics, Record, compare_statistics, examine
from train.evaluate import measure, study_habits
from train.gradients import Ledger
from train.layers import to_torch
from train.loop import descend
from train.material import Material
from train.net import TANH_GAIN
from train.page import Table
from train.recipes import RECIPES, Recipe, make
from train.sample import invent

__all__ = ["EXPERIMENTS", "Experiment"]

BATCH = 32


@dataclass(frozen=True)
class Experiment:
    """One experiment: what it asks, and the function of material and seed that answers."""

    name: str
    question: str
    run: Callable[[Material, int], list[Table]]


def jitter(material: Material, seed: int) -> list[Table]:
    """Put one example into 100 batches of different company, and see how far each layer's output of it moves."""
    net = _train(RECIPES["deep"], material, seed, 300)
    x, generator = material.examples[0], Generator().manual_seed(seed)
    company = [x[torch.randint(len(x), (BATCH,), generator=generator)] for _ in range(100)]
    for batch in company:
        batch[0] = x[0]
    rows = []
    training, still = (_watch_first(net, company, mode) for mode in (True, False))
    for name, values in training.items():
        spread = values[:, 1:].flatten(0, 1).std(0).mean()
        rows.append((name, *(_exact(v[:, 0].std(0).mean() / spread) for v in (values, still[name]))))
    caption = "std of one example's outputs over 100 batches, as a share of the std between examples"
    return [Table(("layer", "in training", "in eval"), rows, caption)]


def scale(material: Material, seed: int) -> list[Table]:
    """Send 1,000 random inputs through a Linear and a random gradient back, without and with BatchNorm after it."""
    generator = Generator().manual_seed(seed)
    x, back = (torch.randn(1000, size, generator=generator) for size in (10, 200))
    weight = torch.randn(200, 10, generator=generator)
    factors = {
        "1": 1.0,
        "5": 5.0,
        "0.2": 0.2,
        "1 / sqrt(10)": 10**-0.5,
        "5/3 / sqrt(10)": TANH_GAIN * 10**-0.5,
    }
    rows = []
    for name, factor in factors.items():
        plain, normal = (_push(x, back, weight * factor, norm) for norm in (False, True))
        rows.append((name, *(f"{value:.3f}" for value in (*plain, *normal))))
    headings = (
        "std of the weights",
        "output",
        "input gradient",
        "output, BatchNorm",
        "input gradient, BatchNorm",
    )
    return [Table(headings, rows, "std after 1,000 inputs and 1,000 output gradients of std 1")]


def depth(material: Material, seed: int) -> list[Table]:
    """Look at the first batch in 50 layers, without and with BatchNorm, and with the right gain."""
    kaiming = replace(RECIPES["plain"], layers=50)
    nets = {
        "weights N(0, 1)": RECIPES["fifty-plain"],
        "weights N(0, 1), BatchNorm": RECIPES["fifty"],
        "Kaiming, gain 5/3": kaiming,
    }
    rows = []
    for name, recipe in nets.items():
        seen = _watch_step(recipe, material, seed).layers
        ends = (seen[0], seen[len(seen) // 2], seen[-1])
        gradients = [layer.gradient.std if layer.gradient else 0.0 for layer in seen]
        rows.append(
            (name, *(f"{end.output.std:.3f}" for end in ends), f"{seen[-1].saturated:.1%}",
             f"{gradients[0]:.1e}", f"{gradients[-1]:.1e}", f"{gradients[0] / gradients[-1]:.1e}")
        )  # fmt: skip
    headings = (
        "50 layers", "std, first tanh", "std, 25th", "std, last", "saturated, last",
        "gradient, first", "gradient, last", "ratio",
    )  # fmt: skip
    return [Table(headings, rows, "the first batch, before any step")]


def bias(material: Material, seed: int) -> list[Table]:
    """Train with a bias before every BatchNorm, and compare its gradients with those of the weights."""
    recipe = replace(RECIPES["bias"], steps=100)
    net, entries = _keep_ledger(recipe, material, seed)
    found = {entry.name: entry for entry in entries}
    names = [
        name for name, _ in net.named_children() if f"{name}.bias" in found and name.startswith("linear")
    ]
    rows = [
        (name, f"{found[f'{name}.weight'].gradient:.1e}", f"{found[f'{name}.bias'].gradient:.1e}",
         f"{found[f'{name}.weight'].moved:.1e}", f"{found[f'{name}.bias'].moved:.1e}")
        for name in names
    ]  # fmt: skip
    headings = (
        "layer",
        "gradient of the weight",
        "gradient of the bias",
        "change of the weight",
        "change of the bias",
    )
    return [Table(headings, rows, "each Linear followed by a BatchNorm: the largest of 100 steps")]


def single(material: Material, seed: int) -> list[Table]:
    """Ask for 500 examples one at a time and all at once, in eval and in training mode."""
    net, x = _train(RECIPES["deep"], material, seed, 300), material.examples[0][:500]
    return [
        Table(
            ("mode", "one at a time against all at once, largest difference of a logit"),
            [
                (mode, _compare_single(copy.deepcopy(net).train(mode == "training"), x))
                for mode in ("eval", "training")
            ],
            words=(1,),
        )
    ]


def momentum(material: Material, seed: int) -> list[Table]:
    """Train with momentum 0.1 and 0.001 at batch 32, and compare running with calibrated statistics."""
    rows = []
    for value in (0.1, 0.001):
        recipe = RECIPES["lecture"].vary("lecture", "", "", momentum=value)
        net = _train(recipe, material, seed, 3000)
        calibrated = calibration.calibrate(net, material, recipe)[calibration.AS_DRAWN]
        losses = [measure(each, material.dev) for each in (net, calibrated)]
        statistics = compare_statistics(net, calibrated)
        apart, ratios = (
            max(one.apart for one in statistics),
            [ratio for one in statistics for ratio in one.ratios],
        )
        rows.append(
            (f"{value}", f"{apart:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}",
             *(f"{loss:.4f}" for loss in losses), f"{losses[0] - losses[1]:+.4f}")
        )  # fmt: skip
    headings = (
        "momentum",
        "means apart, in stds",
        "ratio of stds",
        "dev, running",
        "dev, calibrated",
        "difference",
    )
    return [Table(headings, rows, "3,000 steps of 32 examples, three layers")]


def relus(material: Material, seed: int) -> list[Table]:
    """Kill ReLUs with too high a rate, then go on at a good one and count who comes back."""
    rows, generator = [], Generator().manual_seed(seed)
    recipe = RECIPES["dead-relu"]
    net = make(recipe, material, generator)
    for what, each in (
        ("before", None),
        (f"after at rate {recipe.rate:g}", recipe),
        ("then at 0.1", RECIPES["relu"]),
    ):
        if each is not None:
            _run(net, material, each, generator)
        shares = (layer.dead for layer in examine(net, material.train.contexts))
        rows.append((what, *(f"{share:.1%}" for share in shares)))
    headings = ("1,000 steps each", "dead, first layer", "dead, second layer")
    return [Table(headings, rows, "share of neurons that are 0 for every context of the training set")]


def zeros(material: Material, seed: int) -> list[Table]:
    """Exercise E01: train from zeros, without and with BatchNorm, and say what moved, what did not, and why."""
    tables, rows = [], []
    y = material.examples[1].numpy()
    unigram = data.unigram_loss(y, y)
    for name in ("zeros", "zeros-batchnorm"):
        recipe = RECIPES[name]
        net, entries = _keep_ledger(recipe, material, seed)
        tables.append(replace(gradients.tabulate(entries, recipe.steps), caption=recipe.summary))
        habits = study_habits(net, material.train)
        loss = measure(net, material.train)
        rows.append((name, f"{loss:.4f}", f"{unigram:.4f}", f"{loss - unigram:.4f}", f"{habits.divergence:.4f}",
                     _exact(torch.tensor(habits.contrast))))  # fmt: skip
    headings = (
        "from zeros",
        "train",
        "unigram",
        "difference",
        "KL(letters || net)",
        "what a context changes",
    )
    return [*tables, Table(headings, rows, "what the nets have learnt, beside the letters' frequencies")]


def folding(material: Material, seed: int) -> list[Table]:
    """Exercise E02: train the lecture's nets, fold every BatchNorm away, and compare on every possible input."""
    rows = []
    every = InputDomain((material.context,), "int64", 0, len(material.vocabulary)).every()
    for name in ("batchnorm", "lecture", "deep"):
        net = to_torch(_train(RECIPES[name], material, seed, 2000)).eval()
        folded, report = bnfold.fold(net, every)
        for title, each in ((name, net), (f"{name}, folded", drop_identities(folded))):
            rows.append((title, *_describe(each, material, seed), "" if each is net else _tell(report)))
    headings = ("net", "BatchNorms", "numbers", "train", "dev", "first names", "off, of the largest logit")
    caption = f"after 2,000 steps; folded and unfolded compared on all {len(every):,} inputs"
    return [Table(headings, rows, caption, words=(5,))]


_ROWS = (
    Experiment("jitter", "does an example's company change what the net makes of it?", jitter),
    Experiment("scale", "what does a Linear do to the scale of what passes, forward and backward?", scale),
    Experiment("depth", "what becomes of that in 50 layers?", depth),
    Experiment("bias", "is a bias before a BatchNorm of any use?", bias),
    Experiment("single", "can the net be asked one example at a time?", single),
    Experiment("momentum", "is momentum 0.1 dangerous at batch 32?", momentum),
    Experiment("relus", "does a dead ReLU come back?", relus),
    Experiment("zeros", "E01: what does a net learn whose weights and biases are all zero?", zeros),
    Experiment("folding", "E02: does a net compute the same once its BatchNorms are folded away?", folding),
)

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ROWS}


def _train(recipe: Recipe, material: Material, seed: int, steps: int) -> nn.Sequential:
    generator = Generator().manual_seed(seed)
    net = make(recipe, material, generator)
    _run(net, material, replace(recipe, steps=min(recipe.steps, steps)), generator)
    return net


def _run(net: nn.Sequential, material: Material, recipe: Recipe, generator: Generator) -> None:
    for _ in descend(net, material, recipe, generator):
        pass


def _watch_step(recipe: Recipe, material: Material, seed: int) -> Record:
    """Return what is seen in the first step of a recipe."""
    generator = Generator().manual_seed(seed)
    net = make(recipe, material, generator)
    with Diagnostics(net) as diagnostics:
        diagnostics.record(next(descend(net, material, recipe, generator)))
    return diagnostics.records[0]


def _keep_ledger(
    recipe: Recipe, material: Material, seed: int
) -> tuple[nn.Sequential, list[gradients.Entry]]:
    generator = Generator().manual_seed(seed)
    net = make(recipe, material, generator)
    with Ledger(net) as ledger:
        for loss in descend(net, material, recipe, generator):
            ledger.count(loss)
    return net, ledger.entries()


def _watch_first(net: nn.Sequential, batches: list[Tensor], training: bool) -> dict[str, Tensor]:
    """Return the outputs of the BatchNorms, (batches, examples, channels) each, of a copy of `net` in a mode."""
    net = copy.deepcopy(net).train(training)
    kept: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in batches:
            for name, value in _walk(net, batch):
                if name.startswith("bn"):
                    kept.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in kept.items()}


def _walk(net: nn.Sequential, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the output of each layer by name."""
    for name, layer in net.named_children():
        value = layer(value)
        yield name, value


def _push(x: Tensor, back: Tensor, weight: Tensor, normalise: bool) -> tuple[float, float]:
    """Return the std of a Linear's outputs for `x`, and of the gradient of `x` for `back` as the outputs' gradient."""
    x = x.clone().requires_grad_()
    out = x @ weight.T
    if normalise:
        out = layers.BatchNorm1d(len(weight))(out)
    (gradient,) = torch.autograd.grad(out, x, back)
    return float(out.detach().std()), float(gradient.std())


def _compare_single(net: nn.Sequential, x: Tensor) -> str:
    with torch.no_grad():
        whole = net(x)
        try:
            alone = torch.cat([net(one) for one in x.split(1)])  # type: ignore[no-untyped-call]
        except ValueError as error:
            return f"refused: {error}"
    return f"{float((alone - whole).abs().max()):.1e}"


def _exact(value: Tensor) -> str:
    return f"{float(value):.4f}" if value else "exactly 0"


def _describe(net: nn.Sequential, material: Material, seed: int) -> tuple[str, ...]:
    """Return the number of BatchNorms, of numbers, the losses on train and dev, and some names."""
    norms = sum(isinstance(layer, nn.BatchNorm1d) for layer in net)
    numbers = sum(value.numel() for value in net.state_dict().values() if value.is_floating_point())
    losses = (f"{measure(net, part):.5f}" for part in (material.train, material.dev))
    names = invent(net, material.vocabulary, material.context, 3, Generator().manual_seed(seed))
    return f"{norms}", f"{numbers:,}", *losses, " ".join(names)


def _tell(report: bnfold.Report) -> str:
    return ", ".join(f"{item.question.partition(':')[0]} {item.deviation:.1e}" for item in report.evidence)
