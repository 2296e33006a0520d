"""Spare Python's search for garbage the objects that a fold makes, next to none of which go before its end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collecting_seldom", "frozen_heap"]


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Let searches pass over all that is there already, torch among it, which takes them a tenth of a second each time.

    Nothing is thawed that somebody else froze. No lock is needed: a fold in another thread is only slower.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def collecting_seldom() -> Iterator[None]:
    """Search a thousand times more seldom, in a process of our own."""
    often, *later = gc.get_threshold()
    gc.set_threshold(1000 * often, *later)
    try:
        yield
    finally:
        gc.set_threshold(often, *later)
