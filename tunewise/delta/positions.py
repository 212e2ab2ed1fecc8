"""f(x at positions n + 0, n + 1, ..): the text moves up, as behind a prefix that lies in a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.head.base import takes_positions
from tunewise.sites import Site

__all__ = ["ShiftedPositions"]


class ShiftedPositions(Delta):
    """f(x) with every position raised by `count`; nothing is trained.

    Libraries that keep a prefix in the cache (PEFT) count its tokens; prefixes learnt there expect the text to begin
    behind them. Raises `UserError` for models that cannot be told positions.
    """

    kinds: ClassVar[tuple[str, ...]] = ("model",)
    identity: ClassVar[bool] = False
    count: PositiveInt = 16

    @property
    def positions(self) -> int:
        return self.count

    def tensors(self, site: Site) -> dict[str, P]:
        if not takes_positions(site.module):
            raise UserError(
                f"{type(site.module).__name__} cannot be told positions, so they cannot be raised."
            )
        return {}

    def around(self, t: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            kwargs, args = {"input_ids": args[0], **kwargs}, args[1:]
        given = kwargs.get("position_ids")
        if given is not None:
            return call(*args, **kwargs | {"position_ids": given + self.count})
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        x = ids if ids is not None else kwargs["inputs_embeds"]
        past = 0 if cache is None else cache.get_seq_length()
        embeddings = getattr(getattr(t.root, "base_model", t.root), "embeddings", None)
        padding = getattr(embeddings, "padding_idx", None)
        start = past + self.count
        if padding is not None and ids is not None:  # RoBERTa counts what is no padding
            real = (ids != padding).long()
            found = (real.cumsum(1) + start) * real + padding
        else:
            start += 0 if padding is None else padding + 1
            found = torch.arange(start, start + x.shape[1], device=x.device)[None].expand(len(x), -1)
        return call(*args, **kwargs | {"position_ids": found})
