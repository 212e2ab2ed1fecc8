"""Texts as token ids within a length; what is cut is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tunewise.core.errors import UserError

from .base import Example, Row

__all__ = ["encode_texts", "longest", "row_texts"]


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


def row_texts(row: Row, columns: Sequence[str], optional: Sequence[str] = ()) -> list[str]:
    """The text of each column; numbers become text, a missing one is refused unless it is optional."""
    found = []
    for name in columns:
        value = row.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            value = str(value)
        if isinstance(value, str) and (value.strip() or name not in optional):
            found.append(value)
        elif name not in optional:
            kind = "missing" if value is None else f"{type(value).__name__}, expected text"
            raise UserError(f'Row {row.get("id")}: the column "{name}" is {kind}.')
    return found


def encode_texts(
    rows: Sequence[Row], columns: Sequence[str], tokenizer: Any, limit: int, head: Any = None
) -> tuple[list[Example], int]:
    """({input_ids, token_type_ids if the tokenizer has them} per row, number of rows that were cut).

    With a head that has `render`, the texts are put into its sentence and only the row's own text is cut.
    """
    if not rows:
        return [], 0
    texts = [row_texts(row, columns) for row in rows]
    render = getattr(head, "render", None)
    if render is not None:
        return _encode_rendered(rows, [" ".join(t) for t in texts], render, tokenizer, limit)
    _room_for_text(tokenizer, limit, len(columns) > 1)
    firsts, seconds = [t[0] for t in texts], [t[1] for t in texts] if len(columns) > 1 else None
    whole = tokenizer(firsts, seconds, truncation=False, verbose=False)
    examples = _examples(whole)
    long = [i for i, e in enumerate(examples) if len(e["input_ids"]) > limit]
    if long:
        again = [seconds[i] for i in long] if seconds else None
        shorter = tokenizer([firsts[i] for i in long], again, truncation=True, max_length=limit)
        for i, example in zip(long, _examples(shorter), strict=True):
            examples[i] = example
    return examples, len(long)


def _encode_rendered(
    rows: Sequence[Row], texts: list[str], render: Callable[[str], str], tokenizer: Any, limit: int
) -> tuple[list[Example], int]:
    examples = _examples(tokenizer([render(t) for t in texts], truncation=False, verbose=False))
    cut = 0
    for i, example in enumerate(examples):
        if len(example["input_ids"]) <= limit:
            continue
        fit = longest(texts[i], limit, lambda t: len(tokenizer(render(t), verbose=False)["input_ids"]))
        if not fit:
            raise UserError(
                f"Row {rows[i].get('id')}: max_length={limit} leaves no room for text beside the template."
            )
        examples[i] = _examples(tokenizer([render(fit)], verbose=False))[0]
        cut += 1
    return examples, cut


def _room_for_text(tokenizer: Any, limit: int, pair: bool) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if limit <= special:
        raise UserError(
            f"max_length={limit} leaves no room for text: the tokenizer adds {special} tokens of its own."
        )


def _examples(encoded: Any) -> list[Example]:
    names = [n for n in ("input_ids", "token_type_ids") if n in encoded]
    return [{n: list(encoded[n][i]) for n in names} for i in range(len(encoded["input_ids"]))]
