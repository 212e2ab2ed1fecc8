"""h_k(row) is computed once: what stays frozen below a recipe's lowest change is kept for every step and trial."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.core.adaptation import handles
from tunewise.core.run import Run

from .feature_folder import FeatureFolder
from .frozen import Frozen, find_frozen, precision_mark, row_keys, weight_marks
from .groups import Groups
from .quiet import quiet
from .served import Reached, Served

__all__ = ["Features", "frozen_features"]

MOST = 64
"""Positions of an answer that are compared."""
Store = MutableMapping[tuple[bytes, bytes], Tensor]
Marks = Callable[[nn.Module, Frozen], tuple[bytes, ...]]


class Features:
    """What a run gets from the store, and why not more.

    blocks    leading blocks whose states are served; 0: nothing is
    reason    one sentence that says why nothing (or no more) is served, None if all blocks are
    served    rows asked for whose states came from the store; computed: rows that went through the frozen blocks
    used      bytes of kept states
    marks     names the frozen blocks' weights; those of tensors without values have no content to be named by
    """

    def __init__(
        self,
        run: Run,
        store: Store,
        limit_bytes: int,
        order: int | None = None,
        marks: Marks = weight_marks,
    ) -> None:
        self.run, self.store, self.limit = run, store, limit_bytes
        self._name = marks
        self._marks: tuple[bytes, ...] = ()
        self.served, self.computed = 0, 0
        self.collected: dict[int, Tensor] | None = None
        self.states: dict[int, Tensor] | None = None
        self.tupled, self.padded = 0, False
        self.used = _bytes(store)
        self.active = _active(run)
        takes = inspect.signature(run.model.forward).parameters
        # A cache without the skipped blocks' keys would be wrong for whoever goes on from it.
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        self.frozen = Frozen()
        self.groups: Groups | None = None
        with quiet(run.model):
            self._decide()
        self.full = self.used >= limit_bytes
        if order is not None:
            self.groups = Groups(run, order, self.padded)

    @property
    def blocks(self) -> int:
        """How many leading blocks are served."""
        return len(self.frozen.blocks)

    @property
    def reason(self) -> str | None:
        """Why no more blocks are served."""
        return self.frozen.reason

    def _decide(self) -> None:
        rows = sorted((e for part in self.run.streams.data.values() for e in part), key=_length)
        if self.run.task is None or not rows:
            self.frozen = Frozen(reason="The run has no rows to try it with.")
            return
        alone, both = self.run.collate([rows[0]]), self.run.collate([rows[0], rows[-1]])
        self.frozen = find_frozen(self.run.model, both.inputs)
        if not self.blocks:
            return
        self._marks = self._name(self.run.model, self.frozen)
        mask = both.inputs.get("attention_mask")
        self.padded = mask is not None and not bool(mask.all())
        real = self._answer(both)
        store, used, self.store = self.store, self.used, {}
        with self.installed():
            reason = self._differs(alone, both, real)
        self.store, self.used = store, used
        self.served = self.computed = 0
        if reason is not None:
            self.frozen = Frozen(reason=reason)

    def _answer(self, batch: Any) -> list[Tensor]:
        """What the head and the objectives see of a batch, at the positions that are no padding."""
        logits, outputs = self.run.forward(batch)
        mask = batch.inputs.get("attention_mask")
        found = [logits, *(v for v in (getattr(outputs, "last_hidden_state", None),) if v is not None)]
        same = mask is not None and all(v.shape[:2] == mask.shape for v in found if v.dim() == 3)
        found = [v[mask.bool()] if same and v.dim() == 3 else v for v in found]
        return [v[:: max(1, len(v) // MOST)] for v in found]  # tokens by words is a large table

    def _differs(self, alone: Any, both: Any, real: list[Tensor]) -> str | None:
        """Tries kept states on two rows: a row's states must not depend on the rows beside it, and the model
        must give the same answers with them.
        """
        try:
            one, two = self._compute(alone.inputs), self._compute(both.inputs)
            if any(value.dim() != 3 for value in two.values()):
                return "Its blocks do not give hidden states of shape [rows, tokens, width]."
            masks = [batch.inputs.get("attention_mask") for batch in (alone, both)]
            for index, value in two.items():
                first = value[0] if masks[1] is None else value[0][masks[1][0].bool()]
                before = one[index][0] if masks[0] is None else one[index][0][masks[0][0].bool()]
                if not _close(before, first):
                    return "The hidden states of a row depend on the rows that share its batch."
            answers = self._answer(both)
        except Exception as error:  # whatever a foreign model does with kept states, the run goes on without
            return f"The model does not run on kept states ({type(error).__name__}: {error})."
        if not all(_close(a, b) for a, b in zip(real, answers, strict=True)):
            return "The model answers differently on kept states: more than hidden states goes up its blocks."
        return None

    def collect(self, index: int, result: Any) -> Any:
        """Notes a block's output; after the last frozen block the pass ends."""
        assert self.collected is not None
        self.tupled = len(result) if isinstance(result, tuple) else 0
        if self.tupled and any(value is not None for value in result[1:]):
            raise TypeError("its blocks give more than hidden states")
        if index in self.frozen.needed:
            self.collected[index] = result[0] if self.tupled else result
        if index == self.blocks - 1:
            raise Reached
        return result

    def _compute(self, inputs: dict[str, Tensor]) -> dict[int, Tensor]:
        """States of the needed blocks `[rows, tokens, width]`, in evaluation mode and without a graph."""
        modes = {module: module.training for module in self.run.model.modules()}
        self.run.model.eval()
        self.collected = {}
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.run.model(**inputs, **self.options)
        except Reached:
            return self.collected
        finally:
            self.collected = None
            for module, mode in modes.items():
                module.training = mode
        raise RuntimeError("the last frozen block was not called")

    def outputs(self, batch: Any) -> Any:
        """`Run.outputs`, with the frozen blocks' states served."""
        keys = row_keys(batch.inputs, self.padded) if _active(self.run) <= self.active else None
        if keys is None:
            return Run.outputs(self.run, batch)
        self.states = self._states(batch.inputs, keys)
        try:
            return self.run.model(**batch.inputs, **self.options)
        finally:
            self.states = None

    def _states(self, inputs: dict[str, Tensor], keys: list[bytes]) -> dict[int, Tensor]:
        precision = precision_mark(self.run.device)
        marks = {index: self._marks[index] + precision for index in self.frozen.needed}
        missing = self._missing(keys, marks)
        if missing and self.groups is not None and not self.full:
            for group in self.groups.of([keys[i] for i in missing]):
                self._fill(group, marks)
            missing = self._missing(keys, marks)
        mask = inputs.get("attention_mask")
        rows = {index: [self.store.get((mark, key)) for key in keys] for index, mark in marks.items()}
        if missing:
            at = torch.tensor(missing, device=self.run.device)
            fresh = self._compute({name: value[at] for name, value in inputs.items()})
            for index, states in fresh.items():
                for i, row in zip(missing, _rows(states, None if mask is None else mask[at]), strict=True):
                    rows[index][i] = row
            self._keep({marks[n]: {keys[i]: rows[n][i] for i in missing} for n in marks})
        self.computed += len(missing)
        self.served += len(keys) - len(missing)
        return {index: _padded(values, mask, self.run.device) for index, values in rows.items()}

    def _missing(self, keys: list[bytes], marks: dict[int, bytes]) -> list[int]:
        return [i for i, key in enumerate(keys) if any((m, key) not in self.store for m in marks.values())]

    def _fill(self, group: Any, marks: dict[int, bytes]) -> None:
        """The states of a whole group are computed and kept."""
        keys = row_keys(group.inputs, self.padded)
        if keys is not None and not self.full:
            mask = group.inputs.get("attention_mask")
            fresh = self._compute(group.inputs)
            self._keep(
                {marks[n]: dict(zip(keys, _rows(states, mask), strict=True)) for n, states in fresh.items()}
            )
            self.computed += len(keys)

    def _keep(self, new: dict[bytes, dict[bytes, Any]]) -> None:
        """Rows go into the store, all their depths together, until it is full."""
        for key in next(iter(new.values())):
            group = {
                (mark, key): states[key] for mark, states in new.items() if (mark, key) not in self.store
            }
            size = sum(value.nbytes for value in group.values())
            if self.used + size > self.limit:
                self.full = True
                return
            self.store.update({k: value.detach().to("cpu", copy=True) for k, value in group.items()})
            self.used += size

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The frozen blocks and the run ask here first, for the time of a `with` block."""
        served = [Served.install(self, i, block) for i, block in enumerate(self.frozen.blocks)]
        self.run.__dict__["outputs"] = self.outputs
        try:
            yield
        finally:
            del self.run.__dict__["outputs"]
            for block, one in zip(self.frozen.blocks, served, strict=True):
                one.remove(block)


@contextmanager
def frozen_features(
    run: Run, store: Store, *, limit_bytes: int, order: int | None = None
) -> Iterator[Features]:
    """With h_k the states after the k blocks below a recipe's lowest change, `run` gets h_k(row) from `store`.

    The k blocks are the same in every step, epoch and trial, so they run once per row, in evaluation mode also
    while training; equal up to rounding to computing them anew (`limit_bytes=0` keeps nothing and does just
    that). `store` is a plain dict that outlives the trial; its entries name the weights, the depth, the
    precision and the encoded row, so trials on several models may share it. With a seed as `order`, rows of the
    run's streams are computed in the batches of that seed's first epoch, so that states are equal bit for bit
    whoever asks first (up to the limit); without, in the batches in which they are asked for. Where equal
    results are not certain nothing is served, and `reason` of the yielded `Features` says why. The model must
    not be changed below the recipe's sites inside the `with` block; on leaving it, the model is what it was.
    """
    features = Features(run, store, limit_bytes, order)
    if not features.blocks:
        yield features
        return
    try:
        with features.installed():
            yield features
    finally:
        if isinstance(store, FeatureFolder):
            store.write()


def _bytes(store: Store) -> int:
    """What is kept already, without reading it."""
    return store.nbytes if isinstance(store, FeatureFolder) else sum(v.nbytes for v in store.values())


def _active(run: Run) -> set[Any]:
    return {handle for handle in handles(run.model).values() if handle.active}


def _length(example: dict[str, Any]) -> int:
    return int(example.get("length", 0))


def _rows(states: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Each row's states without those of padding."""
    return [row if mask is None else row[mask[i].bool()] for i, row in enumerate(states)]


def _padded(rows: list[Any], mask: Tensor | None, device: torch.device) -> Tensor:
    if mask is None:
        return torch.stack([row.to(device) for row in rows])
    flat = torch.cat([row.to(device) for row in rows])
    whole = flat.new_zeros(*mask.shape, flat.shape[-1])
    whole[mask.bool()] = flat
    return whole


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to what the order of sums does in this precision."""
    if a.shape != b.shape:
        return False
    bound = 1e-4 if a.dtype in (torch.float32, torch.float64) else 3e-2
    a, b = a.double(), b.double()
    return bool((a - b).abs().mean() <= bound * a.abs().mean())
