"""`tunewise check`: what the data are, before anything is trained on them."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from cyclopts import Parameter

from .console import Flag, Output, settings

__all__ = ["check"]

QUIET = Output()
CLASSES_SHOWN = 20
ROWS_MEASURED = 1000
IMAGES = "image_classification"


def check(
    data: Annotated[str, Parameter(help="A file, a folder, a demo name or a datasets id.")],
    /,
    *,
    model: Annotated[str | None, Parameter(help="Count the tokens of this model too.")] = None,
    task: Annotated[str | None, Parameter(help="Detected from the data if not given.")] = None,
    text_column: Annotated[str | None, Parameter(help='Column of the text; "a,b" for pairs.')] = None,
    label_column: Annotated[str | None, Parameter(help="Column of the answer.")] = None,
    skip_bad_rows: Annotated[Flag, Parameter(help="Leave out unreadable rows, counted.")] = False,
    output: Output = QUIET,
) -> None:
    """Check DATA before training: rows, columns, splits, classes, sizes of images; with --model lengths in tokens."""
    from tunewise.data import detect_columns, read_rows, split_rows, usable_rows

    rows = read_rows(data, skip_bad_rows=skip_bad_rows)
    columns = detect_columns(rows, task=task, text_column=text_column, label_column=label_column)
    rows = usable_rows(rows, columns, skip_bad_rows=skip_bad_rows)
    splits = split_rows(rows, columns)
    for note in dict.fromkeys([*rows.notes, *columns.notes, *splits.notes]):
        output.say(note)
    found: dict[str, Any] = {
        "name": rows.name,
        "sha256": rows.sha256,
        "rows": len(rows),
        "task": columns.task,
        "text": list(columns.text),
        "label": columns.label,
        **{name: len(part) for name, part in splits.items()},
    }
    human = {"image" if k == "text" and columns.task == IMAGES else k: v for k, v in found.items()}
    if columns.task.endswith("classification") and columns.label is not None:
        counts = Counter(str(row.get(columns.label)) for row in rows.rows)
        found["classes"] = dict(counts.most_common())
        shown = [f"{name} {count:,}" for name, count in counts.most_common(CLASSES_SHOWN)]
        human["classes"] = ", ".join(shown) + (", ..." if len(counts) > CLASSES_SHOWN else "")
    if columns.task == IMAGES:
        found["pixels"] = human["pixels"] = _pixels(splits.train[:ROWS_MEASURED], columns.text[0])
    elif model is not None:
        found["tokens"] = human["tokens"] = _tokens(model, splits.train[:ROWS_MEASURED], columns.text)
        human["tokens"] = ", ".join(f"{k} {v}" for k, v in found["tokens"].items())
    output.result(found, human=settings(human))


def _pixels(rows: list[dict[str, Any]], name: str) -> str:
    """The smallest and the largest of these images, by area."""
    sizes = sorted({row[name].size for row in rows}, key=lambda size: (size[0] * size[1], size))
    shown = [f"{width} x {height}" for width, height in dict.fromkeys((sizes[0], sizes[-1]))]
    return " to ".join(shown)


def _tokens(model: str, rows: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, int]:
    """Median, 95th percentile and longest number of tokens of these rows."""
    from tunewise.backbone import load

    _, tokenizer = load(model, auto="base", meta=True)
    texts = ["\n".join(str(row.get(name, "")) for name in names) for row in rows]
    lengths = sorted(len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"])
    last = len(lengths) - 1
    return {"median": lengths[last // 2], "95 %": lengths[round(last * 0.95)], "longest": lengths[last]}
