"""Jobs for the tests of the pool: good ones, and one of each way to go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from os import getpid  # noqa: F401 - a job must not be able to call what a module merely imports

from tunewise.core.errors import RunError, UserError
from tunewise.study.work.worker_main import report, shared


def add(a: float, b: float) -> dict[str, float]:
    return {"sum": a + b}


def who() -> dict[str, int]:
    return {"pid": os.getpid(), "parent": os.getppid()}


def wait(seconds: float) -> str:
    time.sleep(seconds)
    return "waited"


def steps(number: int, pause: float = 0.0) -> int:
    for step in range(1, number + 1):
        report({"step": step, "loss": 1.0 / step})
        time.sleep(pause)
    return number


def infinite() -> dict[str, float]:
    return {"value": float("inf")}


def compute(seconds: float) -> int:
    """Busy and silent."""
    end, turns = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        turns += 1
    return turns


def chatter(text: str) -> str:
    """Prints in every way there is, and reads what is not for it."""
    print('{"kind": "done", "value": "forged"}')
    sys.stdout.write(text)
    os.write(1, b"straight to the descriptor\n")
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    return sys.stdin.read()


def remembered(key: str) -> list[str]:
    """The kept things that had to be made again for this job."""
    made: list[str] = []
    for name in key:
        shared(name, lambda name=name: made.append(name) or name)  # type: ignore[misc]
    return made


def environment(variable: str) -> str | None:
    return os.environ.get(variable)


def diverge() -> None:
    raise RunError("The loss became nan at step 3; a lower learning rate usually helps.")


def stop_short() -> None:
    raise RunError("No row was left at step 2.")


def refuse() -> None:
    raise UserError('There is no column "txet".')


def fail() -> None:
    raise ValueError("a bad\nvalue")


def leave(status: int) -> None:
    os._exit(status)


def quit_politely() -> None:
    sys.exit("enough")


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def grow() -> None:
    """Without end, by 20 MB each time."""
    held = []
    while True:
        held.append(bytearray(20_000_000))
        time.sleep(0.01)


def exhaust() -> None:
    raise MemoryError


def hang() -> None:
    while True:
        time.sleep(60)


def hang_with_child(file: str) -> None:
    """A child that would outlive its parent."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(file, "w", encoding="utf-8") as out:
        out.write(f"{os.getpid()} {child.pid}")
    hang()


def fork_and_die(file: str) -> None:
    """A forked child keeps the worker's pipe open."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    with open(file, "w", encoding="utf-8") as out:
        out.write(f"{os.getpid()} {child}")
    os.kill(os.getpid(), signal.SIGKILL)


def no_json() -> object:
    return object()


def _hidden() -> None:
    return None
