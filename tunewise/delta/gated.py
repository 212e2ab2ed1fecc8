"""W' = W + s B diag(g) A: low-rank adaptation with a gate per rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from tunewise.core.delta import P
from tunewise.core.errors import UserError
from tunewise.init.base import check_rank, site_weight
from tunewise.init.svd import top_svd
from tunewise.sites import Site

from .lora import LoRA

if TYPE_CHECKING:
    from tunewise.core.adaptation import Adaptation

__all__ = ["GatedLowRank"]

STD = 0.02


class GatedLowRank(LoRA):
    """W' = W + s B diag(g) A, A `[rank, in]`, B `[out, rank]`, g `[rank]`; merged, exported and fused as LoRA is.

    start  "svd": A = V_r', g = S_r, B = U_r of W = U S V', and W' = W + s (B diag(g) A - U_r S_r V_r'), as SORSA
           "triplets": A and B normal with std 0.02, g = 0, as AdaLoRA
           "gates": A and B as LoRA's, g normal with std 1, as SoRA
    gate   the tag of g: "singular" or "gate"
    W' = W at step 0 for all of them. Trainable scalars: rank (in + out + 1) per site. Source: SORSA, arXiv
    2409.00055; AdaLoRA, arXiv 2303.10512; SoRA, arXiv 2311.11696.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"components", "sizes", "gates"})
    start: Literal["svd", "triplets", "gates"] = "triplets"
    gate: Literal["singular", "gate"] = "singular"

    @property
    def residual(self) -> bool:
        return self.start == "svd"

    def tensors(self, site: Site) -> dict[str, P]:
        if self.init is not None:
            raise UserError("GatedLowRank has starts of its own (start=...) and takes none as init.")
        found = super().tensors(site)
        a, b = found["A"].value, found["B"].value
        g = torch.zeros(*a.shape[:-1])
        if self.start == "triplets":
            a.normal_(0.0, STD)
            b.normal_(0.0, STD)
        elif self.start == "gates":
            g.normal_()
        else:  # twins of what is set when W can be read
            found |= {
                "A0": P(torch.zeros_like(a), "direction", trainable=False),
                "B0": P(torch.zeros_like(b), "direction", trainable=False),
            }
        return found | {"g": P(g, self.gate, g.dim() - 1)}

    @torch.no_grad()
    def attached(self, adaptation: Adaptation) -> None:
        mine = [(site, t) for _, site, t in adaptation.sites if t.part is self and self.residual]
        for site, t in mine:
            check_rank(self, site)
            if t.get_parameter("A").is_meta:  # a model without values is only counted
                continue
            u, sigma, v = top_svd(site_weight(site), self.rank)
            for name, value in (("A", v), ("B", u), ("g", sigma)):
                t.get_parameter(name).copy_(value)
            t.get_buffer("A0").copy_(t.get_parameter("A"))
            t.get_buffer("B0").copy_(self.trained(t)[1])

    def trained(self, t: Any) -> tuple[Tensor, Tensor]:
        return t.A, t.B * t.g.unsqueeze(-2)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return super().formula(site) + self.rank * site.count
