"""One pass over rows for all starts that need them: the inputs of the layers, padding left out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunewise.core.delta import device_of
from tunewise.core.errors import UserError
from tunewise.core.handle import Handle
from tunewise.core.run import Run
from tunewise.core.tensors import Tensors
from tunewise.sites import Site

from .base import Init, put_start, site_weight
from .collect import Collector

__all__ = ["DataInit", "calibrate"]

IGNORED = -100
Inputs = Mapping[str, Any]
Batches = Callable[[], Iterable[tuple[Inputs, Tensor | None]]]


class DataInit(Init):
    """A start that reads rows: `collector` says what is kept of a site's inputs, `factors` what follows from it.

    rows     no more rows than these are read
    repeats  whether rows are read again until `wanted` is empty
    """

    data: ClassVar[bool] = True
    repeats: ClassVar[bool] = False
    rows: int

    def collector(self, width: int, rank: int) -> Collector:
        """What is kept of the inputs `[n, width]` of one site."""
        raise NotImplementedError

    def wanted(self, found: Mapping[str, Any], rank: int) -> set[str]:
        """The sites whose inputs are still to be read; none: enough was read."""
        return set(found)

    def ranks(self, found: Mapping[str, Any], rank: int) -> dict[str, int]:
        """{site: its rank}."""
        return dict.fromkeys(found, rank)

    def prepare(self, run: Run) -> None:
        """Finds the starts of all deltas that wait for rows, once; also those of the other parts."""
        if not _waiting(run.handle):
            return
        if run.task is None or not {"calibration", "train"} & set(run.streams.data):
            raise UserError(
                f"{type(self).__name__} starts from rows: call tw.calibrate(handle, batches) before training."
            )
        size = getattr(run.settings, "batch_size", 8)
        stream = run.batches("calibration", size)

        def batches() -> Iterator[tuple[Inputs, Tensor | None]]:
            for _ in range(len(stream)):
                batch = run.collate(next(stream))
                yield batch.inputs, batch.labels

        run.log(**_calibrated(run.handle, batches))


def calibrate(handle: Handle, batches: Iterable[Inputs]) -> dict[str, Any]:
    """Finds the starts of `handle` that need rows (EVA, CorDA), for a loop of one's own; W' = W afterwards too.

    batches  dicts of model inputs; `attention_mask` and `labels` (-100) say which positions count. What can be
             iterated more than once is, where a start asks for more.
    Before the optimizer is made: EVA changes ranks. Gives {"calibration_rows", "unconverged": sites that had
    not converged when the rows ended}. Raises `UserError` where nothing waits for rows, for no rows, and for sites
    whose inputs cannot be seen.
    """
    if not _waiting(handle):
        raise UserError("No start of this adaptation waits for rows.")
    given = batches if iter(batches) is not batches else None
    device = device_of(handle.model)

    def moved() -> Iterator[tuple[Inputs, Tensor | None]]:
        for inputs in batches if given is None else given:
            yield (
                {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()},
                inputs.get("labels"),
            )

    facts = _calibrated(handle, moved)
    handle.run = handle.run or Run(handle)
    handle.run.lifecycle.fired["prepare"] += 1
    return facts


@dataclass
class _Job:
    """One delta that waits, and what was found for it."""

    part: Any
    sites: list[tuple[str, Site, Any]]
    found: dict[str, Collector] = field(default_factory=dict)

    def wanted(self, rows: int) -> set[str]:
        init: DataInit = self.part.init
        return init.wanted(self.found, self.part.rank) if rows < init.rows else set()


def _waiting(handle: Handle) -> list[_Job]:
    jobs: dict[int, _Job] = {}
    for key, site, t in handle.sites:
        if "calibrated" in t.meta and not bool(t.calibrated):
            jobs.setdefault(id(t.part), _Job(t.part, [])).sites.append((key, site, t))
    return list(jobs.values())


@torch.no_grad()
def _calibrated(handle: Handle, batches: Batches) -> dict[str, Any]:
    jobs = _waiting(handle)
    for job in jobs:
        for _, site, _ in job.sites:
            if site.kind != "linear":
                raise UserError(
                    f"{type(job.part.init).__name__} reads the inputs of linear layers; {site.name} is one of "
                    f"{site.kind}: choose other sites, or a start from weights such as SVD."
                )
    can_be_off = handle.undo or not handle.existing
    with handle.disabled() if can_be_off else nullcontext(), _evaluating(handle.model):
        rows = _collect(handle.model, jobs, batches)
    unconverged = 0
    for job in jobs:
        unconverged += len(job.part.init.wanted(job.found, job.part.rank)) if job.part.init.repeats else 0
        _put(handle, job)
    return {"calibration_rows": rows, "unconverged": unconverged}


def _collect(model: nn.Module, jobs: list[_Job], batches: Batches) -> int:
    """Feeds the collectors, one for all sites with the same inputs; gives the number of rows that were read."""
    modules = {site.name: site.module for job in jobs for _, site, _ in job.sites}
    stream = iter(batches())
    first = next(stream, None)
    if first is None:
        raise UserError("Calibration got no batch of rows.")
    same = _same_inputs(model, modules, first[0])
    for job in jobs:
        made: dict[int, Collector] = {}
        for _, site, _ in job.sites:
            assert site.in_features is not None
            new = job.part.init.collector(site.in_features, job.part.rank)
            job.found[site.name] = made.setdefault(same[site.name], new)
    rows, stream = 0, chain([first], stream)
    while any(job.wanted(rows) for job in jobs):
        before = rows
        for inputs, labels in stream:
            wanted = [c for job in jobs for c in {job.found[n] for n in job.wanted(rows)}]
            if not wanted:
                break
            _feed(model, jobs, modules, wanted, inputs, labels)
            rows += len(next(v for v in inputs.values() if torch.is_tensor(v)))
        if rows == before or not any(job.part.init.repeats and job.wanted(rows) for job in jobs):
            break
        stream = iter(batches())
    for job in jobs:
        for name, collector in job.found.items():
            if collector.empty:
                raise UserError(f"Calibration saw too few inputs of {name}: give more rows.")
    return rows


def _feed(
    model: nn.Module,
    jobs: list[_Job],
    modules: dict[str, nn.Module],
    wanted: list[Collector],
    inputs: Inputs,
    labels: Tensor | None,
) -> None:
    owners: dict[str, list[Collector]] = {}
    for collector in wanted:  # the first of the sites that share it listens for all
        name = next(n for job in jobs for n, c in job.found.items() if c is collector)
        owners.setdefault(name, []).append(collector)
    masks = _masks(inputs, labels)

    def take(name: str, x: Tensor) -> None:
        rows = _counted(x.detach(), masks)
        for collector in owners[name] if len(rows) else ():
            collector.add(rows)

    with _listening({name: modules[name] for name in owners}, take):
        model(**inputs)


def _masks(inputs: Inputs, labels: Tensor | None) -> list[Tensor]:
    """Bool masks of positions that count: of the input, and of the answer where that has a shape of its own."""
    mask, learnt = inputs.get("attention_mask"), None
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        learnt = labels != IGNORED
    found = [mask.bool()] if mask is not None and mask.dim() == 2 else []
    if learnt is None:
        return found
    learnt = learnt.to(found[0].device) if found else learnt
    return [found[0] & learnt] if found and found[0].shape == learnt.shape else [*found, learnt]


def _counted(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The rows `[n, in]` of x at positions that count; all where x has no such positions."""
    flat = x.reshape(-1, x.shape[-1])
    mask = next((m for m in masks if m.shape == x.shape[:-1] or (x.dim() == 2 and m.numel() == len(x))), None)
    return flat if mask is None else flat[mask.flatten().to(x.device)]


def _same_inputs(model: nn.Module, modules: dict[str, nn.Module], inputs: Inputs) -> dict[str, int]:
    """{site: number}; sites that got the very same tensors in one forward pass have the same number."""
    alive: dict[int, tuple[weakref.ref[Tensor], int]] = {}
    calls: dict[str, list[int]] = {name: [] for name in modules}

    def take(name: str, x: Tensor) -> None:
        known = alive.get(id(x))
        if known is None or known[0]() is not x:
            known = alive[id(x)] = (weakref.ref(x), sum(map(len, calls.values())))
        calls[name].append(known[1])

    with _listening(modules, take):
        model(**inputs)
    for name, seen in calls.items():
        if not seen:
            raise UserError(f"Calibration saw no input of {name}: leave it out of the sites.")
    numbers: dict[tuple[int, ...], int] = {}
    return {name: numbers.setdefault(tuple(seen), len(numbers)) for name, seen in calls.items()}


@contextmanager
def _listening(modules: dict[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(name, next(v for v in (*args, *kwargs.values()) if torch.is_tensor(v)))

        return call

    hooks = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in was.items():
            module.training = mode


def _put(handle: Handle, job: _Job) -> None:
    part, init = job.part, job.part.init
    tensors = handle.run.tensors if handle.run is not None else Tensors(handle)
    ranks = init.ranks(job.found, part.rank)
    for key, site, t in job.sites:
        start = init.factors(site_weight(site), ranks[site.name], part.s, job.found[site.name])
        for name, value in (("A", start.A), ("B", start.B)):
            if (
                getattr(t, name).shape != value.shape
            ):  # in rows, as a checkpoint brings it back: sums round alike
                room = torch.empty(value.shape)
                tensors.replace(f"{site.name}.{key}.{name}", room.to)
        put_start(t, start)
        t.calibrated.fill_(True)
