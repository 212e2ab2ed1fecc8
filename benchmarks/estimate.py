"""`tunewise estimate` against real runs: parameters, peak memory, CPU seconds, with and without glibc's heap growing.

python benchmarks/estimate.py              # writes benchmarks/results/estimate.json; resumable, one thread, 15 minutes
python benchmarks/estimate.py again lora   # measures the cells of these methods anew
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "results" / "estimate.json"
# Which pieces malloc gives back to the system at once: all of 64 KiB and more, or what glibc thinks best.
HEAPS = {"mapped": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "default": {}}
STEPS = {"tiny-roberta": 12, "minilm": 4}
# Three epochs, as `tune` takes by default: from the second one on, kept states are served to methods like these.
LONG, KEEPING = 282, ("head_only", "ladder", "partial")
DATA = {"tiny-roberta": "peptides", "minilm": "reviews"}


Cell = tuple[str, str, int, str]


def cells() -> list[Cell]:
    """(model, method, steps, heap) of every comparison."""
    from tunewise.core.method import method_names

    pairs = [("minilm", "lora"), ("minilm", "full")] + [("tiny-roberta", name) for name in method_names()]
    sized = [(model, method, STEPS[model]) for model, method in pairs]
    sized += [("tiny-roberta", method, LONG) for method in KEEPING]
    return [(*one, heap) for one in sized for heap in HEAPS]


def options(method: str, steps: str) -> dict[str, Any]:
    """Arguments that both sides get."""
    return {"method": method, "steps": int(steps), "options": {"evaluations": 2}, "device": "cpu"}


def estimated(model: str, method: str, steps: str) -> dict[str, Any]:
    """What the estimate says."""
    from tunewise.study.estimate.estimate import estimate

    start = time.perf_counter()
    found = dataclasses.asdict(estimate(model, DATA[model], **options(method, steps)))
    return found | {"took": time.perf_counter() - start}


def real(model: str, method: str, steps: str) -> dict[str, Any]:
    """What a run reports; `cpu` are the loop's own CPU seconds, which a busy machine does not change."""
    import tunewise as tw
    from tunewise.loop.probe import FitHead
    from tunewise.loop.single import Single

    seconds: list[float] = []

    def timed(run: Any) -> Any:
        def wrapped(self: Any, *args: Any) -> None:
            start = time.process_time()
            run(self, *args)
            seconds.append(time.process_time() - start)

        return wrapped

    for loop in (Single, FitHead):
        loop.run = timed(loop.run)  # type: ignore[method-assign]
    result = tw.tune(model, DATA[model], final_test=False, **options(method, steps))
    names = ("trainable", "seconds", "peak_memory_mb")
    return {name: result.metrics[name] for name in names} | {"cpu": seconds[0]}


def child(side: str, model: str, method: str, steps: int, heap: str) -> dict[str, Any]:
    """One side in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "MALLOC_MMAP_THRESHOLD_"}
    environment |= {"OMP_NUM_THREADS": "1", **HEAPS[heap]}
    command = [sys.executable, __file__, side, model, method, str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{model} {method} {side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare(cell: Cell) -> dict[str, Any]:
    """One row of the result."""
    model, method, steps, heap = cell
    guess, truth = child("estimated", *cell), child("real", *cell)
    return {
        "model": model,
        "method": method,
        "steps": steps,
        "heap": heap,
        "how": guess["how"],
        "took": guess["took"],
        "trainable_equal": guess["trainable"] == truth["trainable"],
        "memory_ratio": guess["peak_memory_mb"] / truth["peak_memory_mb"],
        "time_ratio": guess["seconds"] / truth["cpu"],
        "estimated": guess,
        "real": truth,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of cells within bounds, by heap and of all."""
    from tunewise.study.estimate.timing import COLD

    found: dict[str, Any] = {"trainable_exact": all(r["trainable_equal"] for r in rows)}
    for heap in (*HEAPS, "all"):
        mine = [r for r in rows if heap in (r["heap"], "all")]
        memory, seconds = [r["memory_ratio"] for r in mine], [r["time_ratio"] for r in mine]
        found[heap] = {
            "cells": len(mine),
            "memory_within_10": sum(abs(v - 1) <= 0.10 for v in memory) / len(mine),
            "memory_within_25": sum(abs(v - 1) <= 0.25 for v in memory) / len(mine),
            # Real memory beyond the process and the frozen states, over what else is alive: where HEAP comes from.
            "kept_over_alive": statistics.median(v for r in mine if (v := _kept(r))),
            "memory_median": statistics.median(memory),
            "time_within_25": sum(abs(v - 1) <= 0.25 for v in seconds) / len(mine),
            "time_median": statistics.median(seconds),
            # Without the factor COLD: where it comes from.
            "time_alone": statistics.median(r["time_ratio"] / COLD for r in mine if r["how"] == "counted"),
        }
    return found


def _kept(row: dict[str, Any]) -> float:
    """0 for measured methods, whose parts are not known."""
    memory = row["estimated"]["memory"]
    if not memory:
        return 0.0
    states = memory.get("frozen states", 0.0)
    taken = row["real"]["peak_memory_mb"] - memory["process"] - states
    return float(taken / (row["estimated"]["alive_mb"] - states))


def main(again: Sequence[str] = ()) -> None:
    """Fills in the cells that are missing, and those of the methods that are to be measured again."""
    from tunewise.core.checkpoint import write_json
    from tunewise.machine import environment

    rows = json.loads(TARGET.read_text())["rows"] if TARGET.is_file() else []
    rows = [r for r in rows if r["method"] not in again]
    have = {(r["model"], r["method"], r["steps"], r["heap"]) for r in rows}
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(compare, [c for c in cells() if c not in have]):
            rows.append(row)
            write_json(TARGET, {"environment": environment(), "summary": {}, "rows": rows})
            shown = ("model", "method", "steps", "heap", "how", "memory_ratio", "time_ratio")
            print(*(f"{row[k]:.2f}" if isinstance(row[k], float) else row[k] for k in shown), flush=True)
    write_json(TARGET, {"environment": environment(), "summary": summary(rows), "rows": rows})
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["again"]:
        main(sys.argv[2:])
    elif len(sys.argv) > 1:
        side, *names = sys.argv[1:]
        print(json.dumps((estimated if side == "estimated" else real)(*names)))
    else:
        main()
