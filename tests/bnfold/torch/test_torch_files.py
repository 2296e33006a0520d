"""Weights in files and exported programs: what the command folds."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch

from benchmarks.branches import BRANCHES
from benchmarks.branches import build as build_branches
from bnfold import InputError
from bnfold.fold import main
from bnfold.torch.files import (
    fold_checkpoint_file,
    load_factory,
    load_folded,
    load_state,
    make_inputs,
    read_arguments,
)
from bnfold.torch.fold import fold
from bnfold.torch.program import fold_program
from bnfold.torch.side import open_file
from bnfold.verify import main as verify_command
from tests.torch_architectures import ARCHITECTURES, ResNet
from tests.torch_models import randomise

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

FACTORY = "tests.torch_architectures:ResNet"
IMAGES = torch.randn(3, 3, 16, 16)


@pytest.fixture
def model():
    return randomise(ResNet())


PREFIXES = ("", "module.", "model.", "_orig_mod.", "module._orig_mod.", "model._orig_mod.")


@pytest.mark.parametrize(
    ("prefix", "key"), list(zip(PREFIXES, [None, "state_dict", "model"] * 2, strict=True))
)
def test_a_state_dict_is_folded_in_the_form_that_it_has(model, tmp_path, key, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "in.pt")
    report = fold_checkpoint_file(
        tmp_path / "in.pt", tmp_path / "out.pt", model=FACTORY, shapes=["1x3x16x16"]
    )
    assert report.verified
    assert report.count("folded") == len(report.verdicts) == 12
    container, after, found = load_state(tmp_path / "out.pt", model.state_dict())
    assert found == prefix
    assert key is None or container["epoch"] == 3
    twin = load_folded(ResNet().eval(), IMAGES, after)
    torch.testing.assert_close(twin(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


class Owner(torch.nn.Module):
    """A model whose own part is called `model`."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

    def forward(self, x):
        return self.model(x)


def test_a_part_of_the_model_is_no_prefix(tmp_path):
    model = randomise(Owner())
    torch.save(model.state_dict(), tmp_path / "in.pt")
    _, state, prefix = load_state(tmp_path / "in.pt", model.state_dict())
    assert (set(state), prefix) == (set(model.state_dict()), "")
    torch.save({f"model.{n}": t for n, t in model.state_dict().items()}, tmp_path / "in.pt")
    _, state, prefix = load_state(tmp_path / "in.pt", model.state_dict())
    assert (set(state), prefix) == (set(model.state_dict()), "model.")


def test_counters_of_a_profiler_are_no_weights(model, tmp_path):
    state = model.state_dict()
    counters = {f"{name}total_ops": torch.zeros(1) for name in ("", "layer1.", "conv1.")}
    torch.save({**state, **counters, "total_params": torch.zeros(1)}, tmp_path / "in.pt")
    report = fold_checkpoint_file(tmp_path / "in.pt", None, model=FACTORY, shapes=["1x3x16x16"])
    assert report.count("folded") == 12


def test_which_of_several_state_dicts_was_taken_is_said(model, tmp_path):
    state = model.state_dict()
    torch.save({"model": state, "model_ema": state, "optimizer": {"state": {}}}, tmp_path / "in.pt")
    report = fold_checkpoint_file(tmp_path / "in.pt", tmp_path / "o.pt", model=FACTORY, shapes=["1x3x16x16"])
    said = "the weights under `model` were folded; those under `model_ema` are left as they are"
    assert said in report.notes
    after = torch.load(tmp_path / "o.pt", weights_only=True)
    assert len(after["model"]) < len(after["model_ema"]) == len(state)


def saved(container, model, tmp_path, **options):
    """What is in the file that folding the weights in a container gives."""
    torch.save(container, tmp_path / "in.pt")
    report = fold_checkpoint_file(
        tmp_path / "in.pt", tmp_path / "out.pt", model=FACTORY, shapes=["1x3x16x16"], **options
    )
    assert report.verified
    return torch.load(tmp_path / "out.pt", weights_only=True)


@pytest.mark.parametrize("prefix", ["student.", "teacher.net.", "a.b.c."])
def test_any_prefix_that_all_names_have_is_taken_off_and_put_back(model, tmp_path, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    after = saved(state, model, tmp_path)
    assert len(after) < len(state)
    assert all(name.startswith(prefix) for name in after)


@pytest.mark.parametrize("key", ["ema", "model_ema", "state_dict_ema", "generator", "ema.model", "a.b.c"])
def test_the_only_state_dict_in_a_file_is_found_under_any_key(model, tmp_path, key):
    held = model.state_dict()
    for part in reversed(key.split(".")):
        held = {part: held, "epoch": 3}
    after = saved(held, model, tmp_path)
    assert after["epoch"] == 3
    for part in key.split("."):
        after = after[part]
    assert 0 < len(after) < len(model.state_dict())


def test_the_state_dict_that_has_names_of_the_model_is_found_beside_others(model, tmp_path):
    other = {"embed.weight": torch.ones(3)}
    after = saved({"text": other, "image": model.state_dict()}, model, tmp_path)
    assert torch.equal(after["text"]["embed.weight"], other["embed.weight"])
    assert len(after["image"]) < len(model.state_dict())
    after = saved({"model": other, "ema": model.state_dict()}, model, tmp_path)
    assert len(after["ema"]) < len(model.state_dict())


def test_several_state_dicts_of_one_model_are_chosen_from_by_key_alone(model, tmp_path):
    state = model.state_dict()
    container = {"online": state, "target": {name: tensor.clone() for name, tensor in state.items()}}
    with pytest.raises(
        InputError, match=r"several state dicts, under `online`, `target`; choose one with --key"
    ):
        saved(container, model, tmp_path)
    after = saved(container, model, tmp_path, key="target")
    assert len(after["target"]) < len(after["online"]) == len(state)
    assert len(saved({"model": state, "ema": state}, model, tmp_path, key="ema")["model"]) == len(state)
    with pytest.raises(InputError, match=r"no state dict under `nothing`; there are some under `online`"):
        saved(container, model, tmp_path, key="nothing")


def test_a_prefix_that_some_names_have_is_taken_off_where_it_is_named(model, tmp_path):
    state = {f"student.{name}": tensor for name, tensor in model.state_dict().items()}
    others = {"loss.weight": torch.ones(2), "queue": torch.ones(3)}
    for prefix in ("student", "student."):
        after = saved({**state, **others}, model, tmp_path, prefix=prefix)
        assert torch.equal(after["queue"], others["queue"])
        assert sum(name.startswith("student.") for name in after) == len(after) - 2 < len(state)
    with pytest.raises(InputError, match=r"no name begins with teacher\.; they begin with"):
        saved(state, model, tmp_path, prefix="teacher")
    with pytest.raises(InputError, match="--key and --prefix choose others"):
        saved({**state, **others}, model, tmp_path)


def test_a_dict_whose_keys_are_no_names_is_no_state_dict(tmp_path):
    torch.save({0: torch.ones(1)}, tmp_path / "in.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        load_state(tmp_path / "in.pt")


class Wants(torch.nn.Module):
    """Built with arguments, and called with a dict and a keyword."""

    def __init__(self, channels, *, kernel=1):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, channels, kernel), torch.nn.BatchNorm2d(channels)

    def forward(self, batch, *, scale):
        return self.bn(self.conv(batch["image"])) * scale


WANTS = "tests.bnfold.torch.test_torch_files:Wants"


@pytest.mark.parametrize("arguments", ['{"channels": 4, "kernel": 3}', "[4]"])
def test_a_factory_is_called_with_arguments_and_its_module_with_names(tmp_path, arguments):
    given = read_arguments(arguments)
    model = randomise(load_factory(WANTS, given))
    source = tmp_path / "in.pt"
    torch.save(model.state_dict(), source)
    inputs = ["--input", "batch.image=2x3x5x5", "--input", "scale=1"]
    built = ["--model", WANTS, "--model-args", arguments]
    assert main([str(source), *built, *inputs]) == 0
    folded = torch.load(tmp_path / "in.folded.pt", weights_only=True)
    assert set(folded) == {"conv.weight", "conv.bias"}
    assert verify_command([str(source), str(tmp_path / "in.folded.pt"), *built, *inputs]) == 0
    folded["conv.bias"][0] += 1
    torch.save(folded, tmp_path / "in.folded.pt")
    assert verify_command([str(source), str(tmp_path / "in.folded.pt"), *built, *inputs]) == 1


class Scaling(torch.nn.Conv2d):
    """Keeps more than tensors in its state dict."""

    def get_extra_state(self):
        return {"scale": 2.0}

    def set_extra_state(self, state):
        assert state == {"scale": 2.0}


class WithScale(torch.nn.Sequential):
    """A block of such a layer and its BatchNorm."""

    def __init__(self):
        super().__init__(Scaling(3, 4, 3), torch.nn.BatchNorm2d(4))


def test_what_a_module_keeps_besides_tensors_is_handed_on(tmp_path):
    pytest.importorskip("safetensors")
    model = randomise(WithScale())
    torch.save({"model": model.state_dict()}, tmp_path / "in.pt")
    command = [str(tmp_path / "in.pt"), "--model", "tests.bnfold.torch.test_torch_files:WithScale"]
    command += ["--input", "1x3x5x5", "-o"]
    assert main([*command, str(tmp_path / "out.pt")]) == 0
    folded = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert folded["0._extra_state"] == {"scale": 2.0}
    assert set(folded) == {"0.weight", "0.bias", "0._extra_state"}
    images = torch.randn(1, 3, 5, 5)
    twin = load_folded(WithScale().eval(), images, folded)
    torch.testing.assert_close(twin(images), model(images), rtol=1e-4, atol=1e-5)
    assert main([*command, str(tmp_path / "out.safetensors")]) == 2
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.slow
def test_a_program_of_a_module_that_is_called_by_name_is_written(tmp_path):
    torch.save(Wants(4).state_dict(), tmp_path / "in.pt")
    shapes = ["batch.image=2x3x5x5", "scale=1"]
    target = tmp_path / "out.pt2"
    report = fold_checkpoint_file(tmp_path / "in.pt", target, model=WANTS, shapes=shapes, arguments=[4])
    assert report.verified
    program = torch.export.load(target).module()
    assert program(batch={"image": torch.randn(2, 3, 5, 5)}, scale=torch.ones(1)).shape == (2, 4, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model-args", "{"], "is no JSON"),
        (["--model-args", "3"], "is neither an object"),
        (["--model-args", "[]"], "cannot be called without arguments"),
        (["--model-args", '{"depth": 3}'], "cannot be called with these arguments"),
        (["--model-args", "[4]", "--input", "a=1", "--input", "a=1"], "it is named twice"),
        (["--model-args", "[4]", "--input", "a=1", "--input", "a.b=1"], "`a` is a tensor already"),
        (["--model-args", "[4]", "--input", "=1"], "it has no name"),
    ],
)
def test_arguments_and_names_that_cannot_be_used_are_one_line(tmp_path, capsys, arguments, says):
    torch.save(Wants(4).state_dict(), tmp_path / "in.pt")
    given = arguments if "--input" in arguments else [*arguments, "--input", "1"]
    assert main([str(tmp_path / "in.pt"), "--model", WANTS, *given]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folded_weights_are_loaded_into_every_architecture(name):
    build, inputs, _ = ARCHITECTURES[name]
    model = randomise(build())
    after, _ = fold(model, inputs, verify=False)
    twin = load_folded(build().eval(), inputs, after.state_dict())
    assert torch.equal(twin(inputs), after(inputs))


@pytest.mark.parametrize("name", BRANCHES)
def test_merged_weights_are_loaded_into_every_net_with_branches(name):
    """The names and shapes in a state dict tell what was merged, whatever numbers the new net has so far."""
    model, inputs = build_branches(name, small=True)
    after, report = fold(model, inputs, verify=False)
    twin = copy.deepcopy(model)
    for number, parameter in enumerate(twin.parameters()):
        torch.nn.init.constant_(parameter, 0.1 + number % 3)
    load_folded(twin, inputs, after.state_dict())
    assert report.merged
    assert torch.equal(twin(*inputs), after(*inputs))


class Everything(torch.nn.Module):
    """A BatchNorm of which the shift stays, one with an activation, and a computed weight."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.act_norm = ActNorm(4)
        torch.nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x):
        return self.act_norm(self.conv(self.norm(x)))


class ActNorm(torch.nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = torch.nn.PReLU(channels)

    def forward(self, x):
        return torch.nn.functional.relu(self.act(super().forward(x)))


def test_folded_weights_are_loaded_whatever_is_left():
    after, report = fold(randomise(Everything()), IMAGES)
    assert [v.outcome for v in report.verdicts] == ["scale folded", "folded"]
    twin = load_folded(Everything().eval(), IMAGES, after.state_dict())
    assert torch.equal(twin(IMAGES), after(IMAGES))


def test_safetensors(model, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), tmp_path / "in.safetensors")
    fold_checkpoint_file(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", model=FACTORY, shapes=["1x3x16x16"]
    )
    twin = load_folded(ResNet().eval(), IMAGES, safetensors.load_file(tmp_path / "out.safetensors"))
    torch.testing.assert_close(twin(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_program_needs_no_factory(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "in.pt")
    fold_checkpoint_file(tmp_path / "in.pt", tmp_path / "out.pt2", model=FACTORY, shapes=["3x3x16x16"])
    made = torch.export.load(tmp_path / "out.pt2").module()(IMAGES)
    torch.testing.assert_close(made, model(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_program_file_is_folded_and_saved_again(model, tmp_path):
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.export.save(program, tmp_path / "in.pt2")
    report = fold_checkpoint_file(tmp_path / "in.pt2", tmp_path / "out.pt2")
    assert report.count("folded") == 12
    after = torch.export.load(tmp_path / "out.pt2")
    assert not any("batch_norm" in str(node.target) for node in after.graph.nodes)
    more = torch.cat([IMAGES, IMAGES])
    torch.testing.assert_close(after.module()(more), model(more), rtol=1e-4, atol=1e-4)


BATCHED = {"attention": {"bn"}}
"""BatchNorms behind a linear layer that `run_decompositions` makes a batched product of copies."""


@pytest.mark.parametrize("decomposed", [False, True], ids=["whole", "decomposed"])
@pytest.mark.parametrize("name", ["densenet", "repvgg", "attention", "generator", "tdnn"])
def test_programs_fold_as_far_as_modules_do(name, decomposed):
    build, inputs, stay = ARCHITECTURES[name]
    model = randomise(build())
    program = torch.export.export(model, (inputs,))
    if decomposed:
        program, stay = program.run_decompositions(), stay | BATCHED.get(name, set())
    after, report = fold_program(program)
    assert {v.name for v in report.verdicts if v.outcome == "kept"} == stay
    assert sum("batch_norm" in str(node.target) for node in after.graph.nodes) == len(stay)
    torch.testing.assert_close(after.module()(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    assert set(after.state_dict) - set(model.state_dict()) == {
        n for n in after.state_dict if n.endswith(".bias")
    } - set(model.state_dict())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package:make", "cannot be imported"),
        ("tests.torch_architectures:Nothing", "cannot be imported"),
        ("tests.torch_architectures", "no package.module:factory"),
        ("tests.torch_architectures:Bottleneck", "without arguments"),
        ("tests.torch_architectures:dict", "cannot be imported"),
        ("builtins:dict", "no nn.Module"),
        ("..:x", "relative to nothing"),
        (".models:x", "relative to nothing"),
        ("no\0such:x", "cannot be imported"),
        ("tests.torch_architectures:ResNet..x", "cannot be imported"),
    ],
)
def test_a_factory_that_is_none_says_so(name, message):
    with pytest.raises(InputError, match=message):
        load_factory(name)


def test_nothing_in_a_file_is_imported_or_run(tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return os.system, ("exit 3",)

    torch.save({"state_dict": {"a": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="cannot be read"):
        load_state(tmp_path / "evil.pt")


@pytest.mark.parametrize("content", [3, {"a": 1}, {}, [torch.ones(1)]])
def test_a_file_without_a_state_dict_says_so(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match="no state dict"):
        load_state(tmp_path / "x.pt")


def test_complex_numbers_where_the_model_has_real_ones_are_refused_by_name(model, tmp_path):
    state = model.state_dict() | {"head.bias": model.head.bias.detach().to(torch.complex64)}
    torch.save(state, tmp_path / "in.pt")
    with pytest.raises(InputError, match=r"`head\.bias` is complex in .*in\.pt, and real in the model"):
        fold_checkpoint_file(tmp_path / "in.pt", None, model=FACTORY, shapes=["1x3x16x16"])
    with pytest.raises(InputError, match=r"`head\.bias` is complex"):
        open_file(tmp_path / "in.pt", "before", FACTORY, ["1x3x16x16"])


def test_weights_of_another_model_say_so_and_write_nothing(model, tmp_path):
    state = model.state_dict()
    del state["head.bias"]
    torch.save(state, tmp_path / "in.pt")
    (tmp_path / "out.pt").write_bytes(b"before")
    with pytest.raises(InputError, match=r"head\.bias"):
        fold_checkpoint_file(tmp_path / "in.pt", tmp_path / "out.pt", model=FACTORY, shapes=["1x3x16x16"])
    assert (tmp_path / "out.pt").read_bytes() == b"before"


@pytest.mark.parametrize("text", ["", "0x3", "axb", "1x3:float99", "1x3:load"])
def test_a_shape_that_is_none_says_so(text):
    if text == "":
        assert make_inputs([text])[0].shape == ()
        return
    with pytest.raises(InputError, match="no shape"):
        make_inputs([text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1x3x100000x1000000", "more than 268,435,456 numbers"),
        ("99999999999999x1", "more than 268,435,456 numbers"),
        ("9" * 5000, "no shape"),
        ("1x3:quint8", "cannot be made"),
        ("1x3:complex32", "cannot be made"),
        ("1x3:bits8", "cannot be made"),
    ],
)
def test_an_input_that_cannot_be_made_says_so(text, message):
    with pytest.raises(InputError, match=message):
        make_inputs([text])


def test_a_module_that_fails_while_it_is_imported_says_so(tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="fails:net cannot be imported: division by zero"):
        load_factory("fails:net")


def test_shapes_have_dtypes():
    floats, whole = make_inputs(["1x3x4x4", "2x7:int64"])
    assert (floats.shape, floats.dtype) == ((1, 3, 4, 4), torch.float32)
    assert (whole.shape, whole.dtype) == ((2, 7), torch.int64)


def test_a_file_that_is_no_program_says_so(tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"nothing")
    with pytest.raises(InputError, match="exported program"):
        fold_checkpoint_file(tmp_path / "x.pt2", None)


def test_the_command_folds_a_program(model, tmp_path, run_module):
    torch.export.save(torch.export.export(model, (IMAGES,)), tmp_path / "m.pt2")
    result = run_module("bnfold.fold", tmp_path / "m.pt2", PYTHONWARNINGS="default")
    assert "12 of 12" in result.stdout, result.stderr
    assert sys.executable


def test_a_program_whose_weights_are_parts_of_one_tensor_is_folded_without_a_warning_of_torch(
    model, tmp_path, run_module
):
    parts = torch.cat([model.head.weight.detach().clone() for _ in range(3)])
    model.head.weight = torch.nn.Parameter(parts[10:20])
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(torch.export.export(model, (IMAGES,)), tmp_path / "m.pt2")
    result = run_module("bnfold.fold", tmp_path / "m.pt2", PYTHONWARNINGS="default")
    assert "12 of 12" in result.stdout
    assert not result.stderr
    after = torch.export.load(tmp_path / "m.folded.pt2").module()
    torch.testing.assert_close(after(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
