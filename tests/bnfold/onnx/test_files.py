"""Files: external data, atomic writing, what a stranger's file may hold, and the command."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import pytest

import bnfold
import bnfold.onnx
from bnfold.errors import BnfoldError, InputError, NotEquivalent
from bnfold.onnx.copies import copy_without
from bnfold.onnx.edit import Store
from bnfold.onnx.write import fits
from bnfold.travel import Options, travel
from tests.onnx_models import count, model, norm, run, weights, write

TEXT = """g (float[N, 3, 6, 6] x) => (float[N, 8, 4, 4] y) {
    h = Conv(x, w, c) y = BatchNormalization(h, s, b, m, v) }"""


def net(**more):
    return model(TEXT, {"w": weights(8, 3, 3, 3), "c": weights(8), **norm(8), **more})


def save_external(path, some=None, **options):
    options = {"size_threshold": 0, "location": path.name + ".data"} | options
    onnx.save_model(some or net(), path, save_as_external_data=True, **options)
    return path


def listing(folder):
    """The names in a folder, the hash of a file of external data as `#`."""
    return sorted(re.sub(r"-[0-9a-f]{16}\b", "-#", path.name) for path in folder.iterdir())


def find_data(folder, pattern="out.onnx-*.data"):
    (path,) = folder.glob(pattern)
    return path


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same(source, target):
    feed = {"x": weights(2, 3, 6, 6)}
    before, after = (onnx.load(path) for path in (source, target))
    np.testing.assert_allclose(run(after, feed)["y"], run(before, feed)["y"], atol=2e-5)


def test_a_file_becomes_a_file(tmp_path):
    source = write(tmp_path / "net.onnx", net())
    report = bnfold.fold_file(source, tmp_path / "out.onnx")
    assert report.verified
    assert_same(source, tmp_path / "out.onnx")
    assert listing(tmp_path) == ["net.onnx", "out.onnx"]


def test_no_target_writes_nothing(tmp_path):
    source = write(tmp_path / "net.onnx", net())
    assert bnfold.onnx.fold_file(source, None).count("folded") == 1
    assert listing(tmp_path) == ["net.onnx"]


def test_a_file_may_be_folded_in_place(tmp_path):
    source = save_external(tmp_path / "net.onnx")
    copy = onnx.load(source)
    bnfold.fold_file(source, source)
    assert listing(tmp_path) == ["net.onnx", "net.onnx-#.data"]
    feed = {"x": weights(2, 3, 6, 6)}
    np.testing.assert_allclose(run(onnx.load(source), feed)["y"], run(copy, feed)["y"], atol=2e-5)


def test_external_data_stays_external_and_is_named_after_the_new_model(tmp_path):
    source = save_external(tmp_path / "net.onnx")
    before = contents(tmp_path)
    bnfold.fold_file(source, tmp_path / "out.onnx")
    after = contents(tmp_path)
    data = find_data(tmp_path)
    assert set(after) - set(before) == {Path("out.onnx"), Path(data.name)}
    assert data.name == f"out.onnx-{sha256(data.read_bytes()).hexdigest()[:16]}.data"
    assert {path: after[path] for path in before} == before
    folded = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in folded.graph.initializer)
    assert_same(source, tmp_path / "out.onnx")
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)


def test_one_file_per_tensor_stays_so(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "to").mkdir()
    source = save_external(tmp_path / "in" / "net.onnx", all_tensors_to_one_file=False, location=None)
    bnfold.fold_file(source, tmp_path / "to" / "net.onnx")
    assert listing(tmp_path / "to") == ["c-#", "net.onnx", "w-#"]
    assert_same(source, tmp_path / "to" / "net.onnx")


def test_data_in_a_folder_of_its_own(tmp_path):
    (tmp_path / "weights").mkdir()
    source = save_external(tmp_path / "net.onnx", location="weights/all.bin")
    bnfold.fold_file(source, tmp_path / "out.onnx")
    assert listing(tmp_path / "weights") == ["all.bin", "out.all-#.bin"]
    assert_same(source, tmp_path / "out.onnx")


def test_only_what_was_external_is_external(tmp_path):
    source = save_external(tmp_path / "net.onnx", size_threshold=100)
    bnfold.fold_file(source, tmp_path / "out.onnx")
    folded = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert [t.name for t in folded.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL] == [
        "w.folded"
    ]


def test_untouched_data_is_copied_bit_for_bit(tmp_path):
    text = TEXT.replace("}", "z = Conv(x, u) }").replace("4] y)", "4] y, float[N, 4, 4, 4] z)")
    some = model(text, {"w": weights(8, 3, 3, 3), "c": weights(8), "u": weights(4, 3, 3, 3), **norm(8)})
    source = save_external(tmp_path / "net.onnx", some)
    bnfold.fold_file(source, tmp_path / "out.onnx")
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    np.testing.assert_array_equal(kept["u"], weights(4, 3, 3, 3))


def test_new_numbers_that_belong_into_other_files_are_not_in_the_model_until_they_are_written(tmp_path):
    save_external(tmp_path / "net.onnx")
    source = bnfold.onnx.files.load_file(tmp_path / "net.onnx")
    imported = bnfold.onnx.read(source, tmp_path)
    edits = bnfold.onnx.write(imported, travel(imported.graph, Options(), fits(imported)).graph)
    new = {edit.name for edit in edits if isinstance(edit, Store) and edit.location}
    late = bnfold.onnx.apply(edits, copy_without(source, ()), late=new)
    assert new
    for tensor in late.graph.initializer:
        if tensor.name in new:
            assert not tensor.raw_data
    whole, _ = bnfold.onnx.fold(source, folder=tmp_path)
    bnfold.onnx.fold_file(tmp_path / "net.onnx", tmp_path / "out.onnx")
    written = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer
    }
    for tensor in whole.graph.initializer:
        if tensor.name in new:
            np.testing.assert_array_equal(written[tensor.name], onnx.numpy_helper.to_array(tensor))


def test_a_model_in_memory_may_refer_to_data_in_a_folder(tmp_path):
    source = save_external(tmp_path / "net.onnx")
    bare = onnx.load(source, load_external_data=False)
    with pytest.raises(InputError, match="folder"):
        bnfold.onnx.fold(bare)
    folded, report = bnfold.onnx.fold(bare, folder=tmp_path)
    assert report.verified
    feed = {"x": weights(2, 3, 6, 6)}
    np.testing.assert_allclose(run(folded, feed)["y"], run(onnx.load(source), feed)["y"], atol=2e-5)


def test_an_onnx_ir_model_comes_back_as_one(tmp_path):
    import onnx_ir

    source = save_external(tmp_path / "net.onnx")
    some = onnx_ir.load(source)
    some.metadata_props["k"] = "v"
    folded, report = bnfold.fold(some)
    assert isinstance(folded, onnx_ir.Model)
    assert report.verified
    assert folded.metadata_props["k"] == "v"
    onnx_ir.save(folded, tmp_path / "out.onnx")
    assert_same(source, tmp_path / "out.onnx")


# ---------------------------------------------------------------- two files, one step

KILLER = """
import os, shutil, sys
from pathlib import Path
import bnfold.onnx

EVENTS = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "shutil.rmtree"}
count = 0

def watch(event, arguments):
    global count
    count += event in EVENTS or (event == "open" and bool(arguments[2] & os.O_ACCMODE))
    if count > last:
        os._exit(9)

folder, source, target = Path(sys.argv[1]), *sys.argv[2:]
for last in range(1000):
    case = shutil.copytree(folder / "before", folder / f"killed{last}")
    if not os.fork():
        sys.addaudithook(watch)
        bnfold.onnx.fold_file(case / source, case / target, verify=False)
        os._exit(0)
    if not os.waitstatus_to_exitcode(os.wait()[1]):
        break
"""


def other_net():
    return model(TEXT, {"w": -weights(8, 3, 3, 3), "c": weights(8), **norm(8)})


def replace_by_another(folder, **options):
    """A folded model at the target, and another one to fold over it."""
    save_external(folder / "net.onnx", other_net(), **options)
    bnfold.fold_file(folder / "net.onnx", folder / "out.onnx")
    for path in folder.glob("net.onnx*"):
        path.unlink()
    save_external(folder / "net.onnx", **options)
    return "net.onnx", "out.onnx"


def fold_in_place(folder, **options):
    save_external(folder / "net.onnx", **options)
    return "net.onnx", "net.onnx"


def replace_what_another_tool_wrote(folder, **options):
    save_external(folder / "out.onnx", other_net(), **options)
    save_external(folder / "net.onnx", **options)
    return "net.onnx", "out.onnx"


ONE_EACH = {"all_tensors_to_one_file": False, "location": None}


@pytest.mark.parametrize(
    ("prepare", "options"),
    [
        (replace_by_another, {}),
        (replace_by_another, {"location": "weights/net.bin"}),
        pytest.param(replace_by_another, ONE_EACH, marks=pytest.mark.slow),
        pytest.param(fold_in_place, {}, marks=pytest.mark.slow),
        (fold_in_place, ONE_EACH),
        (replace_what_another_tool_wrote, {}),
    ],
)
def test_killed_at_any_moment_the_old_model_stands_there_with_its_data_or_the_new_one(
    prepare, options, tmp_path
):
    """Before each call that changes a file system the process is killed."""
    before = tmp_path / "before"
    (before / "weights").mkdir(parents=True)
    source, target = prepare(before, **options)
    subprocess.run(
        [sys.executable, "-c", KILLER, tmp_path, source, target], check=True, cwd=Path(__file__).parents[3]
    )
    killed = [tmp_path / f"killed{number}" for number in range(len(list(tmp_path.glob("killed*"))))]
    old, new = (contents_of_model(folder / target) for folder in (before, killed[-1]))
    seen = [contents_of_model(folder / target) for folder in killed]
    assert old != new
    assert seen == sorted(seen, key=lambda found: found == new)
    assert {found == old for found in seen if found != new} == {True}
    assert len(killed) > 8


def contents_of_model(path):
    """The nodes of a model, and the numbers of its tensors with all that it refers to."""
    loaded = onnx.load(path)
    return [n.op_type for n in loaded.graph.node], {t.name: t.raw_data for t in loaded.graph.initializer}


def test_the_data_of_a_replaced_model_is_removed_and_so_is_what_a_killed_run_left(tmp_path):
    replace_by_another(tmp_path)
    old = find_data(tmp_path)
    left = tmp_path / "out.onnx-0123456789abcdef.data"
    left.write_bytes(b"of a run that was killed before its model appeared")
    bnfold.fold_file(tmp_path / "net.onnx", tmp_path / "out.onnx")
    assert not old.exists()
    assert listing(tmp_path) == ["net.onnx", "net.onnx.data", "out.onnx", "out.onnx-#.data"]
    assert_same(tmp_path / "net.onnx", tmp_path / "out.onnx")


def test_data_that_a_copy_of_the_replaced_model_refers_to_stays(tmp_path):
    source = save_external(tmp_path / "net.onnx")
    shutil.copy(source, tmp_path / "backup.onnx")
    bnfold.fold_file(source, source)
    assert listing(tmp_path) == ["backup.onnx", "net.onnx", "net.onnx-#.data", "net.onnx.data"]
    assert_same(tmp_path / "backup.onnx", source)


@pytest.mark.parametrize("beside", ["broken.onnx", "link"])
def test_data_stays_where_a_model_beside_it_cannot_be_read_or_it_is_a_link(beside, tmp_path):
    source = save_external(tmp_path / "net.onnx")
    if beside == "link":
        (tmp_path / "net.onnx.data").rename(tmp_path / "elsewhere")
        (tmp_path / "net.onnx.data").symlink_to("elsewhere")
    else:
        (tmp_path / beside).write_bytes(b"\xff no model")
    bnfold.fold_file(source, source)
    assert (tmp_path / "net.onnx.data").exists()


def test_data_that_does_not_bear_the_name_of_the_replaced_model_stays(tmp_path):
    """Two files of one name and other suffixes, or a file that several models share, are nobody's own."""
    source = save_external(tmp_path / "net.onnx", location="shared.data")
    bnfold.fold_file(source, source)
    assert listing(tmp_path) == ["net.onnx", "shared-#.data", "shared.data"]
    bnfold.fold_file(source, source)
    assert listing(tmp_path) == ["net.onnx", "shared-#.data", "shared.data"]


def test_the_source_keeps_its_data_when_it_is_folded_over_a_copy_of_itself(tmp_path):
    source = save_external(tmp_path / "model")
    shutil.copy(source, tmp_path / "model.onnx")
    before = contents_of_model(source)
    bnfold.fold_file(source, tmp_path / "model.onnx")
    assert contents_of_model(source) == before


def test_data_whose_location_goes_up_and_down_again_is_written_beside_the_target_only(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "to").mkdir()
    source = save_external(tmp_path / "in" / "net.onnx")
    escape(source, "../in/net.onnx.data")
    before = contents(tmp_path)
    bnfold.fold_file(source, tmp_path / "to" / "out.onnx", verify=False)
    assert {path: data for path, data in contents(tmp_path).items() if path.parts[0] != "to"} == before
    assert contents_of_model(tmp_path / "to" / "out.onnx")


def test_the_same_fold_writes_the_same_bytes_under_the_same_names(tmp_path):
    source = save_external(tmp_path / "net.onnx")
    bnfold.fold_file(source, tmp_path / "out.onnx")
    first = contents(tmp_path)
    bnfold.fold_file(source, tmp_path / "out.onnx")
    assert contents(tmp_path) == first


# ---------------------------------------------------------------- bad files


def escape(path, location):
    loaded = onnx.load(path, load_external_data=False)
    for entry in loaded.graph.initializer[0].external_data:
        entry.value = location if entry.key == "location" else entry.value
    path.write_bytes(loaded.SerializeToString())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-200]), "no ONNX model"),
        (lambda p: p.write_bytes(b"hello, this is no protobuf at all\xff\xff"), "no ONNX model"),
        (lambda p: p.write_bytes(b""), "no ONNX model"),
        (lambda p: p.unlink(), "no such file"),
        (lambda p: (p.unlink(), p.mkdir()), "folder"),
        (lambda p: p.with_name("net.onnx.data").unlink(), "missing"),
        (lambda p: p.with_name("net.onnx.data").write_bytes(b"short"), "shorter"),
        (lambda p: escape(p, "../outside.bin"), "outside"),
        (lambda p: escape(p, "/etc/hostname"), "outside"),
        (lambda p: escape(p, "sub/../../outside.bin"), "outside"),
        (lambda p: (p.with_name("link").symlink_to("/etc/hostname"), escape(p, "link")), "outside"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_bad_file_is_one_line_and_nothing_is_written(tmp_path, spoil, message, verify):
    (tmp_path / "in").mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(10000))
    source = save_external(tmp_path / "in" / "net.onnx")
    spoil(source)
    target = tmp_path / "out.onnx"
    target.write_bytes(b"what was there")
    with pytest.raises(InputError, match=message):
        bnfold.fold_file(source, target, verify=verify)
    assert target.read_bytes() == b"what was there"
    assert listing(tmp_path) == ["in", "out.onnx", "outside.bin"]


def test_a_model_that_is_not_equivalent_is_not_written(tmp_path, monkeypatch):
    from bnfold import equivalence

    def refuse(*_, **__):
        raise NotEquivalent("made up")

    monkeypatch.setattr(equivalence, "judge", refuse)
    source, target = save_external(tmp_path / "net.onnx"), tmp_path / "out.onnx"
    bnfold.fold_file(source, target, verify=False)
    before = contents(tmp_path)
    with pytest.raises(NotEquivalent):
        bnfold.fold_file(source, target)
    assert contents(tmp_path) == before


def test_a_failed_move_puts_everything_back(tmp_path, monkeypatch):
    source, target = save_external(tmp_path / "net.onnx"), tmp_path / "out.onnx"
    bnfold.fold_file(source, target)
    find_data(tmp_path).write_bytes(b"older data")
    before = contents(tmp_path)
    replace = Path.replace

    def fail(self, to):
        if Path(to) == target:
            raise PermissionError(13, "no", str(to))
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(PermissionError):
        bnfold.fold_file(source, target)
    assert contents(tmp_path) == before


def test_a_damaged_file_is_refused_or_folded_and_never_a_crash(tmp_path):
    """One to three bytes of the description are changed, dropped or added, in 150 ways."""
    whole, draw = net().SerializeToString(), np.random.default_rng(4)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in draw.integers(0, 200, draw.integers(1, 4)):
            how = draw.integers(3)
            data[place : place + (how != 1)] = bytes([draw.integers(256)]) if how else b""
        (tmp_path / "net.onnx").write_bytes(data)
        try:
            bnfold.fold_file(tmp_path / "net.onnx", tmp_path / "out.onnx", verify=False)
        except BnfoldError:
            refused += 1
    assert 50 < refused < 150


@pytest.mark.parametrize("inputs", [{"z": np.zeros(3)}, {}, [], 3, "nowhere.npz"])
def test_wrong_inputs_are_refused(inputs):
    with pytest.raises(InputError):
        bnfold.onnx.fold(net(), inputs)


def test_inputs_from_a_file(tmp_path):
    np.savez(tmp_path / "in.npz", x=weights(5, 3, 6, 6))
    _, report = bnfold.onnx.fold(net(), tmp_path / "in.npz")
    assert report.evidence[0].inputs == 5


def test_inputs_as_python_2_wrote_them_are_read_without_a_warning(tmp_path):
    array, content = weights(5, 3, 6, 6), io.BytesIO()
    np.save(content, array)
    named = content.getvalue().replace(b"(5, 3, 6, 6), }  ", b"(5L, 3, 6L, 6), }")
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:
        archive.writestr("x.npy", named)
    with pytest.warns(UserWarning, match="Python 2"), np.load(tmp_path / "in.npz") as given:
        np.testing.assert_array_equal(given["x"], array)
    _, report = bnfold.onnx.fold(net(), tmp_path / "in.npz")
    assert report.evidence[0].inputs == 5


def test_torch_is_never_imported(tmp_path):
    source = write(tmp_path / "net.onnx", net())
    code = f"""
import sys, bnfold.onnx
report = bnfold.onnx.fold_file({str(source)!r}, {str(tmp_path / "out.onnx")!r})
assert report.verified and "torch" not in sys.modules and "onnx_ir" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[3])
    assert count(onnx.load(tmp_path / "out.onnx")) == 0


@pytest.mark.slow
def test_a_model_over_two_gibibytes_is_never_in_memory_twice(tmp_path):
    """One embedding of 2.2 GB that nothing touches, and a small fold beside it."""
    rows = 550_000
    text = """g (int64[N] i, float[N, 3] x) => (float[N, 5] y, float[N, 1000] z) {
        z = Gather(table, i) h = Gemm(x, w) y = BatchNormalization(h, s, b, m, v) }"""
    some = model(text, {"w": weights(3, 5), **norm(5)})
    table = some.graph.initializer.add(name="table", data_type=1, dims=[rows, 1000])
    table.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "net.data"), ("offset", "0"), ("length", str(rows * 4000))):
        table.external_data.add(key=key, value=value)
    with (tmp_path / "net.data").open("wb") as file:
        file.truncate(rows * 4000)
    source = write(tmp_path / "net.onnx", some)
    code = f"""
import resource, bnfold.onnx
report = bnfold.onnx.fold_file({str(source)!r}, {str(tmp_path / "out.onnx")!r}, verify=False)
assert report.count("folded") == 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert find_data(tmp_path, "out-*.data").stat().st_size >= rows * 4000
    assert int(done.stdout) < 3000
