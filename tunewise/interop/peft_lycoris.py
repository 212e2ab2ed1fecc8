"""LoHa and LoKr as PEFT keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from tunewise.core.delta import Delta
from tunewise.delta.loha import LoHa
from tunewise.delta.lokr import LoKr
from tunewise.sites import Site

from .peft_form import Arguments, Entry, Form, common, patterns, rank_and_alpha

__all__ = ["LohaForm", "LokrForm"]


class _Lycoris(Form):
    """`r`, `alpha` and the dropouts, with patterns for the first two."""

    delta: ClassVar[type[Delta]]
    reads = frozenset({"alpha", "alpha_pattern", "init_weights", "module_dropout", "r", "rank_dropout"})
    reads |= {"rank_pattern", "use_effective_conv2d"}
    plain: ClassVar[dict[str, tuple[str, Any]]] = {
        "rank_dropout": ("rank_dropout", 0.0),
        "module_dropout": ("module_dropout", 0.0),
    }
    """PEFT's option -> (ours, default)."""

    def arguments(self, site: Site, tensors: dict[str, Tensor], config: dict[str, Any]) -> Arguments:
        rank, alpha = rank_and_alpha(config, site.name, 8, "alpha")
        rest = {ours: config.get(theirs, default) for theirs, (ours, default) in self.plain.items()}
        return self.delta, {"rank": rank, "alpha": alpha, **rest}

    def options(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {
            **patterns("r", "rank_pattern", {site.name: t.part.rank for site, t in entries}),
            **patterns("alpha", "alpha_pattern", {site.name: t.part.alpha for site, t in entries}),
            **{theirs: common(entries, ours, self.title) for theirs, (ours, _) in self.plain.items()},
        }


class LohaForm(_Lycoris):
    """`LOHA`: the product of two low-rank matrices."""

    kind, title, delta = "LOHA", "LoHa", LoHa
    deltas = (LoHa,)
    names: ClassVar[dict[str, str]] = {f"hada_{n}": n for n in ("w1_a", "w1_b", "w2_a", "w2_b")}


class LokrForm(_Lycoris):
    """`LOKR`: the Kronecker product of two small matrices, each whole or of low rank."""

    kind, title, delta = "LOKR", "LoKr", LoKr
    deltas = (LoKr,)
    names: ClassVar[dict[str, str]] = {f"lokr_{n}": n for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
    plain: ClassVar[dict[str, tuple[str, Any]]] = _Lycoris.plain | {
        "decompose_both": ("decompose_both", False),
        "decompose_factor": ("factor", -1),
        "rank_dropout_scale": ("rank_dropout_scale", False),
    }
    reads = _Lycoris.reads | {"decompose_both", "decompose_factor", "rank_dropout_scale"}
