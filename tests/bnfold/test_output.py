"""How files appear: in one step, all or none, through links and into devices, whatever fails and whoever is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bnfold.errors import InputError, NotEquivalent
from bnfold.output import replacing, together


def test_a_file_appears_in_one_step_under_its_own_name(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with replacing(target) as temporary:
        assert temporary.name == "model.onnx"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert [*tmp_path.iterdir()] == [target]


@pytest.mark.parametrize("error", [NotEquivalent, OSError, KeyboardInterrupt, ZeroDivisionError])
def test_an_existing_file_survives_every_failure_and_nothing_is_left_beside_it(
    tmp_path: Path, error: Any
) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")

    def write_half() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert target.read_text() == "old"
    assert [*tmp_path.iterdir()] == [target]


def test_a_writer_that_wrote_nothing_fails_and_the_old_file_survives(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert target.read_text() == "old"


def test_a_folder_and_a_missing_folder_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; name a file to write"), replacing(tmp_path):
        pass
    with (
        pytest.raises(InputError, match="is no folder; make it first"),
        replacing(tmp_path / "no" / "model.onnx"),
    ):
        pass
