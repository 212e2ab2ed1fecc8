"""What a run will cost, before any weight is loaded: parameters exactly, peak memory and time by counting."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack

from tunewise.prepare import Prepared, RowArgs, complete, default_sizes, encode, load_base, prepare_data

if TYPE_CHECKING:
    from tunewise.core.run import Run
    from tunewise.loop.settings import Settings
    from tunewise.study.estimate.timing import Clock

__all__ = ["Estimate", "estimate"]

Say = Callable[[str], None]
MIB = 2**20
# What a process takes beyond what is alive while glibc chooses when to give memory back: the median of the cells
# "default" in benchmarks/results/estimate.json. Frozen states stay until the end, so nothing is kept beyond them.
HEAP = 1.5


@dataclass
class Estimate:
    """`seconds` and `peak_memory_mb` are of the training loop, as a finished run reports them.

    alive_mb is the part of the peak that tensors take, 0 where it was measured
    how      "counted" without weights, or "measured" on the loaded model; `reason` says why it was measured
    memory   parts of the peak in MiB; they do not add up exactly: not all are alive at one moment, and the
             process keeps more than is alive, as `assumes` says
    assumes  what the numbers rest on, in sentences
    """

    method: str
    model: str
    data: str
    trainable: int
    total: int
    steps: int
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    alive_mb: float = 0.0
    step_seconds: float = 0.0
    step_gflops: float | None = None
    size_mb: float = 0.0
    how: str = "counted"
    reason: str = ""
    memory: dict[str, float] = field(default_factory=dict)
    assumes: list[str] = field(default_factory=list)


def estimate(
    model: Any,
    data: Any,
    *,
    method: Any = "lora",
    batch_size: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    seed: int = 0,
    options: dict[str, Any] | None = None,
    tokenizer: Any = None,
    say: Say | None = None,
    **rows: Unpack[RowArgs],
) -> Estimate:
    """The cost of `tune` with the same arguments; reads rows, tokenizer and configuration, no weights.

    Two steps of the method are counted on tensors without values, on a typical and on the largest batch of
    this run; each distinct operation of them is then timed on this machine. A method that cannot be
    counted is measured for two steps on the loaded model, and `reason` says why.
    Raises `UserError` for whatever `tune` would refuse.
    """
    import torch

    from tunewise.loop.settings import Settings
    from tunewise.loop.single import Single
    from tunewise.machine import pick_device
    from tunewise.study.estimate.measure import measure
    from tunewise.study.estimate.timing import now_of
    from tunewise.tune import FEATURES

    say = say or (lambda sentence: None)
    if isinstance(model, tuple):
        model, tokenizer = model
    target = pick_device(device)
    complete(method, None, None)
    given = {"batch_size": batch_size, "epochs": epochs, "steps": steps, "dtype": dtype}
    given = {k: v for k, v in given.items() if v is not None} | (options or {})
    Settings.of(**given)
    read = prepare_data(data, say=say, **rows)
    settings = Settings.of(**{**default_sizes(read.task.name, target.type), **given})
    own = hasattr(model, "parameters")
    with torch.random.fork_rng(devices=[]):
        prepared = load_base(model, tokenizer, method, read, target, say, meta=not own)
        encode(prepared, ("train", "valid"), say)
        loop = prepared.recipe.single("loop")
        reason = ""
        if isinstance(loop, Single):
            try:
                return _counted(prepared, settings, seed, target)
            except RuntimeError as error:  # what has no shape without its values
                reason = f"it cannot be counted without values ({' '.join(str(error).split())[:200]})"
        else:
            reason = f"{type(loop).__name__} is no loop of steps"
        say(f"{prepared.recipe.name} is measured on the loaded model: {reason}.")
        if not own:
            loaded = load_base(model, tokenizer, method, read, target, say)
            loaded.examples = prepared.examples
            prepared = loaded
        return measure(prepared, settings, seed, reason, FEATURES, now_of(target))


def _counted(prepared: Prepared, settings: Settings, seed: int, device: Any) -> Estimate:
    from tunewise.core.handle import attach
    from tunewise.core.run import Run
    from tunewise.machine import resident
    from tunewise.study.estimate.count import Counter, bytes_of, fake_copy, fake_mode
    from tunewise.study.estimate.states import Kept
    from tunewise.study.estimate.steps import count_looks, count_steps
    from tunewise.study.estimate.timing import Clock, warm_up
    from tunewise.tune import FEATURES

    warm_up(device)
    clock = Clock(device)
    process = resident() if device.type == "cpu" else 0
    mode = fake_mode()
    twin = fake_copy(prepared.model, mode, device)
    with mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about addresses that tensors without values do not have
        handle = attach(twin, prepared.recipe, undo=prepared.own_model)
    run = Run(handle, data=prepared.examples, task=prepared.data.task, seed=seed, settings=settings)
    run.tokenizer = prepared.tokenizer
    places = [*twin.parameters(), *twin.buffers(), *(e.original for e in handle.existing.values())]
    weights, state = bytes_of(places), sum(_size(v) for v in handle.state().values())
    counter = Counter(mode)
    counter.ignore(places)
    states = Kept(run, counter, FEATURES)
    with states.served():
        trained = count_steps(run, counter, clock, states)
        looked = count_looks(run, counter, clock, states)
    best = state if looked.times > 1 else 0
    peak = weights + max(
        trained.peak + best,
        looked.peak + best,
        trained.kept + trained.states + best + (state if looked.times else 0),
    )
    heap = HEAP if _heap_grows(device) else 1.0
    memory = {
        "process": process,
        "weights": weights,
        "gradients": trained.gradients,
        "moments": trained.moments,
        "best state": best,
        **({"frozen states": trained.states} if states.blocks else {}),
        "activations": max(trained.alive - trained.kept, looked.alive - trained.kept, 0),
    }
    return Estimate(
        **facts(prepared, run),
        steps=trained.steps,
        seconds=trained.steps * trained.seconds + looked.times * looked.seconds,
        step_seconds=trained.seconds,
        step_gflops=trained.flops / 1e9,
        peak_memory_mb=(process + trained.states + heap * (peak - trained.states)) / MIB,
        alive_mb=peak / MIB,
        size_mb=state / MIB,
        memory={name: value / MIB for name, value in memory.items()},
        assumes=_assumptions(clock, settings, device) + states.assumes(),
    )


def facts(prepared: Prepared, run: Run) -> dict[str, Any]:
    """What is known exactly."""
    base = {id(p): p.numel() for n, p in run.model.named_parameters() if ".tw_" not in f".{n}"}
    return {
        "method": prepared.recipe.name,
        "model": str(prepared.base.get("name") or prepared.base.get("class")),
        "data": prepared.data.name,
        "trainable": run.handle.trainable,
        "total": sum(base.values()),
    }


def _size(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _assumptions(clock: Clock, settings: Settings, device: Any) -> list[str]:
    found = [
        f"Every distinct operation was timed on {device} just now, in {settings.dtype}; "
        f"on the whole {clock.rate / 1e9:,.0f} GFLOP/s of matrix products.",
    ]
    if clock.skipped:
        found.append(f"Not timed, since they do not run alone: {', '.join(sorted(clock.skipped))}.")
    if _heap_grows(device):
        found.append(
            f"glibc's malloc keeps freed memory, so the peak holds {HEAP} times what comes and goes; "
            "with MALLOC_MMAP_THRESHOLD_=65536 in the environment it does not."
        )
    return found


def _heap_grows(device: Any) -> bool:
    """Whether freed memory stays with the process: glibc raises its threshold unless it is set."""
    glibc = platform.libc_ver()[0] == "glibc"
    return device.type == "cpu" and glibc and "MALLOC_MMAP_THRESHOLD_" not in os.environ
