"""Figures that tests measure, shown at the end of the run: what an assertion only bounds, a reader wants to know."""

from collections.abc import Callable

import pytest

_figures = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def report_figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with a line for the summary."""
    return request.config.stash.setdefault(_figures, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(_figures, [])
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)
