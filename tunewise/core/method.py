"""Methods are named recipes: `@method`, the catalog, and the reader of `lora(rank=8) + lisa` and YAML."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .errors import UserError, did_you_mean
from .part import Part, part_class
from .reader import literal, parse, source_of
from .recipe import Recipe

__all__ = ["PEFT_SPELLINGS", "Method", "get_method", "method", "method_names", "read_recipe", "read_yaml"]

PEFT_SPELLINGS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "sites",
    "num_virtual_tokens": "tokens",
    "init_lora_weights": "init",
    "use_rslora": "scaling",
    "use_dora": "--method dora",
    "vera_dropout": "dropout",
    "miss_dropout": "dropout",
    "projection_prng_key": "seed",
    "random_loc_seed": "seed",
    "random_seed": "seed",
    "n_frequency": "frequencies",
    "scaling": "scale",
    "oft_block_size": "block_size",
    "num_cayley_neumann_terms": "terms",
    "use_cayley_neumann": "terms",
    "decompose_factor": "factor",
    "feedforward_modules": "inputs",
    "mini_r": "mini",
    "init_weights": "variant",
    "learning_rate": "--lr",
    "num_train_epochs": "--epochs",
    "max_steps": "--steps",
    "per_device_train_batch_size": "--batch-size",
    "output_dir": "--out",
    "task_type": "--task",
}
_defined: dict[str, Method] = {}


class Method:
    """A function that composes parts, with the facts that the catalog shows about it."""

    def __init__(self, make: Callable[..., Recipe], name: str, facts: dict[str, Any]) -> None:
        self.make, self.name, self.facts = make, name, facts
        self.signature = inspect.signature(make)
        self.doc = inspect.getdoc(make) or ""
        self.formula = self.doc.split("\n", 1)[0]
        self.area = (
            make.__module__.split(".")[-2] if make.__module__.startswith("tunewise.catalog") else "yours"
        )
        self.lr: tuple[float, ...] = tuple(facts.get("lr", ()))

    def __call__(self, *args: Any, **options: Any) -> Recipe:
        for key in options:
            if key not in self.signature.parameters:
                raise UserError(self._unknown(key))
        try:
            bound = self.signature.bind(*args, **options)
        except TypeError as error:
            raise UserError(f"{self.name}: {error}.") from None
        recipe = self.make(*bound.args, **bound.kwargs)
        shown = ", ".join(f"{k}={v!r}" for k, v in bound.arguments.items())
        recipe.name = f"{self.name}({shown})" if shown else self.name
        recipe.lr = self.lr
        return recipe

    def __add__(self, other: object) -> Recipe:
        return self() + (other() if isinstance(other, Method) else other)

    def __radd__(self, other: Any) -> Recipe:
        return other + self()  # type: ignore[no-any-return]

    def _unknown(self, key: str) -> str:
        ours = PEFT_SPELLINGS.get(key)
        if ours and (ours.startswith("--") or ours in self.signature.parameters):
            return f'{self.name} has no option "{key}": here it is called "{ours}".'
        return f'{self.name} has no option "{key}"{did_you_mean(key, self.signature.parameters)}'


def method(name: str, **facts: Any) -> Callable[[Callable[..., Recipe]], Method]:
    """Registers a named recipe: `title`, `arxiv`, `lr=(low, default, high)`, `unverified` (what is our own
    reading).
    """

    def wrap(make: Callable[..., Recipe]) -> Method:
        made = Method(make, name, facts)
        _defined[name] = made
        return made

    return wrap


@cache
def _catalog_files() -> dict[str, str]:
    package = importlib.import_module("tunewise.catalog")
    found = {}
    for area in pkgutil.iter_modules(package.__path__):
        for path in package.__path__:
            for item in pkgutil.iter_modules([str(Path(path) / area.name)]):
                found[item.name] = f"tunewise.catalog.{area.name}.{item.name}"
    return found


def method_names() -> list[str]:
    """Names of all methods: catalog, installed plug-ins (entry points `tunewise.methods`), and yours. Imports
    none.
    """
    plugged = {e.name for e in entry_points(group="tunewise.methods")}
    return sorted({*_catalog_files(), *plugged, *_defined})


def get_method(name: str) -> Method:
    """The method of this name; raises `UserError` with the nearest right spelling."""
    if name not in _defined and name in _catalog_files():
        importlib.import_module(_catalog_files()[name])
    for entry in entry_points(group="tunewise.methods") if name not in _defined else ():
        if entry.name == name:
            _defined[name] = entry.load()
    if name not in _defined:
        raise UserError(f'There is no method "{name}"{did_you_mean(name, method_names())}')
    return _defined[name]


def _from_file(spec: str) -> Method:
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"The file {file} of the method {spec} does not exist.")
    module_name = f"tunewise_user_{path.stem}_{abs(hash(path.resolve()))}"
    if module_name not in sys.modules:
        loaded = importlib.util.spec_from_file_location(module_name, path)
        assert loaded is not None and loaded.loader is not None
        module = importlib.util.module_from_spec(loaded)
        sys.modules[module_name] = module
        loaded.loader.exec_module(module)
    found = getattr(sys.modules[module_name], name, None)
    if not isinstance(found, Method):
        names = [n for n, v in vars(sys.modules[module_name]).items() if isinstance(v, Method)]
        raise UserError(f'{file} defines no method "{name}"{did_you_mean(name, names)}')
    return found


def _named(name: str) -> Method:
    return _from_file(name) if ".py:" in name else get_method(name)


def _options(node: ast.Call, owner: str) -> tuple[list[Any], dict[str, Any]]:
    def value(item: ast.expr) -> Any:
        if isinstance(item, ast.Call) or (
            isinstance(item, ast.Name) and item.id[:1].isupper() and item.id not in ("True", "False", "None")
        ):
            return _part(item)
        if isinstance(item, ast.List):
            return [value(one) for one in item.elts]
        return literal(item, f"option of {owner}")

    for keyword in node.keywords:
        if keyword.arg is None:
            raise UserError(f"{owner}(...) takes options written as name=value, not **.")
    return [value(a) for a in node.args], {str(k.arg): value(k.value) for k in node.keywords}


def _part(node: ast.expr) -> Part:
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name):
        raise UserError(f"{source_of(node)} is not a part or a method.")
    args, options = _options(node, name.id) if isinstance(node, ast.Call) else ([], {})
    return part_class(name.id)(*args, **options)


def _build(node: ast.expr) -> Recipe:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _build(node.left) + _build(node.right)
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name):
        raise UserError(f'"{source_of(node)}" is not a method; write for example lora(rank=8) + lisa.')
    if name.id[:1].isupper():
        part = _part(node)
        return Recipe.of(part, source_of(node))
    made = _named(name.id)
    args, options = _options(node, name.id) if isinstance(node, ast.Call) else ([], {})
    return made(*args, **options)


def read_yaml(text: str, what: str) -> Any:
    """YAML in which 2e-5 is a number, as everybody expects; only plain data, no tags."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    number = re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}.") from None


def _entries(item: Any, where: str) -> Iterator[Recipe]:
    if isinstance(item, str):
        yield _build(parse(item, "method"))
    elif isinstance(item, list):
        for one in item:
            yield from _entries(one, where)
    elif isinstance(item, dict):
        if "method" in item:
            name, options = item["method"], {k: v for k, v in item.items() if k != "method"}
            yield _named(name)(**options) if options else read_recipe(name)
            return
        for name, options in item.items():
            if options is not None and not isinstance(options, dict):
                raise UserError(f"{where}: the options of {name} must be a mapping, not {options!r}.")
            yield _named(str(name))(**(options or {}))
    else:
        raise UserError(
            f"{where}: expected a method, a mapping of methods to options, or a list, not {item!r}."
        )


def read_recipe(given: Any) -> Recipe:
    """The recipe in a string (`lora(rank=8) + lisa`, `./mine.py:hira`), a YAML file, a Recipe, Method, Part
    or list.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Method):
        return given()
    if isinstance(given, Part):
        return Recipe.of(given)
    where = "The method"
    if isinstance(given, (str, Path)) and str(given).endswith((".yaml", ".yml")):
        if not Path(given).is_file():
            raise UserError(f"The recipe file {given} does not exist.")
        where, given = str(given), read_yaml(Path(given).read_text(), str(given))
    recipes = list(_entries(given, where))
    if not recipes:
        raise UserError(f"{where} is empty; name a method such as lora.")
    total = recipes[0]
    for recipe in recipes[1:]:
        total = total + recipe
    return total
