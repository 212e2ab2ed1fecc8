"""The inside of a worker process: JSON lines in, one job after another, JSON lines out; never pickle.

A job is a function of one of Tunewise's modules, or of the modules named on the worker's command line. It may call
`report` to tell how far it is, and `shared` for what later jobs can use again, such as a loaded base model.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import queue
import re
import signal
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from importlib import import_module
from types import FunctionType
from typing import Any, TextIO, TypeVar

from tunewise.core.errors import RunError, UserError

__all__ = ["failure", "find_function", "forget", "main", "report", "shared"]

KEPT = 2
T = TypeVar("T")

_kept: OrderedDict[Hashable, Any] = OrderedDict()
_channel: TextIO | None = None
_turn = threading.Lock()


def report(facts: Mapping[str, Any]) -> None:
    """Sends plain facts to the callback of the job's submitter: a sign of life too. Outside a worker: nothing."""
    if _channel is not None:
        _send({"report": dict(facts)})


def shared(key: Hashable, make: Callable[[], T]) -> T:
    """`make()`, kept for later jobs of this worker that ask for the same key; the two used last are kept.

    A job must give back what it borrows as it found it. After a job that failed nothing is kept, since it may
    have left a model half changed.
    """
    if key not in _kept:
        while len(_kept) >= KEPT:  # before the new one is made, so that three are never in memory
            _kept.popitem(last=False)
            gc.collect()
        _kept[key] = make()
    _kept.move_to_end(key)
    found: T = _kept[key]
    return found


def forget() -> None:
    """Drops what `shared` keeps."""
    _kept.clear()


def find_function(call: str, allowed: Collection[str] = ()) -> FunctionType:
    """The function `package.module:function`; raises `UserError` for one that no job may call."""
    module, _, name = call.partition(":")
    if module.split(".")[0] != "tunewise" and module not in allowed:
        raise UserError(
            f'A job may not call "{call}": {module} is no module of Tunewise and was not allowed.'
        )
    if not name.isidentifier() or name.startswith("_"):
        raise UserError(f'A job calls "package.module:function", not "{call}".')
    found = getattr(import_module(module), name, None)
    # What a module merely imports, from `os` for example, is not its own to offer.
    if not isinstance(found, FunctionType) or found.__module__ != module:
        raise UserError(f'A job may not call "{call}": {module} defines no function "{name}".')
    return found


def _send(message: Mapping[str, Any]) -> None:
    line = json.dumps(message)
    assert _channel is not None
    with _turn:
        _channel.write(line + "\n")
        _channel.flush()


def failure(error: BaseException) -> dict[str, str]:
    """What kind of failure it is, and one line that says why."""
    text = " ".join(str(error).split())[:500]
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if memory or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
        return {"kind": "memory", "reason": f"ran out of memory: {text}" if text else "ran out of memory"}
    if isinstance(error, RunError):
        if re.search(r"\bbecame -?(nan|inf)", text, re.IGNORECASE):
            return {"kind": "diverged", "reason": f"diverged: {text[0].lower()}{text[1:]}"}
        return {"kind": "raised", "reason": text}
    if isinstance(error, UserError):
        return {"kind": "refused", "reason": text}
    return {"kind": "raised", "reason": f"raised {type(error).__name__}{': ' if text else ''}{text}"}


def _run(order: Mapping[str, Any], allowed: Collection[str]) -> dict[str, Any]:
    try:
        value = find_function(order["call"], allowed)(**order["args"])
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"its result is not plain JSON: {error}") from None
        return {"kind": "done", "value": value}
    except BaseException as error:  # also SystemExit: a job ends, its worker stays
        traceback.print_exc()
        forget()
        return failure(error)


def _tidy() -> None:
    """Gives freed memory back to the system, so that the next job's peak is its own."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _stand_back() -> None:
    """Leaves Ctrl-C to the parent, and is the first to go when the machine's memory runs out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.access("/proc/self/oom_score_adj", os.W_OK):
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")


def _listen(orders: TextIO, jobs: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in orders:
        jobs.put(json.loads(line))
    # The parent has closed the pipe or is dead: nothing that this worker started may outlive it.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def main(allowed: Collection[str]) -> None:
    """Runs jobs until stdin closes; what they print goes to stderr, what they read from stdin is nothing."""
    global _channel
    _stand_back()
    orders = os.fdopen(os.dup(0), encoding="utf-8")
    _channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders, jobs), daemon=True).start()
    while True:
        order = jobs.get()
        _send({"started": order["call"]})
        answer = _run(order, allowed)
        sys.stdout.flush()  # what a job printed is in the log before its answer is known
        _tidy()
        _send(answer)
        del answer


if __name__ == "__main__":
    # Jobs import this module by its name, and must find the one that runs them.
    from tunewise.study.work.worker_main import main as named_main

    named_main(sys.argv[1:])
