"""Every way of fine-tuning a pretrained model, as small composable parts.

`tune`, `predict` and `evaluate` do a whole run, `compare` tunes and measures many; `load`, `attach` and `restore`
work inside anyone's own loop; `methods` holds the catalog. Importing this package loads nothing heavy: each name
is fetched on first use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunewise.backbone import load
    from tunewise.core.adaptation import handles
    from tunewise.core.delta import Delta, P
    from tunewise.core.errors import RunError, UserError
    from tunewise.core.handle import Handle, attach, restore
    from tunewise.core.method import method
    from tunewise.core.part import Part
    from tunewise.core.recipe import Recipe
    from tunewise.inference.mixed import rows
    from tunewise.init.calibrate import calibrate
    from tunewise.interop.peft import read_peft, write_peft
    from tunewise.post.mix import mix
    from tunewise.study.compare import compare
    from tunewise.study.study import Study
    from tunewise.tune import evaluate, predict, tune

__all__ = [
    "Delta",
    "Handle",
    "P",
    "Part",
    "Recipe",
    "RunError",
    "Study",
    "UserError",
    "__version__",
    "attach",
    "calibrate",
    "compare",
    "evaluate",
    "handles",
    "load",
    "method",
    "methods",
    "mix",
    "predict",
    "read_peft",
    "restore",
    "rows",
    "tune",
    "write_peft",
]

__version__ = "0.1.0"

_HOME = {
    "Delta": "core.delta",
    "Handle": "core.handle",
    "P": "core.delta",
    "Part": "core.part",
    "Recipe": "core.recipe",
    "RunError": "core.errors",
    "Study": "study.study",
    "UserError": "core.errors",
    "attach": "core.handle",
    "calibrate": "init.calibrate",
    "compare": "study.compare",
    "evaluate": "tune",
    "handles": "core.adaptation",
    "load": "backbone",
    "method": "core.method",
    "mix": "post.mix",
    "predict": "tune",
    "read_peft": "interop.peft",
    "restore": "core.handle",
    "rows": "inference.mixed",
    "tune": "tune",
    "write_peft": "interop.peft",
}


class _Methods:
    """The catalog as attributes: `methods.lora(rank=8)` is a recipe; `list(methods)` are all names."""

    def __getattr__(self, name: str) -> Any:
        from tunewise.core.errors import UserError
        from tunewise.core.method import get_method

        try:
            return get_method(name)
        except UserError as error:
            raise AttributeError(str(error)) from None

    def __dir__(self) -> list[str]:
        return list(self)

    def __iter__(self) -> Iterator[str]:
        from tunewise.core.method import method_names

        return iter(method_names())


methods = _Methods()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The function `tune` has the name of the module it lives in; importing that module must not hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
