"""bnfold.shares: the verdict of several processes, each of them a thread here."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from bnfold.cases import Case
from bnfold.distributed import Processes
from bnfold.divergence import Divergence
from bnfold.equivalence import Worst
from bnfold.errors import BnfoldError, InputError, UnreadableModel
from bnfold.report import Evidence
from bnfold.shares import judge_together, take_share
from bnfold.verification import Verification


class Threads(Processes):
    """One of several threads that stand for processes."""

    def __init__(self, rank: int, size: int, said: list, barrier: threading.Barrier) -> None:
        self.rank, self.size, self._said, self._barrier = rank, size, said, barrier

    def gather_bytes(self, content: bytes) -> list[bytes]:
        self._said[self.rank] = content
        self._barrier.wait(60)
        found = list(self._said)
        self._barrier.wait(60)
        return found


def together(*compare, keep=False):
    """What each of the processes comes to: a verdict, or what it raises."""
    said, barrier = [b""] * len(compare), threading.Barrier(len(compare))

    def judge(rank):
        try:
            return judge_together(compare[rank], keep, Threads(rank, len(compare), said, barrier))
        except BnfoldError as error:
            return error

    with ThreadPoolExecutor(len(compare)) as pool:
        return list(pool.map(judge, range(len(compare))))


def verdict(deviation, failure="", bound=1e-6, inputs=5):
    worst = Worst(
        deviation, "input 0, output y[1]: 1 before, 2 after", 0, "y", (1,), ("1", "2"), "float32", bound
    )
    case = Case("given 1", (np.full((2, 3), deviation, np.float32),), ("x",))
    evidence = (
        ()
        if failure
        else (Evidence("float32", inputs, False, deviation, bound, f"by {deviation}", deviation),)
    )
    divergence = Divergence("conv1", "Conv", 0.5, ("x",)) if failure else None
    return Verification(evidence, ("given 1",), worst, case, ("a note",), failure, divergence)


def raising(error):
    def run():
        raise error

    return run


def test_all_come_to_the_same_verdict_which_names_the_share_nearest_its_bound() -> None:
    found = together(lambda: verdict(1e-9), lambda: verdict(3e-8, inputs=7), lambda: None)
    first = found[0]
    assert first.equivalent
    assert first.evidence == (Evidence("float32", 12, False, 3e-8, 1e-6, "by 3e-08", 3e-8),)
    assert first.tried == ("process 0, given 1", "process 1, given 1")
    assert first.notes == ("a note",)
    assert first.describe_worst() == "process 1, given 1, output y[1]: 1 before, 2 after"
    assert all(replace(one, case=None) == replace(first, case=None) for one in found)


def test_a_difference_that_one_process_finds_is_the_verdict_of_all() -> None:
    for found in together(
        lambda: verdict(0.5, bound=1.0), lambda: verdict(0.25, "the models differ"), keep=True
    ):
        assert found.failure == "process 1: the models differ"
        assert found.worst == verdict(0.25).worst
        assert found.divergence == Divergence("conv1", "Conv", 0.5, ("x",))
        assert np.array_equal(found.case.arrays[0], np.full((2, 3), 0.25, np.float32))
        assert found.case.names == ("x",)
        assert found.to_dict()["equivalent"] is False


def test_what_one_process_cannot_compare_is_raised_in_all() -> None:
    first, second = together(lambda: verdict(0.0), raising(UnreadableModel("no float64")))
    assert isinstance(first, InputError)
    assert str(first) == "process 1: no float64"
    assert isinstance(second, UnreadableModel)


@pytest.mark.parametrize(("files", "size"), [(5, 2), (2, 2), (1, 3), (2, 4)])
def test_the_shares_are_all_of_the_inputs_and_none_twice(files, size, tmp_path) -> None:
    paths, rows = [], []
    for number in range(files):
        array = np.arange(3) + 10 * number
        rows += array.tolist()
        paths.append(tmp_path / f"{number}.npz")
        np.savez(paths[-1], x=array, y=array)
    shares = [take_share(paths, Threads(rank, size, [], threading.Barrier(1))) for rank in range(size)]
    taken = [row for share in shares for feed in share for row in feed["x"].tolist()]
    assert sorted(taken) == rows
    assert all(np.array_equal(feed["x"], feed["y"]) for share in shares for feed in share)
    assert all(len(feed["x"]) for share in shares for feed in share)


def test_arrays_without_common_rows_are_not_spread(tmp_path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros(3), y=np.zeros(4))
    with pytest.raises(InputError, match="no rows that could be spread; give as many --inputs as processes"):
        take_share([path], Threads(0, 2, [], threading.Barrier(1)))
