"""What every command shares: `--json` and `--quiet`, sentences to the user, tables, and the result itself."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Flag", "Output", "Whole", "number", "settings", "table"]

Flag = Annotated[bool, Parameter(negative="", show_default=False)]


def _whole(_: Any, tokens: Sequence[Any]) -> int:
    """Strict: 2.5 is refused, where rounding it would run something else than was asked for."""
    return int(tokens[0].value)


Whole = Annotated[int, Parameter(converter=_whole)]


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """Where results and sentences go."""

    json: Annotated[Flag, Parameter(help="Print the result as JSON and nothing else.")] = False
    quiet: Annotated[Flag, Parameter(name=["--quiet", "-q"], help="No sentences, no bars.")] = False

    @property
    def console(self) -> Console:
        """Results on stdout; under `--json`, stdout is for the JSON alone."""
        from rich.console import Console

        return Console(stderr=self.json, highlight=False, soft_wrap=not sys.stdout.isatty())

    @property
    def progress(self) -> bool:
        return not self.quiet

    def say(self, sentence: str) -> None:
        """One sentence for the user, unless quiet."""
        if not self.quiet:
            self.console.print(sentence, markup=False)

    def result(self, value: Any, *, human: Any = None) -> None:
        """The result: JSON under `--json`, else `human` (printable by rich), else `name  value` lines."""
        if self.json:
            print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))
        elif human is not None:
            self.console.print(human)
        else:
            self.console.print(settings(value))


def _plain(value: Any) -> Any:
    """JSON has no NaN, so that a reader in any language can read it: NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def number(value: Any) -> str:
    """Numbers as people read them: 1,234 for counts, four digits for measures."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> Any:
    """A rich table; numbers stand on the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(r[index], (int, float, type(None))) for r in rows)
        made.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(number(cell)) for cell in row))
    return made


def settings(values: Mapping[str, Any]) -> Any:
    """`name  value` lines."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    for name, value in values.items():
        shown = ", ".join(map(number, value)) if isinstance(value, (list, tuple)) else number(value)
        made.add_row(Text(name), Text(shown))
    return made
