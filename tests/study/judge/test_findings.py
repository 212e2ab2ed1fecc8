"""From finished trials to a decision: small studies whose right answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.study.made_study import COSTS, FACTS, ROWS, MadeStudy, rows_of
from tunewise.core.errors import UserError
from tunewise.study.judge.findings import findings, front, table
from tunewise.study.schedule import MEASURE
from tunewise.study.store import Store
from tunewise.task.metrics import regression_scores


@pytest.fixture
def study(tmp_path: Path) -> Any:
    made = MadeStudy(tmp_path / "study")
    yield made
    made.store.close()


def test_a_clear_winner(study: MadeStudy) -> None:
    for seed in range(3):
        study.classified("full", range(seed, 20 + seed), seed=seed, seconds=60.0 + seed)
        study.classified("lora", range(100, 180 + seed), seed=seed, seconds=90.0)
        study.tuned("full", 1e-3, [0.8, 0.9, 0.7][seed], seed=seed, rung=2, steps=90)
    study.baseline("majority", range(0, ROWS, 2))
    found = study.find()
    rows = rows_of(found)
    assert list(rows) == ["full", "lora", "majority"]
    assert found["decision"][0].startswith(
        "Take full at learning rate 0.001. full has the highest accuracy: 0.950 ("
    )
    assert "Every other method is further from it than chance explains." in found["decision"]
    assert any(
        s.startswith("Fine-tuning is worth it: full is ahead of the best baseline") for s in found["decision"]
    )
    assert rows["full"]["vs_best"] is None and rows["lora"]["vs_lora"] is None
    against = rows["lora"]["vs_best"]
    assert against["verdict"] == "worse" and against["p"] < 0.01
    assert against["difference"] == pytest.approx(0.7975 - 0.95)
    assert against["low"] < against["difference"] < against["high"] < 0
    assert rows["full"]["vs_lora"]["verdict"] == "better"
    assert rows["full"]["accuracy_low"] < 0.95 < rows["full"]["accuracy_high"] != 0.9
    assert (rows["full"]["seeds"], rows["full"]["seconds"], rows["full"]["trainable"]) == (3, 61.0, 1000)
    assert found["choice"]["seed"] == 1, "the best seed by validation rows"
    assert found["choice"]["trial"] == rows["full"]["trial"] == 4
    assert found["choice"]["directory"] == "trials/0004"
    assert not any("too good" in note for note in found["notes"])
    assert rows["majority"]["front"] and not rows["lora"]["front"]
    assert rows["lora"]["why_not"].startswith("full is better (0.950 against 0.797)")
    assert found["title"] == "minilm on reviews: 3 methods compared"


def test_two_that_tie(study: MadeStudy) -> None:
    study.classified("full", range(20))
    study.classified("bias_scale", range(1, 22), trainable=10, peak_memory_mb=490.0, seconds=30.0)
    study.classified("lora", range(100, 180))
    found = study.find()
    rows = rows_of(found)
    assert rows["bias_scale"]["vs_best"]["verdict"] == "not told apart"
    assert "These 2 methods cannot be told apart with this data: full, bias_scale." in found["decision"]
    assert any("test rows would be needed (there are 400)" in s for s in found["decision"])
    assert found["decision"][-1] == (
        "As good as full within the noise, and cheaper: bias_scale trains in 0.5 of the time and trains 0.01 of "
        "the parameters."
    )
    note = next(note for note in found["notes"] if "too good" in note)
    assert note.startswith("full is the best on the same test rows") and "tests against lora" in note
    chosen = study.find(prefer="quality within the noise, then parameters")
    assert chosen["choice"]["method"] == "bias_scale"
    assert chosen["choice"]["prefer"] == "quality within the noise, then parameters"
    assert chosen["decision"][0].startswith(
        "Take bias_scale at learning rate 0.001. bias_scale has the lowest"
    )
    assert chosen["decision"][1].startswith("full has the highest accuracy: 0.950")
    assert [row["method"] for row in chosen["rows"]] == ["full", "bias_scale", "lora"]


@pytest.mark.parametrize("plain", ["tfidf", "linear_probe", "head_only", "linear_probe(l2=1.0)"])
def test_what_does_not_tune_the_model_ties(study: MadeStudy, plain: str) -> None:
    study.classified("full", range(20))
    if plain == "tfidf":
        study.baseline(plain, range(1, 23))
    else:
        study.classified(plain, range(1, 23), rate=None)
    worth = f"not worth it with this data: {plain} (0.945) is as good as full (0.950) within the noise."
    assert f"Fine-tuning is {worth}" in study.find()["decision"]


def test_a_baseline_that_wins(study: MadeStudy) -> None:
    study.baseline("tfidf", range(4))
    study.classified("lora", range(100))
    found = study.find()
    assert found["decision"][0].startswith(
        "Do not fine-tune with this data: take tfidf. tfidf has the highest accuracy"
    )
    assert (
        "Fine-tuning is not worth it with this data: every tuned method is worse than tfidf (0.990)."
        in found["decision"]
    )
    assert found["choice"]["method"] == "tfidf" and rows_of(found)["tfidf"]["command"] is None


def test_regression_where_lower_is_better(tmp_path: Path) -> None:
    study = MadeStudy(tmp_path / "study", task="regression", metric="rmse", higher_is_better=False)
    make = np.random.default_rng(0)
    truth = make.normal(3, 2, ROWS)
    noise = make.normal(size=(2, ROWS))
    for method, size in (("lora", 0.5), ("full", 0.3)):
        for seed in range(2):
            said = truth + size * noise[seed]
            scores = {**regression_scores(truth, said), **COSTS, "steps": 90}
            study.tuned(method, 1e-4, [0.4, 0.2][seed], seed=seed, **{"valid/rmse": 0.4})
            study.measured(method, 1e-4, seed, scores, study.frame(reference=truth, prediction=said))
    with study.store:
        found = study.find()
    rows = rows_of(found)
    assert list(rows) == ["full", "lora"] and not found["higher_is_better"]
    assert rows["lora"]["vs_best"]["difference"] > 0 and rows["lora"]["vs_best"]["verdict"] == "worse"
    assert rows["lora"]["rmse"] == pytest.approx(5 / 3 * rows["full"]["rmse"])
    assert found["choice"]["seed"] == 1, "the lower validation error"
    assert "full has the lowest rmse" in found["decision"][0]
    assert rows["full"]["command"] == (
        "tunewise tune minilm reviews --method full --lr 0.0001 --seed 1 --steps 90 --batch-size 32"
    )


def test_a_preference_that_cannot_be_followed_does_not_cost_the_results(tmp_path: Path) -> None:
    study = MadeStudy(tmp_path / "study", prefer="forgetting")
    study.classified("lora", range(20))
    with study.store:
        found = study.find()
        assert found["choice"]["prefer"] == "quality"
        assert any('not by "forgetting"' in note for note in found["notes"])
        with pytest.raises(UserError, match="No row has a measured forgetting"):
            study.find(prefer="forgetting")


def test_nothing_measured_yet(study: MadeStudy) -> None:
    study.tuned("full", 1e-5, 0.9)
    study.tuned("full", 1e-5, 0.7, rung=1, steps=30)
    study.tuned("lora", 1e-3, 0.8, rung=1, steps=30)
    study.tuned("lora", 1e-2, 0.6, rung=1, steps=30)
    study.store.add("full", 1e-5, rung=2, steps=90)
    study.baseline("tfidf", range(40))
    found = study.find()
    assert found["metric"] == "valid/accuracy" and found["choice"] is None
    assert found["decision"] == [
        "Nothing is decided: no tuned method was measured on test rows.",
        "lora leads on validation rows so far: accuracy 0.800 after 30 steps at learning rate 0.001.",
        "On test rows the best baseline is tfidf: accuracy 0.900.",
        "Not finished: 1 trial (full).",
    ]
    assert [(r["method"], r.get("valid/accuracy")) for r in found["rows"]] == [
        ("lora", 0.8),
        ("full", 0.7),
        ("tfidf", None),
    ]
    assert all(row["vs_best"] is None for row in found["rows"])
    assert len(front(found)) == 0 and len(table(found)) == 3


def test_an_empty_study(tmp_path: Path) -> None:
    with Store.open(tmp_path / "study", {}) as store:
        with pytest.raises(UserError, match="ended before its first trial"):
            findings(store)
        store.set("facts", FACTS)
        found = findings(store)
        assert found["decision"] == ["Nothing is decided: no tuned method was measured on test rows."]
        assert len(table(found)) == len(front(found)) == 0


def test_a_resumed_study_finds_the_same(tmp_path: Path) -> None:
    study = MadeStudy(tmp_path / "study")
    study.classified("lora", range(20))
    study.store.start(study.store.add("full", 1e-5, rung=MEASURE, steps=90).id)
    before = findings(study.store)
    study.store.close()
    with Store.open(tmp_path / "study", {}) as store:
        after = findings(store)
        assert after == before
        said = "No time was left to read the test rows with 1 trial (full)."
        assert after["decision"][-1] == said
