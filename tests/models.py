"""Tiny randomly initialised transformers models, two layers and width 32, for tests in milliseconds."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

__all__ = ["NAMES", "tiny", "tiny_batch"]

VOCAB = 99
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {**_WIDE, "vocab_size": VOCAB, **_IDS}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_IMAGE = {"image_size": 16, "patch_size": 8}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCAB,
    **_IDS,
    "decoder_start_token_id": 1,
}
_DISENTANGLED = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 8,
    "share_att_key": True,
}

_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _TEXT),
    "deberta": ("DebertaV2ForSequenceClassification", "DebertaV2Config", {**_TEXT, **_DISENTANGLED}),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**_TEXT, "embedding_size": 16}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": VOCAB, "pad_token_id": 0},
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**_TEXT, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, **_IDS},
    ),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, **_IDS},
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**_TEXT, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 64},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gemma": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 8}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCAB,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_SEQ2SEQ, "forced_eos_token_id": 2}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 32},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_WIDE, **_IMAGE}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**_WIDE, **_IMAGE, "mlp_ratio": 2}),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _TEXT, "vision_config": {**_WIDE, **_IMAGE}, "projection_dim": 16},
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "state_size": 8, **_IDS},
    ),
}
NAMES = tuple(_MODELS)
_CAUSAL = {"gpt2", "neox", "bloom", "falcon", "llama", "phi3", "mixtral", "qwen3", "gemma", "mamba"}


@cache
def _config(name: str) -> Any:
    import transformers

    _, config, options = _MODELS[name]
    return getattr(transformers, config)(**options)


def tiny(name: str, *, seed: int = 0) -> nn.Module:
    """A fresh model in eval mode, the same for the same seed; the global random state is left alone."""
    import copy

    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, _MODELS[name][0])(copy.deepcopy(_config(name)))
    return model.eval()


def tiny_batch(name: str, *, size: int = 2, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Keyword arguments for one forward pass with a loss (CLIP's loss needs `return_loss=True` besides)."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (size, length), generator=make)
    mask = torch.ones_like(ids)
    pixels = torch.randn(size, 3, 16, 16, generator=make)
    if name == "clip":
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    if name in ("vit", "dinov2"):
        return {"pixel_values": pixels, "labels": torch.arange(size) % 2}
    if name == "whisper":
        return {"input_features": torch.randn(size, 8, 16, generator=make), "labels": ids}
    labels = ids if name in _CAUSAL or name in ("t5", "bart", "roberta") else torch.arange(size) % 2
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
