"""Names to roles: what a leaf module does, read from its own name, the names around it and its class."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

__all__ = ["component_of", "fused_rows", "is_attention", "kind_of", "role_of"]

_ATTENTION = re.compile(r"attention|attn|^self$|mixer", re.IGNORECASE)
_ATTENTION_CLASS = re.compile(r"Attention|Attn|Mixer|SSM")
_MLP = re.compile(r"mlp|ffn|feed_?forward|densereludense|expert|moe|^ff$|^intermediate$", re.IGNORECASE)
_MIXER = re.compile(r"mixer|mamba|ssm", re.IGNORECASE)
_HEAD = re.compile(
    r"^((\w+_)?(head|classifier|outputs)|score|cls|embed_out|proj_out|decoder|fc|logits\w*|seq_relationship"
    r"|\w*predictions?\w*)$"
)

_SAME = {
    "query": "q query q_proj query_proj q_lin to_q wq Wq q_attn linear_q project_q projection_query q_b_proj",
    "key": "k key k_proj key_proj k_lin to_k wk Wk linear_k project_k projection_key",
    "value": "v value v_proj value_proj v_lin to_v wv Wv linear_v project_v projection_value",
    "qkv": "qkv qkv_proj query_key_value c_attn Wqkv wqkv to_qkv att_proj",
    "kv": "kv kv_proj Wkv to_kv kv_b_proj",
    "latent": "q_a_proj kv_a_proj_with_mqa kv_a_proj",
    "output": "o o_proj out_lin to_out linear_out",
    "up": "up_proj c_fc lin1 wi wi_1 w3 dense_h_to_4h intermediate_dense ffn layer_1 linear1 linear_fc1"
    " fc_in fc1",
    "gate": "gate_proj wi_0 w1",
    "down": "down_proj lin2 w2 dense_4h_to_h output_dense ffn_output layer_2 linear2 linear_fc2 fc_out fc2",
    "gate_up": "gate_up_proj Wi",
}
_ROLE = {name: role for role, names in _SAME.items() for name in names.split()}
_INTERLEAVED = ("GPTNeoX", "Bloom", "Persimmon", "Falcon", "GPTBigCode", "MiniMaxLightning")
_OF_ATTENTION = {"query", "key", "value", "qkv", "kv", "output"}
_OF_MLP = {"up", "gate", "down", "gate_up", "router"}
_LAST = {"dense", "proj", "c_proj", "wo", "Wo", "out_proj", "output_proj", "proj_out", "projection", "dense2"}
"""Names that close a sub-layer: attention's `output` or the MLP's `down`, depending on what holds them."""


def kind_of(module: nn.Module) -> str | None:
    """Kind of a leaf module: "linear", "embedding", "norm" or "conv"; None for all others."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    own = type(module).__name__
    if isinstance(module, nn.Linear) or (own == "Conv1D" and hasattr(module, "nf")):
        return "linear"
    weight = module._parameters.get("weight")
    if re.search(r"Norm(\dd)?$", own) and weight is not None and weight.dim() == 1:
        return "norm"
    if not module._modules and isinstance(getattr(module, "in_features", None), int):
        return "linear" if isinstance(getattr(module, "out_features", None), int) else None
    return None


def is_attention(name: str, module: nn.Module) -> bool:
    """Whether a container mixes tokens: attention, or the mixer of a state-space model."""
    return bool(_ATTENTION.search(name) or _ATTENTION_CLASS.search(type(module).__name__))


def component_of(path: list[str], role: str) -> str | None:
    """Attention or MLP, told by the innermost enclosing name that says so, else by the role."""
    where = _context(path)
    if where in ("attention", "mlp"):
        return where
    return "attention" if role in _OF_ATTENTION else "mlp" if role in _OF_MLP else None


def _context(path: list[str]) -> str | None:
    patterns = {"mixer": _MIXER, "attention": _ATTENTION, "mlp": _MLP}
    found = (
        kind for part in reversed(path[:-1]) for kind, pattern in patterns.items() if pattern.search(part)
    )
    return next(found, None)


def role_of(kind: str, path: list[str], in_block: bool, has_blocks: bool) -> str:
    """Role of a leaf; `path` is its name below the block, or its whole name outside of blocks."""
    if kind == "embedding":
        return _embedding_role(path[-1])
    if kind == "conv":
        return "patch" if any("patch" in part for part in path) else "conv"
    if kind == "norm":
        return "norm"
    if not in_block:
        outside = _outside_role(path)
        if outside or has_blocks:
            return outside or "other"
    return _inner_role(path)


def _embedding_role(leaf: str) -> str:
    if "position" in leaf or leaf in ("wpe", "relative_attention_bias", "rel_embeddings"):
        return "position"
    return "segment" if "type" in leaf or "segment" in leaf else "token"


def _outside_role(path: list[str]) -> str | None:
    if any("pooler" in part for part in path):
        return "pooler"
    if _HEAD.match(path[-1]) or any(_HEAD.match(part) for part in path[:-1] if part != "decoder"):
        return "head"
    return "projection" if re.search(r"project(ion|or|$)|mapping_in", path[-1]) else None


def _inner_role(path: list[str]) -> str:
    if path[-1] == "linear" and len(path) > 1:  # a wrapped q_proj.linear is known by its wrapper
        path = path[:-1]
    leaf, where = path[-1], _context(path)
    parent = path[-2] if len(path) > 1 else ""
    if where == "mixer" and leaf in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        return leaf
    if "router" in path or (leaf in ("gate", "shared_expert_gate") and where == "mlp"):
        return "router"
    if where == "mlp" and leaf in ("in_proj", "proj_in", "dense1"):
        return "up"
    if leaf not in _LAST:
        return _ROLE.get(leaf, "other")
    if where == "attention":
        return "output"
    ends = {"output": "down", "output_query": "down", "intermediate": "up", "intermediate_query": "up"}
    return ends.get(parent, "down" if where == "mlp" else "other")


def fused_rows(role: str, leaf: str, out: int, parent: nn.Module | None) -> dict[str, Tensor]:
    """{role: output rows} of a fused linear, or {} where the layout of this class is not known.

    Contiguous [q | k | v] with grouped heads (GPT-2, Phi-3, ModernBERT), or interleaved head by head
    (GPT-NeoX, BLOOM, Persimmon) or group by group (Falcon).  `gate` is the half that the activation sees.
    """
    owner, rows = type(parent).__name__, torch.arange(out)
    if role == "gate_up" and owner.startswith(("GptOss", "OpenAIPrivacyFilter")):
        return {"gate": rows[::2], "up": rows[1::2]}
    if out % 2 == 0 and (role == "gate_up" or (role == "kv" and leaf == "c_attn")):
        first, second = ("gate", "up") if role == "gate_up" else ("key", "value")
        return {first: rows[: out // 2], second: rows[out // 2 :]}
    if role != "qkv" or parent is None or owner.startswith("CodeGen"):
        return {}
    head = getattr(parent, "head_dim", None) or getattr(parent, "head_size", None)
    if leaf == "query_key_value" or owner.startswith(_INTERLEAVED):
        return _interleaved(owner, parent, out, head)
    size = _query_size(parent, out)
    kv = (out - size) // 2
    if kv <= 0 or size + 2 * kv != out:
        return {}
    return {"query": rows[:size], "key": rows[size : size + kv], "value": rows[size + kv :]}


def _query_size(parent: nn.Module, out: int) -> int:
    """The output projection reads what the query heads wrote, so its input is as wide as the query."""
    for name, child in parent.named_children():
        if (name in _LAST or _ROLE.get(name) == "output") and kind_of(child) == "linear":
            return int(getattr(child, "in_features", None) or child.get_parameter("weight").shape[0])
    return out // 3


def _interleaved(owner: str, parent: nn.Module, out: int, head: int | None) -> dict[str, Tensor]:
    if not owner.startswith(_INTERLEAVED) or not head or out % head:
        return {}
    group = out // head if getattr(parent, "multi_query", False) else 3
    if getattr(parent, "new_decoder_architecture", False):
        group = int(getattr(parent, "num_heads", 0)) // int(getattr(parent, "num_kv_heads", 1)) + 2
    heads = torch.arange(out).view(-1, group, head)
    parts = {"query": heads[:, :-2], "key": heads[:, -2], "value": heads[:, -1]}
    return {role: rows.reshape(-1) for role, rows in parts.items()}
