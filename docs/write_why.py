"""Write `docs/why.md`, every reason for which a BatchNorm stays, with its way out, from the table that the code uses.

python docs/write_why.py          writes it
python docs/write_why.py --check  fails where it is out of date
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bnfold.reasons import Reason, Section, sections

PAGE = Path(__file__).with_name("why.md")
BEGINNING = """# Why did my BatchNorm stay?

A report has a verdict for every BatchNorm. One that was not folded says why: who was in the way, as the model names it.
Look up here what that means. `...` stands for names and numbers.

What stays is not wrong: the folded model computes the same with it, and a BatchNorm costs little in most runtimes
([what is left where a BatchNorm stays](leftover.md)). `python -m bnfold.fold model.onnx --verbose` prints them all,
`report.verdicts[0].reason` is one, and `bnfold.reasons.explain` looks it up in this table:

```python
from bnfold.reasons import explain

for reason in explain("`act` (Relu) lets no shift through"):
    print(reason.way_out)
```

<!-- written by docs/write_why.py from bnfold/reasons.py -->
"""


def draw() -> str:
    """The whole page."""
    return BEGINNING + "".join(_section(section, rows) for section, rows in sections().items())


def _section(section: Section, rows: dict[str, Reason]) -> str:
    entries = "".join(_entry(name, row) for name, row in rows.items())
    return f"\n## {section.title}\n\n{section.about}\n\n{entries}"


def _entry(name: str, row: Reason) -> str:
    """One reason: an anchor that can be linked to, the sentence, and the way out."""
    anchor = name.lower().replace("_", "-")
    way_out = re.sub(r"`docs/([\w/]+\.md)`", lambda page: _link(page[1]), row.way_out)
    return f'- <a id="{anchor}"></a>**{row.sentence()}**\n  <br>{way_out}\n'


def _link(name: str) -> str:
    """A link to another page, with its title."""
    title = (PAGE.parent / name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    return f"[{title}]({name})"


def main() -> int:
    """Write the page, or check it."""
    if "--check" in sys.argv:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != draw())
    PAGE.write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
