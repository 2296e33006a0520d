"""What is deployed computes what was trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from net import FOLDER, load

import bnfold

Assert = Callable[..., None]


def test_the_file_computes_what_the_net_computes(assert_equivalent: Assert) -> None:
    """The export changed nothing."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert_equivalent(load(), FOLDER / "net.onnx", images)


def test_the_folded_file_computes_what_the_file_computes(assert_equivalent: Assert) -> None:
    """Nor did the fold; the inputs are made up from what the file declares."""
    assert_equivalent(FOLDER / "net.onnx", FOLDER / "net.folded.onnx")


def test_the_folded_net_computes_what_the_net_computes(assert_equivalent: Assert) -> None:
    """The same for those who deploy the module itself."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    net = load()
    assert_equivalent(net, bnfold.fold(net, images)[0], images)
