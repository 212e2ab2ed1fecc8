"""Which columns are the text and the answer, and which task they make; every decision is said in a note."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunewise.core.errors import UserError, did_you_mean
from tunewise.data.image import is_picture_column
from tunewise.data.labels import is_free_text, is_missing, label_task, looks_like_label, require_numbers
from tunewise.data.source import Rows
from tunewise.data.table import Row, few, plural

__all__ = ["Columns", "detect_columns", "usable_rows"]

# In each tuple an earlier group wins over a later one; two names of one group are equally good.
TEXT_NAMES = (
    ("text", "sentence"),
    (
        "review",
        "content",
        "sequence",
        "tweet",
        "comment",
        "body",
        "document",
        "article",
        "passage",
        "utterance",
    ),
    ("question", "query", "prompt"),
    ("title",),
)
PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("text1", "text2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("query", "passage"),
)
LABEL_NAMES = (
    ("label", "labels"),
    ("target", "class", "category"),
    ("score", "rating"),
    ("sentiment", "stars"),
)
# Text columns and the answer; a column in brackets may be absent or empty.
GENERATION_NAMES = (
    (("prompt",), "completion"),
    (("prompt",), "response"),
    (("question",), "answer"),
    (("instruction", "[input]"), "output"),
    (("instruction", "[context]"), "response"),
    (("instruction", "[input]"), "response"),
)
GENERATION = ("causal", "seq2seq")
UNLABELLED = ("causal", "seq2seq", "masked")
IMAGES = "image_classification"
"""The task of rows whose input is an image."""


@dataclass(frozen=True)
class Columns:
    """Text columns (one or two) or one of images, the answer column (None: the text itself is learnt), the task."""

    text: tuple[str, ...]
    label: str | None
    task: str
    notes: list[str] = field(default_factory=list)
    optional: tuple[str, ...] = ()


def detect_columns(
    rows: Rows | Sequence[Row],
    *,
    task: str | None = None,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
) -> Columns:
    """What is given, then well-known names, then types (longest free text; few distinct values = label).

    `text_column` may be two names, or "a,b". UserError for a wrong name (with near ones), two equally good
    candidates, labels that are all equal, or labels that do not fit the task.
    """
    table = rows.rows if isinstance(rows, Rows) else list(rows)
    if not table:
        raise UserError("There are no rows to detect columns in.")
    named = [n for n in dict.fromkeys(n for row in table for n in row) if n != "id"]
    text = _given(text_column, named, "text")
    label = _given(label_column, named, "label")
    if label and label[0] in text:
        raise UserError(f'The column "{label[0]}" cannot be both text and label.')
    names = [n for n in named if n != "source_id"]
    notes = [
        f"{what}: {_quoted(given)} (as given)." for what, given in (("Text", text), ("Label", label)) if given
    ]
    text = text or _detect_images(table, [n for n in names if n not in label], task, notes)
    found = _generation(names, task, text, label, notes)
    if found is None:
        text = text or _detect_text(table, names, label, notes)
        if not label and task not in UNLABELLED:
            label = _detect_label(table, names, text, task, notes)
        found = Columns(text, label[0] if label else None, task or "", notes)
    pictured = task == IMAGES or any(is_picture_column(table, name) for name in found.text)
    found = (_image_task if pictured else _with_task)(table, found, task)
    unused = [n for n in names if n not in (*found.text, found.label)]
    if unused:
        found.notes.append(f"Not used: {plural(len(unused), 'column')} ({few(unused)}).")
    return found


def usable_rows(rows: Rows, columns: Columns, *, skip_bad_rows: bool = False) -> Rows:
    """The same source without rows that lack text or label: refused by number, or skipped, counted and noted."""
    required = [n for n in (*columns.text, columns.label) if n is not None and n not in columns.optional]
    bad: list[str] = []
    kept: dict[str, list[Row]] = {}
    for name, part in (rows.splits or {"": rows.rows}).items():
        kept[name] = []
        for number, row in enumerate(part, start=1):
            missing = next((column for column in required if is_missing(row.get(column))), None)
            if missing is None:
                kept[name].append(row)
            else:
                bad.append(f'{name} row {number}: no "{missing}"'.lstrip())
        if not kept[name]:
            raise UserError(
                f"No row is usable: all {len(part):,} {name} rows lack text or label ({few(bad)})."
            )
    if not bad:
        return rows
    if not skip_bad_rows:
        raise UserError(
            f"{plural(len(bad), 'row')} of {len(rows):,} without text or label ({few(bad)}). "
            "Mend them, or pass --skip-bad-rows to leave them out."
        )
    notes = [*rows.notes, f"Skipped {plural(len(bad), 'row')} without text or label ({few(bad)})."]
    left = [row for part in kept.values() for row in part]
    return replace(rows, rows=left, notes=notes, splits=kept if rows.splits else None)


def _given(chosen: str | Sequence[str] | None, names: list[str], what: str) -> tuple[str, ...]:
    if chosen is None:
        return ()
    if isinstance(chosen, str):
        chosen = [chosen] if chosen in names else [part.strip() for part in chosen.split(",")]
    for name in chosen:
        if name not in names:
            raise UserError(f'There is no column "{name}" for the {what}{did_you_mean(name, names)}')
    if not 1 <= len(chosen) <= (2 if what == "text" else 1):
        raise UserError(f"The {what} is {len(chosen)} columns ({few(chosen)}), expected one{_or_two(what)}.")
    return tuple(chosen)


def _or_two(what: str) -> str:
    return " or two" if what == "text" else ""


def _by_lower(names: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(name.lower(), name)
    return found


def _generation(
    names: list[str], task: str | None, text: tuple[str, ...], label: tuple[str, ...], notes: list[str]
) -> Columns | None:
    """Prompt and answer columns, or None when the data (or the user) means another task."""
    if task not in (None, *GENERATION) or text or label:
        return None
    known = _by_lower(names)
    if "messages" in known:
        notes.append(f'Text: "{known["messages"]}" (chat messages, by name).')
        return Columns((known["messages"],), None, task or "causal", notes)
    for wanted, answer in GENERATION_NAMES:
        required = [n for n in wanted if not n.startswith("[")]
        if answer in known and all(n in known for n in required):
            judged = next((known[n] for group in LABEL_NAMES[:1] for n in group if n in known), None)
            if task is None and judged is not None:
                raise UserError(
                    f'Both "{known[answer]}" and "{judged}" could be the answer: pass --task causal, '
                    f'or --label-column "{judged}" with --text-column.'
                )
            extra = [known[n.strip("[]")] for n in wanted if n.startswith("[") and n.strip("[]") in known]
            found = tuple([known[n] for n in required] + extra)
            notes.append(f'Prompt: {_quoted(found)}; answer: "{known[answer]}" (by name).')
            return Columns(found, known[answer], task or "causal", notes, tuple(extra))
    return None


def _quoted(names: Sequence[str]) -> str:
    return " and ".join(f'"{name}"' for name in names)


def _named(groups: Sequence[Sequence[str]], names: list[str], option: str) -> tuple[str, ...]:
    for group in groups:
        hits = [name for name in names if name.lower() in group]
        if len(hits) > 1:
            raise UserError(f"The columns {_quoted(hits)} are equally good: choose one with {option}.")
        if hits:
            return (hits[0],)
    return ()


def _detect_text(
    table: list[Row], names: list[str], label: tuple[str, ...], notes: list[str]
) -> tuple[str, ...]:
    free = [name for name in names if name not in label]
    known = _by_lower(free)
    for pair in PAIR_NAMES:
        if all(name in known for name in pair):
            found: tuple[str, ...] = tuple(known[name] for name in pair)
            notes.append(f"Text: {_quoted(found)} (a pair, by name).")
            return found
    found = _named(TEXT_NAMES, [n for n in free if is_free_text(table, n, 1)], "--text-column")
    if found:
        notes.append(f'Text: "{found[0]}" (by name).')
        return found
    lengths = {n: length for n in free if (length := is_free_text(table, n, 2))}
    ranked = sorted(lengths, key=lambda n: -lengths[n])
    if not ranked:
        raise UserError(
            f"No column holds free text (columns: {few(names, 12)}): choose one with --text-column."
        )
    if len(ranked) > 1 and lengths[ranked[1]] > lengths[ranked[0]] / 2:
        raise UserError(
            f"The columns {_quoted(ranked[:2])} could both be the text: choose one with --text-column "
            '(or both: "a,b").'
        )
    notes.append(
        f'Text: "{ranked[0]}" (the longest free text, {lengths[ranked[0]]:.0f} characters on average).'
    )
    return (ranked[0],)


def _detect_images(table: list[Row], names: list[str], task: str | None, notes: list[str]) -> tuple[str, ...]:
    """The column of images; none when the user means another task."""
    found = [name for name in names if is_picture_column(table, name)]
    if not found or task not in (None, "classification", IMAGES):
        return ()
    if len(found) > 1:
        raise UserError(f"The columns {_quoted(found)} all hold images: choose one with --text-column.")
    notes.append(f'Image: "{found[0]}" (the only column of images).')
    return (found[0],)


def _image_task(table: list[Row], found: Columns, task: str | None) -> Columns:
    """The same columns under the task of images; whole numbers are classes however many there are."""
    columns = _quoted(found.text)
    if not all(is_picture_column(table, name) for name in found.text):
        if task == IMAGES:
            raise UserError(f"The task {IMAGES} needs a column of images, and {columns} holds none.")
        raise UserError(f"The columns {columns} are an image and a text: choose one with --text-column.")
    if len(found.text) > 1 or task not in (None, "classification", IMAGES):
        what = f"the task {task}" if len(found.text) == 1 else "a pair of columns"
        raise UserError(f"{columns} holds images, and {what} does not take them: the task is {IMAGES}.")
    found = _with_task(table, found, "classification")
    values = {row.get(str(found.label)) for row in table if not is_missing(row.get(str(found.label)))}
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        raise UserError(f'The label column "{found.label}" holds fractions, and {IMAGES} needs classes.')
    found.notes.append(f"Task: {IMAGES} ({len(values):,} classes).")
    return replace(found, task=IMAGES)


def _detect_label(
    table: list[Row], names: list[str], text: tuple[str, ...], task: str | None, notes: list[str]
) -> tuple[str, ...]:
    free = [name for name in names if name not in text]
    if task == "regression":
        free = [name for name in free if looks_like_label(table, name, task)]
    found = _named(LABEL_NAMES, free, "--label-column")
    if found:
        others = [n for n in free if n != found[0] and any(n.lower() in group for group in LABEL_NAMES)]
        rival = f'; --label-column "{others[0]}" chooses the other candidate' if others else ""
        notes.append(f'Label: "{found[0]}" (by name{rival}).')
        return found
    likely = [n for n in free if looks_like_label(table, n, task)]
    if len(likely) == 1:
        notes.append(f'Label: "{likely[0]}" (the only column that looks like a label, by its values).')
        return (likely[0],)
    if likely:
        raise UserError(
            f"The columns {_quoted(likely[:3])} could be the label: choose one with --label-column."
        )
    end = f" (columns: {few(free, 12)})" if free else f' (there is only the column "{text[0]}")'
    if is_picture_column(table, text[0]):
        raise UserError(
            f"No column looks like a label{end}: choose one with --label-column; a folder has a sub-folder of "
            "images for each class."
        )
    raise UserError(
        f"No column looks like a label{end}: choose one with --label-column, or learn the text itself with "
        "--task causal."
    )


def _with_task(table: list[Row], found: Columns, task: str | None) -> Columns:
    if found.label is None or found.task in UNLABELLED:
        return found
    values: list[Any] = [row.get(found.label) for row in table]
    values = [value for value in values if not is_missing(value)]
    if not values:
        raise UserError(f'The label column "{found.label}" is empty in every row.')
    if all(value == values[0] for value in values):
        raise UserError(
            f'The label column "{found.label}" has the same value {values[0]!r} in all {plural(len(values), "row")}: '
            "there is nothing to learn."
        )
    if task == "regression":
        require_numbers(values, found.label)
    if task is None:
        task, reason = label_task(values, found.label)
        found.notes.append(f"Task: {task} ({reason}); --task chooses another.")
    return Columns(found.text, found.label, task, found.notes, found.optional)
