"""The cloze head: templates, words of one token, and where the gap is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach
from tunewise.core.part import build_part, describe_part
from tunewise.head import ClozeHead

WORDS = ["[PAD]", "[UNK]", "[MASK]", "[EOS]", "it", "was", "good", "bad", "film", "plot", "a", ".", "so", "-"]
TASK: Any = SimpleNamespace(name="classification", labels=["neg", "pos"])
VERBALIZER = {"neg": "bad", "pos": "good"}


def tokenizer(ends: bool = False) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    if ends:
        core.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", eos_token="[EOS]"
    )


def batch(texts: list[str], side: str) -> Any:
    encoded = tokenizer()(texts, padding=True, padding_side=side, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return SimpleNamespace(inputs=inputs, ids=[f"row{i}" for i in range(len(texts))])


def ready(name: str, **options: Any) -> ClozeHead:
    head = ClozeHead(**{"verbalizer": VERBALIZER, **options})
    head.setup(TASK, tokenizer(), tiny(name))
    return head


def test_masked_model() -> None:
    head = ready("roberta")
    assert head.render("Film {mask} {text}") == "Film {mask} {text} It was [MASK]."
    assert (head.mask_id, head.words, head.counts) == (2, [[7, 6]], [1, 1])
    assert ready("roberta", template="{mask} - {text}").render("plot") == "[MASK] - plot"


def test_causal_model_ends_before_the_gap() -> None:
    head = ready("gpt2")
    assert head.render("Film") == "Film It was"
    assert (head.mask, head.mask_id, head.words) == ("", None, [[7, 6]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_logits_are_those_of_the_words_at_the_gap(name: str, side: str) -> None:
    head = ready(name)
    rows = batch([head.render("film"), head.render("so a plot [MASK] film")], side)
    values = torch.randn(*rows.inputs["input_ids"].shape, len(WORDS))
    end = [len(tokenizer()(head.render(t))["input_ids"]) for t in ("film", "so a plot [MASK] film")]
    back = 2 if name == "roberta" else 1
    width = values.shape[1]
    at = [width - back if side == "left" else n - back for n in end]
    found = head.logits(None, SimpleNamespace(logits=values), rows)
    expected = torch.stack([values[i, p, [7, 6]] for i, p in enumerate(at)])
    assert torch.equal(found, expected)
    prompted = torch.cat([torch.randn(2, 3, len(WORDS)), values], 1)
    assert torch.equal(head.logits(None, SimpleNamespace(logits=prompted), rows), expected)


def test_gap_in_front_of_the_text() -> None:
    head = ready("roberta", template="{mask} - {text}")
    rows = batch([head.render("a [MASK] film")], "left")
    values = torch.randn(1, rows.inputs["input_ids"].shape[1], len(WORDS))
    assert torch.equal(head.logits(None, SimpleNamespace(logits=values), rows), values[:, 0, [7, 6]])


def test_lost_gap_names_the_row() -> None:
    head = ready("roberta")
    rows = batch([head.render("film"), "film plot"], "right")
    values = torch.randn(*rows.inputs["input_ids"].shape, len(WORDS))
    with pytest.raises(UserError, match="Row row1: the gap"):
        head.logits(None, SimpleNamespace(logits=values), rows)


def test_attached_to_a_model_and_described() -> None:
    model = tiny("roberta")
    handle = attach(model, ready("roberta"))
    t = handle.sites[0][2]
    rows = batch([t.part.render("film")], "right")  # type: ignore[operator]
    logits = t.part.logits(t, model(**rows.inputs), rows)  # type: ignore[operator]
    assert logits.shape == (1, 2) and handle.trainable == 0
    assert build_part(describe_part(ready("roberta"))) == ready("roberta")


def test_label_names_are_the_words_by_default() -> None:
    head = ClozeHead()
    head.setup(SimpleNamespace(labels=["bad", "good"]), tokenizer(), tiny("roberta"))
    assert head.words == [[7, 6]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verbalizer": {"neg": "bad bad", "pos": "good"}}, '"bad bad" of the label "neg" is 2 tokens'),
        ({"verbalizer": {"neg": "awful", "pos": "good"}}, '"awful" of the label "neg" is unknown'),
        ({"verbalizer": {"neg": "bad"}}, 'no word for the label "pos"'),
        ({"verbalizer": {"neg": "bad", "poss": "good"}}, 'did you mean "pos"'),
        ({"verbalizer": {"neg": "bad", "pos": "Bad"}}, "have the same word"),
        ({"template": "It was {mask}."}, "must hold {text} and {mask} once"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready("roberta", **options)


def test_refused_models() -> None:
    with pytest.raises(UserError, match="use ClassHead"):
        ready("bert")
    with pytest.raises(UserError, match="must come after"):
        ready("gpt2", template="{mask} - {text}")
    with pytest.raises(UserError, match="ends each text with an end token"):
        ClozeHead(verbalizer=VERBALIZER).setup(TASK, tokenizer(ends=True), tiny("gpt2"))
    with pytest.raises(UserError, match="has no labels"):
        ClozeHead().setup(SimpleNamespace(name="regression"), tokenizer(), tiny("roberta"))
    with pytest.raises(UserError, match="call setup"):
        ClozeHead().render("film")


MANY = ["{text} It was {mask}.", "{mask} - {text}", "so {mask} {text}"]
SEVERAL = {"neg": ["bad", "plot"], "pos": ["good", "film"]}


def viewed(head: ClozeHead, texts: list[str], side: str = "right") -> Any:
    """A batch as the task makes it: each row in every template."""
    from tunewise.data import Columns
    from tunewise.task import make_task

    task: Any = make_task("classification", Columns(("text",), "label", "classification"))
    task.labels = ["neg", "pos"]
    rows = [{"id": f"row{i}", "text": text, "label": "neg"} for i, text in enumerate(texts)]
    return task.collate(task.encode(rows, tokenizer(), head), tokenizer(), side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_templates_are_averaged_and_words_pooled(pool: str, side: str) -> None:
    head = ready("roberta", template=MANY, verbalizer=SEVERAL, pool=pool)
    rows = viewed(head, ["film", "so a plot [MASK] film"], side)
    assert len(rows.inputs["input_ids"]) == 6 and len(rows) == 2
    values = torch.randn(*rows.inputs["input_ids"].shape, len(WORDS))
    found = head.logits(None, SimpleNamespace(logits=values), rows)
    at = [(i == 2) for i in rows.inputs["input_ids"]]
    gaps = [[p.nonzero()[-1, 0] if k % 3 == 0 else p.nonzero()[0, 0] for k, p in enumerate(at)]]
    z = torch.stack([values[i, p] for i, p in enumerate(gaps[0])])
    choose = {"max": lambda x: x.amax(1), "mean": lambda x: x.mean(1)}[pool]
    each = torch.stack([choose(z[:, [7, 9]]), choose(z[:, [6, 8]])], 1)
    assert torch.allclose(found, each.view(2, 3, 2).mean(1), atol=1e-6)


def test_the_order_of_templates_changes_nothing_and_nothing_is_new() -> None:
    model, found = tiny("roberta"), []
    for templates in (MANY, MANY[::-1]):
        head = ready("roberta", template=templates, verbalizer=SEVERAL)
        with torch.no_grad():
            rows = viewed(head, ["film", "a plot"])
            found.append(head.logits(None, model(**rows.inputs), rows))
    assert torch.allclose(*found, atol=1e-6)
    assert attach(model, head).trainable == 0


def test_long_texts_are_cut_and_every_template_stays_whole() -> None:
    from tunewise.task.text import encode_for

    head = ready("roberta", template=MANY)
    found, cut = encode_for(head, [("film plot " * 9,), ("a",)], tokenizer(), 8)
    lines = [found[0], *found[0]["views"]]
    assert cut == 1 and all(len(line["input_ids"]) <= 8 and 2 in line["input_ids"] for line in lines)
    assert len(lines) == 3


def test_label_names_that_are_no_words_get_tokens_and_the_user_is_told() -> None:
    task = SimpleNamespace(labels=["awful", "good", "fair play"], notes=[])
    head = ClozeHead(stand_in=True)
    head.setup(task, tokenizer(), tiny("roberta"))
    assert head.words is not None and len(set(head.words[0])) == 3 and head.words[0][1] == 6
    assert not set(head.words[0]) & {0, 1, 2, 3} and '"fair play"' in task.notes[0]
    with pytest.raises(UserError, match='"awful" is unknown|"awful" of the label'):
        ClozeHead(stand_in=True, verbalizer={"awful": "awful", "good": "good", "fair play": "film"}).setup(
            task, tokenizer(), tiny("roberta")
        )


def test_rows_that_do_not_fit_the_templates_are_refused() -> None:
    head = ready("roberta", template=MANY)
    rows = viewed(head, ["film", "a plot"])
    rows.ids = ["a", "b", "c", "d"]
    with pytest.raises(UserError, match="are not 6 lines"):
        head.logits(None, SimpleNamespace(logits=torch.zeros(6, 20, len(WORDS))), rows)
