"""The one lock: held while anything is changed that the whole process shares, and put back before it is let go.

A process has one of each of these, whatever the number of its threads, and a fold changes some for a while:

- the methods of `nn.Module` (a recording passes calls of other threads on untouched),
- the states of the global random generators of torch, NumPy and Python (a model that draws numbers is run with the same
  ones each time), and torch's compiler stance,
- loggers and the filters of warnings (`warnings.catch_warnings` is not made for threads),
- and, unlike these, the model: its attributes and buffers are as the caller left them only between two passes.

So two folds in two threads follow each other, and each gives what it gives alone. The lock is re-entrant: a model
whose own forward folds another one does not wait for itself. A fork waits for it, too, since the child would
inherit a process in the middle of a change and a lock that nobody is left to release.

What is of one thread needs no lock: grad mode, the modes that record, NumPy's error state, the float64 of a comparison.

Not covered: a forward that waits for another thread of its own, in which a model is folded, waits for ever. Other
threads keep all that is theirs while a fold runs, but for this: where the model draws numbers from a global generator,
and always for Python's and NumPy's, what another thread draws from the same one meanwhile is drawn again
afterwards; a generator of one's own is never touched.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["exclusive"]

_LOCK = threading.RLock()


@contextmanager
def exclusive() -> Iterator[None]:
    """Be the only thread that changes what the whole process shares; a decorator as well."""
    with _LOCK:
        yield


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)
