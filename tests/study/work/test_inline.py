"""Jobs in the user's own process: outcomes like those of the pool."""

from __future__ import annotations

import pytest

from tunewise.study.work.inline import Inline

JOB = "tunewise.study.report.cells:duration"


def test_outcomes() -> None:
    with Inline() as pool:
        good = pool.submit({"call": JOB, "args": {"seconds": 12}}, time_limit=1).result()
        assert good.ok and good.value == "12 s" and good.peak_memory > 0
        bad = pool.submit({"call": JOB, "args": {"minutes": 1}}).result()
    assert bad.kind == "raised" and "unexpected keyword" in str(bad.reason)


def test_ctrl_c_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunewise.study.report import cells

    def stopped(seconds: float) -> str:
        raise KeyboardInterrupt

    stopped.__module__ = cells.__name__
    monkeypatch.setattr(cells, "duration", stopped)
    with Inline() as pool, pytest.raises(KeyboardInterrupt):
        pool.submit({"call": JOB, "args": {"seconds": 12}})
