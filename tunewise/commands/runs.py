"""What can be done with a finished run: `predict`, `eval`, `merge`, `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from .console import Output

__all__ = ["evaluate", "export", "merge", "predict"]

QUIET = Output()
Run = Annotated[Path, Parameter(help="Folder that `tunewise tune --out` wrote.")]


def predict(
    run: Run,
    rows: Annotated[str, Parameter(help="File, folder, demo name or datasets id.")],
    /,
    *,
    out: Annotated[Path | None, Parameter(help="Write JSON lines here instead of printing them.")] = None,
    output: Output = QUIET,
) -> None:
    """Predict with a finished run; prints one JSON object per row.

    For example:

    ```
    tunewise predict runs/a new.csv
    tunewise predict runs/a new.csv --out predictions.jsonl
    ```
    """
    folder = _folder(run)
    from tunewise.tune import predict as run_predict

    found = run_predict(folder, rows)
    if output.json:
        output.result(found)
        return
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in found]
    if out is None:
        for line in lines:
            print(line)
        return
    _write(out, "".join(line + "\n" for line in lines))
    output.say(f"{len(lines):,} predictions: {out}")


def evaluate(
    run: Run,
    data: Annotated[
        str | None, Parameter(help="Rows with labels; the run's own test rows if not given.")
    ] = None,
    /,
    *,
    output: Output = QUIET,
) -> None:
    """Measure a finished run, on its own test rows or on other data.

    For example:

    ```
    tunewise eval runs/a
    tunewise eval runs/a reviews/amazon --json
    ```
    """
    folder = _folder(run)
    from tunewise.tune import evaluate as run_evaluate

    found: dict[str, Any] = run_evaluate(folder, data)
    output.result(found)


def merge(
    run: Run,
    /,
    *,
    out: Annotated[Path, Parameter(help="Folder of the merged model.")],
    output: Output = QUIET,
) -> None:
    """Write the tuned model as a plain Hugging Face folder, which loads without Tunewise.

    For example:

    ```
    tunewise merge runs/a --out merged
    ```
    """
    folder = _folder(run)
    from tunewise.tune import merge_run

    merge_run(folder, out)
    output.result({"model": str(out)}, human=f"Merged model: {out}")


def export(
    run: Run,
    /,
    *,
    to: Annotated[Literal["peft", "lora", "hf", "tunewise"], Parameter(help="Format that is written.")],
    out: Annotated[Path, Parameter(help="Folder that is written.")],
    output: Output = QUIET,
) -> None:
    """Write a finished run in another library's format.

    For example:

    ```
    tunewise export runs/a --to peft --out adapter
    ```
    """
    folder = _folder(run)
    from tunewise.tune import export_run

    facts = export_run(folder, to, out)
    told = {key: facts[key] for key in ("relative_error", "rank") if key in facts}
    output.result(
        {"folder": str(out), "format": to, **told}, human=f"Exported as {to}: {out}{_exactness(facts)}"
    )


def _exactness(facts: dict[str, Any]) -> str:
    """How far an export is from the change that was trained, |dW - B A| / |dW|."""
    if "rank" not in facts:
        return ""
    off, rank = facts["relative_error"], facts["rank"]
    if off < 1e-4:
        return f"\nPlain LoRA of rank {rank}, exact but for rounding (relative error {off:.1e})."
    return (
        f"\nPlain LoRA of rank {rank} holds the trained change but for a relative error of {off:.3f}; "
        "export.json has it for each layer."
    )


def _folder(run: Path) -> Path:
    from tunewise.core.errors import UserError, did_you_mean

    if not run.is_dir():
        parent = run.parent if run.parent.is_dir() else Path(".")
        near = [str(p) for p in parent.iterdir() if (p / "run.json").is_file()]
        raise UserError(f"The run folder {run} does not exist{did_you_mean(str(run), near)}")
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is not the folder of a run: it holds no run.json.")
    return run


def _write(path: Path, text: str) -> None:
    from tunewise.core.errors import UserError

    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None
