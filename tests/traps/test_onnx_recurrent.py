"""A BatchNorm in front of a recurrent layer, in files: its input weights and input bias take it, nothing else moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import bnfold.onnx
from bnfold.fold import main
from bnfold.onnx import certify
from bnfold.simulation import NotProved
from tests.onnx_models import count, fold, kept, model, norm, weights, write

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
CHANNELS, HIDDEN = 3, 4
TURN = "h = BatchNormalization(x, s, b, m, v) t = Transpose<perm=[2, 0, 1]>(h)"


def layer(
    op: str, directions: int = 1, biased: bool = True, more: str = "", tail: str = ""
) -> onnx.ModelProto:
    """A BatchNorm over (N, C, T), and a layer over (T, N, C)."""
    gates = GATES[op] * HIDDEN
    way = {1: "forward", 2: "bidirectional"}[directions]
    tensors = {
        "W": weights(directions, gates, CHANNELS),
        "R": weights(directions, gates, HIDDEN, seed=2),
        "B": weights(directions, 2 * gates, seed=3),
        "lens": np.array([5, 2], np.int32),
        "start": weights(directions, 2, HIDDEN, seed=4),
        "P": weights(directions, 3 * HIDDEN, seed=5),
        **norm(CHANNELS),
    }
    bias = ("B" if biased else "") + tail
    text = f"""g (float[2, {CHANNELS}, 5] x) => (float[5, {directions}, 2, {HIDDEN}] y) {{
        {TURN} y = {op}<hidden_size={HIDDEN}, direction="{way}"{more}>(t, W, R, {bias}) }}"""
    if not bias:
        text = text.replace(", R, )", ", R)")
    used = {name: array for name, array in tensors.items() if name in (*"WRsbmv", *bias.split(", "))}
    return model(text, used)


def stored(some: onnx.ModelProto, place: int) -> np.ndarray:
    """What the layer reads at one of its inputs."""
    (node,) = [node for node in some.graph.node if node.op_type in GATES]
    tensors = {tensor.name: tensor for tensor in some.graph.initializer}
    return numpy_helper.to_array(tensors[node.input[place]]).astype(np.float64)


@pytest.mark.parametrize("biased", [True, False], ids=["biased", "without biases"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("op", GATES)
def test_the_input_weights_of_all_directions_and_gates_take_it(
    op: str, directions: int, biased: bool
) -> None:
    some = layer(op, directions, biased)
    folded, report = fold(some, 1)
    assert count(folded) == 0
    numbers = {name: array.astype(np.float64) for name, array in norm(CHANNELS).items()}
    scale = numbers["s"] / np.sqrt(numbers["v"] + np.float32(1e-5))
    shift = numbers["b"] - numbers["m"] * scale
    own, state = np.split(stored(some, 3), 2, axis=1) if biased else (0.0, 0.0)
    np.testing.assert_allclose(stored(folded, 1), stored(some, 1) * scale, rtol=1e-7)
    np.testing.assert_array_equal(stored(folded, 2), stored(some, 2))
    new, after = np.split(stored(folded, 3), 2, axis=1)
    np.testing.assert_allclose(new, own + stored(some, 1) @ shift, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after, np.broadcast_to(state, after.shape))
    assert report.proof


FORMS = {
    "reset before the bias": ("GRU", ", linear_before_reset=0", ""),
    "reset after the bias": ("GRU", ", linear_before_reset=1", ""),
    "clipped": ("LSTM", ", clip=0.5", ""),
    "clipped GRU": ("GRU", ", clip=0.5, linear_before_reset=1", ""),
    "other activations": ("RNN", ', activations=["Relu"]', ""),
    "coupled gates": ("LSTM", ", input_forget=1", ""),
    "lengths and a state": ("GRU", "", ", lens, start"),
    "peepholes": ("LSTM", "", ", lens, start, start, P"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "without biases"])
def test_whatever_the_layer_does_with_it_afterwards(form: str, biased: bool) -> None:
    op, more, tail = FORMS[form]
    fold(layer(op, 1, biased, more, tail), 1)


def test_a_layer_whose_axes_are_those_of_a_batch_first() -> None:
    """No runtime of ours runs this layout, so the numbers are held to what they must be."""
    text = f"""g (float[2, {CHANNELS}, 5] x) => (float[2, 5, 1, {HIDDEN}] y) {{
        h = BatchNormalization(x, s, b, m, v) t = Transpose<perm=[0, 2, 1]>(h)
        y = GRU<hidden_size={HIDDEN}, layout=1>(t, W, R) }}"""
    gates = 3 * HIDDEN
    some = model(text, {"W": weights(1, gates, 3), "R": weights(1, gates, HIDDEN), **norm(CHANNELS)})
    folded, report = bnfold.onnx.fold(some, verify=False)
    assert report.count("folded") == 1
    numbers = norm(CHANNELS)
    scale = numbers["s"] / np.sqrt(numbers["v"].astype(np.float64) + np.float32(1e-5))
    np.testing.assert_allclose(stored(folded, 1), stored(some, 1) * scale, rtol=1e-7)


def test_a_weight_that_two_layers_share_is_parted() -> None:
    text = f"""g (float[2, {CHANNELS}, 5] x, float[5, 2, {CHANNELS}] z) => (float[5, 1, 2, {HIDDEN}] y) {{
        {TURN} k = RNN<hidden_size={HIDDEN}>(t, W, R, B) j = RNN<hidden_size={HIDDEN}>(z, W, R, B) y = Add(k, j) }}"""
    tensors = {
        "W": weights(1, HIDDEN, CHANNELS),
        "R": weights(1, HIDDEN, HIDDEN),
        "B": weights(1, 2 * HIDDEN),
    }
    fold(model(text, {**tensors, **norm(CHANNELS)}), 1)


def test_a_layer_whose_start_depends_on_the_same_value_keeps_it() -> None:
    text = f"""g (float[2, {CHANNELS}, 5] x) => (float[5, 1, 2, {CHANNELS}] y) {{
        {TURN} i = ReduceMean<axes=[0], keepdims=1>(t) y = RNN<hidden_size={CHANNELS}>(t, W, R, , , i) }}"""
    tensors = {"W": weights(1, CHANNELS, CHANNELS), "R": weights(1, CHANNELS, CHANNELS)}
    kept(model(text, {**tensors, **norm(CHANNELS)}), "(RNN) is not linear")


def test_nothing_below_a_layer_goes_into_its_input_weights() -> None:
    text = f"""g (float[5, 2, {CHANNELS}] x) => (float[5, 1, 2, {HIDDEN}] y) {{
        k = RNN<hidden_size={HIDDEN}>(x, W, R) y = BatchNormalization(k, s, b, m, v) }}"""
    tensors = {"W": weights(1, HIDDEN, CHANNELS), "R": weights(1, HIDDEN, HIDDEN)}
    kept(model(text, {**tensors, **norm(1)}), "(RNN) is not linear")


def test_a_batchnorm_over_the_steps_stays() -> None:
    text = f"""g (float[2, 5, {CHANNELS}] x) => (float[5, 1, 2, {HIDDEN}] y) {{
        h = BatchNormalization(x, s, b, m, v) t = Transpose<perm=[1, 0, 2]>(h)
        y = RNN<hidden_size={HIDDEN}>(t, W, R) }}"""
    tensors = {"W": weights(1, HIDDEN, CHANNELS), "R": weights(1, HIDDEN, HIDDEN)}
    kept(model(text, {**tensors, **norm(5)}), "has its channels on axis 2")


def test_a_weight_that_is_an_input_is_named() -> None:
    text = f"""g (float[2, {CHANNELS}, 5] x, float[1, {HIDDEN}, {CHANNELS}] W) => (float[5, 1, 2, {HIDDEN}] y) {{
        {TURN} y = RNN<hidden_size={HIDDEN}>(t, W, R) }}"""
    kept(model(text, {"R": weights(1, HIDDEN, HIDDEN), **norm(CHANNELS)}), "its weight `W` is an input")


def test_a_matrix_above_a_layer_is_not_merged_with_its_input_weights() -> None:
    text = f"""g (float[5, 2, 6] x) => (float[5, 1, 2, {HIDDEN}] y) {{
        t = MatMul(x, A) y = RNN<hidden_size={HIDDEN}>(t, W, R) }}"""
    tensors = {"A": weights(6, 6), "W": weights(1, HIDDEN, 6), "R": weights(1, HIDDEN, HIDDEN)}
    folded, report = fold(model(text, tensors), 0)
    assert (count(folded, "MatMul"), count(folded, "RNN")) == (1, 1)
    assert not report.merges


def test_layers_in_a_body_and_in_a_function_take_it() -> None:
    header = f"g (float[2, {CHANNELS}, 5] x) => (float[5, 1, 2, {HIDDEN}] y)"
    call = f"RNN<hidden_size={HIDDEN}>(t, W, R)"
    tensors = {
        "W": weights(1, HIDDEN, CHANNELS),
        "R": weights(1, HIDDEN, HIDDEN),
        "yes": np.array(True),
        **norm(CHANNELS),
    }
    rest = f'<opset_import: ["" : 17], domain: "local"> block (t, W, R) => (y) {{ y = {call} }}'
    called = {name: array for name, array in tensors.items() if name != "yes"}
    some = model(f"{header} {{ {TURN} y = local.block(t, W, R) }}", called, extra=', "local" : 1', rest=rest)
    fold(some, 1)
    shape = f"float[5, 1, 2, {HIDDEN}]"
    body = f"""{header} {{ {TURN} n = ReduceMax<keepdims=0>(x) d = Less(n, n)
        y = If (d) <then_branch = a () => ({shape} p) {{ p = {call} }},
                    else_branch = c () => ({shape} q) {{ q = {call} }}> }}"""
    used = {name: array for name, array in tensors.items() if name != "yes"}
    fold(model(body, used), 1)


# ---------------------------------------------------------------- certificates


@pytest.fixture
def certified(tmp_path: Path) -> tuple[Path, Path, Path]:
    source = write(tmp_path / "net.onnx", layer("LSTM", 2))
    target, told = tmp_path / "out.onnx", tmp_path / "net.json"
    assert main([str(source), "-o", str(target), "--certificate", str(told)]) == 0
    return source, target, told


def test_a_fold_certifies_whatever_the_layer(tmp_path: Path) -> None:
    for op in GATES:
        source = write(tmp_path / f"{op}.onnx", layer(op, biased=op != "GRU"))
        told = tmp_path / f"{op}.json"
        assert main([str(source), "--certificate", str(told)]) == 0
        assert certify.load(told).done.erased


@pytest.mark.parametrize(("place", "where"), [(1, (1, 2, 0)), (2, (0, 3, 1)), (3, (1, 0)), (3, (1, 17))])
def test_a_number_that_is_changed_afterwards_is_found(
    place: int, where: tuple[int, ...], certified: tuple[Path, Path, Path]
) -> None:
    source, target, told = certified
    changed = onnx.load(target)
    (node,) = [node for node in changed.graph.node if node.op_type == "LSTM"]
    tensor = next(one for one in changed.graph.initializer if one.name == node.input[place])
    array = numpy_helper.to_array(tensor).copy()
    array[where] *= 1 + 1e-5
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    data = certify.load(told)
    again = certify.Certificate(**{**vars(data), "result": certify.digest(changed)})
    with pytest.raises(NotProved, match=r"not what they should be|another constant|another bias"):
        certify.check(onnx.load(source), changed, again)
