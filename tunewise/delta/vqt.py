"""Z_l = block_l(P_l; keys and values of X_{l-1}): learnt queries that ask every block of a frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .asking import ask, attention_of
from .classifier import last_classifier
from .side import Side

if TYPE_CHECKING:
    from tunewise.core.run import Run

__all__ = ["VisualQueries"]

Share = Annotated[float, Field(gt=0, le=1)]


class VisualQueries(Side):
    """y' = y + W [Z_1 .. Z_L], Z_l = block_l(P_l; K, V of X_{l-1}).

    P_l is `[queries, width]`, W `[classes, L queries width]`, y are the logits of the model's own classifier, so that
    y' is one linear layer on its input and all queries' answers together. The rows of P_l go through block l by
    themselves (norms, query projection, attention, residual, MLP as they are), their attention reads the keys and
    values of X alone: X stays bit for bit what the frozen model computes and needs no graph, there is no path from
    one block's queries to another's, and X may be served from a store. For the backward pass a block keeps what belongs
    to the queries' rows, and of every patch one row of numbers, the attention's input, for the gradient of P_l is made
    of it: memory grows with L queries and, by that row, with L patches too. K and V themselves are not made where the
    queries can be asked without (`asking`).
    normalize  every Z_l, all queries of a block together, has length 1
    dropout    of P while training (published runs: 0.1)
    keep       share of the columns of W that stays: at `select_at` of the steps those of least norm are taken out
    W starts at 0, P_l at U(-v, v), v = sqrt(6 / (3 patch^2 + width)). With other deltas in the backbone their change
    of X is used and gets gradients. Trainable scalars: L queries width (1 + classes). Encoders of text work too.
    Left out: the reference also normalises the class token; here the classifier reads what it always reads. It
    trains W and P anew after the choice of columns, here they go on. Raises `UserError` for decoders, for attention
    that is rotated or that transformers' interface does not reach, and for models without a classifier.
    Source: VQT, arXiv 2212.03220.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    unit: ClassVar[str] = "query"
    queries: PositiveInt = 5
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    normalize: bool = True
    keep: Share = 1.0
    select_at: Share = 0.5

    def chosen(self, everything: Sequence[Site]) -> list[Site]:
        return last_classifier(everything, "VisualQueries")

    def listens(self, everything: Sequence[Site], taps: Sequence[Site]) -> dict[str, nn.Module]:
        return {str(i): tap.module for i, tap in enumerate(taps)}

    def start(self, site: Site, taps: Sequence[Site]) -> dict[str, P]:
        width = taps[0].out_features or 1
        self.__dict__["_attentions"] = found = [attention_of(tap.module, tap.name) for tap in taps]
        owners: list[Any] = [tap.module.get_submodule(a.name) for tap, a in zip(taps, found, strict=True)]
        for tap, owner in zip(taps, owners, strict=True):
            if getattr(owner, "is_causal", False) is True:
                raise UserError(f"VisualQueries asks encoders, and {tap.name} is the block of a decoder.")
        patch = getattr(owners[0].config, "patch_size", None)
        bound = (6 / ((3 * patch**2 if isinstance(patch, int) else width) + width)) ** 0.5
        columns = len(taps) * self.queries * width
        tensors = {
            "P": P(torch.empty(len(taps), self.queries, width).uniform_(-bound, bound), "prompt"),
            "W": P(torch.zeros(site.out_features or 1, columns), "head"),
        }
        return tensors | ({"kept": P(torch.ones(columns), trainable=False)} if self.keep < 1 else {})

    def read(self, t: Any, taps: list[Tensor], y: Tensor) -> Tensor:
        calls, t.buffer.calls = t.buffer.calls, {}
        if y.dim() != 2:
            raise UserError(f"VisualQueries adds to logits `[rows, classes]`, not to {list(y.shape)}.")
        found = []
        for i, block in enumerate(t.taps):
            x, given = calls[str(i)]
            prompt = F.dropout(t.P[i].to(x.dtype).expand(len(x), -1, -1), self.dropout, t.training)
            z = ask(block, self.__dict__["_attentions"][i], prompt, x, given).flatten(1).to(y.dtype)
            found.append(F.normalize(z, dim=1) if self.normalize else z)
        z = torch.cat(found, 1)
        return y + F.linear(z * t.kept if self.keep < 1 else z, t.W)

    def before_step(self, run: Run) -> None:
        if self.keep < 1 and not run.total_steps:
            raise UserError(
                "VisualQueries(keep < 1) chooses its features in the middle of a run, and this loop does not say "
                "how long it is: train with tune, or set run.total_steps."
            )

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        if self.keep == 1 or run.step != max(1, round(self.select_at * run.total_steps)):
            return
        for _, _, t in run.handle.sites:
            if t.part is self:
                tensors: Any = t
                norms = tensors.W.norm(dim=0)
                best = norms.topk(max(1, round(self.keep * len(norms)))).indices
                tensors.kept.zero_()[best] = 1.0

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return self.queries * sum(tap.out_features or 0 for tap in taps) * (1 + (site.out_features or 0))
