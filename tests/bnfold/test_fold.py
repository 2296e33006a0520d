"""The command `python -m bnfold.fold`: what it writes, says and refuses, and with which exit code."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from torch import nn

import bnfold
from bnfold import checkpoint
from bnfold.checkpoint import Checkpoint, InputDomain
from bnfold.fold import main

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
chain (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y)
{
    c = Conv (x, w)
    y = BatchNormalization (c, gamma, beta, mean, var)
}
"""


@pytest.fixture
def net() -> nn.Sequential:
    """The lecture's net, small, with statistics of its own inputs and gammas of both signs."""
    torch.manual_seed(0)
    layers = [nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Linear(16, 5, bias=False), nn.BatchNorm1d(5))
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.BatchNorm1d):
                layer.weight.copy_(torch.randn(layer.num_features))
                layer.bias.copy_(torch.randn(layer.num_features))
        for _ in range(50):
            net(torch.randint(5, (64, 3)))
    return net.eval()


@pytest.fixture
def ckpt(net: nn.Sequential, tmp_path: Path) -> Path:
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, Checkpoint(net, InputDomain((3,), "int64", 0, 5)))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    proto = parser.parse_model(CHAIN)
    arrays = {
        "w": random.normal(size=(4, 3, 3, 3)),
        "gamma": random.normal(size=4),
        "beta": random.normal(size=4),
    }
    arrays |= {"mean": random.normal(size=4), "var": random.uniform(0.5, 2, 4)}
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return path


def test_new_weights_are_those_of_a_hand_calculation_and_the_batchnorms_are_gone(net, ckpt):
    assert main([str(ckpt)]) == 0
    folded = checkpoint.load(ckpt.with_name("ckpt.folded.pt"))
    assert [type(layer).__name__ for layer in folded.model] == [
        "Embedding",
        "Flatten",
        "Linear",
        "Tanh",
        "Linear",
    ]
    norm, state = net[6], folded.model.state_dict()
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    w2 = scale[:, None] * net[5].weight.double()
    b2 = norm.bias.double() - scale * norm.running_mean.double()
    assert torch.equal(state["5.weight"], w2.float())
    assert torch.equal(state["5.bias"], b2.float())


def test_every_input_is_tried_and_the_output_says_so(ckpt, capsys):
    assert main([str(ckpt)]) == 0
    said = capsys.readouterr().out
    assert said.count("all 125") == 2
    assert "float64" in said
    assert "float32" in said
    assert "2 of 2 BatchNorms folded, verified" in said
    assert "next: python -m export" in said


def test_the_folded_checkpoint_knows_its_source_and_folds_again_into_itself(ckpt):
    assert main([str(ckpt)]) == 0
    folded = ckpt.with_name("ckpt.folded.pt")
    once = checkpoint.load(folded)
    assert [verdict["outcome"] for verdict in once.folded["verdicts"]] == ["folded", "folded"]
    assert main([str(folded)]) == 0
    again = checkpoint.load(ckpt.with_name("ckpt.folded.folded.pt"))
    assert all(
        torch.equal(a, b) for a, b in zip(once.model.parameters(), again.model.parameters(), strict=True)
    )


def test_a_batchnorm_of_which_only_the_scale_could_go_stays_whole_in_a_checkpoint(tmp_path, capsys):
    path = tmp_path / "padded.pt"
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 3, 3, padding=1)).eval()
    net[0].running_mean.fill_(1.0)
    checkpoint.save(path, Checkpoint(net, InputDomain((3, 8), "float32")))
    assert main([str(path)]) == 0
    assert "1 kept" in capsys.readouterr().out
    folded = checkpoint.load(tmp_path / "padded.folded.pt").model
    assert [type(layer) for layer in folded] == [nn.BatchNorm1d, nn.Conv1d]
    assert main([str(path), "--lower"]) == 2


def test_a_dry_run_reports_and_writes_no_model(ckpt, capsys):
    record = ckpt.with_name("report.json")
    assert main([str(ckpt), "--dry-run", "--json", str(record)]) == 0
    assert "nothing written" in capsys.readouterr().out
    assert not ckpt.with_name("ckpt.folded.pt").exists()
    assert json.loads(record.read_text())["counts"] == {"folded": 2, "scale folded": 0, "kept": 0}


def test_a_fold_that_is_not_equivalent_ends_with_1_and_leaves_an_existing_output(ckpt, monkeypatch, capsys):
    output = ckpt.with_name("ckpt.folded.pt")
    output.write_bytes(b"precious")

    def corrupt(model, inputs, **options):
        folded, report = bnfold.fold(model, inputs, verify=False)
        with torch.no_grad():
            folded[2].weight[0, 0] += 1e-3
        bnfold.verify(model, folded, inputs)
        return folded, report

    monkeypatch.setattr(sys.modules["bnfold.fold"], "fold", corrupt)
    assert main([str(ckpt)]) == 1
    assert "differ" in capsys.readouterr().err
    assert output.read_bytes() == b"precious"
    assert not list(ckpt.parent.glob(".bnfold-*"))


def test_an_onnx_file_is_folded_and_keeps_its_names(model, capsys):
    assert main([str(model), "-o", str(model.with_name("out.onnx"))]) == 0
    folded = onnx.load(model.with_name("out.onnx"))
    assert [node.op_type for node in folded.graph.node] == ["Conv"]
    assert [value.name for value in folded.graph.output] == ["y"]
    assert "1 of 1 BatchNorm folded, verified" in capsys.readouterr().out


def test_verify_passes_a_folded_file_and_catches_one_weight(model):
    before = onnx.load(model)
    folded, _ = bnfold.fold(before)
    assert [item.question for item in bnfold.verify(before, folded)] == ["float64", "float32"]
    weight = folded.graph.initializer[0]
    array = onnx.numpy_helper.to_array(weight).copy()
    array.flat[0] += 1e-3
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    with pytest.raises(bnfold.NotEquivalent, match="differ in float64"):
        bnfold.verify(before, folded)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.pt", None, "no such file"),
        ("empty.pt", b"", ""),
        ("empty.onnx", b"", ""),
        ("text.onnx", b"not a model at all, but a line of text", ""),
        ("truncated.onnx", "model", ""),
        ("truncated.pt", "ckpt", ""),
        ("pickle.pt", b"\x80\x02cos\nsystem\nq\x00X\x02\x00\x00\x00lsq\x01\x85q\x02Rq\x03.", ""),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(name, content, says, model, ckpt, tmp_path, capsys):
    path = tmp_path / name
    if isinstance(content, str):
        whole = (model if content == "model" else ckpt).read_bytes()
        content = whole[: len(whole) // 2]
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said
    assert not path.with_name(f"{path.stem}.folded{path.suffix}").exists()


def test_a_folder_and_a_target_without_one_are_refused(ckpt, tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err
    assert main([str(ckpt), "-o", str(tmp_path / "nowhere" / "out.pt")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_an_onnx_file_imports_no_torch(model):
    code = (
        "import sys; from bnfold.fold import main; code = main([sys.argv[1]]); "
        "sys.exit(code or 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_report_that_cannot_be_written_is_refused_before_anything_is(model, tmp_path, capsys):
    before = model.read_bytes()
    for report in (tmp_path, tmp_path / "none" / "r.json", model, model.with_name("model.folded.onnx")):
        assert main([str(model), "--json", str(report)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert model.read_bytes() == before
    assert not model.with_name("model.folded.onnx").exists()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("model", ["--model", "a:b"]),
        ("model", ["--input", "1x3"]),
        ("ckpt", ["--inputs", "x.npz"]),
        ("ckpt", ["--duplicate"]),
        ("ckpt", ["--freeze-initializers"]),
        ("ckpt", ["--input", "1x3"]),
        *(
            (kind, [option, "x"])
            for kind in ("model", "ckpt")
            for option in ("--key", "--prefix", "--model-args")
        ),
    ],
)
def test_an_option_that_would_not_be_heeded_is_refused(name, option, model, ckpt, capsys):
    assert main([str({"model": model, "ckpt": ckpt}[name]), *option]) == 2
    assert f"{option[0]} is not for this kind of file" in capsys.readouterr().err


# ---------------------------------------------------------------- what is written, and to where


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("name", ["model", "ckpt"])
def test_no_model_is_written_where_its_report_cannot_be(name, model, ckpt, capsys):
    path = {"model": model, "ckpt": ckpt}[name]
    assert main([str(path), "--json", "/dev/full"]) == 2
    assert "/dev/full cannot be written to: No space left" in capsys.readouterr().err
    assert not list(path.parent.glob("*.folded.*"))


@pytest.mark.parametrize("name", ["model", "ckpt"])
def test_a_page_is_written_beside_the_model_and_named_after_it(name, model, ckpt, capsys):
    path = {"model": model, "ckpt": ckpt}[name]
    page = path.with_name("report.html")
    page.write_text("old")
    assert main([str(path), "--html", str(page), "--json", str(page.with_suffix(".json"))]) == 0
    html = page.read_text(encoding="utf-8")
    assert f"<h1>{path.name}</h1>" in html
    assert capsys.readouterr().out.splitlines()[0] in html
    for verdict in json.loads(page.with_suffix(".json").read_text())["verdicts"]:
        assert f"<code>{verdict['name']}</code>" in html
    assert not list(path.parent.glob(".bnfold-*"))


def test_a_page_that_cannot_be_written_is_refused_before_anything_is(model, tmp_path, capsys):
    before, folded, record = model.read_bytes(), model.with_name("model.folded.onnx"), tmp_path / "r.json"
    for page in (tmp_path, tmp_path / "none" / "r.html", model, folded, record, "-"):
        assert main([str(model), "--json", str(record), "--html", str(page)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert model.read_bytes() == before
    assert not folded.exists()
    assert not record.exists()
    assert main([str(model), "--dry-run", "--html", str(folded)]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_no_model_is_written_where_its_page_cannot_be(model, capsys):
    assert main([str(model), "--html", "/dev/full"]) == 2
    assert "/dev/full cannot be written to" in capsys.readouterr().err
    assert not list(model.parent.glob("*.folded.*"))


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A checkpoint of 40 linear layers and as many BatchNorms, of which every second one stays."""
    layers = []
    for _ in range(20):
        layers += [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4), nn.Tanh()]
    path = tmp_path / "deep.pt"
    checkpoint.save(path, Checkpoint(nn.Sequential(*layers).eval(), InputDomain((4,), "float32")))
    return path


def test_what_is_printed_fits_a_screen_and_in_full_names_every_batchnorm(deep, capsys):
    assert main([str(deep), "--no-verify"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 25
    assert "20 kept: " in said
    assert "in full: --verbose, --html FILE, --json FILE" in said
    assert "and 28 more" in said, "of the tensors that are new"
    assert main([str(deep), "--no-verify", "--verbose", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{i}: folded into {i - 1}" in said for i in range(1, 100, 5))
    assert all(f"\n{i}: kept; " in said for i in range(3, 100, 5))
    assert "in full" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals here")
@pytest.mark.parametrize("width", [60, 132])
def test_a_report_is_as_wide_as_the_terminal(deep, width):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    command = [sys.executable, "-m", "bnfold.fold", deep, "--dry-run", "--no-verify"]
    variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    subprocess.run(command, stdin=theirs, stdout=theirs, env={**variables, "TERM": "xterm"}, check=True)
    os.close(theirs)
    said = b""
    with suppress(OSError):  # what Linux says at the end
        while piece := os.read(ours, 4096):
            said += piece
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said.decode())
    widest = max(map(len, plain.splitlines()))
    assert width - 15 < widest <= width


def test_a_report_for_stdout_is_all_there_is_on_stdout(model, capsys):
    assert main([str(model), "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["counts"]["folded"] == 1
    assert "1 of 1 BatchNorm folded, verified" in said.err
    assert model.with_name("model.folded.onnx").exists()


def test_a_device_takes_the_model_and_stays_a_device(model, ckpt):
    for path in (model, ckpt):
        assert main([str(path), "-o", "/dev/null", "--json", "/dev/null"]) == 0
        assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("arguments", [["."], [""], ["model.onnx", "-o", ""], ["model.onnx", "-o", "."]])
def test_a_folder_where_a_file_should_be_is_one_line(arguments, model, monkeypatch, capsys):
    monkeypatch.chdir(model.parent)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "folder" in said


@pytest.mark.parametrize("arguments", [["a\0b"], ["model.onnx", "-o", "a\0b"], ["model.onnx", "-o", "-"]])
def test_a_path_that_is_none_is_one_line(arguments, model, monkeypatch, capsys):
    monkeypatch.chdir(model.parent)
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_whose_name_is_no_text_is_folded_or_refused_and_both_in_words(model, tmp_path):
    """onnxruntime opens no such file, so it can only be folded unverified."""
    path = tmp_path / os.fsdecode(b"caf\xe9.onnx")
    model.rename(path)
    command = [sys.executable, "-m", "bnfold.fold", path]
    refused = subprocess.run(command, capture_output=True, check=False)
    assert (refused.returncode, refused.stderr.count(b"\n")) == (2, 1)
    folded = subprocess.run([*command, "--no-verify"], capture_output=True, check=False)
    assert (folded.returncode, folded.stderr) == (0, b"")
    assert (tmp_path / os.fsdecode(b"caf\xe9.folded.onnx")).exists()


def test_a_reader_that_went_away_leaves_a_whole_file_and_141(model):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "bnfold.fold", model]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
    onnx.checker.check_model(model.with_name("model.folded.onnx"))
