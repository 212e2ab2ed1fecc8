"""blocks([P; H]): learnt states in front of the first block, carried to the end of the last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.core.forward import first_tensor, forward_of
from tunewise.sites import Site

from .prompt_generator import layer_of, width_of

__all__ = ["CarriedPrompt"]

# Positions and caches that count tokens: they have no room for some that are not in the input.
COUNTED = (
    "past_key_values",
    "position_embeddings",
    "alibi",
    "position_bias",
    "relative_pos",
    "rel_embeddings",
)


class CarriedPrompt(Delta):
    """[P; H] before the first block in `sites`, without the outputs of P after the last one.

    P = T + E, both `[tokens, width]`: T ~ N(0, std^2), E (its position embedding) ~ N(0, 1 / width). It stands behind
    the embeddings, so that images have it too. Trainable scalars: 2 tokens width. Raises `UserError` for blocks that
    do not follow each other, and for models with a cache or positions inside of attention: they take `prompt_tuning`.
    Source: VPT (shallow), arXiv 2203.12119; the tokens of DVPT's code.
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)
    identity: ClassVar[bool] = False
    unit: ClassVar[str] = "token"
    tokens: PositiveInt = 50
    std: float = 1.0
    sites: str | list[str] = "block"

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        width = width_of(sites, "CarriedPrompt")
        layers = [layer_of(site.name) for site in sites]
        if layers != list(range(layers[0], layers[0] + len(layers))):
            raise UserError(f"CarriedPrompt: the blocks {layers} do not follow each other.")
        self.__dict__["_ends"] = sites[0].name, sites[-1].name
        return {
            "T": P(torch.randn(self.tokens, width) * self.std, "prompt", 0),
            "E": P(torch.randn(self.tokens, width) * width**-0.5, "prompt", 0),
        }

    def tensors(self, site: Site) -> dict[str, P]:
        if any(bool(getattr(m, "is_causal", False)) for m in site.module.modules()):
            raise UserError(
                f"CarriedPrompt does not work in decoders ({site.name}): they take prompt_tuning."
            )
        return {}

    def around(self, t: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, put = first_tensor(args, kwargs)
        first, last = self.__dict__["_ends"]
        if t.site_name == first:
            front = (t.shared.T + t.shared.E).to(hidden.dtype).expand(len(hidden), -1, -1)
            hidden = torch.cat([front, hidden], 1)
        args, kwargs = put(hidden)
        given = {**dict(zip(forward_of(t.root).names, args, strict=False)), **kwargs}  # type: ignore[union-attr]
        taken = next((name for name in COUNTED if given.get(name) is not None), None)
        if taken:
            raise UserError(f"CarriedPrompt: {t.site_name} is given {taken}; such models take prompt_tuning.")
        mask = given.get("attention_mask")
        if mask is not None:
            given["attention_mask"] = self._with_room(mask, hidden.shape[1] - self.tokens)
        result = call(given.pop(next(iter(given))), **given)
        if t.site_name != last:
            return result
        y = result[0] if isinstance(result, tuple) else result
        return (y[:, self.tokens :], *result[1:]) if isinstance(result, tuple) else y[:, self.tokens :]

    def _with_room(self, mask: Tensor, length: int) -> Tensor:
        """The mask `[rows, heads, queries, keys]` of the text with the prompt in front, which everybody sees."""
        if mask.dim() != 4 or mask.shape[-1] != length:
            raise UserError("CarriedPrompt needs sdpa or eager attention; load the model with it.")
        above = self.tokens if mask.shape[2] > 1 else 0
        return F.pad(mask, (self.tokens, 0, above, 0), value=True if mask.dtype == torch.bool else 0.0)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return 0
