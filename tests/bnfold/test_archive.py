"""bnfold.archive: what costs more than its file, or is something else, is refused before it is read."""

from __future__ import annotations

import io
import tarfile
import tempfile
import zipfile

import pytest
import torch

from bnfold.archive import DEEPEST, load_plain, name_stranger
from bnfold.errors import InputError
from bnfold.fold import main


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def with_pickle(pickled: bytes) -> bytes:
    """An archive of torch's with another pickle in it."""
    given, made = zipfile.ZipFile(io.BytesIO(saved({"w": torch.ones(7)}))), io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in given.namelist():
            archive.writestr(name, pickled if name.endswith("data.pkl") else given.read(name))
    return made.getvalue()


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def bomb() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {
            "a/data.pkl": bytes(10**7),
            "a/version": b"3",
            "a/byteorder": b"little",
        }.items():
            archive.writestr(name, content)
    return made.getvalue()


def test_what_torch_writes_is_read() -> None:
    value = {"w": torch.ones(2), "list": [1, (2.0, "x")], "flat": [[] for _ in range(1000)]}
    assert load_plain(saved(value))["list"] == [1, (2.0, "x")]


def test_a_member_that_unpacks_to_more_than_its_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="is compressed"):
        load_plain(bomb())


def test_a_tar_archive_is_refused_before_torch_makes_a_folder_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", None)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(InputError, match="it is a tar archive, as torch wrote them before 2017"):
        load_plain(made.getvalue())


def test_members_that_overlap_are_refused(tmp_path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(1000))
        archive.filelist *= 9
    with pytest.raises(InputError, match="more bytes than the file has"):
        load_plain(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused() -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a/data.pkl", b"1")
        archive.writestr("a/data.pkl", b"2")
    with pytest.raises(InputError, match="one name"):
        load_plain(made.getvalue())


@pytest.mark.parametrize("depth", [DEEPEST + 2, 200_000])
def test_containers_in_containers_end_somewhere(depth) -> None:
    with pytest.raises(InputError, match="nested more than"):
        load_plain(with_pickle(nested(depth)))


def test_a_container_in_itself_is_refused() -> None:
    with pytest.raises(InputError, match="nested more than"):
        load_plain(with_pickle(b"\x80\x02]q\x00h\x00a."))


def test_containers_that_share_what_they_hold_are_looked_at_once_a_level() -> None:
    doubled = b"".join(b"]q%c(h%ch%ce" % (k + 1, k, k) for k in range(60))
    assert len(load_plain(with_pickle(b"\x80\x02]q\x00" + doubled + b"."))) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git-LFS pointer"),
        (b"\x20\0\0\0TFL3" + bytes(40), "TensorFlow Lite"),
        (b"\x20\0\0\0ORTM" + bytes(40), r"\.ort"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"\x1f\x8b\x08" + bytes(40), "gzip"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, said, capsys) -> None:
    for name in ("m.onnx", "m.pt", "m.pt2", "m.ort", "m.tflite", "m.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=said):
            name_stranger(path)
        weights = ["--model", "tests.torch_architectures:ResNet", "--input", "1x3x16x16"]
        assert main([str(path), *(weights if name == "m.safetensors" else [])]) == 2
        message = capsys.readouterr().err
        assert len(message.splitlines()) == 1
        assert said.replace("\\", "") in message
