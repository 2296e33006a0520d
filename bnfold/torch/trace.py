"""What one forward pass computed from what: its calls, the values between them, and whose code they stand in.

**Values.** A value is a tensor as it was when it was made. What is changed in place gets a new name; a tensor whose
memory was changed by way of another one (a view) is read by way of an opaque call that reads both. What is still alive
when the pass is over can be read by somebody, and counts as an output.

**Constants.** A call of a pure operator on constants (parameters, buffers, numbers) makes a constant, which
`constants.Evaluator` can compute again in float64.

`capture` makes these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.torch.aten import name_of
from bnfold.torch.tensors import Slot

__all__ = ["Call", "Frame", "Like", "Slot", "Trace", "Value"]


@dataclass(frozen=True, slots=True)
class Like:
    """Stands in a call's arguments for a tensor of which only the shape and dtype are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(eq=False, slots=True)
class Value:
    """A tensor as it was when it was made.

    Attributes:
        shape, dtype: of the tensor.
        call: who made it; None for an input, a slot, or a tensor from outside of what was recorded.
        slots: the places that hold it, for a parameter, buffer or attribute; its numbers are in `tensor`.
        constant: whether its numbers can be computed again from slots and numbers.
        data: whether its numbers may depend on the inputs.
        name: of a value that somebody computes or gives; unique.
        frame: the module call in whose own code it was made.
        memory: a number for the memory that it lies in; two values of one number may change together.
        sized: the axes that may be as long as some numbers say.
        loose: whether it may have as many axes as some numbers say.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    call: Call | None = None
    slots: tuple[Slot, ...] = ()
    tensor: Tensor | None = None
    constant: bool = False
    data: bool = True
    name: str = ""
    frame: Frame | None = None
    memory: int = 0
    sized: range = range(0)
    loose: bool = False

    @property
    def rank(self) -> int:
        """How many axes it has."""
        return len(self.shape)


@dataclass(eq=False, slots=True)
class Frame:
    """One call of a module.

    Attributes:
        module: the module itself; None for the frame around the model.
        path: its qualified name, None where the model does not hold it.
        parent: the call in whose code this one stands.
        given, made: the values among its arguments and results.
        start, stop: the calls made while it ran.
        data_dependent: whether a number left the tensors while it ran.
        plain: whether it was given one tensor and nothing else, and returned one tensor.
        assigns: whether an attribute of a module was set while it ran, but to a tensor.
    """

    module: nn.Module | None
    path: str | None
    parent: Frame | None
    start: int = 0
    stop: int = 0
    given: tuple[Value, ...] = ()
    made: tuple[Value, ...] = ()
    data_dependent: bool = False
    plain: bool = False
    assigns: bool = False

    def line(self) -> Iterator[Frame]:
        """This frame and those around it, from the inside."""
        frame: Frame | None = self
        while frame is not None:
            yield frame
            frame = frame.parent


@dataclass(eq=False, slots=True)
class Call:
    """One call: `args` and `kwargs` with `Value` in the place of each tensor.

    Attributes:
        index: its place among the calls of the pass.
        function: the operator; a string for what is none: "If" for a branch, "Hook" for whoever looks at a module,
            "Alias" and "Outside" for tensors that nobody saw being made, or what reaches memory by itself ("numpy").
        args, kwargs: by place and by name, as the operator's schema has them.
        reads: every value that it read, each once.
        made: the values of the tensors that it returned, in order.
        changed: pairs of values, before and after, of what it changed in place.
        written: stand for the memory that it changed, where somebody reads that by way of another tensor.
        frame: the module call in whose code it stands.
        constant: whether what it makes can be computed again from slots and numbers.
    """

    index: int
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frame: Frame
    reads: dict[int, Value] = field(default_factory=dict)
    made: list[Value] = field(default_factory=list)
    changed: list[tuple[Value, Value]] = field(default_factory=list)
    written: list[Value] = field(default_factory=list)
    constant: bool = False

    @property
    def label(self) -> str:
        """What was called, in one word."""
        return name_of(self.function)


@dataclass(eq=False)
class Trace:
    """One forward pass.

    Attributes:
        calls: in order.
        frames: module calls, in the order in which they ended (inner ones first).
        inputs: the values that the caller gave, by path.
        outputs: the values that the caller gets, by path, or that stayed alive.
        slots: every tensor that the model holds, by identity.
        changed_slots: tensors of the model that the pass changed in place, by identity.
        escaped: `(module path, attribute)` of tensors that were fetched from outside of their module's own call.
        fake: whether it ran without numbers.
        data_dependent: whether numbers that depend on the inputs left the tensors.
        nondeterministic: what was known before of code that does not always run alike.
        differentiates: whether the model was known to differentiate by itself.
        draws: whether the pass drew from a global random state.
        words: what the caller gets besides numbers (see `tensors.words`); unknown where numbers left the tensors.
        holders: attributes of modules that hold computed values when it is over, by the name of the value.
        asked: whether something depended on numbers that depend on the inputs: code, a size, what is no operator.
        measured: the module calls in whose code the size or type of a value was asked for, by the name of the value.
    """

    calls: list[Call]
    frames: list[Frame]
    inputs: dict[str, Value]
    outputs: dict[str, Value]
    slots: dict[int, Value]
    changed_slots: set[int]
    escaped: dict[tuple[str, str], str]
    fake: bool
    data_dependent: bool
    nondeterministic: frozenset[str] = frozenset()
    differentiates: bool = False
    draws: bool = False
    words: tuple[Any, ...] = ()
    measured: dict[str, list[Frame]] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)
    asked: bool = False
