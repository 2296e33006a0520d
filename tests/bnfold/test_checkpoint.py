"""bnfold.checkpoint: what is saved comes back, and nothing else gets in."""

from __future__ import annotations

import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnfold import checkpoint, layers
from bnfold.checkpoint import (
    Checkpoint,
    InputDomain,
    describe,
    drop_identities,
    identify,
    is_checkpoint,
    load,
    save,
)
from bnfold.errors import InputError

CHARACTERS = (".", "a", "b", "c", "d")


def lecture_net() -> nn.Sequential:
    """Return a small net of the lecture's shape with statistics that are not the initial ones."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("embedding", nn.Embedding(5, 4))
    net.add_module("flatten", nn.Flatten())
    net.add_module("linear1", nn.Linear(12, 7, bias=False))
    net.add_module("bn1", nn.BatchNorm1d(7))
    net.add_module("tanh1", nn.Tanh())
    net.add_module("linear2", nn.Linear(7, 5, bias=False))
    net.add_module("bn2", nn.BatchNorm1d(5))
    net(torch.randint(0, 5, (64, 3)))
    return net.eval()


def lecture_checkpoint(model: nn.Sequential | None = None) -> Checkpoint:
    """Return a checkpoint of `lecture_net`, or of `model` with the same inputs."""
    domain = InputDomain((3,), "int64", 0, 5)
    return Checkpoint(model or lecture_net(), domain, CHARACTERS, {"seed": 1, "losses": (2.5, 2.25)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a sound checkpoint."""
    save(tmp_path / "ckpt.pt", lecture_checkpoint())
    return tmp_path / "ckpt.pt"


def payload_of(path: Path) -> dict[str, Any]:
    """Return the dict inside a checkpoint."""
    payload: dict[str, Any] = torch.load(path, weights_only=True)
    return payload


def refusal(path: Path) -> str:
    """Return the one line with which `load` refuses a file."""
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    return message


def test_a_checkpoint_comes_back_whole_and_in_eval_mode(path: Path) -> None:
    before, after = lecture_checkpoint(), load(path)
    contexts = after.input.every()
    assert torch.equal(before.model(contexts), after.model(contexts))
    assert not any(module.training for module in after.model.modules())
    assert after.input == before.input
    assert after.vocabulary == CHARACTERS
    assert after.record == {"seed": 1, "losses": [2.5, 2.25]}
    assert after.versions["torch"] == torch.__version__
    assert after.folded is None
    assert describe(after.model) == describe(before.model)


def test_a_loaded_net_can_be_trained_on(path: Path) -> None:
    net = load(path).model.train()
    net(torch.randint(0, 5, (8, 3))).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_the_file_holds_one_dict_of_tensors_and_plain_values(path: Path) -> None:
    payload = payload_of(path)
    assert all(type(tensor) is torch.Tensor for tensor in payload.pop("state").values())
    waiting: list[Any] = [payload]
    while waiting:
        value = waiting.pop()
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        waiting.extend(
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        )


def test_the_bytes_depend_on_the_checkpoint_alone(path: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    save(tmp_path / "other_name.pt", load(path))
    assert (tmp_path / "other_name.pt").read_bytes() == path.read_bytes()


def test_saving_and_loading_draw_no_random_numbers(path: Path) -> None:
    before = torch.get_rng_state()
    save(path, load(path))
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_leaves_the_training_mode_as_it_was(path: Path) -> None:
    net = lecture_net().train()
    save(path, lecture_checkpoint(net))
    assert all(module.training for module in net.modules())


def test_a_folded_net_is_saved_without_the_identities_that_a_fold_leaves(path: Path) -> None:
    net = lecture_net()
    net.bn1 = nn.Identity()
    net.linear1.bias = nn.Parameter(torch.ones(7))
    lean = drop_identities(net)
    save(path, Checkpoint(lean, InputDomain((3,), "int64", 0, 5), folded={"verdicts": [{"name": "bn1"}]}))
    after = load(path)
    assert [name for name, _ in after.model.named_children()] == [
        "embedding", "flatten", "linear1", "tanh1", "linear2", "bn2"
    ]  # fmt: skip
    assert after.folded == {"verdicts": [{"name": "bn1"}]}
    contexts = after.input.every()
    assert torch.equal(after.model(contexts), net(contexts))
    assert "bn1" in dict(net.named_children())


def test_one_layer_used_twice_is_saved_twice(path: Path) -> None:
    tanh = nn.Tanh()
    save(path, Checkpoint(drop_identities(nn.Sequential(tanh, nn.Identity(), tanh)), InputDomain((3,))))
    assert [type(layer) for layer in load(path).model] == [nn.Tanh, nn.Tanh]


def test_every_dtype_of_weights_survives(path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save(path, lecture_checkpoint(lecture_net().to(dtype)))
        assert load(path).model.get_submodule("linear1").weight.dtype is dtype


IMAGE: dict[int, tuple[int, ...]] = {1: (4, 8), 2: (4, 8, 8), 3: (4, 4, 4, 4)}
EXAMPLES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(8, 3), (8,)),
    (nn.BatchNorm1d(8, affine=False), (8,)),
    (nn.BatchNorm1d(8, bias=False), (8,)),
    (nn.BatchNorm1d(8, track_running_stats=False), (8,)),
    (nn.Flatten(1, 2), (4, 8)),
    (nn.Unflatten(1, (2, 4)), (8,)),
    (nn.Identity(), (8,)),
    (nn.LayerNorm((4, 8), eps=1e-3), (4, 8)),
    (nn.GroupNorm(2, 4), (4, 8)),
    (nn.Dropout(0.25), (8,)),
    (nn.AlphaDropout(0.25), (8,)),
    (nn.FeatureAlphaDropout(0.25), (4, 8)),
    (nn.ReLU(inplace=True), (8,)),
    (nn.ReLU6(), (8,)),
    (nn.SELU(), (8,)),
    (nn.SiLU(), (8,)),
    (nn.Mish(), (8,)),
    (nn.Hardswish(), (8,)),
    (nn.Hardsigmoid(), (8,)),
    (nn.Tanh(), (8,)),
    (nn.Sigmoid(), (8,)),
    (nn.LogSigmoid(), (8,)),
    (nn.Softsign(), (8,)),
    (nn.Tanhshrink(), (8,)),
    (nn.GELU("tanh"), (8,)),
    (nn.ELU(0.5), (8,)),
    (nn.CELU(0.5), (8,)),
    (nn.LeakyReLU(0.2), (8,)),
    (nn.PReLU(4), (4, 8)),
    (nn.Hardtanh(-2, 0.5), (8,)),
    (nn.Softplus(2, 10), (8,)),
    (nn.Softmax(1), (8,)),
    (nn.LogSoftmax(-1), (8,)),
]
for rank, shape in IMAGE.items():
    arguments: dict[str, tuple[Any, ...]] = {
        "Conv": (4, 6, 3, 2, 1, 1, 2, False, "reflect" if rank < 3 else "zeros"),
        "ConvTranspose": (4, 6, 3, 2, 1, 1, 2),
        "BatchNorm": (4, 1e-3, None),
        "InstanceNorm": (4, 1e-3, 0.2, True, True),
        "Dropout": (0.25,),
        "MaxPool": (2, 1),
        "AvgPool": (2, 2, 1, True, False),
        "AdaptiveAvgPool": (2,),
        "AdaptiveMaxPool": (2,),
        "ZeroPad": (1,),
    }
    EXAMPLES += [(getattr(nn, f"{name}{rank}d")(*given), shape) for name, given in arguments.items()]


def test_the_examples_below_cover_the_whole_table_of_layers() -> None:
    covered = {type(layer).__name__ for layer, _ in EXAMPLES} | {"Embedding"}
    assert covered == set(layers.LAYERS)


@pytest.mark.parametrize(("layer", "shape"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_every_layer_of_the_table_comes_back_the_same(
    layer: nn.Module, shape: tuple[int, ...], path: Path
) -> None:
    torch.manual_seed(1)
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    net, domain = nn.Sequential(layer).eval(), InputDomain(shape)
    save(path, Checkpoint(net, domain))
    after, inputs = load(path).model, domain.sample(5)
    assert repr(after) == repr(net)
    assert torch.equal(after(inputs.clone()), net(inputs.clone()))


class TestRefusedModels:
    """`save` refuses what `load` could not give back, and an existing file survives."""

    class Linear(nn.Linear):
        """A layer of a known name with a forward of its own."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Return twice what torch's layer returns."""
            return 2 * super().forward(x)

    @pytest.mark.parametrize(
        ("model", "fragment"),
        [
            (nn.Linear(5, 5), "an nn.Sequential"),
            (nn.Sequential(nn.Sequential(nn.Linear(3, 5))), "layer `0` is a Sequential"),
            (nn.Sequential(Linear(3, 5)), "layer `0` is a TestRefusedModels.Linear"),
            (nn.Sequential(nn.Linear(4, 5)), "layer `0` does not fit its input of shape [3]"),
            (nn.Sequential(nn.Embedding(4, 2)), "layer `0` has 4 rows, the input runs from 0 to 5"),
            (nn.Sequential(nn.Embedding(5, 2, max_norm=1.0)), "layer `0` (Embedding) has max_norm = 1.0"),
            (nn.Sequential(nn.Embedding(5, 2, dtype=torch.complex64)), "`0.weight` is no tensor"),
            (
                nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))),
                "layer `1` is a ParametrizedLinear",
            ),
        ],
        ids=["no Sequential", "nested", "subclass", "misfit", "rows", "max_norm", "complex", "parametrized"],
    )
    def test_a_model_that_could_not_be_rebuilt(self, model: Any, fragment: str, path: Path) -> None:
        before = path.read_bytes()
        with pytest.raises(InputError) as caught:
            save(path, lecture_checkpoint(model))
        assert fragment in str(caught.value)
        assert path.read_bytes() == before
        assert [one.name for one in path.parent.iterdir()] == ["ckpt.pt"]

    @pytest.mark.parametrize("value", [torch.ones(1), {1: 2}, {1, 2}, b"bytes", Path()], ids=repr)
    def test_a_record_of_more_than_plain_values(self, value: Any, path: Path) -> None:
        with pytest.raises(InputError, match="`record` holds a"):
            save(path, Checkpoint(lecture_net(), InputDomain((3,), "int64", 0, 5), record={"deep": [value]}))

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is no folder"):
            save(tmp_path / "nowhere" / "ckpt.pt", lecture_checkpoint())


def change(payload: dict[str, Any], keys: str, value: Any) -> None:
    """Set the entry of `payload` that a path such as `architecture/2/class` names."""
    *outer, last = [int(key) if key.isdigit() else key for key in keys.split("/")]
    for key in outer:
        payload = payload[key]
    payload[last] = value


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
WIDE: list[Any] = []
for _ in range(40):
    WIDE = [WIDE, WIDE]


class TestMalformedFiles:
    """Every odd file ends in one line that names it, without its code and without its memory."""

    @pytest.mark.parametrize(
        ("keys", "value", "fragment"),
        [
            ("format", "other", "no checkpoint of bnfold's"),
            ("format", torch.ones(2), "no checkpoint of bnfold's"),
            ("version", 2, "has format version 2"),
            ("version", torch.ones(2), "has format version"),
            ("architecture", None, "no readable `architecture`"),
            ("architecture", [[]], "each layer of `architecture`"),
            ("architecture/2/class", "os.system", "layer 'linear1' is a 'os.system'"),
            ("architecture/2/class", "Module", "not in the table"),
            ("architecture/2/class", ["Linear"], "not in the table"),
            ("architecture/2/name", "flatten", "layer `flatten` stands twice"),
            ("architecture/2/name", "a.b", "no layer can have the name"),
            ("architecture/2/name", "forward", "no layer can have the name"),
            ("architecture/2/arguments", {}, "takes exactly in_features, out_features, bias"),
            ("architecture/2/arguments/device", "cuda", "takes exactly in_features, out_features, bias"),
            ("architecture/2/arguments/in_features", float("nan"), "has in_features = nan"),
            ("architecture/2/arguments/in_features", -1, "has in_features = -1"),
            ("architecture/2/arguments/in_features", True, "has in_features = True"),
            ("architecture/2/arguments/in_features", "9" * 999, "has in_features = '99"),
            ("architecture/2/arguments/in_features", 2**62, "has in_features = 46"),
            ("architecture/2/arguments/in_features", 2**31 - 1, "layer `linear1` does not fit"),
            ("architecture/0/arguments/embedding_dim", 2**31 - 1, "layer `linear1` does not fit"),
            ("architecture/2/arguments/out_features", 6, "layer `bn1` does not fit its input of shape [6]"),
            ("architecture/3/arguments/eps", "small", "has eps = 'small'"),
            ("architecture/3/arguments/affine", False, "`state` has 'bn1.bias'"),
            ("architecture/5/arguments/out_features", 2**31 - 1, "layer `bn2` does not fit"),
            ("input", {}, "`input` needs"),
            ("input/shape", 3, "`input` needs"),
            ("input/shape", [2**31], "input shape"),
            ("input/dtype", "complex64", "input dtype"),
            ("input/dtype", [], "input dtype"),
            ("input/high", 6, "`vocabulary` has 5 characters, the input 0 to 6"),
            ("input/high", 0, "is empty"),
            ("input/high", None, "needs integers"),
            ("vocabulary", [".", "."], "different characters"),
            ("vocabulary", [1, 2, 3, 4, 5], "different characters"),
            ("state/linear1.weight", torch.ones(7, 11), "has shape [7, 11], its layer needs [7, 12]"),
            ("state/linear1.weight", torch.ones(7, 12, dtype=torch.int64), "is stored as torch.int64"),
            ("state/linear1.weight", torch.ones(7, 12).to_sparse(), "is no tensor of numbers"),
            ("state/linear1.weight", torch.ones(1).expand(7, 12), "in a form that its layer cannot use"),
            ("state/linear1.weight", [1.0], "is no tensor of numbers"),
            ("state/linear9.weight", torch.ones(1), "`state` has 'linear9.weight'"),
            ("record", [], "no readable `record`"),
            ("record", {"deep": {1: 2}}, "`record` holds a dict"),
            ("record", {"deep": torch.ones(1)}, "`record` holds a Tensor"),
            ("record", {"deep": CYCLE}, "nested more than"),
            ("record", {"deep": WIDE}, "`record` holds more than"),
            ("folded", "yes", "no readable `folded`"),
        ],
        ids=lambda value: value if isinstance(value, str) and "/" in value and len(value) < 50 else "",
    )  # fmt: skip
    def test_an_entry_that_is_wrong(self, keys: str, value: Any, fragment: str, path: Path) -> None:
        payload = payload_of(path)
        change(payload, keys, value)
        payload["claim"] = checkpoint.FORMAT
        torch.save(payload, path)
        assert fragment in refusal(path)

    @pytest.mark.parametrize(
        "key", ["format", "version", "architecture", "input", "vocabulary", "state", "record"]
    )
    def test_an_entry_that_is_missing(self, key: str, path: Path) -> None:
        payload = payload_of(path)
        del payload[key]
        torch.save(payload | {"claim": checkpoint.FORMAT}, path)
        assert refusal(path)

    def test_a_record_of_a_fold_that_is_missing_is_none(self, path: Path) -> None:
        payload = payload_of(path)
        del payload["folded"]
        torch.save(payload, path)
        assert checkpoint.load(path).folded is None

    def test_a_tensor_that_is_missing(self, path: Path) -> None:
        payload = payload_of(path)
        del payload["state"]["bn1.running_var"]
        torch.save(payload, path)
        assert "`state` lacks `bn1.running_var`" in refusal(path)

    def test_something_else_than_a_dict(self, path: Path) -> None:
        torch.save([checkpoint.FORMAT], path)
        assert "no checkpoint of bnfold's" in refusal(path)

    def test_a_file_cut_short_anywhere(self, path: Path) -> None:
        whole = path.read_bytes()
        for length in range(0, len(whole), 61):
            path.write_bytes(whole[:length])
            assert refusal(path)

    def test_flipped_bytes_are_refused_or_leave_a_net(self, path: Path) -> None:
        whole, source = path.read_bytes(), random.Random(3)
        messages = []
        for _ in range(300):
            spoilt = bytearray(whole)
            for _ in range(source.choice([1, 8])):
                spoilt[source.randrange(len(spoilt))] = source.randrange(256)
            path.write_bytes(spoilt)
            try:
                load(path)
            except InputError as error:
                messages.append(str(error))
        assert len(messages) > 30
        assert all(len(message.splitlines()) == 1 for message in messages)

    def test_code_in_a_pickle_is_not_run(self, path: Path, tmp_path: Path) -> None:
        class Bait:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "sprung",)

        torch.save({"format": checkpoint.FORMAT, "bait": Bait()}, path)
        assert "more than tensors and plain values" in refusal(path)
        path.write_bytes(pickle.dumps(Bait()))
        assert "can run code" in refusal(path)
        assert not (tmp_path / "sprung").exists()

    def test_members_that_would_unpack_to_more_than_the_file_holds(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        assert "none that torch.save writes" in refusal(path)

    def test_a_folder_an_empty_file_and_no_file(self, tmp_path: Path) -> None:
        assert "is a folder" in refusal(tmp_path)
        assert "no such file" in refusal(tmp_path / "missing.pt")
        (tmp_path / "empty.pt").touch()
        assert "is no checkpoint" in refusal(tmp_path / "empty.pt")


@pytest.mark.filterwarnings("ignore")
def test_other_files_are_recognised_and_refused_by_what_they_are(path: Path, tmp_path: Path) -> None:
    net, contexts, other = lecture_net(), torch.zeros(2, 3, dtype=torch.int64), tmp_path / "other.pt"
    assert identify(path) == "checkpoint"
    assert is_checkpoint(path)

    torch.save(net.state_dict(), other)
    assert identify(other) == "torch archive"
    assert "a state dict?" in refusal(other)
    torch.save(net, other)
    assert identify(other) == "torch archive"
    torch.save(net.state_dict(), other, _use_new_zipfile_serialization=False)
    assert identify(other) == "pickle"
    torch.jit.save(torch.jit.trace(net, contexts), other)
    assert identify(other) == "torchscript"
    assert "TorchScript" in refusal(other)
    program = tmp_path / "other.pt2"
    torch.export.save(torch.export.export(net, (contexts,)), program)
    assert identify(program) == "exported program"
    assert "before exporting" in refusal(program)
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a/b", b"")
    assert identify(other) == "zip"
    other.write_text("emma\nolivia\n")
    assert identify(other) == "other"
    assert not is_checkpoint(other)


class TestInputDomain:
    """The inputs of a model can be counted, listed and drawn."""

    def test_every_input_once_with_the_last_position_fastest(self) -> None:
        domain = InputDomain((2,), "int32", -1, 2)
        assert domain.every().tolist() == [[a, b] for a in (-1, 0, 1) for b in (-1, 0, 1)]
        assert domain.every().dtype is torch.int32
        assert InputDomain((3,), "int64", 0, 27).count == 19_683
        assert InputDomain((2, 2), "bool", 0, 2).every().shape == (16, 2, 2)
        assert InputDomain((), "int64", 0, 5).every().tolist() == [0, 1, 2, 3, 4]

    def test_what_cannot_be_counted_says_so(self) -> None:
        for domain in (InputDomain((3,)), InputDomain((2**30,), "int64", 0, 27)):
            assert domain.count is None
            with pytest.raises(InputError, match="cannot be counted"):
                domain.every()
        with pytest.raises(InputError, match="too many to list"):
            InputDomain((8,), "int64", 0, 27).every()

    def test_samples_repeat_with_their_seed_and_keep_to_the_alphabet(self) -> None:
        domain = InputDomain((3,), "int64", 2, 4)
        assert torch.equal(domain.sample(50, seed=1), domain.sample(50, seed=1))
        assert set(domain.sample(50).flatten().tolist()) == {2, 3}
        images = InputDomain((3, 4, 4), "float16").sample(9)
        assert images.shape == (9, 3, 4, 4)
        assert images.dtype is torch.float16
