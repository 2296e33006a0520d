"""Each private part of torch that `internals` names does what we take it to do; a failure says which has changed."""

from __future__ import annotations

import ast
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bnfold.torch
from bnfold.torch import internals
from bnfold.torch.aten import is_composite, is_metadata, name_of
from bnfold.torch.internals import (
    BelowAutograd,
    autocast_devices,
    is_fake,
    make_fake_mode,
    with_autocast,
    without_dispatch,
    without_functions,
)

ATEN = torch.ops.aten


class Operators(TorchDispatchMode):
    """Keeps the operators that it sees, with what they were given."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __init__(self):
        super().__init__()
        self.seen, self.given = [], []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append(name_of(operator))
        self.given.append(args)
        return operator(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Keeps the functions that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def seen_below(run, differentiates=False):
    with torch.no_grad(), Operators() as mode, BelowAutograd(differentiates) as below:
        below.settle()
        run(below)
    return mode


# ---------------------------------------------------------------- dispatch


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("conv2d", lambda x: nn.Conv2d(3, 4, 1).eval()(x)),
        ("linear", lambda x: nn.Linear(5, 2)(x)),
        ("batch_norm", lambda x: nn.BatchNorm2d(3).eval()(x)),
        ("pad", lambda x: nn.functional.pad(x, (1, 1, 1, 1), "reflect")),
        ("dropout", lambda x: nn.functional.dropout(x, training=False)),
    ],
)
def test_below_autograd_composite_operators_are_whole(name, run):
    x = torch.randn(2, 3, 5, 5)
    assert seen_below(lambda _: run(x)).seen[-1] == name


def test_below_autograd_a_parameter_is_the_object_that_the_module_holds():
    conv = nn.Conv2d(3, 4, 1)
    mode = seen_below(lambda _: conv(torch.randn(1, 3, 2, 2)))
    assert any(thing is conv.weight for thing in mode.given[-1])


def test_a_view_that_a_mode_returns_is_the_object_that_the_caller_gets():
    kept = []

    class Mode(Operators):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            kept.append((weakref.ref(result), id(result)))
            return result

    base = torch.randn(4)
    with torch.no_grad(), Mode(), BelowAutograd(False) as below:
        below.settle()
        view = base.view(2, 2)
    assert kept[-1][0]() is view
    assert kept[-1][1] == id(view)
    assert view._base is base


def test_gradients_flow_again_while_a_model_differentiates():
    x = torch.randn(1, 3, 2, 2)
    conv = nn.Conv2d(3, 4, 1)

    def run(below):
        with torch.enable_grad():
            below.settle()
            inner = x.clone().requires_grad_()
            assert torch.autograd.grad(conv(inner).sum(), inner)[0].shape == x.shape
        below.settle()
        conv(x)

    seen = seen_below(run, differentiates=True).seen
    assert "convolution" in seen
    assert seen[-1] == "conv2d"


def test_the_setting_of_gradients_and_dual_numbers_pass_by_a_function_mode():
    x = torch.ones(2)
    with Functions() as mode:
        with torch.enable_grad():
            pass
        with torch.autograd.forward_ad.dual_level():
            torch._VF._make_dual(x, x, level=0)
    assert torch._C._set_grad_enabled in mode.seen
    assert torch._VF._make_dual in mode.seen


def test_what_is_asked_without_functions_is_not_seen_by_a_function_mode():
    x = torch.ones(2)
    with Functions() as mode, without_functions():
        x.untyped_storage()
    assert mode.seen == []


def test_memory_that_is_asked_for_without_dispatch_is_not_seen_by_a_dispatch_mode():
    x = torch.ones(2)
    with Operators() as mode:
        with without_dispatch():
            x.new_empty((3,))
        x.new_empty((3,))
    assert mode.seen == ["new_empty"]


def test_the_parts_of_a_composite_operator_pass_by_the_mode_that_takes_it_apart():
    class Mode(Operators):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if is_composite(operator):
                with self:
                    return operator.decompose(*args, **(kwargs or {}))
            return super().__torch_dispatch__(operator, types, args, kwargs)

    x = torch.randn(2, 3, 4)
    with torch.no_grad(), Mode() as mode, BelowAutograd(False) as below:
        below.settle()
        torch.movedim(x, 0, 2)
    assert mode.seen == ["permute"]


def test_composite_is_what_has_a_kernel_for_every_device():
    assert is_composite(ATEN.conv2d.default)
    assert is_composite(ATEN.dropout.default)
    assert not is_composite(ATEN.convolution.default)
    assert not is_composite(ATEN.add.Tensor)


def test_autocast_casts_before_a_mode_sees_the_operator_and_is_off_inside_the_mode():
    found = []

    class Mode(Operators):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            found.append((name_of(operator), args[0].dtype, autocast_devices()))
            return operator(*args, **(kwargs or {}))

    x, weight = torch.randn(1, 3, 2, 2), torch.randn(4, 3, 1, 1)
    with torch.no_grad(), Mode(), torch.autocast("cpu", dtype=torch.bfloat16), BelowAutograd(False) as below:
        below.settle()
        nn.functional.conv2d(x, weight)
        assert autocast_devices() == ("cpu",)
    assert autocast_devices() == ()
    assert found[-1] == ("conv2d", torch.bfloat16, ())
    assert [name for name, *_ in found] == ["to", "to", "conv2d"]


def test_inside_a_mode_autocast_can_be_switched_on_again_for_what_it_does_not_wrap():
    x = torch.randn(2, 2)
    dtypes = {}

    class Mode(Operators):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            with with_autocast(("cpu",), operator.name()):
                result = operator(*args, **(kwargs or {}))
            assert autocast_devices() == ()
            dtypes[name_of(operator)] = result.dtype
            return result

    with torch.no_grad(), Mode(), torch.autocast("cpu", dtype=torch.bfloat16), BelowAutograd(False) as below:
        below.settle()
        torch.einsum("ij,jk->ik", x, x)
        nn.functional.linear(x, x)
    assert dtypes["einsum"] == dtypes["linear"] == torch.bfloat16


def test_what_an_operator_says_of_itself():
    operator = ATEN.add_.Tensor
    assert isinstance(operator, OpOverload)
    assert (operator.namespace, operator.overloadpacket) == ("aten", ATEN.add_)
    first, *_, alpha = operator._schema.arguments
    assert operator._schema.is_mutable
    assert first.alias_info.is_write
    assert (alpha.name, alpha.default_value) == ("alpha", 1)
    assert [each.is_out for each in ATEN.add.out._schema.arguments] == [False, False, False, True]
    assert str(operator._schema.returns[0].type) == "Tensor"


def test_tags_say_what_gives_numbers_away_and_what_is_drawn_by_lot():
    assert torch.Tag.data_dependent_output in ATEN._local_scalar_dense.default.tags
    assert torch.Tag.data_dependent_output in ATEN.equal.default.tags
    assert torch.Tag.dynamic_output_shape in ATEN.nonzero.default.tags
    assert torch.Tag.nondeterministic_seeded in ATEN.bernoulli_.float.tags


def test_every_operator_that_makes_no_tensor_and_has_no_tag_tells_of_shapes_and_layouts_alone():
    known = """_fused_sdp_choice _has_compatible_shallow_copy_type _has_same_storage_numel dense_dim device is_coalesced
        is_pinned is_same_size is_set_to is_vulkan_available layout sparse_dim sym_is_contiguous sym_numel sym_size
        sym_storage_offset sym_stride""".split()  # noqa: SIM905
    overloads = (
        getattr(p, name) for each in dir(ATEN) if (p := getattr(ATEN, each)) for name in _overloads(p)
    )
    takes_tensors = (o for o in overloads if any("Tensor" in str(a.type) for a in o._schema.arguments))
    assert {name_of(o) for o in takes_tensors if _dispatches(o) and is_metadata(o)} <= set(known)


def _overloads(packet):
    return packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ()


def _dispatches(operator):
    """Whether the dispatcher has it at all; some are there for scripted code alone."""
    try:
        return is_composite(operator) is not None
    except RuntimeError:
        return False


def test_a_fake_tensor_has_a_shape_and_no_numbers():
    mode = make_fake_mode()
    fake = mode.from_tensor(torch.ones(2, 3))
    assert is_fake(fake)
    assert not is_fake(torch.ones(2))
    with mode:
        assert is_fake(fake + torch.ones(3))


def test_two_tensors_in_one_memory_have_one_storage():
    x = torch.ones(4)
    one, other = (StorageWeakRef(t.untyped_storage()) for t in (x, x.view(2, 2)))
    assert one.cdata == other.cdata
    assert StorageWeakRef(torch.ones(4).untyped_storage()).cdata != one.cdata


def test_a_class_with_a_dispatch_of_its_own_shows_it():
    class Own(Tensor):
        @classmethod
        def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
            return NotImplemented

    assert nn.Parameter.__torch_dispatch__ is Tensor.__torch_dispatch__
    assert Own.__torch_dispatch__ is not Tensor.__torch_dispatch__


# ---------------------------------------------------------------- modules and trees


def test_what_a_module_holds_and_who_watches_it():
    norm = nn.BatchNorm2d(3)
    assert list(norm._parameters) == ["weight", "bias"]
    assert list(norm._buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert list(nn.Sequential(norm)._modules) == ["0"]
    norm.register_forward_hook(print)
    norm.register_forward_pre_hook(print)
    assert list(norm._forward_hooks.values()) == list(norm._forward_pre_hooks.values()) == [print]
    assert not norm._state_dict_hooks
    assert not norm._load_state_dict_pre_hooks
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_calls_and_fetches_pass_by_the_class_of_all_modules(monkeypatch):
    seen = []
    call, fetch = nn.Module.__call__, nn.Module.__getattr__
    monkeypatch.setattr(nn.Module, "__call__", lambda m, *a: seen.append("call") or call(m, *a))
    monkeypatch.setattr(nn.Module, "__getattr__", lambda m, name: seen.append(name) or fetch(m, name))
    linear = nn.Linear(2, 2)
    seen.clear()
    linear(torch.ones(2))
    assert seen == ["call", "weight", "bias"]


def test_the_classes_that_layers_are_made_of():
    assert issubclass(nn.SyncBatchNorm, nn.modules.batchnorm._BatchNorm)
    assert issubclass(nn.Conv1d, nn.modules.conv._ConvNd)
    assert issubclass(nn.ConvTranspose1d, nn.modules.conv._ConvTransposeNd)


def test_a_hook_of_pruning_knows_the_name_of_its_tensor():
    linear = prune.l1_unstructured(nn.Linear(2, 2), "weight", 1)
    (hook,) = linear._forward_pre_hooks.values()
    assert hook._tensor_name == "weight"


def test_trees_of_tensors():
    tree = torch.utils._pytree
    thing = {"a": [torch.ones(2), 3]}
    assert tree.tree_map_only(Tensor, lambda t: t.shape, thing) == {"a": [(2,), 3]}
    assert tree.tree_unflatten([1, 2], tree.tree_structure({"a": [0, 0]})) == {"a": [1, 2]}


def test_the_deserialiser_of_exported_programs():
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass

    assert {"graph_module", "opset_version", "schema_version"} <= set(schema.ExportedProgram.__annotations__)
    assert callable(ExportedProgramDeserializer.deserialize)
    assert callable(_dict_to_dataclass)


# ---------------------------------------------------------------- and no other


def private_names(path):
    """Every name that starts with an underscore and is no name of ours, as far as the text tells."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    ours |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    ours |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _is_self(n.value)}
    modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    found = {part for module in modules for part in module.split(".")}
    found |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return {name for name in found - ours if re.fullmatch(r"_[A-Za-z]\w*", name)}


def _is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_no_private_part_of_torch_is_used_that_is_not_named():
    files = sorted(Path(bnfold.torch.__file__).parent.glob("*.py"))
    used = {name: path.name for path in files for name in private_names(path)}
    named = set(re.findall(r"\b_[A-Za-z]\w*", internals.__doc__))
    assert {name: where for name, where in used.items() if name not in named} == {"_fields": "tensors.py"}
