"""What a comparison found, for the terminal: the decision, a table that fits, what failed and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["verdict_view"]

Row = Mapping[str, Any]
LONGEST = 28
# What a narrow terminal lets go first; the report shows all of them.
DISPENSABLE = ("inference", "forgetting", "seeds", "on disk", "trainable", "lr", "time", "memory", "interval")


def verdict_view(found: Mapping[str, Any], width: int) -> Any:
    """Printable by rich on a terminal of this width."""
    from rich.console import Group
    from rich.text import Text

    first, *more = found["decision"]
    shown: list[Any] = [Text(first, style="bold"), *(Text(sentence) for sentence in more)]
    if found["rows"]:
        columns = _columns(found["rows"], found["metric"])
        left = _fitting(columns, width)
        shown.append(_table(left, found))
        hidden = [name for name in columns if name not in left]
        if hidden:
            shown.append(Text(f"In the report as well: {', '.join(hidden)}.", style="dim"))
    shown += [Text(sentence) for sentence in _failures(found.get("failed") or ())]
    return Group(*shown)


def _columns(rows: Sequence[Row], metric: str) -> dict[str, list[str]]:
    """Title -> cells; columns without any value are left out."""
    from tunewise.study.report.cells import amount, duration, interval, megabytes, score

    def cells(key: str, write: Callable[[Any], str]) -> list[str]:
        return ["" if row.get(key) is None else write(row[key]) for row in rows]

    # While nothing is decided the rows are ordered by the validation score, which baselines do not have.
    plain = metric.removeprefix("valid/")
    found = {
        "method": [str(row["method"]) for row in rows],
        metric: cells(metric, score),
        plain: cells(plain, score),
        "interval": [interval(row, plain) for row in rows],
        "front": ["yes" if row.get("front") else "" for row in rows],
        "seeds": cells("seeds", str),
        "lr": cells("lr", lambda v: f"{v:g}"),
        "memory": cells("peak_memory_mb", megabytes),
        "time": cells("seconds", duration),
        "trainable": cells("trainable", amount),
        "on disk": cells("size_mb", megabytes),
        "inference": cells("inference_seconds", lambda v: f"{v:.3g} s" if v >= 1e-3 else "< 1 ms"),
        "forgetting": cells("forgetting", lambda v: f"{v:.3f}"),
    }
    return {title: column for title, column in found.items() if any(column)}


def _widths(columns: Mapping[str, Sequence[str]]) -> int:
    """Characters of a table with two blanks between its columns."""
    from rich.cells import cell_len

    widest = {title: max(map(cell_len, (title, *cells))) for title, cells in columns.items()}
    widest["method"] = min(LONGEST, widest["method"])
    return sum(widest.values()) + 2 * (len(widest) - 1)


def _fitting(columns: Mapping[str, list[str]], width: int) -> dict[str, list[str]]:
    left = dict(columns)
    for title in DISPENSABLE:
        if _widths(left) <= width:
            break
        left.pop(title, None)
    return left


def _table(columns: Mapping[str, Sequence[str]], found: Mapping[str, Any]) -> Any:
    """The chosen row is bold; those are dim that another row beats in everything."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    chosen = (found["choice"] or {}).get("method")
    dims = any(row.get("front") for row in found["rows"])
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in columns:
        left = title in ("method", "front", "interval")
        made.add_column(
            title, justify="left" if left else "right", no_wrap=title != "method", overflow="fold"
        )
    for row, *cells in zip(found["rows"], *columns.values(), strict=True):
        style = "bold" if row["method"] == chosen else "dim" if dims and not row.get("front") else ""
        made.add_row(*(Text(cell) for cell in cells), style=style)
    return made


def _failures(failed: Sequence[Row]) -> list[str]:
    """One line per failed trial."""
    said = []
    for row in failed:
        rate = "" if row.get("lr") is None else f" at lr {row['lr']:g}"
        seed = f", seed {row['seed']}" if row.get("seed") else ""
        said.append(f"Failed: {row['method']}{rate}{seed}: {' '.join(str(row['reason']).split())}")
    return said
