"""Soft prompts: where they stand, how they start, padding, cache, generation, checkpointing; all kinds of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tunewise as tw
from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.delta.insert import after_first, insert, remove

METHODS = [
    "prompt_tuning(tokens=3)",
    'prompt_tuning(tokens=3, place="after_first")',
    "p_tuning(tokens=3)",
    'p_tuning(tokens=3, network="mlp", place="after_first")',
    "multitask_prompt_tuning(tokens=3, tasks=2, rank=2, task=1)",
    "prefix_tuning(tokens=3, hidden=8)",
    "prefix_tuning(tokens=3, hidden=None, gated=True)",
    'p_tuning_v2(tokens=3, form="states")',
    "vpt(tokens=3)",
]
TEXTS = [[7, 8, 9, 10, 11, 12], [20, 21, 22]]


def adapted(name: str, method: str) -> Any:
    model = tiny(name)
    handle = tw.attach(model, method, seed=0)
    make = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=make) * 0.3)
    return model


def rows(side: str, counted: bool) -> dict[str, Tensor]:
    """Two texts of unequal length, padded on one side; `counted` gives positions that padding does not move."""
    width = max(len(t) for t in TEXTS)
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for i, text in enumerate(TEXTS):
        where = slice(width - len(text), width) if side == "left" else slice(len(text))
        ids[i, where], mask[i, where] = torch.tensor(text), 1
    found = {"input_ids": ids, "attention_mask": mask}
    return found | ({"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if counted else {})


@torch.no_grad()
def real(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The states or logits of each row's real tokens."""
    out = model(**batch)
    values = out.logits if "logits" in out else out.last_hidden_state
    return [v[m.bool()] for v, m in zip(values, batch["attention_mask"], strict=True)]


def test_positions_go_in_and_come_out_row_by_row() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    new = -torch.ones(2, 2, 2)
    at = torch.tensor([[1], [2]])
    both = insert(x, new, at)
    assert torch.equal(both[0], torch.cat([x[0, :1], new[0], x[0, 1:]]))
    assert torch.equal(both[1], torch.cat([x[1, :2], new[1], x[1, 2:]]))
    assert torch.equal(remove(both, 2, at), x) and torch.equal(remove(insert(x, new, None), 2, None), x)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert torch.equal(after_first(mask, mask), at) and after_first(None, x).flatten().tolist() == [1, 1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["roberta", "bert", "llama"])
def test_behind_the_first_token_is_what_one_writes_by_hand(name: str) -> None:
    model = adapted(name, 'prompt_tuning(tokens=3, place="after_first")')
    found = model(**(batch := rows("right", False)))["logits"]
    prompt = tw.handles(model)["default"].parameters()[0]
    plain: Any = tiny(name)
    embeds = plain.get_input_embeddings()(batch["input_ids"])
    longer = torch.cat([embeds[:, :1], prompt.expand(2, -1, -1), embeds[:, 1:]], 1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), batch["attention_mask"]], 1)
    wanted = plain(inputs_embeds=longer, attention_mask=mask)["logits"]
    if name == "bert":  # [CLS] stays where the pooler reads
        torch.testing.assert_close(found, wanted)
        return
    wanted = torch.cat([wanted[:, :1], wanted[:, 4:]], 1)
    for a, b, m in zip(found, wanted, batch["attention_mask"].bool(), strict=True):
        torch.testing.assert_close(a[m], b[m])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_padding_on_either_side_answers_as_the_row_alone(name: str, method: str) -> None:
    model = adapted(name, method)
    whole = [real(model, rows(side, name == "llama")) for side in ("right", "left")]
    short = {k: v[1:, :3] for k, v in rows("right", name == "llama").items()}
    (alone,) = real(model, short)
    for side in (
        whole if name == "llama" else whole[:1]
    ):  # the plain tiny roberta counts padding ids, not masks
        torch.testing.assert_close(side[1], alone, rtol=1e-4, atol=1e-5)
    if name == "llama":
        torch.testing.assert_close(whole[0][0], whole[1][0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_the_cache_changes_nothing_and_a_padded_row_generates_as_alone(method: str) -> None:
    model = adapted("llama", method)
    batch = rows("left", False)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**batch, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **options))
    alone = model.generate(torch.tensor(TEXTS[1:]), **options)
    assert torch.equal(cached[1, 6:], alone[0, 3:])
    plain: Any = tiny("llama")
    assert not torch.equal(cached, plain.generate(**batch, **options)), "the prompt does nothing"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_checkpointing_gives_the_same_gradients(name: str, method: str, reentrant: bool) -> None:
    found = []
    for saving in (False, True):
        model = adapted(name, method)
        if saving:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        batch = rows("right", False)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append([p.grad for p in tw.handles(model)["default"].parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_a_text_starts_the_prompt_and_is_not_needed_again(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    from tunewise.assets import model_path

    folder = model_path("tiny-roberta")
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    handle = tw.attach(model, 'prompt_tuning(tokens=5, text="ACD")')
    ids = AutoTokenizer.from_pretrained(folder)("ACD", add_special_tokens=False)["input_ids"]
    table = model.get_input_embeddings().weight
    assert torch.equal(handle.parameters()[0], table[torch.tensor((ids * 5)[:5])])
    handle.save(tmp_path)
    other = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    other.config._name_or_path = "nowhere"
    assert torch.equal(tw.restore(other, tmp_path).parameters()[0], handle.parameters()[0])


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("vit", "prompt_tuning", "takes no soft prompt .for images: vpt"),
        ("t5", "prompt_tuning", "encoder-decoder: `generate` calls its encoder apart"),
        ("t5", "p_tuning", "EncodedPrompt does not work"),
        ("llama", 'prompt_tuning(text="a")', "tokenizer for the prompt's text"),
        ("llama", "prompt_tuning(ids=[3, 400])", "starts at token 400, and the model has 99"),
        ("llama", "multitask_prompt_tuning(tasks=2, task=2)", "task=2 of tasks=2"),
        ("t5", "vpt", "no room for a prefix"),
    ],
)
def test_what_cannot_be_is_refused(name: str, method: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tw.attach(tiny(name), method)
