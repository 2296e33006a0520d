"""bnfold.shapes: the formulas against torch itself, on layers, settings and shapes drawn at random."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from bnfold.layers import LAYERS
from bnfold.shapes import Misfit, shape_after, takes_integers

SIZES = (1, 2, 3, 4, 6)
DRAWS = 100


def draw_layer(kind: str, draw: random.Random) -> nn.Module:
    """A layer of a class of the table, with settings that often fit and sometimes do not."""
    rank = int(kind[-2]) if kind.endswith("d") and kind[-2].isdigit() else 0
    channels = draw.choice((2, 4))

    def each(*values):
        return draw.choice(values) if draw.random() < 0.5 else tuple(draw.choice(values) for _ in range(rank))

    window = {"kernel_size": each(1, 2, 3), "stride": each(1, 2, 3), "padding": each(0, 1, 1, 2)}
    family = kind[:-2] if rank else kind
    options = {
        "Embedding": {"num_embeddings": 3, "embedding_dim": 4},
        "Linear": {"in_features": draw.choice(SIZES), "out_features": 3},
        "Conv": {
            **window, "in_channels": channels, "out_channels": 4, "dilation": each(1, 2), "groups": draw.choice((1, 2)),
            "padding_mode": draw.choice(("zeros", "reflect", "replicate", "circular")),
        },
        "ConvTranspose": {
            **window, "in_channels": channels, "out_channels": 4, "dilation": each(1, 2), "output_padding": each(0, 1),
        },
        "MaxPool": {**window, "dilation": each(1, 2), "ceil_mode": draw.random() < 0.5},
        "AvgPool": {**window, "ceil_mode": draw.random() < 0.5},
        "AdaptiveAvgPool": {"output_size": each(1, 2, None) or 1},
        "AdaptiveMaxPool": {"output_size": each(1, 2, None) or 1},
        "ZeroPad": {"padding": draw.choice((1, tuple(range(2 * rank))))},
        "Flatten": {"start_dim": draw.choice((0, 1, 2)), "end_dim": draw.choice((-1, -2, 1))},
        "Unflatten": {"dim": draw.choice((1, -1, 2)), "unflattened_size": draw.choice(((2, 2), (3, 2), (1, 4)))},
        "BatchNorm": {"num_features": channels},
        "InstanceNorm": {"num_features": channels, "track_running_stats": draw.random() < 0.5},
        "GroupNorm": {"num_groups": 2, "num_channels": channels},
        "LayerNorm": {"normalized_shape": tuple(draw.choice(SIZES[:4]) for _ in range(draw.choice((1, 2))))},
        "Softmax": {"dim": draw.choice((1, -1, 3))},
        "LogSoftmax": {"dim": draw.choice((1, -2, 3))},
        "PReLU": {"num_parameters": draw.choice((1, 2, 4))},
        "Threshold": {"threshold": 0.0, "value": 0.0},
    }.get(family, {})  # fmt: skip
    if "padding" in options and draw.random() < 0.2 and family == "Conv":
        options |= {"padding": draw.choice(("same", "valid")), "stride": 1}
    return getattr(nn, kind)(**options).eval()


def draw_shape(kind: str, draw: random.Random) -> tuple[int, ...]:
    rank = int(kind[-2]) if kind.endswith("d") and kind[-2].isdigit() else draw.choice((0, 1, 2))
    axes = rank + draw.choice((1, 1, 1, 1, 0, 2))
    return (
        2,
        *(draw.choice((2, 4)) for _ in range(min(axes, 1))),
        *(draw.choice(SIZES) for _ in range(axes - 1)),
    )


def run(layer: nn.Module, shape: tuple[int, ...], whole: bool) -> tuple[int, ...] | None:
    try:
        made = layer(torch.ones(shape, dtype=torch.int64 if whole else torch.float32))
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, AssertionError):
        return None
    return tuple(made.shape) if made.numel() else None


def formula(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return shape_after(layer, shape)
    except Misfit:
        return None


def is_not_covered(kind: str, shape: tuple[int, ...]) -> bool:
    if kind.startswith("AdaptiveAvgPool"):
        return len(shape) > int(kind[-2]) + 2
    return kind.startswith(("Conv", "InstanceNorm")) and len(shape) == int(kind[-2]) + 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_the_formula_gives_what_torch_gives_and_refuses_what_torch_refuses(kind: str) -> None:
    draw, fitted = random.Random(kind), 0
    for _ in range(DRAWS):
        try:
            layer = draw_layer(kind, draw)
        except ValueError:
            continue
        shape = draw_shape(kind, draw)
        if is_not_covered(kind, shape):
            continue
        made = run(layer, shape, kind == "Embedding")
        assert formula(layer, shape) == made, (layer, shape)
        fitted += made is not None
    assert fitted >= 5


@pytest.mark.parametrize("kind", ["Embedding", "Identity", "Flatten", "ZeroPad2d", "ReLU", "Dropout"])
def test_what_is_said_to_take_integers_does(kind: str) -> None:
    draw = random.Random(kind)
    layer = nn.Flatten() if kind == "Flatten" else draw_layer(kind, draw)
    assert takes_integers(layer)
    assert run(layer, (2, 4, 4, 4), whole=True) is not None


def test_saving_loading_and_folding_a_checkpoint_imports_no_compiler(tmp_path) -> None:
    code = f"""
import sys, torch
from torch import nn
from bnfold import checkpoint
from bnfold.fold import main
before = set(sys.modules)
layers = [nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh()]
layers += [nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 3)]
given = checkpoint.Checkpoint(nn.Sequential(*layers), checkpoint.InputDomain((3,), "int64", 0, 5))
checkpoint.save({str(tmp_path / "c.pt")!r}, given)
main([{str(tmp_path / "c.pt")!r}, "--dry-run"])
print("new:", *(set(sys.modules) - before) & {{"torch._dynamo", "torch._decomp", "torch._meta_registrations", "sympy"}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nothing written" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["new:"]
