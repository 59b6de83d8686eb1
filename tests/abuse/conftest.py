"""Which cases of tests/abuse run, and how many they were.

`make test-abuse` runs all; elsewhere a sample runs: one case of each test's table, and few mutations.
"""

import os
from pathlib import Path

import pytest
from abuse_case import ABUSE
from cli_fixtures import model, packed, photos, small

__all__ = ["model", "packed", "photos", "small"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    own = [item for item in items if here in item.path.parents]
    for item in own:
        item.add_marker("slow")
        if not hasattr(os, "fork"):
            item.add_marker(pytest.mark.skip(reason="needs fork"))
    if ABUSE:
        return
    seen, left = set[str](), []
    for item in own:
        name = item.nodeid.partition("[")[0]
        if item.get_closest_marker("abuse") or name in seen:
            left.append(item)
        seen.add(name)
    dropped = set(map(id, left))
    items[:] = [item for item in items if id(item) not in dropped]
    config.hook.pytest_deselected(items=left)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many cases ran. A test is one, unless it has recorded how many it made."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    own = [report for report in reports if report.when == "call" and report.nodeid.startswith("tests/abuse/")]
    cases = sum(int(dict(report.user_properties).get("cases", 1)) for report in own)
    terminalreporter.section(f"{cases} bad inputs and faults" + ("" if ABUSE else "; `make test-abuse` runs all"))
