"""A BatchNorm in front of a recurrent module: the first layer's input weights take it, in every direction."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import bnfold
from tests.torch_models import agree, check, randomise

CHANNELS, HIDDEN = 5, 4
KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
STEPS = torch.randn(7, 3, CHANNELS)


class Speech(nn.Module):
    """A BatchNorm over (N, C, T), or over all steps of all sequences, and a recurrent layer."""

    def __init__(self, rnn: nn.Module, flat: bool = False) -> None:
        super().__init__()
        self.bn, self.rnn, self.flat = nn.BatchNorm1d(CHANNELS), rnn, flat

    def norm(self, x: Tensor) -> Tensor:
        """Of values whose channels lie last."""
        if self.flat:
            return self.bn(x.reshape(-1, CHANNELS)).view(x.shape)
        return self.bn(x.transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor) -> object:
        return self.rnn(self.norm(x))


FORMS = {
    "forward": {},
    "bidirectional": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "three layers": {"num_layers": 3, "bidirectional": True, "dropout": 0.5},
    "projected": {"proj_size": 2, "bidirectional": True},
    "relu": {"nonlinearity": "relu"},
}
ONLY = {"projected": "LSTM", "relu": "RNN"}
INTO = ("rnn.weight_ih_l0", "rnn.weight_ih_l0_reverse")


@pytest.mark.parametrize(("kind", "form"), [(k, f) for k in KINDS for f in FORMS if ONLY.get(f, k) == k])
def test_the_first_layer_takes_it_in_every_direction(kind: str, form: str) -> None:
    settings = FORMS[form]
    net = Speech(KINDS[kind](CHANNELS, HIDDEN, **settings))
    after, report = check(net, STEPS, ["bn"])
    assert report.verdicts[0].into == INTO[: 1 + bool(settings.get("bidirectional"))]
    changed = {n for n, t in net.rnn.state_dict().items() if not torch.equal(t, after.rnn.state_dict()[n])}
    ways = ("", "_reverse")[: len(report.verdicts[0].into)]
    assert changed == {f"{name}_ih_l0{way}" for name in ("weight", "bias") for way in ways}


@pytest.mark.parametrize("kind", KINDS)
def test_without_biases_the_scale_goes_and_the_shift_stays(kind: str) -> None:
    net = Speech(KINDS[kind](CHANNELS, HIDDEN, bias=False, bidirectional=True))
    check(net, STEPS, half=["bn"], because="its layer has no biases (bias=False)")


def test_without_a_batch_axis() -> None:
    net = Speech(nn.GRU(CHANNELS, HIDDEN), flat=True)
    check(net, torch.randn(6, CHANNELS), ["bn"])


def test_a_linear_layer_above_is_not_merged_with_the_input_weights() -> None:
    net = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.GRU(CHANNELS, HIDDEN))
    after, report = bnfold.fold(net.eval(), STEPS)
    assert not report.merges
    torch.testing.assert_close(after(STEPS)[0], net(STEPS)[0])


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_takes_it_as_a_linear_layer_does(kind: type[nn.Module]) -> None:
    net = nn.Sequential(nn.BatchNorm1d(CHANNELS), kind(CHANNELS, HIDDEN))
    check(net, torch.randn(6, CHANNELS), ["0"])


class Batches(Speech):
    """As in DeepSpeech2: the BatchNorm sees the padding, the layer does not."""

    sort = True

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        first = self.rnn.batch_first
        packed = pack_padded_sequence(self.norm(x), lengths, batch_first=first, enforce_sorted=self.sort)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=first)[0]


class Unsorted(Batches):
    sort = False


class OnData(Batches):
    """The BatchNorm of what is packed already."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths)
        packed = PackedSequence(self.bn(packed.data), packed.batch_sizes)
        return pad_packed_sequence(self.rnn(packed)[0])[0]


@pytest.mark.parametrize("way", [Batches, Unsorted, OnData])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: str, way: type[Batches]) -> None:
    net = way(KINDS[kind](CHANNELS, HIDDEN, bidirectional=True), flat=True)
    after, _ = check(net, (STEPS, torch.tensor([7, 4, 2])), ["bn"])
    lengths = torch.tensor([2, 5, 4, 1]) if way is Unsorted else torch.tensor([5, 4, 2, 1])
    agree(net, after, (torch.randn(5, 4, CHANNELS, dtype=torch.float64), lengths))


def test_packed_with_the_batch_first() -> None:
    net = Batches(nn.GRU(CHANNELS, HIDDEN, batch_first=True))
    check(net, (STEPS.transpose(0, 1).contiguous(), torch.tensor([7, 4, 2])), ["bn"])


def test_a_branch_beside_packed_sequences_is_one() -> None:
    class Branches(Batches):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            h = self.norm(x)
            if lengths.max() > 100:
                return h
            packed = pack_padded_sequence(h, lengths)
            return pad_packed_sequence(self.rnn(packed)[0])[0]

    check(
        Branches(nn.GRU(CHANNELS, HIDDEN)),
        (STEPS, torch.tensor([7, 4, 2])),
        kept=["bn"],
        because="a branch in Branches",
    )


def test_a_hook_on_a_layer_that_looks_at_numbers_keeps_it() -> None:
    def look(module: nn.Module, args: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> object:
        return (result[0] * args[0].sum(), *result[1:]) if result[0].sum() > 1000 else None

    net = Speech(nn.GRU(CHANNELS, HIDDEN))
    net.rnn.register_forward_hook(look)
    check(net, STEPS, kept=["bn"])


def test_a_hook_that_may_return_something_else_keeps_what_that_is_made_of() -> None:
    class Beside(Speech):
        def __init__(self) -> None:
            super().__init__(nn.GRU(HIDDEN, HIDDEN))
            self.linear, self.alive = nn.Linear(CHANNELS, HIDDEN), []
            self.rnn.register_forward_hook(self.look)

        def look(self, module: nn.Module, args: object, result: tuple[Tensor, Tensor]) -> object:
            return (self.alive[0], result[1]) if result[0].sum() > 1000 else None

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            self.alive = [h]
            y = self.rnn(self.linear(h))[0]
            self.alive = []
            return y

    check(Beside(), STEPS, kept=["bn"])


def test_a_forward_of_ones_own_that_branches_keeps_it() -> None:
    def run(rnn: nn.Module, x: Tensor) -> object:
        result = nn.GRU.forward(rnn, x)
        return (x, x) if result[0].sum() > 1000 else result

    net = Speech(nn.GRU(CHANNELS, HIDDEN))
    net.rnn.forward = MethodType(run, net.rnn)
    check(net, STEPS, kept=["bn"], because="a branch in")


# ---------------------------------------------------------------- sharing


class Called(nn.Module):
    """The function, on weights of one's own."""

    def __init__(self, *places: int) -> None:
        super().__init__()
        self.bn, self.places = nn.BatchNorm1d(CHANNELS), places
        shapes = [(CHANNELS, CHANNELS)] * 2 + [(CHANNELS,)] * 2
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(x.transpose(1, 2)).transpose(1, 2)
        params = [self.weights[place] for place in self.places]
        return torch.rnn_tanh(h, x.new_zeros(1, 3, CHANNELS), params, True, 1, 0.0, False, False, False)[0]


def test_weights_of_a_function() -> None:
    check(Called(0, 1, 2, 3), STEPS, ["bn"])


@pytest.mark.parametrize("places", [(0, 0, 2, 3), (0, 1, 2, 2)])
def test_an_input_weight_or_bias_that_is_also_that_of_the_state_stays(places: tuple[int, ...]) -> None:
    check(Called(*places), STEPS, kept=["bn"])


def test_input_weights_that_are_those_of_the_other_direction_stay() -> None:
    net = Speech(nn.GRU(CHANNELS, HIDDEN, bidirectional=True))
    net.rnn.weight_ih_l0_reverse = net.rnn.weight_ih_l0
    check(net, STEPS, kept=["bn"])


def test_a_layer_that_also_reads_something_else_stays() -> None:
    class Twice(Speech):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.rnn(self.norm(x))[0], self.rnn(x)[0]

    check(Twice(nn.GRU(CHANNELS, HIDDEN)), STEPS, kept=["bn"], because="its uses would have to differ")


@pytest.mark.parametrize("steps", [7, 1])
def test_a_state_that_is_made_of_the_same_value_or_is_that_value_stays(steps: int) -> None:
    class Started(Speech):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.rnn(h, h if steps == 1 else h[:1])[0]

    check(Started(nn.RNN(CHANNELS, CHANNELS)), STEPS[:steps], kept=["bn"])


def test_nothing_after_a_layer_goes_into_its_input_weights() -> None:
    class After(Speech):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.rnn(x)[0])

    check(After(nn.GRU(CHANNELS, CHANNELS)), STEPS, kept=["bn"], because="(gru) is not linear")


def test_a_weight_that_a_parametrization_computes_stays() -> None:
    net = Speech(nn.GRU(CHANNELS, HIDDEN))
    parametrizations.weight_norm(net.rnn, "weight_ih_l0")
    check(net, STEPS, kept=["bn"])


def test_a_recurrent_weight_that_a_parametrization_computes_is_in_nobodys_way() -> None:
    net = Speech(nn.GRU(CHANNELS, HIDDEN))
    parametrizations.weight_norm(net.rnn, "weight_hh_l0")
    check(net, STEPS, ["bn"])


# ---------------------------------------------------------------- what the module is afterwards


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_the_folded_module_is_scripted_and_copied_with_its_new_weights(inplace: bool) -> None:
    """These modules keep a list of their weights besides their parameters, which the compiler reads."""
    net = randomise(nn.Sequential(nn.BatchNorm1d(CHANNELS), nn.GRU(CHANNELS, HIDDEN)))
    rows, before = torch.randn(6, CHANNELS), list(net[1]._flat_weights)
    with torch.no_grad():
        wanted = net(rows)[0]
        after, _ = bnfold.fold(net, rows, inplace=inplace, verify=False)
        for module in (torch.jit.script(after), copy.deepcopy(after), after):
            torch.testing.assert_close(module(rows)[0], wanted)
    assert inplace or all(a is b for a, b in zip(before, net[1]._flat_weights, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", [False, True], ids=["in the model", "around the fold"])
def test_a_recurrent_layer_under_autocast_is_read_with_what_autocast_narrows(kind, around):
    class Narrowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.speech = nn.Linear(CHANNELS, CHANNELS), Speech(KINDS[kind](CHANNELS, HIDDEN))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(
                "cpu", torch.bfloat16, enabled=not around or torch.is_autocast_enabled("cpu")
            ):
                return self.speech(self.linear(x).relu())[0]

    model = randomise(Narrowed())
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        folded, report = bnfold.fold(model, STEPS)
        assert [verdict.into for verdict in report.verdicts] == [("speech.rnn.weight_ih_l0",)], str(report)
        assert folded(STEPS).dtype == model(STEPS).dtype == torch.bfloat16
        assert torch.allclose(folded(STEPS), model(STEPS), atol=0.05)
