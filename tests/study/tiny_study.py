"""A tiny base model in a folder and rows that it can learn, for studies in seconds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

VOCAB = 60
WORDS = {f"w{i}": i for i in range(4, VOCAB)}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **WORDS}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, model_max_length=32)


def model() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertModel(BertConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=40, pad_token_id=0))


def folder(place: Path) -> Path:
    """The model as `save_pretrained` writes it."""
    model().save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def rows(count: int = 240) -> list[dict[str, Any]]:
    """The label says whether a word of the first half of the vocabulary comes first."""
    pick = random.Random(0)
    words = list(WORDS)
    found = []
    for _ in range(count):
        text = [pick.choice(words) for _ in range(pick.randint(4, 12))]
        found.append({"text": " ".join(text), "label": "low" if WORDS[text[0]] < VOCAB / 2 else "high"})
    return found


def file(place: Path, count: int = 240) -> Path:
    """The rows as JSON lines."""
    import json

    place.write_text("".join(json.dumps(row) + "\n" for row in rows(count)), encoding="utf-8")
    return place
