"""A study that has ended, or how far it came: its table, its front, the chosen adaptation, its report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tunewise.core.checkpoint import write_json
from tunewise.core.errors import UserError
from tunewise.study.store import Store

__all__ = ["Study", "conclude"]


class Study:
    """with a folder that `compare` wrote: `table` and `front` are DataFrames, one row per method, best first.

    decision  sentences, the decision itself first
    best      the chosen run, as `tune` gives it: predict, evaluate, model, handle
    """

    def __init__(self, folder: str | Path, found: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self._found = found

    @property
    def findings(self) -> dict[str, Any]:
        """Everything that the report shows, JSON-ready."""
        if self._found is None:
            from tunewise.study.judge.findings import findings

            with Store.read(self.folder) as store:
                self._found = findings(store)
        return self._found

    @property
    def table(self) -> Any:
        """One flat row per method and baseline: quality with its interval, costs, tests, settings."""
        from tunewise.study.judge.findings import table

        return table(self.findings)

    @property
    def front(self) -> Any:
        """The rows that no other row beats in everything."""
        found = self.table
        return found[found["front"].astype(bool)] if "front" in found else found

    @property
    def decision(self) -> list[str]:
        """What was found, in sentences."""
        return list(self.findings["decision"])

    @property
    def report(self) -> Path:
        """The page about it all."""
        return self.folder / "report.html"

    @property
    def trials(self) -> Any:
        """Every trial, failed ones too, as a DataFrame."""
        with Store.read(self.folder) as store:
            return store.table()

    @property
    def best(self) -> Any:
        """The chosen run with its finished adaptation. Raises `UserError` where nothing that was tuned was chosen."""
        from tunewise.afterwards import Result

        if not (self.folder / "best" / "run.json").is_file():
            raise UserError(f"{self.folder} has no finished adaptation: {self.decision[0]}")
        return Result.open(self.folder / "best")

    def summary(self) -> dict[str, Any]:
        """JSON-ready: where it is, what was decided, the table."""
        return {
            "directory": str(self.folder),
            "report": str(self.report),
            "best": str(self.folder / "best") if (self.folder / "best").is_dir() else None,
            **{key: self.findings[key] for key in ("decision", "choice", "rows", "failed", "notes", "spent")},
        }


def conclude(store: Store, prefer: str | None = None) -> Study:
    """Findings, `best/`, `findings.json`, `table.parquet` and `report.html` from what is in the store.

    prefer  chooses anew on the front; None: as the study was told
    """
    from tunewise.study.judge.findings import findings, table
    from tunewise.study.report.study_report import write_study_report
    from tunewise.study.tables import write_parquet

    found = findings(store, prefer=prefer)
    place, best = (found["choice"] or {}).get("directory"), store.folder / "best"
    if place and (store.inside(place) / "run.json").is_file():
        _copy_best(store.inside(place), best)
    elif best.exists():
        shutil.rmtree(best)  # of an earlier choice
    write_json(store.folder / "findings.json", found)
    write_parquet(table(found), store.folder / "table.parquet")
    write_study_report(store.folder / "report.html", found)
    return Study(store.folder, found)


def _copy_best(source: Path, target: Path) -> None:
    """The run without its checkpoints, put in place whole."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part, ignore=shutil.ignore_patterns("checkpoints", "test.parquet"))
    if target.exists():
        shutil.rmtree(target)
    part.rename(target)
