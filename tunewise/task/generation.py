"""Greedy answers of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tunewise.core.errors import UserError

__all__ = ["generate", "stop_ids"]


def stop_ids(tokenizer: Any) -> list[int]:
    """The end token, and the end-of-turn token of the chat template where that is another."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if getattr(tokenizer, "chat_template", None):
        from .chat import prompt_answer, tokenize

        pieces = prompt_answer("a", "b", tokenizer, True)
        last = tokenize([pieces], tokenizer, True)[0][0][-1]
        found += [last] if last not in found else []
    if not found:
        raise UserError("The tokenizer has no end-of-sequence token, so generation could not stop.")
    return found


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, examples: Sequence[dict[str, Any]], task: Any, *,
    max_new_tokens: int = 256, batch_size: int = 16,
) -> list[str]:  # fmt: skip
    """Greedy continuations of encoded prompts, as texts without special tokens, in the order given.

    Prompts are padded on the left, so that all of a batch end where the answer begins.
    """
    if not hasattr(model, "generate"):
        raise UserError(f"{type(model).__name__} cannot generate text; load it as a causal language model.")
    device, mode = next(model.parameters()).device, model.training
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    answers, stops = [""] * len(examples), stop_ids(tokenizer)
    pad = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = task.collate([examples[i] for i in rows], tokenizer, "left").to(device)
            ids = model.generate(
                **batch.inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                temperature=None, top_p=None, top_k=None, eos_token_id=stops, pad_token_id=pad,
            )  # fmt: skip
            new = ids[:, batch.inputs["input_ids"].shape[1] :].tolist()
            for i, tokens in zip(rows, new, strict=True):
                answers[i] = tokenizer.decode(_until(tokens, stops), skip_special_tokens=True).strip()
    finally:
        model.train(mode)
    return answers


def _until(tokens: list[int], stops: list[int]) -> list[int]:
    end = next((n for n, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]
