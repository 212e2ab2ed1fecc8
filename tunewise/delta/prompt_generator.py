"""block([P(H); H]): prompts that are generated for each instance from its own states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import PositiveInt
from torch import Tensor, nn

from tunewise.core.delta import Delta, P
from tunewise.core.errors import UserError
from tunewise.core.forward import first_tensor
from tunewise.sites import Site

from .deep_prompt import DeepPrompt
from .generators import AttentionPool, Generator, LatentQueries
from .instruction import argument, keep_prompts, kept_prompts, readable

__all__ = ["PromptGenerator", "PromptReadBack", "layer_of", "width_of"]


def layer_of(name: str) -> int:
    """The number of the block in a module's name; 0 where it has none."""
    return next((int(word) for word in name.split(".") if word.isdigit()), 0)


def width_of(sites: Sequence[Site], part: str) -> int:
    """The one width of these blocks. Raises `UserError` where they have several, or none that is known."""
    widths = {site.out_features for site in sites}
    if len(widths) != 1 or None in widths:
        raise UserError(f"{part}: the blocks at these sites have no one width that is known.")
    return int(next(iter(widths)))  # type: ignore[arg-type]


def _group(generator: Generator, name: str) -> int:
    return layer_of(name) // generator.every if generator.every else 0


def _common(generator: Generator, sites: Sequence[Site], part: str, tokens: int) -> dict[str, P]:
    width = width_of(sites, part)
    groups = sorted({_group(generator, site.name) for site in sites})
    return {f"{n}_{g}": p for g in groups for n, p in generator.common(width, tokens).items()}


def _weights(generator: Generator, t: Any) -> dict[str, Tensor]:
    """The generator's tensors at one block by their plain names."""
    ending = f"_{_group(generator, t.site_name)}"
    found = {n.removesuffix(ending): getattr(t.shared, n) for n in t.shared.meta if n.endswith(ending)}
    return found | {n: getattr(t, n) for n in t.meta}


def _generate(generator: Generator, t: Any, hidden: Tensor) -> Tensor:
    mask = readable(t, hidden)
    return generator.prompts(_weights(generator, t), hidden.to(t.dtype), mask, t.training)


def _own_count(generator: Generator, site: Site, tokens: int) -> int:
    return sum(p.value.numel() for p in generator.own(site.out_features or 0, tokens).values())


@dataclass(eq=False)
class _Told:
    """What a block's call tells the attention inside of it: as an argument, for a checkpointed block runs again."""

    prompts: Tensor | None
    kept: tuple[Tensor, Tensor] | None
    keep: Callable[[Any], None]


class PromptGenerator(DeepPrompt):
    """h_l = block_l([P_l; h_{l-1}]) without the outputs of P_l = `generator`(h_{l-1}) `[rows, tokens, width]`.

    Where prompts stand and what the block makes of them is DeepPrompt's. They depend on the instruction alone
    (`Instruction`, which the recipe must hold too); under `generate` their keys are made once and stay with the
    cache, while the answer grows. Trainable scalars: the generator's. Sources: IAPT, IDPT (see the generators).
    """

    unit: ClassVar[str] = "row"
    tokens: PositiveInt = 4
    generator: Generator = AttentionPool()

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        return {**super().shared(sites), **_common(self.generator, sites, "PromptGenerator", self.tokens)}

    def tensors(self, site: Site) -> dict[str, P]:
        super().tensors(site)  # refuses what takes no prefix
        takes = inspect.signature(type(site.module).forward).parameters.values()
        if all(p.kind is not p.VAR_KEYWORD for p in takes):
            raise UserError(f"{site.name} takes no further arguments, so it cannot be told its prompts.")
        return self.generator.own(width_of([site], "PromptGenerator"), self.tokens)

    def generate(self, t: Any, hidden: Tensor) -> Tensor:
        """P_l for the states that enter a block."""
        return _generate(self.generator, t, hidden)

    def around(self, t: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, _ = first_tensor(args, kwargs)
        cache = argument(t, "past_key_values", args, kwargs)
        kept = kept_prompts(cache, t)
        prompts = self.generate(t, hidden).to(hidden.dtype) if kept is None else None
        told = _Told(prompts, kept, lambda value: keep_prompts(cache, t, value))
        kwargs["tw_told"] = {**kwargs.get("tw_told", {}), id(t): told}
        return call(*args, **kwargs)

    def states(self, t: Any) -> Tensor:
        return t.told.prompts  # type: ignore[no-any-return]

    def keys(self, t: Any) -> tuple[Tensor, Tensor]:
        told: _Told | None = t.told
        if told is None:
            raise UserError(
                f"{t.site_name} hands no further arguments to its attention, so it takes no prompts."
            )
        found = told.kept
        if found is None:
            found = super().keys(t)
            told.keep(found)
        return found

    def folded(
        self, entries: Sequence[tuple[Site, Any]], model: nn.Module
    ) -> tuple[Delta, dict[str, dict[str, Tensor]]]:
        raise UserError(
            "PromptGenerator makes other prompts for every instance: there are no constants to keep."
        )

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return _own_count(self.generator, site, self.tokens)


class PromptReadBack(Delta):
    """h -> block(h + back(h, A)), A = `generator`(h) `[rows, tokens, size]`: prompts that are read, not attended to.

    A is made from the instruction and kept as in `PromptGenerator`. Source: DVPT (see LatentQueries).
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)
    unit: ClassVar[str] = "row"
    tokens: PositiveInt = 50
    generator: Generator = LatentQueries()
    sites: str | list[str] = "block"

    def shared(self, sites: Sequence[Site]) -> dict[str, P]:
        return _common(self.generator, sites, "PromptReadBack", self.tokens)

    def tensors(self, site: Site) -> dict[str, P]:
        return self.generator.own(width_of([site], "PromptReadBack"), self.tokens)

    def around(self, t: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, put = first_tensor(args, kwargs)
        cache = argument(t, "past_key_values", args, kwargs)
        read = kept_prompts(cache, t)
        if read is None:
            read = _generate(self.generator, t, hidden)
            keep_prompts(cache, t, read)
        change = self.generator.back(_weights(self.generator, t), hidden.to(t.dtype), read)
        args, kwargs = put(hidden + change.to(hidden.dtype))
        return call(*args, **kwargs)

    def formula(self, site: Site, taps: Sequence[Site] = ()) -> int:
        return _own_count(self.generator, site, self.tokens)
