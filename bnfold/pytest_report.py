"""What `pytest --bnfold-report FILE` writes: every comparison of a run, as JSON or as one page without a script.

    {"format": "bnfold.assertions", "version": 1, "equivalent": 3, "different": 1, "failed": 0, "assertions": [...]}

An assertion has the test, the two models, whether they are `equivalent` (null: they could not be compared), the
`failure` as a sentence, and the record of `bnfold verify --json`: evidence, inputs, worst, divergence, notes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["draw", "to_json"]

Record = Mapping[str, Any]

_KINDS = {True: "equivalent", False: "different", None: "failed"}


def to_json(records: Sequence[Record]) -> str:
    """The records, with their number by kind."""
    page = {"format": "bnfold.assertions", "version": 1, **_count(records), "assertions": list(records)}
    return json.dumps(page, indent=2, allow_nan=False) + "\n"


def _count(records: Sequence[Record]) -> dict[str, int]:
    return {name: sum(record["equivalent"] is kind for record in records) for kind, name in _KINDS.items()}


def draw(records: Sequence[Record]) -> str:
    """A page: what differs first."""
    counts = ", ".join(f"{count} {name}" for name, count in _count(records).items())
    ordered = sorted(records, key=lambda record: record["equivalent"] is True)
    rows = "\n".join(_row(record) for record in ordered)
    return _PAGE.format(counts=escape(counts), rows=rows)


def _row(record: Record) -> str:
    kind = _KINDS[record["equivalent"]]
    models = f"{record['before']} and {record['after']}"
    lines = "<br>".join(escape(line) for line in _lines(record))
    cells = f"<td>{escape(record['test'])}</td><td>{escape(models)}</td><td>{kind}</td><td>{lines}</td>"
    return f'<tr class="{kind}">{cells}</tr>'


def _lines(record: Record) -> Iterator[str]:
    """What was found, line by line."""
    if record["failure"]:
        yield record["failure"]
    divergence = record.get("divergence")
    if divergence:
        yield f"begins at {divergence['layer']} ({divergence['maker']})"
    for item in record.get("evidence", ()):
        examples = f"all {item['inputs']:,}" if item["exhaustive"] else f"{item['inputs']:,}"
        yield f"{item['question']}: {item['deviation']:.1e}, bound {item['bound']:.1e}, {examples} examples"
    yield from record.get("notes", ())


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Models that should compute the same</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }}
body {{ margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .4rem .6rem; }}
th, td {{ overflow-wrap: anywhere; text-align: left; vertical-align: top; }}
.different td:nth-child(3), .failed td:nth-child(3) {{ color: light-dark(#b3261e, #ff8a80); font-weight: bold; }}
</style></head><body>
<h1>Models that should compute the same</h1>
<p>{counts}</p>
<table><thead><tr><th>test</th><th>models</th><th>result</th><th>found</th></tr></thead>
<tbody>
{rows}
</tbody></table>
</body></html>
"""
