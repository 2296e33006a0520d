"""Two finished models held against each other: of any kinds, on inputs that matter, by name of the worst."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bnfold
from bnfold import InputError, NotEquivalent, UnreadableModel, ascent, verification
from bnfold.checkpoint import Checkpoint, InputDomain, save
from bnfold.verification import open_side, verify_sides
from export.write import write
from tests.onnx_models import model, random

WIDTH = 32


def net() -> nn.Sequential:
    """A net in which every weight moves the output: no weight is small, and no bend is flat."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(0.3 * torch.where(torch.randn_like(parameter) < 0, -1.0, 1.0))
    return layers


def inputs(rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def as_onnx(module: nn.Module, batch: str | int = "N", names=("x", "y")) -> onnx.ModelProto:
    return write(module, inputs(2), batch, names)


def tamper(proto: onnx.ModelProto, place: int, at: int) -> onnx.ModelProto:
    """A copy with one number of one initializer off by a thousandth."""
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    tensor = copied.graph.initializer[place]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[at] *= 1.001
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return copied


def verify(before, after, given=None, **options) -> verification.Verification:
    return verify_sides(open_side(before), open_side(after), given, **options)


# ---------------------------------------------------------------- what is found


def test_every_number_of_a_module_that_is_off_by_a_thousandth_is_found():
    before = net()
    folded, _ = bnfold.fold(before, inputs())
    assert verify(before, folded, inputs()).equivalent
    for name, parameter in folded.named_parameters():
        for at in range(parameter.numel()):
            wrong = copy.deepcopy(folded)
            with torch.no_grad():
                wrong.get_parameter(name).view(-1)[at] *= 1.001
            found = verify(before, wrong, inputs())
            assert not found.equivalent, (name, at)


def test_every_number_of_a_file_that_is_off_by_a_thousandth_is_found():
    before = as_onnx(net())
    folded, _ = bnfold.fold(before)
    for place, tensor in enumerate(folded.graph.initializer):
        for at in range(int(np.prod(tensor.dims))):
            assert not verify(before, tamper(folded, place, at)).equivalent, (tensor.name, at)


class Rare(nn.Module):
    """Adds a branch that opens where all inputs conspire: 14 standard deviations off, and 4 in random corners."""

    def __init__(self, height: float):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rare, self.height = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1), height
        with torch.no_grad():
            self.rare.weight.copy_(torch.sign(torch.randn(1, WIDTH)))
            self.rare.bias.fill_(-80.0)

    def forward(self, x):
        return torch.tanh(self.first(x)) + self.height * torch.relu(self.rare(x))


def rare_file(height: float) -> onnx.ModelProto:
    text = f"""net (float[N,{WIDTH}] x) => (float[N,3] y) {{
        p = MatMul(x, w)
        h = Tanh(p)
        q = MatMul(x, d)
        m = Add(q, t)
        r = Relu(m)
        z = Mul(r, k)
        y = Add(h, z)
    }}"""
    tensors = {
        "w": random(3).standard_normal((WIDTH, 3)).astype(np.float32) / 4,
        "d": np.sign(random(4).standard_normal((WIDTH, 1))).astype(np.float32),
        "t": np.array([-45], np.float32),
        "k": np.array([height], np.float32),
    }
    return model(text, tensors)


@pytest.mark.parametrize("kind", ["modules", "files"])
def test_a_branch_that_opens_rarely_is_found_by_the_ascent_and_by_no_made_up_input(kind, monkeypatch):
    make = Rare if kind == "modules" else rare_file
    given = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(2)) if kind == "modules" else None
    found = verify(make(0.0), make(1.0), given)
    assert "scent step" in found.case.label
    assert found.case.label in found.failure
    assert found.worst.deviation > 0.1
    monkeypatch.setattr(verification, "climb", lambda *arguments: ([], []))
    assert verify(make(0.0), make(1.0), given).equivalent


def test_the_ascent_stays_within_the_range_of_what_was_tried():
    before, after, given = net(), net(), inputs()
    after[0].weight.data += 0.01
    sides = open_side(before), open_side(after)
    case = sides[0].read(given)[0]
    found, notes = ascent.climb(*sides, [case], lambda each: (sides[0].run(each), sides[1].run(each)))
    assert notes == []
    assert all(given.min() <= array.min() and array.max() <= given.max() for array in found[0].arrays)
    assert not np.array_equal(found[0].arrays[0], case.arrays[0])


def test_a_finite_domain_is_tried_whole_and_a_fault_in_its_last_corner_is_found(tmp_path):
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 4)).eval()
    save(tmp_path / "net.pt", Checkpoint(table, InputDomain((3,), "int64", 0, 5)))
    proto = write(table, torch.zeros(2, 3, dtype=torch.int64), 1, ("context", "logits"))
    onnx.save(proto, tmp_path / "net.onnx")
    found = verify(tmp_path / "net.pt", tmp_path / "net.onnx")
    assert found.equivalent
    assert [(item.inputs, item.exhaustive) for item in found.evidence] == [(125, True)] * 2
    assert found.tried == ("all 125 inputs",)
    place = next(i for i, tensor in enumerate(proto.graph.initializer) if list(tensor.dims) == [5, 2])
    onnx.save(tamper(proto, place, 9), tmp_path / "net.onnx")
    found = verify(tmp_path / "net.onnx", tmp_path / "net.pt")
    assert not found.equivalent
    assert 4 in table_row(found.worst.element[0])


def table_row(number: int) -> tuple[int, int, int]:
    """The three indices of an input of the domain, which runs the last one fastest."""
    return number // 25, number // 5 % 5, number % 5


# ---------------------------------------------------------------- of which kinds


def test_a_module_and_its_file_are_matched_by_order_where_names_differ():
    class Two(nn.Module):
        def forward(self, left, right):
            return left - right, left * right

    text = "net (float[N,3] p, float[N,3] q) => (float[N,3] u, float[N,3] v) { u = Sub(p, q) v = Mul(p, q) }"
    given = torch.ones(2, 3), torch.full((2, 3), 3.0)
    assert verify(Two(), model(text), given).equivalent
    assert verify(model(text), Two()).equivalent
    swapped = model(text.replace("Sub(p, q)", "Sub(q, p)"))
    found = verify(Two(), swapped, given)
    assert found.worst.output == "0"
    assert "output u[" in verify(swapped, Two(), given).failure


def test_arrays_by_name_are_for_modules_as_well():
    module, proto = net(), as_onnx(net(), names=("input", "y"))
    array = inputs().numpy()
    assert verify(module, proto, {"input": array}).tried[0] == "given 1"
    assert verify(module, proto, [{"input": array}, {"input": array + 1}]).tried[:2] == ("given 1", "given 2")
    assert verify(proto, as_onnx(net()), {"input": array.astype(np.float64)}).equivalent


def test_files_of_arrays_are_batches(tmp_path):
    for number in (1, 2):
        np.savez(tmp_path / f"{number}.npz", anything=inputs(number).numpy())
    paths = [tmp_path / "1.npz", tmp_path / "2.npz"]
    found = verify(net(), as_onnx(net()), paths)
    assert found.tried[:2] == ("given 1", "given 2")
    assert found.equivalent


def test_a_file_that_takes_a_fixed_number_of_examples_is_given_more_in_pieces():
    wrong = tamper(as_onnx(net(), batch=3), 0, 0)
    assert verify(net(), as_onnx(net(), batch=3), inputs(8)).equivalent
    found = verify(net(), wrong, inputs(8))
    assert not found.equivalent
    assert found.worst.element[0] < 8


def test_module_inputs_may_be_nested_and_hold_other_things():
    class Scaled(nn.Module):
        def forward(self, pair, *, scale=1.0):
            return {"sum": (pair[0] + pair[1]) * scale}

    given = (([inputs(2), inputs(3)[:2]],), {"scale": 2.0})
    assert verify(Scaled(), Scaled(), given).equivalent


def test_a_half_precision_copy_passes_with_a_tolerance_that_is_said_and_not_without():
    before = net()
    after = copy.deepcopy(before).half()
    found = verify(before, after, inputs())
    assert "the first is float32, the second float16: say with a tolerance" in found.failure
    passed = verify(before, after, inputs(), tolerance=1e-2)
    assert [item.source for item in passed.evidence] == ["the tolerance that was given"]
    assert 1e-6 < passed.evidence[0].deviation < 1e-2
    assert not verify(before, after, inputs(), tolerance=1e-6).equivalent


def test_bfloat16_modules_are_compared_on_inputs_that_bfloat16_holds():
    before = net().bfloat16()
    assert verify(before, copy.deepcopy(before), inputs().bfloat16()).equivalent


# ---------------------------------------------------------------- what cannot be compared


def test_a_second_model_that_does_not_run_is_no_equivalent_one():
    with pytest.raises(UnreadableModel, match="the second model does not run where the first does"):
        bnfold.verify(net(), nn.Linear(5, 2), inputs())
    with pytest.raises(UnreadableModel, match="takes 1 inputs"):
        bnfold.verify(nn.Bilinear(4, 4, 2), as_onnx(net()), (inputs(), inputs()))


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_that_holds_nothing_is_refused(tolerance):
    with pytest.raises(InputError, match="give a number of 0 or more"):
        bnfold.verify(net(), net(), inputs(), tolerance)


def test_modules_alone_need_inputs():
    with pytest.raises(InputError, match="give inputs"):
        bnfold.verify(net(), net())


def test_outputs_that_are_others_are_different():
    text = "net (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Relu(x) z = Abs(x) }"
    with pytest.raises(NotEquivalent, match="has outputs"):
        bnfold.verify(net(), model(text), inputs())
    wide = model("net (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    with pytest.raises(NotEquivalent, match=r"shapes \(8, 2\) and \(8, 4\)"):
        bnfold.verify(net(), wide, inputs())


# ---------------------------------------------------------------- what is told, and what is left alone


def test_the_worst_input_is_named_and_its_values_are_there_whether_it_is_within_the_bound_or_not():
    before = net()
    within = verify(before, bnfold.fold(before, inputs())[0], inputs())
    assert within.worst.deviation <= within.evidence[-1].bound
    after = copy.deepcopy(before)
    after[3].bias.data[1] += 0.5
    beyond = verify(before, after, inputs())
    with pytest.raises(NotEquivalent) as caught:
        beyond.raise_if_different()
    assert caught.value.worst == beyond.worst
    assert beyond.worst.element[1] == 1
    old, new = (float(value) for value in beyond.worst.values)
    assert new - old == pytest.approx(0.5)
    row = beyond.case.arrays[0][beyond.worst.element[0]]
    assert before(torch.from_numpy(row)[None])[0, 1].item() == pytest.approx(old)
    assert beyond.to_dict()["worst"]["kind"] == beyond.case.label


def test_what_is_no_number_is_different_and_its_record_is_json():
    after = net()
    after[0].bias.data[0] = float("nan")
    found = verify(net(), after, inputs(), locate=True)
    assert (found.worst.values[1], found.divergence.layer) == ("nan", "0")
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (record["worst"]["deviation"], record["divergence"]["deviation"]) == (None, None)


def test_verifying_changes_neither_models_nor_inputs_nor_random_states():
    before, after, given = net(), net(), inputs()
    after[3].bias.data += 1
    kept = copy.deepcopy((before.state_dict(), after.state_dict(), given))
    state = torch.get_rng_state()
    verify(before, after, given, locate=True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(not module._forward_hooks for each in (before, after) for module in each.modules())
    assert all(parameter.grad is None for parameter in before.parameters())
    for old, new in zip(kept, (before.state_dict(), after.state_dict(), given), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)
