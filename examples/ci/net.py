"""A net with BatchNorms, and its weights from the file beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).parent


def build() -> nn.Sequential:
    """The net without its weights, in eval mode."""
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    return layers.eval()


def load() -> nn.Sequential:
    """The net as it was trained."""
    net = build()
    net.load_state_dict(torch.load(FOLDER / "net.pt", weights_only=True))
    return net
