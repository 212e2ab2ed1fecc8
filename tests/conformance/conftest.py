"""`--capabilities FILE`: what the suite found out about each method, for docs/atlas.md and for whoever asks."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from .capabilities import NAME, Capabilities
from .support import Case, remarks

KEPT = pytest.StashKey[Capabilities]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--capabilities", metavar="FILE", help="write passed / refused / failed per method and check as JSON"
    )


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--capabilities", default=None)
    # under xdist the workers' reports all arrive in the process that started them
    if file and not hasattr(config, "workerinput"):
        kept = config.stash[KEPT] = Capabilities(Path(file))
        config.pluginmanager.register(Listener(kept), "tunewise-capabilities")


class Listener:
    """Collects reports and writes the file at the end."""

    def __init__(self, kept: Capabilities) -> None:
        self.kept = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.kept.add(report)

    def pytest_sessionfinish(self) -> None:
        self.kept.write()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Says in the report which method, check and base it is about, and what the check remarked."""
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("case") if callspec is not None else None
    remarks.clear()
    try:
        return (yield)
    finally:
        if isinstance(case, Case) and isinstance(item, pytest.Function):
            check = item.originalname.removeprefix("test_")
            item.user_properties += [(NAME, [case.name, check, case.base]), *remarks.items()]
