"""Random ONNX graphs, folded: the same numbers in float64 at 1e-12, and a valid model.

A draw is a graph of images `(2, C, H, W)`: each step takes values that were computed earlier, so that branches, second
readers and shared weights come about by themselves. Half of all steps are BatchNorms or linear operators. Any value may
be an output, and some stand in the branch of an If.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

import bnfold.onnx
from tests.onnx_models import run

STEPS = [
    "norm", "norm", "norm", "norm", "conv", "conv", "conv", "deconv", "relu", "leaky", "tanh", "identity", "add",
    "sub", "concat", "average", "maximum", "scale", "shift", "split", "slice", "shuffle", "transpose", "matmul", "pad",
    "resize", "flatten", "if", "spelt", "channel mean",
]  # fmt: skip


class Draw:
    """A graph that is being drawn: its nodes, its tensors, and its values with their shapes."""

    def __init__(self, data):
        self.data, self.nodes, self.tensors = data, [], {}
        self.values = {"x": (2, 3, 6, 6)}
        self.random = np.random.default_rng(data.draw(st.integers(0, 2**31)))
        self.weights, self.prefix = {}, ""

    def pick(self, items):
        return self.data.draw(st.sampled_from(list(items)))

    def any_image(self):
        """A value, mostly a late one."""
        names = [name for name, shape in self.values.items() if len(shape) == 4]
        return self.pick([*names, *names[-2:], names[-1]])

    def tensor(self, array):
        name = f"t{len(self.tensors)}"
        self.tensors[name] = np.asarray(array)
        return name

    def numbers(self, *shape):
        return self.random.standard_normal(shape).astype(np.float32)

    def node(self, op, inputs, shape, **attributes):
        name = f"{self.prefix}v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        self.values[name] = shape
        return name

    # -- steps

    def norm(self, x=None):
        x = x or self.any_image()
        channels = self.values[x][1]
        sign = np.where(self.random.random(channels) < self.pick([0, 0.3]), -1, 1)
        arrays = [
            self.random.uniform(0.5, 1.5, channels) * sign,
            self.numbers(channels),
            self.numbers(channels),
        ]
        arrays.append(self.random.uniform(0.5, 2, channels))
        inputs = [x, *(self.tensor(a.astype(np.float32)) for a in arrays)]
        return self.node("BatchNormalization", inputs, self.values[x])

    def conv(self, x=None):
        x = x or self.any_image()
        n, c, h, w = self.values[x]
        kernel = self.pick([1, 3] if min(h, w) > 3 else [1])
        pad = self.pick([0, kernel // 2])
        out = self.pick([c, 4])
        groups = self.pick([g for g in (1, 2, c) if c % g == 0 and out % g == 0])
        key = (out, c // groups, kernel, kernel)
        if key not in self.weights or self.pick([True, True, False]):
            self.weights[key] = self.tensor(self.numbers(*key) / np.sqrt(np.prod(key[1:])).astype(np.float32))
        inputs = [
            x,
            self.weights[key],
            *([self.tensor(self.numbers(out))] if self.pick([True, False]) else []),
        ]
        shape = (n, out, h - kernel + 1 + 2 * pad, w - kernel + 1 + 2 * pad)
        return self.node("Conv", inputs, shape, group=groups, pads=[pad] * 4)

    def deconv(self):
        x = self.any_image()
        n, c, h, w = self.values[x]
        groups = self.pick([g for g in (1, 2) if c % g == 0])
        weight = self.tensor(self.numbers(c, 2, 2, 2))
        shape = (n, 2 * groups, h + 1, w + 1)
        return self.node("ConvTranspose", [x, weight], shape, group=groups)

    def relu(self):
        x = self.any_image()
        return self.node("Relu", [x], self.values[x])

    def leaky(self):
        x = self.any_image()
        return self.node("LeakyRelu", [x], self.values[x], alpha=0.1)

    def tanh(self):
        x = self.any_image()
        return self.node("Tanh", [x], self.values[x])

    def identity(self):
        x = self.any_image()
        return self.node("Identity", [x], self.values[x])

    def pair(self):
        x = self.any_image()
        return x, self.pick([name for name, shape in self.values.items() if shape == self.values[x]])

    def add(self):
        x, y = self.pair()
        return self.node("Add", [x, y], self.values[x])

    def sub(self):
        x, y = self.pair()
        return self.node("Sub", [x, y], self.values[x])

    def concat(self):
        x = self.any_image()
        n, c, *rest = self.values[x]
        y = self.pick(
            [name for name, s in self.values.items() if s[0] == n and list(s[2:]) == rest and len(s) == 4]
        )
        return self.node("Concat", [x, y], (n, c + self.values[y][1], *rest), axis=1)

    def pool(self, op, **more):
        x = self.any_image()
        n, c, h, w = self.values[x]
        pad = self.pick([0, 1])
        shape = (n, c, h + 2 * pad - 1, w + 2 * pad - 1)
        return self.node(op, [x], shape, kernel_shape=[2, 2], pads=[pad] * 4, **more)

    def average(self):
        return self.pool("AveragePool", count_include_pad=self.pick([0, 1]))

    def maximum(self):
        return self.pool("MaxPool")

    def scale(self):
        x = self.any_image()
        return self.node("Mul", [x, self.tensor(self.numbers(self.values[x][1], 1, 1) + 2)], self.values[x])

    def shift(self):
        x = self.any_image()
        return self.node("Add", [self.tensor(self.numbers(1, self.values[x][1], 1, 1)), x], self.values[x])

    def split(self):
        x = self.any_image()
        n, c, *rest = self.values[x]
        if c < 2:
            return x
        sizes = self.tensor(np.array([1, c - 1]))
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node("Split", [x, sizes], [name, f"{name}b"], axis=1))
        self.values |= {name: (n, 1, *rest), f"{name}b": (n, c - 1, *rest)}
        return name

    def slice(self):
        x = self.any_image()
        n, c, *rest = self.values[x]
        step = self.pick([1, 2, -1])
        start, end = (0, c) if step > 0 else (-1, -c - 1)
        bounds = [self.tensor(np.array([k])) for k in (start, end, 1, step)]
        return self.node("Slice", [x, *bounds], (n, len(range(c)[:: abs(step)]), *rest))

    def shuffle(self):
        """Channel shuffle: reshape, transpose, reshape."""
        x = self.any_image()
        n, c, h, w = self.values[x]
        if c % 2:
            return x
        a = self.node("Reshape", [x, self.tensor(np.array([0, 2, c // 2, h, w]))], (n, 2, c // 2, h, w))
        b = self.node("Transpose", [a], (n, c // 2, 2, h, w), perm=[0, 2, 1, 3, 4])
        return self.node("Reshape", [b, self.tensor(np.array([n, -1, h, w]))], (n, c, h, w))

    def transpose(self):
        x = self.any_image()
        n, c, h, w = self.values[x]
        return self.node("Transpose", [x], (n, h, w, c), perm=[0, 2, 3, 1])

    def matmul(self):
        x = self.any_image()
        *rest, last = self.values[x]
        y = self.node("MatMul", [x, self.tensor(self.numbers(last, 4) / 2)], (*rest, 4))
        return (
            self.node("Add", [y, self.tensor(self.numbers(4))], (*rest, 4)) if self.pick([True, False]) else y
        )

    def pad(self):
        x = self.any_image()
        n, c, h, w = self.values[x]
        pads = self.tensor(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
        return self.node("Pad", [x, pads], (n, c, h + 2, w + 2), mode=self.pick(["constant", "edge"]))

    def resize(self):
        x = self.any_image()
        n, c, h, w = self.values[x]
        if h > 12 or w > 12:
            return x
        scales = self.tensor(np.array([1, 1, 2, 2], np.float32))
        return self.node(
            "Resize", [x, "", scales], (n, c, 2 * h, 2 * w), mode=self.pick(["nearest", "linear"])
        )

    def flatten(self):
        x = self.any_image()
        size = int(np.prod(self.values[x][1:]))
        if size > 2000:
            return x
        flat = self.node("Flatten", [x], (2, size))
        weight = self.tensor(self.numbers(5, size) / np.float32(np.sqrt(size)))
        return self.node("Gemm", [flat, weight, self.tensor(self.numbers(5))], (2, 5), transB=1, alpha=0.5)

    def branch(self):
        """The branch of an If whose other one is the same value."""
        x = self.any_image()
        name = f"v{len(self.nodes)}"
        inner = Draw(self.data)
        inner.tensors, inner.random, inner.prefix = self.tensors, self.random, name
        inner.values = {x: self.values[x]}
        z = inner.node("Tanh", [inner.norm(x)], self.values[x])
        then = helper.make_graph(inner.nodes, "then", [], [info(z, self.values[x])])
        other = helper.make_node("Neg", [x], [f"{name}e"])
        otherwise = helper.make_graph([other], "else", [], [info(f"{name}e", self.values[x])])
        return self.node("If", ["yes"], self.values[x], then_branch=then, else_branch=otherwise)

    def spelt(self):
        x = self.any_image()
        c = self.values[x][1]
        mean, var, gamma, beta = (self.numbers(c, 1, 1) for _ in range(4))
        a = self.node("Sub", [x, self.tensor(mean)], self.values[x])
        b = self.node("Div", [a, self.tensor(np.abs(var) + 0.5)], self.values[x])
        d = self.node("Mul", [b, self.tensor(gamma)], self.values[x])
        return self.node("Add", [d, self.tensor(beta)], self.values[x])

    def channel_mean(self):
        x = self.any_image()
        n, c, _, _ = self.values[x]
        axes = self.tensor(np.array(self.pick([[2, 3], [1]])))
        shape = (n, c, 1, 1) if self.tensors[axes].size == 2 else (n, 1, *self.values[x][2:])
        return self.node("ReduceMean", [x, axes], shape)

    def model(self, steps):
        for step in steps:
            getattr(self, {"if": "branch", "channel mean": "channel_mean"}.get(step, step))()
        assume(all(size > 0 for shape in self.values.values() for size in shape[1:]))
        last = list(self.values)[-1]
        outputs = dict.fromkeys([last, self.pick(self.values), self.pick(self.values)])
        outputs = {name: self.values[name] for name in outputs if name != "x"} or {last: self.values[last]}
        graph = helper.make_graph(
            self.nodes,
            "drawn",
            [info("x", ("N", 3, 6, 6)), helper.make_tensor_value_info("yes", TensorProto.BOOL, [])],
            [info(name, (None, *shape[1:])) for name, shape in outputs.items()],
            [onnx.numpy_helper.from_array(array, name) for name, array in self.tensors.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def info(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def check(data):
    steps = data.draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=10))
    some = Draw(data).model(steps)
    draw = np.random.default_rng(0)
    feed = {"x": draw.standard_normal((2, 3, 6, 6)).astype(np.float32), "yes": np.array(True)}
    feeds = [feed, feed | {"yes": np.array(False)}]
    try:
        truths = [run(some, each) for each in feeds]
    except (Fail, InvalidArgument):  # an image that was cropped to nothing
        reject()
    folded, report = bnfold.onnx.fold(some, feeds, lower=data.draw(st.booleans()))
    onnx.checker.check_model(folded, full_check=True)
    exact = [item for item in report.evidence if item.question == "float64"]
    assert all(item.bound < 1e-8 for item in exact)
    assert bool(exact) == report.verified
    for given_feed, wanted in zip(feeds, truths, strict=True):
        assert_close(run(folded, given_feed), wanted)
        if survives_optimisation(some, given_feed, wanted):
            assert_close(run(folded, given_feed, optimised=True), wanted)


def survives_optimisation(some, feed, wanted):
    """Whether onnxruntime's optimiser leaves a model as it was; a Pad with zeros before a MaxPool it does not."""
    try:
        assert_close(run(some, feed, optimised=True), wanted)
    except (AssertionError, RuntimeError, Fail):
        return False
    return True


def assert_close(found, wanted):
    for name, array in found.items():
        scale = max(1.0, float(np.abs(wanted[name]).max(initial=0)))
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-3 * scale)


@settings(max_examples=50)
@given(st.data())
def test_a_random_graph_computes_the_same_folded(data):
    check(data)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(st.data())
def test_ten_thousand_random_graphs_compute_the_same_folded(data):
    check(data)
