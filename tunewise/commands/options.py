"""Options that several commands share: which rows, and how they go through the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from .console import Flag, Whole

__all__ = ["LOOP", "ROWS", "Loop", "Rows", "read_options"]


@Parameter(name="*")
@dataclass(frozen=True)
class Rows:
    """Where rows and answers are found."""

    task: Annotated[str | None, Parameter(help="Detected from the data if not given.")] = None
    train: Annotated[str | None, Parameter(help="File of the training rows.")] = None
    valid: Annotated[str | None, Parameter(help="File of the validation rows.")] = None
    text_column: Annotated[str | None, Parameter(help='Column of the text; "a,b" for pairs.')] = None
    label_column: Annotated[str | None, Parameter(help="Column of the answer.")] = None
    max_length: Annotated[Whole | None, Parameter(help="Longest row in tokens.")] = None
    image_size: Annotated[Whole | None, Parameter(help="Pixels along an edge of an image.")] = None
    skip_bad_rows: Annotated[Flag, Parameter(help="Leave out unreadable rows, counted.")] = False

    def given(self, command: str, data: str | None) -> dict[str, Any]:
        """As the functions take them. Raises `UserError` where there is nothing to train on."""
        from tunewise.core.errors import UserError

        if data is None and self.train is None:
            raise UserError(f"{command} needs DATA, or --train with a file of rows.")
        return dict(vars(self))


@Parameter(name="*")
@dataclass(frozen=True)
class Loop:
    """Sizes, precision, device, seed, and whatever else the loop can be told."""

    batch_size: Annotated[Whole | None, Parameter(help="Rows per optimizer step.")] = None
    dtype: Annotated[str | None, Parameter(help="float32, bfloat16 or float16.")] = None
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1, mps.")] = "auto"
    seed: Annotated[Whole, Parameter(help="Decides order, dropout and start values.")] = 0
    set_: Annotated[
        list[str] | None,
        Parameter(name="--set", negative="", help="name=value: another option of the loop; repeatable."),
    ] = None

    def given(self) -> dict[str, Any]:
        """As the functions take them: `--set` as `options`."""
        known = {name: value for name, value in vars(self).items() if name != "set_"}
        return {**known, "options": read_options(self.set_ or [])}


ROWS, LOOP = Rows(), Loop()


def read_options(given: list[str]) -> dict[str, Any]:
    """`name=value` pairs, values as in YAML (2e-5 is a number); UserError for one without `=`."""
    from tunewise.core.errors import UserError
    from tunewise.core.method import read_yaml

    found: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise UserError(f'--set takes name=value, not "{item}".')
        if name.strip() in found:
            raise UserError(f'--set names "{name.strip()}" twice.')
        found[name.strip().replace("-", "_")] = read_yaml(value, f"--set {item}")
    return found
