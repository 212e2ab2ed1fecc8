"""Findings of a comparison as they look after half an hour on real data, made up."""

from __future__ import annotations

import math
import random
from typing import Any

# method: quality, MiB at the peak, seconds, trainable, MiB on disk, seconds per 1,000 rows, forgetting, rate
METHODS = {
    "lora(rank=8)": (0.846, 905, 96, 405_504, 1.6, 1.31, 0.021, 1e-3),
    "full": (0.851, 1810, 141, 22_713_216, 86.7, 1.30, 0.184, 5e-5),
    "dora(rank=8)": (0.847, 1120, 164, 442_368, 1.7, 1.62, 0.019, 1e-3),
    "ia3": (0.829, 840, 88, 33_408, 0.14, 1.33, 0.008, 8e-3),
    "bitfit": (0.838, 790, 79, 51_840, 0.21, 1.30, 0.012, 4e-3),
    "houlsby_adapter(size=32)": (0.842, 870, 90, 298_368, 1.2, 1.45, 0.026, 1.5e-3),
    "prefix_tuning(length=20)": (0.801, 960, 118, 184_320, 0.74, 1.52, None, 1e-2),
    "top_layers(count=2)": (0.833, 520, 41, 3_549_696, 13.6, 1.30, 0.071, 2e-4),
    "vera(rank=256)": (0.831, 930, 110, 24_192, 0.1, 1.41, 0.006, 1e-2),
    "ladder": (0.822, 410, 52, 612_000, 2.4, 1.55, 0.0, 1e-3),
    "linear_probe": (0.794, 310, 12, 770, 0.003, 1.29, 0.0, 1e-2),
}
BASELINES = {"majority": (0.504, 0.001), "tfidf": (0.803, 1.9)}


def _row(name: str, kind: str, value: float, **more: Any) -> dict[str, Any]:
    row = {"method": name, "kind": kind, "accuracy": value}
    row |= {"accuracy_low": value - 0.017, "accuracy_high": value + 0.016, "macro_f1": value - 0.004}
    return {**row, "balanced_accuracy": value - 0.002, "loss": 1 - value, **more}


def _gap(value: float, other: float) -> dict[str, Any]:
    d = value - other
    verdict = "not told apart" if abs(d) < 0.012 else ("better" if d > 0 else "worse")
    return {
        "difference": d,
        "low": d - 0.012,
        "high": d + 0.011,
        "p": math.exp(-abs(d) * 250),
        "verdict": verdict,
    }


def _rows() -> list[dict[str, Any]]:
    rows = []
    for name, (value, mb, seconds, trainable, disk, inference, forgot, rate) in METHODS.items():
        command = f"tunewise tune minilm reviews --method '{name}' --lr {rate:g} --seed 0 --steps 1200"
        more = {"seconds": seconds + 0.25, "peak_memory_mb": mb + 0.37, "size_mb": disk, "steps": 1200}
        more |= {"lr": rate, "seeds": 3, "epochs": 3.0, "trainable": trainable, "command": command}
        more |= {"inference_seconds": inference, "forgetting": forgot, "directory": f"trials/{name}"}
        more |= {"vs_best": None if name == "full" else _gap(value, 0.851)}
        more |= {"vs_lora": None if name.startswith("lora") else _gap(value, 0.846)}
        beaten = name in ("dora(rank=8)", "prefix_tuning(length=20)", "vera(rank=256)")
        why = "houlsby_adapter(size=32) is better and needs 0.9 of the memory." if beaten else None
        rows.append(_row(name, "tuned", value, front=not beaten, why_not=why, **more))
    for name, (value, seconds) in BASELINES.items():
        more = {"seconds": seconds, "trainable": 0, "lr": None, "seeds": 1, "steps": 0, "vs_lora": None}
        more |= {"front": True, "why_not": None, "vs_best": _gap(value, 0.851), "command": None}
        rows.append(_row(name, "baseline", value, **more))
    return sorted(rows, key=lambda row: -row["accuracy"])


def _curve(value: float, off: float, first: int, last: int, noise: random.Random) -> list[dict[str, float]]:
    curve: list[dict[str, float]] = []
    for step in range(first + 10, last + 1, 10):
        progress = 1 - math.exp(-step / 260)
        curve.append({"step": step, "loss": 0.7 - (0.55 - off) * progress + noise.gauss(0, 0.04), "lr": 1e-3})
        if step % 50 == 0:
            score = 0.5 + (value - off - 0.5) * progress + noise.gauss(0, 0.004)
            curve.append({"step": step, "valid/accuracy": score, "valid/loss": 1 - score})
    return curve


def _trials() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Three rates for each method; the middle one is the best and goes on through three rungs."""
    noise, trials, failed = random.Random(0), [], []
    for name, (value, mb, seconds, *_, rate) in METHODS.items():
        for factor, off in ((0.3, 0.04), (1.0, 0.0), (3.0, 0.02)):
            first = 0
            for rung, steps in enumerate((150, 450, 1200) if factor == 1 else (150, 450)[: 1 + (off < 0.03)]):
                curve = _curve(value, off, first, steps, noise)
                trial = {"id": len(trials) + 1, "method": name, "lr": rate * factor, "seed": 0, "rung": rung}
                trial |= {"steps": steps, "status": "done", "reason": None, "curve": curve}
                trial |= {"score": curve[-1]["valid/accuracy"], "seconds": seconds * (steps - first) / 1200}
                trials.append({**trial, "peak_memory_mb": mb})
                first = steps
    last = [t for t in trials if t["score"] < 0.77 and t["rung"] == 0]
    for trial, reason in ((last[3], "The loss was NaN at step 37."), (last[5], "Out of memory.")):
        trial |= {"status": "failed", "reason": reason, "score": None, "curve": trial["curve"][:4]}
        failed.append({"trial": trial["id"], **{k: trial[k] for k in ("method", "lr", "seed", "steps")}})
        failed[-1]["reason"] = reason
    return trials, failed


def findings() -> dict[str, Any]:
    """Eleven methods, two baselines, thirty-three configurations, two failures, one forgetting not measured."""
    rows, (trials, failed) = _rows(), _trials()
    settings = []
    for name, figures in METHODS.items():
        done = [t for t in trials if t["method"] == name and t["status"] == "done"]
        last = {t["lr"]: {"lr": t["lr"], "steps": t["steps"], "score": t["score"]} for t in done}
        settings.append(
            {"method": name, "lr": figures[-1], "tried": sorted(last.values(), key=lambda t: t["lr"])}
        )
    methods = {r["method"]: 2.1 * r["seconds"] for r in rows}
    return {
        "title": "minilm on reviews: 13 methods compared",
        "metric": "accuracy",
        "higher_is_better": True,
        "decision": [
            "Take lora(rank=8) at learning rate 0.001. lora(rank=8) is as good within the interval as the best "
            "(0.846 against 0.851) and needs 0.5 of the memory.",
            "These 4 methods cannot be told apart with this data: full, dora(rank=8), lora(rank=8), "
            "houlsby_adapter(size=32).",
            "Fine-tuning is worth it: full is ahead of the best baseline, tfidf (0.803), by 0.048 (0.025 to 0.071).",
        ],
        "choice": {
            "method": "lora(rank=8)",
            "lr": 1e-3,
            "seed": 0,
            "trial": 5,
            "directory": "trials/lora-0-0",
            "sentence": "Of those within 1 % of the best, lora(rank=8) needs the least memory.",
            "prefer": "quality within 1%, then memory",
        },
        "rows": rows,
        "trials": trials,
        "failed": failed,
        "settings": settings,
        "spent": {
            "total": 1741.0,
            "budget": 1800.0,
            "stages": {"setup": 61.0, "tuning": 1020.0, "measuring": 655.0},
            "methods": methods,
        },
        "memory": {r["method"]: r["peak_memory_mb"] for r in rows if "peak_memory_mb" in r},
        "notes": [
            "forgetting is not known of prefix_tuning(length=20): without it a row cannot be on the front."
        ],
        "command": "tunewise compare minilm reviews --budget 30m --prefer 'quality within 1%, then memory'",
        "environment": {"python": "3.12.3", "torch": "2.9.0", "cpu": "2 cores", "tunewise": "0.1.0"},
    }
