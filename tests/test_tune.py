"""`tune` from end to end on a real tiny model: objects, folders, resume, and what can be done afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tunewise as tw
from tunewise.assets import demo_rows

FAST: dict[str, Any] = {"steps": 6, "batch_size": 8, "max_length": 40, "options": {"evaluations": 2}}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """A few real peptides."""
    return [{k: v for k, v in r.items() if k != "id"} for r in demo_rows("peptides")[::40]]


@pytest.fixture(scope="module")
def finished(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("runs") / "a"
    return tw.tune("tiny-roberta", rows, method="lora(rank=2)", out=out, seed=3, **FAST)


def test_the_run_folder_holds_what_is_promised(finished: Any) -> None:
    folder = finished.directory
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "run.json",
        "metrics.jsonl",
        "report.html",
        "adaptation/adaptation.json",
        "adaptation/adaptation.safetensors",
    }
    facts = json.loads((folder / "run.json").read_text())
    assert facts["status"] == "done" and facts["identity"]["seed"] == 3
    assert (
        facts["metrics"]["accuracy_low"] <= facts["metrics"]["accuracy"] <= facts["metrics"]["accuracy_high"]
    )
    assert facts["metrics"]["trainable"] == finished.handle.trainable
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "loss" in s] == [1, 2, 3, 4, 5, 6]
    assert sum("valid/accuracy" in s for s in steps) == 2


def test_predictions_are_the_same_from_memory_and_from_the_folder(
    finished: Any, rows: list[dict[str, Any]]
) -> None:
    here, there = finished.predict(rows[:9]), tw.predict(finished.directory, rows[:9])
    assert here == there and {p["prediction"] for p in here} <= {"AMP", "UniProt"}
    again = tw.evaluate(finished.directory, rows)
    assert again["accuracy"] == finished.evaluate(rows)["accuracy"]
    assert tw.evaluate(finished.directory)["accuracy"] == finished.metrics["accuracy"]


def test_the_merged_folder_gives_the_same_logits_without_tunewise(finished: Any, tmp_path: Path) -> None:
    from tunewise.tune import merge_run

    merged = merge_run(finished.directory, tmp_path / "merged")
    code = (
        "import sys, json, torch\n"
        "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T\n"
        "m, t = M.from_pretrained(sys.argv[1]).eval(), T.from_pretrained(sys.argv[1])\n"
        "assert 'tunewise' not in sys.modules\n"
        "print(json.dumps([m.config.id2label['0' if '0' in m.config.id2label else 0], m(**t(['ACDEF'], "
        "return_tensors='pt')).logits.tolist()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(merged)], capture_output=True, text=True, check=True
    )
    label, logits = json.loads(done.stdout.splitlines()[-1])
    inputs = finished.tokenizer(["ACDEF"], return_tensors="pt")
    with torch.no_grad():
        expected = finished.model.eval()(**inputs).logits
    assert label == "AMP"
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-5)


def test_an_occupied_folder_is_refused_and_a_finished_run_is_not_run_again(finished: Any, rows: Any) -> None:
    with pytest.raises(tw.UserError, match="already holds a run"):
        tw.tune("tiny-roberta", rows, method="lora(rank=2)", out=finished.directory, seed=3, **FAST)
    with pytest.raises(tw.UserError, match="another seed"):
        tw.tune(
            "tiny-roberta", rows, method="lora(rank=2)", out=finished.directory, seed=4, resume=True, **FAST
        )
    again = tw.tune(
        "tiny-roberta", rows, method="lora(rank=2)", out=finished.directory, seed=3, resume=True, **FAST
    )
    assert again.metrics == pytest.approx(
        json.loads((finished.directory / "run.json").read_text())["metrics"]
    )


def test_a_module_a_frame_and_a_metric_of_ones_own(rows: list[dict[str, Any]]) -> None:
    import pandas as pd

    def share_of_amp(predictions: list[str], references: list[str]) -> float:
        return sum(p == "AMP" for p in predictions) / len(predictions)

    model, tokenizer = tw.load("tiny-roberta", auto="sequence_classification", labels=["AMP", "UniProt"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = tw.tune((model, tokenizer), pd.DataFrame(rows), method="bias_scale", metric=share_of_amp, **FAST)
    assert 0 <= result.metrics["share_of_amp"] <= 1 and result.model is model
    result.handle.detach()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_datasets_object_a_cloze_head_and_regression() -> None:
    import datasets

    peptides = demo_rows("peptides")[::40]
    data = datasets.Dataset.from_list([{"sequence": r["sequence"], "label": r["label"]} for r in peptides])
    pooled = tw.tune("tiny-roberta", data, method="lora + PooledHead()", **FAST)
    assert pooled.metrics["accuracy"] > 0
    numbers = [{"sequence": r["sequence"], "length": float(len(r["sequence"]))} for r in peptides]
    found = tw.tune(
        "tiny-roberta", numbers, method="full", label_column="length", text_column="sequence", **FAST
    )
    assert {"rmse", "pearson", "valid/rmse"} <= set(found.metrics)


def test_a_dry_run_trains_nothing_and_says_sites_tensors_counts_and_order(rows: list[dict[str, Any]]) -> None:
    plan = tw.tune("tiny-roberta", rows, method="lora", dry_run=True).plan
    assert plan["trainable"] == sum(t["count"] for t in plan["tensors"])
    assert any(s["role"] == "query" for s in plan["sites"]) and plan["steps"] > 0


def test_a_loss_that_becomes_nan_ends_the_run_and_keeps_the_last_good_state(
    rows: Any, tmp_path: Path
) -> None:
    with pytest.raises(tw.RunError, match="lower learning rate"):
        tw.tune("tiny-roberta", rows, method="full", lr=1e30, out=tmp_path / "a", checkpoint_every=1, **FAST)
    kept = sorted((tmp_path / "a" / "checkpoints").glob("step-*/tensors.safetensors"))
    assert kept and all(torch.isfinite(v).all() for v in load_file(kept[0]).values() if v.is_floating_point())


def test_a_full_disk_is_refused_before_training(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(tw.UserError, match="MiB left"):
        tw.tune("tiny-roberta", rows, method="lora", out=tmp_path / "a", **FAST)
    assert not (tmp_path / "a" / "metrics.jsonl").exists()


def test_two_prompts_of_bad_input_are_one_sentence(rows: list[dict[str, Any]]) -> None:
    for options, words in (
        ({"method": "lroa"}, 'did you mean "lora"'),
        ({"method": "lora(r=8)"}, 'here it is called "rank"'),
        ({"method": "lora", "label_column": "lable"}, 'did you mean "label"'),
        ({"method": "lora", "options": {"paitence": 1}}, 'did you mean "patience"'),
        ({"method": "lora", "device": "cpux"}, 'did you mean "cpu"'),
        ({"method": "lora", "task": "clasification"}, 'did you mean "classification"'),
    ):
        with pytest.raises(tw.UserError, match=words) as caught:
            tw.tune("tiny-roberta", rows, **options)
        assert "\n" not in str(caught.value)
