"""The store of a study: it goes on after any kill, one writer at a time, and its tables are flat."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tunewise.core.errors import RunError, UserError
from tunewise.study.store import Store

ROOT = Path(__file__).parents[2]
IDENTITY: dict[str, Any] = {
    "model": "minilm",
    "data": "ab12",
    "methods": ["lora", "dora"],
    "settings": {"batch_size": 32, "metric": "accuracy"},
}


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(tmp_path / "study", IDENTITY) as made:
        yield made


def test_a_trial_goes_its_way(store: Store) -> None:
    trial = store.add("lora(rank=8)", 1e-3, seed=1, rung=2, steps=40)
    assert (trial.status, trial.attempts, trial.directory) == ("waiting", 0, "trials/0001")
    assert store.path(trial) == (store.folder / "trials/0001").resolve()
    running = store.start(trial.id)
    assert (running.status, running.attempts) == ("running", 1) and running.started is not None
    done = store.finish(trial.id, {"valid/accuracy": 0.8}, [{"step": 1, "loss": 0.5}], cost=3.5)
    assert (done.status, done.metrics, done.cost) == ("done", {"valid/accuracy": 0.8}, 3.5)
    assert done.curve == [{"step": 1, "loss": 0.5}] and done.ended is not None
    assert store.trials("done") == [done] and store.trials("failed") == []


def test_failed_trials_keep_their_reason_and_may_be_tried_again(store: Store) -> None:
    trial = store.add("full", 1e-4)
    store.start(trial.id)
    failed = store.fail(trial.id, "ran out of memory (limit 2.0 GiB)", metrics={"peak": 2.1}, cost=2.0)
    assert (failed.status, failed.reason) == ("failed", "ran out of memory (limit 2.0 GiB)")
    again = store.requeue(trial.id, "with half the micro-batch", cost=1.0)
    assert (again.status, again.metrics, again.cost, again.attempts) == ("waiting", {}, 3.0, 1)
    store.start(trial.id)
    done = store.finish(trial.id, {"a": 1}, cost=4.0)
    assert (done.attempts, done.cost, done.reason) == (2, 7.0, None)


def test_adding_the_same_trial_finds_it(store: Store) -> None:
    first = store.add("lora", 1e-3, seed=0, rung=0, steps=10)
    store.start(first.id)
    done = store.finish(first.id, {"a": 1.0})
    assert store.add("lora", 1e-3, seed=0, rung=0, steps=10) == done
    assert store.add("lora", 1e-3, seed=0, rung=1, steps=20, directory=first.directory).id == 2
    assert store.add("majority").id == store.add("majority", None).id == 3


def test_wrong_moves_are_refused(store: Store) -> None:
    trial = store.add("lora", 1e-3)
    with pytest.raises(RunError, match="Trial 1 is waiting, not running"):
        store.finish(trial.id, {})
    store.start(trial.id)
    with pytest.raises(RunError, match="Trial 1 is running, not waiting"):
        store.start(trial.id)
    with pytest.raises(UserError, match="has no trial 7"):
        store.trial(7)
    with pytest.raises(UserError, match="outside of its study"):
        store.add("lora", 1e-2, directory="../elsewhere")
    with pytest.raises(ValueError, match="cannot be changed"):
        store.set("identity", {})
    assert len(store.trials()) == 1


def test_facts_and_events(store: Store) -> None:
    store.set("used", 12.5)
    store.set("used", 13.5)
    assert store.get("used") == 13.5 and store.get("other", "none") == "none"
    store.event("rung", "Four of eight go on.", kept=[1, 2, 5, 7])
    store.event("stopped", "By hand.")
    (event,) = store.events("rung")
    assert event["text"] == "Four of eight go on." and event["kept"] == [1, 2, 5, 7]
    assert [e["kind"] for e in store.events()] == ["rung", "stopped"]
    assert store.identity == IDENTITY


def test_reopening_lets_running_trials_wait_again(tmp_path: Path) -> None:
    with Store.open(tmp_path, IDENTITY) as store:
        for rate in (1e-4, 1e-3, 1e-2):
            store.start(store.add("lora", rate).id)
        store.finish(1, {"a": 1})
        store.fail(2, "diverged")
    with Store.open(tmp_path, IDENTITY) as store:
        assert [t.status for t in store.trials()] == ["done", "failed", "waiting"]
        assert [t.attempts for t in store.trials()] == [1, 1, 1]
        assert store.events("reopened")[0]["trials"] == [3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "tiny-roberta"}, 'another model: it was started with "minilm", not "tiny-roberta"'),
        (
            {"settings": {"batch_size": 16, "metric": "f1"}},
            "another settings.batch_size: .* 32, not 16",
        ),
        ({"methods": ["lora"]}, r'another methods: it was started with \["lora", "dora"\], not \["lora"\]'),
        ({"versions": {"torch": "9"}}, 'another versions: it was started with null, not {"torch": "9"}'),
    ],
)
def test_another_study_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with Store.open(tmp_path, IDENTITY) as store:
        store.start(store.add("lora", 0.1).id)
        store.finish(1, {"a": 1})
    for _ in range(2):  # a refusal frees the lock
        with pytest.raises(UserError, match=words):
            Store.open(tmp_path, {**IDENTITY, **change})
    Store.open(tmp_path, IDENTITY).close()


def test_a_folder_in_which_nothing_was_tried_may_become_another_study(tmp_path: Path) -> None:
    with Store.open(tmp_path, IDENTITY) as store:
        store.start(store.add("lora", 0.1).id)
        store.fail(1, "needs too much memory")
        store.set("plan", ["too short"])
    with Store.open(tmp_path, {**IDENTITY, "model": "other"}) as store:
        assert store.identity["model"] == "other" and store.trials() == [] and store.get("plan") is None


def test_folders_that_are_no_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no study: it has no study.sqlite"):
        Store.read(tmp_path)
    (tmp_path / "study.sqlite").write_bytes(b"something else" * 100)
    for access in (Store.read, lambda folder: Store.open(folder, IDENTITY)):
        with pytest.raises(UserError, match="is no study that can be read: file is not a database"):
            access(tmp_path)
    (tmp_path / "study.sqlite").unlink()
    sqlite3.connect(tmp_path / "study.sqlite").execute("CREATE TABLE other (a)").connection.close()
    with pytest.raises(UserError, match="is no study that can be read: no such table: meta"):
        Store.read(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        Store.open(tmp_path, IDENTITY)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Store.open(tmp_path / "file" / "study", IDENTITY)


def test_another_format_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path, IDENTITY).close()
    with sqlite3.connect(tmp_path / "study.sqlite") as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'format'")
    connection.close()
    for access in (Store.read, lambda folder: Store.open(folder, IDENTITY)):
        with pytest.raises(UserError, match="has format 99; this version reads 1"):
            access(tmp_path)


def test_one_writer_and_many_readers(store: Store) -> None:
    words = f"is being written by process {os.getpid()} on {socket.gethostname()}: wait for its end"
    with pytest.raises(UserError, match=words):
        Store.open(store.folder, IDENTITY)
    store.add("lora", 1e-3)
    with Store.read(store.folder) as reader:
        assert len(reader.trials()) == 1
        store.add("lora", 1e-2)
        assert len(reader.trials()) == 2
        with pytest.raises(RunError, match="opened for reading"):
            reader.add("dora", 1e-3)
    store.start(1)
    assert store.trial(1).status == "running"


def test_a_store_may_be_closed_by_another_thread(tmp_path: Path) -> None:
    store = Store.open(tmp_path, IDENTITY)
    thread = threading.Thread(target=store.close)
    thread.start()
    thread.join()
    Store.open(tmp_path, IDENTITY).close()


def test_threads_write_side_by_side(store: Store) -> None:
    def work(part: int) -> None:
        for number in range(20):
            trial = store.add(f"m{part}", 1e-3, seed=number)
            store.start(trial.id)
            store.finish(trial.id, {"part": part})

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.trials("done")) == 80
    assert all(t.method == f"m{t.metrics['part']}" for t in store.trials())


def test_an_error_takes_the_whole_change_back(store: Store) -> None:
    store.start(store.add("lora", 1e-3).id)
    with pytest.raises(TypeError):
        store.finish(1, {"a": object()})
    assert store.trial(1).status == "running"


def finish(store: Store, method: str, metrics: dict[str, Any], **more: Any) -> None:
    trial = store.add(method, more.pop("rate", None), **more)
    store.start(trial.id)
    store.finish(trial.id, metrics, [{"step": s, "loss": 1 / s} for s in (1, 2)], cost=1.5)


def test_table_and_parquet(store: Store, tmp_path: Path) -> None:
    assert list(store.table().columns[:6]) == ["id", "method", "rate", "seed", "rung", "steps"]
    assert len(store.export_parquet(tmp_path / "empty.parquet").read_bytes()) > 0
    metrics = {"accuracy": np.float32(0.5), "steps": 9, "loss": math.nan, "by_class": {"good": 0.5, "bad": 1}}
    finish(store, "lora", {**metrics, "note": "x", "top": [1, 2]}, rate=1e-3, steps=10)
    finish(store, "majority", {"accuracy": 0.25, "note": 3})
    store.add("dora", 1e-4)
    table = store.table()
    assert list(table["method"]) == ["lora", "majority", "dora"]
    assert list(table["status"]) == ["done", "done", "waiting"]
    row = table.iloc[0]
    assert (row["accuracy"], row["steps"], row["metrics/steps"], row["by_class/good"]) == (0.5, 10, 9, 0.5)
    assert math.isnan(row["loss"]) and row["cost"] == 1.5 and row["top"] == "[1, 2]"
    assert math.isnan(table.iloc[1]["rate"]) and math.isnan(table.iloc[2]["accuracy"])
    assert abs(row["started"].timestamp() - time.time()) < 60 and pd.isna(table.iloc[2]["started"])
    back = pd.read_parquet(store.export_parquet(tmp_path / "exports" / "study.parquet"))
    assert list(back.columns) == list(table.columns) and list(back["note"][:2]) == ['"x"', "3"]
    assert back["accuracy"][0] == 0.5 and back["started"][0] == row["started"]
    assert [p.name for p in (tmp_path / "exports").iterdir()] == ["study.parquet"]


def test_curves(store: Store) -> None:
    assert len(store.curves()) == 0
    finish(store, "lora", {}, rate=1e-3)
    finish(store, "dora", {}, rate=1e-2, seed=3)
    curves = store.curves()
    assert list(curves["method"]) == ["lora", "lora", "dora", "dora"] and list(curves["seed"]) == [0, 0, 3, 3]
    assert list(curves["loss"]) == [1.0, 0.5, 1.0, 0.5]


WRITER = """
import json, sys
from tunewise.study.store import Store

store = Store.open(sys.argv[1], json.loads(sys.argv[2]))
for number in range(100_000):
    trial = store.add("lora", 1e-3, seed=number)
    if trial.status == "done":
        continue
    store.start(trial.id)
    store.finish(trial.id, {"seed": number, "long": "x" * 3000})
    print(number, flush=True)
"""


def killed_writer(folder: Path, seconds: float) -> list[int]:
    """What a writer has told to be done before it was killed, some time after its first row."""
    command = [sys.executable, "-c", WRITER, str(folder), json.dumps(IDENTITY)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    first = writer.stdout.readline()
    time.sleep(seconds)
    writer.send_signal(signal.SIGKILL)
    rest, _ = writer.communicate(timeout=10)
    return [int(n) for n in (first + rest).split("\n")[:-1]]


def test_a_kill_loses_at_most_the_running_trial(tmp_path: Path) -> None:
    chance, told = random.SystemRandom(), []
    for _ in range(5):
        told += killed_writer(tmp_path, chance.uniform(0.0, 0.05))
        with Store.read(tmp_path) as reader:
            assert {t.seed for t in reader.trials("done")} >= set(told)
            assert len(reader.trials()) - len(reader.trials("done")) <= 1
    with Store.open(tmp_path, IDENTITY) as store:
        assert not store.trials("running")
        assert all(t.metrics == {"seed": t.seed, "long": "x" * 3000} for t in store.trials("done"))
        assert store.trials("done")[-1].seed in (told[-1], told[-1] + 1)
        assert len(store.events("reopened")) == 5
        assert all(
            t.attempts - len([e for e in store.events() if t.id in e["trials"]]) <= 1 for t in store.trials()
        )
