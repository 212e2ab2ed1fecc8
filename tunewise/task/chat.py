"""Prompts and answers as pieces of text, each learnt or only read, by the chat template or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunewise.core.errors import UserError

__all__ = ["Piece", "Tokens", "conversation", "prompt_answer", "prompt_only", "tokenize"]

Tokens = tuple[list[int], list[bool]]

ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Piece:
    """A stretch of text; `learnt` pieces are supervised, and `last` ones end with the end-of-turn token."""

    text: str
    learnt: bool
    last: bool = False


def prompt_only(prompt: str, tokenizer: Any, chat: bool) -> str:
    """The text after which the model answers."""
    if not chat:
        return f"{prompt}\n" if prompt else ""
    return _render([{"role": "user", "content": prompt}], tokenizer, True)


def prompt_answer(prompt: str, answer: str, tokenizer: Any, chat: bool) -> list[Piece]:
    """The prompt is read, the answer and its end are learnt."""
    if not chat:
        return [Piece(prompt_only(prompt, tokenizer, False), False), Piece(answer, True, True)]
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return conversation(messages, tokenizer, "a prompt")


def conversation(messages: Any, tokenizer: Any, where: str) -> list[Piece]:
    """What the assistant says is learnt, everything else is read; text after its last turn is left out.

    UserError where a message is malformed, nobody answers, or the chat template rewrites earlier turns.
    """
    _check(messages, where)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    whole, at, pieces = _render(messages[: turns[-1] + 1], tokenizer, False), 0, []
    for turn in turns:
        before = _render(messages[:turn], tokenizer, True)
        after = _render(messages[: turn + 1], tokenizer, False)
        if not (whole.startswith(after) and after.startswith(before)) or len(before) < at:
            raise UserError(
                f"The tokenizer's chat template writes {where} differently once it is answered, so the "
                "answer cannot be told apart; pass chat=False to do without the template."
            )
        answer = _without_gap(after[len(before) :], tokenizer)
        pieces += [Piece(whole[at : len(before)], False), Piece(answer, True, turn == turns[-1])]
        at = len(before) + len(answer)
    return pieces


def _check(messages: Any, where: str) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{where} holds no list of messages.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f'{where} has a message without text, expected {{"role": ..., "content": ...}}.')
        if message.get("role") not in ROLES:
            raise UserError(f"{where} has the role {message.get('role')!r}, expected {', '.join(ROLES)}.")
    if all(m["role"] != "assistant" for m in messages):
        raise UserError(f"{where} has no message of the role assistant, so there is nothing to learn.")


def _render(messages: list[dict[str, str]], tokenizer: Any, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(f"The chat template refuses messages in the order {roles}: {error}.") from error


def _without_gap(answer: str, tokenizer: Any) -> str:
    """White space after the end-of-turn token belongs to the next turn."""
    bare = answer.rstrip()
    ends = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return bare if any(bare.endswith(e) for e in ends) else answer


def tokenize(rows: Sequence[Sequence[Piece]], tokenizer: Any, chat: bool) -> list[Tokens]:
    """(ids, learnt) per row; piece by piece, so that a prompt reads the same with and without answer.

    A beginning token is put first where the tokenizer does so and the template has not; an end token is put
    after the last answer unless the template has.
    """
    texts = [p.text for row in rows for p in row]
    if not texts:
        return []
    encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    start = [] if chat else _start(tokenizer)
    ends = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    found = []
    for row in rows:
        ids, learnt = list(start), [False] * len(start)
        for piece in row:
            tokens = list(next(encoded))
            if piece.last and not (chat and tokens and tokens[-1] in ends):
                tokens.append(_end(tokenizer))
            ids += tokens
            learnt += [piece.learnt] * len(tokens)
        found.append((ids, learnt))
    return found


def _start(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _end(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end-of-sequence token, so the model could not learn to stop.")
    return int(tokenizer.eos_token_id)
