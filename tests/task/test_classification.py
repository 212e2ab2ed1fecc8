from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.models import tiny
from tests.task.tiny import tiny_tokenizer
from tunewise.core.errors import UserError
from tunewise.data import Columns
from tunewise.task import Task, make_task

COLUMNS = Columns(("text",), "label", "classification")


def rows_of(*labels: Any) -> list[dict[str, Any]]:
    texts = ("good film", "bad film a b", "fine")
    return [{"id": f"r{i}", "text": texts[i % 3], "label": label} for i, label in enumerate(labels)]


def fitted(*labels: Any, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    task, rows = make_task("classification", COLUMNS, **options), rows_of(*labels)
    task.fit(rows)
    return task, rows


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((10, 2, 1), ["1", "2", "10"]),
        (("10", "2", "x"), ["10", "2", "x"]),
        ((True, False), ["false", "true"]),
        ((1.0, 2, "1"), ["1", "2"]),
        (("pos", "neg", " pos "), ["neg", "pos"]),
    ],
)
def test_label_names_are_sorted_and_numbers_keep_their_order(labels: Any, names: list[str]) -> None:
    assert fitted(*labels)[0].labels == names


def test_batches_agree_with_the_tokenizer_and_the_plain_loss() -> None:
    task, rows = fitted("neg", "pos", "neg")
    tokenizer = tiny_tokenizer(bert=True)
    examples = task.encode(rows, tokenizer)
    batch = task.collate(examples, tokenizer).to("cpu")
    expected = tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
    assert set(batch.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(torch.equal(batch.inputs[k], expected[k]) for k in batch.inputs)
    assert batch.ids == ["r0", "r1", "r2"] and batch.units.tolist() == [1, 1, 1] and len(batch) == 3
    logits = torch.randn(3, 2, dtype=torch.bfloat16)
    losses = task.losses(logits, batch)
    assert losses.dtype == torch.float32
    assert torch.equal(losses.mean(), F.cross_entropy(logits.float(), torch.tensor([0, 1, 0])))
    assert task.predict(torch.tensor([[1.0, 0], [0, 1], [2, 1]]), batch) == ["neg", "pos", "neg"]


def test_left_padding_puts_tokens_at_the_end() -> None:
    task, rows = fitted("neg", "pos")
    tokenizer = tiny_tokenizer(bert=True)
    batch = task.collate(task.encode(rows, tokenizer), tokenizer, "left")
    assert batch.inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]
    assert batch.inputs["input_ids"][0, 2] == tokenizer.cls_token_id
    with pytest.raises(UserError, match="left|right"):
        task.collate(task.encode(rows, tokenizer), tokenizer, "middle")


def test_padding_does_not_change_the_loss_of_a_real_model() -> None:
    task, rows = fitted("neg", "pos", "neg")
    tokenizer, model = tiny_tokenizer(bert=True), tiny("bert").eval()
    examples = task.encode(rows, tokenizer)
    together = task.collate(examples, tokenizer)
    with torch.no_grad():
        joint = task.losses(model(**together.inputs).logits, together)
        for i, example in enumerate(examples):
            alone = task.collate([example], tokenizer)
            loss = task.losses(model(**alone.inputs).logits, alone)
            assert torch.allclose(loss, joint[i : i + 1], atol=1e-6)


def test_an_unseen_label_is_named_with_its_row() -> None:
    task, _ = fitted("neg", "pos")
    with pytest.raises(UserError, match='Row r0 has the label "ne".*did you mean "neg"'):
        task.encode(rows_of("ne"), tiny_tokenizer(bert=True))
    with pytest.raises(UserError, match="Row r0 has no label"):
        task.encode(rows_of(None), tiny_tokenizer(bert=True))
    with pytest.raises(UserError, match="two labels are needed"):
        fitted("same", "same")


def test_rows_to_predict_need_no_label_and_have_no_loss() -> None:
    task, _ = fitted("neg", "pos")
    tokenizer = tiny_tokenizer(bert=True)
    batch = task.collate(task.encode([{"id": "x", "text": "fine"}], tokenizer, labelled=False), tokenizer)
    assert batch.labels is None
    with pytest.raises(UserError, match="no labels"):
        task.losses(torch.zeros(1, 2), batch)
    assert task.predict(torch.tensor([[0.0, 1.0]]), batch) == ["pos"]


def test_long_texts_are_cut_and_counted() -> None:
    task, rows = fitted("neg", "pos", max_length=5)
    tokenizer = tiny_tokenizer(bert=True)
    examples = task.encode(rows, tokenizer)
    assert [e["length"] for e in examples] == [4, 5]
    assert examples[1]["input_ids"][-1] == tokenizer.sep_token_id
    assert task.notes == ["1 of 2 rows were longer than 5 tokens and cut (--max-length)."]


def test_pairs_have_token_types_and_both_texts_are_required() -> None:
    columns = Columns(("a", "b"), "label", "classification")
    task = make_task(None, columns)
    rows = [{"id": "1", "a": "good", "b": "bad film", "label": 0}, {"id": "2", "a": "a", "b": 3, "label": 1}]
    task.fit(rows)
    examples = task.encode(rows, tiny_tokenizer(bert=True))
    assert examples[0]["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UserError, match='Row 3 has no text in the column "b"'):
        task.encode([{"id": "3", "a": "good", "label": 0}], tiny_tokenizer(bert=True))


class Cloze:
    def render(self, text: str) -> str:
        return f"{text} fine [MASK]"


def test_a_template_is_never_cut_but_the_text_inside_it_is() -> None:
    task, rows = fitted("neg", "pos", max_length=6)
    tokenizer = tiny_tokenizer(bert=True)
    examples = task.encode(rows, tokenizer, Cloze())
    assert tokenizer.decode(examples[0]["input_ids"]) == "[CLS] good film fine [MASK] [SEP]"
    assert tokenizer.decode(examples[1]["input_ids"]) == "[CLS] bad film fine [MASK] [SEP]"
    assert "1 of 2 rows" in task.notes[0]
    with pytest.raises(UserError, match="no room for text beside the head's template"):
        fitted("neg", "pos", max_length=4)[0].encode(rows, tokenizer, Cloze())


def test_metrics_of_raw_and_encoded_rows_agree_and_a_custom_one_is_used() -> None:
    task, rows = fitted("neg", "pos", "neg")
    said = ["neg", "neg", "neg"]
    found = task.metrics(said, rows)
    assert found == task.metrics(said, task.encode(rows, tiny_tokenizer(bert=True)))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_low"] < 2 / 3 < found["accuracy_high"]

    def hits(predictions: Any, references: Any) -> float:
        return float(sum(p == r for p, r in zip(predictions, references, strict=True)))

    own, _ = fitted("neg", "pos", "neg", metric=hits)
    assert own.metric == "hits" and own.higher_is_better and own.metrics(said, rows)["hits"] == 2.0
    again = Task.from_description(own.describe())
    assert again.metric == "accuracy" and "hits" in again.notes[0]


def test_a_description_gives_the_same_task() -> None:
    task, rows = fitted("neg", "pos", max_length=9, metric="macro_f1")
    again = Task.from_description(task.describe())
    assert again.describe() == task.describe()
    assert again.encode(rows, tiny_tokenizer(bert=True)) == task.encode(rows, tiny_tokenizer(bert=True))


def test_wrong_names_are_answered_with_near_ones() -> None:
    with pytest.raises(UserError, match='no task "clasification"; did you mean "classification"'):
        make_task("clasification", COLUMNS)
    with pytest.raises(UserError, match='no metric "acuracy"; did you mean "accuracy"'):
        make_task("classification", COLUMNS, metric="acuracy")
    with pytest.raises(UserError, match='no option "maxlength"; did you mean "max_length"'):
        make_task("classification", COLUMNS, maxlength=3)
    with pytest.raises(UserError, match="max_length=0"):
        make_task("classification", COLUMNS, max_length=0)


def test_logits_of_another_width_are_refused() -> None:
    task, rows = fitted("neg", "pos")
    tokenizer = tiny_tokenizer(bert=True)
    with pytest.raises(UserError, match=r"shape \[2, 3\], expected \[rows, 2\]"):
        task.losses(torch.zeros(2, 3), task.collate(task.encode(rows, tokenizer), tokenizer))


def test_the_model_bounds_the_length() -> None:
    from transformers import BertConfig, RobertaConfig

    task, _ = fitted("neg", "pos")
    task.bind(BertConfig(max_position_embeddings=64))
    assert task.limit(tiny_tokenizer(bert=True)) == 64
    task, _ = fitted("neg", "pos")
    task.bind(RobertaConfig(max_position_embeddings=66, pad_token_id=1))
    assert task.limit(tiny_tokenizer(bert=True)) == 64
    assert Task.from_description(task.describe()).limit(tiny_tokenizer(bert=True)) == 64
    long, _ = fitted("neg", "pos", max_length=100)
    long.bind(BertConfig(max_position_embeddings=64))
    with pytest.raises(UserError, match="max_length=100 .*expected from 1 to 64"):
        long.limit(tiny_tokenizer(bert=True))
