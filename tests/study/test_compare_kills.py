"""A study that is killed again and again ends with the rows of one that was not."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.study import tiny_study
from tunewise.study.store import Store
from tunewise.study.study import Study

ROOT = Path(__file__).parents[2]
KILLS = 20
TIMED = ("training", "alone", "seconds", "peak_memory_mb", "inference_seconds")
TRIALS = [
    *[
        {"method": name, "lr": lr, "seed": seed, "steps": 150}
        for name in ("lora(rank=2, dropout=0.1)", "full", "head_only", "ladder")
        for lr, seed in ((1e-3, 0), (1e-2, 0), (1e-2, 1))
    ],
    {"method": "linear_probe"},
]
CODE = """
import json, sys
from tunewise.study.compare import compare
model, data, out, trials = sys.argv[1:]
compare(model, data, trials=json.loads(trials), budget="2h", out=out, workers=2)
"""


def start(place: Path, out: Path) -> subprocess.Popen[bytes]:
    words = [str(place / "model"), str(place / "rows.jsonl"), str(out), json.dumps(TRIALS)]
    return subprocess.Popen([sys.executable, "-c", CODE, *words], cwd=ROOT, stderr=subprocess.PIPE)


def rows(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What each finished trial found, without what a clock or a machine decides."""
    with Store.read(folder) as store:
        return {
            (t.method, t.rate, t.seed, t.rung, t.steps): {
                "curve": t.curve,
                **{key: value for key, value in t.metrics.items() if key not in TIMED},
            }
            for t in store.trials("done")
        }


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    tiny_study.folder(tmp_path / "model")
    tiny_study.file(tmp_path / "rows.jsonl")
    whole = start(tmp_path, tmp_path / "whole")
    begun = time.monotonic()
    assert whole.wait() == 0, whole.stderr and whole.stderr.read()
    length = time.monotonic() - begun
    expected, pick, kills, number = rows(tmp_path / "whole"), random.Random(1), 0, 0
    assert len(expected) > len(TRIALS)
    while kills < KILLS:
        number += 1
        study = tmp_path / f"killed-{number}"
        while True:
            process = start(tmp_path, study)
            limit = pick.uniform(0.1, 0.6) * length if kills < KILLS else None
            try:
                code = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                continue
            assert code == 0, process.stderr and process.stderr.read()
            break
        found = rows(study)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == value, (number, key)
        assert (
            Study(study).findings["choice"]["method"]
            == Study(tmp_path / "whole").findings["choice"]["method"]
        )
