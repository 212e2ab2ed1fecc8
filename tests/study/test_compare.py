"""A whole comparison on a tiny model: fixed trials, tuning within a budget, bad trials, objects, refusals."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.study import tiny_study
from tunewise.core.errors import RunError, UserError
from tunewise.core.method import read_recipe
from tunewise.study import conduct
from tunewise.study.compare import compare
from tunewise.study.store import Store
from tunewise.study.study import Study

BAD = str(Path(__file__).with_name("bad_methods.py"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    place = tmp_path_factory.mktemp("tiny")
    return str(tiny_study.folder(place / "model")), str(tiny_study.file(place / "rows.jsonl"))


@pytest.mark.slow
def test_bad_trials_are_rows_with_reasons_and_the_others_go_on(
    tiny: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduct, "SILENCE", 6.0)
    names = [f"{BAD}:{name}" for name in ("nan", "grow", "hang", "fall")]
    trials = [{"method": name, "lr": 1e-3, "steps": 40} for name in [*names, "lora(rank=2)"]]
    alone = compare(*tiny, trials=trials[-1:], budget="5m", out=tmp_path / "alone", workers=1)
    study = compare(*tiny, trials=trials, budget="5m", memory="4GB", workers=2, out=tmp_path / "study")
    reasons = {row["method"].rpartition(":")[2]: row["reason"] for row in study.findings["failed"]}
    assert set(reasons) == {"nan", "grow", "hang", "fall"}
    assert "became nan" in reasons["nan"]
    assert reasons["grow"].startswith("ran out of memory (limit ")
    assert reasons["grow"].endswith("even with one row per forward pass")
    assert reasons["hang"] == "hung: no sign of life for 6.0 s"
    assert reasons["fall"] == "The trap was stepped on."
    good = study.table.set_index("method").loc["lora(rank=2)"]
    assert good["accuracy"] == alone.table.set_index("method").loc["lora(rank=2)"]["accuracy"]
    with Store.read(study.folder) as store:
        halved = [event["micro_batch"] for event in store.events("memory")]
    assert halved == [16, 8, 4, 2, 1]
    assert "hung" in study.report.read_text(encoding="utf-8")


def test_a_budget_is_divided_kept_and_used(tiny: tuple[str, str], tmp_path: Path) -> None:
    said: list[str] = []
    start = time.monotonic()
    study = compare(
        *tiny, methods="head_only, lora(rank=2)", budget="45s", seeds=2, out=tmp_path / "s", say=said.append
    )
    assert time.monotonic() - start < 60
    table = study.table.set_index("method")
    assert {"head_only", "lora(rank=2)", "linear_probe", "full", "majority", "tfidf"} <= set(table.index)
    assert table.loc["lora(rank=2)", "seeds"] >= 1 and table.loc["full", "steps"] > 0
    costs = ["seconds", "peak_memory_mb", "trainable", "size_mb", "inference_seconds"]
    tuned = table[table["kind"] == "tuned"]
    assert tuned[costs].notna().all().all() and (tuned["peak_memory_mb"] > 50).all()
    assert any("configurations" in sentence for sentence in said)
    trials = study.trials
    rates = trials[(trials["method"] == "full") & (trials["rung"] == 0)]["rate"]
    assert rates.nunique() >= 3
    chosen = study.findings["choice"]["method"]
    if table.loc[chosen, "kind"] == "tuned":
        assert study.best.predict([{"text": "w4 w5 w6 w7", "label": "low"}])[0]["prediction"] in (
            "low",
            "high",
        )
    finalist = study.folder / table.loc["full", "directory"]
    assert (finalist / "adaptation" / "adaptation.safetensors").is_file()
    again = Study(study.folder)
    assert again.decision == study.decision and len(again.front) >= 1


def test_the_same_call_again_runs_nothing_anew(tiny: tuple[str, str], tmp_path: Path) -> None:
    trials = [{"method": "head_only", "lr": 1e-2, "steps": 8, "seed": s} for s in (0, 1)]
    options: dict[str, Any] = {"trials": trials, "budget": "5m", "out": tmp_path / "s", "workers": 1}
    first = compare(*tiny, **options)
    second = compare(*tiny, **options)
    assert (first.trials["attempts"] == 1).all() and second.trials.equals(first.trials)
    with pytest.raises(UserError, match="another trials"):
        compare(*tiny, **{**options, "trials": trials[:1]})


def test_a_trial_that_goes_wrong_does_not_touch_the_others(tiny: tuple[str, str], tmp_path: Path) -> None:
    trials = [{"method": f"{BAD}:{name}", "lr": 1e-3, "steps": 9} for name in ("nan", "fall")]
    trials.append({"method": "head_only", "lr": 1e-2, "steps": 9})
    study = compare(*tiny, trials=trials, budget="5m", workers=1, out=tmp_path / "s")
    reasons = [row["reason"] for row in study.findings["failed"]]
    assert "became nan" in reasons[0] and reasons[1] == "The trap was stepped on."
    assert "head_only" in set(study.table["method"])
    with pytest.raises(RunError, match="stepped on"):
        compare(*tiny, trials=trials[1:2], budget="2m", workers=1, out=tmp_path / "none")
    assert (tmp_path / "none" / "report.html").is_file()


def test_objects_stay_in_this_process(tmp_path: Path) -> None:
    def share(predictions: list[Any], references: list[Any]) -> float:
        return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)

    pair = (tiny_study.model(), tiny_study.tokenizer())
    before = {k: v.clone() for k, v in pair[0].state_dict().items()}
    study = compare(
        pair,
        tiny_study.rows(),
        trials=[{"method": read_recipe("linear_probe")}, {"method": "linear_probe(pooling='last')"}],
        metric=share,
        budget="2m",
        out=tmp_path / "s",
    )
    table = study.table.set_index("method")
    row = table.loc["linear_probe"]
    assert 0.3 < row["share"] <= 1 and math.isclose(row["share"], row["accuracy"])
    assert len(table) >= 4
    assert all((v == before[k]).all() for k, v in pair[0].state_dict().items())


def test_what_cannot_be_compared_is_refused(tiny: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seeds=0"):
        compare(*tiny, seeds=0, out=tmp_path / "a")
    with pytest.raises(UserError, match='did you mean "lora"'):
        compare(*tiny, methods="lorra", out=tmp_path / "b")
    with pytest.raises(UserError, match='The time "soon"'):
        compare(*tiny, budget="soon", out=tmp_path / "c")
    with pytest.raises(UserError, match="Nothing can be preferred"):
        compare(*tiny, prefer="beauty", out=tmp_path / "d")
    with pytest.raises(UserError, match="was over before the methods were timed"):
        compare(*tiny, methods="lora", budget="1s", out=tmp_path / "e")
    with pytest.raises(UserError, match="fits into --memory"):
        compare(*tiny, methods="lora", memory="10MB", out=tmp_path / "f")


def test_trials_and_options_that_mean_nothing_are_refused(tiny: tuple[str, str], tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"trials": [{"method": "lora"}]}, "needs lr and steps, for example lr=0.001"),
        ({"trials": [{"method": "linear_probe", "steps": 3}]}, "neither lr nor steps"),
        ({"options": {"epochs": 3}}, "epochs is what a comparison decides by itself"),
        ({"tokenizer": tiny_study.tokenizer()}, "a named one brings its own"),
        ({"general": [{"number": 3}]}, "no column of text"),
    ]
    for place, (options, words) in enumerate(refused):
        with pytest.raises(UserError, match=words):
            compare(*tiny, out=tmp_path / str(place), **options)


def test_another_study_in_this_process_reads_its_own_rows(tmp_path: Path) -> None:
    pair = (tiny_study.model(), tiny_study.tokenizer())
    options: dict[str, Any] = {
        "methods": [read_recipe("linear_probe")],
        "budget": "2m",
        "out": tmp_path / "s",
    }
    counts = []
    for count in (240, 160):
        study = compare(pair, tiny_study.rows(count), **options)
        with Store.read(study.folder) as store:
            counts.append(store.get("facts")["rows"]["test"])
        kept = next(study.folder.glob("trials/*linear*/*/test.parquet"))
        assert len(pd.read_parquet(kept)) == counts[-1]
        shutil.rmtree(tmp_path / "s")
    assert counts[0] > counts[1]
    assert all(not name.startswith("tw_") for name, _ in pair[0].named_modules())


def test_a_dry_run_plans_and_tunes_nothing(tiny: tuple[str, str], tmp_path: Path) -> None:
    said: list[str] = []
    study = compare(*tiny, methods="lora", budget="2m", out=tmp_path / "s", dry_run=True, say=said.append)
    assert any("learning rates each" in sentence for sentence in said)
    assert len(study.trials) == 0


def test_where_lower_is_better(tiny: tuple[str, str], tmp_path: Path) -> None:
    numbers = [{"text": row["text"], "grade": float(len(row["text"].split()))} for row in tiny_study.rows()]
    trials = [
        *[{"method": "head_only", "lr": lr, "steps": 30} for lr in (1e-6, 1e-2)],
        {"method": "linear_probe"},
    ]
    study = compare(
        tiny[0],
        numbers,
        task="regression",
        label_column="grade",
        trials=trials,
        budget="5m",
        workers=1,
        out=tmp_path / "s",
    )
    table = study.table.set_index("method")
    assert study.findings["metric"] == "rmse" and not study.findings["higher_is_better"]
    assert {"mean", "tfidf", "head_only", "linear_probe"} <= set(table.index)
    assert table.loc["head_only", "lr"] == 1e-2  # the rate with the lower error
    assert study.findings["choice"]["method"] == table["rmse"].idxmin()


def test_a_language_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = LlamaConfig(**sizes, vocab_size=tiny_study.VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_study.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": row["text"], "answer": "w5 w6 w7"} for row in tiny_study.rows(160)]
    study = compare(
        str(tmp_path / "model"),
        rows,
        task="causal",
        text_column="prompt",
        label_column="answer",
        trials=[{"method": "lora(rank=2)", "lr": 1e-2, "steps": 20}],
        budget="5m",
        workers=1,
        out=tmp_path / "s",
    )
    table = study.table.set_index("method")
    assert study.findings["metric"] == "loss"
    assert table.loc["lora(rank=2)", "loss"] < table.loc["zero_shot", "loss"]
    assert any(
        "Forgetting is not measured" in note for note in study.findings["notes"]
    )  # of another language
