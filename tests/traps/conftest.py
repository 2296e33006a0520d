"""In every trap, whatever a verdict says is a reason of the table, clause by clause."""

from __future__ import annotations

import pytest

from bnfold import travel
from bnfold.reasons import explain
from bnfold.report import Verdict


@pytest.fixture(autouse=True)
def reasons_of_the_table(monkeypatch):
    """Look up each reason as it is given."""

    def explained(name, outcome, into, reason):
        assert not reason or explain(reason), f"this reason is not in bnfold/reasons.py: {reason}"
        return Verdict(name, outcome, into, reason)

    monkeypatch.setattr(travel, "Verdict", explained)
