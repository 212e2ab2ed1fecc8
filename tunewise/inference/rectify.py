"""p~ = p + strength f in `model.generate`: a logits processor that is there while a Copilot is active."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.delta import SiteDelta
from tunewise.core.errors import UserError
from tunewise.head.copilot import Copilot, Steps, rectified, seen_states

__all__ = ["Rectifier", "rectify_generation"]


def rectify_generation(model: nn.Module, ts: list[SiteDelta]) -> None:
    """Puts `generate` with the correction of these (at most one) on the model, or takes it away."""
    if len(ts) > 1:
        raise UserError("Two Copilots cannot correct one model at once: switch one of them off.")
    found = model.__dict__.get("generate")
    if isinstance(found, _Generate):
        del model.__dict__["generate"]
        if found.before is not None:
            model.__dict__["generate"] = found.before
    if ts and hasattr(model, "generate"):
        model.__dict__["generate"] = _Generate(model, ts[0], model.__dict__.get("generate"))


class _Generate:
    """`model.generate` with one more logits processor; a plain object, so copies and pickles work."""

    def __init__(self, model: nn.Module, t: SiteDelta, before: Any) -> None:
        self.model, self.t, self.before = model, t, before

    def __call__(self, *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        model: Any = self.model
        part: Any = self.t.part
        inner = self.before or type(model).generate.__get__(model)
        if not part.strength:
            return inner(*args, logits_processor=logits_processor, **kwargs)
        for name in ("assistant_model", "prompt_lookup_num_tokens", "inputs_embeds", "prefill_chunk_size"):
            if kwargs.get(name) is not None:
                raise UserError(
                    f"A Copilot reads every token in its turn, so generate takes no {name} beside it."
                )
        from transformers import LogitsProcessorList

        with _Ears(model) as ears, torch.no_grad():
            mine = Rectifier(part, self.t.cast(torch.float32), ears)
            return inner(
                *args, logits_processor=LogitsProcessorList([*(logits_processor or ()), mine]), **kwargs
            )


class _Ears:
    """Hooks for one `generate`: hidden states are asked for, and the last pass is kept."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.hooks = model, list[Any]()
        self.outputs: Any = None
        self.inputs: dict[str, Any] = {}

    def __enter__(self) -> _Ears:
        self.hooks = [
            self.model.register_forward_pre_hook(self._ask, with_kwargs=True),
            self.model.register_forward_hook(self._hear, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _ask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_hidden_states": True}

    def _hear(self, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        self.inputs, self.outputs = kwargs, outputs


class Rectifier:
    """scores -> log p~ of the next token, for greedy, sampled and beam search, with and without a cache."""

    def __init__(self, part: Copilot, t: Any, ears: _Ears) -> None:
        self.part, self.t, self.ears = part, t, ears
        self.steps = Steps(part, t)
        self.ids: Tensor | None = None
        self.f: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows, n = input_ids.shape
        if self.ids is not None:
            self._follow(input_ids)
        slots, at = torch.full((rows,), n - 1, device=scores.device), self._remember(input_ids)
        self.ids, self.f = input_ids.clone(), self.steps.next(self.f, slots, at)
        return rectified(scores.float().softmax(-1), self.f, self.part.strength, self.part.floor).masked_fill(
            scores == -torch.inf, -torch.inf
        )

    def _remember(self, input_ids: Tensor) -> Tensor:
        """The states that are new; gives the position of the last token of each row."""
        inputs, outputs = self.ears.inputs, self.ears.outputs
        pair = bool(getattr(self.t.root.config, "is_encoder_decoder", False))
        first, n = self.ids is None, input_ids.shape[1]
        mask = inputs.get("attention_mask")
        if pair or mask is None or mask.dim() != 2:
            mask = input_ids.new_ones(input_ids.shape)
        mask = mask[:, -n:]
        at = (mask.long().cumsum(1) - 1).clamp(min=0)
        here = torch.arange(n, device=at.device).expand_as(at)
        given = inputs if pair else {"input_ids": inputs["input_ids"]}
        X, x_mask, h, _ = seen_states(self.t, outputs, given)
        keep = n if first else 1  # without a cache the earlier states come again
        if h.shape[1] < keep:
            raise UserError("A Copilot needs the whole prompt in one pass; generate without chunks.")
        new = slice(n - keep, n)
        if not pair:
            self.steps.remember(X[:, -keep:], mask[:, new].bool(), at[:, new], here[:, new])
        elif first:
            x_at = (x_mask.long().cumsum(1) - 1).clamp(min=0)
            self.steps.remember(X, x_mask, x_at, torch.full_like(x_at, -1))
        self.steps.remember(h[:, -keep:], mask[:, new].bool(), at[:, new], here[:, new])
        return at[:, -1]

    def _follow(self, input_ids: Tensor) -> None:
        """Beam search moves rows: each goes on from the row that has its beginning."""
        assert self.ids is not None and self.f is not None
        same = (input_ids[:, None, :-1] == self.ids[None]).all(-1)
        if not bool(same.any(1).all()):
            raise UserError("A Copilot follows token after token, and this way of generating does not.")
        own = torch.arange(len(same), device=same.device)
        rows = torch.where(same.diagonal(), own, same.int().argmax(1))
        if not torch.equal(rows, own):
            self.steps.reorder(rows)
            self.f = self.f[rows]
