"""How files appear: in one step, all or none, through links and into devices, whatever fails and whoever is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bnfold.errors import InputError, NotEquivalent
from bnfold.output import OLD, replacing, together


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


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put(path: Path, text: str = "new") -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


# ---------------------------------------------------------------- several files


def test_what_is_written_together_appears_at_the_end_all_of_it(tmp_path: Path) -> None:
    with together():
        put(tmp_path / "a")
        put(tmp_path / "b")
        assert not list(tmp_path.glob("[ab]"))
    assert listing(tmp_path) == ["a", "b"]


def test_a_failure_of_the_last_file_leaves_every_older_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def write_both() -> None:
        with together():
            put(tmp_path / "a")
            put(tmp_path / "b")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_both()
    assert listing(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("number", range(4))
def test_a_rename_that_fails_puts_back_those_before_it(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("old")
    (tmp_path / "a.data").write_text("old")
    left, replace = [number], Path.replace

    def fail(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == -1:
            raise PermissionError(13, "no", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)

    def write_all() -> None:
        with together():
            with replacing(tmp_path / "a") as temporary:
                temporary.write_text("new")
                temporary.with_name("a.data").write_text("new")
                temporary.with_name("a.more").write_text("new")
            put(tmp_path / "b")

    with pytest.raises(PermissionError):
        write_all()
    assert listing(tmp_path) == ["a", "a.data", "b"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}


# ---------------------------------------------------------------- outputs that are no plain files


def test_a_device_stays_a_device_and_a_full_one_leaves_all_other_files(tmp_path: Path) -> None:
    put(Path(os.devnull))
    assert Path(os.devnull).is_char_device()
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")

    def write_both() -> None:
        with together():
            put(tmp_path / "model")
            put(Path("/dev/full"))

    with pytest.raises(InputError, match="/dev/full cannot be written to: No space left"):
        write_both()
    assert not listing(tmp_path)


def test_a_pipe_gets_the_content_and_one_that_nobody_reads_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="nobody reads this pipe"):
        put(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    put(pipe, "through the pipe")
    assert os.read(reader, 100) == b"through the pipe"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_socket_and_a_path_with_a_nul_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as there:
        there.bind("here")
        with pytest.raises(InputError, match="here is a socket"):
            put(Path("here"))
    with pytest.raises(InputError, match="NUL"):
        put(Path("a\0b"))


def test_an_open_file_is_written_to_where_it_stands_and_is_not_replaced(tmp_path: Path) -> None:
    code = "import pathlib, bnfold.output as o; print('before')\n"
    code += "with o.replacing('/dev/stdout') as t: t.write_text('content\\n')\nprint('after')"
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "before\ncontent\nafter\n"


def test_companions_of_a_device_are_refused_since_nobody_could_find_them() -> None:
    def write_two() -> None:
        with replacing(os.devnull) as temporary:
            temporary.write_text("model")
            temporary.with_name("data").write_text("data")

    with pytest.raises(InputError, match="external data would not be found"):
        write_two()
    assert not Path("/dev/data").exists()


def test_a_link_is_written_through_also_where_it_leads_nowhere_yet(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(Path("store") / "file")
    for text in ("first", "second"):
        put(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "store" / "file").read_text() == text
    (tmp_path / "broken").symlink_to(Path("nowhere") / "file")
    with pytest.raises(InputError, match="nowhere is no folder"):
        put(tmp_path / "broken")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((InputError, OSError)):
        put(tmp_path / "loop")


def test_companions_beside_a_link_to_another_folder_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "file").write_text("old")
    (tmp_path / "link").symlink_to(Path("store") / "file")

    def write_two() -> None:
        with replacing(tmp_path / "link") as temporary:
            temporary.write_text("model")
            temporary.with_name("data").write_text("data")

    with pytest.raises(InputError, match="external data would not be found"):
        write_two()
    assert listing(tmp_path / "store") == ["file"]
    assert (tmp_path / "link").read_text() == "old"


def test_a_companion_is_not_written_through_a_link_that_leaves_the_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "sub").symlink_to(tmp_path / "outside")

    def write_two() -> None:
        with replacing(tmp_path / "in" / "file") as temporary:
            temporary.write_text("model")
            temporary.with_name("sub").mkdir()
            (temporary.with_name("sub") / "data").write_text("data")

    with pytest.raises(InputError, match="leads out of the model's folder"):
        write_two()
    assert listing(tmp_path / "outside") == []
    assert listing(tmp_path / "in") == ["sub"]


def test_other_names_of_a_hard_link_keep_what_they_had(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    put(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "b").read_text() == "old"


# ---------------------------------------------------------------- permissions


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_replaced_file_keeps_its_mode_and_its_companions_get_it(mode: int, tmp_path: Path) -> None:
    put(tmp_path / "file")
    (tmp_path / "file").chmod(mode)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
        temporary.with_name("data").write_text("new")
    assert {path.stat().st_mode & 0o7777 for path in tmp_path.iterdir()} == {mode}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_new_file_follows_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        put(tmp_path / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o7777 == 0o666 & ~mask


def test_a_folder_that_takes_no_file_is_refused_in_one_line_that_names_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"file cannot be written: nothing can be added"):
        put(tmp_path / "file")
    monkeypatch.undo()

    def refuse(**_: Any) -> str:
        raise PermissionError(13, "Permission denied", ".bnfold-12345678")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(InputError, match=r"file cannot be written: Permission denied; write elsewhere"):
        put(tmp_path / "file")


# ---------------------------------------------------------------- left-overs


def leave(folder: Path, name: str, age: float) -> Path:
    """What a run that is killed leaves, of an age in seconds."""
    (folder / name / "new").mkdir(parents=True)
    (folder / name / "new" / "half").write_text("half")
    for path in (folder / name / "new" / "half", folder / name / "new", folder / name):
        os.utime(path, (time.time() - age,) * 2)
    return folder / name


def test_what_a_killed_run_left_is_removed_by_the_next_one_that_writes_there(tmp_path: Path) -> None:
    code = "import os, bnfold.output as o\nwith o.replacing('file') as t: t.write_text('x'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    (left,) = tmp_path.glob(".bnfold-*")
    put(tmp_path / "other")
    assert left.exists()
    shutil.rmtree(left)
    leave(tmp_path, left.name, 2 * OLD)
    put(tmp_path / "other")
    assert listing(tmp_path) == ["other"]


def test_what_is_held_young_or_not_ours_by_its_name_or_kind_stays(tmp_path: Path) -> None:
    held = leave(tmp_path, ".bnfold-heldheld", 2 * OLD)
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    leave(tmp_path, ".bnfold-youngone", OLD / 2)
    leave(tmp_path, ".bnfold-cache", 2 * OLD)
    (tmp_path / ".bnfold-linklink").symlink_to(leave(tmp_path, "precious", 2 * OLD))
    (tmp_path / ".bnfold-filefile").write_text("a file")
    before = listing(tmp_path)
    put(tmp_path / "new")
    assert listing(tmp_path) == sorted([*before, "new"])
    assert listing(tmp_path / "precious") == ["new"]
    os.close(descriptor)


def test_a_run_holds_its_folder_for_as_long_as_it_writes(tmp_path: Path) -> None:
    with replacing(tmp_path / "slow") as temporary:
        temporary.write_text("slow")
        for path in (temporary, temporary.parent, temporary.parents[1]):
            os.utime(path, (time.time() - 2 * OLD,) * 2)
        put(tmp_path / "quick")
    assert listing(tmp_path) == ["quick", "slow"]
