"""Data sets of the Hugging Face hub, the last place where a name of data is looked for."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from tunewise.assets import DATA
from tunewise.core.errors import UserError, did_you_mean, nearest
from tunewise.data.objects import from_datasets
from tunewise.data.table import Row

__all__ = ["load_hub"]


def load_hub(
    dataset: str, config: str | None, name: str
) -> tuple[list[Row] | dict[str, list[Row]], list[str]]:
    """(rows or named sets, notes) of a hub data set; UserError with near demo or file names if it cannot be
    had.
    """
    near = nearest(name, [path.name for path in Path().iterdir()])
    end = f'; did you mean the file "{near[0]}"?' if near else did_you_mean(name, DATA)
    start = f'"{name}" is no file and no demo data, and'
    if not _reachable():
        raise UserError(
            f"{start} the Hugging Face hub cannot be reached (set HF_HUB_OFFLINE=1 to use its cache){end}"
        )
    import datasets

    try:
        loaded = datasets.load_dataset(dataset, config)
    except Exception as problem:  # network libraries share no base class, and each reason is told
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{start} could not be loaded as a Hugging Face dataset ({reason}){end}") from problem
    _, rows, notes = from_datasets(
        loaded, f"Hugging Face dataset {name}", Path(datasets.config.HF_CACHE_HOME)
    )
    return rows, notes


def _reachable() -> bool:
    """False if the hub's host has no address: asking first spares half a minute of retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies().get("https"):
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
