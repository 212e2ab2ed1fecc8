"""Contract 14: a run killed by `kill -9` at any step resumes bit-equal to one that was never stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 12

# Imports once, then forks a new process for every run: no run shares anything but code with another.
WORKER = """
import os, sys
from pathlib import Path
import accelerate, torch, transformers
transformers.BertForSequenceClassification
from tests.core.toys import run_of, start

for line in sys.stdin:
    folder = Path(line.strip())
    child = os.fork()
    if child == 0:
        method = "lora(rank=2, dropout=0.1) + bias_scale"
        run = run_of(method, folder, steps=12, checkpoint_every=2, evaluations=3, micro_batch=4)
        run.listen = lambda row: print("step", row["step"], flush=True) if "loss" in row else None
        start(run).handle.save(folder / "adaptation")
        os._exit(0)
    print("pid", child, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Worker:
    """Runs one after another, each in a process of its own."""

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env,
        )

    def read(self) -> list[str]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the worker died"
        return line.split()

    def run(
        self, folder: Path, kill: Callable[[str], bool] = lambda word: False, watch: Path | None = None
    ) -> int:
        """Starts or resumes the run in `folder`; kills it when `kill` says so of a line, or `watch` holds a part."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        pid = 0
        while True:
            word, number = self.read()
            if word == "ended":
                return int(number)
            if word == "pid":
                pid = int(number)
                if watch is not None:
                    when_writing(watch, pid)
            elif kill(number):
                os.kill(pid, signal.SIGKILL)


def when_writing(checkpoints: Path, pid: int, seconds: float = 30.0) -> None:
    """Kills the process while a checkpoint of it is being written, or returns when it has ended."""
    deadline, known = time.monotonic() + seconds, {p.name for p in checkpoints.glob(".step-*")}
    while time.monotonic() < deadline:
        try:
            names = {n for n in os.listdir(checkpoints) if n.startswith(".step-")} - known
        except FileNotFoundError:
            continue
        if names:
            os.kill(pid, signal.SIGKILL)
            return


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(30)


@pytest.fixture(scope="module")
def wanted(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    assert worker.run(folder) == 0
    return (folder / "adaptation" / "adaptation.safetensors").read_bytes()


def finished(worker: Worker, folder: Path) -> bytes:
    assert worker.run(folder) == 0
    return (folder / "adaptation" / "adaptation.safetensors").read_bytes()


def test_killed_at_a_random_step(worker: Worker, wanted: bytes, tmp_path: Path) -> None:
    step = str(random.SystemRandom().randrange(3, STEPS))
    assert worker.run(tmp_path, lambda n: n == step) == -signal.SIGKILL
    assert not (tmp_path / "adaptation").exists()
    assert finished(worker, tmp_path) == wanted, f"killed at step {step}"


def test_killed_while_a_checkpoint_is_written(worker: Worker, wanted: bytes, tmp_path: Path) -> None:
    for attempt in range(10):  # the kill may come a moment too late, and the folder be whole already
        folder = tmp_path / str(attempt)
        (folder / "checkpoints").mkdir(parents=True)
        assert worker.run(folder, watch=folder / "checkpoints") == -signal.SIGKILL
        half = list((folder / "checkpoints").glob(".step-*"))
        assert finished(worker, folder) == wanted
        assert not list((folder / "checkpoints").glob(".step-*"))
        if half:
            return
    raise AssertionError("no kill ever met a checkpoint that was being written")


@pytest.mark.slow
def test_killed_twenty_times(worker: Worker, wanted: bytes, tmp_path: Path) -> None:
    chance, halves = random.SystemRandom(), 0
    for kill in range(20):
        folder = tmp_path / str(kill // 4)  # four kills on one run, which goes on after each
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if kill % 4 == 1:
            worker.run(folder, watch=folder / "checkpoints")
            halves += bool(list((folder / "checkpoints").glob(".step-*")))
        else:
            step = str(chance.randrange(1, STEPS + 1))
            worker.run(folder, lambda n, step=step: n == step)  # type: ignore[misc]
        if kill % 4 == 3:
            assert finished(worker, folder) == wanted
    assert halves


def tune(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "tunewise",
        "tune",
        "tiny-roberta",
        "peptides",
        "--method",
        "lora(dropout=0.1)",
    ]
    command += ["--steps", str(STEPS), "--checkpoint-every", "2", "--quiet", "--out", str(out), *more]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_the_command_resumes_after_kills(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert tune(whole).wait() == 0
    (cut / "checkpoints").mkdir(parents=True)
    process = tune(cut)
    when_writing(cut / "checkpoints", process.pid, 120)
    assert process.wait() == -signal.SIGKILL
    process, log = tune(cut, "--resume"), cut / "metrics.jsonl"
    step, deadline = random.SystemRandom().randrange(5, STEPS), time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and f'"step": {step},' in log.read_text():
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    last = tune(cut, "--resume")
    assert last.wait() == 0, last.communicate()
    a, b = (f / "adaptation" / "adaptation.safetensors" for f in (whole, cut))
    assert a.read_bytes() == b.read_bytes()
