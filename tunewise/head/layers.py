"""Class attention over the gap's hidden states in the last layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .base import hidden_size, label_names
from .gap import GapHead

__all__ = ["LayersHead"]


class LayersHead(GapHead):
    """a_cj = softmax_j(H_j . (w_c * d)), r_c = sum_j a_cj H_j, logits_c = log softmax(W r_c + b)_c.

    H `[layers, hidden]` are the hidden states at the template's gap in the last `layers` layers, w_c the rows of
    W `[classes, hidden]`, d `[hidden]` starts at 1; dropout acts on r. With several templates, the mean.
    query  "all" trains on the formula above, which evaluation always uses (no label is read there); "gold" asks with
           the row's own label while training, logits = W r_label + b, as the reference does: what it learns need
           not serve the formula, and from a small pretrained model it learnt nothing here
    outputs  number of classes; learnt from the task
    Reads `hidden_states`: in a loop of one's own call the model with output_hidden_states=True. Source: CodePrompt,
    arXiv 2401.05544; the attention is that of Lin et al., 2016 (ACL P16-1200). Raises `UserError` for tasks without
    labels and more layers than there are.
    """

    asks: ClassVar[dict[str, Any]] = {"output_hidden_states": True}
    layers: PositiveInt = 2
    query: Literal["gold", "all"] = "all"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    outputs: int | None = None

    def setup(self, task: Any, tokenizer: Any, model: nn.Module) -> None:
        if len(label_names(task)) < 2:
            raise UserError(f"LayersHead tells labels apart, and the task {task.name} has none.")
        hidden_size(model, "LayersHead")
        super().setup(task, tokenizer, model)
        self.outputs = len(label_names(task))

    def tensors(self, site: Site) -> dict[str, P]:
        if self.outputs is None:
            raise UserError("LayersHead does not know its number of classes: give outputs=N.")
        width = hidden_size(site.module, "LayersHead")
        weight = torch.empty(self.outputs, width).uniform_(-(width**-0.5), width**-0.5)
        return {
            "weight": P(weight, tag="head"),
            "bias": P(torch.zeros(self.outputs), tag="head"),
            "diagonal": P(torch.ones(width), tag="scale"),
        }

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        width, classes = hidden_size(site.module, "LayersHead"), self.outputs or 0
        return classes * width + classes + width

    def logits(self, t: Any, outputs: Any, batch: Any) -> Tensor:
        states = getattr(outputs, "hidden_states", None)
        if states is None:
            raise UserError("LayersHead reads hidden states: call the model with output_hidden_states=True.")
        if self.layers >= len(states):
            raise UserError(f"LayersHead: layers={self.layers}, and the model has {len(states) - 1}.")
        H = torch.stack([self.at_gap(h, batch) for h in states[-self.layers :]], 2).float()
        labels = getattr(batch, "labels", None)
        if self.query == "gold" and t.training and labels is not None:
            asked = (t.weight * t.diagonal)[labels][:, None, None]  # [rows, templates, layers, hidden]
            a = (H * asked).sum(-1, keepdim=True).softmax(2)
            r = F.dropout((a * H).sum(2), self.dropout, t.training)
            return (r @ t.weight.T + t.bias).mean(1)
        a = (H @ (t.weight * t.diagonal).T).softmax(2)
        r = F.dropout(torch.einsum("rtlc,rtld->rtcd", a, H), self.dropout, t.training)
        own = (r @ t.weight.T + t.bias).log_softmax(-1).diagonal(dim1=-2, dim2=-1)
        return own.mean(1)
