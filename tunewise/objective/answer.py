"""l_i = -log p(answer token at the mask), over all words; some rows are plain masked-language examples instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.core.run import Run
from tunewise.head.base import logits_of
from tunewise.head.instruct import InstructHead
from tunewise.task.text import IGNORED

__all__ = ["AnswerLoss"]


class AnswerLoss(Part):
    """L = weight sum_i l_i / units, l_i = mean cross-entropy over the vocabulary at row i's supervised tokens.

    Supervised is the answer's mask. With probability `mlm` a row is a masked-language example instead: the answer
    stands in its place, and `share` of all tokens that are not special are masked and asked for; with `dummy`, what is
    asked for there is the mask token itself. Each row counts once, however many tokens of it are masked (the
    reference averages over all tokens of the batch). Source: ModernBERT-Instruct, arXiv 2502.03793. Raises
    `UserError` without an `InstructHead`.
    """

    slot: ClassVar[str] = "objective"
    weight: Annotated[float, Field(ge=0)] = 1.0
    mlm: Annotated[float, Field(ge=0, le=1)] = 0.0
    share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    dummy: bool = False

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        """The loss of one micro-batch; masked-language rows go through the model once more."""
        head = _head(run)
        if not self.mlm:
            return self._sum(run, batch, outputs, _answers(head, batch), units)
        mixed, targets = self.mixed(run, head, batch)
        return self._sum(run, mixed, run.outputs(mixed), targets, units)

    def direct(self, run: Run, batch: Any, units: float) -> Tensor | None:
        """The same in one pass, where this is the only loss."""
        if not self.mlm:
            return None
        mixed, targets = self.mixed(run, _head(run), batch)
        return self._sum(run, mixed, run.outputs(mixed), targets, units)

    def _sum(self, run: Run, batch: Any, outputs: Any, targets: Tensor, units: float) -> Tensor:
        z = logits_of(outputs)[:, -targets.shape[1] :]
        asked = targets != IGNORED
        found = z.new_zeros(targets.shape, dtype=torch.float32)
        found = found.masked_scatter(
            asked, F.cross_entropy(z[asked].float(), targets[asked], reduction="none")
        )
        per_row = found.sum(1) / asked.sum(1)
        run.sample_losses.update(zip(batch.ids, per_row.tolist(), strict=True))
        return per_row.sum() / units

    def mixed(self, run: Run, head: InstructHead, batch: Any) -> tuple[Any, Tensor]:
        """(the batch with masked-language rows among the others, targets `[rows, tokens]`)."""
        make, tokenizer = run.rng("answer_loss"), run.tokenizer
        ids, targets = batch.inputs["input_ids"].clone(), _answers(head, batch)
        special = torch.tensor(tokenizer.all_special_ids, device=ids.device)
        for i, at in enumerate(head.gaps(batch).tolist()):
            if float(torch.rand((), generator=make)) >= self.mlm:
                continue
            ids[i, at] = targets[i, at]
            free = (batch.inputs["attention_mask"][i].bool() & ~torch.isin(ids[i], special)).nonzero()[:, 0]
            drawn = torch.rand(len(free), generator=make) < self.share
            chosen = free[drawn.to(free.device)] if drawn.any() else free[:1]
            targets[i] = IGNORED
            targets[i, chosen] = tokenizer.mask_token_id if self.dummy else ids[i, chosen]
            ids[i, chosen] = tokenizer.mask_token_id
        return replace(batch, inputs={**batch.inputs, "input_ids": ids}), targets


def _head(run: Run) -> InstructHead:
    head = run.recipe.single("head")
    if not isinstance(head, InstructHead):
        raise UserError(
            f"AnswerLoss scores the answer of an InstructHead, and the head is {type(head).__name__}."
        )
    return head


def _answers(head: InstructHead, batch: Any) -> Tensor:
    """Targets `[rows, tokens]`: the answer's token at the gap, nothing elsewhere."""
    if batch.labels is None:
        raise UserError(f"Row {batch.ids[0]} and its batch have no labels, so there is no loss.")
    assert head.words is not None
    ids = batch.inputs["input_ids"]
    words = torch.tensor(head.words[0], device=ids.device)[batch.labels]
    return torch.full_like(ids, IGNORED).scatter(1, head.gaps(batch)[:, None], words[:, None])
