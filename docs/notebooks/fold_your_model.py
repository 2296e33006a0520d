# %% [markdown]
"""# Fold your model

From a trained module to a file for inference without BatchNorms: what was folded, what stayed and why, how far it is
proved, and what to do before quantisation. Put your own model in place of `Net`.
"""

# %% [markdown]
"""The next cell installs what is missing, where bnfold is: in Colab, for example. Elsewhere it does nothing."""

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("bnfold") is None:
    wanted = "bnfold[all]", "onnxscript"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)

# %%
import json
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from IPython.display import Markdown
from torch import nn

import bnfold
from bnfold import reasons

torch.manual_seed(1)
folder = Path(tempfile.mkdtemp())
logging.disable(logging.WARNING)  # exporters and quantisers talk a lot


class Net(nn.Module):
    """Two branches; BatchNorms behind a concatenation, in a gate, in front of the last layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.near, self.far = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=2, dilation=2)
        self.both_norm = nn.BatchNorm2d(32)
        self.gate_norm = nn.BatchNorm2d(32)
        self.head_norm, self.head = nn.BatchNorm1d(32), nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        x = self.both_norm(torch.cat([self.near(x), self.far(x)], 1)).relu()
        x = x * self.gate_norm(x.tanh()).sigmoid()
        return self.head(self.head_norm(x.mean((2, 3))))


model, images = Net(), torch.randn(16, 3, 24, 24)
for _ in range(20):
    model(torch.randn(16, 3, 24, 24))  # instead of a training, so that there are statistics
model.eval()

# %% [markdown]
"""## A module

The second argument is what the module is called with. `model` is not changed; `folded` is of the same class, with its
own code. The report shows itself:
"""

# %%
folded, report = bnfold.fold(model, images)
report

# %% [markdown]
"""From the top: what the verdicts rest on that no comparison shows, if there is anything; what became of each
BatchNorm; what was proved, for all inputs, over the real numbers; what was compared, and with which bounds. All of it
is data, too:
"""

# %%
for verdict in report.verdicts:
    print(f"{verdict.name:10} {verdict.outcome:7} {', '.join(verdict.into)}")
assert report.verified
assert {verdict.name for verdict in report.verdicts if verdict.outcome == "kept"} == {"gate_norm"}

# %% [markdown]
"""## Why did one stay?

The verdict says what is in the way, on both sides, and every reason has a way out; for a BatchNorm between two bends,
it is that there is none. `lower=True` turns what stays into a multiply and an add.
"""

# %%
stayed = next(verdict for verdict in report.verdicts if verdict.outcome == "kept")
said = {reason.sentence(): reason.way_out for reason in reasons.explain(stayed.reason)}
Markdown("\n".join([stayed.reason, "", *(f"- **{says}** {way_out}" for says, way_out in said.items())]))

# %% [markdown]
"""Others can be mended. The most frequent one is a BatchNorm that was left in training mode:"""

# %%
model.stem_norm.train()
_, unready = bnfold.fold(model, images)
verdict = next(verdict for verdict in unready.verdicts if verdict.name == "stem_norm")
print(f"{verdict.outcome}: {verdict.reason}\n    {reasons.explain(verdict.reason)[0].way_out}")

model.eval()
folded, report = bnfold.fold(model, images)
print(report.summary())

# %% [markdown]
"""## Hold two models to each other

`bnfold.fold` has done this already. `bnfold.verify` does it for any two models, also such as bnfold has not made:
modules, ONNX files, checkpoints, exported programs.
"""

# %%
for evidence in bnfold.verify(model, folded, images):
    print(f"{evidence.question}: {evidence.deviation:.1e} apart, allowed {evidence.bound:.1e}")

with torch.no_grad():
    folded.near.weight[3, 5] += 0.01
try:
    bnfold.verify(model, folded, images)
except bnfold.NotEquivalent as error:
    print(error)
else:
    raise AssertionError("a weight was changed, and nobody noticed")

# %% [markdown]
"""## A file

ONNX files are folded without torch. This one is exported from the unfolded module; your own file does as well. The
certificate says what was done, so that it can be checked elsewhere from the two files alone.
"""

# %%
before, after, certificate = folder / "net.onnx", folder / "net.folded.onnx", folder / "net.json"
batch = torch.export.Dim("batch")
settings = {"dynamo": True, "optimize": False, "verbose": False}
with warnings.catch_warnings(action="ignore"):
    program = torch.onnx.export(model, (images,), dynamic_shapes=({0: batch},), **settings)
program.save(before)

report = bnfold.fold_file(before, after, runtime="onnxruntime", certificate=certificate)
print(report)


# %%
def count(path):
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    return {"nodes": len(kinds), "BatchNormalization": kinds.count("BatchNormalization")}


print(before.name, count(before))
print(after.name, count(after))

# %% [markdown]
"""As commands, `python -m bnfold.fold net.onnx --certificate net.json`, and for whoever has received the files:"""

# %%
command = [sys.executable, "-m", "bnfold.verify", before, after, "--certificate", certificate]
checked = subprocess.run(command, capture_output=True, text=True, check=False)
print(checked.stdout, checked.stderr)
assert checked.returncode == 0

# %% [markdown]
"""A certificate is JSON, and bound to the two files by their digests. A changed weight is found, without a model
being run:"""

# %%
print("what it holds:", *json.loads(certificate.read_text()))
changed = onnx.load(after)
weight = next(tensor for tensor in changed.graph.initializer if len(tensor.dims) == 4)
numbers = onnx.numpy_helper.to_array(weight) * np.float32(1.0001)
weight.CopyFrom(onnx.numpy_helper.from_array(numbers, weight.name))
onnx.save(changed, folder / "changed.onnx")

command[4] = folder / "changed.onnx"
checked = subprocess.run(command, capture_output=True, text=True, check=False)
print(f"exit code {checked.returncode}:", checked.stderr)
assert checked.returncode

# %% [markdown]
"""## Before quantisation

Fold first: a quantised weight is an integer with a scale, into which an affine map cannot be folded exactly. So
quantise the folded file, here with onnxruntime's own quantiser. `runtime="any"` leaves the fewest BatchNorms, and
`lower=True` none: what stays is a multiply and an add.
"""

# %%
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static


class Images(CalibrationDataReader):
    """Some batches; take real ones."""

    def __init__(self, name):
        rng = np.random.default_rng(1)
        shape = 16, 3, 24, 24
        self.batches = iter([{name: rng.normal(size=shape).astype(np.float32)} for _ in range(4)])

    def get_next(self):
        return next(self.batches, None)


def quantise(source, target):
    name = onnx.load(source).graph.input[0].name
    quantize_static(source, target, Images(name), quant_format=QuantFormat.QDQ)
    return target


bnfold.fold_file(before, folder / "plain.onnx", runtime="any", lower=True)
print("folded, then quantised:", count(quantise(folder / "plain.onnx", folder / "int8.onnx")))
assert not count(folder / "int8.onnx")["BatchNormalization"]

# %% [markdown]
"""The other way round it is too late, and bnfold says so:"""

# %%
_, late = bnfold.fold(onnx.load(quantise(before, folder / "late.onnx")))
print(late.summary())
for verdict in late.verdicts:
    print(f"{verdict.name}: {verdict.reason}")
assert all("quantised" in verdict.reason for verdict in late.verdicts)

# %% [markdown]
"""## Further

- *First steps* and the guides: a file, a module, in CI, before quantisation (`docs/`, or the documentation site).
- *Why did my BatchNorm stay?* has every reason, with its way out.
- `report.to_html()` is the report as one page to be sent around, `report.to_json()` the record for a program.
- Statistics of your data set instead of those that were collected along the way: `bnfold.calibrate(model, batches)`.
"""
