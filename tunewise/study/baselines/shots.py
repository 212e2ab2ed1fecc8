"""What a language model answers without training: label names by their likelihood, prompts with worked examples."""

from __future__ import annotations

import copy
import hashlib
import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.errors import UserError
from tunewise.data import Columns
from tunewise.study.baselines.passes import Passes, SharedStart
from tunewise.task import CausalLM, Classification, Task
from tunewise.task.chat import Message, prompt_ids
from tunewise.task.text import IGNORED, longest, pad_id, pad_sequences

__all__ = ["SHOTS", "label_passes", "loss_passes", "shown", "worked_examples"]

SHOTS = 4
CONTENT_FREE = ("N/A", "[MASK]", "")
NO_ROOM = "Not one worked example fits into the {} tokens that there are for them beside a row."

Row = dict[str, Any]
Example = dict[str, Any]


def worked_examples(rows: Sequence[Row], texts: Sequence[str], kinds: Sequence[str]) -> list[int]:
    """Numbers of the training rows to show: SHOTS of them, as many of each kind, or one of each.

    texts, kinds  of each row: what is shown of it, and of which there must be equally many (labels)
    Rows no longer than the median come first, since short ones leave room, then the order of their hashed ids:
    the same rows give the same examples.
    """
    middle = statistics.median(map(len, texts))
    digests = [hashlib.sha256(str(row["id"]).encode()).hexdigest() for row in rows]
    ranks = [(max(len(text), middle), digest) for text, digest in zip(texts, digests, strict=True)]
    queues: dict[str, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: ranks[i]):
        queues.setdefault(kinds[i], []).append(i)
    each = max(1, SHOTS // len(queues))
    return [queue[k] for k in range(each) for _, queue in sorted(queues.items()) if k < len(queue)]


def label_passes(
    task: Classification,
    model: nn.Module,
    tokenizer: Any,
    train: Sequence[Row],
    rows: Sequence[Row],
    size: int,
) -> tuple[Passes, int]:
    """label = argmax_c log q_c(x) - log q_c(no content), q = softmax of the mean log p per token of c's name.

    train  rows to take worked examples from; none for zero-shot. Also returns how many are shown.
    Source: Zhao et al., 2021 (arXiv 2102.09690): the mean q over "N/A", "[MASK]" and "" is divided out, since a
    model prefers some names whatever the text is. Texts longer than the task's limit are cut at their end.
    """
    limit = task.limit(tokenizer)
    positions = _positions(task, tokenizer)
    start, count = _instruction(task, tokenizer, train, min(limit, positions // 2))

    def ids_of(texts: Sequence[str]) -> list[list[int]]:
        return [_prompt(tokenizer, f"{start}{text}\nLabel:") for text in texts]

    names = _label_ids(task, tokenizer)
    room = positions - max(len(n) for n in names) - len(ids_of([""])[0])
    texts = _cut(task, tokenizer, [_shown_text(task, row) for row in rows], min(limit, room))
    prompts = ids_of(texts)
    # The last token of a prompt is never shared: what it predicts is asked for.
    shared = SharedStart(model, prompts, min(map(len, prompts)) - 1)

    def scores(chosen: Sequence[Sequence[int]]) -> Tensor:
        return _label_scores(shared, chosen, names, pad_id(tokenizer)).log_softmax(1)

    nothing = [_fields(task, [text] * len(task.columns.text)) for text in CONTENT_FREE]
    empty = scores(ids_of(nothing)).exp().mean(0).log()

    def answer(numbers: Sequence[int]) -> list[str]:
        best = (scores([prompts[i] for i in numbers]) - empty).argmax(1)
        return [task.labels[i] for i in best.tolist()]

    return Passes([len(ids) - shared.length for ids in prompts], size, answer), count


def _instruction(task: Classification, tokenizer: Any, train: Sequence[Row], room: int) -> tuple[str, int]:
    """(instruction and worked examples, how many of these); they have `room` tokens together."""
    names = f"{', '.join(task.labels[:-1])} or {task.labels[-1]}"
    start = f"Label each text as {names}.\n\n"
    if not train:
        return start, 0
    labels = [task.labels[task.label_of(row)] for row in train]
    texts = [_shown_text(task, row) for row in train]
    chosen = worked_examples(train, texts, labels)
    examples = [f"{texts[i]}\nLabel: {labels[i]}\n\n" for i in chosen]
    while examples and len(_prompt(tokenizer, "".join(examples))) > room:
        examples.pop()
    if not examples:
        raise UserError(NO_ROOM.format(room))
    return start + "".join(examples), len(examples)


def _shown_text(task: Task, row: Row) -> str:
    return _fields(task, [task.text_of(row, column) for column in task.columns.text])


def _fields(task: Task, texts: Sequence[str]) -> str:
    """Each text column with its name; a single one is called Text."""
    columns = task.columns.text
    names = ["Text"] if len(columns) == 1 else columns
    return "\n".join(f"{name}: {text}" for name, text in zip(names, texts, strict=True))


def _cut(task: Task, tokenizer: Any, texts: list[str], limit: int) -> list[str]:
    if limit < 1:
        raise UserError("The label names and worked examples fill all positions of the base model.")

    def tokens(text: str) -> int:
        return len(_prompt(tokenizer, text))

    long = [i for i, text in enumerate(texts) if tokens(text) > limit]
    for i in long:
        texts[i] = longest(texts[i], limit, tokens) or ""
    task.note_cut(len(long), len(texts), limit)
    return texts


def _prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that goes on: without the end token that some tokenizers add."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:-1] if ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else ids


def _label_ids(task: Classification, tokenizer: Any) -> list[list[int]]:
    """The tokens of each label name as they follow "Label:"."""
    before = _prompt(tokenizer, "Label:")
    found = []
    for name in task.labels:
        whole = _prompt(tokenizer, f"Label: {name}")
        found.append(whole[len(os.path.commonprefix([before, whole])) :])
    return found


def _label_scores(
    shared: SharedStart, prompts: Sequence[Sequence[int]], names: Sequence[Sequence[int]], pad: int
) -> Tensor:
    """Mean log p per token of each name after each prompt, `[prompts, names]`, in float32.

    All names that are one token, or begin like a longer one, are read from one pass.
    """
    paths = sorted({tuple(name[:-1]) for name in names}, key=len, reverse=True)
    paths = [p for i, p in enumerate(paths) if not any(q[: len(p)] == p for q in paths[:i])]
    found = torch.empty(len(prompts), len(names))
    for path in paths:
        read = [j for j, name in enumerate(names) if path[: len(name) - 1] == tuple(name[:-1])]
        rows = [[*prompt, *path] for prompt in prompts]
        skip = shared.skipped(rows)
        ends = torch.tensor([len(prompt) - skip - 1 for prompt in prompts])
        wanted = (ends[:, None] + torch.arange(len(path) + 1)).unique()
        cut = [row[skip:] for row in rows]
        mask = pad_sequences([[1] * len(row) for row in cut], 0, "right")
        logits = shared.logits(pad_sequences(cut, pad, "right"), mask, skip, wanted)
        for i, end in enumerate(ends.tolist()):
            at = torch.searchsorted(wanted, torch.arange(end, end + len(path) + 1))
            logs = logits[i, at.to(logits.device)].float().log_softmax(-1).cpu()
            for j in read:
                name = torch.tensor(names[j])
                found[i, j] = logs[torch.arange(len(name)), name].mean()
    return found


def loss_passes(
    task: CausalLM,
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    size: int,
    own: Sequence[Example] | None = None,
) -> Passes:
    """{"loss", "token_accuracy", "tokens"} per row, as the task predicts them.

    own  the examples of these rows without worked ones: so many of the last learnt tokens are the row's own
    """
    examples = task.encode(rows, tokenizer)
    for example, alone in zip(examples, own or examples, strict=True):
        learnt = [i for i, label in enumerate(example["labels"]) if label != IGNORED]
        for i in learnt[: len(learnt) - sum(label != IGNORED for label in alone["labels"])]:
            example["labels"][i] = IGNORED
    first = min(next(i for i, label in enumerate(e["labels"]) if label != IGNORED) for e in examples)
    # The logits of the last token before an answer are needed, so it is never shared.
    shared = SharedStart(model, [e["input_ids"] for e in examples], first - 1)

    def answer(numbers: Sequence[int]) -> list[Any]:
        chosen = [examples[i] for i in numbers]
        skip = shared.skipped([e["input_ids"] for e in chosen])
        cut = [{**e, "input_ids": e["input_ids"][skip:], "labels": e["labels"][skip:]} for e in chosen]
        batch = task.collate(cut, tokenizer, "right").to(shared.device)
        logits = shared.logits(batch.inputs["input_ids"], batch.inputs["attention_mask"], skip)
        return task.predict(logits, batch)

    return Passes([e["length"] - shared.length for e in examples], size, answer)


def shown(
    task: CausalLM, tokenizer: Any, train: Sequence[Row], rows: Sequence[Row], own: Sequence[Example]
) -> tuple[CausalLM, list[Row], int]:
    """(task, rows with the same worked examples before each prompt, how many): as earlier turns of the chat where
    the model has a template, else as text.

    own  the examples of `rows` without worked ones. These have the task's max_length tokens for themselves, so
    that no row is cut more than without them; of rows that are cut the worked ones lose their start first.
    """
    limit, chat = task.limit(tokenizer), bool(task.chat)
    room = min(limit, _positions(task, tokenizer) - max(int(e["length"]) for e in own))
    turns = [_turns(task, row) for row in train]
    texts = ["\n".join(turn["content"] for turn in one) for one in turns]
    chosen = [turns[i] for i in worked_examples(train, texts, [""] * len(train))]

    def tokens(examples: Sequence[list[Message]]) -> int:
        return len(
            prompt_ids(_asked(examples, [{"role": "user", "content": "?"}], chat), tokenizer, chat, "?")
        )

    while chosen and tokens(chosen) - tokens([]) > room:
        chosen.pop()
    if not chosen:
        raise UserError(NO_ROOM.format(room))
    other = copy.copy(task)
    other.notes, column = [], "messages" if chat else task.columns.text[0]
    other.max_length = min(_positions(task, tokenizer), limit + tokens(chosen) - tokens([]))
    made: list[Row] = []
    for row in rows:
        asked = _asked(chosen, _turns(task, row) if chat else _turns(task, row)[:-1], chat)
        made.append({**row, column: asked if chat else asked[0]["content"]})
    label = None if chat else task.columns.label
    other.columns = Columns((column,), label, task.columns.task)
    return other, made, len(chosen)


def _turns(task: CausalLM, row: Row) -> list[Message]:
    """The row as a chat that ends with its answer."""
    messages = task.messages(row)
    if task.is_conversation:
        return messages
    return [*messages, {"role": "assistant", "content": task.references([row])[0]}]


def _asked(examples: Sequence[list[Message]], own: list[Message], chat: bool) -> list[Message]:
    """The examples before a row's own turns, but after its system message, which stands for theirs too."""
    if not chat:
        texts = [f"{one[0]['content']}\n{one[-1]['content']}\n\n" for one in examples]
        return [{"role": "user", "content": "".join([*texts, own[0]["content"]])}]
    system = [turn for turn in own if turn["role"] == "system"]
    rest = [turn for turn in own if turn["role"] != "system"]
    shared = [turn for one in examples for turn in one if turn["role"] != "system"]
    return [*system, *shared, *rest]


def _positions(task: Task, tokenizer: Any) -> int:
    """Tokens that the base model can take at once."""
    known = (task.position_limit, tokenizer.model_max_length)
    return int(min(n for n in known if n is not None))
