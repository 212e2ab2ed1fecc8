"""Losses on routers: experts are used evenly, or as the kind of a row asks, or with decision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from tunewise.core.errors import UserError
from tunewise.core.part import Part
from tunewise.core.run import Run
from tunewise.delta.routing import Routed, tsallis

__all__ = ["Heard", "LoadBalance", "LocalBalance", "RouterEntropy", "balance", "heard_routers", "routed"]


class Heard(NamedTuple):
    """p and w `[..., N]` of one site in a pass, and which positions are text and not padding, `[...]`."""

    site: str
    p: Tensor
    w: Tensor
    real: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the real positions of values `[...]` or `[..., N]`."""
        wide = self.real if values.dim() == self.real.dim() else self.real.unsqueeze(-1)
        return (values * wide).flatten(0, self.real.dim() - 1).sum(0) / self.real.sum()


def routed(run: Run) -> list[Routed]:
    """The deltas of a run that have routers."""
    return [part for _, part in run.handle.deltas if isinstance(part, Routed)]


def heard_routers(run: Run, batch: Any) -> list[Heard]:
    """What the routers decided in the pass over `batch` that was made last."""
    mask = batch.inputs.get("attention_mask")
    return [
        Heard(site, p, w, _real(p, mask))
        for part in routed(run)
        for site, (p, w) in part.routings.heard.items()
    ]


def _real(p: Tensor, mask: Tensor | None) -> Tensor:
    """1 at text, 0 at padding; prompts before the text count as text, and so does everything without a mask."""
    real = torch.ones(p.shape[:-1], device=p.device, dtype=p.dtype)
    if mask is None or mask.dim() != 2 or p.dim() != 3 or len(p) != len(mask) or p.shape[1] < mask.shape[1]:
        return real
    real[:, p.shape[1] - mask.shape[1] :] = mask.to(p.dtype)
    return real


class _RouterLoss(Part):
    """A loss on what routers decided; it listens from `before_step` until the gradients are complete.

    `batchwise`: it is no sum over rows, so that accumulation in micro-batches changes it.
    """

    slot: ClassVar[str] = "objective"
    needs: ClassVar[frozenset[str]] = frozenset({"routing"})
    batchwise: ClassVar[bool] = True
    shown: ClassVar[str] = "router_loss"
    weight: Annotated[float, Field(ge=0)] = 1e-3

    def before_step(self, run: Run) -> None:
        if self.weight:
            run.metrics[self.shown] = 0.0
            for part in routed(run):
                part.routings.listen(run.model)

    def gradients(self, run: Run) -> None:
        for part in routed(run):
            part.routings.rest()

    def value(self, run: Run, batch: Any, heard: Sequence[Heard]) -> Tensor:
        """The loss of one micro-batch, without its weight."""
        raise NotImplementedError

    def loss(self, run: Run, batch: Any, logits: Tensor, outputs: Any, units: float) -> Tensor:
        """The share of one micro-batch, so that a step counts it once; how even the use is, each tells for itself.

        Outside of a step nobody has listened to the pass that made the logits: then there is one more.
        """
        found = heard_routers(run, batch)
        if not found:
            with ExitStack() as stack:
                for part in routed(run):
                    stack.enter_context(part.routings.listening(run.model))
                run.outputs(batch)
                found = heard_routers(run, batch)
        share = self.value(run, batch, found) * (batch.units.sum() / units)
        run.metrics[self.shown] = run.metrics.get(self.shown, 0.0) + self.weight * float(share.detach())
        return share


def balance(heard: Sequence[Heard], counts: bool = True) -> Tensor:
    """N sum_i f_i P_i over the positions of all sites: P the mean of p; f that of w > 0 (`counts`), or of w itself.

    Sites with other numbers of experts are averaged by the number of sites. Even use gives the mean number of chosen
    experts (`counts`), or the mean sum of the weights.
    """
    groups: dict[int, list[Heard]] = {}
    for one in heard:
        groups.setdefault(one.p.shape[-1], []).append(one)
    terms = []
    for n, same in groups.items():
        sizes = [one.real.sum() for one in same]
        total = torch.stack(sizes).sum()
        f, P = (
            torch.stack([one.mean(v) * size for one, v, size in zip(same, values, sizes, strict=True)]).sum(0)
            / total
            for values in (
                [(one.w > 0).to(one.p.dtype) if counts else one.w for one in same],
                [one.p for one in same],
            )
        )
        terms.append(n * (f * P).sum() * len(same))
    return torch.stack(terms).sum() / len(heard)


class LoadBalance(_RouterLoss):
    """L = weight N sum_i f_i P_i, P_i the mean probability of expert i over the tokens of all sites, padding aside.

    f_i is the share of tokens that chose i, which sums to k (`counts`; MoLA and Mixtral), or the mean of its weight
    (DynMoLE). The least value, at even use, is k or the mean sum of the weights. Sources: Switch, arXiv 2101.03961;
    MoLA, arXiv 2402.08562; DynMoLE, arXiv 2504.00661.
    """

    shown: ClassVar[str] = "balance_loss"
    counts: bool = True

    def value(self, run: Run, batch: Any, heard: Sequence[Heard]) -> Tensor:
        return balance(heard, self.counts)


class RouterEntropy(_RouterLoss):
    """L = weight mean H_q(p) over the tokens of all sites, padding aside: routers are to decide.

    H_q is Tsallis' entropy divided by its maximum (`tsallis`). Source: DynMoLE, arXiv 2504.00661.
    """

    shown: ClassVar[str] = "router_entropy_loss"
    weight: Annotated[float, Field(ge=0)] = 1e-2
    q: Annotated[float, Field(gt=0, le=2)] = 1.1

    def value(self, run: Run, batch: Any, heard: Sequence[Heard]) -> Tensor:
        entropies = [one.mean(tsallis(one.p, self.q)) * one.real.sum() for one in heard]
        return torch.stack(entropies).sum() / torch.stack([one.real.sum() for one in heard]).sum()


class LocalBalance(_RouterLoss):
    """L = weight sum over sites of var(Z) / (mean(Z)^2 + 1e-10), Z_nb = I_nb Q_nb.

    Q_nb is the sum of w_n over the tokens of row b. I_nb = 1 + delta where expert n belongs to the kind of row b, else
    1 - delta: the first half of the experts belongs to rows whose `field` is among `first`, the second half to all
    others; the variance is the unbiased one over rows and experts. Without `field` all I are 1.
    The least value has Q in proportion to 1 / I, so that each kind leans to one half: as published, to the one with 1 -
    delta. `first` is saved with the recipe. Unlike the published code, padding is not counted.
    Raises `UserError` for an odd number of experts. Source: LoRAMoE, arXiv 2312.09979.
    """

    shown: ClassVar[str] = "balance_loss"
    weight: Annotated[float, Field(ge=0)] = 0.1
    delta: Annotated[float, Field(ge=0, lt=1)] = 0.1
    field: str | None = None
    first: list[str] = ["1"]

    @property
    def row_fields(self) -> tuple[str, ...]:
        """The fields of the training rows that are read."""
        return () if self.field is None else (self.field,)

    def value(self, run: Run, batch: Any, heard: Sequence[Heard]) -> Tensor:
        first = self._first(run, batch.ids)
        return torch.stack([self._site(one, first) for one in heard]).sum()

    def _site(self, one: Heard, first: list[bool] | None) -> Tensor:
        Q = (one.w * one.real.unsqueeze(-1)).reshape(len(one.w), -1, one.w.shape[-1]).sum(1)
        Z = Q if first is None else Q * self.importance(first, Q.shape[1], one.site).to(Q)
        if Z.numel() < 2:
            return Z.sum() * 0.0
        return Z.var() / (Z.mean().square() + 1e-10)

    def importance(self, first: Sequence[bool], experts: int, site: str = "the site") -> Tensor:
        """I `[rows, experts]`."""
        if experts % 2:
            raise UserError(
                f"LocalBalance gives each kind of row half of the experts, and {site} has {experts}."
            )
        mine = torch.tensor(first).unsqueeze(1) == (torch.arange(experts) < experts // 2)
        return torch.where(mine, 1.0 + self.delta, 1.0 - self.delta)

    def _first(self, run: Run, ids: Sequence[str]) -> list[bool] | None:
        if self.field is None:
            return None
        kinds: dict[str, bool] = self.__dict__.setdefault("_kinds", {})
        if any(i not in kinds for i in ids):
            rows = run.streams.data.get("train", ())
            kinds |= {e["id"]: str(e.get("row", {}).get(self.field)) in self.first for e in rows}
        return [kinds[i] for i in ids]
