"""What a capture gives for each kind of call: calls, values, memory, constants, branches, frames."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnfold.torch.aten import is_pure, name_of
from bnfold.torch.capture import capture
from bnfold.torch.lower import LOWERINGS
from bnfold.torch.modes import KEPT
from bnfold.torch.modules import TAILS
from bnfold.torch.recorder import Differentiates

ROWS = torch.randn(2, 3)
IMAGES = torch.randn(2, 3, 4, 4)


class Net(nn.Module):
    """A convolution, a buffer, an inner module, and a forward that a test gives."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)
        self.inner = nn.Sequential(nn.ReLU(), nn.Sigmoid())
        self.register_buffer("scale", torch.ones(3))
        self.run = forward

    def forward(self, *args):
        return self.run(self, *args)


def traced(forward, *inputs, **options):
    return capture(Net(forward).eval(), inputs or (ROWS,), {}, **options)


def labels(trace):
    return [call.label for call in trace.calls]


def names(values):
    return [value.name for value in values]


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize(
    "spelled",
    [
        lambda x: x + 1,
        lambda x: 1 + x,
        lambda x: torch.add(x, 1),
        lambda x: x.clone().add_(1),
        lambda x: x.clone().__iadd__(1),
        lambda x: torch.ops.aten.add.Tensor(x, 1),
    ],
)
def test_every_spelling_of_a_sum_is_one_operator(spelled):
    assert labels(traced(lambda net, x: spelled(x)))[-1] == "add"


def test_a_composite_operator_with_a_lowering_is_one_call():
    trace = traced(lambda net, x: net.conv(x), IMAGES)
    (call,) = trace.calls
    assert call.label == "conv2d"
    assert names(call.reads.values()) == ["input", "conv.weight", "conv.bias"]
    assert call.args[1].tensor is trace.slots[id(call.args[1].tensor)].tensor
    assert names(call.made) == names(trace.outputs.values())


def test_a_composite_operator_without_a_lowering_is_its_parts():
    assert labels(traced(lambda net, x: torch.hstack([x, x]))) == ["cat"]
    assert labels(traced(lambda net, x: x.movedim(0, 1))) == ["permute"]
    assert labels(traced(lambda net, x: x[:, 1:, None])) == ["slice", "unsqueeze"]


def test_an_operator_with_other_parts_where_a_size_is_one_is_whole():
    for rows in (1, 2):
        assert (
            labels(traced(lambda net, x: torch.einsum("ij,jk->ik", x, x.T), torch.ones(rows, 3)))[-1]
            == "einsum"
        )


def test_what_can_stand_for_a_tail_is_never_taken_apart():
    assert TAILS.keys() <= KEPT
    assert LOWERINGS.keys() <= KEPT
    assert labels(traced(lambda net, x: F.selu(F.relu6(x)))) == ["relu6", "selu"]


def test_an_operator_of_somebody_else_has_its_namespace():
    @torch.library.custom_op("bnfoldtest::relu", mutates_args=())
    def relu(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    assert labels(traced(lambda net, x: relu(x))) == ["bnfoldtest.relu"]
    assert not is_pure(torch.ops.bnfoldtest.relu.default)


def test_what_is_asked_about_a_shape_is_no_call():
    trace = traced(
        lambda net, x: (x.size(0), x.shape, x.dim(), len(x), x.stride(), x.is_contiguous(), x.dtype)[0]
    )
    assert trace.calls == []
    assert not trace.data_dependent


def test_of_what_a_new_tensor_is_like_only_the_shape_is_read():
    trace = traced(lambda net, x: torch.zeros_like(x) + x.new_ones(3))
    assert [names(call.reads.values()) for call in trace.calls[:2]] == [[], []]
    assert trace.calls[0].args[0].shape == (2, 3)


# ---------------------------------------------------------------- values and memory


def test_a_value_that_is_changed_in_place_has_a_new_name():
    def forward(net, x):
        y = x * 2
        y.add_(1)
        return y

    mul, add = traced(forward).calls
    ((before, after),) = add.changed
    assert before is mul.made[0]
    assert after is add.made[0]
    assert before.memory == after.memory == add.written[0].memory


def test_a_tensor_whose_memory_was_changed_through_a_view_is_another_value():
    def forward(net, x):
        y = x * 2
        y[0].zero_()
        return y + 1

    trace = traced(forward)
    assert labels(trace) == ["mul", "select", "zero", "Alias", "add"]
    mul, _, zero, alias, add = trace.calls
    assert {mul.made[0].name, zero.written[0].name} <= set(names(alias.reads.values()))
    assert names(add.reads.values()) == names(alias.made)


def test_a_view_lies_in_the_memory_of_what_it_views_and_a_copy_does_not():
    view, clone = traced(lambda net, x: (x.view(3, 2), x.clone())).calls
    assert view.made[0].memory == view.args[0].memory
    assert clone.made[0].memory != view.args[0].memory


def test_what_a_pass_changes_of_the_model_and_of_its_inputs_is_put_back_and_noted():
    net, x = Net(lambda net, x: x.add_(net.scale.mul_(3))), torch.ones(2, 3)
    trace = capture(net, (x,), {})
    assert trace.changed_slots == {id(net.scale)}
    assert torch.equal(net.scale, torch.ones(3))
    assert torch.equal(x, torch.ones(2, 3))


def test_a_parameter_that_is_given_another_memory_counts_as_changed():
    def forward(net, x):
        net.linear.weight.data = net.linear.weight.data * 2
        return net.linear(x)

    net = Net(forward)
    assert capture(net, (ROWS,), {}).changed_slots >= {id(net.linear.weight)}


def test_a_tensor_from_nowhere_is_an_opaque_value():
    outside = torch.ones(3)
    first, _ = traced(lambda net, x: x + outside).calls
    assert (first.label, first.made[0].data, first.made[0].constant) == ("Outside", True, False)


def test_what_stays_alive_is_an_output():
    kept = []
    trace = traced(lambda net, x: kept.append(x * 2) or x + 1)
    assert list(trace.outputs) == ["", f"kept alive {trace.calls[0].made[0].name}"]


def test_what_a_container_from_before_keeps_is_an_output_though_another_output_is_a_view_of_it():
    """With the heap frozen, too, where no search for those who hold a tensor finds the container."""

    def forward(net, x):
        kept.append(net.conv(x))
        return kept[-1].view(2, -1)

    kept = []
    gc.freeze()
    trace = traced(forward, IMAGES)
    assert list(trace.outputs) == ["", f"kept alive {trace.calls[0].made[0].name}"]


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
def test_what_nobody_holds_but_a_view_of_it_is_no_output(mode):
    with mode():
        assert list(traced(lambda net, x: net.conv(x).view(2, -1), IMAGES).outputs) == [""]


def test_memory_is_searched_for_garbage_only_where_something_else_than_the_models_own_is_alive(monkeypatch):
    """A search takes as long as there are objects in the process."""
    searches, kept = [], []
    monkeypatch.setattr("bnfold.torch.capture.gc.collect", lambda: searches.append(True))
    trace = traced(lambda net, x: x.add_(net.scale.mul_(3)), ROWS.clone())
    assert any(name.startswith("kept alive") for name in trace.outputs)
    assert not searches
    traced(lambda net, x: kept.append(x * 2) or x + 1)
    assert searches


# ---------------------------------------------------------------- constants


def test_pure_operators_on_what_the_model_holds_make_constants():
    trace = traced(lambda net, x: x * (net.scale.double() + torch.tensor([1.0, 2, 3])).view(1, 3))
    assert {call.label for call in trace.calls if call.constant} == {"_to_copy", "add", "view"}
    assert [call.label for call in trace.calls if not call.constant] == ["mul"]


@pytest.mark.parametrize(
    "impure",
    [
        lambda net: torch.rand(3),
        lambda net: F.dropout(net.scale, 0.5, True),
        lambda net: torch.bernoulli(net.scale),
        lambda net: torch.empty(3),
        lambda net: net.scale.clone().add_(1),
        lambda net: net.scale.nonzero(),
    ],
)
def test_lots_memory_that_nobody_has_set_and_changes_make_no_constants(impure):
    made = traced(lambda net, x: impure(net)).calls[-1]
    assert not made.constant
    assert not any(value.constant for value in made.made)


def test_a_number_of_a_parameter_that_leaves_is_no_constant_but_a_reading():
    calls = traced(lambda net, x: x * net.scale.sum().item()).calls
    item = next(call for call in calls if call.label == "_local_scalar_dense")
    assert not item.constant


def test_a_literal_that_may_be_made_of_the_inputs_is_no_constant():
    calls = traced(lambda net, x: x * torch.tensor(x.sum().item())).calls
    (read,) = [value for value in calls[-1].reads.values() if value.name != "input"]
    assert (read.constant, read.data) == (False, True)


# ---------------------------------------------------------------- branches


@pytest.mark.parametrize(
    "tell",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.nonzero().shape,
        lambda x: len(x[x > 0]),
        lambda x: (x[x > 0] * 2).numel(),
        lambda x: x.unique().size(0),
        lambda x: list(x[x[:, 0] > 0]),
        lambda x: x[x[:, 0] > 0].split(1),
        lambda x: torch.zeros_like(x.masked_select(x > 0)),
        lambda x: x.nonzero().stride(),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x.untyped_storage(),
        lambda x: float(x.max()),
        lambda x: 3 in x,
    ],
)
def test_where_numbers_leave_what_is_alive_is_read(tell):
    def forward(net, x):
        y = x * 2
        tell(x)
        return y

    trace = traced(forward)
    assert trace.data_dependent
    branch = next(call for call in trace.calls if call.label == "If")
    assert trace.calls[0].made[0].name in names(branch.reads.values())


@pytest.mark.parametrize(
    "select",
    [
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0].dim(),
        lambda x: x[x > 0].sum().shape,
        lambda x: x.masked_select(x > 0) + 1,
        lambda x: x.unique(),
        lambda x: torch.bincount((x[:, 0] > 0).long()),
        lambda x: x.repeat_interleave((x[:, 0] > 0).long(), 0),
    ],
)
def test_a_size_that_numbers_decide_is_no_branch_while_nobody_asks_for_it(select):
    def forward(net, x):
        y = x * 2
        select(x)
        return y

    trace = traced(forward)
    assert not trace.data_dependent
    assert "If" not in labels(trace)


@pytest.mark.parametrize("tell", [lambda net: net.scale.sum().item(), lambda net: bool(net.scale.any())])
def test_numbers_of_the_model_are_no_branch(tell):
    assert not traced(lambda net, x: tell(net) and x).data_dependent


def test_a_copy_that_no_operator_makes_reads_what_it_copies():
    trace = traced(lambda net, x: copy.deepcopy(x * 2) + 1)
    assert labels(trace) == ["mul", "deepcopy", "add"]
    assert names(trace.calls[1].reads.values()) == names(trace.calls[0].made)
    assert not trace.data_dependent


# ---------------------------------------------------------------- frames


def test_a_frame_knows_its_calls_and_what_went_in_and_out():
    trace = traced(lambda net, x: net.inner(net.linear(x)))
    assert [frame.path for frame in trace.frames] == ["linear", "inner.0", "inner.1", "inner", ""]
    frames = {frame.path: frame for frame in trace.frames}
    assert [(f.start, f.stop) for f in trace.frames] == [(0, 1), (1, 2), (2, 3), (1, 3), (0, 3)]
    assert frames["inner"].given == frames["linear"].made
    assert frames["inner.1"].parent is frames["inner"]
    assert all(frame.plain for frame in trace.frames)


def test_a_hook_reads_what_it_is_shown():
    net = Net(lambda net, x: net.linear(x))
    net.linear.register_forward_hook(lambda *_: None)
    linear, hook = capture(net, (ROWS,), {}).calls
    assert hook.label == "Hook"
    assert names(hook.reads.values()) == ["input", linear.made[0].name]


def test_an_error_carries_the_path_of_the_module_in_whose_code_it_was_raised():
    net = Net(lambda net, x: net.inner(x))
    net.inner[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        capture(net, (ROWS,), {})
    assert caught.value.bnfold_frame == "inner.1"


def test_a_tensor_that_other_code_fetches_from_a_module_is_borrowed():
    assert traced(lambda net, x: F.linear(x, net.linear.weight)).escaped == {("linear", "weight"): ""}
    assert traced(lambda net, x: net.linear(x)).escaped == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_compiled_code_is_one_call_that_reads_and_changes_what_its_operators_do():
    class Code(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x.add_(1) * self.weight

    code = torch.jit.script(Code())
    mul, call = traced(lambda net, x: code(x * 2)).calls
    assert call.label == "ScriptModule"
    assert call.changed[0][0] is mul.made[0]


# ---------------------------------------------------------------- what torch does around operators


def test_a_cast_of_autocast_stands_for_what_was_cast():
    def forward(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net.linear(x)

    (call,) = traced(forward).calls
    assert names(call.reads.values()) == ["input", "linear.weight", "linear.bias"]
    assert call.made[0].dtype == torch.bfloat16


def test_a_cast_that_the_model_makes_under_autocast_is_a_call():
    def forward(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net.linear(x.bfloat16()), x.to(torch.float64), x.half()

    assert labels(traced(forward)) == ["_to_copy", "linear", "_to_copy", "_to_copy"]


def test_under_autocast_a_value_has_the_type_that_it_has_without_capture():
    def forward(net, x):
        y = net.linear(x)
        return torch.einsum("ij,jk->ik", y, net.linear.weight), F.relu(y)

    net = Net(forward)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        plain = [tensor.dtype for tensor in net(ROWS)]
        assert [value.dtype for value in capture(net, (ROWS,), {}).outputs.values()] == plain


def test_weights_that_autocast_keeps_are_not_kept_alive_by_the_model():
    net = Net(lambda net, x: net.linear(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert list(capture(net, (ROWS,), {}).outputs) == [""]


def gradient(net, x):
    with torch.enable_grad():
        inner = x.clone().requires_grad_()
        return torch.autograd.grad(net.linear(inner).pow(2).sum(), inner)[0]


def backward(net, x):
    with torch.enable_grad():
        inner = x.clone().requires_grad_()
        net.linear(inner).sum().backward()
    return inner.grad


def asked(net, x):
    with torch.enable_grad():
        return x * 2 if net.linear(x).requires_grad else x


def swallowed(net, x):
    try:
        return gradient(net, x)
    except RuntimeError:
        return x


@pytest.mark.parametrize("forward", [gradient, backward, asked, swallowed])
def test_a_model_that_differentiates_asks_for_another_pass_and_is_followed_in_it(forward):
    with pytest.raises(Differentiates):
        traced(forward)
    trace = traced(forward, differentiates=True)
    assert trace.differentiates
    assert any("linear.weight" in names(call.reads.values()) for call in trace.calls)


def test_gradients_that_are_switched_on_and_not_used_change_nothing():
    def forward(net, x):
        with torch.enable_grad():
            return net.conv(x).detach()

    assert labels(traced(forward, IMAGES)) == ["conv2d", "detach"]


def test_without_numbers_the_same_calls_are_made():
    def forward(net, x):
        return net.inner(net.conv(x)) * torch.tensor([2.0])

    assert labels(traced(forward, IMAGES, fake=True)) == labels(traced(forward, IMAGES))


def test_a_capture_leaves_modules_gradients_and_dispatch_as_they_were():
    call, fetch = nn.Module.__call__, nn.Module.__getattr__
    net = Net(lambda net, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture(net, (ROWS,), {})
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, fetch)
    assert torch.is_grad_enabled()
    assert net.linear(ROWS).grad_fn is not None


def test_a_name_has_no_mark_of_the_form_in_place():
    assert name_of(torch.ops.aten.add_.Tensor) == name_of(torch.ops.aten.add.Tensor) == "add"
    assert name_of(torch.ops.aten.__and__.Tensor) == "__and__"
