"""[P; E(x)]: learnt vectors before the input's embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.sites import Site

__all__ = ["SoftPrompt"]


class SoftPrompt(Delta):
    """f([P; E(x)]), P `[tokens, width]`; the prompt's own outputs are cut off again, so shapes stay the
    input's.

    P starts at embeddings of real tokens drawn at random (better than noise: Lester et al., 2104.08691), so
    step 0 is not the base model. Works with masks on either side, with `generate` (inserted while the cache
    is empty) and with labels (padded by -100). With `keep=True` the prompt's outputs stay, as PEFT has it for
    classifiers that read position 0. Trainable scalars: tokens x width.
    """

    kinds: ClassVar[tuple[str, ...]] = ("model",)
    identity: ClassVar[bool] = False
    unit: ClassVar[str] = "token"
    tokens: PositiveInt = 16
    keep: bool = False

    @property
    def positions(self) -> int:
        return self.tokens

    def tensors(self, site: Site) -> dict[str, P]:
        root: Any = site.module
        if not hasattr(root, "get_input_embeddings"):
            raise UserError(
                f"{type(site.module).__name__} has no token embeddings, so it takes no soft prompt."
            )
        table = root.get_input_embeddings().weight
        rows = torch.randint(len(table), (self.tokens,))
        return {"P": P(table.detach()[rows.to(table.device)].float(), "prompt", 0)}

    def around(self, t: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            kwargs, args = {"input_ids": args[0], **kwargs}, args[1:]
        cache = kwargs.get("past_key_values")
        filled = cache is not None and cache.get_seq_length() > 0
        ids, embeds, mask = kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        given: Any = embeds if embeds is not None else ids
        if mask is None and not filled:
            mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.tokens), mask], 1)
        kwargs.pop("cache_position", None)
        self._shift_positions(t.root, kwargs, filled)
        if filled:
            return call(*args, **kwargs)
        if embeds is None:
            embeds = t.root.get_input_embeddings()(ids)
        prompt = t.P.to(embeds.dtype).expand(len(embeds), -1, -1)
        kwargs |= {"input_ids": None, "inputs_embeds": torch.cat([prompt, embeds], 1)}
        if kwargs.get("token_type_ids") is not None:
            types = kwargs["token_type_ids"]
            kwargs["token_type_ids"] = torch.cat([types.new_zeros(len(types), self.tokens), types], 1)
        labels = kwargs.get("labels")
        if labels is not None and labels.dim() == 2:
            kwargs["labels"] = torch.cat([labels.new_full((len(labels), self.tokens), -100), labels], 1)
        length = embeds.shape[1]
        return call(*args, **kwargs) if self.keep else self._cut(call(*args, **kwargs), length)

    def _shift_positions(self, root: Any, kwargs: dict[str, Any], filled: bool) -> None:
        """Positions that the caller gives go on behind the prompt's; RoBERTa's are counted from the mask."""
        given = kwargs.get("position_ids")
        embeddings = getattr(getattr(root, "base_model", root), "embeddings", None)
        padding = getattr(embeddings, "padding_idx", None)
        if given is not None:
            prompt = torch.arange(self.tokens, device=given.device).expand(len(given), -1)
            start = 0 if padding is None else padding + 1
            rest = given + self.tokens
            kwargs["position_ids"] = rest if filled else torch.cat([prompt + start, rest], 1)
        elif padding is not None and not filled:
            mask = kwargs["attention_mask"].long()
            kwargs["position_ids"] = mask.cumsum(1) * mask + padding

    def _cut(self, outputs: Any, length: int) -> Any:
        for name in ("logits", "last_hidden_state"):
            value = outputs.get(name) if hasattr(outputs, "get") else None
            if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == length + self.tokens:
                outputs[name] = value[:, self.tokens :]
        return outputs

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return self.tokens * int(site.module.get_input_embeddings().embedding_dim)  # type: ignore[operator,union-attr]
