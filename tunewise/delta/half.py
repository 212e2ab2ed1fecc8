"""theta' = theta + M (trained change), M a random half of the matrices of every block."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from tunewise.core.errors import UserError
from tunewise.core.run import Run
from tunewise.core.streams import seed_of
from tunewise.sites import Site, find_sites

from .existing import ExistingWeights

__all__ = ["HalfWeights", "frozen_half"]

Unit = list[str]
"""Names of the parameters that are frozen together: a matrix with its bias, a norm, or a block."""


def _parameters(site: Site) -> Unit:
    if site.parameter:
        return [site.name]
    return [f"{site.name}.{n}" for n, p in site.module._parameters.items() if p is not None]


def _categories(model: nn.Module, level: str) -> list[list[list[Unit]]]:
    """category -> group -> units; of every group the same share is drawn."""
    blocks: dict[tuple[str | None, int], dict[str, list[Unit]]] = {}
    for site in find_sites(model):
        if site.layer is None or site.kind not in ("linear", "experts", "norm"):
            continue
        if site.roles or site.role in ("qkv", "kv", "gate_up"):
            raise UserError(
                f"{site.name} holds several matrices in one tensor, of which no half can be frozen; "
                "use partial or full, or a model with separate projections."
            )
        category = "norm" if site.kind == "norm" else site.component or "other"
        blocks.setdefault((site.stack, site.layer), {}).setdefault(category, []).append(_parameters(site))
    if not blocks:
        raise UserError(f"{type(model).__name__} has no repeated blocks whose matrices could be halved.")
    if level == "layer":
        return [[[[n for units in b.values() for unit in units for n in unit] for b in blocks.values()]]]
    if level == "model":
        return [[[unit for b in blocks.values() for units in b.values() for unit in units]]]
    names = sorted({category for b in blocks.values() for category in b})
    return [[b[name] for b in blocks.values() if name in b] for name in names]


def _kept(groups: list[list[Unit]], share: float, make: torch.Generator) -> list[Unit]:
    """The units that are not drawn: share * n of each group are; what is left over goes to random groups."""
    exact = [share * len(group) for group in groups]
    counts = [int(e + 1e-9) for e in exact]
    short = [i for i, e in enumerate(exact) if e - counts[i] > 1e-9]
    more = int(sum(exact) - sum(counts) + 0.5)
    for i in torch.randperm(len(short), generator=make).tolist()[:more]:
        counts[short[i]] += 1
    found = []
    for group, count in zip(groups, counts, strict=True):
        order = torch.randperm(len(group), generator=make).tolist()
        found += [group[i] for i in order[count:]]
    return found


def frozen_half(model: nn.Module, share: float, level: str, seed: int, stage: int) -> set[str]:
    """Names of the parameters inside blocks that are not trained in this stage; a function of its arguments alone.

    Raises `UserError` for a model without blocks and for fused projections.
    """
    make = torch.Generator().manual_seed(seed_of(seed, "half", stage))
    return {n for groups in _categories(model, level) for unit in _kept(groups, share, make) for n in unit}


class HalfWeights(ExistingWeights):
    """theta' = theta + M (trained change), M drawn anew for every stage of a run.

    share   of the matrices of every block that is trained; with 3 matrices, 2 in a random half of the blocks and 1 in
            the others
    level   what is drawn: matrices within attention, MLP and norms of each block ("category"), matrices anywhere
            ("model"), whole blocks ("layer")
    Embeddings, head and everything else outside of blocks are always trained. Frozen matrices have no gradient and no
    moments. A bias goes with its matrix. Raises `UserError` for fused projections.
    Source: HFT, arXiv 2404.18466.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    level: Literal["category", "model", "layer"] = "category"
    seed: int = 0

    def existing(self, model: nn.Module) -> dict[str, str]:
        self._frozen(model, 0)
        return super().existing(model)

    def _frozen(self, model: nn.Module, stage: int) -> set[str]:
        return frozen_half(model, self.share, self.level, self.seed, stage)

    def prepare(self, run: Run) -> None:
        self._draw(run)

    def boundary(self, run: Run, kind: str) -> None:
        if kind == "stage":
            self.state["stage"] = self.state.get("stage", 0) + 1
            self._draw(run)

    def _draw(self, run: Run) -> None:
        frozen = self._frozen(run.model, self.state.setdefault("stage", 0))
        for name, info in run.tensors.all().items():
            if info.part is not self:
                continue
            if name in frozen:
                run.tensors.freeze(name, forget=True)
            elif name in run.tensors.frozen:
                run.tensors.thaw(name)
