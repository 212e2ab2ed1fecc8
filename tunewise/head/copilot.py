"""p~ = p + strength f: a second, small decoder corrects what a language model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tunewise.core.delta import P, SiteDelta
from tunewise.core.errors import RunError, UserError
from tunewise.core.run import Run
from tunewise.sites import Site
from tunewise.task.text import IGNORED

from .base import logits_of, sequence_mask
from .decoder import Past, Shape, decode, decoder_formula, decoder_tensors, keys_and_values, shape_of
from .language import LMHead

__all__ = ["Copilot", "Steps", "rectified", "seen_states", "supervised_slots"]


class Copilot(LMHead):
    """p~_i = p_i + strength f_i, f_i = decoder(l_1 ... l_{i-1}; hidden states before token i), `[tokens, words]`.

    p_i is what the Pilot, the model with whatever else is attached to it, says of token i, l_i = onehot(token i) - p_i
    its mistakes. The decoder reads them projected to its width, and by cross-attention the Pilot's token embeddings
    (or its encoder's output) and the mean over layers of its hidden states; nothing goes back into the Pilot. It is
    trained on mistakes (`MistakeLoss`); used, it reads its own f in their place. While training, the logits are the
    Pilot's; in evaluation and in `generate` they are log p~, p~ not below `floor` p, so that p~ is a distribution.
    At the start f = 0.

    layers  self- and cross-attention take turns, so at least 2
    width   of the decoder; None: the Pilot's width and heads, starting from its own blocks if they are Llama-like
    Source: Transformer Copilot, arXiv 2505.16270. Our reading: encoder-decoders use the same two kinds of layers,
    what is read by cross-attention is normed before, and the floor. Raises `UserError` for encoders.
    """

    asks: ClassVar[dict[str, Any]] = {"output_hidden_states": True}
    stage: ClassVar[str] = "rule"
    strength: Annotated[float, Field(ge=0)] = 1.0
    layers: Annotated[int, Field(ge=2)] = 2
    width: PositiveInt | None = None
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.01
    clip: Annotated[float, Field(ge=0)] = 1.0

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        super().setup(task, tokenizer, model)
        self._check(model)

    def _check(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        from transformers import MODEL_FOR_MASKED_LM_MAPPING as MASKED

        both = getattr(config, "is_encoder_decoder", False)
        if not both and type(config) in MASKED and not getattr(config, "is_decoder", False):
            raise UserError(
                f"Copilot corrects the next token, and {type(model).__name__} reads to the right as well: "
                "take a causal or an encoder-decoder model."
            )

    def shape(self, model: nn.Module) -> Shape:
        """Sizes of the decoder on this model."""
        return shape_of(model, self.layers, self.width)

    def tensors(self, site: Site) -> dict[str, P]:
        self._check(site.module)
        return decoder_tensors(self.shape(site.module), site.module)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return decoder_formula(self.shape(site.module))

    @staticmethod
    def switch(model: nn.Module, ts: list[SiteDelta]) -> None:
        """`model.generate` corrects while a Copilot is active."""
        from tunewise.inference.rectify import rectify_generation

        rectify_generation(model, ts)

    def logits(self, t: Any, outputs: Any, batch: Any) -> Tensor:
        logits = logits_of(outputs)
        if t.training or not self.strength:
            return logits
        return _corrected(self, t, logits, outputs, batch)

    def gradients(self, run: Run) -> None:
        """Its gradients, which `MistakeLoss` had put aside, come back, clipped by their own norm.

        So the Pilot is trained as it would be alone.
        """
        aside: list[tuple[nn.Parameter, Tensor]] = self.__dict__.pop("_aside", [])
        if not aside:
            return
        for p, grad in aside:
            p.grad = grad
        norm = nn.utils.clip_grad_norm_([p for p, _ in aside], self.clip or float("inf"))
        if not torch.isfinite(norm):
            raise RunError(f"A gradient of the Copilot became {float(norm)} at step {run.step + 1}.")


def rectified(p: Tensor, f: Tensor, strength: float, floor: float) -> Tensor:
    """log p~ with p~ = max(p + strength f, floor p), normalised; float32 `[..., words]`."""
    new = torch.maximum(p + strength * f, floor * p)
    return new.clamp(min=torch.finfo(p.dtype).tiny).log().log_softmax(-1)


def _is_pair(t: Any) -> bool:
    return bool(getattr(t.root.config, "is_encoder_decoder", False))


def seen_states(t: Any, outputs: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(X, mask of X, h, mask of h): embeddings or encoder output, and the mean over layers, `[rows, n, width]`.

    All detached: nothing that is learnt from them reaches the Pilot. Raises `UserError` where they are missing.
    """
    pair = _is_pair(t)
    states = getattr(outputs, "decoder_hidden_states" if pair else "hidden_states", None)
    if states is None:
        raise UserError("Copilot reads hidden states: call the model with output_hidden_states=True.")
    h: Tensor = sum(s.detach().float() for s in states[1:]) / (len(states) - 1)
    if pair:
        X = outputs.encoder_last_hidden_state.detach().float()
        whole = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        return X, sequence_mask(inputs, X.shape[:2], X.device), h, whole
    n = inputs["input_ids"].shape[1]  # soft prompts stand in front
    mask = sequence_mask(inputs, (len(h), n), h.device)
    return states[0][:, -n:].detach().float(), mask, h[:, -n:], mask


def supervised_slots(t: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """(which positions of the logits are scored, the token that each should give), `[rows, tokens]`.

    Without labels, all that are no padding.
    """
    labels = getattr(batch, "labels", None)
    if labels is None:
        given = batch.inputs.get("labels" if _is_pair(t) else "input_ids")
        given = batch.inputs["decoder_input_ids"] if given is None else given
        mask = (
            torch.ones_like(given) if _is_pair(t) else sequence_mask(batch.inputs, given.shape, given.device)
        )
        return mask.bool(), torch.zeros_like(given)
    if not _is_pair(t):
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return labels != IGNORED, labels


class Steps:
    """f_1, f_2, ... one after the other, each from those before it."""

    def __init__(self, part: Copilot, t: Any) -> None:
        self.t, self.shape = t, part.shape(t.root)
        self.past: Past = [None] * self.shape.layers
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.index = self.real = torch.empty(0)

    def remember(self, states: Tensor, mask: Tensor, at: Tensor, index: Tensor) -> None:
        """More states `[rows, n, memory]` at positions `at`, to be read from slot `index` on where `mask` says real."""
        new = keys_and_values(self.t, self.shape, states, at)
        if self.memory:
            new = [
                (torch.cat([a, c], 2), torch.cat([b, d], 2))
                for (a, b), (c, d) in zip(self.memory, new, strict=True)
            ]
            index, mask = torch.cat([self.index, index], 1), torch.cat([self.real, mask], 1)
        self.memory, self.index, self.real = new, index, mask

    def inputs(self, mistakes: Tensor | None, rows: int) -> Tensor:
        """`[rows, words]` or none before the first token -> `[rows, 1, width]`."""
        if mistakes is None:
            return self.t.start.expand(rows, 1, -1)
        return F.linear(mistakes, self.t.words_in.T)[:, None]

    def run(self, x: Tensor, slots: Tensor, at: Tensor) -> Tensor:
        """f `[rows, n, words]` for inputs x `[rows, n, width]` at these slots and positions `[rows, n]`."""
        seen = self.real[:, None] & (self.index[:, None] <= slots[..., None])
        return decode(self.t, self.shape, x, at, self.past, self.memory, seen)

    def next(self, f: Tensor | None, slots: Tensor, at: Tensor) -> Tensor:
        """f_i `[rows, words]` from f_{i-1}, at slots and positions `[rows]`."""
        return self.run(self.inputs(f, len(slots)), slots[:, None], at[:, None])[:, 0]

    def reorder(self, rows: Tensor) -> None:
        """Beams have changed places."""
        self.past = [None if e is None else (e[0][rows], e[1][rows]) for e in self.past]
        self.memory = [(k[rows], v[rows]) for k, v in self.memory]
        self.index, self.real = self.index[rows], self.real[rows]


def _corrected(part: Copilot, t: Any, logits: Tensor, outputs: Any, batch: Any) -> Tensor:
    """The logits with log p~ at every scored position."""
    X, x_mask, h, mask = seen_states(t, outputs, batch.inputs)
    scored, _ = supervised_slots(t, batch)
    steps = Steps(part, t)
    at, here = (
        (mask.long().cumsum(1) - 1).clamp(min=0),
        torch.arange(h.shape[1], device=h.device).expand(len(h), -1),
    )
    if _is_pair(t):
        x_at = (x_mask.long().cumsum(1) - 1).clamp(min=0)
        steps.remember(X, x_mask, x_at, torch.full_like(x_at, -1))
    else:
        steps.remember(X, x_mask, at, here)
    steps.remember(h, mask, at, here)
    # the scored slots of each row side by side; rows with fewer repeat their last
    counts = scored.sum(1)
    order = torch.argsort((~scored).int(), dim=1, stable=True)
    last = order.gather(1, (counts - 1).clamp(min=0)[:, None])
    inside = torch.arange(int(counts.max()), device=order.device) < counts[:, None]
    slots = torch.where(inside, order[:, : inside.shape[1]], last)
    rows = torch.arange(len(h), device=h.device)
    f: Tensor | None = None
    new = logits[:, -h.shape[1] :].float().clone()
    shift = logits.shape[1] - h.shape[1]
    for i in range(slots.shape[1]):
        f = steps.next(f, slots[:, i], at[rows, slots[:, i]])
        p = logits[rows, slots[:, i] + shift].float().softmax(-1)
        some = inside[:, i]
        new[rows[some], slots[some, i]] = rectified(p, f, part.strength, part.floor)[some]
    return torch.cat([logits[:, :shift].float(), new], 1) if shift else new
