"""Forgetting: zero at the start, positive after a change, equal to what is computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tunewise as tw
from tests.models import tiny
from tests.task.tiny import tiny_tokenizer
from tunewise.core.errors import UserError
from tunewise.diagnose.forgetting import base_side, contrast, general_texts

ROWS = [
    {"text": text}
    for text in ("good film one two", "bad film a", "hi user one", "dull fine a b c d e", "two 1 2 3")
]
BERT = tiny_tokenizer(bert=True)
PLAIN = tiny_tokenizer()


def shaken(handle: Any, by: float = 0.3) -> None:
    """Everything trainable moves."""
    make = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(by * torch.randn(p.shape, generator=make))


def words_of(model: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


METHODS = [
    "lora",
    "full",
    "bias_scale",
    "series_adapter",
    "parallel_adapter",
    "prompt_tuning",
    "prefix_tuning",
    "ladder",
]
KINDS = {"bert": "pairs", "roberta": "masked token", "llama": "next token"}
# Prompts and prefixes are no identity at the start.
MOVED = ("prompt_tuning", "prefix_tuning")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_zero_at_the_start_and_positive_after_a_change(name: str, method: str) -> None:
    model = tiny(name)
    general = base_side(model, PLAIN if name == "llama" else BERT, general=ROWS)
    assert general.kind == KINDS[name]
    handle = tw.attach(model, method, seed=0)
    start = general.measure(handle)
    assert start["general_loss"] == general.loss
    if method not in MOVED:
        assert abs(start["forgetting"]) < 1e-6 and abs(start["forgetting_kl"]) < 1e-6
    shaken(handle, 5.0 if method == "prefix_tuning" else 0.3)
    after = general.measure(handle)
    assert after["forgetting_kl"] > 1e-5 and after["forgetting"] != 0.0
    assert after == general.measure(handle)  # the base's side is what it was
    handle.detach()
    again = tw.attach(model, "lora", seed=0)
    assert general.measure(again)["forgetting_kl"] == pytest.approx(0.0, abs=1e-6)


def test_next_tokens_by_hand() -> None:
    model = tiny("gpt2")
    general = base_side(model, PLAIN, general=ROWS)
    ids = [PLAIN(row["text"])["input_ids"] for row in ROWS]
    old = [words_of(model, row) for row in ids]
    handle = tw.attach(model, "full")
    shaken(handle, 0.05)
    new = [words_of(model, row) for row in ids]
    places = sum(len(row) - 1 for row in ids)
    losses = [
        sum(-float(p[i, row[i + 1]]) for p, row in zip(side, ids, strict=True) for i in range(len(row) - 1))
        for side in (old, new)
    ]
    kl = sum(float((p.exp() * (p - q))[:-1].sum()) for p, q in zip(old, new, strict=True))
    found = general.measure(handle)
    assert found["general_loss"] == pytest.approx(losses[0] / places, rel=1e-5)
    assert found["forgetting"] == pytest.approx((losses[1] - losses[0]) / places, rel=1e-4)
    assert found["forgetting_kl"] == pytest.approx(kl / places, rel=1e-4)


def test_masks_are_always_the_same_and_hide_the_word() -> None:
    first, second = (base_side(tiny("roberta"), BERT, general=ROWS) for _ in range(2))
    assert first.loss == second.loss
    model, total, count = tiny("roberta"), 0.0, 0
    for batch in first.batches:
        for row, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True):
            assert 1 <= int((row == BERT.mask_token_id).sum()) <= 0.15 * int(mask.sum()) + 1
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.inputs.items()}).logits.flatten(0, 1)[batch.at]
        assert (batch.inputs["input_ids"].flatten()[batch.at] == BERT.mask_token_id).all()
        assert BERT.mask_token_id not in batch.targets
        total += float(F.cross_entropy(logits, batch.targets, reduction="sum"))
        count += len(batch.targets)
    assert first.loss == pytest.approx(total / count, rel=1e-5)


def test_contrast_by_hand() -> None:
    # cos(a_1, b_1) = 1, cos(a_1, b_2) = 0, cos(a_2, .) = 0.6 and 0.8.
    pooled = torch.tensor([[2.0, 0.0], [3.0, 4.0], [5.0, 0.0], [0.0, 0.1]])
    found = contrast(pooled, temperature=0.5).exp()
    first, second = math.exp(2) / (math.exp(2) + 1), math.exp(1.6) / (math.exp(1.2) + math.exp(1.6))
    assert found.diagonal().tolist() == pytest.approx([first, second])
    assert found.sum(1).tolist() == pytest.approx([1.0, 1.0])


def test_pairs_are_halves_of_the_same_text() -> None:
    model = tiny("bert")
    general = base_side(model, BERT, general=ROWS)
    halves = [
        ("good film", "one two"),
        ("bad film", "a"),
        ("hi user", "one"),
        ("dull fine", "a b c d e"),
        ("two 1", "2 3"),
    ]
    texts, _ = general_texts(ROWS)
    ordered = sorted(halves, key=lambda h: texts.index(" ".join(h)))
    body: Any = model.base_model
    ids = [torch.tensor([BERT(h[i])["input_ids"]]) for i in (0, 1) for h in ordered]
    with torch.no_grad():
        states = [body(input_ids=row).last_hidden_state.mean(1) for row in ids]
    assert general.loss == pytest.approx(-float(contrast(torch.cat(states)).diagonal().mean()), rel=1e-4)


def classifier(tied: bool) -> Any:
    """A decoder that was loaded for classification, without its output layer over words."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    plain: Any = tiny("llama").config
    return LlamaForSequenceClassification(
        LlamaConfig(**{**plain.to_dict(), "tie_word_embeddings": tied})
    ).eval()


def test_a_decoder_without_output_layer_reads_its_tied_embeddings() -> None:
    model, row = classifier(True), {"text": "dull fine a b c d e"}
    general = base_side(model, PLAIN, general=[row])
    handle = tw.attach(model, "full")
    base = model.model.embed_tokens.weight.detach().clone()
    shaken(handle, 0.1)
    ids = PLAIN(row["text"])["input_ids"]

    def loss() -> float:
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            logits = hidden @ model.model.embed_tokens.weight.T
        return float(F.cross_entropy(logits[:-1], torch.tensor(ids[1:])))

    tuned = loss()
    found = general.measure(handle)
    assert not torch.equal(base, model.model.embed_tokens.weight)
    handle.deactivate()
    assert general.loss == pytest.approx(loss(), rel=1e-5)
    assert found["forgetting"] == pytest.approx(tuned - loss(), rel=1e-4)


def test_an_output_layer_that_is_not_there_is_said() -> None:
    general = base_side(classifier(False), PLAIN, general=ROWS)
    assert general.loss is None and "output layer" in general.reason


def test_an_encoder_gets_the_output_layer_of_its_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    whole = tiny("roberta")
    whole.save_pretrained(tmp_path)  # type: ignore[operator]
    BERT.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    general = base_side(model, BERT, name=str(tmp_path), general=ROWS)
    assert general.kind == "masked token"
    assert general.loss == pytest.approx(base_side(whole, BERT, general=ROWS).loss, rel=1e-6)
    handle = tw.attach(model, "full")
    assert general.measure(handle)["forgetting_kl"] == pytest.approx(0.0, abs=1e-6)
    shaken(handle, 0.05)
    twin = tw.attach(whole, "full")
    twin.load_state({n: handle.state().get(n, v) for n, v in twin.state().items()})
    shared = general.measure(handle), general.measure(twin)
    # The output layer's dense part is the base's in one and trained in neither: the same model twice.
    assert shared[0] == pytest.approx(shared[1], rel=1e-4)
    assert base_side(model, BERT, general=ROWS).kind == "pairs"  # nobody said where it is from


def test_a_tokenizer_that_cannot_read_the_text_is_said() -> None:
    general = base_side(tiny("bert"), BERT, study="reviews")
    assert general.loss is None and "--general" in general.reason and "reviews/nyt" in general.reason
    assert general.measure(tw.attach(tiny("bert"), "lora")) == {}
    for name in ("vit", "t5"):
        assert "not measured" in base_side(tiny(name), BERT, general=ROWS).reason
    assert "not measured" in base_side(nn.Linear(2, 2), BERT).reason


def test_adaptations_are_switched_off_for_the_base() -> None:
    model = tiny("llama")
    plain = base_side(model, PLAIN, general=ROWS)
    handle = tw.attach(model, "full")
    shaken(handle)
    assert base_side(model, PLAIN, general=ROWS).loss == plain.loss
    assert handle.active
    assert plain.measure(handle)["forgetting_kl"] > 1e-3


def test_modes_and_random_state_are_left_alone() -> None:
    model = tiny("llama").train()
    state = torch.get_rng_state()
    general = base_side(model, PLAIN, general=ROWS)
    general.measure(tw.attach(model, "lora", seed=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.model.modules() if not hasattr(m, "part"))  # type: ignore[union-attr]


def test_what_is_no_longer_known_is_refused() -> None:
    model = tiny("llama")
    general = base_side(model, PLAIN, general=ROWS)
    handle = tw.attach(model, "lora")
    handle.deactivate()
    with pytest.raises(UserError, match="switched off"):
        general.measure(handle)
    handle.detach()
    with pytest.raises(UserError, match="undo=True"):
        general.measure(tw.attach(model, "full", undo=False))


def test_texts() -> None:
    texts, name = general_texts()
    assert name == "reviews/nyt" and len(texts) == len(set(texts)) == 256
    assert general_texts(study="reviews/nyt")[1] == "reviews/amazon"
    rows = [
        {"headline": "a", "body": "longer text", "n": 3},
        {"headline": "b", "body": "longer text", "n": 4},
    ]
    assert general_texts(rows)[0] == ["longer text"]
    with pytest.raises(UserError, match="no column of text"):
        general_texts([{"n": 3}])
    with pytest.raises(UserError, match="long enough"):
        base_side(tiny("llama"), PLAIN, general=[{"text": "good"}])
