"""Forward passes over rows: in batches of like length, with a common start computed once, and timed in advance."""

from __future__ import annotations

import copy
import inspect
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Passes", "SharedStart", "Tick"]

Tick = Callable[[int], Any]


@dataclass
class Passes:
    """Rows to answer in batches of like length: `answer(row numbers)` gives one prediction each.

    lengths  what each row costs, in tokens
    size     rows per batch
    """

    lengths: Sequence[int]
    size: int
    answer: Callable[[Sequence[int]], Sequence[Any]]

    def batches(self) -> list[list[int]]:
        """Row numbers, the shortest rows first."""
        order = sorted(range(len(self.lengths)), key=lambda i: self.lengths[i])
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    def run(self, tick: Tick | None = None) -> list[Any]:
        """A prediction for every row, in the order of the rows."""
        found: list[Any] = [None] * len(self.lengths)
        for rows in self.batches():
            for i, value in zip(rows, self.answer(rows), strict=True):
                found[i] = value
            if tick is not None:
                tick(len(rows))
        return found

    def seconds(self) -> float:
        """Seconds that `run` will take: three batches are timed, extended by the padded tokens of all."""
        batches = self.batches()
        places = sorted({len(batches) * k // 6 for k in (1, 3, 5)})
        self.answer(batches[places[0]])  # the first pass is slower than all others
        start = time.perf_counter()
        for place in places:
            self.answer(batches[place])
        taken = time.perf_counter() - start
        return taken * self._padded(batches) / self._padded([batches[place] for place in places])

    def _padded(self, batches: Sequence[Sequence[int]]) -> int:
        return sum(len(rows) * self.lengths[rows[-1]] for rows in batches)


class SharedStart:
    """Outputs of a causal model on rows that begin alike: the common tokens go through the model once.

    length  tokens that the shorter half of the rows has in common, before the end of any of these; 0 for models
            without a cache of keys and values. Rows that begin otherwise are computed whole.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Sequence[int]], most: int) -> None:
        self.model, self.device = model, next(model.parameters()).device
        short = sorted(rows, key=len)[: (len(rows) + 1) // 2]
        common = os.path.commonprefix([list(row) for row in short])
        self.ids = common[: max(0, min(most, len(short[0]) - 1))]
        self.cache: Any = self._filled()
        if self.cache is None:
            self.ids = []
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def length(self) -> int:
        return len(self.ids)

    def _filled(self) -> Any:
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        if not self.ids:
            return None
        made = self.model(input_ids=torch.tensor([self.ids], device=self.device), use_cache=True)
        cache = getattr(made, "past_key_values", None)
        # Recurrent states are another kind of memory, which not every model can take up again mid-text.
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        kept = type(cache) is DynamicCache and all(type(layer) in plain for layer in cache.layers)
        return cache if kept else None

    def skipped(self, rows: Sequence[Sequence[int]]) -> int:
        """How many tokens at the start of these rows need not be computed again."""
        return self.length if all(list(row[: self.length]) == self.ids for row in rows) else 0

    def logits(self, ids: Tensor, mask: Tensor, skip: int, positions: Tensor | None = None) -> Tensor:
        """`[rows, tokens or positions, words]` for right-padded rows without their first `skip` tokens."""
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        if skip:
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(ids))
            start = mask.new_ones(len(ids), skip).to(self.device)
            inputs["attention_mask"] = torch.cat([start, inputs["attention_mask"]], 1)
            inputs["past_key_values"] = cache
        if positions is not None and self.keeps:
            inputs["logits_to_keep"] = positions.to(self.device)
        logits: Tensor = self.model(**inputs, use_cache=bool(skip)).logits
        return logits if positions is None or self.keeps else logits[:, positions]
