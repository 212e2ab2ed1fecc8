"""What a study says about itself: the facts that findings, report and commands are made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunewise.prepare import Data
from tunewise.study.budget import show_time
from tunewise.study.setup import Machine
from tunewise.study.store import Store

__all__ = ["write_facts"]


def write_facts(
    store: Store,
    identity: dict[str, Any],
    rows: Data,
    prefer: str,
    machine: Machine,
    known: tuple[Any, Any],
    asked: Mapping[str, Any],
    general: Any = None,
) -> None:
    """What the findings need to know; model and data are None where no command line could name them.

    known  model and data as they were given; `asked`: further arguments that a command line has to name
    """
    from tunewise.machine import environment

    options = {key: value for key, value in asked.items() if value is not None and value is not False}
    settings = identity["settings"]
    own = store.folder.name.startswith("tunewise-study-")
    plain = (str, Path)
    nameable = all(isinstance(value, (*plain, bool, int, list, tuple)) for value in options.values())
    generated = getattr(rows.task, "generation_metric", None)
    facts = {
        "model": str(known[0]) if known[0] is not None and nameable else None,
        "data": str(known[1]) if isinstance(known[1], plain) and nameable else None,
        "title": f"{identity['model']} on {rows.name}",
        "options": {key: str(v) if isinstance(v, Path) else v for key, v in options.items()}
        if nameable
        else {},
        "task": rows.task.name,
        "metric": generated or rows.task.metric,
        "higher_is_better": True if generated else rows.task.higher_is_better,
        "custom_metric": rows.task.custom is not None,
        "labels": getattr(rows.task, "labels", None),
        "budget": identity["budget"],
        "memory": identity["memory"],
        "methods": identity["methods"],
        "seeds": identity["seeds"],
        "prefer": prefer,
        "general": str(general) if isinstance(general, plain) else None,
        "rows": {name: len(part) for name, part in rows.splits.items()},
        "batch_size": settings["batch_size"],
        "settings": settings,
        "workers": machine.workers,
        "threads": machine.threads,
        "environment": environment(machine.device),
    }
    if facts["model"] is not None and facts["data"] is not None:
        facts["command"] = _command(facts, identity, None if own else store.folder)
    store.set("facts", facts)
    notes = list(rows.notes)
    if not rows.splits.test:
        notes.append(
            "There are no test rows: quality is measured on the validation rows, by which the settings were chosen, "
            "and is too high by that."
        )
    store.set("notes", notes)


def _command(facts: dict[str, Any], identity: dict[str, Any], out: Path | None) -> str | None:
    """The command line of this study; None where it holds what only Python can give."""
    import shlex

    if identity["trials"] is not None:
        return None
    words = ["tunewise", "compare", facts["model"], facts["data"], "--methods", ",".join(facts["methods"])]
    words += ["--budget", show_time(facts["budget"]), "--seeds", str(facts["seeds"])]
    given = {**facts["options"], "prefer": facts["prefer"], "general": facts["general"], "out": out}
    given |= {"seed": identity["seed"] or None, "memory": f"{facts['memory']}B" if facts["memory"] else None}
    for key, value in given.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            words += [f"--{key.replace('_', '-')}", *([] if value is True else [text])]
    for key, value in facts["settings"].items():
        words += ["--set", f"{key}={value}"]
    return shlex.join(words)
