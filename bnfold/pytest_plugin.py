"""The pytest plugin that comes with the wheel: models that should compute the same, in tests.

    def test_the_export_computes_what_the_net_computes(assert_equivalent):
        assert_equivalent(net, "net.onnx", tolerance=1e-4)

The fixture `assert_equivalent(before, after, inputs=None, tolerance=None)` takes what `bnfold.verify` takes, and fails
with the layer, the input and the element where they differ most. `pytest --bnfold-report FILE` writes what was asserted
in the run: as JSON, or as a page where the name ends in .html. Under pytest-xdist the workers' records travel with
their tests' reports, as the property `bnfold` (a JSON text, which a JUnit file then has, too).

pytest imports this at every start, so no framework is imported before a test asks for the fixture.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bnfold.verification import Verification

__all__ = ["assert_equivalent"]

PROPERTY = "bnfold"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--bnfold-report`."""
    group = parser.getgroup("bnfold", "models that should compute the same")
    group.addoption(
        "--bnfold-report",
        metavar="FILE",
        help="write what assert_equivalent found: JSON, or HTML by the suffix",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect records where the run is put together: in the one process, or in the controller of the workers."""
    name = config.getoption("bnfold_report")
    if not name or hasattr(config, "workerinput"):
        return
    from bnfold.errors import InputError
    from bnfold.output import check_target

    path = config.invocation_params.dir / name
    try:
        check_target(path)
    except (InputError, OSError) as error:
        raise pytest.UsageError(f"--bnfold-report: {error}") from error
    config.pluginmanager.register(Collector(path), "bnfold-report")


class Collector:
    """What was asserted in a run, test by test."""

    def __init__(self, path: Path) -> None:
        self.path, self.records = path, list[dict[str, Any]]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a test's records when it is over; a test that is run again has them anew."""
        if report.when == "teardown":
            texts = [value for name, value in report.user_properties if name == PROPERTY]
            self.records += [{"test": report.nodeid, **json.loads(str(text))} for text in texts]

    def pytest_sessionfinish(self) -> None:
        """Write the file in one step."""
        from bnfold.output import replacing
        from bnfold.pytest_report import draw, to_json

        text = draw(self.records) if self.path.suffix == ".html" else to_json(self.records)
        with replacing(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say where it is."""
        terminalreporter.write_line(f"bnfold: {len(self.records)} comparisons in {self.path}")


@pytest.fixture
def assert_equivalent(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Fail unless two models compute the same; see the head of this file."""

    def check(before: Any, after: Any, inputs: Any = None, tolerance: float | None = None) -> None:
        """Compare two models.

        Args:
            before, after, inputs, tolerance: as `bnfold.verify` takes them.

        Raises:
            NotEquivalent: an AssertionError, with the layer, the input and the element.
            InputError, UnreadableModel: they cannot be compared.
        """
        __tracebackhide__ = True
        from bnfold.errors import BnfoldError, NotEquivalent
        from bnfold.verification import open_side, verify_sides

        record: dict[str, Any] = {"before": _name(before), "after": _name(after)}
        try:
            sides = open_side(before, "the first model"), open_side(after, "the second model")
            found = verify_sides(*sides, inputs, tolerance, locate=True)
        except BnfoldError as error:
            _keep(request, {**record, "equivalent": None, "failure": str(error)})
            raise
        _keep(request, {**record, **found.to_dict()})
        if not found.equivalent:
            raise NotEquivalent(explain(found), found.worst)

    return check


def explain(found: Verification) -> str:
    """Why two models are not equivalent: how far they are apart, and where."""
    worst = found.worst
    if worst is None or found.case is None:
        return found.failure
    size = (
        f"by {worst.deviation:.2e} of the largest output in {worst.question}; the bound is {worst.bound:.2e}"
    )
    lines = [f"the models are not equivalent: they differ {size}"]
    lines += [f"  layer:   {found.divergence}"] if found.divergence else []
    lines += [f"  input:   {found.case.label}, the worst of {len(found.tried)}"]
    if worst.element:
        element = ", ".join(map(str, worst.element))
        lines += [
            f"  output:  {worst.output}",
            f"  element: [{element}]: {worst.values[0]} before, {worst.values[1]} after",
        ]
    else:
        lines += [f"  output:  {found.describe_worst()}"]
    return "\n".join(lines)


def _keep(request: pytest.FixtureRequest, record: dict[str, Any]) -> None:
    request.node.user_properties.append((PROPERTY, json.dumps(record, allow_nan=False)))


def _name(model: Any) -> str:
    """A file by its name, a model by its class."""
    return str(model) if isinstance(model, str | Path) else type(model).__name__
