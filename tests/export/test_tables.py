"""export.tables: a table that stands for layers computes what they do, and is made only where the rule says it pays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import export
from bnfold.checkpoint import Checkpoint, InputDomain, save
from bnfold.errors import InputError, NotEquivalent
from export import __main__ as command
from export import tables
from export.session import Session
from export.tables import Positions, choose, positions_pay, tabulate, whole_pays


def build(
    positions: int = 8, characters: int = 27, width: int = 24, features: int = 200, bias: bool = True
) -> Checkpoint:
    """Return a net over so many characters that a table of positions pays for by default, and no whole one."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Embedding(characters, width), nn.Flatten())
    net += nn.Sequential(nn.Linear(positions * width, features, bias=bias), nn.Tanh(), nn.Linear(features, 5))
    return Checkpoint(net.eval(), InputDomain((positions,), "int64", 0, characters))


# ---------------------------------------------------------------- what a table computes


def test_a_net_of_few_inputs_becomes_one_look_up_of_outputs_that_are_rounded_once(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    given = make_checkpoint(".abcd")
    exported = export.export(given, tmp_path / "net.onnx", tables="auto")
    assert (exported.operators, exported.tables) == (("GatherND",), "whole")
    assert exported.evidence.exhaustive
    assert [one.outcome for one in exported.verdicts] == ["folded"] * 3
    proto = onnx.load(exported.path)
    assert {one.key: one.value for one in proto.metadata_props}["tables"] == "whole"
    session = Session(exported.path)
    for context in given.input.every():
        wanted = given.model.double()(context[None]).detach().numpy()
        np.testing.assert_allclose(session(context[None].numpy()), wanted, rtol=2**-24, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_wide_embedding_of_many_positions_becomes_a_table_for_each(bias: bool, tmp_path: Path) -> None:
    given = build(bias=bias)
    exported = export.export(given, tmp_path / "net.onnx", tables="auto")
    assert exported.tables == "positions"
    assert exported.operators == ("Reshape", "GatherND", "ReduceSum", "Tanh", "Gemm")
    contexts = given.input.sample(50, seed=9)
    wanted = given.model.double()(contexts).detach().numpy()
    session = Session(exported.path)
    ran = np.concatenate([session(one[None].numpy()) for one in contexts])
    np.testing.assert_allclose(ran, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [4, "dynamic"])
def test_other_batches_are_looked_up_whole_and_not_by_position(
    batch: int | str, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    given = make_checkpoint(".abcd")
    exported = export.export(given, tmp_path / "net.onnx", batch, "auto")
    assert exported.operators == ("GatherND",)
    contexts = given.input.every()[60:64]
    ran = Session(exported.path, {"context": (4, 3)})(contexts.numpy())
    np.testing.assert_allclose(ran, given.model(contexts).detach().numpy(), rtol=0, atol=1e-5)
    assert export.export(build(), tmp_path / "net.onnx", batch, "auto").tables is None


@pytest.mark.parametrize("kind", ["whole", "positions"])
def test_a_character_that_there_is_not_is_an_error_and_no_row_of_the_next_position(
    kind: str, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    given = make_checkpoint(".abcd") if kind == "whole" else build()
    exported = export.export(given, tmp_path / "net.onnx", tables="auto")
    assert exported.tables == kind
    context = np.zeros((1, *given.input.shape), np.int64)
    context[0, 0] = given.input.high
    with pytest.raises(InputError, match="cannot be run on this"):
        Session(exported.path)(context)


def test_a_table_with_one_wrong_number_is_not_written(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = tables._tabulate_whole

    def spoil(*arguments: Any) -> Any:
        table = exact(*arguments)
        assert table is not None
        table[3, 4, 0, 2] += 1e-3
        return table

    monkeypatch.setattr(tables, "_tabulate_whole", spoil)
    with pytest.raises(NotEquivalent):
        export.export(make_checkpoint(".abcd"), tmp_path / "net.onnx", tables="auto")
    assert not list(tmp_path.iterdir())


def test_numbers_are_rounded_once(tmp_path: Path) -> None:
    """An entry of a position's table is the float32 next to the sum in float64, where a sum in float32 is not."""
    given = build()
    model, kind = tabulate(given.model, given.input)
    first = next(model.children())
    assert kind == "positions"
    assert isinstance(first, Positions)
    embedding, _, linear = given.model[:3]
    exact = embedding.weight.double() @ linear.weight.double()[:, 24:48].T
    assert torch.equal(first.table[1], exact.float())
    assert not torch.equal(first.table[1], embedding.weight @ linear.weight[:, 24:48].T)


# ---------------------------------------------------------------- where one is made


@pytest.mark.parametrize(
    ("sizes", "pays"),
    [
        ((3, 27, 10, 200), False),  # the lecture's net: 6,000 multiplications are less than two nodes
        ((8, 27, 10, 200), False),
        ((3, 27, 64, 200), True),
        ((16, 27, 24, 64), True),
        ((8, 1000, 64, 512), True),
        ((8, 1000, 16, 200), False),  # 6 MB, beyond the cache; of 27 characters it would pay
        ((8, 27, 16, 200), True),
        ((16, 1000, 10, 200), False),  # 13 MB of tables: 3,200 numbers that are waited for
        ((16, 1000, 64, 512), False),  # 33 MB: it would be fast, and the file too large
    ],
)
def test_positions_pay_for_the_multiplications_they_save(sizes: tuple[int, ...], pays: bool) -> None:
    assert positions_pay(*sizes) is pays


def test_saving_more_multiplications_never_makes_a_table_pay_less() -> None:
    for features in (64, 200, 1024):
        paying = [positions_pay(8, 27, width, features) for width in range(1, 200)]
        assert paying == sorted(paying)


def test_a_whole_table_is_as_large_as_a_file_may_be_and_no_larger() -> None:
    assert whole_pays(27**3, 27)
    assert whole_pays(2**12, 2**10)
    assert not whole_pays(2**12, 2**10 + 1)
    assert not whole_pays(2**12, 2**10, itemsize=8)
    assert not whole_pays(1_000_001, 1)  # more than the proof lists
    assert not whole_pays(None, 1)


@pytest.mark.parametrize(
    "given",
    [
        Checkpoint(nn.Sequential(nn.Linear(4, 2)).eval(), InputDomain((4,))),
        Checkpoint(build().model, InputDomain((8,), "int32", 0, 27)),
        Checkpoint(build().model, InputDomain((8,), "int64", 1, 27)),
        Checkpoint(
            nn.Sequential(nn.Flatten(), *build().model[::2]).eval(), InputDomain((8, 1), "int64", 0, 27)
        ),
    ],
    ids=["no characters", "int32", "without character 0", "another shape"],
)
def test_inputs_of_another_kind_have_no_table(given: Checkpoint) -> None:
    assert tabulate(given.model, given.input) == (given.model, None)


def test_an_embedding_that_is_renormalised_has_no_table_of_positions() -> None:
    given = build()
    assert choose(given.model, given.input) == "positions"
    embedding: Any = given.model[0]
    embedding.max_norm = 1.0
    assert choose(given.model, given.input) is None


def test_the_command_makes_tables_when_it_is_told_to(ckpt: Path, capsys: Any) -> None:
    assert command.main([str(ckpt), "--no-timing"]) == 0
    assert "3 Gemm" in capsys.readouterr().out
    assert command.main([str(ckpt), "--no-timing", "--tables", "auto"]) == 0
    assert "nodes: GatherND" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(ckpt.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert len(json.loads(metadata["vocabulary"])) == 27
    with pytest.raises(SystemExit, match="2"):
        command.main([str(ckpt), "--tables", "always"])


def test_where_no_table_pays_the_file_is_the_same(tmp_path: Path) -> None:
    small = build(positions=8, width=4, features=20)
    save(tmp_path / "net.pt", small)
    export.export(tmp_path / "net.pt", tmp_path / "a.onnx")
    assert export.export(tmp_path / "net.pt", tmp_path / "b.onnx", tables="auto").tables is None
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
