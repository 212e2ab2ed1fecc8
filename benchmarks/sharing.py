"""What sharing frozen features saves: probe, head-only and top-two-layer trials, apart and together.

    python benchmarks/sharing.py        # one thread, one process; writes benchmarks/results/sharing.json

Model minilm, data `reviews`. Apart, each trial loads the model, reads and encodes the rows and computes every
state in every step, as a training loop does. Together, the trials share one loaded model per head, one encoding
and one store, as in a study. With a store of its own, each trial loads everything and keeps its states from one
epoch to the next, as `tune` does. The sides take turns, trial by trial, so that a machine that slows down slows
down all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunewise.core.checkpoint import write_json
from tunewise.core.handle import attach
from tunewise.core.run import Run
from tunewise.loop.evaluate import predict_rows
from tunewise.loop.features import frozen_features
from tunewise.loop.settings import Settings
from tunewise.machine import environment, seed_everything
from tunewise.prepare import Prepared, complete, default_sizes, encode, load_base, prepare_data

RATES = {"linear_probe": (1e-3,), "head_only": (3e-4, 3e-3, 1e-2), "partial": (3e-5, 2e-4, 1e-3)}
TRIALS = [(method, rate) for method, rates in RATES.items() for rate in rates]
LIMIT = 2**30
BAR = 0.4


def quiet(sentence: str) -> None:
    """Nothing is said here."""


@dataclass
class Kept:
    """What the trials of one study have in common: rows, models by head, kept states."""

    models: dict[str, Prepared] = field(default_factory=dict)
    store: dict[Any, Any] = field(default_factory=dict)

    def prepared(self, method: str) -> Prepared:
        """The base model as this method's head reads it; loaded and encoded the first time only."""
        kind = type(complete(method, None, None).single("head")).__name__
        if kind not in self.models:
            data = prepare_data("reviews", say=quiet)
            seed_everything(0)
            self.models[kind] = load_base("minilm", None, method, data, torch.device("cpu"), quiet)
            encode(self.models[kind], ("train", "valid"), quiet)
        return self.models[kind]


def trial(kept: Kept, method: str, rate: float, epochs: float, limit: int) -> dict[str, Any]:
    """One trial and its validation predictions; `limit` is what may be kept of frozen states, in bytes."""
    started, busy = time.perf_counter(), time.process_time()
    prepared = kept.prepared(method)
    recipe = complete(method, prepared.data.task, prepared.model.config)
    for head in recipe["head"]:
        head.setup(prepared.data.task, prepared.tokenizer, prepared.model)  # type: ignore[attr-defined]
    seed_everything(0)
    handle = attach(prepared.model, recipe)
    sizes = default_sizes("classification", "cpu")
    run = Run(
        handle,
        data=prepared.examples,
        task=prepared.data.task,
        settings=Settings.of(lr=rate, epochs=epochs, **sizes),
    )
    run.tokenizer = prepared.tokenizer
    with frozen_features(run, kept.store, limit_bytes=limit, order=0) as features:
        handle.recipe.single("loop").run(run)  # type: ignore[union-attr]
        predictions, losses = predict_rows(run, prepared.examples["valid"])
    metrics = prepared.data.task.metrics(predictions, prepared.examples["valid"])
    handle.detach()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
        "accuracy": metrics["accuracy"],
        **losses,
        "predictions": predictions,
        "rows_served": features.served,
        "rows_computed": features.computed,
    }


def compare(epochs: float) -> dict[str, Any]:
    """All trials on all sides, taking turns; the first side changes from trial to trial."""
    together, rows = Kept(), []
    for number, (method, rate) in enumerate(TRIALS):
        sides = [("apart", Kept(), 0), ("together", together, LIMIT)]
        if number % 2:
            sides.reverse()
        sides.append(("own store", Kept(), LIMIT))
        found = {name: trial(kept, method, rate, epochs, limit) for name, kept, limit in sides}
        predicted = {name: one.pop("predictions") for name, one in found.items()}
        row: dict[str, Any] = {"method": method, "lr": rate, **found}
        row["predictions_differ"] = sum(
            a != b for a, b in zip(predicted["apart"], predicted["together"], strict=True)
        )
        row["loss_difference"] = abs(found["apart"]["loss"] - found["together"]["loss"])
        rows.append(row)
        print(json.dumps(row), flush=True)
    names = [name for name in rows[0] if isinstance(rows[0][name], dict)]
    seconds = {name: sum(row[name]["seconds"] for row in rows) for name in names}
    cpu = {name: sum(row[name]["cpu_seconds"] for row in rows) for name in names}
    return {
        "epochs": epochs,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "ratio": seconds["together"] / seconds["apart"],
        "cpu_ratio": cpu["together"] / cpu["apart"],
        "cpu_ratio_to_own_store": cpu["together"] / cpu["own store"],
        "bar": BAR,
        "largest_accuracy_difference": max(
            abs(r["apart"]["accuracy"] - r["together"]["accuracy"]) for r in rows
        ),
        "largest_loss_difference": max(r["loss_difference"] for r in rows),
        "predictions_that_differ": sum(r["predictions_differ"] for r in rows),
        "store_mb": sum(value.nbytes for value in together.store.values()) / 2**20,
        "trials": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=3.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = compare(options.epochs)
    target = Path(__file__).parent / "results" / "sharing.json"
    write_json(target, {"environment": environment(), **found})
    print(json.dumps({k: v for k, v in found.items() if k != "trials"}, indent=1))


if __name__ == "__main__":
    main()
