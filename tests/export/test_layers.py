"""export.layers: what a row draws is what torch computes, in as few nodes as can be, with nothing left to compute."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from bnfold import layers as checkpoint_layers
from bnfold.errors import NotEquivalent
from export.layers import ROWS, NoRow, Sketch, draw
from export.prove import Examples, _batches, prove
from export.write import write

IMAGES = {1: (4, 8), 2: (4, 8, 6), 3: (4, 4, 6, 4)}

CASES: list[tuple[nn.Module, tuple[int, ...], str]] = [
    (nn.Linear(8, 3), (8,), "Gemm"),
    (nn.Linear(8, 3, bias=False), (8,), "Gemm"),
    (nn.Linear(8, 3), (4, 8), "MatMul Add"),
    (nn.Linear(8, 3, bias=False), (4, 8), "MatMul"),
    (nn.Flatten(), (4, 8), "Flatten"),
    (nn.Flatten(2), (4, 2, 3), "Reshape"),
    (nn.Unflatten(1, (2, 4)), (8,), "Reshape"),
    (nn.Identity(), (8,), "Identity"),
    (nn.LayerNorm((4, 8), eps=1e-3), (4, 8), "LayerNormalization"),
    (nn.LayerNorm(8, elementwise_affine=False), (4, 8), "LayerNormalization"),
    (nn.GroupNorm(2, 4), (4, 8), "Reshape InstanceNormalization Reshape Mul Add"),
    (nn.GroupNorm(2, 4, affine=False), (4, 8, 2), "Reshape InstanceNormalization Reshape"),
    (nn.Dropout(), (8,), "Identity"),
    (nn.AlphaDropout(), (8,), "Identity"),
    (nn.FeatureAlphaDropout(), (4, 8), "Identity"),
    (nn.ReLU(inplace=True), (8,), "Relu"),
    (nn.ReLU6(), (8,), "Clip"),
    (nn.Hardtanh(-0.5, 0.25), (8,), "Clip"),
    (nn.SELU(), (8,), "Selu"),
    (nn.SiLU(), (8,), "Sigmoid Mul"),
    (nn.Mish(), (8,), "Mish"),
    (nn.Hardswish(), (8,), "HardSwish"),
    (nn.Hardsigmoid(), (8,), "HardSigmoid"),
    (nn.Tanh(), (8,), "Tanh"),
    (nn.Sigmoid(), (8,), "Sigmoid"),
    (nn.LogSigmoid(), (8,), "Neg Softplus Neg"),
    (nn.Softsign(), (8,), "Softsign"),
    (nn.Tanhshrink(), (8,), "Tanh Sub"),
    (nn.GELU(), (8,), "Gelu"),
    (nn.GELU("tanh"), (8,), "Gelu"),
    (nn.ELU(0.5), (8,), "Elu"),
    (nn.CELU(0.5), (8,), "Celu"),
    (nn.LeakyReLU(0.2), (8,), "LeakyRelu"),
    (nn.PReLU(), (4, 8), "PRelu"),
    (nn.PReLU(4), (4, 8), "PRelu"),
    (nn.Softplus(), (8,), "Softplus"),
    (nn.Softplus(2.0), (8,), "Mul Softplus Div"),
    (nn.Softmax(1), (4, 8), "Softmax"),
    (nn.LogSoftmax(-1), (4, 8), "LogSoftmax"),
    (nn.ZeroPad2d((1, 0, 2, 3)), IMAGES[2], "Pad"),
    (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2), IMAGES[2], "Conv"),
    (nn.Conv2d(4, 6, 3, padding="same", dilation=(1, 2)), IMAGES[2], "Conv"),
    (nn.Conv2d(4, 6, (2, 3), padding="same", bias=False), IMAGES[2], "Conv"),
    (nn.Conv2d(4, 6, 3, padding="valid"), IMAGES[2], "Conv"),
    (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), IMAGES[2], "Pad Conv"),
    (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="replicate"), IMAGES[2], "Pad Conv"),
    (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"), IMAGES[2], "Pad Conv"),
    (nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 0), 2, False), IMAGES[2], "ConvTranspose"),
    (nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2)), IMAGES[2], "MaxPool"),
    (nn.AvgPool2d((3, 2), (2, 1), (1, 0)), IMAGES[2], "AveragePool"),
    (nn.AvgPool2d((3, 2), (2, 1), (1, 0), count_include_pad=False), IMAGES[2], "AveragePool"),
    (nn.AdaptiveAvgPool2d((4, None)), IMAGES[2], "AveragePool"),
    (nn.BatchNorm2d(4, affine=False), IMAGES[2], "BatchNormalization"),
    (nn.InstanceNorm2d(4), IMAGES[2], "InstanceNormalization"),
    (nn.InstanceNorm2d(4, track_running_stats=True), IMAGES[2], "BatchNormalization"),
]
for rank, shape in IMAGES.items():
    for kind, arguments, nodes in [
        ("Conv", (4, 6, 3, 2, 1, 1, 2, False), "Conv"),
        ("ConvTranspose", (4, 6, 3, 2, 1, 1, 2), "ConvTranspose"),
        ("BatchNorm", (4, 1e-3), "BatchNormalization"),
        ("InstanceNorm", (4, 1e-3, 0.1, True), "InstanceNormalization"),
        ("Dropout", (0.25,), "Identity"),
        ("MaxPool", (2, 1), "MaxPool"),
        ("AvgPool", (2, 2, 1), "AveragePool"),
        ("AdaptiveAvgPool", (1,), "GlobalAveragePool"),
        ("AdaptiveMaxPool", (2,), "MaxPool"),
        ("ZeroPad", (1,), "Pad"),
    ]:
        CASES.append((getattr(nn, f"{kind}{rank}d")(*arguments), shape, nodes))


def randomise(net: nn.Module) -> nn.Sequential:
    """Return a net in eval mode, every tensor of numbers somewhere in 0.5 to 1.5, weights of either sign."""
    torch.manual_seed(1)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            sign = 1 if "running" in name else torch.where(torch.rand_like(tensor) < 0.3, -1.0, 1.0)
            tensor.copy_((torch.rand_like(tensor) + 0.5) * sign)
    return nn.Sequential(net).eval()


def test_every_layer_that_a_checkpoint_may_hold_has_a_row_and_a_case() -> None:
    wanted = {getattr(nn, name) for name in checkpoint_layers.LAYERS}
    assert set(ROWS) == wanted
    assert {type(layer) for layer, _, _ in CASES} == wanted - {nn.Embedding}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("layer", "shape", "nodes"), CASES, ids=lambda value: str(value)[:40])
def test_a_row_draws_what_torch_computes(layer: nn.Module, shape: tuple[int, ...], nodes: str) -> None:
    net = randomise(layer)
    inputs = 2 * torch.randn(7, *shape)
    for batch in (1, 3, "batch"):
        proto = write(net, inputs[:2], batch)
        assert [node.op_type for node in proto.graph.node] == nodes.split()
        assert prove(proto.SerializeToString(), net, Examples(inputs)).inputs == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_keep_theirs(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU6(), nn.Linear(6, 4), nn.Tanh(), nn.Softmax(1))
    net, inputs = net.to(dtype).eval(), torch.randn(5, 8, dtype=dtype)
    proto = write(net, inputs[:2])
    assert {tensor.data_type for tensor in proto.graph.initializer} == {
        onnx.helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)
    }
    prove(proto.SerializeToString(), net, Examples(inputs))


def test_names_come_from_the_layers_and_never_collide() -> None:
    net = nn.Sequential()
    net.add_module("input", nn.Linear(4, 4))
    net.add_module("output", nn.SiLU())
    net.add_module("input/Gemm", nn.Linear(4, 4))
    proto = write(net.eval(), torch.zeros(2, 4))
    graph = proto.graph
    names = [value.name for value in (*graph.input, *graph.initializer)]
    names += [name for node in graph.node for name in node.output]
    assert len(set(names)) == len(names)
    assert [value.name for value in (*graph.input, *graph.output)] == ["input", "output"]
    assert "input.weight" in names
    prove(proto.SerializeToString(), net, Examples(torch.randn(3, 4)))


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.BatchNorm1d(4, track_running_stats=False), (4,), "no running statistics"),
        (nn.AdaptiveAvgPool1d(3), (4, 8), "windows of unequal size"),
        (nn.MaxPool1d(2, ceil_mode=True), (4, 7), "ceil_mode"),
        (nn.AvgPool2d(2, divisor_override=3), IMAGES[2], "divisor_override"),
        (nn.Softmax(0), (4,), "mixes the examples of a batch"),
        (nn.Flatten(0), (4,), "mixes the examples of a batch"),
        (nn.Softplus(1.0, 5.0), (4,), "threshold of 5"),
        (nn.GLU(), (4,), "is a GLU, which has no row"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_named(layer: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    net = nn.Sequential(nn.Identity(), layer).eval()
    with pytest.raises(NoRow, match=f"layer `1` .*{reason}"):
        draw(net, torch.randn(2, *shape), Sketch(1, {"input", "output"}), "input")


def test_the_proof_sees_a_row_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = nn.Sequential(nn.GELU()).eval(), torch.randn(50, 4)
    monkeypatch.setitem(ROWS, nn.GELU, lambda sketch, x, layer: sketch.node("Gelu", x, approximate="tanh"))
    with pytest.raises(NotEquivalent, match="output"):
        prove(write(net, inputs[:2]).SerializeToString(), net, Examples(inputs))


def test_the_proof_of_a_free_batch_tries_more_than_one_size() -> None:
    inputs = np.arange(10_000)[:, None]
    for count, sizes in {1: [1], 2: [1, 1], 50: [1, 2, 47], 10_000: [1, 2, 4096, 4096, 1805]}.items():
        parts = list(_batches(inputs[:count], None))
        assert [len(part) for part in parts] == sizes
        assert np.array_equal(np.concatenate(parts), inputs[:count])


def test_the_proof_fills_the_last_batch_of_a_fixed_size() -> None:
    parts = list(_batches(np.arange(7)[:, None], 3))
    assert [part.ravel().tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
