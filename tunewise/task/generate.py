"""Answers in words: greedy generation for rows, and scores of the generated text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tunewise.core.errors import UserError
from tunewise.task.base import Row
from tunewise.task.causal import CausalLM
from tunewise.task.chat import conversation
from tunewise.task.metrics import custom_score, exact_match, wilson
from tunewise.task.text import pad_id

__all__ = ["generate", "generation_metrics"]


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    task: CausalLM,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> list[str]:
    """The greedy answer to each row, without special tokens; ends at eos or after `max_new_tokens`.

    Prompts are padded on the left whatever the training used. Fewer tokens are made where the model has no
    positions for more. Raises `UserError` for a model that cannot generate.
    """
    if not hasattr(model, "generate") or not getattr(model, "can_generate", lambda: False)():
        raise UserError(f"{type(model).__name__} cannot generate text: load it as a causal language model.")
    examples = task.encode(rows, tokenizer, task.default_head(), labelled=False)
    order = sorted(range(len(rows)), key=lambda i: int(examples[i]["length"]))
    device = next(model.parameters()).device
    if task.position_limit is not None and examples:
        room = task.position_limit - max(int(e["length"]) for e in examples)
        if room < 1:
            raise UserError(
                f"The longest prompt fills all {task.position_limit} positions: lower --max-length."
            )
        max_new_tokens = min(max_new_tokens, room)
    answers, mode = [""] * len(rows), model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = task.collate([examples[i] for i in chosen], tokenizer, "left").to(device).inputs
        inputs.pop("position_ids", None)  # `generate` makes its own from the mask, and moves them on
        made = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_id(tokenizer),
            eos_token_id=_stops(model, tokenizer, task),
        )
        width = inputs["input_ids"].shape[1]
        for i, text in zip(
            chosen, tokenizer.batch_decode(made[:, width:], skip_special_tokens=True), strict=True
        ):
            answers[i] = text.strip()
    model.train(mode)
    return answers


def _stops(model: Any, tokenizer: Any, task: CausalLM) -> list[int]:
    """eos of the model and the tokenizer, and the token that ends a turn in the chat template."""
    given = getattr(model.generation_config, "eos_token_id", None)
    stops = {int(i) for i in (given if isinstance(given, list) else [given]) if i is not None}
    stops.add(int(tokenizer.eos_token_id))
    if task.chat:
        turn = conversation(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenizer, "a"
        )
        stops.add([i for i, learnt in zip(turn.ids, turn.learnt, strict=True) if learnt][-1])
    return sorted(stops)


def generation_metrics(task: CausalLM, texts: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    """exact_match (of final answers after `####`, else of texts), the user's own metric, and intervals."""
    references = task.references(rows)
    found: dict[str, float] = {}
    if task.custom is not None and task.generation_metric is not None:
        name = task.generation_metric
        found[name], found[f"{name}_low"], found[f"{name}_high"] = custom_score(
            task.custom, texts, references
        )
    share = exact_match(texts, references)
    low, high = wilson(share * len(texts), len(texts))
    return {"exact_match": share, "exact_match_low": low, "exact_match_high": high, **found}
