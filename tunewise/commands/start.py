"""`tunewise demo` and `tunewise tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from .console import Flag, Output, Whole, settings

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
    task: Annotated[str | None, Parameter(help="Detected from the data if not given.")] = None,
    train: Annotated[str | None, Parameter(help="File of the training rows.")] = None,
    valid: Annotated[str | None, Parameter(help="File of the validation rows.")] = None,
    test: Annotated[str | None, Parameter(help="File of the test rows.")] = None,
    text_column: Annotated[str | None, Parameter(help='Column of the text; "a,b" for pairs.')] = None,
    label_column: Annotated[str | None, Parameter(help="Column of the answer.")] = None,
    metric: Annotated[str | None, Parameter(help="Metric that decides which checkpoint is best.")] = None,
    lr: Annotated[float | None, Parameter(help="Learning rate; each method has a default.")] = None,
    batch_size: Annotated[Whole | None, Parameter(help="Rows per optimizer step.")] = None,
    epochs: Annotated[float | None, Parameter(help="Passes over the training rows.")] = None,
    steps: Annotated[Whole | None, Parameter(help="Optimizer steps, instead of epochs.")] = None,
    max_length: Annotated[Whole | None, Parameter(help="Longest row in tokens.")] = None,
    dtype: Annotated[str | None, Parameter(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    seed: Annotated[Whole, Parameter(help="Decides order, dropout and start values.")] = 0,
    out: Annotated[Path | None, Parameter(help="Folder of the run; needed for --resume.")] = None,
    resume: Annotated[Flag, Parameter(help="Go on where a stopped run stopped.")] = False,
    dry_run: Annotated[Flag, Parameter(help="Show sites, tensors, counts, call order.")] = False,
    skip_bad_rows: Annotated[Flag, Parameter(help="Leave out unreadable rows, counted.")] = False,
    checkpoint_every: Annotated[Whole | None, Parameter(help="Steps between checkpoints.")] = None,
    set_: Annotated[
        list[str] | None,
        Parameter(name="--set", negative="", help="name=value: another option of the loop; repeatable."),
    ] = None,
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
    from tunewise.core.errors import UserError

    if data is None and train is None:
        raise UserError("tune needs DATA, or --train with a file of rows.")
    options = read_options(set_ or [])
    from tunewise.tune import tune as run_tune

    result = run_tune(
        model,
        data,
        method=method,
        task=task,
        train=train,
        valid=valid,
        test=test,
        text_column=text_column,
        label_column=label_column,
        metric=metric,
        lr=lr,
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        max_length=max_length,
        dtype=dtype,
        device=device,
        seed=seed,
        out=out,
        resume=resume,
        dry_run=dry_run,
        skip_bad_rows=skip_bad_rows,
        checkpoint_every=checkpoint_every,
        options=options,
        say=output.say,
        progress=output.progress,
    )
    if dry_run:
        from .plan import plan_view

        output.result(result.plan, human=plan_view(result.plan or {}))
        return
    output.result(result.summary(), human=settings(result.metrics))
    if result.directory is not None:
        output.say(f"Run: {result.directory}")


def read_options(given: list[str]) -> dict[str, Any]:
    """`name=value` pairs, values as in YAML (2e-5 is a number); UserError for one without `=`."""
    from tunewise.core.errors import UserError
    from tunewise.core.method import read_yaml

    found: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise UserError(f'--set takes name=value, not "{item}".')
        if name.strip() in found:
            raise UserError(f'--set names "{name.strip()}" twice.')
        found[name.strip().replace("-", "_")] = read_yaml(value, f"--set {item}")
    return found
