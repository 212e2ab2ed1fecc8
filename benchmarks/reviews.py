"""Mean test accuracy of LoRA, full fine-tuning and the linear probe on `reviews` (minilm), rates chosen on
valid.

    python benchmarks/reviews.py            # resumable; writes benchmarks/results/reviews.json

Every method tries the same number of rates with seed 0; the best on the validation rows is run with seeds 0,
1, 2. Only these last runs touch the test rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import tunewise as tw
from tunewise.core.checkpoint import write_json
from tunewise.machine import environment

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, tuple[float, ...]] = {
    "lora": (1e-3, 2e-3),
    "full": (1e-4, 2e-4),
    "linear_probe": (),
}


class Runs:
    """Runs by (method, rate, seed), kept in a file; what is there is not run again."""

    def __init__(self, file: Path, epochs: float) -> None:
        self.file, self.epochs = file, epochs
        self.rows: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.is_file() else []
        self.live: dict[tuple[Any, ...], Any] = {}

    def get(self, method: str, lr: float | None, seed: int, test: bool) -> dict[str, Any]:
        """One run, its test rows measured only when asked for."""
        key = (method, lr, seed)
        row = next((r for r in self.rows if (r["method"], r["lr"], r["seed"]) == key), None)
        if row is None or (test and "accuracy" not in row["metrics"] and key not in self.live):
            self.rows = [r for r in self.rows if r is not row]
            result = tw.tune(
                "minilm", "reviews", method=method, lr=lr, seed=seed, epochs=self.epochs, final_test=False
            )
            row = {"method": method, "lr": lr, "seed": seed, "epochs": self.epochs, "metrics": result.metrics}
            self.live[key] = result
            self.rows.append(row)
        if test and "accuracy" not in row["metrics"]:
            self.live[key].measure_test()
        write_json(self.file, {"environment": environment(), "runs": self.rows})
        print(json.dumps(row), flush=True)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "reviews.json"
    runs = Runs(file, options.epochs)
    summary = {}
    for method, rates in METHODS.items():
        tried = [runs.get(method, lr, 0, False) for lr in rates]
        lr = max(tried, key=lambda row: row["metrics"]["valid/accuracy"])["lr"] if tried else None
        rows = [runs.get(method, lr, seed, True) for seed in range(options.seeds if rates else 1)]
        values = [row["metrics"]["accuracy"] for row in rows]
        summary[method] = {
            "lr": lr,
            "accuracy": statistics.mean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            "seconds": statistics.mean(row["metrics"]["seconds"] for row in rows),
        }
    write_json(file, {"environment": environment(), "summary": summary, "runs": runs.rows})
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
