"""The PyTorch frontend: any `nn.Module`, as it is, folded into a module of the same class.

What runs:

    passes       one recorded, and made again if it must be  sandbox     a model run without leaving a trace
    capture      one forward pass, operator by operator      trace       what that gives: calls, values, frames
    modes        what torch tells of each operator           recorder    what calls read, make, and may depend on
    hollow       operators without their numbers             hooks       who looks at what goes through a module
    aten         what an operator's schema says of it        memory      which value a tensor is, and where it lies
    internals    the private parts of torch that are used    tensors     the tensors in nested things
    trials       passes on other inputs, with `alignment`    sizes       what of a pass holds for those too
    determinism  code that runs otherwise a second time      idle        BatchNorms that did not run
    compiled     BatchNorms in ScriptModules

What is drawn of it:

    lower        how each operator is drawn as a node        constants   a model's constants again, in float64
    draft        calls drawn as nodes, not bound to storage  read        calls -> Graph, and where numbers are kept
    norms        which module calls are BatchNorms           formulas    BatchNorms that are written out in a forward
    tails        what a module does after its operator       calls       module calls as places for merged operators
    storage      where linear operators keep their numbers   aliasing    what is changed in place
    naming       what the report calls each node             simplify    nodes joined and dropped

What is made of it:

    fold         read, travel, write, compare                write       the difference of two Graphs -> module
    merging      merged operators -> module                  stored      numbers as a module stores them
    modules      what stands where a BatchNorm was           steps       what runs outside of the BatchNorms
    retrace      the folded model's calls, against the plan  side        a module as one side of a verification
    double       float64 in this thread alone                nudge       every number moved a little
    choices      a model that chooses as another run did

Files:

    files        weights of a model that a factory builds    states      where in a file a state dict lies
    program      exported programs (.pt2)                    archive     one loaded, or refused
    recompose    layers again of what a program took apart

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
