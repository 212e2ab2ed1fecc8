"""A word-level tokenizer made in memory, with or without a chat template; pad may be the end token."""

from __future__ import annotations

from typing import Any

__all__ = ["CHATML", "tiny_tokenizer"]

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WORDS = [
    "good",
    "bad",
    "film",
    "fine",
    "dull",
    *"abcde",
    "one",
    "two",
    "hi",
    "user",
    "assistant",
    *"1234",
    "####",
]


def tiny_tokenizer(*, chat: str | None = None, pad: str = "[PAD]", bert: bool = False) -> Any:
    """`bert`: [CLS] text [SEP] with token types; otherwise nothing is added and <|end|> is the end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|start|>", "<|end|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options: dict[str, Any] = {"pad_token": pad, "unk_token": "[UNK]"}
    if bert:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        options |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        options["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        options |= {"eos_token": "<|end|>", "bos_token": "<|start|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **options)
    tokenizer.chat_template = chat
    return tokenizer
