"""How often a right fold is refused: `python -m benchmarks.refusals`.

The small nets of `nets`, with positive gammas and with mixed ones, and with biases and means moved far out by the same
amount (1e4), where float64 loses four digits to cancellation; each as a module in float64, float32, float16 and
bfloat16, on inputs of several seeds. Every fold is proved over the real numbers before it is compared, so that a fold
that is not equivalent by measurement is a right one that is refused. What cannot be run in a type is counted apart.

With `--timm`, where that is installed, also nets of its zoo at the size of their papers, with random statistics, on
images of 96 or 224 pixels.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

import bnfold
from benchmarks.nets import NETS, build

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

ZOO = (
    *(
        "resnet18",
        "mobilenetv2_100",
        "mobilenetv3_small_100",
        "mnasnet_100",
        "efficientnet_b0",
        "regnety_002",
    ),
    *(
        "densenet121",
        "levit_128s",
        "ghostnet_100",
        "repvgg_a0",
        "resnet26d",
        "skresnet18",
        "tinynet_e",
        "lcnet_050",
    ),
    *("hardcorenas_a", "fbnetc_100", "rexnet_100", "xception41", "dla34", "hrnet_w18_small", "vovnet39a"),
    *("selecsls42b", "mobileone_s0", "fastvit_t8", "edgenext_xx_small"),
)
FIXED = ("levit", "edgenext", "fastvit")
"""Families that want the size of their papers."""

FAR = 1e4
"""How far biases and means are moved."""


def main() -> None:
    """Print one line for each dtype, and one for each refusal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many inputs each net is tried on")
    parser.add_argument("--timm", action="store_true", help="nets of timm as well")
    parser.add_argument("--device", default="cpu", help="where nets are folded and compared")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for dtype in DTYPES:
        found = Counter[str]()
        for label, model, inputs in chain(_situations(options.seeds), _zoo() if options.timm else ()):
            outcome = _try(model, inputs, dtype, options.device)
            found[outcome.partition(":")[0]] += 1
            if outcome.startswith("refused"):
                print(f"  {label}: {outcome}")
        name = str(dtype).removeprefix("torch.")
        print(
            f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in sorted(found.items()))}",
            flush=True,
        )


def _situations(seeds: int) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    for name in NETS:
        for gammas in ("positive", "mixed"):
            model, _ = build(name, gammas, small=True)
            for seed in range(seeds):
                torch.manual_seed(seed)
                yield f"{name}, {gammas} gammas", model, NETS[name].small_inputs(2)
    for seed in range(seeds):
        yield "far out", *_far_out(seed)


def _zoo() -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    import timm

    for name in ZOO:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(norm.weight, 0.7, 1.3)
                nn.init.normal_(norm.bias, 0, 0.2)
        size = 224 if name.startswith(FIXED) else 96
        yield name, model, (torch.randn(1, 3, size, size),)


def _far_out(seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two Linears with a BatchNorm between them that takes away what the first one adds."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 10)).eval()
    with torch.no_grad():
        model[0].bias += FAR
        model[1].running_mean += FAR
    return model, (torch.randn(8, 20),)


def _try(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, device: str = "cpu") -> str:
    """What becomes of folding a net in a dtype, in words that begin with what is counted."""
    model = copy.deepcopy(model).to(device, dtype)
    given = tuple(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in inputs)
    try:
        _, report = bnfold.fold(model, given)
    except bnfold.NotEquivalent as error:
        return f"refused: {error}"
    except bnfold.BnfoldError as error:
        return f"not run: {error}"
    return "folded" if report.verified else "unverified"


if __name__ == "__main__":
    main()
