"""A net of the lecture's shape that was not trained but has statistics of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bnfold.checkpoint import Checkpoint, InputDomain, save

LETTERS = ".abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Checkpoint]:
    """Return a function that builds a checkpoint of the lecture's net over some letters."""

    def make(letters: str = LETTERS, hidden: int = 20, batchnorm: bool = True) -> Checkpoint:
        torch.manual_seed(7)
        net, sizes = nn.Sequential(), [30, hidden, hidden, len(letters)]
        net.add_module("embedding", nn.Embedding(len(letters), 10))
        net.add_module("flatten", nn.Flatten())
        for i in (1, 2, 3):
            net.add_module(f"linear{i}", nn.Linear(sizes[i - 1], sizes[i], bias=not batchnorm))
            if batchnorm:
                net.add_module(f"bn{i}", nn.BatchNorm1d(sizes[i]))
            if i < 3:
                net.add_module(f"tanh{i}", nn.Tanh())
        for _ in range(30):
            net(torch.randint(0, len(letters), (64, 3)))
        for name, parameter in net.named_parameters():
            if name.startswith("bn"):
                parameter.data += torch.randn_like(parameter) * 0.7
        return Checkpoint(net.eval(), InputDomain((3,), "int64", 0, len(letters)), tuple(letters))

    return make


@pytest.fixture(scope="session")
def content(make_checkpoint: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of such a checkpoint over the 27 characters, BatchNorms and all."""
    path = tmp_path_factory.mktemp("content") / "ckpt.pt"
    save(path, make_checkpoint())
    return path.read_bytes()


@pytest.fixture
def ckpt(tmp_path: Path, content: bytes) -> Path:
    """Return the file of that checkpoint, in a folder of its own."""
    (tmp_path / "ckpt.pt").write_bytes(content)
    return tmp_path / "ckpt.pt"
