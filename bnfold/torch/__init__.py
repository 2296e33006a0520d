"""The PyTorch frontend: any `nn.Module`, as it is, folded into a module of the same class.

    capture      one forward pass, operator by operator      trace       what that gives: calls, values, frames
    modes        what torch tells of each operator           recorder    what calls read, make, and may depend on
    hollow       operators without their numbers             hooks       who looks at what goes through a module
    aten         what an operator's schema says of it        memory      which value a tensor is, and where it lies
    internals    the private parts of torch that are used    tensors     the tensors in nested things
    lower        how each operator is drawn as a node        constants   a model's constants again, in float64
    read         calls -> Graph, and where numbers are kept  write       the difference of two Graphs -> module
    sandbox      a model run without leaving a trace         draft       calls drawn as nodes, not bound to storage
    norms        which module calls are BatchNorms           storage     where linear operators keep their numbers
    aliasing     what is changed in place                    simplify    nodes joined and dropped
    naming       what the report calls each node             steps       what runs outside of the BatchNorms
    trials       passes on other inputs, with `alignment`    sizes       what of a pass holds for those too
    idle         BatchNorms that did not run                 determinism code that runs otherwise a second time
    retrace      the folded model's calls, against the plan  fold        read, travel, write, compare
    modules      what stands where a BatchNorm was           side        a module as one side of a verification
    files        weights of a model that a factory builds    program     exported programs (.pt2)
    states       where in a file a state dict lies           nudge       every number moved a little

`example_inputs` is everywhere a tensor, a tuple of positional arguments, a dict of keyword arguments, or a pair of a
tuple and a dict.
"""

from __future__ import annotations

from bnfold.torch.files import (
    fold_checkpoint_file,
    load_factory,
    load_folded,
    load_state,
    make_inputs,
    read_arguments,
)
from bnfold.torch.fold import fold, run
from bnfold.torch.program import fold_program, fold_program_file
from bnfold.torch.read import Reading, read
from bnfold.torch.write import write

__all__ = [
    "Reading",
    "fold",
    "fold_checkpoint_file",
    "fold_program",
    "fold_program_file",
    "load_factory",
    "load_folded",
    "load_state",
    "make_inputs",
    "read",
    "read_arguments",
    "run",
    "write",
]
