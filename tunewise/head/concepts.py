"""logits_c = cos(pool(h), e_c) / T: trained class embeddings in the place of a text encoder's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site, device_of

from .base import Head, hidden_size, label_names, sequence_mask
from .pooled import pool

__all__ = ["ConceptHead"]


class ConceptHead(Head):
    """logits_c = cos(pool(h), e_c) / temperature, e_c `[classes, hidden]` trained.

    e_c starts at what the backbone makes of the class's name put into `template`, pooled in the same way; without a
    tokenizer at noise. Names are encoded once, in `setup`; after that no class is encoded any more.
    pooling  "mean" of the real tokens, the "first" of them or the "last" one
    outputs  number of classes; learnt from the task
    Raises `UserError` for encoder-decoders and for tasks without classes. Source: ConES, arXiv 2305.18993; for text,
    with one model for rows and names, it is our form of it.
    """

    auto: ClassVar[str] = "base"
    pooling: Literal["mean", "first", "last"] = "mean"
    temperature: PositiveFloat = 0.07
    template: str = "{label}"
    outputs: int | None = None

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        labels = label_names(task)
        if not labels:
            raise UserError(
                f"ConceptHead has an embedding for each class, and the task {task.name} has none."
            )
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise UserError(
                f"ConceptHead cannot read {type(model).__name__}, an encoder-decoder: use ClassHead()."
            )
        if "{label}" not in self.template:
            raise UserError(f'ConceptHead: the template "{self.template}" must hold {{label}}.')
        hidden_size(model, "ConceptHead")
        self.outputs = len(labels)
        if tokenizer is not None:
            self.__dict__["_start"] = self._encoded(
                [self.template.replace("{label}", n) for n in labels], tokenizer, model
            )

    @torch.no_grad()
    def _encoded(self, texts: list[str], tokenizer: Any, model: nn.Module) -> Tensor:
        """pool(h) of each text on its own, so that no padding is seen."""
        mode = model.training
        model.eval()
        found = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]], device=device_of(model))
            hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.float()
            found.append(pool(hidden, torch.ones_like(ids, dtype=torch.bool), self.pooling)[0].cpu())
        model.train(mode)
        return torch.stack(found)

    def tensors(self, site: Site) -> dict[str, P]:
        if self.outputs is None:
            raise UserError("ConceptHead does not know its number of classes: give outputs=N.")
        start = self.__dict__.pop("_start", None)
        if start is None:
            start = torch.randn(self.outputs, hidden_size(site.module, "ConceptHead"))
        return {"E": P(start, tag="head")}

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return (self.outputs or 0) * hidden_size(site.module, "ConceptHead")

    def logits(self, t: Any, outputs: Any, batch: Any) -> Tensor:
        hidden = getattr(outputs, "last_hidden_state", None)
        if hidden is None:
            raise UserError(f"ConceptHead: {type(outputs).__name__} has no hidden states; load a base model.")
        mask = sequence_mask(batch.inputs, hidden.shape[:2], hidden.device)
        pooled = pool(hidden[:, -mask.shape[1] :].float(), mask, self.pooling)
        return F.normalize(pooled, dim=-1) @ F.normalize(t.E, dim=-1).T / self.temperature
