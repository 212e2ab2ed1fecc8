"""One trial in a worker: cut and continued, killed at awkward moments, and what it says it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.study import tiny_study
from tunewise.loop.single import Single
from tunewise.prepare import prepare_data
from tunewise.study.work import trial
from tunewise.study.work.commons import write_brief

LORA = "lora(rank=2, dropout=0.1)"


@pytest.fixture
def study(tmp_path: Path) -> str:
    """The folder of a study as a worker reads it."""
    tiny_study.folder(tmp_path / "model")
    data = prepare_data(tiny_study.rows(), say=lambda note: None)
    facts: dict[str, Any] = {"settings": {"batch_size": 32}, "device": "cpu", "general": None}
    write_brief(tmp_path, data, model=str(tmp_path / "model"), cache_bytes=2**24, seed=0, **facts)
    return str(tmp_path)


def test_a_trial_that_was_continued_equals_one_in_one_piece(study: str) -> None:
    common: dict[str, Any] = {"warmup_steps": 2, "last": True, "decay_from": 6}
    whole = trial.train(study, LORA, 1e-2, 3, 12, "whole", **common)
    trial.train(study, LORA, 1e-2, 3, 3, "cut", warmup_steps=2, last=False)
    trial.train(study, LORA, 1e-2, 3, 6, "cut", warmup_steps=2, last=False)
    cut = trial.train(study, LORA, 1e-2, 3, 12, "cut", **common)
    files = [Path(study) / name / "adaptation" / "adaptation.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert whole["metrics"]["score"] == cut["metrics"]["score"]
    rates = [row["lr"] for row in whole["curve"] if "loss" in row]
    assert rates[2:6] == [1e-2] * 4 and rates[-1] < rates[7] < 1e-2


def test_one_that_ended_before_its_row_is_not_trained_again(
    study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"last": True, "warmup_steps": 1, "decay_from": 3}
    first = trial.train(study, LORA, 1e-2, 0, 6, "a", **options)
    monkeypatch.setattr(Single, "run", lambda self, run: pytest.fail("it was trained again"))
    assert trial.train(study, LORA, 1e-2, 0, 6, "a", **options) == first


def test_one_that_was_killed_after_its_checkpoint_knows_what_it_took(study: str) -> None:
    first = trial.train(study, LORA, 1e-2, 0, 6, "a", last=False)
    again = trial.train(study, LORA, 1e-2, 0, 6, "a", last=False)
    for key in ("training", "tokens", "score"):
        assert first["metrics"][key] == again["metrics"][key] > 0
    assert first["curve"] == again["curve"] and len(first["curve"]) == 6
    longer = trial.train(study, LORA, 1e-2, 0, 8, "a", last=False)
    assert len(longer["curve"]) == 2
    shorter = trial.train(study, LORA, 1e-2, 0, 4, "a", last=False)
    assert len(shorter["curve"]) == 4


def test_the_base_model_is_given_back_as_it_was(study: str) -> None:
    from tunewise.study.work.commons import open_base

    base = open_base(study, "sequence_classification")
    frozen = {k: v.clone() for k, v in base.model.state_dict().items() if "classifier" not in k}
    for method in ("full", "lora(rank=2)", "ladder"):
        trial.train(study, method, 1e-2, 0, 3, method, last=False)
    assert open_base(study, "sequence_classification") is base
    assert all((v == base.model.state_dict()[k]).all() for k, v in frozen.items())
    trial.train(study, LORA, 1e-2, 0, 3, "again", last=False)
    first = trial.train(study, LORA, 1e-2, 1, 3, "fresh", last=False)
    second = trial.train(study, LORA, 1e-2, 1, 3, "other", last=False)
    assert first["curve"] == second["curve"]  # whatever was trained on the base before
