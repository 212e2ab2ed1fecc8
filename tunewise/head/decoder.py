"""A small decoder in equations: causal self-attention and cross-attention take turns, as in Llama's blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.core.forward import read_weight
from tunewise.sites import find_sites

__all__ = ["Past", "Shape", "decode", "decoder_formula", "decoder_tensors", "keys_and_values", "shape_of"]

EPS = 1e-6
MATRICES = {"q": "query", "k": "key", "v": "value", "o": "output", "gate": "gate", "up": "up", "down": "down"}
Past = list[tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Shape:
    """Sizes: vocabulary, width of what cross-attention reads, own width, heads (and key/value heads), MLP, depth."""

    words: int
    memory: int
    width: int
    heads: int
    groups: int
    size: int
    inner: int
    layers: int
    theta: float = 10_000.0

    def matrices(self, layer: int) -> Iterator[tuple[str, int, int]]:
        """(name, out, in) of a layer's matrices; layers 1, 3, ... (counted from 0) read the memory."""
        read = self.memory if layer % 2 else self.width
        yield "q", self.heads * self.size, self.width
        yield "k", self.groups * self.size, read
        yield "v", self.groups * self.size, read
        yield "o", self.width, self.heads * self.size
        yield "gate", self.inner, self.width
        yield "up", self.inner, self.width
        yield "down", self.width, self.inner


def shape_of(model: Any, layers: int, width: int | None) -> Shape:
    """The decoder of this depth: as wide as the model, or of a given width. `UserError` for sizes that do not fit."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    hidden = getattr(config, "hidden_size", None)
    if layer is None or not isinstance(hidden, int):
        raise UserError(f"{type(model).__name__} is no language model of known width.")
    words = int(layer.weight.shape[0])
    if width is not None:
        heads = max(1, width // 64)
        if width % (2 * heads):
            raise UserError(
                f"A decoder of width {width} has {heads} heads: it must be a multiple of {2 * heads}."
            )
        return Shape(words, hidden, width, heads, heads, width // heads, 4 * width, layers)
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or hidden // heads)
    sizes = [getattr(config, name, None) for name in ("intermediate_size", "d_ff", "n_inner")]
    inner = next((v for v in sizes if isinstance(v, int)), 4 * hidden)
    theta = float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0))
    return Shape(words, hidden, hidden, heads, groups, size + size % 2, inner, layers, theta)


def decoder_formula(s: Shape) -> int:
    """Matrices and two norms per layer, the first input, both projections between words and width, the last norm."""
    per_layer = sum(a * b for i in range(s.layers) for _, a, b in s.matrices(i))
    return per_layer + 2 * s.layers * s.width + 2 * s.words * s.width + 2 * s.width


def decoder_tensors(s: Shape, model: nn.Module) -> dict[str, P]:
    """Start values: matrices of evenly spaced blocks of the model where it has those of this shape, else random.

    What goes out starts at 0, what comes in at the model's token embeddings where they are as wide.
    """
    blocks = _llama_like(model)
    found = {"start": P(torch.randn(s.width) * 0.02, "head")}
    for i in range(s.layers):
        block = blocks[max((i + 1) * len(blocks) // s.layers - 1, 0)] if blocks else {}
        for name, rows, columns in s.matrices(i):
            weight = block.get(MATRICES[name])
            if weight is None or tuple(weight.shape) != (rows, columns):
                weight = torch.randn(rows, columns) * columns**-0.5
            found[f"{name}{i}"] = P(weight, "head")
        found |= {f"{n}{i}": P(torch.ones(s.width), "head") for n in ("norm", "inner_norm")}
    table = model.get_input_embeddings().weight.detach()  # type: ignore[operator,union-attr]
    same = tuple(table.shape) == (s.words, s.width)
    found["words_in"] = P(table.float() if same else torch.randn(s.words, s.width) * 0.02, "head")
    found["words_out"] = P(torch.zeros(s.words, s.width), "head")
    return found | {"last_norm": P(torch.ones(s.width), "head")}


def _llama_like(model: nn.Module) -> list[dict[str, Tensor]]:
    """{role: weight `[out, in]`} of the decoder's blocks that have every matrix of ours, in order."""
    config: Any = getattr(model, "config", None)
    both = getattr(config, "is_encoder_decoder", False)
    blocks: dict[int, dict[str, Tensor]] = {}
    for site in find_sites(model):
        here = site.kind == "linear" and site.layer is not None and not site.roles and not site.transposed
        if here and (not both or "decoder" in str(site.stack)):
            blocks.setdefault(site.layer or 0, {}).setdefault(site.role, read_weight(site.module).detach())
    return [block for _, block in sorted(blocks.items()) if set(MATRICES.values()) <= block.keys()]


def _norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _turned(x: Tensor, at: Tensor, theta: float) -> Tensor:
    """Rotary positions `at` `[rows, tokens]` on x `[rows, heads, tokens, size]`."""
    half = x.shape[-1] // 2
    rates = theta ** (-torch.arange(half, device=x.device) / half)
    angle = (at[:, None, :, None] * rates).to(x.dtype)
    a, b, cos, sin = x[..., :half], x[..., half:], angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def keys_and_values(t: Any, s: Shape, states: Tensor, at: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the cross-attention layers read of states `[rows, n, memory]`, which are brought to norm 1 before."""
    found, states = [], _norm(states)
    for i in range(1, s.layers, 2):
        k, v = (_split(F.linear(states, getattr(t, f"{n}{i}")), s.groups) for n in "kv")
        found.append((_turned(k, at, s.theta), v))
    return found


def decode(
    t: Any, s: Shape, x: Tensor, at: Tensor, past: Past, memory: list[tuple[Tensor, Tensor]], seen: Tensor
) -> Tensor:
    """x `[rows, n, width]` at positions `at` -> `[rows, n, words]`; earlier tokens are in `past`, which grows.

    seen  `[rows, n, memory]`: what each token may read of the memory
    """
    for i in range(s.layers):
        y = _norm(x, getattr(t, f"norm{i}"))
        q = _turned(_split(F.linear(y, getattr(t, f"q{i}")), s.heads), at, s.theta)
        if i % 2:
            (k, v), mask = memory[i // 2], seen[:, None]
        else:
            k, v = (_split(F.linear(y, getattr(t, f"{n}{i}")), s.groups) for n in "kv")
            k, before = _turned(k, at, s.theta), past[i]
            if before is not None:
                k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
            past[i] = (k, v)
            square = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device)
            mask = square.tril(k.shape[2] - q.shape[2])
        y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=s.groups != s.heads)
        x = x + F.linear(y.transpose(1, 2).flatten(2), getattr(t, f"o{i}"))
        y = _norm(x, getattr(t, f"inner_norm{i}"))
        y = F.silu(F.linear(y, getattr(t, f"gate{i}"))) * F.linear(y, getattr(t, f"up{i}"))
        x = x + F.linear(y, getattr(t, f"down{i}"))
    return F.linear(_norm(x, t.last_norm), t.words_out)
