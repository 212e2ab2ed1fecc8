"""h_l = block_l([P_l; h_{l-1}]): learnt states in front of every block, put anew at each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tunewise.core.delta import P, SiteDelta, TapBuffer
from tunewise.core.errors import UserError
from tunewise.core.forward import forward_of
from tunewise.sites import Site, find_sites

from .attention import attending_module
from .prefix import Prefix
from .prompt import Folded

__all__ = ["DeepPrompt"]


@dataclass(eq=False)
class Ear:
    """How the block of a prompt is called with the prompt alone, and what its attention was heard to say."""

    names: tuple[str, ...]
    rotary: int | None
    buffers: tuple[TapBuffer, ...]
    open: bool = False
    heard: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def arguments(self, states: Tensor) -> dict[str, Any]:
        """What else the block wants: no mask, no cache, position 0 (a rotation by nothing)."""
        found: dict[str, Any] = dict.fromkeys(self.names)
        rows, length = states.shape[:2]
        if "position_ids" in found:
            found["position_ids"] = torch.zeros(rows, length, dtype=torch.long, device=states.device)
        if self.rotary is not None:
            shape = (rows, length, self.rotary)
            found["position_embeddings"] = (states.new_ones(shape), states.new_zeros(shape))
        return found


class DeepPrompt(Prefix):
    """h_l = block_l([P_l; h_{l-1}]) without the prompt's own outputs, P_l `[tokens, width]` at every block in `sites`.

    What a block makes of P_l reaches the other positions through its attention's keys and values alone, and those
    are the same for all rows: the block is called once with P_l (norms, projections, changes of weights as they
    are), and its keys and values stand before the attention's own, as a prefix. So there are no further positions in
    the model, no mask and no cache to keep in step, and nothing to cut off; `fold` leaves a Prefix. Prompts have no
    position: no position embedding, no rotation. In decoders a prompt sees itself up to its position, in encoders all
    of itself, which only the block's own outputs for it feel; those are dropped.
    start  "uniform": U(-v, v), v = sqrt(6 / (width + 3 patch^2)) (text: sqrt(3 / width)); "normal": std 0.02
    Trainable scalars: tokens x width per block. Source: VPT-deep, arXiv 2203.12119; deep prompts for text: P-Tuning
    v2, arXiv 2110.07602. Raises `UserError` where the attention is not one that is known, or has a position bias.
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)
    sites: str | list[str] = "block"
    start: Literal["uniform", "normal"] = "uniform"

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        if self.hidden:
            raise UserError("DeepPrompt has no network that makes its states: leave hidden out.")
        return {}

    def tensors(self, site: Site) -> dict[str, P]:
        super().tensors(site)  # refuses what takes no prefix
        width = site.in_features
        if width is None:
            raise UserError(f"The width of {site.name} is not known, so it takes no prompt.")
        if self.start == "normal":
            return {"P": P(torch.randn(self.tokens, width) * 0.02, "prompt", 0)}
        patch = getattr(getattr(attending_module(site.module, site.name), "config", None), "patch_size", None)
        fan = 3 * patch**2 if isinstance(patch, int) else width
        bound = (6 / (fan + width)) ** 0.5
        return {"P": P(torch.empty(self.tokens, width).uniform_(-bound, bound), "prompt", 0)}

    def settle(self, model: nn.Module, t: SiteDelta) -> None:
        block: nn.Module = t.root
        names = list(inspect.signature(_plain_call(block)).parameters.values())[1:]
        wanted = [p.name for p in names if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        wanted += [p.name for p in names if p.name == "position_ids" and p.name not in wanted]
        rotary = None
        if any(p.name == "position_embeddings" for p in names):
            rotary = _rotated(model)
        plans = [f.plan for m in block.modules() if (f := forward_of(m)) is not None]
        buffers = dict.fromkeys(buffer for plan in plans for buffer, _, _ in plan.taps)
        t.__dict__["ear"] = Ear(tuple(wanted), rotary, tuple(buffers))

    def states(self, t: Any) -> Tensor:
        """P_l `[tokens, width]`, or one for each row."""
        return t.P  # type: ignore[no-any-return]

    def keys(self, t: Any) -> tuple[Tensor, Tensor]:
        ear: Ear = t.ear
        states = self.states(t)
        states = states[None] if states.dim() == 2 else states
        block = t.root
        kept = [(buffer, dict(buffer.values), dict(buffer.calls)) for buffer in ear.buffers]
        saving = getattr(block, "gradient_checkpointing", False)
        ear.open = True
        try:
            if saving:  # what is heard must not come from inside of a pass that is done again
                block.gradient_checkpointing = False
            _plain_call(block)(states, **ear.arguments(states))
        finally:
            ear.open = False
            if saving:
                block.gradient_checkpointing = True
            for buffer, values, calls in kept:
                buffer.values, buffer.calls = values, calls
        heard, ear.heard = ear.heard, None
        if heard is None:
            raise UserError(f"The attention of {t.site_name} is not one that takes prompts.")
        return heard

    def folded(self, entries: Sequence[tuple[Site, Any]], model: nn.Module) -> Folded:
        """The same prompt as a Prefix: the keys and values that the blocks make of it."""
        sites = [s for s in find_sites(model) if s.kind == "attention"]
        names = {attending_module(s.module, s.name): s.name for s in sites}
        found: dict[str, dict[str, Tensor]] = {}
        for site, t in entries:
            k, v = self.keys(t)
            found[names[attending_module(site.module, site.name)]] = {"K": k[0], "V": v[0]}
        exactly = [f"re:{re.escape(name)}" for name in found]
        return Prefix(self.tokens, exactly, None, self.gated), found

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return self.tokens * int(site.in_features or 0)


def _plain_call(block: nn.Module) -> Any:
    """The block's own forward, without what is attached to the block as a whole."""
    found = forward_of(block)
    return block.forward if found is None else found.base


def _rotated(model: nn.Module) -> int:
    """How many features of a head the model rotates by position."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.startswith("original"):
                return 2 * buffer.numel()
    raise UserError(f"How {type(model).__name__} rotates keys is not known, so it takes no deep prompt.")
