from __future__ import annotations

import copy
from collections import Counter

import onnx
import pytest
import torch
from torch import Generator, nn

import bnfold
from bnfold.errors import NotEquivalent
from export.prove import Examples, prove
from export.write import write
from train.resnet import ResNet, anchor, build, main


def operators(content):
    model = onnx.load_from_string(content) if isinstance(content, bytes) else onnx.load(content)
    return Counter(node.op_type for node in model.graph.node)


def draw_images(count=4, size=32):
    return torch.rand(count, 3, size, size, generator=Generator().manual_seed(0))


def test_it_is_resnet_50():
    with torch.device("meta"):
        net = ResNet()
        assert net(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    modules = Counter(type(module) for module in net.modules())
    assert (modules[nn.Conv2d], modules[nn.BatchNorm2d], modules[nn.Linear]) == (53, 53, 1)
    assert sum(p.numel() for p in net.parameters()) == 25_557_032  # as torchvision counts its own
    assert all(conv.bias is None for conv in net.modules() if isinstance(conv, nn.Conv2d))
    names = net.state_dict().keys()
    assert {"layer1.0.downsample.1.running_var", "layer4.2.conv3.weight", "fc.bias"} <= names
    assert [net.get_submodule(f"layer{i}.0.conv2").stride[0] for i in range(1, 5)] == [1, 2, 2, 2]


def test_anchored_statistics_keep_a_deep_net_alive():
    images = draw_images()
    net = build(images, small=True)
    with torch.no_grad():
        logits = net(images)
    assert (logits[0] - logits[1]).abs().max() > 0.05 * logits.abs().max()
    gammas = torch.cat([m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert 0.25 < (gammas < 0).float().mean() < 0.35
    assert torch.equal(build(images, small=True)(images), net(images))
    assert anchor(ResNet((1,), 4, 3), images, Generator()).training


def test_every_batchnorm_is_folded_and_one_variance_that_is_off_is_seen():
    images = draw_images()
    net = build(images, small=True)
    folded, report = bnfold.fold(net, images)
    assert {verdict.outcome for verdict in report.verdicts} == {"folded"}
    assert len(report.verdicts) == 32
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    off = copy.deepcopy(net)
    off.layer3[1].bn2.running_var *= 1.002
    with pytest.raises(NotEquivalent):
        bnfold.verify(off, folded, images)


def test_the_command_writes_two_proven_files_and_prints_both(tmp_path, capsys):
    assert main(["--small", "--size", "32", "--no-timing", "-o", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    rows = {line.rsplit(maxsplit=2)[0].strip(): line.split()[-2:] for line in lines}
    before, after = (operators(tmp_path / name) for name in ("resnet.onnx", "resnet.folded.onnx"))
    assert [before["BatchNormalization"], after["BatchNormalization"]] == [32, 0]
    assert rows["BatchNorms"] == ["32", "0"]
    assert rows["ONNX nodes"] == [str(before.total()), str(after.total())]
    assert before.total() - after.total() == 32
    net = build(draw_images(), small=True)
    prove((tmp_path / "resnet.folded.onnx").read_bytes(), net, Examples(draw_images()))


def test_the_exporter_would_have_folded_by_itself():
    net = anchor(ResNet((1,), 4, 3).eval(), draw_images(), Generator().manual_seed(0))
    found = operators(write(net, draw_images(2), optimise=True).SerializeToString())
    assert (found["Conv"], found["BatchNormalization"]) == (5, 0)


def test_what_cannot_be_used_is_refused_in_one_line_before_anything_is_built(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--size", "31"])
    assert "--size 31" in capsys.readouterr().err.splitlines()[-1]
    assert main(["-o", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "none is no folder" in error
