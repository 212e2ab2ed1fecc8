"""L = mean_i |f_i - l_i|: a Copilot learns the Pilot's mistakes from a log of them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.core.run import Run
from tunewise.head.base import logits_of
from tunewise.head.copilot import Copilot, Steps, seen_states, supervised_slots

__all__ = ["MistakeLoss", "mistakes"]

LOG = "mistake_log"
Entry = dict[str, Tensor]


class MistakeLoss(Part):
    """L = weight mean_i |f_i - l_i|_2 over the tokens of `rows` rows drawn from the log, l_i = onehot - p_i.

    Every row that the Pilot is trained on enters the log (by its id; the newest `capacity` rows stay): embeddings or
    encoder output, hidden states averaged over the layers, and of p_i the `top` largest probabilities with the right
    word's; the rest of p_i is taken as spread evenly, so that the errors of a token sum to 0. Entries are as old as
    the row's last step. What is drawn was logged before this step: in the first step there is nothing. One draw per
    step, whatever the micro-batches. The log is a store of the run and part of its checkpoints. No gradient reaches
    the Pilot, and the Copilot's is clipped apart from the Pilot's. Source: Transformer Copilot, arXiv 2505.16270 (a
    sum over tokens there, a mean here). Raises `UserError` without a Copilot.
    """

    slot: ClassVar[str] = "objective"
    stage: ClassVar[str] = "mask"
    needs: ClassVar[frozenset[str]] = frozenset({"backprop"})
    weight: Annotated[float, Field(ge=0)] = 1.0
    rows: PositiveInt = 8
    capacity: PositiveInt = 64
    top: PositiveInt = 32
    start: NonNegativeInt = 0

    def before_step(self, run: Run) -> None:
        """Draws what is learnt from in this step."""
        log = run.store(LOG, self.capacity)
        drawn: list[Entry] = []
        if self.weight and len(log) and run.step >= self.start:
            order = torch.randperm(len(log), generator=run.rng(LOG))[: self.rows].tolist()
            entries = list(log.values())
            drawn = [entries[i] for i in order]
        self.__dict__["_drawn"] = drawn

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        """Logs this micro-batch; the loss of what was drawn goes with the first one of a step."""
        part, t = _copilot(run)
        self._write(run, t, batch, outputs)
        drawn: list[Entry] = self.__dict__.pop("_drawn", [])
        if not drawn:
            return t.start.sum() * 0.0  # a loss that can be sent back, whatever stands beside it
        found = _distances(part, t.cast(torch.float32), drawn, run.device).mean()
        run.metrics["copilot_loss"] = float(found.detach())
        return found

    def gradients(self, run: Run) -> None:
        """The Copilot's gradients stand aside while the Pilot's are clipped."""
        part, t = _copilot(run)
        aside = [(p, p.grad) for p in t.parameters() if p.grad is not None]
        for p, _ in aside:
            p.grad = None
        part.__dict__["_aside"] = aside

    @torch.no_grad()
    def _write(self, run: Run, t: Any, batch: Any, outputs: Any) -> None:
        log = run.store(LOG, self.capacity)
        X, x_mask, h, mask = seen_states(t, outputs, batch.inputs)
        scored, right = supervised_slots(t, batch)
        pair = bool(getattr(t.root.config, "is_encoder_decoder", False))
        logits = logits_of(outputs)[:, -h.shape[1] :]
        at = (mask.long().cumsum(1) - 1).clamp(min=0)
        for i, name in enumerate(batch.ids):
            slots = scored[i].nonzero()[:, 0]
            if not len(slots):
                continue
            until = torch.arange(h.shape[1], device=h.device) <= slots[-1]
            real = mask[i] & until
            gold = right[i, slots]
            p = logits[i, slots].float().softmax(-1)
            value, word = p.topk(min(self.top, p.shape[1]), -1)
            missing = ~(word == gold[:, None]).any(1)
            word[missing, -1], value[missing, -1] = (
                gold[missing],
                p[missing].gather(1, gold[missing, None])[:, 0],
            )
            entry = {"x": X[i][x_mask[i] if pair else real], "h": h[i][real], "slots": at[i, slots]}
            entry |= {"gold": gold, "words": word, "p": value}
            log[name] = {k: v.cpu().clone() for k, v in entry.items()}


def _copilot(run: Run) -> tuple[Copilot, Any]:
    for _, _, t in run.handle.sites:
        if isinstance(t.part, Copilot):
            return t.part, t
    raise UserError("MistakeLoss trains a Copilot, and the recipe has none: use the method copilot.")


def mistakes(entry: Entry, words: int) -> Tensor:
    """l = onehot - p `[tokens, words]` of a log entry: its stored probabilities, the rest spread evenly."""
    p, stored = entry["p"], entry["words"]
    rest = (1.0 - p.sum(1, keepdim=True)).clamp(min=0) / max(words - p.shape[1], 1)
    dense = (-rest).expand(-1, words).scatter(1, stored, -p)
    return dense.scatter_add(1, entry["gold"][:, None], torch.ones_like(p[:, :1]))


def _distances(part: Copilot, t: Any, entries: list[Entry], device: torch.device) -> Tensor:
    """|f_i - l_i| of all tokens of these rows, `[tokens]`; the true errors before token i are read, not f."""
    steps, pair = Steps(part, t), bool(getattr(t.root.config, "is_encoder_decoder", False))
    for name in ("x", "h"):
        states, mask = _padded([e[name] for e in entries], device)
        at = torch.arange(states.shape[1], device=device).expand(mask.shape)
        steps.remember(states, mask, at, torch.full_like(at, -1) if pair and name == "x" else at)
    slots, real = _padded([e["slots"] for e in entries], device)
    errors = torch.cat(
        [mistakes({k: v.to(device) for k, v in e.items()}, steps.shape.words) for e in entries]
    )
    x = errors.new_zeros(*real.shape, steps.shape.width).masked_scatter(
        real[..., None], F.linear(errors, t.words_in.T)
    )
    x = torch.cat([t.start.expand(len(x), 1, -1), x[:, :-1]], 1)
    return (steps.run(x, slots, slots)[real] - errors).norm(dim=-1)


def _padded(rows: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows side by side, filled at their end, and which entries are real)."""
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(r) for r in rows], device=device)
    return table, torch.arange(table.shape[1], device=device) < lengths[:, None]
