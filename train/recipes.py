"""Recipes: how a net is made and trained, as data. A recipe is a row here; nothing else knows its name.

The stations of the lecture come first, in its order, with the figures of its notebook; then its experiments, each a
change of one thing in a station, with what one should see; then what this project adds.

`quick` was found by measuring, on the makemore list and on one thread. What was tried, with the dev loss at the end:

    large batches of examples, AdamW, one cycle                        12 s     2.075
    all different contexts in every step, Adam, 300 steps              10 s     2.122
    the same with orthogonalised steps (Muon), 200 steps                8 s     2.093    overfits
    a sixteenth of the contexts, drawn evenly, Muon, 600 steps          7 s     2.150    misses the frequent ones
    300 contexts drawn by frequency ^ 0, 1, 1/2; Adam, 600 steps      1.3 s     2.140, 2.076, 2.071
    200 contexts; betas (0.9, 0.99), (0.8, 0.95)                      0.9 s     2.074, 2.070  (mean of three seeds)
    with averaged weights, weight decay, dropout, cosine              0.9 s     none better

What limits it now is generalisation: a longer run fits train better, and dev no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Generator, Tensor, nn

from train.batches import draw_contexts, draw_examples
from train.material import Material
from train.net import TANH_GAIN, Design, Kit, Scale, Sizes, build
from train.optimisers import Adam, Descent, Optimiser

__all__ = ["RECIPES", "Recipe", "make"]

Draw = Callable[[Material, int, Generator], Iterator[tuple[Tensor, Tensor]]]
Schedule = Callable[[float], float]


def one_cycle(progress: float, warm: float = 0.2) -> float:
    """Rise linearly during the first fifth, then fall linearly to 0 (after Smith 2018)."""
    return max(progress, 1e-3) / warm if progress < warm else (1 - progress) / (1 - warm)


def step_decay(progress: float) -> float:
    """Return 1 in the first half, then 0.1."""
    return 1.0 if progress < 0.5 else 0.1


def constant(progress: float) -> float:
    """Return 1."""
    return 1.0


def brisk_adam(net: nn.Module) -> Optimiser:
    """Return Adam with betas for runs of a few hundred steps."""
    return Adam(net, betas=(0.8, 0.95))


@dataclass(frozen=True)
class Recipe:
    """How to make and train a net; the defaults are the lecture's own loop.

    `rate` times `schedule(done / steps)` is the learning rate of a step. `summary` says what the recipe is or changes,
    `expect` what one should see. With `explain` a run ends with what moved and what did not (see `train.gradients`).
    `reference` has the notebook's losses: "first", "train", "dev".
    """

    name: str
    summary: str
    expect: str = ""
    steps: int = 200_000
    batch: int = 32
    rate: float = 0.1
    draw: Draw = draw_examples
    optimiser: Callable[[nn.Module], Optimiser] = Descent
    schedule: Schedule = step_decay
    hidden: int = 200
    layers: int = 3
    embedding: int = 10
    context: int = 3
    design: Design = field(default_factory=Design)
    kit: Kit = "torch"
    explain: bool = False
    reference: Mapping[str, float] = field(default_factory=dict)

    def vary(self, name: str, summary: str, expect: str, **changes: Any) -> Recipe:
        """Return another recipe: this one with some fields changed, and some of its design (those named so)."""
        fields = {key: value for key, value in changes.items() if key in Recipe.__dataclass_fields__}
        design = replace(self.design, **{key: value for key, value in changes.items() if key not in fields})
        return replace(
            self, name=name, summary=summary, expect=expect, design=design, **({"reference": {}} | fields)
        )


ORIGINAL = Recipe(
    "original",
    "one hidden layer, weights and biases from N(0, 1)",
    "the first loss is far above ln 27: confidently wrong; the loss curve begins like a hockey stick",
    layers=2,
    design=Design(
        weights=Scale(1.0),
        biases=Scale(1.0),
        last_weights=Scale(1.0),
        last_bias=Scale(1.0),
        batchnorm="none",
        last_batchnorm=False,
    ),
    kit="scratch",
    reference={"first": 27.8817, "train": 2.1245, "dev": 2.1682},
)
SOFTMAX = ORIGINAL.vary(
    "softmax",
    "the last weights x 0.01, the last bias x 0",
    "the first loss is near ln 27, and the steps that unlearned confidence are saved",
    last_weights=Scale(0.01),
    last_bias=Scale(0.0),
    reference={"first": 3.32, "train": 2.07, "dev": 2.13},
)
TANH = SOFTMAX.vary(
    "tanh",
    "also the first weights x 0.2, the first bias x 0.01",
    "few tanh outputs are saturated, so gradients pass",
    weights=Scale(0.2),
    biases=Scale(0.01),
    reference={"train": 2.0356, "dev": 2.1027},
)
KAIMING = TANH.vary(
    "kaiming",
    "also the first weights by rule: std (5/3) / sqrt(fan_in)",
    "the same without a magic number",
    weights=Scale(TANH_GAIN, fan_in=True),
    reference={"train": 2.0377, "dev": 2.1070},
)
BATCHNORM = KAIMING.vary(
    "batchnorm",
    "also a BatchNorm before the tanh, in place of the first bias",
    "no gain for so small a net; what BatchNorm is for comes with depth",
    biases=None,
    batchnorm="before",
    momentum=0.001,
    statistics="std",
    reference={"first": 3.3239, "train": 2.0668, "dev": 2.1048},
)
DEEP = Recipe(
    "deep",
    "six layers of 100, as modules, BatchNorm after every Linear",
    "all tanh layers alike: std about 0.65, 2 % saturated; update ratios near 1e-3",
    hidden=100,
    layers=6,
    design=Design(statistics="unbiased"),
    kit="scratch",
    reference={"first": 3.2870},
)
PLAIN = DEEP.vary(
    "plain",
    "deep without BatchNorm: gain 5/3, biases 0, the last weights x 0.1",
    "the gain keeps the activations' scale; the last layer's update ratio begins too high",
    steps=1000,
    schedule=constant,
    last_weights=Scale(0.1, fan_in=True),
    biases=Scale(0.0),
    last_bias=Scale(0.0),
    batchnorm="none",
    last_batchnorm=False,
)
LINEAR = PLAIN.vary(
    "linear",
    "plain without tanh, gain 1",
    "activations and gradients keep their scale; the six layers are one linear map",
    nonlinearity="none",
    weights=Scale(1.0, fan_in=True),
)
SHORT = replace(DEEP, steps=1000, schedule=constant, reference={})
UNSCALED = SHORT.vary(
    "unscaled-batchnorm",
    "deep without 1 / sqrt(fan_in)",
    "the forward pass does not care; the update ratios fall tenfold",
    weights=Scale(1.0),
)
RELU = ORIGINAL.vary(
    "relu",
    "two hidden layers of ReLUs, Kaiming scale with gain sqrt 2, no BatchNorm",
    "many outputs are zero, but no neuron is zero for every example",
    steps=1000,
    schedule=constant,
    layers=3,
    nonlinearity="ReLU",
    weights=Scale(2**0.5, fan_in=True),
    biases=Scale(0.0),
    last_weights=Scale(0.01),
    last_bias=Scale(0.0),
)
ZEROS = Recipe(
    "zeros",
    "all weights and biases zero, no BatchNorm",
    "only the last bias moves, and the net learns the letters' frequencies: the unigram loss",
    steps=5000,
    explain=True,
    design=Design(
        weights=Scale(0.0),
        biases=Scale(0.0),
        last_bias=Scale(0.0),
        embeddings=Scale(0.0),
        batchnorm="none",
        last_batchnorm=False,
    ),
)

_ROWS = (
    ORIGINAL,
    SOFTMAX,
    TANH,
    KAIMING,
    BATCHNORM,
    DEEP,
    Recipe(
        "lecture",
        "the loop as the lecture runs it, on the three-layer net that is folded: 32 examples a step, step decay",
        "the yardstick for quick",
        design=Design(statistics="unbiased"),
        kit="scratch",
        reference={"train": 2.004, "dev": 2.079},
    ),
    PLAIN,
    PLAIN.vary(
        "gain-1", "plain with gain 1", "the std of the activations shrinks", weights=Scale(1.0, fan_in=True)
    ),
    PLAIN.vary("gain-3", "plain with gain 3", "the tanh layers saturate", weights=Scale(3.0, fan_in=True)),
    PLAIN.vary(
        "gain-half",
        "plain with gain 0.5",
        "activations and gradients vanish",
        weights=Scale(0.5, fan_in=True),
    ),
    LINEAR,
    LINEAR.vary(
        "linear-gain",
        "linear with gain 5/3, at rate 0.01 lest it diverge",
        "activations explode with depth",
        weights=Scale(TANH_GAIN, fan_in=True),
        rate=0.01,
    ),
    LINEAR.vary("linear-half", "linear with gain 0.5", "activations vanish", weights=Scale(0.5, fan_in=True)),
    PLAIN.vary(
        "unscaled",
        "plain without 1 / sqrt(fan_in)",
        "the tanh layers saturate",
        weights=Scale(1.0),
        last_weights=Scale(0.1),
    ),
    UNSCALED,
    UNSCALED.vary(
        "unscaled-fast", "the same at ten times the rate", "the update ratios are back near 1e-3", rate=1.0
    ),
    SHORT.vary("slow", "deep at rate 0.001", "update ratios near 1e-5: too slow", rate=0.001),
    SHORT.vary("after", "deep with BatchNorm after the tanh", "about the same", batchnorm="after"),
    SHORT.vary(
        "bias",
        "deep with a bias in every Linear",
        "the BatchNorm takes each bias away: its gradient is zero",
        biases=Scale(1.0),
        last_bias=Scale(1.0),
    ),
    SHORT.vary(
        "fifty",
        "fifty layers with BatchNorm, without 1 / sqrt(fan_in)",
        "all 49 tanh layers have std 0.63; gradients grow a thousandfold on their way back",
        layers=50,
        weights=Scale(1.0),
    ),
    PLAIN.vary(
        "fifty-plain",
        "fifty layers without BatchNorm, without 1 / sqrt(fan_in)",
        "saturated throughout; gradients grow to 1e13 on their way back",
        layers=50,
        weights=Scale(1.0),
        last_weights=Scale(0.1),
    ),
    RELU,
    RELU.vary(
        "dead-relu",
        "relu at rate 1.5",
        "a third of the second layer is zero for every example, and most of it stays so",
        rate=1.5,
    ),
    ZEROS,
    ZEROS.vary(
        "zeros-batchnorm",
        "all weights and biases zero, BatchNorm after every Linear",
        "only the last beta moves; the same unigram loss",
        biases=None,
        last_bias=None,
        batchnorm="before",
        last_batchnorm=True,
    ),
    Recipe(
        "quick",
        "a good net in about a second: different contexts with all that follows them, Adam, one cycle",
        steps=500,
        batch=256,
        rate=0.06,
        draw=draw_contexts,
        optimiser=brisk_adam,
        schedule=one_cycle,
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ROWS}


def make(recipe: Recipe, material: Material, generator: Generator) -> nn.Sequential:
    """Return the net of a recipe before training, its weights drawn from `generator`.

    Raises:
        InputError: the recipe's sizes are none that a net can have.
    """
    sizes = Sizes(len(material.vocabulary), material.context, recipe.embedding, recipe.hidden, recipe.layers)
    return build(sizes, generator, recipe.design, recipe.kit)
