"""Answers of language models without training: likelihoods of label names, worked examples, the common start."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.models import tiny
from tests.task.tiny import CHATML, tiny_tokenizer
from tunewise.core.errors import UserError
from tunewise.data import Columns
from tunewise.study.baselines.measured import Base, expected_seconds, measure_baseline
from tunewise.study.baselines.passes import SharedStart
from tunewise.study.baselines.shots import worked_examples
from tunewise.task import make_task
from tunewise.task.text import pad_sequences

Rows = list[dict[str, Any]]
CAUSAL = ["gpt2", "neox", "bloom", "falcon", "llama", "phi3", "mixtral", "qwen3", "gemma", "mamba"]


def byte_tokenizer(limit: int = 2000) -> Any:
    """Every letter is a token but for whole words and the pieces around them, as in a byte-pair vocabulary."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (
        "This| text| is| Label| each| as| good| bad| or| so| very|Label|Text|:|\n| | film|N/A|[MASK]".split(
            "|"
        )
    )
    letters = list("abcdefghijklmnopqrstuvwxyzABC,.?")
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<end>", *words, *letters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces = "|".join([r" ?[A-Za-z]+", r"N/A", r"\[MASK\]", "\n", "."])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<end>", pad_token="<end>", model_max_length=limit
    )


def labelled(*pairs: tuple[str, str], start: int = 0) -> Rows:
    return [{"id": str(start + i), "text": text, "label": label} for i, (text, label) in enumerate(pairs)]


TRAIN = labelled(*[(" so good film", "good")] * 5, *[(" film", "bad")] * 5)
TEXTS = [
    " so film",
    " film",
    " very very so film",
    " film or text",
    " as is",
    " each so good",
    "a bc d",
    " good so bad",
]
TEST = labelled(*[(text, "good" if i % 3 else "bad") for i, text in enumerate(TEXTS)], start=50)


def classification(train: Rows = TRAIN, **options: Any) -> Any:
    task = make_task("classification", Columns(("text",), "label", "classification"), **options)
    task.fit(train)
    return task


def base(model: nn.Module, tokenizer: Any, **options: Any) -> Base:
    config: Any = copy.deepcopy(model.config)
    config.architectures = ["LlamaForCausalLM"] if config.model_type == "llama" else None
    return Base(lambda auto: (model, tokenizer), config, **options)


def plain_scores(model: Any, tokenizer: Any, prompt: str, labels: list[str]) -> torch.Tensor:
    """Mean log p per token, one prompt and one name at a time."""
    start, found = tokenizer(prompt)["input_ids"], []
    for label in labels:
        ids = tokenizer(f"{prompt} {label}")["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found.append(sum(logs[i - 1, ids[i]] for i in range(len(start), len(ids))) / (len(ids) - len(start)))
    return torch.tensor([float(f) for f in found])


@pytest.mark.parametrize("name", ["zero_shot", "few_shot"])
@pytest.mark.parametrize("second", ["bad", "so bad", "so very film"])
def test_labels_are_chosen_by_calibrated_likelihood(name: str, second: str) -> None:
    train = [{**r, "label": r["label"].replace("bad", second)} for r in TRAIN]
    test = [{**r, "label": r["label"].replace("bad", second)} for r in TEST]
    model, tokenizer, task = tiny("llama", seed=3), byte_tokenizer(), classification(train)
    found = measure_baseline(name, task, train, test, base(model, tokenizer, batch_size=2))
    start = f"Label each text as {task.labels[0]} or {task.labels[1]}.\n\n"
    if name == "few_shot":
        assert "after 4 worked training examples" in found.notes[0]
        shown = {"good": "Text:  so good film\nLabel: good\n\n", second: f"Text:  film\nLabel: {second}\n\n"}
        start += 2 * (shown[task.labels[0]] + shown[task.labels[1]])
    empty = torch.stack(
        [
            plain_scores(model, tokenizer, f"{start}Text: {nothing}\nLabel:", task.labels).softmax(0)
            for nothing in ("N/A", "[MASK]", "")
        ]
    ).mean(0)
    assert len(set(found.predictions)) == 2, "one answer for all rows would be right by chance"
    for row, said in zip(test, found.predictions, strict=True):
        prompt = f"{start}Text: {row['text']}\nLabel:"
        q = plain_scores(model, tokenizer, prompt, task.labels).softmax(0) / empty
        assert said == task.labels[int(q.argmax())]
    assert found.metrics["accuracy"] == sum(
        r["label"] == p for r, p in zip(test, found.predictions, strict=True)
    ) / len(test)


class Counting(nn.Module):
    """Says "good" as often as the word stands in the prompt's last text, and always likes "bad" more."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.config, self.weight = copy.deepcopy(tiny("llama").config), nn.Parameter(torch.zeros(1))
        self.good, self.bad = tokenizer.convert_tokens_to_ids([" good", " bad"])
        self.size, self.longest = len(tokenizer), 0

    def get_output_embeddings(self) -> Any:
        return self.weight

    def forward(self, input_ids: Any, attention_mask: Any = None, use_cache: bool = False) -> Any:
        self.longest = max(self.longest, input_ids.shape[1])
        logits = torch.zeros(*input_ids.shape, self.size)
        logits[..., self.good] = (input_ids == self.good).float().cumsum(1)
        logits[..., self.bad] = 4.0
        return SimpleNamespace(logits=logits)


def test_calibration_takes_away_what_the_model_always_prefers() -> None:
    tokenizer = byte_tokenizer()
    test = labelled((" good", "good"), (" film", "bad"), (" so good film", "good"), start=50)
    found = measure_baseline("zero_shot", classification(), TRAIN, test, base(Counting(tokenizer), tokenizer))
    # "bad" is likelier by e^2 after every prompt; relative to a prompt without content "good" wins where it stands,
    # and equal ones go to the first label, "bad".
    assert found.predictions == ["good", "bad", "good"]


def test_long_texts_are_cut_and_counted() -> None:
    tokenizer = byte_tokenizer()
    model, task = Counting(tokenizer), classification(max_length=6)
    test = labelled((" film" * 30 + " good", "good"), (" good", "good"), start=50)
    found = measure_baseline("zero_shot", task, TRAIN, test, base(model, tokenizer))
    assert found.predictions == ["bad", "good"] and "1 of 2 rows were longer than 6 tokens" in found.notes[1]
    assert model.longest < 25


def test_examples_must_fit() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match="Not one worked example fits into the 6 tokens"):
        measure_baseline(
            "few_shot", classification(max_length=6), TRAIN, TEST, base(Counting(tokenizer), tokenizer)
        )
    found = measure_baseline(
        "few_shot", classification(max_length=23), TRAIN, TEST, base(Counting(tokenizer), tokenizer)
    )
    assert "after 2 worked training examples," in found.notes[0]


def test_worked_examples_are_balanced_short_and_the_same_each_time() -> None:
    texts = ["x" * n for n in (9, 1, 2, 9, 3, 1, 9, 2)]
    kinds, rows = list("aaaabbbb"), [{"id": i} for i in range(8)]
    chosen = worked_examples(rows, texts, kinds)
    assert [kinds[i] for i in chosen] == ["a", "b", "a", "b"] and all(len(texts[i]) < 9 for i in chosen)
    order = [7, 3, 5, 1, 0, 2, 6, 4]
    again = worked_examples([rows[i] for i in order], [texts[i] for i in order], [kinds[i] for i in order])
    assert [order[i] for i in again] == chosen
    assert len(worked_examples(rows, texts, [""] * 8)) == 4
    assert len(worked_examples(rows[:5], texts[:5], list("abcde"))) == 5


@pytest.mark.parametrize("name", [*CAUSAL, "sliding"])
def test_a_common_start_changes_no_logits(name: str) -> None:
    if name == "sliding":
        from transformers import MistralConfig, MistralForCausalLM

        size: Any = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
        settings = MistralConfig(vocab_size=99, num_key_value_heads=2, sliding_window=4, **size)
        model: Any = MistralForCausalLM(settings).eval()
    else:
        model = tiny(name)
    rows = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 12, 13, 14, 15], [5, 6, 7, 8, 9, 20, 21, 22, 23, 24]]
    with torch.no_grad():
        shared = SharedStart(model, rows, 20)
        assert shared.length == (0 if name == "mamba" else 5) and shared.skipped(rows) == shared.length
        assert shared.skipped([*rows, [5, 6]]) == 0
        cut = [row[shared.length :] for row in rows]
        mask = pad_sequences([[1] * len(row) for row in cut], 0, "right")
        for _ in range(2):  # the first batch must not change what the second one finds
            found = shared.logits(pad_sequences(cut, 0, "right"), mask, shared.length)
        last = shared.logits(pad_sequences(cut, 0, "right"), mask, shared.length, torch.tensor([0, 1]))
        assert torch.allclose(last, found[:, :2], atol=1e-5)
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0, shared.length :]
            assert torch.allclose(found[i, : len(cut[i])], alone, atol=1e-4)


def prompted(count: int) -> Rows:
    words = "good bad film fine dull a b c d e".split()
    return [
        {
            "id": str(i),
            "prompt": f"{words[i % 10]} {words[i % 7]}",
            "answer": f"{words[i % 3]} #### {1 + i % 4}",
        }
        for i in range(count)
    ]


def causal(**options: Any) -> Any:
    return make_task("causal", Columns(("prompt",), "answer", "causal"), **options)


@pytest.mark.parametrize("chat", [None, CHATML])
@pytest.mark.parametrize("name", ["zero_shot", "few_shot"])
def test_losses_are_those_of_the_answers_after_the_examples(name: str, chat: str | None) -> None:
    model, tokenizer, rows = tiny("llama"), tiny_tokenizer(chat=chat), prompted(12)
    train, test = rows[:8], rows[8:]
    found = measure_baseline(name, causal(), train, test, base(model, tokenizer, batch_size=3))
    shown = [
        train[i] for i in worked_examples(train, [f"{r['prompt']}\n{r['answer']}" for r in train], [""] * 8)
    ]
    if name == "few_shot":
        assert found.notes[0] == "The base model as it is after 4 worked training examples."
    for row, said in zip(test, found.predictions, strict=True):
        parts = [*(shown if name == "few_shot" else []), row]
        if chat:
            turn = "<|start|>user\n{}<|end|>\n<|start|>assistant\n{}<|end|>\n"
            text = "".join(turn.format(p["prompt"], p["answer"]) for p in parts)
        else:
            text = "\n\n".join(f"{p['prompt']}\n{p['answer']}" for p in parts) + " <|end|>"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        count = len(tokenizer(row["answer"])["input_ids"]) + 1
        loss = F.cross_entropy(logits[-count:], torch.tensor(ids[1:])[-count:])
        assert said["tokens"] == count and said["loss"] == pytest.approx(float(loss), rel=1e-4)
    weights = [p["tokens"] for p in found.predictions]
    mean = sum(p["loss"] * n for p, n in zip(found.predictions, weights, strict=True)) / sum(weights)
    assert found.metrics["loss"] == pytest.approx(mean) and math.isfinite(found.metrics["loss_high"])


@pytest.mark.parametrize("chat", [None, CHATML])
def test_generated_answers_follow_the_examples(chat: str | None) -> None:
    model, tokenizer, rows = tiny("llama").train(), tiny_tokenizer(chat=chat), prompted(12)
    task, seen = causal(metric="exact_match"), list[int]()
    made = base(model, tokenizer, max_new_tokens=3)
    zero = measure_baseline("zero_shot", task, rows[:8], rows[8:], made, tick=seen.append)
    few = measure_baseline("few_shot", task, rows[:8], rows[8:], made)
    assert zero.answers is not None and few.answers is not None and zero.answers != few.answers
    assert len(few.answers) == 4 and {"loss", "exact_match", "exact_match_low"} <= few.metrics.keys()
    assert sum(seen) == 8 and model.training and task.max_length is None and task.chat is None
    assert expected_seconds("few_shot", task, rows[:8], rows[8:], made) > 0


def test_chats_keep_their_own_system_message_and_learnt_turns() -> None:
    def chat(i: int, system: str | None = None) -> dict[str, Any]:
        turns = [("user", "hi a"), ("assistant", "good"), ("user", "b"), ("assistant", "bad film")]
        told = [{"role": role, "content": content} for role, content in turns]
        return {"id": str(i), "messages": [{"role": "system", "content": system}] * bool(system) + told}

    model, tokenizer = tiny("llama"), tiny_tokenizer(chat=CHATML)
    task = make_task("causal", Columns(("messages",), None, "causal"))
    train, test = [chat(i, "one two") for i in range(4)], [chat(9, "fine"), chat(10)]
    zero = measure_baseline("zero_shot", task, train, test, base(model, tokenizer))
    few = measure_baseline("few_shot", task, train, test, base(model, tokenizer))
    assert [p["tokens"] for p in few.predictions] == [p["tokens"] for p in zero.predictions] == [5, 5]
    assert all(a["loss"] != b["loss"] for a, b in zip(zero.predictions, few.predictions, strict=True))
    own = chat(9)["messages"]
    told = [{"role": "system", "content": "fine"}, *(4 * own), *own]
    ids = torch.tensor(tokenizer.apply_chat_template(told, return_dict=False))
    answers = [i for i, token in enumerate(ids.tolist()) if token == tokenizer.eos_token_id]
    good, bad = answers[-3], answers[-1]  # where the row's own two turns end
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    learnt = torch.tensor([good - 1, good, bad - 2, bad - 1, bad])
    loss = F.cross_entropy(logits[learnt - 1], ids[learnt])
    assert few.predictions[0]["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_rows_are_cut_no_more_than_without_examples() -> None:
    model, tokenizer, rows = tiny("llama"), tiny_tokenizer(), prompted(12)
    long = {"id": "long", "prompt": "a b c d e " * 4, "answer": "good"}
    task = causal(max_length=12)
    few = measure_baseline("few_shot", task, rows[:8], [*rows[8:], long], base(model, tokenizer))
    assert few.notes[0].startswith("The base model as it is after ")
    assert any("1 of 5 rows" in note for note in few.notes[1:])
    assert few.predictions[-1]["tokens"] == 2
    with pytest.raises(UserError, match="Not one worked example fits"):
        tight = tiny_tokenizer()
        tight.model_max_length = 12
        measure_baseline("few_shot", causal(), rows[:8], [long], base(model, tight))


@pytest.mark.slow
def test_a_real_decoder_on_reviews() -> None:
    from tunewise.backbone import backbone_config, load
    from tunewise.data import detect_columns, read_rows, split_rows

    rows = read_rows("reviews")
    columns = detect_columns(rows)
    splits = split_rows(rows, columns)
    task = make_task("classification", columns)
    task.fit(splits.train)
    made = load("smollm2", auto="causal_lm")
    smollm = Base(lambda auto: made, backbone_config("smollm2"))
    test = splits.test[::76]
    for name in ("zero_shot", "few_shot"):
        found = measure_baseline(name, task, splits.train, test, smollm)
        assert 0.55 < found.metrics["accuracy"] < 0.9 and len(found.predictions) == len(test)
