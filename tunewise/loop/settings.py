"""What a loop is told: learning rate, sizes, schedule, precision, when to look and when to keep."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from tunewise.core.errors import UserError, did_you_mean

__all__ = ["Settings"]


@dataclass(config=ConfigDict(extra="forbid"))
class Settings:
    """Options of a run that belong to no part.

    batch_size       rows per optimizer step; micro_batch rows per forward pass (default: all of them)
    schedule         of the learning rate after `warmup` (a fraction of the steps, or `warmup_steps`)
    decay_from       step until which the rate is constant before the schedule begins; default: end of the warmup
    by_length        batches hold rows of like length
    evaluations      looks at the validation rows over the whole run; the best one is kept
    patience         looks without improvement before the run stops; 0 never stops early
    checkpoint_every steps between checkpoints; 0 means at every look
    features         folder in which states of frozen blocks are kept for later runs; default: in memory, for this one
    """

    lr: PositiveFloat = 1e-4
    batch_size: PositiveInt = 32
    micro_batch: PositiveInt | None = None
    epochs: PositiveFloat = 3.0
    steps: PositiveInt | None = None
    warmup: float = 0.06
    warmup_steps: NonNegativeInt | None = None
    decay_from: NonNegativeInt | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    by_length: bool = True
    evaluations: NonNegativeInt = 4
    patience: NonNegativeInt = 0
    checkpoint_every: NonNegativeInt = 0
    eval_batch_size: PositiveInt = 64
    valid_rows: PositiveInt | None = None
    features: str | None = None

    @classmethod
    def of(cls, **options: Any) -> Settings:
        """Settings from options; None means the default. Raises `UserError` with the nearest right name."""
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in options:
            if key not in names:
                raise UserError(f'There is no setting "{key}"{did_you_mean(key, names)}')
        try:
            return cls(**{k: v for k, v in options.items() if v is not None})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{first['loc'][0]}={first['input']!r} is not valid: {first['msg']}.") from None

    def factor(self, step: int, total: int) -> float:
        """The schedule's factor of the learning rate for step 0 .. total - 1."""
        import math

        warm = int(self.warmup * total) if self.warmup_steps is None else self.warmup_steps
        start = max(warm, self.decay_from or 0)
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.schedule == "constant" or step < start:
            return 1.0
        part = (step - start) / max(total - start, 1)
        return 1.0 - part if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * part))
