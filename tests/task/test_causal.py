from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.models import tiny
from tests.task.tiny import CHATML, tiny_tokenizer
from tunewise.core.errors import UserError
from tunewise.data import Columns
from tunewise.task import Task, generate, generation_metrics, make_task

PROMPTED = Columns(("prompt",), "answer", "causal")
ROWS: list[dict[str, Any]] = [
    {"id": "x", "prompt": "a b c", "answer": "good"},
    {"id": "y", "prompt": "hi", "answer": "bad film #### 2"},
]
MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "good"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "bad film"},
]


def learnt(tokenizer: Any, example: dict[str, Any]) -> str:
    return str(tokenizer.decode([i for i in example["labels"] if i != -100]))


@pytest.mark.parametrize("chat", [None, CHATML])
@pytest.mark.parametrize("pad", ["[PAD]", "<|end|>"])
def test_the_answer_and_its_end_are_learnt_whatever_the_pad_token_is(chat: str | None, pad: str) -> None:
    tokenizer, task = tiny_tokenizer(chat=chat, pad=pad), make_task("causal", PROMPTED)
    examples = task.encode(ROWS, tokenizer)
    assert [learnt(tokenizer, e) for e in examples] == ["good <|end|>", "bad film #### 2 <|end|>"]
    batch = task.collate(examples, tokenizer)
    assert batch.units.tolist() == [2, 5] and batch.labels is not None
    assert batch.inputs["attention_mask"].sum(1).tolist() == [e["length"] for e in examples]
    assert (batch.labels[batch.inputs["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_agree_with_the_plain_loss_on_either_padding_side(side: str) -> None:
    tokenizer, task, model = tiny_tokenizer(), make_task("causal", PROMPTED), tiny("llama").eval()
    examples = task.encode(ROWS, tokenizer)
    batch = task.collate(examples, tokenizer, side)
    with torch.no_grad():
        losses = task.losses(model(**batch.inputs).logits, batch)
        for example, loss in zip(examples, losses, strict=True):
            ids = torch.tensor([example["input_ids"]])
            labels = torch.tensor(example["labels"][1:])
            alone = F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels, reduction="sum")
            assert torch.allclose(loss, alone, atol=1e-4)


def test_logits_made_longer_by_a_soft_prompt_are_read_from_their_end() -> None:
    tokenizer, task = tiny_tokenizer(), make_task("causal", PROMPTED)
    batch = task.collate(task.encode(ROWS, tokenizer), tokenizer)
    logits = torch.randn(*batch.inputs["input_ids"].shape, len(tokenizer), requires_grad=True)
    longer = torch.cat([torch.randn(2, 3, len(tokenizer)), logits], 1)
    assert torch.equal(task.losses(longer, batch), task.losses(logits, batch))
    task.losses(longer, batch).sum().backward()
    assert batch.labels is not None and logits.grad is not None
    supervised = F.pad(batch.labels[:, 1:] != -100, (0, 1))
    assert torch.equal(logits.grad.abs().sum(-1) > 0, supervised)
    with pytest.raises(UserError, match="expected"):
        task.losses(logits[:, 1:], batch)


def test_every_assistant_turn_of_a_chat_is_learnt() -> None:
    tokenizer, task = tiny_tokenizer(chat=CHATML), make_task("causal", Columns(("messages",), None, "causal"))
    example = task.encode([{"id": "m", "messages": MESSAGES}], tokenizer)[0]
    assert learnt(tokenizer, example) == "good <|end|> bad film <|end|>"
    with pytest.raises(UserError, match="chat template"):
        make_task("causal", Columns(("messages",), None, "causal")).encode(
            [{"id": "m", "messages": MESSAGES}], tiny_tokenizer()
        )


def test_plain_text_is_learnt_whole() -> None:
    tokenizer, task = tiny_tokenizer(), make_task("causal", Columns(("text",), None, "causal"), max_length=3)
    rows = [{"id": "a", "text": "a b"}, {"id": "b", "text": "a b c d e"}]
    examples = task.encode(rows, tokenizer)
    assert [learnt(tokenizer, e) for e in examples] == ["b <|end|>", "b c"]
    assert "1 of 2 rows" in task.notes[0]


def test_long_prompts_lose_their_start_inside_the_template_and_answers_nothing() -> None:
    tokenizer, row = tiny_tokenizer(chat=CHATML), {"id": "x", "prompt": "a b c d e", "answer": "good film"}
    whole = make_task("causal", PROMPTED).encode([row], tokenizer)[0]
    task = make_task("causal", PROMPTED, max_length=whole["length"] - 2)
    example = task.encode([row], tokenizer)[0]
    text = tokenizer.decode(example["input_ids"])
    assert "c d e" in text and " b " not in text and learnt(tokenizer, example) == "good film <|end|>"
    assert example["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|start|>")
    assert example["length"] <= whole["length"] - 2 and "1 of 1 rows" in task.notes[0]
    with pytest.raises(UserError, match="Row x: its answer has 3 tokens"):
        make_task("causal", PROMPTED, max_length=3).encode([row], tokenizer)


def test_a_prompt_reads_the_same_with_and_without_its_answer() -> None:
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer(chat=CHATML)):
        task = make_task("causal", PROMPTED)
        full, prompt = task.encode(ROWS, tokenizer), task.encode(ROWS, tokenizer, labelled=False)
        for a, b in zip(full, prompt, strict=True):
            assert a["input_ids"][: b["length"]] == b["input_ids"] and b["labels"] is None
        batch = task.collate(prompt, tokenizer)
        with pytest.raises(UserError, match="no answers"):
            task.losses(torch.zeros(2, 30, 9), batch)


def test_metrics_weigh_rows_by_their_tokens() -> None:
    tokenizer, task = tiny_tokenizer(), make_task("causal", PROMPTED)
    examples = task.encode(ROWS, tokenizer)
    batch = task.collate(examples, tokenizer)
    logits = torch.randn(*batch.inputs["input_ids"].shape, len(tokenizer))
    found = task.metrics(task.predict(logits, batch), examples)
    assert found["loss"] == pytest.approx(
        float(task.losses(logits, batch).sum() / batch.units.sum()), rel=1e-5
    )
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["loss_low"] <= found["loss"] <= found["loss_high"]
    assert not task.higher_is_better
    with pytest.raises(UserError, match="0 predictions for 2 rows"):
        task.metrics([], ROWS)


def test_generation_does_not_depend_on_the_batch_and_leaves_the_mode() -> None:
    tokenizer, model = tiny_tokenizer(chat=CHATML), tiny("llama").train()
    task: Any = make_task("causal", PROMPTED, metric="exact_match")
    assert task.metric == "loss" and task.generation_metric == "exact_match"
    alone = generate(model, tokenizer, ROWS, task, max_new_tokens=4, batch_size=1)
    assert generate(model, tokenizer, ROWS, task, max_new_tokens=4, batch_size=2) == alone and model.training
    found = generation_metrics(task, ["good", "so #### 3"], ROWS)
    assert found["exact_match"] == 0.5 and found["exact_match_low"] < 0.5 < found["exact_match_high"]
    with pytest.raises(UserError, match="cannot generate"):
        generate(tiny("bert"), tokenizer, ROWS, task)


def test_a_description_gives_the_same_task() -> None:
    task = make_task("causal", PROMPTED, max_length=20, metric="perplexity", chat=False)
    again = Task.from_description(task.describe())
    tokenizer = tiny_tokenizer(chat=CHATML)
    assert again.describe() == task.describe()
    assert again.encode(ROWS, tokenizer) == task.encode(ROWS, tokenizer)
