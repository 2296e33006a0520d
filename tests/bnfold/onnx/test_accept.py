"""A damaged, hostile or greedy model ends in one line (`InputError`), before anything is computed or written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import bnfold
import bnfold.onnx
from bnfold.errors import BnfoldError, InputError
from bnfold.onnx import constant_folding as constants
from tests.onnx_models import kept, model, norm, weights, write

BN = "y = BatchNormalization(h, s, b, m, v)"
TEXT = f"g (float[N, 3, 6, 6] x) => (float[N, 8, 4, 4] y) {{ h = Conv(x, w, c) {BN} }}"
VERIFY = pytest.mark.parametrize("verify", [True, False])


def net():
    return model(TEXT, {"w": weights(8, 3, 3, 3), "c": weights(8), **norm(8)})


def assert_refused(some, message, verify=True, **options):
    with pytest.raises(InputError, match=message):
        bnfold.onnx.fold(some, verify=verify, **options)


# ---------------------------------------------------------------- text

PLACES = {
    "a node": lambda m: m.graph.node[1],
    "an initializer": lambda m: m.graph.initializer[0],
    "an input": lambda m: m.graph.input[0],
    "a sparse tensor": lambda m: m.graph.sparse_initializer.add().values,
    "an attribute": lambda m: m.graph.node[0].attribute.add(type=onnx.AttributeProto.INT),
    "a metadata entry": lambda m: m.metadata_props.add(),
}


@VERIFY
@pytest.mark.parametrize("place", [*PLACES, "a doc string", "a domain", "a producer"])
def test_text_that_is_not_utf_8(tmp_path, place, verify):
    some, mark = net(), "QQQQ"
    if place == "a doc string":
        some.graph.doc_string = mark
    elif place == "a domain":
        some.graph.node[1].domain = mark
    elif place == "a producer":
        some.producer_name = mark
    elif place == "a metadata entry":
        some.metadata_props.add().key = mark
    else:
        PLACES[place](some).name = mark
    source = tmp_path / "net.onnx"
    source.write_bytes(some.SerializeToString().replace(mark.encode(), b"\xff\xfe\xff\xfe"))
    with pytest.raises(InputError, match="not UTF-8"):
        bnfold.fold_file(source, tmp_path / "out.onnx", verify=verify)
    assert not (tmp_path / "out.onnx").exists()


# ---------------------------------------------------------------- functions and bodies


def calling(*functions):
    """A model of functions `(name, what its nodes call)`, of which the first is called after a BatchNorm."""
    own = {name for name, _ in functions}
    some = model(
        f"g (float[4, 3] x) => (float[4, 5] z) {{ h = Gemm(x, w) {BN} }}",
        {"w": weights(3, 5), **norm(5)},
        extra=', "my": 1',
    )
    some.graph.node.append(helper.make_node(functions[0][0], ["y"], ["z"], domain="my"))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    for name, called in functions:
        names = ["x", *(f"t{place}" for place in range(len(called) - 1)), "y"]
        nodes = [
            helper.make_node(op, [names[place]], [names[place + 1]], domain="my" if op in own else "")
            for place, op in enumerate(called)
        ]
        some.functions.append(helper.make_function("my", name, ["x"], ["y"], nodes, imports))
    return some


@VERIFY
@pytest.mark.parametrize(
    "functions",
    [
        [("f", ["f"])],
        [("f", ["g"]), ("g", ["Relu", "f"])],
        [("f", ["Relu"]), ("g", ["k"]), ("k", ["Tanh", "g"])],
    ],
)
def test_functions_that_call_themselves_or_each_other(functions, verify):
    assert_refused(calling(*functions), "calls itself", verify)


def test_a_function_that_is_defined_twice():
    assert_refused(calling(("f", ["Relu"]), ("f", ["Tanh"])), "defined twice")


@VERIFY
def test_functions_that_double_too_often_are_not_expanded(verify):
    doubling = [(f"f{n}", [f"f{n + 1}"] * 2) for n in range(24)]
    assert_refused(calling(*doubling, ("f24", ["Relu"])), "16777216 nodes", verify)


@VERIFY
def test_functions_that_call_one_another_too_deep(verify):
    chain = [(f"f{n}", [f"f{n + 1}"]) for n in range(5000)]
    assert_refused(calling(*chain, ("f5000", ["Relu"])), "5001 calls deep", verify)


def test_functions_that_double_a_few_times_are_fine():
    doubling = [(f"f{n}", [f"f{n + 1}"] * 2) for n in range(6)]
    _, report = bnfold.onnx.fold(calling(*doubling, ("f6", ["Relu"])))
    assert report.count("folded") == 1
    assert report.verified


@VERIFY
def test_bodies_that_are_nested_too_deep(verify):
    some = net()
    graph = some.graph
    for _ in range(60):
        graph.node.add(op_type="If", input=["yes"], output=["y"])
        graph = graph.node[-1].attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
        graph.name = "branch"
    assert_refused(some, "too deep", verify)


# ---------------------------------------------------------------- tensors


def spoilt(spoil):
    some = net()
    spoil(some.graph.initializer[0])
    return some


def promise(tensor, *dims):
    tensor.dims[:] = dims


@VERIFY
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: promise(t, 8, 3, 3, 10**16), "other than its data"),
        (lambda t: promise(t, 2**62, 2**62), "other than its data"),
        (lambda t: promise(t, 8, 3, 3), "other than its data"),
        (lambda t: promise(t, -8, 3, 3, -3), "negative size"),
        (lambda t: t.ClearField("raw_data"), "other than its data"),
        (lambda t: setattr(t, "data_type", 0), "no type"),
        (lambda t: setattr(t, "data_type", 2**31 - 1), "no type"),
    ],
)
def test_a_tensor_that_is_not_what_it_says(spoil, message, verify):
    assert_refused(spoilt(spoil), message, verify)


@pytest.mark.parametrize(
    "kind", [name for name in dict(TensorProto.DataType.items()) if name not in ("UNDEFINED", "STRING")]
)
@pytest.mark.parametrize("raw", [True, False])
def test_a_tensor_of_every_type_is_taken(kind, raw):
    """However it is stored, and whether or not its last byte is full."""
    from bnfold.onnx.accept import accept

    some, number = net(), TensorProto.DataType.Value(kind)
    dtype = helper.tensor_dtype_to_np_dtype(number)
    if raw:
        tensor = onnx.numpy_helper.from_array(np.zeros((3, 5), dtype), "spare")
    else:
        tensor = helper.make_tensor("spare", number, [3, 5], np.zeros(15, dtype))
    some.graph.initializer.append(tensor)
    accept(some)


def test_an_attribute_that_holds_nothing():
    some = net()
    some.graph.node.append(helper.make_node("Constant", [], ["k"]))
    some.graph.node[-1].attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    assert_refused(some, "holds none", verify=False)


def test_text_in_the_place_of_a_weight_is_no_weight():
    some = net()
    some.graph.initializer[1].CopyFrom(helper.make_tensor("c", TensorProto.STRING, [8], [b"a"] * 8))
    assert_refused(some, "onnxruntime")
    assert_refused(some, "not valid", verify=False)


ENTRIES = {
    "no location": {"offset": "0", "length": "864"},
    "a location with a NUL": {"location": "net.onnx.data\0"},
    "an offset that is no number": {"location": "net.onnx.data", "offset": "one"},
    "a negative offset": {"location": "net.onnx.data", "offset": "-4"},
    "an offset beyond everything": {"location": "net.onnx.data", "offset": str(10**30)},
    "a length that is too short": {"location": "net.onnx.data", "length": "3"},
    "a location that is a folder": {"location": "."},
    "a location that is far too long": {"location": "a" * 5000},
}


@VERIFY
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_damaged_entry_of_external_data(tmp_path, entry, verify):
    onnx.save_model(
        net(), tmp_path / "net.onnx", save_as_external_data=True, size_threshold=0, location="net.onnx.data"
    )
    some = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    del some.graph.initializer[0].external_data[:]
    for key, value in ENTRIES[entry].items():
        some.graph.initializer[0].external_data.add(key=key, value=value)
    with pytest.raises(InputError):
        bnfold.fold_file(write(tmp_path / "net.onnx", some), tmp_path / "out.onnx", verify=verify)
    assert not (tmp_path / "out.onnx").exists()


# ---------------------------------------------------------------- what a file asks for


def test_an_input_of_ten_to_the_sixteen_elements_is_not_made_up():
    text = f"g (float[100000000, 100000000] x) => (float[N, 5] y) {{ h = MatMul(x, w) {BN} }}"
    some = model(text, {"w": weights(1, 5), **norm(5)})
    promise_free = model(
        "g (float[100000000, 100000000] x) => (float[a, b] y) { k = ReduceMean<axes=[1]>(x) h = MatMul(k, w)"
        + BN
        + "}",
        {"w": weights(1, 5), **norm(5)},
    )
    assert_refused(promise_free, "10000000000000000 elements")
    assert bnfold.onnx.fold(promise_free, verify=False)[1].count("folded") == 1
    assert_refused(some, "not valid", verify=False)


GREEDY = {
    "ConstantOfShape": "k = ConstantOfShape(huge) f = Add(k, k)",
    "Expand": "k = Expand(one, huge) f = Add(k, k)",
    "Tile": "f = Tile(row, huge)",
    "Range": "k = Range(low, high, step) f = Cast<to=1>(k)",
    "broadcasting": "k = Expand(one, long) l = Unsqueeze(k, last) f = Add(k, l)",
    "a product": "k = Expand(one, long) i = Unsqueeze(k, last) j = Unsqueeze(k, first) f = MatMul(i, j)",
    "doubling": " ".join(
        [
            "k0 = Expand(one, wide)",
            *(f"k{n + 1} = Concat<axis=0>(k{n}, k{n})" for n in range(24)),
            "f = Neg(k24)",
        ]
    ),
}


@pytest.mark.parametrize("way", GREEDY)
def test_constants_that_expand_to_more_than_memory_are_not_worked_out(way, monkeypatch):
    monkeypatch.setattr(constants, "LARGEST", 1 << 20)
    numbers = {
        "huge": np.array([200_000, 200_000]),
        "long": np.array([200_000]),
        "wide": np.array([60_000]),
        "row": np.ones((1, 1), np.float32),
        "one": np.float32(1),
        "low": np.int64(0),
        "high": np.int64(10**12),
        "step": np.int64(1),
        "last": np.array([-1]),
        "first": np.array([0]),
        "zero": np.array([0]),
    }
    body = GREEDY[way] + " t = ReduceMax<keepdims=0>(f) h = Conv(x, w) z = Mul(h, t)"
    used = body.replace(",", " ").replace("(", " ").replace(")", " ").split()
    tensors = {name: array for name, array in numbers.items() if name in used}
    text = (
        f"g (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y) {{ {body} y = BatchNormalization(z, s, b, m, v) }}"
    )
    some = model(text, {"w": weights(4, 3, 1, 1), **norm(4), **tensors})
    _, report = bnfold.onnx.fold(some, verify=False)
    assert len(report.verdicts) == 1


def test_a_weight_that_would_expand_to_more_than_memory_stays():
    text = f"g (float[N, 200000] x) => (float[N, 200000] y) {{ w = Expand(one, huge) h = MatMul(x, w) {BN} }}"
    some = model(text, {"one": np.float32(1), "huge": np.array([200_000, 200_000]), **norm(200_000)})
    _, report = bnfold.onnx.fold(some, verify=False)
    assert "too large to be worked out" in report.verdicts[0].reason


def test_a_chain_of_constants_is_worked_out_in_one_pass_however_long():
    """Each link reads the one before it twice, and is too large to be remembered."""
    links = " ".join(f"k{n + 1} = Max(k{n}, k{n})" for n in range(700))
    text = f"g (float[N, 300] x) => (float[N, 300] y) {{ {links} h = MatMul(x, k700) {BN} }}"
    _, report = bnfold.onnx.fold(model(text, {"k0": weights(300, 300), **norm(300)}), verify=False)
    assert report.count("folded") + report.count("kept") == 1


def test_a_sparse_tensor_that_stands_for_too_much():
    some = sparse([10**8, 10**8], [0, 5, 11])
    assert_refused(some, "10000000000000000|would have the shape", verify=False)


# ---------------------------------------------------------------- sparse tensors


def sparse(dims, places, op="Gemm"):
    some = model(f"g (float[2, 3] x) => (float[2, 4] y) {{ h = {op}(x, w) {BN} }}", norm(4))
    values = onnx.numpy_helper.from_array(np.array([1, 2, 3], np.float32), "w")
    stored = onnx.numpy_helper.from_array(np.array(places, np.int64), "w_places")
    some.graph.sparse_initializer.append(helper.make_sparse_tensor(values, stored, dims))
    return some


@pytest.mark.parametrize("places", [[0, 5, 11], [[0, 0], [1, 1], [2, 3]]])
@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_a_sparse_weight_is_a_constant_and_takes_the_batchnorm(places, op):
    some = sparse([3, 4], places, op)
    folded, report = bnfold.onnx.fold(some)
    assert report.count("folded") == 1
    assert report.verified
    assert [item.question for item in report.evidence].count("float64") == 1
    assert not folded.graph.sparse_initializer
    assert len(some.graph.sparse_initializer) == 1


def test_a_sparse_weight_that_somebody_else_reads_stays_for_them():
    some = sparse([3, 4], [0, 5, 11])
    some.graph.node.append(helper.make_node("MatMul", ["x", "w"], ["z"]))
    some.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 4]))
    folded, report = bnfold.onnx.fold(some)
    assert report.verified
    assert len(folded.graph.sparse_initializer) == 1


@VERIFY
@pytest.mark.parametrize("places", [[0, 5, 12], [0, -1, 5], [0, 5], [[0, 0], [1, 1], [3, 3]]])
def test_a_sparse_tensor_whose_places_do_not_suit_its_shape(places, verify):
    assert_refused(sparse([3, 4], places), "sparse", verify)


# ---------------------------------------------------------------- the files of the inputs


def test_inputs_from_a_pipe_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "in.npz")
    source = write(tmp_path / "net.onnx", net())
    code = f"import bnfold.onnx; bnfold.onnx.fold_file({str(source)!r}, None, {str(tmp_path / 'in.npz')!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    assert "no regular file" in done.stderr


# ---------------------------------------------------------------- models that are not valid, and change nothing


def group(number, size="1, 3, 8, 8"):
    text = f"g (float[{size}] x) => (float[a, b, c, d] y) {{ h = Conv<group={number}>(x, w) {BN} }}"
    return model(text, {"w": weights(4, 3, 3, 3), **norm(4)})


@VERIFY
@pytest.mark.parametrize("number", [0, -1, 7])
@pytest.mark.parametrize("size", ["1, 3, 8, 8", "N, C, H, W"])
def test_a_convolution_of_groups_that_cannot_be(number, size, verify):
    assert_refused(group(number, size), "onnxruntime|not valid", verify)


INVALID = {
    "an operator that nobody knows": "h = Relu(x) y = Nonsense(h)",
    "an attribute that nobody knows": "h = Relu<foo=1>(x) y = Tanh(h)",
    "an operand too many": "h = Relu(x) y = Tanh(h, x)",
    "a permutation that is none": "h = Relu(x) y = Transpose<perm=[0, 0]>(h)",
    "a domain that is not imported": "h = Relu(x) y = my.Op(h)",
}


@VERIFY
@pytest.mark.parametrize("fault", INVALID)
def test_an_invalid_model_is_not_given_back_as_if_it_were_fine(fault, verify):
    some = model(f"g (float[4, 3] x) => (float[4, 3] y) {{ {INVALID[fault]} }}")
    assert_refused(some, "onnxruntime|not valid", verify)


@VERIFY
def test_a_scale_that_is_declared_as_another_type(verify):
    some = model(
        f"g (float[4, 3] x) => (float[4, 5] y) {{ h = Gemm(x, w) {BN} }}", {"w": weights(3, 5), **norm(5)}
    )
    some.graph.input.append(helper.make_tensor_value_info("s", TensorProto.DOUBLE, [5]))
    assert_refused(some, "onnxruntime|not valid", verify)


def test_an_operator_of_another_domain_is_given_back_with_a_note():
    some = model("g (float[4, 3] x) => (float[4, 3] y) { h = Relu(x) y = my.Op(h) }", extra=', "my": 1')
    folded, report = bnfold.onnx.fold(some)
    assert folded == some
    assert any("could not be run" in note for note in report.notes)


@VERIFY
def test_an_output_without_a_shape_is_taken(verify):
    some = model(
        f"g (float[1, 3, 6, 6] x) => (float y) {{ h = Conv(x, w) {BN} }}",
        {"w": weights(4, 3, 3, 3), **norm(4)},
    )
    some.graph.output[0].type.tensor_type.ClearField("shape")
    _, report = bnfold.onnx.fold(some, verify=verify)
    assert report.count("folded") == 1


def test_a_custom_operator_behind_a_batchnorm_that_stays_is_no_error():
    text = "g (float[4, 3] x) => (float[4, 3] y) { h = my.Op(x) y = BatchNormalization(h, s, b, m, v) }"
    _, report = bnfold.onnx.fold(model(text, norm(3), extra=', "my": 1'))
    assert report.count("kept") == 1
    assert any("could not be run" in note for note in report.notes)


def test_a_batchnorm_that_stays_in_a_valid_model_stays_silently():
    report = kept(
        model("g (float[4, 3] x) => (float[4, 3] y) { y = BatchNormalization(x, s, b, m, v) }", norm(3)),
        "input of",
    )
    assert not any("could not be run" in note for note in report.notes)


# ---------------------------------------------------------------- mutants


def rich():
    """A model of many kinds of nodes: functions, a body, constants that are worked out, sparse and other tensors."""
    rest = """<domain: "my", opset_import: ["": 18]> block <eps> (x, w, s, b, m, v) => (y) {
        h = MatMul(x, w) y = BatchNormalization<epsilon: float = @eps>(h, s, b, m, v) }"""
    text = """g (float[N, 3] x, float[N, 3, 4, 4] image) => (float[N, 5] y, float[N, 6] z) {
        k = my.block<eps = 0.5>(x, w, s, b, m, v) one = Constant<value_ints = [1]>() u = Tile(c, one) l = Add(k, u)
        y = If(yes) <then_branch = a () => (float[N, 5] d) { d = Relu(l) },
                     else_branch = e () => (float[N, 5] f) { f = BatchNormalization(l, s, b, m, v) }>
        n = BatchNormalization(image, s3, b3, m3, v3) p = Pad(n, pads) r = Resize(p, , scales)
        to = Constant<value_ints = [0, -1]>() i = Reshape(r, to) z = Gemm(i, last) }"""
    tensors = {
        "w": weights(3, 5),
        "c": weights(5),
        **norm(5),
        **{f"{name}3": array for name, array in norm(3).items()},
        "pads": np.zeros(8, np.int64),
        "scales": np.array([1, 1, 2, 1], np.float32),
        "yes": np.array(True),
    }
    some = model(text, tensors, opset=18, extra=', "my": 1', rest=rest)
    values = onnx.numpy_helper.from_array(np.array([1, 2, 3], np.float32), "last")
    places = onnx.numpy_helper.from_array(np.array([0, 5, 100], np.int64), "places")
    some.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [96, 6]))
    some.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"b"]))
    return some


def mutant(whole, draw):
    """A file that was cut, or in which some bytes were flipped, overwritten, inserted, dropped or zeroed."""
    data = bytearray(whole)
    if not draw.integers(6):
        return bytes(data[: draw.integers(len(data))])
    for _ in range(draw.integers(1, 4)):
        place, how = int(draw.integers(len(data))), draw.integers(5)
        if how == 0:
            data[place] ^= 1 << int(draw.integers(8))
        elif how == 1:
            data[place] = int(draw.integers(256))
        elif how == 2:
            data[place:place] = draw.bytes(int(draw.integers(1, 4)))
        else:
            data[place : place + 4] = bytes(4 if how == 3 else 0)
    return bytes(data)


SPECIAL = [0, 1, -1, 7, 255, 2**31 - 1, -(2**31), 2**31, 10**16, 2**62, -(2**63)]
WORDS = [
    "",
    "x",
    "y",
    "w",
    "s",
    "n",
    "Loop",
    "Dropout",
    "Constant",
    "BatchNormalization",
    "location",
    "-1",
    "\0",
    "my",
]


def scalars(message):
    """Every field that is set in a message, at any depth."""
    found, waiting = [], [message]
    while waiting:
        message = waiting.pop()
        for field, value in message.ListFields():
            found.append((message, field, value))
            if field.type == field.TYPE_MESSAGE:
                waiting += [value] if hasattr(value, "ListFields") else value
    return found


def other(field, draw):
    if field.type == field.TYPE_STRING:
        return WORDS[draw.integers(len(WORDS))]
    if field.type == field.TYPE_BYTES:
        return [b"", b"\xff\xfe", b"SAME_UPPER"][draw.integers(3)]
    if field.type == field.TYPE_FLOAT:
        return [0.0, -1.0, float("nan"), float("inf")][draw.integers(4)]
    return int(draw.integers(27)) if field.type == field.TYPE_ENUM else SPECIAL[draw.integers(len(SPECIAL))]


def structured_mutant(whole, draw):
    """A file that parses, with a field or two that hold something else, or are gone, or stand there twice."""
    some = onnx.ModelProto.FromString(whole)
    for _ in range(draw.integers(1, 3)):
        fields = scalars(some)
        message, field, value = fields[draw.integers(len(fields))]
        repeated = not isinstance(value, str | bytes | int | float) and not hasattr(value, "ListFields")
        try:
            if repeated and (not len(value) or draw.integers(2)):
                value.append(
                    value[0] if field.type == field.TYPE_MESSAGE and len(value) else other(field, draw)
                )
            elif repeated:
                del value[int(draw.integers(len(value)))]
            elif field.type == field.TYPE_MESSAGE:
                message.ClearField(field.name)
            else:
                setattr(message, field.name, other(field, draw))
        except (ValueError, TypeError):  # the field does not take such a value
            continue
    return some.SerializeToString()


def assert_no_mutant_crashes(folder, count, seed):
    """Fold mutants of two models, one with external data; nothing but a BnfoldError may come of it."""
    draw, refused = np.random.default_rng(seed), 0
    onnx.save_model(
        net(), folder / "net.onnx", save_as_external_data=True, size_threshold=0, location="net.onnx.data"
    )
    wholes = [(folder / "net.onnx").read_bytes(), rich().SerializeToString()]
    for number in range(count):
        change = (mutant, structured_mutant)[number // 2 % 2]
        (folder / "net.onnx").write_bytes(change(wholes[number % 2], draw))
        try:
            bnfold.fold_file(folder / "net.onnx", folder / "out.onnx", verify=not number % 20, duplicate=True)
        except BnfoldError:
            refused += 1
    assert 0.3 * count < refused < count


def test_hundreds_of_damaged_files_are_refused_or_folded_and_never_a_crash(tmp_path):
    assert_no_mutant_crashes(tmp_path, 300, 4)


@pytest.mark.slow
def test_fifty_thousand_damaged_files_are_refused_or_folded_and_never_a_crash(tmp_path):
    assert_no_mutant_crashes(tmp_path, 50_000, 5)
