"""Which frozen states a run keeps, and how many bytes: `loop/features.py` at work on tensors without values."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from tunewise.core.run import Run
from tunewise.loop.features import Features
from tunewise.loop.frozen import Frozen
from tunewise.study.estimate.count import Counter

__all__ = ["Kept"]

UNLIMITED = 2**62


class Kept:
    """The states of rows below everything that a recipe changes, which a run computes once per row.

    blocks   leading blocks whose states are kept; 0: none, then every pass is a whole one
    limit    bytes that a run may keep; the two batches that are counted are always kept
    That shapes fit is tried as in the run; that a row's states do not depend on the rows beside it has to be
    believed without values.
    """

    def __init__(self, run: Run, counter: Counter, limit_bytes: int) -> None:
        self.limit, self.on_device = limit_bytes, run.device.type == "cpu"
        self._store: dict[tuple[bytes, bytes], torch.Tensor] = {}
        with counter:
            self._features = Features(run, self._store, UNLIMITED, marks=_depths)
        self._density = {"train": 0.0, "valid": 0.0}
        if self.blocks:
            with counter:
                self._weigh(run)

    def _weigh(self, run: Run) -> None:
        """Bytes per token, in the precision of steps and in that of looks."""
        rows = [e for part in run.streams.data.values() for e in part][:1]
        dtype, kind = getattr(torch, run.settings.dtype), run.device.type
        for stream, mixed in (("train", dtype is not torch.float32), ("valid", False)):
            self.forget()
            with self.served(), torch.no_grad(), torch.autocast(kind, dtype, enabled=mixed):
                run.outputs(run.collate(rows))
            self._density[stream] = self.held / _tokens(rows)

    @property
    def blocks(self) -> int:
        """How many leading blocks are passed once per row."""
        return self._features.blocks

    @property
    def held(self) -> int:
        """Bytes of the states that are kept while counting."""
        return sum(value.nbytes for value in self._store.values())

    def served(self) -> AbstractContextManager[Any]:
        """A `with` block in which the run's passes keep states and take those that are kept."""
        return self._features.installed() if self.blocks else nullcontext()

    def forget(self) -> None:
        """The next pass over any rows is their first."""
        self._store.clear()
        self._features.used = 0

    def bytes(self, stream: str, rows: Sequence[dict[str, Any]]) -> float:
        """What the states of these rows take; steps and looks differ in precision."""
        return self._density[stream] * _tokens(rows)

    def assumes(self) -> list[str]:
        """What rests on kept states, in sentences."""
        if not self.blocks:
            return []
        reason = self._features.reason
        return [
            f"The states that leave {'block 1' if self.blocks == 1 else f'blocks 1 to {self.blocks}'} are computed "
            f"once per row, without dropout, and kept (at most {self.limit / 2**30:g} GiB); a run that finds that "
            "a row's states depend on the rows beside it computes them anew each time."
            + (f" Not those of higher blocks: {reason}" if reason else "")
        ]


def _tokens(rows: Sequence[dict[str, Any]]) -> int:
    return sum(int(e.get("length", 1)) for e in rows)


def _depths(model: nn.Module, frozen: Frozen) -> tuple[bytes, ...]:
    return tuple(str(i).encode() for i in range(len(frozen.blocks)))
