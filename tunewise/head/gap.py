"""A row inside a template with a gap: how it is written, and what a model says at the gap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunewise.core.errors import UserError

from .base import Head, sequence_mask

__all__ = ["GAP", "TEXT", "GapHead", "reads_last"]

GAP, TEXT = "{mask}", "{text}"


def reads_last(config: Any) -> bool:
    """Whether a model of this configuration fills the gap behind its last token, and not at a mask."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    named = " ".join(getattr(config, "architectures", None) or ())
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and "CausalLM" not in named
    if masked or "ForMaskedLM" in named:
        return False
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


class GapHead(Head):
    """values[row, k] = what the model gives at the gap of the row's k-th template.

    template  a sentence with {text} and {mask}, or several: each row then goes through the model in each of them;
              for a causal model {mask} comes last, and what follows it is left out
    mask, mask_id  learnt from the tokenizer: the gap's token (empty for causal models)
    Texts that are too long are cut inside the template, which stays whole. Raises `UserError` for templates and
    tokenizers without a gap, and for rows whose gap was cut off.
    """

    auto: ClassVar[str] = "base"
    template: str | list[str] = "{text} It was {mask}."
    mask: str | None = None
    mask_id: int | None = None

    @property
    def templates(self) -> list[str]:
        """All templates, in the order in which a row's views stand in a batch."""
        return [self.template] if isinstance(self.template, str) else self.template

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        name = type(self).__name__
        for template in self.templates:
            if template.count(GAP) != 1 or template.count(TEXT) != 1:
                raise UserError(f'{name}: the template "{template}" must hold {TEXT} and {GAP} once each.')
        if not self.templates:
            raise UserError(f"{name} needs at least one template.")
        if tokenizer is None:
            raise UserError(f"{name} writes rows into a template: it needs the model's tokenizer.")
        causal = reads_last(getattr(model, "config", None))
        early = next((t for t in self.templates if t.index(GAP) < t.index(TEXT)), None)
        if causal and early is not None:
            raise UserError(f'{name}: for a causal model {GAP} must come after {TEXT} in "{early}".')
        if not causal and tokenizer.mask_token is None:
            raise UserError(f"{name}: the tokenizer of this masked language model has no mask token.")
        if causal and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
            raise UserError(f"{name}: this tokenizer ends each text with an end token, so no gap follows.")
        self.mask = "" if causal else tokenizer.mask_token
        self.mask_id = None if causal else int(tokenizer.mask_token_id)

    def render(self, row_text: str, which: int = 0) -> str:
        """The row inside a template; only the template's own {mask} is replaced, never one in the text."""
        if self.mask is None:
            raise UserError(
                f"{type(self).__name__} learns its mask token from a tokenizer first: call setup."
            )
        start, _, end = self.templates[which].partition(TEXT)
        if not self.mask:
            return (start + row_text + end.partition(GAP)[0]).rstrip()
        return start.replace(GAP, self.mask) + row_text + end.replace(GAP, self.mask)

    @property
    def renders(self) -> list[Callable[[str], str]]:
        """`render` for each template."""
        return [partial(self.render, which=k) for k in range(len(self.templates))]

    def gaps(self, batch: Any) -> Tensor:
        """Where the gap is in each line of the batch, `[lines]`; a row's views are neighbouring lines.

        A batch that holds every row once is read by the first template alone.
        """
        ids = batch.inputs["input_ids"]
        views = self.views(batch)
        mask = sequence_mask(batch.inputs, ids.shape, ids.device)
        here = mask if self.mask_id is None else mask & (ids == self.mask_id)
        lost = (~here.any(1)).nonzero()
        if len(lost):
            raise UserError(
                f"Row {batch.ids[int(lost[0]) // views]}: the gap of the template was cut off; raise max_length."
            )
        positions = torch.arange(ids.shape[1], device=ids.device)
        last, first = (
            torch.where(here, positions, 0).amax(1),
            torch.where(here, positions, len(positions)).amin(1),
        )
        behind = [t.index(GAP) > t.index(TEXT) for t in self.templates[:views]] * len(batch.ids)
        return torch.where(torch.tensor(behind, device=ids.device), last, first)

    def views(self, batch: Any) -> int:
        """In how many templates the rows of a batch stand."""
        lines, rows = len(batch.inputs["input_ids"]), len(batch.ids)
        if lines not in (rows, rows * len(self.templates)):
            raise UserError(
                f"{type(self).__name__}: {rows} rows in {len(self.templates)} templates are not {lines} lines."
            )
        return lines // rows

    def at_gap(self, values: Tensor, batch: Any) -> Tensor:
        """`[lines, tokens, ...]` -> `[rows, templates, ...]`; soft prompts may stand in front of the tokens."""
        ids = batch.inputs["input_ids"]
        at = self.gaps(batch).to(values.device) + values.shape[1] - ids.shape[1]
        found = values[torch.arange(len(ids), device=values.device), at]
        return found.unflatten(0, (len(batch.ids), self.views(batch)))
