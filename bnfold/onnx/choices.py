"""Let an ONNX model choose as another run of it did (see `bnfold.torch.choices`, which says why).

To record is to run a model with more outputs: what its choices give, and what they are made from. To follow is to run
one in which what a choice gave is an input; the choice is made all the same, under another name, to count how often it
falls otherwise, and the values of a TopK are gathered from the recorded places.

Not covered: choices in the bodies of If, Loop and Scan, which fall as they fall; a TopK before operator set 11.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from bnfold.errors import InputError
from bnfold.onnx.context import ImportContext
from bnfold.onnx.inputs import Feed
from bnfold.onnx.protos import FLOATS
from bnfold.onnx.run import Outputs

__all__ = ["Choices", "find_choices"]

_WHOLE = frozenset(
    {
        *(
            "ArgMax",
            "ArgMin",
            "TopK",
            "NonMaxSuppression",
            "NonZero",
            "Multinomial",
            "Cast",
            "QuantizeLinear",
        ),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf"),
    }
)
"""Operators that make whole numbers or truths of floats."""

_STEPS = frozenset({"Ceil", "Floor", "Hardmax", "Round", "Sign"})
"""Those that make floats of floats, and the same ones of nearly equal values."""

_OWN = "/chosen_here"
_HELD = "/held"


@dataclass(frozen=True)
class Choice:
    """A node that chooses: its operator, the value that is the choice, where it reads floats, its attributes."""

    op: str
    result: str
    places: tuple[int, ...]
    settings: frozenset[bytes] = frozenset()


@dataclass(frozen=True)
class Choices:
    """Those of a model's main graph."""

    made: tuple[Choice, ...]

    def __len__(self) -> int:
        return len(self.made)

    @property
    def results(self) -> tuple[str, ...]:
        """The values that are choices."""
        return tuple(choice.result for choice in self.made)

    def record(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of the model that gives its choices and what they are made from as well."""
        return _with_outputs(model, (*self.results, *self._grounds(model).values()))

    def feed(self, recorded: Outputs) -> Feed:
        """What a model that follows is fed besides its inputs."""
        return {name: recorded[name] for name in self.results}

    def follow(self, model: onnx.ModelProto, feed: Feed) -> onnx.ModelProto:
        """A copy of a model of the same choices in which those are inputs; it still gives those of its own.

        Raises:
            InputError: it makes others.
        """
        grounds = self._grounds(model).values()
        given = (*(name + _OWN for name in self.results), *grounds)
        led = _with_outputs(model, given, dropped=self.results)
        nodes = list(led.graph.node)
        del led.graph.node[:]
        for node in nodes:
            led.graph.node.extend(_led(node) if set(self.results).intersection(node.output) else [node])
        for name in self.results:
            kind = helper.np_dtype_to_tensor_dtype(feed[name].dtype)
            led.graph.input.append(helper.make_tensor_value_info(name, kind, [None] * feed[name].ndim))
        return led

    def tell(self, model: onnx.ModelProto, outputs: Outputs) -> Outputs:
        """What is compared of a run of a model made by `record` or `follow` of this one."""
        kept = {item.name for item in model.graph.output} - set(self.results)
        grounds = {title: outputs[value] for title, value in self._grounds(model).items()}
        return {**{name: outputs[name] for name in outputs if name in kept}, **grounds}

    def count_otherwise(self, outputs: Outputs, feed: Feed) -> int:
        """How many choices of a model that follows would have fallen otherwise."""
        return sum(not _equal(outputs[name + _OWN], feed[name]) for name in self.results)

    def _grounds(self, model: onnx.ModelProto) -> dict[str, str]:
        """The values that choices are made from, by what they are called in a comparison.

        Raises:
            InputError: the model makes other choices.
        """
        makers = {output: node for node in model.graph.node for output in node.output}
        stored = {tensor.name for tensor in model.graph.initializer}
        found = {}
        for choice in self.made:
            maker = makers.get(choice.result)
            if maker is None or (maker.op_type, _settings(maker)) != (choice.op, choice.settings):
                raise InputError(f"the model does not make the choice `{choice.result}`")
            if len(maker.input) <= max(choice.places):
                raise InputError(f"the model does not make the choice `{choice.result}`")
            for place in choice.places:
                name, title = (
                    maker.input[place],
                    f"<what {choice.op} `{choice.result}` is made from>[{place}]",
                )
                if name in makers or name in stored:
                    found[title] = name if name in makers else name + _HELD
        return found


def find_choices(model: onnx.ModelProto, context: ImportContext) -> Choices:
    """The choices of a model, functions aside."""
    return Choices(tuple(c for node in model.graph.node if (c := _choice(node, context)) is not None))


def _choice(node: onnx.NodeProto, context: ImportContext) -> Choice | None:
    if node.domain not in ("", "ai.onnx") or node.op_type not in _WHOLE | _STEPS:
        return None
    if node.op_type == "TopK" and context.opset < 11:
        return None
    result = node.output[-1]
    places = tuple(place for place, name in enumerate(node.input) if context.type(name) in FLOATS)
    numbers = node.op_type not in _STEPS and context.type(result) in FLOATS
    return (
        None if numbers or not places or not result else Choice(node.op_type, result, places, _settings(node))
    )


def _settings(node: onnx.NodeProto) -> frozenset[bytes]:
    return frozenset(item.SerializeToString() for item in node.attribute)


def _led(node: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
    """The choice under another name, and the values that stand at the places that are an input now."""
    own = onnx.NodeProto()
    own.CopyFrom(node)
    del own.output[:]
    own.output.extend(name and name + _OWN for name in node.output)
    yield own
    if node.op_type == "TopK" and node.output[0]:
        axis = next((item.i for item in node.attribute if item.name == "axis"), -1)
        yield helper.make_node("GatherElements", [node.input[0], node.output[1]], [node.output[0]], axis=axis)


def _with_outputs(
    model: onnx.ModelProto, more: Iterable[str], dropped: Sequence[str] = ()
) -> onnx.ModelProto:
    """A copy with more outputs, whose types nobody has to say, and without some; a stored tensor is given by a copy."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [item for item in model.graph.output if item.name not in dropped]
    names = dict.fromkeys(name for name in more if name not in {item.name for item in kept})
    del copy.graph.output[:]
    copy.graph.output.extend([*kept, *(onnx.ValueInfoProto(name=name) for name in names)])
    for name in names:
        if name.endswith(_HELD):
            copy.graph.node.append(helper.make_node("Identity", [name.removesuffix(_HELD)], [name]))
    return copy


def _equal(own: np.ndarray, recorded: np.ndarray) -> bool:
    return own.shape == recorded.shape and bool((own == recorded.astype(own.dtype)).all())
