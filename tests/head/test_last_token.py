"""Decoders that classify at the last token: padding, positions and soft prompts do not change the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.models import VOCAB, tiny
from tunewise.core.handle import attach
from tunewise.core.recipe import Recipe
from tunewise.data import Columns
from tunewise.delta.lora import LoRA
from tunewise.delta.prompt import SoftPrompt
from tunewise.head import ClassHead, LMHead
from tunewise.task import make_task

EXAMPLES: list[dict[str, Any]] = [
    {"id": "short", "input_ids": [5, 6], "labels": 0, "length": 2},
    {"id": "long", "input_ids": [7, 8, 9, 10, 11, 12], "labels": 1, "length": 6},
]


class Tokens:
    """What collating needs of a tokenizer; pad equals eos, as many decoders have it."""

    padding_side, pad_token_id, eos_token_id = "right", 2, 2


def decoder(name: str) -> nn.Module:
    import transformers

    options: dict[str, Any] = {"vocab_size": VOCAB, "num_labels": 2, "pad_token_id": 2, "eos_token_id": 2}
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1, **options}
    if name == "llama":
        return transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(intermediate_size=64, **wide)
        ).eval()
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**wide)).eval()


def ready(name: str, delta: Any) -> tuple[Any, nn.Module]:
    task: Any = make_task("classification", Columns(("text",), "label", "classification"))
    task.labels = ["no", "yes"]
    model, head = decoder(name), ClassHead()
    head.setup(task, Tokens(), model)
    attach(model, Recipe(delta=delta, head=head))
    return task, model.eval()


def logits(task: Any, model: nn.Module, examples: list[dict[str, Any]]) -> torch.Tensor:
    found: torch.Tensor = model(**task.collate(examples, Tokens()).inputs).logits
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_batch_answers_as_its_rows_do(name: str) -> None:
    task, model = ready(name, LoRA(rank=2))
    alone = torch.cat([logits(task, model, [e]) for e in EXAMPLES])
    assert torch.allclose(logits(task, model, EXAMPLES), alone, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_batch_behind_a_soft_prompt_too(name: str) -> None:
    task, model = ready(name, SoftPrompt(tokens=3))
    alone = torch.cat([logits(task, model, [e]) for e in EXAMPLES])
    assert torch.allclose(logits(task, model, EXAMPLES), alone, atol=1e-5)


@torch.no_grad()
def test_left_padded_language_models_get_positions() -> None:
    task: Any = make_task("causal", Columns(("prompt",), "answer", "causal"))
    model = tiny("gpt2")
    LMHead().setup(task, Tokens(), model)
    examples = [{**e, "labels": [-100, *e["input_ids"][1:]]} for e in EXAMPLES]
    right, left = (task.collate(examples, Tokens(), side) for side in ("right", "left"))
    assert "position_ids" in left.inputs and "position_ids" not in right.inputs
    both = [task.losses(model(**b.inputs).logits, b) for b in (right, left)]
    assert torch.allclose(*both, atol=1e-5)
