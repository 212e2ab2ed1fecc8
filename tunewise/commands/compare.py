"""`tunewise compare` and `tunewise report`: many methods on one data set, and the page about them."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from .console import Flag, Output, Whole
from .options import LOOP, ROWS, Loop, Rows

if TYPE_CHECKING:
    from tunewise.study.study import Study

__all__ = ["compare", "report"]

QUIET = Output()
STUDY, RUN = "study.sqlite", "run.json"
# A file and a pipe have lines of any length.
NO_LIMIT = 10_000


def compare(
    model: Annotated[str, Parameter(help="A folder, a demo name (minilm) or a hub id.")],
    data: Annotated[
        str | None,
        Parameter(help="A file, a folder, a demo name (reviews) or a datasets id; or see --train."),
    ] = None,
    /,
    *,
    methods: Annotated[
        str, Parameter(help='default, all, or a list: "lora, ia3, lora(rank=4)".')
    ] = "default",
    budget: Annotated[str, Parameter(help="Time for everything: 30m, 1h30m.")] = "10m",
    memory: Annotated[str | None, Parameter(help="Memory for everything at any moment: 4GB.")] = None,
    seeds: Annotated[Whole, Parameter(help="Seeds of the finalists.")] = 3,
    prefer: Annotated[
        str, Parameter(help='What is chosen: quality, size, "quality within 1%, then memory".')
    ] = "quality",
    out: Annotated[Path | None, Parameter(help="Folder of the study; default: study-MODEL-DATA.")] = None,
    dry_run: Annotated[Flag, Parameter(help="Show what each method would get, and stop.")] = False,
    general: Annotated[str | None, Parameter(help="Text on which forgetting shows; default: news.")] = None,
    test: Annotated[str | None, Parameter(help="File of the test rows.")] = None,
    metric: Annotated[str | None, Parameter(help="Metric that decides which method is best.")] = None,
    workers: Annotated[Whole | None, Parameter(help="Trials side by side; default: by the machine.")] = None,
    rows: Rows = ROWS,
    loop: Loop = LOOP,
    output: Output = QUIET,
) -> None:
    """Compare methods on DATA within a budget: tunes each one's learning rate, measures the best, chooses.

    Stop it at any time: the same command goes on where it stopped. For example:

    ```
    tunewise compare minilm reviews --budget 30m
    tunewise compare minilm reviews --budget 30m --dry-run
    tunewise compare ./my-model rows.csv --methods "lora, full, ia3" --prefer "quality within 1%, then memory"
    ```
    """
    from tunewise.core.errors import RunError

    given: dict[str, Any] = {
        **rows.given("compare", data),
        **loop.given(),
        "methods": methods,
        "budget": budget,
        "memory": memory,
        "seeds": seeds,
        "prefer": prefer,
        "general": general,
        "test": test,
        "metric": metric,
        "workers": workers,
        "say": output.say,
    }
    folder = out or default_folder(model, data or str(rows.train))
    if dry_run:
        _plan_only(model, data, folder, given, output)
        return
    from tunewise.study.compare import compare as run_compare

    if (folder / STUDY).is_file():
        output.say(f"Going on with the study in {folder}.")
    elif out is None:
        output.say(f"Folder of the study: {folder} (with it the same command again goes on).")
    study = run_compare(model, data, out=folder, progress=output.progress and not output.json, **given)
    _show(study, output)
    if study.findings["choice"] is None:
        raise RunError(study.decision[0])


def report(
    study: Annotated[
        Path, Parameter(help="Folder of a comparison, also of one that still runs, or of a run.")
    ],
    /,
    *,
    prefer: Annotated[
        str | None, Parameter(help="Another choice than the study's own; `best` becomes that one.")
    ] = None,
    output: Output = QUIET,
) -> None:
    """Write report.html anew from what is in a study's folder, and put the chosen run into `best`.

    For example:

    ```
    tunewise report study-minilm-reviews
    tunewise report study-minilm-reviews --prefer "quality within 1 point, then size"
    ```
    """
    from tunewise.core.errors import UserError, did_you_mean

    if not study.is_dir():
        parent = study.parent if study.parent.is_dir() else Path(".")
        near = [str(p) for p in parent.iterdir() if (p / STUDY).is_file() or (p / RUN).is_file()]
        raise UserError(f"The folder {study} does not exist{did_you_mean(str(study), near)}")
    try:
        if (study / STUDY).is_file():
            _show(_conclude(study, prefer), output)
        elif not (study / RUN).is_file():
            raise UserError(f"{study} is neither a study nor a run: it holds no {STUDY} and no {RUN}.")
        elif prefer is not None:
            raise UserError(f"{study} is one run: there is nothing to choose by --prefer.")
        else:
            from tunewise.study.report.run_report import run_report

            page = run_report(study)
            output.result({"directory": str(study), "report": str(page)}, human=f"Report: {page}")
    except PermissionError as error:
        raise UserError(f"{error.filename or study} cannot be written: {error.strerror}.") from None


def default_folder(model: str, data: str) -> Path:
    """study-MODEL-DATA in the current folder, so that the same command finds its study again."""
    return Path("-".join(("study", _word(model), _word(data))))


def _word(text: str) -> str:
    # Unlike Path.exists, this is false for a text that can be no path.
    if os.path.exists(text):
        path = Path(text).resolve()
        text = path.stem if path.is_file() else path.name
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:40].strip("-.") or "given"


def _plan_only(model: str, data: str | None, folder: Path, given: dict[str, Any], output: Output) -> None:
    """What each method would get; a study that is not there yet is planned in a folder that does not stay."""
    from rich.text import Text

    from tunewise.study.compare import compare as run_compare
    from tunewise.study.store import Store

    with tempfile.TemporaryDirectory(prefix="tunewise-") as scratch:
        place = folder if (folder / STUDY).is_file() else Path(scratch) / folder.name
        run_compare(model, data, out=place, dry_run=True, **given)
        with Store.read(place) as store:
            plan: list[str] = store.get("plan")
    # The plan is among the sentences that were said, unless nothing was said.
    if output.json or output.quiet:
        output.result({"plan": plan}, human=Text("\n".join(plan)))


def _conclude(folder: Path, prefer: str | None) -> Study:
    """The study's results written anew; with another preference they are those of that choice."""
    from tunewise.study.store import Store
    from tunewise.study.study import conclude

    with Store.read(folder) as store:
        return conclude(store, prefer)


def _show(study: Study, output: Output) -> None:
    """The decision, the table, where everything is, and what can be done with it."""
    import shlex

    from .verdict import verdict_view

    if output.json:
        output.result(study.summary())
        return
    console = output.console
    console.width = console.width if console.is_terminal else NO_LIMIT
    console.print(verdict_view(study.findings, console.width))
    output.say(f"Report: {study.report}")
    best = study.folder / "best"
    if study.findings["choice"] is not None and (best / RUN).is_file():
        place = shlex.quote(str(best))
        output.say(f"The chosen adaptation is in {best}:")
        output.say(f"  tunewise predict {place} rows.csv")
        output.say(f"  tunewise merge {place} --out merged")
