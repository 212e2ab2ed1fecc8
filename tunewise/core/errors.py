"""Errors that users see: one clear sentence each, with the nearest right spelling."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["RunError", "TunewiseError", "UserError", "did_you_mean", "nearest"]


class TunewiseError(Exception):
    """Base of all errors that Tunewise raises on purpose."""

    exit_code = 1


class UserError(TunewiseError, ValueError):
    """Bad input: names the file, row, key or module and what was expected (exit code 2)."""

    exit_code = 2


class RunError(TunewiseError, RuntimeError):
    """A run that started and could not finish, for example a loss that became NaN (exit code 1)."""


def nearest(word: str, options: Iterable[str], n: int = 3) -> list[str]:
    """Up to n options that are spelt like `word`, best first; case and separators do not count."""

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "").replace(" ", "")

    by_plain: dict[str, str] = {}
    for option in options:
        by_plain.setdefault(plain(option), option)
    return [by_plain[match] for match in get_close_matches(plain(word), by_plain, n=n, cutoff=0.55)]


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The end of an error sentence: `; did you mean "lora"?`, or all options if few, else nothing."""
    options = list(options)
    found = nearest(word, options)
    if found:
        return "; did you mean " + " or ".join(f'"{f}"' for f in found[:2]) + "?"
    if 0 < len(options) <= 12:
        return "; known: " + ", ".join(sorted(options)) + "."
    return "."
