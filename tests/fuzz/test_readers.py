"""Damaged files of every kind: one line and an exit code, no code run, nothing changed; see `readers`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.fuzz import mutants
from tests.fuzz.readers import TARGETS, damage, share, survive

FEW, MANY, SHARD = 400, 100_000, 500
SHARDS = [
    (target, range(start, min(start + SHARD, share(target, MANY).stop)))
    for target in TARGETS
    for start in range(FEW, share(target, MANY).stop, SHARD)
]


@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_ends_in_one_line_and_runs_nothing(target: str, tmp_path: Path) -> None:
    assert survive(target, share(target, FEW), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(("target", "seeds"), SHARDS, ids=lambda part: str(getattr(part, "start", part)))
def test_a_hundred_thousand_damaged_files_end_in_one_line(target: str, seeds: range, tmp_path: Path) -> None:
    assert survive(target, seeds, tmp_path) == []


def test_the_same_seed_damages_a_file_in_the_same_way_and_most_seeds_do_it_differently() -> None:
    for target in ("checkpoint", "safetensors", "onnx", "arrays", "names"):
        files = [damage(target, seed) for seed in range(20)]
        assert [damage(target, seed) for seed in range(20)] == files
        assert len({tuple(each.values()) for each in files}) > 15, target


def test_a_message_that_is_taken_apart_and_put_together_is_what_it_was() -> None:
    data = TARGETS["onnx"].sound()["in.onnx"]
    assert onnx.ModelProto.FromString(mutants.encode(mutants.decode(data))) == onnx.ModelProto.FromString(
        data
    )


@pytest.mark.parametrize("target", ["checkpoint", "onnx", "arrays", "safetensors"])
def test_many_mutants_get_past_the_container(target: str) -> None:
    """Otherwise the fuzzer would try the checksums of zip and little else."""
    assert sum(READS[target](damage(target, seed)) for seed in range(40)) >= 12


def _torch_reads(files: dict[str, bytes]) -> bool:
    return isinstance(torch.load(io.BytesIO(files["in.pt"]), weights_only=True), dict)


def _onnx_reads(files: dict[str, bytes]) -> bool:
    return bool(onnx.ModelProto.FromString(files["in.onnx"]).graph.node)


def _numpy_reads(files: dict[str, bytes]) -> bool:
    with np.load(io.BytesIO(files["in.npz"])) as archive:
        return all(archive[name] is not None for name in archive.files)


def _safetensors_reads(files: dict[str, bytes]) -> bool:
    size = int.from_bytes(files["in.safetensors"][:8], "little")
    return isinstance(json.loads(files["in.safetensors"][8 : 8 + size]), dict)


def _or_not(reads: Callable[[dict[str, bytes]], bool]) -> Callable[[dict[str, bytes]], bool]:
    def attempt(files: dict[str, bytes]) -> bool:
        try:
            return reads(files)
        except Exception:  # noqa: BLE001 readers of other people's, which fail in as many ways
            return False

    return attempt


READS = {
    "checkpoint": _or_not(_torch_reads),
    "onnx": _or_not(_onnx_reads),
    "arrays": _or_not(_numpy_reads),
    "safetensors": _or_not(_safetensors_reads),
}


# ---------------------------------------------------------------- the fuzzer itself

FAULTS = {
    "raises": "KeyError: 'shape'",
    "starts": "os.system",
    "starts and hides it": "os.system",
    "writes elsewhere": "open '../../elsewhere'",
    "writes beside": "it left in.txt.bak",
    "changes": "in.txt was changed",
    "empties": "the older output did not survive",
    "prints": "2 lines on stderr",
    "grows": "MemoryError",
    "dies": "Segmentation fault",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reader_with_a_fault_is_found_out(fault: str, tmp_path: Path) -> None:
    found = survive("names", range(3, 5), tmp_path / "in", ("tests.fuzz.faults", "in.txt", fault))
    for seed in (3, 4):
        assert any(f"names {seed}: " in line and FAULTS[fault] in line for line in found), found


def test_a_loader_that_unpickles_what_lies_in_a_program_is_found_out(tmp_path: Path) -> None:
    found = survive("program", range(60), tmp_path, ("tests.fuzz.faults", "in.pt2", "unpickles"))
    assert any("os.system" in line for line in found)
