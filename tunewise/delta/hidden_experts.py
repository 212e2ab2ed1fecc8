"""y = W2 (m(x) * f(W1 x + b1)) + b2: the hidden units of a dense FFN as experts, of which a token uses some."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.core.run import Run
from tunewise.core.streams import seed_of
from tunewise.init.base import site_weight
from tunewise.sites import Site

from .clusters import split_rows
from .random import generator
from .routing import Routed, top_k_mask

__all__ = ["EMoE", "HiddenExperts", "SMoEDropout", "experts_at"]

FRONT = ("gate", "gate_up", "up")
"""The projection whose rows are split, in this order where there are several."""


class HiddenExperts(Routed):
    """y = sum_i w_i(x) W2[:, E_i] f(W1[E_i] x + b1[E_i]) + b2, E_1 ... E_N equal parts of the hidden units.

    A mask on the units before W2, chosen by a router that sees what W1 sees; W1, W2 and their own deltas are left
    where they are, and everything dense about the layer (merging, saving) stays. All units are computed: no time is
    saved. The split and nothing else is saved with the adaptation. In a gated FFN the rows of the gate are split.
    `dense` means that outside of training all experts answer with weight 1: the plain FFN, which is what is
    merged and served. Raises `UserError` where the units cannot be split evenly, or an FFN is not known.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    experts: PositiveInt = 64
    split: Literal["kmeans", "random", "contiguous"] = "kmeans"
    dense: bool = True
    seed: NonNegativeInt = 0
    sites: str | list[str] = "mlp"

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Whether step 0 is the base, outside of training."""
        return self.dense

    @property
    def training_only(self) -> bool:  # type: ignore[override]
        """Whether the plain FFN is what is served and merged."""
        return self.dense

    def chosen(self, everything: Sequence[Site]) -> list[Site]:
        """The projections before and after the hidden units of the selected FFNs."""
        sites = super().chosen(everything)
        layers: dict[tuple[str | None, int | None], list[Site]] = {}
        for site in sites:
            layers.setdefault((site.stack, site.layer), []).append(site)
        pairs = dict(self._pair(found) for found in layers.values())
        self.__dict__["_pairs"] = pairs
        self.__dict__["_backs"] = frozenset(pairs.values())
        return [s for s in sites if s.name in pairs or s.name in self.__dict__["_backs"]]

    def _pair(self, found: list[Site]) -> tuple[str, str]:
        """(the split projection, the one that reads the hidden units) of one layer."""
        name, where = type(self).__name__, found[0].name.rpartition(".")[0]
        fronts = [[s for s in found if s.role == role] for role in FRONT]
        front = next((sites for sites in fronts if sites), [])
        backs = [s for s in found if s.role == "down"]
        if len(front) != 1 or len(backs) != 1:
            what = "several" if len(front) > 1 or len(backs) > 1 else "no whole"
            raise UserError(
                f"{name} splits one dense FFN per layer, and {self.sites!r} selects {what} FFN at {where}: choose "
                'sites such as "mlp & layers[-2]", both projections of an FFN, and no layer that has experts already.'
            )
        hidden = backs[0].in_features or 0
        if hidden % self.experts:
            fit = max(n for n in range(1, self.experts + 1) if hidden % n == 0)
            raise UserError(
                f"{name} splits the {hidden} hidden units of {where} into equal parts: experts={self.experts} does "
                f"not divide them, the next smaller number that does is {fit}."
            )
        return front[0].name, backs[0].name

    def tensors(self, site: Site) -> dict[str, P]:
        if site.name not in self.__dict__["_pairs"]:
            return {}
        W, rows = site_weight(site), torch.arange(site.out_features or 0)
        if "gate" in site.roles and "gate" in site.role:  # a fused projection: the gate's rows are split
            rows = site.roles["gate"].cpu()
            rows = rows if site.rows is None else torch.searchsorted(site.rows.cpu(), rows)
        expert = split_rows(W.index_select(0, rows.to(W.device)), self.experts, self.split, self.seed)
        found = {"expert": expert, "units": rows[expert.argsort(stable=True)]}
        return {name: P(value, "mask", trainable=False) for name, value in found.items()}

    def route(self, t: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(p, w) `[..., N]` in float32, of the input x and output y of the split projection."""
        raise NotImplementedError

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        back = self.__dict__["_pairs"].get(t.site_name)
        if back is None or not (self._masks(t) or self.is_heard()):
            return y
        p, w = self.route(t, x, y)
        self.note(t, p, w)
        if self._masks(t):
            self.routings.between[back] = w.to(y.dtype).index_select(-1, t.expert)
        return y

    def input(self, t: Any, x: Tensor) -> Tensor:
        if not self._masks(t) or t.site_name not in self.__dict__["_backs"]:
            return x
        mask = self.routings.between.pop(t.site_name, None)
        if mask is None:
            raise UserError(
                f"{t.site_name} was called without the first projection of its FFN, which chooses experts."
            )
        return x * mask

    def _masks(self, t: Any) -> bool:
        return bool(t.training) or not self.dense

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return 0


class EMoE(HiddenExperts):
    """w = 1 for the k experts with the largest key_i . x, else 0; key_i = mean of the rows W1[E_i] as they are now.

    key_i . x is the mean of W1 x over E_i, so the keys cost no product and follow W1 through every update, whatever
    trains it (full tuning, LoRA on W1). `noise` is the deviation of Gaussian noise on the scores in training.
    Not mergeable unless `dense`. With k = experts it is the dense FFN. Left out: the key's momentum and the trained
    cosine router of the ablations, and the published code's one trained b2 per expert, whose sum stands for b2.
    Source: arXiv 2310.10908.
    """

    k: PositiveInt = 16
    noise: Annotated[float, Field(ge=0)] = 0.0

    def route(self, t: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = y.detach().index_select(-1, t.units).float()
        bias = t.root._parameters.get("bias")
        if bias is not None:
            own = bias if t.rows is None else bias.index_select(0, t.rows)
            z = z - own.detach().float().index_select(0, t.units)
        scores = z.unflatten(-1, (self.experts, -1)).mean(-1)
        if self.noise and t.training:
            scores = scores + self.noise * torch.randn_like(scores)
        return scores.softmax(-1), top_k_mask(scores, self.k)


class SMoEDropout(HiddenExperts):
    """w_i = N softmax over the k chosen of (R x + r)_i, else 0; R and r are random and frozen, k grows with the steps.

    The factor N (ours) makes equal logits and k = N the dense FFN, which the split of a pretrained FFN starts from;
    b2 stays outside of the mixture. k goes from `k_min` to `k_max` (None: all) over the run: "linear" k_min +
    round((k_max - k_min) t / T), "cosine" k_max - (k_max - k_min) cos(pi t / 2T), "exponential" k_max - (k_max -
    k_min) 0.99^floor(300 t / T), "steps" doubling from 1. In a loop of one's own T is not known, and k stays at k_min.
    Outside of training `k_eval` experts answer (None: k_max), or all with weight 1 if `dense`.
    R and r are drawn from `seed` as torch's linear layers are and not saved. Source: arXiv 2303.01610.
    """

    experts: PositiveInt = 16
    dense: bool = False
    k_min: PositiveInt = 8
    k_max: PositiveInt | None = None
    k_eval: PositiveInt | None = None
    schedule: Literal["linear", "cosine", "exponential", "steps"] = "linear"

    def tensors(self, site: Site) -> dict[str, P]:
        found = super().tensors(site)
        if not found:
            return found
        make, bound = generator(seed_of(self.seed, site.name)), (site.in_features or 1) ** -0.5
        for name, shape in (("R", (self.experts, site.in_features or 0)), ("r", (self.experts,))):
            drawn = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=make)
            found[name] = P(drawn, "router", trainable=False, saved=False)
        return found

    def k_at(self, step: int, total: int) -> int:
        """How many experts answer after `step` of `total` steps."""
        return experts_at(self.schedule, step, total, self.k_min, self.k_max or self.experts)

    def before_step(self, run: Run) -> None:
        self.state["k"] = self.k_at(run.step, run.total_steps)

    def route(self, t: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        exact = t.cast(torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), exact.R, exact.r)
        later = self.k_eval or self.k_max or self.experts
        k = self.state.get("k", self.k_min) if t.training else later
        away = logits.masked_fill(top_k_mask(logits.detach(), k) == 0, float("-inf"))
        return logits.softmax(-1), self.experts * away.softmax(-1)


def experts_at(schedule: str, step: int, total: int, least: int, most: int) -> int:
    """k after `step` of `total` steps, between `least` and `most`; `least` where the total is not known (0)."""
    share = min(step / total, 1.0) if total else 0.0
    if schedule == "linear":
        k = round((most - least) * share) + least
    elif schedule == "cosine":
        k = most - round((most - least) * math.cos(math.pi * share / 2))
    elif schedule == "exponential":
        k = most - round((most - least) * 0.99 ** math.floor(300 * share))
    else:
        doublings = math.floor(math.log2(most)) + 1
        k = 2 ** min(int(doublings * share), doublings - 1)
    return max(least, min(k, most))
