"""A verification in several processes: each compares its share of the inputs, and all come to one verdict.

    torchrun --nproc-per-node 4 -m bnfold.verify A B --inputs images.npz

Where there are as many batches as processes, each takes every n-th; else each takes its rows of every batch, along the
first axis. A share is judged as a whole set is, with bounds of its own: noise, and the largest output to which
differences are relative, are those of the share. The models are equivalent where they are so on every share. What is
reported of each comparison is the share that is nearest its bound.

What the processes tell each other is JSON and arrays, and nothing that could run.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.archive import load_arrays
from bnfold.cases import Array, Case
from bnfold.distributed import Processes
from bnfold.divergence import Divergence
from bnfold.equivalence import Worst
from bnfold.errors import BnfoldError, InputError
from bnfold.report import Evidence
from bnfold.verification import Verification

__all__ = ["judge_together", "take_share"]

Feed = dict[str, Array]


def take_share(paths: Sequence[Path] | None, processes: Processes) -> list[Feed]:
    """The batches, or rows of batches, that this process compares; there may be none.

    Raises:
        InputError: no inputs are given, or there are fewer batches than processes, of which one has no rows to spread.
    """
    if not paths:
        raise InputError("several processes compare shares of --inputs; give some, or start one process")
    feeds = [load_arrays(path) for path in paths]
    if len(feeds) >= processes.size:
        return feeds[processes.rank :: processes.size]
    cut = [_cut(feed, path, processes) for feed, path in zip(feeds, paths, strict=True)]
    return [feed for feed in cut if feed]


def _cut(feed: Feed, path: Path, processes: Processes) -> Feed:
    """The rows of this process; nothing where it has none."""
    sizes = {array.shape[:1] for array in feed.values()}
    if len(sizes) != 1 or () in sizes:
        raise InputError(f"{path} has no rows that could be spread; give as many --inputs as processes")
    begin, end = processes.bounds(sizes.pop()[0])
    return {name: array[begin:end] for name, array in feed.items()} if end > begin else {}


def judge_together(
    compare: Callable[[], Verification | None], keep: bool, processes: Processes
) -> Verification:
    """What all processes find together, the same in each.

    Args:
        compare: compares the share of this process; None where it has none.
        keep: whether the worst input is wanted, and not only where it is.

    Raises:
        InputError, UnreadableModel: a process could not compare its share.
    """
    found, failure = None, None
    try:
        found = compare()
    except BnfoldError as error:
        failure = error
    texts = processes.gather_bytes(json.dumps(_describe(found, failure)).encode())
    wanted = found.case.arrays if keep and found and found.case else ()
    arrays = [_unpack(content) for content in processes.gather_bytes(_pack(wanted))]
    records = [json.loads(text) for text in texts]
    if failure is not None:
        raise failure
    for rank, record in enumerate(records):
        if record["error"]:
            raise InputError(f"process {rank}: {record['error']}")
    verdicts = [_rebuild(rank, *both) for rank, both in enumerate(zip(records, arrays, strict=True))]
    return _join([verdict for verdict in verdicts if verdict is not None])


def _describe(found: Verification | None, failure: BnfoldError | None) -> dict[str, Any]:
    """What a process has found, in plain values."""
    if found is None:
        return {"error": "" if failure is None else str(failure), "found": None}
    case = found.case or Case("", ())
    parts = {
        "evidence": [asdict(item) for item in found.evidence],
        "tried": found.tried,
        "worst": found.worst and asdict(found.worst),
        "case": {"label": case.label, "names": case.names},
        "notes": found.notes,
        "failure": found.failure,
        "divergence": found.divergence and asdict(found.divergence),
    }
    return {"error": "", "found": parts}


def _rebuild(rank: int, record: dict[str, Any], arrays: tuple[Array, ...]) -> Verification | None:
    """The same again, with the process named wherever an input is."""
    found = record["found"]
    if found is None:
        return None
    here, worst, divergence = f"process {rank}, ", found["worst"], found["divergence"]
    if worst is not None:
        worst = Worst(**{**worst, "element": tuple(worst["element"]), "values": tuple(worst["values"])})
    if divergence is not None:
        divergence = Divergence(**{**divergence, "fed_by": tuple(divergence["fed_by"])})
    return Verification(
        tuple(Evidence(**item) for item in found["evidence"]),
        tuple(here + label for label in found["tried"]),
        worst,
        Case(here + found["case"]["label"], arrays, tuple(found["case"]["names"])),
        tuple(found["notes"]),
        found["failure"] and here.replace(", ", ": ") + found["failure"],
        divergence,
    )


def _join(verdicts: Sequence[Verification]) -> Verification:
    """One verdict: the first that is a failure, else all of them."""
    tried = tuple(label for verdict in verdicts for label in verdict.tried)
    notes = tuple(dict.fromkeys(note for verdict in verdicts for note in verdict.notes))
    for verdict in verdicts:
        if not verdict.equivalent:
            return replace(verdict, tried=tried, notes=notes)
    worst = max(verdicts, key=lambda verdict: -1.0 if verdict.worst is None else verdict.worst.deviation)
    by_question: dict[str, list[Evidence]] = {}
    for verdict in verdicts:
        for item in verdict.evidence:
            by_question.setdefault(item.question, []).append(item)
    evidence = tuple(_nearest(items) for items in by_question.values())
    return replace(worst, evidence=evidence, tried=tried, notes=notes)


def _nearest(items: Sequence[Evidence]) -> Evidence:
    """The comparison that came nearest its bound, of the inputs of all."""
    nearest = max(items, key=lambda item: item.deviation / item.bound if item.bound else item.deviation)
    moves = [item.movement for item in items if item.movement is not None]
    return replace(
        nearest,
        inputs=sum(item.inputs for item in items),
        movement=max(moves, default=None),
        exhaustive=False,
    )


def _pack(arrays: Sequence[Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    return buffer.getvalue()


def _unpack(content: bytes) -> tuple[Array, ...]:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return tuple(archive[name] for name in archive.files)
