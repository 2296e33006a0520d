"""Deformable convolutions, and gathers along several axes at once, in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import bnfold.onnx
from bnfold.fold import main
from tests.onnx_models import count, model, norm, weights, write

INPUTS = "float[1, 4, 6, 6] x, float[1, 18, 6, 6] moves, float[1, 9, 6, 6] mask"


def deformable(before: bool = False, rest: str = "moves", group: int = 1) -> onnx.ModelProto:
    """A deformable convolution with a BatchNorm behind it, or in front of it."""
    tensors = {"w": weights(8, 4 // group, 3, 3), "c": weights(8), **norm(4 if before else 8)}
    conv = f"DeformConv<pads=[1, 1, 1, 1], kernel_shape=[3, 3], group={group}>"
    lines = (
        f"h = BatchNormalization(x, s, b, m, v) y = {conv}(h, w, {rest})"
        if before
        else f"h = {conv}(x, w, {rest}) z = BatchNormalization(h, s, b, m, v) y = Relu(z)"
    )
    used = {name: array for name, array in tensors.items() if name != "c" or ", c" in rest}
    return model(f"g ({INPUTS}) => (float[1, 8, 6, 6] y) {{ {lines} }}", used, opset=19, ir=9)


@pytest.mark.parametrize("rest", ["moves", "moves, c", "moves, c, mask", "moves, , mask"])
@pytest.mark.parametrize("group", [1, 2])
def test_what_comes_after_a_deformable_convolution_goes_into_its_weight_and_its_bias(
    rest: str, group: int
) -> None:
    folded, report = bnfold.onnx.fold(deformable(rest=rest, group=group))
    assert [verdict.outcome for verdict in report.verdicts] == ["folded"]
    assert report.verified
    assert count(folded) == 0
    assert [node.op_type for node in folded.graph.node] == ["DeformConv", "Relu"]
    (node, _) = folded.graph.node
    assert node.input[4:] == (["mask"] if "mask" in rest else [])


def test_what_comes_before_a_deformable_convolution_leaves_its_shift_for_zeros_lie_outside() -> None:
    _, report = bnfold.onnx.fold(deformable(before=True), runtime="any")
    assert [verdict.outcome for verdict in report.verdicts] == ["scale folded"]
    assert "it takes zeros from outside of its input" in report.verdicts[0].reason


def test_a_batchnorm_of_the_offsets_of_a_deformable_convolution_stays() -> None:
    text = f"""g ({INPUTS}) => (float[1, 8, 6, 6] y) {{
        h = BatchNormalization(moves, s, b, m, v)
        y = DeformConv<pads=[1, 1, 1, 1], kernel_shape=[3, 3]>(x, w, h, , mask) }}"""
    _, report = bnfold.onnx.fold(model(text, {"w": weights(8, 4, 3, 3), **norm(18)}, opset=19, ir=9))
    assert [verdict.outcome for verdict in report.verdicts] == ["kept"]
    assert "no other one" in report.verdicts[0].reason


def test_a_certificate_of_a_deformable_convolution_holds_and_one_of_another_weight_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, certificate = (tmp_path / name for name in ("a.onnx", "a.folded.onnx", "a.json"))
    write(source, deformable(rest="moves, c, mask"))
    assert main([str(source), "--certificate", str(certificate)]) == 0
    assert verify(source, target, certificate) == 0
    damaged = onnx.load(target)
    for tensor in damaged.graph.initializer:
        array = np.array(numpy_helper.to_array(tensor))
        if array.shape == (8, 4, 3, 3):
            array[0, 0, 0, 0] *= 1 + 1e-5
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(damaged, target)
    assert verify(source, target, certificate) == 1
    capsys.readouterr()


def verify(source: Path, target: Path, certificate: Path) -> int:
    from bnfold.verify import main as command

    return command([str(source), str(target), "--certificate", str(certificate)]) or 0


def test_windows_that_are_gathered_by_a_matrix_of_positions_are_data_movement() -> None:
    text = """g (float[2, 3, 7] x) => (float[2, 6, 5] y) {
        h = BatchNormalization(x, s, b, m, v) windows = Gather<axis=2>(h, places)
        turned = Transpose<perm=[0, 2, 1, 3]>(windows) rows = Reshape(turned, shape)
        y = MatMul(rows, w) }"""
    places = np.add.outer(np.arange(6), np.arange(2))
    tensors = {"places": places, "shape": np.array([2, 6, 6]), "w": weights(6, 5), **norm(3)}
    folded, report = bnfold.onnx.fold(model(text, tensors))
    assert [verdict.outcome for verdict in report.verdicts] == ["folded"]
    assert count(folded) == 0


def test_a_batchnorm_behind_windows_goes_up_where_no_number_is_read_twice() -> None:
    text = """g (float[2, 5] x) => (float[2, 3, 2] y) {
        h = MatMul(x, w) windows = Gather<axis=1>(h, places)
        z = BatchNormalization(windows, s, b, m, v) y = Tanh(z) }"""
    for places, outcome in ((np.arange(6).reshape(3, 2), "folded"), (np.eye(3, 2, dtype=np.int64), "kept")):
        _, report = bnfold.onnx.fold(model(text, {"places": places, "w": weights(5, 6), **norm(3)}))
        assert [verdict.outcome for verdict in report.verdicts] == [outcome]
