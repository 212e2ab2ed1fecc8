"""Where a model name leads: an existing folder, then a demo model, then a Hugging Face id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewise.assets import ALIASES, MODELS, model_path
from tunewise.core.errors import UserError, did_you_mean

__all__ = ["Source", "fetch", "find_source"]

INDEX = "model.safetensors.index.json"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SECONDS = 10
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` gets: a folder or hub id, and whether the network is left alone."""

    name: str
    place: str
    local: bool


def find_source(
    name: str | Path, *, weights: bool = True, note: Callable[[str], None] | None = None
) -> Source:
    """An existing path wins, then demo names (`demo:minilm` forces one), then hub ids (local cache first).

    Raises `UserError` for a folder that holds no model, an unknown name (with near ones), or no connection.
    """
    text = os.fspath(name) if isinstance(name, (str, Path)) else ""
    if not text:
        raise UserError(f"A model is named by a folder, a demo name or a hub id, not by {name!r}.")
    if text.startswith("demo:"):
        return Source(text, str(model_path(text, note)), True)
    path = Path(text).expanduser()
    if path.exists():
        return Source(text, str(_checked_folder(path)), True)
    if isinstance(name, Path) or text[0] in "./~" or "\\" in text or os.path.isabs(text):
        raise UserError(f'The model folder "{text}" does not exist.')
    if text in MODELS or text in ALIASES:
        return Source(text, str(model_path(text, note)), True)
    if not HUB_ID.fullmatch(text):
        raise UserError(
            f'"{text}" is no model: expected a folder, a demo name or a hub id{did_you_mean(text, MODELS)}'
        )
    if not _cached(text, weights):
        _ask_hub(text)
        return Source(text, text, False)
    return Source(text, text, True)


def fetch(name: str | Path, note: Callable[[str], None] | None = None) -> None:
    """Brings the files of a model onto this machine, once; what is there stays. Raises `UserError` as `find_source`."""
    source = find_source(name, note=note)
    if not source.local:
        from huggingface_hub import snapshot_download

        if note is not None:
            note(f'Fetching "{source.name}" from the hub.')
        snapshot_download(source.place, allow_patterns=list(FILES))


def _checked_folder(path: Path) -> Path:
    hint = f' To get the demo model, write "demo:{path.name}".' if path.name in MODELS else ""
    if not path.is_dir():
        raise UserError(
            f'"{path}" is a file: expected a model folder with config.json and model.safetensors.{hint}'
        )
    if not (path / "config.json").is_file():
        other = ""
        if (path / "run.json").is_file() or (path / "adaptation.json").is_file():
            other = " It holds a Tunewise run: load the base model, then tw.restore(model, folder)."
        elif (path / "adapter_config.json").is_file():
            other = " It holds a PEFT adapter, not a whole model."
        raise UserError(f'"{path}" is no model folder: config.json is missing.{other}{hint}')
    if (path / INDEX).is_file():
        for shard in _shards(path / INDEX):
            if Path(shard).name != shard:
                raise UserError(f'"{path / INDEX}" names a file outside its folder: "{shard}".')
    return path


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f'"{index}" is no index of weight files.') from error


def _cached(name: str, weights: bool) -> bool:
    from huggingface_hub import try_to_load_from_cache

    def there(file: str) -> Any:
        found = try_to_load_from_cache(name, file)
        return found if isinstance(found, str) else None

    if not there("config.json"):
        return False
    if not weights or there("model.safetensors"):
        return True
    index = there(INDEX)
    return bool(index) and all(there(shard) for shard in _shards(Path(index)))


def _ask_hub(name: str) -> None:
    """One short question first: `from_pretrained` retries for half a minute when there is no network."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    unknown = f'"{name}" is no folder and no demo model'
    try:
        model_info(name, timeout=SECONDS)
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{unknown}, and the hub has no such model{did_you_mean(name, MODELS)}") from None
    except HfHubHTTPError as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(
            f"{unknown}, and the hub does not give it ({reason}){did_you_mean(name, MODELS)}"
        ) from error
    except Exception as error:  # each version of the hub's client raises connection errors of another library
        reason = type(error).__name__
        raise UserError(
            f"{unknown}, it is not in the local Hugging Face cache, and the hub cannot be reached "
            f"({reason}){did_you_mean(name, MODELS)}"
        ) from error
