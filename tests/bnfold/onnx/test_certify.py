"""Certificates: made and checked on the files as they were written, and refused once anything is another thing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import bnfold.onnx
from bnfold.errors import InputError
from bnfold.fold import main
from bnfold.onnx import certify
from bnfold.onnx.certify import Certificate
from bnfold.simulation import NotProved
from tests.onnx_models import model, norm, weights, write

NET = """
net (float[N,3,8,8] x) => (float[N,4] y) {
    c = Conv<pads=[1,1,1,1]>(x, W)
    n = BatchNormalization(c, s, b, m, v)
    r = LeakyRelu<alpha=0.1>(n)
    d = Conv<pads=[1,1,1,1]>(r, U, u)
    e = Conv(r, V)
    a = Add(d, e)
    z = Clip(a, low, high)
    p = GlobalAveragePool(z)
    f = Flatten(p)
    k = BatchNormalization(f, ks, kb, km, kv)
    y = Gemm<transB=1, alpha=0.5>(k, G, g)
}
"""


def net() -> onnx.ModelProto:
    tensors = {
        "W": weights(4, 3, 3, 3),
        "U": weights(4, 4, 3, 3),
        "u": weights(4, seed=2),
        "V": weights(4, 4, 1, 1, seed=3),
        "G": weights(4, 4, seed=4),
        "g": weights(4, seed=5),
        "low": np.float32(-1.0),
        "high": np.float32(3.0),
        **norm(4),
        **norm(4, "k", seed=9),
    }
    return model(NET, tensors)


@pytest.fixture
def folded(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A file, the folded one, and the certificate."""
    source, target, told = write(tmp_path / "net.onnx", net()), tmp_path / "out.onnx", tmp_path / "net.json"
    report = bnfold.onnx.fold_file(source, target, certificate=told)
    assert report.count("folded") == 2
    assert report.merged
    assert len(report.proof) == 2
    return source, target, told


def check(source: Path, target: Path, told: Path) -> list[str]:
    return certify.check(
        onnx.load(source), onnx.load(target), certify.load(told), source.parent, target.parent
    )


def test_a_certificate_is_checked_again_from_the_two_files(folded: tuple[Path, Path, Path]) -> None:
    algebra, numbers = check(*folded)
    assert "every input" in algebra
    assert "within 0." in numbers


def test_the_folded_model_carries_it_but_for_what_was_measured(folded: tuple[Path, Path, Path]) -> None:
    _, target, told = folded
    (item,) = [item for item in onnx.load(target).metadata_props if item.key == certify.KEY]
    carried, whole = json.loads(item.value), json.loads(told.read_text())
    assert carried.pop("evidence") == []
    assert whole.pop("evidence")
    assert carried == whole


def test_a_certificate_has_a_format_and_a_version(folded: tuple[Path, Path, Path]) -> None:
    data = json.loads(folded[2].read_text())
    assert (data["format"], data["version"]) == ("bnfold certificate", 1)
    expected = {
        "source",
        "result",
        "done",
        "reading",
        "versions",
        "verdicts",
        "evidence",
        "format",
        "version",
    }
    assert data.keys() == expected


def test_other_files_are_told_apart_and_the_same_ones_stored_otherwise_are_not(
    folded: tuple[Path, Path, Path],
) -> None:
    source, target, told = folded
    with pytest.raises(NotProved, match="second"):
        check(source, source, told)
    with pytest.raises(NotProved, match="first"):
        check(target, target, told)
    again = onnx.load(target)
    again.doc_string = "as it was, but for this"
    onnx.save(again, target, save_as_external_data=True, location="out.data", size_threshold=0)
    assert check(source, target, told)


# ---------------------------------------------------------------- the second model is changed


def tensor(some: onnx.ModelProto, place: int) -> onnx.TensorProto:
    """An initializer, the largest first."""
    return sorted(some.graph.initializer, key=lambda t: -int(np.prod(t.dims)))[place]


def nudge(place: int) -> Callable[[onnx.ModelProto], None]:
    """Change one number of a tensor by a few units in its last place."""

    def change(some: onnx.ModelProto) -> None:
        which = tensor(some, place)
        array = numpy_helper.to_array(which).copy()
        array.flat[0] = array.flat[0] * np.float32(1 + 2e-6) + np.float32(1e-30)
        which.CopyFrom(numpy_helper.from_array(array, which.name))

    return change


def node(op: str) -> Callable[[onnx.ModelProto], onnx.NodeProto]:
    return lambda some: next(each for each in some.graph.node if each.op_type == op)


def slope(some: onnx.ModelProto) -> None:
    node("LeakyRelu")(some).attribute[0].f = 0.2


def pads(some: onnx.ModelProto) -> None:
    next(a for a in node("Conv")(some).attribute if a.name == "pads").ints[0] = 2


def operator(some: onnx.ModelProto) -> None:
    node("Clip")(some).op_type = "Relu"
    del node("Relu")(some).input[1:]


def wiring(some: onnx.ModelProto) -> None:
    node("Clip")(some).input[0] = node("Clip")(some).input[1]


def bound(some: onnx.ModelProto) -> None:
    high = next(t for t in some.graph.initializer if t.name == "high")
    high.CopyFrom(numpy_helper.from_array(np.float32(4.0), "high"))


def added(some: onnx.ModelProto) -> None:
    last = some.graph.node[-1]
    last.output[0] = "before"
    some.graph.node.append(onnx.helper.make_node("Neg", ["before"], ["y"]))


CHANGES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "a number of the largest weight": nudge(0),
    "a number of the next one": nudge(1),
    "a number of a bias": nudge(4),
    "a slope": slope,
    "a padding": pads,
    "an operator": operator,
    "what is read": wiring,
    "a bound": bound,
    "one more node": added,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_changed_in_the_folded_model_is_found(
    change: str, folded: tuple[Path, Path, Path]
) -> None:
    source, target, told = folded
    changed = onnx.load(target)
    CHANGES[change](changed)
    stated = json.loads(told.read_text())
    with pytest.raises(NotProved, match="other models"):
        certify.check(onnx.load(source), changed, Certificate.from_json(told.read_text()))
    stated["result"] = certify.digest(changed)
    with pytest.raises(NotProved, match=r"proves nothing|not proved"):
        certify.check(onnx.load(source), changed, Certificate.from_json(json.dumps(stated)))


# ---------------------------------------------------------------- the certificate is changed


def scaled(done: Any) -> None:
    vectors = next(iter(done["linears"].values()))
    vectors["after"]["scale"][0] *= 1.001


def shifted(done: Any) -> None:
    vectors = next(iter(done["linears"].values()))
    vectors["after"]["shift"][0] += 0.001


def kept(done: Any) -> None:
    done["erased"].pop()


def unmerged(done: Any) -> None:
    done["merges"].clear()


def elsewhere(done: Any) -> None:
    done["merges"][0]["source"] = "x"


def unknown(done: Any) -> None:
    done["erased"].append("nobody")


def infinite(done: Any) -> None:
    next(iter(done["linears"].values()))["after"]["scale"][0] = 1e999


LIES = [scaled, shifted, kept, unmerged, elsewhere, unknown, infinite]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_certificate_that_says_another_thing_proves_nothing(
    lie: Callable[[Any], None], folded: tuple[Path, Path, Path]
) -> None:
    source, target, told = folded
    stated = json.loads(told.read_text())
    lie(stated["done"])
    with pytest.raises(NotProved, match=r"proves nothing|not proved"):
        certify.check(onnx.load(source), onnx.load(target), Certificate.from_json(json.dumps(stated)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "bnfold certificate", "version": 2}',
        "{",
        '{"format": "bnfold certificate", "version": 1, "done": {"erased": 3}}',
    ],
)
def test_what_is_no_certificate_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "told.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"told\.json"):
        certify.load(path)


# ---------------------------------------------------------------- the command


def test_the_command_writes_a_certificate_and_says_what_was_proved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "net.onnx", net())
    assert main([str(source), "--certificate", str(tmp_path / "c.json")]) == 0
    assert "units in its last place" in " ".join(capsys.readouterr().out.split())
    assert check(source, tmp_path / "net.folded.onnx", tmp_path / "c.json")


def test_a_certificate_wants_a_model_and_a_place_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "net.onnx", net())
    for options in (["--dry-run", "--certificate", "c.json"], ["--certificate", str(source)]):
        assert main([str(source), *options]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_nothing_is_written_where_a_certificate_would_prove_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> Any:
        raise NotProved("it is not proved")

    monkeypatch.setattr(certify, "check", refuse)
    source = write(tmp_path / "net.onnx", net())
    assert main([str(source), "--certificate", str(tmp_path / "c.json")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def verify(*arguments: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """What `bnfold verify` returns and prints."""
    code = import_module("bnfold.verify").main([str(each) for each in arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_verify_proves_what_a_certificate_says_and_then_measures(
    folded: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, told = folded
    for arguments in ((source, target, "--certificate", told), (source, target)):
        code, said = verify(*arguments, capsys=capsys)
        assert code == 0
        assert said.count("proved: ") == 2
        assert said.rstrip().endswith("equivalent")


def test_verify_fails_with_the_reason_where_a_certificate_was_changed(
    folded: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, told = folded
    stated = json.loads(told.read_text())
    shifted(stated["done"])
    told.write_text(json.dumps(stated))
    code, said = verify(source, target, "--certificate", told, capsys=capsys)
    assert code == 1
    assert said.startswith("error: the fold is not proved: ")
    code, said = verify(target, source, "--certificate", told, capsys=capsys)
    assert (code, said.startswith("error: the certificate is of other models")) == (1, True)


def test_a_carried_certificate_says_nothing_of_a_model_that_was_changed_since(
    folded: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, _ = folded
    changed = onnx.load(target)
    changed.graph.node.append(onnx.helper.make_node("Identity", ["y"], ["y2"]))
    onnx.save(changed, target)
    code, said = verify(source, target, capsys=capsys)
    assert (code, "proved" in said) == (0, False)


def test_a_certificate_of_what_is_no_onnx_file_is_refused(
    folded: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "ckpt.pt"
    other.write_bytes(b"PK")
    code, said = verify(folded[0], other, "--certificate", folded[2], capsys=capsys)
    assert code == 2
    assert "two ONNX files" in said


# ---------------------------------------------------------------- both are forged


def forged(source: onnx.ModelProto, result: onnx.ModelProto, **done: Any) -> list[str]:
    """Check a certificate that somebody wrote who chose the second model, too."""
    empty: dict[str, Any] = {"erased": [], "copies": [], "merges": []}
    empty |= {"linears": {}, "affines": {}, "absorbed": {}, "left": {}}
    told = {"source": certify.digest(source), "result": certify.digest(result), "versions": {}}
    told |= {"format": "bnfold certificate", "version": 1, "reading": done.pop("reading", {})}
    text = json.dumps({**told, "done": {**empty, **done}})
    return certify.check(source, result, Certificate.from_json(text))


def small(
    body: str, ends: str = "(float[N,4] x) => (float[N,4] y)", more: str = "", **tensors: Any
) -> onnx.ModelProto:
    return model(f"net {ends} {more} {{ {body} }}", tensors)


def block(nodes: str, **changes: Any) -> dict[str, Any]:
    """One merge of nodes on `x`."""
    one = {"into": "m", "source": "x", "result": "d", "nodes": nodes.split(), "dropped": [], "signs": []}
    return {"merges": [{**one, **changes}]}


W, V = weights(4, 4), weights(4, 4, seed=2)
K, L = weights(4, 4, 1, 1), weights(4, 4, 3, 3)
KL = np.einsum("oikl,ij->ojkl", L, K[:, :, 0, 0])
ONES, LARGE = np.ones(4, np.float32), np.array([1e8, 1, 1, 1], np.float32)
IMAGE = "(float[N,4,H,Q] x) => (float[N,4,A,B] y)"
TWO = "(float[N,4] x) => (float[N,4] y, float[N,4] z)"
SIZED = "(float[1,1,1,Q] x, int64[4] s) => (float[A,B,C,D] y)"


def branches(*order: tuple[str, str]) -> onnx.ModelProto:
    """An If whose branches, each of one operator, are listed in some order."""
    some = small("y = Relu(x)", "(float[N,4] x, bool k) => (float[N,4] y)")
    del some.graph.node[:]
    some.graph.node.append(onnx.helper.make_node("If", ["k"], ["y"], "if"))
    for name, op in order:
        inner = [onnx.helper.make_node(op, ["x"], [op])]
        body = onnx.helper.make_graph(inner, op, [], [onnx.ValueInfoProto(name=op)])
        some.graph.node[0].attribute.append(onnx.helper.make_attribute(f"{name}_branch", body))
    return some


def loops(outer: str, inner: str, read: str) -> onnx.ModelProto:
    """A loop in a loop, which yields the counter of the outer or of the inner one."""

    def body(name: str, nodes: list[onnx.NodeProto], given: str) -> onnx.GraphProto:
        ends = [onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, [])]
        ends.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
        nodes = [*nodes, onnx.helper.make_node("Identity", ["true"], [f"{name}c"])]
        outputs = [onnx.ValueInfoProto(name=f"{name}c"), onnx.ValueInfoProto(name=given)]
        return onnx.helper.make_graph(nodes, name, ends, outputs)

    def loop(name: str, inside: onnx.GraphProto, output: str) -> onnx.NodeProto:
        return onnx.helper.make_node("Loop", ["three", ""], [output], name, body=inside)

    within = body("b", [onnx.helper.make_node("Cast", [read], ["p"], to=1)], "p")
    around = [onnx.helper.make_node("Identity", ["i"], ["e"]), loop(inner, within, "q")]
    some = small("y = Add(x, x)", "(float[3,3] x) => (float[3,3] y)", three=np.int64(3), true=np.True_)
    some.graph.node.insert(0, loop(outer, body("a", around, "q"), "o"))
    some.graph.node[1].input[1] = "o"
    return some


FORGERIES: dict[str, tuple[onnx.ModelProto, onnx.ModelProto, dict[str, Any]]] = {
    "one weight for two operators": (
        small("c = MatMul(x, W) d = MatMul(x, V) e = Tanh(c) f = Relu(d) y = Add(e, f)", W=W, V=V),
        small("c = MatMul(x, W) e = Tanh(c) f = Relu(c) y = Add(e, f)", W=W),
        {},
    ),
    "one affine map for two": (
        small("c = Mul(x, W) d = Mul(x, V) e = Tanh(c) f = Relu(d) y = Add(e, f)", W=W[0], V=V[0]),
        small("c = Mul(x, W) e = Tanh(c) f = Relu(c) y = Add(e, f)", W=W[0]),
        {},
    ),
    "a small number beside a large one": (
        small("a = Mul(x, W) y = Relu(a)", W=LARGE),
        small("a = Mul(x, W) y = Relu(a)", W=LARGE * np.array([1, 2, 0, -1], np.float32)),
        {},
    ),
    "a Relu that lost its operand": (
        small("a = Relu(x) y = Tanh(a)"),
        small("y = Tanh(x)"),
        {"left": {"a": [0]}},
    ),
    "a copy by the name of another value": (
        small("c = MatMul(x, W) z = Tanh(x) y = MatMul(c, V)", TWO, W=W, V=V),
        small("z = Tanh(x) y = MatMul(z, V)", TWO, V=V),
        {"copies": [["q", "c", "y", "z"]]},
    ),
    "the branches of an If": (
        branches(("then", "Relu"), ("else", "Tanh")),
        branches(("else", "Relu"), ("then", "Tanh")),
        {},
    ),
    "the names of two loops": (loops("one", "two", "e"), loops("two", "one", "i"), {}),
    "paddings that go by no name": (
        small("c = Conv(x, W) d = Conv(c, V) y = Relu(d)", IMAGE, W=K, V=L),
        small('d = Conv<auto_pad="", pads=[1,1,1,1]>(x, W) y = Relu(d)', IMAGE, W=KL),
        block("c d"),
    ),
    "a bias for rows": (
        small("c = Gemm(x, W) d = Gemm(c, V, b) y = Relu(d)", W=W, V=V, b=V[0]),
        small("d = Gemm(x, W, b) y = Relu(d)", W=W @ V, b=V[:1].T),
        block("c d"),
    ),
    "an input where the caller gives none": (
        small("y = Mul(x, c)", "(float[N,4] x, float[4] c) => (float[N,4] y)", c=W[0]),
        small("y = Mul(x, c)", "(float[N,4] x, float[4] c) => (float[N,4] y)", c=W[1]),
        {},
    ),
    "a node that nobody reads and that fails": (
        small("s = Shape(x) g = Gather(s, i) y = Relu(x)", i=np.int64(1)),
        small("s = Shape(x) g = Gather(s, i) y = Relu(x)", i=np.int64(5)),
        {},
    ),
    "a node that nobody reads, of another value": (
        small("s = Shape(x) g = Gather(s, i) y = Relu(x)", i=np.int64(1)),
        small("s = Shape(x) g = Gather(x, i) y = Relu(x)", i=np.int64(1)),
        {},
    ),
    "a product that nobody reads, of another value": (
        small("t = Transpose(x) g = MatMul(x, W) y = Relu(x)", W=W),
        small("t = Transpose(x) g = MatMul(t, W) y = Relu(x)", W=W),
        {},
    ),
    "a scale that nobody reads, of another value": (
        small("t = Transpose(x) g = Mul(x, c) y = Relu(x)", c=W[0]),
        small("t = Transpose(x) g = Mul(t, c) y = Relu(x)", c=W[0]),
        {},
    ),
    "a weight that underflows on its way": (
        small("y = MatMul(x, W)", W=W),
        small(
            "a = Mul(W, t) b = Mul(a, t) c = Mul(b, u) d = Mul(c, u) y = MatMul(x, d)",
            W=W,
            t=np.float32(2.0**-100),
            u=np.float32(2.0**100),
        ),
        {},
    ),
    "a bound that is rounded on its way": (
        small("y = Clip(x, l, h)", l=np.float32(0), h=np.float32(1e5)),
        small("a = Cast<to=10>(h) b = Cast<to=1>(a) y = Clip(x, l, b)", l=np.float32(0), h=np.float32(1e5)),
        {},
    ),
    "a size that is declared": (
        small("r = Reshape(x, s) y = Relu(r)", SIZED),
        small(
            "r = Reshape(x, s) q = Mul(r, k) y = Relu(q)",
            SIZED,
            "<float[1,1,1,7] r>",
            k=np.ones((1, 1, 1, 7), np.float32),
        ),
        {},
    ),
    "a size that is computed": (
        small(
            "c = MatMul(z, W) b = BatchNormalization<epsilon=0.0>(c, s, t, m, s) "
            "i = Cast<to=7>(b) h = Squeeze(i) y = Reshape(x, h)",
            "(float[4,4] x, float[1,4] z) => (float[A,B,C,D] y)",
            W=W,
            s=ONES,
            t=ONES,
            m=0 * ONES,
        ),
        small(
            "c = MatMul(z, W) i = Cast<to=7>(c) h = Squeeze(i) y = Reshape(x, h)",
            "(float[4,4] x, float[1,4] z) => (float[A,B,C,D] y)",
            W=W,
        ),
        {"erased": ["b"], "linears": {"c": {"after": {"scale": [1] * 4, "shift": [1] * 4}}}},
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_pair_that_differs_is_certified_whatever_is_said_of_it(name: str) -> None:
    source, result, done = FORGERIES[name]
    assert forged(source, source)
    with pytest.raises(NotProved):
        forged(source, result, **done)


def functions(which: str) -> onnx.ModelProto:
    """A call of one of two functions of one name."""
    some = small("y = Relu(x)")
    some.ir_version = 10
    some.opset_import.append(onnx.helper.make_opsetid("own", 1))
    some.graph.node[0].CopyFrom(onnx.helper.make_node("F", ["x"], ["y"], domain="own", overload=which))
    for op in ("Tanh", "Relu"):
        inner, sets = [onnx.helper.make_node(op, ["a"], ["b"])], [onnx.helper.make_opsetid("", 17)]
        some.functions.append(onnx.helper.make_function("own", "F", ["a"], ["b"], inner, sets, overload=op))
    return some


def test_functions_are_told_apart() -> None:
    source = functions("Tanh")
    assert forged(source, source)
    for other in (functions("Relu"), functions("Tanh")):
        if other == source:
            del other.functions[:]
        with pytest.raises(NotProved):
            forged(source, other)


def test_a_sum_that_does_without_an_operand_is_certified(tmp_path: Path) -> None:
    body = "a = Conv<pads=[1,1,1,1]>(x, L) r = Relu(x) b = Conv(x, K) s = Sum(a, r, b) y = Tanh(s)"
    source = write(tmp_path / "net.onnx", small(body, IMAGE, L=L, K=K))
    report = bnfold.onnx.fold_file(source, tmp_path / "out.onnx", certificate=tmp_path / "told.json")
    assert len(report.merged) == 1
    result = onnx.load(tmp_path / "out.onnx")
    assert [len(node.input) for node in result.graph.node if node.op_type == "Sum"] == [2]
    for other in ("x", node("Sum")(result).input[0]):
        changed = onnx.load(tmp_path / "out.onnx")
        node("Sum")(changed).input[1] = other
        with pytest.raises(NotProved):
            certify.check(
                onnx.load(source),
                changed,
                replace(certify.load(tmp_path / "told.json"), result=certify.digest(changed)),
            )


def test_what_was_frozen_is_said() -> None:
    frozen = small("y = Mul(x, c)", "(float[N,4] x, float[4] c) => (float[N,4] y)", c=W[0])
    stored = small("y = Mul(x, c)", c=W[0])
    with pytest.raises(NotProved):
        forged(frozen, stored)
    assert "taken for constants" in forged(frozen, stored, reading={"frozen": True})[0]


@pytest.mark.parametrize(
    "change",
    [
        {"reading": 3},
        {"reading": {"plain": 3}},
        {"linears": {"c": 3}},
        {"linears": {"c": {"parallel": [10**400] * 4}}},
        {"affines": {"b": {"scale": 10**400, "shift": 0}}},
        {"affines": {"b": {"scale": [[1]] * 60_000, "shift": [[0] * 60_000]}}},
        {"copies": [["q", "c", "b", ["v"]]]},
        {"copies": [["q", "c", "b", "b"]]},
        {"merges": [{"result": "c"}]},
        {"left": {"y": 3}},
        {"left": {"y": [float("inf")]}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_certificate_that_holds_anything_ends_in_one_line(change: dict[str, Any]) -> None:
    nodes = "c = MatMul(x, W) b = BatchNormalization(c, s, t, m, v) y = Add(b, x)"
    source = small(nodes, W=W, s=ONES, t=ONES, m=ONES, v=ONES)
    with pytest.raises((NotProved, InputError)):
        forged(source, source, **change)


def test_a_certificate_that_is_nested_too_deep_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Certificate.from_json("[" * 200_000)
