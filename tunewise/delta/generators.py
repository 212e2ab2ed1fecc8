"""What prompts are generated with: pooling by attention, graphs over tokens, latent queries."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.core.part import Part

from .rational import gelu_start, rational

__all__ = ["AttentionPool", "EdgeConv", "Generator", "LatentQueries"]

Tensors = dict[str, Any]


def _uniform(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns).uniform_(-(columns**-0.5), columns**-0.5)


class Generator(Part):
    """prompts(H) `[rows, tokens, width]` from the states of an instruction; an option of `PromptGenerator`.

    `common` tensors are shared by `every` consecutive blocks (None: by all), `own` ones belong to each block; all
    come in one dict `w`. `PromptReadBack` adds `back(w, h, prompts)` to h; the others' prompts stand before it.
    """

    every: PositiveInt | None = None

    def common(self, width: int, tokens: int) -> dict[str, P]:
        """Tensors shared by blocks."""
        return {}

    def own(self, width: int, tokens: int) -> dict[str, P]:
        """Tensors of one block."""
        return {}

    def prompts(self, w: Tensors, h: Tensor, mask: Tensor | None, training: bool) -> Tensor:
        """From h `[rows, tokens, width]` and the mask of readable tokens (None: all)."""
        raise NotImplementedError

    def back(self, w: Tensors, h: Tensor, prompts: Tensor) -> Tensor:
        """What is added to h."""
        return torch.zeros_like(h)


class AttentionPool(Generator):
    """P = g(S' U) W_up, U = H W_down, S = softmax over tokens of U W_a; g rational, starting at GELU.

    W_down `[size, width]` and W_up `[width, size]` are shared by `every` blocks; W_a `[tokens, size]` and the
    twelve numbers of g belong to each block. W_up starts at random: prompts of zeros, which the norm in front of an
    attention divides by their length, have gradients a thousand times too large. Source: IAPT, arXiv 2405.18203.
    """

    size: PositiveInt = 128

    def common(self, width: int, tokens: int) -> dict[str, P]:
        return {
            "down": P(_uniform(self.size, width), "direction", 0),
            "up": P(_uniform(width, self.size), "direction", 1),
        }

    def own(self, width: int, tokens: int) -> dict[str, P]:
        above, below = gelu_start()
        query = P(_uniform(tokens, self.size), "prompt")
        return {"query": query, "above": P(above, "scale"), "below": P(below, "scale")}

    def pooling(self, w: Tensors, u: Tensor, mask: Tensor | None) -> Tensor:
        """S `[rows, tokens, prompts]`: weights that sum to 1 over the readable tokens."""
        scores = F.linear(u, w["query"])
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        return scores.softmax(1)

    def prompts(self, w: Tensors, h: Tensor, mask: Tensor | None, training: bool) -> Tensor:
        u = F.linear(h, w["down"])
        pooled = self.pooling(w, u, mask).mT @ u
        return F.linear(rational(pooled, w["above"], w["below"]), w["up"])


class EdgeConv(Generator):
    """P = max over tokens of act(W [x_1; ..; x_L]), x_l,i = max over j of act(W_l [x_j - x_i; x_i]); one prompt.

    j runs over the `neighbours` nearest tokens of i in feature space, i among them; act is LeakyReLU(0.2) of a
    norm. W_l `[width, 2 width]`, W `[width, L width]`; with L = 0 layers W reads the tokens themselves. `norm`:
    "layer" makes a row's prompt independent of the rows beside it; "batch" is the published form, with running
    means for evaluation, whose results depend on micro-batches and whose means move twice under gradient
    checkpointing. Cost: tokens^2 width. Source: IDPT, arXiv 2304.07221.
    """

    neighbours: PositiveInt = 20
    layers: NonNegativeInt = 3
    norm: Literal["layer", "batch"] = "layer"

    def common(self, width: int, tokens: int) -> dict[str, P]:
        if tokens != 1:
            raise UserError(f"EdgeConv makes one prompt, the maximum over tokens: tokens={tokens} must be 1.")
        found: dict[str, P] = {}
        for i in range(self.layers + 1):
            last = i == self.layers
            columns = width * max(self.layers, 1) if last else 2 * width
            found[f"W{i}"] = P(_uniform(width, columns), "weight")
            found[f"scale{i}"] = P(torch.ones(width), "scale")
            found[f"shift{i}"] = P(torch.zeros(width), "bias")
            if self.norm == "batch":
                found[f"mean{i}"] = P(torch.zeros(width), "scale", trainable=False)
                found[f"variance{i}"] = P(torch.ones(width), "scale", trainable=False)
        return found

    def _act(self, w: Tensors, i: int, x: Tensor, valid: Tensor, training: bool) -> Tensor:
        scale, shift = w[f"scale{i}"], w[f"shift{i}"]
        if self.norm == "layer":
            return F.leaky_relu(F.layer_norm(x, x.shape[-1:], scale, shift), 0.2)
        normed = torch.zeros_like(x)
        mean, variance = w[f"mean{i}"], w[f"variance{i}"]
        normed[valid] = F.batch_norm(x[valid], mean, variance, scale, shift, training, 0.1)
        return F.leaky_relu(normed, 0.2)

    def _edges(self, w: Tensors, i: int, x: Tensor, mask: Tensor, training: bool) -> Tensor:
        weight, width = w[f"W{i}"], x.shape[-1]
        near = -torch.cdist(x.detach(), x.detach()).masked_fill(~mask.unsqueeze(1), torch.inf)
        index = near.topk(min(self.neighbours, x.shape[1]), -1).indices
        rows = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        valid = mask[rows, index] & mask.unsqueeze(-1)
        to, here = F.linear(x, weight[:, :width]), F.linear(x, weight[:, width:])
        edges = to[rows, index] + (here - to).unsqueeze(
            2
        )  # W [x_j - x_i; x_i], with W applied once per token
        edges = self._act(w, i, edges, valid, training)
        found = edges.masked_fill(~valid.unsqueeze(-1), -torch.inf).amax(2)
        return found.masked_fill(~mask.unsqueeze(-1), 0.0)

    def prompts(self, w: Tensors, h: Tensor, mask: Tensor | None, training: bool) -> Tensor:
        mask = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if mask is None else mask
        states: list[Tensor] = []
        for i in range(self.layers):
            states.append(self._edges(w, i, states[-1] if states else h, mask, training))
        x = F.linear(torch.cat(states, -1) if states else h, w[f"W{self.layers}"])
        x = self._act(w, self.layers, x, mask, training)
        return x.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1, keepdim=True)


class LatentQueries(Generator):
    """h' = h + g softmax(Z A' / sqrt r) A W_up, A = softmax(Q Z' / sqrt r) Z, Z = h W_down; g starts at 0.

    Q `[tokens, size]` are the prompts, r is `size`. A is what they have read from the instruction; every token
    reads it back. One set per `every` consecutive blocks. Source: DVPT as its abstract has it, arXiv 2307.09787.
    """

    every: PositiveInt | None = 3
    size: PositiveInt = 20

    def common(self, width: int, tokens: int) -> dict[str, P]:
        return {
            "down": P(_uniform(self.size, width), "direction", 0),
            "up": P(_uniform(width, self.size), "direction", 1),
            "query": P(torch.randn(tokens, self.size), "prompt"),
            "gate": P(torch.zeros(1), "gate"),
        }

    def prompts(self, w: Tensors, h: Tensor, mask: Tensor | None, training: bool) -> Tensor:
        z = F.linear(h, w["down"])
        scores = w["query"] @ z.mT * self.size**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
        return scores.softmax(-1) @ z

    def back(self, w: Tensors, h: Tensor, prompts: Tensor) -> Tensor:
        z = F.linear(h, w["down"])
        read = (z @ prompts.mT * self.size**-0.5).softmax(-1) @ prompts
        return w["gate"] * F.linear(read, w["up"])
