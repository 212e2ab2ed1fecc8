"""Texts -> token ids, and rows of different length -> one rectangle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tunewise.core.errors import UserError

__all__ = ["IGNORED", "encode_for", "longest", "pad_id", "pad_rows", "pad_sequences", "tokenize"]

# The value of labels that are not supervised, as in torch's cross-entropy.
IGNORED = -100
TOKEN_FIELDS = ("input_ids", "token_type_ids")


def tokenize(
    texts: Sequence[tuple[str, ...]], tokenizer: Any, limit: int
) -> tuple[list[dict[str, list[int]]], int]:
    """({input_ids, token_type_ids if the tokenizer has them} per text or text pair, how many were cut)."""
    if not texts:
        return [], 0
    found = _call(texts, tokenizer)
    long = [i for i, row in enumerate(found) if len(row["input_ids"]) > limit]
    if long:
        short = _call([texts[i] for i in long], tokenizer, truncation=True, max_length=limit)
        for i, row in zip(long, short, strict=True):
            found[i] = row
    return found, len(long)


def encode_for(
    head: Any, texts: Sequence[tuple[str, ...]], tokenizer: Any, limit: int
) -> tuple[list[dict[str, Any]], int]:
    """`tokenize` as the head wants it: by its `encode_texts`, or inside what its `render` writes.

    A head with several `renders` gets each row in each of them: the first, and the others as `views` of the row.
    """
    if hasattr(head, "encode_texts"):
        made: tuple[list[dict[str, Any]], int] = head.encode_texts(texts, tokenizer, limit)
        return made
    if not hasattr(head, "render"):
        return tokenize(texts, tokenizer, limit)
    joined = [" ".join(t) for t in texts]
    if not joined:
        return [], 0
    views = [_inside(r, joined, tokenizer, limit) for r in getattr(head, "renders", [head.render])]
    found = views[0][0]
    if len(views) > 1:
        found = [{**row, "views": [rows[i] for rows, _ in views[1:]]} for i, row in enumerate(found)]
    return found, max(n for _, n in views)


def _inside(
    render: Callable[[str], str], texts: Sequence[str], tokenizer: Any, limit: int
) -> tuple[list[dict[str, Any]], int]:
    """The texts in a template, those that are too long cut inside of it, and how many were."""
    found, cut = _call([(render(t),) for t in texts], tokenizer), 0
    for i, text in enumerate(texts):
        if len(found[i]["input_ids"]) <= limit:
            continue
        fit = longest(text, limit, lambda t: len(_call([(render(t),)], tokenizer)[0]["input_ids"]))
        if not fit:
            raise UserError(f"max_length={limit} leaves no room for text beside the head's template.")
        found[i], cut = _call([(render(fit),)], tokenizer)[0], cut + 1
    return found, cut


def longest(text: str, most: int, size: Callable[[str], int], *, end: bool = False) -> str | None:
    """The longest start (or end) of `text` with `size(part) <= most`; None if even "" is too much."""

    def part(n: int) -> str:
        return text[len(text) - n :] if end else text[:n]

    if size("") > most:
        return None
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(part(middle)) <= most else (low, middle - 1)
    return part(low)


def _call(texts: Sequence[tuple[str, ...]], tokenizer: Any, **options: Any) -> list[dict[str, list[int]]]:
    columns = [list(column) for column in zip(*texts, strict=True)]
    made = tokenizer(*columns, verbose=False, return_attention_mask=False, **options)
    names = [name for name in TOKEN_FIELDS if name in made]
    return [{name: list(made[name][i]) for name in names} for i in range(len(texts))]


def pad_id(tokenizer: Any) -> int:
    """An id to fill with; which one does not matter, since the attention mask says what is padding."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    return 0


def pad_sequences(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    """`[rows, longest]` integers, filled with `value` on `side`."""
    width = max(len(row) for row in rows)
    table = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        table[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return table


def pad_rows(examples: Sequence[dict[str, Any]], tokenizer: Any, side: str) -> dict[str, Tensor]:
    """{input_ids, attention_mask, token_type_ids if the examples have them}, each `[lines, longest]`.

    A line is a row, or one of its `views`, which follow it.
    """
    examples = [line for e in examples for line in (e, *e.get("views", ()))]
    ids = [e["input_ids"] for e in examples]
    inputs = {
        "input_ids": pad_sequences(ids, pad_id(tokenizer), side),
        "attention_mask": pad_sequences([[1] * len(row) for row in ids], 0, side),
    }
    if "token_type_ids" in examples[0]:
        inputs["token_type_ids"] = pad_sequences([e["token_type_ids"] for e in examples], 0, side)
    return inputs
