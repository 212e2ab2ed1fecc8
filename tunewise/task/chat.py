"""Rows -> token ids and which of them are learnt: chat templates, prompt and answer, plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunewise.core.errors import UserError

__all__ = ["Message", "Tokens", "conversation", "plain_answer", "plain_text", "prompt_ids"]

Message = dict[str, str]


@dataclass
class Tokens:
    """Token ids, which of them are learnt, and how many assistant turns the rendered chat hides."""

    ids: list[int] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)
    lost_turns: int = 0

    def add(self, ids: Sequence[int], learnt: bool) -> None:
        self.ids += ids
        self.learnt += [learnt] * len(ids)

    @property
    def answer_start(self) -> int:
        """Where the last run of learnt tokens begins; the length if nothing is learnt."""
        end = len(self.ids)
        while end and not self.learnt[end - 1]:
            end -= 1
        start = end
        while start and self.learnt[start - 1]:
            start -= 1
        return start if start < end else len(self.ids)

    def cut_left(self, limit: int, bos: int | None) -> bool:
        """Keeps the last `limit` tokens (and a leading bos); whether anything was cut."""
        if len(self.ids) <= limit:
            return False
        keep = 1 if self.ids[0] == bos and limit > 1 else 0
        over = len(self.ids) - limit
        del self.ids[keep : keep + over], self.learnt[keep : keep + over]
        return True


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start(tokenizer: Any) -> list[int]:
    """The bos token, if this tokenizer puts one before a text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _render(tokenizer: Any, messages: Sequence[Message], ask: bool, row: str) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        raise UserError(f"Row {row}: the model's chat template refuses the messages: {error}.") from None
    return text


def conversation(messages: Sequence[Message], tokenizer: Any, row: str) -> Tokens:
    """The rendered chat; learnt is what the assistant says, up to and with its end-of-turn token.

    Each piece is tokenized by itself, as a prompt is when the model has to answer it.
    """
    whole, made, at = _render(tokenizer, messages, False, row), Tokens(), 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _render(tokenizer, messages[:i], True, row) if i else ""
        end = _render(tokenizer, messages[: i + 1], False, row)
        # Some templates rewrite earlier turns (they drop the reasoning): not every turn is found again.
        if (
            not i
            or len(start) < at
            or len(end) <= len(start)
            or not (whole.startswith(start) and whole.startswith(end))
        ):
            made.lost_turns += 1
            continue
        made.add(_ids(tokenizer, whole[at : len(start)]), False)
        _add_turn(made, _ids(tokenizer, whole[len(start) : len(end)]), tokenizer)
        at = len(end)
    if not any(made.learnt):
        raise UserError(f"Row {row} has no assistant message that could be learnt.")
    return made


def _add_turn(made: Tokens, ids: list[int], tokenizer: Any) -> None:
    special = set(tokenizer.all_special_ids)
    stop = next((k for k in range(len(ids) - 1, -1, -1) if ids[k] in special), None)
    if stop is None or tokenizer.decode(ids[stop + 1 :]).strip():
        made.add([*ids, tokenizer.eos_token_id], True)
        return
    made.add(ids[: stop + 1], True)
    made.add(ids[stop + 1 :], False)


def plain_answer(prompt: str, answer: str, tokenizer: Any) -> Tokens:
    """prompt, line break, answer, eos; the answer and eos are learnt."""
    made = Tokens()
    made.add([*_start(tokenizer), *_ids(tokenizer, f"{prompt}\n")], False)
    made.add([*_ids(tokenizer, answer), tokenizer.eos_token_id], True)
    return made


def plain_text(text: str, tokenizer: Any) -> Tokens:
    """The text and eos, all learnt."""
    made = Tokens()
    made.add(_start(tokenizer), False)
    made.add([*_ids(tokenizer, text), tokenizer.eos_token_id], True)
    return made


def prompt_ids(messages: Sequence[Message], tokenizer: Any, chat: bool, row: str) -> list[int]:
    """What the model is given when it has to answer: exactly the part before the learnt tokens."""
    if chat:
        return _ids(tokenizer, _render(tokenizer, messages, True, row))
    text = "\n".join(message["content"] for message in messages)
    return [*_start(tokenizer), *_ids(tokenizer, f"{text}\n")]
