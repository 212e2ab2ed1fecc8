"""A part is one mechanism with its hyperparameters; it fills exactly one slot of a recipe."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pkgutil
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic import dataclasses as pydantic_dataclasses

from .errors import UserError, did_you_mean

if TYPE_CHECKING:
    from .run import Run

__all__ = [
    "EVENTS",
    "LIST_SLOTS",
    "SLOTS",
    "STAGES",
    "TAGS",
    "Part",
    "build_part",
    "describe_part",
    "nested",
    "overrides",
    "part_class",
]

SLOTS: tuple[str, ...] = ("backbone", "delta", "allocate", "head", "objective", "data", "optimizer", "loop")
SLOTS += ("post", "inference", "diagnose")
LIST_SLOTS = frozenset({"delta", "head", "objective", "data", "post", "inference", "diagnose"})
TAGS: tuple[str, ...] = (
    "direction",
    "magnitude",
    "singular",
    "gate",
    "mask",
    "mix",
    "scale",
    "router",
    "prompt",
    "head",
)
TAGS += ("weight", "bias")
EVENTS = ("prepare", "select", "before_step", "gradients", "after_step", "boundary", "finish")
STAGES = ("private", "combine", "observe", "mask", "clip", "project", "rule")
ROOMS: tuple[str, ...] = (
    "backbone",
    "delta",
    "init",
    "allocate",
    "head",
    "objective",
    "data",
    "optim",
    "loop",
)
ROOMS += ("post", "inference", "diagnose")

_classes: dict[str, type[Part]] = {}
T = TypeVar("T", bound="Part")


@dataclass_transform()
class Part:
    """One mechanism: class fields are its hyperparameters, validated; methods named after events are called.

    Subclasses are dataclasses without being told so. Everything a part learns during a run goes into
    `self.state`, a dict of tensors, numbers, strings, lists and dicts that every checkpoint holds.

    Events (override what is needed; only the core calls them, also those of parts among the options):
    `prepare(run)`, `select(run, ids) -> ids`, `before_step(run)`, `gradients(run)`, `after_step(run)`,
    `boundary(run, kind)`, `finish(run)`.
    Raises `UserError` for a misspelt or ill-typed hyperparameter.
    """

    slot: ClassVar[str] = ""
    stage: ClassVar[str] = "observe"
    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, kind in cls.__dict__.get("__annotations__", {}).items():
            default = cls.__dict__.get(name)
            mutable = isinstance(default, (list, dict, Part)) and "ClassVar" not in str(kind)
            if mutable:  # every instance has its own
                setattr(cls, name, dataclasses.field(default_factory=partial(copy.deepcopy, default)))
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
        pydantic_dataclasses.dataclass(config=config)(cls)
        inner = cls.__init__

        def checked(self: Part, *args: Any, **values: Any) -> None:
            names = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
            for key in values:
                if key not in names:
                    raise UserError(f"{type(self).__name__} has no option {key!r}{did_you_mean(key, names)}")
            try:
                inner(self, *args, **values)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(p) for p in first["loc"][:1])
                place = names[int(where)] if where.isdigit() and int(where) < len(names) else where
                raise UserError(
                    f"{type(self).__name__}: {place}={first['input']!r} is not valid: {first['msg']}."
                ) from None

        checked.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
        cls.__init__ = checked  # type: ignore[method-assign,assignment]
        _classes[cls.__name__] = cls

    @property
    def state(self) -> dict[str, Any]:
        """What this part has learnt in the current run; checkpointed by the core."""
        found: dict[str, Any] = self.__dict__.setdefault("_state", {})
        return found

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self.__dict__["_state"] = value

    def prepare(self, run: Run) -> None:
        """Once per stage, before the first step: calibration."""

    def select(self, run: Run, ids: list[str]) -> list[str]:
        """Which rows of the effective batch are used; called before micro-batches are cut."""
        return ids

    def before_step(self, run: Run) -> None:
        """Before each optimizer step."""

    def gradients(self, run: Run) -> None:
        """After the last backward of the step: gradients are complete and unscaled. Ordered by `stage`."""

    def after_step(self, run: Run) -> None:
        """After each optimizer step."""

    def boundary(self, run: Run, kind: str) -> None:
        """At the end of an epoch, task, round or stage."""

    def finish(self, run: Run) -> None:
        """Once, after the last step."""


def overrides(part: Part, event: str) -> bool:
    """Whether the part's class defines this event itself."""
    return getattr(type(part), event) is not getattr(Part, event)


def nested(part: Part) -> list[Part]:
    """The part and the parts among its options, depth first: all that may hold state."""
    found = [part]
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        items = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, (list, tuple))
            else [value]
        )
        for item in items:
            if isinstance(item, Part):
                found += nested(item)
    return found


def part_class(name: str) -> type[Part]:
    """The class of a part by name; only Tunewise's rooms are imported to find it, never a path from a file."""
    if name not in _classes:
        for room in ROOMS:
            package = importlib.import_module(f"tunewise.{room}")
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{module.name}")
    if name not in _classes:
        raise UserError(
            f'No part is called "{name}"{did_you_mean(name, _classes)} '
            "A part of your own must be imported before it is named."
        )
    return _classes[name]


def describe_part(part: Part) -> dict[str, Any]:
    """`{"part": class name, option: value, ...}`, JSON-ready and readable by `build_part`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Part):
            return describe_part(value)
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise UserError(f"{type(part).__name__}: an option of type {type(value).__name__} cannot be saved.")

    fields = dataclasses.fields(part)  # type: ignore[arg-type]
    return {"part": type(part).__name__} | {f.name: plain(getattr(part, f.name)) for f in fields}


def build_part(described: dict[str, Any]) -> Part:
    """The part that `describe_part` described."""

    def value(item: Any) -> Any:
        if isinstance(item, dict) and "part" in item:
            return build_part(item)
        return [value(i) for i in item] if isinstance(item, list) else item

    return part_class(described["part"])(**{k: value(v) for k, v in described.items() if k != "part"})
