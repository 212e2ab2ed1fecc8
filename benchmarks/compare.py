"""What a comparison within a budget loses against a long search, on the same test rows.

    python benchmarks/compare.py reviews repeat --times 3     # `compare minilm reviews --budget 30m`, three times
    python benchmarks/compare.py reviews reference            # every rate of every method to the end, three seeds
    python benchmarks/compare.py reviews summary              # writes benchmarks/results/compare_reviews.json
    (the same with `peptides`)
    python benchmarks/compare.py reviews twelve               # twelve other methods; writes compare_twelve.json

Everything is resumable: studies stand in the folder --work, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import tunewise as tw
from tunewise.core.checkpoint import write_json
from tunewise.core.method import read_recipe
from tunewise.machine import environment
from tunewise.study.judge.findings import findings
from tunewise.study.judge.row_scores import TestRows
from tunewise.study.judge.statistics import best_of, interval, paired_difference
from tunewise.study.portfolio import prior, rates, read_methods
from tunewise.study.schedule import MEASURE
from tunewise.study.store import Store

RESULTS = Path(__file__).parent / "results"
METRIC = "accuracy"
CASES: dict[str, dict[str, Any]] = {
    "reviews": {"model": "minilm", "budget": "30m", "steps": 189},
    "peptides": {"model": "tiny-roberta", "budget": "10m", "steps": 329},
}
TWELVE: tuple[str, ...] = (
    "lora_plus",
    "dora",
    "pissa",
    "eva",
    "miss",
    "nola",
    "fourierft",
    "loca",
    "bitfit",
    "difffit",
    "lift",
)
TWELVE += ("sara",)
"""One of each kind in the catalog: low-rank, spectral, sparse, the model's own parameters."""
DEFAULT = "lora(rank=8)"
"""LoRA again, under another name, at its default rate."""
LONG = "24h"
RULE = (
    "Each decision is the one that this version takes from the stored rows, whichever version ran the trials."
)


def repeat(case: dict[str, Any], data: str, work: Path, times: int) -> None:
    """Studies with other seeds each; a finished one is not run again."""
    for number in range(times):
        folder = work / f"{data}-{number}"
        if (folder / "done.json").is_file():
            continue
        start = time.monotonic()
        study = tw.compare(
            case["model"], data, budget=case["budget"], seed=100 * number, out=folder, say=print
        )
        wall = time.monotonic() - start
        write_json(folder / "done.json", {"wall": wall, "decision": study.decision})


def reference(case: dict[str, Any], data: str, work: Path) -> None:
    """Each rate of each method with seed 0, then the best rate of each with seeds 1 and 2, all to the end."""
    names = read_methods("default", "classification")
    priors = {name: prior(read_recipe(name)) for name in names}
    grid = [
        {"method": name, "lr": lr, "seed": 0, "steps": case["steps"] if lr else 0}
        for name in names
        for lr in rates(priors[name], 3)
    ]
    first = tw.compare(case["model"], data, trials=grid, budget=LONG, out=work / f"{data}-grid", say=print)
    chosen = {row["method"]: row["lr"] for row in first.findings["rows"] if row["kind"] == "tuned"}
    more = [
        {"method": name, "lr": lr, "seed": seed, "steps": case["steps"]}
        for name, lr in chosen.items()
        if lr is not None
        for seed in (1, 2)
    ]
    default = prior(read_recipe("lora"))[1]
    more += [{"method": DEFAULT, "lr": default, "seed": seed, "steps": case["steps"]} for seed in range(3)]
    tw.compare(case["model"], data, trials=more, budget=LONG, out=work / f"{data}-seeds", say=print)


def twelve(case: dict[str, Any], data: str, work: Path, budget: str) -> dict[str, Any]:
    """A study of `TWELVE` beside LoRA and the baselines: its rows, and how far each method came on validation rows."""
    names, folder = ["lora", "linear_probe", *TWELVE], work / f"{data}-twelve"
    study = tw.compare(case["model"], data, methods=names, budget=budget, out=folder, say=print)
    costs = ("trainable", "seconds", "peak_memory_mb", "size_mb")
    keys = (
        "method",
        "kind",
        "lr",
        "seeds",
        "steps",
        METRIC,
        f"{METRIC}_low",
        f"{METRIC}_high",
        *costs,
        "front",
    )
    return {
        "model": case["model"],
        "data": data,
        "budget": budget,
        "environment": environment(),
        "decision": study.decision,
        "failed": study.findings["failed"],
        "rows": [{key: row.get(key) for key in keys} for row in study.findings["rows"]],
        "validation": validation(folder),
    }


def validation(folder: Path) -> dict[str, dict[str, Any]]:
    """method -> rate, steps and accuracy on validation rows of its best trial of the most steps; all that took part."""
    found: dict[str, dict[str, Any]] = {}
    with Store.read(folder) as store:
        for trial in sorted(
            (t for t in store.trials("done") if t.rung != MEASURE and t.metrics),
            key=lambda t: (t.steps, t.metrics["score"]),
        ):
            reached = {"lr": trial.rate, "steps": trial.steps, METRIC: trial.metrics[f"valid/{METRIC}"]}
            found[trial.method] = reached
    return found


def scores(folders: list[Path]) -> dict[str, np.ndarray]:
    """method -> right or wrong `[seeds, rows]` of everything that the studies measured on the test rows."""
    found: dict[str, list[np.ndarray]] = {}
    for folder in folders:
        with Store.read(folder) as store:
            reader = TestRows(store, store.get("facts"))
            for trial in store.trials("done"):
                if trial.rung == MEASURE:
                    found.setdefault(trial.method, []).append(np.asarray(reader.scores([trial]))[0])
    return {name: np.stack(rows) for name, rows in found.items()}


def summary(case: dict[str, Any], data: str, work: Path) -> dict[str, Any]:
    """Per repeat: what was chosen, and against the long reference, if it was run, the regret and the rest."""
    places = [work / f"{data}-grid", work / f"{data}-seeds"]
    long = scores(places) if all((place / "findings.json").is_file() for place in places) else {}
    default = long.pop(DEFAULT, None)
    found: dict[str, Any] = {"case": {**case, "data": data}, "environment": environment(), "rule": RULE}
    found["repeats"] = []
    if default is not None:
        found["reference"] = {n: {"accuracy": float(r.mean()), "seeds": len(r)} for n, r in long.items()}
        found["reference_best"] = best_of(long)
        found["default_lora"] = {"accuracy": float(default.mean()), "seeds": len(default)}
    for folder in sorted(work.glob(f"{data}-[0-9]")):
        if (folder / "done.json").is_file():
            found["repeats"].append(one_repeat(folder, long, default))
    return found


def one_repeat(folder: Path, long: dict[str, np.ndarray], default: np.ndarray | None) -> dict[str, Any]:
    """How one study within the budget ended."""
    from scipy.stats import kendalltau

    with Store.read(folder) as store:  # judged by this version: a decision is a function of the stored rows
        found = findings(store)
    own, chosen = scores([folder]), found["choice"]["method"]
    tuned = [r for r in found["rows"] if r["kind"] == "tuned" and r.get(METRIC) is not None]
    value = interval(own[chosen])
    made: dict[str, Any] = {
        "wall_seconds": json.loads((folder / "done.json").read_text())["wall"],
        "budget_seconds": found["spent"]["budget"],
        "methods_finished": len(tuned),
        "chosen": chosen,
        "accuracy": [value.value, value.low, value.high],
        "rows": [{k: r.get(k) for k in ("method", "lr", "seeds", METRIC, "steps")} for r in tuned],
        "decision": found["decision"],
    }
    if default is None:
        return made
    regret = paired_difference(long[best_of(long)], own[chosen])
    against = paired_difference(own[chosen], default)
    both = [name for name in own if name in long]
    tau = kendalltau([own[n].mean() for n in both], [long[n].mean() for n in both])
    return made | {
        "regret": [regret.difference, regret.low, regret.high],
        "minus_default_lora": [against.difference, against.low, against.high],
        "kendall_tau": float(tau.statistic),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=CASES)
    parser.add_argument("part", choices=("repeat", "reference", "summary", "twelve"))
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--budget", default="30m", help="of the twelve")
    parser.add_argument("--work", type=Path, default=Path("studies"))
    options = parser.parse_args()
    case = CASES[options.data]
    if options.part == "repeat":
        repeat(case, options.data, options.work, options.times)
    elif options.part == "reference":
        reference(case, options.data, options.work)
    else:
        few = options.part == "twelve"
        part = (case, options.data, options.work)
        found = twelve(*part, options.budget) if few else summary(*part)
        write_json(RESULTS / f"compare_{'twelve' if few else options.data}.json", found)
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
