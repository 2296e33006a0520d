"""export.sample: names from an ONNX file, the same for the same seed, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import export
from bnfold.checkpoint import Checkpoint
from bnfold.errors import InputError
from export.sample import Net, choose, invent

CHECKOUT = Path(export.__file__).parent.parent


def save_net(
    path: Path,
    rows: list[list[float]],
    vocabulary: Any = (".", "a", "b"),
    batch: int | str = 1,
    **changes: Any,
) -> str:
    """Write a net whose logits depend on the last character alone, one row of `rows` each; return its path."""
    shape = changes.get("shape", [batch, 2])
    nodes = [
        helper.make_node("Gather", ["context", "last"], ["character"], axis=1),
        helper.make_node("Gather", ["table", "character"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("context", changes.get("dtype", TensorProto.INT64), shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.array(1), "last"),
            numpy_helper.from_array(np.array(rows, np.float32), "table"),
        ],
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 20)])
    if vocabulary is not None:
        text = vocabulary if isinstance(vocabulary, str) else json.dumps(vocabulary)
        helper.set_model_props(model, {"vocabulary": text})
    onnx.save(model, path)
    return str(path)


EVEN = [[0.0, 0.0, 0.0]] * 3


@pytest.fixture
def even(tmp_path: Path) -> Net:
    """Return a net that finds every character equally likely, always."""
    return Net(save_net(tmp_path / "even.onnx", EVEN))


def test_a_seed_gives_the_same_names_whatever_the_batch(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    names = {}
    for batch in (1, 7, "dynamic"):
        export.export(make_checkpoint(".abcde"), tmp_path / "net.onnx", batch)
        names[batch] = list(invent(Net(str(tmp_path / "net.onnx")), 40, seed=3))
    assert names[1] == names[7] == names["dynamic"]
    assert len(set(names[1])) == 40
    other = list(invent(Net(str(tmp_path / "net.onnx")), 40, seed=4))
    assert other != names[1]


def test_more_names_begin_with_the_same_ones(even: Net) -> None:
    assert list(invent(even, 30, seed=1))[:10] == list(invent(even, 10, seed=1))


@pytest.mark.parametrize("start", ["b", "ab", "abba"])
def test_names_begin_as_asked_and_go_on_as_the_net_does_from_there(start: str, tmp_path: Path) -> None:
    net = Net(save_net(tmp_path / "net.onnx", [[0, 0, 0], [0, -99, 99], [99, -99, -99]], batch=7))
    assert list(invent(net, 1, seed=1, start=start)) == [start + "b" * start.endswith("a")]


def test_a_name_that_was_begun_may_be_as_long_as_any_other(even: Net) -> None:
    names = list(invent(even, 8, seed=2, longest=4, start="bab"))
    assert {len(name) for name in names} == {3, 4}
    assert sorted(names) == ["bab", "baba", "babb"]


@pytest.mark.parametrize(
    ("start", "reason"), [("ax", "'x' is none"), (".a", "'.' is none"), ("abab", "more than")]
)
def test_a_beginning_that_no_name_has(start: str, reason: str, even: Net) -> None:
    with pytest.raises(InputError, match=reason):
        list(invent(even, 1, seed=1, longest=3, start=start))


def test_characters_are_drawn_as_often_as_softmax_says() -> None:
    chances, logits = np.random.default_rng(0).random(20_000), np.array([[0.5, -1.0, 2.0]])
    for temperature in (0.5, 1.0, 2.0):
        shares = np.exp(logits[0] / temperature) / np.exp(logits[0] / temperature).sum()
        drawn = choose(np.repeat(logits, len(chances), axis=0), chances, temperature)
        counts = np.bincount(drawn, minlength=3) / len(chances)
        assert np.abs(counts - shares).max() < 5 * np.sqrt(0.25 / len(chances))


def test_the_draw_survives_its_ends_and_huge_logits() -> None:
    logits = np.array([[-1e30, 1e30, 0.0]] * 2)
    assert choose(logits, np.array([0.0, np.nextafter(1.0, 0.0)]), 1e-6).tolist() == [1, 1]
    assert choose(np.zeros((2, 3)), np.array([0.0, np.nextafter(1.0, 0.0)]), 1.0).tolist() == [0, 2]


def test_a_name_follows_from_the_characters_before_it(tmp_path: Path) -> None:
    """After the terminator comes a, after a comes b, after b the end: one name, so one is found."""
    rows = [[0.0, 99.0, 0.0], [0.0, 0.0, 99.0], [99.0, 0.0, 0.0]]
    assert list(invent(Net(save_net(tmp_path / "net.onnx", rows)), 3, seed=1)) == ["ab"]


def test_names_are_new_never_empty_and_end_by_themselves(even: Net) -> None:
    names = list(invent(even, 200, seed=1, longest=7))
    assert len(set(names)) == len(names) == 200
    assert max(map(len, names)) == 7
    assert "" not in names
    assert all(set(name) <= {"a", "b"} for name in names)
    lengths = Counter(map(len, names))
    assert lengths[1] == 2
    assert lengths[2] == 4


def test_the_names_there_are_run_out(even: Net) -> None:
    assert sorted(invent(even, 7, seed=1, longest=2)) == ["a", "aa", "ab", "b", "ba", "bb"]


def test_torch_and_onnx_are_never_imported(tmp_path: Path) -> None:
    path = save_net(tmp_path / "net.onnx", EVEN)
    code = (
        "import sys; from export.sample import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'onnx', 'rich'} & set(sys.modules), sorted(sys.modules); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, path, "--count", "4"],
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.split()) == 4


class TestTheCommand:
    def test_names_one_on_a_line_the_same_twice(self, run_module: Callable[..., Any], tmp_path: Path) -> None:
        save_net(tmp_path / "net.onnx", EVEN)
        first, second = (run_module("export.sample", "net.onnx", "--count", 5, "--seed", 9) for _ in range(2))
        assert (first.returncode, first.stderr) == (0, "")
        assert len(first.stdout.splitlines()) == 5
        assert first.stdout == second.stdout

    def test_it_says_when_there_are_no_more(self, run_module: Callable[..., Any], tmp_path: Path) -> None:
        save_net(tmp_path / "net.onnx", [[0.0, 99.0, 0.0], [99.0, 0.0, 0.0], [0.0] * 3])
        result = run_module("export.sample", "net.onnx", "--count", 3)
        assert (result.returncode, result.stdout) == (0, "a\n")
        assert result.stderr == "no more than 1 different names in 300 attempts\n"

    def test_characters_that_would_move_the_cursor_are_spelt_out(
        self, run_module: Callable[..., Any], tmp_path: Path
    ) -> None:
        save_net(tmp_path / "net.onnx", EVEN, [".", "\x1b", "é"])
        result = run_module("export.sample", "net.onnx", "--count", 6)
        assert "\x1b" not in result.stdout
        assert "\\x1b" in result.stdout
        assert "é" in result.stdout

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("count", "0"),
            ("count", "-3"),
            ("longest", "0"),
            ("seed", "-1"),
            ("temperature", "0"),
            ("temperature", "nan"),
        ],
    )
    def test_numbers_out_of_range(
        self, option: str, value: str, run_module: Callable[..., Any], tmp_path: Path
    ) -> None:
        save_net(tmp_path / "net.onnx", EVEN)
        result = run_module("export.sample", "net.onnx", f"--{option}={value}")
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith(f"error: --{option} ")
        assert len(result.stderr.splitlines()) == 1

    @pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "cut short"])
    def test_files_that_are_no_model(self, kind: str, run_module: Callable[..., Any], tmp_path: Path) -> None:
        path = tmp_path / "net.onnx"
        if kind == "folder":
            path.mkdir()
        elif kind == "cut short":
            save_net(path, EVEN)
            path.write_bytes(path.read_bytes()[:-40])
        elif kind != "missing":
            path.write_text({"empty": "", "text": "emma\nolivia\n"}[kind])
        result = run_module("export.sample", "net.onnx")
        assert result.returncode == 2
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("error: net.onnx")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocabulary": None}, "no `vocabulary` in its metadata"),
        ({"vocabulary": "[1, 2"}, "no list of characters"),
        ({"vocabulary": [".", "ab", "c"]}, "no list of characters"),
        ({"vocabulary": "7"}, "no list of characters"),
        ({"dtype": TensorProto.INT32}, "one int64 input"),
        ({"shape": [1, "context"]}, "one int64 input"),
    ],
)
def test_a_model_of_something_else(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        Net(save_net(tmp_path / "net.onnx", EVEN, **changes))


@pytest.mark.parametrize("rows", [[[0.0] * 2] * 3, [[float("nan")] * 3] * 3, [[float("inf"), 0, 0]] * 3])
def test_logits_that_are_none(rows: list[list[float]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finite logits for its 3 characters"):
        list(invent(Net(save_net(tmp_path / "net.onnx", rows)), 1, seed=1))


def test_a_vocabulary_larger_than_the_table(tmp_path: Path) -> None:
    net = Net(save_net(tmp_path / "net.onnx", [[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]]))
    with pytest.raises(InputError, match="cannot be run"):
        list(invent(net, 5, seed=1))
