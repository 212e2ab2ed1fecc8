"""y = W x + b + s sum_i w_i(x) B_i A_i drop(x): LoRA experts behind a router, at every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.sites import Site

from .kernels import drop
from .random import kaiming
from .routing import PerLayer, Place, Route, Routed, SoftRoute, spread

__all__ = ["LoRAExperts"]


class LoRAExperts(Routed):
    """y = W x + b + s sum_i w_i(x) B_i A_i drop(x), w = route(softmax(G x)), s = alpha / rank.

    A `[N, rank, in]` starts uniform in +-1/sqrt(in), B `[N, out, rank]` at 0, the router G `[N, in]` as A; p and w are
    float32 whatever the precision of the layer. All experts are computed in two products, `[N rank, in]` and `[out, N
    rank]`, with the weights in between; those of weight 0 as well. N and what the route takes by layer may be lists
    that are spread over the adapted layers. One dropout mask serves all experts (the publications draw one for each).
    Not mergeable: the change depends on x. Trainable scalars: N (rank (in + out) + in) per site.
    Sources: LoRAMoE, arXiv 2312.09979; MoLA, arXiv 2402.08562; DynMoLE, arXiv 2504.00661.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    gives: ClassVar[frozenset[str]] = frozenset({"routing", "sizes"})
    unit: ClassVar[str] = "rank"
    experts: PerLayer = 8
    rank: PositiveInt = 8
    alpha: float = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    route: Route = SoftRoute()
    sites: str | list[str] = "linear"

    @property
    def s(self) -> float:
        """The factor of the experts' sum."""
        return self.alpha / self.rank

    def chosen(self, everything: Sequence[Site]) -> list[Site]:
        """The selected sites; remembers which of the adapted layers each belongs to."""
        sites = super().chosen(everything)
        depth: dict[str | None, list[int]] = {}
        for site in sites:
            depth.setdefault(site.stack, []).append(site.layer or 0)
        layers = {stack: sorted(set(found)) for stack, found in depth.items()}
        if not all(v for v in (self.experts, getattr(self.route, "k", 1))):
            raise UserError(f"{type(self).__name__}: an empty list names no number of experts.")
        self.__dict__["_places"] = {
            s.name: (layers[s.stack].index(s.layer or 0), len(layers[s.stack])) for s in sites
        }
        return sites

    def _place(self, name: str) -> Place:
        found: Place = self.__dict__["_places"][name]
        return found

    def _count(self, site: Site) -> int:
        return spread(self.experts, self._place(site.name))

    def tensors(self, site: Site) -> dict[str, P]:
        n, ins, outs = self._count(site), site.in_features, site.out_features
        assert ins is not None and outs is not None
        return {
            "A": P(kaiming(n, self.rank, ins), "direction", 1),
            "B": P(torch.zeros(n, outs, self.rank), "direction", 2),
            "G": P(kaiming(n, ins), "router"),
        }

    def weights(self, t: Any, x: Tensor) -> Tensor:
        """w `[..., N]` in float32."""
        exact = t.cast(torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.float(), exact.G).softmax(-1)
            w = self.route.weights(p, self._place(t.site_name))
        self.note(t, p, w)
        return w

    def output(self, t: Any, x: Tensor, y: Tensor) -> Tensor:
        w = (self.weights(t, x) * self.s).to(t.A.dtype)
        down, up = t.A.flatten(0, 1), t.B.transpose(0, 1).flatten(1)
        h = F.linear(drop(x, self.dropout, t.training).to(down.dtype), down)
        h = (h.unflatten(-1, t.A.shape[:2]) * w.unsqueeze(-1)).flatten(-2)
        return y + F.linear(h, up)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        ins, outs = site.in_features or 0, site.out_features or 0
        return self._count(site) * (self.rank * (ins + outs) + ins)
