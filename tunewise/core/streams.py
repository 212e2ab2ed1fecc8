"""Streams: parts draw rows from named streams, each with its own order and a position that every checkpoint
holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .errors import UserError, did_you_mean

__all__ = ["STREAMS", "Stream", "Streams", "seed_of"]

STREAMS = ("train", "valid", "calibration", "meta", "replay", "unlabelled", "general")
FALLBACK = {"calibration": "train", "meta": "valid", "replay": "train"}
BUCKET = 8

Example = dict[str, Any]


def seed_of(*names: object) -> int:
    """A 63-bit seed from names, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Stream(Iterator[list[Example]]):
    """Endless batches of `size` examples in an order that depends on (seed, name, epoch) alone.

    The order of an epoch is a permutation; inside windows of 8 batches examples are sorted by length, so that
    a batch holds little padding, and the window's batches are then shuffled. The last, shorter batch of an
    epoch is kept.
    """

    def __init__(
        self, name: str, examples: Sequence[Example], size: int, seed: int, by_length: bool = True
    ) -> None:
        if not examples:
            raise UserError(f"The stream {name} has no rows.")
        self.name, self.examples, self.size, self.seed, self.by_length = name, examples, size, seed, by_length
        self.epoch, self.index = 0, 0
        self._order: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        """Batches in one epoch."""
        return -(-len(self.examples) // self.size)

    def order(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch as positions in `examples`."""
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.name, epoch))
            rows = torch.randperm(len(self.examples), generator=generator).tolist()
            batches: list[list[int]] = []
            for start in range(0, len(rows), self.size * BUCKET):
                window = rows[start : start + self.size * BUCKET]
                if self.by_length:
                    window.sort(key=lambda i: int(self.examples[i].get("length", 0)))
                cut = [window[i : i + self.size] for i in range(0, len(window), self.size)]
                batches += [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
            self._order = (epoch, batches)
        return self._order[1]

    def __next__(self) -> list[Example]:
        if self.index >= len(self):
            self.epoch, self.index = self.epoch + 1, 0
        rows = self.order(self.epoch)[self.index]
        self.index += 1
        return [self.examples[i] for i in rows]

    @property
    def at_epoch_end(self) -> bool:
        """Whether the batch just drawn was the last one of its epoch."""
        return self.index >= len(self)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index, "size": self.size, "rows": len(self.examples)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["rows"] != len(self.examples) or state["size"] != self.size:
            raise UserError(
                f"The stream {self.name} had {state['rows']} rows in batches of {state['size']} "
                f"when the run was saved, now {len(self.examples)} in batches of {self.size}: "
                "resume with the same data and settings."
            )
        self.epoch, self.index = state["epoch"], state["index"]


class Streams:
    """All streams of a run, opened on first use; test rows are never among them."""

    def __init__(self, data: Mapping[str, Sequence[Example]], seed: int, by_length: bool = True) -> None:
        if "test" in data:
            raise UserError("Test rows are never handed to a run; give them to the evaluation only.")
        self.data, self.seed, self.by_length = data, seed, by_length
        self._open: dict[str, Stream] = {}
        self._saved: dict[str, dict[str, int]] = {}

    def open(self, name: str, size: int) -> Stream:
        """The stream `name` in batches of `size`; `calibration` and `replay` fall back to train, `meta` to
        valid.
        """
        key = f"{name}/{size}"
        if key not in self._open:
            source = name if name in self.data else FALLBACK.get(name, name)
            if source not in self.data:
                if name in STREAMS:
                    raise UserError(f"This run has no rows for the stream {name}.")
                raise UserError(f'There is no stream "{name}"{did_you_mean(name, STREAMS)}')
            self._open[key] = Stream(name, self.data[source], size, self.seed, self.by_length)
            if key in self._saved:
                self._open[key].load_state_dict(self._saved.pop(key))
        return self._open[key]

    def state_dict(self) -> dict[str, dict[str, int]]:
        return {**self._saved, **{k: s.state_dict() for k, s in self._open.items()}}

    def load_state_dict(self, state: dict[str, dict[str, int]]) -> None:
        self._saved = dict(state)
        for key in [k for k in self._open if k in self._saved]:
            self._open[key].load_state_dict(self._saved.pop(key))
