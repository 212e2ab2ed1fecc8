"""The pool: right reasons for bad jobs, good ones unharmed, nothing left behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any

import psutil
import pytest

from tunewise.core.errors import UserError
from tunewise.study.work.worker_main import find_function, report, shared
from tunewise.study.work.workers import Outcome, Pool

ROOT = Path(__file__).parents[3]
JOBS = "tests.study.jobs"
LIMIT = 200 * 2**20


def job(name: str, **args: Any) -> dict[str, Any]:
    return {"call": f"{JOBS}:{name}", "args": args}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, memory_limit=LIMIT, allow=[JOBS]) as made:
        yield made


def run(
    pool: Pool, name: str, time_limit: float | None = 20.0, silence: float | None = None, **args: Any
) -> Outcome:
    return pool.submit(job(name, **args), time_limit=time_limit, silence=silence).result(30)


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether the process ends soon; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_bad_jobs_are_outcomes_and_leave_the_others_alone(pool: Pool) -> None:
    bad: list[tuple[str, str, str, dict[str, float]]] = [
        ("diverge", "diverged", "diverged: the loss became nan at step 3; a lower", {}),
        ("grow", "memory", "ran out of memory (limit 200 MiB)", {}),
        ("hang", "hung", "hung: no sign of life for 1.0 s", {"silence": 1.0}),
        ("fail", "raised", "raised ValueError: a bad value", {}),
    ]
    ends: list[Future[Outcome]] = []
    good: list[Future[Outcome]] = []
    for number, (name, _, _, limits) in enumerate(bad):
        ends.append(pool.submit(job(name), time_limit=20, **limits))
        good.append(pool.submit(job("add", a=number, b=1)))
    for (_, kind, reason, _), future in zip(bad, ends, strict=True):
        outcome = future.result(30)
        assert (outcome.kind, outcome.ok) == (kind, False)
        assert outcome.reason is not None and outcome.reason.startswith(reason)
    assert [f.result(30).value["sum"] for f in good] == [1, 2, 3, 4]
    assert ends[1].result().peak_memory > LIMIT
    assert "Traceback" in ends[3].result().log and "jobs.py" in ends[3].result().log
    assert run(pool, "add", a=2, b=2).value == {"sum": 4}
    deadline = time.monotonic() + 5
    while len(pool.pids) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(pool.pids) == 2


@pytest.mark.parametrize(
    ("name", "args", "kind", "reason"),
    [
        ("stop_short", {}, "raised", "No row was left at step 2."),
        ("refuse", {}, "refused", 'There is no column "txet".'),
        ("quit_politely", {}, "raised", "raised SystemExit: enough"),
        ("leave", {"status": 7}, "crashed", "crashed: it left with exit status 7"),
        ("leave", {"status": 0}, "crashed", "crashed: it left with exit status 0"),
        ("die", {"number": int(signal.SIGSEGV)}, "crashed", "crashed: signal 11 (Segmentation fault)"),
        ("die", {"number": int(signal.SIGKILL)}, "crashed", "crashed: signal 9 (Killed)"),
        ("exhaust", {}, "memory", "ran out of memory"),
        (
            "no_json",
            {},
            "raised",
            "raised TypeError: its result is not plain JSON: Object of type object is not",
        ),
        ("add", {"a": 1}, "raised", "raised TypeError: add() missing 1 required"),
        (
            "missing",
            {},
            "refused",
            f'A job may not call "{JOBS}:missing": {JOBS} defines no function "missing".',
        ),
    ],
)
def test_reasons(pool: Pool, name: str, args: dict[str, Any], kind: str, reason: str) -> None:
    outcome = pool.submit(job(name, **args), time_limit=20).result(30)
    assert outcome.kind == kind
    assert outcome.reason is not None and outcome.reason.startswith(reason)
    assert run(pool, "add", a=1, b=1).ok


def test_time_limit(pool: Pool) -> None:
    start = time.monotonic()
    outcome = run(pool, "compute", time_limit=0.5, seconds=60)
    assert (outcome.kind, outcome.reason) == ("time", "exceeded its time limit of 0.5 s")
    assert 0.5 < outcome.seconds < 2 and time.monotonic() - start < 3


def test_work_and_reports_are_signs_of_life(pool: Pool) -> None:
    assert run(pool, "compute", silence=1.0, seconds=1.6).ok
    assert run(pool, "steps", silence=1.0, number=3, pause=0.5).ok


def test_reports_reach_the_callback_in_order(pool: Pool) -> None:
    seen: list[dict[str, Any]] = []
    outcome = pool.submit(job("steps", number=5), report=seen.append).result(30)
    assert outcome.value == 5
    assert [r["step"] for r in seen] == [1, 2, 3, 4, 5] and seen[1]["loss"] == 0.5


def test_an_error_of_the_callback_is_raised_by_the_future(pool: Pool) -> None:
    def broken(facts: dict[str, Any]) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pool.submit(job("steps", number=5, pause=1.0), report=broken).result(30)
    assert run(pool, "add", a=1, b=1).ok


def test_what_jobs_print_is_kept_from_the_channel(pool: Pool) -> None:
    outcome = run(pool, "chatter", text="loud ü\n")
    assert (outcome.kind, outcome.value) == ("done", "")
    for text in ("forged", "loud ü", "straight to the descriptor", "from a child"):
        assert text in outcome.log
    assert "forged" not in run(pool, "add", a=1, b=1).log


def test_values_that_json_has_not(pool: Pool) -> None:
    assert math.isinf(run(pool, "infinite").value["value"])


def test_two_things_are_shared_until_a_job_fails() -> None:
    with Pool(1, allow=[JOBS]) as pool:
        assert run(pool, "remembered", key="ab").value == ["a", "b"]
        assert run(pool, "remembered", key="bab").value == []
        assert run(pool, "remembered", key="ac").value == ["c"]
        assert run(pool, "remembered", key="b").value == ["b"], "the one used longest ago has gone"
        pid = run(pool, "who").value["pid"]
        assert run(pool, "fail").reason
        assert run(pool, "remembered", key="cb").value == ["c", "b"]
        assert run(pool, "who").value == {"pid": pid, "parent": os.getpid()}


def test_threads_environment_and_logs(tmp_path: Path) -> None:
    with Pool(1, threads=3, allow=[JOBS], logs=tmp_path, environment={"COLOUR": "red"}) as pool:
        assert run(pool, "environment", variable="OMP_NUM_THREADS").value == "3"
        assert run(pool, "environment", variable="COLOUR").value == "red"
        run(pool, "chatter", text="kept")
    assert "kept" in (tmp_path / "worker-0.log").read_text(encoding="utf-8")


def test_a_worker_starts_fast_and_one_killed_at_rest_is_replaced() -> None:
    start = time.monotonic()
    with Pool(1, allow=[JOBS]) as pool:
        assert run(pool, "add", a=1, b=1).ok
        assert time.monotonic() - start < 1.0
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        assert gone(pid)
        assert run(pool, "add", a=1, b=1).ok
        assert pool.pids and pool.pids != [pid]


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    with Pool(1, environment={"PYTHONHOME": str(tmp_path), "PYTHONPATH": ""}) as pool:
        outcome = pool.submit(job("add", a=1, b=1)).result(30)
    assert outcome.kind == "crashed"
    assert outcome.reason is not None and outcome.reason.startswith("crashed: its worker could not start: ")


def test_closing_stops_cancels_and_leaves_nothing(tmp_path: Path) -> None:
    pool = Pool(2, allow=[JOBS])
    running = [pool.submit(job("hang_with_child", file=str(tmp_path / str(i)))) for i in range(2)]
    later = [pool.submit(job("add", a=1, b=1)) for _ in range(3)]
    pids = pids_in(tmp_path / "0") + pids_in(tmp_path / "1")
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 2
    assert [f.result(0).kind for f in running] == ["stopped", "stopped"]
    for future in later:
        with pytest.raises(CancelledError):
            future.result(0)
    assert all(gone(pid) for pid in pids) and not pool.pids
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(job("add", a=1, b=1))
    pool.close()


def test_nothing_is_left_of_a_worker_that_died(pool: Pool, tmp_path: Path) -> None:
    outcome = run(pool, "fork_and_die", file=str(tmp_path / "pids"))
    assert outcome.reason == "crashed: signal 9 (Killed)"
    assert all(gone(pid) for pid in pids_in(tmp_path / "pids"))


def test_a_cancelled_job_is_never_run(pool: Pool) -> None:
    first = [pool.submit(job("wait", seconds=0.3)) for _ in range(2)]
    waiting = pool.submit(job("add", a=1, b=1))
    assert waiting.cancel()
    wait(first)
    assert run(pool, "add", a=1, b=1).ok and waiting.cancelled()


def pids_in(file: Path, seconds: float = 10.0) -> list[int]:
    """The worker's process and its child's, once the job has written both."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if file.is_file() and len(found := file.read_text(encoding="utf-8").split()) == 2:
            return [int(pid) for pid in found]
        time.sleep(0.02)
    raise AssertionError(f"nothing in {file}")


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where whoever started the tests ignores Ctrl-C
from tunewise.study.work.workers import Pool

with Pool(1, allow=["tests.study.jobs"], logs=sys.argv[2]) as pool:
    pool.submit({"call": "tests.study.jobs:hang_with_child", "args": {"file": sys.argv[1]}}).result()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_orphans_when_the_parent_is_killed_or_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    file = tmp_path / "pids"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(file), str(tmp_path)], env=environment, stderr=subprocess.PIPE
    )
    pids = pids_in(file)
    parent.send_signal(number)
    _, said = parent.communicate(timeout=10)
    assert parent.returncode != 0 and (b"KeyboardInterrupt" in said) == (number == signal.SIGINT)
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize(
    "call",
    [
        "os:getpid",
        "tests.study.jobs:getpid",
        "tests.study.jobs:_hidden",
        "tests.study.jobs:os.getpid",
        "tests.study",
    ],
)
def test_only_named_functions_are_jobs(call: str) -> None:
    with pytest.raises(UserError, match="job"):
        find_function(call, [JOBS])


def test_tunewise_functions_are_jobs(pool: Pool) -> None:
    value = pool.submit({"call": "tunewise.study.report.cells:duration", "args": {"seconds": 12}}).result(30)
    assert value.value == "12 s"


def test_bad_submissions(pool: Pool) -> None:
    with pytest.raises(UserError, match="A job is"):
        pool.submit({"call": "tunewise.study.report.cells:duration"})
    with pytest.raises(UserError, match="not plain JSON"):
        pool.submit({"call": "tunewise.study.report.cells:duration", "args": {"seconds": object()}})
    with pytest.raises(UserError, match="a worker and a thread"):
        Pool(0)


def test_outside_of_a_worker_reports_go_nowhere() -> None:
    report({"step": 1})
    assert shared("tests.study.outside", lambda: json.dumps(1)) == "1"
