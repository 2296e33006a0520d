"""Random ONNX graphs at sizes they were not drawn with, copies allowed, verification off: judged from here alone.

To the steps of `test_onnx_graphs` come values of every rank, matrices from the left, affines along any axis, and pads
and crops by amounts that are computed from sizes. Batch and image sizes are open in the input, while the outputs, in
half of all graphs every value, go on declaring those of one run, as exporters do. A size at which the original does
not run says nothing.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from onnx import helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

import bnfold.onnx
from tests.onnx_models import run
from tests.properties.test_onnx_graphs import STEPS, Draw, assert_close, info

MORE = ["left", "along", "along", "higher", "turned", "padded", "padded", "cropped", "shared", "shared"]
SIZES = [(2, 3, 6, 6), (1, 3, 7, 7), (3, 3, 9, 5)]
REFUSALS = (Fail, InvalidArgument, RuntimeException)


class Open(Draw):
    """A graph with values of every rank, and amounts that are computed from sizes."""

    def any_value(self):
        names = [name for name, shape in self.values.items() if len(shape) > 1 and np.prod(shape) < 5000]
        return self.pick([*names, *names[-2:], names[-1]])

    def amount(self, op, inputs, **attributes):
        """A node that computes whole numbers, which no step may take for an image."""
        name = f"{self.prefix}i{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def width(self, x):
        return self.amount("Gather", [self.amount("Shape", [x]), self.tensor(np.array([3]))], axis=0)

    def left(self):
        x = self.any_value()
        *rest, rows, last = self.values[x]
        made = self.pick([rows, last, 4])
        shape = (*rest, made, last)
        y = self.node("MatMul", [self.tensor(self.numbers(made, rows) / np.float32(np.sqrt(rows))), x], shape)
        if self.pick([True, False]):
            return y
        return self.node("Add", [y, self.tensor(self.numbers(made, 1))], shape)

    def shared(self):
        """A matrix from the left under an affine along its outputs, and under somebody else."""
        x = self.left()
        self.along(x, len(self.values[x]) - 2)
        return self.node("Tanh", [x], self.values[x])

    def along(self, x=None, axis=0):
        x = x or self.any_value()
        shape, axis = self.values[x], axis or self.pick(range(1, len(self.values[x])))
        sizes = [size if place == axis else 1 for place, size in enumerate(shape)]
        y = self.node("Mul", [x, self.tensor(self.numbers(*sizes) + 2)], shape)
        return self.node("Add", [y, self.tensor(self.numbers(*sizes))], shape)

    def higher(self):
        x = self.any_value()
        axis = self.pick(range(1, len(self.values[x])))
        shape = (*self.values[x][:axis], 1, *self.values[x][axis:])
        return self.node("Unsqueeze", [x, self.tensor(np.array([axis]))], shape) if len(shape) < 6 else x

    def turned(self):
        x = self.any_value()
        perm = [0, *self.data.draw(st.permutations(range(1, len(self.values[x]))))]
        return self.node("Transpose", [x], tuple(self.values[x][axis] for axis in perm), perm=perm)

    def padded(self):
        """To an even width, with zeros or by the edge."""
        x, two = self.any_image(), self.tensor(np.array([2]))
        n, c, h, w = self.values[x]
        odd = self.amount("Mod", [self.width(x), two])
        pads = self.amount("Concat", [self.tensor(np.zeros(7, np.int64)), odd], axis=0)
        return self.node(
            "Pad", [x, pads], (n, c, h, w + w % 2), mode=self.pick(["constant", "constant", "edge"])
        )

    def cropped(self):
        """To an even width."""
        x, two = self.any_image(), self.tensor(np.array([2]))
        n, c, h, w = self.values[x]
        if w < 2:
            return x
        even = self.amount("Mul", [self.amount("Div", [self.width(x), two]), two])
        bounds = [self.tensor(np.array([0])), even, self.tensor(np.array([3]))]
        return self.node("Slice", [x, *bounds], (n, c, h, w - w % 2))


def check(data):
    steps = data.draw(
        st.lists(st.sampled_from([*STEPS, *MORE, *MORE, *MORE, "norm", "norm"]), min_size=2, max_size=10)
    )
    drawn = Open(data)
    some = drawn.model(steps)
    if data.draw(st.booleans()):
        some.graph.value_info.extend(info(*value) for value in drawn.values.items() if value[0] != "x")
    for axis, name in ((2, "H"), (3, "W")):
        some.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    options = {
        "duplicate": data.draw(st.sampled_from([True, True, False])),
        "lower": data.draw(st.booleans()),
    }
    folded, _ = bnfold.onnx.fold(some, verify=False, **options)
    draw, ran = np.random.default_rng(0), 0
    for size in SIZES:
        feed = {"x": draw.standard_normal(size).astype(np.float32), "yes": np.array(size[0] == 2)}
        try:
            wanted = run(some, feed)
        except REFUSALS:
            continue
        assert_close(run(folded, feed), wanted)
        ran += 1
    if not ran:  # an image that was cropped to nothing
        reject()


@settings(max_examples=50)
@given(st.data())
def test_a_random_graph_computes_the_same_at_other_sizes(data):
    check(data)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(st.data())
def test_ten_thousand_random_graphs_compute_the_same_at_other_sizes(data):
    check(data)
