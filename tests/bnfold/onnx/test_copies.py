"""Copies that do without weights hold all the rest, and a checker says of them what it says of the whole."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto

from bnfold.onnx.copies import copy_without, without_weights
from tests.onnx_models import model, norm, weights

TEXT = """g (float[1, 8, 6, 6] x) => (float[1, 8, 4, 4] y) {
    h = Conv(x, w) y = BatchNormalization(h, s, b, m, v) }"""


def net() -> onnx.ModelProto:
    some = model(TEXT, {"w": weights(8, 8, 3, 3), **norm(8)})
    some.doc_string, some.graph.doc_string = "of the model", "of the graph"
    some.metadata_props.add(key="who", value="me")
    some.graph.value_info.append(onnx.helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, 8, 4, 4]))
    return some


def complaint(some: onnx.ModelProto) -> str:
    try:
        onnx.checker.check_model(some)
        onnx.shape_inference.infer_shapes(some, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("names", [set(), {"w"}, {"w", "s"}])
def test_a_copy_without_some_tensors_is_the_model_with_these_deleted(names):
    some = net()
    copy = copy_without(some, names)
    for place in range(len(some.graph.initializer) - 1, -1, -1):
        if some.graph.initializer[place].name in names:
            del some.graph.initializer[place]
    assert copy.SerializeToString() == some.SerializeToString()


def test_fields_that_nobody_knows_are_copied_too():
    stranger = bytes([0xFA, 0x7F, 3]) + b"new"
    some = onnx.ModelProto.FromString(net().SerializeToString() + stranger)
    assert copy_without(some, {"w"}).SerializeToString().endswith(stranger)


def test_the_checker_gets_a_model_without_its_large_weights():
    some = net()
    bare = without_weights(some)
    assert [tensor.name for tensor in bare.graph.initializer] == ["s", "b", "m", "v"]
    assert complaint(bare) == complaint(some) == ""
    assert len(some.graph.initializer) == 5


def repeat(some):
    some.graph.initializer.append(some.graph.initializer[0])


def misuse(some):
    some.graph.node[0].input[1], some.graph.node[0].input[0] = "x", "w"


def define_twice(some):
    some.graph.node[0].output[0] = "w"


def forget(some):
    some.graph.node[0].input[1] = "nobody"


def reshape(some):
    some.graph.initializer[0].dims[:] = [8, 4, 6, 3]


@pytest.mark.parametrize("spoil", [repeat, misuse, define_twice, forget, reshape])
def test_the_checker_refuses_a_spoilt_model_without_its_weights_as_with_them(spoil):
    some = net()
    spoil(some)
    assert complaint(some)
    assert complaint(without_weights(some))


def test_a_weight_that_is_also_an_input_stays():
    some = net()
    some.graph.input.append(onnx.helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 8, 3, 3]))
    assert without_weights(some) is some
