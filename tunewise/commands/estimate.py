"""`tunewise estimate`: what a run would cost, before any weight is loaded."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from .console import Output, Whole, number, settings
from .options import LOOP, ROWS, Loop, Rows

__all__ = ["estimate"]

QUIET = Output()


def estimate(
    model: Annotated[str, Parameter(help="A folder, a demo name (minilm) or a hub id.")],
    data: Annotated[
        str | None,
        Parameter(help="A file, a folder, a demo name (reviews) or a datasets id; or see --train."),
    ] = None,
    /,
    *,
    method: Annotated[str, Parameter(help='For example lora, "lora(rank=4)", "lora + lisa", my.yaml.')],
    epochs: Annotated[float | None, Parameter(help="Passes over the training rows.")] = None,
    steps: Annotated[Whole | None, Parameter(help="Optimizer steps, instead of epochs.")] = None,
    rows: Rows = ROWS,
    loop: Loop = LOOP,
    output: Output = QUIET,
) -> None:
    """Estimate parameters, peak memory and time of `tune` with the same options.

    No weights are read: two steps are counted on tensors without values. For example:

    ```
    tunewise estimate minilm reviews --method lora
    tunewise estimate smollm2 gsm8k --method full --steps 30 --dtype bfloat16 --json
    ```
    """
    import dataclasses

    given = {**rows.given("estimate", data), **loop.given()}
    from tunewise.study.estimate.estimate import estimate as run_estimate

    found = run_estimate(model, data, method=method, epochs=epochs, steps=steps, say=output.say, **given)
    output.result(dataclasses.asdict(found), human=_view(found))
    for sentence in found.assumes:
        output.say(sentence)


def _view(found: Any) -> Any:
    """The estimate as people read it."""
    share = found.trainable / found.total if found.total else 0.0
    facts = {
        "method": found.method,
        "trainable": f"{found.trainable:,} of {found.total:,} ({share:.2%})",
        "peak memory": f"{found.peak_memory_mb:,.0f} MiB",
        **{f"  {name}": f"{value:,.1f} MiB" for name, value in found.memory.items()},
        "adaptation": f"{found.size_mb:,.2f} MiB on disk",
        "time": _duration(found.seconds),
    }
    if found.steps:
        work = "" if found.step_gflops is None else f", {number(found.step_gflops)} GFLOP each"
        facts["steps"] = f"{found.steps:,} of {found.step_seconds:.3g} s{work}"
    facts["how"] = found.how + (f": {found.reason}" if found.reason else "")
    return settings(facts)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
