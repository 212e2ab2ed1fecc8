"""w = route(p): with what weight each expert answers for a token; and who may hear what was decided."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tunewise.core.delta import Delta
from tunewise.core.part import Part

__all__ = [
    "EntropyRoute",
    "PerLayer",
    "Place",
    "Route",
    "Routed",
    "Routings",
    "SoftRoute",
    "TopKRoute",
    "spread",
    "top_k_mask",
    "tsallis",
]

Place = tuple[int, int]
"""A layer among those that are adapted, and how many there are."""
PerLayer = PositiveInt | list[PositiveInt]
"""One number for all layers, or a list that is spread over them from the first to the last."""


def spread(value: int | list[int], place: Place) -> int:
    """The number for layer l of L: entry floor(l n / L) of a list of n, so [2, 4] serves half of the layers each."""
    return value[place[0] * len(value) // place[1]] if isinstance(value, list) else value


def tsallis(p: Tensor, q: float, eps: float = 1e-5) -> Tensor:
    """H_q(p) = (1 - sum_i p_i^q) / (1 - N^(1-q)) in [0, 1]; q = 1: -sum_i p_i log p_i / log N. 0 for N = 1.

    `eps` is the least p_i where powers or logarithms have no finite gradient at 0 (q <= 1).
    """
    n = p.shape[-1]
    if n == 1:
        return p.new_zeros(p.shape[:-1])
    if q <= 1.0:
        p = p.clamp(min=eps)
    if q == 1.0:
        return -(p * p.log()).sum(-1) / math.log(n)
    return (p - p.pow(q)).sum(-1) / (1.0 - n ** (1.0 - q))  # p sums to 1, but for rounding


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """1 at the k largest of the last axis, else 0."""
    best = scores.topk(min(k, scores.shape[-1]), -1).indices
    return torch.zeros_like(scores).scatter(-1, best, 1.0)


class Route(Part):
    """w `[..., N]` from p `[..., N]`, the router's probabilities in float32; an option of a delta with experts."""

    def weights(self, p: Tensor, place: Place) -> Tensor:
        """w = p: every expert answers."""
        return p


class SoftRoute(Route):
    """w = p: dense soft routing. Source: LoRAMoE, arXiv 2312.09979."""


class TopKRoute(Route):
    """w_i = p_i / sum_{j in top-k} p_j for the k most probable experts, else 0; k may differ by layer (a list).

    With k = 1 all weight is 1 and the router learns from a balance loss alone. Source: MoLA, arXiv 2402.08562.
    """

    k: PerLayer = 2

    def weights(self, p: Tensor, place: Place) -> Tensor:
        k = min(spread(self.k, place), p.shape[-1])
        values, best = p.topk(k, -1)
        return torch.zeros_like(p).scatter(-1, best, values / values.sum(-1, keepdim=True))


class EntropyRoute(Route):
    """w = p * mask: experts by falling p while their sum, each included, is at most `mass`, and the first `keep`.

    Where the router is undecided, H_q(p) > `threshold`, all experts answer. The one that crosses `mass` is left out
    unless it is among the first `keep`. `renormalise` (not in the publication) makes the weights sum to 1. threshold
    >= 1 is top-p routing, threshold < 0 dense soft routing. Source: DynMoLE, arXiv 2504.00661.
    """

    mass: Annotated[float, Field(gt=0, le=1)] = 0.75
    keep: PositiveInt = 2
    threshold: float = 0.9
    q: Annotated[float, Field(gt=0, le=2)] = 1.1
    renormalise: bool = False

    def weights(self, p: Tensor, place: Place) -> Tensor:
        ordered, index = p.detach().sort(-1, descending=True)
        chosen = (ordered.cumsum(-1) <= self.mass).to(p.dtype)
        chosen[..., : self.keep] = 1.0
        mask = torch.zeros_like(chosen).scatter(-1, index, chosen)
        undecided = tsallis(p.detach(), self.q) > self.threshold
        w = p * torch.where(undecided.unsqueeze(-1), 1.0, mask)
        return w / w.sum(-1, keepdim=True) if self.renormalise else w


class Routings:
    """{site: (p, w)} of the last forward pass of a model, heard only while it runs and somebody listens.

    A pass that gradient checkpointing runs again during backward is not heard: it is no call of the model itself.
    Copies and pickles of a model take nothing of it along.
    """

    def __init__(self) -> None:
        self.heard: dict[str, tuple[Tensor, Tensor]] = {}
        self.between: dict[str, Tensor] = {}
        self.open = False
        self._hooks: list[Any] = []

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return Routings, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Routings:
        return Routings()

    def listen(self, model: nn.Module) -> None:
        """From now on, until `rest`."""
        if not self._hooks:
            self._hooks = [
                model.register_forward_pre_hook(self._began),
                model.register_forward_hook(self._ended, always_call=True),
            ]

    def rest(self) -> None:
        """Nobody listens any more; what was heard is forgotten."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.open = [], False
        self.heard.clear()

    def _began(self, *_: Any) -> None:
        self.heard.clear()
        self.open = True

    def _ended(self, *_: Any) -> None:
        self.open = False

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """For the time of a `with` block; whoever listens already goes on afterwards."""
        others = bool(self._hooks)
        self.listen(model)
        try:
            yield
        finally:
            if not others:
                self.rest()


class Routed(Delta):
    """A delta whose routers choose among experts: `note` tells p and w to whoever listens, and costs nothing else."""

    gives: ClassVar[frozenset[str]] = frozenset({"routing"})
    unit: ClassVar[str] = "expert"

    @property
    def routings(self) -> Routings:
        """Where p and w are heard; one for all sites of an adaptation."""
        found: Routings = self.__dict__.setdefault("_routings", Routings())
        return found

    def is_heard(self) -> bool:
        """Whether anybody listens now."""
        return not torch.compiler.is_compiling() and "_routings" in self.__dict__ and self.routings.open

    def note(self, t: Any, p: Tensor, w: Tensor) -> None:
        """p and w `[..., N]` of one site in this pass."""
        if self.is_heard():
            self.routings.heard[t.site_name] = (p, w)
