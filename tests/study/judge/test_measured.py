"""What the findings tell about trials: rows over seeds, settings, failures, costs, commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.study.made_study import COSTS, FACTS, ROWS, MadeStudy, rows_of
from tunewise.study.judge.findings import findings, front, table
from tunewise.study.store import Store


@pytest.fixture
def study(tmp_path: Path) -> Any:
    made = MadeStudy(tmp_path / "study")
    yield made
    made.store.close()


def test_failed_trials_are_rows_with_reasons(study: MadeStudy) -> None:
    study.tuned("lora", 1e-3, 0.8)
    study.tuned("lora", 1e-2, 0.6)
    study.tuned("lora", 1e-3, 0.85, rung=1, steps=30, peak_memory_mb=520.0)
    study.tuned("partial", 1e-4, 0.7)
    bad = study.store.start(study.store.add("full", 1e-3, steps=10).id)
    study.store.fail(bad.id, "The loss became NaN at step 4.", cost=3.0)
    study.classified("lora", range(20))
    found = study.find()
    assert found["failed"] == [
        {
            "trial": bad.id,
            "method": "full",
            "lr": 1e-3,
            "seed": 0,
            "steps": 10,
            "reason": "The loss became NaN at step 4.",
        }
    ]
    assert [t["id"] for t in found["trials"]] == [1, 2, 3, 4, 5]
    assert found["trials"][0]["curve"] == [{"step": 10, "loss": 0.5}]
    assert (found["trials"][4]["score"], found["trials"][4]["status"]) == (None, "failed")
    tried = [{"lr": 1e-3, "steps": 30, "score": 0.85}, {"lr": 1e-2, "steps": 10, "score": 0.6}]
    assert found["settings"][0] == {"method": "lora", "lr": 1e-3, "tried": tried}
    assert found["settings"][1]["lr"] is None
    assert found["spent"]["methods"] == {"lora": 35.0, "partial": 5.0, "full": 3.0}
    assert (found["spent"]["total"], found["spent"]["budget"]) == (570.0, 600.0)
    assert found["memory"] == {"lora": 520.0, "partial": 480.0}
    assert "Tuned but not measured on test rows: partial." in found["notes"]


def test_what_the_diary_tells_readers_is_in_the_notes(study: MadeStudy) -> None:
    study.classified("lora", range(20))
    study.store.set("notes", ["Rows were cut.", "Rows were cut."])
    study.store.event("memory", "lora: it goes on with 16 rows per forward pass.")
    study.store.event("log", "What a worker printed.")
    assert study.find()["notes"][:2] == ["Rows were cut.", "lora: it goes on with 16 rows per forward pass."]
    assert not any("printed" in note for note in study.find()["notes"])


def test_commands_that_reproduce(tmp_path: Path) -> None:
    options = {"label_column": "grade", "max_length": 64, "text_column": ["a", "b"], "skip_bad_rows": True}
    loop = {"batch_size": 32, "micro_batch": 16, "dtype": "bfloat16", "epochs": 2.0, "by_length": False}
    facts = {"metric": "macro_f1", "data": "my rows.csv", "options": options, "settings": loop}
    study = MadeStudy(tmp_path / "study", **facts)
    scores = {"macro_f1": 0.5, "steps": 240, "warmup_steps": 14, "decay_from": 80, "micro_batch": 8, **COSTS}
    study.measured("lora(rank=4)", 0.0005, 2, scores, None)
    with study.store:
        assert rows_of(study.find())["lora(rank=4)"]["command"] == (
            "tunewise tune minilm 'my rows.csv' --method 'lora(rank=4)' --lr 0.0005 --seed 2 --steps 240 "
            "--batch-size 32 --dtype bfloat16 --label-column grade --max-length 64 --text-column a,b "
            "--skip-bad-rows --metric macro_f1 --set micro_batch=8 --set by_length=False "
            "--set warmup_steps=14 --set decay_from=80"
        )
        for change in ({"data": None}, {"model": None}, {"custom_metric": True}):
            study.store.set("facts", {**FACTS, **facts, **change})
            assert rows_of(study.find())["lora(rank=4)"]["command"] is None


def test_missing_values_stay_missing(study: MadeStudy) -> None:
    study.classified("lora", range(20), forgetting=0.01, forgetting_kl=0.002)
    study.classified("full", range(20), rate=1e-5)
    found = study.find()
    rows = rows_of(found)
    assert rows["lora"]["forgetting"] == 0.01 and "forgetting" not in rows["full"]
    assert any(note.startswith("forgetting is not known of full") for note in found["notes"])
    flat = table(found)
    assert flat["forgetting"].isna().tolist() == [row["method"] == "full" for row in found["rows"]]


def test_seeds_may_differ_in_number(study: MadeStudy) -> None:
    for seed in range(4):
        study.tuned("lora", 1e-3, 0.5 + 0.1 * seed, seed=seed, rung=2, steps=90)
        study.classified("lora", range(10 + seed), seed=seed)
    study.classified("full", range(60))
    found = study.find()
    rows = rows_of(found)
    assert (rows["lora"]["seeds"], rows["full"]["seeds"]) == (4, 1)
    assert rows["lora"]["accuracy"] == pytest.approx(1 - 11.5 / ROWS)
    assert found["choice"]["seed"] == 3, "the validation score is that of the training of this seed"
    assert any(s.startswith("Only one seed was measured of full") for s in found["decision"])


def test_the_table_is_flat(study: MadeStudy) -> None:
    study.classified("lora", range(20))
    study.classified("full", range(30), rate=1e-5)
    found = study.find()
    flat = table(found)
    assert list(flat["method"]) == ["lora", "full"]
    assert flat["vs_best_difference"].iloc[1] == pytest.approx(-0.025) and pd.isna(flat["vs_best_p"].iloc[0])
    assert flat["vs_lora_verdict"].iloc[1] == flat["vs_best_verdict"].iloc[1] == "worse"
    assert not any(isinstance(value, (dict, list)) for value in flat.to_numpy().ravel())
    assert list(front(found)["method"]) == ["lora"]


def test_loss_stands_in_for_generated_text_while_tuning(tmp_path: Path) -> None:
    with Store.open(tmp_path / "study", {}) as store:
        store.set("facts", {**FACTS, "task": "causal", "metric": "exact_match"})
        for rate, loss in ((1e-4, 1.5), (1e-3, 1.2)):
            trial = store.start(store.add("lora", rate, steps=10).id)
            store.finish(trial.id, {"score": loss, "valid/loss": loss})
        found = findings(store)
    assert (found["metric"], found["higher_is_better"]) == ("valid/loss", False)
    assert found["rows"][0]["lr"] == 1e-3
