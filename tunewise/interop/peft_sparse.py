"""Trained single entries as PEFT keeps them: SHiRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tunewise.core.delta import Delta
from tunewise.core.errors import UserError
from tunewise.delta.entries import SparseEntries, smallest
from tunewise.delta.select_entries import Uniform
from tunewise.sites import Site

from .peft_form import Arguments, Entry, Form, common

__all__ = ["ShiraForm"]


class ShiraForm(Form):
    """`SHIRA`: r (in + out) entries of every weight, whichever they are; the checkpoint tells where they stand."""

    kind, title = "SHIRA", "SHiRA"
    deltas: ClassVar[tuple[type[Delta], ...]] = (SparseEntries,)
    names: ClassVar[dict[str, str]] = {"shira_weight": "values", "shira_indices": "index"}
    reads = frozenset({"init_weights", "mask_type", "r", "random_seed"})

    def arguments(self, site: Site, tensors: dict[str, Tensor], config: dict[str, Any]) -> Arguments:
        return SparseEntries, {"entries": Uniform(rank=config.get("r", 32))}

    def theirs(self, t: Any) -> dict[str, Tensor]:
        index, columns = t.index.long(), t.root.weight.shape[1]
        return {
            "shira_weight": t.values,
            "shira_indices": torch.stack([index // columns, index % columns]).int(),
        }

    def put(self, t: Any, tensors: dict[str, Tensor]) -> None:
        rows, columns = tensors["shira_indices"].long()
        high, wide = t.root.weight.shape
        flat = rows * wide + columns
        inside = (rows >= 0) & (rows < high) & (columns >= 0) & (columns < wide)
        if not bool(inside.all()) or len(flat.unique()) < len(flat):
            raise UserError(
                f"The places of SHiRA's entries of {t.site_name} are not distinct entries of its weight."
            )
        t.values.copy_(tensors["shira_weight"])
        t.index.copy_(flat.to(smallest(t.root.weight)))

    def options(self, entries: Sequence[Entry]) -> dict[str, Any]:
        if common(entries, "scale", "SHiRA") != 1.0:
            raise UserError("PEFT's SHiRA has no factor, and scale is not 1 here; export to hf instead.")
        ranks = {len(t.values) / ((site.in_features or 0) + (site.out_features or 0)) for site, t in entries}
        rank = ranks.pop()
        if ranks or rank != int(rank):
            raise UserError(
                "PEFT's SHiRA keeps r (in + out) entries of every weight with one whole r, which these are not; "
                "select them by rank, as in SparseEntries(Uniform(rank=4)), or export to hf."
            )
        return {"r": int(rank), "mask_type": "random", "random_seed": 0, "init_weights": True}
