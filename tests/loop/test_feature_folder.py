"""Frozen states in a folder: equal to those in memory, found again by later runs, never mistaken for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.loop.test_features import MANY, examples, learn, model, run_of
from tunewise.core.errors import UserError
from tunewise.loop import feature_folder
from tunewise.loop.feature_folder import FeatureFolder
from tunewise.loop.features import frozen_features

KEYS = [(bytes([i]), b"row") for i in range(3)]


def test_a_folder_is_a_dict_that_outlives_the_process(tmp_path: Path, monkeypatch: Any) -> None:
    store = FeatureFolder(tmp_path / "states")
    values = [torch.randn(3, 4), torch.randn(2, 4).bfloat16(), torch.randn(1, 4)]
    store.update(dict(zip(KEYS, values, strict=True)))
    assert store.nbytes == sum(v.nbytes for v in values) and not list(store.folder.iterdir())
    assert all(torch.equal(store[k], v) for k, v in zip(KEYS, values, strict=True))
    store.write()
    store.write()
    assert len(list(store.folder.iterdir())) == 1
    again = FeatureFolder(tmp_path / "states")
    assert len(again) == 3 and set(again) == set(KEYS) and (b"?", b"row") not in again
    assert all(
        torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in zip(KEYS, values, strict=True)
    )
    again[KEYS[0]] = values[2]  # it is there already
    assert torch.equal(again[KEYS[0]], values[0])
    monkeypatch.setattr(feature_folder, "SHARD", 1)
    again[(b"new", b"row")] = values[0]
    assert len(list(store.folder.iterdir())) == 2
    assert again.get((b"other", b"row")) is None
    with pytest.raises(UserError, match="delete the folder"):
        del again[KEYS[0]]


def test_unfinished_files_are_passed_over_and_foreign_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "0.part").write_bytes(b"half")
    assert len(FeatureFolder(tmp_path)) == 0
    (tmp_path / "0.safetensors").write_bytes(b"nothing of ours")
    with pytest.raises(UserError, match="holds no frozen features"):
        FeatureFolder(tmp_path)
    (tmp_path / "0.safetensors").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt: frozen features need a folder of their own"):
        FeatureFolder(tmp_path)
    with pytest.raises(UserError, match="cannot be kept in"):
        FeatureFolder(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "method", ["lst(reduction=4)", "unipt", "qst(reduction=4)", "levi(size=6)", "light_decoder"]
)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_runs_with_a_folder_learn_the_same_as_without(kind: str, method: str, tmp_path: Path) -> None:
    def fresh() -> Any:
        head = "AutoModel" if method == "light_decoder" else "AutoModelForSequenceClassification"
        return run_of(model(kind, head), method)

    apart, *alone = learn(fresh(), {}, 0)
    kept, *memory = learn(fresh(), {}, order=0)
    first, *one = learn(fresh(), FeatureFolder(tmp_path), order=0)  # type: ignore[arg-type]
    second, *two = learn(fresh(), FeatureFolder(tmp_path), order=0)  # type: ignore[arg-type]
    assert apart.blocks == kept.blocks == first.blocks == second.blocks == 4
    assert first.computed == kept.computed > 0 and second.computed == 0 and second.served > 0
    for found in (one, two):
        assert found[:2] == memory[:2] and torch.equal(found[2], memory[2])
    assert memory[0] == pytest.approx(alone[0], rel=1e-4) and memory[1] == alone[1]


def test_a_folder_tells_weights_and_cuts_of_the_text_apart(tmp_path: Path) -> None:
    def computed(net: Any, rows: list[dict[str, Any]]) -> int:
        run = run_of(net, "head_only")
        run.model.eval()
        with frozen_features(run, FeatureFolder(tmp_path), limit_bytes=MANY) as features, torch.no_grad():
            run.forward(run.collate(rows))
        run.handle.detach()
        return features.computed

    rows, net = examples(4, 3), model("bert")
    assert computed(net, rows) == 4 and computed(net, rows) == 0
    assert computed(net, [{**row, "input_ids": row["input_ids"][:-1]} for row in rows]) == 4
    assert computed(model("bert", seed=1), rows) == 4
    with torch.no_grad():
        net.bert.embeddings.word_embeddings.weight[50] += 1.0  # type: ignore[union-attr,operator,index]
    assert computed(net, rows) == 4
    assert computed(net.double(), rows) == 4


def test_what_was_computed_before_a_failure_is_kept(tmp_path: Path) -> None:
    run = run_of(model("bert"), "head_only")
    with (
        pytest.raises(RuntimeError, match="stop"),
        frozen_features(run, FeatureFolder(tmp_path), limit_bytes=MANY),
    ):
        run.forward(run.collate(examples(3, 0)))
        raise RuntimeError("stop")
    assert len(FeatureFolder(tmp_path)) == 3


def test_tune_takes_the_folder_as_a_setting(tmp_path: Path) -> None:
    import tunewise as tw

    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": str(i % 2)} for i in range(24)]
    options = {"features": str(tmp_path / "states"), "evaluations": 1}
    losses = []
    for seed in (0, 0):
        result = tw.tune(
            "tiny-roberta", rows, method="lst", steps=3, seed=seed, options=options, device="cpu"
        )
        losses.append(result.metrics["valid/loss"])
    assert losses[0] == losses[1] and len(list((tmp_path / "states").iterdir())) == 1
