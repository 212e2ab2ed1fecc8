"""`tunewise demo` and `tunewise tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .console import Flag, Output, Whole, settings
from .options import LOOP, ROWS, Loop, Rows

__all__ = ["demo", "tune"]

QUIET = Output()


def demo(
    *,
    out: Annotated[Path, Parameter(help="Folder for the runs and the report.")] = Path("demo-run"),
    quick: Annotated[Flag, Parameter(help="A tiny model, in seconds.")] = False,
    output: Output = QUIET,
) -> None:
    """The main job on real data: four methods and two baselines, a table and a report.

    Fine-tunes a 22.7 M encoder on 2,000 movie-review sentences, in less than 8 minutes on 2 cores.
    """
    from tunewise.demo import run_demo

    found = run_demo(out, quick=quick, say=output.say, progress=output.progress)
    output.result(found.summary(), human=found.table())
    output.say(f"Report: {found.report}")


def tune(
    model: Annotated[str, Parameter(help="A folder, a demo name (minilm) or a hub id.")],
    data: Annotated[
        str | None,
        Parameter(help="A file, a folder, a demo name (reviews) or a datasets id; or see --train."),
    ] = None,
    /,
    *,
    method: Annotated[str, Parameter(help='For example lora, "lora(rank=4)", "lora + lisa", my.yaml.')],
    test: Annotated[str | None, Parameter(help="File of the test rows.")] = None,
    metric: Annotated[str | None, Parameter(help="Metric that decides which checkpoint is best.")] = None,
    lr: Annotated[float | None, Parameter(help="Learning rate; each method has a default.")] = None,
    epochs: Annotated[float | None, Parameter(help="Passes over the training rows.")] = None,
    steps: Annotated[Whole | None, Parameter(help="Optimizer steps, instead of epochs.")] = None,
    out: Annotated[Path | None, Parameter(help="Folder of the run; needed for --resume.")] = None,
    resume: Annotated[Flag, Parameter(help="Go on where a stopped run stopped.")] = False,
    dry_run: Annotated[Flag, Parameter(help="Show sites, tensors, counts, call order.")] = False,
    checkpoint_every: Annotated[Whole | None, Parameter(help="Steps between checkpoints.")] = None,
    rows: Rows = ROWS,
    loop: Loop = LOOP,
    output: Output = QUIET,
) -> None:
    """Fine-tune MODEL on DATA by one method.

    For example:

    ```
    tunewise tune minilm reviews --method lora --out runs/a
    tunewise tune ./my-model rows.csv --method "lora(rank=4)" --label-column grade
    tunewise tune tiny-roberta peptides --method full --steps 20 --dry-run
    ```
    """
    given = {**rows.given("tune", data), **loop.given()}
    from tunewise.tune import tune as run_tune

    result = run_tune(
        model,
        data,
        method=method,
        test=test,
        metric=metric,
        lr=lr,
        epochs=epochs,
        steps=steps,
        out=out,
        resume=resume,
        dry_run=dry_run,
        checkpoint_every=checkpoint_every,
        say=output.say,
        progress=output.progress,
        **given,
    )
    if dry_run:
        from .plan import plan_view

        output.result(result.plan, human=plan_view(result.plan or {}))
        return
    output.result(result.summary(), human=settings(result.metrics))
    if result.directory is not None:
        output.say(f"Run: {result.directory}")
