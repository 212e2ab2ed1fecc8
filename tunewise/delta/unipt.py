"""y' = y + Up relu(sum_i c_i m_i): every tap is attended to by itself, and their answers are weighed by confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .side import Side, default_linear
from .side_context import Context

__all__ = ["Parallel"]

EPS = 1e-6


class Parallel(Side):
    """m_i = (w_i + 1) t_i, w_i = relu(a t_i^T) with rows that sum to 1, c = softmax_i g(mean a * mean t_i), and

    "anchor":    t_i = phi_i relu(h_i), a = phi relu(y), y' = y + Up relu(sum_i c_i m_i);
    "projected": t_i = LN(phi_i h_i), a = t_L (the last tap, no target then), y' = Up relu(a + LN(Proj sum_i c_i m_i)).

    i counts h_0 and all taps; t_i, a, m_i are `[rows, length, width / reduction]`, w_i `[rows, length, keys]`, c_i one
    number per position. The products of w_i with padding and, in decoders, with what comes later are 0 before rows
    are normed; a row without a positive product gives 0. `mean` is over what a position sees: all tokens in encoders,
    the earlier ones in decoders; "anchor" compares a itself, the paper's one read-out position, with it. zero=True
    starts Up at 0, so that "anchor" begins as the base; linear layers start as torch's otherwise, and step 0 is not
    the base. Attention costs length^2 per tap. Trainable scalars: k = width / reduction, (k + 1) for each d_i, 2 k more
    for each norm, (k + 1) for g, (k + 1) width for Up.
    Our reading: the paper reads out at one position, here every position is an anchor of its own, which for one
    position is the same. Source: UniPT, arXiv 2308.14316 ("anchor": its CLIP models, "projected": its BERT).
    """

    variant: Literal["anchor", "projected"] = "anchor"
    reduction: PositiveInt = 4
    zero: bool = False
    identity: ClassVar[bool] = False

    @property
    def in_place(self) -> bool:
        return self.variant == "projected"

    def start(self, site: Site, taps: Sequence[Site]) -> dict[str, P]:
        if self.variant == "projected" and self.zero:
            raise UserError(
                'UniPT: zero=True is for variant="anchor"; "projected" has nothing that it is added to.'
            )
        width = site.out_features or 1
        found: dict[str, P] = {}
        k = max(width // self.reduction, 1)
        widths = [taps[0].out_features or 1, *(tap.out_features or 1 for tap in taps)]
        for i, d in enumerate(widths):
            found |= _linear(f"phi{i}", k, d)
            if self.variant == "projected":
                found |= {f"gain{i}": P(torch.ones(k), "scale"), f"shift{i}": P(torch.zeros(k), "bias")}
        if self.variant == "projected":
            found |= _linear("proj", k, k)
            found |= {"gain": P(torch.ones(k), "scale"), "shift": P(torch.zeros(k), "bias")}
        else:
            found |= _linear("phi", k, width)
        weight, _ = default_linear(1, k)
        found["gate"] = P(weight, "gate")  # its bias would be the same for all taps: softmax takes it away
        up = _linear("up", width, k)
        return found | ({n: P(torch.zeros_like(p.value), p.tag) for n, p in up.items()} if self.zero else up)

    def network(self, t: Any, h: list[Tensor], y: Tensor, context: Context) -> Tensor:
        targets = [self._target(t, i, tap) for i, tap in enumerate([context.h0, *h])]
        if self.variant == "projected":
            a = targets.pop()
            _, keys = self._seen(context, a)
            compared = context.mean(context.visible(a.shape[1], keys), keys)
        else:
            a = compared = F.linear(F.relu(y), t.phi, t.phi_bias)
        answers, confidence = [], []
        for target in targets:
            visible, keys = self._seen(context, target)
            w = F.relu(a @ keys.mT) * visible
            w = w / w.sum(-1, keepdim=True).clamp(min=EPS)
            answers.append(w @ keys + target)
            confidence.append(F.linear(compared * context.mean(visible, keys), t.gate))
        c = torch.cat(confidence, -1).softmax(-1)
        merged = sum(c[..., i : i + 1] * m for i, m in enumerate(answers))
        assert isinstance(merged, Tensor)
        if self.variant == "anchor":
            return y + F.linear(F.relu(merged), t.up, t.up_bias)
        projected = F.layer_norm(F.linear(merged, t.proj, t.proj_bias), a.shape[-1:], t.gain, t.shift)
        return F.linear(F.relu(a + projected), t.up, t.up_bias)

    def _target(self, t: Any, i: int, h: Tensor) -> Tensor:
        weight, bias = getattr(t, f"phi{i}"), getattr(t, f"phi{i}_bias")
        if self.variant == "anchor":
            return F.linear(F.relu(h), weight, bias)
        low = F.linear(h, weight, bias)
        return F.layer_norm(low, low.shape[-1:], getattr(t, f"gain{i}"), getattr(t, f"shift{i}"))

    def _seen(self, context: Context, target: Tensor) -> tuple[Tensor, Tensor]:
        keys = context.keys(target)
        return context.visible(target.shape[1], keys), keys

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        width = site.out_features or 0
        k, n = max(width // self.reduction, 1), len(taps) + 1
        ds = sum(tap.out_features or 0 for tap in (taps[0], *taps))
        more = (2 * k * (n + 1) + k * (k + 1)) if self.variant == "projected" else k * (width + 1)
        return k * (ds + n) + more + k + width * (k + 1)


def _linear(name: str, outs: int, ins: int) -> dict[str, P]:
    weight, bias = default_linear(outs, ins)
    return {name: P(weight, "direction"), f"{name}_bias": P(bias, "bias")}
