"""``pytest bench/ --benchmark``: run the benchmarks, print their table, write it to bench/results.

A benchmark file is an ordinary test module whose tests take the ``table`` fixture::

    def test_something(table):
        rows = 64 if table.short else 2048
        table.row(
            "my op",                           # one table per name
            {"rows": rows},                    # what this row is, one column each
            ours={"deeprec": lambda: ...},
            peers={"torch": lambda: ...},      # every setting worth trying is a peer of its own
            operations=2 * rows * 64, unit="fp32_fma", bytes_read=rows * 256,
        )

All callables of a row run in one process, in turn, so that they share whatever else the machine
does. Correctness is the test's business, before it calls ``row``. ``--short`` is for CI: small
sizes, few repetitions, timings that mean nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Table, markdown

TABLE = pytest.StashKey[Table]()
RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deeprec benchmarks")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks under bench/")
    group.addoption("--short", action="store_true", help="smallest sizes only, for CI")
    group.addoption("--seconds", type=float, default=6.0, help="at most, a callable (default 6)")
    group.addoption("--append", action="store_true", help="keep other rows of bench/results")
    group.addoption("--threads", type=int, default=2, help="threads for everybody (default 2)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    run, short = config.getoption("--benchmark"), config.getoption("--short")
    for item in items:
        if not run:
            item.add_marker(pytest.mark.skip(reason="run with --benchmark"))
        elif short and "full_only" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="not under --short"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full_only: too large for --short")


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    """Collects rows; printed and written when the session ends."""
    config = request.config
    rows = Table(
        short=config.getoption("--short"),
        threads=config.getoption("--threads"),
        seconds=config.getoption("--seconds"),
    )
    config.stash[TABLE] = rows
    return rows


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash.get(TABLE, None)
    if rows is None or not rows.results:
        return
    terminalreporter.write_line("")
    terminalreporter.write_line(markdown(rows))
    RESULTS.mkdir(exist_ok=True)
    suffix = "-short" if rows.short else ""
    for op in dict.fromkeys(result["op"] for result in rows.results):
        name = op.replace(" ", "_") + suffix
        if config.getoption("--append") and (RESULTS / f"{name}.json").exists():
            measured = [row["what"] for row in rows.results if row["op"] == op]
            earlier = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
            rows.results = [r for r in earlier if r["what"] not in measured] + rows.results
        (RESULTS / f"{name}.md").write_text(markdown(rows, op))
        (RESULTS / f"{name}.json").write_text(json.dumps(rows.as_json(op), indent=1))
