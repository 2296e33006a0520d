"""export.Session: the numbers of onnxruntime's own session, from memory that is bound once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, parser

import export
from bnfold.checkpoint import Checkpoint
from bnfold.errors import InputError
from export.session import Session, open_session

HEADER = '<ir_version: 9, opset_import: ["" : 20]>'


def model(text: str) -> bytes:
    """Return the bytes of a model that is written as text."""
    return parser.parse_model(f"{HEADER} {text}").SerializeToString()


@pytest.fixture(scope="module")
def path(make_checkpoint: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the exported file of a net over five characters."""
    return export.export(make_checkpoint(".abcd"), tmp_path_factory.mktemp("session") / "net.onnx").path


@pytest.fixture(scope="module")
def contexts(make_checkpoint: Callable[..., Checkpoint]) -> Any:
    """Return all 125 contexts, each as a batch of one."""
    return make_checkpoint(".abcd").input.every().numpy()[:, None]


def test_every_context_gives_the_bits_of_onnxruntime_s_own_session(path: Path, contexts: Any) -> None:
    session, own = Session(path), open_session(path)
    results = [session(context) for context in contexts]
    for context, result in zip(contexts, results, strict=True):
        np.testing.assert_array_equal(result, own.run(None, {"context": context})[0], strict=True)


def test_without_a_copy_the_arrays_are_those_that_the_model_reads_and_writes(
    path: Path, contexts: Any
) -> None:
    session = Session(path.read_bytes())
    session.inputs["context"][:] = contexts[77]
    session.run()
    np.testing.assert_array_equal(session.outputs["logits"], Session(path)(contexts[77]))


def test_threads_that_share_a_session_get_each_its_own_result(path: Path, contexts: Any) -> None:
    """Calls that ran at once would read each other's input: 8 threads, 2,000 calls, often switched."""
    shared, wanted = Session(path), [Session(path)(context) for context in contexts]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda i: shared(contexts[i % 125]), range(2000)))
    finally:
        sys.setswitchinterval(before)
    wrong = [i for i, result in enumerate(results) if not np.array_equal(result, wanted[i % 125])]
    assert wrong == []


def test_several_inputs_and_outputs_come_in_the_order_of_the_model() -> None:
    session = Session(
        model("g (float[2] a, double[3, 1] b) => (bool[2] p, double[3, 1] q) { p = IsNaN(a) q = Neg(b) }")
    )
    p, q = session(np.array([np.nan, 1], np.float32), np.ones((3, 1)))
    assert (list(session.inputs), list(session.outputs)) == (["a", "b"], ["p", "q"])
    assert (p.tolist(), q.tolist(), q.dtype) == ([True, False], [[-1]] * 3, np.float64)


def test_an_open_size_is_given_once(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    given = make_checkpoint(".abcd")
    path = export.export(given, tmp_path / "net.onnx", "dynamic").path
    contexts = given.input.every()[:7]
    logits = Session(path, {"context": (7, 3)})(contexts.numpy())
    np.testing.assert_allclose(logits, given.model(contexts).detach().numpy(), rtol=0, atol=1e-4)
    for shapes, reason in {
        (): "is left open",
        (("context", (7, 4)),): r"is not \[7, 4\]",
        (("context", (7,)),): r"is not \[7\]",
        (("context", (-1, 3)),): r"is not \[-1, 3\]",
        (("input", (7, 3)),): "has no input `input`; its inputs: `context`",
    }.items():
        with pytest.raises(InputError, match=reason):
            Session(path, dict(shapes))


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ([np.zeros((1, 3))], r"takes int64 \[1, 3\], and was given float64 \[1, 3\]"),
        ([np.zeros((1, 3), np.int32)], "given int32"),
        ([np.zeros(3, np.int64)], r"given int64 \[3\]"),
        ([np.zeros((1, 1), np.int64)], r"given int64 \[1, 1\]"),
        ([[[0, 0, 0]]], "given a list"),
        ([], "0 arrays for a model with 1 inputs"),
        ([np.full((1, 3), 99)], "cannot be run on this: .*indices element out of data bounds"),
    ],
    ids=["dtype", "narrower", "rank", "broadcast", "list", "none", "beyond"],
)
def test_what_does_not_fit_is_refused_and_the_next_call_is_right(
    arrays: list[Any], reason: str, path: Path, contexts: Any
) -> None:
    """Nothing is broadcast or rounded on its way into the bound memory."""
    session = Session(path)
    with pytest.raises(InputError, match=reason) as caught:
        session(*arrays)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(session(contexts[9]), Session(path)(contexts[9]))


def test_what_no_session_binds_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Session(tmp_path / "missing.onnx")
    with pytest.raises(InputError, match=r"`x` is a tensor\(string\)"):
        Session(model("g (string[1] x) => (string[1] y) { y = Identity(x) }"))
    node = helper.make_node("SequenceConstruct", ["x"], ["y"])
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [entry], [result])
    proto = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 20)])
    with pytest.raises(InputError, match=r"`y` is a seq"):
        Session(proto.SerializeToString())


def test_it_needs_neither_torch_nor_onnx() -> None:
    code = "import sys, export; export.Session; assert not {'torch', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(export.__file__).parent.parent)
