"""[MASK] instruct: one token behind the anchor, restricted or open, and the loss with masked-language rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.models import VOCAB, tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.recipe import Recipe
from tunewise.core.run import Run
from tunewise.data import Columns
from tunewise.delta.lora import LoRA
from tunewise.head import InstructHead
from tunewise.loop.evaluate import evaluate
from tunewise.loop.settings import Settings
from tunewise.objective.answer import AnswerLoss
from tunewise.objective.task_loss import TaskLoss
from tunewise.task import make_task
from tunewise.task.text import IGNORED

WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "<mask>",
    "[unused0]",
    "choose",
    "options",
    "answer",
    ":",
    "-",
    "a",
    "b",
]
WORDS += ["good", "bad", "film", "plot", "dull", "c"]
A, B, MASK, ANCHOR, END = 11, 12, 4, 5, 2


def tokenizer(anchor: bool = True) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    more = {"additional_special_tokens": ["[unused0]"]} if anchor else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", **more,
    )  # fmt: skip


def task_of(**options: Any) -> Any:
    task: Any = make_task("classification", Columns(("text",), "label", "classification"), **options)
    task.labels = ["neg", "pos"]
    return task


ROWS = [
    {"id": "x", "text": "film", "label": "pos"},
    {"id": "y", "text": "dull plot dull plot", "label": "neg"},
]


def ready(**options: Any) -> tuple[InstructHead, Any]:
    head, task = InstructHead(instruction="choose", **options), task_of()
    head.setup(task, tokenizer(), tiny("roberta"))
    return head, task


def run_of(loss: AnswerLoss, *more: Any, **options: Any) -> Run:
    head, task = ready(**options)
    handle = attach(tiny("roberta"), Recipe(delta=LoRA(rank=2), head=head, objective=[loss, *more]), seed=0)
    examples = task.encode(ROWS, tokenizer(), head)
    run = Run(handle, data={"train": examples}, task=task, settings=Settings.of())
    run.tokenizer = tokenizer()
    return run


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_stands_behind_the_anchor_whatever_the_padding(side: str) -> None:
    head, task = ready()
    batch = task.collate(task.encode(ROWS, tokenizer(), head), tokenizer(), side)
    ids, at = batch.inputs["input_ids"], head.gaps(batch)
    rows = torch.arange(2)
    assert ids[rows, at].tolist() == [MASK] * 2 and ids[rows, at - 1].tolist() == [ANCHOR] * 2
    assert ids[rows, at + 1].tolist() == [END] * 2
    assert head.words == [[A, B]] and "- A: neg\n- B: pos" in head.template
    values = torch.randn(2, ids.shape[1], VOCAB)
    found = head.logits(None, SimpleNamespace(logits=values), batch)
    assert torch.equal(found, values[rows, at][:, [A, B]])
    assert attach(tiny("roberta"), head).trainable == 0


def test_answers_by_name_and_what_options_stand_for() -> None:
    head, task = InstructHead(answers="names", options={"good": "a good film"}), task_of()
    task.labels = ["bad", "good"]
    head.setup(task, tokenizer(), tiny("roberta"))
    assert head.words == [[14, 13]] and "- bad\n- good: a good film" in head.template
    plain = InstructHead()
    plain.setup(task_of(), tokenizer(anchor=False), tiny("roberta"))
    assert str(plain.template).endswith("Answer: {mask}")


def test_long_texts_keep_the_answers_place() -> None:
    head = ready()[0]
    task = task_of(max_length=26)
    rows = [{"id": "x", "text": "film plot " * 30, "label": "pos"}]
    batch = task.collate(task.encode(rows, tokenizer(), head), tokenizer())
    width = batch.inputs["input_ids"].shape[1]
    assert width <= 26 and int(head.gaps(batch)[0]) == width - 2


def test_open_answers_that_are_no_option_are_wrong() -> None:
    run = run_of(AnswerLoss(), open=True)
    head, task = run.recipe.single("head"), run.task
    batch = task.collate(run.streams.data["train"], tokenizer())
    values = torch.zeros(2, batch.inputs["input_ids"].shape[1], VOCAB)
    at = head.gaps(batch)  # type: ignore[union-attr]
    values[0, at[0], B], values[1, at[1], 50], values[1, at[1], A] = 3.0, 2.0, 1.0
    logits = head.logits(None, SimpleNamespace(logits=values), batch)  # type: ignore[union-attr]
    assert task.predict(logits, batch) == ["pos", None]
    assert torch.allclose(
        task.losses(logits, batch), F.cross_entropy(logits[:, :2], batch.labels, reduction="none")
    )
    scores = task.metrics(["pos", None], run.streams.data["train"])
    assert scores["accuracy"] == 0.5 and scores["balanced_accuracy"] == 0.5
    assert type(task).from_description(task.describe()).open_answers is True  # type: ignore[attr-defined]
    assert 0 <= evaluate(run, run.streams.data["train"])["accuracy"] <= 1


def test_the_loss_is_over_all_words_at_the_mask() -> None:
    run = run_of(AnswerLoss())
    batch = run.collate(list(run.streams.data["train"]))
    outputs = run.outputs(batch)
    head: Any = run.recipe.single("head")
    z = outputs.logits[torch.arange(2), head.gaps(batch)]
    wanted = F.cross_entropy(z, torch.tensor([B, A]), reduction="none")
    assert torch.allclose(run.loss(batch, 2.0), wanted.mean(), atol=1e-6)
    assert run.sample_losses["x"] == pytest.approx(float(wanted[0]), abs=1e-5)


@pytest.mark.parametrize("dummy", [False, True])
def test_masked_language_rows(dummy: bool) -> None:
    run = run_of(AnswerLoss(mlm=1.0, share=0.5, dummy=dummy))
    batch = run.collate(list(run.streams.data["train"]))
    head: Any = run.recipe.single("head")
    loss: Any = run.recipe["objective"][0]
    mixed, targets = loss.mixed(run, head, batch)
    whole = batch.inputs["input_ids"].clone()
    whole[torch.arange(2), head.gaps(batch)] = torch.tensor([B, A])
    masked = mixed.inputs["input_ids"] == MASK
    assert torch.equal(targets != IGNORED, masked) and masked.any(1).all()
    assert torch.equal(targets[masked], torch.full_like(whole[masked], MASK) if dummy else whole[masked])
    assert torch.equal(mixed.inputs["input_ids"][~masked], whole[~masked])
    special = torch.tensor(tokenizer().all_special_ids)
    assert not torch.isin(whole[masked], special).any()


def test_a_share_of_rows_is_masked_and_both_ways_of_the_loss_agree() -> None:
    alone, beside = run_of(AnswerLoss(mlm=0.5)), run_of(AnswerLoss(mlm=0.5), TaskLoss())
    batch = alone.collate(list(alone.streams.data["train"]))
    plain = [run.task.losses(run.forward(batch)[0], batch).sum() / 2 for run in (alone, beside)]
    for _ in range(4):
        first, second = alone.loss(batch, 2.0), beside.loss(batch, 2.0)
        assert torch.allclose(first, second - plain[1], atol=1e-5)
    loss: Any = alone.recipe["objective"][0]
    head: Any = alone.recipe.single("head")
    drawn = [(loss.mixed(alone, head, batch)[1] != IGNORED).sum(1) for _ in range(40)]
    answered = sum(int((d == 1).sum()) for d in drawn)
    assert 20 < answered < 65


def test_refused() -> None:
    with pytest.raises(UserError, match="answers at a mask"):
        InstructHead().setup(task_of(), tokenizer(), tiny("gpt2"))
    with pytest.raises(UserError, match="is not one token"):
        ready(anchor="no such")
    with pytest.raises(UserError, match="must be one token"):
        ready(answers="names")
    many = task_of()
    many.labels = list("abcdefgh")
    with pytest.raises(UserError, match='8 options and 3 letters.*answers="names"'):
        InstructHead().setup(many, tokenizer(), tiny("roberta"))
