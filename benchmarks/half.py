"""Does LoRA train as well in bfloat16 as in float32? minilm on `reviews`, three seeds, the same test rows.

    python benchmarks/half.py --work runs/half     # resumable; writes benchmarks/results/half.json

Three ways: float32 throughout; `--dtype bfloat16` (products in bfloat16, weights as they are); and a base model
loaded in bfloat16 with trained tensors in float32. The difference to float32 is paired on rows and seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tunewise as tw
from tunewise.core.checkpoint import write_json
from tunewise.machine import environment
from tunewise.prepare import prepare_data
from tunewise.study.judge.statistics import interval, paired_difference

RESULT = Path(__file__).parent / "results" / "half.json"
WAYS = ("float32", "bfloat16", "bfloat16 base")
SEEDS = (0, 1, 2)
METHOD, RATE = "lora", 1e-3


def run(way: str, seed: int, epochs: float) -> dict[str, Any]:
    """One run and which of its test rows it got right, as a string of 0 and 1."""
    data = prepare_data("reviews", say=lambda sentence: None)
    labels = sorted({str(row["label"]) for row in data.splits.train})
    model: Any = "minilm"
    if way == "bfloat16 base":
        model = tw.load("minilm", auto="sequence_classification", labels=labels, dtype="bfloat16")
    dtype = "bfloat16" if way == "bfloat16" else None
    options: dict[str, Any] = {"method": METHOD, "lr": RATE, "seed": seed, "epochs": epochs, "dtype": dtype}
    result = tw.tune(model, "reviews", **options, final_test=False)
    found = result.predict([{k: v for k, v in row.items() if k != "label"} for row in data.splits.test])
    right = [
        str(f["prediction"]) == str(row["label"]) for f, row in zip(found, data.splits.test, strict=True)
    ]
    return {"metrics": result.metrics, "right": "".join("01"[r] for r in right)}


def summary(work: Path, ways: Sequence[str]) -> dict[str, Any]:
    """Accuracy of each way, and its difference to float32."""
    scores, peaks = {}, {}
    for way in ways:
        rows = [json.loads(place(work, way, seed).read_text(encoding="utf-8")) for seed in SEEDS]
        scores[way] = np.array([[int(c) for c in row["right"]] for row in rows])
        peaks[way] = max(row["metrics"]["peak_memory_mb"] for row in rows)
    found: dict[str, Any] = {}
    for way, values in scores.items():
        here = interval(values)
        found[way] = {"accuracy": [here.value, here.low, here.high], "peak_memory_mb": peaks[way]}
        if way != WAYS[0]:
            gap = paired_difference(values, scores[WAYS[0]])
            found[way] |= {"minus_float32": [gap.difference, gap.low, gap.high], "p": gap.p}
            found[way] |= {"as_good": gap.low <= 0 <= gap.high or gap.difference > 0}
    facts = {"model": "minilm", "data": "reviews", "method": METHOD, "lr": RATE, "seeds": list(SEEDS)}
    return {"environment": environment(), **facts, "ways": found}


def place(work: Path, way: str, seed: int) -> Path:
    """Where a run's row is kept."""
    return work / f"{way.replace(' ', '-')}-{seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--work", type=Path, default=Path("runs") / "half")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="run only these")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        for way in options.ways:
            if not place(options.work, way, seed).is_file():
                write_json(place(options.work, way, seed), run(way, seed, options.epochs))
                print(way, seed, "done", flush=True)
    whole = [way for way in WAYS if all(place(options.work, way, seed).is_file() for seed in SEEDS)]
    if WAYS[0] in whole:
        found = summary(options.work, whole)
        write_json(RESULT, found)
        print(json.dumps(found["ways"], indent=1))


if __name__ == "__main__":
    main()
