"""No byte of any file is executed: a payload per reader, and per place of an archive where code could stand.

Each payload would make a folder of a given name. That it is live is shown where it can be: a plain `pickle.loads`, or
torch's own loader, makes the folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bnfold import InputError, checkpoint
from bnfold.fold import main
from bnfold.torch.archive import load_program
from bnfold.torch.program import fold_program_file
from data.names import read_names

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

IMAGES = torch.randn(2, 3, 8, 8)
FACTORY = "tests.torch_architectures:ResNet"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The members of an exported program with dynamic sizes, a constant and a keyword argument, by name."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.table = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.ones(3)

        def forward(self, x, *, scale):
            y = self.norm(self.conv(x)) * self.table.sum() * scale
            return y.reshape(y.shape[0], -1)

    path = tmp_path_factory.mktemp("program") / "net.pt2"
    sizes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}, "scale": None}
    torch.export.save(
        torch.export.export(Net().eval(), (IMAGES,), {"scale": torch.ones(1)}, dynamic_shapes=sizes), path
    )
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def edited(program, edit, name="net/models/model.json"):
    """The members after an edit of the JSON in one of them."""
    content = json.loads(program[name])
    edit(content)
    return {**program, name: json.dumps(content).encode()}


def nodes(content):
    return content["graph_module"]["graph"]["nodes"]


def call_signature(content):
    return content["graph_module"]["module_call_graph"][0]["signature"]


def renamed(program, old: str, new: str):
    """The members with one string of the program replaced wherever it stands."""
    text = program["net/models/model.json"].decode()
    return {
        **program,
        "net/models/model.json": text.replace(json.dumps(old), json.dumps(new)).encode(),
    }


# ---------------------------------------------------------------- exported programs


WEIGHTS, CONSTANTS = (
    "net/data/weights/model_weights_config.json",
    "net/data/constants/model_constants_config.json",
)


def pickled(listing, file, first):
    def place(program, marker):
        def edit(content):
            entry = content["config"][first]
            entry["use_pickle"], entry["path_name"] = True, Path(file).name

        return {**edited(program, edit, listing), file: bytes_of(file, marker)}

    return place


def bytes_of(file, marker):
    return pickle.dumps(Payload(marker)) if "opaque" in file else saved(Payload(marker))


def older(name):
    """The form that torch 2.7 wrote, with a payload in one of its pickles."""

    def place(program, marker):
        members = {
            "version": b"8.5",
            "serialized_exported_program.json": program["net/models/model.json"],
            **{f"serialized_{part}.pt": saved({}) for part in ("state_dict", "constants")},
            "serialized_example_inputs.pt": saved(((IMAGES,), {"scale": torch.ones(1)})),
        }
        return {**members, name: saved(Payload(marker))}

    return place


PICKLES = {
    "sample inputs": lambda program, marker: {
        **program,
        "net/data/sample_inputs/model.pt": saved(Payload(marker)),
    },
    "a pickled weight": pickled(WEIGHTS, "net/data/weights/weight_99", "conv.weight"),
    "a pickled constant": pickled(CONSTANTS, "net/data/constants/tensor_99", "table"),
    "an opaque object": pickled(CONSTANTS, "net/data/constants/opaque_obj_0", "table"),
    "a script object": pickled(CONSTANTS, "net/data/constants/custom_obj_0", "table"),
    "weights of an older form": lambda program, marker: {
        **program,
        "net/data/weights/model.pt": saved(Payload(marker)),
    },
    "constants of an older form": lambda program, marker: {
        **program,
        "net/data/constants/model.pt": saved(Payload(marker)),
    },
    "2.7: state dict": older("serialized_state_dict.pt"),
    "2.7: constants": older("serialized_constants.pt"),
    "2.7: example inputs": older("serialized_example_inputs.pt"),
}


def guard(program, marker):
    return edited(
        program,
        lambda content: content.update(guards_code=[f"__import__('os').mkdir({str(marker)!r}) or True"]),
    )


def expression(program, marker):
    text = program["net/models/model.json"].decode()
    old = json.dumps("Symbol('s77', positive=True, integer=True)")
    assert old in text
    new = json.dumps(f"Integer(3 if __import__('os').mkdir({str(marker)!r}) is None else 3)")
    return {**program, "net/models/model.json": text.replace(old, new, 1).encode()}


def operator(target):
    def place(program, marker):
        def edit(content):
            call = {
                "name": "path",
                "arg": {"as_string": str(marker)},
                "kind": 1,
            }
            nodes(content).insert(
                0,
                {
                    "target": target,
                    "inputs": [call],
                    "outputs": [{"as_none": True}],
                    "metadata": {},
                    "name": "run",
                },
            )

        return edited(program, edit)

    return place


def operator_argument(program, marker):
    return edited(
        program,
        lambda c: nodes(c)[0]["inputs"].append({"name": "f", "arg": {"as_operator": "torch.os.mkdir"}}),
    )


def name_in_source(program, marker):
    return renamed(program, "x", f"x: __import__('os').mkdir({str(marker)!r})")


def keyword_in_source(program, marker):
    key = f"scale':0}}, __import__('os').mkdir({str(marker)!r})), {{'scale"

    def edit(content):
        call_signature(content)["in_spec"] = call_signature(content)["in_spec"].replace(
            '\\"scale\\"', json.dumps(json.dumps(key))[1:-1]
        )

    return edited(program, edit)


def attribute_in_source(program, marker):
    return renamed(program, "conv.weight", f'conv."), __import__("os").mkdir({str(marker)!r}), ("')


def container(kind, context):
    def place(program, marker):
        (marker.parent / "chosen.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nint = int\n")
        tree = {"type": kind, "context": context, "children_spec": []}

        def edit(content):
            call_signature(content)["out_spec"] = json.dumps([1, tree])

        return edited(program, edit)

    return place


SOURCES = {
    "a guard": guard,
    "an expression of a size": expression,
    "an operator by name": operator("torch.os.mkdir"),
    "an operator that opens libraries": operator("torch.ops.load_library"),
    "an operator that reads files": operator("torch.ops.aten.from_file.default"),
    "an operator that writes files": operator("torch.ops.aten.save.default"),
    "an operator of another library": operator("torch.ops.inductor.accumulate_grad_.default"),
    "a builder of calls": operator("_operator.methodcaller"),
    "an extension": operator("#chosen:mkdir"),
    "an operator as an argument": operator_argument,
    "the name of an input": name_in_source,
    "the name of a keyword": keyword_in_source,
    "the name of a parameter": attribute_in_source,
    "the factory of a defaultdict": container(
        "collections.defaultdict",
        {"default_factory_module": "chosen", "default_factory_name": "int", "dict_context": []},
    ),
    "an enum among the keys": container(
        "builtins.dict", json.dumps([{"__enum__": True, "fqn": "chosen:int", "name": "x"}])
    ),
}
PLACES = {**PICKLES, **SOURCES}


@pytest.mark.parametrize("place", PLACES)
def test_an_exported_program_runs_nothing(program, tmp_path, marker, place, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path / "evil.pt2", PLACES[place](program, marker))
    code = main([str(path), "--dry-run"])
    error = capsys.readouterr().err
    assert not marker.exists()
    assert (code, len(error.splitlines())) in ((0, 0), (2, 1)), error
    assert "Traceback" not in error


LIVE = [
    "sample inputs", "a pickled weight", "a pickled constant", "an opaque object", "weights of an older form",
    "constants of an older form", "2.7: state dict", "2.7: constants", "2.7: example inputs", "a guard",
    "an expression of a size", "the factory of a defaultdict", "an enum among the keys",
]  # fmt: skip
"""Where torch 2.13 runs what it finds; the other places are refused here because nothing but luck keeps them shut."""


@pytest.mark.parametrize("place", LIVE)
def test_the_same_program_is_live_in_the_loader_of_torch(program, tmp_path, marker, place, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path / "evil.pt2", PLACES[place](program, marker))
    with contextlib.suppress(Exception):
        torch.export.load(path).module()(IMAGES, scale=torch.ones(1))
    sys.modules.pop("chosen", None)
    assert marker.exists()


def test_what_a_program_needs_is_read(program, tmp_path):
    path = write(tmp_path / "net.pt2", program)
    ours, theirs = load_program(path), torch.export.load(path)
    assert torch.equal(
        ours.module()(IMAGES, scale=torch.ones(1)), theirs.module()(IMAGES, scale=torch.ones(1))
    )
    assert torch.equal(ours.example_inputs[0][0], IMAGES)
    assert ours.range_constraints == theirs.range_constraints
    assert ours.state_dict.keys() == theirs.state_dict.keys()


def test_the_form_of_torch_2_7_is_read(program, tmp_path):
    members = older("version")(program, tmp_path)
    with zipfile.ZipFile(write(tmp_path / "now.pt2", program)):
        now = load_program(tmp_path / "now.pt2")
    members["serialized_state_dict.pt"] = saved(dict(now.state_dict))
    members["serialized_constants.pt"] = saved(dict(now.constants))
    members["version"] = b"8.5"
    then = load_program(write(tmp_path / "then.pt2", members))
    assert torch.equal(then.module()(IMAGES, scale=torch.ones(1)), now.module()(IMAGES, scale=torch.ones(1)))


def test_example_inputs_that_are_objects_are_made_up_and_the_report_says_so(program, tmp_path, marker):
    path = write(tmp_path / "net.pt2", PLACES["sample inputs"](program, marker))
    report = fold_program_file(path, None)
    assert report.verified
    assert any("no example inputs" in note for note in report.notes)
    assert not marker.exists()


def test_a_compiled_library_is_refused(program, tmp_path):
    path = write(tmp_path / "net.pt2", {**program, "net/data/aotinductor/model/net.so": b"\x7fELF"})
    with pytest.raises(InputError, match="a compiled library, which is never run"):
        load_program(path)


# ---------------------------------------------------------------- weights and checkpoints


def weights(marker):
    return {"state_dict": {"conv.weight": torch.ones(2)}, "callbacks": Payload(marker)}


def in_old_form(value):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".tar"])
@pytest.mark.parametrize("form", [saved, in_old_form, pickle.dumps])
def test_weights_run_nothing(tmp_path, marker, form, suffix, capsys):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(form(weights(marker)))
    assert main([str(path), "--model", FACTORY, "--input", "1x3x16x16", "--dry-run"]) == 2
    assert main([str(path), "--dry-run"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert not marker.exists()


@pytest.mark.parametrize("form", [saved, in_old_form])
def test_the_same_weights_are_live_when_they_are_unpickled(marker, form):
    torch.load(io.BytesIO(form(weights(marker))), weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("place", ["record", "versions", "folded", "state", "architecture", "input"])
def test_a_checkpoint_runs_nothing(tmp_path, marker, place, capsys):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, checkpoint.Checkpoint(nn.Sequential(nn.Linear(2, 2)), checkpoint.InputDomain((2,))))
    payload = torch.load(path, weights_only=True)
    payload[place] = {"evil": Payload(marker)}
    torch.save(payload, path)
    assert main([str(path), "--dry-run"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


# ---------------------------------------------------------------- everything else that is read


def test_arrays_run_nothing(tmp_path, marker, capsys):
    import onnx
    from onnx import parser

    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}, float[2] one = {1, 1}>
        { h = MatMul (x, w)  y = BatchNormalization (h, one, one, one, one) }"""
    onnx.save(parser.parse_model(text), tmp_path / "m.onnx")
    np.savez(tmp_path / "in.npz", x=np.array([Payload(marker)], dtype=object))
    assert main([str(tmp_path / "m.onnx"), "--inputs", str(tmp_path / "in.npz"), "--dry-run"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not marker.exists()
    np.load(tmp_path / "in.npz", allow_pickle=True)["x"]
    assert marker.exists()


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors", ".pt2", ".pt", ".weights"])
def test_a_pickle_under_any_other_name_runs_nothing(tmp_path, marker, suffix, capsys):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(pickle.dumps(Payload(marker)))
    assert main([str(path), "--dry-run"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main([str(path), "--model", FACTORY, "--input", "1x3x16x16", "--dry-run"]) == 2
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


def test_names_are_text(tmp_path, marker):
    path = tmp_path / "names.txt"
    path.write_bytes(pickle.dumps([Payload(marker)] * 9))
    with pytest.raises(InputError):
        read_names(path)
    assert not marker.exists()


def test_no_reader_of_the_project_unpickles_without_restriction():
    root = Path(__file__).parents[2]
    for package in ("bnfold", "data", "export", "train"):
        for path in (root / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for call in (
                "weights_only=False",
                "allow_pickle=True",
                "pickle.load",
                "export.load(",
                "eval(compile",
            ):
                assert call not in text, f"{path} holds {call}"


@pytest.mark.parametrize("cut", ["half", "weights", "json", "listing"])
def test_a_damaged_program_is_one_line_and_no_log(program, tmp_path, cut, capfd):
    path, whole = tmp_path / "net.pt2", program["net/models/model.json"]
    members = {
        "half": program,
        "weights": {name: content for name, content in program.items() if "weight_0" not in name},
        "json": {**program, "net/models/model.json": whole.replace(b"as_tensor", b"as_tensors", 3)},
        "listing": {**program, WEIGHTS: b'{"config": {"conv.weight": 3}}'},
    }[cut]
    write(path, members)
    if cut == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main([str(path), "--dry-run"]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_tensor_may_not_claim_more_than_its_bytes(program, tmp_path):
    def edit(content):
        meta = content["config"]["conv.weight"]["tensor_meta"]
        meta["sizes"], meta["strides"] = [{"as_int": 1 << 20}] * 4, [{"as_int": 0}] * 4

    with pytest.raises(InputError, match="claims"):
        load_program(write(tmp_path / "net.pt2", edited(program, edit, WEIGHTS)))


@pytest.mark.parametrize(
    "size", ["Pow(Integer(9), Integer(9**9))", "9**9**9", "Symbol('s7777777')", "s77.__class__"]
)
def test_a_size_may_not_cost_what_its_text_does_not_show(program, tmp_path, size):
    text = program["net/models/model.json"].decode()
    old = json.dumps("Symbol('s77', positive=True, integer=True)")
    content = text.replace(old, json.dumps(size)).encode()
    with pytest.raises(InputError, match="size"):
        load_program(write(tmp_path / "net.pt2", {**program, "net/models/model.json": content}))
