"""The summary of the training benchmark, from made-up rows: best rates, failures, what is missing, the bar."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from benchmarks import deltas
from tunewise.core.errors import UserError
from tunewise.core.method import get_method


def rows(name: str, losses: list[float | None], seeds: int = 3) -> list[dict[str, Any]]:
    """Three rates with these mean losses, the best with further seeds; None is a rate at which seed 0 failed."""
    found: list[dict[str, Any]] = []
    best = min(loss for loss in losses if loss is not None)
    for lr, loss in zip(get_method(name).lr, losses, strict=True):
        for seed in range(seeds if loss == best else 1):
            row: dict[str, Any] = {"method": name, "lr": lr, "seed": seed, "steps": 10}
            figures = {"accuracy": 0.8, "trainable": 7, "cpu_seconds": 5.0, "peak_memory_mb": 9.0}
            failed = loss is None and seed == 0
            row |= {"failed": "NaN"} if failed else {"loss": (loss or 0.1) + 0.01 * (seed - 1), **figures}
            found.append(row)
    return found


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> deltas.Rows:
    monkeypatch.setattr(
        deltas, "read_methods", lambda given: ["bitfit", "dora", "full", "linear_probe", "lora"]
    )
    probe = {"method": "linear_probe", "lr": None, "seed": 0, "steps": None}
    found = deltas.Rows(tmp_path / "rows.jsonl")
    everything = [probe | {"loss": 0.42, "accuracy": 0.83, "trainable": 5}, *rows("lora", [0.5, 0.4, None])]
    for row in everything + rows("full", [0.6, 0.5, 0.43]) + rows("bitfit", [0.2, 0.1, 0.2], seeds=2):
        found.add(row)
    return found


def test_each_method_counts_at_its_best_rate(kept: deltas.Rows) -> None:
    found = deltas.summary(kept, 10)
    lora = found["methods"]["lora"]
    assert lora["lr"] == get_method("lora").lr[1] and lora["below_probe"]
    assert [round(lora[k], 6) for k in ("loss", "loss_min", "loss_max")] == [0.4, 0.39, 0.41]
    assert lora["seconds_per_step"] == 0.5 and lora["failed"] == {str(get_method("lora").lr[2]): ["NaN"]}
    assert found["share_below"] == 0.5 and found["above"] == {"full": pytest.approx(0.43)}
    assert found["unfinished"] == ["bitfit", "dora"]


def test_finished_runs_are_not_run_again(kept: deltas.Rows) -> None:
    again = deltas.Rows(kept.file)
    assert again.rows == kept.rows
    first = [job for job in deltas.first_jobs(["lora", "bitfit"], 10) if job not in again]
    further = [job for job in deltas.further_jobs(["lora", "bitfit"], again, 10) if job not in again]
    assert not first and [(job.method, job.lr, job.seed) for job in further] == [
        ("bitfit", get_method("bitfit").lr[1], 2)
    ]
    longer = [job for job in deltas.first_jobs(["lora"], 11) if job not in again]
    assert [(job.lr, job.seed) for job in longer] == [(lr, 0) for lr in get_method("lora").lr]
    assert not list(deltas.further_jobs(["lora"], again, 11))  # no rate has been chosen yet
    retried = deltas.Rows(kept.file, again=True)
    failed = [job for job in deltas.first_jobs(["lora"], 10) if job not in retried]
    assert [job.lr for job in failed] == [get_method("lora").lr[2]]


def test_a_rate_that_one_seed_likes_loses_its_lead(kept: deltas.Rows) -> None:
    low, middle, _ = get_method("lora").lr
    row = next(r for r in kept.rows if (r["method"], r["lr"], r["seed"]) == ("lora", middle, 2))
    row["loss"] = 0.9
    assert "lora" in deltas.summary(kept, 10)["unfinished"]
    jobs = [job for job in deltas.further_jobs(["lora"], kept, 10) if job not in kept]
    assert [(job.lr, job.seed) for job in jobs] == [(low, 1), (low, 2)]


def test_a_rate_at_which_a_seed_fails_does_not_lead(kept: deltas.Rows) -> None:
    for row in [r for r in kept.rows if r["method"] == "full" and r["seed"] in (0, 2)]:
        row["failed"] = "NaN"
        row.pop("loss", None)
    full = deltas.summary(kept, 10)["methods"]["full"]
    assert (
        full["lr"] is None and full["loss"] is None and not full["below_probe"] and len(full["failed"]) == 3
    )


def test_other_names_are_refused() -> None:
    with pytest.raises(UserError, match='did you mean "lora"'):
        deltas.methods("lorra")


def test_prompts_for_texts_are_read_as_the_probe_reads_and_trained_longer() -> None:
    images, jobs = deltas.SETTINGS["vision"], deltas.first_jobs(["vpt", "lora"], 10)
    assert {(job.method, job.steps) for job in jobs} == {("linear_probe", None), ("vpt", 30), ("lora", 10)}
    assert deltas.spelled("vpt") == "vpt + PooledHead()" and deltas.spelled("vpt", images) == "vpt"
    assert deltas.spelled("idpt") == "idpt + PooledHead()" and deltas.length("idpt", 10) == 10
    assert deltas.spelled("cones") == "cones" and deltas.length("cones", 10) == 10
    assert deltas.length("vpt", 10, images) == deltas.length("zecoler", 10) == 10
    assert deltas.spelled("mvlpt") == "mvlpt" and deltas.length("mvlpt", 10) == 30


def test_images_are_a_setting_of_their_own(kept: deltas.Rows) -> None:
    vision = deltas.SETTINGS["vision"]
    assert deltas.methods(None, vision) == list(vision.names or ())
    assert all(get_method(name).lr for name in vision.names or ())
    found = deltas.summary(kept, 10, vision)
    assert (found["model"], found["data"], found["train"]) == ("dinov2-small", "fashion", vision.train)
    assert set(found["methods"]) == {"lora"} and "vpt" in found["unfinished"]
    with pytest.raises(UserError, match="dora"):
        deltas.methods("dora", vision)


def test_prompts_are_read_out_as_the_probe_reads(kept: deltas.Rows) -> None:
    there = pickle.loads(pickle.dumps(deltas.TEXT))  # as worker processes get it
    assert deltas.spelled("prompt_tuning", there) == "prompt_tuning + PooledHead()"
    assert deltas.spelled("prompt_tuning", deltas.SETTINGS["vision"]) == "prompt_tuning"
    assert deltas.spelled("lora", there) == "lora" and deltas.spelled("mvlpt", there) == "mvlpt"
