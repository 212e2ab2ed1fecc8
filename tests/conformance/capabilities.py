"""What the suite found each method to be able to do, as a file: `pytest tests/conformance --capabilities FILE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunewise.core.checkpoint import write_json
from tunewise.core.method import get_method, method_names

__all__ = ["Capabilities"]

NAME = "capability"
WORST = ("passed", "inexact", "refused", "failed")


class Capabilities:
    """{method: {check: {base: {"result", "said"?}}}} of one run of the suite.

    result   "passed"; "inexact" (an export that says by how much, in `said`); "refused" (in words, in `said`: the
             method cannot do it, or not on this base); "failed" (`said` is the first line of the error)
    Reports may come in any order and from several processes. A check with several cases has the worst result.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, dict[str, dict[str, dict[str, str]]]] = {}

    def add(self, report: Any) -> None:
        """Takes one report of pytest; a check that could not be run at all, for want of a package, is left out."""
        facts = dict(report.user_properties)
        if NAME not in facts or (report.when != "call" and not report.failed):
            return
        method, check, base = facts[NAME]
        result, said = "passed", ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            result, said = "failed", str(crash.message if crash else report.longrepr).splitlines()[0]
        elif report.skipped:
            result, said = "refused", report.longrepr[2].removeprefix("Skipped: ")
        else:
            result = next((r for r in ("refused", "inexact") if r in facts), "passed")
            said = facts.get(result, "")
        entry = {"result": result} | ({"said": said} if said else {})
        bases = self.found.setdefault(method, {}).setdefault(check, {})
        bases[base] = max(bases.get(base, entry), entry, key=_badness)

    def write(self) -> None:
        """The file, sorted. What an earlier run says about other checks stays, so that a part can be run again."""
        before = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        merged: dict[str, Any] = {}
        for name in (n for n in method_names() if get_method(n).area != "yours"):
            checks = {c: dict(b) for c, b in before.get(name, {}).items()}
            for check, bases in self.found.get(name, {}).items():
                checks[check] = checks.get(check, {}) | bases
            if checks:
                merged[name] = {c: dict(sorted(b.items())) for c, b in sorted(checks.items())}
        write_json(self.file, merged)


def _badness(entry: dict[str, str]) -> tuple[int, str]:
    return WORST.index(entry["result"]), entry.get("said", "")
