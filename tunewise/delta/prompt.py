"""[P; E(x)]: learnt vectors before the input's embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.core.forward import forward_of
from tunewise.sites import Site

from .insert import after_first, insert, padding_first, remove

__all__ = ["Folded", "SoftPrompt", "token_table"]

Folded = tuple[Delta, dict[str, dict[str, Tensor]]]
"""A delta for inference, and its tensors: {site: {name: value}}."""


class SoftPrompt(Delta):
    """f([P; E(x)]), P `[tokens, width]`; the prompt's own outputs are cut off again, so shapes stay the input's.

    place  "front", or "after_first": behind the first real token, which encoders read as [CLS]
    text   P starts at the embeddings of these words, repeated or cut to `tokens`; else at tokens drawn at random
    ids    the tokens of `text`: learnt from the tokenizer that the model was loaded beside, or given
    keep   the prompt's outputs stay, as PEFT has it for classifiers that read position 0
    Step 0 is not the base model. Works with masks on either side (decoders that classify at the last token get theirs
    moved to the front, because they find it by the ids that they are not given), with `generate` (inserted while
    the cache is empty) and with labels (padded by -100). Another prompt is another `prompt(t, rows, kwargs)`. Trainable
    scalars: tokens x width. Raises `UserError` for models without token embeddings, and for encoder-decoders,
    whose encoder `generate` calls apart. Source: Lester et al., arXiv 2104.08691 (starts: its section 3.2).
    """

    kinds: ClassVar[tuple[str, ...]] = ("model",)
    identity: ClassVar[bool] = False
    unit: ClassVar[str] = "token"
    tokens: PositiveInt = 16
    keep: bool = False
    place: Literal["front", "after_first"] = "front"
    text: str | None = None
    ids: list[int] | None = None

    @property
    def positions(self) -> int:
        return self.tokens

    def tensors(self, site: Site) -> dict[str, P]:
        return {"P": P(self.start(site), "prompt", 0)}

    def start(self, site: Site) -> Tensor:
        """Embeddings of real tokens `[tokens, width]`, copied: better than noise."""
        table = token_table(site, type(self).__name__)
        if self.text is not None and not self.ids:
            self.ids = _tokens_of(self.text, site.module)
        if self.ids and max(self.ids) >= len(table):
            raise UserError(f"The prompt starts at token {max(self.ids)}, and the model has {len(table)}.")
        given = torch.tensor(self.ids or [0]).repeat(self.tokens)[: self.tokens]
        rows = given if self.ids else torch.randint(len(table), (self.tokens,))
        return table.detach()[rows.to(table.device)].float()

    def prompt(self, t: Any, rows: int, kwargs: dict[str, Any]) -> Tensor:
        """P `[tokens, width]`, or one for each row; may take what it needs out of the model's arguments."""
        return t.P  # type: ignore[no-any-return]

    def around(self, t: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            kwargs, args = {"input_ids": args[0], **kwargs}, args[1:]
        cache = kwargs.get("past_key_values")
        filled = cache is not None and cache.get_seq_length() > 0
        ids, embeds, mask = kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        given: Any = embeds if embeds is not None else ids
        prompt = self.prompt(t, len(given), kwargs)
        if mask is None and not filled:
            mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        at = after_first(mask, given) if self.place == "after_first" else None
        if mask is not None:
            kwargs["attention_mask"] = insert(mask, mask.new_ones(len(mask), self.tokens), at)
        kwargs.pop("cache_position", None)
        self._shift_positions(t.root, kwargs, filled, at)
        if filled:
            return call(*args, **kwargs)
        if embeds is None:
            embeds = t.root.get_input_embeddings()(ids)
        prompt = prompt.to(embeds.dtype).expand(len(embeds), -1, -1)
        kwargs |= {"input_ids": None, "inputs_embeds": insert(embeds, prompt, at)}
        for name, value in (("token_type_ids", 0), ("labels", -100)):
            old = kwargs.get(name)
            if old is not None and old.dim() == 2:
                kwargs[name] = insert(old, old.new_full((len(old), self.tokens), value), at)
        length = embeds.shape[1]
        if _answers_last(t.root) and mask is not None:
            _put_padding_first(t.root, kwargs)
        return call(*args, **kwargs) if self.keep else self._cut(call(*args, **kwargs), length, at)

    def _shift_positions(self, root: Any, kwargs: dict[str, Any], filled: bool, at: Tensor | None) -> None:
        """Positions that the caller gives go on behind the prompt's; RoBERTa's are counted from the mask."""
        given = kwargs.get("position_ids")
        embeddings = getattr(getattr(root, "base_model", root), "embeddings", None)
        padding = getattr(embeddings, "padding_idx", None)
        if given is not None:
            start: Any = 0 if padding is None else padding + 1
            rest = given + self.tokens
            if at is not None and not filled:
                before = at - 1 + torch.zeros_like(given[:, :1])  # given may have one row for all
                given = given.expand(len(before), -1)
                rest = torch.where(
                    torch.arange(given.shape[1], device=at.device) < at, given, given + self.tokens
                )
                start = given.gather(1, before) + 1
            prompt = start + torch.arange(self.tokens, device=given.device).expand(len(rest), -1)
            kwargs["position_ids"] = rest if filled else insert(rest, prompt, at)
        elif padding is not None and not filled:
            mask = kwargs["attention_mask"].long()
            kwargs["position_ids"] = mask.cumsum(1) * mask + padding

    def _cut(self, outputs: Any, length: int, at: Tensor | None) -> Any:
        for name in ("logits", "last_hidden_state"):
            value = outputs.get(name) if hasattr(outputs, "get") else None
            if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == length + self.tokens:
                outputs[name] = remove(value, self.tokens, at)
        return outputs

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return self.tokens * token_table(site, type(self).__name__).shape[1]


def token_table(site: Site, kind: str) -> Tensor:
    """The model's token embeddings `[words, width]`. Raises `UserError` where a prompt cannot stand before them."""
    root: Any = site.module
    table = getattr(getattr(root, "get_input_embeddings", lambda: None)(), "weight", None)
    if table is None:
        raise UserError(
            f"{type(root).__name__} has no token embeddings, so it takes no soft prompt (for images: vpt)."
        )
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise UserError(
            f"{kind} does not work in {type(root).__name__}, an encoder-decoder: `generate` calls its encoder "
            "apart; use prefix_tuning or lora."
        )
    return table  # type: ignore[no-any-return]


def _answers_last(root: Any) -> bool:
    """Whether it is a decoder that classifies at its last position: told no token ids, it takes padding for text."""
    return hasattr(root, "score") and type(root).__name__.endswith("ForSequenceClassification")


def _put_padding_first(root: Any, kwargs: dict[str, Any]) -> None:
    """Rows end with their last real token; every token keeps its position."""
    mask: Tensor = kwargs["attention_mask"]
    if "position_ids" in forward_of(root).names:  # type: ignore[union-attr]
        plain = torch.arange(mask.shape[1], device=mask.device).unsqueeze(0)
        given = kwargs.get("position_ids")
        kwargs["position_ids"] = (plain if given is None else given).expand(len(mask), -1)
    for name in ("inputs_embeds", "token_type_ids", "position_ids", "attention_mask"):
        if kwargs.get(name) is not None:
            kwargs[name] = padding_first(kwargs[name], mask)


def _tokens_of(text: str, model: Any) -> list[int]:
    """The words' tokens by the tokenizer in the folder that the model was loaded from."""
    from transformers import AutoTokenizer

    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise UserError(
            f'The tokenizer for the prompt\'s text "{text}" is not known: give ids=[...] in its place.'
        )
    try:
        found = AutoTokenizer.from_pretrained(name)(text, add_special_tokens=False)["input_ids"]
    except (OSError, ValueError):
        raise UserError(
            f'{name} has no tokenizer for the prompt\'s text "{text}": give ids=[...] in its place.'
        ) from None
    if not found:
        raise UserError(f'The prompt\'s text "{text}" has no tokens.')
    return [int(i) for i in found]
