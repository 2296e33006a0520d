# %% [markdown]
"""# Beside the lecture, to touch

A notebook to go with "Building makemore, part 3: activations & gradients, BatchNorm" (Andrej Karpathy): a net that
invents names, what goes wrong in its first step, what to look at, and what BatchNorm does about it. Exercises E01 and
E02 stand at the end, each with a hidden solution.

All of it runs in about a minute on one core, because the trainings are short: some hundred steps where the lecture
takes 200,000. What the pictures are about can be seen by then; how good a net gets cannot. The full figures stand in
`docs/lecture.md`.

Nothing is written twice: nets, recipes, diagnostics and pictures are those of the folder `train/`, short files that
are meant to be read.
"""

# %% [markdown]
"""In a checkout of bnfold the next cell installs nothing. Elsewhere, as in Colab, it fetches the source archive, in
which `train/` and the names lie, and installs what it needs; should the runtime ask to be restarted after that,
restart it and begin again.
"""

# %%
import subprocess
import sys
import tarfile
from pathlib import Path


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet"], check=True)


def find_checkout():
    here = Path.cwd()
    folders = (here, *here.parents, *here.glob("bnfold-*"))
    return next((folder for folder in folders if (folder / "train" / "lab.py").is_file()), None)


if find_checkout() is None:
    pip("download", "bnfold", "--no-deps", "--no-binary", "bnfold")
    with tarfile.open(next(Path.cwd().glob("bnfold-*.tar.gz"))) as archive:
        archive.extractall(filter="data")
    pip("install", f"{find_checkout()}[lecture]")
sys.path.insert(0, str(find_checkout()))

# %%
import copy
import math
from dataclasses import replace

import torch
from IPython.display import display
from torch import Generator, nn
from torch.nn import functional as F

import bnfold
import data
from bnfold.checkpoint import InputDomain
from train import calibration, gradients, layers, plots
from train.diagnostics import Diagnostics, compare_statistics
from train.evaluate import measure, study_habits
from train.experiments import EXPERIMENTS
from train.gradients import Ledger
from train.lab import perform, tabulate
from train.layers import to_torch
from train.loop import descend
from train.material import prepare
from train.net import TANH_GAIN, Scale, count_parameters
from train.page import Table
from train.recipes import RECIPES, constant, make
from train.sample import invent

torch.set_num_threads(1)
SEED = 2147483647  # the notebook's of the lecture

# %% [markdown]
"""## The names

Three characters tell the fourth; `.` begins and ends a name. `prepare(data.read_names("makemore"))` takes the
lecture's own list instead of the one that ships, once `python -m data fetch makemore` has downloaded it.
"""

# %%
material = prepare(data.read_names())
vocabulary, (x, y) = material.vocabulary, material.examples
print(f"{len(x):,} examples of {len(vocabulary)} characters; a name becomes")
for context, target in zip(x[:7].tolist(), y[:7].tolist(), strict=True):
    print("   ", vocabulary.decode(context), "->", vocabulary.decode([target]))

# %% [markdown]
"""## The first loss

Before it has seen anything, a net should find all 27 characters equally likely. That costs ln 27 = 3.30 nats. The
first net has weights from N(0, 1), and its first guess costs nine times as much.
"""


# %%
def begin(recipe):
    """The net of a recipe before its first step, and the first batch."""
    generator = Generator().manual_seed(SEED)
    net = make(recipe, material, generator)
    chosen = torch.randint(len(x), (32,), generator=generator)
    return net, x[chosen], y[chosen]


net, contexts, targets = begin(RECIPES["original"])
with torch.no_grad():
    logits = net(contexts)
print(f"ln 27 = {math.log(27):.4f}, loss of the first batch {F.cross_entropy(logits, targets):.4f}")
print(f"logits from {logits.min():.1f} to {logits.max():.1f}, std {logits.std():.1f}")

# %% [markdown]
"""Logits far apart are confidence, and confidence in the wrong character is what costs. Four characters are enough to
see it: the same guess, louder and louder, of which none is any better informed than the first.
"""

# %%
guess, truth = torch.tensor([[1.0, -0.5, 0.3, -1.2]]), torch.tensor([3])
for loudness in (0, 1, 5, 20):
    print(f"logits x {loudness:>2}: loss {F.cross_entropy(guess * loudness, truth):7.4f}")

# %% [markdown]
"""The remedy: last weights x 0.01, last bias x 0. Left, the hockey stick is gone: the steps that went into unlearning
are saved, and go into learning.
"""

# %%
stations = {
    name: perform(RECIPES[name], material, SEED, 600) for name in ("original", "softmax", "tanh", "kaiming")
}
plots.draw_losses({name: stations[name].diagnostics.losses for name in ("original", "softmax")})

# %% [markdown]
"""## Saturated tanh

On its way back a gradient is multiplied by the slope of tanh, 1 - h^2. Where h is close to -1 or 1, nothing is left
of it. White in the map is |h| > 0.99; a column all white would be a neuron that learns from none of these examples.
"""

# %%
display(plots.draw_saturation(stations["softmax"].diagnostics.records[:1]))
display(plots.draw_saturation(stations["tanh"].diagnostics.records[:1]))

# %% [markdown]
"""Above, weights from N(0, 1); below, the same weights x 0.2 and the bias x 0.01. In numbers:"""

# %%
for name in ("softmax", "tanh"):
    net, contexts, targets = begin(RECIPES[name])
    with torch.no_grad():
        before = net[:3](contexts)
    slope = 1 - before.tanh().square()
    print(f"{name:8} std before tanh {before.std():.2f}, mean slope {slope.mean():.2f}")

# %% [markdown]
"""## Kaiming's rule instead of 0.2

A sum of `fan_in` terms is sqrt(fan_in) times as wide as one of them. So weights have to be 1 / sqrt(fan_in) wide if
what comes out is to be as wide as what goes in, and a little wider before a tanh, which squeezes: 5/3 / sqrt(fan_in).
"""

# %%
generator = Generator().manual_seed(SEED)
sent, weights = torch.randn(1000, 30, generator=generator), torch.randn(30, 200, generator=generator)
for name, factor in {"1": 1, "1 / sqrt(30)": 30**-0.5, "5/3 / sqrt(30)": TANH_GAIN * 30**-0.5}.items():
    out = sent @ (weights * factor)
    print(f"weights x {name:15} std {out.std():.2f}, after tanh {out.tanh().std():.2f}")

# %% [markdown]
"""The same backwards, and with a BatchNorm after the layer, to which the scale of the weights makes no difference:"""

# %%
EXPERIMENTS["scale"].run(material, SEED)[0]

# %% [markdown]
"""The four stations so far, after 600 steps each:"""

# %%
tabulate(list(stations.values()))

# %% [markdown]
"""## BatchNorm

If the values before a tanh should have mean 0 and std 1, why not give them that? Over the batch, for each neuron:
"""

# %%
net, contexts, targets = begin(RECIPES["kaiming"])
with torch.no_grad():
    before = net[:3](contexts)
mean, var = before.mean(0), before.var(0, correction=0)
normal = (before - mean) / torch.sqrt(var + 1e-5)
print(f"a neuron's std before from {before.std(0).min():.2f} to {before.std(0).max():.2f}")
print(f"             and after from {normal.std(0).min():.2f} to {normal.std(0).max():.2f}")

# %% [markdown]
"""A gain (gamma) and a shift (beta), which are learnt, let the net move away from there if that is better. That is
all there is to it, here and in torch:
"""

# %%
for kind in (layers.BatchNorm1d, nn.BatchNorm1d):
    norm = kind(200)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=generator)
        norm.bias.uniform_(-1, 1, generator=generator)
        assert torch.allclose(norm(before), normal * norm.weight + norm.bias, atol=1e-5)

# %% [markdown]
"""**The price.** What the net makes of an example now depends on its company in the batch. Of one example in 100
batches, how far does each BatchNorm's output move? It works as noise, and noise is a regulariser.
"""

# %%
EXPERIMENTS["jitter"].run(material, SEED)[0]

# %% [markdown]
"""**A bias before it is useless.** The mean that is subtracted holds the bias, so its gradient is 0 but for
rounding:"""

# %%
EXPERIMENTS["bias"].run(material, SEED)[0]

# %% [markdown]
"""## Running statistics

Later there is one name to write and no batch. So a BatchNorm keeps running averages while it trains, and uses those
in eval mode.
"""

# %%
recipe = replace(RECIPES["lecture"], steps=300)
generator = Generator().manual_seed(SEED)
net = make(recipe, material, generator)
with Diagnostics(net, every=100) as diagnostics:
    for loss in descend(net, material, recipe, generator):
        diagnostics.record(loss)

one = contexts[:1]
try:
    net(one)
except ValueError as error:
    print("training mode:", error)
with torch.no_grad():
    print("eval mode:    ", list(net.eval()(one).shape), "logits")

# %% [markdown]
"""Averages lag behind weights that move. The lecture's stage two takes the statistics anew, over the whole training
set, once the weights stand still; `bnfold.calibrate` does it exactly, for any module.
"""

# %%
calibrated = calibration.calibrate(net, material, recipe)[calibration.AS_DRAWN]
for name, each in {"running": net, "calibrated": calibrated}.items():
    print(f"{name:11} dev loss {measure(each, material.dev):.4f}")
plots.draw_statistics(compare_statistics(net, calibrated)[:1])

# %% [markdown]
"""## Layers like torch.nn's

`train/layers.py` has them in plain tensor operations, with torch.nn's names, so that a net is a list of layers. Six
of them, with a BatchNorm after each Linear:
"""

# %%
net, contexts, targets = begin(RECIPES["deep"])
with torch.no_grad():
    print(f"{count_parameters(net):,} parameters, first loss {F.cross_entropy(net(contexts), targets):.4f}")
    twin = to_torch(net)
    apart = float((net.eval()(contexts) - twin.eval()(contexts)).abs().max())
print(f"the same weights in torch.nn's layers: {apart:.1e} apart in eval mode")
twin

# %% [markdown]
"""## What to look at

**Activations.** Without BatchNorm everything hangs on the gain. With gain 1 a tanh layer takes something away each
time:
"""

# %%
first = {
    name: perform(RECIPES[name], material, SEED, 1).diagnostics.records[0]
    for name in ("gain-half", "gain-1", "gain-3", "deep")
}
plots.draw_activations(first["gain-1"])

# %% [markdown]
"""With gain 3 all of them saturate:"""

# %%
plots.draw_activations(first["gain-3"])

# %% [markdown]
"""With BatchNorm they are all alike, whatever the weights:"""

# %%
plots.draw_activations(first["deep"])

# %% [markdown]
"""**Gradients** of these outputs, with gain 0.5, where they vanish on their way back, and with BatchNorm:"""

# %%
display(plots.draw_gradients(first["gain-half"]))
display(plots.draw_gradients(first["deep"]))

# %% [markdown]
"""**Gradients of the weights**, and how large they are beside the weights:"""

# %%
plots.draw_parameter_gradients(first["deep"])

# %% [markdown]
"""**Updates.** The best of the pictures: how far does a step move a weight, beside the weight? About a thousandth is
right, -3 on this scale. First without BatchNorm, where the last layer was shrunk and so moves too fast; then `deep`;
then `deep` at a hundredth of the rate.
"""

# %%
for name in ("plain", "deep", "slow"):
    print(name)
    recipe = replace(RECIPES[name], steps=200, schedule=constant)
    display(plots.draw_updates(perform(recipe, material, SEED).diagnostics))

# %% [markdown]
"""**Depth** is where it matters. Fifty layers, the first batch, before any step:"""

# %%
EXPERIMENTS["depth"].run(material, SEED)[0]

# %% [markdown]
"""## Exercise E01: all zero

All weights and biases of a net are zero, embeddings included, and there is no BatchNorm. Does it train? Before you
run the next cell but one, write down which of these parameters will have moved.
"""

# %%
recipe = replace(RECIPES["zeros"], steps=1000)
generator = Generator().manual_seed(SEED)
net = make(recipe, material, generator)
print(*dict(net.named_parameters()), sep="\n")

# %%
moved = ...  # a set of names, such as {"linear1.weight", "linear1.bias"}

# %%
with Ledger(net) as ledger:
    for loss in descend(net, material, recipe, generator):
        ledger.count(loss)
found = {entry.name for entry in ledger.entries() if entry.moved}
if moved is ...:
    print("no answer yet; the solution is below")
else:
    print("right" if moved == found else "not those")

# %% [markdown]
"""And when it stops: what does it know about names? Think of a reference loss to hold it to.

<details><summary><b>Solution</b></summary>

Only the last bias moves. Backpropagation is a product: the gradient of the last weight holds what the layer gets,
tanh(0) = 0; the gradient of everything before it has passed through the last weight, 0. Neither ever changes, since
the one keeps the other at 0. The last bias alone has a factor that is not 0, the error itself.

So the net cannot see its context. The best that it can do is to know how frequent each character is: the unigram loss.
After 1,000 steps it is on its way there, after the recipe's own 5,000 it is 0.002 away. With BatchNorms it is the last
beta that moves, for the same reasons.

</details>
"""

# %% tags=["hide-input"] cellView="form" jupyter={"source_hidden": true}
# @title Solution in numbers
display(gradients.tabulate(ledger.entries(), recipe.steps))
habits = study_habits(net, material.train)
unigram = data.unigram_loss(y.numpy(), y.numpy())
print(f"train loss {measure(net, material.train):.4f}, unigram loss {unigram:.4f}")
print(f"a context changes the probability of a character by {habits.contrast:g} at most")

# %% [markdown]
"""## Exercise E02: fold the BatchNorms away

A net of three layers with BatchNorms is trained. In eval mode a BatchNorm multiplies and adds, and so does the Linear
before it. Find new weights for the Linear, so that the BatchNorm can go and nothing changes.

The net is the lecture's, except that its Linears have a bias (which training leaves where it began, as we have seen):
of a net that somebody else has trained, you cannot know.
"""

# %%
recipe = RECIPES["lecture"].vary("exercise", "", "", steps=400, biases=Scale(1.0), last_bias=Scale(1.0))
generator = Generator().manual_seed(SEED)
net = make(recipe, material, generator)
for _ in descend(net, material, recipe, generator):
    pass
net = to_torch(net).eval()
net

# %% [markdown]
"""### By hand, one layer

`linear2` and `bn2`, in float64: there a right answer is right to 15 digits, and a wrong one cannot hide behind
rounding.
"""

# %%
exact = copy.deepcopy(net).double().requires_grad_(False)
linear, norm = exact.linear2, exact.bn2
inputs = exact[:5](material.train.contexts)
wanted = norm(linear(inputs))


def deviate(W, b):
    """How far x W^T + b is from Linear and BatchNorm: the worst number, as a share of the largest."""
    return float((inputs @ W.T + b - wanted).abs().max() / wanted.abs().max())


# %% [markdown]
"""You have `linear.weight` (200, 200) and `linear.bias`, `norm.weight` (gamma), `norm.bias` (beta),
`norm.running_mean`, `norm.running_var` and `norm.eps`.
"""

# %%
W2 = ...
b2 = ...

if W2 is ... or b2 is ...:
    print("no answer yet; the solution is below")
else:
    assert deviate(W2, b2) < 1e-12, f"off by {deviate(W2, b2):.1e} of the largest output"
    print("folded")

# %% [markdown]
"""<details><summary><b>A hint</b></summary>

Write out y = gamma (W x + b - mean) / std + beta, and sort it into what stands before x, and the rest.

</details>
"""

# %% tags=["hide-input"] cellView="form" jupyter={"source_hidden": true}
# @title Solution
scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
W2 = linear.weight * scale[:, None]
b2 = (linear.bias - norm.running_mean) * scale + norm.bias

assert deviate(W2, b2) < 1e-12
print(f"off by {deviate(W2, b2):.1e} of the largest output")

# %% [markdown]
"""### What goes wrong

Each of these runs, and none gives an error. The numbers tell. The last column is a tolerance that one sees in tests.
"""


# %%
def fold_by(std, mean=norm.running_mean, bias=linear.bias):
    scale = norm.weight / std
    return linear.weight * scale[:, None], (bias - mean) * scale + norm.bias


std = torch.sqrt(norm.running_var + norm.eps)
batch = linear(inputs[:32])
batch_std = torch.sqrt(batch.var(0, correction=0) + norm.eps)
attempts = {
    "right": fold_by(std),
    "variance for standard deviation": fold_by(norm.running_var + norm.eps),
    "eps forgotten": fold_by(torch.sqrt(norm.running_var)),
    "statistics of the batch": fold_by(batch_std, mean=batch.mean(0)),
    "old bias forgotten": fold_by(std, bias=0),
    "columns scaled, not rows": (linear.weight * scale, b2),
}
off = {name: deviate(*attempt) for name, attempt in attempts.items()}
assert [name for name in off if off[name] < 1e-12] == ["right"]
rows = [
    (name, f"{value:.1e}", *("yes" if value < bound else "no" for bound in (1e-12, 1e-3)))
    for name, value in off.items()
]
Table(("how it was folded", "off, of the largest output", "within 1e-12", "within 1e-3"), rows)

# %% [markdown]
"""The forgotten eps is the one that slips through: variances near 1 make 1e-5 look small, and a test in float32 with
a generous tolerance is content. In a neuron that hardly varies it is not small at all:
"""

# %%
for variance in (1.0, 1e-3, 1e-6):
    print(f"variance {variance:g}: without eps {math.sqrt((variance + 1e-5) / variance):.4f} times too large")

# %% [markdown]
"""### The whole net, with bnfold

`bnfold.fold` does this for every BatchNorm of any module. A context has three characters of 27, so there are 19,683
inputs in the world, and the two nets are compared on all of them, in one call. A notebook shows the report by itself.
"""

# %%
every = InputDomain((3,), "int64", 0, len(vocabulary)).every()
folded, report = bnfold.fold(net, every)
report

# %%
assert torch.allclose(folded.linear2.weight.double(), W2, rtol=1e-6)
assert torch.allclose(folded.linear2.bias.double(), b2, rtol=1e-6)
folded

# %% [markdown]
"""The weights are those by hand, rounded to float32. The same losses, then, and the same names (badly invented: 400
steps are few):
"""

# %%
rows = [
    (
        name,
        f"{measure(each, material.train):.6f}",
        f"{measure(each, material.dev):.6f}",
        " ".join(invent(each, vocabulary, 3, 6, Generator().manual_seed(SEED))),
    )
    for name, each in {"net": net, "folded": folded}.items()
]
Table(("", "train", "dev", "names"), rows, words=(3,))

# %% [markdown]
"""And the mistakes, put into the net? `bnfold.verify` holds any two models to each other, with bounds that follow
from their rounding. It names the worst input:
"""


# %%
def put_into_net(W, b):
    other = copy.deepcopy(folded).requires_grad_(False)
    other.linear2.weight.copy_(W)
    other.linear2.bias.copy_(b)
    return other


for name in ("right", "variance for standard deviation", "eps forgotten"):
    try:
        evidence = bnfold.verify(net, put_into_net(*attempts[name]), every[::100])
        print(f"{name}: equal, but for {max(each.deviation for each in evidence):.1e}")
    except bnfold.NotEquivalent as error:
        print(f"{name}: {error}")

# %% [markdown]
"""Does the forgotten eps come out as equal? By then it is a few units in the last place of float32 weights, and
nobody who has the two nets alone can tell it from rounding. Hence the float64 above, and hence `bnfold.fold` compares
in float64 what it computed *before* it rounds, with a bound of 1e-12.

## From here

```
python -m train                   # a good net of this kind, in a few seconds        -> ckpt.pt
python -m bnfold.fold ckpt.pt     # this exercise, as one command                    -> ckpt.folded.pt
python -m export                  # seven nodes for onnxruntime                      -> ckpt.onnx
python -m train.lab --quick       # all stations and experiments, as a page          -> lab.html
```

The other notebook, `fold_your_model.ipynb`, folds modules and files that are no lecture's.
"""
