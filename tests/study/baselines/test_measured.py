"""Baselines: the plain ones, those of encoders, and why some cannot be measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.data import Columns
from tunewise.study.baselines.measured import Base, can, expected_seconds, measure_baseline, model_kind
from tunewise.study.portfolio import BASELINES
from tunewise.task import make_task

Rows = list[dict[str, Any]]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[MASK]",
    "[EOS]",
    "this",
    "text",
    "is",
    ".",
    "it",
    "was",
    "good",
    "bad",
    "film",
    "a",
    "one",
]


def rows(*pairs: tuple[Any, Any], start: int = 0) -> Rows:
    return [{"id": str(start + i), "text": text, "label": label} for i, (text, label) in enumerate(pairs)]


TRAIN = rows(
    *[(f"good film number {i}", "good") for i in range(8)],
    *[(f"bad film number {i}", "bad") for i in range(6)],
)
TEST = rows(*[("a good one", "good"), ("a bad one", "bad")] * 10, start=100)
NUMBERS = rows(*[("good film", 3.0), ("bad film", 1.0)] * 5, ("fine film", 8.0))


def fitted(train: Rows = TRAIN, name: str = "classification", **options: Any) -> Any:
    task = make_task(name, Columns(("text",), "label", name), **options)
    task.fit(train)
    return task


def tokenizer(*, mask: bool = True, letters: bool = False) -> Any:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS[:4], *"abcdefghijklmnopqrstuvwxyz"] if letters else WORDS
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    if letters:
        core.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    special = {"mask_token": "[MASK]"} if mask else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", **special
    )


def base(name: str, model: Any = None, tok: Any = None, **options: Any) -> Base:
    model = model or tiny(name)
    return Base(lambda auto: (model, tok or tokenizer()), model.config, **options)


def test_majority() -> None:
    found = measure_baseline("majority", fitted(), TRAIN, TEST)
    assert found.predictions == ["good"] * 20
    assert found.metrics["accuracy"] == found.metrics["balanced_accuracy"] == 0.5
    assert found.metrics["macro_f1"] == pytest.approx(1 / 3)
    assert found.costs["trainable"] == found.costs["size_mb"] == 0
    # Wilson's interval of 10 of 20, as printed in textbooks.
    interval = (found.metrics["accuracy_low"], found.metrics["accuracy_high"])
    assert interval == pytest.approx((0.2993, 0.7007), abs=1e-4)


def test_equal_classes_are_decided_by_name() -> None:
    train = rows(("x", "b"), ("x", "a"))
    assert measure_baseline("majority", fitted(train), train, train).predictions == ["a", "a"]


def test_labels_are_read_as_the_task_reads_them() -> None:
    train = rows(("x", 1.0), ("x", "1 "), ("y", 0), ("x", 1))
    assert measure_baseline("majority", fitted(train), train, train).predictions == ["1"] * 4


def test_tfidf_learns_words() -> None:
    found = measure_baseline("tfidf", fitted(), TRAIN, TEST)
    assert found.metrics["accuracy"] == 1.0
    # good, bad, film, number; good film, bad film, film number (digits alone are no words); and the intercept.
    assert found.costs["trainable"] == 8 and found.costs["size_mb"] > 0


def test_tfidf_reads_sequences_without_spaces() -> None:
    train = rows(
        *[("KKLLKKAA" + "KL" * i, "yes") for i in range(5)],
        *[("GGSSGGTT" + "SG" * i, "no") for i in range(5)],
    )
    assert measure_baseline("tfidf", fitted(train), train, rows(("LKLKLK", "yes"))).predictions == ["yes"]


def test_own_metric_is_measured() -> None:
    def last(predictions: list[Any], references: list[Any]) -> float:
        return float(predictions == references)

    assert measure_baseline("tfidf", fitted(metric=last), TRAIN, TEST).metrics["last"] == 1.0


def test_regression() -> None:
    task = fitted(NUMBERS, "regression")
    mean = measure_baseline("mean", task, NUMBERS, NUMBERS)
    assert mean.predictions == pytest.approx([28 / 11] * 11) and mean.metrics["pearson"] == 0
    assert mean.metrics["rmse"] == pytest.approx(task.std)
    found = measure_baseline("tfidf", task, NUMBERS, NUMBERS)
    assert found.metrics["rmse"] < task.std / 2 and found.metrics["pearson"] > 0.9
    assert min(found.predictions) < 1.5 and max(found.predictions) > 5, "in the units of the data"


class Echo(nn.Module):
    """An encoder whose hidden state of a token is its one-hot vector; or a masked model sure of one word."""

    def __init__(self, config: Any, says: int | None = None) -> None:
        super().__init__()
        self.config, self.says = config, says
        self.weight = nn.Parameter(torch.eye(len(WORDS)))

    def get_output_embeddings(self) -> Any:
        return self.weight

    def forward(self, input_ids: Any, attention_mask: Any, **inputs: Any) -> Any:
        from types import SimpleNamespace

        hidden = self.weight[input_ids]
        if self.says is None:
            return SimpleNamespace(last_hidden_state=hidden)
        return SimpleNamespace(logits=torch.zeros_like(hidden).index_fill(2, torch.tensor(self.says), 5.0))


def config(architecture: str, name: str = "bert") -> Any:
    import copy

    made: Any = copy.deepcopy(tiny(name).config)
    made.architectures = [architecture]
    return made


def test_encoders_without_a_head_take_the_nearest_description() -> None:
    model = Echo(config("BertModel")).train()
    found = measure_baseline("zero_shot", fitted(), TRAIN, TEST, base("", model, batch_size=3))
    assert found.predictions == [row["label"] for row in TEST]
    assert found.costs["trainable"] == 0 and found.costs["inference_seconds"] > 0 and model.training
    assert "This text is LABEL." in found.notes[0]


def test_an_encoder_with_a_new_classifier_is_read_below_it() -> None:
    model = tiny("bert")
    whole = Base(lambda auto: (model, tokenizer()), config("BertModel"))
    inner = Base(lambda auto: (model.base_model, tokenizer()), config("BertModel"))
    found = [measure_baseline("zero_shot", fitted(), TRAIN, TEST, one) for one in (whole, inner)]
    assert found[0].predictions == found[1].predictions


@pytest.mark.parametrize("label", ["good", "bad"])
def test_masked_models_fill_the_gap(label: str) -> None:
    model = Echo(config("RobertaForMaskedLM", "roberta"), says=WORDS.index(label))
    found = measure_baseline("zero_shot", fitted(), TRAIN, TEST, base("", model))
    assert found.predictions == [label] * 20 and "It was {mask}." in found.notes[0]


def test_a_real_masked_model_gives_what_its_head_gives() -> None:
    from tunewise.head import ClozeHead

    model, task, head = tiny("roberta"), fitted(), ClozeHead()
    found = measure_baseline("zero_shot", task, TRAIN, TEST, base("", model))
    head.setup(task, tokenizer(), model)
    with torch.no_grad():
        for row, said in zip(TEST[:2], found.predictions, strict=False):
            ids = tokenizer()(head.render(row["text"]), return_tensors="pt")["input_ids"]
            logits = model(ids).logits[0, -2, head.words[0]]
            assert said == task.labels[int(logits.argmax())]


def test_rows_keep_their_order_and_the_task_its_state() -> None:
    task = fitted()
    mixed = rows(("a good one", "good"), ("bad", "bad"), ("good", "good"), ("a bad film is a bad one", "bad"))
    seen: list[int] = []
    model = Echo(config("BertModel"))
    found = measure_baseline("zero_shot", task, TRAIN, mixed, base("", model, batch_size=2), tick=seen.append)
    assert found.predictions == ["good", "bad", "good", "bad"] and seen == [2, 2]
    assert task.max_length is None and task.position_limit is None and not task.notes


def test_reasons() -> None:
    task, words = fitted(), tokenizer()

    def reason(name: str, architecture: str, tok: Any = words, train: Rows = TRAIN) -> str:
        return str(can(name, config(architecture), tok, fitted(train)))

    assert can("zero_shot", config("BertModel"), words, task) is None
    assert can("majority", None, None, task) is None
    assert "(BertModel) is no decoder" in reason("few_shot", "BertModel")
    assert "no token for a gap" in reason("zero_shot", "BertForMaskedLM", tokenizer(mask=False))
    assert "no words to the tokenizer" in reason("zero_shot", "BertModel", tokenizer(letters=True))
    unknown = rows(("x", "AMP"), ("x", "UniProt"))
    assert '("AMP", "UniProt") are no words' in reason("zero_shot", "BertModel", train=unknown)
    assert "numbers" in reason("zero_shot", "BertModel", train=rows(("x", 0), ("x", -1.5)))
    two = rows(("x", "good film"), ("x", "bad"))
    assert "one token each" in reason("zero_shot", "BertForMaskedLM", train=two)
    assert "no tokenizer for text" in str(can("zero_shot", config("BertModel"), None, task))
    assert "no configuration" in str(can("zero_shot", None, words, task))
    assert "encoder-decoder" in str(can("zero_shot", tiny("t5").config, words, task))
    assert "not of classification" in str(can("mean", None, None, task))
    with pytest.raises(UserError, match='did you mean "tfidf"'):
        can("tf-idf", None, None, task)


def test_language_models_only() -> None:
    task = make_task("causal", Columns(("text",), None, "causal"))
    llama = config("LlamaForCausalLM", "llama")
    assert can("zero_shot", llama, tokenizer(), task) is None
    assert "cannot be shown" in str(can("few_shot", llama, tokenizer(), task))
    assert "no decoder" in str(can("zero_shot", config("BertForMaskedLM"), tokenizer(), task))


def test_kinds() -> None:
    assert model_kind(config("LlamaForCausalLM", "llama")) == "causal_lm"
    assert model_kind(config("GPT2LMHeadModel", "gpt2")) == "causal_lm"
    assert model_kind(config("LlamaModel", "llama")) == "base"
    assert model_kind(config("BertForSequenceClassification")) == "base"
    assert model_kind(config("RobertaForMaskedLM", "roberta")) == "masked_lm"
    assert [model_kind(tiny(n).config) for n in ("llama", "bert", "t5")] == ["causal_lm", "masked_lm", None]


def test_refused() -> None:
    one = [row for row in TRAIN if row["label"] == "good"]
    with pytest.raises(UserError, match="cannot be fitted"):
        measure_baseline("tfidf", fitted(), one, TEST)
    with pytest.raises(UserError, match="few_shot cannot be measured: the base model"):
        measure_baseline("few_shot", fitted(), TRAIN, TEST, base("", Echo(config("BertModel"))))
    without = Base(lambda auto: (tiny("llama").base_model, tokenizer()), config("LlamaForCausalLM", "llama"))
    with pytest.raises(UserError, match="LlamaModel was loaded without its language-model head"):
        measure_baseline("zero_shot", fitted(), TRAIN, TEST, without)
    with pytest.raises(UserError, match="the base model is not given"):
        measure_baseline("zero_shot", fitted(), TRAIN, TEST)
    with pytest.raises(UserError, match="majority cannot be measured"):
        measure_baseline("majority", fitted(NUMBERS, "regression"), NUMBERS, NUMBERS)
    with pytest.raises(UserError, match="no baseline"):
        measure_baseline("nothing", fitted(), TRAIN, TEST)


def test_every_listed_baseline_exists() -> None:
    tasks = {"classification": fitted(), "regression": fitted(NUMBERS, "regression")}
    tasks["causal"] = make_task("causal", Columns(("text",), "label", "causal"))
    for name, task in tasks.items():
        for one in BASELINES[name]:
            assert can(one, config("LlamaForCausalLM", "llama"), tokenizer(), task) is None, one


class Slow(Echo):
    """A millisecond for each token of a row, padding included."""

    def forward(self, input_ids: Any, attention_mask: Any, **inputs: Any) -> Any:
        import time

        time.sleep(0.001 * input_ids.numel())
        return super().forward(input_ids, attention_mask, **inputs)


def test_time_is_foreseen() -> None:
    model = Slow(config("BertModel"))
    test = rows(*[("good " * (1 + i % 5), "good") for i in range(90)])  # 270 tokens
    found = expected_seconds("zero_shot", fitted(), TRAIN, test, base("", model, batch_size=3))
    assert 0.26 < found < 0.7
    assert 0 < expected_seconds("tfidf", fitted(), TRAIN, TEST) < 5
