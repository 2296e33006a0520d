"""Why a BatchNorm stays: everything that a verdict can say about it, each with its way out, in one table.

A `Reason` is a sentence, or a clause of one, with open places. Whoever refuses takes one from here and fills it in:

    raise Refuse(reasons.NO_SHIFT(node=node))

So no reason is without a way out, and `docs/why.md`, which `docs/write_why.py` writes, has them all. Tests ask that no
module which decides about BatchNorms words a reason of its own.

A clause is said of what the sentence around it names: of a BatchNorm ("it is in training mode"), or of a linear
operator that cannot absorb ("its weight is quantised").

Not here: why operators are not merged (`bnfold.operators`, `bnfold.merge`, and each frontend's `merging`), and why a
fold is not proved (`bnfold.simulation`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Formatter

__all__ = ["Reason", "Section", "explain", "sections"]


_NESTED = ("because", "above", "below")
"""The places in which another sentence or clause stands."""


@dataclass(frozen=True)
class Section:
    """A part of the table: the reasons that stand below it.

    Attributes:
        title: what they are about.
        about: one sentence more.
    """

    title: str
    about: str


@dataclass(frozen=True)
class Reason:
    """One kind of reason.

    Attributes:
        says: the sentence, with `str.format` fields for what differs from model to model.
        way_out: what can be done about it; says so where nothing can.
    """

    says: str
    way_out: str

    def __call__(self, **names: object) -> str:
        """The sentence about these."""
        return self.says.format(**names)

    @property
    def fields(self) -> frozenset[str]:
        """What has to be given."""
        return frozenset(name.partition(".")[0] for _, name in self._parts() if name)

    def sentence(self, mark: str = "...") -> str:
        """The sentence about anything."""
        return "".join(text + (mark if name is not None else "") for text, name in self._parts())

    def match(self, sentence: str) -> tuple[str, ...] | None:
        """The clauses that are filled into it, where `sentence` is this one about something; else None."""
        places: dict[str | None, str] = {None: "", **dict.fromkeys(_NESTED, "(.*)")}
        texts = (re.escape(text) + places.get(name, ".*") for text, name in self._parts())
        found = re.fullmatch("".join(texts), sentence, re.DOTALL)
        return None if found is None else found.groups()

    def _parts(self) -> list[tuple[str, str | None]]:
        return [(text, name) for text, name, *_ in Formatter().parse(self.says)]


def sections() -> dict[Section, dict[str, Reason]]:
    """The table, in its order: for each of its sections the reasons, by their names in this module."""
    table: dict[Section, dict[str, Reason]] = {}
    for name, value in globals().items():
        if isinstance(value, Section):
            rows = table.setdefault(value, {})
        elif isinstance(value, Reason):
            rows[name] = value
    return table


def explain(sentence: str) -> list[Reason]:
    """The reasons that make up what a verdict says, the sentence first; empty where it is none of the table's.

    What a sentence says of another reason (a clause behind its colon, the two directions) follows it.
    """
    rows = (row for section in sections().values() for row in section.values())
    found = [(row, clauses) for row in rows if (clauses := row.match(sentence)) is not None]
    if not found:
        return []
    row, clauses = max(found, key=lambda one: len(one[0].sentence("")))
    return [row, *(inner for clause in clauses for inner in explain(clause))]


SAID = Section(
    "How it is said",
    "What a verdict says is one of the sentences below, or two of them, one for each direction.",
)

BOTH_WAYS = Reason(
    "not into what comes before: {above}; not into what comes after: {below}",
    "One of the two ways has to be opened: see both reasons.",
)
SLOWER = Reason(
    "{because}; its scale could go, but the Add that is left is slower in {runtime} (--for any)",
    '`--for any` (`runtime="any"`) moves the scale, for a runtime that minds BatchNorms more than Adds; '
    "`docs/leftover.md` has the times.",
)

UNPROVED = Reason(
    "what it would become could not be proved",
    "The checker found no proof, so nothing is done. Numbers near overflow do this, or shapes that are not "
    "known; if it is neither, please report the model.",
)

NUMBERS = Section(
    "Its mode and its numbers",
    "The BatchNorm itself is no affine map of constants.",
)

TRAINING = Reason(
    "it is in training mode and would normalise by the batch; call model.eval() first",
    "Call `model.eval()` before folding. If it is meant to normalise by the batch, it is no affine map, "
    "and has to stay.",
)
TRAINING_PROGRAM = Reason(
    "it was exported in training mode and normalises by the batch; call model.eval() and export again",
    "A program has no mode to change: export the model after `model.eval()`.",
)
TRAINING_NODE = Reason(
    "it is in training mode (training_mode=1) and normalises by the batch; export the model in eval mode",
    "Call `model.eval()` before exporting, and do not export with `training=TrainingMode.TRAINING`.",
)
TRAINING_OUTPUTS = Reason(
    "it has more than one output, so it is in training mode; export the model in eval mode",
    "Export the model in eval mode; older operator sets say by the number of outputs that they train.",
)
NORM_QUANTISED = Reason(
    "it is quantised; fold the model before it is quantised",
    "Fold first, then quantise: `docs/guides/before_quantisation.md`.",
)
UNTRACKED = Reason(
    "it keeps no running statistics and normalises by the batch even in eval (track_running_stats=False)",
    "Train with `track_running_stats=True`; what normalises by the batch is no affine map.",
)
NO_STATISTICS = Reason(
    "it has no statistics",
    "The node lacks inputs that ONNX requires; export the model again, in eval mode.",
)
OTHER_VERSION = Reason(
    "it is in the function `{function}` of operator set {own}, and the model's is {version}, in which {op} is another",
    "Write both for one operator set; a function of another one cannot be inlined where its operators differ.",
)
CHANGING = Reason(
    "its statistics are computed or changed while the model runs",
    "Compute them once, and store them in the buffers `running_mean` and `running_var`.",
)
NOT_AHEAD = Reason(
    "its {what} cannot be computed ahead",
    "Store the number as a parameter or buffer instead of computing it from something that is not one.",
)
UNREADABLE = Reason(
    "its numbers cannot be read",
    "Store scale, bias, mean and variance as floating-point tensors in the file.",
)
NOT_CONSTANT = Reason(
    "its numbers are not constant",
    "Make its scale and shift constants of the model, which nothing computes.",
)
NOT_FINITE = Reason(
    "its {what} holds a number that is not finite, for channel {channel}",
    "The model was broken before: look at that channel, and repair or retrain it.",
)
OWN_NOT_FINITE = Reason(
    "its scale or shift is not finite: look at its variance and its weight",
    "The model was broken before: a variance near zero, or a weight that is infinite. Repair or retrain "
    "that channel.",
)
OWN_OVERFLOWS = Reason(
    "a number in it overflows",
    "Look at its variance and weight: their quotient is beyond float64.",
)
NOT_POSITIVE = Reason(
    "the variance of channel {channel} is not positive",
    "No root can be taken of it: repair the running variance of that channel (`bnfold.calibrate` "
    "computes it anew).",
)
WRONG_SHAPE = Reason(
    "its {what} has the shape {sizes}, which does not suit an input of {shape}",
    "Its vectors must have one number per channel (axis 1); it would not run as it is.",
)
NOT_PER_ELEMENT = Reason(
    "its {what} has the shape {sizes}, and spatial=0 asks for a number for every element of an input of {shape}",
    "If it is meant per channel, as in files converted from MXNet (ArcFace), set `spatial` to 1, which is the default.",
)
RANK_UNKNOWN = Reason(
    "the rank of its input is not known",
    "Declare the shapes of the model's inputs, or run `onnx.shape_inference` first; names for sizes will do.",
)
NO_NUMBERS_YET = Reason(
    "`{lazy}` has no numbers yet; run the model once before folding",
    "Lazy modules learn their sizes from the first input: call the model once.",
)

USE = Section(
    "How a module is used",
    "The BatchNorm, or the layer beside it, is a module of torch that cannot be taken out of the code "
    "around it.",
)

NOT_RUN = Reason(
    "it did not run on the example inputs",
    "Give example inputs on which it runs, if there are any; one that only training runs costs nothing.",
)
NOT_CALLED = Reason(
    "it is not called; the code of `{who}` uses its numbers",
    "Call the module instead of taking its buffers (or leave it: what that code computes may be folded "
    "by itself).",
)
NOT_AFFINE = Reason(
    "what it computes is not one affine map per channel",
    "It calls itself a BatchNorm and computes something else in eval mode; only an affine map can be folded.",
)
COMPILED = Reason(
    "it is compiled into the ScriptModule `{path}`; fold the module before scripting, or the ONNX file that "
    "torch.onnx.export writes of it with dynamo=False",
    "Fold the module that was scripted or traced, and script the result; where there is only a file, "
    "`torch.onnx.export(torch.jit.load(file), ..., dynamo=False)` gives one that folds.",
)
WRITTEN_OUT = Reason(
    "it is written out in the code of `{where}`; make it a module of its own",
    "Move the formula into a module that holds the statistics, or use `nn.BatchNorm`; in a file it is "
    "folded as it is.",
)
WRITTEN_OUT_AS = Reason(
    "it is written out in the code of `{where}`, and {because}; make it a module of its own",
    "Where its numbers are stored, they could be those of an identity. Move the formula into a module, or mend that.",
)
NOT_SAVED = Reason(
    "`{slot}` is not saved with the model; make it a parameter or a buffer",
    "What a state dict does not hold cannot be changed for good: use `register_buffer`.",
)
SLOT_CHANGES = Reason(
    "`{slot}` changes while the model runs",
    "Compute it once, and store it in a buffer.",
)
SLOT_SHARED = Reason(
    "`{slot}` is held by several modules, or no ordinary tensor of numbers",
    "Give the formula numbers of its own.",
)
NOT_UNDONE = Reason(
    "its lines do more to their numbers than can be undone",
    "Sums, products, quotients, powers and roots are solved for what is stored; write the formula with these.",
)
NO_NUMBERS = Reason(
    "no numbers in its lines would make them that",
    "What is left of the BatchNorm is no case of the formula that is written there. Move it into a module.",
)
LOOKS_AT_NUMBERS = Reason(
    "some code looks at its numbers",
    "Without the formula that code would do something else: let nobody else read what the formula reads.",
)
FUNCTION = Reason(
    "it is called as a function in the code of `{where}`; make it an nn.BatchNorm module of its own",
    "Replace `F.batch_norm(x, ...)` by a module: user code is not edited, so a call cannot be taken out "
    "of it.",
)
WHOLE_MODEL = Reason(
    "it is the whole model",
    "There is no layer beside it; fold the model that it is a part of.",
)
HOMELESS = Reason(
    "its module is not held by the model; make it an attribute, or keep it in an nn.ModuleList",
    "A module in a plain list or dict is in no state dict either; register it.",
)
CALLED_DIFFERENTLY = Reason(
    "it is called {calls} times and does not do the same each time",
    "Give each use a module of its own.",
)
NARROWS = Reason(
    "it also changes the type of its input, from {dtype}",
    "Let the cast be an operation of its own (`x.to(...)`), before or after.",
)
NUMBERS_USED = Reason(
    "its numbers are used by {who} as well",
    "Without the module that code would not run: let it keep numbers of its own.",
)
BUFFER_USED = Reason(
    "its `{attribute}` is used by the code of `{who}` as well",
    "Without the module that code would not run: let it keep numbers of its own.",
)
DOES_MORE = Reason(
    "its own code does more than normalise and activate: {what}",
    "Let the module normalise (and activate), and do the rest outside of it.",
)
ANOTHER_TENSOR = Reason(
    "its code runs on other tensors than those that it is given and returns, which stand for them",
    "A subclass of Tensor, or a transformation (`jvp`, `jacrev`) comes between: fold the model with plain tensors, or "
    "what is transformed by itself.",
)
OWN_CALL = Reason(
    "its class has a `__call__` of its own",
    "Put what `__call__` does into `forward`, or around the module.",
)
NOT_PLAIN = Reason(
    "it is called with more than one argument, or returns more than one tensor",
    "Let the module take one tensor and return one.",
)
NOT_ALWAYS = Reason(
    "its code does not always do the same",
    "Its code looks at numbers, or at random: move the branch out of the module.",
)
LOOKED_AT = Reason(
    "some code looks at it otherwise than by calling it, and would do something else without it",
    "Let no code ask for its attributes or type; what is needed of it can be stored beside it.",
)
OTHER_SIZE = Reason(
    "it does something else for inputs of another size",
    "Fold a model whose code does not look at sizes, or one for each size.",
)
USED_OTHERWISE = Reason(
    "the code of `{where}` uses it otherwise",
    "The code goes another way for the inputs that are named: take that branch out, or give it "
    "parameters of its own.",
)
OUTPUT_CHANGED = Reason(
    "`{by}` changes its output in place, and without it would change its input",
    "Use the operation that makes a new tensor (`inplace=False`, no trailing underscore).",
)
INPUT_CHANGED = Reason(
    "`{by}` changes its input in place, and without it would change its output",
    "Use the operation that makes a new tensor (`inplace=False`, no trailing underscore).",
)

READERS = Section(
    "Who else reads or writes the value",
    "The algebra would allow it, but somebody else needs the value as it is.",
)

ENDS = Reason(
    "the output of `{node.name}` ({node.op}) is an output of the model",
    "What the model returns cannot change. Only the way up is left; or append a linear operator that "
    "takes the BatchNorm in.",
)
KEPT_OUTPUT = Reason(
    "the output of `{node.name}` ({node.op}) is kept in `{where}` when the model has run (return it without assigning "
    "it)",
    "Code outside may look at the attribute afterwards, as at an output. Return the value without assigning it to "
    "`self`.",
)
BEGINS = Reason(
    "`{value}` is an input of the model",
    "What the model is given cannot change. Only the way down is left; or scale and shift the inputs "
    "before they are given.",
)
ALSO_OUTPUT = Reason(
    "the output of `{node.name}` ({node.op}) is an output of the model too",
    "Do not return it, if nobody needs it; in a file, `--duplicate` copies the operator.",
)
ALSO_READ = Reason(
    "the output of `{node.name}` ({node.op}) is also read by `{reader.name}` ({reader.op})",
    "That reader needs the value as it is. In a file, `--duplicate` (`duplicate=True`) gives the "
    "BatchNorm a copy of the "
    "operator, which rarely pays: see `docs/leftover.md`. A hook can be taken off.",
)
USED_TWICE = Reason(
    "`{place}` is used {times} times, and its uses would have to differ",
    "Give each use weights of its own: copy the module, or the shared parameter.",
)
MOVES_TWICE = Reason(
    "`{node.name}` would have to move twice",
    "Another BatchNorm has already gone part of the way; fold the folded model once more.",
)
ZERO_SCALE = Reason(
    "`{node.name}` has a scale of zero, or would have to move twice",
    "Remove channels whose scale is zero (what they give is constant); or fold the folded model once more.",
)
ONLY_SHIFTS = Reason(
    "it only shifts",
    "Its scale is one already, so one Add is all that is left of it, and it stays that.",
)

PASSING = Section(
    "An operator that it cannot pass",
    "On its way to a linear operator an affine map meets another operator, and there is no identity that "
    "leads through.",
)

NOT_LINEAR = Reason(
    "`{node.name}` ({node.op}) is not linear",
    "No affine map passes it (tanh, sigmoid, softmax, a branch, an operator that is not known). Put the "
    "BatchNorm on the "
    "side of it on which the linear layer is, and train again; otherwise it stays, and costs little: see "
    "`docs/leftover.md`.",
)
NOT_FOLLOWED = Reason(
    "`{node.name}` ({node.op}) is not followed, though it is linear",
    "No row of the table says how an affine map passes it. Write it as a matrix product, a convolution or a sum; or "
    "report it, with the model.",
)
NO_SHIFT = Reason(
    "`{node.name}` ({node.op}) lets no shift through",
    "The scale goes by, and goes alone where that pays (`--for any`: always). A BatchNorm without a "
    "shift goes whole.",
)
NO_SHIFT_AS = Reason(
    "`{node.name}` ({node.op}) lets no shift through: {because}",
    "The scale goes by, and goes alone where that pays (`--for any`: always). Without padding the shift "
    "would pass, too.",
)
NO_NEGATIVE = Reason(
    "`{node.name}` ({node.op}) lets no negative scale through",
    "Some gammas are negative, and what keeps the larger of two numbers (or cuts at zero) does not "
    "commute with a change of "
    "sign. Train with gammas that stay positive, or put the BatchNorm before it.",
)
ALSO_WHERE = Reason(
    "`{node.name}` ({node.op}) also says where the largest is, which only a positive scale keeps",
    "Do not ask for the indices, if nobody needs them; else gammas must be positive.",
)
MIXES_POSITIONS = Reason(
    "`{node.name}` ({node.op}) mixes positions on which the affine differs",
    "It averages (or takes the largest) over an axis along which scale and shift vary: put the BatchNorm "
    "behind it.",
)
MIXES_CHANNELS = Reason(
    "`{node.name}` ({node.op}) mixes the channels with an axis on which the affine varies",
    "Put the BatchNorm on the other side of the shuffle.",
)
SPREADS = Reason(
    "`{node.name}` ({node.op}) spreads channels that differ over one image",
    "Their numbers would have to be alike: put the BatchNorm on the other side of the shuffle.",
)
REPEATS = Reason(
    "`{node.name}` ({node.op}) repeats a channel that would have to differ",
    "The copies would need numbers of their own: put the BatchNorm before it.",
)
BROADCASTS = Reason(
    "`{node.name}` ({node.op}) repeats `{value}` along an axis on which the affine varies",
    "The smaller operand would have to be written out; expand it in the model, or put the BatchNorm on "
    "the other operand.",
)
NOT_SCALED = Reason(
    "`{node.name}` ({node.op}) has another operand that is not scaled",
    "Of a sum all operands must bring the same scale (a residual connection does not): put a BatchNorm "
    "with the same scale on "
    "the other branch, or one behind the sum.",
)
NOT_ALIKE = Reason(
    "`{node.name}` ({node.op}) has another operand that is not scaled and shifted alike",
    "Put one BatchNorm behind it instead of one before.",
)
NO_OPERAND_SHIFT = Reason(
    "no operand of `{node.name}` ({node.op}) can take the shift",
    "Give one of its operands the full shape, or one that a linear operator with a bias computes.",
)
NO_OPERAND_SCALE = Reason(
    "no operand of `{node.name}` ({node.op}) can take the scale",
    "Give one of its factors the full shape.",
)
DIVIDES = Reason(
    "`{node.name}` (Div) divides by it",
    "Put the BatchNorm behind the division.",
)
NARROWS_TYPE = Reason(
    "`{node.name}` (Cast) rounds to a narrower type",
    "Scaled numbers round otherwise. Put the BatchNorm behind the cast, or leave the cast out.",
)
STAYS = Reason(
    "`{node.name}` stays: {because}",
    "Another BatchNorm, or constants in a row with it, stays: see its reason.",
)
HOLDS_NOT_FINITE = Reason(
    "`{node.name}` ({node.op}) holds a number that is not finite",
    "The model was broken before: repair it there.",
)
BY_ZERO = Reason(
    "`{node.name}` multiplies by zero",
    "What is multiplied by zero cannot be made up for above it; remove channels whose factor is zero.",
)
IN_THE_WAY = Reason(
    "`{node.name}` ({node.op}) is in the way",
    "Another BatchNorm stands there, which takes this one in only where nothing better was found.",
)
OTHER_OPERANDS = Reason(
    "`{node.name}` ({node.op}) reads or writes more than its main operand",
    "It has inputs or outputs that the rule of its operator does not know; leave them out of the model, "
    "or it stays.",
)
NO_CARRIER = Reason(
    "an operand that cannot carry an affine would have to",
    "A value that holds no floating-point numbers (indices, a shape) is in between; compute it from "
    "something else.",
)
TOO_LARGE = Reason(
    "`{node.name}` ({node.op}) would write the affine out in more than {limit:,} numbers",
    "A reshape or a copy makes one number per element of it; keep the channels on an axis of their own.",
)
SHAPE_UNKNOWN = Reason(
    "the shape around `{node.name}` ({node.op}) is not known",
    "Fix the sizes that can be fixed (`onnxruntime.tools.make_dynamic_shape_fixed`, or the exporter's "
    "`dynamic_axes`).",
)
VALUE_UNKNOWN = Reason(
    "the shape of `{value}` is not known",
    "Declare it: run `onnx.shape_inference`, or give shapes to the inputs of the model.",
)
SHAPES_DISAGREE = Reason(
    "the shapes around `{node.name}` ({node.op}) do not agree",
    "The file declares shapes that contradict one another: remove its `value_info`, or export it again.",
)

ABSORBING = Section(
    "A linear operator that cannot take it in",
    "A linear operator was reached. What is said behind the colon is said of that operator.",
)

CANNOT_ABSORB = Reason(
    "`{node.name}` ({node.op}) cannot absorb: {because}",
    "It would be the right place, but its weights cannot be changed: see the clause behind the colon.",
)
CANNOT_STORE = Reason(
    "`{node.name}` ({node.op}) cannot absorb it: {because}",
    "The new weights cannot be stored as the old ones are: see the clause behind the colon.",
)
CANNOT_BEFORE = Reason(
    "`{node.name}` ({node.op}) cannot absorb what comes in: {because}",
    "A table takes in what follows it, not what precedes it: see the clause behind the colon.",
)
CANNOT_SHIFT = Reason(
    "`{node.name}` ({node.op}) cannot take the shift: {because}",
    "The scale goes in, the shift does not: see the clause behind the colon. A scale goes alone where "
    "that pays (`--for any`).",
)
OTHER_AXIS = Reason(
    "`{node.name}` ({node.op}) has its channels on axis {axis}, and the affine varies along axis {axes}",
    "The BatchNorm works on another axis than the matrix: transpose before it, so that both mean the "
    "same channels.",
)
OTHER_AXES = Reason(
    "`{node.name}` ({node.op}) cannot hold an affine that varies along other axes",
    "The other BatchNorm has one number per channel; put the two in one order.",
)
BECOMES_NOT_FINITE = Reason(
    "`{node.name}` ({node.op}) would not be finite",
    "A scale near zero, or a huge one, makes the new weights overflow: look at the variance of that "
    "BatchNorm.",
)
PADS = Reason(
    "it pads with zeros",
    "At the border a zero is read instead of the shift, so no bias makes up for all positions. Put the "
    "BatchNorm behind the padding, pad by repeating the edge, or train without padding.",
)
PARTLY = Reason(
    "some of its outputs sum only a part of its kernel",
    "A stride in a transposed convolution: positions differ in which taps reach them. Put the BatchNorm "
    "behind it.",
)
COUNTS_PADDING = Reason(
    "it counts zero padding",
    "Use `count_include_pad=False`: then its weights sum to one everywhere.",
)
OTHER_DIVISOR = Reason(
    "it divides by another number than it sums",
    "Leave `divisor_override` out: then its weights sum to one.",
)
FILLS_IN = Reason("it fills in zeros outside the image", "Crop within the image: then nothing is filled in.")
LOOKS_UP = Reason(
    "it looks up rows, by whole numbers",
    "A BatchNorm behind a table goes into its rows; what is before one are indices.",
)
NO_WEIGHT = Reason(
    "it has no weight",
    "None of its operands is constant (a product of two computed values): nothing can take it in.",
)
MISMATCH = Reason(
    "the shapes of its weight and of its input do not match",
    "The file is not valid there: export it again.",
)
OVERRIDABLE = Reason(
    "its {role} `{value}` is also an input of the model, which a caller may override; freeze it with "
    "--freeze-initializers",
    "`--freeze-initializers` (`freeze_initializers=True`), if no caller overrides it.",
)
IS_INPUT = Reason(
    "its {role} `{value}` is an input of the model",
    "Make it an initializer, if it is always the same.",
)
QUANTISED = Reason(
    "its {role} is quantised; fold the model before it is quantised",
    "Fold the float model, and quantise the folded one: `docs/guides/before_quantisation.md`.",
)
COMPUTED_BY = Reason(
    "its {role} is computed by `{node.name}` ({node.op})",
    "What is computed from the inputs is no constant. If it does not depend on them, let the exporter "
    "fold constants.",
)
TOO_LARGE_CONSTANT = Reason(
    "its {role} is computed from constants and too large to be worked out",
    "Store the result as an initializer (constant folding of the exporter, or `onnxsim`).",
)
CONSTANT_TOO_MUCH = Reason(
    "the constant `{value}` is too much to be worked out",
    "Store the result as an initializer (constant folding of the exporter, or `onnxsim`).",
)
CONSTANT_BROKEN = Reason(
    "the constant `{value}` cannot be worked out: {error}",
    "The nodes that compute it do not run; store the result as an initializer.",
)
ROUNDING_DECIDES = Reason(
    "the constant `{value}` cannot be worked out: rounding decides what `{op}` makes of its operands",
    "Store the result as an initializer (constant folding of the exporter, or `onnxsim`).",
)
NOT_FLOAT = Reason(
    "its {role} is not a floating-point tensor",
    "Store it in float16, bfloat16, float32 or float64.",
)
FROM_THE_LEFT = Reason(
    "its weight multiplies from the left",
    "Swap the operands (transposed): a Gemm takes its weight as the second one.",
)
NOT_A_MATRIX = Reason(
    "its constant is not a matrix",
    "A stack of matrices, one per example or head, has no one set of channels.",
)
WEIGHT_NOT_FINITE = Reason(
    "its weight holds numbers that are not finite",
    "The model was broken before: repair that weight.",
)
OVERFLOWS = Reason(
    "its {role} would overflow {dtype}",
    "The product is beyond the range of the type that the weights are stored in: fold in float32, then "
    "convert.",
)
STORED_AS = Reason(
    "its weight is stored as {dtype}",
    "Fold the model in a floating-point type of 16 bits or more, and convert the result.",
)
NO_BIAS = Reason(
    "the code of `{where}` gives it no bias",
    "The code calls the function without a bias: use an `nn` module there, to which one can be added.",
)
BARE_PRODUCT = Reason(
    "it is a matrix product without a bias",
    "Use `nn.Linear`, or add a parameter behind the product.",
)
BARE_EINSUM = Reason("it is an einsum without a bias", "Add a parameter behind the einsum.")
BARE_LAYER = Reason(
    "its layer has no biases (bias=False)",
    "Build the recurrent layer with `bias=True`; zeros will do.",
)
BIAS_CHANGES_CODE = Reason(
    "its code does something else where there is a bias",
    "Build the layer with a bias; zeros will do.",
)
WEIGHT_COMPUTED = Reason(
    "its {role} is computed while the model runs",
    "Let a module hold it; parametrizations (`nn.utils.parametrize`) and products by constants are followed.",
)
WEIGHT_COMPUTED_AS = Reason(
    "its {role} is computed while the model runs, and {because}",
    "A module that computes its weight and uses it, and does nothing else, becomes an operator with that weight.",
)
NOT_ALONE = Reason(
    "no module of torch.nn computes it alone",
    "Only a convolution or a linear layer can stand for code that computes a weight; write it as one of these.",
)
LAST_AXIS = Reason(
    "torch has no module for a matrix along another axis than the last",
    "Bring that axis to the end, and back afterwards.",
)
PADS_UNEVENLY = Reason(
    "torch's convolutions pad alike on both sides",
    "Let a pad of its own do what is more on one side.",
)
FIRST_OPERAND = Reason(
    "`{node.name}` ({node.op}) absorbs what its first operand lacks, and no other one",
    "Swap the operands, if that is the same to the model; or put the BatchNorm on the first one.",
)
OTHER_FACTOR = Reason(
    "what is added to one operand is multiplied by the other one",
    "A bilinear form takes the scale of an operand, and no shift: put the BatchNorm behind it, which folds whole.",
)
ZEROS_OUTSIDE = Reason(
    "it takes zeros from outside of its input",
    "A deformable convolution takes the scale, and no shift: put the BatchNorm behind it, which folds whole.",
)
PART = Reason(
    "its weight is the part `{name}` of a parameter, beside which there is no bias",
    "A bias can be added where rows of a layer's weight are taken. Give the operator a bias, or a weight of its own.",
)
BIAS_OF_PARTS = Reason(
    "a bias of its module would be that of several parts of its weight",
    "Two operators that read parts of one weight would add one bias twice. Give each a layer of its own.",
)
WEIGHT_CHANGES = Reason(
    "its {role} changes while the model runs",
    "Let `forward` not write into parameters in eval mode.",
)
NOT_ORDINARY = Reason(
    "its weight is no ordinary tensor of numbers",
    "It is sparse, quantised or of a class of its own: fold the dense float model first.",
)
HELD_BY_SEVERAL = Reason(
    "its weight is held by {names} at once, and its code does not tell which is meant",
    "Call the layer by its module, or untie the parameter.",
)
BIAS_OF_SEVERAL = Reason(
    "its bias is held by several modules at once",
    "Untie the bias: give each module its own.",
)
READ_AS_WELL = Reason(
    "its {role} is read by `{who}` as well",
    "Who reads the weight needs it as it is (a tied decoder, a penalty): untie it, or leave the BatchNorm.",
)
OTHER_WAY = Reason(
    "`{name}` is used in another way by `{other}`",
    "Two operators share a parameter and read it differently: untie them.",
)
